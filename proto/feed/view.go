package feed

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"time"

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
	claims  []Position // heads that answers named before they were applied
}

// pendingSnapshot gathers a snapshot until it is complete: half of one proves nothing.
type pendingSnapshot struct {
	position Position
	events   []Event
}

const (
	// MaxSnapshotEvents bounds what a subscriber gathers for one snapshot.
	MaxSnapshotEvents = 1 << 20
	// maxClaims bounds the heads that are remembered until they are applied.
	maxClaims = 64
	// ageSlack is how far an honest age may be off, since every machine measures its
	// own part of it: 200 ppm of drift for four minutes.
	ageSlack = 50 * time.Millisecond
)

// Position returns up to where the view has applied everything.
func (v *View) Position() Position { return v.log.Head() }

// Log returns the view's own copy of the log, for cursors of those who follow it.
func (v *View) Log() *Log { return &v.log }

// Err returns the fork that closed the view, if there was one. Only a new era ends it.
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
// fresh enough is for Freshness to say. After a fork nobody can say which log is the
// true one, so every token is OffLog.
func (v *View) Judge(sub revocation.Subject) revocation.Verdict {
	switch {
	case v.fork != nil:
		return revocation.Verdict{Reason: revocation.OffLog}
	case v.set == nil:
		return revocation.Verdict{Reason: revocation.Ahead}
	}
	return v.set.Judge(sub)
}

// Reconnected forgets the part of a snapshot that the last stream left unfinished: the
// next one begins anew.
func (v *View) Reconnected() { v.pending = nil }

// Apply takes a delivery. ErrGap means that the sender must begin again from
// Position; ErrFork closes the view; ErrMalformed is the sender's fault.
// What comes from a sender that is behind, or in an earlier era, is compared where
// that is possible, and not applied.
//
// A fork ends with the snapshot of a later era, and with nothing else. Which of the two
// histories was the true one no longer matters then: every token of either is dead, and
// the snapshot is all that there is to know of the new era.
func (v *View) Apply(d Delivery, now Instant) error {
	if v.fork != nil && !(d.Snapshot && d.Position.Era > v.Position().Era) {
		return v.fork
	}
	var err error
	if d.Snapshot {
		err = v.applySnapshot(d, now)
	} else {
		v.pending = nil // left by a stream that ended: only memory
		err = v.applyEvents(d, now)
	}
	return v.seal(cmp.Or(err, v.settleClaims()))
}

// seal remembers a fork.
func (v *View) seal(err error) error {
	if errors.Is(err, ErrFork) {
		v.fork = err
	}
	return err
}

