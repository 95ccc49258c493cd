package main

// packetCells are the points of the packet paths that are measured, the most
// telling ones alone if quick.
func packetCells(quick bool) (out []cell) {
	add := func(c cell) {
		if c.Queues == 0 {
			c.Queues = 1
		}
		if c.Size == 0 {
			c.Size = 64
		}
		out = append(out, c)
	}
	if quick {
		for _, packed := range []bool{false, true} {
			add(cell{Path: guestToGuest, Packed: packed})
			add(cell{Path: guestToGuest, Size: 1500, Packed: packed})
		}
		add(cell{Path: guestTx})
		add(cell{Path: guestRx})
		add(cell{Path: roundTrip})
		return out
	}
	for _, path := range []string{guestToGuest, guestTx, guestRx} {
		for _, packed := range []bool{false, true} {
			for _, size := range []int{64, 512, 1500, 9000} {
				add(cell{Path: path, Size: size, Packed: packed})
			}
			add(cell{Path: path, Packed: packed, Queues: 2})
		}
	}
	for _, packed := range []bool{false, true} {
		add(cell{Path: guestToGuest, Size: gsoSize, GSO: true, Packed: packed})
	}
	for _, packed := range []bool{false, true} {
		add(cell{Path: roundTrip, Packed: packed})
		add(cell{Path: roundTrip, Packed: packed, Kicks: true})
	}
	return out
}
