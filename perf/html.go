package main

import (
	"fmt"
	"html/template"
	"io"
	"strings"
)

var page = template.Must(template.New("page").Parse(`<!doctype html>
<html lang="en"><meta charset="utf-8"><title>sidewire beside its peers</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; color: #1c2024; background: #fff }
pre { white-space: pre-wrap } figure { margin: 1rem 0 2.5rem } h3 { margin-bottom: .2rem; font-weight: 600 }
svg { max-width: 100%; height: auto } svg text { font: 12px system-ui, sans-serif; fill: #1c2024 } .dim { fill: #6a7178 }
</style>
<h1>sidewire beside its peers</h1>
<p>{{.Machine}}</p>
<p>{{.Explanation}}</p>
{{range .Plots}}<h3>{{.Group}}: {{.Title}}</h3>
<figure>{{.SVG}}</figure>
{{end}}<h2>The figures</h2>
<pre>{{.Markdown}}</pre>
</html>
`))

type plot struct {
	Group, Title string
	SVG          template.HTML
}

// html writes the plots and, below them, the tables.
func (r result) html(w io.Writer) error {
	var md strings.Builder
	r.markdown(&md)
	var plots []plot
	for _, t := range r.tables() {
		if svg := t.svg(); svg != "" {
			// What is in it was escaped where it was written.
			plots = append(plots, plot{t.group, fmt.Sprintf("%s (%s)", t.metric.Name, t.metric.Unit), template.HTML(svg)})
		}
	}
	return page.Execute(w, map[string]any{
		"Machine": r.where(), "Explanation": fmt.Sprintf(explanation, r.Rounds), "Plots": plots, "Markdown": md.String(),
	})
}

// colours tell the columns apart, also for those who see few colours, in the
// order of the columns.
var colours = []string{"#0b63ce", "#8fb8ea", "#e07a1f", "#3d9a6c", "#b0457b", "#8a6d3b", "#5f6b76", "#111111"}

// Dimensions of a plot in pixels.
const (
	plotWidth = 980
	labelArea = 290
	valueArea = 110
	barHigh   = 12
	rowGap    = 10
	legend    = 26
)

// svg draws the medians as bars and the ranges as lines, or returns nothing
// where nothing was measured.
func (t *table) svg() string {
	most := 0.0
	for _, w := range t.rows {
		for c := range t.columns {
			if f := t.cell(w, c); f != nil && f.Spread != nil {
				most = max(most, f.Spread.High)
			}
		}
	}
	if most == 0 {
		return ""
	}
	var b strings.Builder
	scale := float64(plotWidth-labelArea-valueArea) / most
	y := t.legend(&b)
	for _, w := range t.rows {
		y += rowGap
		fmt.Fprintf(&b, `<text x="%d" y="%d" text-anchor="end">%s</text>`, labelArea-8, y+barHigh-1, escape(w.title))
		for c := range t.columns {
			if f := t.cell(w, c); f != nil {
				bar(&b, f, y, scale, colours[c%len(colours)])
				y += barHigh + 2
			}
		}
	}
	return fmt.Sprintf(`<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" role="img" aria-label="%s">%s</svg>`,
		plotWidth, y+rowGap, plotWidth, escape(t.metric.Name), b.String())
}

// legend names the colours and returns where it ends.
func (t *table) legend(b *strings.Builder) (y int) {
	x := 0
	for c, name := range t.columns {
		wide := 24 + 7*len(name)
		if x+wide > plotWidth {
			x, y = 0, y+18
		}
		fmt.Fprintf(b, `<rect x="%d" y="%d" width="11" height="11" rx="2" fill="%s"/><text x="%d" y="%d">%s</text>`,
			x, y+2, colours[c%len(colours)], x+16, y+12, escape(name))
		x += wide
	}
	return y + legend
}

func bar(b *strings.Builder, f *figure, y int, scale float64, colour string) {
	if f.Spread == nil {
		fmt.Fprintf(b, `<text class="dim" x="%d" y="%d">%s</text>`, labelArea+2, y+barHigh-2, f.text())
		return
	}
	at := func(x float64) float64 { return labelArea + x*scale }
	mid := float64(y) + barHigh/2
	fmt.Fprintf(b, `<rect x="%d" y="%d" width="%.1f" height="%d" rx="2" fill="%s"/>`, labelArea, y, max(1, f.Spread.Median*scale), barHigh, colour)
	fmt.Fprintf(b, `<path d="M%.1f %.1fH%.1f" stroke="#1c2024" stroke-width="1.5"/>`, at(f.Spread.Low), mid, at(f.Spread.High))
	text := short(f.Spread.Median)
	if f.Ratio != nil {
		text += " (×" + short(f.Ratio.Median) + ")"
	}
	fmt.Fprintf(b, `<text x="%.1f" y="%d">%s</text>`, at(f.Spread.High)+6, y+barHigh-2, escape(text))
}

func escape(s string) string { return template.HTMLEscapeString(s) }
