package vmi

import (
	"fmt"
	"net/netip"
)

// Held is an address that a guest of an earlier or another run has. It stays that guest's.
type Held struct {
	// Networks are the networks that it is an address of, by name and by bridge: a definition is the same network as
	// others of its name in this run, and of its bridge and VLAN.
	Networks [2]string  `json:"networks"`
	Addr     netip.Addr `json:"addr"`
	Guest    string     `json:"guest"` // NAMESPACE/VMI/INTERFACE
	// Gone says that nobody serves the guest now: the address goes to another guest when no other is left.
	Gone bool `json:"-"`
}

// Hold keeps addresses for those who have them. The last of two that are the same counts.
func (docs *Docs) Hold(held []Held) { docs.held = held }

// Holds are the addresses that [Plan] gives: what the next run is to be told by [Docs.Hold].
func (docs *Docs) Holds() (out []Held) {
	l := docs.allot()
	for i := range docs.VMIs {
		v := &docs.VMIs[i]
		for j := range v.Spec.Interfaces {
			if lease := l.given[[2]int{i, j}]; lease != nil {
				nad := docs.leased(v, j)
				out = append(out, Held{Networks: nad.networks(), Addr: lease.Address.Addr(), Guest: v.guestKey(j)})
			}
		}
	}
	return out
}

// leases gives every interface whose definition has an ipam its address, by the places of VMI and interface.
// Definitions that name the same bridge and VLAN are one network, and so is one definition in several namespaces: there
// no two guests get the same. A guest that is known from before gets what it had; the others what is free, in order.
func (docs *Docs) leases() (leases map[[2]int]*Lease, faults []Fault) {
	l := docs.allot()
	return l.given, l.faults
}

// allotment is who gets which address. Addresses are known by their network's names and themselves.
type allotment struct {
	given  map[[2]int]*Lease
	mine   map[networkAddr]bool // given to a guest of this run
	theirs map[networkAddr]bool // held
	faults []Fault
}

// networkAddr is an address of a network, by one of that's names.
type networkAddr struct {
	network string
	addr    netip.Addr
}

func (docs *Docs) allot() *allotment {
	l := &allotment{given: map[[2]int]*Lease{}, mine: map[networkAddr]bool{}, theirs: map[networkAddr]bool{}}
	for _, h := range docs.held {
		for _, n := range h.Networks {
			l.theirs[networkAddr{n, h.Addr}] = true
		}
	}
	docs.eachLeased(func(i, j int, nad *NAD) { docs.keep(l, i, j, nad) })
	docs.eachLeased(func(i, j int, nad *NAD) {
		if l.given[[2]int{i, j}] != nil {
			return
		}
		networks := nad.networks()
		lease, ok := nad.Switch.IPAM.Lease(func(a netip.Addr) bool { return in(l.mine, networks, a) || in(l.theirs, networks, a) })
		if !ok {
			lease, ok = docs.inherit(l, nad)
		}
		if ok {
			l.give(i, j, nad, lease)
			return
		}
		if v := &docs.VMIs[i]; len(l.faults) < maxFaults {
			f := &v.Spec.Interfaces[j]
			k, _ := v.multusOf(f)
			l.faults = append(l.faults, v.fault(Error, v.networkPath(k)+".multus.networkName",
				"no address is left in NetworkAttachmentDefinition %s (%s) for interface %q; enlarge its range", nad.Key(), nad.place(), f.Name))
		}
	})
	return l
}

// keep gives an interface the address that it had, if it may still have it.
func (docs *Docs) keep(l *allotment, i, j int, nad *NAD) {
	guest, networks := docs.VMIs[i].guestKey(j), nad.networks()
	for k := len(docs.held) - 1; k >= 0; k-- {
		h := &docs.held[k]
		if h.Guest != guest || h.Networks[0] != networks[0] && h.Networks[1] != networks[1] {
			continue
		}
		if lease, ok := nad.Switch.IPAM.LeaseOf(h.Addr); ok && !in(l.mine, networks, h.Addr) {
			l.give(i, j, nad, lease)
			return
		}
	}
}

// inherit finds an address whose guest is gone, the one that was held longest.
func (docs *Docs) inherit(l *allotment, nad *NAD) (Lease, bool) {
	networks := nad.networks()
	for _, h := range docs.held {
		if !h.Gone || h.Networks[0] != networks[0] && h.Networks[1] != networks[1] || in(l.mine, networks, h.Addr) {
			continue
		}
		if lease, ok := nad.Switch.IPAM.LeaseOf(h.Addr); ok {
			return lease, true
		}
	}
	return Lease{}, false
}

// in says whether an address of a network is in a set.
func in(set map[networkAddr]bool, networks [2]string, a netip.Addr) bool {
	for _, n := range networks {
		if set[networkAddr{n, a}] {
			return true
		}
	}
	return false
}

func (l *allotment) give(i, j int, nad *NAD, lease Lease) {
	l.given[[2]int{i, j}] = &lease
	for _, n := range nad.networks() {
		l.mine[networkAddr{n, lease.Address.Addr()}] = true
	}
}

// eachLeased calls do for every interface whose definition gives it an address, in order.
func (docs *Docs) eachLeased(do func(i, j int, nad *NAD)) {
	for i := range docs.VMIs {
		v := &docs.VMIs[i]
		for j := range v.Spec.Interfaces {
			if nad := docs.leased(v, j); nad != nil {
				do(i, j, nad)
			}
		}
	}
}

// leased is the definition that gives an interface its address, nil if none does.
func (docs *Docs) leased(v *VMI, j int) *NAD {
	f := &v.Spec.Interfaces[j]
	_, network := v.multusOf(f)
	if network == nil || !f.has(Bridge) || f.State == Absent {
		return nil
	}
	nad := docs.nadOf(v, network.NetworkName)
	if nad == nil || nad.Switch == nil || nad.Switch.IPAM == nil || len(nad.Switch.IPAM.Ranges) == 0 {
		return nil
	}
	return nad
}

// networks are the names of a definition's network: its own, and that of its bridge and VLAN.
func (n *NAD) networks() [2]string {
	s := n.Switch
	return [2]string{n.Key(), fmt.Sprintf("%v %s %d", s.OVS, s.Bridge, s.untagged())}
}

// guestKey names a guest's interface among all guests.
func (v *VMI) guestKey(j int) string {
	return namespaceOr(v.Namespace) + "/" + v.Name + "/" + v.Spec.Interfaces[j].Name
}
