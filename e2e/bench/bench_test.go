package main

import (
	"bytes"
	"context"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// bin is where the built commands are.
var bin string

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "floor" { // a floor's process, of this binary
		os.Exit(run(context.Background(), os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
	}
	os.Exit(testMain(m))
}

func testMain(m *testing.M) int {
	dir, err := os.MkdirTemp("", "dayfly-bench-bin")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	bin = dir
	// As the other tests build them, so that nothing is compiled twice.
	build := exec.Command("go", "build", "-o", dir, "../../cmd/dayfly-broker", "../../cmd/dayfly-agent", "./hello")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "building the commands: %v: %s", err, out)
		return 1
	}
	return m.Run()
}

// bench runs the command and returns its standard output.
func bench(t *testing.T, wantCode int, args ...string) string {
	t.Helper()
	var stdout, stderr bytes.Buffer
	if code := run(t.Context(), args, strings.NewReader(""), &stdout, &stderr); code != wantCode {
		t.Fatalf("bench %s: exit code %d, want %d: %s", strings.Join(args, " "), code, wantCode, &stderr)
	}
	return stdout.String()
}

// TestTiny measures every row once, with next to nothing, so that none of them rots. No
// figure is judged: this machine may be doing anything.
func TestTiny(t *testing.T) {
	var got Report
	if err := json.Unmarshal([]byte(bench(t, 0, "run", "--size", "tiny", "--bin", bin, "--output", "json")), &got); err != nil {
		t.Fatal(err)
	}
	want := strings.Fields(strings.ReplaceAll(bench(t, 0, "rows", "--size", "tiny"), " ", "_"))
	var ids []string
	for _, f := range got.Figures {
		ids = append(ids, strings.ReplaceAll(f.id(), " ", "_"))
		if f.Floor == nil != (f.Ratio == nil) || f.Target != nil && f.Pass == nil {
			t.Errorf("%s: a floor without a ratio, or a target that nothing is held against: %+v", f.id(), f)
		}
		if f.Floor == nil {
			continue // the CPU of six verifiers' pings may well round to none
		}
		for side, x := range map[string]float64{"ours": f.Ours.Median, "floor": f.Floor.Median, "ratio": f.Ratio.Median} {
			if math.IsNaN(x) || math.IsInf(x, 0) || x <= 0 {
				t.Errorf("%s: %s is %v", f.id(), side, x)
			}
		}
	}
	if !slices.Equal(ids, want) {
		t.Errorf("figures of %v, want %v", ids, want)
	}
}

// TestSizes: each size has rows, no two of the same name, and together they have all that
// is in any of them.
func TestSizes(t *testing.T) {
	for name := range sizes {
		seen := map[string]bool{}
		for _, id := range strings.Split(strings.TrimSpace(bench(t, 0, "rows", "--size", name)), "\n") {
			if seen[id] {
				t.Errorf("size %s has %q twice", name, id)
			}
			seen[id] = true
		}
		if len(seen) < 8 {
			t.Errorf("size %s has only %d rows", name, len(seen))
		}
	}
}

// TestUsage: what is wrong with a command line is said, and is no failure to measure.
func TestUsage(t *testing.T) {
	for _, args := range [][]string{
		{"run", "--size", "huge"}, {"run", "--row", "("}, {"run", "--row", "nothing like it"}, {"run", "--output", "xml"}, {"run", "--no-such-flag"},
	} {
		bench(t, exitUsage, args...)
	}
}

// figure is one whose median ratio is known.
func figure(name string, ratio float64, target *Target) *Figure {
	f := &Figure{Row: "issue", Case: name, Unit: perSecond, Ours: &Reading{Spread: Spread{Median: 100 * ratio}, Rate: 100 * ratio}, Floor: &Reading{Spread: Spread{Median: 100}, Rate: 100}, Ratio: &Spread{ratio, ratio, ratio}, Target: target}
	if target != nil {
		pass := target.met(ratio)
		f.Pass = &pass
	}
	return f
}

