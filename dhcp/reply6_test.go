package dhcp

import (
	"net"
	"testing"

	"github.com/insomniacslk/dhcp/dhcpv6"
	"github.com/insomniacslk/dhcp/iana"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/frame"
)

var iaid = [4]byte{1, 2, 3, 4}

func message6(kind dhcpv6.MessageType, options ...dhcpv6.Option) *dhcpv6.Message {
	m := &dhcpv6.Message{MessageType: kind, TransactionID: dhcpv6.TransactionID{7, 8, 9}}
	m.AddOption(dhcpv6.OptClientID(clientID))
	for _, o := range options {
		m.AddOption(o)
	}
	return m
}

func solicit(options ...dhcpv6.Option) *dhcpv6.Message {
	return message6(dhcpv6.MessageTypeSolicit, append([]dhcpv6.Option{ia()}, options...)...)
}

// ia is an identity association with these addresses.
func ia(addrs ...string) *dhcpv6.OptIANA {
	o := &dhcpv6.OptIANA{IaId: iaid}
	for _, a := range addrs {
		o.Options.Add(&dhcpv6.OptIAAddress{IPv6Addr: net.ParseIP(a)})
	}
	return o
}

// ask6 sends a message and returns the answer, nil for silence.
func (n *bench6) ask6(m *dhcpv6.Message) *dhcpv6.Message {
	n.t.Helper()
	p := n.answer(wrap6(m, client6Port, server6Port))
	if p == nil {
		return nil
	}
	require.Equal(n.t, guestMAC[:], p[:6])
	require.Equal(n.t, routerLL.AsSlice(), p[src6At:dst6At])
	require.Equal(n.t, guestLL.AsSlice(), p[dst6At:l4At6])
	r, err := dhcpv6.MessageFromBytes(p[l4At6+udpLen:])
	require.NoError(n.t, err)
	assert.Equal(n.t, m.TransactionID, r.TransactionID)
	assert.True(n.t, r.Options.ServerID().Equal(routerID))
	assert.True(n.t, r.Options.ClientID().Equal(clientID))
	return r
}

// given is the address of an answer, whose association must be the one asked
// for.
func given(t *testing.T, r *dhcpv6.Message) string {
	t.Helper()
	require.NotNil(t, r)
	o := r.Options.OneIANA()
	require.NotNil(t, o)
	assert.Equal(t, iaid, o.IaId)
	a := o.Options.OneAddress()
	require.NotNil(t, a)
	assert.Equal(t, DefaultLeaseTime, a.ValidLifetime)
	assert.Equal(t, DefaultLeaseTime, a.PreferredLifetime)
	assert.Less(t, o.T1, o.T2)
	assert.Less(t, o.T2, DefaultLeaseTime)
	return a.IPv6Addr.String()
}

// The whole exchange, with what KubeVirt's server gives and the domains that it
// does not (row 63).
func TestRFC8415Sec183Row61Row63Exchange(t *testing.T) {
	var leased []frame.MAC
	c := masquerade6()
	c.OnLease = func(m frame.MAC) { leased = append(leased, m) }
	n := newBench6(t, c)
	r := n.ask6(solicit())
	assert.Equal(t, dhcpv6.MessageTypeAdvertise, r.MessageType)
	assert.Equal(t, guest6.String(), given(t, r))
	assert.Empty(t, n.s.Leases(), "an offer is no lease")
	r = n.ask6(message6(dhcpv6.MessageTypeRequest, dhcpv6.OptServerID(routerID), ia(guest6.String())))
	assert.Equal(t, dhcpv6.MessageTypeReply, r.MessageType)
	assert.Equal(t, guest6.String(), given(t, r))
	assert.Equal(t, "2001:db8::53", r.Options.DNS()[0].String())
	assert.Equal(t, []string{"default.svc.cluster.local", "cluster.local"}, r.Options.DomainSearchList().Labels)
	require.Len(t, n.s.Leases(), 1)
	assert.Equal(t, guestMAC, n.s.Leases()[0].MAC)
	assert.Equal(t, []frame.MAC{guestMAC}, leased)
	for _, m := range []*dhcpv6.Message{
		message6(dhcpv6.MessageTypeRenew, dhcpv6.OptServerID(routerID), ia(guest6.String())),
		message6(dhcpv6.MessageTypeRebind, ia(guest6.String())),
	} {
		assert.Equal(t, guest6.String(), given(t, n.ask6(m)), "%v", m.MessageType)
	}
	st := n.s.Export()
	other := newBench6(t, c)
	require.NoError(t, other.s.Import(st))
	assert.Equal(t, st, other.s.Export())
	r = n.ask6(message6(dhcpv6.MessageTypeRelease, dhcpv6.OptServerID(routerID), ia(guest6.String())))
	assert.Equal(t, iana.StatusSuccess, r.Options.Status().StatusCode)
	assert.Empty(t, n.s.Leases())
}

