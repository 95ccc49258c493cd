package main

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"sidewire/dhcp"
	"sidewire/engine/enginetest"
	sidewiredns "sidewire/nat/dns"
	"sidewire/vhostuser/vhosttest"
)

// bigTXT is how many bytes of text the stub's answer about big.example has.
const bigTXT = 20 * 200

// stub is a resolver on the pod's loopback which, like systemd-resolved,
// refuses whoever is not on the loopback too.
func stub(w dns.ResponseWriter, q *dns.Msg) {
	m := new(dns.Msg)
	m.SetReply(q)
	name := q.Question[0].Name
	host, _, err := net.SplitHostPort(w.RemoteAddr().String())
	switch {
	case err != nil || !net.ParseIP(host).IsLoopback():
		m.Rcode = dns.RcodeRefused
	case name == "big.example.":
		for range bigTXT / 200 {
			m.Answer = append(m.Answer, &dns.TXT{
				Hdr: dns.RR_Header{Name: name, Rrtype: dns.TypeTXT, Class: dns.ClassINET, Ttl: 1},
				Txt: []string{strings.Repeat("x", 200)},
			})
		}
	default:
		m.Answer = []dns.RR{&dns.A{
			Hdr: dns.RR_Header{Name: name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 1},
			A:   net.IPv4(192, 0, 2, 53),
		}}
	}
	_ = w.WriteMsg(m)
}

// startStub serves the stub at an address of the pod. Like that of
// systemd-resolved it is bound to the loopback link: nothing else reaches it,
// whatever its destination is rewritten to.
func startStub(t *testing.T, w *enginetest.World, addr string) {
	t.Helper()
	c := net.ListenConfig{Control: control(func(fd int) error { return unix.BindToDevice(fd, "lo") })}
	serveDNS(t, w.Pod, c, "4", addr, stub)
}

// serveDNS answers on UDP and TCP of an IP version at an address of a namespace.
func serveDNS(t *testing.T, ns *enginetest.NetNS, c net.ListenConfig, version, addr string, h dns.HandlerFunc) {
	t.Helper()
	require.NoError(t, ns.Do(func() error {
		pc, err := c.ListenPacket(context.Background(), "udp"+version, addr)
		if err != nil {
			return err
		}
		t.Cleanup(func() { pc.Close() })
		l, err := c.Listen(context.Background(), "tcp"+version, addr)
		if err != nil {
			return err
		}
		t.Cleanup(func() { l.Close() })
		for _, srv := range []*dns.Server{{PacketConn: pc}, {Listener: l}} {
			srv.Handler = h
			go func() { _ = srv.ActivateAndServe() }() // ends with its socket
		}
		return nil
	}))
}

// dig asks the gateway and returns the short answer.
func (v *vm) dig(args ...string) string {
	v.t.Helper()
	return strings.TrimSpace(v.run("dig", append([]string{"+short", "+time=3", "+tries=1", "@10.0.2.1"}, args...)...))
}

