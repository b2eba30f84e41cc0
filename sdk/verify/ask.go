package verify

import (
	"context"
	"sync"
	"time"

	"github.com/dayflyhq/dayfly/proto/feed"
)

const (
	// askWait bounds how long a token is held for an answer of the feed.
	askWait = 2 * time.Second
	// askGap is the least time between two such pings: whoever sends made-up key IDs
	// must not flood the broker through us.
	askGap = 50 * time.Millisecond
	// maxAsking bounds the requests that are held, for the same reason.
	maxAsking = 256
)

// asks are the questions out of turn: a token names what the feed has not told. One ping
// is under way at a time. Whoever comes while it is waits for the next one, because its
// answer may be older than the token.
type asks struct {
	wake chan struct{} // tells the stream's sender to look

	mu      sync.Mutex
	next    *ask
	sent    *ask
	sentAt  feed.Instant
	waiting int
}

type ask struct {
	done     chan struct{}
	nonce    string
	head     feed.Position
	answered bool
}

// ask waits for the answer to a ping that is sent after the call, and for the answer's
// head to be applied. It returns false where that didn't come in time.
func (a *asks) ask(ctx context.Context) bool {
	q := a.join()
	if q == nil {
		return false
	}
	defer a.leave()
	timer := time.NewTimer(askWait)
	defer timer.Stop()
	select {
	case <-q.done:
		return true
	case <-timer.C:
	case <-ctx.Done():
	}
	return false
}

func (a *asks) join() *ask {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.waiting == maxAsking {
		return nil
	}
	a.waiting++
	if a.next == nil {
		a.next = &ask{done: make(chan struct{})}
		a.poke()
	}
	return a.next
}

func (a *asks) leave() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.waiting--
}

func (a *asks) poke() {
	select {
	case a.wake <- struct{}{}:
	default:
	}
}

// due returns whether to send the next question with a nonce now, and else how long to
// wait until looking again; 0 means until poked.
func (a *asks) due(nonce string, now feed.Instant) (send bool, wait time.Duration) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.next == nil || a.sent != nil {
		return false, 0
	}
	if since := now.Sub(a.sentAt); a.sentAt != 0 && since < askGap {
		return false, askGap - since
	}
	a.sent, a.next, a.sentAt = a.next, nil, now
	a.sent.nonce = nonce
	return true, 0
}

// answered notes the head of an answer.
func (a *asks) answered(nonce string, head feed.Position) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.sent != nil && a.sent.nonce == nonce {
		a.sent.head, a.sent.answered = head, true
	}
}

// applied ends the question whose answer has been applied.
func (a *asks) applied(p feed.Position) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.sent == nil || !a.sent.answered || a.sent.head.Compare(p) > 0 {
		return
	}
	close(a.sent.done)
	a.sent = nil
	if a.next != nil {
		a.poke()
	}
}

// reconnected asks again what the last stream took with it.
func (a *asks) reconnected() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.sent != nil {
		if a.next == nil {
			a.next = &ask{done: a.sent.done}
		} else {
			close(a.sent.done) // judged again as things are
		}
		a.sent = nil
	}
	if a.next != nil {
		a.poke()
	}
}
