package vmi

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"go.yaml.in/yaml/v3"
)

// ErrInput is wrapped by every error of Load: the input is wrong, not the machine.
var ErrInput = errors.New("input")

type inputError struct{ text string }

func (e inputError) Error() string        { return e.text }
func (e inputError) Is(target error) bool { return target == ErrInput }

func badInput(format string, args ...any) error {
	return inputError{oneLine(fmt.Sprintf(format, args...))}
}

// Load reads files of YAML or JSON, with several documents each, and says what they hold. "-" is the standard
// input, and FILE@NETNS gives the VMIs of a file a network namespace of their own. Documents of kinds that do not concern
// a VMI's network are passed over. The error has one line per file that could not be read; it is nil although a
// spec is wrong: that is [Validate]'s to say. Load asks for no VMI to be there: NADs come in files of their own.
func Load(files ...string) (Docs, error) {
	var docs Docs
	var errs []error
	for _, arg := range files {
		file, netns := splitNetNS(arg)
		if file != arg && netns == "" {
			errs = append(errs, fmt.Errorf("%s: no network namespace behind the @: want FILE@NETNS, such as %s/run/netns/pod", arg, arg))
			continue
		}
		data, err := readFile(file)
		if err == nil {
			err = docs.add(file, netns, data)
		}
		if err != nil {
			errs = append(errs, err)
		}
	}
	return docs, errors.Join(errs...)
}

// Parse reads one file's content as Load does; name stands for the file in messages.
func Parse(name string, data []byte) (Docs, error) {
	var docs Docs
	err := docs.add(name, "", data)
	return docs, err
}

// splitNetNS cuts FILE@NETNS, unless a file of that whole name is there.
func splitNetNS(arg string) (file, netns string) {
	i := strings.LastIndexByte(arg, '@')
	if i <= 0 {
		return arg, ""
	}
	if _, err := os.Stat(arg); err == nil {
		return arg, ""
	}
	return arg[:i], arg[i+1:]
}

func readFile(name string) ([]byte, error) {
	f, err := os.Stdin, error(nil)
	if name != "-" {
		if f, err = os.Open(name); err == nil {
			defer f.Close()
		}
	}
	var data []byte
	if err == nil {
		data, err = io.ReadAll(io.LimitReader(f, maxFile+1))
	}
	var pe *os.PathError
	if errors.As(err, &pe) {
		return nil, badInput("%s: %v", name, pe.Err)
	}
	if err != nil {
		return nil, badInput("%s: %v", name, err)
	}
	if len(data) > maxFile {
		return nil, badInput("%s: larger than %d MiB, no VMI is; split the file", name, maxFile>>20)
	}
	return data, nil
}

func (docs *Docs) add(file, netns string, data []byte) error {
	nodes, err := parse(file, data)
	if err != nil {
		return err
	}
	d := &decoder{file: file, raw: data, budget: maxNodes}
	from := len(docs.VMIs)
	for _, n := range nodes {
		if err := d.document(docs, n, 0); err != nil {
			return err
		}
	}
	if d.budget < 0 {
		return badInput("%s: more than %d nodes with its aliases expanded; split the file", file, maxNodes)
	}
	docs.nameAndPlace(from, netns)
	docs.faults = append(docs.faults, d.faults...)
	return nil
}

// nameAndPlace gives the VMIs from an index on their namespace, and those without a name their file's.
func (docs *Docs) nameAndPlace(from int, netns string) {
	nameless := 0
	for i := from; i < len(docs.VMIs); i++ {
		v := &docs.VMIs[i]
		v.NetNS = netns
		if v.named {
			continue
		}
		base := filepath.Base(v.File)
		if v.File == "-" {
			base = "stdin"
		}
		v.Name = strings.TrimSuffix(base, filepath.Ext(base))
		if v.Name == "" {
			v.Name = base
		}
		if nameless++; nameless > 1 {
			v.Name = fmt.Sprintf("%s-%d", v.Name, nameless)
		}
	}
}

var yamlLine = regexp.MustCompile(`^(?:yaml: )?(?:line (\d+): )?(.*)$`)

// parse reads the documents of a file as nodes. The library is run behind a recover: what it was given may be anything.
func parse(file string, data []byte) (nodes []*yaml.Node, err error) {
	defer func() {
		if r := recover(); r != nil {
			nodes, err = nil, badInput("%s: not YAML that can be read: %v", file, r)
		}
	}()
	dec := yaml.NewDecoder(bytes.NewReader(data))
	for {
		n := new(yaml.Node)
		err := dec.Decode(n)
		if errors.Is(err, io.EOF) {
			return nodes, nil
		}
		if err != nil {
			m := yamlLine.FindStringSubmatch(oneLine(err.Error()))
			if m != nil && m[1] != "" {
				return nil, badInput("%s:%s: %s", file, m[1], m[2])
			}
			return nil, badInput("%s: %s", file, strings.TrimPrefix(err.Error(), "yaml: "))
		}
		if len(nodes) == maxDocs {
			return nil, badInput("%s: more than %d documents; split the file", file, maxDocs)
		}
		nodes = append(nodes, n)
	}
}

