package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"sidewire/engine/enginetest"
	"sidewire/engine/vmi"
	"sidewire/vhostuser"
)

// outcome is how a command line ended.
type outcome struct {
	code     int
	out, err string
}

func finish(t *testing.T, cmd *exec.Cmd) outcome {
	t.Helper()
	var out, errw bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errw
	return ended(t, cmd.Run(), &out, &errw)
}

func ended(t *testing.T, err error, out, errw *bytes.Buffer) outcome {
	t.Helper()
	o := outcome{out: out.String(), err: errw.String()}
	if exit := new(exec.ExitError); errors.As(err, &exit) {
		o.code = exit.ExitCode()
	} else {
		require.NoError(t, err)
	}
	return o
}

// sidewire runs the program to its end.
func sidewire(t *testing.T, args ...string) outcome {
	t.Helper()
	return finish(t, sidewireCommand(args...))
}

// says asserts that stderr is exactly one line for each fault, with the
// command's name before it and these words in it.
func (o outcome) says(t *testing.T, code int, command string, faults ...[]string) {
	t.Helper()
	assert.Equal(t, code, o.code, "exit code")
	assert.Empty(t, o.out, "stdout")
	lines := strings.Split(strings.TrimSuffix(o.err, "\n"), "\n")
	if !assert.Len(t, lines, len(faults), "%s", o.err) {
		return
	}
	for i, words := range faults {
		assert.True(t, strings.HasPrefix(lines[i], "sidewire "+command+": "), "%s", lines[i])
		for _, w := range words {
			assert.Contains(t, lines[i], w)
		}
	}
}

// badSpecs are faults of a VMI: what is replaced in a sound one by what, and
// the words that the fault's line has to have: field, reason, mend.
var badSpecs = map[string]struct {
	from, to string
	faults   [][]string
}{
	"malformed YAML":      {"masquerade: {}", "masquerade: {", [][]string{{":12: "}}},
	"unknown field":       {"macAddress", "macAdress", [][]string{{"interfaces[0].macAdress", "did you mean \"macAddress\"?"}}},
	"prefix of 33":        {"pod: {}", "pod: {vmNetworkCIDR: 10.0.2.0/33}", [][]string{{"spec.networks[0].pod.vmNetworkCIDR", "10.0.2.0/33", "write it like"}}},
	"no CIDR":             {"pod: {}", "pod: {vmNetworkCIDR: red}", [][]string{{"spec.networks[0].pod.vmNetworkCIDR", "red", "write it like"}}},
	"prefix of 31":        {"pod: {}", "pod: {vmNetworkCIDR: 10.0.2.0/31}", [][]string{{"spec.networks[0].pod.vmNetworkCIDR", "10.0.2.0/31", "use /30 or larger"}}},
	"unsupported binding": {"masquerade: {}", "passt: {}", [][]string{{"interfaces[0].passt", "discontinued since v1.3"}, {"interfaces[0]", "exactly one binding"}}},
	"no binding":          {"masquerade: {}", "bootOrder: 1", [][]string{{"interfaces[0]", "red", "exactly one binding"}}},
	"unknown model":       {"masquerade: {}", "masquerade: {}\n        model: ne2000", [][]string{{"interfaces[0].model", "ne2000"}}},
	"malformed MAC":       {guestMAC.String(), "02:00:00", [][]string{{"interfaces[0].macAddress", "malformed MAC"}}},
	"port twice":          {"masquerade: {}", "masquerade: {}\n        ports: [{port: 80}, {port: 80}]", [][]string{{"ports[1].port", "80/TCP", "twice", "remove one"}}},
	"port of 0":           {"masquerade: {}", "masquerade: {}\n        ports: [{port: 0}]", [][]string{{"ports[0]", "port"}}},
	"port of 70000":       {"masquerade: {}", "masquerade: {}\n        ports: [{port: 70000}]", [][]string{{"ports[0].port", "70000"}}},
	"unknown protocol":    {"masquerade: {}", "masquerade: {}\n        ports: [{port: 80, protocol: SCTP}]", [][]string{{"ports[0].protocol", "only TCP or UDP"}}},
	"no such network":     {"- name: red\n    pod", "- name: blue\n    pod", [][]string{{"interfaces[0].name", "Masquerade interface only implemented with pod network"}, {"networks[0].name", "blue", "not found"}, {"interfaces[0].name", "red", "not found"}}},
	"nothing in it":       {"VirtualMachineInstance", "Pod", [][]string{{"no VMI in it"}}},
}

