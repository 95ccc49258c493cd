package oracle

import (
	"encoding/json"
	"fmt"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	kv "kubevirt.io/api/core/v1"
	poolv1 "kubevirt.io/api/pool/v1beta1"
)

const namesFile = "../fields.txt"

// roots are the documents whose field names engine/vmi knows.
var roots = []any{kv.VirtualMachineInstance{}, kv.VirtualMachine{}, kv.VirtualMachineInstanceReplicaSet{}, poolv1.VirtualMachinePool{}, kv.KubeVirt{}}

// namer numbers the struct types that can be reached from the roots.
type namer struct {
	number map[reflect.Type]int
	types  []reflect.Type
}

// TestFieldNames keeps the file of names as the API has them: a line for each type, its fields in order, and after a
// field whose value has fields itself the number of its type. The first lines are the roots.
func TestFieldNames(t *testing.T) {
	n := namer{number: map[reflect.Type]int{}}
	for _, r := range roots {
		n.add(reflect.TypeOf(r))
	}
	var out strings.Builder
	for i := 0; i < len(n.types); i++ {
		fmt.Fprintln(&out, strings.Join(n.line(n.types[i]), " "))
	}
	if *update {
		require.NoError(t, os.WriteFile(namesFile, []byte(out.String()), 0o644))
	}
	stored, err := os.ReadFile(namesFile)
	require.NoError(t, err)
	assert.Equal(t, out.String(), string(stored))
	t.Logf("%d types, %d bytes", len(n.types), out.Len())
}

func (n *namer) add(t reflect.Type) int {
	if _, ok := n.number[t]; !ok {
		n.number[t] = len(n.types)
		n.types = append(n.types, t)
	}
	return n.number[t]
}

func (n *namer) line(t reflect.Type) []string {
	fields := map[string]string{}
	n.fields(t, fields)
	var out []string
	for name, kind := range fields {
		out = append(out, name+kind)
	}
	slices.Sort(out)
	return out
}

func (n *namer) fields(t reflect.Type, out map[string]string) {
	for i := range t.NumField() {
		f := t.Field(i)
		name, options, _ := strings.Cut(f.Tag.Get("json"), ",")
		if name == "-" || !f.IsExported() && !f.Anonymous {
			continue
		}
		inner := f.Type
		for inner.Kind() == reflect.Pointer || inner.Kind() == reflect.Slice {
			inner = inner.Elem()
		}
		if name == "" && (f.Anonymous || strings.Contains(options, "inline")) {
			n.fields(inner, out)
			continue
		}
		if name == "" {
			name = f.Name
		}
		out[name] = ""
		if inner.Kind() == reflect.Struct && !opaque(inner) {
			out[name] = fmt.Sprint(":", n.add(inner))
		}
	}
}

// opaque are types that write themselves otherwise than by their fields. KubeVirt's own never do, they only tidy up.
func opaque(t reflect.Type) bool {
	marshals := reflect.PointerTo(t).Implements(reflect.TypeFor[json.Unmarshaler]())
	return marshals && !strings.HasPrefix(t.PkgPath(), "kubevirt.io/api")
}
