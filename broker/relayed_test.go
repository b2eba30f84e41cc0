package broker_test

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/revocation"
)

func (w *world) relay(instance string) *broker.Follower {
	w.t.Helper()
	f, err := w.b.Subscribe(ctx, w.caller("agent"), broker.Subscriber{Instance: instance, MaxStaleness: time.Second, Relay: true})
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(f.Close)
	return f
}

func (w *world) relays(f *broker.Follower, verifiers ...feed.Relayed) []broker.RelayedRefusal {
	w.t.Helper()
	refused, err := f.Relayed(ctx, verifiers)
	if err != nil {
		w.t.Fatal(err)
	}
	return refused
}

func below(instance string) feed.Relayed {
	return feed.Relayed{Path: []string{instance}, Audiences: []string{"orders"}, Bound: 2 * time.Second}
}

// Policy is asked about every verifier behind a relay, as about the relay's identity,
// anew when its terms change; whom it refuses is not on the roster, and hinders nobody.
func TestRelayedNeedPolicy(t *testing.T) {
	w := newWorld(t)
	asked := 0
	w.policy.set(func(q broker.Question) (broker.Decision, error) {
		if q.Action == broker.ActionFollow && len(q.Audiences) > 0 {
			asked++
			if q.Caller.ID != id("agent") {
				t.Errorf("asked about %s", q.Caller.ID)
			}
			if q.AcceptsStale || slices.Contains(q.Audiences, "ledger") || q.MaxStaleness > 10*time.Second {
				return broker.Decision{Reason: "not_for_you", Message: "no", Hint: "ask"}, nil
			}
		}
		return yes(q), nil
	})
	f := w.relay("relay-0001")
	rec := w.revoke(broker.LockNone, revocation.Identity(id("payments")))
	wide, open, long := below("verifier-2"), below("verifier-3"), below("verifier-4")
	wide.Audiences = []string{"orders", "ledger"}
	open.AcceptsStale = true
	long.Bound = time.Minute
	refused := w.relays(f, below("verifier-1"), wide, open, long)
	var names []string
	for _, r := range refused {
		names = append(names, r.Path[0])
		if r.Refusal.Reason != broker.ErrPolicyDenied.Reason || r.Refusal.Message != "no" || r.Refusal.Hint != "ask" {
			t.Errorf("refused with %v", r.Refusal)
		}
	}
	if want := []string{"verifier-2", "verifier-3", "verifier-4"}; !slices.Equal(names, want) {
		t.Errorf("refused %v, want %v", names, want)
	}
	for _, name := range names {
		if s := w.state(rec, name); s != "not on the roster" {
			t.Errorf("%s, refused, is %s", name, s)
		}
	}
	if s := w.state(rec, "verifier-1"); s != feed.Pending {
		t.Errorf("the good one is %s", s)
	}
	if e := w.last(); e.Outcome != "refused" || e.Action != broker.ActionFollow || e.Actor != id("agent").String() {
		t.Errorf("audited %+v", e)
	}

	asked = 0
	if got := w.relays(f, below("verifier-1")); len(got) != 0 || asked != 0 {
		t.Errorf("the same terms: refused %v, policy was asked %d times", got, asked)
	}
	raised := below("verifier-1")
	raised.Bound = time.Minute
	if got := w.relays(f, raised); len(got) != 1 || asked != 1 {
		t.Errorf("other terms: refused %v, policy was asked %d times", got, asked)
	}
	raised.Gone = true
	if got := w.relays(f, raised); len(got) != 0 {
		t.Errorf("one that leaves was refused: %v", got)
	}
	left := below("verifier-5")
	left.Gone = true
	w.relays(f, left)
	if s := w.state(rec, "verifier-5"); s != "not on the roster" {
		t.Errorf("one that came and left unanswered is %s", s)
	}
}

