package vhostuser

import (
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sidewire/engine/frame"
)

// wire is one message as bytes.
func wire(req Request, payload ...byte) []byte {
	return append(u32s(uint32(req), flagVersion|flagNeedReply, uint32(len(payload))), payload...)
}

// FuzzMessages gives a session a stream of bytes. The first byte says which
// descriptors go along with the first bytes of each piece, the second how long
// the pieces are. Whatever comes, the device stays alive and gives all back.
func FuzzMessages(f *testing.F) {
	join := func(kind, piece byte, ms ...[]byte) []byte {
		b := []byte{kind, piece}
		for _, m := range ms {
			b = append(b, m...)
		}
		return b
	}
	hello := [][]byte{wire(SetProtocolFeatures, u64(offeredProtocol)...), wire(SetFeatures, u64(plainFeats|featCtrlVQ|featLogAll)...)}
	mem := wire(AddMemReg, region1(testGPA, testMem, testUVA, 0)...)
	f.Add(join(0, 0, hello...))
	f.Add(join(1, 0, mem))                                                                                       // memory
	f.Add(join(1, 0, wire(SetMemTable, table([4]uint64{testGPA, testMem, testUVA, 0})...)))                      // a table
	f.Add(join(1, 12, wire(SetMemTable, table([4]uint64{testGPA, 1 << 40, testUVA, 0})...)))                     // H029
	f.Add(join(1, 0, wire(SetMemTable, u32s(1<<32-1, 0)...)))                                                    // H026
	f.Add(join(2, 0, wire(SetVringKick, u64(1)...)))                                                             // a ring
	f.Add(join(2, 0, wire(SetVringKick, u64(0xff)...)))                                                          // H039
	f.Add(join(0, 0, wire(SetVringNum, u32s(1<<32-1, 64)...)))                                                   // H039
	f.Add(join(0, 0, wire(GetVringBase, u32s(1<<32-1, 64)...)))                                                  // H039
	f.Add(join(0, 1, wire(GetConfig, append(u32s(250, 7, 0), make([]byte, 7)...)...)))                           // H021, H003
	f.Add(join(0, 0, u32s(5, 1, 1<<32-1)))                                                                       // H001
	f.Add(join(3, 0, wire(SetFeatures, 1)))                                                                      // H002, H008
	f.Add(join(0, 0, u32s(1, 5, 0)))                                                                             // H007
	f.Add(join(1, 0, wire(SetLogBase, u64s(4096, 0)...), wire(ResetDevice), wire(SetLogBase, u64s(0, 0)...)))    // H036
	f.Add(join(0, 0, wire(0), wire(23), wire(26), wire(41), wire(9999)))                                         // H013
	f.Add(join(0, 0, wire(SetProtocolFeatures, u64(protoInband)...)))                                            // H015
	f.Add(join(0, 0, wire(NetSetMTU, u64(67)...), wire(SendRARP, u64(1)...), wire(SetStatus, u64(1<<40)...)))    // H019, H020
	f.Add(join(4, 0, wire(SetVringCall, u64(1)...), wire(SetVringErr, u64(ringFDNone|1)...), wire(GetFeatures))) // H010, H011
	packed := wire(SetFeatures, u64(plainFeats|featRingPacked)...)
	f.Add(join(0, 0, packed, wire(SetVringNum, u32s(1, 100)...), wire(SetVringBase, u32s(1, 1<<32-1)...), wire(GetVringBase, u32s(1, 0)...))) // H040, H043
	f.Add(join(1, 0, mem, packed, wire(SetVringNum, u32s(1, 3)...), wire(SetVringAddr, addr(1, 0, 0)...), wire(SetVringKick, u64(1|ringFDNone)...),
		wire(SetFeatures, u64(plainFeats)...))) // H068: a packed ring becomes a split one of 3 entries
	d, err := NewDevice(Config{Name: "fuzz", Path: "unused", QueuePairs: 2, Log: quiet, MTU: 1500, Packed: true})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { d.Close() })
	memory, event := memfd(f, testMem), eventfd(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < 2 {
			return
		}
		kind, piece := b[0], int(b[1])
		b = b[2:]
		if piece == 0 {
			piece = len(b)
		}
		before, maps := resources(t)
		a, c := pair(t)
		s := d.take(c)
		if s == nil {
			t.Fatal("not taken")
		}
		go func() { // replies are read, but not looked at
			buf := make([]byte, 4096)
			for {
				if _, err := a.Read(buf); err != nil {
					return
				}
			}
		}()
		for len(b) > 0 {
			n := min(piece, len(b))
			var oob []byte
			switch kind % 5 {
			case 1:
				oob = unix.UnixRights(memory)
			case 2:
				oob = unix.UnixRights(event)
			case 3:
				oob = unix.UnixRights(memory, event, memory)
			case 4:
				oob = unix.UnixRights(event, memory)
			}
			if _, _, err := a.WriteMsgUnix(b[:n], oob, nil); err != nil {
				break
			}
			b = b[n:]
		}
		_ = a.CloseWrite()
		select {
		case <-s.done:
		case <-time.After(10 * time.Second):
			t.Fatal("session hangs")
		}
		a.Close()
		var batch frame.Batch
		if d.Pairs()[0].Pull(&batch) != 0 || d.Status().State != Disconnected {
			t.Fatal("something is left")
		}
		if after, m := resources(t); after > before+2 || m > maps { // the control queue's own
			t.Fatalf("%d descriptors, %d before; %d mappings, %d before", after, before, m, maps)
		}
	})
}
