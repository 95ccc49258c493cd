package enginetest

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"
)

// QMP is QEMU's monitor. It is safe for concurrent use.
type QMP struct {
	w io.Writer

	mu      sync.Mutex // guards the rest, and writes
	next    int
	waiting map[int]chan qmpReply
	events  []QMPEvent
	ready   chan struct{} // closed when commands are taken
	done    chan struct{}
}

// QMPEvent is something that QEMU told on its own.
type QMPEvent struct {
	Event string          `json:"event"`
	Data  json.RawMessage `json:"data"`
}

type qmpReply struct {
	ID       *int            `json:"id"`
	Greeting json.RawMessage `json:"QMP"`
	Return   json.RawMessage `json:"return"`
	Error    *struct {
		Desc string `json:"desc"`
	} `json:"error"`
	QMPEvent
}

// maxEvents bounds how many events are kept.
const maxEvents = 1000

func newQMP(rw io.ReadWriter) *QMP {
	q := &QMP{w: rw, waiting: map[int]chan qmpReply{}, ready: make(chan struct{}), done: make(chan struct{})}
	go q.read(rw)
	return q
}

func (q *QMP) read(r io.Reader) {
	defer close(q.done)
	d := json.NewDecoder(bufio.NewReader(r))
	for {
		var m qmpReply
		if d.Decode(&m) != nil {
			return
		}
		q.mu.Lock()
		switch {
		case m.Greeting != nil:
			// The monitor takes commands only after this one, and in order.
			_, _ = io.WriteString(q.w, `{"execute":"qmp_capabilities"}`+"\n")
			close(q.ready)
		case m.Event != "" && len(q.events) < maxEvents:
			q.events = append(q.events, m.QMPEvent)
		case m.ID != nil && q.waiting[*m.ID] != nil:
			q.waiting[*m.ID] <- m
			delete(q.waiting, *m.ID)
		}
		q.mu.Unlock()
	}
}

// Events returns the events with that name so far.
func (q *QMP) Events(name string) []QMPEvent {
	q.mu.Lock()
	defer q.mu.Unlock()
	var out []QMPEvent
	for _, e := range q.events {
		if e.Event == name {
			out = append(out, e)
		}
	}
	return out
}

// Do runs a command, such as set_link, with arguments that can be nil.
func (q *QMP) Do(command string, arguments any) (json.RawMessage, error) {
	select {
	case <-q.ready:
	case <-q.done:
	case <-time.After(30 * time.Second):
		return nil, fmt.Errorf("qmp: %s: no greeting", command)
	}
	c := make(chan qmpReply, 1)
	if err := q.send(command, arguments, c); err != nil {
		return nil, fmt.Errorf("qmp: %s: %w", command, err)
	}
	select {
	case m := <-c:
		if m.Error != nil {
			return nil, fmt.Errorf("qmp: %s: %s", command, m.Error.Desc)
		}
		return m.Return, nil
	case <-q.done:
		return nil, fmt.Errorf("qmp: %s: %w", command, errors.New("QEMU is gone"))
	case <-time.After(30 * time.Second):
		return nil, fmt.Errorf("qmp: %s: no answer", command)
	}
}

func (q *QMP) send(command string, arguments any, c chan qmpReply) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.next++
	m := map[string]any{"execute": command, "id": q.next}
	if arguments != nil {
		m["arguments"] = arguments
	}
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	q.waiting[q.next] = c
	_, err = q.w.Write(append(b, '\n'))
	return err
}