// A VMI with a fault is refused with a line that names field and mend.
func TestBadSpecs(t *testing.T) {
	for name, c := range badSpecs {
		t.Run(name, func(t *testing.T) {
			sound := spec("vm", 1)
			require.Contains(t, sound, c.from)
			file := writeFile(t, "vmi.yaml", strings.Replace(sound, c.from, c.to, 1))
			dir := filepath.Join(socketDir(t), "new")
			want := make([][]string, len(c.faults))
			for i, words := range c.faults {
				want[i] = append([]string{file}, words...)
			}
			sidewire(t, "run", "-f", file, "--socket-dir", dir, "--netns", "/does/not/exist").says(t, exitInput, "run", want...)
			assert.NoDirExists(t, dir)
		})
	}
}

// Command lines that make no sense are refused before anything is touched.
func TestBadCommandLines(t *testing.T) {
	good := writeFile(t, "vmi.yaml", spec("vm", 1))
	for name, c := range map[string]struct {
		args  []string
		words []string
	}{
		"no file":           {[]string{"run"}, []string{"no VMI given", "-f"}},
		"missing file":      {[]string{"run", "-f", "/does/not/exist.yaml"}, []string{"/does/not/exist.yaml", "no such file"}},
		"unknown flag":      {[]string{"run", "-f", good, "--frobnicate"}, []string{"-frobnicate", "sidewire run -h"}},
		"argument":          {[]string{"run", good}, []string{"unexpected argument", "-f"}},
		"unknown path":      {[]string{"run", "-f", good, "--path", "tunnel"}, []string{"--path tunnel", "auto, packet or socket"}},
		"unknown mode":      {[]string{"run", "-f", good, "--mode", "both"}, []string{"--mode both", "server or client"}},
		"unknown polling":   {[]string{"run", "-f", good, "--poll", "often"}, []string{"--poll often", "adaptive, always or never"}},
		"bad CPUs":          {[]string{"run", "-f", good, "--cpus", "a"}, []string{"--cpus a", "such as 0,2-4"}},
		"CPUs of others":    {[]string{"run", "-f", good, "--cpus", "0,1001"}, []string{"--cpus 0,1001", "processor 1001"}},
		"bad uplink":        {[]string{"run", "-f", good, "--uplink", "eth1"}, []string{"--uplink eth1", "NETWORK=LINK"}},
		"bad name":          {[]string{"run", "-f", good, "--dns-name", "db.example"}, []string{"-dns-name", `"db.example"`, "NAME=ADDR[,ADDR]"}},
		"bad address":       {[]string{"run", "-f", good, "--dns-name", "db.example=far"}, []string{"-dns-name", `"far" is no IP address`}},
		"bad cache":         {[]string{"run", "-f", good, "--dns-cache", "-1"}, []string{"--dns-cache -1", "0 to 65536"}},
		"validate nothing":  {[]string{"validate"}, []string{"no file given", "-f"}},
		"status argument":   {[]string{"status", "please"}, []string{"please"}},
		"status flag late":  {[]string{"status", "please", "--json"}, []string{"please", "status -h"}},
		"forward flag late": {[]string{"forward", "list", "--json"}, []string{"--json", "flags stand before"}},
		"no namespace":      {[]string{"run", "-f", good + "@"}, []string{good + "@", "FILE@NETNS"}},
		"status flag":       {[]string{"status", "--frobnicate"}, []string{"-frobnicate", "sidewire status -h"}},
		"forward what":      {[]string{"forward", "frob"}, []string{"frob", "list, add or remove"}},
		"forward port":      {[]string{"forward", "add", "tcp:0"}, []string{"1 to 65535"}},
		"forward protocol":  {[]string{"forward", "add", "gre:1"}, []string{"gre", "TCP or UDP"}},
		"forward no port":   {[]string{"forward", "add"}, []string{"PROTO:PORT"}},
		"qemu-args no file": {[]string{"qemu-args"}, []string{"no VMI given", "-f"}},
	} {
		t.Run(name, func(t *testing.T) {
			sidewire(t, c.args...).says(t, exitInput, c.args[0], c.words)
		})
	}
	sidewire(t, "run", "-f", good, "-f", good).says(t, exitInput, "run",
		[]string{"metadata.name", "needs its own"}, []string{"macAddress", "give each its own"}, []string{"ports", "list ports or use -f FILE@NETNS"})
	o := sidewire(t, "frobnicate")
	assert.Equal(t, exitInput, o.code)
	assert.Contains(t, o.err, "frobnicate")
	o = sidewire(t)
	assert.Equal(t, exitInput, o.code)
	assert.Contains(t, o.err, "usage: sidewire COMMAND")
	for _, args := range [][]string{{"help"}, {"run", "-h"}, {"status", "--help"}} {
		o = sidewire(t, args...)
		assert.Equal(t, exitOK, o.code, args)
		assert.NotEmpty(t, o.err, args)
	}
}

