package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
	"sidewire/nat/usernet"
	"sidewire/vhostuser/vhosttest"
)

// nobody is a user without any privilege.
const nobody = 65534

// startNobody runs sidewire in a world's pod as a user without privileges, and
// waits until it is ready.
func startNobody(t *testing.T, w *enginetest.World, vmi string, flags ...string) *process {
	t.Helper()
	return startWith(t, w, "", vmi, flags...)
}

// startWith is startNobody for a user with capabilities.
func startWith(t *testing.T, w *enginetest.World, caps, vmi string, flags ...string) *process {
	t.Helper()
	p := prepareNobody(t, w, vmi)
	p.launch(p.with(w, caps, flags...))
	t.Cleanup(func() {
		p.stop()
		if t.Failed() {
			t.Logf("sidewire's log:\n%s", p.log)
		}
	})
	return p
}

// prepareNobody makes a directory with all that the user needs.
func prepareNobody(t *testing.T, w *enginetest.World, vmi string) *process {
	t.Helper()
	enginetest.Need(t, "root", "netns", "setpriv")
	p := &process{t: t, dir: socketDir(t), log: &logBuffer{}}
	p.vmi = filepath.Join(p.dir, "vmi.yaml")
	resolv, err := os.ReadFile(w.ResolvConf)
	require.NoError(t, err)
	program, err := os.Open("/proc/self/exe")
	require.NoError(t, err)
	defer program.Close()
	copied, err := os.OpenFile(filepath.Join(p.dir, "sidewire"), os.O_CREATE|os.O_WRONLY, 0o755)
	require.NoError(t, err)
	_, err = io.Copy(copied, program)
	require.NoError(t, err)
	enginetest.Must(t, copied.Close(),
		os.WriteFile(p.vmi, []byte(vmi), 0o644), os.WriteFile(filepath.Join(p.dir, "resolv.conf"), resolv, 0o644),
		os.Chown(p.dir, nobody, nobody), os.Chmod(p.dir, 0o700))
	return p
}

// nobody is the program as that user, in the pod.
func (p *process) nobody(w *enginetest.World, flags ...string) *exec.Cmd {
	return p.with(w, "", flags...)
}

// with is the program as that user, with capabilities such as ",+net_admin".
func (p *process) with(w *enginetest.World, caps string, flags ...string) *exec.Cmd {
	args := append([]string{"--reuid", fmt.Sprint(nobody), "--regid", fmt.Sprint(nobody), "--clear-groups",
		"--bounding-set", "-all" + caps, "--inh-caps", "-all" + caps, "--ambient-caps", "-all" + caps, "--no-new-privs",
		filepath.Join(p.dir, "sidewire"), "run", "-f", p.vmi, "--socket-dir", p.dir, "--resolv-conf", filepath.Join(p.dir, "resolv.conf")}, flags...)
	cmd := w.Pod.Command("setpriv", args...)
	cmd.Env = append(os.Environ(), "SIDEWIRE_TEST_MAIN=1")
	return cmd
}

// logs waits until the log has a text.
func (p *process) logs(text string) {
	p.t.Helper()
	enginetest.Eventually(p.t, soon, func() bool { return strings.Contains(p.log.String(), text) })
}

// slirpSpec is spec for a slirp interface of a model.
func slirpSpec(name, model string, vcpus int, ports ...string) string {
	return strings.Replace(spec(name, vcpus, ports...), "masquerade: {}\n", "slirp: {}\n        model: "+model+"\n", 1)
}

// pings lets everybody in the pod ping.
func pings(t *testing.T, w *enginetest.World) {
	t.Helper()
	enginetest.Must(t, w.Pod.Sysctl("net/ipv4/ping_group_range", "0 2147483647"))
}

