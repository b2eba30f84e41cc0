package feed

import (
	"errors"
	"fmt"
	"slices"
)

// Errors of applying and appending events.
var (
	// ErrGap: the events don't continue what is known. Ask again from the position.
	ErrGap = errors.New("events do not continue the log")
	// ErrFork: two histories for one number. Nobody can say which is true, so
	// whoever meets this refuses everything and says so loudly.
	ErrFork = errors.New("the log has two histories")
)

// A Log is the shared record that any number of cursors read: consecutive events up
// to the head, with holes only where something was dropped that no live token can be
// matched by. The zero value is an empty log. Not safe for concurrent use; what it
// hands out is never changed afterwards.
type Log struct {
	events  []Event // ascending; replaced, never edited, when something is dropped
	head    Position
	horizon Position
}

// Head returns the newest position.
func (l *Log) Head() Position { return l.head }

// Horizon returns the position below which every token has expired.
func (l *Log) Horizon() Position { return l.horizon }

// Len returns how many events are held.
func (l *Log) Len() int { return len(l.events) }

// Append adds the next event, whose chain must hold. An era event begins its era:
// what came before can matter to no token any more.
func (l *Log) Append(e Event) error {
	if err := l.admit(e); err != nil {
		return err
	}
	if e.Seq != l.head.Seq+1 || e.Era == nil && l.head.Era == 0 {
		return fmt.Errorf("%w: number %d after %s", ErrGap, e.Seq, l.head)
	}
	if e.Chain(l.head.Sum) != e.Sum {
		return fmt.Errorf("%w: the chain breaks at number %d", ErrFork, e.Seq)
	}
	l.push(e)
	return nil
}

// Load adds an event that a store kept, oldest first, across holes that pruning left.
// The record of the era may be in such a hole. LoadPositions ends the loading.
func (l *Log) Load(e Event) error {
	if err := l.admit(e); err != nil {
		return err
	}
	if e.Seq <= l.head.Seq {
		return fmt.Errorf("%w: number %d after %d", ErrMalformed, e.Seq, l.head.Seq)
	}
	if e.Seq == l.head.Seq+1 && e.Chain(l.head.Sum) != e.Sum {
		return fmt.Errorf("%w: the chain breaks at number %d", ErrMalformed, e.Seq)
	}
	l.push(e)
	return nil
}

// LoadPositions sets head and horizon as a store keeps them, once all events are
// loaded: pruning may have dropped the newest event itself, and that of the era.
// A horizon of an earlier era, or before the first pruning, says nothing.
func (l *Log) LoadPositions(head, horizon Position) error {
	last := l.head
	if last.Era == 0 {
		last.Era = head.Era
	}
	if head.Era != last.Era || head.Seq < last.Seq || head.ForkOf(last) {
		return fmt.Errorf("%w: head %s, last event %s", ErrMalformed, head, last)
	}
	l.head = head
	if horizon.Era == head.Era && horizon.Seq > l.horizon.Seq {
		if at, known := l.At(horizon.Seq); horizon.Seq > head.Seq || known && at != horizon {
			return fmt.Errorf("%w: horizon %s, head %s", ErrMalformed, horizon, head)
		}
		l.SetHorizon(horizon)
	}
	if l.horizon.Era != head.Era {
		return fmt.Errorf("%w: no horizon explains what is missing before %s", ErrMalformed, head)
	}
	return nil
}

func (l *Log) admit(e Event) error {
	if err := e.Validate(); err != nil {
		return err
	}
	if e.Era == nil && e.Seq == 1 {
		return fmt.Errorf("%w: the log does not begin with an era", ErrMalformed)
	}
	if e.Era != nil && e.Era.Era <= l.head.Era {
		return fmt.Errorf("%w: era %s after %s", ErrMalformed, e.Era.Era, l.head.Era)
	}
	return nil
}

func (l *Log) push(e Event) {
	era := l.head.Era
	if e.Era != nil {
		era, l.events = e.Era.Era, nil
	}
	l.events = append(l.events, e)
	l.head = Position{era, e.Seq, e.Sum}
	if e.Era != nil {
		l.horizon = l.head
	}
}

// SetHorizon moves the horizon up to a position of the log; never down.
func (l *Log) SetHorizon(p Position) {
	if p.Era == l.head.Era && p.Compare(l.horizon) > 0 && p.Seq <= l.head.Seq {
		l.horizon = p
	}
}