// A resolver on the pod's loopback is the gateway to the guest, which forwards
// to it over UDP and TCP, whatever ports are published, and also past a
// resolver that is dead.
func TestLoopbackResolverIsTheGatewayRow64(t *testing.T) {
	enginetest.Need(t, "netns", "tun", "nft", "dhclient", "dig")
	const answer = "192.0.2.53"
	for name, c := range map[string]struct {
		ports []string
		conf  string
		stub  string
	}{
		"no ports":             {nil, "nameserver 127.0.0.53\n", "127.0.0.53:53"},
		"ports":                {[]string{"tcp:80"}, "nameserver 127.0.0.53\n", "127.0.0.53:53"},
		"127.0.0.1, no ports":  {nil, "nameserver 127.0.0.1\n", "127.0.0.1:53"},
		"127.0.0.1, its ports": {[]string{"tcp:53", "udp:53"}, "nameserver 127.0.0.1\n", "127.0.0.1:53"},
		"the first is dead":    {nil, "nameserver 127.0.0.99\nnameserver 127.0.0.53\n", "127.0.0.53:53"},
	} {
		t.Run(name, func(t *testing.T) {
			w := enginetest.NewWorld(t, enginetest.WorldOptions{})
			startStub(t, w, c.stub)
			w.ResolvConf = writeFile(t, "resolv.conf", c.conf)
			// IPv6 takes its time to settle, which is no change of ours.
			require.True(t, enginetest.Wait(soon, func() bool {
				out, err := runIn(w.Pod, t.TempDir(), "ip", "-o", "addr")
				return err == nil && !strings.Contains(out, "tentative")
			}))
			before := footprint(t, w.Pod)
			p := startSidewire(t, w, spec("vm", 1, c.ports...))
			v := startVM(t, p, vhosttest.Options{})
			assert.Contains(t, v.run("cat", v.dir+"/resolv.conf"), "nameserver 10.0.2.1")
			assert.Equal(t, answer, v.dig("a.example"))
			assert.Equal(t, answer, v.dig("+tcp", "b.example"))
			for _, how := range [][]string{{"+bufsize=8192", "+ignore"}, {"+tcp"}} {
				text := v.dig(append(how, "big.example", "TXT")...)
				assert.Equal(t, bigTXT, strings.Count(text, "x"), how)
			}
			// Other ports of the gateway are the pod's own.
			_, err := v.try("dig", "+tries=1", "+time=1", "-p", "54", "@10.0.2.1", "c.example")
			assert.Error(t, err)

			st := p.status().Interfaces[0].DNS
			require.NotNil(t, st.Listen)
			assert.Equal(t, "10.0.2.1:53", st.Listen.String())
			assert.EqualValues(t, [3]uint64{2, 2, 2}, [3]uint64{st.Relay.Queries, st.Relay.Answers, st.Relay.Conns})
			out := sidewire(t, "status", "--socket-dir", p.dir).out
			assert.Contains(t, out, "10.0.2.1:53 asks [127.0.0.")
			p.stop()
			assert.Empty(t, changes(before, footprint(t, w.Pod)))
		})
	}
}

// A guest that has IPv4 alone asks the gateway where the pod's resolvers have
// IPv6 alone, also an address of the link.
func TestIPv6ResolverIsTheGateway(t *testing.T) {
	enginetest.Need(t, "netns", "tun", "nft", "dhclient", "dig")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	enginetest.Must(t, w.Pod.Addr("eth0", "fd00:53::5/64"), w.Outside.Addr("veth0", "fd00:53::1/64"), w.Outside.Addr("veth0", "fe80::53/64"))
	serveDNS(t, w.Outside, net.ListenConfig{}, "6", "[::]:53", func(w dns.ResponseWriter, q *dns.Msg) {
		m := new(dns.Msg)
		m.SetReply(q)
		m.Answer = []dns.RR{&dns.TXT{
			Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeTXT, Class: dns.ClassINET, Ttl: 1}, Txt: []string{w.LocalAddr().Network()},
		}}
		_ = w.WriteMsg(m)
	})
	for name, addr := range map[string]string{"global": "fd00:53::1", "of the link": "fe80::53%eth0"} {
		t.Run(name, func(t *testing.T) {
			w.ResolvConf = writeFile(t, "resolv.conf", "nameserver "+addr+"\n")
			p := startSidewire(t, w, spec("vm", 1))
			v := startVM(t, p, vhosttest.Options{})
			assert.Contains(t, v.run("cat", v.dir+"/resolv.conf"), "nameserver 10.0.2.1")
			assert.Equal(t, `"udp"`, v.dig("a.example", "TXT"))
			assert.Equal(t, `"tcp"`, v.dig("+tcp", "a.example", "TXT"))
			st := p.status().Interfaces[0].DNS
			assert.Equal(t, "[10.0.2.1]", fmt.Sprint(st.Leased))
			assert.Contains(t, sidewire(t, "status", "--socket-dir", p.dir).out, "10.0.2.1:53 asks [["+addr+"]:53]: 1 queries, 1 answers")
			p.stop()
		})
	}
}

