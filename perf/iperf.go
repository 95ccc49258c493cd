package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"sidewire/engine/enginetest"
)

// iperfServer starts iperf3 in server mode in ns and returns how to end it.
func iperfServer(ns *enginetest.NetNS, addr string) (stop func(), err error) {
	cmd := ns.Command("iperf3", "-s", "-B", addr, "-p", "5201")
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("iperf3 server: %w", err)
	}
	return func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}, nil
}

// iperfClient runs one TCP stream from ns to addr and returns the Gbit/s of
// payload that arrived; reverse lets the server send.
func iperfClient(ctx context.Context, ns *enginetest.NetNS, addr string, seconds int, reverse bool) (float64, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Duration(seconds+15)*time.Second)
	defer cancel()
	// A host's default may be one that paces, whose estimates of the path move
	// the result more than the path does.
	args := []string{"-C", "cubic", "-c", addr, "-p", "5201", "-t", strconv.Itoa(seconds), "-J", "--connect-timeout", "3000"}
	if reverse {
		args = append(args, "-R")
	}
	base := ns.Command("iperf3", args...)
	cmd := exec.CommandContext(ctx, base.Path, base.Args[1:]...)
	out, err := cmd.Output()
	var r struct {
		Error string `json:"error"`
		End   struct {
			Received struct {
				BitsPerSecond float64 `json:"bits_per_second"`
			} `json:"sum_received"`
		} `json:"end"`
	}
	if jerr := json.Unmarshal(out, &r); jerr != nil || err != nil || r.Error != "" {
		return 0, fmt.Errorf("iperf3 to %s: %v %s %s", addr, err, r.Error, strings.TrimSpace(string(out[:min(len(out), 200)])))
	}
	return r.End.Received.BitsPerSecond / 1e9, nil
}
