package dhcp

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/rfc1035label"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/frame"
)

// full is a configuration with every option that KubeVirt sends.
func full() Config {
	c := masquerade()
	c.DNS = []netip.Addr{netip.MustParseAddr("10.96.0.10"), netip.MustParseAddr("1.1.1.1")}
	c.Search = []string{"default.svc.cluster.local", "svc.cluster.local", "cluster.local"}
	c.NTPServers = []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("127.0.0.3")}
	c.TFTPServerName, c.BootFileName = "tftp.example.com", "pxelinux.0"
	c.Private = []PrivateOption{{240, "private.options.kubevirt.io"}, {224, "a"}}
	c.Routes = []Route{{netip.MustParsePrefix("10.1.0.0/16"), netip.MustParseAddr("10.0.2.1")}}
	return c
}

// kubevirt.md, section 1.7: the bytes of every option.
func TestKubeVirt17OptionsRow30Row31Row32Row35Row64Row65(t *testing.T) {
	want := map[uint8]string{
		optMask:      "ffffff00",
		optRouter:    "0a000201",
		optDNS:       "0a60000a" + "01010101",
		optHostname:  hex.EncodeToString([]byte("vm")),
		optDomain:    hex.EncodeToString([]byte("default.svc.cluster.local")),
		optMTU:       "05aa",
		optNTP:       "7f000001" + "7f000003",
		optLeaseTime: "05250a80",
		optServerID:  "0a000201",
		optTFTPName:  hex.EncodeToString([]byte("tftp.example.com")),
		optBootFile:  hex.EncodeToString([]byte("pxelinux.0")),
		optSearch: "0764656661756c74" + "03737663" + "07636c7573746572" + "056c6f63616c" + "00" +
			"03737663" + "07636c7573746572" + "056c6f63616c" + "00" + "07636c7573746572" + "056c6f63616c" + "00",
		optRoutes: "100a010a000201",
		224:       "61",
		240:       hex.EncodeToString([]byte("private.options.kubevirt.io")),
	}
	require.EqualValues(t, 86313600, 0x05250a80)
	for _, compat := range []bool{false, true} {
		for kind, p := range map[dhcpv4.MessageType][]byte{
			dhcpv4.MessageTypeOffer: broadcastFrame(message(t, msgDiscover)),
			dhcpv4.MessageTypeAck:   selecting(t),
		} {
			t.Run(fmt.Sprintf("compat %v %v", compat, kind), func(t *testing.T) {
				c := full()
				c.KubeVirtCompat = compat
				a := newBench(t, c).mustAnswer(p, kind)
				got := map[uint8]string{}
				for code, v := range a.Options {
					got[code] = hex.EncodeToString(v)
				}
				delete(got, optType)
				delete(got, optOverload)
				assert.Equal(t, want, got)
				assert.Equal(t, []byte{optType, optServerID, optLeaseTime}, codes(a.raw)[:3])
			})
		}
	}
}

// kubevirt.md, section 1.7: what is copied, what is zero, what is left out.
func TestKubeVirt17Header(t *testing.T) {
	c := masquerade()
	c.Router, c.DNS, c.Search, c.Hostname, c.MTU = netip.Addr{}, nil, nil, "", 0
	c.KubeVirtCompat = true
	m := message(t, msgRequest, dhcpv4.WithRelay(net.IP{10, 0, 2, 8}), dhcpv4.WithClientIP(addr(guestIP)),
		dhcpv4.WithBroadcast(true), dhcpv4.WithRequestedOptions(dhcpv4.OptionNTPServers))
	a := newBench(t, c).mustAnswer(broadcastFrame(m), dhcpv4.MessageTypeAck)
	assert.Equal(t, dhcpv4.OpcodeBootReply, a.OpCode)
	assert.Equal(t, m.TransactionID, a.TransactionID)
	assert.Equal(t, m.Flags, a.Flags)
	assert.Equal(t, net.IP{10, 0, 2, 8}, a.GatewayIPAddr.To4())
	assert.Equal(t, net.HardwareAddr(guestMAC[:]), a.ClientHWAddr)
	assert.True(t, a.ClientIPAddr.IsUnspecified())
	assert.True(t, a.ServerIPAddr.IsUnspecified())
	assert.Equal(t, make([]byte, snameLen+fileLen), a.raw[offSname:offCookie])
	assert.Equal(t, []byte{optType, optServerID, optLeaseTime, optMask}, codes(a.raw))
	assert.Len(t, a.raw, 300)
	assert.Equal(t, make([]byte, 300-offOption-22-1), a.raw[offOption+22:299], "zeros, not what was there before")
}

