package main

import (
	"fmt"
	"io"
	"strings"
	"time"
)

// progress is a line on a terminal, or a line for each step elsewhere, that
// says what is being measured and how long it will take.
type progress struct {
	w        io.Writer
	terminal bool
	left     time.Duration // of the steps to come, as they were guessed
	all      time.Duration
	guessed  time.Duration // of the steps done
	spent    time.Duration
	step     string
	nstep    int
	steps    int
}

func newProgress(w io.Writer, terminal bool) *progress { return &progress{w: w, terminal: terminal} }

// begin adds up what is to be done.
func (p *progress) begin(trials []*trial, rounds int) {
	for _, t := range trials {
		n := (len(t.Subjects) - len(t.missing)) * rounds
		p.steps += n
		p.all += time.Duration(n) * t.takes
	}
	p.left = p.all
}

// remaining is the time that the rest will take, if it keeps to the guesses as
// well as what is done has.
func (p *progress) remaining() time.Duration {
	if p.guessed < 5*time.Second {
		return p.left
	}
	return time.Duration(float64(p.left) * float64(p.spent) / float64(p.guessed))
}

func (p *progress) now(t *trial, subject string) {
	p.nstep++
	p.step = t.Title + ": " + subject
	p.draw()
}

func (p *progress) took(t *trial, d time.Duration) {
	p.guessed += t.takes
	p.spent += d
	p.left -= t.takes
}

func (p *progress) failed(t *trial, subject string, err error) {
	p.left -= t.takes
	p.line("%s: %s: not measured: %v", t.Title, subject, oneLine(err))
}

// line writes a line that stays.
func (p *progress) line(format string, args ...any) {
	if p.terminal {
		fmt.Fprint(p.w, "\r\x1b[K")
	}
	fmt.Fprintf(p.w, format+"\n", args...)
}

func (p *progress) draw() {
	const width = 24
	done := 0
	if p.all > 0 {
		done = int(width * (p.all - p.left) / p.all)
	}
	done = min(max(done, 0), width)
	s := fmt.Sprintf("[%s%s] %d/%d, %v left: %s", strings.Repeat("#", done), strings.Repeat(".", width-done),
		p.nstep, p.steps, p.remaining().Round(time.Second), p.step)
	if p.terminal {
		fmt.Fprint(p.w, "\r\x1b[K"+s)
		return
	}
	fmt.Fprintln(p.w, s)
}

func (p *progress) end() {
	if p.terminal {
		fmt.Fprint(p.w, "\r\x1b[K")
	}
}

// oneLine is an error without what a program wrote at length.
func oneLine(err error) string {
	s, _, _ := strings.Cut(err.Error(), "\n")
	return s
}
