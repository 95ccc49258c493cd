package vmi

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func write(t *testing.T, name, text string) string {
	t.Helper()
	p := filepath.Join(t.TempDir(), name)
	require.NoError(t, os.WriteFile(p, []byte(text), 0o600))
	return p
}

func TestLoadErrors(t *testing.T) {
	for _, c := range []struct{ name, text, want string }{
		{"syntax", "kind: VM\nspec:\n  a: [1,\n", ":3: did not find expected node content"},
		{"tab", "kind: VM\nspec:\n\ta: b\n", ":3: found character that cannot start any token"},
		{"scalar", "hello", ":1: a document must be a mapping with kind and spec, found the text \"hello\""},
		{"list", "---\nkind: VM\n---\n- a\n", ":4: a document must be a mapping with kind and spec, found a list"},
		{"no kind", "spec: {}\n", ":1: no kind; a VMI starts with kind: VirtualMachineInstance"},
		{"documents", strings.Repeat("---\nkind: X\n", maxDocs+1), ": more than 1024 documents; split the file"},
		{"unknown alias", "kind: *x\n", ": unknown anchor 'x' referenced"},
		{"too large", strings.Repeat("# comment\n", maxFile/10+1), ": larger than 4 MiB, no VMI is; split the file"},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := write(t, "v.yaml", c.text)
			_, err := Load(p)
			require.ErrorIs(t, err, ErrInput)
			assert.Equal(t, p+c.want, err.Error())
		})
	}
}

// H108: a directory in a file's place, and a file that is not there. All files are spoken of, a line for each.
func TestLoadNoFile(t *testing.T) {
	dir := t.TempDir()
	_, err := Load(dir, filepath.Join(dir, "no.yaml"))
	require.ErrorIs(t, err, ErrInput)
	assert.Equal(t, dir+": is a directory\n"+dir+"/no.yaml: no such file or directory", err.Error())
}

func TestLoadNetNS(t *testing.T) {
	p := write(t, "a@b.yaml", "kind: VM\n")
	docs, err := Load(p, p+"@/run/netns/blue")
	require.NoError(t, err)
	assert.Equal(t, "", docs.VMIs[0].NetNS)
	assert.Equal(t, "a@b", docs.VMIs[0].Name)
	assert.Equal(t, "/run/netns/blue", docs.VMIs[1].NetNS)
}

func TestLoadDocuments(t *testing.T) {
	docs, err := Load(write(t, "v.yaml", `---
# nothing
---
kind: VM
spec: {}
---
kind: Service
spec: {networks: [{masqurade: {}}]}
---
apiVersion: v1
kind: List
items:
- kind: VirtualMachineInstance
  metadata: {name: listed}
- kind: NetworkAttachmentDefinition
  metadata: {name: n, namespace: s}
  spec: {config: '{"type": "bridge"}'}
---
kind: VM
`))
	require.NoError(t, err)
	require.Len(t, docs.VMIs, 3)
	assert.Equal(t, "v listed v-2", docs.VMIs[0].Name+" "+docs.VMIs[1].Name+" "+docs.VMIs[2].Name)
	require.Len(t, docs.NADs, 1)
	assert.Equal(t, "s/n bridge", docs.NADs[0].Namespace+"/"+docs.NADs[0].Name+" "+docs.NADs[0].Type)
	assert.Empty(t, Validate(docs, Options{}))
}

func TestLoadJSON(t *testing.T) {
	docs, err := Load(write(t, "v.json", "{\n\t\"kind\": \"VirtualMachineInstance\", \"metadata\": {\"name\": \"j\"},\n\t\"spec\": {\"domain\": {\"devices\": {\"interfaces\": [{\"name\": \"a\", \"masquerade\": {}, \"ports\": [{\"port\": 80}]}]}},\n\t\"networks\": [{\"name\": \"a\", \"pod\": {}}]}}\n"))
	require.NoError(t, err)
	assert.Empty(t, Validate(docs, Options{}))
	assert.Equal(t, uint16(80), Plan(docs)[0].Interfaces[0].Ports[0].Port)
}