// kubevirt.md, section 1.2, point 7: the Calico example.
func TestKubeVirt12CalicoRoutesRow41(t *testing.T) {
	c := masquerade()
	c.Address = netip.MustParsePrefix("10.244.1.5/32")
	c.Router = netip.MustParseAddr("169.254.1.1")
	c.ServerIP = netip.MustParseAddr("169.254.75.12")
	c.Routes = []Route{
		{netip.MustParsePrefix("169.254.1.1/32"), netip.MustParseAddr("0.0.0.0")},
		{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParseAddr("169.254.1.1")},
	}
	a := newBench(t, c).mustAnswer(broadcastFrame(message(t, msgDiscover)), dhcpv4.MessageTypeOffer)
	assert.Equal(t, []byte{32, 169, 254, 1, 1, 0, 0, 0, 0, 0, 169, 254, 1, 1}, a.Options[optRoutes])
	assert.Equal(t, []byte{255, 255, 255, 255}, a.Options[optMask])
	assert.Equal(t, []byte{169, 254, 1, 1}, a.Options[optRouter])
	assert.Len(t, a.ClasslessStaticRoute(), 2, "the codec reads them")
}

// Host bits of a destination are no part of the route (RFC 3442).
func TestRouteHostBits(t *testing.T) {
	got := encodeRoutes([]Route{{netip.MustParsePrefix("10.17.255.1/12"), netip.MustParseAddr("10.0.0.1")}})
	assert.Equal(t, []byte{12, 10, 16, 10, 0, 0, 1}, got)
}

// The example of KubeVirt's user guide: options 66 and 67 as given, and in the
// header what iPXE needs to boot.
func TestPXERow29Row30Row31(t *testing.T) {
	c := masquerade()
	c.TFTPServerName, c.BootFileName = "10.0.2.1", "pxelinux.0"
	a := newBench(t, c).mustAnswer(broadcastFrame(message(t, msgDiscover)), dhcpv4.MessageTypeOffer)
	assert.Equal(t, "10.0.2.1", a.TFTPServerName())
	assert.Equal(t, "pxelinux.0", a.BootFileNameOption())
	assert.Equal(t, addr(serverIP), a.ServerIPAddr.To4())
	assert.Equal(t, "pxelinux.0", a.DHCPv4.BootFileName)

	c.TFTPServerName, c.BootFileName = "tftp.example.com", strings.Repeat("x", fileLen)
	a = newBench(t, c).mustAnswer(broadcastFrame(message(t, msgDiscover)), dhcpv4.MessageTypeOffer)
	assert.True(t, a.ServerIPAddr.IsUnspecified(), "a name is no address")
	assert.Empty(t, a.DHCPv4.BootFileName, "does not fit")
	assert.Equal(t, c.BootFileName, a.BootFileNameOption())

	c.NextServer = netip.MustParseAddr("10.9.9.9")
	a = newBench(t, c).mustAnswer(broadcastFrame(message(t, msgDiscover)), dhcpv4.MessageTypeOffer)
	assert.Equal(t, net.IP{10, 9, 9, 9}, a.ServerIPAddr.To4(), "but may be resolved")
}

