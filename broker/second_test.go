package broker_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/revocation"
)

const within = 10 * time.Minute

// twoPersons is a policy by which a lift takes two, and that denies some an action.
func (w *world) twoPersons(denied ...string) {
	w.policy.set(func(q broker.Question) (broker.Decision, error) {
		d := yes(q)
		d.Allow = !slices.Contains(denied, q.Caller.ID.Path()+" "+string(q.Action))
		d.SecondPerson = broker.SecondPerson{Required: true, Within: within, Confirmers: []string{"spiffe://example.org/ops/*"}}
		return d, nil
	})
}

// pending wants a call that only proposed.
func (w *world) pending(rec broker.Record, err error) *broker.Pending {
	w.t.Helper()
	var p *broker.Pending
	if !errors.As(err, &p) {
		w.t.Fatalf("got record %d, %v, want a proposal", rec.Seq, err)
	}
	return p
}

// A lift is proposed by one operator and confirmed by another, never by the same one,
// and what was proposed survives a restart.
func TestLiftTakesTwo(t *testing.T) {
	w := newWorld(t)
	w.twoPersons("/cat lift_confirm", "/dan lift")
	alice, bob := w.caller("alice"), w.caller("bob")
	c := w.caller("payments")
	before := w.issue(c, "orders")
	lock := w.revoke(broker.LockQuarantine, revocation.Identity(c.ID)).Seq
	other := w.revoke(broker.LockQuarantine, revocation.Identity(id("other"))).Seq
	head := w.b.Head()

	_, err := w.b.Lift(ctx, w.caller("dan"), lock, "r", "")
	refused(t, err, broker.ErrPolicyDenied) // may confirm, but there is nothing to
	p := w.pending(w.b.Lift(ctx, alice, lock, "rebuilt", "key-1"))
	if p.Actor != alice.ID.String() || p.Reason != "rebuilt" || !p.Time.Equal(noon) || !p.Ends.Equal(noon.Add(within)) || len(p.Confirmers) != 1 {
		t.Errorf("proposed: %+v", p)
	}
	if e := w.last(); e.Outcome != "proposed" || e.Action != broker.ActionLift || e.Sequence != lock || e.Actor != alice.ID.String() {
		t.Errorf("audit: %+v", e)
	}
	w.clock.advance(time.Minute)
	for range 2 {
		if again := w.pending(w.b.Lift(ctx, alice, lock, "rebuilt", "key-1")); again.Time != p.Time {
			t.Errorf("a retried proposal is another one: %+v", again)
		}
		for name, caller := range map[string]broker.Caller{"the same SVID": alice, "another SVID": w.caller("alice")} {
			for _, key := range []string{"", "key-2"} {
				_, err := w.b.Lift(ctx, caller, lock, "rebuilt", key)
				r := refused(t, err, broker.ErrSecondPerson)
				if !strings.Contains(r.Message, "12:10:00Z") || !strings.Contains(r.Hint, "spiffe://example.org/ops/*") || !strings.Contains(r.Hint, "--break-glass") {
					t.Errorf("%s: %q, hint %q", name, r.Message, r.Hint)
				}
			}
		}
		_, err := w.b.Lift(ctx, alice, other, "r", "key-1")
		refused(t, err, broker.ErrIdempotencyReused)
		_, err = w.b.Lift(ctx, w.caller("cat"), lock, "r", "")
		refused(t, err, broker.ErrPolicyDenied)
		if e := w.last(); e.Action != broker.ActionLiftConfirm {
			t.Errorf("audit: %+v", e)
		}
		if got, err := w.b.ProposedLifts(ctx); err != nil || len(got) != 1 || got[lock].Actor != alice.ID.String() {
			t.Errorf("proposed lifts %+v, %v", got, err)
		}
		w.admitted(c, false, "proposed")
		if w.b.Head() != head {
			t.Error("a proposal made a record")
		}
		w.restart()
	}

	rec, err := w.b.Lift(ctx, bob, lock, "I looked", "key-1") // a key is its actor's
	if err != nil {
		t.Fatal(err)
	}
	if q := rec.Details.Proposed; rec.Details.Actor != bob.ID.String() || q == nil || q.Actor != alice.ID.String() || q.Reason != "rebuilt" || rec.Details.Reason != "I looked" {
		t.Errorf("recorded: %+v", rec.Details)
	}
	if e := w.last(); e.Outcome != "allowed" || e.Action != broker.ActionLiftConfirm || e.Actor != bob.ID.String() || e.ProposedBy != alice.ID.String() {
		t.Errorf("audit: %+v", e)
	}
	for range 2 {
		w.admitted(c, true, "confirmed")
		if v := w.verdict(before.Token); v != revocation.Revoked {
			t.Errorf("the lift revived a token: %s", v)
		}
		for who, caller := range map[string]broker.Caller{"confirmer": bob, "proposer": alice} {
			if again, err := w.b.Lift(ctx, caller, lock, "r", "key-1"); err != nil || again.Seq != rec.Seq {
				t.Errorf("the %s's retry: record %d, %v, want %d", who, again.Seq, err, rec.Seq)
			}
		}
		_, err = w.b.Lift(ctx, alice, lock, "r", "")
		refused(t, err, broker.ErrNotStanding)
		if got, err := w.b.ProposedLifts(ctx); err != nil || len(got) != 0 {
			t.Errorf("proposed lifts %+v, %v", got, err)
		}
		w.restart()
	}
	if w.b.Head().Seq != head.Seq+1 {
		t.Errorf("head %s, want one record after %s", w.b.Head(), head)
	}
}

