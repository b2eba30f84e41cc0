package broker_test

import (
	"crypto/rand"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
)

// introspected checks what a caller is told of a token, and what the audit says.
func (w *world) introspected(c broker.Caller, secret token.Secret, active bool, outcome, reason string) {
	w.t.Helper()
	got, err := w.b.Introspect(ctx, c, secret)
	if err != nil {
		w.t.Fatalf("introspecting, for %q: %v", reason, err)
	}
	if got.Active() != active {
		w.t.Errorf("active is %v, want %v %q", got.Active(), active, reason)
	}
	if e := w.last(); e.Action != broker.ActionIntrospect || e.Outcome != outcome || e.Reason != reason || e.Actor != c.ID.String() {
		w.t.Errorf("audited %+v, want %s %q", e, outcome, reason)
	}
}

// onlyFor lets one identity introspect.
func onlyFor(c broker.Caller) func(broker.Question) (broker.Decision, error) {
	return func(q broker.Question) (broker.Decision, error) {
		d := yes(q)
		d.Allow = q.Action != broker.ActionIntrospect || q.Caller.ID == c.ID && q.Parent != nil && q.Parent.Audience == q.Audience
		return d, nil
	}
}

// Whatever ends a token anywhere ends it here at once, over a restart too.
func TestIntrospect(t *testing.T) {
	w := newWorld(t)
	payments, orders, ledger := w.caller("payments"), w.caller("orders"), w.caller("ledger")
	w.policy.set(onlyFor(ledger))
	chain := func() (*broker.Credential, *broker.Credential) {
		root := w.issue(payments, orders.ID.String())
		return root, w.exchange(orders, root.Token, "ledger")
	}
	good := func(cred *broker.Credential) {
		t.Helper()
		w.introspected(ledger, cred.Token, true, "allowed", "")
	}
	dead := func(cred *broker.Credential, reason string) {
		t.Helper()
		w.introspected(ledger, cred.Token, false, "allowed", reason)
	}
	_, derived := chain()
	good(derived)
	got, err := w.b.Introspect(ctx, ledger, derived.Token)
	if err != nil || got.Claims.Presenter() != orders.ID || got.Claims.Root() != payments.ID || got.Claims.Audience != "ledger" || got.Claims.Binding != token.BindingSPIFFE {
		t.Fatalf("it says %+v, %v", got.Claims, err)
	}
	w.restart()
	good(derived)

	root, derived := chain()
	w.revoke(broker.LockNone, revocation.Grant(root.Grant.ID()))
	dead(derived, "SUBJECT_TOKEN_REVOKED")
	root, derived = chain()
	w.giveBack(payments, root.Token)
	dead(derived, "SUBJECT_TOKEN_REVOKED")
	w.restart()
	dead(derived, "SUBJECT_TOKEN_REVOKED")

	// Somebody else's lock is not its; those of the chain are.
	w.revoke(broker.LockQuarantine, revocation.Identity(id("somebody")))
	_, derived = chain()
	good(derived)
	for name, c := range map[string]broker.Caller{"the root": payments, "the presenter": orders} {
		rec := w.revoke(broker.LockQuarantine, revocation.Identity(c.ID))
		dead(derived, "SUBJECT_TOKEN_REVOKED")
		if _, err := w.b.Lift(ctx, w.operator(), rec.Seq, "r", ""); err != nil {
			t.Fatal(name, err)
		}
		_, derived = chain()
		good(derived)
	}

	w.clock.advance(broker.DefaultTTL - 1)
	good(derived)
	w.clock.advance(1)
	dead(derived, "SUBJECT_TOKEN_EXPIRED")
	w.clock.set(-time.Hour)
	_, ahead := chain()
	w.clock.set(-time.Hour)
	dead(ahead, "SUBJECT_TOKEN_MALFORMED") // not valid yet
	w.clock.set(2 * time.Hour)

	_, derived = chain()
	w.revoke(broker.LockNone, revocation.Key(w.public.ID))
	dead(derived, "SUBJECT_TOKEN_REVOKED")
}

