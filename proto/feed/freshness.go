package feed

import (
	"errors"
	"time"
)

// PingsPerBound is how many pings go out in one staleness bound.
const PingsPerBound = 6

// maxPings bounds the pings that may wait for an answer: the oldest are forgotten.
const maxPings = 64

// ErrUnknownPing: an answer to a ping that was never sent, or answered already.
var ErrUnknownPing = errors.New("answer to no ping that waits")

// Freshness says how old a view's knowledge is, by local elapsed time alone. A ping
// sent at t0 and answered with an age proves: everything committed before t0 - age
// is at or below the answer's head. Once the view has applied up to that head, it is
// fresh as of t0 - age, and of no other moment. The zero value is not fresh. Not safe
// for concurrent use.
type Freshness struct {
	sent    []ping
	waiting []proof // answers whose head isn't applied yet
	asOf    Instant
	known   bool
}

type ping struct {
	nonce string
	at    Instant
}

type proof struct {
	head Position
	asOf Instant
}

// Sent notes a ping.
func (f *Freshness) Sent(nonce string, now Instant) {
	if len(f.sent) == maxPings {
		f.sent = append(f.sent[:0], f.sent[1:]...)
	}
	f.sent = append(f.sent, ping{nonce, now})
}

// Reconnected forgets the pings of the stream that ended.
func (f *Freshness) Reconnected() { f.sent = f.sent[:0] }

// Answered notes the answer to a ping and returns as of when the answer speaks. A
// negative age is an error of the answerer's and counts as no answer.
func (f *Freshness) Answered(nonce string, head Position, age time.Duration, applied Position) (Instant, error) {
	for i, p := range f.sent {
		if p.nonce != nonce {
			continue
		}
		f.sent = append(f.sent[:i], f.sent[i+1:]...)
		if age < 0 {
			return 0, errors.New("answer with a negative age")
		}
		asOf := p.at.Add(-age)
		if age > time.Duration(1<<62) {
			return 0, errors.New("answer with an absurd age")
		}
		if len(f.waiting) == maxPings {
			f.waiting = append(f.waiting[:0], f.waiting[1:]...)
		}
		f.waiting = append(f.waiting, proof{head, asOf})
		f.Applied(applied)
		return asOf, nil
	}
	return 0, ErrUnknownPing
}

// Applied notes that the view has applied everything up to a position.
func (f *Freshness) Applied(applied Position) {
	kept := f.waiting[:0]
	for _, p := range f.waiting {
		if p.head.Compare(applied) > 0 {
			kept = append(kept, p)
			continue
		}
		if !f.known || p.asOf > f.asOf {
			f.asOf, f.known = p.asOf, true
		}
	}
	f.waiting = kept
}

// AsOf returns as of when the view is complete, and false before the first proof.
func (f *Freshness) AsOf() (Instant, bool) { return f.asOf, f.known }

// Age returns how old the knowledge is, and false before the first proof.
func (f *Freshness) Age(now Instant) (time.Duration, bool) {
	return max(0, now.Sub(f.asOf)), f.known
}

// Fresh reports whether the knowledge is no older than a bound.
func (f *Freshness) Fresh(now Instant, bound time.Duration) bool {
	age, known := f.Age(now)
	return known && age <= bound
}
