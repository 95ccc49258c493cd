package main

import (
	"encoding/binary"
	"math/rand/v2"
	"os"
)

// localType is an EtherType for experiments.
var localType = []byte{0x88, 0xb5}

// station is the i-th address behind a port.
func station(port byte, i int) []byte {
	b := []byte{2, 0x10 + port, 0, 0, 0, 0}
	binary.BigEndian.PutUint32(b[2:], uint32(i))
	return b
}

// writeStations writes a file of frames for testpmd's net_pcap: one from each
// of n stations behind a port to one behind the other, in no order.
func writeStations(path string, n, size int, port byte) error {
	var c capture
	f := make([]byte, size)
	copy(f[12:], localType)
	// The same order in every run, so that runs compare.
	for i, j := range rand.New(rand.NewPCG(uint64(n), uint64(port))).Perm(n) {
		copy(f, station(1-port, j))
		copy(f[6:], station(port, i))
		c.add(f)
	}
	return os.WriteFile(path, c.bytes(), 0o600)
}

// capture is a file of frames as net_pcap reads it. The zero value has none.
type capture struct{ records []byte }

// add adds a frame.
func (c *capture) add(f []byte) {
	n := uint32(len(f))
	c.records = append(c.records, make([]byte, 8)...) // the time
	c.records = binary.LittleEndian.AppendUint32(c.records, n)
	c.records = binary.LittleEndian.AppendUint32(c.records, n)
	c.records = append(c.records, f...)
}

// bytes is the file.
func (c *capture) bytes() []byte {
	b := binary.LittleEndian.AppendUint32(nil, 0xa1b2c3d4)
	b = binary.LittleEndian.AppendUint16(b, 2)
	b = binary.LittleEndian.AppendUint16(b, 4)
	b = append(b, make([]byte, 8)...)
	b = binary.LittleEndian.AppendUint32(b, 1<<17) // longer than any frame
	b = binary.LittleEndian.AppendUint32(b, 1)     // Ethernet
	return append(b, c.records...)
}
