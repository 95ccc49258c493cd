package main

import (
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
	"sidewire/vhostuser/vhosttest"
)

// withoutTun is the program in a world's pod, with all capabilities, on a machine
// that has no /dev/net/tun.
func withoutTun(t *testing.T, p *process, w *enginetest.World, flags ...string) *exec.Cmd {
	t.Helper()
	program, err := os.Executable()
	require.NoError(t, err)
	args := append([]string{"-m", "sh", "-c", `mount --bind /dev/null /dev/net/tun && exec "$@"`, "sh",
		program, "run", "-f", p.vmi, "--socket-dir", p.dir, "--resolv-conf", w.ResolvConf}, flags...)
	cmd := w.Pod.Command("unshare", args...)
	cmd.Env = append(os.Environ(), "SIDEWIRE_TEST_MAIN=1")
	return cmd
}

// Where the packet path cannot be for want of something else than a capability,
// `auto` takes sockets and says why; who has asked for the packet path is told.
func TestPathFallsBack(t *testing.T) {
	enginetest.Need(t, "root", "netns", "tun", "dhclient", "setpriv")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{MTU: 1400})
	before := footprint(t, w.Pod)
	p := &process{t: t, dir: socketDir(t), log: &logBuffer{}, vmi: writeFile(t, "vmi.yaml", spec("vm", 2))}
	p.launch(withoutTun(t, p, w))
	defer p.stop()
	p.logs("msg=serving")
	assert.Contains(t, p.log.String(), "the packet path cannot be: masquerade takes the socket path")
	assert.Contains(t, p.log.String(), "every TCP and UDP port leads to the guest")
	v := startVM(t, p, vhosttest.Options{QueuePairs: 2})
	assert.Contains(t, v.run("ip", "link", "show", "dev", "eth0"), "mtu 1400")
	s := &scene{World: w, t: t, guest: v.ns, far: w.Outside, dir: v.dir}
	s.serveAt(v.ns, "vm", 8080)
	assert.Equal(t, "vm, peer 10.244.1.1", s.tcp(w.Outside, "10.244.1.5:8080"))
	assert.Equal(t, "vm, peer 10.244.1.1", s.udp(w.Outside, "10.244.1.5:8080"))
	st := p.status()
	assert.Equal(t, "socket socket", st.Path+" "+st.Interfaces[0].Path)
	assert.Contains(t, st.Interfaces[0].Why, "take over eth0: sink: ")
	assert.NotZero(t, st.Interfaces[0].Sockets.MaxSockets)
	assert.Contains(t, sidewire(t, "status", "--socket-dir", p.dir).out, "socket (take over eth0")
	p.stop()
	assert.Empty(t, changes(before, footprint(t, w.Pod)))

	cmd := withoutTun(t, p, w, "--path", "packet")
	out, err := cmd.CombinedOutput()
	require.Error(t, err)
	assert.Equal(t, exitMachine, cmd.ProcessState.ExitCode())
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	assert.Contains(t, lines[len(lines)-1], "sidewire run: vm/red: take over eth0: sink: ")
	assert.Empty(t, changes(before, footprint(t, w.Pod)))
}

// What the user has to mend is no reason for another path.
func TestPathDoesNotFallBack(t *testing.T) {
	enginetest.Need(t, "root", "netns", "tun")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	run := func(flags ...string) outcome {
		return sidewire(t, append([]string{"run", "-f", writeFile(t, "vmi.yaml", spec("vm", 1)), "--netns", w.Pod.Path, "--socket-dir", socketDir(t),
			"--resolv-conf", w.ResolvConf}, flags...)...)
	}
	o := run("--uplink", "red=eth7")
	assert.Equal(t, exitInput, o.code)
	assert.Contains(t, o.err, "no such link: eth7")
	startSidewire(t, w, spec("vm", 1))
	o = run()
	assert.Equal(t, exitMachine, o.code)
	assert.Contains(t, o.err, "another sidewire serves this link")
}

// What a packet path that has crashed leaves in the pod does not keep frames
// from the socket path.
func TestSocketsAfterACrashOfThePacketPath(t *testing.T) {
	enginetest.Need(t, "dhclient")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	before := footprint(t, w.Pod)
	for _, ports := range [][]string{nil, {"tcp:8080", "udp:8080"}} {
		p := startSidewire(t, w, spec("vm", 1, ports...))
		p.kill()
		require.NotEmpty(t, changes(before, footprint(t, w.Pod)))
		p.start(w, "--path", "socket")
		v := startVM(t, p, vhosttest.Options{})
		s := &scene{World: w, t: t, guest: v.ns, far: w.Outside, dir: v.dir}
		s.serveAt(v.ns, "vm", 8080)
		assert.Equal(t, "vm, peer 10.244.1.1", s.tcp(w.Outside, "10.244.1.5:8080"))
		assert.Equal(t, "vm, peer 10.244.1.1", s.udp(w.Outside, "10.244.1.5:8080"))
		p.stop()
		assert.Empty(t, changes(before, footprint(t, w.Pod)))
	}
}
