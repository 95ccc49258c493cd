// Sidewire-guest is the whole of a test guest's userspace: as /init it loads
// the drivers, and runs the commands that come as lines of JSON over the
// second serial port (enginetest.GuestCmd).
//
// With -stdio it serves its standard input instead and sets nothing up, for a
// guest that is only a network namespace.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"sync"
	"time"

	"sidewire/engine/enginetest"
)

func main() {
	switch {
	case len(os.Args) > 1 && os.Args[1] == "-stdio":
		serve(os.Stdin, os.Stdout)
	case os.Getpid() == 1:
		guest()
	default:
		fmt.Fprintln(os.Stderr, "usage: sidewire-guest -stdio, or as /init of a guest")
		os.Exit(1)
	}
}

// guest is init: it never returns, for that would be a kernel panic.
func guest() {
	defer func() {
		if r := recover(); r != nil {
			fmt.Printf("sidewire-guest: panic: %v\n%s", r, debug.Stack())
		}
		power(false)
	}()
	if err := setup(); err != nil {
		fmt.Println("sidewire-guest:", err)
		return
	}
	port, err := openSerial("/dev/ttyS1")
	if err != nil {
		fmt.Println("sidewire-guest:", err)
		return
	}
	fmt.Println("sidewire-guest: ready")
	serve(port, port)
	select {} // the other end is gone; whoever started the guest ends it
}

// serve runs the commands that come from r until it ends.
func serve(r io.Reader, w io.Writer) {
	a := &agent{leases: map[string]*held{}, servers: map[int]*server{}, started: map[int]*program{}}
	var mu sync.Mutex // a reply is one line
	reply := func(v enginetest.GuestReply) {
		b, err := json.Marshal(v)
		if err != nil {
			b = fmt.Appendf(nil, `{"id":%d,"error":"reply cannot be written"}`, v.ID)
		}
		mu.Lock()
		defer mu.Unlock()
		_, _ = w.Write(append(b, '\n')) // nobody else could be told
	}
	reply(enginetest.GuestReply{Ready: true})
	s := bufio.NewScanner(r)
	s.Buffer(make([]byte, 0, 64<<10), 1<<20)
	for s.Scan() {
		var c enginetest.GuestCmd
		if err := json.Unmarshal(s.Bytes(), &c); err != nil {
			reply(enginetest.GuestReply{Error: err.Error()})
			continue
		}
		go func() { reply(a.run(c)) }()
	}
}

// run runs one command.
func (a *agent) run(c enginetest.GuestCmd) (r enginetest.GuestReply) {
	start := time.Now()
	defer func() {
		if p := recover(); p != nil {
			r.Error = fmt.Sprintf("panic: %v\n%s", p, debug.Stack())
		}
		r.ID, r.Took = c.ID, time.Since(start)
	}()
	if c.If == "" {
		c.If = "eth0"
	}
	if c.N == 0 {
		c.N = 1
	}
	if c.Timeout == 0 {
		c.Timeout = 20 * time.Second
	}
	f := commands[c.Do]
	if f == nil {
		r.Error = "no such command"
		return r
	}
	if err := f(a, &c, &r); err != nil {
		r.Error = err.Error()
	}
	return r
}

// commands are what GuestCmd describes.
var commands = map[string]func(*agent, *enginetest.GuestCmd, *enginetest.GuestReply) error{
	"dhcp": (*agent).dhcp, "renew": (*agent).renew, "release": (*agent).release,
	"addr": (*agent).addr, "link": (*agent).link, "channels": (*agent).channels, "offloads": (*agent).offloads,
	"arp": (*agent).arp, "ping": (*agent).ping, "lookup": (*agent).lookup, "neigh": (*agent).neigh,
	"http_get": (*agent).httpGet, "http_put": (*agent).httpPut,
	"listen": (*agent).listen, "unlisten": (*agent).unlisten, "peers": (*agent).peers,
	"tcp": (*agent).tcp, "udp": (*agent).udp, "send": (*agent).send,
	"file": (*agent).file, "write": (*agent).write, "run": (*agent).program, "start": (*agent).start, "stop": (*agent).stop, "dmesg": (*agent).dmesg, "reboot": (*agent).reboot, "poweroff": (*agent).poweroff,
}

// agent is what outlives a command.
type agent struct {
	mu      sync.Mutex // guards what follows
	leases  map[string]*held
	servers map[int]*server
	started map[int]*program
}