func (v *View) applyEvents(d Delivery, now Instant) error {
	// Events don't name their era; the horizon that comes with them does.
	switch era := d.Horizon.Era; {
	case era == 0:
		return fmt.Errorf("%w: events of no era", ErrMalformed)
	case era < v.Position().Era:
		return nil
	case era > v.Position().Era && (len(d.Events) == 0 || d.Events[0].Era == nil):
		return fmt.Errorf("%w: era %s after %s", ErrGap, era, v.Position())
	}
	for _, e := range d.Events {
		if d.Horizon.Era == v.Position().Era && e.Seq <= v.Position().Seq {
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

// applySnapshot gathers the deliveries of a snapshot. One that doesn't continue what
// is gathered begins a new snapshot: the stream of the old one has ended.
func (v *View) applySnapshot(d Delivery, now Instant) error {
	if v.pending == nil || !v.pending.continues(d) {
		v.pending = &pendingSnapshot{position: d.Position}
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
	snapshot, err := loadSnapshot(events, d)
	if err != nil {
		return err
	}
	if err := v.checkSnapshot(snapshot); err != nil {
		return err
	}
	if snapshot.head.Compare(v.Position()) < 0 {
		return nil // the sender lags: nothing to learn
	}
	return v.adopt(snapshot, now)
}

func (p *pendingSnapshot) continues(d Delivery) bool {
	n := len(p.events)
	return p.position == d.Position && (n == 0 || len(d.Events) == 0 || p.events[n-1].Seq < d.Events[0].Seq)
}

// loadSnapshot reads a snapshot as a store's log is read: it must agree with itself.
func loadSnapshot(events []Event, d Delivery) (*Log, error) {
	l := new(Log)
	for _, e := range events {
		if err := l.Load(e); err != nil {
			return nil, err
		}
	}
	if d.Position.Era == 0 {
		return nil, fmt.Errorf("%w: a snapshot of no era", ErrMalformed)
	}
	if err := l.LoadPositions(d.Position, d.Horizon); err != nil {
		return nil, err
	}
	return l, nil
}

// checkSnapshot looks for a fork between the view and a snapshot of the same era.
func (v *View) checkSnapshot(l *Log) error {
	if l.head.Era != v.Position().Era {
		return nil
	}
	for _, e := range l.events {
		if err := v.checkKnown(Position{l.head.Era, e.Seq, e.Sum}); err != nil {
			return err
		}
		if before, ok := v.log.At(e.Seq - 1); ok && e.Era == nil && e.Chain(before.Sum) != e.Sum {
			return fmt.Errorf("%w: the chain breaks at number %d", ErrFork, e.Seq)
		}
	}
	if err := v.checkKnown(l.horizon); err != nil {
		return err
	}
	return v.checkKnown(l.head)
}

// adopt adds a snapshot that reaches at least as far as the view. It only adds, but
// for retired keys: one whose event is at or below the snapshot's horizon and no
// longer in it signed no live token.
func (v *View) adopt(l *Log, now Instant) error {
	if l.head.Compare(v.Position()) > 0 {
		v.learnt = now
	}
	if l.head.Era != v.Position().Era {
		v.begin(l.head.Era)
		v.log = Log{horizon: Position{Era: l.head.Era}}
		v.fork = nil
	}
	events := slices.DeleteFunc(slices.Clone(v.log.events), func(e Event) bool {
		_, still := l.find(e.Seq)
		return e.Key != nil && e.Seq <= l.horizon.Seq && !still
	})
	for _, e := range l.events {
		_, known := v.log.find(e.Seq)
		if known || e.Seq <= v.log.horizon.Seq && !outlivesHorizon(e) {
			continue
		}
		events = append(events, e)
		v.learn(e)
	}
	slices.SortFunc(events, func(a, b Event) int { return cmp.Compare(a.Seq, b.Seq) })
	v.log = Log{events: events, head: l.head, horizon: v.log.horizon}
	v.set.Know(l.head.Seq, l.head.Sum.Short())
	v.collectKeys()
	return v.applyHorizon(l.horizon)
}

// collectKeys forgets the keys whose events are gone.
func (v *View) collectKeys() {
	v.keys = map[token.KeyID]token.PublicKey{}
	for _, e := range v.log.events {
		if e.Key != nil {
			v.keys[e.Key.Public.ID] = e.Key.Public
		}
	}
}

// begin begins an era: keys and revocations of earlier ones can match nothing.
func (v *View) begin(era token.Era) {
	v.set = revocation.NewSet(era)
	v.keys = map[token.KeyID]token.PublicKey{}
}

// learn takes one event that is new.
func (v *View) learn(e Event) {
	if e.Era != nil && (v.set == nil || v.set.Era() != e.Era.Era) {
		v.begin(e.Era.Era)
	}
	v.set.Know(e.Seq, e.Sum.Short())
	switch {
	case e.Revocation != nil:
		v.set.Add(e.Seq, e.Revocation.Selectors...)
	case e.Key != nil:
		v.keys[e.Key.Public.ID] = e.Key.Public
	case e.Era != nil:
		v.set.SetHorizon(e.Seq) // an era's tokens are issued at its record or later
	}
}

func (v *View) applyHorizon(h Position) error {
	if h.Era != v.Position().Era || h.Seq <= v.log.Horizon().Seq {
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
	v.log.Drop(func(e Event) bool { return e.Seq <= h.Seq && !outlivesHorizon(e) })
	return nil
}

// outlivesHorizon reports whether an event matters to tokens issued after it: keys,
// and their revocations, which are judged whatever the number.
func outlivesHorizon(e Event) bool {
	return e.Key != nil || revokesKey(e)
}

// checkKnown returns ErrFork if the view knows another hash for the same number.
func (v *View) checkKnown(p Position) error {
	if v.set == nil || p.Era != v.set.Era() || p.Seq == 0 {
		return nil
	}
	if at, ok := v.log.At(p.Seq); ok && at.Sum != p.Sum {
		return fmt.Errorf("%w at number %d", ErrFork, p.Seq)
	}
	if sum, ok := v.set.SumAt(p.Seq); ok && sum != p.Sum.Short() {
		return fmt.Errorf("%w at number %d", ErrFork, p.Seq)
	}
	return nil
}

// CheckHead compares the head of an answer that claims to be as of an instant with
// what the view knows. A lower head only means that the answerer is behind, unless it
// claims to be as of later than when the view learnt of a higher one: then records
// were lost. A higher one is remembered, and compared once it is applied.
func (v *View) CheckHead(head Position, asOf Instant) error {
	if v.fork != nil && head.Era <= v.Position().Era {
		return v.fork
	}
	if err := v.checkKnown(head); err != nil {
		return v.seal(err)
	}
	switch c := head.Compare(v.Position()); {
	case c < 0 && asOf > v.learnt.Add(ageSlack):
		return v.seal(fmt.Errorf("%w: %s is told as of later than %s was learnt", ErrFork, head, v.Position()))
	case c > 0 && !slices.Contains(v.claims, head):
		if len(v.claims) == maxClaims {
			v.claims = slices.Delete(v.claims, 0, 1)
		}
		v.claims = append(v.claims, head)
	}
	return nil
}

// settleClaims compares the heads that were named with what has been applied since:
// if the record that an answer stood on was replaced by another, the answer proves
// nothing, and records were lost.
func (v *View) settleClaims() error {
	var err error
	v.claims = slices.DeleteFunc(v.claims, func(p Position) bool {
		if p.Compare(v.Position()) > 0 {
			return false
		}
		err = cmp.Or(err, v.checkKnown(p))
		return true
	})
	return err
}
