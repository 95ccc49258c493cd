package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"strconv"
	"text/tabwriter"
	"time"

	"sidewire/engine"
	"sidewire/engine/frame"
	"sidewire/nat"
	"sidewire/nat/usernet"
)

// maxFlowsShown is how many flows are listed unless more are asked for.
const maxFlowsShown = 1000

// FlowStatus is one flow of a guest.
type FlowStatus struct {
	Interface    string        `json:"interface"` // VMI/INTERFACE
	Protocol     string        `json:"protocol"`
	GuestAddr    netip.Addr    `json:"guestAddr"`
	GuestPort    uint16        `json:"guestPort"`           // or query id
	ExternalPort uint16        `json:"externalPort"`        // or query id
	Remote       netip.Addr    `json:"remote,omitzero"`     // none where the mapping is for all, as a UDP socket's
	RemotePort   uint16        `json:"remotePort,omitzero"` // likewise
	Inbound      bool          `json:"inbound"`             // opened from outside, where that is known
	State        string        `json:"state,omitempty"`
	Packets      *[2]uint64    `json:"packets,omitempty"` // from the guest and to it; not known of sockets
	Bytes        [2]uint64     `json:"bytes"`             // of IP packets; of sockets, of payload
	Age          time.Duration `json:"age,omitzero"`      // not known of sockets
	Idle         time.Duration `json:"idle"`
	Queue        uint16        `json:"queue"`
}

// FlowList is flows, and whether there are more.
type FlowList struct {
	Flows []FlowStatus `json:"flows"`
	More  bool         `json:"more"`
}

// Flows implements controller: at most limit of them.
func (s *server) Flows(limit int) FlowList {
	l := FlowList{Flows: []FlowStatus{}}
	add := func(f FlowStatus) bool {
		if l.More = len(l.Flows) == limit; !l.More {
			l.Flows = append(l.Flows, f)
		}
		return !l.More
	}
	open, _ := s.serving()
	for _, n := range open {
		if n, ok := n.(interface{ flows(func(FlowStatus) bool) }); ok && !l.More {
			n.flows(add)
		}
	}
	return l
}

func (n *userNIC) flows(fn func(FlowStatus) bool) {
	more := true
	for _, net := range n.nets() {
		if !more {
			return
		}
		net.Flows(engine.Now(), func(i usernet.FlowInfo) bool {
			more = fn(FlowStatus{
				Interface: n.name(), Protocol: ipProtocol(i.Proto), GuestAddr: i.GuestAddr, GuestPort: i.GuestPort, ExternalPort: i.ExternalPort,
				Remote: i.Remote, RemotePort: i.RemotePort, Inbound: i.Inbound, State: i.State, Bytes: i.Bytes, Idle: i.Idle, Queue: i.Queue,
			})
			return more
		})
	}
}

func (n *podNIC) flows(fn func(FlowStatus) bool) {
	more := true
	show := func(i nat.FlowInfo) bool {
		more = fn(FlowStatus{
			Interface: n.name(), Protocol: ipProtocol(i.Proto), GuestAddr: i.GuestAddr, GuestPort: i.GuestPort, ExternalPort: i.ExternalPort,
			Remote: i.Remote, RemotePort: i.RemotePort, Inbound: i.Inbound, State: i.State, Packets: &i.Packets, Bytes: i.Bytes,
			Age: i.Age, Idle: i.Idle, Queue: i.Queue,
		})
		return more
	}
	if n.pod.nat != nil {
		n.pod.nat.Flows(engine.Now(), func(i nat.FlowInfo) bool { return i.Guest != n.index || show(i) })
	}
	if n.six.router != nil && more {
		n.pod.six.nat.Flows(engine.Now(), func(i nat.FlowInfo) bool { return i.Guest != n.six.index || show(i) })
	}
}

func ipProtocol(p uint8) string {
	switch p {
	case frame.ProtoTCP:
		return "TCP"
	case frame.ProtoUDP:
		return "UDP"
	case frame.ProtoICMP:
		return "ICMP"
	case frame.ProtoICMPv6:
		return "ICMPv6"
	}
	return strconv.Itoa(int(p))
}

// flowsCommand lists the flows of a running sidewire.
func flowsCommand(ctx context.Context, args []string, out, errw io.Writer) error {
	var o options
	var asJSON bool
	limit := maxFlowsShown
	fs := newFlags("flows", errw)
	o.registerControl(fs, &asJSON)
	fs.IntVar(&limit, "max", limit, "list at most `N` flows")
	if err := parse(fs, args); err != nil {
		return err
	}
	if limit < 1 {
		return badInput("--max %d: want at least 1", limit)
	}
	var l FlowList
	if err := ask(ctx, o.controlPath(), "GET", fmt.Sprintf("/flows?max=%d", limit), nil, &l); err != nil {
		return err
	}
	if asJSON {
		enc := json.NewEncoder(out)
		enc.SetIndent("", "  ")
		return enc.Encode(l)
	}
	return printFlows(out, l)
}

func printFlows(out io.Writer, l FlowList) error {
	w := tabwriter.NewWriter(out, 0, 4, 2, ' ', 0)
	fmt.Fprintln(w, "interface\tprotocol\tguest\texternal\tremote\tstate\tbytes out, in\tidle")
	for _, f := range l.Flows {
		remote := "any"
		if f.Remote.IsValid() {
			remote = netip.AddrPortFrom(f.Remote, f.RemotePort).String()
		}
		direction := ""
		if f.Inbound {
			direction = " (inbound)"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%s%s\t%s\t%d, %d\t%s\n", f.Interface, f.Protocol, netip.AddrPortFrom(f.GuestAddr, f.GuestPort),
			f.ExternalPort, remote, direction, orElse(f.State, "-"), f.Bytes[0], f.Bytes[1], f.Idle.Round(time.Second))
	}
	if err := w.Flush(); err != nil {
		return err
	}
	if l.More {
		fmt.Fprintf(out, "and more: list them with --max\n")
	}
	return nil
}
