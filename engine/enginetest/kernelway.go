package enginetest

import (
	"errors"
	"fmt"
	"os/exec"
	"strings"
)

// KernelTap is the name of the pod's tap in KernelMasquerade.
const KernelTap = "tap0"

// KernelMasquerade makes the pod of a world masquerade a guest as KubeVirt's
// launcher does it with the kernel: bridge k6t-eth0 with the gateway's address
// and the tap as its port, forwarding, and nftables NAT. The tap must exist in
// the pod. ports are those of the VMI, such as "tcp:80"; none means all.
//
// It is what sidewire's masquerade is compared with.
func (w *World) KernelMasquerade(ports ...string) error {
	ns := w.Pod
	steps := [][]string{
		{"ip", "link", "add", "k6t-eth0", "address", "02:00:00:00:00:00", "type", "bridge"},
		{"ip", "link", "set", KernelTap, "master", "k6t-eth0", "up"},
		{"ip", "addr", "add", "10.0.2.1/24", "dev", "k6t-eth0"},
		{"ip", "link", "set", "k6t-eth0", "up"},
	}
	var errs []error
	for _, s := range steps {
		errs = append(errs, ns.Run(s[0], s[1:]...))
	}
	errs = append(errs,
		ns.Sysctl("net/ipv4/ip_forward", "1"),
		ns.Sysctl("net/ipv4/conf/k6t-eth0/route_localnet", "1"),
		ns.nft(kernelRules(ports)))
	return errors.Join(errs...)
}

// nft loads a ruleset in the namespace.
func (ns *NetNS) nft(rules string) error {
	cmd := ns.Command("nft", "-f", "-")
	cmd.Stdin = strings.NewReader(rules)
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return fmt.Errorf("nft: %s", out)
	}
	return err
}

// kernelRules is KubeVirt's nat table for the pod's eth0.
func kernelRules(ports []string) string {
	var pre, post, out strings.Builder
	if len(ports) == 0 {
		pre.WriteString("  counter dnat to 10.0.2.2\n")
		post.WriteString("  ip saddr 127.0.0.1 counter snat to 10.0.2.1\n")
		out.WriteString("  ip daddr 127.0.0.1 counter dnat to 10.0.2.2\n")
	}
	for _, p := range ports {
		proto, port, _ := strings.Cut(p, ":")
		fmt.Fprintf(&pre, "  %s dport %s counter dnat to 10.0.2.2\n", proto, port)
		fmt.Fprintf(&post, "  %s dport %s ip saddr 127.0.0.1 counter snat to 10.0.2.1\n", proto, port)
		fmt.Fprintf(&out, "  ip daddr 127.0.0.1 %s dport %s counter dnat to 10.0.2.2\n", proto, port)
	}
	return `table ip nat {
 chain KUBEVIRT_PREINBOUND {
` + pre.String() + ` }
 chain KUBEVIRT_POSTINBOUND {
` + post.String() + ` }
 chain prerouting {
  type nat hook prerouting priority -100
  iifname "eth0" counter jump KUBEVIRT_PREINBOUND
 }
 chain postrouting {
  type nat hook postrouting priority 100
  ip saddr 10.0.2.2 counter masquerade
  oifname "k6t-eth0" counter jump KUBEVIRT_POSTINBOUND
 }
 chain output {
  type nat hook output priority -100
` + out.String() + ` }
}
`
}
