package vmi

import (
	"encoding/json"
	"fmt"
	"strings"

	"go.yaml.in/yaml/v3"
)

// NAD is a NetworkAttachmentDefinition.
type NAD struct {
	Namespace, Name string
	File            string
	Annotations     map[string]string
	Config          []byte // the CNI configuration, sound JSON; nil if the definition has none
	Type            string // the CNI type, or that of the first plugin of a list; may be empty
}

// definition reads a NetworkAttachmentDefinition.
func (d *decoder) definition(docs *Docs, root *yaml.Node) {
	nad := NAD{File: d.file, Annotations: map[string]string{}}
	d.object(root, "", false, fields{
		"metadata": func(n *yaml.Node, p string) {
			d.metadata(n, p, &nad.Name, &nad.Namespace, func(key string, n *yaml.Node, p string) {
				if len(nad.Annotations) < maxList {
					nad.Annotations[key] = d.text(n, p)
				}
			})
		},
		"spec": func(n *yaml.Node, p string) {
			d.object(n, p, false, fields{"config": func(n *yaml.Node, p string) { d.cniConfig(n, p, &nad) }})
		},
	})
	if nad.Name == "" {
		d.fault(root, "metadata.name", "a NetworkAttachmentDefinition needs a name, networks refer to it")
	}
	docs.NADs = append(docs.NADs, nad)
}

func (d *decoder) cniConfig(n *yaml.Node, path string, nad *NAD) {
	text := d.text(n, path)
	if strings.TrimSpace(text) == "" {
		return
	}
	config, warning := mendJSON([]byte(text))
	var cni struct {
		Type    string
		Plugins []struct{ Type string }
	}
	if err := json.Unmarshal(config, &cni); err != nil {
		d.fault(n, path, "not the JSON of a CNI configuration: %v", err)
		return
	}
	if warning != "" {
		d.fault(n, path, "%s; read as if it were right, but a cluster refuses it", warning)
		d.faults[len(d.faults)-1].Severity = Warning
	}
	nad.Config, nad.Type = config, cni.Type
	if nad.Type == "" && len(cni.Plugins) > 0 {
		nad.Type = cni.Plugins[0].Type
	}
}

// mendJSON corrects the two slips that examples of CNI configurations in the wild have: no comma between two members
// (put in), and one after the last (taken out). Sound JSON comes back as it is. The warning names the first slip.
func mendJSON(in []byte) (out []byte, warning string) {
	if json.Valid(in) {
		return in, ""
	}
	say := func(what string, at int) {
		if warning == "" {
			warning = fmt.Sprintf("JSON with a comma %s at character %d", what, at+1)
		}
	}
	out = make([]byte, 0, len(in)+8)
	value := false // a value or key has just ended, and nothing has followed
	comma := -1    // place in out of a comma that nothing has followed yet
	for i := 0; i < len(in); i++ {
		switch c := in[i]; c {
		case ' ', '\t', '\r', '\n':
			out = append(out, c)
			continue
		case ',', ':':
			if c == ',' {
				comma = len(out)
			}
			out, value = append(out, c), false
			continue
		case '}', ']':
			if comma >= 0 {
				say("too many", i)
				out[comma] = ' '
			}
			out, value = append(out, c), true
		default:
			end := tokenEnd(in, i)
			if value {
				say("missing", i)
				out = append(out, ',')
			}
			out = append(out, in[i:end]...)
			value = c != '{' && c != '['
			i = end - 1
		}
		comma = -1
	}
	if !json.Valid(out) {
		return in, "" // some other slip: let the JSON reader say which
	}
	return out, warning
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