// Drop removes the events for which gone returns true. They must be at or below the
// horizon, or match no live token; set the horizon first, so that no cursor meets a
// hole before the horizon that explains it. The revocation of a key must stay for as
// long as the key's own event, or a new subscriber would trust the key.
func (l *Log) Drop(gone func(Event) bool) {
	l.events = slices.DeleteFunc(slices.Clone(l.events), gone)
}

// At returns the position of a number, where its event is held or it is the head or
// the horizon.
func (l *Log) At(seq uint64) (Position, bool) {
	switch seq {
	case l.head.Seq:
		return l.head, true
	case l.horizon.Seq:
		return l.horizon, true
	}
	i, ok := l.find(seq)
	if !ok {
		return Position{}, false
	}
	return Position{l.head.Era, seq, l.events[i].Sum}, true
}

func (l *Log) find(seq uint64) (int, bool) {
	return slices.BinarySearchFunc(l.events, seq, func(e Event, seq uint64) int {
		switch {
		case e.Seq < seq:
			return -1
		case e.Seq > seq:
			return 1
		}
		return 0
	})
}

// Events returns the held events, oldest first. The caller must not change them.
func (l *Log) Events() []Event { return l.events[:len(l.events):len(l.events)] }

// A Delivery is one step of a cursor: what goes to its subscriber next.
type Delivery struct {
	// Snapshot: the events add up to all that can still matter, in one or more
	// deliveries, after which the subscriber is at Position. Else they are
	// consecutive and continue what it has.
	Snapshot bool
	Events   []Event
	// Horizon is never above what the subscriber has with this delivery. Its era
	// is that of the events.
	Horizon Position
	// Position after this delivery, or after the whole snapshot. A View reads it of
	// snapshots only.
	Position Position
	// Complete: the last delivery of a snapshot.
	Complete bool
}

// A Cursor is a subscriber's place in a Log. It costs a few words, whatever the log
// holds: a slow subscriber gets a snapshot instead of a queue.
type Cursor struct {
	at       Position // delivered up to here
	horizon  Position // the last one delivered
	started  bool
	snapshot *Delivery // what is left of a snapshot under way
}

// NewCursor returns the cursor of a subscriber that has applied everything up to a
// position; the zero position for one that knows nothing.
func NewCursor(known Position) *Cursor {
	return &Cursor{at: known}
}

// Position returns what was delivered last.
func (c *Cursor) Position() Position { return c.at }

// Next returns what to deliver next, at most limit (at least 1) events of it, and
// whether there is anything. The first delivery is there even if nothing is new: it
// tells the horizon.
func (c *Cursor) Next(l *Log, limit int) (Delivery, bool) {
	limit = max(limit, 1)
	if c.snapshot != nil {
		return c.nextOfSnapshot(limit), true
	}
	news, continues := c.continuation(l)
	if !continues {
		c.snapshot = &Delivery{Snapshot: true, Events: l.Events(), Horizon: l.horizon, Position: l.head}
		return c.nextOfSnapshot(limit), true
	}
	if len(news) == 0 && c.started && c.horizon == l.horizon {
		return Delivery{}, false
	}
	if len(news) > limit {
		news = news[:limit]
	}
	if n := len(news); n > 0 {
		c.at = Position{l.head.Era, news[n-1].Seq, news[n-1].Sum}
	}
	c.started, c.horizon = true, l.horizon
	if c.horizon.Seq > c.at.Seq {
		c.horizon = c.at // the rest of it comes with the rest of the events
	}
	return Delivery{Events: news, Horizon: c.horizon, Position: c.at}, true
}

// continuation returns the events after the cursor, and false if there is a hole in
// them or the cursor is not on this log.
func (c *Cursor) continuation(l *Log) ([]Event, bool) {
	if c.at.Era != l.head.Era || c.at.Seq > l.head.Seq {
		return nil, false
	}
	if known, ok := l.At(c.at.Seq); !ok || known.Sum != c.at.Sum {
		return nil, false
	}
	i, found := l.find(c.at.Seq)
	if found {
		i++
	}
	news := l.events[i:len(l.events):len(l.events)]
	if uint64(len(news)) != l.head.Seq-c.at.Seq {
		return nil, false
	}
	return news, true
}

func (c *Cursor) nextOfSnapshot(limit int) Delivery {
	d := *c.snapshot
	if len(d.Events) > limit {
		c.snapshot.Events = d.Events[limit:]
		d.Events = d.Events[:limit]
		return d
	}
	d.Complete = true
	c.snapshot, c.started, c.at, c.horizon = nil, true, d.Position, d.Horizon
	return d
}
