package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"sidewire/engine/enginetest"
)

// guestImage builds what a launched QEMU boots.
func guestImage(t *testing.T) []string {
	t.Helper()
	enginetest.Need(t, "qemu", "kernel", "go")
	kernel, initramfs, err := enginetest.BuildGuestImage(t.TempDir(), "")
	require.NoError(t, err)
	return []string{
		"qemu-system-x86_64", "-machine", "pc,accel=tcg", "-cpu", "max", "-nodefaults", "-no-user-config", "-display", "none",
		"-kernel", kernel, "-initrd", initramfs,
		"-append", "console=ttyS0 quiet panic=-1 tsc=reliable no_timer_check nokaslr mitigations=off",
	}
}

// launchedVM is a sidewire that has started a QEMU.
type launchedVM struct {
	*process
	*enginetest.Agent
	out *logBuffer // of sidewire and of QEMU
	in  io.WriteCloser
}

// startLaunched runs sidewire with a QEMU. Its guest's agent talks on a
// descriptor that is passed through sidewire, as a user's own would be.
func startLaunched(t *testing.T, w *enginetest.World, doc string, flags, qemu []string) *launchedVM {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	ours, theirs := os.NewFile(uintptr(fds[0]), "agent"), os.NewFile(uintptr(fds[1]), "agent")
	defer theirs.Close()
	l := &launchedVM{process: &process{t: t, dir: socketDir(t), log: &logBuffer{}, vmi: writeFile(t, "vmi.yaml", doc)}, out: &logBuffer{}}
	args := append([]string{"run", "-f", l.vmi, "--netns", w.Pod.Path, "--socket-dir", l.dir, "--resolv-conf", w.ResolvConf}, flags...)
	args = append(append(args, "--"), qemu...)
	args = append(args, "-serial", "stdio", "-chardev", "socket,id=agent,fd=5", "-serial", "chardev:agent")
	l.cmd = sidewireCommand(args...)
	l.cmd.ExtraFiles = []*os.File{nil, nil, theirs} // its number is 5
	l.cmd.Stdout, l.cmd.Stderr = l.out, l.log
	l.in, err = l.cmd.StdinPipe()
	require.NoError(t, err)
	require.NoError(t, l.cmd.Start())
	t.Cleanup(func() {
		l.stop()
		ours.Close()
		if t.Failed() {
			t.Logf("sidewire's log:\n%s\nand QEMU's console:\n%s", l.log, l.out)
		}
	})
	l.Agent = enginetest.NewAgent(ours)
	if !slices.Contains(qemu, "-incoming") {
		require.NoError(t, l.WaitBoot(1, time.Minute), "%s", l.log)
	}
	return l
}

// qemuPID is the process that a sidewire has started.
func (l *launchedVM) qemuPID() int {
	l.t.Helper()
	pid := 0
	require.True(l.t, enginetest.Wait(5*time.Second, func() bool {
		tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", l.cmd.Process.Pid))
		for _, f := range tasks {
			b, _ := os.ReadFile(f)
			for _, s := range strings.Fields(string(b)) {
				pid, _ = strconv.Atoi(s)
			}
		}
		return pid > 0
	}), "sidewire has no child")
	return pid
}

// gone says whether a process has ended.
func gone(pid int) bool {
	return enginetest.Wait(10*time.Second, func() bool { return unix.Kill(pid, 0) == unix.ESRCH })
}

// exits waits for sidewire's end and returns its code.
func (l *launchedVM) exits() int {
	l.t.Helper()
	cmd := l.cmd
	l.cmd = nil
	done := make(chan struct{})
	go func() { _ = cmd.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(30 * time.Second):
		_ = cmd.Process.Kill()
		<-done
		l.t.Fatalf("sidewire does not end\n%s", l.log)
	}
	return cmd.ProcessState.ExitCode()
}

