package main

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"sidewire/engine/uplink"
	"sidewire/nat/usernet"
)

// publish forwards the ports that the VMI and the flags ask for, and says what
// is not.
func (n *userNIC) publish(s *server) error {
	for _, f := range n.ports {
		if err := n.forward(f); err != nil {
			if errors.Is(err, unix.EACCES) {
				err = fmt.Errorf("%w, or another port that leads there: --forward PORT:%d", err, f.Guest)
			}
			return cannot("%w", err)
		}
	}
	if len(n.ranges) > 0 {
		n.publishRanges(s)
	}
	if n.slirp() || len(n.iface.Ports) > 0 {
		return nil
	}
	log := s.log.With("interface", n.name())
	why := n.lead(s)
	if n.six.net != nil && why == "" {
		log.Warn("no ports are listed, which means all, but by IPv6 only those of --forward reach the guest from outside: list ports, or take the packet path")
	}
	switch {
	case why == "":
		log.Info("every TCP and UDP port leads to the guest; other protocols, and UDP ports that a process of the pod has, stay with the pod")
		if low := lowestPort(n.netns); low > 1 {
			log.Warn("the guest's answers from low UDP ports leave from others, which clients do not know: it takes CAP_NET_BIND_SERVICE, or the setting net.ipv4.ip_unprivileged_port_start",
				"ports", fmt.Sprintf("1-%d", low-1))
		}
	case len(n.ports) == 0:
		log.Warn("no ports are listed, which means all, but none of them reaches the guest from outside: list ports, or name some with --forward", "why", why)
	default:
		log.Warn("no ports are listed, which means all, but only these reach the guest from outside; other ports, and other protocols than TCP and UDP, do not",
			"why", why, "ports", forwardList(n.forwards()))
	}
	return nil
}

// publishRanges leads the ranges of ports that the VMI lists to the guest: by one
// redirect, or, where we may not do that, and for IPv6, by a socket for each port
// as far as there are descriptors for them.
func (n *userNIC) publishRanges(s *server) {
	why, add := n.lead(s, n.ranges...), n.forward
	if why == "" {
		if n.six.net == nil {
			return
		}
		why, add = "the redirect is of IPv4", n.six.net.AddForward
	}
	log := s.log.With("interface", n.name())
	room := min(maxForwardRange, s.socketShare/rangeShare)
	var missing int
	var reason error
	for _, p := range n.ranges {
		for port := int(p.Port); port <= int(p.Last); port++ {
			f := usernet.Forward{Proto: p.Proto, Port: uint16(port)}
			err := errNoRoom
			if room > 0 {
				err = add(f)
			}
			if err == nil {
				room -= len(n.of(f))
				continue
			}
			if reason == nil {
				reason = err
			}
			missing++
		}
	}
	if missing > 0 {
		log.Warn("ports of portRanges do not reach the guest: a redirect would lead all of them, but cannot be made here", "ports", missing, "first", reason, "redirect", why)
	}
}

// rangeShare is the part of the descriptors that ports of ranges may have: one in
// so many. The guest's own connections need theirs.
const rangeShare = 4

var errNoRoom = errors.New("each takes a socket, and as many as ranges may have are open")

// lead leads what arrives for the pod at these ports, or at all if none is named,
// to the guest, or says why it cannot.
func (n *userNIC) lead(s *server, ports ...uplink.Port) (why string) {
	switch {
	case n.vm.Istio:
		return "Istio's proxy has what comes from outside, and gives it to listed ports"
	case !hasCapability(unix.CAP_NET_ADMIN):
		return "CAP_NET_ADMIN missing"
	case n.net == nil:
		return "it leads IPv4 alone, which the pod has none of"
	case !n.pod.IsValid():
		return "link " + n.link + " has no IPv4 address"
	}
	tcp, udp, err := n.net.OpenAll(n.pod.As4())
	if err != nil {
		return err.Error()
	}
	err = uplink.InNetNS(n.netns, func() (err error) {
		n.redirect, err = uplink.OpenRedirect(uplink.RedirectConfig{Link: n.link, Pod: n.pod, TCP: tcp, UDP: udp, Ports: ports})
		return err
	})
	if err != nil {
		n.net.CloseAll()
		return err.Error()
	}
	s.onStop(n.redirect.Close)
	return ""
}

// lowestPort is the lowest port that we may bind in a namespace.
func lowestPort(netns string) (low int) {
	if hasCapability(unix.CAP_NET_BIND_SERVICE) {
		return 1
	}
	low = 1024
	_ = uplink.InNetNS(netns, func() error {
		b, err := os.ReadFile("/proc/sys/net/ipv4/ip_unprivileged_port_start")
		if p, perr := strconv.Atoi(strings.TrimSpace(string(b))); err == nil && perr == nil {
			low = p
		}
		return err
	})
	return max(low, 1)
}
