package uplink

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"sidewire/engine/frame"
)

// The rule set, all of it in two tables named after the link.
//
// Goal: of the frames for the pod's address, those of the guest leave the
// stack for the sink, where the kernel neither answers nor resets them; those
// of the pod's own flows stay, also when everything is published. Whose a
// frame is must be known before it arrives, so the egress chain notes each
// flow that the kernel starts in sets that the ingress chain looks up. Frames
// of the engine's own carry Mark and pass egress unseen, but for protocols
// without ports where ports are listed: there is no other sign of the guest's.
//
// A flow of the pod is forgotten when it was silent for as long as RFC 5382
// and RFC 4787 ask a NAT to remember one, sooner when TCP ended it. What arrives
// keeps it alive too (RFC 4787, REQ-6a): some processes ask once and listen for
// hours; TCP answers whatever arrives. A RST of the kernel's own starts no flow.
// A flow that is forgotten, or that a full set did not take, is the guest's when
// its peer speaks again.
//
// Fragments carry ports only in the first, which is classified like any other
// packet and notes where the rest goes. A fragment that is ahead of its first
// goes both ways; so do ICMP errors, because only the two flow tables know
// whose packet is quoted. Neither side minds what is not its own.
//
// Limits: untagged unicast frames; everything else stays with the pod. What is
// here is for IPv4, see ruleset6.go.
const (
	tcpIdle   = 7440 * time.Second // RFC 5382, REQ-5: 2 h 4 min
	tcpBrief  = 240 * time.Second  // opening and closing
	udpIdle   = 300 * time.Second  // RFC 4787, REQ-5
	echoIdle  = 60 * time.Second   // RFC 5508, REQ-2
	otherIdle = 300 * time.Second
	fragIdle  = 30 * time.Second
)

// Offsets of fields.
const (
	offID, offFrag, offProto, offSrc, offDst = 4, 6, 9, 12, 16

	tcpFlags           = 13
	fin, syn, rst, ack = 1, 2, 4, 16
)

const (
	echoReply, unreachable, redirect, echoRequest, timeExceeded, badParameter = 0, 3, 5, 8, 11, 12
)

// savedChain holds, as comments of rules, what must be put back.
const savedChain = "saved"

func tableName(link string) string { return "sidewire-" + link }

func (p *Pod) netdevTable() *nftables.Table {
	return &nftables.Table{Name: tableName(p.c.Link), Family: nftables.TableFamilyNetdev}
}

func (p *Pod) ipTable() *nftables.Table {
	return &nftables.Table{Name: tableName(p.c.Link), Family: nftables.TableFamilyIPv4}
}

var (
	chainsNetdev = []string{"ingress", "egress", "marked", "seen", "seentcp", "transport", "candidate", "icmp", "fragment", "pod", "guest"}
	chainsIP     = []string{"unmarked", "output", "postrouting", "prerouting"}

	typeFlow  = nftables.MustConcatSetType(nftables.TypeIPAddr, nftables.TypeInetProto, nftables.TypeInetService, nftables.TypeInetService)
	typePair  = nftables.MustConcatSetType(nftables.TypeIPAddr, nftables.TypeInetService)
	typeProto = nftables.MustConcatSetType(nftables.TypeIPAddr, nftables.TypeInetProto)
	typeFrag  = nftables.MustConcatSetType(nftables.TypeIPAddr, nftables.TypeInetProto, nftables.TypeInetService)
	typePort  = nftables.MustConcatSetType(nftables.TypeInetProto, nftables.TypeInetService)
)

