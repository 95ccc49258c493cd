package vmi

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// The two slips of the guide are mended, and nothing else.
func TestMendJSON(t *testing.T) {
	for _, c := range []struct {
		in, out  string
		inserted []int
		slips    []slip
	}{
		{`{"a": 1}`, `{"a": 1}`, nil, nil},
		{`{"a": "x" "b": [1, 2, 3,],}`, `{"a": "x" ,"b": [1, 2, 3 ] }`, []int{10}, []slip{{true, 10}, {false, 23}, {false, 25}}},
		{`[ {"n": "{,}"}, ]`, `[ {"n": "{,}"}  ]`, nil, []slip{{false, 14}}},
		{`{"a": {"b": []} "c": {} "d": "\"" "e": -1}`, `{"a": {"b": []} ,"c": {} ,"d": "\"" ,"e": -1}`, []int{16, 25, 36}, []slip{{true, 16}, {true, 24}, {true, 34}}},
	} {
		out, inserted, slips := mendJSON([]byte(c.in))
		assert.Equal(t, c.out, string(out))
		assert.Equal(t, c.inserted, inserted)
		assert.Equal(t, c.slips, slips)
		assert.True(t, json.Valid(out), c.in)
	}
	for _, in := range []string{
		`[,]`, `{,}`, `[1,,]`, `{"a": 1,,}`, `[1 2]`, `["a" "b"]`, `[{} {}]`, `{"a" 1}`, `{"a" "b"}`, `{"a": 1 2}`, `{"a": 1 "b"}`, `{"a": 1 b: 2}`, `{"a": 1; "b": 2}`,
		`{"a": "x`, `}{`, `{} {}`, `{},`, `,{}`, `{"a":,}`, `{"a",}`, `{'a': 1}`, `[1,}`, `{"a": 1,`, `{"a": tru}`, ``, `// x`, `{"a": 1, // x`,
	} {
		out, _, _ := mendJSON([]byte(in))
		assert.False(t, json.Valid(out), in)
	}
}

// What is wrong beside a slip is what is said, where it stands.
func TestOtherSlips(t *testing.T) {
	for config, want := range map[string]string{
		"{\n \"type\": \"bridge\"\n \"bridge\" \"b\"\n}": "not JSON at line 6, column 11: invalid character '\"' after object key",
		"{\n \"type\": \"bridge\",,\n}":                  "not JSON at line 5, column 19: invalid character ',' looking for beginning of object key string",
		"{\n 'type': \"bridge\"\n}":                      "not JSON at line 5, column 2: invalid character '\\'' looking for beginning of object key string",
		"{\n \"a\": [1\n  2]\n}":                         "not JSON at line 6, column 3: invalid character '2' after array element",
		"{\n \"a\": [,]\n}":                              "not JSON at line 5, column 8: invalid character ',' looking for beginning of value",
	} {
		docs, err := Parse("n.yaml", []byte("kind: NetworkAttachmentDefinition\nmetadata: {name: n}\nspec:\n  config: '"+strings.ReplaceAll(config, "'", "''")+"'\n"))
		require.NoError(t, err)
		faults := Validate(docs, Options{})
		require.Len(t, faults, 1, config)
		assert.Equal(t, "spec.config: "+want, faults[0].String())
	}
	_, faults := parseNAD(t, `{"type": "bridge" "x-": 1 "mtu": 1500,}`)
	assert.Len(t, faults, 4, "each slip, and the field")
	_, faults = parseNAD(t, `{"type": "bridge"`+strings.Repeat(` "mtu": 1500`, 20)+`}`)
	assert.Contains(t, faults[maxSlips], "12 more commas are missing or too many")
}

// FuzzMendJSON: a mend changes nothing but commas, each is a slip, and what stands in documents beside a VMI ends in
// faults of one line, whatever it is.
func FuzzMendJSON(f *testing.F) {
	for _, s := range []string{`{"a": "x" "b": [1, 2, 3,],}`, `[{"name": "dataplane", "master": "eth0",},]`, `{"type": "macvtap" "mtu": 1500}`, `[,]`, `}{`, `{"a":{"b":1 "c"`, `"\`, ``,
		`{"type": "sriov", "vlan": 1e9, "ipam": {"type": 1}}`, strings.Repeat(`{"a":[`, 200), `{"plugins": [{"type": "sriov"}, {"type": "tuning", "mtu": -1}]}`} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, in string) {
		out, inserted, slips := mendJSON([]byte(in))
		require.Len(t, out, len(in)+len(inserted))
		if json.Valid([]byte(in)) {
			require.Equal(t, in, string(out))
			require.Empty(t, slips)
		}
		missing := 0
		for _, s := range slips {
			if s.missing {
				missing++
			} else {
				require.Equal(t, byte(','), in[s.at])
			}
		}
		require.Len(t, inserted, missing)
		back := append([]byte(nil), out...)
		for i := len(inserted) - 1; i >= 0; i-- {
			require.Equal(t, byte(','), back[inserted[i]])
			back = append(back[:inserted[i]], back[inserted[i]+1:]...)
		}
		for _, s := range slips {
			if !s.missing {
				back[s.at] = ','
			}
		}
		require.Equal(t, in, string(back))

		text, err := json.Marshal(in)
		require.NoError(t, err)
		docs, err := Parse("f.yaml", fmt.Appendf(nil, `{"kind": "List", "items": [{"kind": "ConfigMap", "data": {"DP_MACVTAP_CONF": %[1]s}}, `+
			`{"kind": "NetworkAttachmentDefinition", "metadata": {"name": "n"}, "spec": {"config": %[1]s}}, `+
			`{"kind": "SriovNetwork", "metadata": {"name": "s"}, "spec": {"resourceName": "r", "ipam": %[1]s}}]}`, text))
		if err != nil {
			return
		}
		for _, f := range Validate(docs, Options{}) {
			require.NotContains(t, f.String(), "\n")
		}
		for _, p := range docs.MacvtapPools {
			require.True(t, linkable(p.LowerDevice))
			require.Positive(t, p.Capacity)
		}
	})
}
