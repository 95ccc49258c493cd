package handoff

import (
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// VFSettings are what a virtual function's owner keeps it to, whatever the guest
// does. They are the knobs of sriov-cni.
type VFSettings struct {
	MAC     net.HardwareAddr // nil: as it is
	VLAN    *int             // 0: none; nil: as it is
	VLANQoS int
	// VLANProto is 802.1q, also if empty, or 802.1ad.
	VLANProto            string
	SpoofCheck, Trust    *bool // nil: as it is
	LinkState            string
	MinTxRate, MaxTxRate *int // Mbit/s, 0: no limit; nil: as it is
}

// vfState is how a virtual function is set.
type vfState struct {
	MAC        string `json:"mac,omitempty"`
	VLAN       int    `json:"vlan"`
	VLANQoS    int    `json:"vlan_qos,omitempty"`
	VLANProto  int    `json:"vlan_proto,omitempty"` // EtherType, 0 if the driver does not say
	SpoofCheck bool   `json:"spoofchk"`
	Trust      bool   `json:"trust"`
	LinkState  uint32 `json:"link_state"`
	MinTxRate  int    `json:"min_tx_rate"`
	MaxTxRate  int    `json:"max_tx_rate"`
}

// hostLinks is what is asked of the links of the current namespace; tests have a
// physical function's link without its hardware.
type hostLinks interface {
	// vf reads a virtual function of a physical one's link, set one setting of it.
	vf(link string, n int) (vfState, error)
	set(link string, n int, c vfChange) error
	// use says for what the host uses a link, empty if for nothing.
	use(link string) (string, error)
	state(link string) (mtu int, up bool, err error)
}

// vfChange is one setting, and what it is to become.
type vfChange struct {
	what string
	to   vfState
}

// What a vfChange sets. VLAN, priority and protocol are one, so are the rates.
const (
	setMAC   = "MAC"
	setVLAN  = "VLAN"
	setSpoof = "spoofchk"
	setTrust = "trust"
	setLink  = "link_state"
	setRate  = "rates"
)

var linkStates = []string{"auto", "enable", "disable"} // by their numbers in the kernel

var (
	errLinkState = errors.New(`link_state must be "auto", "enable" or "disable"`)
	errVLANProto = errors.New(`vlanProto must be "802.1q" or "802.1ad"`)
)

// check says what is wrong with settings that no definition checked.
func (c *VFSettings) check() error {
	switch {
	case c.MAC != nil && len(c.MAC) != 6:
		return fmt.Errorf("MAC %s is not one of Ethernet", c.MAC)
	case c.VLAN != nil && (*c.VLAN < 0 || *c.VLAN > 4094):
		return fmt.Errorf("VLAN %d must be between 0 and 4094", *c.VLAN)
	case c.VLANQoS < 0 || c.VLANQoS > 7:
		return fmt.Errorf("vlanQoS %d must be between 0 and 7", c.VLANQoS)
	}
	if _, err := c.apply(vfState{}); err != nil {
		return err
	}
	return nil
}

// apply is what a function that is set like before is to be set like.
func (c *VFSettings) apply(before vfState) (vfState, error) {
	s := before
	if c.MAC != nil {
		s.MAC = c.MAC.String()
	}
	proto := unix.ETH_P_8021Q
	switch strings.ToLower(c.VLANProto) {
	case "", "802.1q":
	case "802.1ad":
		proto = unix.ETH_P_8021AD
	default:
		return s, errVLANProto
	}
	if c.VLAN != nil {
		s.VLAN, s.VLANQoS = *c.VLAN, c.VLANQoS
		if s.VLAN != 0 {
			s.VLANProto = proto
		}
	}
	if c.SpoofCheck != nil {
		s.SpoofCheck = *c.SpoofCheck
	}
	if c.Trust != nil {
		s.Trust = *c.Trust
	}
	if c.LinkState != "" {
		n := slices.Index(linkStates, c.LinkState)
		if n < 0 {
			return s, errLinkState
		}
		s.LinkState = uint32(n)
	}
	if c.MinTxRate != nil {
		s.MinTxRate = *c.MinTxRate
	}
	if c.MaxTxRate != nil {
		s.MaxTxRate = *c.MaxTxRate
	}
	return s, nil
}

// changes lists what leads from one state to another. Trust comes first, for
// a driver may refuse a MAC to a function that is not trusted, and the link last.
func changes(from, to vfState) (list []vfChange) {
	add := func(what string, differ bool) {
		if differ {
			list = append(list, vfChange{what, to})
		}
	}
	add(setTrust, from.Trust != to.Trust)
	add(setMAC, from.MAC != to.MAC)
	add(setVLAN, from.VLAN != to.VLAN || from.VLANQoS != to.VLANQoS || from.VLANProto != to.VLANProto && to.VLAN != 0)
	add(setSpoof, from.SpoofCheck != to.SpoofCheck)
	add(setRate, from.MinTxRate != to.MinTxRate || from.MaxTxRate != to.MaxTxRate)
	add(setLink, from.LinkState != to.LinkState)
	return list
}

// asked is whether there is anything to set.
func (c *VFSettings) asked() bool {
	return c.MAC != nil || c.VLAN != nil && *c.VLAN != 0 || c.SpoofCheck != nil || c.Trust != nil || c.LinkState != "" ||
		c.MinTxRate != nil || c.MaxTxRate != nil
}

// command is what an administrator would type for a change.
func (c vfChange) command(link string, n int) string {
	onOff := map[bool]string{true: "on", false: "off"}
	to, what := c.to, ""
	switch c.what {
	case setTrust:
		what = "trust " + onOff[to.Trust]
	case setMAC:
		what = "mac " + to.MAC
	case setVLAN:
		what = fmt.Sprintf("vlan %d qos %d", to.VLAN, to.VLANQoS)
		if to.VLANProto == unix.ETH_P_8021AD {
			what += " proto 802.1ad"
		}
	case setSpoof:
		what = "spoofchk " + onOff[to.SpoofCheck]
	case setRate:
		what = fmt.Sprintf("min_tx_rate %d max_tx_rate %d", to.MinTxRate, to.MaxTxRate)
	case setLink:
		what = "state " + linkStates[min(to.LinkState, 2)]
	}
	return fmt.Sprintf("ip link set %s vf %d %s", link, n, what)
}

// refusedSetting says that a setting was not taken.
func refusedSetting(link string, n int, c vfChange, err error) error {
	if errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("the driver of link %s cannot set %s of a virtual function (%s): leave it out", link, c.what, c.command(link, n))
	}
	return fmt.Errorf("set %s (%s): %w", c.what, c.command(link, n), err)
}

