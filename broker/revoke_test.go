package broker_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk/spiffetest"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func selector(t *testing.T, text string) revocation.Selector {
	t.Helper()
	s, err := revocation.Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// asks reports whether an identity with an SVID gets a credential now.
func (w *world) asks(c broker.Caller) error {
	cred, err := w.b.Issue(ctx, c, broker.Request{Audience: "orders"})
	if err == nil {
		w.got(cred, err)
	}
	return err
}

func (w *world) admitted(c broker.Caller, want bool, what string) {
	w.t.Helper()
	err := w.asks(c)
	if want && err != nil || !want && !errors.Is(err, broker.ErrLocked) {
		w.t.Errorf("%s: %s gets %v, want admitted %t", what, c.ID, err, want)
	}
}

// A caller gets a credential only if every lock that stands admits it.
func TestEveryLockMustAdmit(t *testing.T) {
	prod := id("ns/prod/sa/web")
	old := func(w *world) broker.Caller { return w.callerWith(prod, spiffeOptions) }
	fresh := func(w *world) broker.Caller { // issued well after every cut
		return w.callerWith(prod, spiffetest.SVIDOptions{NotBefore: w.clock.Now().Add(time.Hour), NotAfter: w.clock.Now().Add(2 * time.Hour)})
	}
	type lock struct {
		mode     broker.LockMode
		selector string
	}
	for _, tc := range []struct {
		name       string
		locks      []lock
		old, fresh bool
	}{
		{"none", []lock{{broker.LockNone, "identity:" + prod.String()}}, true, true},
		{"quarantine", []lock{{broker.LockQuarantine, "identity:" + prod.String()}}, false, false},
		{"reissue", []lock{{broker.LockReissue, "identity:" + prod.String()}}, false, true},
		{"quarantine, then none", []lock{{broker.LockQuarantine, "identity:" + prod.String()}, {broker.LockNone, "identity:" + prod.String()}}, false, false},
		{"quarantine, then reissue", []lock{{broker.LockQuarantine, "identity:" + prod.String()}, {broker.LockReissue, "identity:" + prod.String()}}, false, false},
		{"reissue, then none", []lock{{broker.LockReissue, "identity:" + prod.String()}, {broker.LockNone, "identity:" + prod.String()}}, false, true},
		{"reissue of another", []lock{{broker.LockReissue, "identity:" + id("other").String()}}, true, true},
		{"subtree", []lock{{broker.LockQuarantine, "subtree:spiffe://example.org/ns/prod/*"}}, false, false},
		{"subtree, reissue", []lock{{broker.LockReissue, "subtree:spiffe://example.org/ns/prod/*"}}, false, true},
		{"half a segment", []lock{{broker.LockQuarantine, "subtree:spiffe://example.org/ns/pro/*"}}, true, true},
		{"the subtree's own name", []lock{{broker.LockQuarantine, "subtree:spiffe://example.org/ns/prod/sa/web/*"}}, true, true},
		{"subtree quarantine and identity reissue", []lock{{broker.LockQuarantine, "subtree:spiffe://example.org/ns/*"}, {broker.LockReissue, "identity:" + prod.String()}}, false, false},
		{"the trust domain", []lock{{broker.LockQuarantine, "trust_domain:example.org"}}, false, false},
		{"another trust domain", []lock{{broker.LockQuarantine, "trust_domain:example.com"}}, true, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t)
			for _, l := range tc.locks {
				w.revoke(l.mode, selector(t, l.selector))
			}
			for range 2 { // the same after a restart
				w.admitted(old(w), tc.old, "an old SVID")
				w.admitted(fresh(w), tc.fresh, "a fresh SVID")
				w.restart()
			}
		})
	}
}

// A lock on one SVID stops that SVID, whatever the mode, and not its siblings, until it
// has expired.
func TestLockOnSVID(t *testing.T) {
	for _, mode := range []broker.LockMode{broker.LockQuarantine, broker.LockReissue} {
		t.Run(string(mode), func(t *testing.T) {
			w := newWorld(t)
			stolen, sibling := w.caller("payments"), w.caller("payments")
			w.admitted(stolen, true, "before")
			rec := w.revoke(mode, revocation.SVID(token.ThumbprintOf(stolen.Leaf)))
			w.admitted(stolen, false, "the stolen one")
			w.admitted(sibling, true, "its sibling")
			if got := rec.Details.SVIDExpires[token.ThumbprintOf(stolen.Leaf).String()]; !got.Equal(stolen.Leaf.NotAfter) {
				t.Errorf("the lock stands until %s, the SVID until %s", got, stolen.Leaf.NotAfter)
			}
			w.restart()
			w.admitted(stolen, false, "after a restart")
		})
	}
}