// What the machine or another process stands in the way of is named, and
// nothing is left behind: not in the namespace, and no socket.
func TestRefusedStarts(t *testing.T) {
	enginetest.Need(t, "root", "netns", "tun", "nft", "ip")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	file := writeFile(t, "vmi.yaml", spec("vm", 1))
	empty := writeFile(t, "resolv.conf", "")
	noAddr := enginetest.NewNetNS(t)
	enginetest.Veth(t, noAddr, "eth0", w.Outside, "veth9")
	for name, c := range map[string]struct {
		prepare func(dir string)
		args    []string
		code    int
		words   []string
	}{
		"no such link": {nil, []string{"--netns", w.Pod.Path, "--uplink", "red=eth7"}, exitInput,
			[]string{"vm/red", "eth7", "eth0", "--uplink"}},
		"no address": {nil, []string{"--netns", noAddr.Path}, exitMachine, []string{"vm/red", "eth0", "no IP address"}},
		"no namespace": {nil, []string{"--netns", "/run/netns/nowhere"}, exitMachine,
			[]string{"/run/netns/nowhere", "no such file"}},
		"no resolvers": {nil, []string{"--netns", w.Pod.Path, "--resolv-conf", empty + "x"}, exitInput,
			[]string{empty + "x", "--resolv-conf"}},
		"socket is a file": {func(dir string) {
			require.NoError(t, os.MkdirAll(filepath.Join(dir, "vm"), 0o700))
			require.NoError(t, os.WriteFile(filepath.Join(dir, "vm", "red.sock"), []byte("precious"), 0o600))
		}, []string{"--netns", w.Pod.Path}, exitMachine, []string{"vm/red.sock", "socket"}},
		"control is a file": {func(dir string) {
			require.NoError(t, os.WriteFile(filepath.Join(dir, "control.sock"), []byte("precious"), 0o600))
		}, []string{"--netns", w.Pod.Path}, exitInput, []string{"control.sock", "no socket", "--control"}},
		"socket directory is a file": {func(dir string) {
			require.NoError(t, os.WriteFile(filepath.Join(dir, "vm"), []byte("precious"), 0o600))
		}, []string{"--netns", w.Pod.Path}, exitMachine, []string{"/vm", "--socket-dir"}},
	} {
		t.Run(name, func(t *testing.T) {
			dir := socketDir(t)
			if c.prepare != nil {
				c.prepare(dir)
			}
			before, files := footprint(t, w.Pod), listing(t, dir)
			args := append([]string{"run", "-f", file, "--socket-dir", dir, "--resolv-conf", w.ResolvConf}, c.args...)
			sidewire(t, args...).says(t, c.code, "run", c.words)
			assert.Empty(t, changes(before, footprint(t, w.Pod)), "left in the namespace")
			assert.Equal(t, files, listing(t, dir), "left in the socket directory")
		})
	}
}

// listing is every file below a directory with its content; directories are
// no harm.
func listing(t *testing.T, dir string) map[string]string {
	t.Helper()
	out := map[string]string{}
	require.NoError(t, filepath.WalkDir(dir, func(p string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, _ := os.ReadFile(p) // a socket cannot be read
		out[p] = string(b)
		return nil
	}))
	return out
}

