package broker_test

import (
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/revocation"
)

// TestForeignKeyBelowHorizon: whoever writes the store mints nothing, not even with a
// key record that a forged horizon has passed.
func TestForeignKeyBelowHorizon(t *testing.T) {
	w := newWorld(t)
	thief := newKey(t)
	record, public := w.vouched(thief, id("attacker"))
	w.stopBroker()
	add := func(e feed.Event) uint64 {
		rec, err := w.store.Append(ctx, func(feed.Position) (broker.Record, error) {
			return broker.Record{Event: e, Details: broker.Details{Time: w.clock.Now(), Actor: issuer}}, nil
		})
		if err != nil {
			t.Fatal(err)
		}
		return rec.Seq
	}
	add(feed.Event{Key: &record})
	last := add(feed.Event{Revocation: &feed.Revocation{Selectors: []revocation.Selector{revocation.Identity(id("x"))}}})
	if _, err := w.store.Prune(ctx, broker.Pruning{Horizon: last, Keep: func(broker.Record) bool { return true }}); err != nil {
		t.Fatal(err)
	}
	w.restart()
	if !w.b.KeyRevoked(public.ID) {
		t.Error("a key that no broker vouches for is not revoked")
	}
	var view feed.View
	f := w.follow("orders", "instance-new", time.Second)
	defer f.Close()
	drain(t, f, &view)
	for _, k := range view.Keys() {
		if k.ID == public.ID {
			t.Error("a new verifier would accept the thief's key")
		}
	}
}

// TestLiftOutlivesPruning: a lock's record that is kept for the key it revokes doesn't
// lock anew once its lift could be forgotten.
func TestLiftOutlivesPruning(t *testing.T) {
	w := newWorld(t)
	p := w.caller("payments")
	record, public := w.vouched(newKey(t), brokerID)
	if err := w.b.PublishKey(ctx, record); err != nil {
		t.Fatal(err)
	}
	r := w.revoke(broker.LockQuarantine, revocation.Identity(p.ID), revocation.Key(public.ID))
	if _, err := w.b.Lift(ctx, w.operator(), r.Seq, "r", ""); err != nil {
		t.Fatal(err)
	}
	w.revoke(broker.LockNone, revocation.Identity(id("last")))
	w.clock.elapse(broker.ForgetAfter + 1)
	w.prune()
	w.admitted(p, true, "after pruning")
	w.restart()
	w.admitted(p, true, "after pruning and a restart")
}

// TestRepeatAsksPolicy: an answer that is repeated for an idempotency key is decided
// anew.
func TestRepeatAsksPolicy(t *testing.T) {
	w := newWorld(t)
	c := w.caller("payments")
	req := broker.Request{Audience: "orders", IdempotencyKey: "key-1"}
	w.got(w.b.Issue(ctx, c, req))
	w.policy.set(func(broker.Question) (broker.Decision, error) { return broker.Decision{Reason: "no_entitlement"}, nil })
	_, err := w.b.Issue(ctx, c, req)
	refused(t, err, broker.ErrPolicyDenied)
}

// TestKeysUnchecked: a broker that knows no bundle yet revokes no key for it, publishes
// none and issues nothing; root can revoke all the same. Once it knows, the honest key
// lives on and the thief's is revoked.
func TestKeysUnchecked(t *testing.T) {
	w := newWorld(t)
	thief := newKey(t)
	record, foreign := w.vouched(thief, id("attacker"))
	w.stop()
	w.startUnchecked()
	rec, err := w.store.Append(ctx, func(feed.Position) (broker.Record, error) {
		return broker.Record{Event: feed.Event{Key: &record}, Details: broker.Details{Time: w.clock.Now(), Actor: issuer}}, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	w.awaitHead(rec.Seq)
	head := rec.Seq

	if keys := w.b.Keys(); len(keys) != 0 || w.b.KeyRevoked(w.public.ID) || w.b.KeyRevoked(foreign.ID) {
		t.Errorf("published %v; revoked: own %t, foreign %t", keys, w.b.KeyRevoked(w.public.ID), w.b.KeyRevoked(foreign.ID))
	}
	_, err = w.b.Issue(ctx, w.caller("payments"), broker.Request{Audience: "orders"})
	refused(t, err, broker.ErrNoSigningKey)
	root := broker.Caller{Local: "break-glass:uid=0"}
	r, err := w.b.Revoke(ctx, root, broker.Revoke{Selectors: []revocation.Selector{revocation.Identity(id("taken"))}, Reason: "r"})
	if err != nil || r.Seq != head+1 {
		t.Fatalf("revoked %+v, %v", r, err)
	}
	w.clock.elapse(broker.ForgetAfter + 1)
	w.prune()

	for range 2 {
		if err := w.b.CheckKeys(ctx); err != nil {
			t.Fatal(err)
		}
		if keys := w.b.Keys(); len(keys) != 1 || keys[0].ID != w.public.ID || !w.b.KeyRevoked(foreign.ID) || w.b.Head().Seq != head+2 {
			t.Errorf("published %v; foreign revoked %t; head %d, want %d", keys, w.b.KeyRevoked(foreign.ID), w.b.Head().Seq, head+2)
		}
	}
	honest := w.issue(w.caller("payments"), "orders")
	w.restart()
	if v := w.verdict(honest.Token); v != revocation.Alive {
		t.Errorf("the honest token is %s", v)
	}
	if _, err := w.b.Revocation(r.Seq); err != nil {
		t.Errorf("the later start lost the revocation: %v", err)
	}
	_, err = w.b.Issue(ctx, w.caller("taken"), broker.Request{Audience: "orders"})
	refused(t, err, broker.ErrLocked)
}
