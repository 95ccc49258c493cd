package virtq

// Direction says who may write to a chain's buffers.
type Direction uint8

const (
	Readable Direction = 0         // device-readable only: tx
	Writable Direction = flagWrite // device-writable only: rx
)

// Status is what became of a Pop.
type Status uint8

const (
	// Empty: there is nothing more to pop at the moment.
	Empty Status = iota
	// OK: the chain is lent to the caller until it is put.
	OK
	// Bad: only the chain's head is valid; the caller puts it with length 0.
	// LastCause tells why.
	Bad
	// NoRoom: the slices do not fit in the room given; nothing was popped. A
	// room of MaxSegs is enough for every chain.
	NoRoom
	// Broken: the ring cannot be followed any further, now or later. Err
	// tells why.
	Broken
)

var statusNames = [...]string{"empty", "ok", "bad", "no room", "broken"}

// String returns the status in words.
func (s Status) String() string { return name(statusNames[:], int(s)) }

// Cause is what is wrong with a chain.
type Cause uint8

// The causes of Bad.
const (
	NoCause        Cause = iota
	CauseLong            // a loop, or more descriptors or slices than allowed
	CauseNext            // next is not in the table
	CauseUnmapped        // a buffer is not in guest memory
	CauseLength          // longer than MaxBytes, or empty
	CauseDirection       // readable where writable was due, or in the wrong order
	CauseIndirect        // indirect not negotiated, nested, with NEXT, or of a wrong size
	CauseID              // a packed ring's buffer id is not less than the ring's size
	NumCauses
)

var causeNames = [NumCauses]string{
	"none", "chain too long", "next outside table", "buffer unmapped",
	"length", "direction", "indirect table", "buffer id",
}

// String returns the cause in words, as a counter's name.
func (c Cause) String() string { return name(causeNames[:], int(c)) }

func name(names []string, i int) string {
	if i < len(names) {
		return names[i]
	}
	return "unknown"
}
