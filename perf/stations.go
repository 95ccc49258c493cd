package main

import (
	"bufio"
	"encoding/binary"
	"math/rand/v2"
	"os"
)

// station is the i-th address behind a port.
func station(port byte, i int) []byte {
	b := []byte{2, 0x10 + port, 0, 0, 0, 0}
	binary.BigEndian.PutUint32(b[2:], uint32(i))
	return b
}

// writeStations writes a file of frames for testpmd's net_pcap: one from each
// of n stations behind a port to one behind the other, in no order.
func writeStations(path string, n, size int, port byte) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	w := bufio.NewWriter(f)
	header := binary.LittleEndian.AppendUint32(nil, 0xa1b2c3d4)
	header = binary.LittleEndian.AppendUint16(header, 2)
	header = binary.LittleEndian.AppendUint16(header, 4)
	header = append(header, make([]byte, 8)...)
	header = binary.LittleEndian.AppendUint32(header, 65535)
	header = binary.LittleEndian.AppendUint32(header, 1) // Ethernet
	_, _ = w.Write(header)                               // Flush tells
	record := make([]byte, 16+size)
	binary.LittleEndian.PutUint32(record[8:], uint32(size))
	binary.LittleEndian.PutUint32(record[12:], uint32(size))
	// The same order in every run, so that runs compare.
	to := rand.New(rand.NewPCG(uint64(n), uint64(port))).Perm(n)
	for i, j := range to {
		copy(record[16:], station(1-port, j))
		copy(record[22:], station(port, i))
		record[28], record[29] = 0x88, 0xb5 // a local experimental type
		_, _ = w.Write(record)
	}
	return w.Flush()
}