// A slirp guest has QEMU's addresses and names, reaches what QEMU lets it
// reach, and is reached by its listed ports, with no privilege at all.
func TestSlirpRow15Row24Row47Row48Row49Row50(t *testing.T) {
	enginetest.Need(t, "netns", "tun", "dhclient", "curl", "dig", "ping")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	pings(t, w)
	p := startNobody(t, w, slirpSpec("vm", "virtio", 1, "tcp:8080", "udp:8080"))
	v := startVM(t, p, vhosttest.Options{})
	assert.Contains(t, v.run("ip", "-4", "-o", "addr", "show", "dev", "eth0"), "10.0.2.15/24")
	assert.Contains(t, v.run("ip", "route"), "default via 10.0.2.2")
	leased, err := os.ReadFile(filepath.Join(v.dir, "resolv.conf"))
	require.NoError(t, err)
	assert.Contains(t, string(leased), "nameserver 10.0.2.3")
	assert.Contains(t, string(leased), "search default.svc.cluster.local", "option 119, as QEMU's dnssearch")
	v.run("ping", "-c", "1", "-W", "5", "10.0.2.2")
	_, err = v.try("ping", "-c", "1", "-W", "1", enginetest.OutsideIP)
	assert.Error(t, err, "ICMP beyond the gateway is not supported")
	assert.Equal(t, enginetest.OutsideIP+"\n", v.run("dig", "+short", "@10.0.2.3", enginetest.OutsideName))
	url := fmt.Sprintf("http://%s:%d", enginetest.OutsideIP, enginetest.HTTPPort)
	assert.True(t, strings.HasPrefix(v.run("curl", "-sS", "--max-time", "10", url+"/whoami"), enginetest.PodIP+":"))
	v.reached(w, "8080", "10.0.2.2")
	transfer(t, v, 16<<20)

	i := p.status().Interfaces[0]
	assert.Equal(t, "slirp socket 10.0.2.15 10.0.2.2 "+enginetest.PodIP, fmt.Sprint(i.Binding, " ", i.Path, " ", i.Guest, " ", i.Gateway, " ", i.Pod))
	assert.Equal(t, guestMAC.String(), i.MAC)
	assert.Equal(t, []forwardRequest{{Protocol: "TCP", Port: 8080}, {Protocol: "UDP", Port: 8080}}, i.Forwards)
	assert.NotZero(t, i.DNS.Relay.Answers)
	assert.Equal(t, "none", p.status().Path)
	if t.Failed() {
		t.Log(p.dump())
	}
}

// reached asserts that clients reach the guest's port by the pod's, over TCP and
// UDP, and are seen as from.
func (v *vm) reached(w *enginetest.World, port, from string) {
	v.t.Helper()
	s := &scene{World: w, t: v.t, guest: v.ns, far: w.Outside, dir: v.dir}
	var n int
	fmt.Sscan(port, &n)
	s.serveAt(v.ns, "vm", n)
	to := net.JoinHostPort(enginetest.PodIP, port)
	assert.Equal(v.t, "vm, peer "+from, s.tcp(w.Outside, to))
	assert.Equal(v.t, "vm, peer "+from, s.udp(w.Outside, to))
	// And by the pod's loopback, as the gateway.
	gateway := netip.MustParsePrefix(strings.Fields(v.run("ip", "-4", "-o", "addr", "show", "dev", "eth0"))[3]).Masked().Addr().Next()
	if from == "10.0.2.2" {
		gateway = gateway.Next()
	}
	assert.Equal(v.t, "vm, peer "+gateway.String(), s.tcp(w.Pod, net.JoinHostPort("127.0.0.1", port)))
	assert.Equal(v.t, "vm, peer "+gateway.String(), s.udp(w.Pod, net.JoinHostPort("127.0.0.1", port)))
}