// document reads one document, or one item of a List.
func (d *decoder) document(docs *Docs, n *yaml.Node, depth int) error {
	if n.Kind == yaml.DocumentNode {
		if len(n.Content) == 0 {
			return nil
		}
		n = n.Content[0]
	}
	root := d.resolve(n)
	if isNull(root) {
		return nil
	}
	if root.Kind != yaml.MappingNode {
		return badInput("%s:%d: a document must be a mapping with kind and spec, found %s", d.file, root.Line, kindName(root))
	}
	kind, items := "", (*yaml.Node)(nil)
	for _, p := range d.pairs(root, "") {
		switch p.key {
		case "kind":
			kind = d.text(p.val, "kind")
		case "items":
			items = p.val
		}
	}
	switch kind {
	case "VirtualMachineInstance", "VMI", "VirtualMachine", "VM", "VirtualMachineInstanceReplicaSet", "VirtualMachinePool":
		d.machine(docs, root, kind)
	case "NetworkAttachmentDefinition":
		d.definition(docs, root)
	case "KubeVirt", "Kubevirt":
		d.cluster(docs, root)
	case "ConfigMap":
		d.configMap(docs, root)
	case "SriovNetwork":
		d.sriovNetwork(docs, root)
	case "SriovNetworkNodePolicy":
		d.sriovPolicy(docs, root)
	case "":
		if d.fragment(root) {
			docs.documents++
			return nil
		}
		return badInput("%s:%d: no kind; a VMI starts with kind: VirtualMachineInstance", d.file, root.Line)
	case "List":
		if depth > 0 || items == nil {
			return nil
		}
		var err error
		d.list(items, "items", maxDocs, func(n *yaml.Node, _ string) {
			if err == nil {
				err = d.document(docs, n, depth+1)
			}
		})
		return err
	default:
		return nil // of no concern
	}
	docs.documents++
	return nil
}

// metadata reads a name and a namespace, and shows each annotation to annotation.
func (d *decoder) metadata(n *yaml.Node, path string, name, namespace *string, annotation func(key string, n *yaml.Node, path string)) {
	d.object(n, path, false, fields{
		"name":      func(n *yaml.Node, p string) { *name = d.text(n, p) },
		"namespace": func(n *yaml.Node, p string) { *namespace = d.text(n, p) },
		"annotations": func(n *yaml.Node, p string) {
			for _, a := range d.pairs(n, p) {
				if d.vmi != nil {
					d.vmi.lines[p+"."+a.key] = a.line
				}
				annotation(a.key, a.val, p+"."+a.key)
			}
		},
	})
}

// fragment reads a part of a VMI's spec that stands for itself, as an example may: what is in it is looked at, but there
// is no machine to serve.
func (d *decoder) fragment(root *yaml.Node) bool {
	w := nameWalk{types: fieldTypes()}
	spec := w.child(typeVMI, "spec")
	pairs := d.pairs(root, "")
	for _, p := range pairs {
		if w.child(spec, p.key) < 0 {
			return false
		}
	}
	if len(pairs) == 0 {
		return false
	}
	d.warn(root, pairs[0].key, "no kind: a part of a spec, which is passed over; a VMI starts with kind: VirtualMachineInstance")
	d.spec(root, "", new(Spec), fields{})
	return true
}

// machine reads a VMI, an object with a template of VMIs, or the guide's VM with spec.domain at the top.
func (d *decoder) machine(docs *Docs, root *yaml.Node, kind string) {
	v := VMI{Kind: kind, File: d.file, Line: root.Line, Path: "spec", lines: map[string]int{}}
	d.vmi, d.names = &v, true
	var own annotations // of the document itself
	first := len(d.faults)
	document, beside := typeVMI, fields{}
	switch kind {
	case "VirtualMachine", "VM":
		document, beside = typeVM, d.template(&v)
	case "VirtualMachineInstanceReplicaSet":
		document, beside = typeReplicaSet, d.template(&v)
	case "VirtualMachinePool":
		document, beside = typePool, fields{"virtualMachineTemplate": func(n *yaml.Node, p string) {
			d.object(n, p, false, fields{"spec": func(n *yaml.Node, p string) { d.object(n, p, false, d.template(&v)) }})
		}}
	}
	d.object(root, "", false, fields{
		"metadata": func(n *yaml.Node, p string) { d.metadata(n, p, &v.Name, &v.Namespace, d.annotations(&own)) },
		"spec":     func(n *yaml.Node, p string) { d.spec(n, p, &v.Spec, beside) },
	})
	v.named = v.Name != ""
	if v.Path == "spec" {
		v.annotations = own
	}
	d.vmi, d.names = nil, false
	d.checkNames(root, document, &v)
	// The name may come after the faults.
	for i := first; i < len(d.faults); i++ {
		d.faults[i].VMI = oneLine(v.Name)
	}
	docs.VMIs = append(docs.VMIs, v)
}

// template reads a template's spec, which takes the place of what stands beside it. Its annotations are the VMI's.
func (d *decoder) template(v *VMI) fields {
	return fields{"template": func(n *yaml.Node, p string) {
		var name, namespace string
		d.object(n, p, false, fields{
			"metadata": func(n *yaml.Node, p string) { d.metadata(n, p, &name, &namespace, d.annotations(&v.annotations)) },
			"spec": func(n *yaml.Node, p string) {
				v.Path, v.Spec = p, Spec{}
				d.spec(n, p, &v.Spec, fields{})
			},
		})
	}}
}

// annotations is what a VMI's annotations say that concerns us.
type annotations struct {
	istio         string // path of the one that asks for Istio's proxy beside the guest, empty if none does
	migrateBridge bool   // a bridge on the pod network is no reason not to migrate, whatever its value
}

// annotations notes in to what concerns us.
func (d *decoder) annotations(to *annotations) func(key string, n *yaml.Node, path string) {
	return func(key string, n *yaml.Node, path string) {
		switch key {
		case "sidecar.istio.io/inject":
			if strings.EqualFold(d.text(n, path), "true") {
				to.istio = path
			}
		case "kubevirt.io/allow-pod-bridge-network-live-migration":
			to.migrateBridge = true
		}
	}
}