func TestRFC8415Sec1831RapidCommit(t *testing.T) {
	n := newBench6(t, masquerade6())
	r := n.ask6(solicit(&dhcpv6.OptionGeneric{OptionCode: dhcpv6.OptionRapidCommit}))
	assert.Equal(t, dhcpv6.MessageTypeReply, r.MessageType)
	assert.NotNil(t, r.GetOneOption(dhcpv6.OptionRapidCommit))
	assert.Equal(t, guest6.String(), given(t, r))
	assert.Len(t, n.s.Leases(), 1)
}

// Messages that section 16 has a server discard.
func TestRFC8415Sec16Discarded(t *testing.T) {
	another := dhcpv6.OptServerID(&dhcpv6.DUIDLL{HWType: iana.HWTypeEthernet, LinkLayerAddr: net.HardwareAddr(otherMAC[:])})
	mine := dhcpv6.OptServerID(routerID)
	for name, m := range map[string]*dhcpv6.Message{
		"solicit to a server":       solicit(mine),
		"request to nobody":         message6(dhcpv6.MessageTypeRequest, ia()),
		"request to another":        message6(dhcpv6.MessageTypeRequest, another, ia()),
		"renew to another":          message6(dhcpv6.MessageTypeRenew, another, ia(guest6.String())),
		"rebind to a server":        message6(dhcpv6.MessageTypeRebind, mine, ia(guest6.String())),
		"confirm to a server":       message6(dhcpv6.MessageTypeConfirm, mine, ia(guest6.String())),
		"confirm without addresses": message6(dhcpv6.MessageTypeConfirm, ia()),
		"release to another":        message6(dhcpv6.MessageTypeRelease, another, ia(guest6.String())),
		"information with IA":       message6(dhcpv6.MessageTypeInformationRequest, ia()),
		"advertise":                 message6(dhcpv6.MessageTypeAdvertise, mine, ia()),
		"reconfigure":               message6(dhcpv6.MessageTypeReconfigure, mine),
	} {
		n := newBench6(t, masquerade6())
		assert.Nil(t, n.ask6(m), name)
		assert.Empty(t, n.s.Leases(), name)
	}
}

func TestRFC8415Sec1833Confirm(t *testing.T) {
	n := newBench6(t, masquerade6())
	r := n.ask6(message6(dhcpv6.MessageTypeConfirm, ia(guest6.String())))
	assert.Equal(t, iana.StatusSuccess, r.Options.Status().StatusCode)
	r = n.ask6(message6(dhcpv6.MessageTypeConfirm, ia("2001:db8::7")))
	assert.Equal(t, iana.StatusNotOnLink, r.Options.Status().StatusCode)
}

// A client that has another address is given the right one, and the other one
// with lifetimes of 0.
func TestRFC8415Sec1834WrongAddressGoes(t *testing.T) {
	n := newBench6(t, masquerade6())
	r := n.ask6(message6(dhcpv6.MessageTypeRebind, ia("fd10:0:2::9")))
	as := r.Options.OneIANA().Options.Addresses()
	require.Len(t, as, 2)
	assert.Equal(t, guest6.String(), as[0].IPv6Addr.String())
	assert.Equal(t, "fd10:0:2::9", as[1].IPv6Addr.String())
	assert.Zero(t, as[1].ValidLifetime)
}

// There is one address: of several associations one gets it, and prefixes are
// nobody's.
func TestRFC8415Sec183OneAddress(t *testing.T) {
	n := newBench6(t, masquerade6())
	second := &dhcpv6.OptIANA{IaId: [4]byte{9}}
	second.Options.Add(&dhcpv6.OptIAAddress{IPv6Addr: net.ParseIP(guest6.String())})
	r := n.ask6(solicit(second, &dhcpv6.OptIAPD{IaId: [4]byte{5}}))
	ias := r.Options.IANA()
	require.Len(t, ias, 2)
	assert.Equal(t, iana.StatusNoAddrsAvail, ias[0].Options.Status().StatusCode)
	assert.Equal(t, guest6.String(), ias[1].Options.OneAddress().IPv6Addr.String(), "who has it already")
	require.Len(t, r.Options.IAPD(), 1)
	assert.Equal(t, iana.StatusNoPrefixAvail, r.Options.IAPD()[0].Options.Status().StatusCode)
	r = n.ask6(message6(dhcpv6.MessageTypeSolicit))
	assert.Empty(t, r.Options.IANA(), "a client that wants no address is told the rest")
	assert.NotEmpty(t, r.Options.DNS())
}

// Only guests with the right hardware address are served where that is given.
func TestMACs6(t *testing.T) {
	c := masquerade6()
	c.MACs = []frame.MAC{otherMAC}
	n := newBench6(t, c)
	in, out := n.process(wrap6(solicit(), client6Port, server6Port))
	assert.Equal(t, frame.Drop, in.Out)
	assert.Zero(t, in.Reason)
	assert.Empty(t, out)
}
