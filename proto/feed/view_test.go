package feed_test

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/revocation"
)

func at(seconds float64) feed.Instant { return feed.Instant(seconds * float64(time.Second)) }

// follow returns a view that has applied all of a log.
func follow(t testing.TB, l *feed.Log) *feed.View {
	t.Helper()
	v := new(feed.View)
	drain(t, feed.NewCursor(feed.Position{}), l, v, 100)
	return v
}

func whole(l *feed.Log) feed.Delivery {
	return feed.Delivery{Snapshot: true, Complete: true, Events: l.Events(), Horizon: l.Horizon(), Position: l.Head()}
}

func reason(v *feed.View, sub revocation.Subject) revocation.Reason { return v.Judge(sub).Reason }

func TestViewJudges(t *testing.T) {
	l := newLog(t, 0)
	key := fakeKey("k")
	add(t, l, feed.Event{Key: key})
	old := l.Head()
	if v := new(feed.View); reason(v, subject(old, 1)) != revocation.Ahead {
		t.Error("an empty view knows a token")
	}
	v := follow(t, l)
	if _, ok := v.Key(key.Public.ID); !ok || len(v.Keys()) != 1 || reason(v, subject(old, 1)) != revocation.Alive {
		t.Error("a token of now is refused")
	}
	c := feed.NewCursor(v.Position())
	add(t, l, revokes(identity(1)))
	r := l.Head()
	drain(t, c, l, v, 10)
	off, ahead := r, r
	off.Sum[0]++
	ahead.Seq++
	for name, c := range map[string]struct {
		sub  revocation.Subject
		want revocation.Reason
	}{
		"before the revocation":           {subject(old, 1), revocation.Revoked},
		"issued with knowledge of it":     {subject(r, 1), revocation.Alive},
		"another identity":                {subject(old, 2), revocation.Alive},
		"another history":                 {subject(off, 2), revocation.OffLog},
		"above the head":                  {subject(ahead, 2), revocation.Ahead},
		"an earlier era":                  {subject(feed.Position{Era: 0, Seq: 2}, 2), revocation.WrongEra},
		"a later era":                     {subject(feed.Position{Era: 2, Seq: 2}, 2), revocation.Ahead},
		"from before the era's own start": {subject(feed.Position{Era: 1}, 2), revocation.BelowHorizon},
	} {
		if got := reason(v, c.sub); got != c.want {
			t.Errorf("%s: %s, want %s", name, got, c.want)
		}
	}
	add(t, l, revokes(revocation.Key(key.Public.ID)))
	drain(t, feed.NewCursor(v.Position()), l, v, 10)
	if got := reason(v, subject(l.Head(), 2)); got != revocation.KeyRevoked || len(v.Keys()) != 0 {
		t.Errorf("a revoked key: %s, %d keys", got, len(v.Keys()))
	}
	// Below the horizon the key's revocation still stands, and goes to followers.
	add(t, l, revokes(identity(3)))
	l.SetHorizon(l.Head())
	drain(t, feed.NewCursor(v.Position()), l, v, 10)
	for name, v := range map[string]*feed.View{"view": v, "follower": follow(t, v.Log())} {
		if got := reason(v, subject(l.Head(), 2)); got != revocation.KeyRevoked {
			t.Errorf("%s, after the horizon: %s", name, got)
		}
		if got := reason(v, subject(r, 2)); got != revocation.KeyRevoked {
			t.Errorf("%s, below the horizon: %s", name, got)
		}
	}
}

