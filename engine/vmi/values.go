package vmi

import (
	"errors"
	"fmt"
	"math"
	"math/big"
	"net"
	"net/netip"
	"strconv"
	"strings"
)

// KubeVirt's defaults.
const (
	defaultCIDR   = "10.0.2.0/24"
	defaultCIDR6  = "fd10:0:2::/120"
	defaultMemory = 512 << 20
)

// gatewayMAC is the in-pod bridge's: static, so that a guest's ARP entry survives a migration.
const gatewayMAC = "02:00:00:00:00:00"

var errQuantity = errors.New("not a quantity; write it like 512Mi, 2Gi or 1500m")

var suffixes = map[string]*big.Rat{
	"n": big.NewRat(1, 1e9), "u": big.NewRat(1, 1e6), "m": big.NewRat(1, 1e3), "": big.NewRat(1, 1),
	"k": big.NewRat(1e3, 1), "M": big.NewRat(1e6, 1), "G": big.NewRat(1e9, 1), "T": big.NewRat(1e12, 1),
	"P": big.NewRat(1e15, 1), "E": big.NewRat(1e18, 1),
	"Ki": big.NewRat(1<<10, 1), "Mi": big.NewRat(1<<20, 1), "Gi": big.NewRat(1<<30, 1),
	"Ti": big.NewRat(1<<40, 1), "Pi": big.NewRat(1<<50, 1), "Ei": big.NewRat(1<<60, 1),
}

// parseQuantity reads a Kubernetes quantity and rounds it up to a whole number, as Quantity.Value does. What does not
// fit an int64 becomes the largest; a negative one is an error, nothing that we read may be.
func parseQuantity(s string) (int64, error) {
	end := 0
	for end < len(s) && (s[end] >= '0' && s[end] <= '9' || s[end] == '.' || end == 0 && s[end] == '+') {
		end++
	}
	num, suffix := s[:end], s[end:]
	if num == "" || len(num) > 40 || strings.Count(num, ".") > 1 || strings.Trim(num, "+.") == "" {
		return 0, errQuantity
	}
	value, ok := new(big.Rat).SetString(num)
	if !ok {
		return 0, errQuantity
	}
	scale, ok := suffixes[suffix]
	if !ok && len(suffix) >= 2 && len(suffix) <= 4 && (suffix[0] == 'e' || suffix[0] == 'E') {
		exp, err := strconv.Atoi(suffix[1:])
		if err != nil || exp < -30 || exp > 30 {
			return 0, errQuantity
		}
		pow := new(big.Int).Exp(big.NewInt(10), big.NewInt(int64(max(exp, -exp))), nil)
		scale, ok = new(big.Rat).SetInt(pow), true
		if exp < 0 {
			scale.Inv(scale)
		}
	}
	if !ok {
		return 0, errQuantity
	}
	value.Mul(value, scale)
	q, r := new(big.Int).QuoRem(value.Num(), value.Denom(), new(big.Int))
	if r.Sign() != 0 {
		q.Add(q, big.NewInt(1))
	}
	if !q.IsInt64() {
		return math.MaxInt64, nil
	}
	return q.Int64(), nil
}

// parseIPv4 reads a dotted quad in which numbers may have leading zeros, which are decimal all the same.
func parseIPv4(s string) (netip.Addr, bool) {
	parts := strings.Split(s, ".")
	if len(parts) != 4 {
		return netip.Addr{}, false
	}
	var a [4]byte
	for i, p := range parts {
		for _, c := range p {
			if c < '0' || c > '9' {
				return netip.Addr{}, false
			}
		}
		n, err := strconv.ParseUint(p, 10, 8)
		if err != nil || len(p) > 16 {
			return netip.Addr{}, false
		}
		a[i] = byte(n)
	}
	return netip.AddrFrom4(a), true
}

// parseNTP reads an address of an NTP server: IPv4, if need be as IPv6 writes it.
func parseNTP(s string) (netip.Addr, bool) {
	if a, ok := parseIPv4(s); ok {
		return a, true
	}
	a, err := netip.ParseAddr(s)
	return a.Unmap(), err == nil && a.Is4In6() && a.Zone() == ""
}

