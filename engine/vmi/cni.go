package vmi

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"sort"
	"strings"
	"unicode"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
)

// Theory of operation: a CNI configuration is JSON inside a text of a YAML document, as is that of the macvtap device
// plugin. It is turned into the nodes that
// the YAML of the same content would have, each with its line in the file, so that one decoder serves both and a fault
// names the line that has to be mended, whatever way the text is quoted.

// jsonText is the JSON of a configuration and its place in the file.
type jsonText struct {
	d        *decoder
	json     []byte // sound
	inserted []int  // places in json of commas that the text does not have
	before   int    // of inserted, those before the value that was read last
	places   placer
}

// bytesPerNode is how much of a text is read at the price of a node: a long one that many aliases stand for would be
// read at that of one node each time.
const bytesPerNode = 64

// jsonNode reads the JSON that a text holds. It returns nil after a fault, or where there is no text.
func (d *decoder) jsonNode(n *yaml.Node, path string) (root *yaml.Node, config []byte) {
	text := d.text(n, path)
	if strings.TrimSpace(text) == "" {
		return nil, nil
	}
	n = d.resolve(n)
	if n == nil {
		return nil, nil
	}
	if d.budget -= len(text) / bytesPerNode; d.budget < 0 {
		return nil, nil
	}
	t := jsonText{d: d, places: d.placer(n)}
	var slips []slip
	t.json, t.inserted, slips = mendJSON([]byte(text))
	if err := json.Unmarshal(t.json, new(json.RawMessage)); err != nil {
		offset := len(text)
		if s := new(json.SyntaxError); errors.As(err, &s) {
			offset = min(max(t.unmended(int(s.Offset)-1), 0), len(text))
		}
		line, col := t.first(offset)
		d.fault(&yaml.Node{Line: line}, path, "not JSON at line %d, column %d: %v", line, col, err)
		return nil, nil
	}
	for i, s := range slips {
		if i == maxSlips {
			d.warn(n, path, "%d more commas are missing or too many", len(slips)-maxSlips)
			break
		}
		line, col := t.first(s.at)
		d.warn(&yaml.Node{Line: line}, path, s.meant(), line, col)
	}
	dec := json.NewDecoder(bytes.NewReader(t.json))
	dec.UseNumber()
	root, err := t.node(dec, 0)
	if err != nil {
		d.fault(n, path, "not the JSON of a configuration: %v", err)
		return nil, nil
	}
	return root, t.json
}

// unmended is the place in the text of one in the mended JSON.
func (t *jsonText) unmended(offset int) int {
	return offset - sort.SearchInts(t.inserted, offset)
}

var errTooDeep = errors.New("nested too deep")

// node reads one value.
func (t *jsonText) node(dec *json.Decoder, depth int) (*yaml.Node, error) {
	if depth > maxDepth {
		return nil, errTooDeep
	}
	if t.d.budget--; t.d.budget < 0 {
		return nil, errors.New("too long")
	}
	n := &yaml.Node{}
	n.Line, n.Column = t.where(dec.InputOffset())
	tok, err := dec.Token()
	if err != nil {
		return nil, err
	}
	switch v := tok.(type) {
	case json.Delim:
		n.Kind = yaml.SequenceNode
		if v == '{' {
			n.Kind = yaml.MappingNode
		}
		for dec.More() {
			c, err := t.node(dec, depth+1) // of a mapping the keys too
			if err != nil {
				return nil, err
			}
			n.Content = append(n.Content, c)
		}
		if _, err := dec.Token(); err != nil && !errors.Is(err, io.EOF) {
			return nil, err
		}
	case string:
		n.Kind, n.Tag, n.Value, n.Style = yaml.ScalarNode, "!!str", v, yaml.DoubleQuotedStyle
	case json.Number:
		n.Kind, n.Tag, n.Value = yaml.ScalarNode, "!!float", v.String()
		if !strings.ContainsAny(n.Value, ".eE") {
			n.Tag = "!!int"
		}
	case bool:
		n.Kind, n.Tag, n.Value = yaml.ScalarNode, "!!bool", fmt.Sprint(v)
	default:
		n.Kind, n.Tag, n.Value = yaml.ScalarNode, "!!null", "null"
	}
	return n, nil
}