// makeTables makes tables, chains and sets where they are not there yet.
// Chains without rules change nothing.
func (p *Pod) makeTables() error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("nftables: %w", err)
	}
	dev := c.AddTable(p.netdevTable())
	hook := func(name string, h *nftables.ChainHook) {
		c.AddChain(&nftables.Chain{
			Name: name, Table: dev, Type: nftables.ChainTypeFilter, Hooknum: h,
			Priority: nftables.ChainPriorityRef(0), Device: p.c.Link,
		})
	}
	hook("ingress", nftables.ChainHookIngress)
	hook("egress", nftables.ChainHookEgress)
	for _, name := range append([]string{savedChain}, chainsNetdev[2:]...) {
		c.AddChain(&nftables.Chain{Name: name, Table: dev})
	}
	err = nil
	flows := func(name string, key nftables.SetDatatype, size uint32) {
		err = errors.Join(err, c.AddSet(&nftables.Set{
			Table: dev, Name: name, KeyType: key, Concatenation: true, Dynamic: true, HasTimeout: true, Size: size,
		}, nil))
	}
	flows("flows", typeFlow, 65536)
	flows("opening", typeFlow, 65536)
	flows("closing", typeFlow, 65536)
	flows("echoes", typePair, 4096)
	flows("others", typeProto, 4096)
	flows("guestothers", typeProto, 4096)
	flows("podfrags", typeFrag, 4096)
	flows("guestfrags", typeFrag, 4096)
	err = errors.Join(err, p.makeTables6(c, dev, hook))

	ip := c.AddTable(p.ipTable())
	base := func(name string, t nftables.ChainType, h *nftables.ChainHook, prio *nftables.ChainPriority) {
		c.AddChain(&nftables.Chain{Name: name, Table: ip, Type: t, Hooknum: h, Priority: prio})
	}
	base("unmarked", nftables.ChainTypeFilter, nftables.ChainHookOutput, nftables.ChainPriorityRaw)
	base("output", nftables.ChainTypeNAT, nftables.ChainHookOutput, nftables.ChainPriorityNATDest)
	base("postrouting", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource)
	base("prerouting", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, nftables.ChainPriorityRef(proxyPriority))
	err = errors.Join(err, c.AddSet(p.portSet(dev, "ports"), nil))
	for i := range p.ports {
		err = errors.Join(err, c.AddSet(p.portSet(ip, portsOf(i)), nil))
	}
	if err != nil {
		return fmt.Errorf("nftables sets: %w", err)
	}
	if err := c.Flush(); err != nil {
		return nftError(err)
	}
	return p.fillPorts()
}

// seed notes the flows that the pod's processes have already.
func (p *Pod) seed(socks []socket) error {
	var elems []nftables.SetElement
	for _, s := range socks {
		if s.local.Addr() != p.c.Pod || !s.remote.Addr().Is4() || s.remote.Port() == 0 || s.state == tcpListen && s.proto == frame.ProtoTCP {
			continue
		}
		key := append(s.remote.Addr().AsSlice(), s.proto, 0, 0, 0)
		key = append(binary.BigEndian.AppendUint16(key, s.local.Port()), 0, 0)
		key = append(binary.BigEndian.AppendUint16(key, s.remote.Port()), 0, 0)
		elems = append(elems, nftables.SetElement{Key: key, Timeout: s.idle()})
	}
	flows := &nftables.Set{Table: p.netdevTable(), Name: "flows", KeyType: typeFlow, HasTimeout: true}
	return addElements(flows, elems)
}

// idle is how long the flow of a socket is remembered.
func (s *socket) idle() time.Duration {
	switch {
	case s.proto != frame.ProtoTCP:
		return udpIdle
	case s.state == tcpTimeWait:
		return tcpBrief
	}
	return tcpIdle
}

// addElements puts elements into a set, in messages that are not too long.
func addElements(s *nftables.Set, elems []nftables.SetElement) error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("nftables: %w", err)
	}
	if err := appendElements(c, s, elems); err != nil {
		return err
	}
	if err := c.Flush(); err != nil {
		return nftError(err)
	}
	return nil
}

func appendElements(c *nftables.Conn, s *nftables.Set, elems []nftables.SetElement) error {
	const most = 500 // an attribute holds less than 64 KiB
	for chunk := range slices.Chunk(elems, most) {
		if err := c.SetAddElements(s, chunk); err != nil {
			return fmt.Errorf("nftables set %s: %w", s.Name, err)
		}
	}
	return nil
}

// nftError says what a refused transaction may want.
func nftError(err error) error {
	switch {
	case errors.Is(err, unix.EPERM):
		return privilege(err, "CAP_NET_ADMIN")
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EPROTONOSUPPORT), errors.Is(err, unix.ENOENT):
		return fmt.Errorf("%w: nftables with netdev ingress and egress hooks, fwd, dup, sets and nat "+
			"(Linux 5.16, modules nf_tables nft_fwd_netdev nft_dup_netdev nft_nat): %w", ErrKernel, err)
	}
	return fmt.Errorf("nftables: %w", err)
}

