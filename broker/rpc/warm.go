package rpc

import (
	"slices"
	"sync"
	"time"
)

// warmFor is how long a goroutine that has nothing to do waits for more.
const warmFor = time.Minute

// A warm pool runs functions on goroutines that it keeps because their stacks are deep.
// gRPC begins a goroutine with a small one for each call, and what a call does is deep:
// OPA's evaluator calls itself anew for each expression. Growing the stack for it took
// three times what the decision itself does. gRPC's own workers would be held for ever by
// those who follow the feed. Nobody ever waits for a goroutine: where none is idle there
// is one more. The zero pool is ready; it must not be copied.
type warm struct {
	mu   sync.Mutex
	idle []chan warmJob // the one that ran last is last and runs next: its stack is the deepest
}

type warmJob struct {
	run  func()
	done chan struct{}
}

// do runs f, which must not panic, and waits for it.
func (w *warm) do(f func()) {
	j := warmJob{f, make(chan struct{})}
	if work := w.take(); work != nil {
		work <- j
	} else {
		go w.serve(j)
	}
	<-j.done
}

// take takes the goroutine that was used last out of those that are idle.
func (w *warm) take() chan warmJob {
	w.mu.Lock()
	defer w.mu.Unlock()
	last := len(w.idle) - 1
	if last < 0 {
		return nil
	}
	work := w.idle[last]
	w.idle = slices.Delete(w.idle, last, last+1)
	return work
}

// leave takes a certain one out; false if somebody has taken it.
func (w *warm) leave(work chan warmJob) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	i := slices.Index(w.idle, work)
	if i < 0 {
		return false
	}
	w.idle = slices.Delete(w.idle, i, i+1)
	return true
}

// serve runs one job after the other, until none came for a while.
func (w *warm) serve(j warmJob) {
	work := make(chan warmJob, 1)
	timer := time.NewTimer(warmFor)
	defer timer.Stop()
	for {
		j.run()
		timer.Reset(warmFor)
		w.mu.Lock()
		w.idle = append(w.idle, work)
		w.mu.Unlock()
		close(j.done) // after it is idle, or who waited and comes again would find it busy
		j = warmJob{} // an idle goroutine holds nothing of a call
		select {
		case j = <-work:
		case <-timer.C:
			if w.leave(work) {
				return
			}
			j = <-work
		}
	}
}
