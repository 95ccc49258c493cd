package main

import (
	"context"
	"errors"
	"fmt"
	"io"

	"sidewire/engine/uplink"
)

// restoreCommand puts back what runs that crashed have left: links whose place a
// guest had, and what a pod was prepared with for masquerade.
func restoreCommand(_ context.Context, args []string, out, errw io.Writer) error {
	var o options
	var spaces list
	fs := newFlags("restore", errw)
	fs.Var(&spaces, "netns", "network namespace `PATH` of a pod (default: the own one); may be repeated")
	fs.StringVar(&o.socketDir, "socket-dir", runtimeDir(), "`DIR` that was given to run")
	fs.StringVar(&o.stateDir, "state-dir", "", "`DIR` that was given to run (default SOCKET-DIR/state)")
	if err := parse(fs, args); err != nil {
		return err
	}
	if err := o.checkStateDir(); err != nil {
		return err
	}
	if len(spaces) == 0 {
		spaces = list{""}
	}
	var errs []error
	for _, ns := range spaces {
		done, err := restoreLinks(&o, ns, nil)
		for _, s := range done {
			fmt.Fprintf(out, "%s put back as it was before %s had its place\n", s.Link, s.Owner)
		}
		var links []string
		cerr := uplink.InNetNS(ns, func() (err error) {
			links, err = uplink.CleanupAll()
			return err
		})
		for _, l := range links {
			fmt.Fprintf(out, "%s put back as it was before guests were masqueraded by it\n", l)
		}
		if err = errors.Join(err, cerr); err == nil && len(done)+len(links) == 0 {
			fmt.Fprintln(out, "nothing to put back"+in(ns))
		}
		errs = append(errs, err)
	}
	err := errors.Join(errs...)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, uplink.ErrPrivilege):
		return cannot("%w: run as root", err)
	}
	return bridgeError(err)
}

func in(netns string) string {
	if netns == "" {
		return ""
	}
	return " in " + netns
}

// restoreLinks puts back what crashed runs have left in a namespace, but for
// what keep wants as it is.
func restoreLinks(o *options, netns string, keep func(*uplink.Saved) bool) (done []*uplink.Saved, err error) {
	err = uplink.InNetNS(netns, func() error {
		done, err = uplink.RestoreSaved(o.linkState(), keep)
		return err
	})
	return done, err
}

// restoreStale puts back, in the namespaces that are served, links that crashed
// runs have left and that are not the same guest's again.
func (s *server) restoreStale(o *options, p *plan) error {
	seen := map[string]bool{}
	for _, n := range p.all {
		netns := netnsOf(o, n.base().vm)
		if seen[netns] {
			continue
		}
		seen[netns] = true
		done, err := restoreLinks(o, netns, func(w *uplink.Saved) bool {
			for _, b := range p.bridges {
				if b.netns == netns && b.link == w.Link && b.name() == w.Owner {
					return true
				}
			}
			return false
		})
		for _, w := range done {
			s.log.Info("link is put back as it was before a crash", "link", w.Link, "netns", netns, "was", w.Owner)
		}
		switch {
		case errors.Is(err, uplink.ErrInUse):
			s.log.Debug("another sidewire serves a link here", "netns", netns, "err", err)
		case errors.Is(err, uplink.ErrPrivilege):
			// Who needs it to serve says so, and what it is needed for.
			s.log.Debug("links of a crash are not looked for", "netns", netns, "err", err)
		case err != nil:
			return bridgeError(err)
		}
	}
	return nil
}