// Without privileges masquerade takes the socket path, with KubeVirt's
// addresses, and clients keep theirs.
func TestMasqueradeOnSocketsRow35Row56Row57Row58(t *testing.T) {
	enginetest.Need(t, "netns", "tun", "dhclient", "curl", "dig", "ping")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{MTU: 1400})
	pings(t, w)
	p := startNobody(t, w, spec("vm", 1, "tcp:8080", "udp:8080"))
	p.logs("msg=serving")
	assert.Contains(t, p.log.String(), "masquerade takes the socket path")
	assert.Contains(t, p.log.String(), "CAP_NET_ADMIN and CAP_NET_RAW missing")
	v := startVM(t, p, vhosttest.Options{})
	addr := v.run("ip", "-4", "-o", "addr", "show", "dev", "eth0")
	assert.Contains(t, addr, "10.0.2.2/24")
	assert.Contains(t, v.run("ip", "link", "show", "dev", "eth0"), "mtu 1400")
	assert.Contains(t, v.run("ip", "route"), "default via 10.0.2.1")
	leased, err := os.ReadFile(filepath.Join(v.dir, "resolv.conf"))
	require.NoError(t, err)
	assert.Contains(t, string(leased), "nameserver "+enginetest.OutsideIP)
	v.run("ping", "-c", "1", "-W", "5", "10.0.2.1")
	v.run("ping", "-c", "1", "-W", "5", enginetest.OutsideIP)
	assert.Contains(t, v.run("ip", "neigh"), "10.0.2.1 dev eth0 lladdr 02:00:00:00:00:00")
	assert.Equal(t, enginetest.OutsideIP+"\n", v.run("dig", "+short", "@"+enginetest.OutsideIP, enginetest.OutsideName))
	assert.Equal(t, enginetest.OutsideIP+"\n", v.run("dig", "+short", "@10.0.2.1", enginetest.OutsideName))
	v.reached(w, "8080", enginetest.OutsideIP)
	transfer(t, v, 16<<20)
	st := p.status()
	assert.Equal(t, "socket", st.Path)
	assert.Equal(t, "socket", st.Interfaces[0].Path)
	assert.Equal(t, 1400, st.Interfaces[0].MTU)
	if t.Failed() {
		t.Log(p.dump())
	}
}

// The flag decides where there are privileges, and the pod may be another
// namespace than ours.
func TestSocketPathByFlag(t *testing.T) {
	enginetest.Need(t, "root", "netns", "tun", "dhclient", "curl")
	for _, pairs := range []int{1, 2} {
		w := enginetest.NewWorld(t, enginetest.WorldOptions{})
		p := startSidewire(t, w, spec("vm", pairs, "tcp:8080", "udp:8080"), "--path", "socket", "--mtu", "65520")
		v := startVM(t, p, vhosttest.Options{QueuePairs: pairs})
		assert.Contains(t, v.run("ip", "link", "show", "dev", "eth0"), "mtu 65520")
		v.reached(w, "8080", enginetest.OutsideIP)
		transfer(t, v, 64<<20)
		if t.Failed() {
			t.Log(p.dump())
		}
	}
}

