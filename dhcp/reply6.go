package dhcp

import (
	"net"
	"net/netip"
	"slices"

	"github.com/insomniacslk/dhcp/dhcpv6"
	"github.com/insomniacslk/dhcp/iana"

	"sidewire/engine/frame"
)

// maxIAs bounds the identity associations that one message is answered for.
const maxIAs = 16

// processDHCP answers a client's message, which goes to all servers of the link:
// no client may speak to one alone unless that has said so (RFC 8415, section
// 18.4), and this one does not.
func (s *Server6) processDHCP(b *frame.Batch, f *frame.Frame) {
	o := s.offer.Load()
	if f.HeadLen < l4At6+udpLen || [16]byte(f.Head[dst6At:l4At6]) != allServers.As16() {
		return
	}
	p := s.private(b, f, frame.ProtoUDP)
	if p == nil {
		return
	}
	q, panicked := decode6(p[l4At6+udpLen:])
	if q == nil {
		s.bad(f, frame.BadDHCP, panicked)
		return
	}
	f.Out = frame.Consumed
	r := s.answer6(o, q, frame.MAC(p[6:12]))
	if r == nil {
		s.count(func(st *Stats6) { st.Silent++ })
		return
	}
	msg := r.ToBytes()
	udp := make([]byte, udpLen, udpLen+len(msg))
	udp[0], udp[1], udp[2], udp[3] = server6Port>>8, server6Port&0xff, client6Port>>8, client6Port&0xff
	udp = append(udp, msg...)
	udp[4], udp[5] = byte(len(udp)>>8), byte(len(udp))
	src := netip.AddrFrom16([16]byte(p[src6At:dst6At]))
	if l4At6+len(udp) > frame.EthernetLen+o.MTU || !o.send6(b, f.Queue, frame.MAC(p[6:12]), o.router, src, frame.ProtoUDP, udp, 6) {
		f.Drop(frame.BatchFull)
		return
	}
	s.count(func(st *Stats6) { st.Replies++ })
}

// decode6 runs the codec. A panic in it is caught: it touches private memory
// only, so the message is at fault (H089).
func decode6(m []byte) (q *dhcpv6.Message, panicked bool) {
	defer func() {
		if recover() != nil {
			q, panicked = nil, true
		}
	}()
	q, err := dhcpv6.MessageFromBytes(m)
	if err != nil || q.Options.ClientID() == nil && q.MessageType != dhcpv6.MessageTypeInformationRequest {
		return nil, false
	}
	if id := q.Options.ClientID(); id != nil && len(id.ToBytes()) > maxEcho {
		return nil, false
	}
	return q, false
}

// answer6 is what a message is answered with, nil for nothing: RFC 8415,
// section 18.3, with the checks of section 16.
func (s *Server6) answer6(o *offer6, q *dhcpv6.Message, mac frame.MAC) *dhcpv6.Message {
	s.mu.Lock()
	defer s.mu.Unlock()
	kind := dhcpv6.MessageTypeReply
	forUs := q.Options.ServerID() != nil && q.Options.ServerID().Equal(o.duid)
	named := q.Options.ServerID() != nil
	var ok bool
	switch q.MessageType {
	case dhcpv6.MessageTypeSolicit:
		s.stats.Solicit++
		if ok = !named; q.GetOneOption(dhcpv6.OptionRapidCommit) == nil {
			kind = dhcpv6.MessageTypeAdvertise
		}
	case dhcpv6.MessageTypeRequest:
		s.stats.Request++
		ok = forUs
	case dhcpv6.MessageTypeConfirm:
		s.stats.Confirm++
		ok = !named && slices.ContainsFunc(q.Options.IANA(), func(ia *dhcpv6.OptIANA) bool { return len(ia.Options.Addresses()) > 0 })
	case dhcpv6.MessageTypeRenew:
		s.stats.Renew++
		ok = forUs
	case dhcpv6.MessageTypeRebind:
		s.stats.Rebind++
		ok = !named
	case dhcpv6.MessageTypeRelease:
		s.stats.Release++
		ok = forUs
	case dhcpv6.MessageTypeDecline:
		s.stats.Decline++
		ok = forUs
	case dhcpv6.MessageTypeInformationRequest:
		s.stats.Information++
		ok = (!named || forUs) && len(q.Options.IANA()) == 0
	}
	if !ok {
		if named && !forUs {
			s.stats.OtherServer++
		}
		return nil
	}
	return s.reply6(o, q, kind, mac)
}

