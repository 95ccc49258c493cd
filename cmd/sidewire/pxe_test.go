package main

import (
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv4/nclient4"
	"github.com/insomniacslk/dhcp/dhcpv4/server4"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
	"sidewire/vhostuser/vhosttest"
)

const bootTimeout = 150 * time.Second

// bootScript is an image that iPXE takes for a script, long enough to need many
// blocks; it says so, and which address it has.
func bootScript(said string) []byte {
	b := []byte("#!ipxe\n")
	for range 2000 {
		b = append(b, "# a long way\n"...)
	}
	return append(b, "echo "+said+" ${ip}\nshell\n"...)
}

// names gathers what was asked for.
type names struct {
	mu  sync.Mutex
	all []string
}

func (n *names) add(name string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.all = append(n.all, name)
}

func (n *names) list() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return append([]string(nil), n.all...)
}

// guideBoot starts the guide's VM as it stands, whose NICs boot in this order:
// masquerade, then VLAN 100 of a bridge of Open vSwitch, which leads to a
// namespace of its own.
func guideBoot(t *testing.T, flags ...string) (w *enginetest.World, lan *enginetest.NetNS, p *process, args func() []string) {
	t.Helper()
	enginetest.Need(t, "root", "netns", "tun", "nft", "ip", "qemu", "ipxe")
	w = enginetest.NewWorld(t, enginetest.WorldOptions{})
	lan = enginetest.NewNetNS(t)
	enginetest.Veth(t, w.Pod, "eth1", lan, "eth0")
	atRest(t, w.Pod, "eth1")
	vmi, err := filepath.Abs("../../engine/vmi/testdata/guide/03-ovs-vm.yaml")
	require.NoError(t, err)
	nad, err := filepath.Abs("../../engine/vmi/testdata/guide/02-ovs-nad.yaml")
	require.NoError(t, err)
	p = &process{t: t, dir: socketDir(t), log: &logBuffer{}, vmi: vmi}
	p.start(w, append([]string{"--nad", nad, "--uplink", "ovs-net=eth1"}, flags...)...)
	t.Cleanup(func() {
		p.stop()
		if t.Failed() {
			t.Logf("sidewire's log:\n%s", p.log)
		}
	})
	return w, lan, p, func() []string { return qemuArgs(t, w, p, "--nad", nad, "--uplink", "ovs-net=eth1") }
}

// boot starts a guest without a disk and waits until its console shows a text.
func boot(t *testing.T, p *process, args []string, text string) *enginetest.VM {
	t.Helper()
	g, err := enginetest.StartIPXE(enginetest.GuestOptions{Args: args, Memory: -1, CPUs: -1, Machine: "q35"})
	require.NoError(t, err)
	t.Cleanup(g.Stop)
	if err := g.WaitConsole(text, bootTimeout); err != nil {
		t.Fatalf("%v\n%s\n%s", err, g.Console(), p.dump())
	}
	return g
}

// The guide's example boots from its masquerade NIC: the TFTP server is a name,
// which the ROM is told the address of.
func TestRow29Row30Row31PXEFromMasquerade(t *testing.T) {
	t.Parallel() // most of its time is QEMU's
	for _, path := range []string{"packet", "socket"} {
		t.Run(path, func(t *testing.T) {
			w, _, p, args := guideBoot(t, "--path", path)
			var asked names
			w.Outside.ServeTFTP(t, enginetest.OutsideIP+":69", map[string][]byte{"default_image.bin": bootScript("from-masquerade")}, asked.add)
			boot(t, p, args(), "from-masquerade 10.0.2.2")
			assert.Contains(t, asked.list(), "default_image.bin")
		})
	}
}

