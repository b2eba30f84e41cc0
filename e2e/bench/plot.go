package main

import (
	"bytes"
	"cmp"
	"encoding/xml"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// A plot is cost against size: a line of ours and one of the floor for each series.
type plot struct {
	file, title, x string
	series         []string
	logX           bool
	perCall        bool // of a rate: its inverse, which is a cost
}

// plots of the page.
var plots = []plot{
	{file: "performance-revoke.svg", title: "A revoke, until committed (p50)", x: "live grants of the identity", series: []string{"revoke"}, logX: true},
	{file: "performance-contained.svg", title: "Revoke, until the last verifier refuses", x: "connected verifiers", series: []string{"contained"}, logX: true},
	{file: "performance-exchange.svg", title: "Issuing and exchanging, 64 callers: 1 / rate", x: "depth of the token that is made", series: []string{"exchange"}, perCall: true},
	{file: "performance-verify.svg", title: "Verifying a token", x: "depth of the token", series: []string{"verify, first time", "verify, again"}},
	{file: "performance-policy.svg", title: "A policy decision", x: "entitlements", series: []string{"policy"}, logX: true},
}

// A point of a line; y is in seconds.
type point struct{ x, y float64 }

// A line of a plot. That of a floor is dashed.
type line struct {
	name   string
	floor  bool
	points []point
}

// writePlots writes those for which there are at least two points.
func (r *Report) writePlots(dir string) error {
	for _, p := range plots {
		lines := r.lines(p)
		if len(lines) == 0 || len(lines[0].points) < 2 {
			continue
		}
		if err := os.WriteFile(filepath.Join(dir, p.file), p.svg(lines), 0o644); err != nil {
			return err
		}
	}
	return nil
}

func (r *Report) lines(p plot) []line {
	var lines []line
	for _, name := range p.series {
		ours, floor := line{name: "dayfly"}, line{name: "floor", floor: true}
		if len(p.series) > 1 {
			_, which, _ := strings.Cut(name, ", ")
			ours.name, floor.name = "dayfly, "+which, "floor"
		}
		for _, f := range r.Figures {
			if f.Series != name || f.Floor == nil {
				continue
			}
			cost := func(y float64) point {
				if p.perCall {
					y = 1 / y
				}
				return point{f.X, y}
			}
			ours.points = append(ours.points, cost(f.Ours.Median))
			floor.points = append(floor.points, cost(f.Floor.Median))
		}
		if len(ours.points) == 0 {
			continue
		}
		for _, l := range []*line{&ours, &floor} {
			slices.SortFunc(l.points, func(a, b point) int { return cmp.Compare(a.x, b.x) })
		}
		lines = append(lines, ours)
		if len(lines) == 1 { // the same for all series of a plot
			lines = append(lines, floor)
		}
	}
	return lines
}

// The picture, in its own units.
const (
	plotWidth, plotHeight     = 560, 300
	left, right, above, below = 70, 130, 40, 48
	innerWidth, innerHeight   = plotWidth - left - right, plotHeight - above - below
	style                     = `<style>text{font:12px system-ui,sans-serif;fill:#1f2328}.title{font-size:14px;font-weight:600}.grid{stroke:#d1d9e0;stroke-width:1}.c0{stroke:#0969da;fill:#0969da}.c1{stroke:#6e7781;fill:#6e7781}.c2{stroke:#bc4c00;fill:#bc4c00}.line{fill:none;stroke-width:2}.floor{stroke-dasharray:5 4}@media(prefers-color-scheme:dark){text{fill:#f0f6fc}.grid{stroke:#3d444d}.c0{stroke:#4493f8;fill:#4493f8}.c1{stroke:#9198a1;fill:#9198a1}.c2{stroke:#f0883e;fill:#f0883e}.line{fill:none}}</style>`
	yTicks                    = 4
)

// svg draws with a y axis from zero, so that a flat line is one.
func (p plot) svg(lines []line) []byte {
	var xs []float64
	top := 0.0
	for _, l := range lines {
		for _, at := range l.points {
			top = max(top, at.y)
			if !slices.Contains(xs, at.x) {
				xs = append(xs, at.x)
			}
		}
	}
	slices.Sort(xs)
	step := niceStep(top / yTicks)
	top = step * math.Ceil(top/step)
	scale := func(x float64) float64 { return x }
	if p.logX {
		scale = math.Log10
	}
	lo, hi := scale(xs[0]), scale(xs[len(xs)-1])
	px := func(x float64) float64 { return left + innerWidth*(scale(x)-lo)/max(hi-lo, 1e-9) }
	py := func(y float64) float64 { return above + innerHeight*(1-y/top) }

	var b bytes.Buffer
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" height="%d" role="img" aria-label="%s">%s`, plotWidth, plotHeight, plotWidth, plotHeight, escaped(p.title), style)
	fmt.Fprintf(&b, "\n<text class=\"title\" x=\"%d\" y=\"22\">%s</text>\n", left, escaped(p.title))
	for y := 0.0; y <= top*1.0001; y += step {
		fmt.Fprintf(&b, "<line class=\"grid\" x1=\"%d\" x2=\"%d\" y1=\"%.1f\" y2=\"%.1f\"/><text x=\"%d\" y=\"%.1f\" text-anchor=\"end\">%s</text>\n", left, left+innerWidth, py(y), py(y), left-8, py(y)+4, tick(y))
	}
	for _, x := range xs {
		fmt.Fprintf(&b, "<text x=\"%.1f\" y=\"%d\" text-anchor=\"middle\">%s</text>\n", px(x), above+innerHeight+18, groups(int(x)))
	}
	fmt.Fprintf(&b, "<text x=\"%d\" y=\"%d\" text-anchor=\"middle\">%s</text>\n", left+innerWidth/2, plotHeight-10, escaped(p.x))
	for i, l := range spread(lines, py) {
		class := fmt.Sprintf("c%d", i%3)
		dashed := ""
		if l.floor {
			dashed = " floor"
		}
		var path strings.Builder
		for _, at := range l.points {
			fmt.Fprintf(&path, "%.1f,%.1f ", px(at.x), py(at.y))
		}
		fmt.Fprintf(&b, "<polyline class=\"line %s%s\" points=\"%s\"/>\n", class, dashed, strings.TrimSpace(path.String()))
		for _, at := range l.points {
			fmt.Fprintf(&b, "<circle class=\"%s\" cx=\"%.1f\" cy=\"%.1f\" r=\"3\"><title>%s: %s at %s</title></circle>\n", class, px(at.x), py(at.y), escaped(l.name), quantity(at.y, inSeconds), groups(int(at.x)))
		}
		fmt.Fprintf(&b, "<text x=\"%d\" y=\"%.1f\">%s</text>\n", left+innerWidth+10, l.label, escaped(l.name))
	}
	b.WriteString("</svg>\n")
	return b.Bytes()
}

// labelled is a line with the height of its name.
type labelled struct {
	line
	label float64
}

// spread puts the names at the ends of the lines, and no two of them over each other.
func spread(lines []line, py func(float64) float64) []labelled {
	const apart = 14
	out := make([]labelled, len(lines))
	byHeight := make([]*labelled, len(lines))
	for i, l := range lines {
		out[i] = labelled{l, py(l.points[len(l.points)-1].y) + 4}
		byHeight[i] = &out[i]
	}
	slices.SortFunc(byHeight, func(a, b *labelled) int { return cmp.Compare(b.label, a.label) }) // the lowest first
	for i := 1; i < len(byHeight); i++ {
		byHeight[i].label = min(byHeight[i].label, byHeight[i-1].label-apart)
	}
	return out
}

// niceStep rounds up to 1, 2 or 5 times a power of ten.
func niceStep(x float64) float64 {
	if x <= 0 {
		return 1
	}
	power := math.Pow(10, math.Floor(math.Log10(x)))
	for _, m := range []float64{1, 2, 5} {
		if x <= m*power*1.0001 {
			return m * power
		}
	}
	return 10 * power
}

func tick(y float64) string {
	if y == 0 {
		return "0"
	}
	return quantity(y, inSeconds)
}

func escaped(s string) string {
	var b strings.Builder
	_ = xml.EscapeText(&b, []byte(s)) // to memory
	return b.String()
}
