package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"time"

	"sidewire/engine/enginetest"
)

// echoAddr is where the outside sends back what it receives.
const echoAddr = enginetest.OutsideIP + ":5202"

// runEcho is the program "perf echo": it sends back every byte of every
// connection.
func runEcho(args []string) error {
	l, err := net.Listen("tcp4", first(args))
	if err != nil {
		return err
	}
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			var b [64]byte
			for {
				n, err := c.Read(b[:])
				if err != nil {
					return
				}
				if _, err := c.Write(b[:n]); err != nil {
					return
				}
			}
		}()
	}
}

// asked is what "perf ask" found.
type asked struct {
	Ops     int     `json:"ops"`
	Seconds float64 `json:"seconds"`
	P50     float64 `json:"p50_us"`
	P99     float64 `json:"p99_us"`
}

// runAsk is the program "perf ask": one byte there and back, again and again,
// over one connection or each over one of its own.
func runAsk(args []string) error {
	fs := flag.NewFlagSet("ask", flag.ContinueOnError)
	each := fs.Bool("connect", false, "a connection for each request")
	seconds := fs.Float64("seconds", 2, "how long")
	if err := fs.Parse(args); err != nil {
		return err
	}
	request := func() error { return once(echoAddr) }
	if !*each {
		c, err := net.DialTimeout("tcp4", echoAddr, 5*time.Second)
		if err != nil {
			return err
		}
		defer c.Close()
		request = func() error { return exchange(c) }
	}
	var times []time.Duration
	began := time.Now()
	for end := began.Add(time.Duration(*seconds * float64(time.Second))); time.Now().Before(end); {
		t := time.Now()
		if err := request(); err != nil {
			return err
		}
		times = append(times, time.Since(t))
	}
	return json.NewEncoder(os.Stdout).Encode(summary(times, time.Since(began)))
}

func summary(times []time.Duration, total time.Duration) asked {
	slices.Sort(times)
	at := func(p float64) float64 { return float64(times[int(p*float64(len(times)-1))].Nanoseconds()) / 1000 }
	return asked{Ops: len(times), Seconds: total.Seconds(), P50: at(.5), P99: at(.99)}
}

// exchange sends a byte and waits for it to come back.
func exchange(c net.Conn) error {
	b := [1]byte{'x'}
	if _, err := c.Write(b[:]); err != nil {
		return err
	}
	_, err := io.ReadFull(c, b[:])
	return err
}

// once does the same over a connection of its own.
func once(addr string) error {
	c, err := net.DialTimeout("tcp4", addr, 5*time.Second)
	if err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	return errors.Join(exchange(c), c.Close())
}
