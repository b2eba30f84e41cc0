package feed_test

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/proto/feed"
)

func pos(seq uint64) feed.Position { return feed.Position{Era: 1, Seq: seq} }

func answer(t *testing.T, f *feed.Freshness, nonce string, head feed.Position, age time.Duration, applied feed.Position) {
	t.Helper()
	if _, err := f.Answered(nonce, head, age, applied); err != nil {
		t.Fatal(err)
	}
}

func TestFreshness(t *testing.T) {
	var f feed.Freshness
	if _, known := f.Age(at(1)); known || f.Fresh(at(1), time.Hour) {
		t.Error("fresh without an answer")
	}
	f.Sent("a", at(1))
	f.Sent("b", at(2))
	// The answer to the later ping comes first, with an age, ahead of its records.
	asOf, err := f.Answered("b", pos(5), 300*time.Millisecond, pos(4))
	if err != nil || asOf != at(1.7) {
		t.Errorf("as of %v, %v", asOf, err)
	}
	if f.Fresh(at(3), time.Hour) {
		t.Error("fresh before the records of the answer's head are applied")
	}
	f.Applied(pos(5))
	if age, known := f.Age(at(10)); !known || age != 8300*time.Millisecond {
		t.Errorf("age %v, %v: the ping was sent at 2 s", age, known)
	}
	if !f.Fresh(at(3.7), 2*time.Second) || f.Fresh(at(3.7)+1, 2*time.Second) {
		t.Error("the bound is not at 2 s")
	}
	answer(t, &f, "a", pos(5), 0, pos(5)) // an older one changes nothing
	if got, _ := f.AsOf(); got != at(1.7) {
		t.Errorf("as of %v", got)
	}
}

func TestAnswersThatProveNothing(t *testing.T) {
	for name, give := range map[string]func(*feed.Freshness) error{
		"to no ping":   func(f *feed.Freshness) error { _, err := f.Answered("x", pos(1), 0, pos(1)); return err },
		"negative age": func(f *feed.Freshness) error { _, err := f.Answered("a", pos(1), -1, pos(1)); return err },
		"absurd age":   func(f *feed.Freshness) error { _, err := f.Answered("a", pos(1), 1<<63-1, pos(1)); return err },
		"of an old stream": func(f *feed.Freshness) error {
			f.Reconnected()
			_, err := f.Answered("a", pos(1), 0, pos(1))
			return err
		},
	} {
		var f feed.Freshness
		f.Sent("a", at(1))
		if err := give(&f); err == nil {
			t.Errorf("%s: no error", name)
		}
		if _, known := f.AsOf(); known {
			t.Errorf("%s: fresh", name)
		}
	}
	var f feed.Freshness
	f.Sent("a", at(1))
	answer(t, &f, "a", pos(1), 0, pos(1))
	if _, err := f.Answered("a", pos(1), 0, pos(1)); !errors.Is(err, feed.ErrUnknownPing) {
		t.Errorf("answered twice: %v", err)
	}
	// An answerer still in the era before knows nothing of this one.
	f = feed.Freshness{}
	f.Sent("a", at(1))
	answer(t, &f, "a", feed.Position{Era: 1, Seq: 99}, 0, feed.Position{Era: 2, Seq: 5})
	if _, known := f.AsOf(); known {
		t.Error("fresh by an answer from an earlier era")
	}
}

// Neither pings without answers nor answers without records grow without bound.
func TestFreshnessIsBounded(t *testing.T) {
	var f feed.Freshness
	for i := range 1000 {
		f.Sent(fmt.Sprint(i), at(float64(i)))
	}
	if _, err := f.Answered("0", pos(1), 0, pos(1)); !errors.Is(err, feed.ErrUnknownPing) {
		t.Errorf("the oldest ping is still there: %v", err)
	}
	answer(t, &f, "999", pos(1), 0, pos(1))
	for i := range 1000 {
		f.Sent("x", at(float64(i)))
		answer(t, &f, "x", pos(uint64(i+2)), 0, pos(1))
	}
	f.Applied(pos(2000))
	if got, _ := f.AsOf(); got != at(999) {
		t.Errorf("as of %v", got)
	}
}

// TestFreshnessOfEra: what was proven of one era says nothing of the next. Whoever
// answered last may be a process that was left running beside the restored one.
func TestFreshnessOfEra(t *testing.T) {
	var f feed.Freshness
	f.Sent("a", at(1))
	f.Sent("b", at(2))
	answer(t, &f, "a", pos(5), 0, pos(5))
	next := feed.Position{Era: 2, Seq: 6}
	f.Applied(next)
	if _, known := f.AsOf(); known || f.Fresh(at(1), time.Hour) {
		t.Error("fresh in a new era without an answer of it")
	}
	answer(t, &f, "b", next, 0, next)
	if asOf, known := f.AsOf(); !known || asOf != at(2) {
		t.Errorf("as of %v, %v", asOf, known)
	}
}
