// Package handoff gives a guest a kernel macvtap or a vfio device, and then
// stays out of the path.
//
// A [Device] is prepared on the host, opened once for each QEMU that gets it,
// and given back as it was. QEMU gets it as descriptors and arguments when it is
// started, or over its monitor when it runs ([QMP]). Nothing here is on the path
// of a frame. Devices of the network belong to a namespace: whoever makes one or
// closes it runs in that namespace.
package handoff

import "os"

// Device is what QEMU is given in place of a port. Its methods are not safe for
// concurrent use, but for Status.
type Device interface {
	// Up lets the device speak on its network, which it does not before.
	Up() error
	// Open opens what QEMU is to have, in the order in which Netdev and
	// Properties take it. The caller closes the files when QEMU has its own.
	// There may be none.
	Open() ([]*os.File, error)
	// Netdev is the value of -netdev with this id, where fds are what the files
	// are to QEMU: numbers, or names that its monitor knows. It is empty if the
	// device needs no network backend.
	Netdev(fds []string, id string) string
	// Properties are what -device has beside its place in the guest, such as
	// "csum=on"; where there is no netdev the first is the driver.
	Properties() []string
	Status() Status
	// Close gives everything back as it was. It may be called again.
	Close() error
}

// Status is what a device is, as users see it.
type Status struct {
	Kind    string `json:"kind"` // "macvtap" or "sriov"
	MAC     string `json:"mac,omitempty"`
	MTU     int    `json:"mtu,omitempty"`
	Queues  int    `json:"queues,omitempty"`
	Adopted bool   `json:"adopted"`        // it was there before us
	Kept    bool   `json:"kept,omitempty"` // a run before this one prepared it and crashed: QEMU may have it

	// Limits is what the guest does without, empty if nothing.
	Limits string `json:"limits,omitempty"`

	// Of a macvtap.
	Link     string `json:"link,omitempty"`
	Lower    string `json:"lower,omitempty"` // empty where that is in another namespace
	Mode     string `json:"mode,omitempty"`
	Capacity int    `json:"capacity,omitempty"`
	Node     string `json:"node,omitempty"`   // the character device, such as /dev/tap4
	Device   string `json:"device,omitempty"` // its number, where /dev has no node of it

	// Of a function of a PCI device. What cannot be seen is left out.
	Address    string `json:"address,omitempty"` // such as 0000:65:00.2
	Driver     string `json:"driver,omitempty"`
	Group      string `json:"iommu_group,omitempty"`
	PF         string `json:"pf,omitempty"` // the physical function's address, and Link is its link
	VF         *int   `json:"vf,omitempty"`
	VLAN       int    `json:"vlan,omitempty"`
	SpoofCheck *bool  `json:"spoofchk,omitempty"`
	Trust      *bool  `json:"trust,omitempty"`
}