// parseCIDR4 reads a vmNetworkCIDR and masks its host bits off. The error says how to mend it.
func parseCIDR4(s string) (netip.Prefix, error) {
	if s == "" {
		s = defaultCIDR
	}
	addr, bits, _ := strings.Cut(s, "/")
	a, ok := parseIPv4(addr)
	n, err := strconv.ParseUint(bits, 10, 8)
	if !ok || err != nil || n > 32 {
		return netip.Prefix{}, fmt.Errorf("%q is not an IPv4 network; write it like %s", s, defaultCIDR)
	}
	p := netip.PrefixFrom(a, int(n)).Masked()
	if n > 30 {
		return netip.Prefix{}, fmt.Errorf("VM CIDR subnet is too small, at least 2 host addresses are required: %s; use /30 or larger", s)
	}
	for _, bad := range []string{"0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/3"} {
		if b := netip.MustParsePrefix(bad); b.Contains(guestOf(p)) {
			return netip.Prefix{}, fmt.Errorf("%s lies in %s, where no guest can have an address; use a private network like %s", s, bad, defaultCIDR)
		}
	}
	return p, nil
}

// parseCIDR6 is parseCIDR4 for vmIPv6NetworkCIDR.
func parseCIDR6(s string) (netip.Prefix, error) {
	if s == "" {
		s = defaultCIDR6
	}
	p, err := netip.ParsePrefix(s)
	if err != nil || !p.Addr().Is6() || p.Addr().Is4In6() {
		return netip.Prefix{}, fmt.Errorf("%q is not an IPv6 network; write it like %s", s, defaultCIDR6)
	}
	p = p.Masked()
	if p.Bits() > 126 {
		return netip.Prefix{}, fmt.Errorf("VM CIDR subnet is too small, at least 2 host addresses are required: %s; use /126 or larger", s)
	}
	if g := guestOf(p); g.IsMulticast() || g.IsLinkLocalUnicast() || p.Addr().IsUnspecified() {
		return netip.Prefix{}, fmt.Errorf("%s is not a network for guests; use a private network like %s", s, defaultCIDR6)
	}
	return p, nil
}

// gatewayOf and guestOf are a network's first and second address after its base.
func gatewayOf(p netip.Prefix) netip.Addr { return p.Addr().Next() }
func guestOf(p netip.Prefix) netip.Addr   { return p.Addr().Next().Next() }

// parseMAC reads a MAC of six bytes in any spelling; nil if it is none.
func parseMAC(s string) net.HardwareAddr {
	m, err := net.ParseMAC(s)
	if err != nil || len(m) != 6 {
		return nil
	}
	return m
}

// PCIAddress is where a device sits.
type PCIAddress struct {
	Domain   uint16
	Bus      uint8
	Slot     uint8 // 0 to 31
	Function uint8 // 0 to 7
}

// String is the address as KubeVirt writes it.
func (a PCIAddress) String() string {
	return fmt.Sprintf("%04x:%02x:%02x.%d", a.Domain, a.Bus, a.Slot, a.Function)
}

// parsePCI reads dddd:bb:ss.f; the caller has matched pciAddress.
func parsePCI(s string) PCIAddress {
	hex := func(from, to int) uint64 { n, _ := strconv.ParseUint(s[from:to], 16, 16); return n }
	return PCIAddress{uint16(hex(0, 4)), uint8(hex(5, 7)), uint8(hex(8, 10)), uint8(hex(11, 12))}
}

// vcpus is KubeVirt's count: the topology of domain.cpu if it says anything, else the CPU of the limits, else that of the
// requests, rounded up, else 1. Values too large stay too large; ok is false if one does not parse.
func (s *Spec) vcpus() (n int64, ok bool) {
	if c := s.CPU; c.Sockets != 0 || c.Cores != 0 || c.Threads != 0 {
		n = 1
		for _, f := range []int64{c.Sockets, c.Cores, c.Threads} {
			if f < 0 {
				return 1, false
			}
			if f > 1 {
				n = min(n*min(f, 1<<20), 1<<20)
			}
		}
		return n, true
	}
	for _, q := range []string{s.Limits.CPU, s.Requests.CPU} {
		if q != "" {
			v, err := parseQuantity(q)
			return max(v, 1), err == nil
		}
	}
	return 1, true
}

// memory is the guest's memory in bytes and the field that said so ("" for the default), below domain.
func (s *Spec) memory() (n int64, field string, ok bool) {
	for _, m := range []struct{ field, q string }{
		{"memory.guest", s.GuestMemory},
		{"resources.requests.memory", s.Requests.Memory},
		{"resources.limits.memory", s.Limits.Memory},
	} {
		if m.q != "" {
			v, err := parseQuantity(m.q)
			return v, m.field, err == nil
		}
	}
	return defaultMemory, "", true
}