// Anchors and merge keys are what large YAML files are kept short with.
func TestLoadAnchors(t *testing.T) {
	docs, err := Load(write(t, "v.yaml", `
kind: VM
spec:
  domain:
    devices:
      interfaces:
      - &first {name: a, masquerade: {}, ports: &ports [{port: 80}]}
      - {<<: *first, name: b, ports: *ports}
  networks: [{name: a, pod: {}}, {name: b, multus: {networkName: y}}]
`))
	require.NoError(t, err)
	require.Len(t, docs.VMIs[0].Spec.Interfaces, 2)
	b := docs.VMIs[0].Spec.Interfaces[1]
	assert.Equal(t, "b", b.Name)
	assert.True(t, b.has(Masquerade))
	assert.Len(t, b.Ports, 1)
	assert.Equal(t, "y", docs.VMIs[0].Spec.Networks[1].Multus.NetworkName)
}

func TestDefinitionFaults(t *testing.T) {
	docs, err := Parse("n.yaml", []byte("kind: NetworkAttachmentDefinition\nmetadata: {name: n}\nspec: {config: '{\"type\": 5}'}\n---\nkind: NetworkAttachmentDefinition\n"))
	require.NoError(t, err)
	assert.Equal(t, []string{
		"spec.config.type: must be a text, found the number 5; put it in quotes",
		"metadata.name: a NetworkAttachmentDefinition needs a name, networks refer to it",
	}, lines(Validate(docs, Options{})))
}

func TestOneLine(t *testing.T) {
	docs, err := Parse("v.yaml", []byte(spec(masqA+"\nmodel: \"a\\nb\\e[31m\\u2028"+strings.Repeat("x", 5000)+"\"", "")))
	require.NoError(t, err)
	f := Validate(docs, Options{})
	require.Len(t, f, 1)
	assert.NotContains(t, f[0].Message, "\n")
	assert.NotContains(t, f[0].Message, "\x1b")
	assert.NotContains(t, f[0].Message, "\u2028")
	assert.Less(t, len(f[0].String()), 1000)
}

