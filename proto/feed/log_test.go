package feed_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"testing"

	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
)

func TestAppendRefuses(t *testing.T) {
	l := newLog(t, 2)
	gap := next(feed.Position{Seq: 7}, revokes(identity(1)))
	fork := next(l.Head(), revokes(identity(1)))
	fork.Sum[0]++
	for name, c := range map[string]struct {
		e    feed.Event
		want error
	}{
		"a gap":       {gap, feed.ErrGap},
		"a fork":      {fork, feed.ErrFork},
		"the same":    {l.Events()[1], feed.ErrGap},
		"the era":     {next(l.Head(), feed.Event{Era: &feed.Era{Era: 1}}), feed.ErrMalformed},
		"nothing":     {feed.Event{Seq: 4}, feed.ErrMalformed},
		"a first one": {next(feed.Position{}, revokes(identity(1))), feed.ErrMalformed},
	} {
		before := l.Head()
		if err := l.Append(c.e); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
		if l.Head() != before {
			t.Errorf("%s moved the head", name)
		}
	}
}

// TestLoad reads what a store kept, with the era's record, the newest and some between
// pruned.
func TestLoad(t *testing.T) {
	full := newLog(t, 9)
	events := full.Events()
	var l feed.Log
	for _, i := range []int{3, 4, 7} {
		if err := l.Load(events[i]); err != nil {
			t.Fatal(err)
		}
	}
	horizon, _ := full.At(3)
	if err := l.LoadPositions(full.Head(), horizon); err != nil {
		t.Fatal(err)
	}
	if l.Head() != full.Head() || l.Horizon() != horizon {
		t.Errorf("head %s, horizon %s", l.Head(), l.Horizon())
	}
	add(t, &l, revokes(identity(1)))
}

func TestLoadRefuses(t *testing.T) {
	full := newLog(t, 9)
	events, head := full.Events(), full.Head()
	horizon, _ := full.At(3)
	wrong := head
	wrong.Sum[0]++
	low, _ := full.At(5)
	high := feed.Position{Era: 1, Seq: 99}
	other := feed.Position{Era: 2, Seq: 99}
	broken := events[4]
	broken.Sum[0]++
	for name, load := range map[string]func(*feed.Log) error{
		"order":              func(l *feed.Log) error { return errors.Join(l.Load(events[4]), l.Load(events[3])) },
		"a broken chain":     func(l *feed.Log) error { return errors.Join(l.Load(events[3]), l.Load(broken)) },
		"another head":       func(l *feed.Log) error { return errors.Join(l.Load(events[9]), l.LoadPositions(wrong, horizon)) },
		"a head too low":     func(l *feed.Log) error { return errors.Join(l.Load(events[9]), l.LoadPositions(low, horizon)) },
		"a head of an era":   func(l *feed.Log) error { return errors.Join(l.Load(events[0]), l.LoadPositions(other, horizon)) },
		"horizon above head": func(l *feed.Log) error { return errors.Join(l.Load(events[9]), l.LoadPositions(head, high)) },
		"an unexplained hole": func(l *feed.Log) error {
			return errors.Join(l.Load(events[9]), l.LoadPositions(head, feed.Position{}))
		},
	} {
		if err := load(new(feed.Log)); !errors.Is(err, feed.ErrMalformed) {
			t.Errorf("%s: %v, want ErrMalformed", name, err)
		}
	}
}

// drain applies all that a cursor has for a view.
func drain(t testing.TB, c *feed.Cursor, l *feed.Log, v *feed.View, limit int) (deliveries, snapshots int) {
	t.Helper()
	for {
		d, ok := c.Next(l, limit)
		if !ok {
			return deliveries, snapshots
		}
		deliveries++
		if d.Snapshot {
			snapshots++
		}
		if err := v.Apply(d, 0); err != nil {
			t.Fatal(err)
		}
	}
}

func TestCursorContinues(t *testing.T) {
	l := newLog(t, 5)
	var v feed.View
	c := feed.NewCursor(feed.Position{})
	if _, snapshots := drain(t, c, l, &v, 2); snapshots != 3 {
		t.Errorf("%d deliveries of a snapshot of 6 by 2", snapshots)
	}
	for i := range 5 {
		add(t, l, revokes(identity(i)))
	}
	if n, snapshots := drain(t, c, l, &v, 2); n != 3 || snapshots != 0 {
		t.Errorf("5 events by 2: %d deliveries, %d of a snapshot", n, snapshots)
	}
	// A second stream from where the first one ended gets the horizon and no more.
	c = feed.NewCursor(v.Position())
	if d, ok := c.Next(l, 2); !ok || d.Snapshot || len(d.Events) != 0 || d.Horizon != l.Horizon() {
		t.Errorf("first delivery at the head: %+v, %v", d, ok)
	}
	if d, ok := c.Next(l, 0); ok {
		t.Errorf("and then %+v", d)
	}
	add(t, l, revokes(identity(1)))
	if d, ok := c.Next(l, 0); !ok || len(d.Events) != 1 {
		t.Errorf("a limit of 0 gives %+v, %v", d, ok)
	}
}