// TestSnapshotNeverReplaces: E3. What a sender that is behind doesn't know stays known.
func TestSnapshotNeverReplaces(t *testing.T) {
	l := newLog(t, 3)
	behind := follow(t, l)
	before := l.Head()
	add(t, l, revokes(identity(7)))
	v := follow(t, l)
	c := feed.NewCursor(v.Position())
	if _, snapshots := drain(t, c, behind.Log(), v, 1); snapshots == 0 {
		t.Error("a cursor ahead of the log got no snapshot")
	}
	if got := reason(v, subject(before, 7)); got != revocation.Revoked || v.Position() != l.Head() {
		t.Errorf("after a snapshot from behind: %s at %s", got, v.Position())
	}
	// A later snapshot that lacks a record doesn't take it away either.
	add(t, l, revokes(identity(8)))
	l.Drop(func(e feed.Event) bool { return e.Seq == before.Seq+1 })
	if err := v.Apply(whole(l), 0); err != nil {
		t.Fatal(err)
	}
	if got := reason(v, subject(before, 7)); got != revocation.Revoked || reason(v, subject(before, 8)) != revocation.Revoked {
		t.Errorf("after a snapshot with a hole: %s", got)
	}
	// And the sender that is behind catches up on the same stream.
	drain(t, feed.NewCursor(behind.Position()), l, behind, 10)
	drain(t, c, behind.Log(), v, 1)
	if v.Err() != nil || v.Position() != l.Head() {
		t.Errorf("%v at %s", v.Err(), v.Position())
	}
}

// TestSnapshotCutOff: what is left of a stream that ended must not mix with the next.
func TestSnapshotCutOff(t *testing.T) {
	l := newLog(t, 6)
	other := newLog(t, 3)
	for name, second := range map[string]*feed.Log{"the same log": l, "a shorter one": other} {
		for _, limit := range []int{1, 2, 3, 6} {
			var v feed.View
			c := feed.NewCursor(v.Position())
			for range 2 {
				if d, _ := c.Next(l, 2); v.Apply(d, 0) != nil {
					t.Fatal("half a snapshot is refused")
				}
			}
			if v.Position() != (feed.Position{}) {
				t.Error("half a snapshot moved the view")
			}
			drain(t, feed.NewCursor(v.Position()), second, &v, limit)
			if v.Position() != second.Head() || v.Log().Len() != follow(t, second).Log().Len() {
				t.Errorf("%s by %d: at %s with %d events", name, limit, v.Position(), v.Log().Len())
			}
		}
	}
}

func TestEraChange(t *testing.T) {
	l := newLog(t, 9)
	add(t, l, feed.Event{Key: fakeKey("k")})
	v := follow(t, l)
	old := l.Head()
	backup := newLog(t, 4)
	add(t, backup, feed.Event{Era: &feed.Era{Era: 2}})
	drain(t, feed.NewCursor(v.Position()), backup, v, 1)
	if got := reason(v, subject(old, 1)); got != revocation.WrongEra || len(v.Keys()) != 0 || v.Position() != backup.Head() {
		t.Errorf("old token %s, %d keys, at %s", got, len(v.Keys()), v.Position())
	}
	if got := reason(v, subject(backup.Head(), 1)); got != revocation.Alive {
		t.Errorf("new token is %s", got)
	}
	for range 6 {
		add(t, backup, revokes(identity(5)))
	}
	drain(t, feed.NewCursor(v.Position()), backup, v, 1)
	// A relay still in the old era hands out numbers that mean other things here.
	relay := follow(t, newLog(t, 5))
	c := feed.NewCursor(v.Position())
	drain(t, c, relay.Log(), v, 2)
	for range 4 {
		add(t, relay.Log(), revokes(identity(2)))
	}
	drain(t, c, relay.Log(), v, 2)
	if v.Err() != nil || v.Position() != backup.Head() {
		t.Errorf("after a sender of the old era: %v at %s", v.Err(), v.Position())
	}
	// The era itself as a plain event, for a view that stands right before it.
	w := follow(t, newLog(t, 4))
	events := backup.Events()
	err := w.Apply(feed.Delivery{Events: events, Horizon: backup.Horizon()}, 0)
	if err != nil || w.Position() != backup.Head() {
		t.Errorf("an era as an event: %v at %s", err, w.Position())
	}
	if err := w.Apply(feed.Delivery{Events: events[3:], Horizon: feed.Position{Era: 3, Seq: 1}}, 0); !errors.Is(err, feed.ErrGap) {
		t.Errorf("events of a later era: %v, want ErrGap", err)
	}
}

