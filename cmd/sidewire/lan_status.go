package main

import (
	"fmt"
	"io"
	"strings"

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
	Name    string              `json:"name"`
	Members []string            `json:"members"`
	Uplinks []uplink.LinkStatus `json:"uplinks"`
}

func (l *lan) status() SwitchStatus {
	st := SwitchStatus{Name: l.name, Uplinks: l.linkStatus()}
	for _, n := range l.nics {
		st.Members = append(st.Members, n.name())
	}
	return st
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
	fmt.Fprintf(w, "\nswitch %s\t%d guests, uplinks %s\n", sw.Name, len(sw.Members), orElse(linkList(sw.Uplinks), "none"))
}