// One that its relay answers no more closes at its own bound, though the relay lives;
// so it does after a restart.
func TestGoneBehindRelay(t *testing.T) {
	w := newWorld(t)
	f := w.relay("relay-0001")
	w.relays(f, below("verifier-1"), below("verifier-2"))
	rec := w.revoke(broker.LockNone, revocation.Identity(id("payments")))
	gone := below("verifier-1")
	gone.Gone, gone.LastAnswerAge = true, time.Second
	w.relays(f, gone)
	if s := w.state(rec, "verifier-1"); s != feed.Pending {
		t.Errorf("within its bound: %s", s)
	}
	w.clock.advance(time.Second + time.Millisecond)
	if _, err := f.Prove(ctx); err != nil {
		t.Fatal(err)
	}
	if s := w.state(rec, "verifier-1"); s != feed.Closed {
		t.Errorf("past its bound: %s", s)
	}
	if s := w.state(rec, "verifier-2"); s != feed.Pending {
		t.Errorf("the living one: %s", s)
	}

	w.restart()
	f = w.relay("relay-0001")
	w.clock.advance(2*time.Second + time.Millisecond)
	if _, err := f.Prove(ctx); err != nil {
		t.Fatal(err)
	}
	if s := w.state(rec, "verifier-1"); s != feed.Closed {
		t.Errorf("after a restart: %s", s)
	}
	w.relays(f, below("verifier-1"))
	if s := w.state(rec, "verifier-1"); s != feed.Pending {
		t.Errorf("after its return: %s", s)
	}
}

// Who left the roster while its stream was open gets no answer on it: containment counts
// without it.
func TestForgottenGetsNoAnswer(t *testing.T) {
	w := newWorld(t)
	silent := w.follow("orders", "instance-silent", time.Second)
	if _, err := silent.Prove(ctx); err != nil {
		t.Fatal(err)
	}
	w.clock.elapse(broker.ForgetAfter + 2*time.Second)
	w.prune()
	rec := w.revoke(broker.LockNone, revocation.Identity(id("payments")))
	if s := w.state(rec, "instance-silent"); s != "not on the roster" {
		t.Fatalf("after a long silence: %s", s)
	}
	_, err := silent.Prove(ctx)
	refused(t, err, broker.ErrForgotten)

	silent.Close()
	again := w.follow("orders", "instance-silent", time.Second)
	if _, err := again.Prove(ctx); err != nil {
		t.Error(err)
	}
	if s := w.state(rec, "instance-silent"); s != feed.Pending {
		t.Errorf("after it followed anew: %s", s)
	}
}

// An identity's entries are bounded; those that have closed make room.
func TestRosterFull(t *testing.T) {
	w := newWorld(t)
	f := w.relay("relay-0001")
	for n := 1; n < broker.MaxRoster; {
		var batch []feed.Relayed
		for len(batch) < broker.MaxRelayed && n < broker.MaxRoster {
			batch = append(batch, below(fmt.Sprintf("verifier-%d", n)))
			n++
		}
		w.relays(f, batch...)
	}
	tooMany := w.relays(f, below("one-too-many"), below("verifier-1"))
	if len(tooMany) != 1 || !slices.Equal(tooMany[0].Path, []string{"one-too-many"}) || tooMany[0].Refusal.Reason != broker.ErrRosterFull.Reason {
		t.Errorf("one too many: %v", tooMany)
	}
	if _, err := w.b.Subscribe(ctx, w.caller("agent"), broker.Subscriber{Instance: "relay-0002", MaxStaleness: time.Second, Relay: true}); err != nil {
		refused(t, err, broker.ErrRosterFull)
	} else {
		t.Error("another relay was let in")
	}
	w.relays(f, below("verifier-1")) // those on the roster go on
	w.follow("orders", "instance-1", time.Second).Close()

	w.clock.advance(3 * time.Second)
	w.relays(f, below("the-next"))
	rec := w.revoke(broker.LockNone, revocation.Identity(id("payments")))
	for instance, want := range map[string]feed.ReceiptState{
		"the-next": feed.Pending, "verifier-1": "not on the roster", "instance-1": feed.Closed,
	} {
		if s := w.state(rec, instance); s != want {
			t.Errorf("%s is %s, want %s", instance, s, want)
		}
	}
	w.restart()
	if s := w.state(rec, "verifier-1"); s != "not on the roster" {
		t.Errorf("after a restart: %s", s)
	}
}