func (p *Pod) portSet(t *nftables.Table, name string) *nftables.Set {
	return &nftables.Set{Table: t, Name: name, KeyType: typePort, Concatenation: true, Interval: p.wide}
}

// portsOf is the name of the set of the i-th guest's ports. Those of all guests
// are in the set "ports" of the other table.
func portsOf(i int) string { return fmt.Sprintf("ports%d", i) }

// fillPorts makes the port sets hold exactly the published ports, at once.
func (p *Pod) fillPorts() error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("nftables: %w", err)
	}
	var all []nftables.SetElement
	for i := range p.ports {
		elems := p.ports[i].elements(p.wide)
		s := p.portSet(p.ipTable(), portsOf(i))
		c.FlushSet(s)
		if err := appendElements(c, s, elems); err != nil {
			return err
		}
		all = append(all, elems...)
	}
	s := p.portSet(p.netdevTable(), "ports")
	c.FlushSet(s)
	if err := appendElements(c, s, all); err != nil {
		return err
	}
	if err := c.Flush(); err != nil {
		return nftError(err)
	}
	return nil
}

var chainsEgress = []string{"egress", "marked", "seen", "seentcp"}

// setEgress replaces the rules that note the pod's flows, so that none starts
// unseen while those of before are noted.
func (p *Pod) setEgress() error {
	r := &rules{family: nftables.TableFamilyNetdev, table: tableName(p.c.Link)}
	for _, c := range slices.Concat(chainsEgress, chainsEgress6) {
		r.flush(c)
	}
	if p.c.Pod.IsValid() {
		p.egressRules(r)
	}
	if p.c.Pod6.IsValid() {
		p.egressRules6(r)
	}
	if err := r.commit(); err != nil {
		return nftError(err)
	}
	return nil
}

// emptyTables takes all rules out of the tables but what must be put back.
func emptyTables(link string) error {
	dev := &rules{family: nftables.TableFamilyNetdev, table: tableName(link)}
	for _, c := range slices.Concat(chainsNetdev, chainsNetdev6) {
		dev.flush(c)
	}
	ip := &rules{family: nftables.TableFamilyIPv4, table: tableName(link)}
	for _, c := range chainsIP {
		ip.flush(c)
	}
	return errors.Join(dev.commit(), ip.commit())
}

// setRules replaces all rules, in one transaction for each table.
func (p *Pod) setRules() error {
	dev := &rules{family: nftables.TableFamilyNetdev, table: tableName(p.c.Link)}
	for _, c := range slices.Concat(chainsNetdev, chainsNetdev6) {
		dev.flush(c)
	}
	if p.c.Pod.IsValid() {
		p.ingressRules(dev)
		p.icmpRules(dev)
		p.fragmentRules(dev)
		p.egressRules(dev)
	}
	if p.c.Pod6.IsValid() {
		p.ingressRules6(dev)
		p.egressRules6(dev)
	}
	ip := &rules{family: nftables.TableFamilyIPv4, table: tableName(p.c.Link)}
	for _, c := range chainsIP {
		ip.flush(c)
	}
	if p.c.Pod.IsValid() {
		p.loopbackRules(ip)
	}
	for _, r := range []*rules{dev, ip} {
		if err := r.commit(); err != nil {
			return nftError(err)
		}
	}
	return nil
}

// protocol loads the IP protocol and compares it.
func protocol(proto byte) any { return []any{ipField(offProto, 1, reg1), is(proto)} }

// flowKey is the key of a flow, seen from the pod.
func flowKey(peer, ownPort, peerPort uint32) any {
	return []any{ipField(peer, 4, reg1), ipField(offProto, 1, reg2), thField(ownPort, 2, reg3), thField(peerPort, 2, reg4)}
}

// portKey is protocol and port at an offset of the transport header.
func portKey(off uint32) any { return []any{ipField(offProto, 1, reg1), thField(off, 2, reg2)} }

// inNAT matches a port of the range that the guest's flows go out from.
func (p *Pod) inNAT(off uint32) any {
	return []any{thField(off, 2, reg1), cmp(expr.CmpOpGte, be16(p.c.NAT.Lo)...), cmp(expr.CmpOpLte, be16(p.c.NAT.Hi)...)}
}

