package vmi

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// decoder walks the YAML nodes of one file. It follows aliases and merge keys only where a field is looked at, and
// pays for every node from a budget, so that an alias bomb costs nothing. Faults are gathered, not returned: a reader
// of a spec wants to see all of them.
type decoder struct {
	file   string
	raw    []byte    // the file's content
	marks  []rawWalk // places in it, in order; nil until one is needed
	cni    bool      // in a CNI configuration: keys in any case, and unknown ones are no more than a warning
	vmi    *VMI      // whose fields are being read; nil between documents
	names  bool      // in a document of which checkNames looks at every name
	faults []Fault
	budget int
	depth  int
}

type pair struct {
	key  string
	line int
	val  *yaml.Node
}

// fields says what to do with each key of a mapping.
type fields map[string]func(n *yaml.Node, path string)

func (d *decoder) fault(n *yaml.Node, path, format string, args ...any) {
	if len(d.faults) >= maxFaults {
		return
	}
	f := Fault{Field: oneLine(path), Message: oneLine(fmt.Sprintf(format, args...)), Reason: Invalid, Severity: Error, File: d.file}
	if n != nil {
		f.Line = n.Line
	}
	d.faults = append(d.faults, f)
}

// warn notes what is served all the same.
func (d *decoder) warn(n *yaml.Node, path, format string, args ...any) {
	before := len(d.faults)
	d.fault(n, path, format, args...)
	if len(d.faults) > before {
		d.faults[before].Severity = Warning
	}
}

// resolve follows aliases; nil when there is nothing or the budget is used up.
func (d *decoder) resolve(n *yaml.Node) *yaml.Node {
	for hops := 0; n != nil && n.Kind == yaml.AliasNode; hops++ {
		if hops > maxDepth {
			return nil
		}
		n = n.Alias
	}
	if d.budget--; d.budget < 0 || n == nil {
		return nil
	}
	return n
}

func isNull(n *yaml.Node) bool {
	return n == nil || n.Kind == 0 || n.Kind == yaml.ScalarNode && n.Tag == "!!null"
}

// object reads a mapping. A key that is not in f is a fault if strict, and otherwise a warning if it is nearly one of f
// (the rest of a document has many fields that are none of our business). Null values count as absent. It returns what the
// keys that it found fault with were probably meant to be.
func (d *decoder) object(n *yaml.Node, path string, strict bool, f fields) (meant []string) {
	for _, p := range d.pairs(n, path) {
		sub := p.key
		if path != "" {
			sub = path + "." + p.key
		}
		if d.vmi != nil && len(p.key) <= maxText {
			if _, dup := d.vmi.lines[sub]; !dup {
				d.vmi.lines[sub] = p.line
			}
		}
		if read, ok := d.field(f, p.key); ok {
			if !isNull(d.resolve(p.val)) {
				read(p.val, sub)
			}
			continue
		}
		if !strict && d.names {
			continue
		}
		near := nearest(p.key, f)
		at, say := &yaml.Node{Line: p.line}, d.fault
		if d.cni || !strict {
			say = d.warn
		}
		switch {
		case near != "" && (strict || closeTo(p.key, near)):
			say(at, sub, "unknown field %q, did you mean %q?", p.key, near)
			meant = append(meant, near)
		case strict && len(f) == 0:
			say(at, sub, "unknown field %q, nothing goes in here: write {}", p.key)
		case strict:
			say(at, sub, "unknown field %q, known here are %s", p.key, strings.Join(sortedKeys(f), ", "))
		}
	}
	return meant
}

// field finds what reads a key. The plugins of CNI read their JSON with Go's library, which does not look at the case.
func (d *decoder) field(f fields, key string) (read func(*yaml.Node, string), ok bool) {
	if read, ok = f[key]; ok || !d.cni {
		return read, ok
	}
	for _, name := range sortedKeys(f) {
		if strings.EqualFold(name, key) {
			return f[name], true
		}
	}
	return nil, false
}

// pairs lists a mapping's keys and values in file order, merge keys (<<) included where nothing overrides them.
func (d *decoder) pairs(n *yaml.Node, path string) []pair {
	n = d.resolve(n)
	if isNull(n) {
		return nil
	}
	if n.Kind != yaml.MappingNode {
		d.fault(n, path, "must be a mapping (key: value), found %s", kindName(n))
		return nil
	}
	if d.depth++; d.depth > maxDepth {
		d.depth--
		d.fault(n, path, "nested too deep")
		return nil
	}
	defer func() { d.depth-- }()
	var own, merged []pair
	seen := map[string]bool{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		k, v := d.resolve(n.Content[i]), n.Content[i+1]
		if k == nil {
			break
		}
		if k.Kind != yaml.ScalarNode {
			d.fault(k, path, "a key must be a plain word, found %s", kindName(k))
			continue
		}
		if k.Tag == "!!merge" {
			merged = append(merged, d.merge(v, path)...)
			continue
		}
		if seen[k.Value] {
			d.fault(k, path, "key %q is there twice, remove one", k.Value)
			continue
		}
		seen[k.Value] = true
		own = append(own, pair{k.Value, k.Line, v})
	}
	for _, p := range merged {
		if !seen[p.key] {
			seen[p.key] = true
			own = append(own, p)
		}
	}
	return own
}

func (d *decoder) merge(n *yaml.Node, path string) []pair {
	r := d.resolve(n)
	if r == nil || r.Kind != yaml.SequenceNode {
		return d.pairs(n, path)
	}
	var out []pair
	for _, c := range r.Content {
		out = append(out, d.pairs(c, path)...)
	}
	return out
}

