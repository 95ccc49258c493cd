package uplink

import (
	"bytes"
	"compress/gzip"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"
)

// silencePrefix begins the names of the tables that keep links silent.
const silencePrefix = "sidewire-bridge-"

func silenceTable(link string) *nftables.Table {
	return &nftables.Table{Name: silencePrefix + link, Family: nftables.TableFamilyNetdev}
}

// silence keeps a link's frames from the kernel, and the kernel's from the link.
// What the link was is written into the table too: it outlasts a container whose
// files do not. Without nftables silence returns SilenceAddress and why.
func silence(link string, was *Saved) (Silence, error) {
	err := silenceBy(link, was, true)
	if err == nil {
		return SilenceBoth, nil
	}
	if silenceBy(link, was, false) == nil {
		return SilenceIngress, nil
	}
	return SilenceAddress, err
}

// silenceBy makes the table anew, at once: what a crashed run left goes with the
// same transaction.
func silenceBy(link string, was *Saved, egress bool) error {
	note, err := was.note()
	if err != nil {
		return err
	}
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("nftables: %w", err)
	}
	t := silenceTable(link)
	c.AddTable(t)
	c.DelTable(t)
	c.AddTable(t)
	saved := c.AddChain(&nftables.Chain{Name: savedChain, Table: t})
	for note != "" {
		n := min(len(note), commentMax)
		c.AddRule(&nftables.Rule{
			Table: t, Chain: saved, Exprs: []expr.Any{&expr.Verdict{Kind: expr.VerdictAccept}},
			UserData: userdata.AppendString(nil, userdata.TypeComment, note[:n]),
		})
		note = note[n:]
	}
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

// endSilence lets the kernel speak on the link again. What it was stays noted.
func endSilence(link string) error {
	return changeSilence(link, func(c *nftables.Conn, t *nftables.Table) error {
		chains, err := c.ListChainsOfTableFamily(t.Family)
		for _, ch := range chains {
			if ch.Table.Name == t.Name && ch.Hooknum != nil {
				c.DelChain(ch)
			}
		}
		return err
	})
}

// forgetSilence removes the table, if there is one.
func forgetSilence(link string) error {
	return changeSilence(link, func(c *nftables.Conn, t *nftables.Table) error {
		c.DelTable(t)
		return nil
	})
}

func changeSilence(link string, change func(*nftables.Conn, *nftables.Table) error) error {
	c, err := nftables.New()
	if err != nil {
		return nil // without nftables nothing was made
	}
	err = change(c, silenceTable(link))
	if err == nil {
		err = c.Flush()
	}
	switch {
	case err == nil, errors.Is(err, unix.ENOENT), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EPROTONOSUPPORT), errors.Is(err, unix.EINVAL):
		return nil
	}
	return nftError(err)
}

// noted lists what the tables of the current namespace say that links were. Whom
// the kernel does not let look finds none.
func noted() (out []*Saved) {
	c, err := nftables.New()
	if err != nil {
		return nil
	}
	tables, err := c.ListTablesOfFamily(nftables.TableFamilyNetdev)
	if err != nil {
		return nil
	}
	for _, t := range tables {
		if !strings.HasPrefix(t.Name, silencePrefix) {
			continue
		}
		rs, err := c.GetRules(t, &nftables.Chain{Name: savedChain, Table: t})
		if err != nil {
			continue
		}
		note := ""
		for _, r := range rs {
			part, _ := userdata.GetString(r.UserData, userdata.TypeComment)
			note += part
		}
		if s := readNote(note); s != nil {
			out = append(out, s)
		}
	}
	return out
}

// note is what was written down, as short text.
func (s *Saved) note() (string, error) {
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	if err := errors.Join(json.NewEncoder(z).Encode(s), z.Close()); err != nil {
		return "", fmt.Errorf("note of %s: %w", s.Link, err)
	}
	return base64.StdEncoding.EncodeToString(b.Bytes()), nil
}

// readNote is nil for what is no such note.
func readNote(text string) *Saved {
	z, err := gzip.NewReader(base64.NewDecoder(base64.StdEncoding, strings.NewReader(text)))
	if err != nil {
		return nil
	}
	s := &Saved{}
	if json.NewDecoder(io.LimitReader(z, maxState)).Decode(s) != nil || !s.whole() || s.Version != savedVersion {
		return nil
	}
	return s
}
