package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// result is a report as JSON has it.
type result struct {
	Machine machine `json:"machine"`
	// Distance is the nanoseconds that a cache line takes between the two
	// sides' processors, before each measurement.
	Distance *spread `json:"distance_ns,omitempty"`
	Rounds   int     `json:"rounds"`
	Rows     []row   `json:"rows"`
}

// row is one trial.
type row struct {
	Group   string   `json:"group"`
	Title   string   `json:"title"`
	Figures []figure `json:"figures"`
}

// figure is one metric of one subject in one trial.
type figure struct {
	Subject     string    `json:"subject"`
	Metric      metric    `json:"metric"`
	Samples     []float64 `json:"samples,omitempty"`
	Spread      *spread   `json:"spread,omitempty"`
	Ratio       *spread   `json:"ratio,omitempty"` // sidewire's by this one's, round by round
	Goal        string    `json:"goal,omitempty"`  // of the ratio
	Reached     bool      `json:"reached,omitempty"`
	NotMeasured string    `json:"not_measured,omitempty"`
}

// newResult draws up what was measured.
func newResult(m machine, rounds int, all []*samples) result {
	r := result{Machine: m, Rounds: rounds}
	var distances []float64
	for _, s := range all {
		distances = append(distances, s.distances...)
		w := row{Group: s.trial.Group, Title: s.trial.Title}
		for _, me := range s.trial.Metrics {
			for _, name := range s.trial.Subjects {
				w.Figures = append(w.Figures, s.figure(name, me))
			}
		}
		r.Rows = append(r.Rows, w)
	}
	if len(distances) > 0 {
		d := spreadOf(distances)
		r.Distance = &d
	}
	return r
}

func (s *samples) figure(name string, m metric) figure {
	f := figure{Subject: name, Metric: m, Samples: s.column(name, m.Name)}
	if len(f.Samples) == 0 {
		if err := s.reason(name); err != nil {
			f.NotMeasured = oneLine(err)
		}
		return f
	}
	sp := spreadOf(f.Samples)
	f.Spread = &sp
	if name == s.trial.Subjects[0] || m.Plain {
		return f
	}
	if xs := s.ratios(name, m.Name); len(xs) > 0 {
		ra := spreadOf(xs)
		f.Ratio = &ra
	}
	for _, g := range s.trial.goals {
		if g.Metric == m.Name && g.Against == name && f.Ratio != nil {
			f.Goal, f.Reached = g.String(), g.reached(f.Ratio.Median)
		}
	}
	return f
}

// write puts report.md, report.json and report.html into a directory.
func (r result) write(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	j, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	var md, html strings.Builder
	r.markdown(&md)
	if err := r.html(&html); err != nil {
		return err
	}
	for name, b := range map[string][]byte{"report.json": append(j, '\n'), "report.md": []byte(md.String()), "report.html": []byte(html.String())} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// table is one metric of one group: rows are trials, columns subjects.
type table struct {
	group   string
	metric  metric
	columns []string
	rows    []tableRow
}

type tableRow struct {
	title string
	cells []*figure // by column; nil where the trial does not have the subject
}

// tables sorts the figures by group and metric, in the order of the trials.
func (r result) tables() []*table {
	var out []*table
	find := func(group string, m metric) *table {
		for _, t := range out {
			if t.group == group && t.metric == m {
				return t
			}
		}
		out = append(out, &table{group: group, metric: m})
		return out[len(out)-1]
	}
	for _, w := range r.Rows {
		for i := range w.Figures {
			find(w.Group, w.Figures[i].Metric).add(w.Title, &w.Figures[i])
		}
	}
	return out
}

func (t *table) add(title string, f *figure) {
	c := slices.Index(t.columns, f.Subject)
	if c < 0 {
		c = len(t.columns)
		t.columns = append(t.columns, f.Subject)
	}
	if n := len(t.rows); n == 0 || t.rows[n-1].title != title {
		t.rows = append(t.rows, tableRow{title: title})
	}
	w := &t.rows[len(t.rows)-1]
	for len(w.cells) <= c {
		w.cells = append(w.cells, nil)
	}
	w.cells[c] = f
}

func (t *table) cell(w tableRow, c int) *figure {
	if c >= len(w.cells) {
		return nil
	}
	return w.cells[c]
}

// text is a cell of a table: the figure, and behind it what sidewire's is by
// this one.
func (f *figure) text() string {
	switch {
	case f == nil:
		return ""
	case f.NotMeasured != "":
		return "not measured"
	case f.Spread == nil:
		return "–" // nothing tells it
	}
	s := f.Spread.String()
	if f.Ratio != nil {
		s += "; " + f.Ratio.String()
	}
	if f.Goal != "" {
		verdict := "missed"
		if f.Reached {
			verdict = "reached"
		}
		s += fmt.Sprintf("; goal %s %s", f.Goal, verdict)
	}
	return s
}

const explanation = `Median (lowest-highest) of %d rounds. Behind a semicolon: sidewire's figure by that column's, taken round by
round; of the A/A column, sidewire by itself, which is the error bar of all the others. Both sides are restarted
for each figure and the order of the columns is rotated.
`

// where is the machine, and how near its processors were to each other.
func (r result) where() string {
	s := r.Machine.String()
	if r.Distance != nil {
		s += fmt.Sprintf("A cache line took %v ns from the one side's processor to the other's.\n", *r.Distance)
	}
	return s
}

// markdown writes the tables.
func (r result) markdown(w io.Writer) {
	fmt.Fprintf(w, "# sidewire beside its peers\n\n%s\n%s", r.where(), fmt.Sprintf(explanation, r.Rounds))
	group := ""
	for _, t := range r.tables() {
		if t.group != group {
			group = t.group
			fmt.Fprintf(w, "\n## %s\n", group)
		}
		less := ""
		if t.metric.Less {
			less = ", less is better"
		}
		fmt.Fprintf(w, "\n### %s (%s%s)\n\n| |", t.metric.Name, t.metric.Unit, less)
		for _, c := range t.columns {
			fmt.Fprintf(w, " %s |", c)
		}
		fmt.Fprintf(w, "\n|---|%s\n", strings.Repeat("---|", len(t.columns)))
		for _, row := range t.rows {
			fmt.Fprintf(w, "| %s |", row.title)
			for c := range t.columns {
				fmt.Fprintf(w, " %s |", t.cell(row, c).text())
			}
			fmt.Fprintln(w)
		}
	}
	r.reasons(w)
}

// reasons lists why something was not measured, each reason once.
func (r result) reasons(w io.Writer) {
	var order []string
	where := map[string][]string{}
	for _, x := range r.Rows {
		for _, f := range x.Figures {
			if f.NotMeasured == "" {
				continue
			}
			why := f.Subject + ": " + f.NotMeasured
			if where[why] == nil {
				order = append(order, why)
			}
			if !slices.Contains(where[why], x.Title) {
				where[why] = append(where[why], x.Title)
			}
		}
	}
	if len(order) == 0 {
		return
	}
	fmt.Fprint(w, "\n## Not measured\n\n")
	for _, why := range order {
		fmt.Fprintf(w, "- %s (%s)\n", why, strings.Join(where[why], "; "))
	}
}
