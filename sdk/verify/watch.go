package verify

import (
	"context"
	"sync"
	"time"

	"github.com/dayflyhq/dayfly/proto/revocation"
)

// watches are the accepted tokens that something long is still done with.
type watches struct {
	mu  sync.Mutex
	all map[*watch]struct{}
}

type watch struct {
	token   *Verified
	subject revocation.Subject
	end     context.CancelCauseFunc
	timer   *time.Timer // at exp, or when the verifier that stopped gets stale
}

// Watch returns a context that ends when the token would no longer be accepted: when it
// is revoked or expires, or when the verifier itself closes. context.Cause is then the
// *Refusal. The caller calls the function when done, as with any context.
func (v *Verifier) Watch(ctx context.Context, t *Verified) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	w := &watch{token: t, subject: revocation.SubjectOf(&t.Claims), end: cancel}
	// Entered before it is judged: a revocation in between finds it there.
	v.watches.mu.Lock()
	if v.watches.all == nil {
		v.watches.all = map[*watch]struct{}{}
	}
	v.watches.all[w] = struct{}{}
	w.timer = time.AfterFunc(v.watchFor(t), func() { v.endWatch(w) })
	v.watches.mu.Unlock()
	if r := v.dead(&t.Claims); r != nil {
		cancel(r)
	}
	return ctx, func() {
		v.watches.mu.Lock()
		delete(v.watches.all, w)
		w.timer.Stop()
		v.watches.mu.Unlock()
		cancel(context.Canceled)
	}
}

// watchFor returns when to look at the token without an event: at its expiry, and where
// nobody follows the feed any more, when the verifier gets stale.
func (v *Verifier) watchFor(t *Verified) time.Duration {
	wait := t.Expires.Add(v.cfg.Leeway).Sub(v.cfg.Now())
	v.mu.RLock()
	defer v.mu.RUnlock()
	if v.state == stopped && v.cfg.OnStale == Refuse {
		wait = min(wait, v.untilStaleLocked())
	}
	return max(wait, 0)
}

// endWatch is called by a watch's timer.
func (v *Verifier) endWatch(w *watch) {
	r := v.expired(&w.token.Claims, v.cfg.Now())
	if r == nil {
		r = v.closed()
	}
	if r != nil {
		w.end(r)
		return
	}
	v.watches.mu.Lock()
	defer v.watches.mu.Unlock()
	if _, still := v.watches.all[w]; still {
		w.timer.Reset(max(v.watchFor(w.token), time.Millisecond)) // the clock was set back
	}
}

// judgeWatches ends those that the newest events, or the verifier's own closing, kill.
func (v *Verifier) judgeWatches() {
	v.watches.mu.Lock()
	defer v.watches.mu.Unlock()
	for w := range v.watches.all {
		if r := v.dead(&w.token.Claims); r != nil {
			w.end(r)
		}
	}
}

// rearmWatches leaves the watches to their timers, when Run ends.
func (v *Verifier) rearmWatches() {
	v.watches.mu.Lock()
	defer v.watches.mu.Unlock()
	for w := range v.watches.all {
		w.timer.Reset(v.watchFor(w.token))
	}
}

// untilStaleLocked returns how long the knowledge stays within its bound.
func (v *Verifier) untilStaleLocked() time.Duration {
	age, known := v.fresh.Age(v.cfg.Boot())
	if !known {
		return 0
	}
	// Fresh at exactly the bound: look just after.
	return max(v.bound-age+time.Millisecond, 0)
}

// closeWhenStale ends the watches at the moment that the verifier gets stale. Timers
// stand still while the machine sleeps, so it also looks once a ping interval.
func (v *Verifier) closeWhenStale(ctx context.Context) {
	if v.cfg.OnStale == Accept {
		return
	}
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		v.mu.RLock()
		wait, changed := min(v.untilStaleLocked(), pingEvery(v.bound)), v.changed
		closed := v.closedLocked() != nil
		v.mu.RUnlock()
		if closed {
			v.judgeWatches()
			timer.Stop()
		} else {
			timer.Reset(max(wait, time.Millisecond))
		}
		select {
		case <-timer.C:
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}
