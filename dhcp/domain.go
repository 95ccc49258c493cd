package dhcp

import (
	"regexp"
	"strings"
)

// domainName is what may stand in a search list: labels of letters, digits,
// hyphens and underscores that neither start nor end with a hyphen.
var domainName = regexp.MustCompile(`^[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?)*$`)

// maxDomain is the longest name that DNS can carry, in text.
const maxDomain = 253

func validDomain(d string) bool { return len(d) <= maxDomain && domainName.MatchString(d) }

// validDomains returns the domains that can be sent, in lower case and without
// the final dot.
func validDomains(ds []string) []string {
	var out []string
	for _, d := range ds {
		if d = strings.TrimSuffix(strings.ToLower(d), "."); validDomain(d) {
			out = append(out, d)
		}
	}
	return out
}

// longest returns the longest domain, the first one of several: it says most
// exactly where the guest is.
func longest(ds []string) string {
	l := ""
	for _, d := range ds {
		if len(d) > len(l) {
			l = d
		}
	}
	return l
}

// encodeSearch encodes a search list (RFC 3397): uncompressed where that fits
// into one option or is asked for, since some clients read no more, otherwise
// compressed. A compressed name ends in one pointer, to a name that has none.
func encodeSearch(ds []string, plain bool) []byte {
	b := encodeNames(ds, nil)
	if plain || len(b) <= 255 {
		return b
	}
	return encodeNames(ds, map[string]int{})
}

// maxPointer is the last offset that a compression pointer can name.
const maxPointer = 0x3fff

// encodeNames writes names as DNS does (RFC 1035, 3.1). Where seen is not nil,
// it holds the offsets of what was written in full, for 4.1.4.
func encodeNames(ds []string, seen map[string]int) []byte {
	var b []byte
	for _, d := range ds {
		written := map[string]int{}
		rest := d
		for rest != "" {
			if at, ok := seen[rest]; ok {
				b = append(b, 0xc0|byte(at>>8), byte(at))
				break
			}
			if len(b) <= maxPointer {
				written[rest] = len(b)
			}
			var label string
			label, rest, _ = strings.Cut(rest, ".")
			b = append(b, byte(len(label)))
			b = append(b, label...)
		}
		if rest != "" {
			continue
		}
		b = append(b, 0)
		for name, at := range written {
			if seen != nil {
				seen[name] = at
			}
		}
	}
	return b
}
