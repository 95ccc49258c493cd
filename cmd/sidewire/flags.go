package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"sidewire/engine"
	"sidewire/engine/vmi"
	"sidewire/nat/dns"
	"sidewire/nat/usernet"
)

// list is a flag that may be given several times.
type list []string

func (l *list) String() string { return strings.Join(*l, ",") }

func (l *list) Set(s string) error {
	*l = append(*l, s)
	return nil
}

// options are the flags that run and qemu-args share.
type options struct {
	files      list // -f FILE[@NETNS]
	nads       list
	cluster    vmi.Cluster
	netns      string
	socketDir  string
	control    string
	stateDir   string
	path       string
	mode       string
	cpus       string
	poll       string
	uplinks    list // NETWORK=LINK
	macNAT     list // NETWORK
	resolvConf string
	dnsNames   map[string][]netip.Addr
	dnsCache   int
	packed     bool
	guestTSO   bool
	compat     bool
	verbose    bool
	qemu       string
	kvm        bool

	handoff handoffOptions
	sriov   sriovOptions

	// Of the socket path.
	rules          []usernet.Rule // in the order given
	forward        list
	mtu            int
	noHostLoopback bool
	slirpPing      bool
}

// newFlags makes a flag set that reports errors through parse, in one line,
// and whose help goes to errw.
func newFlags(name string, errw io.Writer) *flag.FlagSet {
	fs := flag.NewFlagSet("sidewire "+name, flag.ContinueOnError)
	fs.SetOutput(errw)
	fs.Usage = func() {} // the package would print it after every error too
	return fs
}

// parseFlags parses the flags at the beginning of args.
func parseFlags(fs *flag.FlagSet, args []string) error {
	errw := fs.Output()
	fs.SetOutput(io.Discard)
	err := fs.Parse(args)
	fs.SetOutput(errw)
	switch {
	case errors.Is(err, flag.ErrHelp):
		fmt.Fprintf(errw, "flags of %s:\n", fs.Name())
		fs.PrintDefaults()
		return err
	case err != nil:
		return badInput("%w; %s -h lists the flags", err, fs.Name())
	}
	return nil
}

// parse parses args, which must all be flags.
func parse(fs *flag.FlagSet, args []string) error {
	if err := parseFlags(fs, args); err != nil {
		return err
	}
	if fs.NArg() > 0 {
		return badInput("unexpected argument %q: files are given with -f", fs.Arg(0))
	}
	return nil
}

// unexpected refuses an argument of a command.
func unexpected(command, arg string) error {
	if strings.HasPrefix(arg, "-") {
		return badInput("unexpected argument %q: flags stand before all others, as in sidewire %s %s ...", arg, command, arg)
	}
	return badInput("unexpected argument %q; sidewire %s -h says what it takes", arg, command)
}

// silent is an error that has been printed already.
type silent struct{}

func (silent) Error() string { return "" }

func (o *options) register(fs *flag.FlagSet) {
	dir := runtimeDir()
	fs.Var(&o.files, "f", "`FILE[@NETNS]` with a VMI or VM (YAML or JSON); may be repeated")
	fs.Var(&o.nads, "nad", "`FILE` with NetworkAttachmentDefinitions; may be repeated")
	registerCluster(fs, &o.cluster)
	fs.StringVar(&o.netns, "netns", "", "network namespace `PATH` of the pod (default: the own one)")
	fs.StringVar(&o.socketDir, "socket-dir", dir, "`DIR` for the vhost-user sockets, DIR/VMI/INTERFACE.sock")
	fs.StringVar(&o.control, "control", "", "control `SOCKET` (default SOCKET-DIR/control.sock)")
	fs.StringVar(&o.stateDir, "state-dir", "", "`DIR` for what outlasts a run: leases, and what links were before they became a guest's (default SOCKET-DIR/state)")
	fs.StringVar(&o.path, "path", "auto", "way out of masquerade: `auto`, packet (with CAP_NET_ADMIN and CAP_NET_RAW) or socket (without privileges)")
	fs.StringVar(&o.mode, "mode", "server", "vhost-user `MODE`: server (QEMU dials) or client (QEMU listens)")
	fs.StringVar(&o.cpus, "cpus", "", "`LIST` of processors for the workers, one worker each, such as 2,4-6")
	fs.StringVar(&o.poll, "poll", "adaptive", "idle workers: `adaptive`, always (poll) or never")
	fs.Var(&o.uplinks, "uplink", "`NETWORK=LINK`: the host link of a network, which is named as in the VMI or by its definition (the pod network's is eth0)")
	fs.Var(&o.macNAT, "mac-nat", "`NETWORK` whose links carry their own hardware address only, so that guests' are translated to it (macvlan, ipvlan and wireless links are known by themselves)")
	fs.StringVar(&o.resolvConf, "resolv-conf", "", "`FILE` with the pod's resolvers (default: the namespace's own, else /etc/resolv.conf)")
	fs.Var(dnsNames{&o.dnsNames}, "dns-name", "`NAME=ADDR[,ADDR]` that guests of masquerade and slirp are told, whatever the pod's resolvers say; may be repeated")
	fs.IntVar(&o.dnsCache, "dns-cache", 0, "keep up to `N` answers of the pod's resolvers for each such guest (default 0: none)")
	fs.BoolVar(&o.packed, "packed", false, "offer packed virtqueues, on which no guest survives a crash of sidewire")
	fs.BoolVar(&o.guestTSO, "guest-tso", true, "let guests receive TCP super-frames; off for guests that attach XDP")
	fs.BoolVar(&o.compat, "dhcp-kubevirt-compat", false, "answer DHCP as KubeVirt's server does, faults included")
	fs.BoolVar(&o.verbose, "v", false, "log what is of interest to developers")
	fs.Var(rules{"allow", &o.rules}, "allow", "`WHERE` slirp guests and those of the socket path may go, such as 192.0.2.0/24:443/tcp or any:53/udp; the first of all --allow and --deny that fits decides")
	fs.Var(rules{"deny", &o.rules}, "deny", "`WHERE` they may not go, such as 10.0.0.0/8 or any/icmp")
	fs.Var(&o.forward, "forward", "`[VMI/INTERFACE=][ADDR:]PORT[-LAST][:GUESTPORT][/udp]` that leads to such a guest; may be repeated")
	fs.IntVar(&o.mtu, "mtu", 0, "`BYTES` of the MTU of such guests' links (default: that of the pod's link, 1500 for slirp)")
	fs.BoolVar(&o.noHostLoopback, "no-host-loopback", false, "keep such guests from the pod's 127.0.0.1, for which the gateway stands otherwise")
	o.handoff.register(fs)
	o.sriov.register(fs)
	fs.BoolVar(&o.slirpPing, "slirp-ping", false, "let slirp guests ping beyond the gateway")
}

