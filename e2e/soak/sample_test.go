//go:build linux

package soak_test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
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
			if name == harness {
				s.threads = runtime.NumGoroutine()
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

func newSeries(samples []sample, value func(sample) float64) series {
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