// where is the place in the file of the value that follows an offset in the JSON. Offsets do not go back from one call
// to the next.
func (t *jsonText) where(offset int64) (line, col int) {
	i := int(offset)
	for i < len(t.json) && strings.IndexByte(" \t\r\n,:", t.json[i]) >= 0 {
		i++
	}
	for t.before < len(t.inserted) && t.inserted[t.before] < i {
		t.before++
	}
	return t.places.place(i - t.before)
}

// first is the place in the file of an offset in the text, whatever is asked for next.
func (t *jsonText) first(offset int) (line, col int) {
	p := t.places
	return p.place(offset)
}

// placer tells where the bytes of a text stand in the file. It goes on from the last one that was asked for, so that
// all of a text together cost one walk. The text of the node and the file differ in white space and escapes only, so
// what is neither is counted in both.
type placer struct {
	n      *yaml.Node // the text
	offset int        // in the text, that was asked for last
	w      rawWalk    // in the file
	ahead  int        // characters from w to offset that are not white space
}

// placer makes one for a text of the file.
func (d *decoder) placer(n *yaml.Node) placer {
	w := d.seek(n.Line, n.Column)
	switch {
	case n.Style&(yaml.LiteralStyle|yaml.FoldedStyle) != 0:
		for w.line == n.Line && w.next() {
		}
	case n.Style&yaml.SingleQuotedStyle != 0:
		w.quote = '\''
	case n.Style&yaml.DoubleQuotedStyle != 0:
		w.quote = '"'
	}
	for q := w.quote; q != 0 && w.more() && w.raw[w.at] != q && w.next(); {
	}
	if w.quote != 0 {
		w.next()
	}
	return placer{n: n, w: w}
}

// place is the line and the column, from 1, at which the byte at an offset of the text stands in the file. The offset
// is not before the last one.
func (p *placer) place(offset int) (line, col int) {
	offset = min(offset, len(p.n.Value))
	for _, r := range p.n.Value[p.offset:offset] {
		if !unicode.IsSpace(r) {
			p.ahead++
		}
	}
	p.offset = offset
	at := p.w
	for p.w.more() {
		at = p.w
		if p.w.solid() {
			if p.ahead == 0 {
				break
			}
			p.ahead--
		}
	}
	p.w = at // it has not been passed: it may be asked for again
	return max(at.line, p.n.Line), max(at.col, 1)
}

// markEvery is how many bytes of a file one of its marks is for.
const markEvery = 4 << 10

// seek goes to a line and a column, from 1, of the file.
func (d *decoder) seek(line, col int) rawWalk {
	if d.marks == nil {
		w := rawWalk{raw: d.raw, line: 1, col: 1}
		d.marks = append(d.marks, w)
		for next := markEvery; w.next(); {
			if w.at >= next {
				d.marks = append(d.marks, w)
				next += markEvery
			}
		}
	}
	behind := sort.Search(len(d.marks), func(i int) bool {
		m := &d.marks[i]
		return m.line > line || m.line == line && m.col > col
	})
	w := d.marks[max(behind-1, 0)]
	for w.line < line && w.next() {
	}
	for w.line == line && w.col < col && w.next() {
	}
	return w
}

// rawWalk goes through a file's bytes.
type rawWalk struct {
	raw       []byte
	at        int
	line, col int
	quote     byte // of the text that it is in, 0 outside of quotes
}

func (w *rawWalk) more() bool { return w.at < len(w.raw) }

