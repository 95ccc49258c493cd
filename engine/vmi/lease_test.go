package vmi

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// leasing is docs with these VMIs on a network with room for three.
func leasing(t *testing.T, names ...string) Docs {
	t.Helper()
	var b strings.Builder
	for _, n := range names {
		fmt.Fprintf(&b, "---\nkind: VirtualMachineInstance\nmetadata: {name: %s}\nspec:\n  domain: {devices: {interfaces: [{name: net, bridge: {}}]}}\n  networks: [{name: net, multus: {networkName: blue}}]\n", n)
	}
	b.WriteString("---\nkind: NetworkAttachmentDefinition\nmetadata: {name: blue}\nspec: {config: '{\"type\": \"bridge\", \"bridge\": \"br0\", \"ipam\": {\"type\": \"host-local\", \"subnet\": \"10.9.0.0/24\", \"rangeStart\": \"10.9.0.2\", \"rangeEnd\": \"10.9.0.4\"}}'}\n")
	docs, err := Parse("docs.yaml", []byte(b.String()))
	require.NoError(t, err)
	return docs
}

// addresses are those that the guests get.
func addresses(docs Docs) map[string]string {
	out := map[string]string{}
	for _, vm := range Plan(docs) {
		if l := vm.Interfaces[0].Network.Lease; l != nil {
			out[vm.Name] = l.Address.Addr().String()
		}
	}
	return out
}

// A guest keeps its address whatever guests there are beside it, and nobody else
// gets it as long as another one is left.
func TestLeasesAreKept(t *testing.T) {
	first := leasing(t, "a", "b")
	require.Equal(t, map[string]string{"a": "10.9.0.2", "b": "10.9.0.3"}, addresses(first))
	held := first.Holds()
	require.Len(t, held, 2)
	assert.Equal(t, "default/b/net", held[1].Guest)

	docs := leasing(t, "c", "b")
	assert.Equal(t, map[string]string{"c": "10.9.0.2", "b": "10.9.0.3"}, addresses(docs), "nobody is known")
	docs.Hold(held)
	assert.Equal(t, map[string]string{"c": "10.9.0.4", "b": "10.9.0.3"}, addresses(docs))
	docs.Hold(append(held, Held{Networks: [2]string{"other/red", held[0].Networks[1]}, Addr: netip.MustParseAddr("10.9.0.4"), Guest: "x"}))
	_, faults := docs.leases()
	require.Len(t, faults, 1, "the same bridge and VLAN is the same network")
	assert.Contains(t, faults[0].Message, "no address is left")
}

// When none is left, one whose guest is gone goes to another, but never one
// whose guest is there.
func TestLeasesOfTheGoneAreInherited(t *testing.T) {
	first := leasing(t, "a", "b", "c")
	held := first.Holds()
	docs := leasing(t, "d", "b")
	docs.Hold(held)
	_, faults := docs.leases()
	require.Len(t, faults, 1)
	held[2].Gone = true
	docs.Hold(held)
	assert.Equal(t, map[string]string{"d": "10.9.0.4", "b": "10.9.0.3"}, addresses(docs))
	held[1].Gone = true // it is b's own
	held[2].Gone = false
	docs.Hold(held)
	_, faults = docs.leases()
	require.Len(t, faults, 1)
}

// What is remembered is not believed where it cannot be.
func TestLeasesHeldByNobody(t *testing.T) {
	docs := leasing(t, "a", "b")
	networks := docs.Holds()[0].Networks
	hold := func(addr, guest string) Held {
		return Held{Networks: networks, Addr: netip.MustParseAddr(addr), Guest: guest}
	}
	docs.Hold([]Held{hold("10.9.0.1", "default/a/net"), hold("10.8.0.7", "default/b/net"), {Guest: "default/b/net"}})
	assert.Equal(t, map[string]string{"a": "10.9.0.2", "b": "10.9.0.3"}, addresses(docs), "not of the range")
	docs.Hold([]Held{hold("10.9.0.4", "default/a/net"), hold("10.9.0.4", "default/b/net")})
	assert.Equal(t, map[string]string{"a": "10.9.0.4", "b": "10.9.0.2"}, addresses(docs), "one address, two guests")
}

// A full book of a large network costs each guest a look at what is taken, and no
// memory for it.
func TestLeasesAmongManyHeld(t *testing.T) {
	docs := leasing(t, "a", "b")
	networks := docs.Holds()[0].Networks
	docs.NADs[0].Switch.IPAM.Ranges = []AddressRange{{
		Subnet: netip.MustParsePrefix("10.8.0.0/15"), First: netip.MustParseAddr("10.8.0.1"), Last: netip.MustParseAddr("10.9.255.254"),
	}}
	var held []Held
	a := netip.MustParseAddr("10.8.0.1")
	for range 20000 {
		held, a = append(held, Held{Networks: networks, Addr: a, Guest: "x"}), a.Next()
	}
	docs.Hold(held)
	assert.Equal(t, a, docs.Holds()[0].Addr)
	assert.Less(t, testing.AllocsPerRun(1, func() { docs.Holds() }), 2000.0, "for 20000 addresses")
}
