package policy

import (
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// TestWarm: evaluations share as few goroutines as there were at once, which go when
// nobody has needed them for a while.
func TestWarm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var w warm
		idle := func() int {
			synctest.Wait()
			w.mu.Lock()
			defer w.mu.Unlock()
			return len(w.idle)
		}
		for range 10 {
			if err := w.do(func() {}); err != nil {
				t.Fatal(err)
			}
		}
		if n := idle(); n != 1 {
			t.Errorf("%d goroutines for one call after the other", n)
		}

		// Nobody waits for another's.
		var all, entered sync.WaitGroup
		release := make(chan struct{})
		entered.Add(5)
		for range 5 {
			all.Go(func() { _ = w.do(func() { entered.Done(); <-release }) })
		}
		entered.Wait()
		close(release)
		all.Wait()
		if n := idle(); n != 5 {
			t.Errorf("%d goroutines for five calls at once", n)
		}

		for range 4 { // as long as they are needed
			time.Sleep(warmFor / 2)
			_ = w.do(func() {})
		}
		if n := idle(); n != 1 {
			t.Errorf("%d goroutines where one was enough", n)
		}
		time.Sleep(warmFor)
		if n := idle(); n != 0 {
			t.Errorf("%d goroutines that nobody needs", n)
		}
	})
}

// TestWarmPanic: a panic is the error of one call, and the goroutine goes on.
func TestWarmPanic(t *testing.T) {
	var w warm
	if err := w.do(func() { panic("secret") }); err == nil || err.Error() != "panic: string" {
		t.Errorf("a panic is %v", err)
	}
	ran := false
	if err := w.do(func() { ran = true }); err != nil || !ran || len(w.idle) != 1 {
		t.Errorf("after a panic: %v, ran %v, %d idle", err, ran, len(w.idle))
	}
}

// TestWarmRace: calls that come as goroutines give up are run all the same, once.
func TestWarmRace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var w warm
		for range 200 {
			var all sync.WaitGroup
			n := make(chan struct{}, 3)
			for range 3 {
				all.Go(func() { _ = w.do(func() { n <- struct{}{} }) })
			}
			all.Wait()
			if len(n) != 3 {
				t.Fatalf("%d of 3 ran", len(n))
			}
			time.Sleep(warmFor) // they give up at the moment at which the next come
		}
	})
}
