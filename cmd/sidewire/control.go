package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// The control API is HTTP and JSON over a unix socket, every path below a
// version. Only root and the user that runs sidewire are heard.
const (
	apiVersion  = "v1"
	maxBody     = 64 << 10
	readTimeout = 5 * time.Second
)

// forwardRequest names one forwarded port of one interface.
type forwardRequest struct {
	Interface string `json:"interface,omitempty"` // VMI/INTERFACE; may be left out where there is one
	Protocol  string `json:"protocol"`            // TCP or UDP
	// Address is where the host listens, if not everywhere, and GuestPort the
	// guest's port, if another: on the socket path alone.
	Address netip.Addr `json:"address,omitzero"`
	Port    uint16     `json:"port"`
	Last    uint16     `json:"last,omitempty"` // of a range that the VMI lists
	Guest   uint16     `json:"guestPort,omitempty"`
}

// apiError is the body of every answer that is not a success.
type apiError struct {
	Error string `json:"error"`
}

// controller is what the control API steers.
type controller interface {
	Status() Status
	FDB() []StationStatus
	Leases() []LeaseStatus
	Flows(limit int) FlowList
	Forwards() map[string][]forwardRequest
	AddForward(*forwardRequest) error
	RemoveForward(*forwardRequest) error
	SetLink(*linkRequest) error // names the interface if the request does not
}

// serveControl listens on path and serves until ctx ends. It returns when the
// socket is there.
func serveControl(ctx context.Context, path string, c controller, log *slog.Logger) (func(), error) {
	l, err := listenUnix(path)
	if err != nil {
		return nil, err
	}
	srv := &http.Server{
		Handler:           controlHandler(c),
		ReadTimeout:       readTimeout,
		ReadHeaderTimeout: readTimeout,
		WriteTimeout:      2 * readTimeout,
		IdleTimeout:       readTimeout, // an idle engine keeps no timers running for gone clients
		MaxHeaderBytes:    8 << 10,
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := srv.Serve(peerListener{l}); !errors.Is(err, http.ErrServerClosed) {
			log.Error("control socket ended", "err", err)
		}
	}()
	return func() {
		_ = srv.Close()
		<-done
		_ = os.Remove(path)
	}, nil
}

// socketPathMax is how long the path of a unix socket may be, in bytes.
const socketPathMax = 107

// checkSocketPath refuses a path that no socket can have.
func checkSocketPath(path string) error {
	if len(path) > socketPathMax {
		return badInput("socket path %s is longer than the %d bytes that a unix socket may have: choose a shorter --socket-dir or --control",
			path, socketPathMax)
	}
	return nil
}

// listenUnix makes a socket that its owner alone may use. A socket file that
// nobody answers on is a leftover and is replaced.
func listenUnix(path string) (*net.UnixListener, error) {
	if err := checkSocketPath(path); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, cannot("control socket: %w; name another place with --socket-dir or --control", err)
	}
	addr := &net.UnixAddr{Name: path, Net: "unix"}
	old := syscall.Umask(0o177)
	l, err := net.ListenUnix("unix", addr)
	syscall.Umask(old)
	if !errors.Is(err, syscall.EADDRINUSE) {
		if err != nil {
			return nil, cannot("control socket: %w; name another place with --socket-dir or --control", err)
		}
		return l, nil
	}
	if c, err := net.DialUnix("unix", nil, addr); err == nil {
		_ = c.Close()
		return nil, cannot("control socket %s is in use by another process: end it, or name another with --control", path)
	}
	if st, err := os.Lstat(path); err != nil || st.Mode().Type() != os.ModeSocket {
		return nil, badInput("control socket %s exists and is no socket: name another with --control", path)
	}
	if err := os.Remove(path); err != nil {
		return nil, cannot("control socket: remove leftover: %w", err)
	}
	return listenUnix(path)
}