// A second sidewire is refused while the first runs, and does it no harm;
// another program's socket is not taken away.
func TestSocketsInUse(t *testing.T) {
	s := sidewireScene(t)
	start := func(dir string, more ...string) outcome {
		args := append([]string{"run", "-f", s.proc.vmi, "--netns", s.Pod.Path, "--socket-dir", dir, "--resolv-conf", s.ResolvConf}, more...)
		return sidewire(t, args...)
	}
	start(s.proc.dir).says(t, exitMachine, "run", []string{"control.sock", "in use", "--control"})
	other := socketDir(t)
	start(s.proc.dir, "--control", filepath.Join(other, "c")).says(t, exitMachine, "run", []string{"vm/red"})
	start(other).says(t, exitMachine, "run", []string{"vm/red", "another sidewire serves this link"})
	assert.Empty(t, listing(t, other), "left in the socket directory")
	assert.Equal(t, "vm, peer 10.244.1.1", s.tcp(s.Outside, "10.244.1.5:80"), "the first one still serves")
	assert.Equal(t, vhostuser.Up, s.proc.status().Interfaces[0].Device.State)

	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	require.NoError(t, os.MkdirAll(filepath.Join(other, "vm"), 0o700))
	path := filepath.Join(other, "vm", "red.sock")
	l, err := net.Listen("unix", path)
	require.NoError(t, err)
	defer l.Close()
	before := footprint(t, w.Pod)
	sidewire(t, "run", "-f", s.proc.vmi, "--netns", w.Pod.Path, "--socket-dir", other, "--resolv-conf", w.ResolvConf).
		says(t, exitMachine, "run", []string{path, "in use"})
	assert.FileExists(t, path)
	assert.Empty(t, changes(before, footprint(t, w.Pod)))

	start(other, "--control", filepath.Join(other, strings.Repeat("control", 20))).says(t, exitInput, "run", []string{"107", "--control"})
	long := filepath.Join(other, strings.Repeat("long", 30))
	start(long).says(t, exitInput, "run", []string{"vm/red.sock", "107", "--socket-dir"})
	assert.NoDirExists(t, long)
}

// withoutCapabilities runs the program in a namespace without any capability.
func withoutCapabilities(t *testing.T, netns string, args ...string) outcome {
	t.Helper()
	cmd := sidewireCommand(args...)
	var out, errw bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errw
	started := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with what it gave up
		started <- func() error {
			ns, err := os.Open(netns)
			if err != nil {
				return err
			}
			defer ns.Close()
			if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
				return err
			}
			for c := range unix.CAP_LAST_CAP + 1 {
				if err := unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(c), 0, 0, 0); err != nil {
					return err
				}
			}
			return cmd.Start()
		}()
	}()
	require.NoError(t, <-started)
	return ended(t, cmd.Wait(), &out, &errw)
}

// Without the capabilities of the packet path the missing one is named, with
// the command that grants it.
func TestMissingCapability(t *testing.T) {
	enginetest.Need(t, "root", "netns", "tun", "nft", "ip")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	file := writeFile(t, "vmi.yaml", spec("vm", 1))
	dir := socketDir(t)
	before := footprint(t, w.Pod)
	run := []string{"run", "-f", file, "--socket-dir", dir, "--resolv-conf", w.ResolvConf}
	withoutCapabilities(t, w.Pod.Path, append(run, "--path", "packet")...).
		says(t, exitMachine, "run", []string{"vm/red", "CAP_NET_ADMIN", "setcap", "--path socket"})
	run = append(run, "--netns", w.Pod.Path)
	withoutCapabilities(t, w.Outside.Path, append(run, "--path", "packet")...).
		says(t, exitMachine, "run", []string{"vm/red", "CAP_SYS_ADMIN", "setcap"})
	withoutCapabilities(t, w.Outside.Path, append(run, "--path", "socket")...).
		says(t, exitMachine, "run", []string{"vm/red", "CAP_SYS_ADMIN", "setcap cap_sys_admin+ep", "start it in the pod's namespace"})
	assert.Empty(t, changes(before, footprint(t, w.Pod)))
	assert.Empty(t, listing(t, dir))
}