// Where the first NIC does not boot, the second does by the order given, from
// the DHCP and the TFTP server of its own network: a guest of another sidewire,
// in VLAN 100 too.
func TestRow28Row29PXEFailsOverToTheSecondNIC(t *testing.T) {
	t.Parallel() // most of its time is QEMU's
	w, lan, p, args := guideBoot(t)
	var first names
	w.Outside.ServeTFTP(t, enginetest.OutsideIP+":69", nil, first.add)
	far := startLAN(t, onLAN("peer", "vlan-100", 1)+definition("vlan-100", `{"type": "ovs", "bridge": "br1", "vlan": 100}`),
		"--netns", lan.Path, "--uplink", "vlan-100=eth0")
	server := plugVM(t, far, "peer", vhosttest.Options{}).withAddr("192.0.2.1/24")
	server.ns.ServeTFTP(t, "192.0.2.1:69", map[string][]byte{"second.bin": bootScript("from-the-second")}, nil)
	serveDHCP(t, server.ns, "eth0", dhcpv4.WithYourIP(net.IPv4(192, 0, 2, 77)), dhcpv4.WithServerIP(net.IPv4(192, 0, 2, 1)),
		dhcpv4.WithNetmask(net.CIDRMask(24, 32)), dhcpv4.WithLeaseTime(3600),
		func(m *dhcpv4.DHCPv4) { m.BootFileName = "second.bin" })
	boot(t, p, args(), "from-the-second 192.0.2.77")
	assert.Contains(t, first.list(), "default_image.bin", "the first NIC was tried first")
}

// serveDHCP is a DHCP server that is not ours: it leases one address.
func serveDHCP(t *testing.T, ns *enginetest.NetNS, link string, with ...dhcpv4.Modifier) {
	t.Helper()
	handler := func(conn net.PacketConn, peer net.Addr, m *dhcpv4.DHCPv4) {
		kind := dhcpv4.MessageTypeOffer
		if m.MessageType() == dhcpv4.MessageTypeRequest {
			kind = dhcpv4.MessageTypeAck
		}
		r, err := dhcpv4.NewReplyFromRequest(m, append([]dhcpv4.Modifier{
			dhcpv4.WithMessageType(kind), dhcpv4.WithServerIP(net.IPv4(192, 0, 2, 1)),
			dhcpv4.WithOption(dhcpv4.OptServerIdentifier(net.IPv4(192, 0, 2, 1))),
		}, with...)...)
		if err != nil {
			return
		}
		_, _ = conn.WriteTo(r.ToBytes(), &net.UDPAddr{IP: net.IPv4bcast, Port: dhcpv4.ClientPort})
	}
	var s *server4.Server
	require.NoError(t, ns.Do(func() (err error) {
		s, err = server4.NewServer(link, &net.UDPAddr{Port: dhcpv4.ServerPort}, handler)
		return err
	}))
	go func() { _ = s.Serve() }()
	t.Cleanup(func() { s.Close() })
}

// A lease of a definition has the address of a TFTP server that is a name too, as
// the namespace's resolvers know it.
func TestRow31TFTPServerByNameOnASwitch(t *testing.T) {
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	vm := strings.Replace(onLAN("vm1", "blue", 1), "bridge: {}}", "bridge: {}, dhcpOptions: {tftpServerName: "+enginetest.TFTPName+", bootFileName: x}}", 1)
	p := startLAN(t, vm+definition("blue", `{"type": "bridge", `+hostLocal+`}`), "--netns", w.Pod.Path, "--resolv-conf", w.ResolvConf)
	enginetest.Eventually(t, soon, func() bool { return strings.Contains(p.log.String(), "address="+enginetest.OutsideIP) })
	v := plugVM(t, p, "vm1", vhosttest.Options{})
	got := make(chan *dhcpv4.DHCPv4, 1)
	require.NoError(t, v.ns.Do(func() error {
		c, err := nclient4.New("eth0")
		if err != nil {
			return err
		}
		defer c.Close()
		offer, err := c.DiscoverOffer(t.Context())
		got <- offer
		return err
	}))
	offer := <-got
	assert.Equal(t, enginetest.OutsideIP, offer.ServerIPAddr.String())
	assert.Equal(t, enginetest.TFTPName, offer.TFTPServerName())
}