// TestGapRecovery: after ErrGap a new cursor from Position brings what is missing.
func TestGapRecovery(t *testing.T) {
	l := newLog(t, 2)
	v := follow(t, l)
	for i := range 4 {
		add(t, l, revokes(identity(i)))
	}
	err := v.Apply(feed.Delivery{Events: l.Events()[5:], Horizon: l.Horizon()}, 0)
	if !errors.Is(err, feed.ErrGap) || v.Err() != nil {
		t.Fatalf("%v, fork %v", err, v.Err())
	}
	if _, snapshots := drain(t, feed.NewCursor(v.Position()), l, v, 3); snapshots != 0 || v.Position() != l.Head() {
		t.Errorf("%d snapshots, at %s", snapshots, v.Position())
	}
}

func TestForks(t *testing.T) {
	base := func() *feed.Log { return newLog(t, 3) }
	l := base()
	head := add(t, l, revokes(identity(7)))
	other := base()
	add(t, other, revokes(identity(8)))
	beyond := base()
	add(t, beyond, revokes(identity(8)))
	add(t, beyond, revokes(identity(9)))
	pruned := base()
	add(t, pruned, revokes(identity(8)))
	add(t, pruned, revokes(identity(9)))
	pruned.SetHorizon(other.Head())
	pruned.Drop(func(e feed.Event) bool { return e.Seq <= other.Head().Seq })
	chained := whole(beyond)
	chained.Events = chained.Events[len(chained.Events)-1:]
	chained.Horizon, _ = beyond.At(3)
	lower, _ := l.At(3)
	for name, show := range map[string]func(*feed.View) error{
		"an event": func(v *feed.View) error {
			return v.Apply(feed.Delivery{Events: other.Events()[4:], Horizon: other.Horizon()}, at(2))
		},
		"the next event": func(v *feed.View) error {
			return v.Apply(feed.Delivery{Events: beyond.Events()[5:], Horizon: other.Horizon()}, at(2))
		},
		"a snapshot":               func(v *feed.View) error { return v.Apply(whole(other), at(2)) },
		"a longer snapshot":        func(v *feed.View) error { return v.Apply(whole(beyond), at(2)) },
		"only a horizon":           func(v *feed.View) error { return v.Apply(whole(pruned), at(2)) },
		"only the chain":           func(v *feed.View) error { return v.Apply(chained, at(2)) },
		"a head":                   func(v *feed.View) error { return v.CheckHead(other.Head(), at(0)) },
		"a lower head as of later": func(v *feed.View) error { return v.CheckHead(lower, at(1.1)) },
		"a horizon": func(v *feed.View) error {
			return v.Apply(feed.Delivery{Horizon: other.Head()}, at(2))
		},
	} {
		t.Run(name, func(t *testing.T) {
			v := new(feed.View)
			if err := v.Apply(whole(l), at(1)); err != nil {
				t.Fatal(err)
			}
			if err := show(v); !errors.Is(err, feed.ErrFork) {
				t.Fatalf("%v, want ErrFork", err)
			}
			if got := reason(v, subject(feed.Position{Era: 1, Seq: head.Seq, Sum: head.Sum}, 1)); got != revocation.OffLog || v.Err() == nil {
				t.Errorf("a forked view finds a token %s, Err %v", got, v.Err())
			}
			if err := v.Apply(whole(l), at(3)); !errors.Is(err, feed.ErrFork) {
				t.Errorf("a forked view goes on: %v", err)
			}
			if err := v.CheckHead(l.Head(), at(3)); !errors.Is(err, feed.ErrFork) {
				t.Errorf("a forked view goes on: %v", err)
			}
		})
	}
}

