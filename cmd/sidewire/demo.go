package main

import (
	"context"
	"io"
)

// demoCommand builds a small world, boots a real guest in it and shows each
// thing working.
func demoCommand(ctx context.Context, args []string, out, errw io.Writer) error {
	return cannot("not built yet")
}
