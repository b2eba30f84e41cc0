package feed

import (
	"cmp"
	"slices"
	"strings"
	"time"
)

// A VerifierID names one run of one verifier. A receipt counts for it and for no
// other: not for the next start of the same verifier, not for another identity.
type VerifierID struct {
	// Identity is what it proved by mTLS; for one behind a relay, the relay's.
	Identity string
	// Instance is random, new with every start.
	Instance string
	// Via is the instances of the relays between, nearest to the broker first,
	// joined by "/"; empty for none.
	Via string
}

// How long an instance may be, in characters.
const (
	MinInstance = 8
	MaxInstance = 64
)

// ValidInstance reports whether s has the form of a verifier's instance, base64url: it
// must not hold what paths, lists and the roster's keys are joined by.
func ValidInstance(s string) bool {
	if len(s) < MinInstance || len(s) > MaxInstance {
		return false
	}
	for i := range len(s) {
		c := s[i]
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '-' && c != '_' {
			return false
		}
	}
	return true
}

// A Verifier is one entry of the roster.
type Verifier struct {
	ID VerifierID
	// Claimed is the SPIFFE ID that it proved to the relay it stands behind, by the word of
	// the relays between; nothing is decided by it.
	Claimed   string
	Audiences []string
	// Bound is its staleness bound, at most the largest that any entry may have.
	Bound time.Duration
	// AcceptsStale: it runs on when stale, so nothing bounds it but expiry.
	AcceptsStale bool
	// Acked is up to where it said to have applied everything.
	Acked   Position
	AckedAt Instant
	// Answered is when one of its pings was last answered: it can be fresh as of no
	// later moment.
	Answered Instant
	// Gone: the relay that it stood behind says that it answers it no more.
	Gone bool
}

// A Roster knows every verifier that may accept tokens. Not safe for concurrent use.
// The zero value is empty.
//
// "All have confirmed" is true of verifiers behind a relay because a relay answers the
// pings of nobody whom the broker hasn't recorded.
type Roster struct {
	verifiers  map[VerifierID]*Verifier
	identities map[string]int // entries of each
}

// Join adds a verifier or takes over its new data; what it acknowledged before under
// the same ID stands, and so does the larger of two bounds, which it may still live
// by. Now counts as an answer: from here on it may become fresh. Of one that is gone
// its Answered counts, which is not after now.
func (r *Roster) Join(v Verifier, now Instant) {
	if r.verifiers == nil {
		r.verifiers, r.identities = map[VerifierID]*Verifier{}, map[string]int{}
	}
	v.AckedAt = now
	old, ok := r.verifiers[v.ID]
	if ok {
		if old.Acked.Compare(v.Acked) >= 0 {
			v.Acked, v.AckedAt = old.Acked, old.AckedAt
		}
		v.Bound = max(v.Bound, old.Bound)
	} else {
		r.identities[v.ID.Identity]++
	}
	if !v.Gone {
		v.Answered = now
	}
	r.verifiers[v.ID] = &v
}

// closes returns from when a verifier refuses everything if it stays silent. One
// behind a relay may have been answered without the broker having heard of it yet, but
// never with younger knowledge than the relay's own last answer; unless it is gone.
func (r *Roster) closes(v *Verifier) Instant {
	answered := v.Answered
	if v.Gone {
		return answered.Add(v.Bound)
	}
	if nearest, _, _ := strings.Cut(v.ID.Via, "/"); nearest != "" {
		if relay, ok := r.verifiers[VerifierID{Identity: v.ID.Identity, Instance: nearest}]; ok {
			answered = max(answered, relay.Answered)
		}
	}
	return answered.Add(v.Bound)
}

// Answered notes that a ping of the verifier is being answered.
func (r *Roster) Answered(id VerifierID, now Instant) {
	if v, ok := r.verifiers[id]; ok {
		v.Answered = max(v.Answered, now)
	}
}

// Acknowledged notes a receipt and reports whether it is news. One above what is
// delivered is the caller's to refuse.
func (r *Roster) Acknowledged(id VerifierID, p Position, now Instant) bool {
	v, ok := r.verifiers[id]
	if !ok || p.Compare(v.Acked) <= 0 {
		return false
	}
	v.Acked, v.AckedAt = p, now
	return true
}

// Get returns a copy of one entry.
func (r *Roster) Get(id VerifierID) (Verifier, bool) {
	v, ok := r.verifiers[id]
	if !ok {
		return Verifier{}, false
	}
	return *v, true
}

