package rpc

import (
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func (w *warm) len() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.idle)
}

// TestWarm: there are as many goroutines as were needed at once, which go when nobody has
// needed them for a while.
func TestWarm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var w warm
		for range 10 {
			w.do(func() {})
		}
		if n := w.len(); n != 1 {
			t.Errorf("%d goroutines for one call after the other", n)
		}

		// Nobody waits for another's.
		var all, entered sync.WaitGroup
		release := make(chan struct{})
		entered.Add(5)
		for range 5 {
			all.Go(func() { w.do(func() { entered.Done(); <-release }) })
		}
		entered.Wait()
		close(release)
		all.Wait()
		if n := w.len(); n != 5 {
			t.Errorf("%d goroutines for five calls at once", n)
		}

		for range 4 { // as long as they are needed
			time.Sleep(warmFor / 2)
			w.do(func() {})
		}
		if n := w.len(); n != 1 {
			t.Errorf("%d goroutines where one was enough", n)
		}
		time.Sleep(warmFor)
		synctest.Wait()
		if n := w.len(); n != 0 {
			t.Errorf("%d goroutines that nobody needs", n)
		}
	})
}

// TestWarmRace: what comes in the moment in which goroutines give up runs all the same, once.
func TestWarmRace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var w warm
		for range 200 {
			ran := make(chan struct{}, 3)
			var all sync.WaitGroup
			for range 3 {
				all.Go(func() { w.do(func() { ran <- struct{}{} }) })
			}
			all.Wait()
			if len(ran) != 3 {
				t.Fatalf("%d of 3 ran", len(ran))
			}
			time.Sleep(warmFor)
		}
	})
}
