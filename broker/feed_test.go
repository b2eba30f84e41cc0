package broker_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/revocation"
)

// containment adds up the receipts of a record.
func (w *world) containment(rec broker.Record) *broker.Containment {
	w.t.Helper()
	r, err := w.b.Revocation(rec.Seq)
	if err != nil {
		w.t.Fatal(err)
	}
	c, _ := w.b.Containment(r)
	return c
}

// state is what is known of one verifier and one revocation.
func (w *world) state(rec broker.Record, instance string) feed.ReceiptState {
	w.t.Helper()
	for _, r := range w.containment(rec).Receipts {
		if r.Verifier.ID.Instance == instance {
			return r.State
		}
	}
	return "not on the roster"
}

func (w *world) acknowledge(f *broker.Follower, p feed.Position) {
	w.t.Helper()
	if err := f.Acknowledge(ctx, p); err != nil {
		w.t.Fatal(err)
	}
}

// A receipt counts for what was delivered to whom sent it; 'contained' is never said
// before all have confirmed or the largest bound has passed.
func TestReceipts(t *testing.T) {
	w := newWorld(t)
	fast, slow := w.follow("orders", "instance-fast", 2*time.Second), w.follow("ledger", "instance-slow", 10*time.Second)
	var fastView, slowView feed.View
	w.acknowledge(fast, drain(t, fast, &fastView))
	w.acknowledge(slow, drain(t, slow, &slowView))
	rec := w.revoke(broker.LockQuarantine, revocation.Identity(id("payments")))
	r, err := w.b.Revocation(rec.Seq)
	if err != nil {
		t.Fatal(err)
	}

	refused(t, fast.Acknowledge(ctx, r.Position), broker.ErrFeedRejected) // not delivered yet
	position := drain(t, fast, &fastView)
	if position != r.Position {
		t.Fatalf("delivered up to %s, want %s", position, r.Position)
	}
	wrong := position
	wrong.Sum[0] ^= 1
	refused(t, fast.Acknowledge(ctx, wrong), broker.ErrFeedRejected)
	above := position
	above.Seq++
	refused(t, fast.Acknowledge(ctx, above), broker.ErrFeedRejected)
	above = position
	above.Era++
	refused(t, fast.Acknowledge(ctx, above), broker.ErrFeedRejected)
	if c := w.containment(rec); c.Contained || c.Counts[feed.Pending] != 2 {
		t.Errorf("refused receipts count: %+v", c.Counts)
	}

	_, changed := w.b.Containment(r)
	w.acknowledge(fast, position)
	select {
	case <-changed:
	default:
		t.Error("nobody who watches was woken")
	}
	if w.state(rec, "instance-fast") != feed.Confirmed || w.state(rec, "instance-slow") != feed.Pending || w.containment(rec).Contained {
		t.Errorf("after one of two receipts: %+v", w.containment(rec))
	}
	w.clock.advance(9 * time.Second)
	if c := w.containment(rec); c.Contained {
		t.Errorf("contained before the largest bound: %+v", c)
	}

	// The verifier starts anew: its receipt was its predecessor's.
	again := w.follow("orders", "instance-anew", 2*time.Second)
	if s := w.state(rec, "instance-anew"); s != feed.Pending {
		t.Errorf("a new instance is %s", s)
	}
	if s := w.state(rec, "instance-fast"); s != feed.Confirmed {
		t.Errorf("the old instance is %s", s)
	}

	// So does the broker: the roster and the receipts stand.
	w.restart()
	for instance, want := range map[string]feed.ReceiptState{"instance-fast": feed.Confirmed, "instance-slow": feed.Pending, "instance-anew": feed.Pending} {
		if s := w.state(rec, instance); s != want {
			t.Errorf("after a restart %s is %s, want %s", instance, s, want)
		}
	}
	if w.containment(rec).Contained {
		t.Error("contained, because the broker forgot when")
	}
	_ = again
	slow, slowView = w.follow("ledger", "instance-slow", 10*time.Second), feed.View{}
	w.acknowledge(slow, drain(t, slow, &slowView))
	anew := w.follow("orders", "instance-anew", 2*time.Second)
	w.acknowledge(anew, drain(t, anew, &feed.View{}))
	if c := w.containment(rec); !c.Contained || c.Counts[feed.Confirmed] != 3 {
		t.Errorf("all have confirmed: %+v", c)
	}

	// Silence longer than the bound closes.
	rec = w.revoke(broker.LockNone, revocation.Identity(id("other")))
	w.clock.advance(2*time.Second + 1)
	if s := w.state(rec, "instance-fast"); s != feed.Closed {
		t.Errorf("silent past its bound: %s", s)
	}
	if c := w.containment(rec); c.Contained {
		t.Error("contained before the largest bound")
	}
	w.clock.advance(8 * time.Second)
	if c := w.containment(rec); !c.Contained {
		t.Errorf("the largest bound has passed: %+v", c)
	}
}