// An end that was given for an identity doesn't free a stolen SVID in the same record;
// the SVID's own expiry ends that part, and with it the lock.
func TestLockOnSVIDOutlivesTheEnd(t *testing.T) {
	w := newWorld(t)
	stolen, other := w.caller("payments"), w.caller("web")
	w.admitted(stolen, true, "before") // seen, so its expiry is known
	rec, err := w.b.Revoke(ctx, w.operator(), broker.Revoke{
		Selectors: []revocation.Selector{revocation.SVID(token.ThumbprintOf(stolen.Leaf)), revocation.Identity(other.ID)},
		Reason:    "r", LockEnds: noon.Add(time.Minute),
	})
	if err != nil {
		t.Fatal(err)
	}
	w.admitted(other, false, "before the end")
	w.clock.advance(time.Minute)
	for range 2 {
		w.admitted(other, true, "at the end")
		w.admitted(stolen, false, "at the end")
		if locks := w.b.Locks(); len(locks) != 1 || locks[0].Number != rec.Seq || !locks[0].End().Equal(stolen.Leaf.NotAfter) {
			t.Errorf("standing: %+v", locks)
		}
		w.restart()
	}
	w.clock.advance(stolen.Leaf.NotAfter.Sub(w.clock.Now()) + time.Second)
	if locks := w.b.Locks(); len(locks) != 0 {
		t.Errorf("the SVID has expired, and there stand %+v", locks)
	}
	_, err = w.b.Lift(ctx, w.operator(), rec.Seq, "r", "")
	if refused(t, err, broker.ErrNotStanding); !strings.Contains(err.Error(), "ended by itself at "+stolen.Leaf.NotAfter.UTC().Format(time.RFC3339)) {
		t.Error(err)
	}
}

// Where nobody knows when an SVID expires its lock stands until it is lifted, over
// restarts and prunings.
func TestLockOnUnknownSVID(t *testing.T) {
	w := newWorld(t)
	stolen := w.callerWith(id("payments"), spiffetest.SVIDOptions{NotAfter: noon.Add(90 * 24 * time.Hour)})
	rec := w.revoke("", revocation.SVID(token.ThumbprintOf(stolen.Leaf)))
	if len(rec.Details.SVIDExpires) != 0 {
		t.Errorf("the expiry of an SVID that was never seen: %v", rec.Details.SVIDExpires)
	}
	w.clock.advance(60 * 24 * time.Hour)
	if err := w.b.Prune(ctx); err != nil {
		t.Fatal(err)
	}
	w.restart()
	w.admitted(stolen, false, "two months later")
	if locks := w.b.Locks(); len(locks) != 1 || !locks[0].End().IsZero() {
		t.Errorf("standing: %+v", locks)
	}
	if _, err := w.b.Lift(ctx, w.operator(), rec.Seq, "r", ""); err != nil {
		t.Fatal(err)
	}
	w.admitted(stolen, true, "lifted")
}

// A lock's end ends the lock and nothing else.
func TestLockEnds(t *testing.T) {
	w := newWorld(t)
	c := w.caller("payments")
	before := w.issue(c, "orders")
	rec, err := w.b.Revoke(ctx, w.operator(), broker.Revoke{
		Selectors: []revocation.Selector{revocation.Identity(c.ID)}, Reason: "r", LockEnds: noon.Add(time.Minute),
	})
	if err != nil {
		t.Fatal(err)
	}
	w.admitted(c, false, "before its end")
	_, err = w.b.Issue(ctx, c, broker.Request{Audience: "orders"})
	if r := refused(t, err, broker.ErrLocked); !strings.Contains(r.Hint, fmt.Sprintf("dayfly lift %d ", rec.Seq)) {
		t.Errorf("the hint is %q", r.Hint)
	}
	if n := len(w.b.Locks()); n != 1 {
		t.Errorf("%d locks stand", n)
	}
	w.clock.advance(time.Minute)
	w.admitted(c, true, "at its end")
	if n := len(w.b.Locks()); n != 0 {
		t.Errorf("%d locks stand after the end", n)
	}
	if v := w.verdict(before.Token); v != revocation.Revoked {
		t.Errorf("the end of a lock revived a token: %s", v)
	}
}

