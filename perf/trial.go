package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"runtime"
	"sort"
	"time"
)

// metric is one figure that a trial brings.
type metric struct {
	Name string `json:"name"`
	Unit string `json:"unit"`
	// Less says that less of it is better.
	Less bool `json:"less"`
	// Plain figures are mostly zero: nothing is said about their ratio.
	Plain bool `json:"plain,omitempty"`
}

// values are the figures that one round brought of one subject, by metric. What
// the subject cannot tell is not in it.
type values map[string]float64

// trial is one row of the report: the same path through several subjects. The
// first of them is sidewire.
type trial struct {
	Group    string
	Title    string
	Metrics  []metric
	Subjects []string
	// missing says why subjects cannot be measured on this machine.
	missing map[string]error
	measure func(ctx context.Context, subject string) (values, error)
	// takes is how long one measurement is likely to last.
	takes time.Duration
	goals []goal
}

// goal is what the ratio of sidewire to a subject is to be.
type goal struct {
	Metric  string
	Against string
	Least   float64 // or 0
	Most    float64 // or 0
}

func (g goal) String() string {
	if g.Least > 0 {
		return fmt.Sprintf("≥ %g", g.Least)
	}
	return fmt.Sprintf("≤ %g", g.Most)
}

func (g goal) reached(ratio float64) bool {
	return !math.IsNaN(ratio) && ratio >= g.Least && (g.Most == 0 || ratio <= g.Most)
}

// samples are what the rounds brought of one trial.
type samples struct {
	trial  *trial
	rounds []map[string]values // by subject; nil where it failed
	failed map[string]error    // the last failure of a subject

	distances []float64 // between the processors, before each measurement
}

// runTrials measures every trial in every round. It returns what there is when
// the context ends.
func runTrials(ctx context.Context, trials []*trial, rounds int, bar *progress) []*samples {
	all := make([]*samples, len(trials))
	for i, t := range trials {
		all[i] = &samples{trial: t, failed: map[string]error{}}
	}
	bar.begin(trials, rounds)
	for r := range rounds {
		for i, s := range all {
			if ctx.Err() != nil {
				return all
			}
			s.round(ctx, r+i, bar)
		}
	}
	bar.end()
	return all
}

// round measures every subject once, beginning with another one each time.
func (s *samples) round(ctx context.Context, turn int, bar *progress) {
	t := s.trial
	got := map[string]values{}
	for i := range t.Subjects {
		name := t.Subjects[(i+turn)%len(t.Subjects)]
		if t.missing[name] != nil {
			continue
		}
		bar.now(t, name)
		apart := s.apart()
		began := time.Now()
		v, err := t.measure(ctx, name)
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			s.failed[name] = err
			bar.failed(t, name, err)
		default:
			got[name] = v
			v[processors.Name] = apart
			bar.took(t, time.Since(began))
		}
	}
	s.rounds = append(s.rounds, got)
}

// apart measures how near the two sides' processors are now.
func (s *samples) apart() float64 {
	if runtime.NumCPU() < 2 {
		return nan
	}
	d := distance()
	if !math.IsNaN(d) {
		s.distances = append(s.distances, d)
	}
	return d
}

// column is one subject's figure in each round that brought it.
func (s *samples) column(subject, metric string) (xs []float64) {
	for _, r := range s.rounds {
		if x, ok := r[subject][metric]; ok && !math.IsNaN(x) {
			xs = append(xs, x)
		}
	}
	return xs
}

// ratios are sidewire's figure by the subject's, in each round that brought
// both, so that what the machine did in that round cancels out.
func (s *samples) ratios(subject, metric string) (xs []float64) {
	for _, r := range s.rounds {
		a, ok1 := r[s.trial.Subjects[0]][metric]
		b, ok2 := r[subject][metric]
		if ok1 && ok2 && b != 0 && !math.IsNaN(a/b) {
			xs = append(xs, a/b)
		}
	}
	return xs
}

// reason says why a subject has no figures at all, or nil if it has some and
// merely does not tell one of them.
func (s *samples) reason(subject string) error {
	for _, r := range s.rounds {
		if r[subject] != nil {
			return nil
		}
	}
	switch {
	case s.trial.missing[subject] != nil:
		return s.trial.missing[subject]
	case s.failed[subject] != nil:
		return s.failed[subject]
	}
	return errors.New("ended before its turn")
}

// spread is the median and the range of a figure.
type spread struct {
	Median float64 `json:"median"`
	Low    float64 `json:"low"`
	High   float64 `json:"high"`
}

// spreadOf returns the spread of figures, of which there must be at least one.
// The median of an even number is the mean of the two in the middle.
func spreadOf(xs []float64) spread {
	xs = append([]float64(nil), xs...)
	sort.Float64s(xs)
	n := len(xs)
	return spread{(xs[(n-1)/2] + xs[n/2]) / 2, xs[0], xs[n-1]}
}

func (s spread) String() string {
	if s.Low == s.High {
		return short(s.Median)
	}
	return fmt.Sprintf("%s (%s-%s)", short(s.Median), short(s.Low), short(s.High))
}

// short writes a figure with three digits that count.
func short(x float64) string {
	switch a := math.Abs(x); {
	case a == 0:
		return "0"
	case a >= 100:
		return fmt.Sprintf("%.0f", x)
	case a >= 10:
		return fmt.Sprintf("%.1f", x)
	case a >= 0.1:
		return fmt.Sprintf("%.2f", x)
	}
	return fmt.Sprintf("%.2g", x)
}
