package main

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// The frames of a GSO cell: TCP segments of a guest that leaves it to others to
// cut them, as long as IPv4 allows.
const (
	gsoMSS      = 1460
	gsoSegments = 44
	gsoSize     = 14 + 20 + 20 + gsoSegments*gsoMSS
	gsoMTU      = 1500
	// gsoRoom is how much of them one of testpmd's buffers holds, so that a
	// frame takes fewer of them than an indirect descriptor of DPDK has.
	gsoRoom  = 16384
	gsoMbufs = 8192
	headroom = 128
	// gsoInFlight frames fill half of a ring.
	gsoInFlight = ringSize / 2 / (gsoSize/gsoRoom + 1)
)

// gsoFrame is one of them, between guests whose addresses testpmd fills in.
func gsoFrame() []byte {
	f := make([]byte, gsoSize)
	f[12], f[13] = 8, 0
	ip := f[14:]
	ip[0], ip[8], ip[9] = 0x45, 64, 6
	binary.BigEndian.PutUint16(ip[2:], gsoSize-14)
	copy(ip[12:], []byte{10, 0, 0, 1, 10, 0, 0, 2})
	tcp := ip[20:]
	binary.BigEndian.PutUint16(tcp[0:], 1000)
	binary.BigEndian.PutUint16(tcp[2:], 2000)
	tcp[12], tcp[13] = 5<<4, 0x10 // ACK
	var sum uint32
	for i := 0; i < 20; i += 2 {
		sum += uint32(binary.BigEndian.Uint16(ip[i:]))
	}
	sum = sum&0xffff + sum>>16
	binary.BigEndian.PutUint16(ip[10:], ^uint16(sum+sum>>16))
	return f
}

// gsoDevices are testpmd's devices that have the frames of a cell, in files
// below dir: those that go round, and one by which a switch learns where guest 1
// is.
func gsoDevices(dir string) ([]string, error) {
	var long, short capture
	for range gsoInFlight {
		long.add(gsoFrame())
	}
	short.add(append(make([]byte, 12, 64), localType...)[:64])
	var vdevs []string
	for i, c := range []capture{long, short} {
		file := filepath.Join(dir, fmt.Sprint("frames", i))
		if err := os.WriteFile(file, c.bytes(), 0o600); err != nil {
			return nil, err
		}
		vdevs = append(vdevs, fmt.Sprintf("net_pcap%d,rx_pcap=%s", i, file))
	}
	return vdevs, nil
}

// allowGSO lets guests have long frames, and starts their devices.
func (t *testpmd) allowGSO(guests int) error {
	var lines []string
	for i := range guests {
		for _, l := range []string{"port config %d rx_offload tcp_cksum on", "port config %d rx_offload tcp_lro on", "csum set tcp hw %d"} {
			lines = append(lines, fmt.Sprintf(l, i))
		}
		lines = append(lines, fmt.Sprintf("tso set %d %d", gsoMSS, i))
	}
	_, err := t.set(append(lines, "port start all")...)
	return err
}

// beginGSO lets the backend learn where guest 1 is, then guest 0 send it the
// frames of the file, which it leaves in its ring, and then guest 0 send again
// whatever guest 1 receives. Ports 2 and 3 are the files; what is sent to them
// is gone.
func (f frontend) beginGSO() error {
	for _, ports := range []string{"3,1", "2,0"} {
		if _, err := f.set("set fwd csum", "set portlist "+ports, "start"); err != nil {
			return err
		}
		time.Sleep(settle)
		if _, err := f.set("stop"); err != nil {
			return err
		}
	}
	_, err := f.set("set portlist 0,1", "start")
	return err
}
