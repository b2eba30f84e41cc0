package broker

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// A Lock is a standing refusal to issue. Its number is that of its revocation.
type Lock struct {
	Number    uint64
	Selectors []revocation.Selector // the lockable ones
	Mode      LockMode
	Ends      time.Time // zero: when lifted. A selector of an SVID has an end of its own
	Cut       time.Time
	Reason    string
	Actor     string
	Time      time.Time

	svidExpires map[string]time.Time
}

// standing reports whether any part of the lock still stands at a moment.
func (l *Lock) standing(now time.Time) bool {
	return slices.ContainsFunc(l.Selectors, func(sel revocation.Selector) bool { return l.stands(sel, now) })
}

// stands reports whether the lock on one of its selectors still stands. On an SVID it
// does until that has expired, for ever if it isn't known when that is.
func (l *Lock) stands(sel revocation.Selector, now time.Time) bool {
	if sel.Kind() == revocation.KindSVID {
		exp, known := l.svidExpires[sel.Value()]
		return !known || !now.After(exp)
	}
	return l.Ends.IsZero() || now.Before(l.Ends)
}

// End returns when the whole lock ends by itself; zero: when it is lifted.
func (l *Lock) End() time.Time {
	var last time.Time
	for _, sel := range l.Selectors {
		end := l.Ends
		if sel.Kind() == revocation.KindSVID {
			end = l.svidExpires[sel.Value()]
		}
		if end.IsZero() {
			return time.Time{}
		}
		if end.After(last) {
			last = end
		}
	}
	return last
}

// admits reports whether the lock lets an identity with its SVID have credentials.
func (l *Lock) admits(id spiffeid.ID, svid token.Thumbprint, notBefore time.Time, now time.Time) bool {
	for _, sel := range l.Selectors {
		if !sel.MatchesCaller(id, svid) || !l.stands(sel, now) {
			continue
		}
		// A stolen SVID gets nothing, whatever the mode.
		if sel.Kind() == revocation.KindSVID || l.Mode == LockQuarantine || !notBefore.After(l.Cut) {
			return false
		}
	}
	return true
}

// state is the log as this process has applied it: everything that issuing reads,
// under one lock, so that position, locks and parent come from one snapshot.
type state struct {
	mu     sync.RWMutex
	log    feed.Log
	set    *revocation.Set
	keys   map[token.KeyID]feed.Key
	keySeq map[token.KeyID]uint64
	// signing is the key that this process signs with, and replaced is when it was last
	// seen to sign with each other one.
	signing  token.KeyID
	replaced map[token.KeyID]feed.Instant
	// unchecked are the numbers of key records of this era that wait for checkKeys, and
	// the time as of which each is to be checked.
	unchecked   map[uint64]time.Time
	keysChecked bool
	eraSeq      uint64          // number of the record that began the era
	eras        []feed.Position // where each era began
	records     map[uint64]Record
	known       map[uint64]feed.Instant // when this process first knew each record
	locks       map[uint64]*Lock
	dated       time.Time         // the latest time of a record
	lifts       map[uint64]Record // by the lock's number
	retried     map[string]uint64 // actor and idempotency key -> number

	changed chan struct{} // closed and replaced when anything above changes
}

func newState() *state {
	return &state{
		keys:      map[token.KeyID]feed.Key{},
		keySeq:    map[token.KeyID]uint64{},
		replaced:  map[token.KeyID]feed.Instant{},
		unchecked: map[uint64]time.Time{},
		records:   map[uint64]Record{},
		known:     map[uint64]feed.Instant{},
		locks:     map[uint64]*Lock{},
		lifts:     map[uint64]Record{},
		retried:   map[string]uint64{},
		changed:   make(chan struct{}),
	}
}

func retryKey(actor, key string) string { return actor + "\n" + key }

// apply takes the next record of the store, and with it the horizon that explains a hole
// before it, of which nobody must hear later than of the hole. A key is verified as of the
// time recorded, or, until checkKeys, put off.
func (s *state) apply(rec Record, horizon feed.Position, now feed.Instant, recorded time.Time, verify func(Record, time.Time) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if rec.Seq <= s.log.Head().Seq {
		return nil
	}
	if err := s.log.Load(rec.Event); err != nil {
		return fmt.Errorf("applying record %d: %w", rec.Seq, err)
	}
	if rec.Era != nil {
		s.set = revocation.NewSet(rec.Era.Era)
		s.eraSeq = rec.Seq
		s.eras = append(s.eras, s.log.Head())
		clear(s.keys) // private halves died with their era
		clear(s.keySeq)
		clear(s.replaced)
		clear(s.unchecked)
	}
	if s.set == nil {
		s.set = revocation.NewSet(s.log.Head().Era)
	}
	s.set.Know(rec.Seq, rec.Sum.Short())
	if horizon.Seq > rec.Seq { // all up to here is below it
		horizon = s.log.Head()
	}
	if horizon.Seq > s.log.Horizon().Seq && horizon.Era == s.log.Head().Era {
		s.log.SetHorizon(horizon)
		s.set.SetHorizon(horizon.Seq)
	}
	s.records[rec.Seq] = rec
	s.date(rec)
	s.known[rec.Seq] = now
	if k := rec.Details.IdempotencyKey; k != "" {
		s.retried[retryKey(rec.Details.Actor, k)] = rec.Seq
	}
	if p := rec.Details.Proposed; p != nil && p.IdempotencyKey != "" {
		s.retried[retryKey(p.Actor, p.IdempotencyKey)] = rec.Seq
	}
	switch {
	case rec.Revocation != nil:
		s.set.Add(rec.Seq, rec.Revocation.Selectors...)
		if l := lockOf(rec); l != nil {
			s.locks[rec.Seq] = l
		}
	case rec.Lift != nil:
		delete(s.locks, rec.Lift.Lock)
		s.lifts[rec.Lift.Lock] = rec
	case rec.Key != nil:
		s.unchecked[rec.Seq] = recorded
		if s.keysChecked {
			s.check(rec.Seq, verify)
		}
	}
	s.broadcast()
	return nil
}