// RFC 2132, 9.8: the client's order, and the rest behind it; the mask before
// the router (3.3).
func TestParameterOrder(t *testing.T) {
	n := newBench(t, full())
	m := message(t, msgDiscover, opt(optParameters, optDNS, optRouter, 99, optDNS, optMask, optDomain),
		dhcpv4.WithOption(dhcpv4.OptMaxMessageSize(1400)))
	a := n.mustAnswer(broadcastFrame(m), dhcpv4.MessageTypeOffer)
	assert.Equal(t, []byte{optType, optServerID, optLeaseTime, optMask, optDNS, optRouter, optDomain,
		optHostname, optMTU, optNTP, optTFTPName, optBootFile, optSearch, optRoutes, 224, 240}, codes(a.raw))
}

func TestOptionalTimes(t *testing.T) {
	c := masquerade()
	c.LeaseTime, c.RenewTime, c.RebindTime = time.Hour, 30*time.Minute, 50*time.Minute
	c.V6OnlyWait, c.CaptiveURI = 5*time.Minute, "https://example.com/api"
	n := newBench(t, c)
	a := n.mustAnswer(selecting(t), dhcpv4.MessageTypeAck)
	assert.Equal(t, time.Hour, a.IPAddressLeaseTime(0))
	assert.Equal(t, 30*time.Minute, a.IPAddressRenewalTime(0))
	assert.Equal(t, 50*time.Minute, a.IPAddressRebindingTime(0))
	assert.Equal(t, c.CaptiveURI, string(a.Options[optCaptive]))
	assert.NotContains(t, a.Options, uint8(optV6Only), "RFC 8925, 3.3: only where asked for")
	a = n.mustAnswer(selecting(t, opt(optParameters, optV6Only)), dhcpv4.MessageTypeAck)
	assert.Equal(t, []byte{0, 0, 1, 44}, a.Options[optV6Only])
}

// RFC 2131, section 4.1, and RFC 2132, 9.3 and 9.10: an answer is never longer
// than the client takes, and uses sname and file before it leaves options out.
func TestOverload(t *testing.T) {
	big := func(n int, size int) (ps []PrivateOption) {
		for i := range n {
			ps = append(ps, PrivateOption{uint8(firstPrivate + i), strings.Repeat(string(rune('a'+i)), size)})
		}
		return ps
	}
	const unasked = 0
	for _, c := range []struct {
		name     string
		private  []PrivateOption
		maxSize  uint16
		mtu      int
		overload byte
		lost     uint64
		limit    int
	}{
		{"fits", big(2, 50), unasked, 1500, 0, 0, 576},
		{"sname", big(6, 50), unasked, 1500, overloadSname, 0, 576},
		{"sname and file", big(8, 50), unasked, 1500, overloadSname | overloadFile, 0, 576},
		{"too much", big(12, 50), unasked, 1500, overloadSname | overloadFile, 4, 576},
		{"larger datagram", big(12, 50), 1400, 1500, 0, 0, 1400},
		{"not larger than the MTU", big(25, 50), 65535, 1400, overloadSname | overloadFile, 1, 1400},
		{"never below 576", big(6, 50), 10, 1500, overloadSname, 0, 576},
		{"long one first", append(big(3, 50), PrivateOption{250, strings.Repeat("z", 190)}), unasked, 1500, overloadSname | overloadFile, 0, 576},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg := Config{Port: guestPort, Address: netip.PrefixFrom(guestIP, 24), ServerIP: serverIP,
				MTU: c.mtu, Private: c.private, BootFileName: "boot"}
			var mods []dhcpv4.Modifier
			if c.maxSize != unasked {
				mods = append(mods, dhcpv4.WithOption(dhcpv4.OptMaxMessageSize(c.maxSize)))
			}
			n := newBench(t, cfg)
			a := n.mustAnswer(broadcastFrame(message(t, msgDiscover, mods...)), dhcpv4.MessageTypeOffer)
			assert.LessOrEqual(t, int(a.ip.Length), c.limit)
			assert.Equal(t, c.lost, n.s.Stats().Truncated)
			var over byte
			if v := a.Options[optOverload]; v != nil {
				over = v[0]
			}
			assert.Equal(t, c.overload, over)
			got := 0
			for _, p := range c.private {
				if v, ok := a.Options[p.Code]; ok {
					assert.Equal(t, p.Value, string(v))
					got++
				}
			}
			assert.EqualValues(t, len(c.private)-got, n.s.Stats().Truncated)
			assert.Equal(t, "boot", string(a.Options[optBootFile]))
			assert.Equal(t, c.overload&overloadFile == 0, a.DHCPv4.BootFileName == "boot")
		})
	}
}

