package enginetest

import (
	"bytes"
	"encoding/binary"
	"net"
	"time"
)

// Opcodes of TFTP (RFC 1350 section 5).
const (
	tftpRead  = 1
	tftpData  = 3
	tftpAck   = 4
	tftpError = 5

	tftpBlock = 512
)

// ServeTFTP answers read requests for files by their names, in the namespace at
// addr, such as "10.0.0.1:69", until the test ends. Each transfer has a port of
// its own, as RFC 1350 section 4 wants; options are not negotiated, blocks
// are sent again after a second. asked, if not nil, is told each name.
func (ns *NetNS) ServeTFTP(t TB, addr string, files map[string][]byte, asked func(name string)) {
	t.Helper()
	pc, err := ns.ListenPacket("udp4", addr)
	if err != nil {
		t.Fatalf("TFTP server: %v", err)
	}
	t.Cleanup(func() { pc.Close() })
	host, _, _ := net.SplitHostPort(addr)
	go func() {
		b := make([]byte, 2048)
		for {
			n, from, err := pc.ReadFrom(b)
			if err != nil {
				return
			}
			if n < 4 || binary.BigEndian.Uint16(b) != tftpRead {
				continue
			}
			name, _, _ := bytes.Cut(b[2:n], []byte{0})
			if asked != nil {
				asked(string(name))
			}
			file, ok := files[string(name)]
			c, err := ns.ListenPacket("udp4", host+":0")
			if err != nil {
				return
			}
			if !ok {
				_, _ = c.WriteTo([]byte("\x00\x05\x00\x01File not found\x00"), from)
				c.Close()
				continue
			}
			go sendTFTP(c, from, file)
		}
	}()
}

// sendTFTP sends a file; a client that is gone is waited for a few seconds.
func sendTFTP(c net.PacketConn, to net.Addr, file []byte) {
	defer c.Close()
	ack := make([]byte, tftpBlock)
	for block := uint16(1); ; block++ {
		part := file[:min(len(file), tftpBlock)]
		file = file[len(part):]
		msg := binary.BigEndian.AppendUint16(nil, tftpData)
		msg = append(binary.BigEndian.AppendUint16(msg, block), part...)
		for tries := 0; ; tries++ {
			if _, err := c.WriteTo(msg, to); err != nil || tries == 10 {
				return
			}
			_ = c.SetReadDeadline(time.Now().Add(time.Second))
			n, _, err := c.ReadFrom(ack)
			if err != nil || n < 4 {
				continue
			}
			if binary.BigEndian.Uint16(ack) == tftpError {
				return
			}
			if binary.BigEndian.Uint16(ack) == tftpAck && binary.BigEndian.Uint16(ack[2:]) == block {
				break
			}
		}
		if len(part) < tftpBlock {
			return
		}
	}
}
