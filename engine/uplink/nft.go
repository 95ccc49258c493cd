package uplink

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Registers of a set's key, as nft itself uses them: 4 bytes each.
const (
	reg1 = unix.NFT_REG_1
	reg2 = unix.NFT_REG32_01
	reg3 = unix.NFT_REG32_02
	reg4 = unix.NFT_REG32_03
)

// rules is one transaction of rules. The nftables package makes tables, sets
// and chains, but knows no fwd statement and lets nobody add one.
type rules struct {
	family nftables.TableFamily
	table  string
	msgs   []netlink.Message
	acks   int
	err    error
}

// rawExpr is an expression that the nftables package does not know.
type rawExpr struct {
	name string
	data []netlink.Attribute
}

func (r *rules) message(typ uint16, flags netlink.HeaderFlags, attrs ...netlink.Attribute) {
	b, err := netlink.MarshalAttributes(attrs)
	r.err = errors.Join(r.err, err)
	r.msgs = append(r.msgs, netlink.Message{
		Header: netlink.Header{
			Type:  netlink.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | typ),
			Flags: netlink.Request | netlink.Acknowledge | flags,
		},
		Data: append([]byte{byte(r.family), unix.NFNETLINK_V0, 0, 0}, b...),
	})
	r.acks++
}

// flush removes the rules of a chain.
func (r *rules) flush(chain string) {
	r.message(unix.NFT_MSG_DELRULE, 0,
		netlink.Attribute{Type: unix.NFTA_RULE_TABLE, Data: cstring(r.table)},
		netlink.Attribute{Type: unix.NFTA_RULE_CHAIN, Data: cstring(chain)})
}

// add appends a rule made of expr.Any, rawExpr and slices of them.
func (r *rules) add(chain string, parts ...any) { r.addNoted(chain, "", parts...) }

// addNoted is add with a comment that nft shows.
func (r *rules) addNoted(chain, comment string, parts ...any) {
	var list []netlink.Attribute
	for _, p := range flattenParts(nil, parts) {
		b, err := r.marshal(p)
		r.err = errors.Join(r.err, err)
		list = append(list, netlink.Attribute{Type: unix.NLA_F_NESTED | unix.NFTA_LIST_ELEM, Data: b})
	}
	exprs, err := netlink.MarshalAttributes(list)
	r.err = errors.Join(r.err, err)
	attrs := []netlink.Attribute{
		{Type: unix.NFTA_RULE_TABLE, Data: cstring(r.table)},
		{Type: unix.NFTA_RULE_CHAIN, Data: cstring(chain)},
		{Type: unix.NLA_F_NESTED | unix.NFTA_RULE_EXPRESSIONS, Data: exprs},
	}
	if comment != "" {
		attrs = append(attrs, netlink.Attribute{
			Type: unix.NFTA_RULE_USERDATA, Data: userdata.AppendString(nil, userdata.TypeComment, comment),
		})
	}
	r.message(unix.NFT_MSG_NEWRULE, netlink.Create|netlink.Append, attrs...)
}

func flattenParts(out, in []any) []any {
	for _, p := range in {
		if list, ok := p.([]any); ok {
			out = flattenParts(out, list)
		} else {
			out = append(out, p)
		}
	}
	return out
}

func (r *rules) marshal(p any) ([]byte, error) {
	switch e := p.(type) {
	case expr.Any:
		return expr.Marshal(byte(r.family), e)
	case rawExpr:
		data, err := netlink.MarshalAttributes(e.data)
		if err != nil {
			return nil, err
		}
		return netlink.MarshalAttributes([]netlink.Attribute{
			{Type: unix.NFTA_EXPR_NAME, Data: cstring(e.name)},
			{Type: unix.NLA_F_NESTED | unix.NFTA_EXPR_DATA, Data: data},
		})
	}
	return nil, fmt.Errorf("%T is no expression", p)
}

// commit sends the transaction: all of it holds afterwards, or nothing.
func (r *rules) commit() error {
	c, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return fmt.Errorf("nftables: %w", err)
	}
	defer c.Close()
	return r.commitBy(c)
}

