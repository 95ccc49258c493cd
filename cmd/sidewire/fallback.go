package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"sidewire/engine/uplink"
	"sidewire/nat/usernet"
)

// masqueradePath is the way out of masquerade: what the flag says, else packet
// where we may and socket where we may not. why says what is missing for packet.
func masqueradePath(o *options) (path, why string) {
	if o.path != "auto" {
		return o.path, ""
	}
	var missing []string
	for _, c := range []struct {
		bit  uint
		name string
	}{{unix.CAP_NET_ADMIN, "CAP_NET_ADMIN"}, {unix.CAP_NET_RAW, "CAP_NET_RAW"}} {
		if !hasCapability(c.bit) {
			missing = append(missing, c.name)
		}
	}
	if len(missing) == 0 {
		return "packet", ""
	}
	return "socket", strings.Join(missing, " and ") + " missing"
}

// hasCapability says whether this process has a capability (capabilities(7)).
func hasCapability(c uint) bool {
	head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if unix.Capget(&head, &data[0]) != nil {
		return false
	}
	return data[c/32].Effective&(1<<(c%32)) != 0
}

// hostRefusal is that the pod's namespace could not be prepared for the packet
// path. Nothing of it is left.
type hostRefusal struct {
	error       // as hostError says it
	cause error // as the uplink does
}

func (h hostRefusal) Unwrap() error { return h.error }

// openPods opens the packet path's side of pods and their guests. Guests of one
// for which this machine lacks something take the socket path instead, where the
// choice is ours.
func (s *server) openPods(ctx context.Context, o *options, p *plan, stopEngine func() error) error {
	for _, q := range slices.Clone(p.pods) {
		s.mu.Lock()
		built := len(s.closers)
		s.mu.Unlock()
		err := q.open(ctx, s, o, stopEngine)
		if err == nil {
			continue
		}
		if o.path != "auto" || !mayFallBack(err) {
			return fmt.Errorf("%s: %w", q.name(), err)
		}
		if uerr := s.undo(built); uerr != nil {
			return fmt.Errorf("%s: %w", q.name(), errors.Join(err, uerr))
		}
		s.log.Warn("the packet path cannot be: masquerade takes the socket path, which carries TCP, UDP and ping by ordinary sockets", "interface", q.name(), "why", err)
		p.toSockets(o, q, err.Error())
		s.shareSockets(p)
		if len(p.pods) == 0 {
			s.path = "socket"
		}
	}
	return nil
}

// mayFallBack says whether an error is one of the machine's, not of what it was
// told to do.
func mayFallBack(err error) bool {
	var h hostRefusal
	if !errors.As(err, &h) {
		return false
	}
	for _, given := range []error{uplink.ErrNoLink, uplink.ErrNoAddress, uplink.ErrInUse} {
		if errors.Is(h.cause, given) {
			return false
		}
	}
	return true
}

// toSockets has the guests of a pod reach the network by sockets.
func (p *plan) toSockets(o *options, q *pod, why string) {
	p.pods = slices.DeleteFunc(p.pods, func(other *pod) bool { return other == q })
	for _, g := range q.nics {
		n := newUserNIC(o, g.nic)
		n.why = why
		n.addListed()
		p.users = append(p.users, n)
		p.all[slices.Index(p.all, served(g))] = n
	}
}

// shareSockets shares the descriptors out.
func (s *server) shareSockets(p *plan) {
	pairs := 0
	for _, n := range p.all {
		pairs += n.base().iface.QueuePairs
	}
	if len(p.users) > 0 {
		s.socketShare = max((usernet.MaxDescriptors()-descriptorsForOthers-descriptorsPerPair*pairs)/len(p.users), 1)
	}
}

// undo takes down what was built since there were n closers.
func (s *server) undo(n int) error {
	s.mu.Lock()
	last := slices.Clone(s.closers[n:])
	s.closers = s.closers[:n]
	s.mu.Unlock()
	var errs []error
	for _, c := range slices.Backward(last) {
		errs = append(errs, c())
	}
	return errors.Join(errs...)
}