func TestValidateCommand(t *testing.T) {
	good := writeFile(t, "good.yaml", spec("vm", 1))
	bad := writeFile(t, "bad.yaml", strings.Replace(spec("vm", 1), "macAddress", "macAdress", 1))
	assert.Equal(t, outcome{}, sidewire(t, "validate", "-f", good))
	for _, none := range []string{"", "kind: VirtualMachineInstanc\nspec: {domain: {}}\n", "kind: Pod\n"} {
		sidewire(t, "validate", "-f", writeFile(t, "none.yaml", none)).says(t, exitInput, "validate", []string{"none.yaml", "no VMI", "kind: VirtualMachineInstance"})
	}
	assert.Zero(t, sidewire(t, "validate", "-f", writeFile(t, "nad.yaml", definition("blue", `{"type": "bridge"}`))).code)
	// A machine without a domain would get the default interface: the pod's own link.
	sidewire(t, "run", "-f", writeFile(t, "vm.yaml", "kind: VM\n")).says(t, exitInput, "run", []string{"spec.domain", "no machine that could run"})
	o := sidewire(t, "validate", "-f", bad)
	assert.Equal(t, exitInput, o.code)
	assert.Empty(t, o.err)
	assert.Equal(t, "spec.domain.devices.interfaces[0].macAdress: unknown field \"macAdress\", did you mean \"macAddress\"?\n", o.out)

	o = sidewire(t, "validate", "--json", "-f", good)
	assert.Equal(t, exitOK, o.code)
	assert.JSONEq(t, "[]", o.out)
	o = sidewire(t, "validate", "--json", "-f", bad)
	assert.Equal(t, exitInput, o.code)
	var faults []vmi.Fault
	require.NoError(t, json.Unmarshal([]byte(o.out), &faults))
	require.Len(t, faults, 1)
	assert.Equal(t, "spec.domain.devices.interfaces[0].macAdress", faults[0].Field)
	assert.Equal(t, vmi.Invalid, faults[0].Reason)

	multus := writeFile(t, "multus.yaml", strings.NewReplacer("masquerade: {}", "bridge: {}", "pod: {}", "multus: {networkName: n}").Replace(spec("vm", 1)))
	o = sidewire(t, "validate", "-f", multus)
	assert.Equal(t, outcome{err: o.err}, o, "KubeVirt takes it")
	assert.Contains(t, o.err, "unserved: ")
}

func TestStatusWithoutSidewire(t *testing.T) {
	dir := socketDir(t)
	for _, args := range [][]string{{"status"}, {"status", "--json"}, {"forward"}} {
		args = append(args[:1:1], append([]string{"--socket-dir", dir}, args[1:]...)...)
		sidewire(t, args...).says(t, exitMachine, args[0], []string{filepath.Join(dir, "control.sock"), "is sidewire run running", "--control"})
	}
}

// Ports are added and removed while connections come in.
func TestForwardCommand(t *testing.T) {
	s := sidewireScene(t, "tcp:80")
	forward := func(args ...string) outcome {
		t.Helper()
		return sidewire(t, append([]string{"forward", "--socket-dir", s.proc.dir}, args...)...)
	}
	assert.Equal(t, outcome{out: "vm/red tcp:80\n"}, forward("list"))
	require.Equal(t, "pod, peer 10.244.1.1", s.tcp(s.Outside, "10.244.1.5:81"))
	require.Equal(t, "refused by pod", s.udp(s.Outside, "10.244.1.5:80"))

	assert.Equal(t, outcome{out: "vm/red tcp:80 tcp:81\n"}, forward("add", "tcp:81"))
	assert.Equal(t, "vm, peer 10.244.1.1", s.tcp(s.Outside, "10.244.1.5:81"))
	assert.Equal(t, "vm, peer 10.0.2.1", s.tcp(s.Pod, "127.0.0.1:81"))
	assert.Equal(t, outcome{out: "vm/red tcp:80 tcp:81 udp:80\n"}, forward("add", "vm/red", "udp:80"))
	assert.Equal(t, "vm, peer 10.244.1.1", s.udp(s.Outside, "10.244.1.5:80"))
	open := dialFrom(t, s.Outside, "10.244.1.5:80")

	assert.Equal(t, outcome{out: "vm/red tcp:81 udp:80\n"}, forward("remove", "tcp:80"))
	assert.Equal(t, "refused by pod", s.tcp(s.Outside, "10.244.1.5:80"))
	_ = open.Close()
	assert.Equal(t, outcome{out: "vm/red udp:80\n"}, forward("remove", "tcp:81"))
	assert.Equal(t, "pod, peer 10.244.1.1", s.tcp(s.Outside, "10.244.1.5:81"))
	assert.Equal(t, "pod, peer 127.0.0.1", s.tcp(s.Pod, "127.0.0.1:81"))
	assert.Equal(t, outcome{out: "vm/red none\n"}, forward("remove", "udp:80"))
	assert.Equal(t, "refused by pod", s.udp(s.Outside, "10.244.1.5:80"))
	assert.Equal(t, outcome{out: "vm/red tcp:80\n"}, forward("add", "80"))
	assert.Equal(t, "vm, peer 10.244.1.1", s.tcp(s.Outside, "10.244.1.5:80"))

	forward("remove", "tcp:4444").says(t, exitInput, "forward", []string{"4444"})
	forward("add", "vm/blue", "tcp:1").says(t, exitInput, "forward", []string{"vm/blue", "vm/red"})
	o := sidewire(t, "status", "--socket-dir", s.proc.dir)
	assert.Zero(t, o.code, o.err)
	for _, want := range []string{"vm/red", "masquerade", "guest 10.0.2.2", "pod 10.244.1.5 on eth0", "tcp:80", "(up)"} {
		assert.Contains(t, o.out, want)
	}
}