// The cut of a reissue lock is the latest of our clock, the newest NotBefore that was
// seen of whom it locks, and the time of any record, plus the skew.
func TestReissueCut(t *testing.T) {
	dated := func(w *world, path string, notBefore time.Time) broker.Caller {
		return w.callerWith(id(path), spiffetest.SVIDOptions{NotBefore: notBefore, NotAfter: notBefore.Add(3 * time.Hour)})
	}
	t.Run("our clock", func(t *testing.T) {
		w := newWorld(t)
		w.revoke(broker.LockReissue, revocation.Identity(id("payments")))
		cut := noon.Add(broker.ClockSkew)
		w.admitted(dated(w, "payments", cut), false, "at the cut")
		w.admitted(dated(w, "payments", cut.Add(time.Second)), true, "after the cut")
	})
	t.Run("the SVID issuer's clock is ahead", func(t *testing.T) {
		w := newWorld(t)
		ahead := noon.Add(20 * time.Minute)
		w.admitted(dated(w, "payments", ahead), true, "before")
		w.admitted(dated(w, "other", ahead.Add(time.Hour)), true, "another identity")
		rec := w.revoke(broker.LockReissue, revocation.Identity(id("payments")))
		if want := ahead.Add(broker.ClockSkew); !rec.Details.LockCut.Equal(want) {
			t.Errorf("cut %s, want %s", rec.Details.LockCut, want)
		}
		w.admitted(dated(w, "payments", ahead), false, "the SVID from before")
		w.admitted(dated(w, "payments", ahead.Add(broker.ClockSkew+time.Second)), true, "a new one")
	})
	t.Run("our clock was set back", func(t *testing.T) {
		w := newWorld(t)
		w.clock.set(time.Hour)
		w.revoke(broker.LockNone, revocation.Identity(id("other")))
		w.clock.set(-time.Hour)
		if !w.b.ClockOff() {
			t.Error("a clock behind the newest record goes unnoticed")
		}
		// As every start does, whose key is a record of its own.
		w.revoke(broker.LockNone, revocation.Identity(id("other")))
		if !w.b.ClockOff() {
			t.Error("a record of the clock that was set back hides the one before")
		}
		rec := w.revoke(broker.LockReissue, revocation.Identity(id("payments")))
		if want := noon.Add(time.Hour + broker.ClockSkew); !rec.Details.LockCut.Equal(want) {
			t.Errorf("cut %s, want %s", rec.Details.LockCut, want)
		}
	})
	t.Run("our clock was set back, and we began anew", func(t *testing.T) {
		w := newWorld(t)
		w.clock.set(time.Hour)
		issued := w.clock.Now()
		stolen := dated(w, "payments", issued)
		w.issue(stolen, "orders")
		w.issue(dated(w, "other", issued), "orders")
		w.clock.set(-time.Hour)
		w.restart()
		rec := w.revoke(broker.LockReissue, revocation.Identity(id("payments")))
		if want := issued.Add(broker.ClockSkew); !rec.Details.LockCut.Equal(want) {
			t.Errorf("cut %s, want %s: when the last credential was issued, and the skew", rec.Details.LockCut, want)
		}
		w.clock.set(time.Hour) // as NTP does at last
		w.admitted(stolen, false, "the SVID from before")
		w.admitted(dated(w, "payments", issued.Add(broker.ClockSkew+time.Second)), true, "a new one")
		if rec := w.revoke(broker.LockReissue, revocation.Identity(id("nobody"))); rec.Details.LockCut.After(w.clock.Now().Add(broker.ClockSkew)) {
			t.Errorf("an identity without any has the cut %s", rec.Details.LockCut)
		}
	})
	t.Run("a subtree", func(t *testing.T) {
		w := newWorld(t)
		ahead := noon.Add(20 * time.Minute)
		w.admitted(dated(w, "ns/prod/web", ahead), true, "before")
		rec := w.revoke(broker.LockReissue, selector(t, "subtree:spiffe://example.org/ns/prod/*"))
		if want := ahead.Add(broker.ClockSkew); !rec.Details.LockCut.Equal(want) {
			t.Errorf("cut %s, want %s", rec.Details.LockCut, want)
		}
		err := w.asks(dated(w, "ns/prod/web", ahead))
		if r := refused(t, err, broker.ErrLocked); r.Metadata["cut"] == "" || r.Metadata["mode"] != "reissue" || !strings.Contains(r.Hint, "rotate") {
			t.Errorf("the refusal doesn't say what heals: %+v", r)
		}
	})
}

