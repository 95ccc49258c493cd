package usernet

import (
	"fmt"
	"net"
	"net/netip"

	"golang.org/x/sys/unix"
)

// Theory of operation.
//
// A UDP forward at all addresses answers a client from the address that the
// client wrote to, or the client would not know the answer. The kernel chooses an
// answer's source by its route, so where the host has one address beside the
// loopback that is right by itself, and nothing is kept. Of a client that wrote to
// another address a peer of the mapping says so (peerSource), until it is silent
// for as long as a mapping lives; the address is among the flow's fields while the
// guest sends there.
//
// Mappings that are no forward's pay nothing: their sockets do not say where a
// datagram was sent to.

// mapWild: the mapping is a forward's, at all addresses. Its socket tells by
// which one a datagram came.
const mapWild flags = 1 << 14

// peerSource: this one has written to the host's address that is its lastAddr.
const peerSource = 0x91

// source is the address that a mapping sends from now, 0 for the kernel's
// choice. The field is TCP's in other flows.
func (f *flow) source() uint32     { return f.sndMax }
func (f *flow) setSource(a uint32) { f.sndMax = a }

// tellAddress has a forward's socket say by which of the host's addresses a
// datagram came.
func (n *Net) tellAddress(fd int32) error {
	if errno := n.setIP(fd, unix.IP_PKTINFO, 1); errno != 0 {
		return errno
	}
	var only uint32
	err := n.inside(func() error {
		addrs, err := net.InterfaceAddrs()
		if err != nil {
			return fmt.Errorf("addresses of the host: %w", err)
		}
		count := 0
		for _, a := range addrs {
			if p, ok := a.(*net.IPNet); ok && (p.IP.To4() != nil) == (n.six == nil) && !p.IP.IsLoopback() && (n.six == nil || p.IP.IsGlobalUnicast()) {
				ip, _ := netip.AddrFromSlice(p.IP)
				only = n.numberOf(ip.Unmap())
				count++
			}
		}
		if count != 1 {
			only = 0
		}
		return nil
	})
	n.forwards.only.Store(only)
	return err
}

// wroteTo notes by which of the host's addresses a client has sent to a mapping
// of all addresses. last says that the guest sends to that client now.
func (w *worker) wroteTo(i int32, from target, to uint32, last bool) {
	if to == loopback || to == w.net.forwards.only.Load() {
		to = 0 // the kernel would choose it
	}
	fl := w.table.at(i)
	if last && fl.source() == to {
		return // its peer lives as long as the guest talks to it
	}
	p := w.peer(peerSource, i, from)
	switch {
	case to == 0:
		if p != none {
			w.removePeer(p)
		}
	case p != none, w.udp.peers < w.table.max/clientsMost:
		if p = w.keepPeer(peerSource, i, from); p != none {
			w.table.at(p).setLast(to, 0, 0, 0)
			break
		}
		fallthrough
	default:
		w.stats.TableFull++
	}
	if last {
		w.table.at(i).setSource(to)
	}
}

// chooseSource sets which address a mapping sends from to where it sends now.
func (w *worker) chooseSource(i int32) {
	fl := w.table.at(i)
	if fl.flags&mapWild == 0 {
		return
	}
	fl.setSource(0)
	if w.udp.peers == 0 {
		return
	}
	if p := w.peer(peerSource, i, target{mapped(fl.hostAddr()), fl.hostPort()}); p != none {
		fl.setSource(w.table.at(p).lastAddr())
	}
}

// inside does f where the guest's sockets are made.
func (n *Net) inside(f func() error) error {
	if n.ns.on {
		if err := n.ns.enter(); err != nil {
			return err
		}
		defer n.ns.leave()
	}
	return f()
}
