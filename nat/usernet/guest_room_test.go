package usernet_test

import (
	"crypto/sha256"
	"encoding/hex"
	"io"

	"sidewire/nat/usernet"
	"sidewire/vhostuser"
)

func roomOf(d *vhostuser.Device, pair int) usernet.Room { return d.Reserver(pair) }

func sumOf(r io.Reader) string {
	h := sha256.New()
	io.Copy(h, r)
	return hex.EncodeToString(h.Sum(nil))
}