// A lift ends one lock, by its number; nothing issued before revives.
func TestLiftRevivesNothing(t *testing.T) {
	w := newWorld(t)
	c := w.caller("payments")
	w.policy.names[id("orders")] = "orders"
	before := w.issue(c, "orders")
	derived := w.exchange(w.caller("orders"), before.Token, "ledger")
	first := w.revoke(broker.LockQuarantine, revocation.Identity(c.ID))
	second := w.revoke(broker.LockQuarantine, revocation.Identity(c.ID))

	lift := func(number uint64, reason string) (broker.Record, error) {
		return w.b.Lift(ctx, w.operator(), number, reason, "")
	}
	for _, number := range []uint64{0, 1, second.Seq + 1, 1 << 62} {
		_, err := lift(number, "r")
		refused(t, err, broker.ErrNotStanding)
	}
	_, err := lift(first.Seq, "")
	refused(t, err, broker.ErrReasonRequired)
	rec, err := lift(first.Seq, "the first incident is over")
	if err != nil {
		t.Fatal(err)
	}
	if e := w.last(); e.Action != broker.ActionLift || e.Sequence != first.Seq || e.Why != "the first incident is over" || e.Outcome != "allowed" {
		t.Errorf("audit: %+v", e)
	}
	_, err = lift(first.Seq, "again")
	refused(t, err, broker.ErrNotStanding)
	if want := fmt.Sprintf("lifted already: number %d, by %s at %s", rec.Seq, w.operator().Actor(), noon.Format(time.RFC3339)); !strings.Contains(err.Error(), want) {
		t.Errorf("%v, without %q", err, want)
	}
	_, err = lift(w.revoke(broker.LockNone, selector(t, "audience:orders")).Seq, "nothing to lift")
	if refused(t, err, broker.ErrNotStanding); !strings.Contains(err.Error(), "locked nobody") {
		t.Error(err)
	}
	w.admitted(c, false, "after the lift of the first of two locks")
	w.restart()
	w.admitted(c, false, "after a restart")
	if locks := w.b.Locks(); len(locks) != 1 || locks[0].Number != second.Seq {
		t.Errorf("standing: %+v", locks)
	}
	if _, err := lift(second.Seq, "r"); err != nil {
		t.Fatal(err)
	}
	w.admitted(c, true, "after both lifts")
	dead := func(when string) {
		t.Helper()
		for name, cred := range map[string]*broker.Credential{"root": before, "derived": derived} {
			if v := w.verdict(cred.Token); v != revocation.Revoked {
				t.Errorf("%s, the %s token is %s", when, name, v)
			}
		}
		_, err := w.b.Exchange(ctx, w.caller("orders"), broker.Request{Audience: "ledger", Subject: before.Token})
		refused(t, err, broker.ErrSubjectRevoked)
	}
	dead("after the lifts")
	w.restart()
	dead("after the lifts and a restart")
	w.admitted(c, true, "after the lifts and a restart")

	got, err := w.b.Revocation(first.Seq)
	if err != nil || got.Lift == nil || got.Lift.Seq != rec.Seq || got.Lift.Details.Reason != "the first incident is over" {
		t.Errorf("the record of the lift: %+v, %v", got.Lift, err)
	}
	if _, err := w.b.Revocation(rec.Seq); !errors.Is(err, broker.ErrNoSuchRevocation) {
		t.Errorf("a lift is no revocation: %v", err)
	}
}

