package uplink

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// LinkState is what frames have to expect of a link.
type LinkState string

// The states of a link. One that is gone does not come back: another of its
// name is another link.
const (
	LinkUp        LinkState = "up"
	LinkNoCarrier LinkState = "no carrier"
	LinkDown      LinkState = "down"
	LinkGone      LinkState = "gone"
)

// LinkStatus is the state of one link.
type LinkStatus struct {
	Name  string    `json:"name"`
	State LinkState `json:"state"`
}

// Links follows the state of some links of a namespace.
type Links struct {
	sub     *nl.NetlinkSocket
	h       *netlink.Handle
	done    sync.WaitGroup
	index   []int
	changed func(LinkStatus)

	mu  sync.Mutex // guards now
	now []LinkStatus
}

// WatchLinks follows links of the current network namespace until Close. It
// has changed called for every link that is not up, and then for each change.
func WatchLinks(changed func(LinkStatus), names ...string) (l *Links, err error) {
	l = &Links{changed: changed}
	defer func() {
		if err != nil {
			l.closeSockets()
			l, err = nil, fmt.Errorf("watch links: %w", err)
		}
	}()
	// Subscribe before the first look, so that no change falls between.
	if l.sub, err = nl.Subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_LINK); err != nil {
		return l, err
	}
	if l.h, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return l, err
	}
	for _, name := range names {
		found, err := link(name)
		if err != nil {
			return l, err
		}
		l.index = append(l.index, found.Attrs().Index)
		l.now = append(l.now, LinkStatus{name, LinkUp})
	}
	l.look()
	l.done.Go(l.listen)
	return l, nil
}

// Status is how the links are, in the order of their names at WatchLinks.
func (l *Links) Status() []LinkStatus {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.now)
}

// Close ends the calls of changed.
func (l *Links) Close() {
	l.sub.Close()
	l.done.Wait()
	l.closeSockets()
}

func (l *Links) closeSockets() {
	if l.sub != nil {
		l.sub.Close()
	}
	if l.h != nil {
		l.h.Close()
	}
}

func (l *Links) listen() {
	for {
		_, _, err := l.sub.Receive()
		switch {
		case err == nil, errors.Is(err, unix.ENOBUFS):
			l.look()
		case errors.Is(err, unix.EINTR):
		default:
			if !errors.Is(err, os.ErrClosed) && !errors.Is(err, unix.EBADF) {
				l.look() // for the last time
			}
			return
		}
	}
}

// look compares what there is with what was.
func (l *Links) look() {
	for i, index := range l.index {
		if s, ok := l.set(i, l.state(index)); ok {
			l.changed(s)
		}
	}
}

func (l *Links) set(i int, s LinkState) (LinkStatus, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	ok := l.now[i].State != s
	l.now[i].State = s
	return l.now[i], ok
}

func (l *Links) state(index int) LinkState {
	found, err := l.h.LinkByIndex(index)
	switch {
	case err != nil:
		return LinkGone
	case found.Attrs().RawFlags&unix.IFF_UP == 0:
		return LinkDown
	case found.Attrs().RawFlags&unix.IFF_RUNNING == 0:
		return LinkNoCarrier
	}
	return LinkUp
}
