package dhcp

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"sidewire/engine/frame"
)

// LeaseInfo is the lease of an address: who has it and until when.
type LeaseInfo struct {
	MAC         frame.MAC  // the client's hardware address
	Addr        netip.Addr // what it was given
	ClientID    []byte     // option 61, if it gave one
	Hostname    string     // option 12, made printable; the guest chose it
	Since       time.Time  // when it got the address first
	Expiry      time.Time  // when the lease ends unless it is renewed
	LastMessage string     // type of the last message, as RFC 2131 names it
	LastSeen    time.Time  // when that came
}

// stateVersion is the version of State that this code writes.
const stateVersion = 1

// State is what a server knows that its configuration does not say. It is a
// plain value: it can be written down and given to another process's server.
type State struct {
	Version int
	Leases  []LeaseInfo
}

// Leases returns the leases that have not expired, at most one.
func (s *Server) Leases() []LeaseInfo {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lease == nil || !s.offer.Load().Now().Before(s.lease.Expiry) {
		return nil
	}
	l := *s.lease
	l.ClientID = slices.Clone(l.ClientID)
	return []LeaseInfo{l}
}

// Export returns the server's state.
func (s *Server) Export() State {
	return State{Version: stateVersion, Leases: s.Leases()}
}

// Import takes up a state that Export returned. It refuses, without a change,
// one of another version and one with a lease that this server's configuration
// does not give. OnLease is told of the lease.
func (s *Server) Import(st State) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	o := s.offer.Load()
	lease, err := st.leaseOf(o.Address.Addr())
	if err != nil {
		return err
	}
	s.lease = lease
	if lease != nil && o.OnLease != nil && o.Now().Before(lease.Expiry) {
		o.OnLease(lease.MAC)
	}
	return nil
}

// leaseOf is the lease of an address in a state that somebody may have written,
// nil if it has none. One that cannot be is refused.
func (st State) leaseOf(addr netip.Addr) (lease *LeaseInfo, err error) {
	if st.Version != stateVersion {
		return nil, fmt.Errorf("dhcp: import state: version %d, want %d", st.Version, stateVersion)
	}
	for _, l := range st.Leases {
		if l.Addr != addr {
			return nil, fmt.Errorf("dhcp: import state: lease of %v, want %v", l.Addr, addr)
		}
		if len(l.ClientID) > maxEcho {
			return nil, fmt.Errorf("dhcp: import state: client identifier of %d bytes", len(l.ClientID))
		}
		l.Hostname, l.ClientID = printable([]byte(l.Hostname)), slices.Clone(l.ClientID)
		lease = &l
	}
	return lease, nil
}

// bind notes that q's client has the address now. The caller holds mu.
func (s *Server) bind(o *offer, q *request) {
	now := o.Now()
	l := &LeaseInfo{
		MAC: q.chaddr, Addr: o.Address.Addr(), ClientID: slices.Clone(q.clientID), Hostname: q.hostname,
		Since: now, Expiry: now.Add(o.LeaseTime), LastMessage: typeName(q.kind), LastSeen: now,
	}
	if old := s.lease; old != nil && now.Before(old.Expiry) {
		if old.MAC != l.MAC {
			s.stats.Takeover++
		} else {
			l.Since = old.Since
			if l.Hostname == "" {
				l.Hostname = old.Hostname
			}
		}
	}
	s.lease = l
	if o.OnLease != nil {
		o.OnLease(q.chaddr)
	}
}

// unbind ends the lease if it is the client's own that it gives back or
// declines. The caller holds mu.
func (s *Server) unbind(o *offer, q *request) {
	addr := q.ciaddr
	if q.kind == typeDecline {
		addr = q.requested
	}
	if q.serverID != ([4]byte{}) && q.serverID != o.server {
		s.stats.OtherServer++
		return
	}
	if s.lease != nil && s.lease.MAC == q.chaddr && addr == o.addr {
		s.lease = nil
	}
}
