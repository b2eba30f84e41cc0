package feed

import (
	"fmt"

	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
)

// A View is what a verifier or a relay knows: it applies deliveries, in order, and
// judges tokens. It never un-learns anything but by the horizon or a new era. Not
// safe for concurrent use. The zero value knows nothing and finds every token Ahead.
type View struct {
	set     *revocation.Set
	log     Log // for those who follow this view
	keys    map[token.KeyID]token.PublicKey
	learnt  Instant // when the head was learnt
	fork    error
	pending *pendingSnapshot
}

// pendingSnapshot gathers a snapshot until it is complete: half of one proves nothing.
type pendingSnapshot struct {
	events []Event
}

// MaxSnapshotEvents bounds what a subscriber gathers for one snapshot.
const MaxSnapshotEvents = 1 << 20

// Position returns up to where the view has applied everything.
func (v *View) Position() Position { return v.log.Head() }

// Log returns the view's own copy of the log, for cursors of those who follow it.
func (v *View) Log() *Log { return &v.log }

// Err returns the fork that closed the view for good, if there was one.
func (v *View) Err() error { return v.fork }

// Key returns a published signing key. A revoked one is there too: Judge refuses it.
func (v *View) Key(id token.KeyID) (token.PublicKey, bool) {
	k, ok := v.keys[id]
	return k, ok
}

// Keys returns the published keys that are not revoked, in no order.
func (v *View) Keys() []token.PublicKey {
	out := make([]token.PublicKey, 0, len(v.keys))
	for id, k := range v.keys {
		if !v.set.KeyRevoked(id) {
			out = append(out, k)
		}
	}
	return out
}

// Judge applies the rule of revocation to what is known. Whether what is known is
// fresh enough is for Freshness to say.
func (v *View) Judge(sub revocation.Subject) revocation.Verdict {
	if v.set == nil {
		return revocation.Verdict{Reason: revocation.Ahead}
	}
	return v.set.Judge(sub)
}

// Apply takes a delivery. ErrGap means that the sender must begin again from
// Position; ErrFork closes the view for good; ErrMalformed is the sender's fault.
func (v *View) Apply(d Delivery, now Instant) error {
	if v.fork != nil {
		return v.fork
	}
	var err error
	if d.Snapshot {
		err = v.applySnapshot(d, now)
	} else {
		err = v.applyEvents(d, now)
	}
	return v.seal(err)
}

// seal remembers a fork.
func (v *View) seal(err error) error {
	if err != nil && isFork(err) {
		v.fork = err
	}
	return err
}

func (v *View) applyEvents(d Delivery, now Instant) error {
	for _, e := range d.Events {
		if e.Seq <= v.Position().Seq && e.Era == nil {
			if err := v.checkKnown(Position{v.Position().Era, e.Seq, e.Sum}); err != nil {
				return err
			}
			continue
		}
		if err := v.log.Append(e); err != nil {
			return err
		}
		v.learn(e)
		v.learnt = now
	}
	return v.applyHorizon(d.Horizon)
}

func (v *View) applySnapshot(d Delivery, now Instant) error {
	if v.pending == nil {
		v.pending = &pendingSnapshot{}
	}
	if len(v.pending.events)+len(d.Events) > MaxSnapshotEvents {
		v.pending = nil
		return fmt.Errorf("%w: a snapshot of more than %d events", ErrMalformed, MaxSnapshotEvents)
	}
	v.pending.events = append(v.pending.events, d.Events...)
	if !d.Complete {
		return nil
	}
	events := v.pending.events
	v.pending = nil
	if d.Position.Compare(v.Position()) < 0 {
		return v.compareOlder(events, d.Position) // the sender lags: nothing to learn
	}
	return v.adopt(events, d, now)
}

// compareOlder looks for a fork in the snapshot of a sender that is behind.
func (v *View) compareOlder(events []Event, at Position) error {
	if at.Era != v.Position().Era {
		return nil
	}
	for _, e := range events {
		if err := v.checkKnown(Position{at.Era, e.Seq, e.Sum}); err != nil {
			return err
		}
	}
	return v.checkKnown(at)
}

