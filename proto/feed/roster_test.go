package feed_test

import (
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/proto/feed"
)

func id(name string) feed.VerifierID { return feed.VerifierID{Identity: "i", Instance: name} }

func state(t *testing.T, c feed.Containment, name string) feed.Receipt {
	t.Helper()
	for _, r := range c.Receipts {
		if r.Verifier.ID.Instance == name {
			return r
		}
	}
	t.Fatalf("no receipt of %s", name)
	return feed.Receipt{}
}

func TestContainment(t *testing.T) {
	var r feed.Roster
	if c := r.Containment(pos(5), at(1), at(1)); !c.Contained {
		t.Error("nobody to confirm, but not contained")
	}
	r.Join(feed.Verifier{ID: id("quick"), Bound: 2 * time.Second}, at(0))
	r.Join(feed.Verifier{ID: id("slow"), Bound: 10 * time.Second}, at(0))
	r.Join(feed.Verifier{ID: id("silent"), Bound: time.Second}, at(0))
	r.Answered(id("slow"), at(4))
	if !r.Acknowledged(id("quick"), pos(5), at(2)) || r.Acknowledged(id("quick"), pos(4), at(3)) || r.Acknowledged(id("nobody"), pos(5), at(3)) {
		t.Error("which receipts are news")
	}
	c := r.Containment(pos(5), at(1), at(3))
	if c.Contained || c.By != at(11) {
		t.Errorf("contained %v by %v, want by the largest bound, 11 s", c.Contained, c.By)
	}
	for name, want := range map[string]struct {
		state feed.ReceiptState
		at    feed.Instant
	}{
		"quick": {feed.Confirmed, at(2)}, "slow": {feed.Pending, at(14)}, "silent": {feed.Closed, at(1)},
	} {
		if got := state(t, c, name); got.State != want.state || got.At != want.at || c.Counts[want.state] != 1 {
			t.Errorf("%s is %s at %v, want %s at %v", name, got.State, got.At, want.state, want.at)
		}
	}
	if c := r.Containment(pos(5), at(1), at(11)-1); c.Contained {
		t.Error("contained before the largest bound")
	}
	if c := r.Containment(pos(5), at(1), at(11)); !c.Contained {
		t.Error("not contained at the largest bound")
	}
	r.Acknowledged(id("slow"), pos(6), at(6))
	r.Acknowledged(id("silent"), pos(5), at(7))
	if c := r.Containment(pos(5), at(1), at(7)); !c.Contained || c.By != at(7) {
		t.Errorf("all have confirmed: contained %v by %v", c.Contained, c.By)
	}
	r.Join(feed.Verifier{ID: id("open"), Bound: time.Second, AcceptsStale: true}, at(8))
	if c := r.Containment(pos(5), at(1), at(1000)); c.Contained || state(t, c, "open").State != feed.Unbounded {
		t.Errorf("contained %v although one accepts when stale", c.Contained)
	}
	r.Acknowledged(id("open"), pos(5), at(1001))
	if c := r.Containment(pos(5), at(1), at(1001)); !c.Contained {
		t.Error("the one that accepts when stale confirmed, but not contained")
	}
}

// A receipt for another history of the same number is none.
func TestForkedReceipt(t *testing.T) {
	var r feed.Roster
	r.Join(feed.Verifier{ID: id("a"), Bound: time.Second}, at(0))
	other := pos(5)
	other.Sum[0]++
	r.Acknowledged(id("a"), other, at(1))
	if c := r.Containment(pos(5), at(1), at(1)); c.Contained || c.Counts[feed.Confirmed] != 0 {
		t.Errorf("contained %v, %v", c.Contained, c.Counts)
	}
}

func TestJoinAgain(t *testing.T) {
	var r feed.Roster
	r.Join(feed.Verifier{ID: id("a"), Bound: 10 * time.Second}, at(0))
	r.Acknowledged(id("a"), pos(5), at(1))
	r.Join(feed.Verifier{ID: id("a"), Bound: 2 * time.Second}, at(3))
	got, ok := r.Get(id("a"))
	if !ok || r.Len() != 1 || got.Acked != pos(5) || got.AckedAt != at(1) || got.Answered != at(3) {
		t.Errorf("%+v", got)
	}
	if got.Bound != 10*time.Second {
		t.Errorf("bound %v: it may still live by an answer under the larger one", got.Bound)
	}
	// The next start confirmed nothing.
	r.Join(feed.Verifier{ID: id("b"), Bound: time.Second}, at(4))
	if c := r.Containment(pos(5), at(1), at(4)); c.Counts[feed.Confirmed] != 1 || c.Contained {
		t.Errorf("%v, contained %v", c.Counts, c.Contained)
	}
	if gone := r.Expire(at(12), 5*time.Second, at(12)); len(gone) != 1 || gone[0] != id("b") {
		t.Errorf("expired %v", gone)
	}
}

