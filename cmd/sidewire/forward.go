package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strconv"
	"strings"

	"sidewire/engine/uplink"
	"sidewire/nat"
)

// Forwards implements controller.
func (s *server) Forwards() map[string][]forwardRequest {
	out := map[string][]forwardRequest{}
	open, _ := s.serving()
	for _, n := range open {
		out[n.base().name()] = n.forwards()
	}
	return out
}

// forwards are the ports that are forwarded; nil is all of them.
func (n *podNIC) forwards() []forwardRequest {
	ports := n.pod.host.Ports(n.index)
	if ports == nil {
		return nil
	}
	out := []forwardRequest{}
	for _, p := range ports {
		out = append(out, forwardRequest{Protocol: protoName(p.Proto), Port: p.Port, Last: p.Last})
	}
	return out
}

// forwards of a switch's port is everything.
func (n *lanNIC) forwards() []forwardRequest { return nil }

// forwarder is an interface that ports are forwarded to.
type forwarder interface {
	served
	addForward(r forwardRequest, proto uint8) error
	removeForward(r forwardRequest, proto uint8) error
}

// AddForward implements controller.
func (s *server) AddForward(r *forwardRequest) error {
	n, proto, err := s.find(*r)
	if err != nil {
		return err
	}
	return n.addForward(*r, proto)
}

// RemoveForward implements controller.
func (s *server) RemoveForward(r *forwardRequest) error {
	n, proto, err := s.find(*r)
	if err != nil {
		return err
	}
	return n.removeForward(*r, proto)
}

func (n *podNIC) addForward(r forwardRequest, proto uint8) error {
	if err := n.plain(r); err != nil {
		return err
	}
	var done []publisher
	undo := func(err error) error {
		for _, t := range done {
			err = errors.Join(err, t.remove(proto, r.Port))
		}
		return fmt.Errorf("forward %s port %d: %w", protoName(proto), r.Port, err)
	}
	for _, t := range n.translators() {
		if err := t.add(proto, r.Port); err != nil {
			return undo(err)
		}
		done = append(done, t)
	}
	if err := n.pod.host.AddPort(n.index, uplink.Port{Proto: proto, Port: r.Port}); err != nil {
		return undo(err)
	}
	return nil
}

// publisher is the NAT of one family, which has the guest at an index.
type publisher struct {
	nat interface {
		AddForward(nat.Forward) error
		RemoveForward(nat.Forward) error
	}
	guest int
}

func (t publisher) add(proto uint8, port uint16) error {
	return t.nat.AddForward(nat.Forward{Guest: t.guest, Proto: proto, Port: port})
}

func (t publisher) remove(proto uint8, port uint16) error {
	return t.nat.RemoveForward(nat.Forward{Guest: t.guest, Proto: proto, Port: port})
}

// translators are the NATs of the families that the guest has.
func (n *podNIC) translators() (out []publisher) {
	if n.pod.nat != nil {
		out = append(out, publisher{n.pod.nat, n.index})
	}
	if n.six.router != nil {
		out = append(out, publisher{n.pod.six.nat, n.six.index})
	}
	return out
}

func (n *podNIC) removeForward(r forwardRequest, proto uint8) error {
	if err := n.plain(r); err != nil {
		return err
	}
	if err := n.pod.host.RemovePort(n.index, uplink.Port{Proto: proto, Port: r.Port}); err != nil {
		return err
	}
	var errs []error
	for _, t := range n.translators() {
		errs = append(errs, t.remove(proto, r.Port))
	}
	return errors.Join(errs...)
}

// plain refuses what the packet path does not have: a port leads to the same
// port of the guest's, at all addresses.
func (n *podNIC) plain(r forwardRequest) error {
	switch {
	case n.pod.host.Ports(n.index) == nil:
		return badInput("%s has no list of ports: every port is forwarded already", n.name())
	case r.Address.IsValid(), r.Guest != 0 && r.Guest != r.Port:
		return badInput("%s takes the packet path, where a port leads to the same port of the guest's and at every address: say PROTO:PORT", n.name())
	}
	return nil
}