func (p *Pod) ingressRules(r *rules) {
	pod := p.c.Pod.AsSlice()
	// A VLAN tag that the NIC took out shows in the link header again.
	r.add("ingress", load(expr.PayloadBaseLLHeader, 12, 2, reg1), isNot(be16(frame.TypeIPv4)...), accept())
	r.add("ingress", &expr.Meta{Key: expr.MetaKeyPKTTYPE, Register: reg1}, isNot(unix.PACKET_HOST), accept())
	r.add("ingress", ipField(offDst, 4, reg1), isNot(pod...), accept())
	r.add("ingress", ipBits(offFrag, 0x1fff), isNot(0, 0), jump("fragment"))
	r.add("ingress", protocol(frame.ProtoICMP), jump("icmp"))
	r.add("ingress", protocol(frame.ProtoTCP), jump("transport"))
	r.add("ingress", protocol(frame.ProtoUDP), jump("transport"))
	r.add("ingress", ipField(offSrc, 4, reg1), ipField(offProto, 1, reg2), inSet("others"), update("others", otherIdle), jump("pod"))
	if p.all() {
		r.add("ingress", jump("guest"))
		r.add("transport", jump("candidate"))
	} else {
		r.add("ingress", ipField(offSrc, 4, reg1), ipField(offProto, 1, reg2), inSet("guestothers"), jump("guest"))
		r.add("ingress", jump("pod"))
		r.add("transport", p.inNAT(2), jump("candidate"))
		r.add("transport", portKey(2), inSet("ports"), jump("candidate"))
		r.add("transport", jump("pod"))
	}
	r.add("candidate", protocol(frame.ProtoUDP), flowKey(offSrc, 2, 0), inSet("flows"), update("flows", udpIdle), jump("pod"))
	for _, set := range []string{"flows", "opening", "closing"} {
		r.add("candidate", flowKey(offSrc, 2, 0), inSet(set), jump("pod"))
	}
	r.add("candidate", jump("guest"))
}

func (p *Pod) icmpRules(r *rules) {
	icmp := func(typ byte) any { return []any{thField(0, 1, reg1), is(typ)} }
	for _, t := range []byte{unreachable, timeExceeded, badParameter} {
		r.add("icmp", icmp(t), dup(p.index), jump("pod"))
	}
	r.add("icmp", icmp(redirect), jump("pod"))
	r.add("icmp", icmp(echoReply), ipField(offSrc, 4, reg1), thField(4, 2, reg2), inSet("echoes"), jump("pod"))
	r.add("icmp", icmp(echoReply), jump("guest"))
	if p.all() {
		r.add("icmp", jump("guest"))
	} else {
		r.add("icmp", jump("pod"))
	}
}

// fragKey names the packet that a fragment belongs to (RFC 791).
func fragKey() any {
	return []any{ipField(offSrc, 4, reg1), ipField(offProto, 1, reg2), ipField(offID, 2, reg3)}
}

func (p *Pod) fragmentRules(r *rules) {
	r.add("fragment", fragKey(), inSet("podfrags"), accept())
	r.add("fragment", fragKey(), inSet("guestfrags"), fwd(p.index))
	r.add("fragment", dup(p.index), accept())

	first := ipBits(offFrag, frame.MoreFragments|0x1fff)
	r.add("pod", first, is(be16(frame.MoreFragments)...), fragKey(), update("podfrags", fragIdle))
	r.add("pod", accept())
	r.add("guest", first, is(be16(frame.MoreFragments)...), fragKey(), update("guestfrags", fragIdle))
	r.add("guest", fwd(p.index))
}