// One behind a relay is as young as the relay at most, and may be younger than what
// the relay has told yet.
func TestClosedBehindRelay(t *testing.T) {
	var r feed.Roster
	below := feed.VerifierID{Identity: "i", Instance: "v", Via: "r/s"}
	r.Join(feed.Verifier{ID: id("r"), Bound: time.Second}, at(0))
	r.Join(feed.Verifier{ID: below, Bound: 2 * time.Second}, at(0))
	r.Answered(id("r"), at(5))
	c := r.Containment(pos(5), at(1), at(6))
	if got := state(t, c, "v"); got.State != feed.Pending || got.At != at(7) {
		t.Errorf("%s at %v, want pending at 7 s", got.State, got.At)
	}
	if gone := r.Expire(at(8), 2*time.Second, at(8)); len(gone) != 0 {
		t.Errorf("expired %v", gone)
	}
	if gone := r.Expire(at(9.5), 2*time.Second, at(9)); len(gone) != 2 {
		t.Errorf("expired %v", gone)
	}
}

// One that its relay answers no more closes by its own last answer, not by the relay's.
func TestGone(t *testing.T) {
	var r feed.Roster
	below := feed.VerifierID{Identity: "i", Instance: "v", Via: "r"}
	r.Join(feed.Verifier{ID: id("r"), Bound: time.Second}, at(0))
	r.Join(feed.Verifier{ID: below, Bound: 2 * time.Second}, at(0))
	r.Join(feed.Verifier{ID: below, Bound: 2 * time.Second, Gone: true, Answered: at(1)}, at(2))
	r.Answered(id("r"), at(9))
	if got := state(t, r.Containment(pos(5), at(1), at(9)), "v"); got.State != feed.Closed || got.At != at(3) {
		t.Errorf("%s at %v, want closed since 3 s", got.State, got.At)
	}
	r.Join(feed.Verifier{ID: below, Bound: 2 * time.Second}, at(9))
	if got := state(t, r.Containment(pos(5), at(1), at(9)), "v"); got.State != feed.Pending || got.At != at(11) {
		t.Errorf("%s at %v, want pending till 11 s", got.State, got.At)
	}
}

func TestMakeRoom(t *testing.T) {
	var r feed.Roster
	other := feed.VerifierID{Identity: "other", Instance: "a"}
	for _, v := range []feed.VerifierID{id("a"), id("b"), other} {
		r.Join(feed.Verifier{ID: v, Bound: time.Second}, at(0))
	}
	r.Answered(id("b"), at(1))
	if r.LenOf("i") != 2 || r.LenOf("other") != 1 || r.LenOf("nobody") != 0 {
		t.Errorf("lengths %d, %d, %d", r.LenOf("i"), r.LenOf("other"), r.LenOf("nobody"))
	}
	if got := r.MakeRoom("i", at(1)); len(got) != 0 {
		t.Errorf("dropped %v at their bound", got)
	}
	if got := r.MakeRoom("i", at(1)+1); len(got) != 1 || got[0] != id("a") {
		t.Errorf("dropped %v, want what has closed", got)
	}
	if r.LenOf("i") != 1 || r.Len() != 2 {
		t.Errorf("lengths %d, %d", r.LenOf("i"), r.Len())
	}
}

// One that accepts when stale is as good as open for as long as it knows a key of live
// tokens.
func TestUnboundedStays(t *testing.T) {
	var r feed.Roster
	r.Join(feed.Verifier{ID: id("a"), Bound: time.Second, AcceptsStale: true}, at(0))
	if gone := r.Expire(at(100), 5*time.Second, at(1)); len(gone) != 0 {
		t.Errorf("gone, though it knows the oldest key: %v", gone)
	}
	if gone := r.MakeRoom("i", at(100)); len(gone) != 0 {
		t.Errorf("made room at the expense of an open one: %v", gone)
	}
	if gone := r.Expire(at(100), 5*time.Second, at(1)+1); len(gone) != 1 {
		t.Error("it knows no key, and stays")
	}
}
