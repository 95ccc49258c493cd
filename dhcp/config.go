package dhcp

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"sidewire/engine/frame"
)

// DefaultLeaseTime is KubeVirt's: 999 days.
const DefaultLeaseTime = 86313600 * time.Second

// DefaultServerMAC is the gateway's hardware address, the same everywhere so
// that a guest's neighbour entry survives a migration.
var DefaultServerMAC = frame.MAC{0x02}

var broadcast4 = [4]byte{255, 255, 255, 255}

// Config is what a [Server] leases to its guest. The server keeps it: its
// slices must not be changed afterwards.
type Config struct {
	Port frame.PortID // the guest's port, where answers go
	MACs []frame.MAC  // client hardware addresses that are served, empty for any

	Address netip.Prefix // the guest's IPv4 address and the length of its network
	Router  netip.Addr   // option 3, left out if not valid

	ServerIP  netip.Addr // option 54 and the source of answers
	ServerMAC frame.MAC  // DefaultServerMAC if zero

	DNS      []netip.Addr // option 6, IPv4 only
	Search   []string     // options 119 and 15; a domain that cannot be sent is left out and counted
	Hostname string       // option 12

	MTU int // option 26 in bytes, left out if 0

	LeaseTime  time.Duration // option 51, DefaultLeaseTime if 0
	RenewTime  time.Duration // option 58, left out if 0
	RebindTime time.Duration // option 59, left out if 0
	NTPServers []netip.Addr  // option 42
	Routes     []Route       // option 121, in this order
	V6OnlyWait time.Duration // option 108 (RFC 8925), sent if asked for and not 0
	CaptiveURI string        // option 114 (RFC 8910), the API's URI

	TFTPServerName string     // option 66, and siaddr if it is an IPv4 address
	BootFileName   string     // option 67, and the file field if it fits there
	NextServer     netip.Addr // siaddr where TFTPServerName is a name

	Private []PrivateOption // options 224 to 254

	// KubeVirtCompat makes the server decide as KubeVirt's does: every DISCOVER
	// gets an OFFER and every REQUEST an ACK whatever it asks for, all other
	// messages get silence, nothing of the request but its header is echoed.
	KubeVirtCompat bool
	// Alone drops what the guest asks of other servers, as frame.Policy: it is
	// for a network on which there may be one.
	Alone bool

	// OnLease, if not nil, is told who has the address with every lease: what
	// comes for the guest from outside need not wait until it speaks of itself.
	// It is called from Process and must not wait, nor call the server.
	OnLease func(mac frame.MAC)

	// Now is the wall clock, time.Now if nil. It is read once per message.
	Now func() time.Time
}

// Route is a classless static route (RFC 3442). Via is 0.0.0.0 for a
// destination on the link.
type Route struct {
	Dest netip.Prefix
	Via  netip.Addr
}

// PrivateOption is an option for private use (RFC 3942), sent as it is.
type PrivateOption struct {
	Code  uint8
	Value string
}

// Codes of the options that the server reads or writes (RFC 2132 unless the
// configuration names another).
const (
	optPad         = 0
	optMask        = 1
	optRouter      = 3
	optDNS         = 6
	optHostname    = 12
	optDomain      = 15
	optMTU         = 26
	optNTP         = 42
	optRequestedIP = 50
	optLeaseTime   = 51
	optOverload    = 52
	optType        = 53
	optServerID    = 54
	optParameters  = 55
	optMessage     = 56
	optMaxSize     = 57
	optRenew       = 58
	optRebind      = 59
	optClientID    = 61
	optTFTPName    = 66
	optBootFile    = 67
	optRapidCommit = 80
	optRelay       = 82
	optV6Only      = 108
	optCaptive     = 114
	optSearch      = 119
	optRoutes      = 121
	optEnd         = 255

	firstPrivate, lastPrivate = 224, 254
)

// minMTU is the smallest value that option 26 may have.
const minMTU = 68

// offer is a Config made ready to be sent. It never changes.
type offer struct {
	Config
	addr     [4]byte // yiaddr
	server   [4]byte
	next     [4]byte  // siaddr
	directed [4]byte  // broadcast address of the guest's network
	times    []option // lease times: only where an address is leased
	options  []option // the other options, ascending by code
	file     string

	badDomains int
}

func newOffer(c Config) (*offer, error) {
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
	o := &offer{Config: c, addr: as4(c.Address.Addr()), server: as4(c.ServerIP), next: as4(c.NextServer)}
	if a, err := netip.ParseAddr(c.TFTPServerName); err == nil && a.Is4() && !c.NextServer.IsValid() {
		o.next = a.As4()
	}
	if len(c.BootFileName) < fileLen {
		o.file = c.BootFileName // the field ends with a zero
	}
	o.directed = broadcast4
	if bits := c.Address.Bits(); bits < 31 { // the others have none (RFC 3021)
		binary.BigEndian.PutUint32(o.directed[:], binary.BigEndian.Uint32(o.addr[:])|^uint32(0)>>bits)
	}
	o.build()
	return o, nil
}

