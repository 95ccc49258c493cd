package uplink

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

// linkWatch follows the links of a rig's pod.
func linkWatch(r *rig) (*Links, chan LinkStatus) {
	r.t.Helper()
	news := make(chan LinkStatus, 16)
	var l *Links
	enginetest.Must(r.t, r.Pod.Do(func() (err error) {
		l, err = WatchLinks(func(s LinkStatus) { news <- s }, "eth0", r.pod.Sink(), r.pod.Tap(0).Name())
		return err
	}))
	r.t.Cleanup(l.Close)
	return l, news
}

// becomes waits until a link is told to be in a state. On its way up a link may
// be without carrier for a moment.
func becomes(t *testing.T, news chan LinkStatus, name string, state LinkState) {
	t.Helper()
	for end := time.After(deadline); ; {
		select {
		case s := <-news:
			if s == (LinkStatus{name, state}) {
				return
			}
			require.Equal(t, LinkStatus{name, LinkNoCarrier}, s)
			require.Equal(t, LinkUp, state)
		case <-end:
			require.FailNow(t, "not told", "%s is %s", name, state)
		}
	}
}

// Each change is told once; what is gone stays gone.
func TestLinks(t *testing.T) {
	r := newRig(t)
	enginetest.Must(t, r.Pod.Down(r.pod.Sink()))
	l, news := linkWatch(r)
	told := func(name string, s LinkState) {
		t.Helper()
		becomes(t, news, name, s)
	}
	told("swin-eth0", LinkDown)
	require.Equal(t, []LinkStatus{{"eth0", LinkUp}, {"swin-eth0", LinkDown}, {"sw-eth0", LinkUp}}, l.Status())
	enginetest.Must(t, r.Pod.Up(r.pod.Sink()))
	told("swin-eth0", LinkUp)
	enginetest.Must(t, r.Outside.Down("veth0"))
	told("eth0", LinkNoCarrier)
	enginetest.Must(t, r.Pod.Down("eth0"))
	told("eth0", LinkDown)
	output(t, r.Pod, "ip", "link", "add", "bystander", "type", "bridge")
	enginetest.Must(t, r.Outside.Up("veth0"), r.Pod.Up("eth0"))
	told("eth0", LinkUp)
	output(t, r.Outside, "ip", "link", "del", "veth0")
	told("eth0", LinkGone)
	output(t, r.Pod, "ip", "link", "add", "eth0", "type", "bridge")
	output(t, r.Pod, "ip", "link", "del", "sw-eth0")
	told("sw-eth0", LinkGone)
	require.Equal(t, []LinkStatus{{"eth0", LinkGone}, {"swin-eth0", LinkUp}, {"sw-eth0", LinkGone}}, l.Status())
	require.Empty(t, news)
}

// epoll is who wakes a worker.
type epoll struct {
	t  *testing.T
	fd int
}

func newEpoll(t *testing.T) epoll {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	require.NoError(t, err)
	t.Cleanup(func() { unix.Close(fd) })
	return epoll{t, fd}
}

func (e epoll) Watch(fd int) error {
	return unix.EpollCtl(e.fd, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLET, Fd: int32(fd)})
}

func (e epoll) Unwatch(fd int) { _ = unix.EpollCtl(e.fd, unix.EPOLL_CTL_DEL, fd, nil) }

// sleeps reports whether a worker that serves q comes to sleep: nothing is
// pulled, nothing waits, and nothing wakes it.
func (e epoll) sleeps(q interface {
	source
	Arm() bool
}) bool {
	var evs [4]unix.EpollEvent
	b := new(frame.Batch)
	for range 4 {
		n := len(pull(q, b))
		more := q.Arm()
		woken, err := unix.EpollWait(e.fd, evs[:], 0)
		require.NoError(e.t, err)
		if n == 0 && !more && woken == 0 {
			return true
		}
	}
	return false
}

// Whatever becomes of the links, a worker finds its sleep, what is pushed is
// dropped with a reason, and everything can be put back.
func TestLinksThatGo(t *testing.T) {
	for _, c := range []struct {
		link  string
		state LinkState
	}{
		{"sw-eth0", LinkGone}, {"sw-eth0", LinkDown}, {"swin-eth0", LinkGone}, {"swin-eth0", LinkDown},
		{"eth0", LinkGone}, {"eth0", LinkDown},
	} {
		t.Run(c.link+" "+string(c.state), func(t *testing.T) {
			r := newRig(t)
			_, news := linkWatch(r)
			e := newEpoll(t)
			q := r.up.Queues()[0]
			require.NoError(t, q.SetWatcher(e))
			require.NoError(t, r.pod.Tap(0).SetWatcher(e))
			if c.state == LinkGone {
				output(t, r.Pod, "ip", "link", "del", c.link)
			} else {
				enginetest.Must(t, r.Pod.Down(c.link))
			}
			becomes(t, news, c.link, c.state)
			require.True(t, e.sleeps(r.pod.Tap(0)), "tap")
			require.True(t, e.sleeps(q), "uplink")
			f := gsoFrame(enginetest.UDPFrame(fromGuest(), enginetest.IP{Src: guestIP, Dst: gateway.Addr()}, enginetest.UDP{}, nil), frame.ProtoUDP, 0)
			r.pod.Tap(0).Push(0, []*frame.Frame{f})
			require.Equal(t, c.link == "sw-eth0", f.Reason == frame.SendFailed, "tap: %v", f.Reason)
			f = gsoFrame(enginetest.UDPFrame(fromGuest(), enginetest.IP{Src: podIP, Dst: outsideIP}, enginetest.UDP{}, nil), frame.ProtoUDP, 0)
			r.up.Push(0, []*frame.Frame{f})
			require.Equal(t, c.link == "eth0", f.Reason == frame.SendFailed, "uplink: %v", f.Reason)
			require.NoError(t, r.pod.Restore())
			require.NotContains(t, output(t, r.Pod, "nft", "list", "ruleset"), "sidewire")
		})
	}
}

// A link that was down receives and sends again when it is up.
func TestLinksThatComeBack(t *testing.T) {
	r := newRig(t)
	_, news := linkWatch(r)
	works := func(src uint16) {
		t.Helper()
		r.syn(src, 80)
		r.next(r.in(), "SYN on the sink", tcp(src, 80, enginetest.SYN))
		send(t, r.up, enginetest.UDPFrame(enginetest.Eth{Dst: r.outMAC, Src: r.podMAC}, enginetest.IP{Src: podIP, Dst: outsideIP},
			enginetest.UDP{Src: src, Dst: 9}, nil))
		r.next(r.outside(), "datagram", udp(src, 9))
	}
	works(1)
	for i, name := range []string{"eth0", r.pod.Sink(), r.pod.Tap(0).Name()} {
		enginetest.Must(t, r.Pod.Down(name))
		becomes(t, news, name, LinkDown)
		enginetest.Must(t, r.Pod.Up(name))
		becomes(t, news, name, LinkUp)
		works(uint16(i + 2))
	}
}
