//go:build !amd64

package virtq

// prefetch does nothing where there is no stub for it.
func prefetch([]byte, Direction) {}
