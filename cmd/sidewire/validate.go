package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"sidewire/engine/vmi"
)

// validateCommand prints one line per fault on out. What is sound but served
// otherwise than it reads, or not at all with what was given, goes to errw: a
// spec that KubeVirt takes leaves out empty.
func validateCommand(_ context.Context, args []string, out, errw io.Writer) error {
	var files, nads list
	var asJSON bool
	fs := newFlags("validate", errw)
	fs.Var(&files, "f", "`FILE` with VMIs, VMs or NetworkAttachmentDefinitions; may be repeated")
	fs.Var(&nads, "nad", "`FILE` with NetworkAttachmentDefinitions; may be repeated")
	var cluster vmi.Cluster
	registerCluster(fs, &cluster)
	fs.BoolVar(&asJSON, "json", false, "print the faults as JSON")
	if err := parse(fs, args); err != nil {
		return err
	}
	if len(files)+len(nads) == 0 {
		return badInput("no file given: name it with -f")
	}
	docs, err := read(files, nads, cluster)
	if err != nil {
		return err
	}
	if docs.Empty() {
		return badInput("%s: no VMI, VM or definition in it; a VMI starts with kind: VirtualMachineInstance", strings.Join(append(files, nads...), ", "))
	}
	faults := vmi.Validate(docs, vmi.Options{})
	unserved := vmi.Unsupported(docs)
	for i := range unserved {
		if unserved[i].Severity == vmi.Error {
			unserved[i].Severity = vmi.Unserved
		}
	}
	faults = append(faults, unserved...)
	if asJSON {
		enc := json.NewEncoder(out)
		enc.SetIndent("", "  ")
		if faults == nil {
			faults = []vmi.Fault{}
		}
		if err := enc.Encode(faults); err != nil {
			return err
		}
	} else {
		for _, f := range faults {
			if f.Severity == vmi.Error {
				fmt.Fprintln(out, f)
			} else {
				fmt.Fprintf(errw, "%s: %s\n", f.Severity, where(f))
			}
		}
	}
	if len(vmi.Errors(faults)) > 0 {
		return inputError{silent{}}
	}
	return nil
}

// allFaults is what is wrong with the documents, and what is right but cannot
// be served yet.
func allFaults(docs vmi.Docs) []vmi.Fault {
	return append(vmi.Validate(docs, vmi.Options{}), vmi.Unsupported(docs)...)
}

// read reads files with VMIs and definitions, and others for their definitions
// alone; the cluster's settings are those of a flag. The error has a line for
// each file that cannot be read.
func read(files, nads []string, cluster vmi.Cluster) (vmi.Docs, error) {
	docs, err := vmi.Load(files...)
	more, moreErr := vmi.Load(nads...)
	if err := errors.Join(err, moreErr); err != nil {
		return docs, inputError{err}
	}
	docs.Define(more)
	docs.SetCluster(cluster)
	return docs, nil
}

// load reads, checks and plans the VMIs that the flags name. Warnings go to
// errw; an error has a line for each fault. The book, if there is one, knows who
// has which address.
func load(o *options, errw io.Writer, book *leaseBook) ([]vmi.VM, error) {
	docs, err := read(o.files, o.nads, o.cluster)
	if err != nil {
		return nil, err
	}
	var faults []vmi.Fault
	if book != nil {
		faults = book.allot(&docs)
	} else {
		faults = allFaults(docs)
	}
	for _, f := range vmi.Warnings(faults) {
		fmt.Fprintln(errw, "warning:", where(f))
	}
	var lines []string
	for _, f := range vmi.Errors(faults) {
		lines = append(lines, where(f))
	}
	if len(lines) > 0 {
		return nil, inputError{errors.New(strings.Join(lines, "\n"))}
	}
	vms := vmi.Plan(docs)
	if len(vms) == 0 {
		return nil, badInput("%s: no VMI in it", strings.Join(o.files, ", "))
	}
	return vms, nil
}

func where(f vmi.Fault) string {
	if w := f.Where(); w != "" {
		return w + ": " + f.String()
	}
	return f.String()
}