// Quarantine ends what no revocation does: here a credential that a broker with a mistake
// gave to somebody under a standing lock.
func TestIntrospectLock(t *testing.T) {
	w := newWorld(t)
	payments := w.caller("payments")
	cred := w.issue(payments, "orders")
	rec := w.revoke(broker.LockQuarantine, revocation.Identity(payments.ID))
	grant := *cred.Grant
	newID, err := token.NewGrantID(payments.ID, noon, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	grant.Lineage = slices.Clone(grant.Lineage)
	grant.Lineage[0].Grant, grant.Position = newID, w.b.Head()
	newer := w.forge(func(c *token.Claims) { c.Lineage, c.Position = grant.Lineage, grant.Position.Token() }, cred.Token)
	read, err := token.Inspect(newer.Reveal())
	if err != nil {
		t.Fatal(err)
	}
	grant.Fingerprint = read.Fingerprint
	if err := w.store.Issue(ctx, &grant, func([]broker.Record) error { return nil }); err != nil {
		t.Fatal(err)
	}
	w.introspected(w.caller("orders"), newer, false, "allowed", "IDENTITY_LOCKED")
	if _, err := w.b.Lift(ctx, w.operator(), rec.Seq, "r", ""); err != nil {
		t.Fatal(err)
	}
	w.introspected(w.caller("orders"), newer, true, "allowed", "")
}

// Whoever may not ask, and whoever shows what isn't ours, is told the same.
func TestIntrospectToldNothing(t *testing.T) {
	w := newWorld(t)
	payments, orders := w.caller("payments"), w.caller("orders")
	w.policy.set(onlyFor(orders))
	cred := w.issue(payments, "orders")
	w.introspected(orders, cred.Token, true, "allowed", "")
	w.introspected(payments, cred.Token, false, "refused", "POLICY_DENIED") // its holder
	w.introspected(w.operator(), cred.Token, false, "refused", "POLICY_DENIED")
	w.introspected(orders, token.NewSecret("eyJhbGciOiJub25lIn0.e30."), false, "refused", "SUBJECT_TOKEN_MALFORMED")
	w.introspected(orders, token.Secret{}, false, "refused", "SUBJECT_TOKEN_MALFORMED")
	w.introspected(orders, w.forge(func(c *token.Claims) { c.Issuer = "https://elsewhere.example" }, cred.Token), false, "refused", "SUBJECT_TOKEN_MALFORMED")
	if w.last().Alert {
		t.Error("another issuer's token is an alarm")
	}
	for _, c := range []broker.Caller{orders, payments} { // an alarm, whoever shows it
		w.introspected(c, w.forge(func(c *token.Claims) { c.Scopes = []string{"admin"} }, cred.Token), false, "refused", "SUBJECT_TOKEN_UNKNOWN")
		if !w.last().Alert {
			t.Error("a token that was never recorded is no alarm")
		}
	}
}

// What isn't known for sure is no answer.
func TestIntrospectFailsClosed(t *testing.T) {
	w := newWorld(t)
	orders := w.caller("orders")
	cred := w.issue(w.caller("payments"), "orders")
	fails := func(want *broker.Refusal) {
		t.Helper()
		got, err := w.b.Introspect(ctx, orders, cred.Token)
		refused(t, err, want)
		if got.Active() {
			t.Errorf("%s, and it is active", want.Reason)
		}
	}
	w.store.set(func(s *tap) { s.observe = func([]broker.Observation) error { return broker.ErrStoreClosed } })
	fails(broker.ErrStoreLost)
	w.store.set(func(s *tap) { s.observe = nil })
	for err, want := range map[error]*broker.Refusal{errors.New("broken"): broker.ErrPolicyFailed, broker.ErrNoPolicy: broker.ErrNoPolicy} {
		w.policy.set(func(broker.Question) (broker.Decision, error) { return broker.Decision{}, err })
		fails(want)
	}
	w.policy.set(nil)
	w.mu.Lock()
	w.auditErr = errors.New("no disk")
	w.mu.Unlock()
	if got, err := w.b.Introspect(ctx, orders, cred.Token); err == nil || got.Active() {
		t.Errorf("without an audit: %+v, %v", got, err)
	}
	w.mu.Lock()
	w.auditErr = nil
	w.mu.Unlock()
	w.introspected(orders, cred.Token, true, "allowed", "")

	later := w.b.Head()
	later.Seq += 5
	w.show(w.head("dayfly/broker", issuer, later)).Close()
	fails(broker.ErrLogBehind)
	w.restart()
	w.clock.advance(1000 * time.Hour)
	fails(broker.ErrSVIDExpired)
}

// An answer knows everything that was committed before the question, though this process
// hadn't applied it yet, and stands on a proof begun after it.
func TestIntrospectIsFresh(t *testing.T) {
	w := newWorld(t)
	orders := w.caller("orders")
	cred := w.issue(w.caller("payments"), "orders")
	held, release := make(chan struct{}), make(chan struct{})
	first := true
	w.store.set(func(s *tap) {
		s.beforeApply = func() {
			if first {
				first = false
				close(held)
				<-release
			}
		}
	})
	revoked := make(chan struct{})
	go func() {
		defer close(revoked)
		w.revoke(broker.LockNone, revocation.Grant(cred.Grant.ID()))
	}()
	<-held // it is durable, and nobody here knows
	proofs := 0
	w.store.set(func(s *tap) { s.observe = func([]broker.Observation) error { proofs++; return nil } })
	answer := make(chan bool)
	go func() {
		got, err := w.b.Introspect(ctx, orders, cred.Token)
		answer <- err == nil && got.Active()
	}()
	select {
	case active := <-answer:
		t.Errorf("answered before the record was applied, active %v", active)
		close(release)
	case <-time.After(50 * time.Millisecond):
		close(release)
		if <-answer {
			t.Error("revoked before the question, and active")
		}
	}
	<-revoked
	if proofs != 1 {
		t.Errorf("%d proofs for one answer", proofs)
	}
}