// A guest that sidewire starts has its network from the first moment: memory
// that the user gave as QEMU likes it is made visible, the user's descriptors
// and standard output arrive, and SIGTERM ends both in order.
func TestLaunch(t *testing.T) {
	t.Parallel() // most of its time is QEMU's
	enginetest.Need(t, "netns", "tun", "nft")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	l := startLaunched(t, w, spec("vm", 2, "tcp:80"), nil, append(guestImage(t), "-m", "256"))
	assert.True(t, strings.HasPrefix(l.out.String(), "ready\n"), "%s", l.out)
	r, err := l.Do(enginetest.GuestCmd{Do: "dhcp"})
	require.NoError(t, err)
	assert.Equal(t, "10.0.2.2/24", r.Lease.Addr)
	r, err = l.Do(enginetest.GuestCmd{Do: "http_get", Timeout: time.Minute, URL: outsideURL("/data?bytes=1048576")})
	require.NoError(t, err)
	assert.Equal(t, enginetest.DataSum(1<<20), r.Sum)
	r, err = l.Do(enginetest.GuestCmd{Do: "link"})
	require.NoError(t, err)
	assert.Equal(t, guestMAC.String(), r.Link.MAC)
	assert.Equal(t, 2, r.Link.MaxChan)
	pid := l.qemuPID()
	require.NoError(t, l.cmd.Process.Signal(syscall.SIGTERM))
	assert.Zero(t, l.exits(), "%s", l.log)
	assert.True(t, gone(pid))
}

// Memory that others cannot see is mended, whatever way it was given.
func TestLaunchMendsMemory(t *testing.T) {
	t.Parallel() // most of its time is QEMU's
	enginetest.Need(t, "netns", "tun", "nft")
	image := guestImage(t)
	for name, memory := range map[string]string{
		"ram":  "-m 256M -object memory-backend-ram,id=x,size=256M -numa node,memdev=x",
		"path": "-m 256M -mem-path /dev/shm",
	} {
		t.Run(name, func(t *testing.T) {
			w := enginetest.NewWorld(t, enginetest.WorldOptions{})
			l := startLaunched(t, w, spec("vm", 1), nil, append(image[:len(image):len(image)], strings.Fields(memory)...))
			r, err := l.Do(enginetest.GuestCmd{Do: "dhcp"})
			require.NoError(t, err)
			assert.Equal(t, "10.0.2.2/24", r.Lease.Addr)
			assert.Contains(t, l.log.String(), "note: ")
			assert.Contains(t, l.log.String(), "share=on")
		})
	}
}

// When QEMU ends, so does sidewire, with QEMU's code.
func TestLaunchExitCode(t *testing.T) {
	enginetest.Need(t, "netns", "tun", "nft", "qemu")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	vmi := writeFile(t, "vmi.yaml", spec("vm", 1))
	before := footprint(t, w.Pod)
	run := func(qemu ...string) outcome {
		return finish(t, sidewireCommand(append([]string{"run", "-f", vmi, "--netns", w.Pod.Path, "--socket-dir", socketDir(t), "--resolv-conf", w.ResolvConf, "--"}, qemu...)...))
	}
	for script, want := range map[string]int{"exit 0": 0, "exit 7": 7, "kill -9 $$": 128 + 9, "cat <&0; exit 3": 3} {
		o := run("sh", "-c", script)
		assert.Equal(t, want, o.code, o.err)
		assert.Equal(t, "ready\n", o.out)
	}
	o := run("qemu-system-x86_64", "-m", "lots")
	o.says(t, exitInput, "run", []string{`-m lots: "lots" is no size`})
	o = run("qemu-system-x86_64", "-no-such-option")
	assert.Equal(t, 1, o.code)
	assert.Contains(t, o.err, "no-such-option")
	assert.Contains(t, o.err, "sidewire run: qemu-system-x86_64 ended: exit status 1")
	assert.Empty(t, changes(before, footprint(t, w.Pod)))
}