// Names that a flag gives are the guest's, and answers are kept, although it
// could ask the pod's resolver itself.
func TestNamesAndCacheOfTheRelay(t *testing.T) {
	enginetest.Need(t, "netns", "tun", "nft", "dhclient", "dig")
	flags := []string{"--dns-name", "Db.example=192.0.2.77,2001:db8::77", "--dns-cache", "10"}
	for path, start := range map[string]func(*testing.T, *enginetest.World, string, ...string) *process{"packet": startSidewire, "socket": startNobody} {
		t.Run(path, func(t *testing.T) {
			w := enginetest.NewWorld(t, enginetest.WorldOptions{})
			p := start(t, w, spec("vm", 1), flags...)
			v := startVM(t, p, vhosttest.Options{})
			assert.Contains(t, v.run("cat", v.dir+"/resolv.conf"), "nameserver 10.0.2.1")
			for _, how := range []string{"+notcp", "+tcp"} {
				assert.Equal(t, "192.0.2.77", v.dig(how, "db.EXAMPLE"))
				assert.Equal(t, "2001:db8::77", v.dig(how, "db.example", "AAAA"))
				assert.Equal(t, "db.example.", v.dig(how, "-x", "192.0.2.77"))
				assert.Empty(t, v.dig(how, "db.example", "MX"))
			}
			for range 2 {
				assert.Equal(t, enginetest.OutsideIP, v.dig("+nocookie", enginetest.OutsideName))
			}
			st := p.status().Interfaces[0]
			assert.Equal(t, path, st.Path)
			r := st.DNS.Relay
			assert.Equal(t, [4]uint64{8, 1, 1, 1}, [4]uint64{r.Static, r.CacheHits, r.CacheMisses, r.Answers})
			assert.Contains(t, sidewire(t, "status", "--socket-dir", p.dir).out, "8 about static names, 1 of 2 from the cache")
		})
	}
}

// A relay that a flag wants and that cannot be ends the start.
func TestNamesWithoutARelay(t *testing.T) {
	enginetest.Need(t, "netns", "tun", "nft")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	pc, err := w.Pod.ListenPacket("udp4", "0.0.0.0:53")
	require.NoError(t, err)
	t.Cleanup(func() { pc.Close() })
	before := footprint(t, w.Pod)
	sidewire(t, "run", "-f", writeFile(t, "vmi.yaml", spec("vm", 1)), "--netns", w.Pod.Path, "--socket-dir", socketDir(t), "--resolv-conf", w.ResolvConf,
		"--dns-name", "db.example=192.0.2.77").says(t, exitMachine, "run", []string{"--dns-name", "a process of the pod listens there"})
	assert.Empty(t, changes(before, footprint(t, w.Pod)))
}

// Links of the same name in two namespaces are two links.
func TestDialByALinkOfTheNamespace(t *testing.T) {
	enginetest.Need(t, "netns")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	enginetest.Must(t, enginetest.CreateVeth(w.Outside, "eth0", w.Pod, "other"),
		w.Pod.Addr("eth0", "fe80::5/64"), w.Outside.Addr("eth0", "fe80::5/64"))
	zones := map[uint32]bool{}
	for _, ns := range []*enginetest.NetNS{w.Pod, w.Outside} {
		c, err := (&resolver{relayPlace: relayPlace{netns: ns.Path}}).dial(t.Context(), "udp", "[fe80::53%eth0]:53")
		require.NoError(t, err)
		defer c.Close()
		raw, err := c.(*net.UDPConn).SyscallConn()
		require.NoError(t, err)
		require.NoError(t, raw.Control(func(fd uintptr) {
			peer, err := unix.Getpeername(int(fd))
			require.NoError(t, err)
			zones[peer.(*unix.SockaddrInet6).ZoneId] = true
		}))
	}
	assert.Equal(t, map[uint32]bool{2: true, 3: true}, zones)
	for _, same := range []string{"[fe80::1%7]:53", "[fe80::1]:53", "192.0.2.1:53", "a.example:53"} {
		assert.Equal(t, same, numericZone(same))
	}
}

// The status names those whom the guest asks, which are not all of the pod's.
func TestResolverStatusIsTheGuests(t *testing.T) {
	for want, conf := range map[string]string{
		"the guest asks [192.0.2.1]":                                "nameserver fd00::1\nnameserver 192.0.2.1\n",
		"no resolver in /etc/resolv.conf: the guest asks [8.8.8.8]": "",
	} {
		rc, err := dhcp.ParseResolvConf(strings.NewReader(conf))
		require.NoError(t, err)
		relay, err := sidewiredns.New(sidewiredns.Config{Allow: netip.MustParsePrefix("10.0.2.2/32")})
		require.NoError(t, err)
		r := &resolver{relayPlace: relayPlace{shown: netip.MustParseAddr("10.0.2.1")}, path: "/etc/resolv.conf", conf: rc, relay: relay}
		assert.Equal(t, want, r.status().String())
	}
}

