package handoff

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// QMP is the monitor of a QEMU that runs. It is not safe for concurrent use.
type QMP struct {
	c      *net.UnixConn
	r      *bufio.Scanner
	events []qmpEvent
}

type qmpEvent struct {
	Event string `json:"event"`
	Data  struct {
		Device string `json:"device"`
	} `json:"data"`
}

// QMPError is what QEMU said to a command that it did not carry out.
type QMPError struct {
	Command, Class, Desc string
}

func (e *QMPError) Error() string { return fmt.Sprintf("QEMU refused %s: %s", e.Command, e.Desc) }

const (
	// qmpPatience is how long QEMU may take to answer.
	qmpPatience = 10 * time.Second
	// maxQMPLine bounds an answer, and maxQMPEvents how many events are kept
	// that nobody has asked for: whoever talks on that socket may not be QEMU.
	maxQMPLine   = 4 << 20
	maxQMPEvents = 64
)

// DialQMP connects to a monitor's Unix socket and waits for its greeting. The
// caller closes it.
func DialQMP(ctx context.Context, path string) (*QMP, error) {
	c, err := (&net.Dialer{Timeout: qmpPatience}).DialContext(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("qmp: %w", err)
	}
	return NewQMP(c.(*net.UnixConn))
}

// NewQMP is DialQMP for a connection that is there; it owns that.
func NewQMP(c *net.UnixConn) (*QMP, error) {
	q := &QMP{c: c, r: bufio.NewScanner(c)}
	q.r.Buffer(make([]byte, 0, 4096), maxQMPLine)
	m, err := q.read(time.Now().Add(qmpPatience))
	if errors.Is(err, os.ErrDeadlineExceeded) {
		err = fmt.Errorf("no greeting within %v: a monitor talks to one at a time, so it may have somebody else; give QEMU one more with -qmp", qmpPatience)
	}
	if err == nil && m.Greeting == nil {
		err = errors.New("no greeting: is it a monitor with mode=control?")
	}
	if err == nil {
		err = q.do("qmp_capabilities", nil, nil)
	}
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("qmp: %w", err)
	}
	return q, nil
}

// Close ends the connection; QEMU runs on.
func (q *QMP) Close() error { return q.c.Close() }

// Peer is a descriptor of QEMU's process, non-blocking, that becomes readable
// when it ends, or -1 where the kernel does not tell (before Linux 5.10, or in another
// PID namespace). The caller closes it.
func (q *QMP) Peer() int {
	pidfd := -1
	raw, err := q.c.SyscallConn()
	if err != nil {
		return -1
	}
	_ = raw.Control(func(fd uintptr) {
		cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
		if err != nil || cred.Pid <= 0 {
			return
		}
		if pidfd, err = unix.PidfdOpen(int(cred.Pid), unix.PIDFD_NONBLOCK); err != nil {
			pidfd = -1
		}
	})
	return pidfd
}

type qmpReply struct {
	ID       string          `json:"id"`
	Greeting json.RawMessage `json:"QMP"`
	Return   json.RawMessage `json:"return"`
	Error    *struct {
		Class string `json:"class"`
		Desc  string `json:"desc"`
	} `json:"error"`
	qmpEvent
}

// read returns the next answer and keeps the events before it.
func (q *QMP) read(deadline time.Time) (m qmpReply, err error) {
	if err := q.c.SetReadDeadline(deadline); err != nil {
		return m, err
	}
	for q.r.Scan() {
		line := bytes.TrimSpace(q.r.Bytes())
		if len(line) == 0 {
			continue
		}
		m = qmpReply{}
		if err := json.Unmarshal(line, &m); err != nil {
			return m, fmt.Errorf("not an answer: %.80q", line)
		}
		if m.Event == "" {
			return m, nil
		}
		if len(q.events) < maxQMPEvents {
			q.events = append(q.events, m.qmpEvent)
		}
	}
	if err := q.r.Err(); err != nil {
		return m, err
	}
	return m, errors.New("QEMU has gone")
}

// do runs a command, with descriptors that go with it, and reads what it
// returns into out.
func (q *QMP) do(command string, arguments, out any, files ...*os.File) error {
	m := map[string]any{"execute": command, "id": command}
	if arguments != nil {
		m["arguments"] = arguments
	}
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	var rights []byte
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, f := range files {
			fds[i] = int(f.Fd())
		}
		rights = unix.UnixRights(fds...)
	}
	deadline := time.Now().Add(qmpPatience)
	if err := q.c.SetWriteDeadline(deadline); err != nil {
		return err
	}
	if _, _, err := q.c.WriteMsgUnix(append(b, '\n'), rights, nil); err != nil {
		return fmt.Errorf("%s: %w", command, err)
	}
	for {
		r, err := q.read(deadline)
		switch {
		case err != nil:
			return fmt.Errorf("%s: %w", command, err)
		case r.ID != command:
			continue // of a command that was given up
		case r.Error != nil:
			return &QMPError{command, r.Error.Class, r.Error.Desc}
		case out != nil:
			return json.Unmarshal(r.Return, out)
		}
		return nil
	}
}

// SetLink shows the guest that the link of the NIC behind a netdev is up or down.
func (q *QMP) SetLink(netdev string, up bool) error {
	return q.do("set_link", map[string]any{"name": netdev, "up": up}, nil)
}

// Quit has QEMU end at once.
func (q *QMP) Quit() error { return q.do("quit", nil, nil) }

// Running says whether the guest runs, and if not, what QEMU calls its state,
// such as inmigrate.
func (q *QMP) Running() (running bool, state string, err error) {
	var st struct {
		Running bool   `json:"running"`
		Status  string `json:"status"`
	}
	err = q.do("query-status", nil, &st)
	return st.Running, st.Status, err
}

// Announce has QEMU and the guest tell the network where a NIC's address is:
// QEMU by RARP, the guest's driver by gratuitous ARP and neighbour
// advertisements for all addresses that it has. It needs QEMU 4.0.
func (q *QMP) Announce(device string) error {
	return q.do("announce-self", map[string]any{
		"initial": 50, "max": 550, "rounds": 5, "step": 100, "interfaces": []string{device},
	}, nil)
}

// Has says whether QEMU has a device of this id, which it was given.
func (q *QMP) Has(device string) (bool, error) {
	var list []struct {
		Name string `json:"name"`
	}
	err := q.do("qom-list", map[string]any{"path": "/machine/peripheral"}, &list)
	for _, p := range list {
		if p.Name == device {
			return true, err
		}
	}
	return false, err
}

// wait waits for an event about a device.
func (q *QMP) wait(event, device string, timeout time.Duration) error {
	deadline := time.Now().Add(timeout)
	for {
		if slices.ContainsFunc(q.events, func(e qmpEvent) bool { return e.Event == event && e.Data.Device == device }) {
			return nil
		}
		q.events = q.events[:0]
		if err := q.c.SetReadDeadline(deadline); err != nil {
			return err
		}
		if !q.r.Scan() {
			return fmt.Errorf("no %s of %s within %v", event, device, timeout)
		}
		var e qmpEvent
		if json.Unmarshal(q.r.Bytes(), &e) == nil && e.Event != "" {
			q.events = append(q.events, e)
		}
	}
}