// peerListener accepts only connections of root and of our own user.
type peerListener struct{ *net.UnixListener }

func (l peerListener) Accept() (net.Conn, error) {
	for {
		c, err := l.AcceptUnix()
		if err != nil {
			return nil, err
		}
		if peerAllowed(c) {
			return c, nil
		}
		_ = c.Close()
	}
}

func peerAllowed(c *net.UnixConn) bool {
	raw, err := c.SyscallConn()
	if err != nil {
		return false
	}
	ok := false
	err = raw.Control(func(fd uintptr) {
		cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
		ok = err == nil && (cred.Uid == 0 || int(cred.Uid) == os.Geteuid())
	})
	return err == nil && ok
}

func controlHandler(c controller) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /"+apiVersion+"/status", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, http.StatusOK, c.Status())
	})
	mux.HandleFunc("GET /"+apiVersion+"/fdb", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, http.StatusOK, c.FDB())
	})
	mux.HandleFunc("GET /"+apiVersion+"/leases", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, http.StatusOK, c.Leases())
	})
	mux.HandleFunc("GET /"+apiVersion+"/flows", func(w http.ResponseWriter, r *http.Request) {
		limit := maxFlowsShown
		if text := r.URL.Query().Get("max"); text != "" {
			n, err := strconv.Atoi(text)
			if err != nil || n < 1 {
				answer(w, http.StatusBadRequest, apiError{"max: want a number of at least 1"})
				return
			}
			limit = n
		}
		answer(w, http.StatusOK, c.Flows(limit))
	})
	mux.HandleFunc("GET /"+apiVersion+"/forwards", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, http.StatusOK, c.Forwards())
	})
	mux.HandleFunc("POST /"+apiVersion+"/forwards", change(c.AddForward, func(forwardRequest) any { return c.Forwards() }))
	mux.HandleFunc("DELETE /"+apiVersion+"/forwards", change(c.RemoveForward, func(forwardRequest) any { return c.Forwards() }))
	mux.HandleFunc("POST /"+apiVersion+"/link", change(c.SetLink, func(r linkRequest) any { return r }))
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		answer(w, http.StatusNotFound, apiError{fmt.Sprintf("%s %s is not part of the control API %s", r.Method, r.URL.Path, apiVersion)})
	})
	return mux
}

// change handles a request that changes something, and answers with what is then.
func change[T any](do func(*T) error, then func(T) any) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		var req T
		dec := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody))
		dec.DisallowUnknownFields()
		if err := dec.Decode(&req); err != nil {
			answer(w, http.StatusBadRequest, apiError{"body: " + err.Error()})
			return
		}
		if err := do(&req); err != nil {
			answer(w, http.StatusConflict, apiError{err.Error()})
			return
		}
		answer(w, http.StatusOK, then(req))
	}
}

func answer(w http.ResponseWriter, code int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	_ = enc.Encode(v) // a client that went away is no fault of ours
}

// ask sends one request to a running sidewire and decodes the answer into v.
func ask(ctx context.Context, socket, method, path string, body, v any) error {
	cl := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		},
	}}
	r, w := io.Pipe()
	go func() {
		if body == nil {
			_ = w.Close()
			return
		}
		_ = w.CloseWithError(json.NewEncoder(w).Encode(body))
	}()
	req, err := http.NewRequestWithContext(ctx, method, "http://sidewire/"+apiVersion+path, r)
	if err != nil {
		return err
	}
	resp, err := cl.Do(req)
	if err != nil {
		return cannot("nobody answers on the control socket %s (%v): is sidewire run running, and is --control the same?", socket, errors.Unwrap(err))
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		var e apiError
		if err := json.NewDecoder(resp.Body).Decode(&e); err != nil || e.Error == "" {
			return cannot("control socket %s: %s", socket, resp.Status)
		}
		return badInput("%s", e.Error)
	}
	return json.NewDecoder(resp.Body).Decode(v)
}