// find returns the interface that a request means, which may leave it out
// where there is one that ports are forwarded to.
func (s *server) find(r forwardRequest) (forwarder, uint8, error) {
	proto, err := protoNumber(r.Protocol)
	if err != nil {
		return nil, 0, err
	}
	if r.Port == 0 {
		return nil, 0, badInput("port 0 cannot be forwarded: give one from 1 to 65535")
	}
	if r.Last != 0 && r.Last != r.Port {
		return nil, 0, badInput("ports %d-%d: give one port at a time", r.Port, r.Last)
	}
	var found []forwarder
	var names []string
	open, _ := s.serving()
	for _, n := range open {
		to, ok := n.(forwarder)
		switch {
		case ok && (r.Interface == "" || r.Interface == n.base().name()):
			found = append(found, to)
		case n.base().name() == r.Interface:
			return nil, 0, badInput("%s is on a network of its own: whatever is sent to the guest's own address gets there, nothing is forwarded", r.Interface)
		}
		if ok {
			names = append(names, n.base().name())
		}
	}
	if len(found) != 1 {
		return nil, 0, badInput("no interface %q that ports are forwarded to; there are: %s", r.Interface, strings.Join(names, ", "))
	}
	return found[0], proto, nil
}

func forwardList(fs []forwardRequest) string {
	switch {
	case fs == nil:
		return "everything"
	case len(fs) == 0:
		return "none"
	}
	var out []string
	for _, f := range fs {
		out = append(out, f.String())
	}
	return strings.Join(out, " ")
}

// String is the forward as the forward command takes it.
func (r forwardRequest) String() string {
	s := strings.ToLower(r.Protocol) + ":"
	if r.Address.IsValid() {
		s += r.Address.String() + ":"
	}
	s += strconv.Itoa(int(r.Port))
	if r.Last > r.Port {
		s += "-" + strconv.Itoa(int(r.Last))
	}
	if r.Guest != 0 {
		s += ":" + strconv.Itoa(int(r.Guest))
	}
	return s
}

// forwardCommand lists, adds or removes forwarded ports.
func forwardCommand(ctx context.Context, args []string, out, errw io.Writer) error {
	o, asJSON, rest, err := controlFlags("forward", args, errw)
	if err != nil {
		return err
	}
	if len(rest) == 0 {
		rest = []string{"list"}
	}
	method, what := "GET", rest[0]
	var body any
	switch what {
	case "list":
		if len(rest) > 1 {
			return unexpected("forward", rest[1])
		}
	case "add", "remove", "del":
		r, err := parseForward(rest[1:])
		if err != nil {
			return err
		}
		body = r
		method = map[string]string{"add": "POST", "remove": "DELETE", "del": "DELETE"}[what]
	default:
		return badInput("%q: want list, add or remove", what)
	}
	var fwds map[string][]forwardRequest
	if err := ask(ctx, o.controlPath(), method, "/forwards", body, &fwds); err != nil {
		return err
	}
	if asJSON {
		return json.NewEncoder(out).Encode(fwds)
	}
	for _, name := range sortedKeys(fwds) {
		fmt.Fprintf(out, "%s %s\n", name, forwardList(fwds[name]))
	}
	return nil
}

// parseForward reads [VMI/INTERFACE] PROTO:[ADDR:]PORT[:GUESTPORT].
func parseForward(args []string) (r forwardRequest, err error) {
	if len(args) == 2 {
		r.Interface, args = args[0], args[1:]
	}
	if len(args) != 1 {
		return r, badInput("want [VMI/INTERFACE] PROTO:PORT, such as tcp:8080, or tcp:8080:80 on the socket path")
	}
	proto, rest, ok := strings.Cut(args[0], ":")
	if !ok || isNumber(proto) || strings.Contains(proto, ".") {
		proto, rest = "tcp", args[0]
	}
	if _, err := protoNumber(proto); err != nil {
		return r, err
	}
	r.Protocol = strings.ToUpper(proto)
	words := strings.Split(rest, ":")
	if strings.Contains(words[0], ".") {
		if r.Address, err = netip.ParseAddr(words[0]); err != nil {
			return r, badInput("%q is no IPv4 address", words[0])
		}
		words = words[1:]
	}
	if len(words) == 0 || len(words) > 2 {
		return r, badInput("%q: want PROTO:[ADDR:]PORT[:GUESTPORT]", args[0])
	}
	for i, to := range []*uint16{&r.Port, &r.Guest}[:len(words)] {
		n, err := strconv.ParseUint(words[i], 10, 16)
		if err != nil || n == 0 {
			return r, badInput("port %q: want a number from 1 to 65535", words[i])
		}
		*to = uint16(n)
	}
	return r, nil
}

func isNumber(s string) bool { return s != "" && strings.Trim(s, "0123456789") == "" }