func (p *Pod) egressRules(r *rules) {
	if p.all() {
		r.add("egress", markIs(Mark), accept())
	} else {
		// What the guest began in a protocol without ports is known by its peer.
		r.add("egress", markIs(Mark), jump("marked"))
		for _, proto := range []byte{frame.ProtoTCP, frame.ProtoUDP, frame.ProtoICMP} {
			r.add("marked", protocol(proto), accept())
		}
		r.add("marked", ipField(offDst, 4, reg1), ipField(offProto, 1, reg2), update("guestothers", otherIdle))
		r.add("marked", accept())
	}
	r.add("egress", &expr.Meta{Key: expr.MetaKeyPROTOCOL, Register: reg1}, isNot(be16(frame.TypeIPv4)...), accept())
	r.add("egress", ipField(offSrc, 4, reg1), isNot(p.c.Pod.AsSlice()...), accept())
	r.add("egress", ipBits(offFrag, 0x1fff), isNot(0, 0), accept())
	r.add("egress", protocol(frame.ProtoICMP), thField(0, 1, reg1), is(echoRequest),
		ipField(offDst, 4, reg1), thField(4, 2, reg2), update("echoes", echoIdle))
	r.add("egress", protocol(frame.ProtoICMP), accept())
	if p.all() {
		r.add("egress", jump("seen"))
	} else {
		// Other flows stay with the pod anyway.
		r.add("egress", p.inNAT(0), jump("seen"))
		r.add("egress", portKey(0), inSet("ports"), jump("seen"))
		r.add("egress", protocol(frame.ProtoTCP), accept())
		r.add("egress", protocol(frame.ProtoUDP), accept())
		r.add("egress", jump("seen"))
	}
	out := flowKey(offDst, 0, 2)
	r.add("seen", protocol(frame.ProtoTCP), jump("seentcp"))
	r.add("seen", protocol(frame.ProtoUDP), out, update("flows", udpIdle), accept())
	r.add("seen", ipField(offDst, 4, reg1), ipField(offProto, 1, reg2), update("others", otherIdle))

	flags := func(mask, want byte) any {
		return []any{thField(tcpFlags, 1, reg1), &expr.Bitwise{
			SourceRegister: reg1, DestRegister: reg1, Len: 1, Mask: []byte{mask}, Xor: []byte{0},
		}, is(want)}
	}
	r.add("seentcp", flags(rst, rst), out, inSet("flows"), update("closing", tcpBrief), remove("flows"), accept())
	r.add("seentcp", flags(rst, rst), accept())
	r.add("seentcp", flags(syn|ack, syn), out, remove("flows"), remove("closing"), update("opening", tcpBrief), accept())
	r.add("seentcp", flags(fin, fin), out, remove("flows"), update("closing", tcpBrief), accept())
	r.add("seentcp", out, inSet("closing"), update("closing", tcpBrief), accept())
	r.add("seentcp", out, update("flows", tcpIdle))
}

// loopbackRules are those of KubeVirt for connections from inside the pod. What
// the engine itself asks on the pod's loopback is no such connection.
func (p *Pod) loopbackRules(r *rules) {
	r.add("unmarked", markIs(Mark), &expr.Notrack{})
	r.add("output", markIs(PodMark), accept())
	// Who has everything gets what no list names.
	for _, everything := range []bool{false, true} {
		for i, g := range p.c.Guests {
			if (p.ports[i] == nil) == everything {
				r.add("output", ipField(offDst, 4, reg1), is(loopback...), p.listed(i), nat(expr.NATTypeDestNAT, g.Addr.AsSlice()))
			}
		}
		p.proxyRules(r, everything)
	}
	for i, g := range p.c.Guests {
		r.add("postrouting", toTap(p.taps[i]),
			ipField(offSrc, 4, reg1), is(loopback...), p.listed(i), nat(expr.NATTypeSourceNAT, g.Gateway.Addr().AsSlice()))
	}
}

var loopback = []byte{127, 0, 0, 1}

// listed matches the published ports of the i-th guest.
func (p *Pod) listed(i int) any {
	if p.ports[i] == nil {
		return []any{}
	}
	return []any{portKey(2), inSet(portsOf(i))}
}

// toTap matches what goes by a local tap.
func toTap(t *Tap) any {
	tap := make([]byte, unix.IFNAMSIZ)
	copy(tap, t.Name())
	return []any{&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: reg1}, is(tap...)}
}

func nat(t expr.NATType, to []byte) any {
	return []any{&expr.Immediate{Register: reg1, Data: to}, &expr.NAT{Type: t, Family: unix.NFPROTO_IPV4, RegAddrMin: reg1}}
}

// deleteTables removes both tables if they are there.
func deleteTables(link string) error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("nftables: %w", err)
	}
	for _, fam := range []nftables.TableFamily{nftables.TableFamilyNetdev, nftables.TableFamilyIPv4} {
		// Deleting what does not exist is an error, adding what exists is not.
		c.DelTable(c.AddTable(&nftables.Table{Name: tableName(link), Family: fam}))
	}
	if err := c.Flush(); err != nil {
		return nftError(err)
	}
	return nil
}
