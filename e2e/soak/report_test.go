//go:build linux

package soak_test

import (
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"text/tabwriter"
	"time"
)

// counts are of one kind of request.
type counts struct {
	requests, served atomic.Int64
	away             atomic.Int64 // unanswered, and no credential could have been had
	down             atomic.Int64 // unanswered, and the agent itself was ended or paused
	lost             atomic.Int64
}

// A tally is all that is counted.
type tally struct {
	violations atomic.Int64

	mu         sync.Mutex
	kinds      map[string]*counts
	faults     map[kind]int
	complaints map[string]int
	samples    map[string][]sample
	survived   time.Duration // the longest outage in which every request of an agent was served
	longest    time.Duration // the longest outage
	missed     time.Duration // for how long the broker was reachable at most for a request that isn't lost
	bytes      int64
}

func (l *tally) init() {
	l.kinds, l.faults, l.complaints, l.samples = map[string]*counts{}, map[kind]int{}, map[string]int{}, map[string][]sample{}
}

func (l *tally) of(name string) *counts {
	l.mu.Lock()
	defer l.mu.Unlock()
	c, ok := l.kinds[name]
	if !ok {
		c = &counts{}
		l.kinds[name] = c
	}
	return c
}

func (l *tally) fault(k kind) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.faults[k]++
}

func (l *tally) outage(d time.Duration, survived bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.longest = max(l.longest, d)
	if survived {
		l.survived = max(l.survived, d)
	}
}

func (l *tally) unused(d time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.missed = max(l.missed, d)
}

func (l *tally) sample(name string, s sample) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.samples[name] = append(l.samples[name], s)
}

func (l *tally) store(bytes int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.bytes = bytes
}

// maxComplaints are told one by one of the requests of one kind; more are counted.
const maxComplaints = 5

// complain fails the test.
func (w *world) complain(about, format string, args ...any) {
	w.log.mu.Lock()
	w.log.complaints[about]++
	n := w.log.complaints[about]
	w.log.mu.Unlock()
	if n > maxComplaints {
		w.t.Fail()
		return
	}
	w.t.Errorf("%v: %s: %s", time.Since(w.began).Round(time.Millisecond), about, fmt.Sprintf(format, args...))
}

// violate is for what must never be.
func (w *world) violate(about, format string, args ...any) {
	w.log.violations.Add(1)
	w.complain("VIOLATION: "+about, format, args...)
}

// A result is how it ended.
type result struct {
	Seed       uint64             `json:"seed"`
	For        string             `json:"for"`
	Life       string             `json:"life"`
	Notice     string             `json:"notice"`
	Requests   map[string]request `json:"requests"`
	Lost       int64              `json:"lost"`
	Violations int64              `json:"violations"`
	Faults     map[kind]int       `json:"faults"`
	Outage     string             `json:"longest_outage"`
	Survived   string             `json:"longest_outage_survived"`
	Missed     string             `json:"longest_reachable_and_not_used"`
	CPU        float64            `json:"cpu"` // of one core
	StoreBytes int64              `json:"store_bytes"`
	Processes  map[string]took    `json:"processes"`
}

type request struct {
	Requests int64 `json:"requests"`
	Served   int64 `json:"served"`
	Away     int64 `json:"broker_away"`
	Down     int64 `json:"agent_down"`
	Lost     int64 `json:"lost"`
}

// took is what a process took.
type took struct {
	RSS     series `json:"rss_bytes"`
	Own     series `json:"anonymous_bytes"`
	FDs     series `json:"fds"`
	Threads series `json:"threads"`
	// Goroutines are those of the broker and of this test.
	Goroutines series `json:"goroutines"`
}

func (w *world) result(seed uint64, soaked, cpu time.Duration) result {
	l := &w.log
	l.mu.Lock()
	defer l.mu.Unlock()
	short := func(d time.Duration) string { return d.Round(10 * time.Millisecond).String() }
	r := result{
		Seed: seed, For: soaked.Round(time.Second).String(), Life: w.life.String(), Notice: w.notice.String(),
		Requests: map[string]request{}, Violations: l.violations.Load(), Faults: maps.Clone(l.faults),
		Outage: short(l.longest), Survived: short(l.survived), Missed: short(l.missed),
		CPU: cpu.Seconds() / soaked.Seconds(), StoreBytes: l.bytes, Processes: map[string]took{},
	}
	for name, c := range l.kinds {
		r.Requests[name] = request{c.requests.Load(), c.served.Load(), c.away.Load(), c.down.Load(), c.lost.Load()}
		r.Lost += c.lost.Load()
	}
	for name, s := range l.samples {
		r.Processes[name] = took{
			newSeries(s, func(s sample) float64 { return float64(s.rss) }), newSeries(s, func(s sample) float64 { return float64(s.own) }),
			newSeries(s, func(s sample) float64 { return float64(s.fds) }), newSeries(s, func(s sample) float64 { return float64(s.threads) }),
			newSeries(s, func(s sample) float64 { return float64(s.goroutines) }),
		}
	}
	return r
}

// String is the result as tables.
func (r *result) String() string {
	var out strings.Builder
	fmt.Fprintf(&out, "soaked for %s with tokens of %s, seed %d: %d lost, %d violations\n\n", r.For, r.Life, r.Seed, r.Lost, r.Violations)
	t := tabwriter.NewWriter(&out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "requests\tall\tserved\tbroker away\tagent down\tlost")
	var sum request
	row := func(name string, c request) {
		fmt.Fprintf(t, "%s\t%d\t%d\t%d\t%d\t%d\n", name, c.Requests, c.Served, c.Away, c.Down, c.Lost)
	}
	for _, name := range slices.Sorted(maps.Keys(r.Requests)) {
		c := r.Requests[name]
		row(name, c)
		sum = request{sum.Requests + c.Requests, sum.Served + c.Served, sum.Away + c.Away, sum.Down + c.Down, sum.Lost + c.Lost}
	}
	row("all", sum)
	fmt.Fprintln(t, "\nfaults\t")
	for _, k := range slices.SortedFunc(maps.Keys(r.Faults), cmp.Compare[kind]) {
		fmt.Fprintf(t, "%s\t%d\n", k, r.Faults[k])
	}
	fmt.Fprintf(t, "longest outage\t%s\nlongest without a request unserved\t%s\nlongest reachable and not used\t%s\n", r.Outage, r.Survived, r.Missed)
	fmt.Fprintln(t, "\nquarters 1, 2, 4\tRSS MiB\tanonymous MiB\tMiB per hour\tfds\tthreads\tgoroutines")
	three := func(s series, unit float64) string {
		if s == (series{}) {
			return "-"
		}
		return fmt.Sprintf("%.4g %.4g %.4g", s.First/unit, s.Second/unit, s.Last/unit)
	}
	for _, name := range slices.Sorted(maps.Keys(r.Processes)) {
		p := r.Processes[name]
		fmt.Fprintf(t, "%s\t%s\t%s\t%+.2f\t%s\t%s\t%s\n", name, three(p.RSS, 1<<20), three(p.Own, 1<<20), p.Own.PerHour/(1<<20), three(p.FDs, 1), three(p.Threads, 1), three(p.Goroutines, 1))
	}
	t.Flush()
	fmt.Fprintf(&out, "\nprocessor: %.0f %% of one core; store: %.1f MiB\n", 100*r.CPU, float64(r.StoreBytes)/(1<<20))
	return out.String()
}

func (r *result) write(path string) error {
	text, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(text, '\n'), 0o600)
}