// list reads a sequence, at most limit elements of it, and says whether there were more.
func (d *decoder) list(n *yaml.Node, path string, limit int, each func(n *yaml.Node, path string)) (more bool) {
	n = d.resolve(n)
	if isNull(n) {
		return false
	}
	if n.Kind != yaml.SequenceNode {
		d.fault(n, path, "must be a list (lines that start with -), found %s", kindName(n))
		return false
	}
	for i, c := range n.Content {
		if i == limit {
			return true
		}
		sub := fmt.Sprintf("%s[%d]", path, i)
		if d.vmi != nil {
			d.vmi.lines[sub] = c.Line
		}
		each(c, sub)
	}
	return false
}

func (d *decoder) scalar(n *yaml.Node, path, want string) (*yaml.Node, bool) {
	n = d.resolve(n)
	if isNull(n) {
		return nil, false
	}
	if n.Kind != yaml.ScalarNode {
		d.fault(n, path, "must be %s, found %s", want, kindName(n))
		return nil, false
	}
	return n, true
}

// text reads a string. A bare y, on or off is the word that stands there, as it is in YAML 1.2.
func (d *decoder) text(n *yaml.Node, path string) string {
	n, ok := d.scalar(n, path, "a text")
	if !ok {
		return ""
	}
	if n.Style&(yaml.SingleQuotedStyle|yaml.DoubleQuotedStyle|yaml.LiteralStyle|yaml.FoldedStyle) == 0 {
		switch n.Tag {
		case "!!int", "!!float", "!!bool":
			d.fault(n, path, "must be a text, found the %s %s; put it in quotes", tagName(n), n.Value)
			return ""
		}
	}
	return n.Value
}

// quantity reads a Kubernetes quantity, which may be written as a number or as a text.
func (d *decoder) quantity(n *yaml.Node, path string) string {
	n, ok := d.scalar(n, path, "a quantity like 512Mi")
	if !ok {
		return ""
	}
	return n.Value
}

// number reads a whole number.
func (d *decoder) number(n *yaml.Node, path string) int64 {
	n, ok := d.scalar(n, path, "a whole number")
	if !ok {
		return 0
	}
	v, err := strconv.ParseInt(n.Value, 0, 64)
	if n.Tag == "!!float" { // 80.0 and 1e3 are whole
		f, ferr := strconv.ParseFloat(n.Value, 64)
		if ferr == nil && f == math.Trunc(f) && math.Abs(f) < 1<<53 {
			return int64(f)
		}
	}
	if err != nil || n.Tag != "!!int" {
		if _, plain := strconv.ParseInt(n.Value, 0, 64); plain == nil {
			d.fault(n, path, "must be a whole number, found the text %q; remove the quotes", n.Value)
		} else {
			d.fault(n, path, "must be a whole number, found %q", n.Value)
		}
		return 0
	}
	return v
}

func (d *decoder) numberPtr(n *yaml.Node, path string) *int64 {
	before := len(d.faults)
	v := d.number(n, path)
	if len(d.faults) > before {
		return nil // it has been said once
	}
	return &v
}

// boolean reads true and false, and YAML 1.1's other spellings of them, which KubeVirt's reader takes too.
func (d *decoder) boolean(n *yaml.Node, path string) bool {
	n, ok := d.scalar(n, path, "true or false")
	if !ok {
		return false
	}
	if n.Style&(yaml.SingleQuotedStyle|yaml.DoubleQuotedStyle) == 0 {
		if b, ok := oldBoolean(n.Value); ok {
			return b
		}
	}
	d.fault(n, path, "must be true or false, found %q", n.Value)
	return false
}

// oldBoolean reads a boolean as YAML 1.1 spells it, which is what KubeVirt's reader does.
func oldBoolean(s string) (value, ok bool) {
	switch s {
	case "y", "Y", "yes", "Yes", "YES", "true", "True", "TRUE", "on", "On", "ON":
		return true, true
	case "n", "N", "no", "No", "NO", "false", "False", "FALSE", "off", "Off", "OFF":
		return false, true
	}
	return false, false
}

func kindName(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "a mapping"
	case yaml.SequenceNode:
		return "a list"
	case yaml.ScalarNode:
		return fmt.Sprintf("the %s %q", tagName(n), n.Value)
	}
	return "something else"
}

func tagName(n *yaml.Node) string {
	switch n.Tag {
	case "!!int", "!!float":
		return "number"
	case "!!bool":
		return "boolean"
	}
	return "text"
}

func sortedKeys(f fields) []string {
	keys := make([]string, 0, len(f))
	for k := range f {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// nearest returns the known name that is most like key, or nothing if none is.
func nearest(key string, f fields) string {
	best, bestDist := "", max(1, len(key)/3)+1
	begins := ""
	low := strings.ToLower(key)
	for _, name := range sortedKeys(f) {
		lowName := strings.ToLower(name)
		if dist := distance(low, lowName); dist < bestDist && dist < len(name) {
			best, bestDist = name, dist
		}
		if begins == "" && len(key) >= 3 && (strings.HasPrefix(lowName, low) || strings.HasPrefix(low, lowName)) {
			begins = name
		}
	}
	if best == "" {
		return begins
	}
	return best
}

// closeTo is the stricter likeness for places where unknown fields are allowed.
func closeTo(key, name string) bool {
	return len(name) >= 6 && distance(strings.ToLower(key), strings.ToLower(name)) <= 2
}

// distance is Levenshtein's; texts that are too different in length are simply far.
func distance(a, b string) int {
	if len(a) > 64 || len(b) > 64 {
		return 64
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diag := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			diag, row[j+1] = row[j+1], min(row[j+1]+1, row[j]+1, diag+cost)
		}
	}
	return row[len(b)]
}
