package vmi

import (
	"encoding/json"
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
