package dhcp

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

// hostile is a frame that a guest might attack the server with, and the reason
// with which it must go.
type hostile struct {
	name string
	p    []byte
	want frame.DropReason
}

func hostiles(t testing.TB) []hostile {
	good := message(t, msgDiscover).ToBytes()
	change := func(f func(m []byte) []byte) []byte { return wrap(f(bytes.Clone(good)), anyIP, allOnes) }
	set := func(at int, v ...byte) []byte {
		return change(func(m []byte) []byte { copy(m[at:], v); return m })
	}
	options := func(o ...byte) []byte {
		return change(func(m []byte) []byte { return append(m[:offOption], o...) })
	}
	header := func(f func(ip, udp []byte)) []byte {
		p := wrap(good, anyIP, allOnes)
		f(p[14:34], p[34:42])
		binary.BigEndian.PutUint16(p[24:], 0)
		binary.BigEndian.PutUint16(p[24:], ^frame.Fold(frame.Sum(p[14:34], 0)))
		return p
	}
	put := binary.BigEndian.PutUint16
	hs := []hostile{
		{"H089 no cookie", set(offCookie, 0, 0, 0, 0), frame.BadDHCP},
		{"H089 op 0", set(0, 0), frame.BadDHCP},
		{"H089 reply", set(0, 2), frame.BadDHCP},
		{"H089 hlen 255", set(2, 255), frame.BadDHCP},
		{"H089 hlen 0", set(2, 0), frame.BadDHCP},
		{"H089 hlen 16", set(2, 16), frame.BadDHCP},
		{"H089 htype", set(1, 32), frame.BadDHCP},
		{"H089 no options", options(), frame.BadDHCP},
		{"H089 END only", options(255), frame.BadDHCP},
		{"H089 no END", options(53, 1, 1), frame.BadDHCP},
		{"H089 option past the end", options(53, 1, 1, 12, 200, 'x', 255), frame.BadDHCP},
		{"H089 code without length", options(53, 1, 1, 12), frame.BadDHCP},
		{"H089 type 0", options(53, 1, 0, 255), frame.BadDHCP},
		{"H089 type 255", options(53, 1, 255, 255), frame.BadDHCP},
		{"H089 type OFFER", options(53, 1, 2, 255), frame.BadDHCP},
		{"H089 type of no bytes", options(53, 0, 255), frame.BadDHCP},
		{"H089 type twice", options(53, 1, 1, 53, 1, 3, 255), frame.BadDHCP},
		{"H089 overload 0", options(53, 1, 1, 52, 1, 0, 255), frame.BadDHCP},
		{"H089 overload 4", options(53, 1, 1, 52, 1, 4, 255), frame.BadDHCP},
		{"H089 overload without a value", options(53, 1, 1, 52, 0, 255), frame.BadDHCP},
		{"H089 overload twice", options(53, 1, 1, 52, 1, 1, 52, 1, 1, 255), frame.BadDHCP},
		{"H089 overload of a field without END", options(53, 1, 1, 52, 1, 3, 255), frame.BadDHCP},
		{"H089 overload in overload", change(func(m []byte) []byte {
			copy(m[offFile:], []byte{52, 1, 2, 255})
			return append(m[:offOption], 53, 1, 1, 52, 1, 1, 255)
		}), frame.BadDHCP},
		{"H089 option past the file field", change(func(m []byte) []byte {
			m[offFile+126], m[offFile+127] = 12, 9
			return append(m[:offOption], 53, 1, 1, 52, 1, 1, 255)
		}), frame.BadDHCP},
		{"H089 1,000 options", options(append(append([]byte{53, 1, 1}, bytes.Repeat([]byte{12, 0}, 1000)...), 255)...), frame.BadDHCP},
		{"H089 129 options", options(append(append([]byte{53, 1, 1}, bytes.Repeat([]byte{12, 0}, 128)...), 255)...), frame.BadDHCP},
		{"H089 too long", options(append(append([]byte{53, 1, 1}, make([]byte, 4000)...), 255)...), frame.BadDHCP},
		{"H089 server id of 3 bytes", options(53, 1, 3, 54, 3, 1, 2, 3, 255), frame.BadDHCP},
		{"H089 address of 5 bytes", options(53, 1, 3, 50, 5, 1, 2, 3, 4, 5, 255), frame.BadDHCP},
		{"H089 client id of 510 bytes", options(append(append([]byte{53, 1, 1}, bytes.Repeat(append([]byte{61, 255}, make([]byte, 255)...), 2)...), 255)...), frame.BadDHCP},
		{"H082 version 6", header(func(ip, _ []byte) { ip[0] = 0x65 }), frame.BadIPv4},
		{"H082 total length past the frame", header(func(ip, _ []byte) { put(ip[2:], 60000) }), frame.ShortFrame},
		{"H090 total length 27", header(func(ip, _ []byte) { put(ip[2:], 27) }), frame.BadTransport},
		{"H090 total length 20", header(func(ip, _ []byte) { put(ip[2:], 20) }), frame.BadTransport},
		{"H090 total length 0", header(func(ip, _ []byte) { put(ip[2:], 0) }), frame.BadIPv4},
		{"H087 UDP length 0", header(func(_, udp []byte) { put(udp[4:], 0) }), frame.BadTransport},
		{"H087 UDP length past the packet", header(func(_, udp []byte) { put(udp[4:], 2000) }), frame.BadTransport},
	}
	for _, n := range []int{0, 1, 27, 28, 34, 43, 235, 236, 239} {
		hs = append(hs, hostile{"H089 BOOTP cut", change(func(m []byte) []byte { return m[:n] }), frame.BadDHCP})
	}
	return hs
}