// Retried calls find the record they made, also in another process; a key is one
// request's.
func TestIdempotentRevoke(t *testing.T) {
	w := newWorld(t)
	op := w.operator()
	req := broker.Revoke{Selectors: []revocation.Selector{revocation.Identity(id("payments"))}, Reason: "r", IdempotencyKey: "key-1"}
	first, err := w.b.Revoke(ctx, op, req)
	if err != nil {
		t.Fatal(err)
	}
	same := func(when string) {
		t.Helper()
		again, err := w.b.Revoke(ctx, op, req)
		if err != nil || again.Seq != first.Seq {
			t.Errorf("%s: record %d, %v; want %d", when, again.Seq, err, first.Seq)
		}
	}
	same("at once")
	w.restart()
	same("after a restart")

	for name, change := range map[string]func(*broker.Revoke){
		"other selectors": func(r *broker.Revoke) { r.Selectors = []revocation.Selector{revocation.Identity(id("other"))} },
		"another lock":    func(r *broker.Revoke) { r.Lock = broker.LockNone },
		"another end":     func(r *broker.Revoke) { r.LockEnds = noon.Add(time.Hour) },
	} {
		other := req
		change(&other)
		if _, err := w.b.Revoke(ctx, op, other); !errors.Is(err, broker.ErrIdempotencyReused) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := w.b.Lift(ctx, op, first.Seq, "r", "key-1"); !errors.Is(err, broker.ErrIdempotencyReused) {
		t.Errorf("a lift with the key of a revocation: %v", err)
	}
	if rec, err := w.b.Revoke(ctx, w.caller("second-operator"), req); err != nil || rec.Seq == first.Seq {
		t.Errorf("another operator's same key: record %d, %v", rec.Seq, err)
	}

	lifted, err := w.b.Lift(ctx, op, first.Seq, "r", "key-2")
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if again, err := w.b.Lift(ctx, op, first.Seq, "r", "key-2"); err != nil || again.Seq != lifted.Seq {
			t.Errorf("a retried lift: %d, %v", again.Seq, err)
		}
		w.restart()
	}
	if _, err := w.b.Lift(ctx, op, first.Seq+1, "r", "key-2"); !errors.Is(err, broker.ErrIdempotencyReused) {
		t.Errorf("the key with another lock: %v", err)
	}

	// Many at once make one record.
	head := w.b.Head().Seq
	req.IdempotencyKey = "key-3"
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			if rec, err := w.b.Revoke(ctx, op, req); err != nil || rec.Seq != head+1 {
				t.Errorf("record %d, %v", rec.Seq, err)
			}
		})
	}
	wg.Wait()
	var lifts, refusals int
	var mu sync.Mutex
	for range 16 {
		wg.Go(func() {
			_, err := w.b.Lift(ctx, op, head+1, "r", "")
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err == nil:
				lifts++
			case errors.Is(err, broker.ErrNotStanding):
				refusals++
			default:
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if lifts != 1 || refusals != 15 || w.b.Head().Seq != head+2 {
		t.Errorf("%d lifts, %d refusals, head %d", lifts, refusals, w.b.Head().Seq)
	}
}

// A caller that gives up while its record waits doesn't wait for ever, and its retry
// finds the record.
func TestRevokeGivesUp(t *testing.T) {
	w := newWorld(t)
	op := w.operator()
	enter, leave := make(chan struct{}), make(chan struct{})
	w.store.set(func(s *tap) {
		s.beforeAppend = func() error { close(enter); <-leave; return nil }
	})
	req := broker.Revoke{Selectors: []revocation.Selector{revocation.Identity(id("payments"))}, Reason: "r", IdempotencyKey: "key-1"}
	short, cancel := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() { _, err := w.b.Revoke(short, op, req); done <- err }()
	<-enter
	cancel()
	select {
	case err := <-done:
		if !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
	case <-time.After(30 * time.Second):
		t.Fatal("the call still waits")
	}
	w.store.set(func(s *tap) { s.beforeAppend = nil })
	head := w.b.Head().Seq
	close(leave)
	rec, err := w.b.Revoke(ctx, op, req)
	if err != nil || rec.Seq != head+1 || w.b.Head().Seq != head+1 {
		t.Errorf("the retry: record %d, %v; head %d", rec.Seq, err, w.b.Head().Seq)
	}
}

func TestMalformedRevocations(t *testing.T) {
	w := newWorld(t)
	payments := revocation.Identity(id("payments"))
	many := slices.Repeat([]revocation.Selector{payments}, broker.MaxSelectors+1)
	audience := selector(t, "audience:orders")
	head := w.b.Head()
	for _, tc := range []struct {
		name string
		req  broker.Revoke
		want *broker.Refusal
	}{
		{"no selectors", broker.Revoke{Reason: "r"}, broker.ErrInvalidRequest},
		{"an empty selector", broker.Revoke{Selectors: []revocation.Selector{payments, {}}, Reason: "r"}, broker.ErrInvalidRequest},
		{"too many selectors", broker.Revoke{Selectors: many, Reason: "r"}, broker.ErrInvalidRequest},
		{"no reason", broker.Revoke{Selectors: many[:1]}, broker.ErrReasonRequired},
		{"a blank reason", broker.Revoke{Selectors: many[:1], Reason: " \t\n"}, broker.ErrReasonRequired},
		{"a long reason", broker.Revoke{Selectors: many[:1], Reason: strings.Repeat("é", broker.MaxReason+1)}, broker.ErrReasonRequired},
		{"a reason that is no text", broker.Revoke{Selectors: many[:1], Reason: "\xff\xfe"}, broker.ErrReasonRequired},
		{"everything, without its flag", broker.Revoke{Selectors: []revocation.Selector{revocation.Everything()}, Reason: "r"}, broker.ErrEverythingUnflagged},
		{"everything, hidden", broker.Revoke{Selectors: []revocation.Selector{payments, revocation.Everything()}, Reason: "r"}, broker.ErrEverythingUnflagged},
		{"an unknown lock", broker.Revoke{Selectors: many[:1], Reason: "r", Lock: "jail"}, broker.ErrInvalidRequest},
		{"a lock on an audience", broker.Revoke{Selectors: []revocation.Selector{audience}, Reason: "r", Lock: broker.LockQuarantine}, broker.ErrInvalidRequest},
		{"an end in the past", broker.Revoke{Selectors: many[:1], Reason: "r", LockEnds: noon}, broker.ErrInvalidRequest},
		{"an end of a lock on an SVID alone", broker.Revoke{Selectors: []revocation.Selector{revocation.SVID(token.Thumbprint{1})}, Reason: "r", LockEnds: noon.Add(time.Hour)}, broker.ErrInvalidRequest},
		{"an end without a lock", broker.Revoke{Selectors: many[:1], Reason: "r", Lock: broker.LockNone, LockEnds: noon.Add(time.Hour)}, broker.ErrInvalidRequest},
		{"a huge key", broker.Revoke{Selectors: many[:1], Reason: "r", IdempotencyKey: strings.Repeat("k", broker.MaxKeyLength+1)}, broker.ErrInvalidRequest},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := w.b.Revoke(ctx, w.operator(), tc.req)
			refused(t, err, tc.want)
			if e := w.last(); e.Outcome != "refused" || len(e.Why) > broker.MaxReason {
				t.Errorf("audit: %+v", e)
			}
		})
	}
	if w.b.Head() != head {
		t.Error("something was recorded")
	}
	_, err := w.b.Lift(ctx, w.operator(), 1, "r", strings.Repeat("k", broker.MaxKeyLength+1))
	refused(t, err, broker.ErrInvalidRequest)

	// The longest that is allowed.
	_, err = w.b.Revoke(ctx, w.operator(), broker.Revoke{
		Selectors: many[:broker.MaxSelectors], Reason: strings.Repeat("é", broker.MaxReason), IdempotencyKey: strings.Repeat("k", broker.MaxKeyLength),
	})
	if err != nil {
		t.Error(err)
	}
	// What matches nothing is recorded all the same: it may match what is issued elsewhere.
	rec := w.revoke("", audience)
	if rec.Details.Lock != broker.LockNone {
		t.Errorf("an audience is locked: %q", rec.Details.Lock)
	}
}