func TestJudging(t *testing.T) {
	r := &Report{Figures: []*Figure{
		figure("rate met", 0.65, atLeast(0.65)), figure("rate missed", 0.64, atLeast(0.65)),
		figure("cost met", 1.3, atMost(1.3)), figure("cost missed", 1.31, atMost(1.3)), figure("reported", 9, nil),
	}}
	if r.judged() != 4 || r.missed() != 2 {
		t.Errorf("%d judged and %d missed, want 4 and 2", r.judged(), r.missed())
	}
	var b strings.Builder
	if err := r.table(&b); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"rate missed", "at least 0.65", "at most 1.30", "NO", "of 4 targets 2 are missed"} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("the table lacks %q:\n%s", want, &b)
		}
	}
}

// TestInterleave: the sides take turns, and a ratio is of the two samples of one round.
func TestInterleave(t *testing.T) {
	var order strings.Builder
	noise := 1.0
	take := func(name string, value float64) side {
		return func(context.Context) (sample, error) {
			order.WriteString(name)
			noise *= 1.1
			return sample{value: value * noise}, nil
		}
	}
	ours, floor, ratio, err := interleave(t.Context(), 4, pair{take("o", 20), take("f", 10)})
	if err != nil {
		t.Fatal(err)
	}
	if order.String() != "offooffo" {
		t.Errorf("order %s", &order)
	}
	if ratio.Median < 1.9 || ratio.Median > 2.1 || ratio.Min > ratio.Median || ratio.Max < ratio.Median {
		t.Errorf("ratio %+v, want one around 2: the machine got slower for both", ratio)
	}
	if ours.Median <= floor.Median {
		t.Errorf("ours %+v, floor %+v", ours, floor)
	}
}

// TestSave: newer figures replace older ones, older rows stay, and what people wrote
// around the table stays too.
func TestSave(t *testing.T) {
	dir := t.TempDir()
	page := filepath.Join(dir, pageFile)
	if err := os.WriteFile(page, []byte("before\n"+tableBegin+"old"+tableEnd+"\nafter\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	plotted := func(n int, cost float64) *Figure {
		f := figure(groups(n)+" live grants", cost, nil)
		f.Row, f.Unit, f.Series, f.X = "revoke", inSeconds, "revoke", float64(n)
		return f
	}
	for _, figures := range [][]*Figure{{figure("1 caller", 0.5, nil), figure("a row that was", 0.3, nil), plotted(1000, 1)}, {figure("1 caller", 0.75, nil), plotted(1_000_000, 1.5)}} {
		if err := (&Report{Command: "bench", Figures: figures}).save(dir); err != nil {
			t.Fatal(err)
		}
	}
	raw, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	text := string(raw)
	for _, want := range []string{"before\n", "after\n", "0.75", "1,000 live grants", "1,000,000 live grants"} {
		if !strings.Contains(text, want) {
			t.Errorf("the page lacks %q:\n%s", want, text)
		}
	}
	for _, gone := range []string{"old", "0.50", "a row that was"} {
		if strings.Contains(text, gone) {
			t.Errorf("the page still says %q:\n%s", gone, text)
		}
	}
}

// TestPlots: each plot has rows enough for a line, and is XML.
func TestPlots(t *testing.T) {
	r := &Report{}
	for _, name := range []string{"normal", "large"} {
		for _, row := range rowsOf(sizes[name]) {
			r.merge(&Report{Figures: []*Figure{{
				Row: row.row, Case: row.name, Unit: row.unit, Series: row.series, X: row.x,
				Ours: &Reading{Spread: Spread{Median: 2e-4 + row.x*1e-9}}, Floor: &Reading{Spread: Spread{Median: 1e-4}},
			}}})
		}
	}
	dir := t.TempDir()
	if err := r.writePlots(dir); err != nil {
		t.Fatal(err)
	}
	for _, p := range plots {
		raw, err := os.ReadFile(filepath.Join(dir, p.file))
		if err != nil {
			t.Error(err)
			continue
		}
		dec := xml.NewDecoder(bytes.NewReader(raw))
		for err == nil {
			_, err = dec.Token()
		}
		if !errors.Is(err, io.EOF) {
			t.Errorf("%s: %v", p.file, err)
		}
		for _, bad := range []string{"NaN", "Inf"} {
			if bytes.Contains(raw, []byte(bad)) {
				t.Errorf("%s has a %s", p.file, bad)
			}
		}
		if n := bytes.Count(raw, []byte("<polyline")); n != len(p.series)+1 {
			t.Errorf("%s has %d lines, want %d", p.file, n, len(p.series)+1)
		}
	}
}
