// Command sidewire serves the network interfaces of virtual machines over
// vhost-user: it runs next to QEMU and gives a guest the network that its
// KubeVirt spec asks for. This package wires the others together and is the
// only one that knows all of them.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
)

// Exit codes, which scripts rely on.
const (
	exitOK      = 0
	exitInput   = 1 // the input is wrong
	exitMachine = 2 // the machine cannot do it
)

// inputError is a fault in what the user gave.
type inputError struct{ error }

// machineError is something that this machine lacks, with the way to mend it.
type machineError struct{ error }

func badInput(format string, args ...any) error {
	return inputError{fmt.Errorf(format, args...)}
}

func cannot(format string, args ...any) error {
	return machineError{fmt.Errorf(format, args...)}
}

// command is one subcommand.
type command struct {
	name, args, does string
	run              func(ctx context.Context, args []string, out, errw io.Writer) error
}

func commands() []command {
	return []command{
		{"run", "-f VMI.yaml [flags] [-- QEMU...]", "serve every interface of the VMIs until SIGTERM, or until the QEMU ends that it starts", runCommand},
		{"validate", "-f FILE...", "one line per fault; exit 1 if there is one", validateCommand},
		{"qemu-args", "-f VMI.yaml [flags]", "the QEMU arguments for the interfaces, one per line", qemuArgsCommand},
		{"restore", "[--netns PATH]... [--state-dir DIR]", "put back links that a crashed run left, without serving", restoreCommand},
		{"demo", "", "boot a real guest and show each thing working", demoCommand},
		{"status", "[--json]", "what a running sidewire does", statusCommand},
		{"fdb", "[--json]", "the addresses that the switches of a running sidewire know", fdbCommand},
		{"leases", "[--json]", "the addresses that the guests of a running sidewire have taken", leasesCommand},
		{"flows", "[--json] [--max N]", "the flows of the guests of a running sidewire", flowsCommand},
		{"link", "[INTERFACE] up|down", "take a guest's link up or down", linkCommand},
		{"forward", "list|add|remove [INTERFACE] [PROTO:[ADDR:]PORT[:GUESTPORT]]", "look at or change the forwarded ports", forwardCommand},
	}
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	code := realMain(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// realMain runs a command line and returns the exit code.
func realMain(ctx context.Context, args []string, out, errw io.Writer) int {
	if len(args) == 0 || args[0] == "help" || args[0] == "-h" || args[0] == "--help" {
		usage(errw)
		if len(args) == 0 {
			return exitInput
		}
		return exitOK
	}
	for _, c := range commands() {
		if c.name != args[0] {
			continue
		}
		err := c.run(ctx, args[1:], out, errw)
		if err == nil || errors.Is(err, flag.ErrHelp) {
			return exitOK
		}
		if msg := strings.TrimSpace(err.Error()); msg != "" {
			for line := range strings.SplitSeq(msg, "\n") {
				fmt.Fprintf(errw, "sidewire %s: %s\n", c.name, line)
			}
		}
		if q := (qemuExit{}); errors.As(err, &q) {
			return q.code
		}
		if errors.As(err, new(inputError)) {
			return exitInput
		}
		return exitMachine
	}
	fmt.Fprintf(errw, "sidewire: no command %q; sidewire help lists them\n", args[0])
	return exitInput
}

func usage(w io.Writer) {
	fmt.Fprintln(w, "usage: sidewire COMMAND [flags]")
	for _, c := range commands() {
		fmt.Fprintf(w, "  %-10s %-42s %s\n", c.name, c.args, c.does)
	}
	fmt.Fprintln(w, "sidewire COMMAND -h lists a command's flags.")
}