// Nobody but the guest is answered at the gateway: to others the port is what
// it was.
func TestGatewayAnswersGuestsAlone(t *testing.T) {
	enginetest.Need(t, "netns", "tun", "nft", "dig")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	startStub(t, w, "127.0.0.53:53")
	w.ResolvConf = writeFile(t, "resolv.conf", "nameserver 127.0.0.53\n")
	p := startSidewire(t, w, spec("vm", 1, "tcp:80"))
	enginetest.Must(t, w.Outside.Route("10.0.2.0/24", enginetest.PodIP), w.Outside.Addr("veth0", guestIP+"/32"))
	for name, c := range map[string]struct {
		ns   *enginetest.NetNS
		from string
	}{"pod": {w.Pod, gatewayIP}, "outside": {w.Outside, enginetest.OutsideIP}, "outside, as the guest": {w.Outside, guestIP}} {
		for _, how := range []string{"+notcp", "+tcp"} {
			out, err := runIn(c.ns, t.TempDir(), "dig", "+short", "+time=1", "+tries=1", "-b", c.from, how, "@10.0.2.1", "a.example")
			assert.Error(t, err, "%s %s: %s", name, how, out)
		}
	}
	st := p.status().Interfaces[0].DNS.Relay
	assert.Zero(t, st.Queries+st.Conns)
	assert.LessOrEqual(t, st.Refused, uint64(4), "the pod's, which the kernel lets near: from outside nothing is")
}

// A process of the pod that listens for everybody answers the guest too, as it
// does with KubeVirt.
func TestPodsOwnServerAtTheGateway(t *testing.T) {
	enginetest.Need(t, "netns", "tun", "nft", "dhclient", "dig")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	pc, err := w.Pod.ListenPacket("udp4", "0.0.0.0:53")
	require.NoError(t, err)
	srv := &dns.Server{PacketConn: pc, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		m := new(dns.Msg)
		m.SetReply(q)
		m.Answer = []dns.RR{&dns.A{
			Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 1}, A: net.IPv4(192, 0, 2, 99),
		}}
		_ = w.WriteMsg(m)
	})}
	go func() { _ = srv.ActivateAndServe() }()
	t.Cleanup(func() { pc.Close() })
	w.ResolvConf = writeFile(t, "resolv.conf", "nameserver 127.0.0.1\n")
	p := startSidewire(t, w, spec("vm", 1))
	v := startVM(t, p, vhosttest.Options{})
	assert.Equal(t, "192.0.2.99", v.dig("a.example"))
	st := p.status().Interfaces[0].DNS
	assert.Nil(t, st.Listen)
	assert.Contains(t, st.Error, "a process of the pod listens there")
}

// What becomes of the resolv.conf is followed: by the next lease and by the
// relay.
func TestResolvConfIsFollowed(t *testing.T) {
	enginetest.Need(t, "netns", "tun", "nft", "dhclient", "dig")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	startStub(t, w, "127.0.0.53:53")
	original, err := os.ReadFile(w.ResolvConf)
	require.NoError(t, err)
	p := startSidewire(t, w, spec("vm", 1))
	v := startVM(t, p, vhosttest.Options{})
	lease := func() string { return v.run("cat", v.dir+"/resolv.conf") }
	assert.Contains(t, lease(), "nameserver "+enginetest.OutsideIP)
	_, err = v.try("dig", "+time=1", "+tries=1", "@10.0.2.1", "a.example")
	require.Error(t, err, "nobody listens as long as nobody needs to")

	// replace puts other content in the file's place, and waits until it counts.
	replace := func(content string) {
		t.Helper()
		next := w.ResolvConf + ".next"
		require.NoError(t, os.WriteFile(next, []byte(content), 0o644))
		require.NoError(t, os.Rename(next, w.ResolvConf))
		want := strings.Fields(content)[1]
		ok := enginetest.Wait(soon, func() bool { return p.status().Interfaces[0].DNS.Servers[0].String() == want })
		require.True(t, ok, "%s is not in %+v", want, p.status().Interfaces[0].DNS)
	}
	replace("nameserver 127.0.0.53\nsearch new.example\n")
	ok := enginetest.Wait(soon, func() bool { return p.status().Interfaces[0].DNS.Listen != nil })
	require.True(t, ok)
	v.dhclient("-x")
	v.dhclient("-1")
	assert.Contains(t, lease(), "nameserver 10.0.2.1")
	assert.Contains(t, lease(), "new.example")
	assert.Equal(t, "192.0.2.53", v.dig("a.example"))

	// The lease still says so: who was asked there is asked there, of others.
	replace(string(original))
	assert.Equal(t, enginetest.OutsideIP, v.dig(enginetest.OutsideName))
}

