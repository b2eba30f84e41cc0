package broker_test

import (
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
	"pgregory.net/rapid"
)

func (w *world) horizon() uint64 {
	w.t.Helper()
	st, err := w.store.State(ctx)
	if err != nil {
		w.t.Fatal(err)
	}
	return st.Horizon.Seq
}

// The log is trimmed by elapsed time alone, and never of what can still matter.
func TestPrune(t *testing.T) {
	w := newWorld(t)
	payments := w.caller("payments")
	gone := w.revoke(broker.LockNone, revocation.Identity(id("gone")))
	locked := w.revoke(broker.LockQuarantine, revocation.Identity(payments.ID))
	lifted := w.revoke(broker.LockQuarantine, revocation.Identity(id("lifted")))
	if _, err := w.b.Lift(ctx, w.operator(), lifted.Seq, "r", ""); err != nil {
		t.Fatal(err)
	}
	stolen := newKey(t)
	record, public := w.vouched(stolen, brokerID)
	if err := w.b.PublishKey(ctx, record); err != nil {
		t.Fatal(err)
	}
	key := w.revoke(broker.LockNone, revocation.Key(public.ID))
	last := w.revoke(broker.LockNone, revocation.Identity(id("last")))

	w.clock.set(365 * 24 * time.Hour) // the wall clock leaps: nothing has elapsed
	w.prune()
	if h := w.horizon(); h != 0 {
		t.Fatalf("a leap of the wall clock moved the horizon to %d", h)
	}
	w.clock.set(-365 * 24 * time.Hour)
	w.clock.elapse(broker.ForgetAfter) // just not long enough
	w.prune()
	if h := w.horizon(); h != 0 {
		t.Fatalf("the horizon moved to %d too early", h)
	}
	w.clock.elapse(1)
	w.prune()
	if h := w.horizon(); h != last.Seq {
		t.Fatalf("the horizon is %d, want %d", h, last.Seq)
	}

	check := func(when string) {
		t.Helper()
		w.admitted(payments, false, when+", the quarantined one")
		w.admitted(w.caller("lifted"), true, when+", the lifted one")
		w.admitted(w.caller("gone"), true, when+", another")
		if _, err := w.b.Revocation(gone.Seq); !errors.Is(err, broker.ErrNoSuchRevocation) {
			t.Errorf("%s: a forgotten revocation is there: %v", when, err)
		}
		if _, err := w.b.Revocation(lifted.Seq); !errors.Is(err, broker.ErrNoSuchRevocation) {
			t.Errorf("%s: the lifted one is there: %v", when, err)
		}
		for _, seq := range []uint64{locked.Seq, key.Seq} {
			if _, err := w.b.Revocation(seq); err != nil {
				t.Errorf("%s: revocation %d: %v", when, seq, err)
			}
		}
		if !w.b.KeyRevoked(public.ID) {
			t.Errorf("%s: a revoked key came back", when)
		}
		if keys := w.b.Keys(); len(keys) != 1 || keys[0].ID != w.public.ID {
			t.Errorf("%s: keys %v", when, keys)
		}
		if v := w.verdict(w.issue(w.caller("shop"), "orders").Token); v != revocation.Alive {
			t.Errorf("%s: a new token is %s", when, v)
		}
		var view feed.View
		f := w.follow("orders", "instance-new", time.Second)
		defer f.Close()
		drain(t, f, &view)
		if view.Position() != w.b.Head() {
			t.Errorf("%s: a new verifier is at %s, the head is %s", when, view.Position(), w.b.Head())
		}
	}
	check("after pruning")
	w.restart()
	check("after pruning and a restart")
	w.prune()
	check("after a restart and pruning")
	if _, err := w.b.Lift(ctx, w.operator(), locked.Seq, "r", ""); err != nil {
		t.Errorf("a lock below the horizon can't be lifted: %v", err)
	}
	w.restart()
	w.admitted(payments, true, "after the lift of a lock below the horizon")
}