// A proposal lapses: the next lift proposes anew, whoever asks.
func TestProposalLapses(t *testing.T) {
	w := newWorld(t)
	w.twoPersons()
	alice, bob := w.caller("alice"), w.caller("bob")
	lock := w.revoke(broker.LockQuarantine, revocation.Identity(id("payments"))).Seq
	w.pending(w.b.Lift(ctx, alice, lock, "r", "key"))
	w.clock.advance(within)
	if p := w.pending(w.b.Lift(ctx, bob, lock, "r", "")); p.Actor != bob.ID.String() {
		t.Errorf("proposed by %s", p.Actor)
	}
	w.clock.set(-time.Minute) // before it was made: nobody knows how old it is
	if p := w.pending(w.b.Lift(ctx, alice, lock, "r", "key")); p.Actor != alice.ID.String() {
		t.Errorf("proposed by %s", p.Actor)
	}
	w.clock.advance(within - time.Second)
	if err := w.b.Prune(ctx); err != nil {
		t.Fatal(err)
	}
	if got, err := w.b.ProposedLifts(ctx); err != nil || len(got) != 1 {
		t.Errorf("pruning dropped a live proposal: %v, %v", got, err)
	}
	w.clock.advance(time.Second)
	if err := w.b.Prune(ctx); err != nil {
		t.Fatal(err)
	}
	for o, err := range w.store.Observed(ctx, "proposal/") {
		t.Errorf("lapsed, and kept: %s %v", o.Key, err)
	}
}

// waiting is a store whose first append waits.
type waiting struct {
	broker.Store
	enter, leave, made chan struct{}
}

func (s *waiting) Append(ctx context.Context, next func(feed.Position) (broker.Record, error)) (broker.Record, error) {
	close(s.enter)
	<-s.leave
	defer close(s.made)
	return s.Store.Append(ctx, next)
}

// Two that confirm at once make one record, also if one of them gave up meanwhile.
func TestConfirmersRace(t *testing.T) {
	w := newWorld(t)
	w.twoPersons()
	lock := w.revoke(broker.LockQuarantine, revocation.Identity(id("payments"))).Seq
	everything := broker.Revoke{Selectors: []revocation.Selector{revocation.Everything()}, Reason: "r", AllowEverything: true}
	for name, call := range map[string]func(context.Context, broker.Caller, string) (broker.Record, error){
		"lift": func(ctx context.Context, c broker.Caller, key string) (broker.Record, error) {
			return w.b.Lift(ctx, c, lock, "r", key)
		},
		"everything": func(ctx context.Context, c broker.Caller, key string) (broker.Record, error) {
			r := everything
			r.IdempotencyKey = key
			return w.b.Revoke(ctx, c, r)
		},
	} {
		w.pending(call(ctx, w.caller("alice"), ""))
		head := w.b.Head().Seq
		// The first one's record waits, and its caller goes away.
		enter, leave, made := make(chan struct{}), make(chan struct{}), make(chan struct{})
		store := w.store.Store
		w.store.set(func(s *tap) {
			s.Store = &waiting{s.Store, enter, leave, made}
		})
		short, cancel := context.WithCancel(ctx)
		gone := make(chan error, 1)
		zoe := w.caller("zoe")
		go func() { _, err := call(short, zoe, "key-"+name); gone <- err }()
		select {
		case <-enter:
		case err := <-gone:
			t.Fatalf("%s: the confirmation didn't get to the store: %v", name, err)
		}
		w.store.set(func(s *tap) { s.Store = store })
		cancel()
		if err := <-gone; !errors.Is(err, context.Canceled) {
			t.Errorf("%s: got %v", name, err)
		}
		var (
			wg      sync.WaitGroup
			mu      sync.Mutex
			numbers []uint64
		)
		for range 8 {
			caller := w.caller("bob")
			wg.Go(func() {
				rec, err := call(ctx, caller, "key-"+name)
				mu.Lock()
				defer mu.Unlock()
				if err != nil {
					t.Errorf("%s: %v", name, err)
				}
				numbers = append(numbers, rec.Seq)
			})
		}
		wg.Wait()
		if numbers = slices.Compact(numbers); len(numbers) != 1 || numbers[0] != head+1 {
			t.Errorf("%s: records %v, want %d alone", name, numbers, head+1)
		}
		close(leave)
		<-made
		if st, err := store.State(ctx); err != nil || st.Head.Seq != head+1 {
			t.Errorf("%s: head %d, %v, want %d", name, st.Head.Seq, err, head+1)
		}
	}
}