// next passes one character.
func (w *rawWalk) next() bool {
	if !w.more() {
		return false
	}
	_, size := utf8.DecodeRune(w.raw[w.at:])
	w.col++
	if w.raw[w.at] == '\n' {
		w.line, w.col = w.line+1, 1
	}
	w.at += size
	return true
}

// solid passes one character of the text, however it is written, and says whether it is more than white space.
func (w *rawWalk) solid() bool {
	r, _ := utf8.DecodeRune(w.raw[w.at:])
	w.next()
	switch {
	case w.quote == '\'' && r == '\'':
		w.next() // a quote is written twice
	case w.quote == '"' && r == '\\' && w.more():
		c := w.raw[w.at]
		w.next()
		for n := map[byte]int{'x': 2, 'u': 4, 'U': 8}[c]; n > 0; n-- {
			w.next()
		}
		return strings.IndexByte("nrtvf \tNLP_\n\r", c) < 0
	}
	return !unicode.IsSpace(r)
}

// slip is a comma that is wrong, at a byte of the text.
type slip struct {
	missing bool // before that byte; else it is one too many
	at      int
}

// meant is what the slip is read as, with the line and the column to be put in.
func (s slip) meant() string {
	if s.missing {
		return "JSON with a comma missing at line %d, column %d: read as if it were there, but a cluster refuses it; put it in"
	}
	return "JSON with a comma too many at line %d, column %d: read as if it were not there, but a cluster refuses it; take it out"
}

// maxSlips is how many slips of one text are named.
const maxSlips = 8

// mendJSON corrects the two slips that the examples of CNI configurations and of the macvtap device plugin have: no
// comma between two members of an object (put in, at the places that inserted tells), and one after the last member or
// element (made a space). Nothing else is guessed at; sound JSON comes back as it is.
func mendJSON(in []byte) (out []byte, inserted []int, slips []slip) {
	if json.Valid(in) {
		return in, nil, nil
	}
	type container struct {
		object bool
		colon  bool // of an object: the colon of the member that is being read has come
	}
	var within []container
	top := new(container)
	out = make([]byte, 0, len(in)+8)
	value := false // a value or key has just ended, and nothing has followed
	comma := -1    // place in in of a comma after one that nothing has followed yet
	for i := 0; i < len(in); i++ {
		c := in[i]
		switch c {
		case ' ', '\t', '\r', '\n':
			out = append(out, c)
			continue
		case ',':
			if comma = -1; value {
				comma = i
			}
			out, value, top.colon = append(out, c), false, false
			continue
		case ':':
			out, value, top.colon = append(out, c), false, true
		case '}', ']':
			if comma >= 0 {
				slips = append(slips, slip{at: comma})
				out[comma+len(inserted)] = ' '
			}
			out, value = append(out, c), true
			if top = new(container); len(within) > 0 {
				within = within[:len(within)-1]
			}
			if len(within) > 0 {
				top = &within[len(within)-1]
			}
		default:
			end := tokenEnd(in, i)
			if value && top.object && top.colon && c == '"' {
				slips = append(slips, slip{missing: true, at: i})
				inserted = append(inserted, len(out))
				out = append(out, ',')
				top.colon = false
			}
			out = append(out, in[i:end]...)
			if value = c != '{' && c != '['; !value {
				within = append(within, container{object: c == '{'})
				top = &within[len(within)-1]
			}
			i = end - 1
		}
		comma = -1
	}
	return out, slices.Clip(inserted), slips
}

// tokenEnd returns the end of the string, the number, the word or the bracket that starts at i.
func tokenEnd(in []byte, i int) int {
	switch in[i] {
	case '{', '[':
		return i + 1
	case '"':
		for j := i + 1; j < len(in); j++ {
			switch in[j] {
			case '\\':
				j++
			case '"':
				return j + 1
			}
		}
		return len(in)
	}
	for j := i + 1; j < len(in); j++ {
		if strings.IndexByte(" \t\r\n,:{}[]\"", in[j]) >= 0 {
			return j
		}
	}
	return len(in)
}
