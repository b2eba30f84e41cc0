//go:build linux

package soak_test

import (
	"context"
	"sync"
	"testing"
	"time"
)

// judgedFrom is how long a soak must be for a verdict on memory: in a shorter one it is
// still getting warm.
const judgedFrom = 30 * time.Minute

// TestSoak soaks for -soak.for, and longer until all is well again.
func TestSoak(t *testing.T) {
	life, notice, seed := *soakLife, *soakNotice, *soakSeed
	if notice == 0 {
		notice = max(life/10, 4*time.Second)
	}
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	t.Logf("again: go test -count=1 -timeout 0 -v -run '^TestSoak$' ./e2e/soak -soak.for=%v -soak.life=%v -soak.notice=%v -soak.seed=%d", *soakFor, life, notice, seed)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	w := newWorld(t, ctx, life, notice)
	cpu := w.cpu()
	w.began = time.Now()

	// Those who ask, and those who look, to the end.
	asking, stop := context.WithCancel(ctx)
	defer stop()
	var all sync.WaitGroup
	for _, s := range w.streams {
		all.Go(func() { s.run(asking) })
	}
	for _, j := range w.judges {
		all.Go(func() { _ = j.v.Run(asking) })
		all.Go(func() { j.run(asking) })
	}
	for _, u := range w.units {
		all.Go(func() { w.probe(asking, u) })
	}
	all.Go(func() { w.checker.run(asking) })
	all.Go(func() { w.watchLateness(asking) })
	all.Go(func() { w.sampling(asking, max(*soakFor/400, time.Second)) })
	all.Go(func() { w.progress(asking) })

	// Those who break.
	breaking, over := context.WithTimeout(ctx, *soakFor)
	defer over()
	var faults sync.WaitGroup
	for _, planned := range plan(seed, *soakFor, life) {
		faults.Go(func() { w.follow(breaking, planned) })
	}
	faults.Wait()
	<-breaking.Done()
	w.recovers(ctx)

	soaked := time.Since(w.began)
	cpu = w.cpu() - cpu
	stop()
	all.Wait()
	if err := w.checker.finish(ctx); err != nil {
		t.Error(err)
	}
	w.checkStore()
	r := w.result(seed, soaked, cpu)
	t.Logf("\n%s", r.String())
	if *soakJSON != "" {
		if err := r.write(*soakJSON); err != nil {
			t.Error(err)
		}
	}
	w.verdict(&r)
}

// recovers waits until everybody was served again after the last fault.
func (w *world) recovers(ctx context.Context) {
	healed := time.Now()
	for _, s := range w.streams {
		for {
			s.mu.Lock()
			at := s.at
			s.mu.Unlock()
			if at.After(healed) {
				break
			}
			if time.Since(healed) > patience {
				w.t.Errorf("%s of %s isn't served any more", s.kind, s.u.name)
				break
			}
			if !pause(ctx, 50*time.Millisecond) {
				return
			}
		}
	}
	for _, j := range w.judges {
		waiting, cancel := context.WithTimeout(ctx, patience)
		if err := j.v.WaitReady(waiting); err != nil {
			w.t.Errorf("%s: %v", j.kind, err)
		}
		cancel()
	}
}

// progress says each minute how it goes.
func (w *world) progress(ctx context.Context) {
	for pause(ctx, time.Minute) {
		r := w.result(0, time.Since(w.began), 0)
		var sum request
		for _, c := range r.Requests {
			sum.Requests, sum.Away, sum.Down = sum.Requests+c.Requests, sum.Away+c.Away, sum.Down+c.Down
		}
		n := 0
		for _, k := range r.Faults {
			n += k
		}
		w.t.Logf("%v: %d requests, %d while the broker was away, %d while the agent was down, %d lost, %d violations; %d faults", r.For, sum.Requests, sum.Away, sum.Down, r.Lost, r.Violations, n)
	}
}

// verdict holds what there was against what had to be, and in a long soak memory too.
func (w *world) verdict(r *result) {
	for name, c := range r.Requests {
		if c.Served == 0 {
			w.t.Errorf("%s: nothing was served", name)
		}
	}
	if time.Since(w.began) < judgedFrom {
		return
	}
	const some, someFDs = 4 << 20, 8
	for name, p := range r.Processes {
		if name == harness {
			continue
		}
		if !p.Own.flat(some) {
			w.t.Errorf("%s: memory isn't flat: %.1f MiB in the second quarter, %.1f in the last", name, p.Own.Second/(1<<20), p.Own.Last/(1<<20))
		}
		if p.FDs.Last > p.FDs.Second+someFDs {
			w.t.Errorf("%s: %.0f descriptors in the second quarter, %.0f in the last", name, p.FDs.Second, p.FDs.Last)
		}
	}
}