// A lock with an end outlives a wall clock that leaps past it and comes back; once its
// time has elapsed too it is forgotten.
func TestPruneKeepsLocksOverLeap(t *testing.T) {
	w := newWorld(t)
	const lasts = 3 * broker.ForgetAfter
	rec, err := w.b.Revoke(ctx, w.operator(), broker.Revoke{
		Selectors: []revocation.Selector{revocation.Identity(id("payments"))}, Reason: "r", LockEnds: w.clock.Now().Add(lasts),
	})
	if err != nil {
		t.Fatal(err)
	}
	w.revoke(broker.LockNone, revocation.Identity(id("newer"))) // the head stays in any case
	w.clock.elapse(broker.ForgetAfter + 1)
	w.clock.set(2 * lasts)
	w.prune()
	w.clock.set(-2 * lasts)
	if h := w.horizon(); h < rec.Seq {
		t.Fatalf("the horizon is %d, below the lock", h)
	}
	w.restart()
	if locks := w.b.Locks(); len(locks) != 1 || locks[0].Number != rec.Seq {
		t.Fatalf("after a leap of the wall clock and back these stand: %+v", locks)
	}

	w.revoke(broker.LockNone, revocation.Identity(id("another"))) // so that the horizon moves
	w.clock.elapse(lasts)
	w.clock.set(lasts)
	w.prune()
	if _, err := w.b.Revocation(rec.Seq); !errors.Is(err, broker.ErrNoSuchRevocation) {
		t.Errorf("once it has ended: %v", err)
	}
	w.clock.set(-lasts)
	if locks := w.b.Locks(); len(locks) != 0 {
		t.Errorf("a lock without a record: %+v", locks)
	}
}

// A retried revoke finds its record as long as that is there, then makes another.
func TestPruneForgetsKeysOfRetries(t *testing.T) {
	w := newWorld(t)
	op := w.operator()
	req := broker.Revoke{Selectors: []revocation.Selector{revocation.Identity(id("payments"))}, Lock: broker.LockNone, Reason: "r", IdempotencyKey: "key-1"}
	first, err := w.b.Revoke(ctx, op, req)
	if err != nil {
		t.Fatal(err)
	}
	w.revoke(broker.LockNone, revocation.Identity(id("other")))
	w.clock.elapse(broker.ForgetAfter + 1)
	w.prune()
	again, err := w.b.Revoke(ctx, op, req)
	if err != nil || again.Seq <= first.Seq {
		t.Errorf("record %d, %v", again.Seq, err)
	}
}

// The key of a successor that never took over retires nothing: the key that signs stays,
// and goes only when the last token that it signed has expired.
func TestPruneKeepsTheKeyThatSigns(t *testing.T) {
	w := newWorld(t)
	old := w.public
	has := func() bool {
		return slices.ContainsFunc(w.b.Keys(), func(k token.PublicKey) bool { return k.ID == old.ID })
	}
	for range 2 {
		successor, _ := w.vouched(newKey(t), brokerID)
		if err := w.b.PublishKey(ctx, successor); err != nil {
			t.Fatal(err)
		}
	}
	w.revoke(broker.LockNone, revocation.Identity(id("other"))) // the head stays, whatever it is
	published := len(w.b.Keys())
	w.clock.elapse(10 * time.Hour)
	w.prune()
	if !has() {
		t.Fatal("the signing key is gone while it signs")
	}
	if n := len(w.b.Keys()); n != published {
		t.Fatalf("of %d keys since the signing one there are %d: only the oldest may go", published, n)
	}
	w.clock.elapse(time.Hour)
	w.issue(w.caller("payments"), "orders") // lives for an hour
	w.newKey()
	w.prune()
	if !has() {
		t.Fatal("the key is gone as soon as it was replaced")
	}
	w.clock.elapse(broker.ForgetAfter + broker.SignGrace)
	w.prune()
	if !has() {
		t.Fatal("the key is gone while what it signed may live")
	}
	w.revoke(broker.LockNone, revocation.Identity(id("other"))) // the horizon moves with the log
	w.clock.elapse(broker.ForgetAfter + 1)
	w.prune()
	if has() {
		t.Error("the key stays for ever")
	}
}

