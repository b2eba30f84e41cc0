package outgoing

import (
	"errors"
	"io"
	"sync"
)

// maxReplay is how much of a body is kept, so that a request can be made once more.
const maxReplay = 64 << 10

// A replay is a body that can be read twice, while what was read is small: the second time
// begins with what was kept and goes on with the rest, so a stream needs no end for it.
type replay struct {
	src io.Reader

	reading chan struct{} // has an element while somebody reads from src

	mu      sync.Mutex
	kept    []byte
	lost    bool // more was read than is kept
	current *attempt
	err     error // that src ended with
}

// An attempt is one reading of a replay.
type attempt struct {
	of  *replay
	pos int // in what is kept; what is beyond that comes from src
}

func newReplay(src io.Reader) *replay {
	r := &replay{src: src, reading: make(chan struct{}, 1)}
	r.current = &attempt{of: r}
	return r
}

// again begins another attempt, and reports false if the body can't be had again. What the
// attempt before is just reading goes to the new one.
func (r *replay) again() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.lost {
		return false
	}
	r.current = &attempt{of: r}
	return true
}

var errReplaced = errors.New("the body is read by another attempt now")

func (a *attempt) Read(p []byte) (int, error) {
	if n, err, ok := a.fromKept(p); ok {
		return n, err
	}
	r := a.of
	r.reading <- struct{}{}
	defer func() { <-r.reading }()
	if n, err, ok := a.fromKept(p); ok { // what another attempt was reading
		return n, err
	}
	n, err := r.src.Read(p)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.err = err
	if a != r.current || !r.lost && len(r.kept)+n <= maxReplay {
		r.kept = append(r.kept, p[:n]...) // also beyond the bound, once, for the attempt that replaced this one
	} else {
		r.kept, r.lost = nil, true
	}
	a.pos += n
	return n, err
}

// Close leaves the source alone: it belongs to the server.
func (a *attempt) Close() error { return nil }

// fromKept reads what is kept, and reports false where there is nothing but the source.
func (a *attempt) fromKept(p []byte) (int, error, bool) {
	r := a.of
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case a != r.current:
		return 0, errReplaced, true
	case a.pos < len(r.kept):
		n := copy(p, r.kept[a.pos:])
		a.pos += n
		return n, nil, true
	case r.err != nil:
		return 0, r.err, true
	}
	return 0, nil, len(p) == 0
}

// settle says that there will be no other attempt: nothing more is kept.
func (r *replay) settle() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.current.pos == len(r.kept) {
		r.kept, r.lost = nil, true
	}
}
