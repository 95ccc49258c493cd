package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net/netip"
	"os"
	"sort"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"sidewire/dhcp"
	"sidewire/engine"
	"sidewire/engine/stream"
	"sidewire/engine/uplink"
	"sidewire/nat"
	"sidewire/nat/usernet"
	"sidewire/vhostuser"
)

// Status is what a running sidewire says of itself.
type Status struct {
	API        string               `json:"api"`
	Path       string               `json:"path"` // way out of masquerade; "none" where nothing is masqueraded
	Uptime     float64              `json:"uptime_seconds"`
	Memory     uint64               `json:"memory_bytes"` // that sidewire owns, without the guests'
	Workers    []engine.WorkerStats `json:"workers"`
	Interfaces []InterfaceStatus    `json:"interfaces"`
	Machines   []MachineStatus      `json:"machines"` // the same as KubeVirt shows it
	Switches   []SwitchStatus       `json:"switches,omitempty"`
	Ports      []engine.PortStats   `json:"ports"`
}

// InterfaceStatus is one interface of a guest.
type InterfaceStatus struct {
	Name       string              `json:"name"` // VMI/INTERFACE
	Binding    string              `json:"binding"`
	Path       string              `json:"path,omitempty"`
	Why        string              `json:"why,omitempty"`    // it is not the packet path
	Switch     *PortStatus         `json:"switch,omitempty"` // of a Multus network
	Link       string              `json:"link,omitempty"`   // of the pod network
	Links      []uplink.LinkStatus `json:"links"`            // that one and those that sidewire made, or the switch's uplinks
	Pod        netip.Addr          `json:"pod,omitzero"`
	Guest      netip.Addr          `json:"guest,omitzero"` // what it is leased
	Gateway    netip.Addr          `json:"gateway,omitzero"`
	Alias      *netip.Addr         `json:"alias,omitempty"`     // the guest's address to the pod, if another
	Taken      *TakenStatus        `json:"taken,omitempty"`     // the link whose place the guest has
	Migration  *MigrationStatus    `json:"migration,omitempty"` // of a bridge on a link of the pod's
	MAC        string              `json:"mac,omitempty"`       // the guest's, as given or as seen
	LinkState  string              `json:"linkState"`           // up while a frontend is connected: so the guest sees it
	MTU        int                 `json:"mtu"`
	QueueCount int                 `json:"queueCount"`
	Socket     string              `json:"socket"`
	Model      string              `json:"model"`
	Device     vhostuser.Status    `json:"device"`
	Stream     *stream.Status      `json:"stream,omitempty"` // of a NIC that is not virtio; Device has its state
	Leases     []dhcp.LeaseInfo    `json:"leases"`
	DHCP       dhcp.Stats          `json:"dhcp"`
	DNS        ResolverStatus      `json:"dns,omitzero"`
	NAT        *nat.Stats          `json:"nat,omitempty"`        // of the packet path
	IPv6       *IPv6Status         `json:"ipv6,omitempty"`       // what the guest has of that
	Sockets    *usernet.Stats      `json:"sockets,omitempty"`    // of the socket path
	Policy     []string            `json:"policy,omitempty"`     // rules of the socket path, of which the first that fits decides
	Handoff    *HandoffStatus      `json:"handoff,omitempty"`    // of a device of the kernel's: nothing comes by us
	Forwards   []forwardRequest    `json:"forwards"`             // null: everything
	Everything bool                `json:"everything,omitempty"` // every TCP and UDP port, beside forwards, by sockets
	Proxy      string              `json:"proxy,omitempty"`      // whose stands between the guest and the outside, but for forwards
}

// Status implements controller.
func (s *server) Status() Status {
	st := Status{API: apiVersion, Path: s.path, Uptime: time.Since(s.started).Seconds(), Memory: ownMemory()}
	s.mu.Lock()
	e := s.engine
	s.mu.Unlock()
	if e != nil {
		st.Workers, st.Ports = e.WorkerStats(), e.PortStats()
	}
	open, lans := s.serving()
	for _, n := range open {
		st.Interfaces = append(st.Interfaces, n.status(s))
	}
	st.Machines = machines(open, st.Interfaces)
	for _, l := range lans {
		st.Switches = append(st.Switches, l.status())
	}
	return st
}

