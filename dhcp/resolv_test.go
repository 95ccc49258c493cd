package dhcp

import (
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func addrList(s ...string) (as []netip.Addr) {
	for _, a := range s {
		as = append(as, netip.MustParseAddr(a))
	}
	return as
}

// kubevirt.md, section 1.7, options 6, 15 and 119.
func TestResolvConfRow64_KubeVirt1779(t *testing.T) {
	for _, c := range []struct {
		name, text string
		dns4       []netip.Addr
		search     []string // the gateway, 10.0.2.1, is only among dns4 where it relays
	}{
		{"pod", "search ns.svc.cluster.local svc.cluster.local cluster.local\nnameserver 10.96.0.10\noptions ndots:5\n",
			addrList("10.96.0.10"), []string{"ns.svc.cluster.local", "svc.cluster.local", "cluster.local"}},
		{"empty", "", addrList("8.8.8.8"), []string{"cluster.local"}},
		{"no server", "search a.example\n", addrList("8.8.8.8"), []string{"a.example"}},
		{"IPv6 only", "nameserver fd00::a\nnameserver fd00::b\n", addrList("10.0.2.1"), []string{"cluster.local"}},
		{"IPv6 of the link only", "nameserver fe80::1%eth0\n", addrList("10.0.2.1"), []string{"cluster.local"}},
		{"both", "nameserver fd00::a\nnameserver 1.1.1.1\n", addrList("1.1.1.1"), []string{"cluster.local"}},
		{"leading zeros (1779)", "nameserver 01.1.1.1\nnameserver 8.8.008.8\n", addrList("1.1.1.1", "8.8.8.8"), []string{"cluster.local"}},
		{"systemd-resolved", "nameserver 127.0.0.53\noptions edns0 trust-ad\nsearch .\n", addrList("10.0.2.1"), []string{"."}},
		{"loopback twice", "nameserver 127.0.0.1\nnameserver 127.0.0.53\nnameserver 9.9.9.9\n", addrList("10.0.2.1", "9.9.9.9"), []string{"cluster.local"}},
		{"IPv6 loopback", "nameserver ::1\n", addrList("10.0.2.1"), []string{"cluster.local"}},
		{"zone and mapped", "nameserver fe80::1%eth0\nnameserver ::ffff:9.9.9.9\n", addrList("9.9.9.9"), []string{"cluster.local"}},
		{"the last search holds", "search a\ndomain b.example c\n", addrList("8.8.8.8"), []string{"b.example"}},
		{"comments and junk", "# nameserver 1.2.3.4\n; search x\n\tnameserver\t1.1.1.1 # one\nnameserver\nnameserver 1.2.3\nnameserver 1.2.3.256\nnameserver 1.2.3.-4\nfoo bar\nsearch a.example ; b\n",
			addrList("1.1.1.1"), []string{"a.example"}},
		{"upper case", "search NS.Svc.Cluster.Local\n", addrList("8.8.8.8"), []string{"ns.svc.cluster.local"}},
		{"CRLF", "nameserver 1.1.1.1\r\nsearch a.example\r\n", addrList("1.1.1.1"), []string{"a.example"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r, err := ParseResolvConf(strings.NewReader(c.text))
			require.NoError(t, err)
			assert.Equal(t, c.dns4, r.DNS4(serverIP))
			assert.Equal(t, slices.Contains(c.dns4, serverIP), r.Relayed())
			assert.Equal(t, c.search, r.SearchDomains(""))
		})
	}
}

func TestSubdomainRow64(t *testing.T) {
	pod := []string{"ns.svc.cluster.local", "svc.cluster.local", "cluster.local"}
	for _, c := range []struct {
		subdomain string
		in, want  []string
	}{
		{"", pod, pod},
		{"sub", pod, append([]string{"sub.ns.svc.cluster.local"}, pod...)},
		{"Sub", pod, append([]string{"sub.ns.svc.cluster.local"}, pod...)},
		{"ns", pod, pod},
		{"sub", []string{"a.example"}, []string{"a.example"}},
		{"sub", nil, []string{"cluster.local"}},
		{"sub", []string{"x.svc.y", "longer.svc.y", "-bad.but.longest.svc.y"},
			[]string{"sub.longer.svc.y", "x.svc.y", "longer.svc.y", "-bad.but.longest.svc.y"}},
	} {
		assert.Equal(t, c.want, Resolv{Search: c.in}.SearchDomains(c.subdomain), "%q %v", c.subdomain, c.in)
	}
}

func TestResolvConfFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "resolv.conf")
	_, err := ResolvConf(path)
	assert.ErrorIs(t, err, os.ErrNotExist)
	require.NoError(t, os.WriteFile(path, []byte("nameserver 1.1.1.1\n#"+strings.Repeat("x", 1<<20)), 0o600))
	r, err := ResolvConf(path)
	require.NoError(t, err)
	assert.Equal(t, addrList("1.1.1.1"), r.Servers)
}

// A zone means something on a link only.
func TestServersOfALink(t *testing.T) {
	r, err := ParseResolvConf(strings.NewReader("nameserver fe80::1%eth0\nnameserver fe80::1%net1\nnameserver fd00::1%eth0\nnameserver fd00::1\n"))
	require.NoError(t, err)
	assert.Equal(t, addrList("fe80::1%eth0", "fe80::1%net1", "fd00::1"), r.Servers)
}

// Whatever the file holds, the server can be made from it.
func FuzzResolvConf(f *testing.F) {
	f.Add("search a.svc.b\nnameserver 127.0.0.1\n", "sub")
	f.Add("nameserver 1.1.1.1%x\nsearch . .. - \xff", "-")
	f.Fuzz(func(t *testing.T, text, subdomain string) {
		r, err := ParseResolvConf(strings.NewReader(text))
		if err != nil {
			return
		}
		c := masquerade()
		c.DNS, c.Search = r.DNS4(serverIP), r.SearchDomains(subdomain)
		_, err = New(c)
		require.NoError(t, err)
	})
}
