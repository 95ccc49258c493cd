package frame

import "encoding/binary"

// Flags of an Offload (virtio 1.2, 5.1.6).
const (
	// NeedsCsum: the checksum from CsumStart on is not yet in its field; the
	// field holds the pseudo-header's sum.
	NeedsCsum = 1
	// DataValid: the checksum was verified on the way.
	DataValid = 2
)

// GSO types of an Offload.
const (
	GSONone  = 0
	GSOTCPv4 = 1
	GSOUDP   = 3 // UDP fragmentation offload, deprecated, never carried
	GSOTCPv6 = 4
	GSOUDPL4 = 5
	GSOECN   = 0x80 // a bit beside the type: the TCP header has CWR set
)

// Offload is the meaning of a struct virtio_net_hdr: what the sender of a
// frame left for others to do. Offsets count from the frame's first byte.
type Offload struct {
	Flags      uint8
	GSO        uint8
	HdrLen     uint16 // a hint; recomputed wherever it matters
	GSOSize    uint16 // payload bytes of each segment
	CsumStart  uint16
	CsumOffset uint16
}

// VnetHdrLen and VnetHdrMrgLen are the header's two lengths: without and with
// num_buffers (VERSION_1 or MRG_RXBUF).
const (
	VnetHdrLen    = 10
	VnetHdrMrgLen = 12
)

// GSOType is the GSO type without its ECN bit.
func (o *Offload) GSOType() uint8 { return o.GSO &^ GSOECN }

// Decode reads the first VnetHdrLen bytes of b. num_buffers is not read: it
// has no meaning from a driver (H075), nor have the others where nothing was
// left to do. Each byte is read once.
func (o *Offload) Decode(b []byte) {
	h := binary.LittleEndian.Uint64(b)
	if h&(0xff00|NeedsCsum|DataValid) == 0 {
		*o = Offload{}
		return
	}
	o.Flags, o.GSO = uint8(h)&(NeedsCsum|DataValid), uint8(h>>8)
	o.HdrLen, o.GSOSize, o.CsumStart = uint16(h>>16), uint16(h>>32), uint16(h>>48)
	o.CsumOffset = binary.LittleEndian.Uint16(b[8:])
}

// Encode writes the header to b, VnetHdrLen or VnetHdrMrgLen bytes long; the
// longer one gets num_buffers 1.
func (o *Offload) Encode(b []byte) {
	_ = b[VnetHdrLen-1]
	b[0], b[1] = o.Flags, o.GSO
	binary.LittleEndian.PutUint16(b[2:], o.HdrLen)
	binary.LittleEndian.PutUint16(b[4:], o.GSOSize)
	binary.LittleEndian.PutUint16(b[6:], o.CsumStart)
	binary.LittleEndian.PutUint16(b[8:], o.CsumOffset)
	if len(b) >= VnetHdrMrgLen {
		binary.LittleEndian.PutUint16(b[10:], 1)
	}
}
