package dns

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"net"
	"slices"
	"sync"
	"time"
)

// lively is a connection that says when something comes.
type lively struct {
	net.Conn
	alive func()
}

func (l lively) Read(b []byte) (int, error) {
	n, err := l.Conn.Read(b)
	if n > 0 {
		l.alive()
	}
	return n, err
}

// joinByMessage is join where some queries are answered here: it looks at each,
// and the others go to one resolver, which is called for the first of them.
func (s *Server) joinByMessage(ctx context.Context, guest *net.TCPConn) {
	var (
		wg           sync.WaitGroup
		mu           sync.Mutex // a message is written whole
		up           net.Conn   // set before another goroutine looks at it
		in, out, key []byte
		err          error
	)
	defer wg.Wait()
	alive := func() {
		at := time.Now().Add(s.c.Idle)
		_ = guest.SetDeadline(at)
		if up != nil {
			_ = up.SetDeadline(at)
		}
	}
	alive()
	from := bufio.NewReaderSize(lively{guest, alive}, pipeBuffer)
	for {
		if in, err = readMessage(from, in); err != nil {
			break
		}
		if answer, keyed, done := s.hereTCP(out, key, in[lengthLen:]); done {
			out, key = answer, keyed
			if err = writeLocked(&mu, guest, out); err != nil {
				break
			}
			continue
		}
		if up != nil {
			if _, err = up.Write(in); err != nil {
				break
			}
			continue
		}
		c, head := s.call(ctx, in)
		if c == nil {
			s.stats.connFailures.Add(1)
			_ = guest.SetLinger(0)
			return
		}
		up = c
		defer up.Close()
		defer context.AfterFunc(ctx, func() { c.Close() })()
		alive()
		wg.Go(func() {
			s.passAnswers(&mu, guest, io.MultiReader(bytes.NewReader(head), lively{c, alive}))
			// What the resolver has ended is over for the guest too.
			guest.Close()
			c.Close()
		})
	}
	if c, ok := up.(interface{ CloseWrite() error }); ok {
		_ = c.CloseWrite()
	}
	wg.Wait() // the end of the questions is not the end of the answers
}

// hereTCP is here for a message of a connection, whose answer has its length
// before it; it is empty if there is none.
func (s *Server) hereTCP(buf, key, msg []byte) (answer, keyed []byte, done bool) {
	if !isQuery(msg) {
		return buf, key, false
	}
	name, end, ok := question(msg)
	if !ok {
		return buf, key, false
	}
	answer, keyed, done = s.here(append(buf[:0], 0, 0), key, msg, name, end, true)
	if len(answer) == lengthLen {
		return answer[:0], keyed, done
	}
	binary.BigEndian.PutUint16(answer, uint16(len(answer)-lengthLen))
	return answer, keyed, done
}

// passAnswers copies messages to the guest until the end.
func (s *Server) passAnswers(mu *sync.Mutex, guest net.Conn, up io.Reader) {
	from := bufio.NewReaderSize(up, pipeBuffer)
	var b []byte
	for {
		var err error
		if b, err = readMessage(from, b); err != nil {
			return
		}
		if writeLocked(mu, guest, b) != nil {
			return
		}
	}
}

func writeLocked(mu *sync.Mutex, to net.Conn, b []byte) error {
	mu.Lock()
	defer mu.Unlock()
	_, err := to.Write(b)
	return err
}

// readMessage reads a message and the length before it, into b's memory if
// that is enough. It takes more only for what has come.
func readMessage(from *bufio.Reader, b []byte) ([]byte, error) {
	head, err := from.Peek(lengthLen)
	if err != nil {
		return b, err
	}
	n := lengthLen + int(binary.BigEndian.Uint16(head))
	b = b[:0]
	for len(b) < n {
		b = slices.Grow(b, min(n-len(b), pipeBuffer))
		m, err := from.Read(b[len(b):min(n, cap(b))])
		if b = b[:len(b)+m]; err != nil {
			return b, err
		}
	}
	return b, nil
}