// Wherever the border between the fields falls, the answer is whole: its length
// within the limit, each field with its END and nothing behind it.
func TestOverloadBorders(t *testing.T) {
	for n := 1; n < 500; n++ {
		cfg := Config{Port: guestPort, Address: netip.PrefixFrom(guestIP, 24), ServerIP: serverIP,
			BootFileName: strings.Repeat("b", 100)}
		for i, left := 0, n; left > 0; i, left = i+1, left-40 {
			cfg.Private = append(cfg.Private, PrivateOption{uint8(firstPrivate + i), strings.Repeat("p", min(left, 40))})
		}
		a := newBench(t, cfg).mustAnswer(selecting(t), dhcpv4.MessageTypeAck)
		require.LessOrEqual(t, int(a.ip.Length), minDatagram)
		over := a.Options[optOverload]
		if len(over) == 1 && over[0]&overloadFile != 0 {
			_, tail, _ := bytes.Cut(a.raw[offFile:offCookie], []byte{optEnd})
			require.Empty(t, bytes.Trim(tail, "\x00"))
		}
	}
}

// What a relay agent added is returned where it looks, in the options field,
// or not at all; what does not fit is counted.
func TestEchoOverflow(t *testing.T) {
	n := newBench(t, masquerade())
	m := message(t, msgDiscover, opt(optClientID, make([]byte, 255)...), opt(optRelay, make([]byte, 60)...))
	a := n.mustAnswer(broadcastFrame(m), dhcpv4.MessageTypeOffer)
	assert.Len(t, a.Options[optClientID], 255)
	assert.NotContains(t, a.Options, uint8(optRelay))
	assert.NotZero(t, n.s.Stats().Truncated)
}

// RFC 3396: a value over 255 bytes is split, and the codec joins it again.
func TestLongOptionRow64(t *testing.T) {
	for _, n := range []int{1, 254, 255, 256, 510, 511, 700} {
		c := Config{Address: netip.PrefixFrom(guestIP, 24), ServerIP: serverIP, Port: guestPort,
			Private: []PrivateOption{{224, strings.Repeat("v", n)}}}
		m := message(t, msgDiscover, dhcpv4.WithOption(dhcpv4.OptMaxMessageSize(1500)))
		a := newBench(t, c).mustAnswer(broadcastFrame(m), dhcpv4.MessageTypeOffer)
		assert.Equal(t, c.Private[0].Value, string(a.Options[224]))
		assert.Equal(t, (n+254)/255, bytes.Count(codes(a.raw), []byte{224}))
		o := option{data: []byte(c.Private[0].Value)}
		assert.Len(t, o.appendTo(nil), o.size())
	}
}