// status is what all interfaces have in common.
func (n *nic) status() InterfaceStatus {
	st := InterfaceStatus{
		Name: n.name(), Binding: string(n.iface.Binding), QueueCount: n.iface.QueuePairs, Socket: n.socket,
		Model: n.iface.Model, Leases: []dhcp.LeaseInfo{},
	}
	if n.stream != nil {
		x := n.stream.Status()
		st.Stream = &x
		st.Device = vhostuser.Status{Name: x.Name, Path: x.Path, Pairs: []vhostuser.PairStatus{{
			TxFrames: x.TxFrames, TxBytes: x.TxBytes, RxFrames: x.RxFrames, RxBytes: x.RxBytes, Drops: x.Drops,
		}}, Counters: x.Counters}
		if x.Connected {
			st.Device.State = vhostuser.Up
		}
	} else {
		st.Device = n.device.Status()
	}
	st.LinkState = n.linkState(st.Device.State != vhostuser.Disconnected)
	if n.dhcp != nil {
		st.Leases, st.DHCP = n.dhcp.Leases(), n.dhcp.Stats()
	}
	return st
}

func (n *podNIC) status(s *server) InterfaceStatus {
	st := n.nic.status()
	if n.aliased {
		st.Alias = &n.guestIP
	}
	st.Path, st.Link, st.Links, st.Pod, st.MTU = s.path, n.pod.link, n.pod.links.Status(), n.pod.host.Addr(), n.pod.host.MTU()
	if n.pod.nat != nil {
		x := n.pod.nat.Stats()
		st.Guest, st.Gateway, st.MAC, st.NAT = n.iface.Network.Guest, n.iface.Network.Gateway, x.Guests[n.index].MAC, &x
	}
	n.status6(&st)
	if n.vm.Istio {
		st.Proxy = "istio"
	}
	st.DNS, st.Forwards = n.dns.status(), n.forwards()
	return st
}

// ownMemory is the anonymous memory of this process in bytes, 0 if the kernel
// does not say. What guests share is not anonymous.
func ownMemory() uint64 {
	b, _ := os.ReadFile("/proc/self/status")
	_, rest, _ := strings.Cut(string(b), "\nRssAnon:")
	line, _, _ := strings.Cut(rest, "\n")
	kib, _ := strconv.ParseUint(strings.TrimSuffix(strings.TrimSpace(line), " kB"), 10, 64)
	return kib << 10
}

// serving is what is served, nothing while the server starts.
func (s *server) serving() ([]served, []*lan) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.open, s.lans
}

// registerControl adds the flags of the commands that talk to a running
// sidewire.
func (o *options) registerControl(fs *flag.FlagSet, asJSON *bool) {
	fs.StringVar(&o.socketDir, "socket-dir", runtimeDir(), "`DIR` of the running sidewire")
	fs.StringVar(&o.control, "control", "", "control `SOCKET` (default SOCKET-DIR/control.sock)")
	fs.BoolVar(asJSON, "json", false, "print JSON")
}

// controlFlags reads them.
func controlFlags(name string, args []string, errw io.Writer) (o options, asJSON bool, rest []string, err error) {
	fs := newFlags(name, errw)
	o.registerControl(fs, &asJSON)
	if err = parseFlags(fs, args); err != nil {
		return o, asJSON, nil, err
	}
	return o, asJSON, fs.Args(), nil
}

// show is a command that asks a running sidewire for one thing and shows it, as
// JSON where that is asked for, else by text.
func show[T any](ctx context.Context, name string, args []string, out, errw io.Writer, text func(io.Writer, T) error) error {
	o, asJSON, rest, err := controlFlags(name, args, errw)
	if err != nil {
		return err
	}
	if len(rest) > 0 {
		return unexpected(name, rest[0])
	}
	var v T
	if err := ask(ctx, o.controlPath(), "GET", "/"+name, nil, &v); err != nil {
		return err
	}
	if asJSON {
		enc := json.NewEncoder(out)
		enc.SetIndent("", "  ")
		return enc.Encode(v)
	}
	return text(out, v)
}

func statusCommand(ctx context.Context, args []string, out, errw io.Writer) error {
	return show(ctx, "status", args, out, errw, printStatus)
}

