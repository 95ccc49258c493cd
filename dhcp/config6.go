package dhcp

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv6"
	"github.com/insomniacslk/dhcp/iana"

	"sidewire/engine/frame"
)

// minMTU6 is the smallest MTU of a link with IPv6 (RFC 8200, section 5).
const minMTU6 = 1280

// Config6 is what a [Server6] tells its guest. The server keeps it: its slices
// must not be changed afterwards.
type Config6 struct {
	Port frame.PortID // the guest's port, where answers go
	MACs []frame.MAC  // client hardware addresses that are served, empty for any

	Address netip.Prefix // the guest's IPv6 address and the length of its network, which is on its link
	Gateway netip.Addr   // an address of the router's in that network

	ServerMAC frame.MAC // the router's, DefaultServerMAC if zero

	DNS    []netip.Addr // IPv6 only: of others the guest is told by DHCPv4
	Search []string     // a domain that cannot be sent is left out

	MTU int // of the link in bytes, at least 1280

	LeaseTime time.Duration // DefaultLeaseTime if 0

	BootURL string // option 59 (RFC 5970), left out if empty

	// OnLease, if not nil, is told who has the address with every lease. It is
	// called from Process and must not wait, nor call the server.
	OnLease func(mac frame.MAC)

	// Now is the wall clock, time.Now if nil. It is read once per message.
	Now func() time.Time
}

// linkLocalOf is the address that a station makes of its hardware address (RFC
// 4291, appendix A).
func linkLocalOf(m frame.MAC) netip.Addr {
	return netip.AddrFrom16([16]byte{0xfe, 0x80, 8: m[0] ^ 2, 9: m[1], 10: m[2], 11: 0xff, 12: 0xfe, 13: m[3], 14: m[4], 15: m[5]})
}

// offer6 is a Config6 made ready to be sent. It never changes.
type offer6 struct {
	Config6
	router  netip.Addr   // its link-local address, the source of what it says
	advert  []byte       // the router advertisement: ICMPv6, checksum undone
	gone    []netip.Addr // resolvers of before, which are advertised as no more
	duid    dhcpv6.DUID
	options []dhcpv6.Option // of every DHCPv6 answer
}

// newOffer6 makes c ready; old, unless it is nil, is what it is in the place of.
func newOffer6(c Config6, old *offer6) (*offer6, error) {
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.LeaseTime == 0 {
		c.LeaseTime = DefaultLeaseTime
	}
	if c.ServerMAC == (frame.MAC{}) {
		c.ServerMAC = DefaultServerMAC
	}
	if err := c.check(); err != nil {
		return nil, err
	}
	o := &offer6{Config6: c, router: linkLocalOf(c.ServerMAC)}
	if old != nil {
		for _, a := range slices.Concat(old.DNS, old.gone) {
			if len(o.gone) < maxGone && !slices.Contains(o.DNS, a) && !slices.Contains(o.gone, a) {
				o.gone = append(o.gone, a)
			}
		}
	}
	search := validDomains(c.Search)
	o.advert = o.routerAdvertisement(search)
	o.duid = &dhcpv6.DUIDLL{HWType: iana.HWTypeEthernet, LinkLayerAddr: net.HardwareAddr(c.ServerMAC[:])}
	if len(c.DNS) > 0 {
		var servers []net.IP
		for _, a := range c.DNS {
			servers = append(servers, net.IP(a.AsSlice()))
		}
		o.options = append(o.options, dhcpv6.OptDNS(servers...))
	}
	if len(search) > 0 {
		o.options = append(o.options, &dhcpv6.OptionGeneric{OptionCode: dhcpv6.OptionDomainSearchList, OptionData: encodeNames(search, nil)})
	}
	if c.BootURL != "" {
		o.options = append(o.options, dhcpv6.OptBootFileURL(c.BootURL))
	}
	return o, nil
}

