package handoff

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// linkState is how an adopted link was before us. It is kept as the link's
// alias: there it lives exactly as long as what it is about, and any later run
// finds it.
type linkState struct {
	mac      net.HardwareAddr
	mtu      int
	up       bool
	allmulti bool
	promisc  bool
	gen      int // how the kernel makes itself addresses, genUnknown without IPv6
	alias    string
}

// How the kernel makes an IPv6 address for a link (addr_gen_mode).
const (
	genUnknown = -1
	genNone    = 1 // IN6_ADDR_GEN_MODE_NONE
)

// statePrefix begins an alias of ours.
const statePrefix = "sidewire: was"

// maxAlias is what the kernel takes (IFALIASZ and its NUL).
const maxAlias = 255

func stateOf(l netlink.Link) linkState {
	a := l.Attrs()
	return linkState{
		mac: a.HardwareAddr, mtu: a.MTU, up: a.RawFlags&unix.IFF_UP != 0,
		allmulti: a.RawFlags&unix.IFF_ALLMULTI != 0, promisc: a.RawFlags&unix.IFF_PROMISC != 0,
		gen: genMode(a.Name), alias: a.Alias,
	}
}

// genMode reads it, for a link of the current namespace.
func genMode(link string) int {
	b, err := os.ReadFile("/proc/sys/net/ipv6/conf/" + link + "/addr_gen_mode")
	if err != nil {
		return genUnknown
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		return genUnknown
	}
	return n
}

// String is the alias that says all this. An alias that it has no room for any
// more is cut.
func (s linkState) String() string {
	t := fmt.Sprintf("%s mac=%s mtu=%d up=%t allmulti=%t promisc=%t gen=%d alias=%s", statePrefix, s.mac, s.mtu, s.up, s.allmulti, s.promisc, s.gen, s.alias)
	return t[:min(len(t), maxAlias)]
}

// parseState reads an alias; ok if it is one of ours.
func parseState(alias string) (s linkState, ok bool) {
	rest, ok := strings.CutPrefix(alias, statePrefix)
	if !ok {
		return s, false
	}
	fields, own, ok := strings.Cut(rest, " alias=")
	if !ok {
		return s, false
	}
	var mac string
	if _, err := fmt.Sscanf(fields, " mac=%s mtu=%d up=%t allmulti=%t promisc=%t gen=%d", &mac, &s.mtu, &s.up, &s.allmulti, &s.promisc, &s.gen); err != nil {
		return s, false
	}
	hw, err := net.ParseMAC(mac)
	s.mac, s.alias = hw, own
	return s, err == nil
}

// restore puts a link back. It goes down first where it was down, so that it
// says nothing meanwhile.
func (s *linkState) restore(l netlink.Link) error {
	if !s.up {
		if err := netlink.LinkSetDown(l); errors.Is(err, unix.ENODEV) {
			return nil // it was taken away, and there is nothing to put back
		}
	}
	var errs []error
	try := func(err error) {
		if err != nil && !errors.Is(err, unix.ENODEV) {
			errs = append(errs, err)
		}
	}
	try(netlink.LinkSetHardwareAddr(l, s.mac))
	try(netlink.LinkSetMTU(l, s.mtu))
	if !s.allmulti {
		try(netlink.LinkSetAllmulticastOff(l))
	}
	if !s.promisc {
		try(netlink.SetPromiscOff(l))
	}
	if s.gen != genUnknown {
		try(netlink.LinkSetIP6AddrGenMode(l, s.gen))
	}
	try(netlink.LinkSetAlias(l, s.alias))
	return errors.Join(errs...)
}
