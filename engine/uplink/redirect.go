package uplink

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"sidewire/engine/frame"
)

// Theory of operation.
//
// Goal: TCP connections and datagrams that arrive by the pod's link for its
// address come to two sockets of ours, whatever their port, with addresses and
// ports as they were; no frame leaves the kernel's stack. Not for us: what the
// pod's processes have begun, what arrives by the loopback (127.0.0.1, and the
// pod's address from inside the pod), ICMP, other protocols.
//
// One nftables chain gives a packet that has no socket yet to one of ours
// (tproxy). Nothing is rewritten, so there is no connection tracking: whose a
// packet is tells the kernel's own table of sockets, in this order.
//
//  1. A socket that is marked as ours (IP_TRANSPARENT) has it: an accepted
//     connection, or a listener for a port that was asked for by name.
//  2. TCP: tproxy looks for the connection itself and leaves those of the pod's
//     processes alone; the rest are ours, also where a process of the pod listens.
//  3. UDP: who has the port, has it. A socket of the pod's may have sent and wait
//     for its answer, which nobody can tell from one that serves clients.
//  4. Other datagrams are ours.
//
// The table belongs to a netlink socket of this process: the kernel takes it away
// when that is closed, also by a crash, and lets no other process change it.

// RedirectConfig says what is led where.
type RedirectConfig struct {
	Link string // by which it arrives, such as eth0
	// Pod is the address that it arrives for; the zero value is the link's first.
	Pod netip.Addr
	// TCP and UDP are ports of 127.0.0.1 that sockets with IP_TRANSPARENT have.
	TCP, UDP uint16
	// Ports are those that are led there; none is all.
	Ports []Port
}

// Redirect leads what arrives for a pod to sockets of ours, until it is closed.
// Its methods are safe for concurrent use.
type Redirect struct {
	conn *netlink.Conn
}

// tableOwner is NFT_TABLE_F_OWNER: the table ends with its socket.
const tableOwner = 2

// priorityMangle is where tproxy belongs: before addresses are rewritten.
const priorityMangle = ^uint32(150) + 1

func redirectTable(link string) string { return "sidewire-sockets-" + link }

// OpenRedirect changes the current network namespace. It needs CAP_NET_ADMIN. It
// returns ErrInUse if another sidewire has the link's.
func OpenRedirect(c RedirectConfig) (r *Redirect, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("redirect what arrives by %s: %w", c.Link, err)
		}
	}()
	l, err := link(c.Link)
	if err != nil {
		return nil, err
	}
	if !c.Pod.IsValid() {
		if c.Pod, err = firstAddr(l, unix.AF_INET); err != nil {
			return nil, err
		}
		if !c.Pod.IsValid() {
			return nil, fmt.Errorf("link %s has no IPv4 address", c.Link)
		}
	}
	if err := checkPorts(c.Ports); err != nil {
		return nil, err
	}
	if err := freeOfRedirect(c.Link); err != nil {
		return nil, err
	}
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return nil, fmt.Errorf("nftables: %w", err)
	}
	if err := c.rules().commitBy(conn); err != nil {
		_ = conn.Close()
		return nil, redirectError(err)
	}
	return &Redirect{conn: conn}, nil
}

// Close puts back what OpenRedirect changed. Connections that came stay.
func (r *Redirect) Close() error {
	if err := r.conn.Close(); err != nil {
		return fmt.Errorf("redirect: %w", err)
	}
	return nil
}

// freeOfRedirect says whether nobody has the link's table.
func freeOfRedirect(link string) error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("nftables: %w", err)
	}
	tables, err := c.ListTablesOfFamily(nftables.TableFamilyIPv4)
	if err != nil {
		return redirectError(err)
	}
	if slices.ContainsFunc(tables, func(t *nftables.Table) bool { return t.Name == redirectTable(link) }) {
		return ErrInUse
	}
	return nil
}

