//go:build linux

package soak_test

import (
	"bytes"
	"context"
	"fmt"
	"math"
	"net/http"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A sample is what a process took at a moment.
type sample struct {
	at      time.Time
	rss     uint64 // bytes that are in memory
	own     uint64 // of these, what is no file: a broker's store is mapped
	fds     int
	threads int
	// goroutines are known of this process and of the broker, which tells of its own.
	goroutines int
}

// take looks at a process; false: it isn't there.
func take(pid int) (sample, bool) {
	dir := fmt.Sprintf("/proc/%d/", pid)
	text, err := os.ReadFile(dir + "status")
	fds, err2 := os.ReadDir(dir + "fd")
	if err != nil || err2 != nil {
		return sample{}, false
	}
	s := sample{at: time.Now(), fds: len(fds)}
	for line := range strings.SplitSeq(string(text), "\n") {
		key, value, _ := strings.Cut(line, ":")
		n, _ := strconv.ParseUint(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 10, 64)
		switch key {
		case "VmRSS":
			s.rss = n << 10
		case "RssAnon":
			s.own = n << 10
		case "Threads":
			s.threads = int(n)
		}
	}
	return s, s.rss > 0 // a zombie has none
}

// harness is this process, the agent in it included.
const harness = "this test"

// sampling takes samples of everybody until ctx ends.
func (w *world) sampling(ctx context.Context, every time.Duration) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		pids := map[string]int{"broker": int(w.pid.Load()), harness: os.Getpid()}
		for name, u := range w.units {
			if pid := u.pid(); pid != 0 {
				pids["agent "+name] = pid
			}
		}
		for name, pid := range pids {
			s, ok := take(pid)
			if pid == 0 || !ok {
				continue
			}
			switch name {
			case harness:
				s.goroutines = runtime.NumGoroutine()
			case "broker":
				s.goroutines = w.brokerGoroutines(ctx)
			}
			w.log.sample(name, s)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// brokerGoroutines is what the broker tells of itself, 0 if it doesn't now.
func (w *world) brokerGoroutines(ctx context.Context) int {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	a, err := get(ctx, http.DefaultClient, "http://"+w.admin+"/metrics", "")
	if err != nil {
		return 0
	}
	_, rest, _ := strings.Cut(string(a.body), "\ngo_goroutines ")
	line, _, _ := strings.Cut(rest, "\n")
	n, _ := strconv.Atoi(line)
	return n
}

// cpu is the processor time of this process and of its children that have ended, and of
// those that run.
func (w *world) cpu() time.Duration {
	var sum time.Duration
	for _, who := range []int{unix.RUSAGE_SELF, unix.RUSAGE_CHILDREN} {
		var u unix.Rusage
		if err := unix.Getrusage(who, &u); err == nil {
			sum += time.Duration(u.Utime.Nano() + u.Stime.Nano())
		}
	}
	pids := []int{int(w.pid.Load())}
	for _, u := range w.units {
		pids = append(pids, u.pid())
	}
	for _, pid := range pids {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if pid == 0 || err != nil {
			continue
		}
		fields := bytes.Fields(text[bytes.LastIndexByte(text, ')')+1:])
		for _, f := range fields[11:13] { // utime and stime, in hundredths
			n, _ := strconv.Atoi(string(f))
			sum += time.Duration(n) * 10 * time.Millisecond
		}
	}
	return sum
}

// A series says how one figure went: medians of quarters, and the slope.
type series struct {
	First   float64 `json:"first_quarter"`
	Second  float64 `json:"second_quarter"`
	Last    float64 `json:"last_quarter"`
	PerHour float64 `json:"per_hour"` // by least squares
}

// newSeries leaves out what is zero: it wasn't known then.
func newSeries(all []sample, value func(sample) float64) series {
	var samples []sample
	for _, s := range all {
		if value(s) > 0 {
			samples = append(samples, s)
		}
	}
	if len(samples) == 0 {
		return series{}
	}
	quarter := func(n int) float64 {
		part := samples[n*len(samples)/4 : max((n+1)*len(samples)/4, n*len(samples)/4+1)]
		values := make([]float64, len(part))
		for i, s := range part {
			values[i] = value(s)
		}
		slices.Sort(values)
		return values[len(values)/2]
	}
	var n, sx, sy, sxx, sxy float64
	for _, s := range samples {
		x, y := s.at.Sub(samples[0].at).Hours(), value(s)
		n, sx, sy, sxx, sxy = n+1, sx+x, sy+y, sxx+x*x, sxy+x*y
	}
	out := series{First: quarter(0), Second: quarter(1), Last: quarter(3)}
	if d := n*sxx - sx*sx; d > 0 {
		out.PerHour = (n*sxy - sx*sy) / d
	}
	return out
}

// flat is where a figure is judged: it may end at 1.15 times the second quarter, when all
// is warm, and something.
func (s series) flat(some float64) bool { return s.Last <= 1.15*s.Second+some }

// TestSeries: what grows isn't flat, what only gets warm is.
func TestSeries(t *testing.T) {
	began := time.Now()
	at := func(value func(minute int) int) series {
		var samples []sample
		for m := range 60 {
			samples = append(samples, sample{at: began.Add(time.Duration(m) * time.Minute), fds: value(m)})
		}
		return newSeries(samples, func(s sample) float64 { return float64(s.fds) })
	}
	grows := at(func(m int) int { return 100 + m })
	if want := (series{First: 107, Second: 122, Last: 152, PerHour: 60}); math.Abs(grows.PerHour-60) > 0.01 || grows.First != want.First || grows.Second != want.Second || grows.Last != want.Last {
		t.Errorf("got %+v, want %+v", grows, want)
	}
	if grows.flat(10) || !grows.flat(20) {
		t.Error("152 after 122 is flat within 20, and not within 10")
	}
	if warm := at(func(m int) int { return 100 + min(m, 10) }); !warm.flat(0) {
		t.Errorf("%+v isn't flat", warm)
	}
	if unknown := at(func(int) int { return 0 }); unknown != (series{}) {
		t.Errorf("of nothing: %+v", unknown)
	}
}
