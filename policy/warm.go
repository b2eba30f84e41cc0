package policy

import (
	"fmt"
	"slices"
	"sync"
	"time"
)

// warmFor is how long a goroutine that has nothing to evaluate waits for more.
const warmFor = time.Minute

// warm runs evaluations on goroutines that it keeps. OPA's evaluator calls itself anew for
// each expression, so its stack becomes deep: on a new goroutine, as each call of gRPC is
// one, growing that stack costs three times what the evaluation does. Nobody ever waits
// for such a goroutine: where none is idle there is one more. The zero warm has none.
type warm struct {
	mu   sync.Mutex
	idle []chan *job // the one that ran last is last and runs next: its stack is the deepest
}

type job struct {
	run  func()
	done chan struct{}
	err  error
}

// do runs f and returns when it has ended: with an error if it panicked.
func (w *warm) do(f func()) error {
	j := &job{run: f, done: make(chan struct{})}
	if work := w.take(); work != nil {
		work <- j
	} else {
		go w.serve(j)
	}
	<-j.done
	return j.err
}

// take takes the goroutine that was used last out of those that are idle.
func (w *warm) take() chan *job {
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
func (w *warm) leave(work chan *job) bool {
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
func (w *warm) serve(j *job) {
	work := make(chan *job, 1)
	patience := time.NewTimer(warmFor)
	defer patience.Stop()
	for {
		j.err = guarded(j.run)
		patience.Reset(warmFor)
		w.mu.Lock()
		w.idle = append(w.idle, work)
		w.mu.Unlock()
		close(j.done) // after it is idle, or who waited and asks again would find it busy
		select {
		case j = <-work:
		case <-patience.C:
			if w.leave(work) {
				return
			}
			j = <-work
		}
	}
}

// guarded makes a panic an error, which ends one decision and not the process.
func guarded(f func()) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %T", p) // its value might hold a request
		}
	}()
	f()
	return nil
}
