package uplink

import (
	"encoding/binary"
	"errors"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"sidewire/engine/frame"
)

// The rules for IPv6, in chains and sets of their own beside those for IPv4,
// whose ways they share; see ruleset.go. What differs:
//
// Neighbour discovery, multicast listeners and whatever is link-local is the
// link's own business and always stays with the pod. A protocol is what the
// kernel finds behind extension headers. Fragments name their packet in a header
// of their own.
//
// Limits: connections to [::1] from inside the pod are the pod's, as nothing can
// leave ::1 by another link.

// Offsets of fields, registers of keys with an address, which takes four.
const (
	offSrc6, offDst6 = 8, 24

	reg5 = unix.NFT_REG32_04
	reg6 = unix.NFT_REG32_05
	reg7 = unix.NFT_REG32_06

	headerFragment = 44
)

const (
	icmp6LastError, icmp6Echo, icmp6EchoReply = 4, 128, 129
)

var (
	chainsNetdev6 = []string{"ingress6", "egress6", "marked6", "seen6", "seentcp6", "transport6", "candidate6", "icmp6", "fragment6", "pod6", "guest6"}
	chainsEgress6 = []string{"egress6", "marked6", "seen6", "seentcp6"}

	typeFlow6  = nftables.MustConcatSetType(nftables.TypeIP6Addr, nftables.TypeInetProto, nftables.TypeInetService, nftables.TypeInetService)
	typePair6  = nftables.MustConcatSetType(nftables.TypeIP6Addr, nftables.TypeInetService)
	typeProto6 = nftables.MustConcatSetType(nftables.TypeIP6Addr, nftables.TypeInetProto)
	typeFrag6  = nftables.MustConcatSetType(nftables.TypeIP6Addr, nftables.TypeMark)
)

// makeTables6 adds chains and sets to the table for IPv4's.
func (p *Pod) makeTables6(c *nftables.Conn, dev *nftables.Table, hook func(name string, h *nftables.ChainHook)) (err error) {
	hook("ingress6", nftables.ChainHookIngress)
	hook("egress6", nftables.ChainHookEgress)
	for _, name := range chainsNetdev6[2:] {
		c.AddChain(&nftables.Chain{Name: name, Table: dev})
	}
	for _, s := range []struct {
		name string
		key  nftables.SetDatatype
		size uint32
	}{
		{"flows6", typeFlow6, 65536}, {"opening6", typeFlow6, 65536}, {"closing6", typeFlow6, 65536}, {"echoes6", typePair6, 4096},
		{"others6", typeProto6, 4096}, {"guestothers6", typeProto6, 4096}, {"podfrags6", typeFrag6, 4096}, {"guestfrags6", typeFrag6, 4096},
	} {
		err = errors.Join(err, c.AddSet(&nftables.Set{
			Table: dev, Name: s.name, KeyType: s.key, Concatenation: true, Dynamic: true, HasTimeout: true, Size: s.size,
		}, nil))
	}
	return err
}

// seed6 is seed for IPv6.
func (p *Pod) seed6(socks []socket) error {
	var elems []nftables.SetElement
	for _, s := range socks {
		if s.local.Addr() != p.c.Pod6 || s.remote.Port() == 0 || s.state == tcpListen && s.proto == frame.ProtoTCP {
			continue
		}
		key := append(s.remote.Addr().AsSlice(), s.proto, 0, 0, 0)
		key = append(binary.BigEndian.AppendUint16(key, s.local.Port()), 0, 0)
		key = append(binary.BigEndian.AppendUint16(key, s.remote.Port()), 0, 0)
		elems = append(elems, nftables.SetElement{Key: key, Timeout: s.idle()})
	}
	return addElements(&nftables.Set{Table: p.netdevTable(), Name: "flows6", KeyType: typeFlow6, HasTimeout: true}, elems)
}

func l4proto(reg uint32) any { return &expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg} }