// "everything" is its own question to policy.
func TestEverything(t *testing.T) {
	w := newWorld(t)
	cred := w.issue(w.caller("payments"), "orders")
	req := broker.Revoke{Selectors: []revocation.Selector{revocation.Everything()}, Reason: "r", AllowEverything: true}
	w.policy.set(func(q broker.Question) (broker.Decision, error) {
		return broker.Decision{Allow: q.Action != broker.ActionRevokeEverything}, nil
	})
	_, err := w.b.Revoke(ctx, w.operator(), req)
	refused(t, err, broker.ErrPolicyDenied)
	if e := w.last(); e.Action != broker.ActionRevokeEverything {
		t.Errorf("audit: %+v", e)
	}
	w.policy.set(nil)
	head := w.b.Head()
	first := w.pending(w.b.Revoke(ctx, w.operator(), req))
	if v := w.verdict(cred.Token); v != revocation.Alive || w.b.Head() != head {
		t.Errorf("proposed, and the token is %s", v)
	}
	if _, err := w.b.Revoke(ctx, w.caller("second-operator"), req); err != nil {
		t.Fatal(err)
	}
	if v := w.verdict(cred.Token); v != revocation.Revoked {
		t.Errorf("the token is %s", v)
	}
	if want := noon.Add(15 * time.Minute); !first.Ends.Equal(want) {
		t.Errorf("it would have waited until %s, want %s", first.Ends, want)
	}
}