// Forwards and flows can be looked at and changed while all runs.
func TestForwardsOfSockets(t *testing.T) {
	enginetest.Need(t, "netns", "tun", "dhclient")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	p := startNobody(t, w, slirpSpec("vm", "virtio", 2, "tcp:8080", "udp:8080"), "--forward", "vm/red=127.0.0.1:7000-7001:80/udp")
	v := startVM(t, p, vhosttest.Options{QueuePairs: 2})
	cmd := func(args ...string) outcome {
		return sidewire(t, append([]string{args[0], "--socket-dir", p.dir}, args[1:]...)...)
	}
	all := "vm/red tcp:8080 udp:127.0.0.1:7000:80 udp:127.0.0.1:7001:81 udp:8080\n"
	assert.Equal(t, outcome{out: all}, cmd("forward"))
	assert.Equal(t, outcome{out: strings.Replace(all, "tcp:8080", "tcp:8080 tcp:9000:8080", 1)}, cmd("forward", "add", "tcp:9000:8080"))
	v.reached(w, "8080", "10.0.2.2")
	s := &scene{World: w, t: t, guest: v.ns, far: w.Outside, dir: v.dir}
	assert.Equal(t, "vm, peer 10.0.2.2", s.tcp(w.Outside, enginetest.PodIP+":9000"))
	d := net.Dialer{Timeout: soon}
	var c net.Conn
	require.NoError(t, w.Outside.Do(func() (err error) { c, err = d.Dial("tcp4", enginetest.PodIP+":9000"); return err }))
	defer c.Close()
	require.True(t, echoesAfterGreeting(t, c))

	var l FlowList
	require.NoError(t, json.Unmarshal([]byte(cmd("flows", "--json", "--max", "100").out), &l))
	var inbound int
	for _, f := range l.Flows {
		if f.Protocol == "TCP" && f.Inbound && f.ExternalPort == 9000 && f.State == "established" {
			inbound++
			assert.Equal(t, "vm/red 10.0.2.15:8080 10.0.2.2", fmt.Sprintf("%s %s:%d %s", f.Interface, f.GuestAddr, f.GuestPort, f.Remote))
		}
	}
	assert.Equal(t, 1, inbound, "%+v", l.Flows)
	assert.Contains(t, cmd("flows", "--max", "1").out, "and more")
	assert.Contains(t, cmd("flows").out, "10.0.2.15:8080")

	assert.Equal(t, outcome{out: all}, cmd("forward", "del", "tcp:9000"))
	assert.Equal(t, "refused by pod", s.tcp(w.Outside, enginetest.PodIP+":9000"))
	assert.True(t, echoes(t, c, "it goes on"))

	assert.Equal(t, outcome{code: exitInput, err: "sidewire forward: forward 8080/tcp: there is one already\n"}, cmd("forward", "add", "tcp:8080"))
	assert.Equal(t, exitInput, cmd("forward", "remove", "tcp:9000").code)
	o := cmd("forward", "add", "tcp:80")
	assert.Contains(t, o.err, "forward 80/tcp: permission denied: it takes CAP_NET_BIND_SERVICE, or the setting net.ipv4.ip_unprivileged_port_start of at most 80")
	taken, err := w.Pod.Listen("tcp4", "0.0.0.0:9001")
	require.NoError(t, err)
	defer taken.Close()
	assert.Contains(t, cmd("forward", "add", "tcp:9001").err, "forward 9001/tcp: address already in use: another process listens there; end it, or forward another port")
	assert.Equal(t, outcome{out: all}, cmd("forward"))
}

// echoesAfterGreeting is echoes for a connection whose server says first whom it
// sees.
func echoesAfterGreeting(t *testing.T, c net.Conn) bool {
	t.Helper()
	b := make([]byte, 64)
	n, err := c.Read(b)
	return assert.NoError(t, err) && assert.Contains(t, string(b[:n]), "peer") && echoes(t, c, "hello")
}

// A port that is listed and cannot be had is said, with why.
func TestListedPortsThatFail(t *testing.T) {
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	taken, err := w.Pod.Listen("tcp4", "127.0.0.1:8080")
	require.NoError(t, err)
	defer taken.Close()
	for want, c := range map[string]struct {
		vmi   string
		flags []string
	}{
		"sidewire run: vm/red: forward 8080/tcp: address already in use: another process listens there; end it, or forward another port":                                                                                {vmi: spec("vm", 1, "tcp:8080")},
		"sidewire run: vm/red: forward 80/tcp: permission denied: it takes CAP_NET_BIND_SERVICE, or the setting net.ipv4.ip_unprivileged_port_start of at most 80, or another port that leads there: --forward PORT:80": {vmi: spec("vm", 1, "tcp:80")},
	} {
		p := prepareNobody(t, w, c.vmi)
		cmd := p.nobody(w, c.flags...)
		out, err := cmd.CombinedOutput()
		require.Error(t, err)
		assert.Equal(t, exitMachine, cmd.ProcessState.ExitCode())
		lines := strings.Split(strings.TrimSpace(string(out)), "\n")
		assert.Equal(t, want, lines[len(lines)-1])
	}
	// Another port does.
	p := startNobody(t, w, spec("vm", 1, "tcp:80", "tcp:81"), "--forward", "8081:80", "--forward", "8082:81")
	assert.Equal(t, []forwardRequest{{Protocol: "TCP", Port: 8081, Guest: 80}, {Protocol: "TCP", Port: 8082, Guest: 81}}, p.status().Interfaces[0].Forwards)
}

