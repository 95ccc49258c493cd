package dhcp

import (
	"bufio"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
)

// maxResolvConf bounds how much of a resolv.conf is read.
const maxResolvConf = 64 << 10

// fallbackDNS is the server of a pod whose resolv.conf names none.
var fallbackDNS = netip.AddrFrom4([4]byte{8, 8, 8, 8})

// defaultSearch is the domain of a pod whose resolv.conf names none.
const defaultSearch = "cluster.local"

// Resolv is what a resolv.conf says: the name servers of both families, in
// order, those on a link with its zone, and the search domains as they are
// written.
type Resolv struct {
	Servers []netip.Addr
	Search  []string
}

// ResolvConf reads the resolv.conf at path.
func ResolvConf(path string) (Resolv, error) {
	f, err := os.Open(path)
	if err != nil {
		return Resolv{}, fmt.Errorf("dhcp: read resolver configuration: %w", err)
	}
	defer f.Close()
	r, err := ParseResolvConf(f)
	if err != nil {
		return Resolv{}, fmt.Errorf("dhcp: read resolver configuration %s: %w", path, err)
	}
	return r, nil
}

// ParseResolvConf reads the text of a resolv.conf. As in glibc the last of the
// lines "domain" and "search" holds; what it does not know it passes over.
func ParseResolvConf(from io.Reader) (Resolv, error) {
	var r Resolv
	lines := bufio.NewScanner(io.LimitReader(from, maxResolvConf))
	lines.Buffer(nil, maxResolvConf+1)
	for lines.Scan() {
		words := strings.Fields(lines.Text())
		for i, w := range words {
			if w[0] == '#' || w[0] == ';' {
				words = words[:i]
				break
			}
		}
		if len(words) < 2 {
			continue
		}
		switch words[0] {
		case "nameserver":
			if a, ok := parseServer(words[1]); ok && !slices.Contains(r.Servers, a) {
				r.Servers = append(r.Servers, a)
			}
		case "domain":
			r.Search = words[1:2]
		case "search":
			r.Search = words[1:]
		}
	}
	return r, lines.Err()
}

// parseServer reads an address; an IPv4 address may have leading zeros, which
// count as decimal as they do for Kubernetes.
func parseServer(s string) (netip.Addr, bool) {
	if a, err := netip.ParseAddr(s); err == nil {
		if !a.IsLinkLocalUnicast() {
			a = a.WithZone("")
		}
		return a.Unmap(), true
	}
	parts := strings.Split(s, ".")
	if len(parts) != 4 {
		return netip.Addr{}, false
	}
	var b [4]byte
	for i, p := range parts {
		n, err := strconv.ParseUint(p, 10, 8)
		if err != nil {
			return netip.Addr{}, false
		}
		b[i] = byte(n)
	}
	return netip.AddrFrom4(b), true
}

// DNS4 returns the name servers for option 6. A resolver on the host's
// loopback, of either family, is no use to a guest: the gateway, which
// forwards, stands for it, and for all of them if none has an IPv4 address.
// Without any server of either family it is 8.8.8.8.
func (r Resolv) DNS4(gateway netip.Addr) []netip.Addr {
	servers, _ := r.dns4(gateway)
	return servers
}

// Relayed says whether DNS4 has the gateway stand for others.
func (r Resolv) Relayed() bool {
	_, relayed := r.dns4(netip.IPv4Unspecified())
	return relayed
}

func (r Resolv) dns4(gateway netip.Addr) (out []netip.Addr, relayed bool) {
	if len(r.Servers) == 0 {
		return []netip.Addr{fallbackDNS}, false
	}
	for _, a := range r.Servers {
		if a.IsLoopback() || a.IsUnspecified() {
			a, relayed = gateway, true
		}
		if a.Is4() && !slices.Contains(out, a) {
			out = append(out, a)
		}
	}
	if len(out) == 0 {
		return []netip.Addr{gateway}, true
	}
	return out, relayed
}

// SearchDomains returns the search list for a guest whose VMI has that
// subdomain: lower case, cluster.local if there is none, and in front the
// subdomain's own domain, which is the longest one with ".svc." behind it.
func (r Resolv) SearchDomains(subdomain string) []string {
	var out []string
	svc := ""
	for _, d := range r.Search {
		d = strings.ToLower(d)
		out = append(out, d)
		if strings.Contains(d, ".svc.") && len(d) > len(svc) && validDomain(d) {
			svc = d
		}
	}
	if len(out) == 0 {
		out = []string{defaultSearch}
	}
	if subdomain = strings.ToLower(subdomain); subdomain != "" && svc != "" && !strings.HasPrefix(svc, subdomain+".") {
		out = slices.Insert(out, 0, subdomain+"."+svc)
	}
	return out
}
