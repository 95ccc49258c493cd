package main

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"sidewire/engine"
	"sidewire/engine/frame"
	"sidewire/engine/uplink"
)

// PortStatus is an interface's place on a switch.
type PortStatus struct {
	Name       string   `json:"name"`              // of the switch
	Network    string   `json:"network"`           // the definition: NAMESPACE/NAME
	VLAN       uint16   `json:"vlan,omitempty"`    // of untagged frames
	Trunk      []uint16 `json:"trunk,omitempty"`   // VLANs that pass tagged
	SpoofCheck bool     `json:"spoofCheck"`        // frames must come from the guest's own MAC
	Members    []string `json:"members,omitempty"` // the others
}

// SwitchStatus is one switch.
type SwitchStatus struct {
	Name      string              `json:"name"`
	NetNS     string              `json:"netns,omitempty"`
	Addresses int                 `json:"addresses"` // that it has learned
	Uplinks   []uplink.LinkStatus `json:"uplinks"`
	MACNAT    []MACNATStatus      `json:"macNAT,omitempty"`
	Members   []MemberStatus      `json:"members"`
}

// MemberStatus is one port of a switch.
type MemberStatus struct {
	Name string `json:"name"` // VMI/INTERFACE or uplink LINK
	engine.SwitchPortStats
}

func (l *lan) status() SwitchStatus {
	stats := l.sw.Stats()
	st := SwitchStatus{Name: l.name, NetNS: l.netns, Addresses: stats.Addresses, Uplinks: l.linkStatus(), MACNAT: l.macNATStatus()}
	for _, p := range stats.Ports {
		st.Members = append(st.Members, MemberStatus{l.portName(p.Port), p})
	}
	return st
}

// portName is how users name a port of the switch.
func (l *lan) portName(id frame.PortID) string {
	for _, n := range l.nics {
		if n.port == id {
			return n.name()
		}
	}
	for _, u := range l.ups {
		if u.port == id {
			return "uplink " + u.link
		}
	}
	return fmt.Sprint(id)
}

// StationStatus is an address that a switch knows.
type StationStatus struct {
	Switch string    `json:"switch"`
	MAC    frame.MAC `json:"mac"`
	VLAN   uint16    `json:"vlan"` // 0 is none
	Port   string    `json:"port"`
	Age    int       `json:"age_seconds"` // since it was last seen
	Static bool      `json:"static"`      // the guest's own, by spoof check
}

// FDB implements controller.
func (s *server) FDB() []StationStatus {
	out := []StationStatus{}
	_, lans := s.serving()
	for _, l := range lans {
		first := len(out)
		l.sw.FDB(func(e engine.FDBEntry) bool {
			out = append(out, StationStatus{
				Switch: l.name, MAC: e.MAC, VLAN: e.VLAN, Port: l.portName(e.Port), Age: int(e.Age / time.Second), Static: e.Own,
			})
			return true
		})
		slices.SortFunc(out[first:], func(a, b StationStatus) int {
			return cmp.Or(cmp.Compare(a.VLAN, b.VLAN), bytes.Compare(a.MAC[:], b.MAC[:]))
		})
	}
	return out
}

// fdbCommand shows what the switches have learned.
func fdbCommand(ctx context.Context, args []string, out, errw io.Writer) error {
	return show(ctx, "fdb", args, out, errw, printStations)
}

func printStations(out io.Writer, stations []StationStatus) error {
	w := tabwriter.NewWriter(out, 0, 4, 2, ' ', 0)
	fmt.Fprintln(w, "switch\tVLAN\taddress\tport\tseen")
	for _, st := range stations {
		vlan, seen := "-", fmt.Sprintf("%d s ago", st.Age)
		if st.VLAN != 0 {
			vlan = fmt.Sprint(st.VLAN)
		}
		if st.Static {
			seen = "static"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", st.Switch, vlan, st.MAC, st.Port, seen)
	}
	return w.Flush()
}

func (l *lan) linkStatus() []uplink.LinkStatus {
	if l.watch == nil {
		return []uplink.LinkStatus{}
	}
	return l.watch.Status()
}

func (n *lanNIC) status(*server) InterfaceStatus {
	st := n.nic.status()
	sw := n.nad().Switch
	st.MAC, st.MTU, st.Links = n.mac().String(), n.mtu(), n.lan.linkStatus()
	st.Switch = &PortStatus{Name: n.lan.name, Network: n.nad().Key(), SpoofCheck: sw.SpoofCheck}
	if !n.lan.cni {
		st.Switch.VLAN, st.Switch.Trunk = sw.VLAN, sw.Trunk
	}
	for _, o := range n.lan.nics {
		if o != n {
			st.Switch.Members = append(st.Switch.Members, o.name())
		}
	}
	if l := n.iface.Network.Lease; l != nil {
		st.Guest = l.Address.Addr()
		if l.Router {
			st.Gateway = l.Gateway
		}
	}
	return st
}

// printPort writes what status says of an interface on a switch.
func printPort(w io.Writer, i InterfaceStatus) {
	p := i.Switch
	fmt.Fprintf(w, "  switch\t%s by %s%s, spoof check %s\n", p.Name, p.Network, vlanText(p), onOff(p.SpoofCheck))
	fmt.Fprintf(w, "  with\t%s\n", orElse(strings.Join(p.Members, ", "), "nobody"))
	if len(i.Links) > 0 {
		fmt.Fprintf(w, "  uplinks\t%s\n", linkList(i.Links))
	}
	if i.Guest.IsValid() {
		fmt.Fprintf(w, "  address\t%s by DHCP\n", i.Guest)
	}
	printLeases(w, i)
}

func vlanText(p *PortStatus) (s string) {
	if p.VLAN != 0 {
		s = fmt.Sprintf(", VLAN %d", p.VLAN)
	}
	if len(p.Trunk) > 0 {
		s += ", tagged VLANs " + vlanRanges(p.Trunk)
	}
	return s
}

// vlanRanges is a list of VLANs in short.
func vlanRanges(ids []uint16) string {
	var out []string
	for i := 0; i < len(ids); {
		j := i
		for j+1 < len(ids) && ids[j+1] == ids[j]+1 {
			j++
		}
		if i == j {
			out = append(out, fmt.Sprint(ids[i]))
		} else {
			out = append(out, fmt.Sprintf("%d-%d", ids[i], ids[j]))
		}
		i = j + 1
	}
	return strings.Join(out, ",")
}

func onOff(b bool) string {
	if b {
		return "on"
	}
	return "off"
}

func printSwitch(w io.Writer, sw SwitchStatus) {
	fmt.Fprintf(w, "\nswitch %s\t%d addresses, uplinks %s\n", sw.Name, sw.Addresses, orElse(linkList(sw.Uplinks), "none"))
	for _, t := range sw.MACNAT {
		fmt.Fprintf(w, "  on %s\thardware addresses translated to %s (%s), %d IP addresses of guests known\n", t.Link, t.MAC, t.Kind, t.Addresses)
	}
	for _, m := range sw.Members {
		fmt.Fprintf(w, "  %s\t%d addresses, %d flooded, %d moved, dropped %s\n", m.Name, m.Addresses, m.Flooded, m.Moved, dropList(m.Drops))
	}
}
