package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"sidewire/dhcp"
	"sidewire/engine/uplink"
	"sidewire/nat/dns"
)

// dnsPort is where resolvers listen.
const dnsPort = 53

// resolver follows the pod's resolv.conf for a guest. Servers that the guest
// can reach itself are in its lease as they are. Where one is on the pod's
// loopback, or none has an IPv4 address, a relay is instead, which asks all of
// them, as a process of the pod. So it is where the relay knows more than they:
// it has static names or a cache.
type resolver struct {
	relayPlace
	path  string // of the resolv.conf
	relay *dns.Server
	log   *slog.Logger
	// wanted says that a flag wants the relay, whatever the resolvers are.
	wanted bool

	mu     sync.Mutex   // guards everything below
	udp    *net.UDPConn // the relay's from before it serves
	tcp    *net.TCPListener
	conf   dhcp.Resolv
	listen netip.AddrPort // the relay's; the zero value as long as it has none
	err    error          // why it has none although it should
}

// relayPlace is where a guest's relay is.
type relayPlace struct {
	netns  string
	at     netip.AddrPort // where it listens; port 0 is any
	device string         // the only link by which it is reached, empty for all
	allow  netip.Prefix   // who is answered
	shown  netip.Addr     // its address as the guest sees it
	leased bool           // it is the only one that the lease names
	// inside is the guest's own network: it reaches no resolver that is outside
	// but has an address of that.
	inside netip.Prefix
}

// ResolverStatus is what the guest's queries go by.
type ResolverStatus struct {
	File    string           `json:"file"`
	Servers []netip.Addr     `json:"servers"`          // that it names
	Leased  []netip.Addr     `json:"leased,omitempty"` // whom the guest's next lease names
	Listen  *netip.AddrPort  `json:"listen,omitempty"` // the relay at the gateway, if there is one
	Asks    []netip.AddrPort `json:"asks,omitempty"`   // whom it asks, in order
	Error   string           `json:"error,omitempty"`
	Relay   dns.Stats        `json:"relay"`
}

// newResolver reads the resolv.conf of the pod.
func newResolver(o *options, p relayPlace, log *slog.Logger) (*resolver, error) {
	r := &resolver{relayPlace: p, path: resolvConf(o, p.netns), log: log}
	var err error
	if r.conf, err = dhcp.ResolvConf(r.path); err != nil {
		return nil, badInput("resolvers: %w; name a file with --resolv-conf", err)
	}
	r.wanted = o.relayed()
	r.leased = r.leased || r.wanted
	r.relay, err = dns.New(dns.Config{
		Resolvers: r.targets(r.conf), Allow: p.allow, Dial: r.dial, Names: o.dnsNames, Cache: o.dnsCache,
	})
	return r, err
}

// servers are whom the guest's lease names, and whether the relay is one of
// them.
func (p *relayPlace) servers(conf dhcp.Resolv) (out []netip.Addr, relayed bool) {
	if p.leased {
		return []netip.Addr{p.shown}, true
	}
	if p.shown.Is6() {
		if out = servers6(conf); len(out) == 0 {
			return []netip.Addr{p.shown}, true
		}
		return out, false
	}
	relayed = conf.Relayed()
	for _, a := range conf.DNS4(p.shown) {
		if p.inside.IsValid() && p.inside.Contains(a) {
			a, relayed = p.shown, true
		}
		if !slices.Contains(out, a) {
			out = append(out, a)
		}
	}
	return out, relayed
}

// config is what the resolv.conf says now.
func (r *resolver) config() dhcp.Resolv {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.conf
}

