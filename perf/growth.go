package main

import (
	"context"
	"fmt"
	"time"
)

// growthTrials are the rows that compare a switch with itself: what a frame
// costs as ports and addresses become more. Their first column is the largest.
func (p *programs) growthTrials(d time.Duration) []*trial {
	var out []*trial
	for _, name := range []string{ours, ovs} {
		out = append(out,
			p.growth(name, "addresses", d, func(n int) cell { return cell{Path: guestToGuest, Size: 64, Queues: 1, FDB: n} }, 64000, 1000, 2),
			p.growth(name, "ports", d, func(n int) cell { return cell{Path: guestToGuest, Size: 64, Queues: 1, Ports: n} }, 64, 8, 2),
			p.growth(name, "ports, single frames", d, func(n int) cell {
				return cell{Path: guestToGuest, Size: 64, Queues: 1, Ports: n, Single: true}
			}, 64, 8, 2))
	}
	return out
}

// growth is one of those rows.
func (p *programs) growth(name, what string, d time.Duration, of func(n int) cell, counts ...int) *trial {
	t := &trial{
		Group: "Growth", Title: name + ": " + what, missing: map[string]error{}, takes: d + 6*time.Second,
		Metrics: []metric{busyTime, mpps, dropped},
	}
	cells := map[string]cell{}
	for _, n := range counts {
		column := fmt.Sprint(n)
		t.Subjects = append(t.Subjects, column)
		cells[column] = of(n)
		if err := p.missing(name, of(n)); err != nil {
			t.missing[column] = err
		}
	}
	if name == ours {
		t.goals = []goal{{busyTime.Name, fmt.Sprint(counts[len(counts)-1]), 0, 1.3}}
	}
	t.measure = func(ctx context.Context, column string) (values, error) {
		f, err := measureCell(ctx, p.subjects()[name], cells[column], d)
		if err != nil {
			return nil, err
		}
		return f.values(cells[column]), nil
	}
	return t
}