// A key stays until the last token that it signed has expired, by elapsed time.
func TestPruneKeepsKeys(t *testing.T) {
	w := newWorld(t)
	old := w.public
	has := func() bool {
		for _, k := range w.b.Keys() {
			if k.ID == old.ID {
				return true
			}
		}
		return false
	}
	w.clock.elapse(10 * time.Hour)
	w.prune()
	if !has() {
		t.Fatal("the signing key is gone while it signs")
	}
	cred := w.issue(w.caller("payments"), "orders")
	w.newKey()
	w.clock.elapse(broker.ForgetAfter + broker.SignGrace)
	w.prune()
	w.restart()
	if !has() {
		t.Fatal("the key is gone while what it signed may live")
	}
	if v := w.verdict(cred.Token); v != revocation.Alive && v != revocation.BelowHorizon {
		t.Errorf("its token is %s", v)
	}
	w.revoke(broker.LockNone, revocation.Identity(id("other"))) // the head stays, whatever it is
	w.clock.elapse(broker.ForgetAfter + broker.SignGrace + 1)
	w.prune()
	if has() {
		t.Error("the key stays for ever")
	}
	w.restart()
	if has() {
		t.Error("the key is back after a restart")
	}
	w.issue(w.caller("payments"), "orders")
}

// Silent verifiers leave the roster one hard cap after they closed, grants thirty days
// after they expired.
func TestPruneRosterAndGrants(t *testing.T) {
	w := newWorld(t)
	cred := w.issue(w.caller("payments"), "orders")
	w.follow("orders", "instance-1", time.Second)
	rec := w.revoke(broker.LockQuarantine, revocation.Identity(id("payments")))
	w.clock.elapse(time.Second + broker.ForgetAfter)
	w.prune()
	if s := w.state(rec, "instance-1"); s != feed.Closed {
		t.Errorf("a silent verifier is %s", s)
	}
	w.clock.elapse(1)
	w.prune()
	if s := w.state(rec, "instance-1"); s != "not on the roster" {
		t.Errorf("long silent, it is %s", s)
	}
	w.restart()
	if s := w.state(rec, "instance-1"); s != "not on the roster" {
		t.Errorf("after a restart it is %s", s)
	}

	w.clock.advance(broker.GrantsKept)
	w.prune()
	if _, err := w.b.Grant(ctx, cred.Grant.ID()); err != nil {
		t.Errorf("gone too early: %v", err)
	}
	w.clock.advance(25 * time.Hour)
	w.prune()
	if _, err := w.b.Grant(ctx, cred.Grant.ID()); !errors.Is(err, broker.ErrNoSuchGrant) {
		t.Errorf("kept for ever: %v", err)
	}
}

