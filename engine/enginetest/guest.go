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

// GuestCmd is what a test asks of the agent in a guest (cmd/sidewire-guest):
// one JSON object to a line. Do names the command, and which other fields it
// reads:
//
//	dhcp      If              DISCOVER to ACK, then configures what the lease says
//	renew     If              renews the lease that dhcp got
//	release   If              gives it back and takes the address away
//	addr      If Addr GW DNS MTU  configures by hand; Addr "" only what else is given
//	link      If Up MTU MAC   sets what is given, and tells about the link
//	channels  If N            sets the number of queue pairs
//	offloads  If Offload      switches tx, rx, sg, tso, gso, gro on or off
//	arp       If Host         asks who has the address
//	ping      Host N Bytes DF sends N echo requests, Interval apart
//	lookup    Host Type       resolves a name by the resolv.conf of the lease
//	http_get  URL             gets it; Bytes, Sum, Status, and Body if it is short
//	http_put  URL Bytes       sends Data(Bytes)
//	listen    Kind Port       serves "http" (Handler), "echo" (TCP), "sink" (TCP) or "udp" (echo)
//	unlisten  Port            ends it
//	peers     Port            who came to what listen opened
//	tcp       Host Port Data  connects, sends, and reads as much as it sent
//	udp       Host Port Bytes N  sends N datagrams and counts the echoes
//	send      If Hex N        sends a raw frame N times
//	neigh     If              the neighbour table
//	file      Path            reads a small file, of /proc for instance
//	write     Path Data       writes one, of /sys for instance
//	run       Path Args       runs a program to its end: Data what it printed, Status how it ended
//	start     Path Args       starts one: Status is its process, Data the file of what it prints
//	stop      N Kind          ends the process N that was started, Kind "kill" by force; as run
//	dmesg                     the end of the kernel's log
//	reboot, poweroff
type GuestCmd struct {
	ID       uint64          `json:"id"` // set by Do
	Do       string          `json:"do"`
	If       string          `json:"if,omitempty"` // eth0 unless said otherwise
	Addr     string          `json:"addr,omitempty"`
	GW       string          `json:"gw,omitempty"`
	DNS      []string        `json:"dns,omitempty"`
	Up       *bool           `json:"up,omitempty"`
	MTU      int             `json:"mtu,omitempty"`
	MAC      string          `json:"mac,omitempty"`
	N        int             `json:"n,omitempty"` // 1 unless said otherwise
	Offload  map[string]bool `json:"offload,omitempty"`
	Host     string          `json:"host,omitempty"`
	Port     int             `json:"port,omitempty"`
	Kind     string          `json:"kind,omitempty"`
	Type     string          `json:"type,omitempty"`
	URL      string          `json:"url,omitempty"`
	Bytes    int64           `json:"bytes,omitempty"`
	Data     string          `json:"data,omitempty"`
	Hex      string          `json:"hex,omitempty"`
	Path     string          `json:"path,omitempty"`
	Args     []string        `json:"args,omitempty"`
	DF       bool            `json:"df,omitempty"`
	Interval time.Duration   `json:"interval,omitempty"`
	// Timeout is how long the guest tries, 20 s unless said otherwise.
	Timeout time.Duration `json:"timeout,omitempty"`
}

// GuestReply is the agent's answer.
type GuestReply struct {
	ID    uint64 `json:"id"`
	Ready bool   `json:"ready,omitempty"` // the first line after boot
	Error string `json:"error,omitempty"`

	Lease    *GuestLease       `json:"lease,omitempty"`
	Link     *GuestLink        `json:"link,omitempty"`
	Addrs    []string          `json:"addrs,omitempty"`    // lookup
	Local    string            `json:"local,omitempty"`    // tcp, udp: our end
	Peers    []string          `json:"peers,omitempty"`    // peers, neigh: "IP MAC STATE"
	Data     string            `json:"data,omitempty"`     // tcp, file, run, dmesg
	Status   int               `json:"status,omitempty"`   // http, run
	Body     string            `json:"body,omitempty"`     // http, up to 4 KiB
	Bytes    int64             `json:"bytes,omitempty"`    // http: how many
	Sum      string            `json:"sum,omitempty"`      // http: SHA-256 of the body got or sent
	Sent     int               `json:"sent,omitempty"`     // ping, udp
	Received int               `json:"received,omitempty"` // ping, udp
	MAC      string            `json:"mac,omitempty"`      // arp
	MTU      int               `json:"mtu,omitempty"`      // ping with DF: what ICMP said
	RTT      time.Duration     `json:"rtt,omitempty"`      // ping: the mean
	Took     time.Duration     `json:"took,omitempty"`     // how long the command took
	Stats    map[string]uint64 `json:"stats,omitempty"`    // link: ethtool -S
}

