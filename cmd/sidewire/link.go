package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"

	"sidewire/engine/vmi"
)

// linkRequest takes the link of an interface up or down, as the guest sees it.
type linkRequest struct {
	Interface string `json:"interface,omitempty"` // VMI/INTERFACE; may be left out where there is one
	State     string `json:"state"`               // up or down
}

// SetLink implements controller.
func (s *server) SetLink(r *linkRequest) error {
	if r.State != vmi.Up && r.State != vmi.Down {
		return badInput("state %q: want up or down", r.State)
	}
	open, _ := s.serving()
	var found []*nic
	var names []string
	for _, n := range open {
		b := n.base()
		names = append(names, b.name())
		if r.Interface == "" || r.Interface == b.name() {
			found = append(found, b)
		}
	}
	switch {
	case len(found) == 0 && r.Interface != "":
		return badInput("no interface %q; there are: %s", r.Interface, strings.Join(names, ", "))
	case len(found) != 1:
		return badInput("which interface? Name one of them: %s", strings.Join(names, ", "))
	}
	n := found[0]
	r.Interface = n.name()
	switch {
	case n.stream != nil:
		n.stream.SetLink(r.State == vmi.Up)
		if err := s.showLink(n); err != nil {
			return fmt.Errorf("the guest does not see it: %w", err)
		}
	case n.device != nil:
		if err := n.device.SetLink(r.State == vmi.Up); err != nil {
			return err
		}
	default:
		return badInput("%s is not served by us: its link is that of the device that was handed over", n.name())
	}
	s.log.Info("link set", "interface", n.name(), "state", r.State)
	return nil
}

// showLinksBy says how a guest is shown the link of a NIC that is not virtio, nil
// for not at all, and shows it those that are down.
func (s *server) showLinksBy(show func(netdev string, up bool) error) {
	s.mu.Lock()
	s.linkShower = show
	s.mu.Unlock()
	open, _ := s.serving()
	for _, o := range open {
		if n := o.base(); show != nil && n.stream != nil && !n.stream.LinkUp() {
			go func() {
				if err := s.showLink(n); err != nil {
					s.log.Warn("the guest does not see that its link is down", "interface", n.name(), "err", err)
				}
			}()
		}
	}
}

// showLink shows a guest the link of a NIC that is not virtio, if it can be
// shown.
func (s *server) showLink(n *nic) error {
	s.mu.Lock()
	show := s.linkShower
	s.mu.Unlock()
	if show == nil {
		return nil
	}
	return show(n.iface.NetdevID(), n.stream.LinkUp())
}

// linkState is how the guest finds its link: QEMU takes it down while there is
// no backend.
func (n *nic) linkState(connected bool) string {
	switch {
	case n.stream != nil && !n.stream.LinkUp(), n.device != nil && !n.device.LinkUp(), !connected:
		return vmi.Down
	}
	return vmi.Up
}

// linkCommand takes a link up or down.
func linkCommand(ctx context.Context, args []string, out, errw io.Writer) error {
	o, asJSON, rest, err := controlFlags("link", args, errw)
	if err != nil {
		return err
	}
	var r linkRequest
	switch len(rest) {
	case 1:
		r.State = rest[0]
	case 2:
		r.Interface, r.State = rest[0], rest[1]
	default:
		return badInput("want [VMI/INTERFACE] up or down")
	}
	if err := ask(ctx, o.controlPath(), "POST", "/link", r, &r); err != nil {
		return err
	}
	if asJSON {
		return json.NewEncoder(out).Encode(r)
	}
	fmt.Fprintln(out, r.Interface, r.State)
	return nil
}