// reply6 makes the answer. The caller holds mu.
func (s *Server6) reply6(o *offer6, q *dhcpv6.Message, kind dhcpv6.MessageType, mac frame.MAC) *dhcpv6.Message {
	r := &dhcpv6.Message{MessageType: kind, TransactionID: q.TransactionID}
	if id := q.Options.ClientID(); id != nil {
		r.AddOption(dhcpv6.OptClientID(id))
	}
	r.AddOption(dhcpv6.OptServerID(o.duid))
	switch q.MessageType {
	case dhcpv6.MessageTypeConfirm:
		status := &dhcpv6.OptStatusCode{StatusCode: iana.StatusSuccess}
		if !o.onLink(q) {
			status.StatusCode, status.StatusMessage = iana.StatusNotOnLink, "another link"
		}
		r.AddOption(status)
		return r
	case dhcpv6.MessageTypeRelease, dhcpv6.MessageTypeDecline:
		if s.lease != nil && s.lease.MAC == mac && slices.ContainsFunc(q.Options.IANA(), o.holds) {
			s.lease = nil
		}
		r.AddOption(&dhcpv6.OptStatusCode{StatusCode: iana.StatusSuccess})
		return r
	}
	if kind == dhcpv6.MessageTypeReply && q.MessageType == dhcpv6.MessageTypeSolicit {
		r.AddOption(&dhcpv6.OptionGeneric{OptionCode: dhcpv6.OptionRapidCommit})
	}
	if given := o.addAssociations(r, q); given && kind == dhcpv6.MessageTypeReply {
		s.bind6(o, q, mac)
	}
	for _, opt := range o.options {
		r.AddOption(opt)
	}
	return r
}

// addAssociations answers each identity association: the first one for an
// address, or that which has ours already, gets it, with the addresses that it
// names beside taken away; all others get none.
func (o *offer6) addAssociations(r, q *dhcpv6.Message) (given bool) {
	ias := q.Options.IANA()
	ias = ias[:min(len(ias), maxIAs)]
	chosen := slices.IndexFunc(ias, o.holds)
	for i, ia := range ias {
		out := &dhcpv6.OptIANA{IaId: ia.IaId}
		if i == max(chosen, 0) {
			given = true
			out.T1, out.T2 = o.LeaseTime/2, o.LeaseTime/5*4
			out.Options.Add(&dhcpv6.OptIAAddress{IPv6Addr: net.IP(o.Address.Addr().AsSlice()), PreferredLifetime: o.LeaseTime, ValidLifetime: o.LeaseTime})
		} else {
			out.Options.Add(&dhcpv6.OptStatusCode{StatusCode: iana.StatusNoAddrsAvail, StatusMessage: "one address"})
		}
		if q.MessageType != dhcpv6.MessageTypeSolicit {
			for j, a := range ia.Options.Addresses() {
				if j < maxIAs && !a.IPv6Addr.Equal(o.Address.Addr().AsSlice()) {
					out.Options.Add(&dhcpv6.OptIAAddress{IPv6Addr: a.IPv6Addr}) // lifetimes of 0: no more
				}
			}
		}
		r.AddOption(out)
	}
	for i, pd := range q.Options.IAPD() {
		if i < maxIAs {
			out := &dhcpv6.OptIAPD{IaId: pd.IaId}
			out.Options.Add(&dhcpv6.OptStatusCode{StatusCode: iana.StatusNoPrefixAvail, StatusMessage: "no prefix"})
			r.AddOption(out)
		}
	}
	return given
}

// holds says whether an association has the guest's address.
func (o *offer6) holds(ia *dhcpv6.OptIANA) bool {
	return slices.ContainsFunc(ia.Options.Addresses(), func(a *dhcpv6.OptIAAddress) bool {
		return a.IPv6Addr.Equal(o.Address.Addr().AsSlice())
	})
}

// onLink says whether all addresses of a message belong to the guest's network.
func (o *offer6) onLink(q *dhcpv6.Message) bool {
	for _, ia := range q.Options.IANA() {
		for _, a := range ia.Options.Addresses() {
			if addr, ok := netip.AddrFromSlice(a.IPv6Addr); !ok || !o.Address.Contains(addr) {
				return false
			}
		}
	}
	return true
}

// bind6 notes that the client has the address now. The caller holds mu.
func (s *Server6) bind6(o *offer6, q *dhcpv6.Message, mac frame.MAC) {
	now := o.Now()
	l := &LeaseInfo{
		MAC: mac, Addr: o.Address.Addr(), ClientID: q.Options.ClientID().ToBytes(), Since: now,
		Expiry: now.Add(o.LeaseTime), LastMessage: q.MessageType.String(), LastSeen: now,
	}
	if old := s.lease; old != nil && now.Before(old.Expiry) {
		if old.MAC != mac {
			s.stats.Takeover++
		} else {
			l.Since = old.Since
		}
	}
	s.lease = l
	if o.OnLease != nil {
		o.OnLease(mac)
	}
}