// A confirmation that is committed, whose caller gave up before this broker had applied
// it, isn't made again.
func TestConfirmedBeforeApplied(t *testing.T) {
	w := newWorld(t)
	w.twoPersons()
	lock := w.revoke(broker.LockQuarantine, revocation.Identity(id("payments"))).Seq
	w.pending(w.b.Lift(ctx, w.caller("alice"), lock, "r", ""))
	head := w.b.Head().Seq
	committed, apply := make(chan struct{}), make(chan struct{})
	w.store.set(func(s *tap) {
		s.beforeApply = sync.OnceFunc(func() { close(committed); <-apply })
	})
	short, cancel := context.WithCancel(ctx)
	bob, zoe := w.caller("bob"), w.caller("zoe")
	gone, answered := make(chan error, 1), make(chan error, 1)
	go func() { _, err := w.b.Lift(short, bob, lock, "r", ""); gone <- err }()
	<-committed
	cancel()
	if err := <-gone; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	asked := make(chan struct{})
	w.policy.set(func(q broker.Question) (broker.Decision, error) {
		if q.Action == broker.ActionLiftConfirm {
			defer close(asked)
		}
		d := yes(q)
		d.SecondPerson.Required = true
		return d, nil
	})
	go func() { _, err := w.b.Lift(ctx, zoe, lock, "r", ""); answered <- err }()
	<-asked
	select {
	case err := <-answered:
		t.Errorf("answered without knowing the log: %v", err)
		close(apply)
	case <-time.After(50 * time.Millisecond): // long enough to be wrong, never too short to be right
		close(apply)
		refused(t, <-answered, broker.ErrNotStanding)
	}
	if st, err := w.store.State(ctx); err != nil || st.Head.Seq != head+1 {
		t.Errorf("head %d, %v, want %d", st.Head.Seq, err, head+1)
	}
}

