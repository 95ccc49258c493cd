package vmi

import (
	_ "embed"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// fieldNames are the names of every field that KubeVirt's objects have: a line for each type, and after a field whose
// value has fields itself the number of its type. The module oracle writes them (make oracle UPDATE=1).
//
//go:embed fields.txt
var fieldNames string

// Types of the documents, by their lines in fieldNames.
const (
	typeVMI = iota
	typeVM
	typeReplicaSet
	typePool
	typeKubeVirt
)

const (
	maxWalk     = 100_000 // nodes looked at for unknown names in one document
	maxUnknowns = 100     // warnings in one document
)

// fieldTypes are the lines of fieldNames.
func fieldTypes() []string { return strings.Split(fieldNames, "\n") }

// nameWalk looks through a whole document for names of fields that KubeVirt does not have. A guest is served without
// them, so it says no more than a warning, and it spends a budget of its own.
type nameWalk struct {
	d        *decoder
	types    []string
	nodes    int
	unknowns int
	skip     []string // paths that are read by name anyway
	vmiSpec  int      // type that may have the fields of vmSpec too; 0 if none may
	vmSpec   int
}

// checkNames warns of unknown names in a document of a type. v is the machine that was read from it, nil for none: the
// reader has looked at the names in its interfaces and networks.
func (d *decoder) checkNames(root *yaml.Node, document int, v *VMI) {
	w := nameWalk{d: d, types: fieldTypes(), nodes: maxWalk}
	if v != nil {
		w.skip = []string{v.interfacesPath(), v.Path + ".networks"}
		if v.Path == "spec" && document != typeVMI { // the guide's VM has a VMI's spec
			w.vmiSpec, w.vmSpec = w.child(typeVMI, "spec"), w.child(document, "spec")
			document = typeVMI
		}
	}
	w.value(root, document, "", 0)
}

// child finds a field in a type: -1 for no field, 0 for one whose value has no fields that are known, else its type.
func (w *nameWalk) child(kind int, name string) int {
	for field := range strings.SplitSeq(w.types[kind], " ") {
		n, number, deeper := strings.Cut(field, ":")
		if n != name {
			continue
		}
		if !deeper {
			return 0
		}
		child, _ := strconv.Atoi(number)
		return child
	}
	if kind == w.vmiSpec && kind != 0 {
		return w.child(w.vmSpec, name)
	}
	return -1
}

func (w *nameWalk) value(n *yaml.Node, kind int, path string, depth int) {
	for n != nil && n.Kind == yaml.AliasNode && depth < maxDepth {
		n = n.Alias
		depth++
	}
	if w.nodes--; n == nil || w.nodes < 0 || depth > maxDepth || w.unknowns >= maxUnknowns || slices.Contains(w.skip, path) {
		return
	}
	switch n.Kind {
	case yaml.SequenceNode:
		for i, c := range n.Content {
			w.value(c, kind, fmt.Sprintf("%s[%d]", path, i), depth+1)
		}
	case yaml.MappingNode:
		for i := 0; i+1 < len(n.Content); i += 2 {
			if k := n.Content[i]; k.Kind == yaml.ScalarNode && k.Tag == "!!merge" {
				w.value(n.Content[i+1], kind, path, depth+1)
			} else if k.Kind == yaml.ScalarNode && len(k.Value) <= maxText {
				w.field(n, k, n.Content[i+1], kind, path, depth)
			}
		}
	}
}

func (w *nameWalk) field(in, k, value *yaml.Node, kind int, path string, depth int) {
	at := k.Value
	if path != "" {
		at = path + "." + k.Value
	}
	switch child := w.child(kind, k.Value); child {
	case -1:
		w.unknowns++
		w.d.warn(k, at, "unknown field %q%s", k.Value, w.meant(in, k.Value, kind))
	case 0:
	default:
		w.value(value, child, at, depth+1)
	}
}

// meant is what an unknown name was probably meant to be: a field of the type with a name like it, or one of a field's
// that stands beside it.
func (w *nameWalk) meant(in *yaml.Node, name string, kind int) string {
	names, below := fields{}, ""
	for field := range strings.SplitSeq(w.types[kind], " ") {
		n, number, deeper := strings.Cut(field, ":")
		names[n] = nil
		child, _ := strconv.Atoi(number)
		if deeper && below == "" && w.child(child, name) >= 0 && slices.ContainsFunc(in.Content, func(k *yaml.Node) bool { return k.Value == n }) {
			below = n
		}
	}
	if below != "" {
		return fmt.Sprintf(", it belongs below %q", below)
	}
	if near := nearest(name, names); near != "" {
		return fmt.Sprintf(", did you mean %q?", near)
	}
	return ""
}
