package vhosttest

// Requests of the frontend.
const (
	ReqGetFeatures         = 1
	ReqSetFeatures         = 2
	ReqSetOwner            = 3
	ReqResetOwner          = 4
	ReqSetMemTable         = 5
	ReqSetLogBase          = 6
	ReqSetLogFD            = 7
	ReqSetVringNum         = 8
	ReqSetVringAddr        = 9
	ReqSetVringBase        = 10
	ReqGetVringBase        = 11
	ReqSetVringKick        = 12
	ReqSetVringCall        = 13
	ReqSetVringErr         = 14
	ReqGetProtocolFeatures = 15
	ReqSetProtocolFeatures = 16
	ReqGetQueueNum         = 17
	ReqSetVringEnable      = 18
	ReqSendRARP            = 19
	ReqNetSetMTU           = 20
	ReqSetBackendReqFD     = 21
	ReqIOTLB               = 22
	ReqSetVringEndian      = 23
	ReqGetConfig           = 24
	ReqSetConfig           = 25
	ReqPostcopyAdvise      = 28
	ReqGetInflightFD       = 31
	ReqSetInflightFD       = 32
	ReqResetDevice         = 34
	ReqVringKick           = 35
	ReqGetMaxMemSlots      = 36
	ReqAddMemReg           = 37
	ReqRemMemReg           = 38
	ReqSetStatus           = 39
	ReqGetStatus           = 40
	ReqSetDeviceStateFD    = 42
	ReqCheckDeviceState    = 43
)

// Flags of a message header.
const (
	FlagVersion   = 1
	FlagReply     = 4
	FlagNeedReply = 8
)

// Protocol features.
const (
	ProtoMQ          = 1 << 0
	ProtoLogShmfd    = 1 << 1
	ProtoRARP        = 1 << 2
	ProtoReplyAck    = 1 << 3
	ProtoMTU         = 1 << 4
	ProtoBackendReq  = 1 << 5
	ProtoConfig      = 1 << 9
	ProtoInflight    = 1 << 12
	ProtoResetDevice = 1 << 13
	ProtoInband      = 1 << 14
	ProtoMemSlots    = 1 << 15
	ProtoStatus      = 1 << 16
	ProtoDeviceState = 1 << 19

	// QEMUProtocol is what QEMU 10 acknowledges of our offer.
	QEMUProtocol = ProtoMQ | ProtoLogShmfd | ProtoRARP | ProtoReplyAck | ProtoMTU | ProtoBackendReq |
		ProtoResetDevice | ProtoMemSlots | ProtoStatus | ProtoDeviceState
)

// Virtio features.
const (
	FeatCsum          = 1 << 0
	FeatGuestCsum     = 1 << 1
	FeatGuestOffloads = 1 << 2
	FeatMTU           = 1 << 3
	FeatMAC           = 1 << 5
	FeatGuestTSO4     = 1 << 7
	FeatGuestTSO6     = 1 << 8
	FeatGuestECN      = 1 << 9
	FeatGuestUFO      = 1 << 10
	FeatHostTSO4      = 1 << 11
	FeatHostTSO6      = 1 << 12
	FeatHostECN       = 1 << 13
	FeatHostUFO       = 1 << 14
	FeatMrgRxbuf      = 1 << 15
	FeatStatus        = 1 << 16
	FeatCtrlVQ        = 1 << 17
	FeatCtrlRx        = 1 << 18
	FeatAnnounce      = 1 << 21
	FeatMQ            = 1 << 22
	FeatAnyLayout     = 1 << 27
	FeatLogAll        = 1 << 26
	FeatIndirect      = 1 << 28
	FeatEventIdx      = 1 << 29
	FeatProtocol      = 1 << 30
	FeatVersion1      = 1 << 32
	FeatRingPacked    = 1 << 34
	FeatInOrder       = 1 << 35
	FeatGuestUSO4     = 1 << 54
	FeatGuestUSO6     = 1 << 55
	FeatHostUSO       = 1 << 56

	// LinuxFeatures is what a current Linux guest accepts.
	LinuxFeatures = FeatCsum | FeatGuestCsum | FeatMTU | FeatGuestTSO4 | FeatGuestTSO6 | FeatGuestECN |
		FeatHostTSO4 | FeatHostTSO6 | FeatHostECN | FeatMrgRxbuf | FeatAnnounce | FeatMQ | FeatIndirect |
		FeatEventIdx | FeatProtocol | FeatVersion1 | FeatGuestUSO4 | FeatGuestUSO6 | FeatHostUSO

	// NoOffloads is LinuxFeatures without any checksum or segment left to others.
	NoOffloads = FeatMTU | FeatMrgRxbuf | FeatAnnounce | FeatMQ | FeatIndirect | FeatEventIdx | FeatProtocol |
		FeatVersion1

	// LegacyFeatures is what iPXE or a guest before virtio 1.0 accepts: a
	// header of 10 bytes with a descriptor of its own.
	LegacyFeatures = FeatProtocol
)

// Config is the layout of struct virtio_net_config, in bytes.
const (
	ConfigMAC      = 0
	ConfigStatus   = 6
	ConfigMaxPairs = 8
	ConfigMTU      = 10
	ConfigSize     = 12
)

// Message is one vhost-user message. Size is the size field if it is to
// differ from the payload's length.
type Message struct {
	Request uint32
	Flags   uint32
	Size    *uint32
	Payload []byte
	// Fds are borrowed when sent. Those received belong to the receiver.
	Fds []int
}
