package main

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestSpread(t *testing.T) {
	for _, x := range []struct {
		in   []float64
		want spread
	}{
		{[]float64{3}, spread{3, 3, 3}},
		{[]float64{5, 1}, spread{3, 1, 5}},
		{[]float64{9, 1, 2}, spread{2, 1, 9}},
		{[]float64{4, 1, 100, 2}, spread{3, 1, 100}},
	} {
		in := append([]float64(nil), x.in...)
		assert.Equal(t, x.want, spreadOf(in))
		assert.Equal(t, x.in, in, "the samples keep their order: they belong to rounds")
	}
	assert.Equal(t, "2.00 (1.00-9.00)", spreadOf([]float64{9, 1, 2}).String())
	assert.Equal(t, "3.00", spreadOf([]float64{3, 3}).String())
}

func TestShort(t *testing.T) {
	for want, x := range map[string]float64{"0": 0, "1234": 1234, "12.3": 12.34, "1.23": 1.234, "0.12": 0.123, "0.00012": 0.000123} {
		assert.Equal(t, want, short(x))
	}
}

var rate, blank = metric{Name: "rate", Unit: "Mpps"}, metric{Name: "blank", Unit: "frames", Plain: true}

// threeRounds is a machine that gets slower by the round, and two subjects of
// which one is always twice as fast.
func threeRounds() *samples {
	t := &trial{
		Group: "Packets", Title: "there", Metrics: []metric{rate, blank}, Subjects: []string{ours, "peer", "absent", "broken"},
		missing: map[string]error{"absent": errors.New("not installed")},
		goals:   []goal{{"rate", "peer", 1.5, 0}},
	}
	return &samples{trial: t, failed: map[string]error{"broken": errors.New("it fell over\nat length")}, rounds: []map[string]values{
		{ours: {"rate": 20, "blank": 0}, "peer": {"rate": 10}},
		{ours: {"rate": 12, "blank": 0}, "peer": {"rate": 6}},
		{ours: {"rate": 2, "blank": 1}, "peer": {"rate": 1}},
		{ours: {"rate": 7}},
		{"peer": {"rate": 7}},
	}}
}

func TestRatiosAreTakenRoundByRound(t *testing.T) {
	s := threeRounds()
	assert.Equal(t, []float64{2, 2, 2}, s.ratios("peer", "rate"), "rounds that one of them missed do not count")
	assert.Equal(t, []float64{20, 12, 2, 7}, s.column(ours, "rate"))
	assert.Empty(t, s.ratios("absent", "rate"))
}

func TestGoals(t *testing.T) {
	least, most := goal{Least: 1.15}, goal{Most: 0.55}
	assert.Equal(t, "≥ 1.15", least.String())
	assert.Equal(t, "≤ 0.55", most.String())
	for ratio, want := range map[float64][2]bool{1.15: {true, false}, 1.14: {false, false}, 0.55: {false, true}, 0.56: {false, false}} {
		assert.Equal(t, want, [2]bool{least.reached(ratio), most.reached(ratio)}, "%v", ratio)
	}
	assert.False(t, most.reached(nan))
}

func TestReport(t *testing.T) {
	m := machine{Date: "2026-01-02", Processors: 2, Kernel: "6.1", HugePages: true, Versions: map[string]string{"ovs": "3.1.0"}}
	r := newResult(m, 5, []*samples{threeRounds()})
	dir := t.TempDir()
	require.NoError(t, r.write(dir))

	md := string(readFile(t, dir, "report.md"))
	assert.Contains(t, md, "| there | 9.50 (2.00-20.0) | 6.50 (1.00-10.0); 2.00; goal ≥ 1.5 reached | not measured | not measured |")
	assert.Contains(t, md, "| there | 0 (0-1.00) | – | not measured | not measured |")
	assert.Contains(t, md, "- absent: not installed (there)\n- broken: it fell over (there)\n")
	assert.Contains(t, md, "2026-01-02: 2 processors")

	var back result
	require.NoError(t, json.Unmarshal(readFile(t, dir, "report.json"), &back))
	assert.Equal(t, r, back)

	html := string(readFile(t, dir, "report.html"))
	assert.Contains(t, html, "<svg")
	assert.Contains(t, html, ">not measured</text>")
	assert.Contains(t, html, "(×2.00)")
}

// What a subject is called, or why it failed, cannot break the page.
func TestReportEscapes(t *testing.T) {
	s := threeRounds()
	s.trial.Title, s.failed["broken"] = "<b>there</b>", errors.New("<script>")
	var b strings.Builder
	require.NoError(t, newResult(machine{}, 1, []*samples{s}).html(&b))
	assert.NotContains(t, b.String(), "<b>")
	assert.NotContains(t, b.String(), "<script>")
}

// Every subject is measured in every round, and another one comes first each time.
func TestRunTrials(t *testing.T) {
	var order []string
	x := &trial{
		Title: "x", Metrics: []metric{rate}, Subjects: []string{"a", "b", "gone"}, takes: time.Second,
		missing: map[string]error{"gone": errors.New("not here")},
		measure: func(_ context.Context, subject string) (values, error) {
			order = append(order, subject)
			if subject == "b" && len(order) < 3 {
				return nil, errors.New("not today")
			}
			return values{"rate": 1}, nil
		},
	}
	all := runTrials(context.Background(), []*trial{x}, 3, newProgress(io.Discard, false))
	assert.Equal(t, []string{"a", "b", "b", "a", "a", "b"}, order)
	assert.Len(t, all[0].column("a", "rate"), 3)
	assert.Len(t, all[0].column("b", "rate"), 2)
	assert.NoError(t, all[0].reason("b"))
	assert.EqualError(t, all[0].reason("gone"), "not here")
}

func TestRunTrialsEnds(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	x := &trial{Title: "x", Subjects: []string{"a"}, measure: func(context.Context, string) (values, error) {
		cancel()
		return nil, ctx.Err()
	}}
	all := runTrials(ctx, []*trial{x, x}, 3, newProgress(io.Discard, false))
	require.Len(t, all, 2)
	assert.EqualError(t, all[0].reason("a"), "ended before its turn")
}

func TestProgress(t *testing.T) {
	var b strings.Builder
	p := newProgress(&b, false)
	x := &trial{Title: "x", Subjects: []string{"a", "b", "gone"}, missing: map[string]error{"gone": io.EOF}, takes: 10 * time.Second}
	p.begin([]*trial{x}, 2)
	assert.Equal(t, 40*time.Second, p.remaining())
	p.now(x, "a")
	p.took(x, 20*time.Second)
	assert.Equal(t, 60*time.Second, p.remaining(), "everything takes twice as long as guessed")
	p.now(x, "b")
	p.failed(x, "b", errors.New("it\nfell"))
	assert.Equal(t, 40*time.Second, p.remaining())
	assert.Equal(t, "[........................] 1/4, 40s left: x: a\n"+
		"[######..................] 2/4, 1m0s left: x: b\nx: b: not measured: it\n", b.String())
}