// watched follows what a path leads to. The channel gets the content after
// each change, "" for none.
func watched(t *testing.T, path string) chan string {
	t.Helper()
	w, err := watchFile(path)
	require.NoError(t, err)
	told, done := make(chan string, 100), make(chan struct{})
	go func() {
		defer close(done)
		for w.Next() == nil {
			b, _ := os.ReadFile(path)
			told <- string(b)
		}
	}()
	t.Cleanup(func() {
		w.Close()
		<-done
	})
	return told
}

// untilTold waits until a change to this content has been told.
func untilTold(t *testing.T, told chan string, want string) {
	t.Helper()
	for limit := time.After(soon); ; {
		select {
		case got := <-told:
			if got == want {
				return
			}
		case <-limit:
			t.Fatalf("%q is not noticed", want)
		}
	}
}

// A tree that is removed and made again is followed, and so are Kubernetes's
// volumes, in which a link to a directory is swapped before the old directory
// goes.
func TestFileWatchTreeMadeAgain(t *testing.T) {
	root := t.TempDir()
	write := func(name, content string) {
		path := filepath.Join(root, name)
		require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
		require.NoError(t, os.WriteFile(path, []byte(content), 0o644))
	}
	write("a/b/c/f", "first")
	told := watched(t, filepath.Join(root, "a/b/c/f"))
	for _, again := range []string{"second", "third"} {
		require.NoError(t, os.RemoveAll(filepath.Join(root, "a")))
		write("a/b/c/f", again)
		untilTold(t, told, again)
	}
	write("a/b/c/f", "fourth")
	untilTold(t, told, "fourth")

	swap := func(version string) {
		write("volume/.."+version+"/f", version)
		require.NoError(t, os.Symlink(".."+version, filepath.Join(root, "volume/..data_tmp")))
		require.NoError(t, os.Rename(filepath.Join(root, "volume/..data_tmp"), filepath.Join(root, "volume/..data")))
	}
	swap("v0")
	require.NoError(t, os.Symlink("..data/f", filepath.Join(root, "volume/f")))
	told = watched(t, filepath.Join(root, "volume/f"))
	for old, version := range []string{"v1", "v2", "v3"} {
		swap(version)
		untilTold(t, told, version)
		require.NoError(t, os.RemoveAll(filepath.Join(root, "volume/..v"+string(rune('0'+old)))))
	}
	require.NoError(t, os.RemoveAll(filepath.Join(root, "volume")))
	swap("v4")
	require.NoError(t, os.Symlink("..data/f", filepath.Join(root, "volume/f")))
	untilTold(t, told, "v4")
}

// A watch that the kernel takes away, as it does when a file system is
// unmounted, is a change, and another takes its place.
func TestFileWatchIsArmedAgain(t *testing.T) {
	dir := t.TempDir()
	w, err := watchFile(filepath.Join(dir, "sub/f"))
	require.NoError(t, err)
	limit := time.AfterFunc(soon, func() { w.Close() })
	defer limit.Stop()
	defer w.Close()
	for wd := range w.names {
		_, err := unix.InotifyRmWatch(int(w.f.Fd()), wd)
		require.NoError(t, err)
	}
	require.NoError(t, w.Next(), "the watches are gone")
	require.NoError(t, os.Mkdir(filepath.Join(dir, "sub"), 0o755))
	require.NoError(t, w.Next(), "the new ones see what comes")
}

