package stream

import (
	"net/netip"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/dhcp"
	"sidewire/engine"
	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

// messages keeps who sent the DHCP messages that pass.
type messages struct {
	mu   sync.Mutex
	seen map[dhcpv4.MessageType]frame.MAC
}

func (s *messages) Process(b *frame.Batch) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range b.Len() {
		f := b.Frame(i).Bytes()
		const payload = frame.EthernetLen + 20 + 8
		if len(f) < payload || f[23] != frame.ProtoUDP || !enginetest.ChecksumsOK(f) {
			continue
		}
		if m, err := dhcpv4.FromBytes(f[payload:]); err == nil {
			s.seen[m.MessageType()] = frame.MAC(m.ClientHWAddr)
		}
	}
}

func (s *messages) of(typ dhcpv4.MessageType) frame.MAC {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.seen[typ]
}

// QEMU's NIC models that are not virtio, driven by iPXE, get their lease over
// the stream, whoever of us listens. One QEMU ends and starts again.
func TestQEMU(t *testing.T) {
	enginetest.Need(t, "qemu", "ipxe")
	for i, model := range []string{"e1000", "e1000e", "rtl8139", "ne2k_pci", "pcnet"} {
		t.Run(model, func(t *testing.T) {
			t.Parallel() // what a boot takes is mostly iPXE's waiting
			path := filepath.Join(t.TempDir(), "s")
			d := newDevice(t, Config{Path: path, MTU: 1500, Client: i%2 == 1})
			s := &messages{seen: map[dhcpv4.MessageType]frame.MAC{}}
			start(t, d, engine.Config{}, func(p frame.PortID) engine.Stage {
				srv, err := dhcp.New(dhcp.Config{
					Port: p, Address: netip.MustParsePrefix("10.0.2.2/24"), MTU: 1500,
					Router: netip.MustParseAddr("10.0.2.1"), ServerIP: netip.MustParseAddr("10.0.2.1"),
				})
				require.NoError(t, err)
				return stages{s, srv}
			})
			require.NoError(t, d.Listen())
			serve(t, d)
			server := "off"
			if d.cfg.Client {
				server = "on"
			}
			mac := frame.MAC{0x52, 0x54, 0, 0, 0, byte(i + 1)}
			boots := 1
			if i == 0 {
				boots = 2
			}
			for range boots {
				s.mu.Lock()
				clear(s.seen)
				s.mu.Unlock()
				g, err := enginetest.StartIPXE(enginetest.GuestOptions{Memory: 64, Args: []string{
					"-netdev", "stream,id=n0,server=" + server + ",addr.type=unix,addr.path=" + path,
					"-device", model + ",netdev=n0,bootindex=1,mac=" + mac.String(),
				}})
				require.NoError(t, err)
				t.Cleanup(g.Stop)
				if err := g.WaitConsole("net0: 10.0.2.2/255.255.255.0 gw 10.0.2.1", 90*time.Second); err != nil {
					t.Fatalf("%v\n%+v\n%v", err, d.Status(), s.seen)
				}
				assert.Equal(t, mac, s.of(dhcpv4.MessageTypeDiscover))
				assert.Equal(t, mac, s.of(dhcpv4.MessageTypeRequest))
				assert.True(t, d.Status().Connected)
				g.Stop()
				enginetest.Eventually(t, 10*time.Second, func() bool { return !d.Status().Connected })
			}
			st := d.Status()
			// A QEMU that listens may take us once more while it dies.
			assert.GreaterOrEqual(t, st.Counters["sessions"], uint64(boots))
			assert.Empty(t, st.Drops)
		})
	}
}

// stages are several, one after the other.
type stages []engine.Stage

func (ss stages) Process(b *frame.Batch) {
	for _, s := range ss {
		s.Process(b)
	}
}