// redirectError says what a refused transaction may want.
func redirectError(err error) error {
	switch {
	case errors.Is(err, unix.EPERM):
		return privilege(err, "CAP_NET_ADMIN")
	case errors.Is(err, unix.EEXIST):
		return ErrInUse
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EPROTONOSUPPORT), errors.Is(err, unix.ENOENT), errors.Is(err, unix.EINVAL):
		return fmt.Errorf("%w: nftables with tables that have an owner, socket and tproxy "+
			"(Linux 5.12, modules nf_tables nft_socket nft_tproxy): %w", ErrKernel, err)
	}
	return fmt.Errorf("nftables: %w", err)
}

// rules are the table, its chain and what is in it.
func (c *RedirectConfig) rules() *rules {
	const chain = "arriving"
	r := &rules{family: nftables.TableFamilyIPv4, table: redirectTable(c.Link)}
	r.message(unix.NFT_MSG_NEWTABLE, netlink.Create|netlink.Excl,
		netlink.Attribute{Type: unix.NFTA_TABLE_NAME, Data: cstring(r.table)},
		netlink.Attribute{Type: unix.NFTA_TABLE_FLAGS, Data: be32(tableOwner)})
	hook, err := netlink.MarshalAttributes([]netlink.Attribute{
		{Type: unix.NFTA_HOOK_HOOKNUM, Data: be32(unix.NF_INET_PRE_ROUTING)},
		{Type: unix.NFTA_HOOK_PRIORITY, Data: be32(priorityMangle)},
	})
	r.err = errors.Join(r.err, err)
	r.message(unix.NFT_MSG_NEWCHAIN, netlink.Create,
		netlink.Attribute{Type: unix.NFTA_CHAIN_TABLE, Data: cstring(r.table)},
		netlink.Attribute{Type: unix.NFTA_CHAIN_NAME, Data: cstring(chain)},
		netlink.Attribute{Type: unix.NLA_F_NESTED | unix.NFTA_CHAIN_HOOK, Data: hook},
		netlink.Attribute{Type: unix.NFTA_CHAIN_TYPE, Data: cstring("filter")})

	name := make([]byte, unix.IFNAMSIZ)
	copy(name, c.Link)
	r.add(chain, &expr.Meta{Key: expr.MetaKeyIIFNAME, Register: reg1}, isNot(name...), accept())
	r.add(chain, ipField(offDst, 4, reg1), isNot(c.Pod.AsSlice()...), accept())
	socket := &expr.Socket{Key: expr.SocketKeyTransparent, Register: reg1} // does not match where there is no socket
	r.add(chain, socket, is(1), accept())
	c.lead(r, chain, frame.ProtoTCP, tproxy(c.TCP))
	r.add(chain, l4Protocol(frame.ProtoUDP), socket, accept())
	c.lead(r, chain, frame.ProtoUDP, tproxy(c.UDP))
	return r
}

// lead gives the ports of a protocol to a socket.
func (c *RedirectConfig) lead(r *rules, chain string, proto uint8, to any) {
	if len(c.Ports) == 0 {
		r.add(chain, l4Protocol(proto), to, accept())
	}
	for _, p := range portListOf(c.Ports) {
		if p.Proto == proto {
			dst := []any{thField(2, 2, reg1), cmp(expr.CmpOpGte, be16(p.Port)...), cmp(expr.CmpOpLte, be16(p.last())...)}
			r.add(chain, l4Protocol(proto), dst, to, accept())
		}
	}
}

// l4Protocol matches the protocol in such a way that what needs one may follow.
func l4Protocol(proto byte) any {
	return []any{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg1}, is(proto)}
}

// tproxy gives the packet to the socket at a port of 127.0.0.1. It does not
// match where there is none.
func tproxy(port uint16) any {
	return []any{
		&expr.Immediate{Register: reg1, Data: loopback}, &expr.Immediate{Register: reg2, Data: be16(port)},
		&expr.TProxy{Family: unix.NFPROTO_IPV4, TableFamily: unix.NFPROTO_IPV4, RegAddr: reg1, RegPort: reg2},
	}
}

func be32(v uint32) []byte { return binary.BigEndian.AppendUint32(nil, v) }