// check refuses what could not be sent or would lock the guest out.
func (c *Config) check() error {
	if !c.Address.IsValid() || !c.Address.Addr().Is4() || c.Address.Addr().IsUnspecified() {
		return fmt.Errorf("dhcp: guest address %v: not an IPv4 address with a prefix length", c.Address)
	}
	if !c.ServerIP.Is4() || c.ServerIP.IsUnspecified() {
		return fmt.Errorf("dhcp: server address %v: not an IPv4 address", c.ServerIP)
	}
	for name, as := range map[string][]netip.Addr{
		"router": {c.Router}, "next server": {c.NextServer}, "DNS server": c.DNS, "NTP server": c.NTPServers,
	} {
		for _, a := range as {
			if a.IsValid() && !a.Is4() {
				return fmt.Errorf("dhcp: %s %v: not an IPv4 address", name, a)
			}
		}
	}
	for _, r := range c.Routes {
		if !r.Dest.IsValid() || !r.Dest.Addr().Is4() || !r.Via.Is4() {
			return fmt.Errorf("dhcp: route %v via %v: not IPv4", r.Dest, r.Via)
		}
	}
	if c.MTU != 0 && (c.MTU < minMTU || c.MTU > 65535) {
		return fmt.Errorf("dhcp: MTU %d: not in %d to 65535", c.MTU, minMTU)
	}
	seen := map[uint8]bool{}
	for _, p := range c.Private {
		if p.Code < firstPrivate || p.Code > lastPrivate {
			return fmt.Errorf("dhcp: private option %d: not in %d to %d", p.Code, firstPrivate, lastPrivate)
		}
		if seen[p.Code] {
			return fmt.Errorf("dhcp: private option %d: given twice", p.Code)
		}
		seen[p.Code] = true
	}
	for name, d := range map[string]time.Duration{
		"lease": c.LeaseTime, "renewal": c.RenewTime, "rebinding": c.RebindTime, "IPv6-only": c.V6OnlyWait,
	} {
		if d < 0 || d/time.Second > 0xffffffff {
			return fmt.Errorf("dhcp: %s time %v: not in 0 to 2^32-1 seconds", name, d)
		}
	}
	return nil
}

// build encodes the options that do not depend on the request.
func (o *offer) build() {
	o.times = append(o.times, option{code: optLeaseTime, data: seconds(o.LeaseTime), must: true})
	if o.RenewTime > 0 {
		o.times = append(o.times, option{code: optRenew, data: seconds(o.RenewTime)})
	}
	if o.RebindTime > 0 {
		o.times = append(o.times, option{code: optRebind, data: seconds(o.RebindTime)})
	}
	add := func(code uint8, data []byte) {
		if len(data) > 0 {
			o.options = append(o.options, option{code: code, data: data})
		}
	}
	mask := ^uint32(0) << (32 - o.Address.Bits())
	add(optMask, binary.BigEndian.AppendUint32(nil, mask))
	add(optRouter, addrs(o.Router))
	add(optDNS, addrs(o.DNS...))
	add(optHostname, []byte(o.Hostname))
	search := validDomains(o.Search)
	o.badDomains = len(o.Search) - len(search)
	add(optDomain, []byte(longest(search)))
	if o.MTU > 0 {
		add(optMTU, binary.BigEndian.AppendUint16(nil, uint16(o.MTU)))
	}
	add(optNTP, addrs(o.NTPServers...))
	add(optTFTPName, []byte(o.TFTPServerName))
	add(optBootFile, []byte(o.BootFileName))
	if o.V6OnlyWait > 0 {
		o.options = append(o.options, option{code: optV6Only, data: seconds(o.V6OnlyWait), asked: true})
	}
	add(optCaptive, []byte(o.CaptiveURI))
	add(optSearch, encodeSearch(search, o.KubeVirtCompat))
	add(optRoutes, encodeRoutes(o.Routes))
	private := slices.Clone(o.Private)
	slices.SortFunc(private, func(a, b PrivateOption) int { return int(a.Code) - int(b.Code) })
	for _, p := range private {
		add(p.Code, []byte(p.Value))
	}
}

func seconds(d time.Duration) []byte {
	return binary.BigEndian.AppendUint32(nil, uint32(d/time.Second))
}

func addrs(as ...netip.Addr) []byte {
	var b []byte
	for _, a := range as {
		if a.IsValid() {
			b = append(b, a.AsSlice()...)
		}
	}
	return b
}

// encodeRoutes writes each route as prefix length, the significant octets of
// the destination, and the router (RFC 3442).
func encodeRoutes(rs []Route) []byte {
	var b []byte
	for _, r := range rs {
		bits, dst, via := r.Dest.Bits(), r.Dest.Masked().Addr().As4(), r.Via.As4()
		b = append(b, byte(bits))
		b = append(b, dst[:(bits+7)/8]...)
		b = append(b, via[:]...)
	}
	return b
}
