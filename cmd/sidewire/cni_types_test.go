package main

import (
	"fmt"
	"testing"

	"github.com/stretchr/testify/assert"

	"sidewire/engine/enginetest"
	"sidewire/vhostuser/vhosttest"
)

// Whatever plugin a definition names, the link that it left is the network, by both of KubeVirt's names for it; so is one
// that a flag names.
func TestAnyCNIRow5Row6(t *testing.T) {
	enginetest.Need(t, "root", "netns", "tun", "ip", "ping")
	for _, c := range []struct{ config, link string }{
		{`{"cniVersion": "0.3.1", "type": "ovs", "bridge": "br1", "vlan": 100}`, "poda08a0fcbdea"},
		{`{"cniVersion": "0.3.1", "name": "ptp-mac", "plugins": [{"type": "ptp", "ipam": {"type": "host-local", "subnet": "10.1.1.0/24"}}, {"type": "tuning"}]}`, "poda08a0fcbdea"},
		{`{"type": "flannel", "delegate": {"isDefaultGateway": true}}`, "net1"},
		{`{"type": "unheard-of", "mtu": "none of our business"}`, "poda08a0fcbdea"},
		{`{"type": "sriov", "spoofchk": "off"}`, "poda08a0fcbdea"},
	} {
		t.Run(c.config, func(t *testing.T) {
			ns, outside := enginetest.NewNetNS(t), enginetest.NewNetNS(t)
			enginetest.Veth(t, ns, c.link, outside, "eth0")
			enginetest.Must(t, outside.Addr("eth0", "10.9.0.250/24"), ns.SetMTU(c.link, 1400), outside.SetMTU("eth0", 1400))
			p := startLAN(t, onLAN("vm1", "blue", 1)+definition("blue", c.config), "--netns", ns.Path)
			assert.True(t, plugVM(t, p, "vm1", vhosttest.Options{}).withAddr("10.9.0.1/24").pings("10.9.0.250"))
			m := p.status().Machines
			assert.Equal(t, []MachineStatus{{Name: "vm1", Interfaces: []MachineInterface{{Name: "net", MAC: p.macOf("vm1/net").String(), PodInterfaceName: c.link,
				InfoSource: "domain, multus-status", QueueCount: 1, LinkState: "up"}}}}, m)
			o := sidewire(t, "qemu-args", "-f", p.vmi, "--netns", ns.Path, "--socket-dir", p.dir)
			assert.Contains(t, o.out, "host_mtu=1400")
		})
	}
	ns, _ := node(t)
	p := startLAN(t, onLAN("vm1", "blue", 1)+definition("blue", `{"type": "unheard-of"}`), "--netns", ns.Path, "--uplink", "blue=eth1")
	assert.Equal(t, "eth1", p.nicOf("vm1/net").Links[0].Name)
	docs := writeFile(t, "docs.yaml", onLAN("vm1", "blue", 1)+definition("blue", `{"type": "unheard-of"}`))
	sidewire(t, "run", "-f", docs, "--netns", ns.Path, "--socket-dir", t.TempDir()).says(t, exitInput, "run",
		[]string{"vm1/net", fmt.Sprintf("default/blue (%s:", docs), `type "unheard-of"`, "poda08a0fcbdea or net1", "--uplink net=LINK", "bridge, cnv-bridge, ovs"})
}