// check refuses what could not be sent.
func (c *Config6) check() error {
	a, g := c.Address.Addr(), c.Gateway
	switch {
	case !c.Address.IsValid() || !a.Is6() || a.Is4In6() || a.IsMulticast() || a.IsUnspecified() || a.IsLinkLocalUnicast():
		return fmt.Errorf("dhcp: guest address %v: not a global IPv6 address with a prefix length", c.Address)
	case !g.Is6() || !c.Address.Contains(g) || g == a:
		return fmt.Errorf("dhcp: gateway %v: not another address of %v", g, c.Address.Masked())
	case c.MTU < minMTU6 || c.MTU > 65535:
		return fmt.Errorf("dhcp: MTU %d: not in %d to 65535", c.MTU, minMTU6)
	case c.LeaseTime < 0 || c.LeaseTime/time.Second > 0xfffffffe:
		return fmt.Errorf("dhcp: lease time %v: not in 0 to 2^32-2 seconds", c.LeaseTime)
	case len(c.BootURL) > 1024 || strings.ContainsFunc(c.BootURL, func(r rune) bool { return r < ' ' }):
		return fmt.Errorf("dhcp: boot URL of %d bytes: at most 1024, without control characters", len(c.BootURL))
	}
	for _, d := range c.DNS {
		if !d.Is6() || d.Is4In6() || d.IsUnspecified() || d.IsMulticast() {
			return fmt.Errorf("dhcp: DNS server %v: not an IPv6 address", d)
		}
	}
	return nil
}

// Options of neighbour discovery (RFC 4861, section 4.6, and RFC 8106).
const (
	ndSourceLink = 1
	ndTargetLink = 2
	ndPrefix     = 3
	ndMTU        = 5
	ndRoute      = 24 // RFC 4191, section 2.3
	ndRDNSS      = 25
	ndDNSSL      = 31

	forever = 0xffffffff
)

const (
	// routerLifetime is the longest that RFC 8319, section 4, lets a router
	// announce; advertEvery is after how long it is announced again. A guest that
	// says nothing for that long keeps its route by the route option, if it knows
	// that (Linux does): nobody wakes up to tell it again.
	routerLifetime = 65535 * time.Second
	advertEvery    = int64(routerLifetime / 4)
)

// maxGone bounds the resolvers that are advertised as no more.
const maxGone = 8

// maxAdvert bounds the options of an advertisement: what does not fit is left to
// DHCPv6.
const maxAdvert = 1024

// routerAdvertisement is the ICMPv6 message: addresses by DHCPv6, the guest's
// network on the link, the way to everything else, resolvers and domains.
func (o *offer6) routerAdvertisement(search []string) []byte {
	be := binary.BigEndian
	const managed, other = 0x80, 0x40
	b := []byte{icmpRouterAdvert, 0, 0, 0, 64, managed | other}
	b = be.AppendUint16(b, uint16(routerLifetime/time.Second))
	b = append(b, make([]byte, 8)...) // reachable time, retransmission timer: not said
	b = append(append(b, ndSourceLink, 1), o.ServerMAC[:]...)
	b = be.AppendUint32(append(b, ndMTU, 1, 0, 0), uint32(o.MTU))

	b = be.AppendUint32(append(b, ndRoute, 1, 0, 0), forever) // ::/0

	const onLink = 0x80
	prefix := o.Address.Masked()
	b = append(b, ndPrefix, 4, uint8(prefix.Bits()), onLink)
	b = be.AppendUint32(be.AppendUint32(b, forever), forever)
	b = append(b, 0, 0, 0, 0)
	b = append(b, prefix.Addr().AsSlice()...)

	resolvers := func(as []netip.Addr, lifetime uint32) {
		if len(as) == 0 {
			return
		}
		b = be.AppendUint32(append(b, ndRDNSS, uint8(1+2*len(as)), 0, 0), lifetime)
		for _, a := range as {
			b = append(b, a.AsSlice()...)
		}
	}
	resolvers(o.DNS[:min(len(o.DNS), 16)], forever)
	resolvers(o.gone, 0)
	for n := len(search); n > 0; n-- {
		names := encodeNames(search[:n], nil)
		names = append(names, make([]byte, -len(names)&7)...)
		if len(b)+8+len(names) <= maxAdvert {
			b = be.AppendUint32(append(b, ndDNSSL, uint8(1+len(names)/8), 0, 0), forever)
			b = append(b, names...)
			break
		}
	}
	return b
}
