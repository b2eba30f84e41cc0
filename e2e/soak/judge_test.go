//go:build linux

package soak_test

import (
	"sync"
	"testing"
	"time"
)

// A span is a time with a beginning and an end.
type span struct{ from, to time.Time }

// within is how much of the span is between two times.
func (s span) within(from, to time.Time) time.Duration {
	if s.from.After(from) {
		from = s.from
	}
	if s.to.Before(to) {
		to = s.to
	}
	return to.Sub(from)
}

// A reach is what is known of one agent's way to credentials: when it was surely open.
// It is from one probe that got a credential on that very way to another one, while no
// fault of which we know was in force, and each probe between them got one too.
type reach struct {
	mu      sync.Mutex
	faults  int
	changed time.Time // when a fault last began or ended
	open    bool      // the last window may still grow
	windows []span
}

// begin says that something stands in the way, from before it does.
func (r *reach) begin() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.faults++
	r.open, r.changed = false, time.Now()
}

// end says that it no longer does, after that.
func (r *reach) end() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.faults--
	r.changed = time.Now()
}

// endAfter is end, after a time.
func (r *reach) endAfter(d time.Duration) { time.AfterFunc(d, r.end) }

// breaks ends the window that is open, if there is one.
func (r *reach) breaks() {
	r.begin()
	r.end()
}

// probed takes the result of a probe.
func (r *reach) probed(start, end time.Time, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case !ok, r.faults > 0, start.Before(r.changed):
		r.open = false
	case r.open:
		r.windows[len(r.windows)-1].to = start
	default:
		r.open = true
		r.windows = append(r.windows[max(0, len(r.windows)-maxWindows):], span{end, end})
	}
}

// maxWindows are remembered: many more than open and close in two lives.
const maxWindows = 200

// longest is for how long the way was open without a break between two times.
func (r *reach) longest(from, to time.Time) time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	var longest time.Duration
	for _, w := range r.windows {
		longest = max(longest, w.within(from, to))
	}
	return longest
}

// fresh reports whether the way was open for a time, and no longer ago than that.
func (r *reach) fresh(at time.Time, open, ago time.Duration) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, w := range r.windows {
		if w.within(w.from, at) >= open && at.Sub(w.to) <= ago {
			return true
		}
	}
	return false
}

// A downtime is when an agent's process didn't run, or stood still.
type downtime struct {
	mu    sync.Mutex
	spans []span // the last one without an end while it is down
	up    time.Time
}

func (d *downtime) begin() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.spans = append(d.spans, span{from: time.Now()})
}

// end says that the process runs; memory says whether it still has what it had.
func (d *downtime) end(memory bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	now := time.Now()
	d.spans[len(d.spans)-1].to = now
	if !memory {
		d.up = now
	}
}

// meets reports whether it was down at any moment between two times.
func (d *downtime) meets(from, to time.Time) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, s := range d.spans {
		if !s.from.After(to) && (s.to.IsZero() || !s.to.Before(from)) {
			return true
		}
	}
	return false
}

// since is when the process began that runs now.
func (d *downtime) since() time.Time {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.up
}

// TestReach holds what counts as reachable.
func TestReach(t *testing.T) {
	var r reach
	began := time.Now().Add(-time.Hour) // before any fault of this test
	at := func(s int) time.Time { return began.Add(time.Duration(s) * time.Second) }
	probe := func(s int, ok bool) { r.probed(at(s), at(s).Add(100*time.Millisecond), ok) }
	for s := range 10 {
		probe(s, true)
	}
	probe(10, false)
	for s := 11; s < 14; s++ {
		probe(s, true)
	}
	for _, c := range []struct {
		from, to int
		want     time.Duration
	}{
		{0, 20, 8900 * time.Millisecond},
		{5, 20, 4 * time.Second},
		{5, 7, 2 * time.Second},
		{9, 20, 1900 * time.Millisecond},
		{15, 20, 0},
	} {
		if got := r.longest(at(c.from), at(c.to)); got != c.want {
			t.Errorf("reachable between %d and %d for %v, want %v", c.from, c.to, got, c.want)
		}
	}
	if !r.fresh(at(15), time.Second, 3*time.Second) || r.fresh(at(15), 5*time.Second, 3*time.Second) || r.fresh(at(20), time.Second, 3*time.Second) {
		t.Error("reachable until a moment ago")
	}
	// What is probed while a fault is in force, or began before it ended, proves nothing.
	r = reach{}
	start := time.Now()
	r.begin()
	r.probed(time.Now(), time.Now(), true)
	early := time.Now()
	r.end()
	r.probed(early, time.Now(), true)
	r.probed(start, time.Now(), true)
	if len(r.windows) > 0 {
		t.Errorf("reachable during a fault: %v", r.windows)
	}
	r.probed(time.Now(), time.Now(), true)
	if len(r.windows) != 1 {
		t.Error("not reachable after it")
	}
}