// What cannot be reached of "all ports" is said once.
func TestAllPortsOnSockets(t *testing.T) {
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	p := startNobody(t, w, spec("vm", 1))
	p.logs("msg=serving")
	assert.Equal(t, 1, strings.Count(p.log.String(), "no ports are listed, which means all"))
	assert.Contains(t, p.log.String(), "none of them reaches the guest from outside: list ports, or name some with --forward")
	p = startNobody(t, w, spec("vm", 1), "--forward", "8000-8002", "--forward", "5353:53/udp")
	p.logs("msg=serving")
	assert.Contains(t, p.log.String(), "only these reach the guest from outside")
	assert.Contains(t, p.log.String(), `ports="tcp:8000 tcp:8001 tcp:8002 udp:5353:53"`)
}

// Where a guest may go is for the flags to say, in their order.
func TestPolicyOfSockets(t *testing.T) {
	enginetest.Need(t, "netns", "tun", "dhclient", "ping")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	pings(t, w)
	p := startNobody(t, w, spec("vm", 1, "tcp:8080"), "--allow", enginetest.OutsideIP+":9001/tcp", "--deny", "10.244.0.0/16/tcp", "--deny", "any:9002",
		"--deny", "any/icmp", "--no-host-loopback")
	assert.Equal(t, []string{"allow=10.244.1.1:9001/tcp", "deny=10.244.0.0/16/tcp", "deny=any:9002", "deny=any/icmp"}, p.status().Interfaces[0].Policy)
	v := startVM(t, p, vhosttest.Options{})
	s := &scene{World: w, t: t, guest: v.ns, far: w.Outside, dir: v.dir}
	s.serveAt(w.Outside, "outside", 9001, 9002, 9003)
	s.serveAt(w.Pod, "pod", 7777)
	assert.Equal(t, "outside, peer "+enginetest.PodIP, s.tcp(v.ns, enginetest.OutsideIP+":9001"))
	assert.Equal(t, "unreachable", s.tcp(v.ns, enginetest.OutsideIP+":9003"))
	assert.Equal(t, "outside, peer "+enginetest.PodIP, s.udp(v.ns, enginetest.OutsideIP+":9003"))
	assert.Equal(t, "unreachable", s.udp(v.ns, enginetest.OutsideIP+":9002"))
	assert.Contains(t, s.ping(v.ns, enginetest.OutsideIP), "10.0.2.1: ")
	assert.Equal(t, "unreachable", s.tcp(v.ns, "10.0.2.1:7777"))
	assert.Equal(t, "somebody replies", s.ping(v.ns, "10.0.2.1"))
	assert.NotZero(t, p.status().Interfaces[0].Sockets.PolicyDenied)
}

