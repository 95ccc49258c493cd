package enginetest

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"github.com/miekg/dns"
)

// Addresses and names of a World.
const (
	OutsideIP = "10.244.1.1"
	PodIP     = "10.244.1.5"
	// OutsideIP6 and PodIP6 are there where the World has IPv6.
	OutsideIP6 = "2001:db8:1::1"
	PodIP6     = "2001:db8:1::5"
	// OutsideName is the name that the outside's DNS server knows itself by.
	OutsideName = "outside.example"
	// TFTPName is that of the guide's TFTP server; it has the same address.
	TFTPName = "tftp.example.com"
	HTTPPort = 9000
)

// World is a pod and an outside: two namespaces joined by a veth pair, eth0 in
// the pod, whose default route is the outside. The outside runs an HTTP and a
// DNS server.
type World struct {
	Pod, Outside *NetNS
	// ResolvConf is a file that names the outside's DNS server, as the pod's
	// own would.
	ResolvConf string

	dir     string
	closers []func() error
}

// WorldOptions are what a World can be varied in.
type WorldOptions struct {
	Name string // a prefix for the namespaces' names
	MTU  int    // of the veth pair; 0 is 1500
	IPv6 bool   // beside IPv4
	Only bool   // IPv6 without IPv4
}

// NewWorld makes a World for a test.
func NewWorld(t TB, o WorldOptions) *World {
	t.Helper()
	Need(t, "netns")
	if o.Name == "" {
		o.Name = fmt.Sprintf("sw-test-%d-%d", os.Getpid(), namespaces.Add(1))
	}
	w, err := CreateWorld(o)
	if err != nil {
		t.Fatalf("world: %v", err)
	}
	t.Cleanup(func() { w.Close() })
	return w
}

// CreateWorld makes a World. The caller closes it.
func CreateWorld(o WorldOptions) (w *World, err error) {
	if o.MTU == 0 {
		o.MTU = 1500
	}
	w = &World{}
	defer func() {
		if err != nil {
			w.Close()
		}
	}()
	if w.Pod, err = CreateNetNS(o.Name + "-pod"); err != nil {
		return w, err
	}
	w.closers = append(w.closers, w.Pod.Close)
	if w.Outside, err = CreateNetNS(o.Name + "-out"); err != nil {
		return w, err
	}
	w.closers = append(w.closers, w.Outside.Close)
	if err = errors.Join(w.Pod.withoutDAD(), w.Outside.withoutDAD()); err != nil {
		return w, err
	}
	if w.dir, err = os.MkdirTemp("", "sidewire-world-"); err != nil {
		return w, err
	}
	w.closers = append(w.closers, func() error { return os.RemoveAll(w.dir) })
	w.ResolvConf = filepath.Join(w.dir, "resolv.conf")
	conf := "nameserver " + OutsideIP + "\nsearch default.svc.cluster.local svc.cluster.local cluster.local\n"
	if err = os.WriteFile(w.ResolvConf, []byte(conf), 0o644); err != nil {
		return w, err
	}
	if err = CreateVeth(w.Pod, "eth0", w.Outside, "veth0"); err != nil {
		return w, err
	}
	err = errors.Join(w.Pod.SetMTU("eth0", o.MTU), w.Outside.SetMTU("veth0", o.MTU), w.Outside.Addr("veth0", OutsideIP+"/24"))
	if !o.Only {
		err = errors.Join(err, w.Pod.Addr("eth0", PodIP+"/24"), w.Pod.Route("default", OutsideIP))
	}
	if o.IPv6 || o.Only {
		err = errors.Join(err, w.addIPv6())
	}
	if err = errors.Join(err, w.Pod.settle("eth0"), w.Outside.settle("veth0")); err != nil {
		return w, err
	}
	return w, w.serve(o)
}

// addIPv6 gives pod and outside addresses of it.
func (w *World) addIPv6() error {
	err := errors.Join(w.Pod.Addr("eth0", PodIP6+"/64"), w.Outside.Addr("veth0", OutsideIP6+"/64"), w.Pod.Route("default", OutsideIP6))
	if err != nil {
		return err
	}
	conf := "nameserver " + OutsideIP6 + "\nsearch default.svc.cluster.local svc.cluster.local cluster.local\n"
	return os.WriteFile(filepath.Join(w.dir, "resolv6.conf"), []byte(conf), 0o644)
}

// ResolvConf6 is a file that names the outside's DNS server by IPv6.
func (w *World) ResolvConf6() string { return filepath.Join(w.dir, "resolv6.conf") }

// serve6 lets the outside's servers be reached by IPv6 too.
func (w *World) serve6(h http.Handler) error {
	l, err := w.Outside.Listen("tcp6", net.JoinHostPort(OutsideIP6, strconv.Itoa(HTTPPort)))
	if err != nil {
		return fmt.Errorf("outside http: %w", err)
	}
	srv := &http.Server{Handler: h, ReadHeaderTimeout: 10 * time.Second}
	go func() { _ = srv.Serve(l) }() // ends with Close
	w.closers = append(w.closers, srv.Close)
	pc, err := w.Outside.ListenPacket("udp6", net.JoinHostPort(OutsideIP6, "53"))
	if err != nil {
		return fmt.Errorf("outside dns: %w", err)
	}
	d := &dns.Server{PacketConn: pc, Handler: dns.HandlerFunc(answerDNS)}
	go func() { _ = d.ActivateAndServe() }() // ends with the packet connection
	w.closers = append(w.closers, pc.Close)
	return nil
}