// A port that cannot be published belongs to nobody afterwards.
func TestForwardThatFails(t *testing.T) {
	enginetest.Need(t, "root", "netns", "tun", "nft")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	mac := "        macAddress: " + guestMAC.String() + "\n"
	p := startSidewire(t, w, spec("vm", 1, "tcp:80")+"---\n"+strings.Replace(spec("vm2", 1, "tcp:81"), mac, "", 1))
	require.NoError(t, w.Pod.Run("nft", "delete", "table", "netdev", "sidewire-eth0"))
	for _, nic := range []string{"vm/red", "vm2/red"} {
		o := sidewire(t, "forward", "--socket-dir", p.dir, "add", nic, "tcp:90")
		assert.Equal(t, exitInput, o.code)
		assert.Contains(t, o.err, "forward TCP port 90: publish ports: ", nic)
	}
	assert.Equal(t, outcome{out: "vm/red tcp:80\nvm2/red tcp:81\n"}, sidewire(t, "forward", "--socket-dir", p.dir))
}

func TestForwardWithoutList(t *testing.T) {
	s := sidewireScene(t)
	for _, change := range []string{"add", "remove"} {
		sidewire(t, "forward", "--socket-dir", s.proc.dir, change, "tcp:80").
			says(t, exitInput, "forward", []string{"vm/red", "every port is forwarded already"})
	}
	assert.Equal(t, outcome{out: "vm/red everything\n"}, sidewire(t, "forward", "--socket-dir", s.proc.dir, "list"))
}

// The arguments for a current QEMU, as scripts will use them.
func TestQEMUArgsCommand(t *testing.T) {
	enginetest.Need(t, "netns")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{MTU: 1450})
	file := writeFile(t, "vmi.yaml", spec("vm", 2))
	qemu := func(version string) string {
		p := writeFile(t, "qemu", "#!/bin/sh\necho QEMU emulator version "+version+"\n")
		require.NoError(t, os.Chmod(p, 0o755))
		return p
	}
	want := `-m
256M
-object
memory-backend-memfd,id=mem,size=256M,share=on
-numa
node,memdev=mem
-smp
2,sockets=1,cores=2,threads=1
-chardev
socket,id=char-red,path=/run/sw/vm/red.sock,reconnect-ms=100
-netdev
vhost-user,id=net-red,chardev=char-red,queues=2
-device
virtio-net-pci,id=nic-red,netdev=net-red,mac=02:00:00:00:aa:01,mq=on,vectors=6,mrg_rxbuf=on,rx_queue_size=1024,tx_queue_size=1024,host_mtu=1450,disable-legacy=on,romfile=
`
	args := []string{"qemu-args", "-f", file, "--socket-dir", "/run/sw", "--netns", w.Pod.Path, "--qemu"}
	assert.Equal(t, outcome{out: want}, sidewire(t, append(args, qemu("10.0.2"))...))
	o := sidewire(t, append(args, qemu("7.2.22"))...)
	assert.Zero(t, o.code)
	assert.Contains(t, o.out, "vectors=0")
	assert.Contains(t, o.out, "reconnect=1\n")
	assert.Contains(t, o.err, "note: vectors=0", "it is said why")
	o = sidewire(t, append(args, qemu("7.2.22"), "--kvm")...)
	assert.Contains(t, o.out, "vectors=6")
	o = sidewire(t, append(args, "/does/not/exist")...)
	assert.Zero(t, o.code)
	assert.Contains(t, o.out, "vectors=0")
	assert.Contains(t, o.err, "name yours with --qemu")
	sidewire(t, "qemu-args", "-f", file, "--netns", "/does/not/exist").says(t, exitMachine, "qemu-args",
		[]string{"/does/not/exist", "--netns"})
}
