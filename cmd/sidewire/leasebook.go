package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"sidewire/dhcp"
	"sidewire/engine/vmi"
)

const (
	// maxBook bounds what is read, bookAddresses and bookGuests what is kept of
	// those that are gone.
	maxBook                   = 16 << 20
	bookAddresses, bookGuests = 65536, 4096
	bookVersion               = 1
	// bookPause is between two writings, however often guests take leases;
	// bookStale is how far the end of a lease moves before that alone is worth one.
	bookPause, bookStale = 2 * time.Second, time.Hour
	// bookPatience is how long the lock may be another's, and bookRetry how often
	// it is tried.
	bookPatience, bookRetry = 5 * time.Second, 10 * time.Millisecond
)

// leaseBook is the file in which addresses and leases outlast a run. Processes
// that share a state directory share it: it is read, changed and replaced under
// a lock, so none gives an address that is another one's guest's.
type leaseBook struct {
	path string
	log  *slog.Logger
	self owner
	told chan struct{} // a token: somebody has taken a lease

	mu   sync.Mutex // guards what follows
	nics []*nic
	last map[string]dhcp.State // as written
	said bool                  // that it cannot be written
}

// bookPage is what the file holds.
type bookPage struct {
	Version   int                   `json:"version"`
	Addresses []bookEntry           `json:"addresses,omitempty"` // held longest first
	Guests    map[string]dhcp.State `json:"guests,omitempty"`    // by NAMESPACE/VMI/INTERFACE
}

// bookEntry is an address, and who serves its guest.
type bookEntry struct {
	vmi.Held
	Owner owner `json:"owner"`
}

// owner is a process: numbers are used again, but not within one clock tick.
type owner struct {
	PID   int    `json:"pid"`
	Since string `json:"since"` // in clock ticks after the machine's start
}

// ownerOf is the process of a number; Since is empty if there is none.
func ownerOf(pid int) owner {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
	const starttime = 22 - 3 // the third field is behind the name, which may hold anything
	if err != nil || len(fields) <= starttime {
		return owner{PID: pid}
	}
	return owner{PID: pid, Since: string(fields[starttime])}
}

func newLeaseBook(o *options, log *slog.Logger) *leaseBook {
	return &leaseBook{
		path: filepath.Join(o.statePath(), "leases.json"), log: log, self: ownerOf(os.Getpid()),
		told: make(chan struct{}, 1), last: map[string]dhcp.State{},
	}
}

// allot gives the guests of the documents their addresses, those of before to
// whom they are known for, and notes them: both at once, so that no other
// process gives the same. It returns what is wrong with the documents.
func (b *leaseBook) allot(docs *vmi.Docs) (faults []vmi.Fault) {
	if len(docs.Holds()) == 0 {
		return allFaults(*docs)
	}
	err := b.change(func(page *bookPage) bool {
		docs.Hold(b.heldIn(*page))
		faults = allFaults(*docs)
		return len(vmi.Errors(faults)) == 0 && page.note(docs.Holds(), b.self)
	})
	if err != nil {
		b.complain(err)
		faults = allFaults(*docs)
	}
	return faults
}

// heldIn is what a page says of addresses.
func (b *leaseBook) heldIn(page bookPage) (held []vmi.Held) {
	gone := map[owner]bool{b.self: false}
	for _, e := range page.Addresses {
		if _, known := gone[e.Owner]; !known {
			gone[e.Owner] = e.Owner.Since == "" || ownerOf(e.Owner.PID) != e.Owner
		}
		e.Gone = gone[e.Owner]
		held = append(held, e.Held)
	}
	return held
}

// note writes down who has which address now. It returns true.
func (p *bookPage) note(now []vmi.Held, self owner) bool {
	have := map[string]bool{}
	for _, h := range now {
		for _, n := range h.Networks {
			have[n+" "+h.Addr.String()], have[n+" "+h.Guest] = true, true
		}
	}
	p.Addresses = slices.DeleteFunc(p.Addresses, func(e bookEntry) bool {
		for _, n := range e.Networks {
			if have[n+" "+e.Addr.String()] || have[n+" "+e.Guest] {
				return true
			}
		}
		return false
	})
	for _, h := range now {
		p.Addresses = append(p.Addresses, bookEntry{h, self})
	}
	p.Addresses = p.Addresses[max(len(p.Addresses)-bookAddresses, 0):]
	return true
}

// take gives the server of an interface the lease that it knew of, and follows
// it from now on.
func (b *leaseBook) take(n *nic) {
	page, err := b.read()
	if err != nil {
		b.complain(err)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.nics = append(b.nics, n)
	st, ok := page.Guests[n.leaseKey()]
	if !ok {
		return
	}
	b.last[n.leaseKey()] = st
	if err := n.dhcp.Import(st); err != nil {
		b.log.Debug("the lease of before is not taken up", "interface", n.name(), "err", err)
	}
}

// leased says that a guest has taken a lease. It does not wait.
func (b *leaseBook) leased() {
	select {
	case b.told <- struct{}{}:
	default:
	}
}

// start writes leases down until stop is called, which does so once more.
func (b *leaseBook) start() (stop func() error) {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { b.run(ctx) })
	return func() error {
		cancel()
		wg.Wait()
		return nil
	}
}