// GuestLease is what the DHCP server gave.
type GuestLease struct {
	Addr     string            `json:"addr"` // with prefix length
	Server   string            `json:"server"`
	Routers  []string          `json:"routers"`
	Routes   []string          `json:"routes"` // option 121, "PREFIX via ROUTER"
	DNS      []string          `json:"dns"`
	Search   []string          `json:"search"`
	Domain   string            `json:"domain"`
	Hostname string            `json:"hostname"`
	MTU      int               `json:"mtu"`
	Time     time.Duration     `json:"time"`
	Options  map[string]string `json:"options"` // every option of the ACK, code to hexadecimal
}

// GuestLink is what the guest knows of its NIC.
type GuestLink struct {
	Name     string   `json:"name"`
	MAC      string   `json:"mac"`
	MTU      int      `json:"mtu"`
	Carrier  bool     `json:"carrier"`
	Driver   string   `json:"driver"`
	Addrs    []string `json:"addrs"`
	Channels int      `json:"channels"` // queue pairs in use
	MaxChan  int      `json:"max_channels"`
	RxQueues int      `json:"rx_queues"`
	TxQueues int      `json:"tx_queues"`
	// Features are virtio feature bits as in sysfs, lowest bit first.
	Features string          `json:"features"`
	Offload  map[string]bool `json:"offload"`
}

// Agent talks to the agent of one guest. It is safe for concurrent use:
// commands run side by side in the guest.
type Agent struct {
	w io.Writer

	mu      sync.Mutex // guards the rest, and writes
	next    uint64
	waiting map[uint64]chan GuestReply
	boots   int
	booted  chan struct{} // closed and replaced at every ready line
	err     error
	done    chan struct{}
}

// errAgentGone is why commands fail when the guest has ended.
var errAgentGone = errors.New("the guest's agent is gone")

// NewAgent begins to talk to an agent over rw, until it ends.
func NewAgent(rw io.ReadWriter) *Agent {
	a := &Agent{w: rw, waiting: map[uint64]chan GuestReply{}, booted: make(chan struct{}), done: make(chan struct{})}
	go a.read(rw)
	return a
}

func (a *Agent) read(r io.Reader) {
	s := bufio.NewScanner(r)
	s.Buffer(make([]byte, 0, 64<<10), 4<<20)
	for s.Scan() {
		var reply GuestReply
		// A serial line may carry noise of firmware before the agent is up.
		if json.Unmarshal(s.Bytes(), &reply) != nil {
			continue
		}
		a.mu.Lock()
		if reply.Ready {
			a.boots++
			close(a.booted)
			a.booted = make(chan struct{})
		}
		if c := a.waiting[reply.ID]; c != nil {
			delete(a.waiting, reply.ID)
			c <- reply
		}
		a.mu.Unlock()
	}
	a.mu.Lock()
	a.err = errAgentGone
	close(a.done)
	a.mu.Unlock()
}

// Boots is how often the agent has said that it is ready: more than once after
// a reboot.
func (a *Agent) Boots() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.boots
}

// WaitBoot waits until Boots is at least n.
func (a *Agent) WaitBoot(n int, timeout time.Duration) error {
	end := time.After(timeout)
	for {
		a.mu.Lock()
		boots, c := a.boots, a.booted
		a.mu.Unlock()
		if boots >= n {
			return nil
		}
		select {
		case <-c:
		case <-a.done:
			return errAgentGone
		case <-end:
			return fmt.Errorf("the guest was not ready after %v", timeout)
		}
	}
}

// Do runs one command in the guest and waits for its end. The error is the
// agent's, or says that it did not answer.
func (a *Agent) Do(c GuestCmd) (GuestReply, error) {
	if c.Timeout == 0 {
		c.Timeout = 20 * time.Second
	}
	answer := make(chan GuestReply, 1)
	if err := a.send(&c, answer); err != nil {
		return GuestReply{}, fmt.Errorf("guest: %s: %w", c.Do, err)
	}
	select {
	case r := <-answer:
		if r.Error != "" {
			return r, fmt.Errorf("guest: %s: %s", c.Do, r.Error)
		}
		return r, nil
	case <-a.done:
		return GuestReply{}, fmt.Errorf("guest: %s: %w", c.Do, errAgentGone)
	case <-time.After(c.Timeout + 10*time.Second): // the guest may be slow
		a.mu.Lock()
		delete(a.waiting, c.ID)
		a.mu.Unlock()
		return GuestReply{}, fmt.Errorf("guest: %s: no answer", c.Do)
	}
}

func (a *Agent) send(c *GuestCmd, answer chan GuestReply) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.err != nil {
		return a.err
	}
	a.next++
	c.ID = a.next
	b, err := json.Marshal(c)
	if err != nil {
		return err
	}
	a.waiting[c.ID] = answer
	if _, err := a.w.Write(append(b, '\n')); err != nil {
		delete(a.waiting, c.ID)
		return err
	}
	return nil
}