// run relays if it must, and calls changed when the resolv.conf has changed,
// until ctx ends. It returns at once; wait returns when all is over.
func (r *resolver) run(ctx context.Context, changed func()) (wait func()) {
	var wg sync.WaitGroup
	r.serve(ctx, &wg)
	w, err := watchFile(r.path)
	if err != nil {
		r.log.Warn("changes of the pod's resolvers are not followed", "file", r.path, "err", err)
		return wg.Wait
	}
	stop := context.AfterFunc(ctx, func() { w.Close() })
	wg.Go(func() {
		defer w.Close()
		defer stop()
		for {
			// It may have changed before it was watched, too.
			if r.reload() {
				r.serve(ctx, &wg)
				changed()
			}
			if err := w.Next(); err != nil {
				if ctx.Err() == nil {
					r.log.Warn("changes of the pod's resolvers are not followed any more", "file", r.path, "err", err)
				}
				return
			}
		}
	})
	return wg.Wait
}

// reload reads the resolv.conf again and says whether it has changed. One that
// cannot be read, or names nobody, is being written: another event follows.
func (r *resolver) reload() bool {
	conf, err := dhcp.ResolvConf(r.path)
	if err != nil || len(conf.Servers) == 0 {
		return false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if slices.Equal(conf.Servers, r.conf.Servers) && slices.Equal(conf.Search, r.conf.Search) {
		return false
	}
	r.log.Info("the pod's resolvers have changed", "file", r.path, "servers", conf.Servers, "search", conf.Search)
	r.conf = conf
	r.relay.SetResolvers(r.targets(conf))
	return true
}

// serve begins to relay when the gateway stands for a resolver. It goes on when
// that changes: the guest's lease may still say so.
func (r *resolver) serve(ctx context.Context, wg *sync.WaitGroup) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, relayed := r.servers(r.conf); r.listen.IsValid() || !relayed && r.udp == nil {
		return
	}
	udp, tcp, at := r.udp, r.tcp, netip.AddrPortFrom(r.shown, dnsPort)
	if udp == nil {
		at = r.at
		var err error
		udp, tcp, err = r.open(ctx, r.at.String())
		if r.err = err; err != nil && r.wanted {
			return // missing says so
		} else if err != nil {
			r.log.Warn("the gateway does not answer the guest's DNS queries", "err", err)
			return
		}
	}
	r.listen = at
	wg.Go(func() { r.relay.Serve(ctx, udp, tcp) })
}

// missing is why the relay that a flag wants is not there.
func (r *resolver) missing() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.err == nil || !r.wanted {
		return nil
	}
	return cannot("--dns-name and --dns-cache: %w", r.err)
}

// early lets the relay listen before it serves, and whether or not anybody
// needs it. It returns where that is.
func (r *resolver) early(ctx context.Context) (udp, tcp netip.AddrPort, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.udp, r.tcp, err = r.open(ctx, r.at.String()); err != nil {
		return udp, tcp, err
	}
	return r.udp.LocalAddr().(*net.UDPAddr).AddrPort(), r.tcp.Addr().(*net.TCPAddr).AddrPort(), nil
}

// targets are whom the relay asks: everybody but itself.
func (r *resolver) targets(conf dhcp.Resolv) []netip.AddrPort {
	var out []netip.AddrPort
	servers := conf.Servers
	if len(servers) == 0 && r.wanted {
		servers = conf.DNS4(r.shown) // whom the guest would ask itself
	}
	for _, a := range servers {
		switch {
		case a == r.at.Addr() && r.at.Port() == dnsPort:
			continue
		case a.IsUnspecified() && a.Is4():
			a = netip.AddrFrom4([4]byte{127, 0, 0, 1})
		case a.IsUnspecified():
			a = netip.IPv6Loopback()
		}
		out = append(out, netip.AddrPortFrom(a, dnsPort))
	}
	return out
}

