package feed

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/dayflyhq/dayfly/proto/token"
)

// PingsPerBound is how many pings go out in one staleness bound.
const PingsPerBound = 6

// maxPings bounds the pings that may wait for an answer: the oldest are forgotten.
const maxPings = 64

// maxAge bounds the age of an answer, far beyond any use, so that sums can't overflow.
const maxAge = 100 * 365 * 24 * time.Hour

// ErrUnknownPing: an answer to a ping that was never sent, or answered already.
var ErrUnknownPing = errors.New("answer to no ping that waits")

// Freshness says how old a view's knowledge is, by local elapsed time alone. A ping
// sent at t0 and answered with an age proves: everything committed before t0 - age
// is at or below the answer's head. Once the view has applied up to that head, it is
// fresh as of t0 - age, and of no other moment. The zero value is not fresh, and is
// where a verifier begins again when its bound is raised: what was proven while brokers
// counted on the smaller bound must not count under the larger one. Not safe for
// concurrent use.
type Freshness struct {
	sent    []ping
	waiting []proof // answers whose head isn't applied yet
	asOf    Instant
	era     token.Era // that it was proven in
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
		f.sent = slices.Delete(f.sent, 0, 1)
	}
	f.sent = append(f.sent, ping{nonce, now})
}

// Reconnected forgets the pings of the stream that ended.
func (f *Freshness) Reconnected() { f.sent = f.sent[:0] }

// Answered notes the answer to a ping and returns as of when the answer speaks, for
// View.CheckHead. A negative age is an error of the answerer's and counts as no answer.
func (f *Freshness) Answered(nonce string, head Position, age time.Duration, applied Position) (Instant, error) {
	i := slices.IndexFunc(f.sent, func(p ping) bool { return p.nonce == nonce })
	if i < 0 {
		return 0, ErrUnknownPing
	}
	sent := f.sent[i].at
	f.sent = slices.Delete(f.sent, i, i+1)
	if age < 0 || age > maxAge {
		return 0, fmt.Errorf("answer with an age of %s", age)
	}
	if len(f.waiting) == maxPings {
		f.waiting = slices.Delete(f.waiting, 0, 1)
	}
	asOf := sent.Add(-age)
	f.waiting = append(f.waiting, proof{head, asOf})
	f.Applied(applied)
	return asOf, nil
}

// Applied notes that the view has applied everything up to a position. An answer from
// an earlier era proves nothing: who gave it may know nothing of this one. For the same
// reason a new era is not fresh before an answer of its own.
func (f *Freshness) Applied(applied Position) {
	f.known = f.known && f.era == applied.Era
	f.waiting = slices.DeleteFunc(f.waiting, func(p proof) bool {
		if p.head.Compare(applied) > 0 {
			return false
		}
		if p.head.Era == applied.Era && (!f.known || p.asOf > f.asOf) {
			f.asOf, f.era, f.known = p.asOf, applied.Era, true
		}
		return true
	})
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