// commitBy is commit by a socket of the caller's.
func (r *rules) commitBy(c *netlink.Conn) error {
	if r.err != nil {
		return r.err
	}
	if err := c.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return fmt.Errorf("nftables: %w", err)
	}
	batch := []byte{unix.AF_UNSPEC, unix.NFNETLINK_V0, 0, unix.NFNL_SUBSYS_NFTABLES}
	edge := func(t netlink.HeaderType) netlink.Message {
		return netlink.Message{Header: netlink.Header{Type: t, Flags: netlink.Request}, Data: batch}
	}
	msgs := append([]netlink.Message{edge(unix.NFNL_MSG_BATCH_BEGIN)}, r.msgs...)
	if _, err := c.SendMessages(append(msgs, edge(unix.NFNL_MSG_BATCH_END))); err != nil {
		return fmt.Errorf("nftables: %w", err)
	}
	for got := 0; got < r.acks; {
		in, err := c.Receive()
		if err != nil {
			return fmt.Errorf("nftables rules: %w", err)
		}
		got += len(in)
	}
	return nil
}

func cstring(s string) []byte { return append([]byte(s), 0) }

// What follows are pieces of rules, named as nft would say them.

func accept() any { return &expr.Verdict{Kind: expr.VerdictAccept} }

func jump(chain string) any { return &expr.Verdict{Kind: expr.VerdictGoto, Chain: chain} }

func load(base expr.PayloadBase, off, n, reg uint32) any {
	return &expr.Payload{OperationType: expr.PayloadLoad, DestRegister: reg, Base: base, Offset: off, Len: n}
}

func ipField(off, n, reg uint32) any { return load(expr.PayloadBaseNetworkHeader, off, n, reg) }

func thField(off, n, reg uint32) any { return load(expr.PayloadBaseTransportHeader, off, n, reg) }

func cmp(op expr.CmpOp, data ...byte) any { return &expr.Cmp{Op: op, Register: reg1, Data: data} }

func is(data ...byte) any    { return cmp(expr.CmpOpEq, data...) }
func isNot(data ...byte) any { return cmp(expr.CmpOpNeq, data...) }

// ipBits loads 16 bits of the IP header under a mask.
func ipBits(off uint32, mask uint16) any {
	return []any{ipField(off, 2, reg1), &expr.Bitwise{
		SourceRegister: reg1, DestRegister: reg1, Len: 2, Mask: be16(mask), Xor: be16(0),
	}}
}

func markIs(m uint32) any {
	return []any{&expr.Meta{Key: expr.MetaKeyMARK, Register: reg1}, is(binaryutil.NativeEndian.PutUint32(m)...)}
}

func inSet(name string) any { return &expr.Lookup{SourceRegister: reg1, SetName: name} }

// update puts the key into a set, or renews its time.
func update(name string, timeout time.Duration) any {
	return &expr.Dynset{SrcRegKey: reg1, SetName: name, Operation: unix.NFT_DYNSET_OP_UPDATE, Timeout: timeout}
}

func remove(name string) any {
	return &expr.Dynset{SrcRegKey: reg1, SetName: name, Operation: dynsetDelete}
}

// dynsetDelete is NFT_DYNSET_OP_DELETE.
const dynsetDelete = 2

// fwd and dup send the frame, or a copy of it, out of a link.
func fwd(link int) any { return steal("fwd", 1, link) }

func dup(link int) any { return steal("dup", 2, link) }

// steal is an expression whose attribute names the register that holds the
// link's index.
func steal(name string, attr uint16, link int) any {
	return []any{
		&expr.Immediate{Register: reg1, Data: binaryutil.NativeEndian.PutUint32(uint32(link))},
		rawExpr{name, []netlink.Attribute{{Type: attr, Data: binaryutil.BigEndian.PutUint32(reg1)}}},
	}
}

func be16(v uint16) []byte { return binary.BigEndian.AppendUint16(nil, v) }