// A directory on the way that may be passed but not read is no obstacle.
func TestFileWatchBehindUnreadableDirectory(t *testing.T) {
	closed := filepath.Join(t.TempDir(), "closed")
	require.NoError(t, os.MkdirAll(filepath.Join(closed, "open"), 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(closed, "open/f"), nil, 0o644))
	require.NoError(t, os.Chmod(closed, 0o311))
	t.Cleanup(func() { _ = os.Chmod(closed, 0o755) })
	if os.Geteuid() == 0 {
		const nobody = 65534
		require.NoError(t, os.Chmod(filepath.Dir(filepath.Dir(closed)), 0o755))
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		require.NoError(t, unix.Setfsuid(nobody))
		defer func() { require.NoError(t, unix.Setfsuid(0)) }()
	}
	w, err := watchFile(filepath.Join(closed, "open/f"))
	require.NoError(t, err)
	w.Close()
	_, err = watchFile(filepath.Join(closed, "none/f"))
	require.ErrorIs(t, err, unix.EACCES, "nobody would tell when it comes")
}

// Each step changes what the path leads to, in a way that is told once. (What
// removes an inode for good ends its watch too, and may be told twice.)
func TestFileWatch(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	mkdir := func(name string) { require.NoError(t, os.MkdirAll(at(name), 0o755)) }
	rename := func(from, to string) { require.NoError(t, os.Rename(at(from), at(to))) }
	write := func(name, content string) { require.NoError(t, os.WriteFile(at(name), []byte(content), 0o644)) }
	link := func(to, name string) {
		require.NoError(t, os.Symlink(to, at(name+"~")))
		rename(name+"~", name)
	}
	for _, name := range []string{"run", "v1", "v2", "etc/net"} {
		mkdir(name)
		write(name+"/f", filepath.Base(name))
	}
	write("plain", "")
	write("bystander", "bystander")
	link("run/f", "rel")
	link(at("rel"), "abs")
	link("v1", "data")
	link("data/f", "f")
	for _, c := range []struct {
		name, path string
		steps      []func()
		want       []string
	}{
		{"plain file", "plain", []func(){
			func() { write("plain", "written") },
			func() { write("other", "replaced"); rename("other", "plain") },
			func() { write("plain", "written again") },
			func() { rename("plain", "gone") },
			func() { write("other", "back"); rename("other", "plain") },
			func() { link("bystander", "plain") },
			func() { write("bystander", "now it matters") },
		}, []string{"written", "replaced", "written again", "", "back", "bystander", "now it matters"}},
		{"behind links", "abs", []func(){
			func() { write("run/f", "written") },
			func() { link("bystander", "rel") },
			func() { write("bystander", "elsewhere") },
			func() { link("v1/f", "abs") },
		}, []string{"written", "now it matters", "elsewhere", "v1"}},
		{"behind a link to a directory", "f", []func(){
			func() { link("v2", "data") },
			func() { write("v2/f", "written") },
			func() { link("v1", "data") },
		}, []string{"v2", "written", "v1"}},
		{"not there yet", "no/such/file", []func(){
			func() { mkdir("no") },
			func() { mkdir("no/such") },
			func() { write("other", "there"); rename("other", "no/such/file") },
		}, []string{"", "", "there"}},
		{"a directory that moves", "etc/net/f", []func(){
			func() { rename("etc", "away") },
			func() { mkdir("etc") },
			func() { mkdir("etc/net") },
			func() { write("other", "made again"); rename("other", "etc/net/f") },
			func() { rename("etc/net", "etc/away") },
			func() { rename("away/net", "etc/net") },
			func() { write("etc/net/f", "written") },
		}, []string{"", "", "", "made again", "", "net", "written"}},
		{"a file in the way", "etc/net/f/g", []func(){
			func() { rename("etc/net/f", "etc/f") },
			func() { mkdir("etc/net/f") },
			func() { write("other", "there"); rename("other", "etc/net/f/g") },
		}, []string{"", "", "there"}},
		{"..", "run/../run/f", []func(){func() { write("run/f", "seen") }}, []string{"seen"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			told := watched(t, at(c.path))
			for i, step := range c.steps {
				step()
				select {
				case got := <-told:
					require.Equal(t, c.want[i], got, "step %d", i)
				case <-time.After(soon):
					t.Fatalf("step %d is not noticed", i)
				}
			}
			assert.Empty(t, told, "each change is told once")
		})
	}
	_, err := watchFile(at("f") + "\x00")
	assert.NoError(t, err, "what cannot be is waited for too")
}