// adopt adds a snapshot that reaches at least as far as the view.
func (v *View) adopt(events []Event, d Delivery, now Instant) error {
	var fresh Log
	for _, e := range events {
		if fresh.head.Era == 0 {
			// The era's own record may have been dropped long ago.
			fresh.head.Era = d.Position.Era
			if e.Era != nil {
				fresh.head.Era = 0
			}
		}
		if err := fresh.Load(e); err != nil {
			return err
		}
		if err := v.checkKnown(Position{fresh.head.Era, e.Seq, e.Sum}); err != nil {
			return err
		}
	}
	if fresh.head.Era == 0 {
		fresh.head.Era = d.Position.Era
	}
	if fresh.head.Era != d.Position.Era {
		return fmt.Errorf("%w: a snapshot of era %s that ends in %s", ErrMalformed, fresh.head.Era, d.Position.Era)
	}
	if fresh.head.Seq == d.Position.Seq && fresh.head.Sum != d.Position.Sum || fresh.head.Seq > d.Position.Seq {
		return fmt.Errorf("%w: a snapshot's events and position disagree", ErrMalformed)
	}
	if err := v.checkKnown(d.Position); err != nil {
		return err
	}
	if d.Position.Compare(v.Position()) > 0 {
		v.learnt = now
	}
	if v.set == nil || v.set.Era() != d.Position.Era {
		v.reset(d.Position.Era)
	}
	v.merge(fresh.events, d.Position)
	v.set.Know(d.Position.Seq, d.Position.Sum.Short())
	return v.applyHorizon(d.Horizon)
}

// merge puts the snapshot's events beside those the view has: snapshots only add.
func (v *View) merge(events []Event, head Position) {
	have := v.log.events
	if v.log.head.Era != head.Era {
		have = nil
	}
	merged := make([]Event, 0, len(have)+len(events))
	for len(have) > 0 || len(events) > 0 {
		switch {
		case len(have) == 0 || len(events) > 0 && events[0].Seq < have[0].Seq:
			v.learn(events[0])
			merged = append(merged, events[0])
			events = events[1:]
		case len(events) > 0 && events[0].Seq == have[0].Seq:
			events = events[1:]
		default:
			merged = append(merged, have[0])
			have = have[1:]
		}
	}
	horizon := v.log.horizon
	if horizon.Era != head.Era {
		horizon = Position{Era: head.Era}
	}
	v.log = Log{events: merged, head: head, horizon: horizon}
}

// reset begins an era: keys and revocations of earlier ones can match nothing.
func (v *View) reset(era token.Era) {
	v.set = revocation.NewSet(era)
	v.keys = map[token.KeyID]token.PublicKey{}
}

// learn takes one event that is new.
func (v *View) learn(e Event) {
	if e.Era != nil && (v.set == nil || v.set.Era() != e.Era.Era) {
		v.reset(e.Era.Era)
	}
	v.set.Know(e.Seq, e.Sum.Short())
	switch {
	case e.Revocation != nil:
		v.set.Add(e.Seq, e.Revocation.Selectors...)
	case e.Key != nil:
		v.keys[e.Key.Public.ID] = e.Key.Public
	}
}

func (v *View) applyHorizon(h Position) error {
	if v.set == nil || h.Era != v.set.Era() || h.Seq <= v.log.Horizon().Seq {
		return nil
	}
	if h.Seq > v.Position().Seq {
		return fmt.Errorf("%w: horizon %d above head %d", ErrMalformed, h.Seq, v.Position().Seq)
	}
	if err := v.checkKnown(h); err != nil {
		return err
	}
	v.log.SetHorizon(h)
	v.set.SetHorizon(h.Seq)
	v.log.Drop(func(e Event) bool {
		return e.Seq <= h.Seq && e.Key == nil && !revokesKey(e)
	})
	return nil
}

func revokesKey(e Event) bool {
	if e.Revocation == nil {
		return false
	}
	for _, s := range e.Revocation.Selectors {
		if s.Kind() == revocation.KindKey {
			return true
		}
	}
	return false
}

// checkKnown returns ErrFork if the view knows another hash for the same number.
func (v *View) checkKnown(p Position) error {
	if v.set == nil || p.Era != v.set.Era() {
		return nil
	}
	if at, ok := v.log.At(p.Seq); ok && at.Sum != p.Sum {
		return fmt.Errorf("%w at number %d", ErrFork, p.Seq)
	}
	if sum, ok := v.set.SumAt(p.Seq); ok && sum != p.Sum.Short() && p.Seq > 0 {
		return fmt.Errorf("%w at number %d", ErrFork, p.Seq)
	}
	return nil
}

// CheckHead compares the head of an answer that claims to be as of an instant with
// what the view knows. A lower head only means that the answerer is behind, unless it
// claims to be as of later than when the view learnt of a higher one: then records
// were lost.
func (v *View) CheckHead(head Position, asOf Instant) error {
	if v.fork != nil {
		return v.fork
	}
	if v.set == nil {
		return nil
	}
	if err := v.checkKnown(head); err != nil {
		return v.seal(err)
	}
	if head.Compare(v.Position()) < 0 && asOf > v.learnt {
		return v.seal(fmt.Errorf("%w: %s is told as of later than %s was learnt", ErrFork, head, v.Position()))
	}
	return nil
}