// A verifier that accepts when stale is bounded by nothing.
func TestAcceptsStale(t *testing.T) {
	w := newWorld(t)
	f, err := w.b.Subscribe(ctx, w.caller("orders"), broker.Subscriber{
		Instance: "instance-1", Audiences: []string{"orders"}, MaxStaleness: time.Second, AcceptsStale: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	rec := w.revoke(broker.LockNone, revocation.Identity(id("payments")))
	w.clock.advance(time.Minute)
	if c := w.containment(rec); c.Contained || c.Counts[feed.Unbounded] != 1 {
		t.Errorf("got %+v", c)
	}
	w.acknowledge(f, drain(t, f, &feed.View{}))
	if c := w.containment(rec); !c.Contained {
		t.Errorf("after its receipt: %+v", c)
	}
}

// Who joins again with a smaller bound may still live by the larger one, also after
// the broker's restart.
func TestLargerBoundStands(t *testing.T) {
	w := newWorld(t)
	w.follow("orders", "instance-1", 30*time.Second).Close()
	w.follow("orders", "instance-1", time.Second).Close()
	rec := w.revoke(broker.LockNone, revocation.Identity(id("payments")))
	for range 2 {
		if got := w.containment(rec).Receipts[0].Verifier.Bound; got != 30*time.Second {
			t.Errorf("bound %s", got)
		}
		w.restart()
	}
}

// A verifier is on the roster, durably, before it gets anything.
func TestRosterBeforeAnything(t *testing.T) {
	w := newWorld(t)
	subscribe := func() (*broker.Follower, error) {
		return w.b.Subscribe(ctx, w.caller("orders"), broker.Subscriber{Instance: "instance-1", Audiences: []string{"orders"}, MaxStaleness: time.Second})
	}
	w.store.set(func(s *tap) { s.observe = func([]broker.Observation) error { return broker.ErrStoreFull } })
	_, err := subscribe()
	refused(t, err, broker.ErrFull)
	w.store.set(func(s *tap) { s.observe = nil })
	rec := w.revoke(broker.LockNone, revocation.Identity(id("payments")))
	if got := w.state(rec, "instance-1"); got != "not on the roster" {
		t.Errorf("it is %s", got)
	}
	f, err := subscribe()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()

	// A receipt that can't be kept is said to be lost.
	w.store.set(func(s *tap) { s.observe = func([]broker.Observation) error { return broker.ErrStoreClosed } })
	refused(t, f.Acknowledge(ctx, drain(t, f, &feed.View{})), broker.ErrStoreLost)
	// And a broker that can't write its store doesn't call itself fresh.
	_, err = f.Prove(ctx)
	refused(t, err, broker.ErrStoreLost)
	w.store.set(func(s *tap) { s.observe = nil })
	p, err := f.Prove(ctx)
	if err != nil || p.Head != w.b.Head() || p.Age != 0 {
		t.Errorf("proof %+v, %v", p, err)
	}
}

func TestSubscribeRefusals(t *testing.T) {
	w := newWorld(t)
	good := broker.Subscriber{Instance: "instance-1", Audiences: []string{"orders"}, MaxStaleness: time.Second}
	for _, tc := range []struct {
		name   string
		change func(*broker.Subscriber)
		want   *broker.Refusal
	}{
		{"no instance", func(s *broker.Subscriber) { s.Instance = "" }, broker.ErrFeedRejected},
		{"a short instance", func(s *broker.Subscriber) { s.Instance = "1234567" }, broker.ErrFeedRejected},
		{"a long instance", func(s *broker.Subscriber) { s.Instance = strings.Repeat("i", 65) }, broker.ErrFeedRejected},
		{"an instance with a bar", func(s *broker.Subscriber) { s.Instance = "instance|1" }, broker.ErrFeedRejected},
		{"an instance that isn't printable", func(s *broker.Subscriber) { s.Instance = "instance\x001" }, broker.ErrFeedRejected},
		{"no audience", func(s *broker.Subscriber) { s.Audiences = nil }, broker.ErrFeedRejected},
		{"too many audiences", func(s *broker.Subscriber) { s.Audiences = make([]string, 65) }, broker.ErrFeedRejected},
		{"a malformed audience", func(s *broker.Subscriber) { s.Audiences = []string{"a b"} }, broker.ErrFeedRejected},
		{"no bound", func(s *broker.Subscriber) { s.MaxStaleness = 0 }, broker.ErrBoundTooLarge},
		{"a small bound", func(s *broker.Subscriber) { s.MaxStaleness = broker.MinStaleness - 1 }, broker.ErrBoundTooLarge},
		{"a large bound", func(s *broker.Subscriber) { s.MaxStaleness = broker.MaxStaleness + 1 }, broker.ErrBoundTooLarge},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := good
			tc.change(&s)
			_, err := w.b.Subscribe(ctx, w.caller("orders"), s)
			refused(t, err, tc.want)
			if e := w.last(); e.Action != broker.ActionFollow || e.Outcome != "refused" {
				t.Errorf("audit: %+v", e)
			}
		})
	}
	w.policy.set(func(q broker.Question) (broker.Decision, error) {
		return broker.Decision{Allow: q.Action != broker.ActionRelay}, nil
	})
	relay := good
	relay.Relay = true
	_, err := w.b.Subscribe(ctx, w.caller("orders"), relay)
	refused(t, err, broker.ErrPolicyDenied)
	w.policy.set(func(q broker.Question) (broker.Decision, error) {
		return broker.Decision{Allow: q.Action != broker.ActionFollow}, nil
	})
	_, err = w.b.Subscribe(ctx, w.caller("orders"), good)
	refused(t, err, broker.ErrPolicyDenied)
}

