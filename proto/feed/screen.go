package feed

import (
	"fmt"
	"slices"
)

// A Screen stands before a View whose records come through a relay that isn't trusted. It
// holds back what is delivered until a signed head covers it: a record changes what a
// verifier accepts only once the broker's word for it is there. So a relay can withhold,
// which makes the view stale, and can say nothing that the broker didn't. The zero value
// is ready. Not safe for concurrent use.
//
// What is checked: every record above the signed horizon is there and chains to the signed
// head; of what is below only keys, and their revocations, can matter to a live token, and
// they have the signed digest, which says their places too. Nothing else of it is let
// through: a record in a place that is another's would look like a fork.
type Screen struct {
	gathering *pendingSnapshot
	snapshot  *pendingSnapshot // complete and not yet proven
	tail      []Event          // that follow the snapshot, or else the view
	heads     []HeadStatement  // verified, whose records aren't applied yet
}

// Reconnected forgets what the last stream left. What was signed stays signed.
func (s *Screen) Reconnected() { s.gathering, s.snapshot, s.tail = nil, nil, nil }

// Waits reports whether something was delivered that no signed head covers yet: a reason
// to ask at once.
func (s *Screen) Waits() bool { return s.snapshot != nil || len(s.tail) > 0 }

// Deliver takes a delivery and returns those that are proven now, to be applied in order.
// ErrGap: subscribe again. ErrUnproven and ErrMalformed: the relay's fault.
func (s *Screen) Deliver(v *View, d Delivery) ([]Delivery, error) {
	var err error
	if d.Snapshot {
		err = s.gather(d)
	} else {
		err = s.follow(v, d)
	}
	if err != nil {
		return nil, err
	}
	return s.settle(v)
}

// Signed takes a verified statement and returns what it proves, to be applied in order.
func (s *Screen) Signed(v *View, h HeadStatement) ([]Delivery, error) {
	if len(s.heads) == maxClaims {
		s.heads = slices.Delete(s.heads, 0, 1)
	}
	s.heads = append(s.heads, h)
	return s.settle(v)
}

func (s *Screen) gather(d Delivery) error {
	if s.gathering == nil || !s.gathering.continues(d) {
		s.gathering = &pendingSnapshot{position: d.Position}
	}
	if len(s.gathering.events)+len(d.Events) > MaxSnapshotEvents {
		s.gathering = nil
		return fmt.Errorf("%w: a snapshot of more than %d events", ErrMalformed, MaxSnapshotEvents)
	}
	s.gathering.events = append(s.gathering.events, d.Events...)
	if d.Complete {
		s.snapshot, s.gathering, s.tail = s.gathering, nil, nil
	}
	return nil
}

// end is where the records that are held, or the view, end.
func (s *Screen) end(v *View) Position {
	at := v.Position()
	if s.snapshot != nil {
		at = s.snapshot.position
	}
	if n := len(s.tail); n > 0 {
		at.Seq, at.Sum = s.tail[n-1].Seq, s.tail[n-1].Sum
	}
	return at
}

func (s *Screen) follow(v *View, d Delivery) error {
	at := s.end(v)
	if d.Horizon.Era != at.Era {
		return fmt.Errorf("%w: records of era %s after %s", ErrGap, d.Horizon.Era, at)
	}
	for _, e := range d.Events {
		switch {
		case e.Seq <= at.Seq:
			continue // from a relay that is behind
		case e.Seq != at.Seq+1:
			return fmt.Errorf("%w: number %d after %s", ErrGap, e.Seq, at)
		case e.Era != nil || e.Chain(at.Sum) != e.Sum:
			return fmt.Errorf("%w: the chain breaks at number %d", ErrUnproven, e.Seq)
		case len(s.tail) >= MaxSnapshotEvents:
			return fmt.Errorf("%w: more than %d records that no signed head covers", ErrUnproven, MaxSnapshotEvents)
		}
		s.tail = append(s.tail, e)
		at.Seq, at.Sum = e.Seq, e.Sum
	}
	return nil
}

// settle finds the highest signed head that is reached, and what it proves.
func (s *Screen) settle(v *View) ([]Delivery, error) {
	base, end := v.Position(), s.end(v)
	if s.snapshot != nil {
		base = s.snapshot.position
	}
	var best *HeadStatement
	for i := range s.heads {
		h := &s.heads[i]
		if h.Head.Era == base.Era && h.Head.Seq >= base.Seq && h.Head.Seq <= end.Seq && (best == nil || h.Head.Seq >= best.Head.Seq) {
			best = h
		}
	}
	if best == nil {
		return nil, nil
	}
	proven := *best
	out, err := s.prove(v, proven)
	if out == nil || err != nil {
		return nil, err
	}
	s.heads = slices.DeleteFunc(s.heads, func(h HeadStatement) bool { return h.Head.Compare(proven.Head) <= 0 })
	return out, nil
}

// prove returns what a statement proves of what is held: nothing where records are
// missing that a later horizon may explain.
func (s *Screen) prove(v *View, h HeadStatement) ([]Delivery, error) {
	n := 0
	for n < len(s.tail) && s.tail[n].Seq <= h.Head.Seq {
		n++
	}
	covered := s.tail[:n]
	known := v.log.events
	at := v.Position()
	if s.snapshot != nil {
		known, at = s.snapshot.events, s.snapshot.position
	}
	if n > 0 {
		at.Seq, at.Sum = covered[n-1].Seq, covered[n-1].Sum
	}
	if at != h.Head {
		return nil, fmt.Errorf("%w: number %d has another history than its signed head", ErrUnproven, h.Head.Seq)
	}
	d := Delivery{Horizon: h.Horizon, Position: h.Head}
	if s.snapshot == nil && n == 0 {
		return []Delivery{d}, nil // perhaps a newer horizon
	}
	all := slices.Concat(known, covered)
	if s.snapshot != nil {
		whole, err := chains(all, h)
		if !whole || err != nil {
			return nil, err
		}
	}
	set, ok := matchKeySet(all, h.KeySet)
	if !ok {
		return nil, fmt.Errorf("%w: the keys up to number %d are not those that the broker signed for", ErrUnproven, h.Head.Seq)
	}
	d.Events = slices.Clone(covered)
	if s.snapshot != nil {
		d.Snapshot, d.Complete = true, true
		d.Events = slices.DeleteFunc(all, func(e Event) bool {
			return e.Seq <= h.Horizon.Seq && !slices.ContainsFunc(set, func(in Event) bool { return in.Seq == e.Seq })
		})
	}
	s.snapshot, s.tail = nil, slices.Clone(s.tail[n:])
	return []Delivery{d}, nil
}

// chains checks the events above a statement's horizon: that each is there, and follows
// from the one before up to the head.
func chains(events []Event, h HeadStatement) (whole bool, err error) {
	at := h.Horizon
	for _, e := range events {
		if e.Seq <= h.Horizon.Seq {
			continue
		}
		if e.Seq != at.Seq+1 {
			return false, nil // the relay has pruned by a later horizon, or withholds
		}
		if e.Chain(at.Sum) != e.Sum {
			return false, fmt.Errorf("%w: the chain breaks at number %d", ErrUnproven, e.Seq)
		}
		at.Seq, at.Sum = e.Seq, e.Sum
	}
	switch {
	case at.Seq != h.Head.Seq:
		return false, nil
	case at != h.Head:
		return false, fmt.Errorf("%w: number %d has another history than its signed head", ErrUnproven, at.Seq)
	}
	return true, nil
}