func TestHostile(t *testing.T) {
	hs := hostiles(t)
	for _, h := range hs {
		t.Run(h.name, func(t *testing.T) {
			n := newBench(t, masquerade())
			in, out := n.process(h.p)
			assert.Equal(t, h.want, in[0].Reason, "got %v, want %v", in[0].Reason, h.want)
			assert.Equal(t, frame.Drop, in[0].Out)
			assert.Empty(t, out)
			assert.EqualValues(t, 1, n.s.Stats().Bad)
			assert.Zero(t, n.s.Stats().Panics)
			n.mustAnswer(broadcastFrame(message(t, msgDiscover)), dhcpv4.MessageTypeOffer)
		})
	}
}

// Options that a client really put into file and sname are read (RFC 2132,
// 9.3).
func TestOverloadedRequest(t *testing.T) {
	m := message(t, msgRequest).ToBytes()
	copy(m[offFile:], append([]byte{50, 4}, append(ip4(guestIP), 255)...))
	copy(m[offSname:], append([]byte{54, 4}, append(ip4(serverIP), 255)...))
	m = append(m[:offOption], 53, 1, 3, 52, 1, 3, 255)
	n := newBench(t, masquerade())
	n.mustAnswer(wrap(m, anyIP, allOnes), dhcpv4.MessageTypeAck)
	m[offFile+2] ^= 1
	n.mustAnswer(wrap(m, anyIP, allOnes), dhcpv4.MessageTypeNak)
	m[offSname+2] ^= 1
	assert.Nil(t, n.ask(wrap(m, anyIP, allOnes)))
}

// A panic of the codec is a bad message, no more.
func TestDecodeRecovers(t *testing.T) {
	p, panicked := decode(nil, func([]byte) (*dhcpv4.DHCPv4, error) { panic("slice bounds out of range") })
	assert.Nil(t, p)
	assert.True(t, panicked)
	n := newBench(t, masquerade())
	n.s.bad(new(frame.Frame), frame.BadDHCP, true)
	assert.Equal(t, Stats{Bad: 1, Panics: 1}, n.s.Stats())
}

// Nothing that a guest sends makes the server panic, answer more than once,
// answer with what cannot be read or is too long, lease another address, or
// forget how to answer a real client.
func FuzzServer(f *testing.F) {
	for _, h := range hostiles(f) {
		f.Add(h.p, uint8(0))
	}
	long := masquerade()
	long.Search = []string{strings.Repeat("a", 60) + "." + strings.Repeat("b", 60) + ".example", strings.Repeat("c", 60)}
	long.BootFileName, long.TFTPServerName = strings.Repeat("f", 120), "10.0.2.9"
	long.Private = []PrivateOption{{230, strings.Repeat("p", 300)}}
	compat := long
	compat.KubeVirtCompat = true
	configs := []Config{masquerade(), long, compat}
	for i := range configs {
		f.Add(broadcastFrame(message(f, msgDiscover, opt(optRapidCommit), opt(optClientID, make([]byte, 255)...),
			opt(optRelay, make([]byte, 255)...))), uint8(i))
		f.Add(selecting(f, opt(optParameters, 1, 3, 6, 108, 121), opt(optMaxSize, 255, 255)), uint8(i))
		f.Add(unicastFrame(message(f, dhcpv4.MessageTypeInform)), uint8(i))
		f.Add(unicastFrame(message(f, dhcpv4.MessageTypeDecline, opt(optRequestedIP, ip4(guestIP)...))), uint8(i))
	}
	b := new(frame.Batch)
	f.Fuzz(func(t *testing.T, p []byte, config uint8) {
		if len(p) > frame.MaxLen {
			return
		}
		c := configs[int(config)%len(configs)]
		s, err := New(c)
		require.NoError(t, err)
		// A second copy has its checksum done by nobody, so that changed bytes
		// come through.
		for _, flags := range []uint8{0, frame.DataValid} {
			b.Now += int64(time.Second)
			enginetest.Fill(b, p)
			in := b.Frame(0)
			in.Flags = flags
			s.Process(b)
			require.LessOrEqual(t, b.Len(), 2)
			if b.Len() == 2 {
				require.Equal(t, frame.Consumed, in.Out)
				a := parse(t, b.Frame(1).Bytes())
				require.LessOrEqual(t, int(a.ip.Length), c.MTU)
				require.Equal(t, dhcpv4.OpcodeBootReply, a.OpCode)
				if y, _ := netip.AddrFromSlice(a.YourIPAddr.To4()); !y.IsUnspecified() {
					require.Equal(t, guestIP, y)
				}
			}
			require.LessOrEqual(t, len(s.Leases()), 1)
		}
		require.Zero(t, s.Stats().Panics)
		enginetest.Fill(b, selecting(t))
		s.Process(b)
		require.Equal(t, 2, b.Len())
		require.Equal(t, dhcpv4.MessageTypeAck, parse(t, b.Frame(1).Bytes()).MessageType())
	})
}