func printStatus(out io.Writer, st Status) error {
	w := tabwriter.NewWriter(out, 0, 4, 2, ' ', 0)
	fmt.Fprintf(w, "path\t%s\nuptime\t%s\nworkers\t%d\nmemory\t%.1f MiB\n", st.Path,
		(time.Duration(st.Uptime) * time.Second).String(), len(st.Workers), float64(st.Memory)/(1<<20))
	for _, i := range st.Interfaces {
		fmt.Fprintf(w, "\n%s\t%s, %s, %d queue pairs, MTU %d\n", i.Name, i.Binding, i.Model, i.QueueCount, i.MTU)
		if i.Handoff != nil {
			fmt.Fprintf(w, "  device\t%s\n  guest\t%s\n", i.Handoff.summary(), orElse(i.MAC, "of the device's address"))
			continue
		}
		fmt.Fprintf(w, "  socket\t%s (%s)\n", i.Socket, i.Device.State)
		fmt.Fprintf(w, "  guest\t%s, link %s, %d KiB for each queue pair\n", orElse(i.MAC, "not seen yet"), i.LinkState, pairMemory(i.Device)>>10)
		if i.Switch != nil {
			printPort(w, i)
			continue
		}
		if i.Taken != nil {
			printTaken(w, i)
			continue
		}
		fmt.Fprintf(w, "  path\t%s%s\n", i.Path, inBrackets(i.Why))
		switch {
		case i.Pod.IsValid():
			fmt.Fprintf(w, "  addresses\tguest %s, gateway %s, pod %s on %s\n", i.Guest, i.Gateway, i.Pod, i.Link)
		case i.Guest.IsValid():
			fmt.Fprintf(w, "  addresses\tguest %s, gateway %s\n", i.Guest, i.Gateway)
		}
		if six := i.IPv6; six != nil {
			fmt.Fprintf(w, "  addresses\tguest %s, gateway %s, pod %s on %s\n", six.Guest, six.Gateway, six.Pod, i.Link)
		}
		if i.Alias != nil {
			fmt.Fprintf(w, "  \tto the pod's processes the guest is %s\n", i.Alias)
		}
		if len(i.Links) > 0 {
			fmt.Fprintf(w, "  links\t%s\n", linkList(i.Links))
		}
		printLeases(w, i)
		fmt.Fprintf(w, "  names\t%s\n", i.DNS)
		printForwards(w, i)
		if i.NAT != nil {
			fmt.Fprintf(w, "  flows\t%d (%d external ports)\n", i.NAT.Flows, i.NAT.Mappings)
		}
		for _, n := range i.sockets() {
			fmt.Fprintf(w, "  flows\t%d TCP, %d UDP, %d echo; %d of %d sockets\n", n.TCPOpen, n.UDPOpen, n.EchoOpen, n.Sockets, n.MaxSockets)
			fmt.Fprintf(w, "  refused\t%d by hosts, %d by policy, %d for want of room, %d of sockets\n", n.Refused, n.PolicyDenied, n.TableFull, n.NoSocket)
		}
		if len(i.Policy) > 0 {
			fmt.Fprintf(w, "  policy\t%s\n", strings.Join(i.Policy, " "))
		}
	}
	for _, sw := range st.Switches {
		printSwitch(w, sw)
	}
	fmt.Fprintf(w, "\nport\tin\tout\tdropped\n")
	for _, p := range st.Ports {
		fmt.Fprintf(w, "%s\t%d frames, %d bytes\t%d frames, %d bytes\t%s\n", p.Name, p.InFrames, p.InBytes, p.OutFrames, p.OutBytes, dropList(p.Drops))
	}
	return w.Flush()
}

func printForwards(w io.Writer, i InterfaceStatus) {
	if !i.Everything {
		fmt.Fprintf(w, "  forwards\t%s\n", forwardList(i.Forwards))
		if i.Proxy != "" {
			fmt.Fprintf(w, "  proxy\t%s, for all else from outside and for the guest's TCP\n", i.Proxy)
		}
		return
	}
	fmt.Fprint(w, "  forwards\tevery TCP and UDP port")
	if len(i.Forwards) > 0 {
		fmt.Fprintf(w, ", and %s", forwardList(i.Forwards))
	}
	fmt.Fprintln(w)
}

func printLeases(w io.Writer, i InterfaceStatus) {
	for _, l := range i.Leases {
		fmt.Fprintf(w, "  lease\t%s to %s %s\n", l.Addr, l.MAC, strconv.Quote(l.Hostname))
	}
}

// pairMemory is what a queue pair takes of our memory, the largest of them.
func pairMemory(d vhostuser.Status) (n int) {
	for _, p := range d.Pairs {
		n = max(n, p.MemoryBytes)
	}
	return n
}

// inBrackets is a remark behind something, if there is one.
func inBrackets(s string) string {
	if s == "" {
		return ""
	}
	return " (" + s + ")"
}

func orElse(s, other string) string {
	if s == "" {
		return other
	}
	return s
}

func dropList(drops map[string]uint64) string {
	if len(drops) == 0 {
		return "none"
	}
	var out []string
	for k, v := range drops {
		out = append(out, fmt.Sprintf("%s %d", k, v))
	}
	sort.Strings(out)
	return strings.Join(out, ", ")
}

func linkList(links []uplink.LinkStatus) string {
	var out []string
	for _, l := range links {
		out = append(out, l.Name+" "+string(l.State))
	}
	return strings.Join(out, ", ")
}

func sortedKeys[V any](m map[string]V) []string {
	var ks []string
	for k := range m {
		ks = append(ks, k)
	}
	sort.Strings(ks)
	return ks
}
