package main

import (
	"context"
	"errors"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"sidewire/dhcp"
	"sidewire/nat/dns"
)

const (
	// bootServerFirst is how long a lookup that nobody answered waits before it
	// is tried again, which doubles up to bootServerMost.
	bootServerFirst, bootServerMost = time.Second, time.Minute
	// bootServerKeep is how long an address is good, however often the guest
	// asks for leases; that there is none, bootServerFirst.
	bootServerKeep = 10 * time.Second
)

// bootServer follows the address of a TFTP server that the spec gives by name.
// The lease has the name in option 66, as KubeVirt's; but boot ROMs go by
// siaddr, and few could resolve a name before they have the lease.
type bootServer struct {
	name string
	addr atomic.Pointer[netip.Addr] // nil as long as it is not known
	ask  chan struct{}              // a token: the guest boots, or the resolvers have changed
}

// newBootServer is nil where the spec gives no name.
func newBootServer(name string) *bootServer {
	if _, err := netip.ParseAddr(name); name == "" || err == nil {
		return nil
	}
	return &bootServer{name: name, ask: make(chan struct{}, 1)}
}

// followBoot looks the name of the guest's TFTP server up as a process of the
// namespace, for a guest whose names nobody else resolves here.
func (n *nic) followBoot(ctx context.Context, s *server, o *options, netns string, update func()) {
	log := s.log.With("interface", n.name())
	r, err := newResolver(o, relayPlace{netns: netns, allow: netip.PrefixFrom(loopback, 32)}, log)
	if err != nil {
		log.Warn("the lease has no address of the TFTP server", "err", err)
		return
	}
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() { n.boot.follow(ctx, r, update) })
	s.onStop(func() error {
		cancel()
		wg.Wait()
		return nil
	})
}

// again has the name looked up again. It does not wait.
func (b *bootServer) again() {
	if b == nil {
		return
	}
	select {
	case b.ask <- struct{}{}:
	default:
	}
}

// lease puts the address into a lease.
func (b *bootServer) lease(c *dhcp.Config) {
	if b == nil {
		return
	}
	if a := b.addr.Load(); a != nil {
		c.NextServer = *a
	}
}

// follow looks the name up by r until ctx ends, and calls changed with every
// other address. A name that the resolvers do not know waits for the guest to
// ask again; resolvers that are silent do not answer sooner for being asked
// often.
func (b *bootServer) follow(ctx context.Context, r *resolver, changed func()) {
	wait, said := bootServerFirst, false
	for ctx.Err() == nil {
		a, err := r.relay.Lookup4(ctx, b.name, r.config().Search)
		var retry <-chan time.Time
		switch {
		case err == nil:
			wait, said = bootServerFirst, false
			if old := b.addr.Load(); old == nil || *old != a {
				b.addr.Store(&a)
				r.log.Info("the lease names the TFTP server", "name", b.name, "address", a)
				changed()
			}
		case ctx.Err() != nil:
			return
		default:
			if !said {
				r.log.Warn("the lease has no address of the TFTP server: ROMs that go by siaddr do not boot", "err", err)
				said = true
			}
			if !errors.Is(err, dns.ErrNoName) {
				retry = time.After(wait)
				wait = min(2*wait, bootServerMost)
			}
		}
		if !b.wait(ctx, time.Now(), retry) {
			return
		}
	}
}

// wait returns when it is time to look again; false: ctx has ended.
func (b *bootServer) wait(ctx context.Context, last time.Time, retry <-chan time.Time) bool {
	for {
		select {
		case <-ctx.Done():
			return false
		case <-retry:
			return true
		case <-b.ask:
			keep := bootServerKeep
			if b.addr.Load() == nil {
				keep = bootServerFirst
			}
			if time.Since(last) >= keep {
				return true
			}
		}
	}
}
