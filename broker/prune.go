package broker

import (
	"context"
	"maps"
	"time"

	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/revocation"
)

func (b *Broker) pruneLoop(ctx context.Context) {
	tick := time.NewTicker(pruneEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			if err := b.Prune(ctx); err != nil && ctx.Err() == nil {
				b.cfg.Log.ErrorContext(ctx, "pruning failed", "err", err)
			}
		}
	}
}

// Prune forgets what can match no live token, in order, by elapsed time: a record
// that this process has known for the hard cap and the leeway. After a restart that
// time begins anew; late is always safe.
func (b *Broker) Prune(ctx context.Context) error {
	now := b.cfg.Boot()
	b.issuers.tidy(now)
	b.signed.Sweep(b.cfg.Now())
	b.signer() // so that a key is known to sign though nobody asks for a token
	horizon, moved := b.nextHorizon(now)
	keep := b.keeper(now)
	p := Pruning{Keep: keep, GrantsExpiredBefore: b.cfg.Now().Add(-grantsKept), Observations: b.oldUses()}
	if moved {
		p.Horizon = horizon.Seq
	}
	if _, err := b.cfg.Store.Prune(ctx, p); err != nil {
		return err
	}
	if moved {
		b.forget(horizon, keep)
	}
	if err := b.pruneProposals(ctx); err != nil {
		return err
	}
	b.roster.mu.Lock()
	maps.DeleteFunc(b.roster.contained, func(seq uint64, _ feed.Instant) bool { return seq <= horizon.Seq })
	b.roster.mu.Unlock()
	keys := b.state.oldestKey(now)
	err := b.drop(ctx, func(r *feed.Roster) []feed.VerifierID { return r.Expire(now, forgetAfter, keys) })
	if err != nil {
		return err
	}
	deletions := b.forgetUses(now)
	if len(deletions) == 0 {
		return nil
	}
	return b.cfg.Store.Observe(ctx, deletions...)
}

// nextHorizon is the highest position such that all up to it are past their age.
func (b *Broker) nextHorizon(now feed.Instant) (feed.Position, bool) {
	s := b.state
	s.mu.RLock()
	defer s.mu.RUnlock()
	at := s.log.Horizon()
	for _, e := range s.log.Events() {
		if e.Seq <= at.Seq {
			continue
		}
		if now.Sub(s.known[e.Seq]) <= forgetAfter {
			break
		}
		at = feed.Position{Era: s.log.Head().Era, Seq: e.Seq, Sum: e.Sum}
	}
	return at, at.Seq > s.log.Horizon().Seq
}

// keeper says which records stay below the horizon: the head, the era, standing locks,
// keys that may have signed a live token or weren't checked yet, and revoked keys; and all
// that another broker appended and this one hasn't heard of.
func (b *Broker) keeper(now feed.Instant) func(Record) bool {
	s := b.state
	s.mu.RLock()
	defer s.mu.RUnlock()
	keep, head := map[uint64]bool{}, s.log.Head().Seq
	for n, l := range s.locks {
		// Its end is a time of the wall clock, which may have leapt: not before it also
		// has elapsed.
		if l.standing(b.cfg.Now()) || now.Sub(s.known[n]) < l.End().Sub(l.Time) {
			keep[n] = true
		}
	}
	oldest := s.oldestKept(now)
	for _, seq := range s.keySeq {
		if seq >= oldest {
			keep[seq] = true
		}
	}
	for seq := range s.unchecked {
		keep[seq] = true
	}
	for seq, rec := range s.records {
		// A lift stays as long as its lock's record, or the lock would stand again
		// after a restart.
		if rec.Lift != nil && (keep[rec.Lift.Lock] || revokesKey(s.records[rec.Lift.Lock])) {
			keep[seq] = true
		}
	}
	return func(rec Record) bool {
		return keep[rec.Seq] || rec.Seq >= head || rec.Era != nil || revokesKey(rec)
	}
}

// signGrace is how long a replaced key may still sign what was made for it.
const signGrace = time.Minute

// retired reports whether a key was followed by another so long ago that every token
// it signed has expired. That another one is on record ends nothing by itself: it may be
// the key of a successor that never took over. The caller holds the lock.
func (s *state) retired(seq uint64, now feed.Instant) bool {
	id := s.records[seq].Key.Public.ID
	if at, was := s.replaced[id]; id == s.signing || was && now.Sub(at) <= forgetAfter+signGrace {
		return false
	}
	for _, later := range s.keySeq {
		if later > seq && now.Sub(s.known[later]) > forgetAfter+signGrace {
			return true
		}
	}
	return false
}

// oldestKept is the number of the oldest key that isn't retired. Later ones stay with it,
// retired or not: who knows more keys than are signed for takes those that it lacks for
// the oldest (feed.Screen). The caller holds the lock.
func (s *state) oldestKept(now feed.Instant) uint64 {
	oldest := s.log.Head().Seq
	for _, seq := range s.keySeq {
		if !s.retired(seq, now) {
			oldest = min(oldest, seq)
		}
	}
	return oldest
}

// oldestKey returns when the oldest key was published that may have signed a live token.
func (s *state) oldestKey(now feed.Instant) feed.Instant {
	s.mu.RLock()
	defer s.mu.RUnlock()
	oldest := now
	for _, seq := range s.keySeq {
		if !s.retired(seq, now) {
			oldest = min(oldest, s.known[seq])
		}
	}
	return oldest
}

func revokesKey(rec Record) bool {
	if rec.Revocation == nil {
		return false
	}
	for _, sel := range rec.Revocation.Selectors {
		if sel.Kind() == revocation.KindKey {
			return true
		}
	}
	return false
}

// forget drops from memory what the store dropped.
func (b *Broker) forget(horizon feed.Position, keep func(Record) bool) {
	s := b.state
	s.mu.Lock()
	defer s.mu.Unlock()
	s.log.SetHorizon(horizon)
	s.set.SetHorizon(horizon.Seq)
	s.log.Drop(func(e feed.Event) bool { return e.Seq <= horizon.Seq && !keep(s.records[e.Seq]) })
	s.dated = time.Time{}
	for seq, rec := range s.records {
		if seq > horizon.Seq || keep(rec) {
			s.date(rec)
			continue
		}
		delete(s.records, seq)
		delete(s.known, seq)
		if rec.Key != nil {
			delete(s.keys, rec.Key.Public.ID)
			delete(s.keySeq, rec.Key.Public.ID)
			delete(s.replaced, rec.Key.Public.ID)
		}
		if rec.Revocation != nil {
			delete(s.lifts, seq)
			delete(s.locks, seq)
		}
		delete(s.retried, retryKey(rec.Details.Actor, rec.Details.IdempotencyKey))
		if p := rec.Details.Proposed; p != nil {
			delete(s.retried, retryKey(p.Actor, p.IdempotencyKey))
		}
	}
	s.broadcast()
}