// TestClaimedHead: G4c. An answer names a head; the broker loses it and uses the number
// again. The record that comes isn't the one that the answer stood on.
func TestClaimedHead(t *testing.T) {
	l := newLog(t, 3)
	v := follow(t, l)
	lost := next(l.Head(), revokes(identity(7)))
	if err := v.CheckHead(feed.Position{Era: 1, Seq: lost.Seq, Sum: lost.Sum}, at(1)); err != nil {
		t.Fatal(err)
	}
	add(t, l, revokes(identity(8)))
	d, _ := feed.NewCursor(v.Position()).Next(l, 10)
	if err := v.Apply(d, at(2)); !errors.Is(err, feed.ErrFork) {
		t.Errorf("%v, want ErrFork", err)
	}
}

// TestNoFalseFork: E2. A sender that is behind is only behind.
func TestNoFalseFork(t *testing.T) {
	l := newLog(t, 3)
	lower := l.Head()
	v := new(feed.View)
	add(t, l, revokes(identity(7)))
	if err := v.Apply(whole(l), at(1)); err != nil {
		t.Fatal(err)
	}
	higher := next(l.Head(), revokes(identity(8)))
	for name, c := range map[string]struct {
		head feed.Position
		asOf feed.Instant
	}{
		"behind":                      {lower, at(0.9)},
		"behind, by a drifting clock": {lower, at(1.01)},
		"the same":                    {l.Head(), at(5)},
		"ahead":                       {feed.Position{Era: 1, Seq: higher.Seq, Sum: higher.Sum}, at(5)},
		"ahead, said again":           {feed.Position{Era: 1, Seq: higher.Seq, Sum: higher.Sum}, at(6)},
	} {
		if err := v.CheckHead(c.head, c.asOf); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := v.Apply(feed.Delivery{Events: []feed.Event{higher}, Horizon: l.Horizon()}, at(6)); err != nil {
		t.Error(err)
	}
}

// TestMalformedDeliveries are the sender's fault: no fork, and nothing changes.
func TestMalformedDeliveries(t *testing.T) {
	l := newLog(t, 5)
	add(t, l, feed.Event{Key: fakeKey("k")})
	good := whole(l)
	swapped := good
	swapped.Events = []feed.Event{l.Events()[2], l.Events()[1]}
	noEra, above, inner := good, good, good
	noEra.Position = feed.Position{}
	above.Horizon = feed.Position{Era: 1, Seq: 99}
	inner.Events = append([]feed.Event(nil), l.Events()...)
	inner.Events[2].Private[0]++
	for name, d := range map[string]feed.Delivery{
		"a snapshot out of order":            swapped,
		"a snapshot of no era":               noEra,
		"a snapshot with a horizon beyond":   above,
		"a snapshot that contradicts itself": inner,
		"events of no era":                   {Events: l.Events()},
		"events with a horizon beyond":       {Horizon: feed.Position{Era: 1, Seq: 99}},
	} {
		v := follow(t, newLog(t, 3))
		before := v.Position()
		if err := v.Apply(d, 0); !errors.Is(err, feed.ErrMalformed) || errors.Is(err, feed.ErrFork) {
			t.Errorf("%s: %v, want ErrMalformed", name, err)
		}
		if v.Err() != nil || v.Position() != before {
			t.Errorf("%s: %v at %s", name, v.Err(), v.Position())
		}
		drain(t, feed.NewCursor(v.Position()), l, v, 2)
	}
}

// TestHorizonForgets: D1. Below the horizon everything is refused, and forgotten.
func TestHorizonForgets(t *testing.T) {
	l := newLog(t, 5)
	v := follow(t, l)
	h, _ := l.At(4)
	below, _ := l.At(3)
	l.SetHorizon(h)
	l.Drop(func(e feed.Event) bool { return e.Seq <= h.Seq })
	drain(t, feed.NewCursor(v.Position()), l, v, 10)
	for name, v := range map[string]*feed.View{"old": v, "new": follow(t, l)} {
		if got := reason(v, subject(below, 99)); got != revocation.BelowHorizon {
			t.Errorf("%s view, below: %s", name, got)
		}
		if got := reason(v, subject(h, 99)); got != revocation.Alive {
			t.Errorf("%s view, at the horizon: %s", name, got)
		}
		if v.Log().Len() != l.Len() {
			t.Errorf("%s view holds %d events, the log %d", name, v.Log().Len(), l.Len())
		}
	}
	l.SetHorizon(below)
	if l.Horizon() != h {
		t.Error("the horizon moved down")
	}
}

// TestRetiredKey: a key whose event is no longer in a snapshot that would have it has
// signed no live token.
func TestRetiredKey(t *testing.T) {
	l := newLog(t, 0)
	for i := range 3 {
		add(t, l, feed.Event{Key: fakeKey(fmt.Sprint(i))})
	}
	v := follow(t, l)
	h, _ := l.At(3)
	add(t, l, revokes(identity(1)))
	behind := follow(t, l)
	l.SetHorizon(h)
	l.Drop(func(e feed.Event) bool { return e.Seq == 2 })
	if err := v.Apply(whole(l), 0); err != nil {
		t.Fatal(err)
	}
	for i, want := range []bool{false, true, true} {
		if _, ok := v.Key(fakeKey(fmt.Sprint(i)).Public.ID); ok != want {
			t.Errorf("key %d known: %v, want %v", i, ok, want)
		}
	}
	// One above the horizon stays, whatever a snapshot lacks.
	l.Drop(func(e feed.Event) bool { return e.Seq == 4 })
	if err := v.Apply(whole(l), 0); err != nil {
		t.Fatal(err)
	}
	if _, ok := v.Key(fakeKey("2").Public.ID); !ok {
		t.Error("a snapshot took a key from above its horizon")
	}
	// A sender with an older horizon brings it back, which harms nobody.
	if err := v.Apply(whole(behind.Log()), 0); err != nil {
		t.Fatal(err)
	}
}

// TestForkEndsWithEra: after a fork only the whole snapshot of a later era opens the
// view again, and then it knows nothing of the era before.
func TestForkEndsWithEra(t *testing.T) {
	l := newLog(t, 3)
	old := l.Head()
	v := follow(t, l)
	other := old
	other.Sum[0] ^= 1
	if err := v.CheckHead(other, at(1)); !errors.Is(err, feed.ErrFork) {
		t.Fatalf("%v, want ErrFork", err)
	}
	restored := newLog(t, 3)
	add(t, restored, revokes(identity(7)))
	add(t, restored, feed.Event{Era: &feed.Era{Era: 2}})
	add(t, restored, revokes(identity(8)))

	if err := v.CheckHead(restored.Head(), at(2)); err != nil {
		t.Errorf("an answer of a later era: %v", err)
	}
	events := feed.Delivery{Events: restored.Events(), Horizon: restored.Horizon(), Position: restored.Head()}
	if err := v.Apply(events, at(2)); !errors.Is(err, feed.ErrFork) {
		t.Errorf("events of a later era, no snapshot: %v", err)
	}
	half := whole(restored)
	half.Events, half.Complete = half.Events[:1], false
	if err := v.Apply(half, at(2)); err != nil || v.Err() == nil {
		t.Errorf("half a snapshot: %v, fork %v", err, v.Err())
	}
	v.Reconnected()
	same := whole(restored)
	same.Position.Era, same.Horizon.Era = 1, 1
	if err := v.Apply(same, at(2)); !errors.Is(err, feed.ErrFork) {
		t.Errorf("a snapshot of the same era: %v", err)
	}
	if err := v.Apply(whole(restored), at(3)); err != nil || v.Err() != nil || v.Position() != restored.Head() {
		t.Fatalf("%v, fork %v, at %s", err, v.Err(), v.Position())
	}
	if got := reason(v, subject(old, 1)); got != revocation.WrongEra {
		t.Errorf("a token of the era before is %s", got)
	}
	if got := reason(v, subject(restored.Head(), 1)); got != revocation.Alive {
		t.Errorf("a token of the new era is %s", got)
	}
	lower, _ := restored.At(restored.Head().Seq - 1)
	if err := v.CheckHead(lower, at(4)); !errors.Is(err, feed.ErrFork) {
		t.Errorf("the new era's own fork: %v", err)
	}
}
