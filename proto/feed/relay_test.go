package feed_test

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/proto/feed"
)

// relayed is a relay with its log above.
type relayed struct {
	*testing.T
	feed.Relay
	above  feed.Log
	cursor *feed.Cursor
	n      int
}

func newRelay(t *testing.T) *relayed {
	r := &relayed{T: t, cursor: feed.NewCursor(feed.Position{})}
	r.append(feed.Event{Era: &feed.Era{Era: 7}})
	r.Connected(true)
	r.deliver(0)
	return r
}

func (r *relayed) append(e feed.Event) {
	r.Helper()
	e.Seq = r.above.Head().Seq + 1
	e.Sum = e.Chain(r.above.Head().Sum)
	if err := r.above.Append(e); err != nil {
		r.Fatal(err)
	}
}

func (r *relayed) deliver(now float64) {
	r.Helper()
	for d, ok := r.cursor.Next(&r.above, 10); ok; d, ok = r.cursor.Next(&r.above, 10) {
		if err := r.Deliver(d, at(now)); err != nil {
			r.Fatal(err)
		}
	}
}

// ping reports, asks, and gets the head of now as the answer.
func (r *relayed) ping(now float64) []feed.Relayed {
	r.Helper()
	reported := r.Report(at(now), true)
	r.n++
	r.Ping(fmt.Sprint(r.n), at(now))
	if err := r.Answered(fmt.Sprint(r.n), r.above.Head(), 0); err != nil {
		r.Fatal(err)
	}
	return reported
}

func (r *relayed) follow(instance string, bound time.Duration) *feed.Downstream {
	r.Helper()
	d, _, err := r.Follow(feed.Relayed{Path: []string{instance}, Bound: bound}, false, at(0))
	if err != nil {
		r.Fatal(err)
	}
	return d
}

// answered is what a ping gets now, nil for nothing.
func answered(d *feed.Downstream, now float64) *feed.Answer {
	d.Ping("nonce")
	for m, ok := d.Next(at(now), 10); ok; m, ok = d.Next(at(now), 10) {
		if m.Answer != nil {
			return m.Answer
		}
	}
	return nil
}

// Nobody is answered whom the broker didn't have on its roster when it was asked, nor
// before the relay knows what the broker knew then: what was contained without one must
// be known to it from its first answer on.
func TestAnsweredFromTheRosterOn(t *testing.T) {
	r := newRelay(t)
	r.ping(1)
	d := r.follow("verifier-1", time.Second)
	if _, ok := d.Next(at(1), 10); ok {
		t.Error("welcomed before it was reported")
	}
	r.append(feed.Event{Lift: &feed.Lift{Lock: 1}}) // the broker has it, the relay doesn't yet
	if got := r.ping(2); len(got) != 1 || got[0].Path[0] != "verifier-1" {
		t.Errorf("reported %v", got)
	}
	if a := answered(d, 2); a != nil {
		t.Errorf("answered with %+v from before it was on the roster", a)
	}
	r.deliver(3)
	a := answered(d, 4)
	if a == nil || a.Head != r.above.Head() || a.Age != 2*time.Second {
		t.Errorf("answered %+v, want the head with an age of 2 s", a)
	}

	// The same terms go on, larger ones wait.
	again, replaced, err := r.Follow(feed.Relayed{Path: []string{"verifier-1"}, Bound: time.Second}, false, at(4))
	if err != nil || replaced != d {
		t.Fatalf("replaced %v, %v", replaced, err)
	}
	if answered(again, 4) == nil {
		t.Error("the same terms had to wait")
	}
	raised, _, err := r.Follow(feed.Relayed{Path: []string{"verifier-1"}, Bound: time.Minute}, false, at(4))
	if err != nil {
		t.Fatal(err)
	}
	if answered(raised, 4) != nil {
		t.Error("a raised bound held before it was recorded")
	}
	r.ping(5)
	if answered(raised, 5) == nil {
		t.Error("a raised bound was never recorded")
	}
	// A stream above that may not relay confirms nothing.
	other := r.follow("verifier-2", time.Second)
	r.Connected(false)
	if got := r.ping(6); got != nil {
		t.Errorf("reported %v", got)
	}
	if answered(other, 6) != nil {
		t.Error("answered without a report")
	}
}