// Standard input is QEMU's, and a terminal is afterwards as it was, whatever the
// program did to it.
func TestLaunchTerminal(t *testing.T) {
	enginetest.Need(t, "netns", "tun", "nft", "qemu")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	command := func(qemu ...string) *exec.Cmd {
		return sidewireCommand(append([]string{"run", "-f", writeFile(t, "vmi.yaml", spec("vm", 1)), "--netns", w.Pod.Path, "--socket-dir", socketDir(t), "--resolv-conf", w.ResolvConf, "--"}, qemu...)...)
	}
	cmd := command("qemu-system-x86_64", "-m", "64", "-S", "-nodefaults", "-display", "none", "-monitor", "stdio")
	cmd.Stdin = strings.NewReader("quit\n")
	o := finish(t, cmd)
	assert.Zero(t, o.code, o.err)
	assert.Contains(t, o.out, "QEMU")

	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	require.NoError(t, err)
	defer master.Close()
	require.NoError(t, unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0))
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	require.NoError(t, err)
	terminal, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	require.NoError(t, err)
	defer terminal.Close()
	before, err := unix.IoctlGetTermios(int(terminal.Fd()), unix.TCGETS)
	require.NoError(t, err)
	cmd = command("sh", "-c", "stty raw -echo && stty -a | head -c 0 && kill -9 $$")
	cmd.Stdin = terminal
	o = finish(t, cmd)
	assert.Equal(t, 128+9, o.code, o.err)
	after, err := unix.IoctlGetTermios(int(terminal.Fd()), unix.TCGETS)
	require.NoError(t, err)
	assert.Equal(t, before, after)
}

// The guest's own end is QEMU's, and sidewire's.
func TestLaunchPoweroff(t *testing.T) {
	t.Parallel() // most of its time is QEMU's
	enginetest.Need(t, "netns", "tun", "nft")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	l := startLaunched(t, w, spec("vm", 1), nil, append(guestImage(t), "-m", "256"))
	go func() { _, _ = l.Do(enginetest.GuestCmd{Do: "poweroff"}) }()
	assert.Zero(t, l.exits(), "%s", l.log)
}

// A sidewire that is killed leaves no QEMU behind; one that is told to end kills
// a program that does not listen.
func TestLaunchNoOrphans(t *testing.T) {
	enginetest.Need(t, "netns", "tun", "nft")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	stubborn := writeScript(t, "trap '' TERM INT\necho stubborn\nwhile :; do read -t 1000 <> <(:); done\n")
	for _, sig := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM} {
		t.Run(sig.String(), func(t *testing.T) {
			l := &launchedVM{process: &process{t: t, dir: socketDir(t), log: &logBuffer{}, vmi: writeFile(t, "vmi.yaml", spec("vm", 1))}, out: &logBuffer{}}
			l.cmd = sidewireCommand("run", "-f", l.vmi, "--netns", w.Pod.Path, "--socket-dir", l.dir, "--resolv-conf", w.ResolvConf, "--", stubborn)
			l.cmd.Stdout, l.cmd.Stderr, l.cmd.WaitDelay = l.out, l.log, 5*time.Second
			require.NoError(t, l.cmd.Start())
			require.True(t, enginetest.Wait(20*time.Second, func() bool { return strings.Contains(l.out.String(), "stubborn") }), "%s", l.log)
			pid := l.qemuPID()
			require.NoError(t, l.cmd.Process.Signal(sig))
			if code := l.exits(); sig == syscall.SIGTERM {
				assert.Equal(t, exitMachine, code)
				assert.Contains(t, l.log.String(), "was killed")
			}
			assert.True(t, gone(pid))
		})
	}
}