// Without an operator's right nothing is revoked, lifted or listed, and the attempt is
// on record.
func TestOperatorsNeedPolicy(t *testing.T) {
	w := newWorld(t)
	rec := w.revoke(broker.LockQuarantine, revocation.Identity(id("payments")))
	w.policy.set(func(broker.Question) (broker.Decision, error) { return broker.Decision{}, nil })
	c := w.caller("nobody")
	_, err := w.b.Revoke(ctx, c, broker.Revoke{Selectors: []revocation.Selector{revocation.Identity(id("x"))}, Reason: "r"})
	refused(t, err, broker.ErrPolicyDenied)
	_, err = w.b.Lift(ctx, c, rec.Seq, "r", "")
	refused(t, err, broker.ErrPolicyDenied)
	_, absent := w.b.Lift(ctx, c, 999, "r", "")
	refused(t, absent, broker.ErrPolicyDenied) // a stranger can't tell an absent lock from a standing one
	refused(t, w.b.May(ctx, c, broker.ActionList), broker.ErrPolicyDenied)
	if e := w.last(); e.Action != broker.ActionList || e.Actor != c.ID.String() || e.Outcome != "refused" {
		t.Errorf("audit: %+v", e)
	}
}

// The dry run: what would die, whom it reaches, and what stands already.
func TestPlan(t *testing.T) {
	w := newWorld(t)
	w.policy.names[id("orders")] = "orders"
	w.policy.audiences["orders"] = broker.Audience{Name: "orders", Owner: "team-o", VerifiedBy: "feed"}
	root := w.issue(w.caller("payments"), "orders")
	w.exchange(w.caller("orders"), root.Token, "sts")
	w.issue(w.caller("other"), "orders")
	dead := w.issue(w.caller("payments"), "orders")
	w.revoke(broker.LockNone, revocation.Grant(dead.Grant.ID()))
	lock := w.revoke(broker.LockQuarantine, revocation.Identity(id("somebody")))

	sel := revocation.Identity(id("payments"))
	head := w.b.Head()
	p, err := w.b.Plan(ctx, []revocation.Selector{sel, revocation.Identity(id("somebody"))}, netip.Addr{})
	if err != nil {
		t.Fatal(err)
	}
	if p.Live != 2 || p.Derived != 1 || w.b.Head() != head {
		t.Errorf("live %d, derived %d", p.Live, p.Derived)
	}
	if len(p.Identities) != 2 || p.Identities[0] != (broker.PlannedIdentity{ID: id("orders"), Presents: 1}) || p.Identities[1] != (broker.PlannedIdentity{ID: id("payments"), Presents: 1, Derives: 1}) {
		t.Errorf("identities %+v", p.Identities)
	}
	if len(p.Audiences) != 2 || p.Audiences[0].Audience.Owner != "team-o" || p.Audiences[1].Audience.VerifiedBy != "external" || !p.Audiences[1].LastExpiry.Equal(root.Grant.Expires) {
		t.Errorf("audiences %+v", p.Audiences)
	}
	if len(p.Standing) != 1 || p.Standing[0].Number != lock.Seq {
		t.Errorf("standing %+v", p.Standing)
	}
	if p, err := w.b.Plan(ctx, []revocation.Selector{revocation.Identity(id("nobody"))}, netip.Addr{}); err != nil || p.Live != 0 {
		t.Errorf("a selector that matches nothing: %+v, %v", p, err)
	}
	_, err = w.b.Plan(ctx, nil, netip.Addr{})
	refused(t, err, broker.ErrInvalidRequest)

	// After the revocation the external audience is named.
	rec := w.revoke(broker.LockNone, sel)
	r, err := w.b.Revocation(rec.Seq)
	if err != nil {
		t.Fatal(err)
	}
	external, err := w.b.External(ctx, r)
	if err != nil || len(external) != 1 || external[0].Audience.Name != "sts" {
		t.Errorf("external %+v, %v", external, err)
	}
}

