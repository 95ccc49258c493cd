package vhostuser

import (
	"math/bits"
	"strconv"
)

// Feature bits of a virtio-net device (virtio 1.2, 5.1.3 and 6) and of
// vhost-user itself.
const (
	featCSUM              = 1 << 0
	featGuestCSUM         = 1 << 1
	featCtrlGuestOffloads = 1 << 2
	featMTU               = 1 << 3
	featMAC               = 1 << 5
	featGuestTSO4         = 1 << 7
	featGuestTSO6         = 1 << 8
	featGuestECN          = 1 << 9
	featHostTSO4          = 1 << 11
	featHostTSO6          = 1 << 12
	featHostECN           = 1 << 13
	featMrgRxbuf          = 1 << 15
	featStatus            = 1 << 16
	featCtrlVQ            = 1 << 17
	featCtrlRx            = 1 << 18
	featCtrlVLAN          = 1 << 19
	featCtrlRxExtra       = 1 << 20
	featGuestAnnounce     = 1 << 21
	featMQ                = 1 << 22
	featCtrlMACAddr       = 1 << 23
	featNotifyOnEmpty     = 1 << 24
	featLogAll            = 1 << 26
	featAnyLayout         = 1 << 27
	featIndirectDesc      = 1 << 28
	featEventIdx          = 1 << 29
	featProtocolFeatures  = 1 << 30
	featVersion1          = 1 << 32
	featRingPacked        = 1 << 34
	featGuestUSO4         = 1 << 54
	featGuestUSO6         = 1 << 55
	featHostUSO           = 1 << 56
)

// offloadFeatures are those that CTRL_GUEST_OFFLOADS switches.
const offloadFeatures = featGuestCSUM | featGuestTSO4 | featGuestTSO6 | featGuestECN | featGuestUSO4 | featGuestUSO6

// ctrlFeatures need a control queue that is ours.
const ctrlFeatures = featCtrlVQ | featCtrlRx | featCtrlVLAN | featCtrlRxExtra | featCtrlMACAddr | featCtrlGuestOffloads

// Protocol feature bits.
const (
	protoMQ          = 1 << 0
	protoRARP        = 1 << 2
	protoReplyAck    = 1 << 3
	protoMTU         = 1 << 4
	protoBackendReq  = 1 << 5
	protoConfig      = 1 << 9
	protoResetDevice = 1 << 13
	protoInband      = 1 << 14
	protoMemSlots    = 1 << 15
	protoStatus      = 1 << 16
)

// offeredProtocol is what GET_PROTOCOL_FEATURES answers.
const offeredProtocol = protoMQ | protoRARP | protoReplyAck | protoMTU | protoBackendReq | protoConfig |
	protoResetDevice | protoMemSlots | protoStatus

// offered returns the virtio features that a device of this configuration has.
// IN_ORDER is not among them: tx buffers go back in the order in which they
// came, but a frame that is received into the guest's own buffers (Reserver)
// goes back when its fate is known, and others may pass it meanwhile.
func (c *Config) offered() uint64 {
	f := uint64(featCSUM | featGuestCSUM | featHostTSO4 | featHostTSO6 | featHostECN | featMrgRxbuf | featStatus |
		featGuestAnnounce | featNotifyOnEmpty | featLogAll | featAnyLayout | featIndirectDesc | featEventIdx |
		featProtocolFeatures | featVersion1 | featMTU)
	if !c.NoGuestTSO {
		f |= featGuestTSO4 | featGuestTSO6 | featGuestECN
	}
	if c.MAC != (macAddr{}) {
		f |= featMAC
	}
	if c.QueuePairs > 1 {
		f |= featMQ
	}
	if c.Packed {
		f |= featRingPacked
	}
	if c.QueuePairs <= maxPairsWithCtrl {
		f |= ctrlFeatures
	}
	return f
}

var featureNames = map[int]string{
	0: "CSUM", 1: "GUEST_CSUM", 2: "CTRL_GUEST_OFFLOADS", 3: "MTU", 5: "MAC", 7: "GUEST_TSO4", 8: "GUEST_TSO6",
	9: "GUEST_ECN", 11: "HOST_TSO4", 12: "HOST_TSO6", 13: "HOST_ECN", 15: "MRG_RXBUF", 16: "STATUS",
	17: "CTRL_VQ", 18: "CTRL_RX", 19: "CTRL_VLAN", 20: "CTRL_RX_EXTRA", 21: "GUEST_ANNOUNCE", 22: "MQ",
	23: "CTRL_MAC_ADDR", 24: "NOTIFY_ON_EMPTY", 26: "LOG_ALL", 27: "ANY_LAYOUT", 28: "INDIRECT_DESC",
	29: "EVENT_IDX", 30: "PROTOCOL_FEATURES", 32: "VERSION_1", 34: "RING_PACKED", 54: "GUEST_USO4", 55: "GUEST_USO6", 56: "HOST_USO",
}

var protocolNames = map[int]string{
	0: "MQ", 1: "LOG_SHMFD", 2: "RARP", 3: "REPLY_ACK", 4: "MTU", 5: "BACKEND_REQ", 9: "CONFIG",
	12: "INFLIGHT_SHMFD", 13: "RESET_DEVICE", 14: "INBAND_NOTIFICATIONS", 15: "CONFIGURE_MEM_SLOTS",
	16: "STATUS", 19: "DEVICE_STATE",
}

// bitNames lists the bits that are set in v by name.
func bitNames(v uint64, names map[int]string) []string {
	out := make([]string, 0, bits.OnesCount64(v))
	for ; v != 0; v &= v - 1 {
		bit := bits.TrailingZeros64(v)
		name, ok := names[bit]
		if !ok {
			name = "bit " + strconv.Itoa(bit)
		}
		out = append(out, name)
	}
	return out
}