// A program that has to be found, and flags that do not go together, are told
// before anything is touched.
func TestLaunchFaults(t *testing.T) {
	one, two := writeFile(t, "a.yaml", spec("a", 1)), writeFile(t, "b.yaml", strings.Replace(spec("b", 1, "tcp:80"), guestMAC.String(), "02:00:00:00:bb:02", 1))
	sidewire(t, "run", "-f", one, "--").says(t, exitInput, "run", []string{"-- without a program", "qemu-system-x86_64"})
	sidewire(t, "run", "-f", one, "-f", two, "--", "true").says(t, exitInput, "run", []string{"2 VMIs given", "run a sidewire for each"})
	sidewire(t, "run", "-f", one, "--qmp", "/x", "--", "true").says(t, exitInput, "run", []string{"--qmp", "leave it out"})
	sidewire(t, "run", "-f", one, "--qmp", "/x").says(t, exitInput, "run", []string{"no interface of the VMI is handed over"})
	sidewire(t, "run", "-f", one, "--announce").says(t, exitInput, "run", []string{"--announce needs QEMU's monitor"})
	sidewire(t, "run", "-f", one, "--", "no-such-qemu").says(t, exitMachine, "run", []string{"no-such-qemu", "not found", "apt-get install qemu-system-x86"})
	sidewire(t, "run", "-f", one, "--", "qemu-system-x86_64", "-daemonize").says(t, exitInput, "run", []string{"-daemonize", "leave it out"})
}

// A macvtap goes to the QEMU that sidewire starts, as descriptors, beside a port
// of ours; both work, with two queues each.
func TestLaunchMacvtapRow77Row78(t *testing.T) {
	t.Parallel() // most of its time is QEMU's
	needMacvtap(t, "tun", "nft", "ping")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	wire := listenFrames(t, w.Outside, "veth0")
	l := startLaunched(t, w, onMacvtap(2, "", dataplane), nil, append(guestImage(t), "-m", "256"))
	assert.Empty(t, wire.from(guestMAC[:]), "silent until the guest speaks (row 79)")
	st := l.status().Interfaces[0]
	assert.Equal(t, "inherited handed over 2", fmt.Sprint(st.Handoff.Way, " ", st.Handoff.State, " ", st.Handoff.Queues))
	_, err := l.Do(enginetest.GuestCmd{Do: "channels", N: 2})
	require.NoError(t, err)
	works(t, w, l.Agent, guestMAC[:])
	require.NoError(t, l.cmd.Process.Signal(syscall.SIGTERM))
	assert.Zero(t, l.exits(), "%s", l.log)
	assert.Empty(t, macvtaps(t, w.Pod))
}

// Two nodes on one network, and a guest that moves between them with its
// address: the second node's macvtap says nothing before the guest has come, and
// then the guest is announced, so that the network finds it there.
func TestLaunchMacvtapRow79Migration(t *testing.T) {
	needMacvtap(t, "ip", "ping")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	second := enginetest.NewNetNS(t)
	enginetest.Veth(t, second, "eth0", w.Outside, "veth1")
	for _, args := range []string{
		"addr flush dev veth0", "link add br0 type bridge", "link set veth0 master br0", "link set veth1 master br0",
		"addr add " + enginetest.OutsideIP + "/24 dev br0", "link set br0 up",
	} {
		require.NoError(t, w.Outside.Run("ip", strings.Fields(args)...))
	}
	dir, image := socketDir(t), append(guestImage(t), "-m", "256")
	monitor, migration := filepath.Join(dir, "qmp.sock"), "unix:"+filepath.Join(dir, "migrate.sock")
	from := startLaunched(t, w, onMacvtap(1, "", dataplane), nil, append(image[:len(image):len(image)], "-qmp", "unix:"+monitor+",server=on,wait=off"))
	_, err := from.Do(enginetest.GuestCmd{Do: "addr", Addr: guestCIDR})
	require.NoError(t, err)
	require.NoError(t, w.Outside.Run("ping", "-c", "1", "-W", "10", guestAddr))

	wire := listenFrames(t, w.Outside, "veth1")
	to := startLaunched(t, &enginetest.World{Pod: second, ResolvConf: w.ResolvConf}, onMacvtap(1, "", dataplane), []string{"--announce"},
		append(image[:len(image):len(image)], "-incoming", migration))
	c, err := net.Dial("unix", monitor)
	require.NoError(t, err)
	defer c.Close()
	// The second node's QEMU listens a moment after its start.
	require.True(t, enginetest.Wait(20*time.Second, func() bool {
		_, err := os.Stat(strings.TrimPrefix(migration, "unix:"))
		return err == nil
	}), "%s", to.log)
	assert.Empty(t, wire.from(guestMAC[:]), "the second node is silent before the guest has come")
	_, err = fmt.Fprintf(c, `{"execute":"qmp_capabilities"}{"execute":"migrate","arguments":{"uri":%q}}`, migration)
	require.NoError(t, err)

	var rarp, arp bool
	require.True(t, enginetest.Wait(60*time.Second, func() bool {
		for _, f := range wire.from(guestMAC[:]) {
			rarp = rarp || f[12] == 0x80 && f[13] == 0x35
			arp = arp || len(f) >= 42 && f[12] == 8 && f[13] == 6 && string(f[28:32]) == string(f[38:42]) && net.IP(f[28:32]).String() == guestAddr
		}
		return rarp && arp
	}), "RARP of QEMU's %v, gratuitous ARP of the guest's %v\n%s", rarp, arp, to.log)
	require.NoError(t, w.Outside.Run("ping", "-c", "1", "-W", "10", guestAddr))
	r, err := to.Do(enginetest.GuestCmd{Do: "ping", Host: enginetest.OutsideIP})
	require.NoError(t, err)
	assert.Equal(t, 1, r.Received)
}

