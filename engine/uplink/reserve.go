package uplink

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"
)

// Files below /proc/sys/net belong to the namespace of the thread that opens
// them.
const (
	reservedPorts  = "/proc/sys/net/ipv4/ip_local_reserved_ports"
	localPortRange = "/proc/sys/net/ipv4/ip_local_port_range"
)

// commentMax is how much of the saved value one rule's comment carries.
const commentMax = 100

// portMap is a set of ports.
type portMap [65536 / 64]uint64

func (m *portMap) has(p int) bool { return m[p/64]>>(p%64)&1 != 0 }

func (m *portMap) set(lo, hi int) {
	for p := lo; p <= hi; p++ {
		m[p/64] |= 1 << (p % 64)
	}
}

// parsePorts reads the kernel's list of ports, such as "80,8000-8080".
func parsePorts(s string) (*portMap, error) {
	m := new(portMap)
	for part := range strings.SplitSeq(strings.TrimSpace(s), ",") {
		if part == "" {
			continue
		}
		lo, hi, ranged := strings.Cut(part, "-")
		if !ranged {
			hi = lo
		}
		a, err := strconv.ParseUint(lo, 10, 16)
		b, err2 := strconv.ParseUint(hi, 10, 16)
		if err := errors.Join(err, err2); err != nil {
			return nil, fmt.Errorf("list of ports %q: %w", s, err)
		}
		m.set(int(a), int(b))
	}
	return m, nil
}

// String writes the list as the kernel does.
func (m *portMap) String() string {
	var parts []string
	for p := 0; p < 65536; p++ {
		if !m.has(p) {
			continue
		}
		lo := p
		for p < 65535 && m.has(p+1) {
			p++
		}
		if lo == p {
			parts = append(parts, strconv.Itoa(lo))
		} else {
			parts = append(parts, fmt.Sprintf("%d-%d", lo, p))
		}
	}
	return strings.Join(parts, ",")
}

// reserve keeps the pod's kernel out of the NAT range. What there was before is
// noted first, so that a crash at any point leaves enough to put it back.
func (p *Pod) reserve() error {
	now, err := readPorts()
	if err != nil {
		return err
	}
	if p.kernel, err = readKernelRange(); err != nil {
		return err
	}
	note, err := savedNote(p.c.Link)
	if err != nil {
		return err
	}
	if note == "" {
		if err := p.save(now); err != nil {
			return err
		}
	}
	want := *now
	want.set(int(p.c.NAT.Lo), int(p.c.NAT.Hi))
	err = os.WriteFile(reservedPorts, []byte(want.String()), 0)
	switch {
	case err == nil:
		p.kernel = p.kernel.without(p.c.NAT)
	case p.evade():
		p.Warnings = append(p.Warnings, fmt.Sprintf("cannot reserve ports from the pod's kernel (%v): external ports are %d-%d instead",
			err, p.c.NAT.Lo, p.c.NAT.Hi))
	default:
		return fmt.Errorf("reserve ports: %w", err)
	}
	return nil
}

// evade chooses a NAT range that the kernel does not use by itself, for
// containers whose /proc/sys is read-only.
func (p *Pod) evade() bool {
	const enough = 4096
	lo, hi := int(p.kernel.Lo), int(p.kernel.Hi)
	switch {
	case 65535-hi >= enough:
		p.c.NAT = PortRange{uint16(hi + 1), 65535}
	case lo-1024 >= enough:
		p.c.NAT = PortRange{1024, uint16(lo - 1)}
	default:
		return false
	}
	return true
}

// readKernelRange reads which ports the namespace's kernel chooses from.
func readKernelRange() (r PortRange, err error) {
	b, err := os.ReadFile(localPortRange)
	if err != nil {
		return r, fmt.Errorf("local port range: %w", err)
	}
	if _, err := fmt.Sscan(string(b), &r.Lo, &r.Hi); err != nil {
		return r, fmt.Errorf("local port range %q: %w", b, err)
	}
	return r, nil
}

// without takes the ports of o from an end of r. Where o is in the middle, r
// stays as it is.
func (r PortRange) without(o PortRange) PortRange {
	switch {
	case o.Lo > r.Hi || o.Hi < r.Lo:
	case o.Lo <= r.Lo && o.Hi >= r.Hi:
		return PortRange{1, 0}
	case o.Lo <= r.Lo:
		r.Lo = o.Hi + 1
	case o.Hi >= r.Hi:
		r.Hi = o.Lo - 1
	}
	return r
}

func readPorts() (*portMap, error) {
	f, err := os.Open(reservedPorts)
	if err != nil {
		return nil, fmt.Errorf("reserved ports: %w", err)
	}
	defer f.Close()
	// The kernel gives as much as fits into one read, and then nothing more.
	b := make([]byte, 6*65536)
	n, err := f.Read(b)
	if err != nil && err != io.EOF {
		return nil, fmt.Errorf("reserved ports: %w", err)
	}
	return parsePorts(string(b[:n]))
}

// save writes the value down where it outlives the process: in rules that are
// never passed.
func (p *Pod) save(m *portMap) error {
	r := &rules{family: nftables.TableFamilyNetdev, table: tableName(p.c.Link)}
	rest := fmt.Sprintf("reserved %d-%d of %s", p.c.NAT.Lo, p.c.NAT.Hi, m)
	for rest != "" {
		n := min(len(rest), commentMax)
		r.addNoted(savedChain, rest[:n], accept())
		rest = rest[n:]
	}
	if err := r.commit(); err != nil {
		return nftError(err)
	}
	return nil
}

// savedNote returns what was written down for a link.
func savedNote(link string) (string, error) {
	c, err := nftables.New()
	if err != nil {
		return "", fmt.Errorf("nftables: %w", err)
	}
	tables, err := c.ListTablesOfFamily(nftables.TableFamilyNetdev)
	if err != nil {
		return "", nftError(err)
	}
	for _, t := range tables {
		if t.Name != tableName(link) {
			continue
		}
		rs, err := c.GetRules(t, &nftables.Chain{Name: savedChain, Table: t})
		if errors.Is(err, unix.ENOENT) {
			return "", nil // a table without the chain: nothing was changed yet
		}
		if err != nil {
			return "", nftError(err)
		}
		note := ""
		for _, r := range rs {
			s, _ := userdata.GetString(r.UserData, userdata.TypeComment)
			note += s
		}
		return note, nil
	}
	return "", nil
}

// unreserve takes out of the reserved ports what a run put there and was not
// there before; what others changed meanwhile stays.
func unreserve(link string) error {
	note, err := savedNote(link)
	if err != nil || note == "" {
		return err
	}
	ours, list, _ := strings.Cut(strings.TrimPrefix(note, "reserved "), " of ")
	before, err := parsePorts(list)
	if err != nil {
		return err
	}
	mine, err := parsePorts(ours)
	if err != nil {
		return err
	}
	now, err := readPorts()
	if err != nil {
		return err
	}
	changed := false
	for i := range now {
		keep := now[i] &^ (mine[i] &^ before[i])
		changed = changed || keep != now[i]
		now[i] = keep
	}
	if !changed {
		return nil
	}
	if err := os.WriteFile(reservedPorts, []byte(now.String()+"\n"), 0); err != nil {
		return fmt.Errorf("reserved ports: %w", err)
	}
	return nil
}

// cleanup puts back what a run changed outside its own links, which end with
// it. While the ports cannot be given back, the note of them stays.
func cleanup(link string) error {
	if err := unreserve(link); err != nil {
		return errors.Join(err, emptyTables(link))
	}
	return deleteTables(link)
}
