package outgoing

import (
	"errors"
	"io"
	"sync"
)

// maxReplay is how much of a body is kept, so that a request can be made once more.
const maxReplay = 64 << 10

// A replay is a body that can be read twice, while what was read is small: the second time
// begins with what was kept and goes on with the rest, so a stream needs no end for it. It
// has a goroutine of its own for the source, so that Close ends a Read that waits for the
// caller: the transport waits for that before it lets go of an answer.
type replay struct {
	src     io.Reader
	buffers *pool

	mu      sync.Mutex
	wake    sync.Cond // at every change
	pumping bool
	next    []byte // read from the source, and by no attempt yet
	err     error  // that the source ended with
	kept    []byte // what attempts have read of it
	lost    bool   // they have read more than is kept, or nothing is kept any more
	current *attempt
	over    bool
}

// An attempt is one reading of a replay.
type attempt struct {
	of     *replay
	pos    int // in what is kept
	closed bool
}

func newReplay(src io.Reader, buffers *pool) *replay {
	r := &replay{src: src, buffers: buffers}
	r.wake.L = &r.mu
	r.current = &attempt{of: r}
	return r
}

// again begins another attempt, and reports false if the body can't be had again.
func (r *replay) again() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.lost {
		return false
	}
	r.current = &attempt{of: r}
	r.wake.Broadcast()
	return true
}

// settle says that there will be no other attempt: nothing more is kept.
func (r *replay) settle() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.current.pos == len(r.kept) {
		r.kept, r.lost = nil, true
	}
}

// done reports whether the whole body has come in.
func (r *replay) done() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.err == io.EOF
}

// end says that nobody reads any more.
func (r *replay) end() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.over, r.next = true, nil
	r.wake.Broadcast()
}

// pump reads the source, no more than a buffer ahead.
func (r *replay) pump() {
	buf := r.buffers.Get()
	defer r.buffers.Put(buf)
	for {
		n, err := r.src.Read(buf)
		r.mu.Lock()
		if !r.over {
			r.next, r.err = buf[:n], err
		}
		r.wake.Broadcast()
		for len(r.next) > 0 {
			r.wake.Wait()
		}
		over := r.over
		r.mu.Unlock()
		if over || err != nil {
			return
		}
	}
}

var errClosed = errors.New("the body is read by nobody any more")

func (a *attempt) Read(p []byte) (int, error) {
	r := a.of
	r.mu.Lock()
	defer r.mu.Unlock()
	for {
		switch {
		case a.closed, a != r.current, r.over:
			return 0, errClosed
		case a.pos < len(r.kept):
			n := copy(p, r.kept[a.pos:])
			a.pos += n
			return n, nil
		case len(r.next) > 0:
			return a.take(p), nil
		case r.err != nil:
			return 0, r.err
		case !r.pumping:
			r.pumping = true
			go r.pump()
		}
		r.wake.Wait()
	}
}

// take reads what no attempt has read yet, and keeps it if it may.
func (a *attempt) take(p []byte) int {
	r := a.of
	n := copy(p, r.next)
	if !r.lost && len(r.kept)+n <= maxReplay {
		r.kept = append(r.kept, r.next[:n]...)
		a.pos += n
	} else {
		r.kept, r.lost, a.pos = nil, true, 0
	}
	r.next = r.next[n:]
	if len(r.next) == 0 {
		r.wake.Broadcast()
	}
	return n
}

// Close leaves the source alone: it belongs to the server.
func (a *attempt) Close() error {
	a.of.mu.Lock()
	defer a.of.mu.Unlock()
	a.closed = true
	a.of.wake.Broadcast()
	return nil
}