// kubevirt.md, section 1.7: a search list that cannot be sent as it is must not
// end the server (#3187, #4541, #12615).
func TestSearchDegradesRow64(t *testing.T) {
	var many []string
	for i := range 30 {
		many = append(many, fmt.Sprintf("team-%02d.a-rather-long-namespace.svc.cluster.local", i))
	}
	for _, c := range []struct {
		name   string
		in     []string
		want   []string
		domain string
	}{
		{"bad ones are left out", []string{"good.example", "-bad.example", "a..b", "", "sp ace", "ünï.example",
			strings.Repeat("x", 64) + ".example", "bad-.example"}, []string{"good.example"}, "good.example"},
		{"case and final dot", []string{"UPPER.Example."}, []string{"upper.example"}, "upper.example"},
		{"underscore", []string{"_x.under_score.example"}, []string{"_x.under_score.example"}, "_x.under_score.example"},
		{"root", []string{"."}, nil, ""},
		{"the longest is option 15", []string{"a.b", "longest.example", "c.d"}, []string{"a.b", "longest.example", "c.d"}, "longest.example"},
		{"over 255 bytes", many, many, many[0]},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg := masquerade()
			cfg.Search = c.in
			n := newBench(t, cfg)
			m := message(t, msgDiscover, dhcpv4.WithOption(dhcpv4.OptMaxMessageSize(1500)))
			a := n.mustAnswer(broadcastFrame(m), dhcpv4.MessageTypeOffer)
			assert.EqualValues(t, len(c.in)-len(c.want), n.s.Stats().BadDomains)
			assert.Equal(t, c.domain, string(a.Options[optDomain]))
			if c.want == nil {
				assert.NotContains(t, a.Options, uint8(optSearch))
				return
			}
			l, err := rfc1035label.FromBytes(a.Options[optSearch])
			require.NoError(t, err)
			assert.Equal(t, c.want, l.Labels)
		})
	}
}

// RFC 1035, 4.1.4, by example: a pointer only where the list is too long for
// one option, and to a name without one.
func TestCompression(t *testing.T) {
	got := encodeNames([]string{"a.example", "b.example", "example", "a.example", "c.b.example"}, map[string]int{})
	assert.Equal(t, "\x01a\x07example\x00"+"\x01b\xc0\x02"+"\xc0\x02"+"\xc0\x00"+"\x01c\x01b\xc0\x02", string(got))
	assert.NotContains(t, string(encodeSearch([]string{"a.example", "b.example"}, false)), "\xc0")
	long := []string{strings.Repeat("l", 60) + ".example", strings.Repeat("m", 60) + ".example",
		strings.Repeat("n", 60) + ".example", strings.Repeat("o", 60) + ".example"}
	assert.Contains(t, string(encodeSearch(long, false)), "\xc0")
	assert.NotContains(t, string(encodeSearch(long, true)), "\xc0", "KubeVirt does not compress")
}

func TestConfigFaults(t *testing.T) {
	v6 := netip.MustParseAddr("fd10:0:2::1")
	for name, change := range map[string]func(*Config){
		"no address":       func(c *Config) { c.Address = netip.Prefix{} },
		"IPv6 address":     func(c *Config) { c.Address = netip.PrefixFrom(v6, 120) },
		"no server":        func(c *Config) { c.ServerIP = netip.Addr{} },
		"IPv6 server":      func(c *Config) { c.ServerIP = v6 },
		"IPv6 router":      func(c *Config) { c.Router = v6 },
		"IPv6 DNS":         func(c *Config) { c.DNS = []netip.Addr{v6} },
		"IPv6 route":       func(c *Config) { c.Routes = []Route{{netip.PrefixFrom(v6, 64), serverIP}} },
		"small MTU":        func(c *Config) { c.MTU = 67 },
		"large MTU":        func(c *Config) { c.MTU = 65536 },
		"private option":   func(c *Config) { c.Private = []PrivateOption{{223, "x"}} },
		"option END":       func(c *Config) { c.Private = []PrivateOption{{255, "x"}} },
		"private twice":    func(c *Config) { c.Private = []PrivateOption{{230, "x"}, {230, "y"}} },
		"negative lease":   func(c *Config) { c.LeaseTime = -time.Second },
		"136 years' lease": func(c *Config) { c.LeaseTime = (1 << 32) * time.Second },
	} {
		t.Run(name, func(t *testing.T) {
			c := masquerade()
			change(&c)
			_, err := New(c)
			assert.ErrorContains(t, err, "dhcp: ")
			s, err := New(masquerade())
			require.NoError(t, err)
			assert.Error(t, s.Update(c))
		})
	}
}