// Flags that would mean nothing are refused.
func TestSocketFlags(t *testing.T) {
	file := func(vmi string) string { return writeFile(t, "vmi.yaml", vmi) }
	for _, c := range []struct {
		vmi, want string
		flags     []string
	}{
		{spec("vm", 1, "tcp:80"), "--allow and --deny: vm/red takes the packet path, which has nothing of the kind: it is for slirp and --path socket", []string{"--path", "packet", "--deny", "any"}},
		{spec("vm", 1, "tcp:80"), "--forward: vm/red takes the packet path", []string{"--path", "packet", "--forward", "80"}},
		{spec("vm", 1, "tcp:80"), "--mtu: vm/red takes the packet path", []string{"--path", "packet", "--mtu", "9000"}},
		{onLAN("vm", "blue", 1) + definition("blue", `{"type": "bridge"}`), "--no-host-loopback: no interface is for it, which is for slirp and --path socket", []string{"--no-host-loopback"}},
		{onLAN("vm", "blue", 1) + definition("blue", `{"type": "bridge"}`), "--dns-name and --dns-cache: no interface is for them", []string{"--dns-cache", "9"}},
		{spec("vm", 1), "invalid value \"10.1.0.0/8\" for flag -deny: rule \"deny=10.1.0.0/8\": 10.1.0.0/8 has bits behind its length", []string{"--deny", "10.1.0.0/8"}},
		{spec("vm", 1), "--mtu 100: want 576 to 65535", []string{"--mtu", "100"}},
		{slirpSpec("vm", "virtio", 1), "--forward nobody=80: no interface nobody that ports are forwarded to; there are: vm/red", []string{"--forward", "nobody=80"}},
		{slirpSpec("vm", "virtio", 1) + "---\n" + strings.Replace(slirpSpec("vm2", "virtio", 1), guestMAC.String(), "02:00:00:00:aa:02", 1),
			"--forward 80: say for which interface, as in vm/red=8080: there are vm/red, vm2/red", []string{"--forward", "80"}},
	} {
		o := sidewire(t, append([]string{"run", "-f", file(c.vmi), "--socket-dir", socketDir(t)}, c.flags...)...)
		assert.Equal(t, exitInput, o.code, o.err)
		assert.Contains(t, o.err, c.want)
	}
}

// The other commands know slirp too: an e1000 on a stream unless the VMI says
// otherwise.
func TestSlirpCommandsRow51(t *testing.T) {
	assert.Equal(t, outcome{}, sidewire(t, "validate", "-f", "../../engine/vmi/testdata/guide/11-slirp.yaml"))
	args := func(vmi string) []string {
		o := sidewire(t, "qemu-args", "-f", writeFile(t, "vmi.yaml", vmi), "--socket-dir", "/x", "--mtu", "9000")
		require.Zero(t, o.code, o.err)
		return strings.Split(o.out, "\n")
	}
	lines := args(strings.Replace(slirpSpec("vm", "x", 1), "        model: x\n", "", 1))
	assert.Contains(t, strings.Join(lines, "\n"), "-netdev\nstream,id=net-red,server=off")
	assert.Contains(t, lines, "e1000,id=nic-red,netdev=net-red,mac="+guestMAC.String()+",romfile=")
	assert.Contains(t, strings.Join(args(slirpSpec("vm", "virtio", 1)), "\n"), ",host_mtu=9000")
}

func TestParseUserForward(t *testing.T) {
	tcp := func(port, guest uint16) usernet.Forward {
		return usernet.Forward{Proto: frame.ProtoTCP, Port: port, Guest: guest}
	}
	for text, want := range map[string][]usernet.Forward{
		"80":                      {tcp(80, 80)},
		"8080:80":                 {tcp(8080, 80)},
		"8080:80/tcp":             {tcp(8080, 80)},
		"80-82":                   {tcp(80, 80), tcp(81, 81), tcp(82, 82)},
		"8080-8081:80":            {tcp(8080, 80), tcp(8081, 81)},
		"8080-8081:80-81":         {tcp(8080, 80), tcp(8081, 81)},
		"vm/red=127.0.0.1:53/udp": {{Proto: frame.ProtoUDP, Addr: netip.MustParseAddr("127.0.0.1"), Port: 53, Guest: 53}},
	} {
		name, fs, err := parseUserForward(text)
		require.NoError(t, err, text)
		assert.Equal(t, want, fs, text)
		assert.Equal(t, strings.Contains(text, "="), name == "vm/red")
	}
	for text, want := range map[string]string{
		"":                  `port "": want a number from 1 to 65535`,
		"80/sctp":           `protocol "sctp": want TCP or UDP`,
		"1.2.3:80":          `"1.2.3" is no IPv4 address`,
		"127.0.0.1":         "want [ADDR:]PORT[:GUESTPORT][/udp]",
		"1:2:3":             "want [ADDR:]PORT[:GUESTPORT][/udp]",
		"[::1]:80":          "want [ADDR:]PORT[:GUESTPORT][/udp]",
		"80-90:1-3":         "11 ports cannot lead to 3 of the guest's",
		"1-65535":           "65535 ports in a range, at most 4096",
		"1000-1010:65530":   "the guest's ports would end at 65540",
		"90-80":             "the range ends before it begins",
		"vm/red=8080:99999": `port "99999": want a number`,
	} {
		_, _, err := parseUserForward(text)
		require.ErrorContains(t, err, want, text)
		require.ErrorContains(t, err, "--forward "+text+": ", text)
	}
}

