package engine

import (
	"bytes"
	"testing"

	"github.com/gopacket/gopacket/layers"
	"github.com/stretchr/testify/assert"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

// FuzzMACNAT sends any frame in either direction, of which any part is private.
// Whatever leaves by the link has its address, and right checksums if they were
// right; the other guest gets it as it was; nothing comes in under the link's
// address.
func FuzzMACNAT(f *testing.F) {
	for _, b := range [][]byte{
		echoFrame, echoFrame[:33], eth(outMAC, guest1, 7), nil,
		enginetest.ARPFrame(bcastEth, enginetest.ARPReply, guest1, ip4G1, guest1, ip4G1),
		enginetest.ARPFrame(enginetest.Eth{Src: outMAC, Dst: linkMAC}, enginetest.ARPReply, outMAC, ip4Out, linkMAC, ip4G1),
		nd6(bcastEth, ip6G1, ip6Nodes, ndNeighSol, ip6Out, lla(1, guest1)),
		nd6(bcastEth, ip6G1, ip6Nodes, ndRouterAdv, ip6G1, filler(20), lla(1, guest1)),
		nd6(bcastEth, ip6G1, ip6Nodes, ndRouterAdv, ip6G1, filler(6), lla(1, guest1)),
		nd6(bcastEth, ip6G1, ip6Nodes, ndNeighSol, ip6Out, make([]byte, 8)),
		nd6(enginetest.Eth{Src: outMAC, Dst: linkMAC}, ip6Out, ip6G1, ndRedirect, ip6G2, lla(2, linkMAC)),
		nd(ndNeighSol, lla(1, own), cat([]byte{extDestOpts}, []byte{protoICMP6, 0, 1, 4, 0, 0, 0, 0})...),
		nd(ndNeighSol, lla(1, own), cat([]byte{extDestOpts, extDestOpts, 30}, make([]byte, 246), []byte{protoICMP6, 0, 1, 4, 0, 0, 0, 0})...),
		dhcpFrame(f, guest1, nil), dhcpFrame(f, guest1, nil)[:100],
		dhcpFrame(f, guest1, func(d *layers.DHCPv4) { d.ClientIP = ip4G1.AsSlice() }),
		dhcpOver(f, enginetest.Eth{Src: outMAC, Dst: linkMAC}, enginetest.IP{Src: ip4Out, Dst: ip4Limit}, enginetest.UDP{Src: 67, Dst: 68},
			&layers.DHCPv4{Operation: 2, HardwareType: 1, HardwareLen: 6, Xid: 0x01020304, ClientHWAddr: hw(linkMAC)}),
	} {
		for _, snapshot := range []byte{14, 18, 90, 128} {
			f.Add(b, snapshot, uint16(0), uint16(0))
		}
		f.Add(b, byte(128), uint16(54), uint16(2))
		f.Add(b, byte(128), uint16(14), uint16(8))
		f.Add(b, byte(128), uint16(34), uint16(6))
		if len(b) > 14 {
			f.Add(tag(b, typeVLAN, 5), byte(18), uint16(0), uint16(0))
			f.Add(tag(tag(tag(b, typeVLAN, 5), typeQinQ, 5), typeVLAN, 0), byte(18), uint16(0), uint16(0))
		}
	}
	asked := enginetest.UDPFrame(enginetest.Eth{Src: outMAC, Dst: linkMAC}, enginetest.IP{Src: ip4Out, Dst: ip4Out.Next()}, enginetest.UDP{Src: 5, Dst: 6}, nil)
	for range 22 {
		asked = tag(asked, typeVLAN, 5)
	}
	f.Add(asked, byte(128), uint16(0), uint16(0))
	f.Fuzz(func(t *testing.T, data []byte, snapshot byte, start, off uint16) {
		if len(data) > 3000 {
			return
		}
		b := newNATBed(t, MACNATConfig{}, twoGuests()...)
		b.sends(1, echoFrame, dhcpFrame(t, guest1, nil), nd6(bcastEth, ip6G1, ip6Nodes, ndNeighAdv, ip6G1, lla(2, guest1)))
		b.sends(2, nd6(enginetest.Eth{Src: guest2, Dst: frame.Broadcast}, ip6G2, ip6Nodes, ndNeighAdv, ip6G2, lla(2, guest2)))
		for _, from := range []int{1, 0} {
			b.batch.Reset(b.batch.Now)
			fr := setSnapshot(b.batch, data, min(int(snapshot), frame.HeadSize), b.ids[from])
			if start != 0 {
				fr.Flags, fr.CsumStart, fr.CsumOffset = frame.NeedsCsum, start, off
				if int(fr.HeadLen) < frame.EthernetLen || !fr.CheckOffload() {
					return
				}
			}
			b.stages[from].Process(b.batch)
			b.deliver(from)
			got := b.got()
			for _, g := range got[0] {
				if from == 1 {
					checkOut(t, data, g, start != 0)
				}
			}
			for _, g := range append(got[1], got[2]...) {
				if from == 0 && bytes.Equal(g[:6], linkMAC[:]) {
					t.Fatalf("%x came in as it was", g)
				}
				if from == 1 && !bytes.Equal(g, data) {
					t.Fatalf("the other guest gets\n%x\nof\n%x", g, data)
				}
			}
		}
	})
}

// checkOut judges what left by the link of what a guest sent.
func checkOut(t *testing.T, sent, got []byte, partial bool) {
	assert.Equal(t, linkMAC[:], got[6:12])
	if !partial && enginetest.ChecksumsOK(sent) {
		assert.True(t, enginetest.ChecksumsOK(got), "%x of %x", got, sent)
	}
	typ := uint16(got[12])<<8 | uint16(got[13])
	if typ == frame.TypeARP {
		assert.Equal(t, linkMAC[:], got[22:28])
	}
	if len(got) != len(sent) && typ != frame.TypeIPv4 && !isTag(typ) {
		t.Fatalf("%d bytes of %d", len(got), len(sent))
	}
}

// natBatch fills a batch with TCP frames of a guest's, or of the link's.
func natBatch(b *natBed, n int, in frame.PortID, data []byte) {
	b.batch.Reset(b.batch.Now)
	for range n {
		setSnapshot(b.batch, data, frame.HeadSize, in)
	}
}

// tcpPair is a segment of a guest's, and one for it from the link.
func tcpPair(v6 bool) (out, in []byte) {
	src, dst := ip4G1, ip4Out
	if v6 {
		src, dst = ip6G1, ip6Out
	}
	return enginetest.TCPFrame(enginetest.Eth{Src: guest1, Dst: outMAC}, enginetest.IP{Src: src, Dst: dst}, enginetest.TCP{Src: 1, Dst: 2}, make([]byte, 1400)),
		enginetest.TCPFrame(enginetest.Eth{Src: outMAC, Dst: linkMAC}, enginetest.IP{Src: dst, Dst: src}, enginetest.TCP{Src: 2, Dst: 1}, make([]byte, 1400))
}

// taker is a port that takes everything.
type taker struct{}

func (taker) Push(int, []*frame.Frame) {}

func TestMACNATAllocs(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		b := newNATBed(t, MACNATConfig{}, twoGuests()...)
		out, in := tcpPair(v6)
		arp := enginetest.ARPFrame(enginetest.Eth{Src: guest1, Dst: outMAC}, enginetest.ARPRequest, guest1, ip4G1, frame.MAC{}, ip4Out)
		ns := nd6(enginetest.Eth{Src: guest1, Dst: outMAC}, ip6G1, ip6Out, ndNeighSol, ip6Out, lla(1, guest1))
		b.sends(1, out, arp, ns)
		port := b.nat.Port(taker{})
		fs := make([]*frame.Frame, 64)
		assert.Zero(t, testing.AllocsPerRun(50, func() {
			for _, data := range [][]byte{out, arp, ns} {
				natBatch(b, 64, b.ids[1], data)
				for i := range fs {
					fs[i] = b.batch.Frame(i)
				}
				port.Push(0, fs)
			}
			natBatch(b, 64, b.ids[0], in)
			b.nat.Process(b.batch)
			if b.batch.Frame(63).Dst()[5] != 1 {
				t.Fatal("not translated")
			}
		}))
	}
}

func BenchmarkMACNAT(b *testing.B) {
	for _, v6 := range []bool{false, true} {
		bed := newNATBed(b, MACNATConfig{}, twoGuests()...)
		out, in := tcpPair(v6)
		bed.sends(1, out)
		port := bed.nat.Port(taker{})
		name := map[bool]string{false: "IPv4", true: "IPv6"}[v6]
		b.Run("out/"+name, func(b *testing.B) {
			natBatch(bed, 64, bed.ids[1], out)
			fs := make([]*frame.Frame, 64)
			for i := range fs {
				fs[i] = bed.batch.Frame(i)
			}
			b.ReportAllocs()
			for b.Loop() {
				for _, f := range fs {
					copy(f.Head[6:], guest1[:])
				}
				port.Push(0, fs)
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/64, "ns/frame")
		})
		b.Run("in/"+name, func(b *testing.B) {
			natBatch(bed, 64, bed.ids[0], in)
			b.ReportAllocs()
			for b.Loop() {
				for i := range 64 {
					copy(bed.batch.Frame(i).Head[:], linkMAC[:])
				}
				bed.nat.Process(bed.batch)
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/64, "ns/frame")
		})
	}
}
