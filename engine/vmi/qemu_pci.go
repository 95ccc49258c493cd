package vmi

import (
	"fmt"
	"slices"
)

// A VMI's pciAddress names a bus by number, but bus numbers are the firmware's to give: it walks the bridges of a bus
// in the order of their slots and counts up, and a root port may ask it to leave numbers out after its own
// (bus-reserve, which SeaBIOS and OVMF obey). So there is a bridge for every bus that is named, in order, and a root port
// with nothing behind it for every gap. They sit far up on bus 0, behind the places that QEMU gives to devices
// by itself. A host bridge of a fixed number (pxb-pcie) would be simpler, but QEMU puts later devices without
// a bus onto it, and then refuses them.

// firstOwnSlot to lastOwnSlot are our bridges'; slot 31 is the chipset's.
const (
	firstOwnSlot = 0x10
	lastOwnSlot  = 0x1e
)

// buses makes the buses that addresses name, and a function 0 in each slot of which only others are used: a guest does
// not look for those otherwise. The device that is put there is QEMU's test device, which no driver takes.
func (b *qemuArgs) buses(order []Interface) error {
	slots := map[PCIAddress]bool{} // every address in use
	ports := map[uint8]bool{}      // bus to whether a root port will do: it has slot 0 only
	for _, i := range order {
		a := i.PCIAddress
		if a == nil {
			continue
		}
		if a.Domain != 0 || a.Slot > 31 || a.Function > 7 || a.Bus == 0 && a.Slot == 0 {
			return fmt.Errorf("interface %q: PCI address %s: no guest has it; use domain 0000 and a slot of 01 to 1f", i.Name, a)
		}
		slots[*a] = true
		port, seen := ports[a.Bus]
		ports[a.Bus] = a.Slot == 0 && (port || !seen)
	}
	if len(ports) == 0 {
		return nil
	}
	b.note("an interface has a PCI address: the machine must be q35, and its bus must not be taken by other bridges")
	numbers := make([]uint8, 0, len(ports))
	for n := range ports {
		numbers = append(numbers, n)
	}
	slices.Sort(numbers)
	slot, next := firstOwnSlot, 1 // the next bridge's slot, and the number of the bus behind it
	bridge := func(kind string, options ...any) {
		b.arg("-device", fmt.Sprintf(kind+",bus=pcie.0,addr=%02x.0", append(options, slot)...))
		slot++
	}
	for _, n := range numbers {
		if n == 0 {
			continue
		}
		if gap := int(n) - next; gap > 0 {
			bridge("pcie-root-port,id=gap-%02x,chassis=%d,bus-reserve=%d", n, slot, gap-1)
		}
		if ports[n] {
			bridge("pcie-root-port,id=%s,chassis=%d", busName(n), slot)
		} else {
			bridge("pcie-pci-bridge,id=%s", busName(n))
		}
		if slot > lastOwnSlot+1 {
			return fmt.Errorf("PCI bus %02x: too many buses are named; leave some pciAddress out", n)
		}
		next = int(n) + 1
	}
	b.fillers(order, slots)
	return nil
}

func (b *qemuArgs) fillers(order []Interface, slots map[PCIAddress]bool) {
	for _, i := range order {
		if i.PCIAddress == nil {
			continue
		}
		first := *i.PCIAddress
		if first.Function = 0; slots[first] {
			continue
		}
		slots[first] = true
		b.arg("-device", fmt.Sprintf("pci-testdev,bus=%s,addr=%02x.0,multifunction=on", busName(first.Bus), first.Slot))
	}
}

// busName is the identifier of a bus that addresses name.
func busName(bus uint8) string {
	if bus == 0 {
		return "pcie.0"
	}
	return fmt.Sprintf("bus-%02x", bus)
}