// One that left is said to be gone until the broker has answered, and then until it has
// closed.
func TestLeave(t *testing.T) {
	r := newRelay(t)
	d := r.follow("verifier-1", 2*time.Second)
	r.ping(1)
	answered(d, 1)
	d.Leave()
	if r.Due(time.Minute, at(1)) != 0 {
		t.Error("nothing is to be said of one that left")
	}
	for _, again := range []bool{false, true} {
		r.Connected(true)
		got := r.Report(at(9), false)
		if len(got) != 1 || !got[0].Gone || got[0].LastAnswerAge != 8*time.Second {
			t.Errorf("again %v: reported %+v", again, got)
		}
	}
	r.ping(10)
	r.Report(at(10), true)
	if r.Len() != 0 {
		t.Error("it was never forgotten")
	}
}

// What a relay below says of its own goes up under longer paths, and its own pings wait
// for whoever is new.
func TestRelayBelowRelay(t *testing.T) {
	r := newRelay(t)
	below, _, err := r.Follow(feed.Relayed{Path: []string{"relay-1"}, Bound: time.Second}, true, at(0))
	if err != nil {
		t.Fatal(err)
	}
	r.ping(1)
	if answered(below, 1) == nil {
		t.Fatal("the relay below was not answered")
	}
	inner := feed.Relayed{Path: []string{"verifier-1"}, Bound: 500 * time.Millisecond}
	if err := below.Report([]feed.Relayed{inner}, at(1)); err != nil {
		t.Fatal(err)
	}
	if answered(below, 1) != nil {
		t.Error("answered before its new verifier was on the roster")
	}
	got := r.ping(2)
	if len(got) != 2 || len(got[1].Path) != 2 || got[1].Path[0] != "relay-1" || got[1].Path[1] != "verifier-1" {
		t.Errorf("reported %+v", got)
	}
	if answered(below, 2) == nil {
		t.Error("not answered after its verifier was reported")
	}
	if b := r.Bound(time.Minute); b != 500*time.Millisecond {
		t.Errorf("the smallest bound below is %s", b)
	}
	if d := r.Refused([]string{"relay-1", "verifier-1"}); d != below {
		t.Error("a refusal doesn't find the relay that it is for")
	}

	var long []string
	for i := range feed.MaxPath {
		long = append(long, fmt.Sprint("instance-", i))
	}
	forked := inner
	forked.Acked = r.above.Head()
	forked.Acked.Sum[0]++
	for name, bad := range map[string]feed.Relayed{"no path": {}, "a long path": {Path: long}, "a forked receipt": forked} {
		if err := below.Report([]feed.Relayed{bad}, at(2)); !errors.Is(err, feed.ErrMalformed) {
			t.Errorf("%s: %v", name, err)
		}
	}
	below.Leave() // the inner one may have been answered for as long as the relay was
	for _, l := range r.Report(at(3), false) {
		if !l.Gone || l.LastAnswerAge != time.Second {
			t.Errorf("left behind: %+v", l)
		}
	}
}

func TestRelayIsCrowded(t *testing.T) {
	r := newRelay(t)
	var err error
	for i := 0; err == nil; i++ {
		_, _, err = r.Follow(feed.Relayed{Path: []string{fmt.Sprint("verifier-", i)}, Bound: time.Second}, false, at(0))
		if i > 10000 {
			t.Fatal("there is no limit")
		}
	}
	if !errors.Is(err, feed.ErrCrowded) {
		t.Error(err)
	}
}

// TestInstanceIsOneIdentitys: who knows another's instance neither takes its stream over
// nor gives its receipts, not even once it is gone: it may be fresh for a while yet.
func TestInstanceIsOneIdentitys(t *testing.T) {
	r := newRelay(t)
	self := feed.Relayed{Path: []string{"verifier-1"}, Bound: time.Second, Identity: "spiffe://example.org/web"}
	d, _, err := r.Follow(self, false, at(0))
	if err != nil {
		t.Fatal(err)
	}
	for _, gone := range []bool{false, true} {
		for _, identity := range []string{"spiffe://example.org/thief", ""} {
			other := self
			other.Identity = identity
			if _, replaced, err := r.Follow(other, false, at(1)); !errors.Is(err, feed.ErrTaken) || replaced != nil {
				t.Errorf("as %q, gone: %t: %v", identity, gone, err)
			}
		}
		if !gone {
			d.Leave()
		}
	}
	if _, _, err := r.Follow(self, false, at(1)); err != nil {
		t.Errorf("itself again: %v", err)
	}
}