// Whatever happens and however the wall clock is set, the horizon refuses no token that
// lives, and no revoked one is accepted, by a verifier that followed all along.
func TestHorizonRefusesNoLiveToken(t *testing.T) {
	w := newWorld(t)
	type issued struct {
		cred    *broker.Credential
		expires feed.Instant // by elapsed time, the leeway included
		revoked bool
	}
	follower := w.follow("verifier", "instance-1", time.Second)
	var view feed.View
	rapid.Check(t, func(rt *rapid.T) {
		var all []*issued
		n := 0
		rt.Repeat(map[string]func(*rapid.T){
			"issue": func(rt *rapid.T) {
				who := fmt.Sprintf("w%d", rapid.IntRange(0, 3).Draw(rt, "who"))
				ttl := time.Duration(rapid.IntRange(1, 3600).Draw(rt, "ttl")) * time.Second
				late := rapid.IntRange(0, 7).Draw(rt, "late") == 0
				w.store.set(func(s *tap) {
					s.beforeIssue = nil
					if late { // the commit comes long after the signing
						s.beforeIssue = func(*broker.Grant) error {
							w.store.set(func(s *tap) { s.beforeIssue = nil })
							n++
							w.revoke(broker.LockNone, revocation.Identity(id(fmt.Sprintf("nobody-%d", n))))
							w.clock.advance(30 * time.Minute)
							return nil
						}
					}
				})
				cred, err := w.b.Issue(ctx, w.caller(who), broker.Request{Audience: "orders", TTL: ttl})
				if err != nil {
					rt.Fatal(err)
				}
				left := cred.Grant.Expires.Sub(w.clock.Now())
				all = append(all, &issued{cred, w.clock.Boot().Add(left + token.Leeway), false})
			},
			"revoke": func(rt *rapid.T) {
				who := fmt.Sprintf("w%d", rapid.IntRange(0, 5).Draw(rt, "who"))
				w.revoke(broker.LockNone, revocation.Identity(id(who)))
				for _, i := range all {
					i.revoked = i.revoked || i.cred.Grant.Presenter() == id(who)
				}
			},
			"pass": func(rt *rapid.T) {
				w.clock.advance(time.Duration(rapid.IntRange(0, 2400).Draw(rt, "pause")) * time.Second)
			},
			"prune": func(rt *rapid.T) { w.prune() },
			"": func(rt *rapid.T) {
				drain(t, follower, &view)
				for _, i := range all {
					v := view.Judge(i.cred.Grant.Subject()).Reason
					switch {
					case i.revoked && v == revocation.Alive && w.clock.Boot() <= i.expires:
						rt.Fatalf("a revoked token of position %d is alive", i.cred.Grant.Position.Seq)
					case !i.revoked && v != revocation.Alive && w.clock.Boot() <= i.expires:
						rt.Fatalf("a live token of position %d is %s", i.cred.Grant.Position.Seq, v)
					}
				}
			},
		})
	})
}

// TestHoleOfOthers: a broker that was behind while another pruned their store learns the
// horizon with the hole that it explains, and so do those who follow it.
func TestHoleOfOthers(t *testing.T) {
	w := newWorld(t)
	behind := w.newBroker()
	if err := behind.Load(ctx); err != nil {
		t.Fatal(err)
	}
	w.revoke(broker.LockNone, revocation.Identity(id("gone")))
	last := w.revoke(broker.LockNone, revocation.Identity(id("last")))
	w.clock.elapse(broker.ForgetAfter + 1)
	w.prune()
	next := w.revoke(broker.LockNone, revocation.Identity(id("next")))
	if err := behind.ApplyUntil(ctx, next.Seq); err != nil {
		t.Fatal(err)
	}
	f, err := behind.Subscribe(ctx, w.caller("orders"), broker.Subscriber{Instance: "instance-1", Audiences: []string{"orders"}, MaxStaleness: time.Second})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	d, ok, _ := f.Next(100)
	if !ok || d.Horizon.Seq != last.Seq || d.Position.Seq != next.Seq {
		t.Errorf("delivered %+v, want the horizon %d with what is left up to %d", d, last.Seq, next.Seq)
	}
}

// TestPruneBehind: a broker that is behind drops nothing of what others appended meanwhile,
// though they moved the horizon past it.
func TestPruneBehind(t *testing.T) {
	w := newWorld(t)
	behind := w.newBroker()
	if err := behind.Load(ctx); err != nil {
		t.Fatal(err)
	}
	lock := w.revoke(broker.LockQuarantine, revocation.Identity(id("locked")))
	w.revoke(broker.LockNone, revocation.Identity(id("last")))
	w.clock.elapse(broker.ForgetAfter + 1)
	w.prune()
	if err := behind.Prune(ctx); err != nil {
		t.Fatal(err)
	}
	w.restart()
	if locks := w.b.Locks(); len(locks) != 1 || locks[0].Number != lock.Seq {
		t.Errorf("locks %+v, want %d", locks, lock.Seq)
	}
}