func (b *leaseBook) run(ctx context.Context) {
	for {
		select {
		case <-b.told:
			b.save()
		case <-ctx.Done():
			b.save()
			return
		}
		select {
		case <-time.After(bookPause):
		case <-ctx.Done():
		}
	}
}

// save writes down what has changed, if anything has.
func (b *leaseBook) save() {
	b.mu.Lock()
	defer b.mu.Unlock()
	now := map[string]dhcp.State{}
	for _, n := range b.nics {
		st := n.dhcp.Export()
		if old, ok := b.last[n.leaseKey()]; (ok || len(st.Leases) > 0) && !sameLease(old, st) {
			now[n.leaseKey()] = st
		}
	}
	if len(now) == 0 {
		return
	}
	err := b.change(func(page *bookPage) bool {
		if page.Guests == nil {
			page.Guests = map[string]dhcp.State{}
		}
		maps.Copy(page.Guests, now)
		page.forget()
		return true
	})
	if err != nil {
		b.complainLocked(err)
		return
	}
	maps.Copy(b.last, now)
}

// forget drops guests without a lease, and beyond bookGuests those who have been
// silent longest.
func (p *bookPage) forget() {
	maps.DeleteFunc(p.Guests, func(_ string, st dhcp.State) bool { return len(st.Leases) == 0 })
	if len(p.Guests) <= bookGuests {
		return
	}
	seen := func(guest string) int64 { return p.Guests[guest].Leases[0].LastSeen.Unix() }
	keys := slices.SortedFunc(maps.Keys(p.Guests), func(a, b string) int { return cmp.Compare(seen(a), seen(b)) })
	for _, k := range keys[:len(keys)-bookGuests] {
		delete(p.Guests, k)
	}
}

// sameLease says whether two states differ in nothing that is worth writing.
func sameLease(a, b dhcp.State) bool {
	return a.Version == b.Version && slices.EqualFunc(a.Leases, b.Leases, func(x, y dhcp.LeaseInfo) bool {
		return x.MAC == y.MAC && x.Addr == y.Addr && bytes.Equal(x.ClientID, y.ClientID) && x.Hostname == y.Hostname &&
			x.Expiry.Sub(y.Expiry).Abs() < bookStale
	})
}

func (b *leaseBook) complain(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.complainLocked(err)
}

func (b *leaseBook) complainLocked(err error) {
	if !b.said {
		b.log.Warn("leases do not outlast this run; name a directory that can be written with --state-dir", "err", err)
		b.said = true
	}
}

// read reads the file, which need not be there.
func (b *leaseBook) read() (page bookPage, err error) {
	f, err := os.OpenFile(b.path, unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return bookPage{Version: bookVersion}, nil
	}
	if err != nil {
		return page, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxBook+1))
	switch {
	case err != nil:
		return page, fmt.Errorf("%s: %w", b.path, err)
	case len(data) > maxBook:
		return page, fmt.Errorf("%s: larger than %d MiB", b.path, maxBook>>20)
	}
	return b.parse(data)
}

// parse reads a page.
func (b *leaseBook) parse(data []byte) (page bookPage, err error) {
	if err := json.Unmarshal(data, &page); err != nil {
		return bookPage{}, fmt.Errorf("%s: %w; remove it to begin a new one", b.path, err)
	}
	if page.Version != bookVersion {
		return bookPage{}, fmt.Errorf("%s: version %d, want %d; remove it to begin a new one", b.path, page.Version, bookVersion)
	}
	return page, nil
}

// change reads the file, lets edit change it, and replaces it if edit says so:
// who reads it, after a crash too, finds either the old one or the new one.
func (b *leaseBook) change(edit func(*bookPage) (changed bool)) error {
	dir := filepath.Dir(b.path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close() // and with it the lock
	if err := lockWithin(int(d.Fd()), bookPatience); err != nil {
		return fmt.Errorf("lock %s: %w", dir, err)
	}
	page, err := b.read()
	if err != nil {
		return err
	}
	if !edit(&page) {
		return nil
	}
	data, err := json.MarshalIndent(page, "", " ")
	if err != nil {
		return err
	}
	temp := filepath.Join(dir, ".leases.new") // nobody else writes it: the lock is ours
	if err := writeSynced(temp, data); err != nil {
		return errors.Join(err, os.Remove(temp))
	}
	if err := os.Rename(temp, b.path); err != nil {
		return err
	}
	return d.Sync()
}

// lockWithin takes a lock that others hold for a moment, unless they are stopped.
func lockWithin(fd int, patience time.Duration) error {
	for end := time.Now().Add(patience); ; time.Sleep(bookRetry) {
		err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case err == nil:
			return nil
		case errors.Is(err, unix.EINTR):
		case !errors.Is(err, unix.EWOULDBLOCK):
			return err
		case time.Now().After(end):
			return fmt.Errorf("another process has kept it for %v", patience)
		}
	}
}

func writeSynced(name string, data []byte) error {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	return errors.Join(err, f.Sync(), f.Close())
}