// Update changes what is sent, and ends a lease only of another address.
func TestUpdate(t *testing.T) {
	n := newBench(t, masquerade())
	n.mustAnswer(selecting(t), dhcpv4.MessageTypeAck)
	c := masquerade()
	c.DNS = []netip.Addr{netip.MustParseAddr("9.9.9.9")}
	require.NoError(t, n.s.Update(c))
	require.Len(t, n.s.Leases(), 1)
	renew := unicastFrame(message(t, msgRequest, dhcpv4.WithClientIP(addr(guestIP))))
	a := n.mustAnswer(renew, dhcpv4.MessageTypeAck)
	assert.Equal(t, []net.IP{{9, 9, 9, 9}}, a.DNS())
	c.Address = netip.MustParsePrefix("10.0.2.3/24")
	require.NoError(t, n.s.Update(c))
	assert.Empty(t, n.s.Leases())
	n.mustAnswer(renew, dhcpv4.MessageTypeNak)
}

func TestLeases(t *testing.T) {
	now := epoch
	c := masquerade()
	c.LeaseTime, c.Now = time.Hour, func() time.Time { return now }
	n := newBench(t, c)
	n.mustAnswer(selecting(t, opt(optHostname, []byte("web\x1b[2J\n")...), opt(optClientID, 1, 2)), dhcpv4.MessageTypeAck)
	want := LeaseInfo{MAC: guestMAC, Addr: guestIP, ClientID: []byte{1, 2}, Hostname: "web?[2J?",
		Since: epoch, Expiry: epoch.Add(time.Hour), LastMessage: "REQUEST", LastSeen: epoch}
	assert.Equal(t, []LeaseInfo{want}, n.s.Leases())

	now = epoch.Add(30 * time.Minute)
	n.mustAnswer(unicastFrame(message(t, msgRequest, dhcpv4.WithClientIP(addr(guestIP)))), dhcpv4.MessageTypeAck)
	l := n.s.Leases()[0]
	assert.Equal(t, epoch, l.Since)
	assert.Equal(t, now.Add(time.Hour), l.Expiry)
	assert.Equal(t, want.Hostname, l.Hostname, "a renewal does not repeat it")
	n.ask(unicastFrame(message(t, dhcpv4.MessageTypeInform, dhcpv4.WithClientIP(addr(guestIP)))))
	assert.Equal(t, "INFORM", n.s.Leases()[0].LastMessage)

	st := n.s.Export()
	var told []frame.MAC
	c.OnLease = func(m frame.MAC) { told = append(told, m) }
	m := newBench(t, c)
	require.NoError(t, m.s.Import(st))
	assert.Equal(t, []frame.MAC{guestMAC}, told)
	assert.Equal(t, n.s.Leases(), m.s.Leases())
	assert.Equal(t, st, m.s.Export())

	now = now.Add(time.Hour)
	assert.Empty(t, n.s.Leases(), "expired")
	m = newBench(t, c)
	require.NoError(t, m.s.Import(st))
	assert.Empty(t, m.s.Leases())
}

func TestImportFaults(t *testing.T) {
	n := newBench(t, masquerade())
	n.mustAnswer(selecting(t), dhcpv4.MessageTypeAck)
	for name, change := range map[string]func(*State){
		"version":   func(s *State) { s.Version++ },
		"address":   func(s *State) { s.Leases[0].Addr = serverIP },
		"client id": func(s *State) { s.Leases[0].ClientID = make([]byte, 256) },
	} {
		t.Run(name, func(t *testing.T) {
			st := n.s.Export()
			change(&st)
			assert.Error(t, n.s.Import(st))
			assert.Len(t, n.s.Leases(), 1, "unchanged")
		})
	}
	assert.NoError(t, n.s.Import(State{Version: stateVersion}))
	assert.Empty(t, n.s.Leases())
}