// Where we have QEMU's monitor, a guest is shown the link of a NIC that is not virtio too, and finds it down from the start
// where it is to be. QEMU has igb from 8.0 on.
func TestLaunchLinkStateRow19Row84(t *testing.T) {
	t.Parallel() // most of its time is QEMU's
	enginetest.Need(t, "netns", "tun", "nft", "qemu10")
	kit, err := enginetest.Hardware()
	require.NoError(t, err)
	dir := t.TempDir()
	image := enginetest.Initramfs{Modules: kit.Modules, Drivers: []string{"igb"}}
	image.Init, err = enginetest.BuildGuest(dir)
	require.NoError(t, err)
	f, err := os.Create(filepath.Join(dir, "initramfs.cpio"))
	require.NoError(t, err)
	require.NoError(t, enginetest.BuildInitramfs(f, image))
	require.NoError(t, f.Close())
	qemu := append([]string{kit.QEMU, "-machine", "q35,accel=tcg", "-cpu", "max", "-nodefaults", "-no-user-config", "-display", "none", "-m", "512",
		"-kernel", kit.Kernel, "-initrd", f.Name(), "-append", "console=ttyS0 quiet panic=-1 tsc=reliable no_timer_check nokaslr mitigations=off"}, kit.Data...)
	for _, model := range []string{"e1000", "igb"} {
		t.Run(model, func(t *testing.T) {
			w := enginetest.NewWorld(t, enginetest.WorldOptions{})
			doc := strings.Replace(withState(spec("vm", 1), "down"), "masquerade: {}", "masquerade: {}\n        model: "+model, 1)
			l := startLaunched(t, w, doc, nil, qemu)
			_, err := l.Do(enginetest.GuestCmd{Do: "dhcp", Timeout: 2 * time.Second})
			require.ErrorContains(t, err, "no carrier")
			for range 2 {
				require.Equal(t, outcome{out: "vm/red up\n"}, sidewire(t, "link", "--socket-dir", l.dir, "up"))
				r, err := l.Do(enginetest.GuestCmd{Do: "dhcp", Timeout: time.Minute})
				require.NoError(t, err)
				assert.Equal(t, "10.0.2.2/24", r.Lease.Addr)
				require.Equal(t, outcome{out: "vm/red down\n"}, sidewire(t, "link", "--socket-dir", l.dir, "vm/red", "down"))
				assert.True(t, enginetest.Wait(20*time.Second, func() bool {
					r, err := l.Do(enginetest.GuestCmd{Do: "link"})
					return err == nil && !r.Link.Carrier
				}))
				assert.Equal(t, "down", l.status().Machines[0].Interfaces[0].LinkState)
			}
		})
	}
}