func protocol6(proto byte) any { return []any{l4proto(reg1), is(proto)} }

func flowKey6(peer, ownPort, peerPort uint32) any {
	return []any{ipField(peer, 16, reg1), l4proto(reg5), thField(ownPort, 2, reg6), thField(peerPort, 2, reg7)}
}

func portKey6(off uint32) any { return []any{l4proto(reg1), thField(off, 2, reg2)} }

func protoKey6(peer uint32) any { return []any{ipField(peer, 16, reg1), l4proto(reg5)} }

// fragmentOf loads the offset and flags of a fragment header; the rule does not
// match without one.
func fragmentOf(mask uint16) any {
	return []any{
		&expr.Exthdr{DestRegister: reg1, Type: headerFragment, Offset: 2, Len: 2, Op: expr.ExthdrOpIpv6},
		&expr.Bitwise{SourceRegister: reg1, DestRegister: reg1, Len: 2, Mask: be16(mask), Xor: be16(0)},
	}
}

func fragKey6() any {
	return []any{ipField(offSrc6, 16, reg1), &expr.Exthdr{DestRegister: reg5, Type: headerFragment, Offset: 4, Len: 4, Op: expr.ExthdrOpIpv6}}
}

func (p *Pod) ingressRules6(r *rules) {
	r.add("ingress6", load(expr.PayloadBaseLLHeader, 12, 2, reg1), isNot(be16(frame.TypeIPv6)...), accept())
	r.add("ingress6", &expr.Meta{Key: expr.MetaKeyPKTTYPE, Register: reg1}, isNot(unix.PACKET_HOST), accept())
	r.add("ingress6", ipField(offDst6, 16, reg1), isNot(p.c.Pod6.AsSlice()...), accept())
	// What is link-local is between the pod and its link.
	r.add("ingress6", ipField(offSrc6, 2, reg1), &expr.Bitwise{
		SourceRegister: reg1, DestRegister: reg1, Len: 2, Mask: be16(0xffc0), Xor: be16(0),
	}, is(be16(0xfe80)...), accept())
	r.add("ingress6", fragmentOf(0xfff8), isNot(0, 0), jump("fragment6"))
	r.add("ingress6", protocol6(frame.ProtoICMPv6), jump("icmp6"))
	r.add("ingress6", protocol6(frame.ProtoTCP), jump("transport6"))
	r.add("ingress6", protocol6(frame.ProtoUDP), jump("transport6"))
	r.add("ingress6", protoKey6(offSrc6), inSet("others6"), update("others6", otherIdle), jump("pod6"))
	if p.all6() {
		r.add("ingress6", jump("guest6"))
		r.add("transport6", jump("candidate6"))
	} else {
		r.add("ingress6", protoKey6(offSrc6), inSet("guestothers6"), jump("guest6"))
		r.add("ingress6", jump("pod6"))
		r.add("transport6", p.inNAT(2), jump("candidate6"))
		r.add("transport6", portKey6(2), inSet("ports"), jump("candidate6"))
		r.add("transport6", jump("pod6"))
	}
	r.add("candidate6", protocol6(frame.ProtoUDP), flowKey6(offSrc6, 2, 0), inSet("flows6"), update("flows6", udpIdle), jump("pod6"))
	for _, set := range []string{"flows6", "opening6", "closing6"} {
		r.add("candidate6", flowKey6(offSrc6, 2, 0), inSet(set), jump("pod6"))
	}
	r.add("candidate6", jump("guest6"))
	p.icmpRules6(r)
	p.fragmentRules6(r)
}

func (p *Pod) icmpRules6(r *rules) {
	icmp := func(typ byte) any { return []any{thField(0, 1, reg1), is(typ)} }
	r.add("icmp6", thField(0, 1, reg1), cmp(expr.CmpOpLte, icmp6LastError), dup(p.index), jump("pod6"))
	r.add("icmp6", icmp(icmp6EchoReply), ipField(offSrc6, 16, reg1), thField(4, 2, reg5), inSet("echoes6"), jump("pod6"))
	r.add("icmp6", icmp(icmp6EchoReply), jump("guest6"))
	if p.all6() {
		r.add("icmp6", icmp(icmp6Echo), jump("guest6"))
	}
	r.add("icmp6", jump("pod6"))
}