func TestCursorGetsSnapshot(t *testing.T) {
	l := newLog(t, 9)
	fork, _ := l.At(5)
	fork.Sum[0]++
	dropped, _ := l.At(6)
	known, _ := l.At(4)
	l.Drop(func(e feed.Event) bool { return e.Seq == 6 })
	for name, at := range map[string]feed.Position{
		"nothing known":    {},
		"a hole ahead":     known,
		"its own dropped":  dropped,
		"ahead of the log": {Era: 1, Seq: 99},
		"a later era":      {Era: 2, Seq: 3},
		"an earlier era":   {Era: 0, Seq: 3},
		"a fork":           fork,
	} {
		d, ok := feed.NewCursor(at).Next(l, 100)
		if !ok || !d.Snapshot || !d.Complete || len(d.Events) != l.Len() || d.Position != l.Head() {
			t.Errorf("%s: %+v", name, d)
		}
	}
	// The horizon needs no event of its own.
	seven, _ := l.At(7)
	l.SetHorizon(seven)
	l.Drop(func(e feed.Event) bool { return e.Seq <= 7 })
	if d, _ := feed.NewCursor(seven).Next(l, 100); d.Snapshot || len(d.Events) != 3 {
		t.Errorf("at the horizon: %+v", d)
	}
}

// TestHorizonNeverAboveDelivered: a subscriber that is handed the events in parts
// must not be told of a horizon that it can't place yet.
func TestHorizonNeverAboveDelivered(t *testing.T) {
	l := newLog(t, 1)
	var v feed.View
	c := feed.NewCursor(feed.Position{})
	drain(t, c, l, &v, 10)
	for i := range 8 {
		add(t, l, feed.Event{Key: fakeKey(fmt.Sprint(i))})
	}
	horizon, _ := l.At(9)
	l.SetHorizon(horizon)
	drain(t, c, l, &v, 2) // fails on a horizon above the head
	if v.Log().Horizon() != horizon {
		t.Errorf("horizon %s, want %s", v.Log().Horizon(), horizon)
	}
}

// TestSnapshotUnderChange: what a cursor began to hand out stays as it was, whatever
// happens to the log meanwhile, and the rest follows.
func TestSnapshotUnderChange(t *testing.T) {
	for name, change := range map[string]func(*feed.Log){
		"appends": func(l *feed.Log) { add(t, l, revokes(identity(8))) },
		"a drop":  func(l *feed.Log) { l.Drop(func(e feed.Event) bool { return e.Seq%2 == 0 }) },
		"the horizon": func(l *feed.Log) {
			h := l.Head()
			add(t, l, revokes(identity(8)))
			l.SetHorizon(h)
			l.Drop(func(e feed.Event) bool { return e.Seq <= h.Seq })
		},
		"an era": func(l *feed.Log) {
			add(t, l, feed.Event{Era: &feed.Era{Era: l.Head().Era + 1}})
			add(t, l, revokes(identity(8)))
		},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLog(t, 6)
			var v feed.View
			c := feed.NewCursor(feed.Position{})
			for range 3 {
				d, _ := c.Next(l, 2)
				if err := v.Apply(d, 0); err != nil {
					t.Fatal(err)
				}
				change(l)
			}
			drain(t, c, l, &v, 2)
			if v.Position() != l.Head() || v.Log().Horizon() != l.Horizon() {
				t.Errorf("view at %s, horizon %s; log at %s, horizon %s", v.Position(), v.Log().Horizon(), l.Head(), l.Horizon())
			}
			if got := v.Judge(subject(l.Head(), 1)).Reason; got != revocation.Alive {
				t.Errorf("a token of now is %s", got)
			}
		})
	}
}

// subject is a token of an identity, issued at a position.
func subject(at feed.Position, who int) revocation.Subject {
	return revocation.Subject{Position: at.Token(), Audience: "ledger", Lineage: []token.Member{member(who, 1, fakeKey("k").Public.ID)}}
}

func BenchmarkCursors(b *testing.B) {
	l := newLog(b, 0)
	cursors := make([]*feed.Cursor, 10_000)
	b.ReportAllocs()
	for b.Loop() {
		for i := range cursors {
			cursors[i] = feed.NewCursor(l.Head())
		}
	}
}

// BenchmarkAppend: the cost of a record must not grow with those who follow.
func BenchmarkAppend(b *testing.B) {
	for _, n := range []int{0, 10_000} {
		b.Run(fmt.Sprint(n, " cursors"), func(b *testing.B) {
			l := newLog(b, 0)
			cursors := make([]*feed.Cursor, n)
			for i := range cursors {
				cursors[i] = feed.NewCursor(l.Head())
			}
			b.ReportAllocs()
			for b.Loop() {
				add(b, l, revokes(identity(1)))
			}
		})
	}
}

// BenchmarkDeliver is what one record costs for each of 10,000 that follow.
func BenchmarkDeliver(b *testing.B) {
	l := newLog(b, 100)
	cursors := make([]*feed.Cursor, 10_000)
	for i := range cursors {
		cursors[i] = feed.NewCursor(l.Head())
		cursors[i].Next(l, 10)
	}
	b.ReportAllocs()
	for b.Loop() {
		add(b, l, revokes(identity(rand.IntN(9))))
		for _, c := range cursors {
			if d, ok := c.Next(l, 10); !ok || len(d.Events) != 1 {
				b.Fatal("nothing to deliver")
			}
		}
	}
}

// TestCursorCost: 10,000 subscribers cost 10,000 cursors, whatever the log holds.
func TestCursorCost(t *testing.T) {
	const n = 10_000
	for _, events := range []int{1, 2000} {
		l := newLog(t, events)
		cursors := make([]*feed.Cursor, n)
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		for i := range cursors {
			cursors[i] = feed.NewCursor(l.Head())
			cursors[i].Next(l, 10)
		}
		runtime.ReadMemStats(&after)
		if bytes := (after.TotalAlloc - before.TotalAlloc) / n; bytes > 256 {
			t.Errorf("a cursor on %d events costs %d bytes", events, bytes)
		}
	}
}