func isZeroMAC(mac string) bool { return strings.Trim(mac, "0:") == "" }

// kernelLinks are the links of the current namespace.
type kernelLinks struct{}

func (kernelLinks) vf(link string, n int) (vfState, error) {
	l, err := netlink.LinkByName(link)
	if err != nil {
		return vfState{}, err
	}
	for _, v := range l.Attrs().Vfs {
		if v.ID == n {
			return vfState{
				MAC: v.Mac.String(), VLAN: v.Vlan, VLANQoS: v.Qos, VLANProto: v.VlanProto, SpoofCheck: v.Spoofchk, Trust: v.Trust == 1,
				LinkState: v.LinkState, MinTxRate: int(v.MinTxRate), MaxTxRate: int(v.MaxTxRate),
			}, nil
		}
	}
	return vfState{}, fmt.Errorf("link %s has no virtual function %d", link, n)
}

func (kernelLinks) set(link string, n int, c vfChange) error {
	l, err := netlink.LinkByName(link)
	if err != nil {
		return err
	}
	switch to := c.to; c.what {
	case setTrust:
		return netlink.LinkSetVfTrust(l, n, to.Trust)
	case setMAC:
		mac, err := net.ParseMAC(to.MAC)
		if err != nil {
			return err
		}
		return netlink.LinkSetVfHardwareAddr(l, n, mac)
	case setVLAN:
		if to.VLANProto == unix.ETH_P_8021AD {
			return netlink.LinkSetVfVlanQosProto(l, n, to.VLAN, to.VLANQoS, to.VLANProto)
		}
		return netlink.LinkSetVfVlanQos(l, n, to.VLAN, to.VLANQoS) // drivers that know one protocol only take this
	case setSpoof:
		return netlink.LinkSetVfSpoofchk(l, n, to.SpoofCheck)
	case setRate:
		return netlink.LinkSetVfRate(l, n, to.MinTxRate, to.MaxTxRate)
	case setLink:
		return netlink.LinkSetVfState(l, n, to.LinkState)
	}
	return nil
}

func (kernelLinks) state(link string) (mtu int, up bool, err error) {
	l, err := netlink.LinkByName(link)
	if err != nil {
		return 0, false, err
	}
	return l.Attrs().MTU, l.Attrs().RawFlags&unix.IFF_UP != 0, nil
}

func (kernelLinks) use(link string) (string, error) {
	l, err := netlink.LinkByName(link)
	if err != nil {
		return "", err
	}
	if master := l.Attrs().MasterIndex; master != 0 {
		name := fmt.Sprintf("link %d", master)
		if m, err := netlink.LinkByIndex(master); err == nil {
			name = m.Attrs().Name
		}
		return "is a port of " + name, nil
	}
	addrs, err := netlink.AddrList(l, netlink.FAMILY_ALL)
	if err != nil {
		return "", err
	}
	for _, a := range addrs {
		if a.IP.IsGlobalUnicast() {
			return "has the address " + a.IPNet.String(), nil
		}
	}
	return "", nil
}