func (p *Pod) fragmentRules6(r *rules) {
	r.add("fragment6", fragKey6(), inSet("podfrags6"), accept())
	r.add("fragment6", fragKey6(), inSet("guestfrags6"), fwd(p.index))
	r.add("fragment6", dup(p.index), accept())

	first := fragmentOf(0xfff9) // offset 0, more to come
	r.add("pod6", first, is(0, 1), fragKey6(), update("podfrags6", fragIdle))
	r.add("pod6", accept())
	r.add("guest6", first, is(0, 1), fragKey6(), update("guestfrags6", fragIdle))
	r.add("guest6", fwd(p.index))
}

func (p *Pod) egressRules6(r *rules) {
	if p.all6() {
		r.add("egress6", markIs(Mark), accept())
	} else {
		r.add("egress6", markIs(Mark), jump("marked6"))
		for _, proto := range []byte{frame.ProtoTCP, frame.ProtoUDP, frame.ProtoICMPv6} {
			r.add("marked6", protocol6(proto), accept())
		}
		r.add("marked6", protoKey6(offDst6), update("guestothers6", otherIdle))
		r.add("marked6", accept())
	}
	r.add("egress6", &expr.Meta{Key: expr.MetaKeyPROTOCOL, Register: reg1}, isNot(be16(frame.TypeIPv6)...), accept())
	r.add("egress6", ipField(offSrc6, 16, reg1), isNot(p.c.Pod6.AsSlice()...), accept())
	r.add("egress6", fragmentOf(0xfff8), isNot(0, 0), accept())
	r.add("egress6", protocol6(frame.ProtoICMPv6), thField(0, 1, reg1), is(icmp6Echo),
		ipField(offDst6, 16, reg1), thField(4, 2, reg5), update("echoes6", echoIdle))
	r.add("egress6", protocol6(frame.ProtoICMPv6), accept())
	if p.all6() {
		r.add("egress6", jump("seen6"))
	} else {
		r.add("egress6", p.inNAT(0), jump("seen6"))
		r.add("egress6", portKey6(0), inSet("ports"), jump("seen6"))
		r.add("egress6", protocol6(frame.ProtoTCP), accept())
		r.add("egress6", protocol6(frame.ProtoUDP), accept())
		r.add("egress6", jump("seen6"))
	}
	out := flowKey6(offDst6, 0, 2)
	r.add("seen6", protocol6(frame.ProtoTCP), jump("seentcp6"))
	r.add("seen6", protocol6(frame.ProtoUDP), out, update("flows6", udpIdle), accept())
	r.add("seen6", protoKey6(offDst6), update("others6", otherIdle))

	flags := func(mask, want byte) any {
		return []any{thField(tcpFlags, 1, reg1), &expr.Bitwise{
			SourceRegister: reg1, DestRegister: reg1, Len: 1, Mask: []byte{mask}, Xor: []byte{0},
		}, is(want)}
	}
	r.add("seentcp6", flags(rst, rst), out, inSet("flows6"), update("closing6", tcpBrief), remove("flows6"), accept())
	r.add("seentcp6", flags(rst, rst), accept())
	r.add("seentcp6", flags(syn|ack, syn), out, remove("flows6"), remove("closing6"), update("opening6", tcpBrief), accept())
	r.add("seentcp6", flags(fin, fin), out, remove("flows6"), update("closing6", tcpBrief), accept())
	r.add("seentcp6", out, inSet("closing6"), update("closing6", tcpBrief), accept())
	r.add("seentcp6", out, update("flows6", tcpIdle))
}