// One identity has so many streams and no more; another isn't held up by it.
func TestStreamLimit(t *testing.T) {
	w := newWorld(t)
	c := w.caller("orders")
	subscribe := func(c broker.Caller, i int) (*broker.Follower, error) {
		return w.b.Subscribe(ctx, c, broker.Subscriber{Instance: fmt.Sprintf("instance-%d", i%3), Audiences: []string{"orders"}, MaxStaleness: time.Second})
	}
	var streams []*broker.Follower
	for i := range broker.MaxStreams {
		f, err := subscribe(c, i)
		if err != nil {
			t.Fatal(err)
		}
		streams = append(streams, f)
	}
	_, err := subscribe(c, 0)
	refused(t, err, broker.ErrTooManyStreams)
	if f, err := subscribe(w.caller("ledger"), 0); err != nil {
		t.Error(err)
	} else {
		f.Close()
	}
	streams[0].Close()
	streams[0].Close() // twice is once
	if _, err := subscribe(c, 0); err != nil {
		t.Error(err)
	}
	_, err = subscribe(c, 0)
	refused(t, err, broker.ErrTooManyStreams)
}

// What a relay says of those below it counts as its word, for what it was given.
func TestRelay(t *testing.T) {
	w := newWorld(t)
	subscribe := func(position feed.Position) *broker.Follower {
		f, err := w.b.Subscribe(ctx, w.caller("agent"), broker.Subscriber{Instance: "relay-0001", MaxStaleness: time.Second, Relay: true, Position: position})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(f.Close)
		return f
	}
	relay := subscribe(feed.Position{})
	var view feed.View
	at := drain(t, relay, &view)
	good := feed.Relayed{Path: []string{"verifier-1"}, Audiences: []string{"orders"}, Bound: 2 * time.Second, Acked: at}
	report := func(change func(*feed.Relayed)) error {
		rv := good
		change(&rv)
		_, err := relay.Relayed(ctx, []feed.Relayed{rv})
		return err
	}
	if err := report(func(*feed.Relayed) {}); err != nil {
		t.Fatal(err)
	}
	rec := w.revoke(broker.LockNone, revocation.Identity(id("payments")))
	r, err := w.b.Revocation(rec.Seq)
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*feed.Relayed){
		"no path": func(v *feed.Relayed) { v.Path = nil },
		"a long path": func(v *feed.Relayed) {
			v.Path = strings.Split("verifier-1 "+strings.Repeat("relay-00x ", 7)+"v", " ")
		},
		"a path with a bar":       func(v *feed.Relayed) { v.Path = []string{"verifier|1"} },
		"a path with a slash":     func(v *feed.Relayed) { v.Path = []string{"relay/0001/verifier"} },
		"an empty instance":       func(v *feed.Relayed) { v.Path = []string{""} },
		"a malformed audience":    func(v *feed.Relayed) { v.Audiences = []string{"a b"} },
		"no bound":                func(v *feed.Relayed) { v.Bound = 0 },
		"a bound out of range":    func(v *feed.Relayed) { v.Bound = 2 * time.Hour },
		"a negative age":          func(v *feed.Relayed) { v.LastAnswerAge = -1 },
		"a receipt not delivered": func(v *feed.Relayed) { v.Acked = r.Position },
		"a receipt of a wrong sum": func(v *feed.Relayed) {
			v.Acked.Sum[3] ^= 1
		},
	} {
		if err := report(change); !errors.Is(err, broker.ErrFeedRejected) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := relay.Relayed(ctx, make([]feed.Relayed, broker.MaxRelayed+1)); !errors.Is(err, broker.ErrFeedRejected) {
		t.Errorf("a report too large: %v", err)
	}
	verifier := w.follow("orders", "instance-1", time.Second)
	if _, err := verifier.Relayed(ctx, nil); !errors.Is(err, broker.ErrFeedRejected) {
		t.Errorf("a report of one that is no relay: %v", err)
	}
	verifier.Close()

	if s := w.state(rec, "verifier-1"); s != feed.Pending {
		t.Errorf("below the relay: %s", s)
	}
	at = drain(t, relay, &view)
	w.acknowledge(relay, at)
	if s := w.state(rec, "verifier-1"); s != feed.Pending {
		t.Errorf("the relay's own receipt counted for one below it: %s", s)
	}
	if err := report(func(v *feed.Relayed) { v.Acked = at }); err != nil {
		t.Fatal(err)
	}
	if s := w.state(rec, "verifier-1"); s != feed.Confirmed {
		t.Errorf("after its receipt: %s", s)
	}

	// A relay that comes back says what it has; only its receipt says who is below it.
	other, err := w.b.Subscribe(ctx, w.caller("agent"), broker.Subscriber{Instance: "relay-0002", MaxStaleness: time.Second, Relay: true, Position: at})
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if s := w.state(rec, "relay-0002"); s != feed.Pending {
		t.Errorf("a relay's claim at the start was taken for a receipt: %s", s)
	}
	// A verifier's is one.
	f, err := w.b.Subscribe(ctx, w.caller("orders"), broker.Subscriber{Instance: "instance-2", Audiences: []string{"orders"}, MaxStaleness: time.Second, Position: at})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if s := w.state(rec, "instance-2"); s != feed.Confirmed {
		t.Errorf("a verifier that has it all: %s", s)
	}
	w.restart()
	if s := w.state(rec, "verifier-1"); s != feed.Confirmed {
		t.Errorf("after a restart: %s", s)
	}
}

