package frame

// DropReason says why a frame went no further. Every reason has a counter;
// none has a log line.
type DropReason uint8

// The reasons, grouped by who is to blame.
const (
	ReasonNone DropReason = iota // not dropped, or no stage claimed the frame

	// What the sender got wrong.
	BadDescriptor // a chain that cannot be followed (virtio 1.2, 2.7.5)
	ShortFrame    // fewer bytes than an Ethernet, IP or transport header
	OversizeFrame // longer than the MTU or than 64 KiB allows
	BadOffload    // a virtio_net_hdr that contradicts its frame
	BadIPv4       // version, IHL or length of an IPv4 header
	BadChecksum   // a header checksum that does not add up
	BadTransport  // a TCP, UDP or ICMP header that contradicts its length
	BadDHCP       // a DHCP message that cannot be read
	Spoofed       // a source address that is not the guest's

	// What the engine does not carry.
	NotCarried   // an EtherType or protocol that this mode has no way for
	NoRoute      // no way to the destination
	NoNeighbour  // the next hop's hardware address is not known yet
	TTLExpired   // the hop count ran out
	FragNeeded   // DF is set and the next link's MTU is smaller
	Policy       // refused by configuration
	NoFlow       // nothing is known of this flow and none may be made
	TableFull    // the guest's share of the flow table is used up
	NoPort       // no external port is free
	RateLimited  // more replies than the limit allows
	FragPending  // a fragment that waited too long for its first one
	FragOverflow // the memory for waiting fragments is used up

	// What the receiver could not take.
	NoBuffer     // the guest's rx ring has no room
	QueueStopped // the ring is disabled, stopped or broken
	SendFailed   // the host refused the frame
	BatchFull    // no room left for a reply in the batch
	PortGone     // the port was detached

	// What a switch does not pass on.
	BadSource // a source address that is zero, a group's, or our own link's
	WrongVLAN // of a VLAN that the port is not a member of, or without a tag where one is needed
	SamePort  // the destination is where the frame comes from
	LinkLocal // for the next bridge only (IEEE 802.1Q, table 8-1)
	Storm     // the port's share of frames for many is used up

	// BadIPv6 is an IPv6 header, or one behind it, that contradicts itself.
	BadIPv6

	// What a link with one hardware address does not carry.
	ForeignMAC // for another address than the link's

	NumReasons // how many there are
)

var reasonNames = [NumReasons]string{
	"none", "bad_descriptor", "short_frame", "oversize_frame", "bad_offload", "bad_ipv4", "bad_checksum",
	"bad_transport", "bad_dhcp", "spoofed", "not_carried", "no_route", "no_neighbour", "ttl_expired",
	"frag_needed", "policy", "no_flow", "table_full", "no_port", "rate_limited", "frag_pending",
	"frag_overflow", "no_buffer", "queue_stopped", "send_failed", "batch_full", "port_gone",
	"bad_source", "wrong_vlan", "same_port", "link_local", "storm",
	"bad_ipv6", "foreign_mac",
}

// String returns the name under which the reason is counted.
func (r DropReason) String() string {
	if r < NumReasons {
		return reasonNames[r]
	}
	return "unknown"
}
