package main

import (
	"context"
	"fmt"
	"io"
	"net/netip"
	"text/tabwriter"
	"time"

	"sidewire/engine/frame"
)

// LeaseStatus is an address that a guest has taken.
type LeaseStatus struct {
	Interface string     `json:"interface"` // VMI/INTERFACE
	Address   netip.Addr `json:"address"`
	MAC       frame.MAC  `json:"mac"`
	Hostname  string     `json:"hostname,omitempty"` // that the guest says of itself
	Since     time.Time  `json:"since"`
	Expiry    time.Time  `json:"expiry"`
}

// Leases implements controller.
func (s *server) Leases() []LeaseStatus {
	out := []LeaseStatus{}
	open, _ := s.serving()
	for _, n := range open {
		st := n.status(s)
		for _, l := range st.Leases {
			out = append(out, LeaseStatus{st.Name, l.Addr, l.MAC, l.Hostname, l.Since, l.Expiry})
		}
	}
	return out
}

// leasesCommand lists the leases of a running sidewire.
func leasesCommand(ctx context.Context, args []string, out, errw io.Writer) error {
	return show(ctx, "leases", args, out, errw, printLeaseList)
}

func printLeaseList(out io.Writer, leases []LeaseStatus) error {
	w := tabwriter.NewWriter(out, 0, 4, 2, ' ', 0)
	fmt.Fprintln(w, "interface\taddress\tMAC\thost name\tsince\tuntil")
	for _, l := range leases {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", l.Interface, l.Address, l.MAC, orElse(l.Hostname, "-"),
			l.Since.Format(time.DateTime), l.Expiry.Format(time.DateTime))
	}
	return w.Flush()
}