// open listens where the relay is.
func (r *resolver) open(ctx context.Context, addr string) (udp *net.UDPConn, tcp *net.TCPListener, err error) {
	c := net.ListenConfig{Control: control(func(fd int) error {
		if r.device == "" {
			return nil
		}
		return unix.BindToDevice(fd, r.device)
	})}
	err = uplink.InNetNS(r.netns, func() error {
		pc, err := c.ListenPacket(ctx, "udp", addr)
		if err != nil {
			return err
		}
		l, err := c.Listen(ctx, "tcp", addr)
		if err != nil {
			pc.Close()
			return err
		}
		udp, tcp = pc.(*net.UDPConn), l.(*net.TCPListener)
		return nil
	})
	switch {
	case errors.Is(err, unix.EADDRINUSE):
		err = fmt.Errorf("%w: a process of the pod listens there for everybody, the guest included", err)
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		err = fmt.Errorf("%w: it takes CAP_NET_BIND_SERVICE, or ip_unprivileged_port_start of at most %d", err, dnsPort)
	}
	return udp, tcp, err
}

// dial calls a resolver as a process of the pod.
func (r *resolver) dial(ctx context.Context, network, addr string) (c net.Conn, err error) {
	d := net.Dialer{Control: control(func(fd int) error {
		// Without the privilege there are no rules that look for it either.
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, uplink.PodMark)
		return nil
	})}
	err = uplink.InNetNS(r.netns, func() error {
		c, err = d.DialContext(ctx, network, numericZone(addr))
		return err
	})
	return c, err
}

// numericZone replaces the name of the link in a numeric address by the link's
// index in this namespace: net remembers names, but not whose they are.
func numericZone(addr string) string {
	a, err := netip.ParseAddrPort(addr)
	if err != nil || a.Addr().Zone() == "" {
		return addr
	}
	l, err := net.InterfaceByName(a.Addr().Zone())
	if err != nil {
		return addr // a number, or a link that is not there
	}
	return netip.AddrPortFrom(a.Addr().WithZone(strconv.Itoa(l.Index)), a.Port()).String()
}

// control makes a function for a socket one for net.
func control(f func(fd int) error) func(network, address string, c syscall.RawConn) error {
	return func(_, _ string, c syscall.RawConn) (err error) {
		if cerr := c.Control(func(fd uintptr) { err = f(int(fd)) }); cerr != nil {
			return cerr
		}
		return err
	}
}

// status says what the guest's queries go by.
func (r *resolver) status() ResolverStatus {
	r.mu.Lock()
	defer r.mu.Unlock()
	st := ResolverStatus{File: r.path, Servers: r.conf.Servers, Relay: r.relay.Stats()}
	st.Leased, _ = r.servers(r.conf)
	if r.listen.IsValid() {
		listen := r.listen
		st.Listen, st.Asks = &listen, r.relay.Resolvers()
	}
	if r.err != nil {
		st.Error = r.err.Error()
	}
	return st
}

// String is the status in a line.
func (st ResolverStatus) String() string {
	switch {
	case st.Error != "":
		return "not answered at the gateway: " + st.Error
	case st.Listen != nil:
		s := fmt.Sprintf("%s asks %v: %d queries, %d answers, %d failures, %d over TCP", st.Listen, st.Asks,
			st.Relay.Queries, st.Relay.Answers, st.Relay.Failures, st.Relay.Conns)
		if r := st.Relay; r.Static+r.CacheHits+r.CacheMisses > 0 {
			s += fmt.Sprintf(", %d about static names, %d of %d from the cache", r.Static, r.CacheHits, r.CacheHits+r.CacheMisses)
		}
		return s
	case len(st.Servers) == 0:
		return fmt.Sprintf("no resolver in %s: the guest asks %v", st.File, st.Leased)
	}
	return fmt.Sprintf("the guest asks %v", st.Leased)
}

// resolvConf is the file that names the pod's resolvers: what the flag says,
// what `ip netns` keeps for a namespace, or the system's.
func resolvConf(o *options, netns string) string {
	if o.resolvConf != "" {
		return o.resolvConf
	}
	if dir, name := filepath.Split(netns); dir == "/run/netns/" || dir == "/var/run/netns/" {
		own := filepath.Join("/etc/netns", name, "resolv.conf")
		if _, err := os.Stat(own); err == nil {
			return own
		}
	}
	return "/etc/resolv.conf"
}
