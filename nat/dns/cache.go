package dns

import (
	"container/list"
	"encoding/binary"
	"math"
	"sync"
	"time"
)

// The cache keeps answers of resolvers as they are, each for exactly the query
// that it is the answer to: name, type and class, all flags, and EDNS with its
// flags. Queries with EDNS options, with records or with bytes behind their end
// pass it by, and so do answers that are truncated, signed, failures or longer
// than maxKept. What is kept is bounded by number and by bytes; what was
// asked for longest ago gives way. Time is looked at when somebody asks: nothing runs in
// between.

const (
	maxKept      = 4 << 10 // bytes of an answer
	maxCacheSize = 4 << 20 // bytes of all that is kept
	keptOverhead = 256     // bytes of an entry beside its slices, about

	maxLife         = 24 * time.Hour
	maxNegativeLife = 3 * time.Hour // RFC 2308 section 5
)

// MaxCache is the largest Config.Cache.
const MaxCache = 1 << 16

type cache struct {
	entries int // at most
	now     func() time.Time

	mu    sync.Mutex // guards everything below
	byKey map[string]*list.Element
	used  list.List // of *kept, the latest first
	size  int
	// generation counts the changes of resolvers: what the old ones say late is
	// not kept.
	generation uint64
}

// kept is an answer.
type kept struct {
	key    string
	msg    []byte
	ttls   []uint16 // where they are in msg
	stored time.Time
	life   time.Duration
}

func (k *kept) size() int { return len(k.key) + len(k.msg) + 2*len(k.ttls) + keptOverhead }

func newCache(entries int, now func() time.Time) *cache {
	return &cache{entries: entries, now: now, byKey: map[string]*list.Element{}}
}

// cacheKey appends to dst what an answer depends on, and says how long it may be
// over UDP. It is empty if the answer may not be kept, or come from here.
func cacheKey(dst, query []byte, name, end int) (key []byte, limit int) {
	if qdcount(query) != 1 || flags(query)&maskOpcode != 0 || binary.BigEndian.Uint32(query[6:]) != 0 {
		return dst[:0], 0
	}
	typ, class := binary.BigEndian.Uint16(query[name:]), binary.BigEndian.Uint16(query[name+2:])
	if typ == typeOPT || typ >= 128 && typ <= 255 || class == 0 || class >= 254 { // RFC 6895 section 3.1
		return dst[:0], 0
	}
	key, ok := appendLower(dst[:0], query[headerLen:name])
	if !ok {
		return dst[:0], 0
	}
	key = append(append(key, query[name:end]...), query[2:4]...)
	opt := query[end:]
	switch additional := binary.BigEndian.Uint16(query[10:]); {
	case additional == 0 && len(opt) == 0:
		return key, minSize
	case additional == 1 && len(opt) == 11 && opt[0] == 0 && binary.BigEndian.Uint16(opt[1:]) == typeOPT &&
		opt[6] == 0 && opt[9] == 0 && opt[10] == 0: // version 0 and no options (RFC 6891 section 6.1)
		return append(key, opt[5:9]...), max(int(binary.BigEndian.Uint16(opt[3:])), minSize)
	}
	return dst[:0], 0
}

// get appends the answer to a query to dst, if there is one that is not longer
// than limit.
func (c *cache) get(dst, key, query []byte, name, limit int) ([]byte, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	el := c.byKey[string(key)]
	if el == nil {
		return dst, false
	}
	k := el.Value.(*kept)
	age := c.now().Sub(k.stored)
	if age < 0 || age >= k.life {
		c.drop(el)
		return dst, false
	}
	if len(k.msg) > limit {
		return dst, false // the resolver truncates it, as it sees fit
	}
	c.used.MoveToFront(el)
	at := len(dst)
	dst = append(dst, k.msg...)
	msg := dst[at:]
	copy(msg[:2], query)
	copy(msg[headerLen:name], query[headerLen:name]) // in its own letters
	for _, at := range k.ttls {
		ttl := binary.BigEndian.Uint32(msg[at:])
		binary.BigEndian.PutUint32(msg[at:], ttl-uint32(age/time.Second))
	}
	return dst, true
}

// current is the generation of what is asked for now.
func (c *cache) current() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.generation
}

// put keeps a copy of the answer to a query whose question ends at end, if it
// may.
func (c *cache) put(key, answer []byte, name, end int, generation uint64) {
	if len(answer) > maxKept {
		return
	}
	k := &kept{msg: answer}
	if k.life = k.read(name, end); k.life == 0 {
		return
	}
	k.key, k.msg = string(key), append([]byte(nil), answer...)
	k.msg[2] &^= flagAA >> 8 // it is not the authority's word any more
	c.mu.Lock()
	defer c.mu.Unlock()
	if generation != c.generation {
		return
	}
	if el := c.byKey[k.key]; el != nil {
		c.drop(el)
	}
	k.stored = c.now()
	c.byKey[k.key] = c.used.PushFront(k)
	c.size += k.size()
	for len(c.byKey) > c.entries || c.size > maxCacheSize {
		c.drop(c.used.Back())
	}
}

// drop forgets an entry. The caller holds c.mu.
func (c *cache) drop(el *list.Element) {
	k := c.used.Remove(el).(*kept)
	delete(c.byKey, k.key)
	c.size -= k.size()
}

// flush forgets everything, and what is being asked for too.
func (c *cache) flush() {
	c.mu.Lock()
	defer c.mu.Unlock()
	clear(c.byKey)
	c.used.Init()
	c.size = 0
	c.generation++
}

// length returns the number of entries, and the bytes that they take.
func (c *cache) length() (entries, size int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.byKey), c.size
}

// read finds the TTLs of an answer and returns how long it may be kept, 0 if
// not at all. An answer without data is kept as long as its SOA says (RFC 2308
// section 5).
func (k *kept) read(name, end int) time.Duration {
	msg := k.msg
	rcode := flags(msg) & maskRcode
	if flags(msg)&flagTC != 0 || rcode != 0 && rcode != rcodeNXDomain || qdcount(msg) != 1 {
		return 0
	}
	typ := binary.BigEndian.Uint16(msg[name:])
	least, denied, positive := uint32(math.MaxUint32), false, false
	at := end
	for section := range 3 {
		for range binary.BigEndian.Uint16(msg[6+2*section:]) {
			var r record
			var ok bool
			if r, at, ok = readRecord(msg, at); !ok {
				return 0
			}
			switch {
			case r.typ == typeOPT:
				if r.ttl>>24 != 0 { // the rest of the rcode
					return 0
				}
				continue
			case r.typ == typeTSIG, r.typ == typeSIG:
				return 0
			case section == 0 && r.typ == typ:
				positive = true
			case section == 1 && r.typ == typeSOA && r.rdlen >= 22:
				denied = true
				least = min(least, binary.BigEndian.Uint32(msg[at-4:]))
			}
			if int32(r.ttl) < 0 { // RFC 2181 section 8
				return 0
			}
			least = min(least, r.ttl)
			k.ttls = append(k.ttls, uint16(r.ttlAt))
		}
	}
	life := min(time.Duration(least)*time.Second, maxLife)
	switch {
	case at != len(msg):
		return 0
	case rcode == 0 && positive:
		return life
	case denied:
		return min(life, maxNegativeLife)
	}
	return 0
}