// Len returns the number of entries.
func (r *Roster) Len() int { return len(r.verifiers) }

// LenOf returns the number of an identity's entries.
func (r *Roster) LenOf(identity string) int { return r.identities[identity] }

// Expire drops, and returns, those that have been closed for longer than keep. One that
// accepts when stale never closes: it goes once it was last heard of before keys, when
// the oldest signing key that may still have signed a live token was published, which it
// then doesn't know.
func (r *Roster) Expire(now Instant, keep time.Duration, keys Instant) []VerifierID {
	return r.drop(func(v *Verifier) bool {
		closes := r.closes(v)
		return now.Sub(closes) > keep && (!v.AcceptsStale || closes < keys)
	})
}

// MakeRoom drops, and returns, those of an identity that are closed by now.
func (r *Roster) MakeRoom(identity string, now Instant) []VerifierID {
	return r.drop(func(v *Verifier) bool {
		return v.ID.Identity == identity && !v.AcceptsStale && now > r.closes(v)
	})
}

func (r *Roster) drop(which func(*Verifier) bool) []VerifierID {
	var dropped []VerifierID
	for id, v := range r.verifiers {
		if which(v) {
			dropped = append(dropped, id)
		}
	}
	for _, id := range dropped {
		delete(r.verifiers, id)
		if r.identities[id.Identity]--; r.identities[id.Identity] == 0 {
			delete(r.identities, id.Identity)
		}
	}
	return dropped
}

// A ReceiptState is what is known of one verifier and one revocation.
type ReceiptState string

// The states of a receipt.
const (
	// Confirmed: it acknowledged a position at or after the revocation.
	Confirmed ReceiptState = "confirmed"
	// Pending: it has neither confirmed nor passed its bound.
	Pending ReceiptState = "pending"
	// Closed: silent for longer than its bound, so it refuses everything.
	Closed ReceiptState = "closed"
	// Unbounded: it accepts when stale; nothing bounds it but expiry.
	Unbounded ReceiptState = "unbounded"
)

// A Receipt is one verifier's part of a containment.
type Receipt struct {
	Verifier Verifier
	State    ReceiptState
	// At: confirmed then, closed since then, or closing then at the latest; zero
	// for an unbounded one.
	At Instant
}

// A Containment is the sum of the receipts for one revocation.
type Containment struct {
	Receipts []Receipt // in the order of identity, via, instance
	Counts   map[ReceiptState]int
	// Contained: no feed verifier accepts what was revoked.
	Contained bool
	// By is from when that holds, or will hold at the latest; meaningless while a
	// verifier is unbounded.
	By Instant
}

// Containment adds up the receipts for a revocation at a position that was durable at
// committed. It says contained only when every verifier has confirmed, or when
// the largest bound has passed since the commit and none is unbounded: after that, a
// verifier that hasn't applied the record can't be fresh, not even one that the
// roster has never heard of but whose bound is no larger.
func (r *Roster) Containment(at Position, committed, now Instant) Containment {
	c := Containment{Counts: map[ReceiptState]int{}}
	var largest time.Duration
	last := committed
	for _, v := range r.verifiers {
		rec := r.receipt(v, at, now)
		c.Receipts = append(c.Receipts, rec)
		c.Counts[rec.State]++
		largest = max(largest, v.Bound)
		if rec.State == Confirmed {
			last = max(last, rec.At)
		}
	}
	slices.SortFunc(c.Receipts, func(a, b Receipt) int {
		x, y := a.Verifier.ID, b.Verifier.ID
		return cmp.Or(cmp.Compare(x.Identity, y.Identity), cmp.Compare(x.Via, y.Via), cmp.Compare(x.Instance, y.Instance))
	})
	c.By = committed.Add(largest)
	if c.Counts[Confirmed] == len(c.Receipts) {
		c.By = last
	}
	c.Contained = c.Counts[Unbounded] == 0 && now >= c.By
	return c
}

func (r *Roster) receipt(v *Verifier, at Position, now Instant) Receipt {
	switch closes := r.closes(v); {
	case v.Acked.Compare(at) >= 0 && !v.Acked.ForkOf(at):
		return Receipt{*v, Confirmed, v.AckedAt}
	case v.AcceptsStale:
		return Receipt{Verifier: *v, State: Unbounded}
	case now > closes:
		return Receipt{*v, Closed, closes}
	}
	return Receipt{*v, Pending, r.closes(v)}
}