// The relay follows the pod's resolvers, whatever they are.
func TestResolversOfSockets(t *testing.T) {
	enginetest.Need(t, "netns", "tun", "dhclient", "dig")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	startStub(t, w, "127.0.0.53:53")
	startStub(t, w, "127.0.0.54:53")
	w.ResolvConf = writeFile(t, "resolv.conf", "nameserver 127.0.0.53\n")
	p := startNobody(t, w, spec("vm", 1, "tcp:8080"))
	v := startVM(t, p, vhosttest.Options{})
	leased, err := os.ReadFile(filepath.Join(v.dir, "resolv.conf"))
	require.NoError(t, err)
	assert.Contains(t, string(leased), "nameserver 10.0.2.1")
	for _, how := range []string{"+notcp", "+tcp"} {
		assert.NotEmpty(t, v.run("dig", how, "+short", "@10.0.2.1", "a.example"))
	}
	require.NoError(t, os.WriteFile(filepath.Join(p.dir, "resolv.conf"), []byte("nameserver 127.0.0.54\n"), 0o644))
	enginetest.Eventually(t, soon, func() bool {
		a := p.status().Interfaces[0].DNS.Asks
		return len(a) == 1 && a[0].String() == "127.0.0.54:53"
	})
	assert.NotEmpty(t, v.run("dig", "+short", "@10.0.2.1", "a.example"))
}

// Two guests share a pod. Each has its own ports, and reaches the other and
// itself by them (RFC 4787 REQ-9).
func TestTwoGuestsOnSockets(t *testing.T) {
	enginetest.Need(t, "netns", "tun", "dhclient")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	other := frame.MAC{0x02, 0, 0, 0, 0xaa, 0x02}
	p := startNobody(t, w, spec("vm", 1, "tcp:8081", "udp:8081")+"---\n"+
		strings.Replace(slirpSpec("vm2", "virtio", 1, "tcp:8082", "udp:8082"), guestMAC.String(), other.String(), 1))
	a := startVM(t, p, vhosttest.Options{})
	b := joinVM(t, vhosttest.Options{Path: filepath.Join(p.dir, "vm2", "red.sock"), MAC: other})
	s := &scene{World: w, t: t, guest: a.ns, far: b.ns, dir: a.dir}
	s.serveAt(a.ns, "vm", 8081)
	s.serveAt(b.ns, "vm2", 8082)
	for _, c := range []struct {
		from *vm
		port string
		want string
	}{
		{a, "8081", "vm, peer 10.0.2.1"}, {a, "8082", "vm2, peer 10.0.2.2"}, {b, "8081", "vm, peer 10.0.2.1"}, {b, "8082", "vm2, peer 10.0.2.2"},
	} {
		assert.Equal(t, c.want, s.tcp(c.from.ns, net.JoinHostPort(enginetest.PodIP, c.port)))
		assert.Contains(t, s.udp(c.from.ns, net.JoinHostPort(enginetest.PodIP, c.port)), strings.Split(c.want, " peer")[0])
	}
	st := p.status()
	assert.Equal(t, "socket", st.Path)
	assert.Less(t, st.Interfaces[0].Sockets.MaxSockets, usernet.MaxDescriptors()/2, "each has its share")
}
