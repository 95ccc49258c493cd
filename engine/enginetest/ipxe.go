package enginetest

// StartIPXE starts QEMU without a disk or a kernel, so that the firmware boots
// from the network by iPXE's option ROM: a guest that does DHCP, DNS, HTTP and
// TFTP, and needs no kernel. Args give it a NIC with bootindex=1 and no romfile:
// QEMU finds the ROM for its model itself. What the guest does is what option
// 67 of its lease, the URL of a script, says. Follow it with VM.WaitConsole: everything
// it prints goes there. There is no agent.
func StartIPXE(o GuestOptions) (*VM, error) {
	if o.Machine == "" {
		o.Machine = "pc"
	}
	o.Machine += ",graphics=off" // firmware and iPXE print to the serial port
	return startQEMU(o, []string{"-boot", "n"})
}