// Deep paths and long identities still have a place in the store.
func TestLongNamesOnRoster(t *testing.T) {
	w := newWorld(t)
	c := w.caller(strings.Repeat("ns/", 400) + "agent")
	f, err := w.b.Subscribe(ctx, c, broker.Subscriber{Instance: strings.Repeat("r", 64), MaxStaleness: time.Second, Relay: true})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	path := make([]string, 8)
	for i := range path {
		path[i] = strings.Repeat(fmt.Sprint(i), 64)
	}
	if _, err := f.Relayed(ctx, []feed.Relayed{{Path: path, Bound: time.Second}}); err != nil {
		t.Fatal(err)
	}
	w.restart()
	rec := w.revoke(broker.LockNone, revocation.Identity(id("payments")))
	if n := len(w.containment(rec).Receipts); n != 2 {
		t.Errorf("%d on the roster after a restart, want 2", n)
	}
}

func (w *world) prune() {
	w.t.Helper()
	if err := w.b.Prune(ctx); err != nil {
		w.t.Fatal(err)
	}
}

// A key in the store that no broker vouches for is revoked, at the start and while the
// broker runs, and tokens that it signs are worth nothing.
func TestForeignKey(t *testing.T) {
	for _, running := range []bool{false, true} {
		t.Run(fmt.Sprintf("running=%t", running), func(t *testing.T) {
			w := newWorld(t)
			honest := w.issue(w.caller("payments"), "orders")
			thief := newKey(t)
			record, public := w.vouched(thief, id("attacker"))
			if !running {
				w.stopBroker()
			}
			rec, err := w.store.Append(ctx, func(feed.Position) (broker.Record, error) {
				return broker.Record{Event: feed.Event{Key: &record}, Details: broker.Details{Time: w.clock.Now(), Actor: issuer}}, nil
			})
			if err != nil {
				t.Fatal(err)
			}
			if !running {
				w.restart()
			}
			w.awaitHead(rec.Seq + 1)
			r, err := w.b.Revocation(rec.Seq + 1)
			if err != nil || len(r.Record.Revocation.Selectors) != 1 || r.Record.Revocation.Selectors[0] != revocation.Key(public.ID) {
				t.Fatalf("got %+v, %v", r, err)
			}
			for _, k := range w.b.Keys() {
				if k.ID == public.ID {
					t.Error("it is published")
				}
			}
			u, _ := w.unsigned(t, honest.Token, thief.Public())
			forged, err := u.Sign(thief)
			if err != nil {
				t.Fatal(err)
			}
			if v := w.verdict(forged); v != revocation.KeyRevoked {
				t.Errorf("a token that it signed is %s", v)
			}
			w.policy.names[id("orders")] = "orders"
			_, err = w.b.Exchange(ctx, w.caller("orders"), broker.Request{Audience: "far", Subject: forged})
			refused(t, err, broker.ErrSubjectKeyUnknown)
			if v := w.verdict(honest.Token); v != revocation.Alive {
				t.Errorf("an honest token is %s", v)
			}
			w.restart() // and it isn't revoked again and again
			if got := w.b.Head().Seq; got != rec.Seq+1 {
				t.Errorf("head %d after a restart, want %d", got, rec.Seq+1)
			}
		})
	}
}

// awaitHead waits until the broker has applied a record.
func (w *world) awaitHead(seq uint64) {
	w.t.Helper()
	deadline := time.After(time.Minute)
	for {
		changed := w.b.Changed()
		if w.b.Head().Seq >= seq {
			return
		}
		select {
		case <-changed:
		case <-deadline:
			w.t.Fatalf("the head is %d, want %d", w.b.Head().Seq, seq)
		}
	}
}