// hostile is what Load meets in the worst files, each with what makes it bad.
func hostile() []string {
	bomb := "kind: VM\nx0: &x0 [a, a, a, a, a, a, a, a, a]\n"
	mergeBomb := "kind: VM\nx0: &x0 {a: b}\n"
	for i := 1; i < 30; i++ {
		d := string(rune('0'+(i-1)/10)) + string(rune('0'+(i-1)%10))
		e := string(rune('0'+i/10)) + string(rune('0'+i%10))
		if i == 1 {
			d = "0"
		}
		bomb += "x" + e + ": &x" + e + " [" + strings.Repeat("*x"+d+", ", 9) + "]\n"
		mergeBomb += "x" + e + ": &x" + e + " {<<: [" + strings.Repeat("*x"+d+", ", 9) + "]}\n"
	}
	return []string{
		bomb + "spec: {domain: {devices: {interfaces: *x29}}, networks: *x29}\n",
		mergeBomb + "spec: {domain: {devices: {interfaces: [*x29]}}, networks: [*x29]}\n",
		"kind: VM\nspec: &s {<<: *s, domain: *s, networks: [*s]}\n",
		"kind: VM\nspec: " + strings.Repeat("[", 9000) + "\n",
		"kind: VM\nspec: " + strings.Repeat("{a: ", 9000) + "\n",
		"kind: VM\nspec: {domain: {devices: {interfaces: " + strings.Repeat("[", 5000) + strings.Repeat("]", 5000) + "}}}\n",
		"kind: VM\n" + strings.Repeat(" ", 9000) + "- a\n",
		spec(masqA+"\nbootOrder: 99999999999999999999999999\nacpiIndex: -9223372036854775808\nports: [{port: 1e9}, {port: 0x7fffffffffffffff}]", ""),
		"kind: VM\nspec: {domain: {cpu: {sockets: 4294967295, cores: 4294967295, threads: 4294967295}, memory: {guest: 9999999999999999999999Ei}}}\n",
		"kind: VM\nspec: {domain: {memory: {guest: 1e-30}, resources: {limits: {cpu: " + strings.Repeat("9", 4000) + "}}}}\n",
		"kind: List\nitems: &i [{kind: List, items: *i}]\n",
		"kind: VM\nmetadata: {name: \"\\0\\n../../x\"}\nspec: {networks: [{name: \"\\uD800\"}]}\n",
		"kind: VM\n? {a: b}\n: c\n? [a]\n: d\n",
		"kind: VM\nspec: !!binary aGVsbG8=\n---\nkind: !!int VM\nspec: !<tag:x> {domain: !!set {a, b}}\n",
		"%YAML 9.9\n---\nkind: VM\n...\n\xef\xbb\xbf",
		"\xff\xfek\x00i\x00n\x00d\x00",
		"kind: NetworkAttachmentDefinition\nmetadata: {name: n}\nspec: {config: '" + strings.Repeat("[", 20000) + "'}\n",
		"kind: NetworkAttachmentDefinition\nmetadata: {name: n, annotations: {a: {b: c}}}\nspec: {config: '{\"type\" \"\\'}\n",
		guest("v", "n") + nad("n", `{"type": "bridge", "vlanTrunk": [{"minID": 1, "maxID": 4094}, {"minID": -1, "maxID": 1e99}], "ipam": {"type": "host-local", "subnet": "10.0.0.0/1", "rangeStart": "255.255.255.255"}}`),
		guest("v", "n") + nad("n", `{"type": "ovs" "bridge": "\ud800\u0000", "plugins": [[], 5, {"type": "ovs"}], "trunk": [[[[[[]]]]]],}`),
		guest("v", "a/b/c") + "kind: NetworkAttachmentDefinition\nmetadata: {name: b/c, namespace: a}\nspec: {config: \"{\\n\\x\"}\n",
		"kind: NetworkAttachmentDefinition\nmetadata: {name: n}\nspec:\n  config: |2+\n\n   {\n   \"type\":",
		"kind: NetworkAttachmentDefinition\nmetadata: {name: n}\nspec: {config: '" + strings.Repeat("{\"a\":", 9000) + "1" + strings.Repeat("}", 9000) + "'}\n",
		spec(masqA+"\nports: ["+strings.Repeat("{},", 5000)+"]", ""),
		vmi("interfaces: ["+strings.Repeat("{name: a},", 3000)+"]", "networks: ["+strings.Repeat("{name: a},", 3000)+"]"),
	}
}

func FuzzLoad(f *testing.F) {
	for _, s := range hostile() {
		f.Add([]byte(s))
	}
	files, _ := filepath.Glob("testdata/guide/*.yaml")
	for _, name := range files {
		data, err := os.ReadFile(name)
		require.NoError(f, err)
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		docs, err := Parse("f.yaml", data)
		if err != nil {
			require.ErrorIs(t, err, ErrInput)
			require.NotContains(t, err.Error(), "\n")
			return
		}
		faults := append(Validate(docs, Options{}), Unsupported(docs)...)
		require.LessOrEqual(t, len(faults), 2*maxFaults)
		for _, x := range faults {
			require.False(t, strings.ContainsAny(x.String(), "\n\r\x1b"), "%q", x)
			require.Less(t, len(x.String()), 5000)
		}
		if len(Errors(faults)) > 0 {
			return
		}
		for _, vm := range Plan(docs) {
			require.NotEmpty(t, vm.Name)
			args, _, err := QEMUArgs(vm, QEMUOptions{SocketDir: "/run/x"})
			for _, a := range args {
				require.NoError(t, err)
				require.False(t, strings.ContainsAny(a, "\n\x00"), "%q", a)
			}
		}
	})
}
