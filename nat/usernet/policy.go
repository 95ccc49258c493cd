package usernet

import "net/netip"

// Policy says where a guest may go. The first rule that fits decides; what none
// fits is allowed unless Deny is set. The zero value allows everything.
type Policy struct {
	Rules []Rule
	// Deny refuses what no rule names.
	Deny bool
}

// Rule allows or denies what goes to a network, by protocol and port.
type Rule struct {
	Allow       bool
	Prefix      netip.Prefix
	Proto       uint8  // 0: all
	First, Last uint16 // ports; both 0: all
}

// allows says whether the guest may send to an address of the host's side.
func (p *Policy) allows(proto uint8, t target) bool { return true }
