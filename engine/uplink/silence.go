package uplink

import (
	"errors"
	"fmt"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

func silenceTable(link string) *nftables.Table {
	return &nftables.Table{Name: "sidewire-bridge-" + link, Family: nftables.TableFamilyNetdev}
}

// silence keeps a link's frames from the kernel, and the kernel's from the link.
// Without nftables it returns SilenceAddress and why.
func silence(link string) (Silence, error) {
	err := silenceBy(link, true)
	if err == nil {
		return SilenceBoth, nil
	}
	if silenceBy(link, false) == nil {
		return SilenceIngress, nil
	}
	return SilenceAddress, err
}

// silenceBy makes the table anew, at once: what a crashed run left goes with the
// same transaction.
func silenceBy(link string, egress bool) error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("nftables: %w", err)
	}
	t := silenceTable(link)
	c.AddTable(t)
	c.DelTable(t)
	c.AddTable(t)
	drop := nftables.ChainPolicyDrop
	chain := func(name string, h *nftables.ChainHook) *nftables.Chain {
		return c.AddChain(&nftables.Chain{
			Name: name, Table: t, Type: nftables.ChainTypeFilter, Hooknum: h, Priority: nftables.ChainPriorityRef(0),
			Device: link, Policy: &drop,
		})
	}
	chain("ingress", nftables.ChainHookIngress)
	if egress {
		c.AddRule(&nftables.Rule{Table: t, Chain: chain("egress", nftables.ChainHookEgress), Exprs: []expr.Any{
			&expr.Meta{Key: expr.MetaKeyMARK, Register: 1},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.NativeEndian.PutUint32(Mark)},
			&expr.Verdict{Kind: expr.VerdictAccept},
		}})
	}
	if err := c.Flush(); err != nil {
		return nftError(err)
	}
	return nil
}

// endSilence removes the table, if there is one.
func endSilence(link string) error {
	c, err := nftables.New()
	if err != nil {
		return nil // without nftables nothing was made
	}
	c.DelTable(silenceTable(link))
	err = c.Flush()
	switch {
	case err == nil, errors.Is(err, unix.ENOENT), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EPROTONOSUPPORT):
		return nil
	}
	return nftError(err)
}