// What a stolen key signed is on no record: a plan proposes nothing narrower than the key,
// and every audience outside the feed may accept it for a while, whatever is live.
func TestKeyReachesUnrecorded(t *testing.T) {
	w := newWorld(t)
	for name, by := range map[string]string{"orders": broker.VerifiedByFeed, "sts": broker.VerifiedByExternal, "api": broker.VerifiedByIntrospection} {
		w.policy.audiences[name] = broker.Audience{Name: name, VerifiedBy: by}
	}
	g := w.issue(w.caller("payments"), "orders").Grant
	key := revocation.Key(g.Lineage[0].Key)
	for _, selectors := range [][]revocation.Selector{{key}, {revocation.Everything()}, {revocation.Identity(id("payments")), key}} {
		p, err := w.b.Plan(ctx, selectors, netip.Addr{})
		if err != nil || p.Live != 1 || len(p.Narrower) > 0 {
			t.Errorf("plan of %v: %+v, %v", selectors, p, err)
		}
	}
	external := func(selector revocation.Selector) func() []broker.PlannedAudience {
		r, err := w.b.Revocation(w.revoke(broker.LockNone, selector).Seq)
		if err != nil {
			t.Fatal(err)
		}
		return func() []broker.PlannedAudience {
			out, err := w.b.External(ctx, r)
			if err != nil {
				t.Fatal(err)
			}
			return out
		}
	}
	ofGrant, ofKey := external(revocation.Grant(g.ID())), external(key)
	if got := ofGrant(); len(got) > 0 {
		t.Errorf("a grant for a verifier of the feed reaches %+v", got)
	}
	until := w.clock.Now().Add(token.MaxTTL + token.Leeway)
	if got := ofKey(); len(got) != 1 || got[0].Audience.Name != "sts" || !got[0].LastExpiry.Equal(until) {
		t.Errorf("a key reaches %+v, not sts until %s", got, until)
	}
	w.clock.advance(token.MaxTTL + token.Leeway)
	if got := ofKey(); len(got) > 0 {
		t.Errorf("after that a key reaches %+v", got)
	}
}

// Lists of grants and revocations, with what narrows them.
func TestLists(t *testing.T) {
	w := newWorld(t)
	w.policy.names[id("orders")] = "orders"
	root := w.issue(w.caller("payments"), "orders")
	child := w.exchange(w.caller("orders"), root.Token, "ledger")
	w.issue(w.caller("other"), "orders")
	for _, tc := range []struct {
		name   string
		filter broker.GrantFilter
		want   int
	}{
		{"all", broker.GrantFilter{}, 3},
		{"a presenter's", broker.GrantFilter{Presenter: id("orders")}, 1},
		{"derived from", broker.GrantFilter{DerivedFrom: revocation.Identity(id("payments"))}, 2},
		{"to an audience", broker.GrantFilter{Audience: "ledger"}, 1},
		{"both", broker.GrantFilter{Presenter: spiffeid.ID{}, DerivedFrom: revocation.Identity(id("other")), Audience: "ledger"}, 0},
	} {
		var got int
		for page := ""; ; {
			grants, next, err := w.b.Grants(ctx, tc.filter, 1, page)
			if err != nil {
				t.Fatal(err)
			}
			got += len(grants)
			if page = next; next == "" {
				break
			}
		}
		if got != tc.want {
			t.Errorf("%s: %d grants, want %d", tc.name, got, tc.want)
		}
	}
	_, _, err := w.b.Grants(ctx, broker.GrantFilter{}, 1, "!")
	refused(t, err, broker.ErrBadPageToken)
	_, err = w.b.Grant(ctx, token.GrantID{})
	refused(t, err, broker.ErrNoSuchGrant)
	w.clock.advance(broker.DefaultTTL)
	if grants, _, err := w.b.Grants(ctx, broker.GrantFilter{}, 10, ""); err != nil || len(grants) != 0 {
		t.Errorf("expired grants are listed: %d, %v", len(grants), err)
	}
	if grants, _, err := w.b.Grants(ctx, broker.GrantFilter{IncludeExpired: true}, 10, ""); err != nil || len(grants) != 3 {
		t.Errorf("with expired ones: %d, %v", len(grants), err)
	}
	if s, _ := w.b.GrantState(child.Grant); s != broker.GrantExpired {
		t.Errorf("state %s", s)
	}
	a, b := w.revoke(broker.LockNone, revocation.Identity(id("x"))), w.revoke(broker.LockNone, revocation.Identity(id("y")))
	if got := w.b.Revocations(0, 10, false); len(got) != 2 || got[0].Seq != b.Seq || got[1].Seq != a.Seq {
		t.Errorf("revocations %+v", got)
	}
	if got := w.b.Revocations(b.Seq, 10, false); len(got) != 1 || got[0].Seq != a.Seq {
		t.Errorf("below the newest: %+v", got)
	}
}
