package dhcp

import (
	"sidewire/engine/frame"
)

// Theory of operation: what a server with one address decides.
//
// The address belongs to the port, not to a client: a guest that boots from
// the network shows three client identifiers in a row (ROM, initramfs,
// system), and each must get the same address. So there is no table of
// clients; the lease is a note of who had the address last, and the server is
// authoritative: it knows without a record whether a client's address is
// right, and says NAK where it is not (RFC 2131, section 4.3.2).
//
//	DISCOVER             OFFER, or with rapid commit (RFC 4039) ACK
//	REQUEST, other id    silence: the client chose another server
//	REQUEST, SELECTING   ACK, NAK if option 50 is another address
//	REQUEST, INIT-REBOOT ACK, NAK if option 50 is another address
//	REQUEST, RENEWING or
//	  REBINDING          ACK, NAK if ciaddr is another address
//	INFORM               ACK without address and times, no lease
//	DECLINE, RELEASE     the lease ends, silence
//
// A declined address is offered again: there is no other, and in a network of
// one guest the conflict was a mistake.

// reply is what is to be sent; its options are in the order of sending.
type reply struct {
	kind           byte
	ciaddr, yiaddr [4]byte
	siaddr         [4]byte
	file           string
	options        []option
}

// answer decides about a message, keeps the lease and the counters, and
// returns what to send, or nil.
func (s *Server) answer(o *offer, q *request) *reply {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.received(o, q)
	kind := o.decide(q)
	if o.KubeVirtCompat {
		kind = decideAsKubeVirt(q)
	}
	switch {
	case kind == typeOffer:
		s.stats.Offer++
	case kind == typeNak:
		s.stats.Nak++
	case kind == typeAck:
		s.stats.Ack++
		if q.kind != typeInform {
			s.bind(o, q)
		}
	case (q.kind == typeRelease || q.kind == typeDecline) && !o.KubeVirtCompat:
		s.unbind(o, q)
		return nil
	default:
		s.stats.Silent++
		if q.serverID != ([4]byte{}) && q.serverID != o.server {
			s.stats.OtherServer++
		}
		return nil
	}
	return o.reply(q, kind)
}

// received counts a message and notes it in its client's lease.
func (s *Server) received(o *offer, q *request) {
	switch q.kind {
	case typeDiscover:
		s.stats.Discover++
	case typeRequest:
		s.stats.Request++
	case typeInform:
		s.stats.Inform++
	case typeDecline:
		s.stats.Decline++
	case typeRelease:
		s.stats.Release++
	}
	if s.lease != nil && s.lease.MAC == q.chaddr {
		s.lease.LastMessage, s.lease.LastSeen = typeName(q.kind), o.Now()
	}
}

// decide returns the type of the answer, 0 for silence.
func (o *offer) decide(q *request) byte {
	var none [4]byte
	switch q.kind {
	case typeDiscover:
		if q.rapid {
			return typeAck
		}
		return typeOffer
	case typeInform:
		// A client of another network would be misled by our options.
		if q.ciaddr != none && !o.contains(q.ciaddr) {
			return 0
		}
		return typeAck
	case typeRequest:
		if q.serverID != none && q.serverID != o.server {
			return 0
		}
		want := q.requested
		if want == none {
			want = q.ciaddr
		}
		switch {
		case want == o.addr:
			return typeAck
		case want != none:
			return typeNak
		case q.serverID == o.server:
			return typeAck // it took our offer but forgot option 50
		}
	}
	return 0
}

// decideAsKubeVirt is decide with KubeVirt's answers.
func decideAsKubeVirt(q *request) byte {
	switch q.kind {
	case typeDiscover:
		return typeOffer
	case typeRequest:
		return typeAck
	}
	return 0
}

// contains says whether a lies in the guest's network.
func (o *offer) contains(a [4]byte) bool {
	for i, left := 0, o.Address.Bits(); left > 0; i, left = i+1, left-8 {
		mask := byte(0xff)
		if left < 8 {
			mask <<= 8 - left
		}
		if (a[i]^o.addr[i])&mask != 0 {
			return false
		}
	}
	return true
}

// reply fills the answer of that type (RFC 2131, table 3).
func (o *offer) reply(q *request, kind byte) *reply {
	r := &reply{kind: kind}
	r.add(option{code: optType, data: []byte{kind}, must: true})
	r.add(option{code: optServerID, data: o.server[:], must: true})
	if kind == typeNak {
		r.add(option{code: optMessage, data: []byte("address is not the one leased here")})
		r.echo(q)
		return r
	}
	r.siaddr, r.file = o.next, o.file
	if q.kind != typeInform {
		r.yiaddr = o.addr
		r.add(o.times...)
	}
	if o.KubeVirtCompat {
		r.add(o.options...)
		return r
	}
	if kind == typeAck {
		r.ciaddr = q.ciaddr
	}
	r.inOrder(o.options, q.parameters)
	if q.kind == typeDiscover && kind == typeAck {
		r.add(option{code: optRapidCommit, must: true})
	}
	r.echo(q)
	return r
}

func (r *reply) add(os ...option) { r.options = append(r.options, os...) }

// echo returns the client identifier (RFC 6842) and, last, what a relay agent
// added (RFC 3046, section 2.2).
func (r *reply) echo(q *request) {
	if len(q.clientID) > 0 {
		r.add(option{code: optClientID, data: q.clientID, must: true})
	}
	if len(q.relay) > 0 {
		r.add(option{code: optRelay, data: q.relay, must: true})
	}
}

// inOrder adds all options, those first that the client asks for, in its
// order: they are the last to be left out where room is short. The mask comes
// before everything, since it must precede the router (RFC 2132, 3.3).
func (r *reply) inOrder(os []option, parameters []byte) {
	var done [256]bool
	add := func(code byte, asked bool) {
		if done[code] {
			return
		}
		for _, o := range os {
			if o.code == code && (asked || !o.asked) {
				r.add(o)
				done[code] = true
			}
		}
	}
	add(optMask, true)
	for _, code := range parameters {
		add(code, true)
	}
	for _, o := range os {
		add(o.code, false)
	}
}

// typeName is the name of a message type as the RFC writes it.
func typeName(kind byte) string {
	switch kind {
	case typeDiscover:
		return "DISCOVER"
	case typeRequest:
		return "REQUEST"
	case typeDecline:
		return "DECLINE"
	case typeRelease:
		return "RELEASE"
	case typeInform:
		return "INFORM"
	}
	return "unknown"
}

// destination returns where an answer goes (RFC 2131, section 4.1).
func (o *offer) destination(q *request, r *reply) (mac frame.MAC, ip [4]byte, port uint16) {
	var none [4]byte
	switch {
	case o.KubeVirtCompat && (q.ipSrc == none || q.broadcast):
		return frame.Broadcast, broadcast4, q.portSrc
	case o.KubeVirtCompat:
		return q.frameSrc, q.ipSrc, q.portSrc
	case q.giaddr != none:
		return q.frameSrc, q.giaddr, serverPort
	case r.kind == typeNak:
		return frame.Broadcast, broadcast4, clientPort
	case q.ciaddr != none:
		return q.chaddr, q.ciaddr, clientPort
	case q.kind == typeInform && q.ipSrc != none:
		return q.chaddr, q.ipSrc, clientPort
	case q.broadcast || r.yiaddr == none:
		return frame.Broadcast, broadcast4, clientPort
	}
	return q.chaddr, r.yiaddr, clientPort
}
