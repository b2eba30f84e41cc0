package main

import (
	"context"
	"math"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// A sample is what one round of one side showed.
type sample struct {
	value    float64 // what is compared, in the row's unit
	rate     float64 // calls a second, where there were calls
	p50, p99 time.Duration
	allocs   float64 // of one call, where they are counted
	refused  float64 // calls that were refused as unavailable, and made again
}

// A side measures once.
type side func(context.Context) (sample, error)

// what a run of calls is judged by.
type judged int

const (
	byRate judged = iota
	byP50
)

// warmup is how many calls go first and aren't counted: connections, caches, tables.
const warmup = 50

// calls makes calls at once from a number of callers, for a while or until there were most
// of them (0: no bound), and tells what they took.
func calls(by judged, callers int, window time.Duration, most int64, call func(ctx context.Context, caller int) error) side {
	warm := false
	return func(ctx context.Context) (sample, error) {
		if !warm {
			warm = true
			for i := range max(warmup, callers) {
				if _, err := insist(ctx, func() error { return call(ctx, i%callers) }); err != nil {
					return sample{}, err
				}
			}
		}
		var (
			wg    sync.WaitGroup
			made  atomic.Int64
			mu    sync.Mutex
			all   []time.Duration
			again int
			fault error
		)
		started := time.Now()
		until := started.Add(window)
		for c := range callers {
			wg.Go(func() {
				took := make([]time.Duration, 0, 1024)
				var err error
				refused := 0
				for at := time.Now(); at.Before(until) && err == nil && (most == 0 || made.Add(1) <= most); {
					var n int
					n, err = insist(ctx, func() error { return call(ctx, c) })
					refused += n
					now := time.Now()
					took = append(took, now.Sub(at))
					at = now
				}
				mu.Lock()
				defer mu.Unlock()
				all, again = append(all, took...), again+refused
				if err != nil {
					fault = err
				}
			})
		}
		wg.Wait()
		elapsed := time.Since(started)
		if fault != nil {
			return sample{}, fault
		}
		s := summarise(all)
		s.rate, s.refused = float64(len(all))/elapsed.Seconds(), float64(again)
		s.value = s.rate
		if by == byP50 {
			s.value = s.p50.Seconds()
		}
		return s, nil
	}
}

// insist makes a call again while it is refused as unavailable, which a broker does that
// could not decide in time: on a machine that is busy with other things it may happen. The
// time of the attempts is the call's own.
func insist(ctx context.Context, call func() error) (refused int, err error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		err := call()
		if code := status.Code(err); code != codes.Unavailable && code != codes.DeadlineExceeded || ctx.Err() != nil {
			return refused, err
		}
		refused++
	}
}

// patience is for what should come by itself, on a machine that may be doing anything.
const patience = 3 * time.Minute

// batchTime is about how long a batch takes whose time is measured: long enough for the
// clock, and no longer on one side than on the other, since whatever else runs on the
// machine is likelier to come in between the longer it is.
const batchTime = 50 * time.Microsecond

// repeat runs f n times in this process, and tells what one run of it takes: the median of
// short batches, and how often it allocates. It calls f(0) to f(n-1).
func repeat(n int, f func(i int) error) (sample, error) {
	var took []time.Duration
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	batch := 1
	for i := 0; i < n; {
		at, from := time.Now(), i
		for ; i < min(from+batch, n); i++ {
			if err := f(i); err != nil {
				return sample{}, err
			}
		}
		each := max(time.Since(at)/time.Duration(i-from), 1)
		took = append(took, each)
		if len(took) <= 10 { // the first may be slow
			batch = max(batch, min(int(batchTime/each), n/20))
		}
	}
	runtime.ReadMemStats(&after)
	s := summarise(took)
	s.value = s.p50.Seconds()
	s.allocs = float64(after.Mallocs-before.Mallocs) / float64(n)
	return s, nil
}

func summarise(took []time.Duration) sample {
	if len(took) == 0 {
		return sample{}
	}
	slices.Sort(took)
	at := func(q float64) time.Duration { return took[int(q*float64(len(took)-1))] }
	return sample{p50: at(0.50), p99: at(0.99)}
}

// A Spread is the median of several rounds, and their extremes.
type Spread struct {
	Median float64 `json:"median"`
	Min    float64 `json:"min"`
	Max    float64 `json:"max"`
}

func spreadOf(xs []float64) Spread {
	if len(xs) == 0 {
		return Spread{}
	}
	xs = slices.Sorted(slices.Values(xs))
	mid := len(xs) / 2
	m := xs[mid]
	if len(xs)%2 == 0 {
		m = (xs[mid-1] + xs[mid]) / 2
	}
	return Spread{Median: m, Min: xs[0], Max: xs[len(xs)-1]}
}

// A Reading is one side of a figure: the medians of its rounds. Times are in seconds.
type Reading struct {
	Spread
	Rate   float64 `json:"rate,omitempty"`
	P50    float64 `json:"p50,omitempty"`
	P99    float64 `json:"p99,omitempty"`
	Allocs float64 `json:"allocs,omitempty"`
	// Refused are the calls that were refused as unavailable and made again, in all rounds.
	Refused float64 `json:"refused,omitempty"`
}

func readingOf(samples []sample) *Reading {
	pick := func(f func(sample) float64) Spread {
		var xs []float64
		for _, s := range samples {
			xs = append(xs, f(s))
		}
		return spreadOf(xs)
	}
	refused := 0.0
	for _, s := range samples {
		refused += s.refused
	}
	return &Reading{
		Refused: refused,
		Spread:  pick(func(s sample) float64 { return s.value }),
		Rate:    pick(func(s sample) float64 { return s.rate }).Median,
		P50:     pick(func(s sample) float64 { return s.p50.Seconds() }).Median,
		P99:     pick(func(s sample) float64 { return s.p99.Seconds() }).Median,
		Allocs:  math.Round(pick(func(s sample) float64 { return s.allocs }).Median),
	}
}

// interleave measures both sides in turns, ours first in one round and the floor first in
// the next, so that what changes on the machine meanwhile favours neither. The ratio is of
// the two samples of one round.
func interleave(ctx context.Context, rounds int, p pair) (ours, floor *Reading, ratio Spread, err error) {
	var a, b []sample
	var ratios []float64
	take := func(of side, into *[]sample) {
		if err != nil || of == nil {
			return
		}
		var s sample
		if s, err = of(ctx); err == nil {
			*into = append(*into, s)
		}
	}
	for i := range rounds {
		if i%2 == 0 {
			take(p.ours, &a)
			take(p.floor, &b)
		} else {
			take(p.floor, &b)
			take(p.ours, &a)
		}
		if err != nil {
			return nil, nil, Spread{}, err
		}
		if p.floor != nil {
			ratios = append(ratios, a[i].value/b[i].value)
		}
	}
	ours = readingOf(a)
	if p.floor != nil {
		floor = readingOf(b)
	}
	return ours, floor, spreadOf(ratios), nil
}