// check says what is wrong with the flags' values.
func (o *options) check() error {
	switch {
	case len(o.files) == 0:
		return badInput("no VMI given: name its file with -f")
	case o.path != "auto" && o.path != "packet" && o.path != "socket":
		return badInput("--path %s: want auto, packet or socket", o.path)
	case o.mode != "server" && o.mode != "client":
		return badInput("--mode %s: want server or client", o.mode)
	}
	if o.mtu != 0 && (o.mtu < 576 || o.mtu > 65535) {
		return badInput("--mtu %d: want 576 to 65535", o.mtu)
	}
	if o.dnsCache < 0 || o.dnsCache > dns.MaxCache {
		return badInput("--dns-cache %d: want 0 to %d answers", o.dnsCache, dns.MaxCache)
	}
	if _, err := o.pollMode(); err != nil {
		return err
	}
	if _, err := parseCPUs(o.cpus); err != nil {
		return err
	}
	for _, u := range o.uplinks {
		if n, l, ok := strings.Cut(u, "="); !ok || n == "" || l == "" {
			return badInput("--uplink %s: want NETWORK=LINK, such as default=eth0", u)
		}
	}
	return nil
}

func (o *options) pollMode() (engine.PollMode, error) {
	switch o.poll {
	case "adaptive":
		return engine.PollAdaptive, nil
	case "always":
		return engine.PollAlways, nil
	case "never":
		return engine.PollNever, nil
	}
	return 0, badInput("--poll %s: want adaptive, always or never", o.poll)
}

// controlPath is where the control socket is.
func (o *options) controlPath() string {
	if o.control != "" {
		return o.control
	}
	return filepath.Join(o.socketDir, "control.sock")
}

// statePath is where what outlasts a run is written down.
func (o *options) statePath() string {
	if o.stateDir != "" {
		return o.stateDir
	}
	return filepath.Join(o.socketDir, "state")
}

// socketPath is where an interface's vhost-user socket is.
func (o *options) socketPath(vmi, iface string) string {
	return filepath.Join(o.socketDir, vmi, iface+".sock")
}

// uplinkOf is the link of a network; the pod network's is eth0 unless a flag
// says otherwise.
func (o *options) uplinkOf(network string) string {
	for _, u := range o.uplinks {
		if n, l, _ := strings.Cut(u, "="); n == network {
			return l
		}
	}
	return "eth0"
}

// runtimeDir is where sockets live by default.
func runtimeDir() string {
	if d := os.Getenv("XDG_RUNTIME_DIR"); d != "" {
		return filepath.Join(d, "sidewire")
	}
	return "/run/sidewire"
}

// parseCPUs reads a list such as 0,2-4; empty is nil.
func parseCPUs(s string) ([]int, error) {
	if s == "" {
		return nil, nil
	}
	var out []int
	for _, part := range strings.Split(s, ",") {
		lo, hi, isRange := strings.Cut(part, "-")
		a, err := strconv.Atoi(lo)
		b := a
		if err == nil && isRange {
			b, err = strconv.Atoi(hi)
		}
		if err != nil || a < 0 || b < a || b > 1023 {
			return nil, badInput("--cpus %s: %q is no processor or range; want a list such as 0,2-4", s, part)
		}
		for c := a; c <= b; c++ {
			out = append(out, c)
		}
	}
	return out, nil
}
