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