// latest returns the latest time of a record. The newest record needn't have it: the
// first one that a clock dates which was set back would hide all those before it.
func (s *state) latest() time.Time {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.dated
}

// date notes the time of a record. The caller holds the lock.
func (s *state) date(rec Record) {
	if rec.Details.Time.After(s.dated) {
		s.dated = rec.Details.Time
	}
}

// checkKeys checks the keys that were put off, oldest first.
func (s *state) checkKeys(verify func(Record, time.Time) error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.keysChecked = true
	for _, seq := range slices.Sorted(maps.Keys(s.unchecked)) {
		s.check(seq, verify)
	}
	s.broadcast()
}

// check publishes one key if it is a broker's. The caller holds the lock.
func (s *state) check(seq uint64, verify func(Record, time.Time) error) {
	rec := s.records[seq]
	if err := verify(rec, s.unchecked[seq]); err == nil {
		s.keys[rec.Key.Public.ID] = *rec.Key
		s.keySeq[rec.Key.Public.ID] = seq
	}
	delete(s.unchecked, seq)
}

// eraOf returns the era of a number: revocations of earlier eras are kept for their
// locks. The caller holds the lock.
func (s *state) eraOf(seq uint64) token.Era {
	for i := len(s.eras) - 1; i >= 0; i-- {
		if s.eras[i].Seq <= seq {
			return s.eras[i].Era
		}
	}
	if len(s.eras) == 0 {
		return s.log.Head().Era // the record of the only era is gone
	}
	return 0
}

// broadcast wakes whoever waits for a change. The caller holds the lock.
func (s *state) broadcast() {
	close(s.changed)
	s.changed = make(chan struct{})
}

func lockOf(rec Record) *Lock {
	if rec.Details.Lock == "" || rec.Details.Lock == LockNone {
		return nil
	}
	l := &Lock{
		Number: rec.Seq, Mode: rec.Details.Lock, Ends: rec.Details.LockEnds, Cut: rec.Details.LockCut,
		Reason: rec.Details.Reason, Actor: rec.Details.Actor, Time: rec.Details.Time,
		svidExpires: rec.Details.SVIDExpires,
	}
	for _, sel := range rec.Revocation.Selectors {
		if sel.Lockable() {
			l.Selectors = append(l.Selectors, sel)
		}
	}
	if len(l.Selectors) == 0 {
		return nil
	}
	return l
}

// await returns once a record has been applied.
func (s *state) await(ctx context.Context, seq uint64) error {
	for {
		s.mu.RLock()
		done, changed := s.log.Head().Seq >= seq, s.changed
		s.mu.RUnlock()
		if done {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// signs notes which key this process signs with now.
func (s *state) signs(id token.KeyID, now feed.Instant) {
	s.mu.RLock()
	same := s.signing == id
	s.mu.RUnlock()
	if same {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.signing != id {
		s.replaced[s.signing] = now
		s.signing = id
	}
}

// key returns a published key for the signature check.
func (s *state) key(id token.KeyID) (token.PublicKey, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	k, ok := s.keys[id]
	return k.Public, ok
}

// publicKeys returns the published keys that are not revoked, by number.
func (s *state) publicKeys() []token.PublicKey {
	s.mu.RLock()
	defer s.mu.RUnlock()
	ids := slices.SortedFunc(maps.Keys(s.keys), func(a, b token.KeyID) int {
		return int(int64(s.keySeq[a]) - int64(s.keySeq[b]))
	})
	var out []token.PublicKey
	for _, id := range ids {
		if !s.set.KeyRevoked(id) {
			out = append(out, s.keys[id].Public)
		}
	}
	return out
}

// locked returns the newest lock that refuses the caller. The caller holds the lock
// of the state.
func (s *state) locked(id spiffeid.ID, svid token.Thumbprint, notBefore, now time.Time) *Lock {
	var refusing *Lock
	for _, l := range s.locks {
		if (refusing == nil || l.Number > refusing.Number) && !l.admits(id, svid, notBefore, now) {
			refusing = l
		}
	}
	return refusing
}