// The same selectors in any order are the same revocation of everything; others are
// another one. A proposal counts once, even if the broker died before it forgot it.
func TestEverythingTakesTwo(t *testing.T) {
	w := newWorld(t)
	alice, bob := w.caller("alice"), w.caller("bob")
	cred := w.issue(w.caller("payments"), "orders")
	req := broker.Revoke{
		Selectors: []revocation.Selector{revocation.Everything(), revocation.Identity(id("payments"))},
		Reason:    "the host is theirs", AllowEverything: true, IdempotencyKey: "key",
	}
	turned := req
	turned.Selectors = []revocation.Selector{req.Selectors[1], req.Selectors[0]}
	head := w.b.Head()
	first := w.pending(w.b.Revoke(ctx, alice, req))
	if e := w.last(); e.Outcome != "proposed" || e.Action != broker.ActionRevokeEverything || e.Why != req.Reason || len(e.Selector) != 2 {
		t.Errorf("audit: %+v", e)
	}
	w.restart()
	if again := w.pending(w.b.Revoke(ctx, w.caller("alice"), req)); again.Time != first.Time {
		t.Errorf("a retried proposal is another one: %+v", again)
	}
	own := turned
	own.IdempotencyKey = ""
	_, err := w.b.Revoke(ctx, w.caller("alice"), own)
	refused(t, err, broker.ErrSecondPerson)
	for name, change := range map[string]func(*broker.Revoke){
		"fewer selectors": func(r *broker.Revoke) { r.Selectors = r.Selectors[:1] },
		"another lock":    func(r *broker.Revoke) { r.Lock = broker.LockNone },
		"another end":     func(r *broker.Revoke) { r.LockEnds = noon.Add(time.Hour) },
	} {
		other := req
		other.IdempotencyKey = ""
		change(&other)
		if p := w.pending(w.b.Revoke(ctx, bob, other)); p.Actor != bob.ID.String() {
			t.Errorf("%s: the proposal is %s's", name, p.Actor)
		}
	}
	var stale []broker.Observation
	for o, err := range w.store.Observed(ctx, "proposal/") {
		if err != nil {
			t.Fatal(err)
		}
		stale = append(stale, o)
	}
	if len(stale) != 2 {
		t.Errorf("%d proposals are kept, one an operator wanted", len(stale))
	}
	if v := w.verdict(cred.Token); v != revocation.Alive || w.b.Head() != head {
		t.Errorf("proposed, and the token is %s", v)
	}

	rec, err := w.b.Revoke(ctx, bob, turned)
	if err != nil {
		t.Fatal(err)
	}
	if q := rec.Details.Proposed; rec.Details.Actor != bob.ID.String() || q == nil || q.Actor != alice.ID.String() || rec.Details.Lock != broker.LockQuarantine {
		t.Errorf("recorded: %+v", rec.Details)
	}
	if e := w.last(); e.Outcome != "allowed" || e.ProposedBy != alice.ID.String() || e.Actor != bob.ID.String() || e.Sequence != rec.Seq {
		t.Errorf("audit: %+v", e)
	}
	if v := w.verdict(cred.Token); v != revocation.Revoked {
		t.Errorf("the token is %s", v)
	}
	if err := w.store.Observe(ctx, stale...); err != nil {
		t.Fatal(err)
	}
	w.restart()
	if again, err := w.b.Revoke(ctx, alice, req); err != nil || again.Seq != rec.Seq {
		t.Errorf("the proposer's retry: record %d, %v, want %d", again.Seq, err, rec.Seq)
	}
	if p := w.pending(w.b.Revoke(ctx, w.caller("cat"), own)); p.Actor != id("cat").String() {
		t.Errorf("what was confirmed counted twice: %+v", p)
	}
}

// Root on the broker's host needs no second person, and says so loudly.
func TestBreakGlassIsAlone(t *testing.T) {
	w := newWorld(t)
	w.twoPersons()
	root := broker.Caller{Local: "break-glass:uid=0"}
	lock := w.revoke(broker.LockQuarantine, revocation.Identity(id("payments"))).Seq
	w.pending(w.b.Lift(ctx, w.operator(), lock, "r", ""))
	if rec, err := w.b.Lift(ctx, root, lock, "r", ""); err != nil || rec.Details.Proposed != nil || rec.Details.Actor != root.Local {
		t.Errorf("lift: %+v, %v", rec.Details, err)
	}
	rec, err := w.b.Revoke(ctx, root, broker.Revoke{Selectors: []revocation.Selector{revocation.Everything()}, Reason: "r", AllowEverything: true})
	if err != nil || rec.Details.Proposed != nil {
		t.Errorf("everything: %+v, %v", rec.Details, err)
	}
}

// A record that one person made has the digest that it had before there were two.
func TestDigestOfOnePerson(t *testing.T) {
	d := broker.Details{Time: noon, Actor: "a", Reason: "r", IdempotencyKey: "k", Lock: broker.LockQuarantine}
	const text = `{"time":"2026-11-23T12:00:00Z","actor":"a","reason":"r","idempotency_key":"k","lock":"quarantine"}`
	if d.Digest() != sha256.Sum256([]byte(text)) {
		t.Error("the hashes of old records no longer stand")
	}
	alone := d.Digest()
	d.Proposed = &broker.Proposal{Actor: "b"}
	if d.Digest() == alone {
		t.Error("who proposed isn't under the hash")
	}
}

// Once policy no longer wants two persons one is enough, whatever was proposed.
func TestOnePersonAgain(t *testing.T) {
	w := newWorld(t)
	w.twoPersons()
	lock := w.revoke(broker.LockQuarantine, revocation.Identity(id("payments"))).Seq
	w.pending(w.b.Lift(ctx, w.caller("alice"), lock, "r", ""))
	w.policy.set(nil)
	if rec, err := w.b.Lift(ctx, w.caller("bob"), lock, "r", ""); err != nil || rec.Details.Proposed != nil {
		t.Errorf("%+v, %v", rec.Details, err)
	}
}