// Close takes everything down.
func (w *World) Close() error {
	var errs []error
	for i := len(w.closers) - 1; i >= 0; i-- {
		errs = append(errs, w.closers[i]())
	}
	w.closers = nil
	return errors.Join(errs...)
}

// serve starts the outside's servers.
func (w *World) serve(o WorldOptions) error {
	if o.IPv6 || o.Only {
		if err := w.serve6(Handler()); err != nil {
			return err
		}
	}
	l, err := w.Outside.Listen("tcp4", fmt.Sprintf("%s:%d", OutsideIP, HTTPPort))
	if err != nil {
		return fmt.Errorf("outside http: %w", err)
	}
	srv := &http.Server{Handler: Handler(), ReadHeaderTimeout: 10 * time.Second}
	go func() { _ = srv.Serve(l) }() // ends with Close
	w.closers = append(w.closers, srv.Close)

	pc, err := w.Outside.ListenPacket("udp4", OutsideIP+":53")
	if err != nil {
		return fmt.Errorf("outside dns: %w", err)
	}
	d := &dns.Server{PacketConn: pc, Handler: dns.HandlerFunc(answerDNS)}
	go func() { _ = d.ActivateAndServe() }() // ends with the packet connection
	w.closers = append(w.closers, pc.Close)
	return nil
}

// Listen opens a listener in the namespace.
func (ns *NetNS) Listen(network, addr string) (l net.Listener, err error) {
	err = ns.Do(func() error {
		l, err = net.Listen(network, addr)
		return err
	})
	return l, err
}

// ListenPacket opens a packet socket in the namespace.
func (ns *NetNS) ListenPacket(network, addr string) (pc net.PacketConn, err error) {
	err = ns.Do(func() error {
		pc, err = net.ListenPacket(network, addr)
		return err
	})
	return pc, err
}

// Dial connects from the namespace. addr must be numeric.
func (ns *NetNS) Dial(network, addr string, timeout time.Duration) (c net.Conn, err error) {
	if _, err := netip.ParseAddrPort(addr); err != nil {
		return nil, fmt.Errorf("dial from a namespace: %w", err)
	}
	err = ns.Do(func() error {
		// One address and no deadline racing keeps the socket on this thread.
		c, err = (&net.Dialer{Timeout: timeout, FallbackDelay: -1}).Dial(network, addr)
		return err
	})
	return c, err
}

func answerDNS(w dns.ResponseWriter, q *dns.Msg) {
	m := new(dns.Msg)
	m.SetReply(q)
	known := len(q.Question) == 1 && (q.Question[0].Name == OutsideName+"." || q.Question[0].Name == TFTPName+".")
	if known && q.Question[0].Qtype == dns.TypeA {
		m.Answer = []dns.RR{&dns.A{
			Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 60},
			A:   net.ParseIP(OutsideIP),
		}}
	} else if len(q.Question) == 1 && !known {
		m.Rcode = dns.RcodeNameError
	}
	_ = w.WriteMsg(m) // the client asks again
}

// Handler is the HTTP server of a World: GET /data?bytes=N gives N bytes with
// their SHA-256 in X-Sha256, PUT /data answers with the SHA-256 of what came,
// GET /whoami with the client's address as the server sees it.
func Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /data", func(rw http.ResponseWriter, r *http.Request) {
		n, err := strconv.ParseInt(r.FormValue("bytes"), 10, 64)
		if err != nil || n < 0 || n > 16<<30 {
			http.Error(rw, "bytes: want a number", http.StatusBadRequest)
			return
		}
		rw.Header().Set("Content-Length", strconv.FormatInt(n, 10))
		rw.Header().Set("X-Sha256", DataSum(n))
		_, _ = io.Copy(rw, Data(n)) // the client may leave
	})
	mux.HandleFunc("PUT /data", func(rw http.ResponseWriter, r *http.Request) {
		h := sha256.New()
		if _, err := io.Copy(h, r.Body); err != nil {
			http.Error(rw, err.Error(), http.StatusBadRequest)
			return
		}
		fmt.Fprint(rw, hexSum(h))
	})
	mux.HandleFunc("GET /whoami", func(rw http.ResponseWriter, r *http.Request) {
		fmt.Fprint(rw, r.RemoteAddr)
	})
	return mux
}

func hexSum(h hash.Hash) string { return hex.EncodeToString(h.Sum(nil)) }

// block is what Data repeats; its length is no power of two, so that a lost or
// doubled segment shifts everything behind it.
var block = sync.OnceValue(func() []byte { return Payload(65521, 7) })

type data struct {
	left int64
	off  int
}

// Data is a stream of n bytes, always the same ones.
func Data(n int64) io.Reader { return &data{left: n} }

func (d *data) Read(p []byte) (int, error) {
	if d.left == 0 {
		return 0, io.EOF
	}
	if int64(len(p)) > d.left {
		p = p[:d.left]
	}
	n := copy(p, block()[d.off:])
	d.off = (d.off + n) % len(block())
	d.left -= int64(n)
	return n, nil
}

var sums sync.Map // of int64 to string

// DataSum is the SHA-256 of Data(n), in hexadecimal.
func DataSum(n int64) string {
	if s, ok := sums.Load(n); ok {
		return s.(string)
	}
	h := sha256.New()
	_, _ = io.Copy(h, Data(n)) // neither side can fail
	s := hexSum(h)
	sums.Store(n, s)
	return s
}
