package broker_test

import (
	"context"
	"errors"
	"fmt"
	"math"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk/spiffetest"
)

var ctx = context.Background()

// A credential leaves only after its grant is on record: a write that failed, or whose
// outcome is unknown, gives nothing to the caller.
func TestRecordedBeforeReleased(t *testing.T) {
	w := newWorld(t)
	c := w.caller("payments")
	cred := w.issue(c, "orders")
	tok, err := token.Parse(cred.Token.Reveal(), func(id token.KeyID) (token.PublicKey, bool) { return w.public, id == w.public.ID })
	if err != nil {
		t.Fatal(err)
	}
	g, err := w.b.Grant(ctx, tok.Grant())
	if err != nil {
		t.Fatal(err)
	}
	if g.Fingerprint != tok.Fingerprint || g.Presenter() != c.ID || g.Audience != "orders" || !g.Expires.Equal(tok.Expires) || g.Position.Token() != tok.Position {
		t.Errorf("the record says otherwise than the token: %+v, %+v", g, tok)
	}
	if tok.Self().SVID != token.ThumbprintOf(c.Leaf) || tok.Self().Key != w.public.ID || tok.Issuer != issuer {
		t.Errorf("got member %+v of issuer %q", tok.Self(), tok.Issuer)
	}

	var tried *broker.Grant
	for name, fail := range map[string]struct {
		hook func(*tap)
		want *broker.Refusal
		kept bool
	}{
		"full, nothing written":    {func(s *tap) { s.beforeIssue = lose(&tried, broker.ErrStoreFull) }, broker.ErrFull, false},
		"closed, nothing written":  {func(s *tap) { s.beforeIssue = lose(&tried, broker.ErrStoreClosed) }, broker.ErrStoreLost, false},
		"written, the answer lost": {func(s *tap) { s.afterIssue = lose(&tried, broker.ErrStoreClosed) }, broker.ErrStoreLost, true},
	} {
		t.Run(name, func(t *testing.T) {
			w.store.set(fail.hook)
			defer w.store.set(func(s *tap) { s.beforeIssue, s.afterIssue = nil, nil })
			cred, err := w.b.Issue(ctx, c, broker.Request{Audience: "orders"})
			if cred != nil {
				t.Fatal("a credential was released")
			}
			refused(t, err, fail.want)
			if _, err := w.b.Grant(ctx, tried.ID()); (err == nil) != fail.kept {
				t.Errorf("the grant on record: %v, want kept %t", err, fail.kept)
			}
		})
	}
	w.issue(c, "orders") // and it goes on
	w.restart()
	if _, err := w.b.Grant(ctx, tok.Grant()); err != nil {
		t.Errorf("after a restart: %v", err)
	}
}

func lose(seen **broker.Grant, err error) func(*broker.Grant) error {
	return func(g *broker.Grant) error { *seen = g; return err }
}

// The condition on the head, case by case.
func TestAdmit(t *testing.T) {
	w := newWorld(t)
	w.policy.names[id("orders")] = "orders"
	root := w.issue(w.caller("payments"), "orders")
	derived := w.exchange(w.caller("orders"), root.Token, "ledger")
	parent, err := token.Inspect(root.Token.Reveal())
	if err != nil {
		t.Fatal(err)
	}
	audience := func(name string) revocation.Selector {
		s, err := revocation.Audience(name)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	at := func(when time.Time, e feed.Event) broker.Record {
		return broker.Record{Event: e, Details: broker.Details{Time: when}}
	}
	revoked := func(selectors ...revocation.Selector) feed.Event {
		return feed.Event{Revocation: &feed.Revocation{Selectors: selectors}}
	}
	now := w.clock.Now()
	for _, c := range []struct {
		name   string
		newer  []broker.Record
		root   bool // whether the root may commit
		derive bool // whether the derived one may
	}{
		{"nothing between", nil, true, true},
		{"another identity", []broker.Record{at(now, revoked(revocation.Identity(id("other"))))}, true, true},
		{"the root's identity", []broker.Record{at(now, revoked(revocation.Identity(id("payments"))))}, false, false},
		{"the deriver's identity", []broker.Record{at(now, revoked(revocation.Identity(id("orders"))))}, true, false},
		{"the root's grant", []broker.Record{at(now, revoked(revocation.Grant(root.Grant.ID())))}, false, false},
		{"the parent's audience", []broker.Record{at(now, revoked(audience("orders")))}, false, false},
		{"the child's audience", []broker.Record{at(now, revoked(audience("ledger")))}, true, false},
		{"the key", []broker.Record{at(now, revoked(revocation.Key(w.public.ID)))}, false, false},
		{"the SVID of the root", []broker.Record{at(now, revoked(revocation.SVID(root.Grant.Lineage[0].SVID)))}, false, false},
		{"second of two records", []broker.Record{at(now, feed.Event{Lift: &feed.Lift{Lock: 1}}), at(now, revoked(revocation.Everything()))}, false, false},
		{"a lift", []broker.Record{at(now, feed.Event{Lift: &feed.Lift{Lock: 1}})}, true, true},
		{"an era", []broker.Record{at(now, feed.Event{Era: &feed.Era{Era: 9}})}, false, false},
		{"a record that may be forgotten before it expires", []broker.Record{at(now.Add(-broker.ForgetAfter), feed.Event{Lift: &feed.Lift{Lock: 1}})}, false, false},
		{"one that expires just in time", []broker.Record{at(root.Grant.Expires.Add(-broker.ForgetAfter), feed.Event{Lift: &feed.Lift{Lock: 1}})}, true, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			if err := broker.Admit(root.Grant, nil, c.newer); (err == nil) != c.root || err != nil && !errors.Is(err, broker.ErrOvertaken) {
				t.Errorf("root: got %v, want admitted %t", err, c.root)
			}
			if err := broker.Admit(derived.Grant, parent, c.newer); (err == nil) != c.derive {
				t.Errorf("derived: got %v, want admitted %t", err, c.derive)
			}
		})
	}
}

// A record commits between the snapshot and the commit: where it concerns the grant,
// the grant is made anew or refused, and never stands at the old position.
func TestOvertakenByRevocation(t *testing.T) {
	w := newWorld(t)
	c := w.caller("payments")
	// overtake makes one record while the next issue waits for its commit.
	overtake := func(record func()) {
		once := false
		w.store.set(func(s *tap) {
			s.beforeIssue = func(*broker.Grant) error {
				if !once {
					once = true
					record()
				}
				return nil
			}
		})
	}
	var rec broker.Record

	overtake(func() { rec = w.revoke(broker.LockQuarantine, revocation.Identity(id("somebody-else"))) })
	cred := w.issue(c, "orders")
	if cred.Grant.Position.Seq != rec.Seq-1 {
		t.Errorf("an unrelated record: the grant stands at %d, want the old position %d", cred.Grant.Position.Seq, rec.Seq-1)
	}

	overtake(func() { rec = w.revoke(broker.LockNone, revocation.Identity(c.ID)) })
	cred = w.issue(c, "orders")
	if cred.Grant.Position.Seq != rec.Seq {
		t.Errorf("the grant stands at %d, want made anew at %d", cred.Grant.Position.Seq, rec.Seq)
	}
	if v := w.verdict(cred.Token); v != revocation.Alive {
		t.Errorf("issued with knowledge of the revocation, and %s", v)
	}

	overtake(func() { w.revoke(broker.LockQuarantine, revocation.Identity(c.ID)) })
	_, err := w.b.Issue(ctx, c, broker.Request{Audience: "orders"})
	refused(t, err, broker.ErrLocked)

	// The parent of an exchange dies meanwhile.
	w.policy.names[id("orders")] = "orders"
	parent := w.issue(w.caller("shop"), "orders")
	overtake(func() { w.revoke(broker.LockNone, revocation.Grant(parent.Grant.ID())) })
	_, err = w.b.Exchange(ctx, w.caller("orders"), broker.Request{Audience: "ledger", Subject: parent.Token})
	refused(t, err, broker.ErrSubjectRevoked)

	// The signing key is revoked meanwhile.
	overtake(func() { w.revoke(broker.LockNone, revocation.Key(w.public.ID)) })
	_, err = w.b.Issue(ctx, w.caller("shop"), broker.Request{Audience: "orders"})
	refused(t, err, broker.ErrNoSigningKey)
	w.newKey()

	// And it gives up instead of trying for ever.
	w.store.set(func(s *tap) {
		s.beforeIssue = func(*broker.Grant) error {
			w.revoke(broker.LockNone, revocation.Identity(id("shop")))
			return nil
		}
	})
	_, err = w.b.Issue(ctx, w.caller("shop"), broker.Request{Audience: "orders"})
	refused(t, err, broker.ErrBusy)
}

// Requests that are wrong in themselves.
func TestMalformedRequests(t *testing.T) {
	w := newWorld(t)
	c := w.caller("payments")
	many := make([]string, 10_000)
	for i := range many {
		many[i] = fmt.Sprintf("scope-%d", i)
	}
	secret := w.issue(c, "orders").Token
	for _, tc := range []struct {
		name  string
		req   broker.Request
		field string
	}{
		{"no audience", broker.Request{}, "audience"},
		{"audience with a space", broker.Request{Audience: "a b"}, "audience"},
		{"audience too long", broker.Request{Audience: strings.Repeat("a", token.MaxAudienceBytes+1)}, "audience"},
		{"a token pasted as the audience", broker.Request{Audience: "x" + secret.Reveal()}, "audience"},
		{"an empty scope", broker.Request{Audience: "orders", Scopes: []string{""}}, "scopes"},
		{"a scope with a quote", broker.Request{Audience: "orders", Scopes: []string{`a"b`}}, "scopes"},
		{"a huge scope", broker.Request{Audience: "orders", Scopes: []string{strings.Repeat("s", token.MaxScopeBytes+1)}}, "scopes"},
		{"10,000 scopes", broker.Request{Audience: "orders", Scopes: many}, "scopes"},
		{"a negative ttl", broker.Request{Audience: "orders", TTL: -time.Second}, "ttl"},
		{"a ttl below a second", broker.Request{Audience: "orders", TTL: time.Millisecond}, "ttl"},
		{"a ttl above the cap", broker.Request{Audience: "orders", TTL: token.MaxTTL + 1}, "ttl"},
		{"a huge ttl", broker.Request{Audience: "orders", TTL: math.MaxInt64}, "ttl"},
		{"an unknown binding", broker.Request{Audience: "orders", Binding: "dpop"}, "binding"},
		{"a huge idempotency key", broker.Request{Audience: "orders", IdempotencyKey: strings.Repeat("k", broker.MaxKeyLength+1)}, "idempotency_key"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := w.b.Issue(ctx, c, tc.req)
			if r := refused(t, err, broker.ErrInvalidRequest); r.Metadata["field"] != tc.field {
				t.Errorf("field %q, want %q", r.Metadata["field"], tc.field)
			}
			if e := w.last(); e.Outcome != "refused" || e.Reason != "INVALID_REQUEST" || len(e.Audience) > token.MaxAudienceBytes {
				t.Errorf("audit: %+v", e)
			}
		})
	}
	if len(w.policy.asked) != 1 {
		t.Errorf("policy was asked %d times; malformed requests are none of its business", len(w.policy.asked)-1)
	}
}

// A zero ttl and no scopes leave both to policy; a shorter wish is granted, and the
// caps hold whatever policy says.
func TestTerms(t *testing.T) {
	w := newWorld(t)
	c := w.caller("payments")
	for _, tc := range []struct {
		name    string
		req     broker.Request
		d       broker.Decision
		ttl     time.Duration
		binding token.Binding
	}{
		{"all left open", broker.Request{}, broker.Decision{}, broker.DefaultTTL, token.BindingSPIFFE},
		{"policy's ttl", broker.Request{}, broker.Decision{TTL: 2 * time.Minute}, 2 * time.Minute, token.BindingSPIFFE},
		{"shorter than policy's", broker.Request{TTL: time.Minute}, broker.Decision{TTL: 2 * time.Minute}, time.Minute, token.BindingSPIFFE},
		{"longer than policy's", broker.Request{TTL: 3 * time.Minute}, broker.Decision{TTL: 2 * time.Minute}, 2 * time.Minute, token.BindingSPIFFE},
		{"policy beyond the cap", broker.Request{}, broker.Decision{TTL: 48 * time.Hour}, token.MaxTTL, token.BindingSPIFFE},
		{"policy negative", broker.Request{}, broker.Decision{TTL: -1}, broker.DefaultTTL, token.BindingSPIFFE},
		{"a bearer, as policy says", broker.Request{}, broker.Decision{Binding: token.BindingNone}, broker.DefaultTTL, token.BindingNone},
		{"stricter asked", broker.Request{Binding: token.BindingX5T}, broker.Decision{Binding: token.BindingNone}, broker.DefaultTTL, token.BindingX5T},
		{"weaker asked", broker.Request{Binding: token.BindingNone}, broker.Decision{Binding: token.BindingSPIFFE}, broker.DefaultTTL, token.BindingSPIFFE},
		{"policy's binding unknown", broker.Request{}, broker.Decision{Binding: "mtls"}, broker.DefaultTTL, token.BindingSPIFFE},
	} {
		t.Run(tc.name, func(t *testing.T) {
			tc.req.Audience, tc.d.Allow, tc.d.Scopes = "orders", true, []string{"write", "read", "read"}
			w.policy.set(func(broker.Question) (broker.Decision, error) { return tc.d, nil })
			g := w.got(w.b.Issue(ctx, c, tc.req)).Grant
			if got := g.Expires.Sub(g.IssuedAt); got != tc.ttl || g.Binding != tc.binding {
				t.Errorf("got %s %s, want %s %s", got, g.Binding, tc.ttl, tc.binding)
			}
			if !slices.Equal(g.Scopes, []string{"read", "write"}) {
				t.Errorf("scopes %q", g.Scopes)
			}
			if bound := g.Certificate != [32]byte{}; bound != (tc.binding == token.BindingX5T) {
				t.Errorf("bound to a certificate: %t", bound)
			}
		})
	}
}

// A token that would be too large isn't issued.
func TestTokenTooLarge(t *testing.T) {
	w := newWorld(t)
	var scopes []string
	for i := range token.MaxScopes {
		scopes = append(scopes, fmt.Sprintf("%d-%s", i, strings.Repeat("s", 120)))
	}
	_, err := w.b.Issue(ctx, w.caller("payments"), broker.Request{Audience: "orders", Scopes: scopes})
	refused(t, err, broker.ErrTokenTooLarge)
}

// Policy denies, fails, or grants what no token can have: nothing is issued.
func TestPolicyFailsClosed(t *testing.T) {
	w := newWorld(t)
	c := w.caller("payments")
	ask := func() error {
		_, err := w.b.Issue(ctx, c, broker.Request{Audience: "orders"})
		return err
	}
	w.policy.set(func(broker.Question) (broker.Decision, error) { return broker.Decision{}, nil })
	refused(t, ask(), broker.ErrPolicyDenied)
	w.policy.set(func(broker.Question) (broker.Decision, error) {
		return broker.Decision{Reason: "no_entitlement", Message: "payments may not reach orders", Hint: "ask its owner", Metadata: map[string]string{"owner": "team-o"}, Rule: "deny"}, nil
	})
	r := refused(t, ask(), broker.ErrPolicyDenied)
	if r.Message != "payments may not reach orders" || r.Hint != "ask its owner" || r.Metadata["owner"] != "team-o" || r.Metadata["policy_reason"] != "no_entitlement" {
		t.Errorf("policy's reasons don't reach the caller: %+v", r)
	}
	if e := w.last(); e.Outcome != "refused" || e.Reason != "POLICY_DENIED" || e.Rule != "deny" || e.Actor != c.ID.String() || e.Audience != "orders" || e.Peer != "192.0.2.7" {
		t.Errorf("audit: %+v", e)
	}
	if broker.ErrPolicyDenied.Metadata != nil {
		t.Error("a refusal changed its sentinel")
	}
	w.policy.set(func(q broker.Question) (broker.Decision, error) {
		return broker.Decision{Allow: true}, errors.New("evaluation timed out")
	})
	r = refused(t, ask(), broker.ErrPolicyFailed)
	if strings.Contains(r.Message, "timed out") {
		t.Error("an inner error reaches a stranger")
	}
	w.policy.set(func(q broker.Question) (broker.Decision, error) {
		return broker.Decision{Allow: true, Scopes: []string{"not a scope"}}, nil
	})
	refused(t, ask(), broker.ErrPolicyFailed)
}

// Each decision is in the audit; what can't be audited isn't issued.
func TestAudit(t *testing.T) {
	w := newWorld(t)
	c := w.caller("payments")
	cred := w.issue(c, "orders")
	want := broker.AuditEntry{
		Time: noon, Action: broker.ActionIssue, Actor: c.ID.String(), Peer: "192.0.2.7", Outcome: "allowed",
		Rule: "test", Revision: "sha256:test", Audience: "orders", Scopes: []string{"read"}, TTL: 5 * time.Minute, Binding: token.BindingSPIFFE,
		Grant: cred.Grant.ID().String(),
		Asked: []broker.Asked{{
			Action: broker.ActionIssue, Time: noon, Attestation: "x509", Peer: "192.0.2.7:4711", Audience: "orders",
			SVID:   broker.AskedSVID{Serial: c.Leaf.SerialNumber.Text(16), NotBefore: c.Leaf.NotBefore.UTC(), NotAfter: c.Leaf.NotAfter.UTC()},
			Answer: &broker.Answer{Allow: true, Scopes: []string{"read"}, TTL: 5 * time.Minute},
		}},
	}
	if got := w.last(); !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}

	w.mu.Lock()
	w.auditErr = errors.New("disk full")
	w.mu.Unlock()
	if cred, err := w.b.Issue(ctx, c, broker.Request{Audience: "orders"}); cred != nil || err == nil {
		t.Errorf("issued without an audit: %v", err)
	}
	if _, err := w.b.Subscribe(ctx, c, broker.Subscriber{Instance: "instance-1", Audiences: []string{"orders"}, MaxStaleness: time.Second}); err == nil {
		t.Error("followed without an audit")
	}
	// A revocation is not held up by it.
	w.revoke(broker.LockQuarantine, revocation.Identity(c.ID))
	w.mu.Lock()
	w.auditErr = nil
	w.mu.Unlock()
	if _, err := w.b.Issue(ctx, c, broker.Request{Audience: "orders"}); !errors.Is(err, broker.ErrLocked) {
		t.Errorf("got %v", err)
	}
	if e := w.last(); e.Outcome != "refused" || e.Reason != "IDENTITY_LOCKED" {
		t.Errorf("audit of a refusal: %+v", e)
	}
	rec := w.revoke(broker.LockNone, revocation.Identity(id("other")))
	if e := w.last(); e.Action != broker.ActionRevoke || e.Sequence != rec.Seq || e.Why != "test" || e.Lock != broker.LockNone || e.Outcome != "allowed" || !slices.Equal(e.Selector, []string{"identity:" + id("other").String()}) {
		t.Errorf("audit of a revoke: %+v", e)
	}
}

// A full disk: nothing is issued, with a clear answer; a revoke still works; it
// recovers by itself.
func TestStoreFull(t *testing.T) {
	w := newWorld(t)
	c := w.caller("payments")
	cred := w.issue(c, "orders")
	w.store.set(func(s *tap) {
		s.beforeIssue = func(*broker.Grant) error { return fmt.Errorf("growing: %w", broker.ErrStoreFull) }
	})
	_, err := w.b.Issue(ctx, c, broker.Request{Audience: "orders"})
	refused(t, err, broker.ErrFull)
	w.revoke(broker.LockNone, revocation.Identity(c.ID))
	if v := w.verdict(cred.Token); v != revocation.Revoked {
		t.Errorf("after a revoke on a full disk the token is %s", v)
	}
	w.store.set(func(s *tap) { s.beforeIssue = nil })
	w.issue(c, "orders")
}

func TestNoSigningKey(t *testing.T) {
	w := newWorld(t)
	w.noSigner = true
	_, err := w.b.Issue(ctx, w.caller("payments"), broker.Request{Audience: "orders"})
	refused(t, err, broker.ErrNoSigningKey)
	w.noSigner = false
	// A key that isn't published signs nothing either.
	key := newKey(t)
	_, public := w.vouched(key, brokerID)
	w.key, w.public = key, public
	_, err = w.b.Issue(ctx, w.caller("payments"), broker.Request{Audience: "orders"})
	refused(t, err, broker.ErrNoSigningKey)
}

// An SVID that expired while its connection was open.
func TestSVIDExpires(t *testing.T) {
	w := newWorld(t)
	w.policy.names[id("orders")] = "orders"
	c := w.callerWith(id("orders"), spiffetest.SVIDOptions{NotAfter: noon.Add(time.Minute)})
	subject := w.issue(w.caller("payments"), "orders").Token
	w.exchange(c, subject, "ledger")
	f, err := w.b.Subscribe(ctx, c, broker.Subscriber{Instance: "instance-1", Audiences: []string{"orders"}, MaxStaleness: time.Second})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w.clock.advance(time.Minute + time.Second)
	for name, call := range map[string]func() error{
		"issue": func() error { _, err := w.b.Issue(ctx, c, broker.Request{Audience: "orders"}); return err },
		"exchange": func() error {
			_, err := w.b.Exchange(ctx, c, broker.Request{Audience: "ledger", Subject: subject})
			return err
		},
		"revoke": func() error {
			_, err := w.b.Revoke(ctx, c, broker.Revoke{Selectors: []revocation.Selector{revocation.Identity(c.ID)}, Reason: "r"})
			return err
		},
		"lift": func() error { _, err := w.b.Lift(ctx, c, 1, "r", ""); return err },
		"list": func() error { return w.b.May(ctx, c, broker.ActionList) },
		"subscribe": func() error {
			_, err := w.b.Subscribe(ctx, c, broker.Subscriber{Instance: "instance-2", Audiences: []string{"orders"}, MaxStaleness: time.Second})
			return err
		},
		"ping":        func() error { _, err := f.Prove(ctx); return err },
		"acknowledge": func() error { return f.Acknowledge(ctx, feed.Position{}) },
		"report":      func() error { return f.Report(ctx, broker.UseReport{}) },
		"relayed":     func() error { _, err := f.Relayed(ctx, nil); return err },
	} {
		refused(t, call(), broker.ErrSVIDExpired)
		_ = name
	}
}

// The break-glass socket revokes; it has no identity to issue to.
func TestBreakGlassGetsNoCredential(t *testing.T) {
	w := newWorld(t)
	w.policy.set(func(broker.Question) (broker.Decision, error) {
		return broker.Decision{}, errors.New("policy is broken")
	})
	local := broker.Caller{Local: "break-glass:uid=0"}
	rec, err := w.b.Revoke(ctx, local, broker.Revoke{Selectors: []revocation.Selector{revocation.Identity(id("payments"))}, Reason: "all is broken"})
	if err != nil {
		t.Fatal(err)
	}
	if rec.Details.Actor != "break-glass:uid=0" || w.last().Actor != "break-glass:uid=0" || w.last().Rule != "break-glass" {
		t.Errorf("recorded as %q, audited as %+v", rec.Details.Actor, w.last())
	}
	if _, err := w.b.Lift(ctx, local, rec.Seq, "wrong one", ""); err != nil {
		t.Error(err)
	}
	_, err = w.b.Issue(ctx, local, broker.Request{Audience: "orders"})
	refused(t, err, broker.ErrSVIDExpired)
	_, err = w.b.Exchange(ctx, local, broker.Request{Audience: "orders"})
	refused(t, err, broker.ErrSVIDExpired)
	_, err = w.b.Issue(ctx, broker.Caller{}, broker.Request{Audience: "orders"})
	refused(t, err, broker.ErrSVIDExpired)
}

// A retry with its key gets the same credential while that lives; after a revocation it
// gets an answer of its own.
func TestIdempotentIssue(t *testing.T) {
	w := newWorld(t)
	c := w.caller("payments")
	req := broker.Request{Audience: "orders", IdempotencyKey: "key-1"}
	first := w.got(w.b.Issue(ctx, c, req))
	if again := w.got(w.b.Issue(ctx, c, req)); again.Grant.ID() != first.Grant.ID() {
		t.Error("a retry got another credential")
	}
	other := req
	other.Scopes = []string{"write"}
	_, err := w.b.Issue(ctx, c, other)
	refused(t, err, broker.ErrIdempotencyReused)
	_, err = w.b.Issue(ctx, w.callerWith(c.ID, spiffetest.SVIDOptions{}), req)
	refused(t, err, broker.ErrIdempotencyReused) // another SVID, another request
	if cred := w.got(w.b.Issue(ctx, w.caller("other"), req)); cred.Grant.Presenter() != id("other") {
		t.Error("one caller's key reached another's credential")
	}
	w.clock.advance(broker.RetryWindow)
	if later := w.got(w.b.Issue(ctx, c, req)); later.Grant.ID() == first.Grant.ID() {
		t.Error("the window doesn't end")
	}

	// Many at once get one.
	req.IdempotencyKey = "key-2"
	ids := make(chan token.GrantID, 16)
	for range cap(ids) {
		go func() {
			cred, err := w.b.Issue(ctx, c, req)
			if err != nil {
				t.Error(err)
				ids <- token.GrantID{}
				return
			}
			ids <- cred.Grant.ID()
		}()
	}
	one := <-ids
	for range cap(ids) - 1 {
		if got := <-ids; got != one {
			t.Error("concurrent retries got different credentials")
		}
	}

	w.revoke(broker.LockQuarantine, revocation.Identity(c.ID))
	_, err = w.b.Issue(ctx, c, req)
	refused(t, err, broker.ErrLocked)

	// A failure isn't kept.
	req.IdempotencyKey = "key-3"
	shop := w.caller("shop")
	w.store.set(func(s *tap) { s.beforeIssue = func(*broker.Grant) error { return broker.ErrStoreFull } })
	_, err = w.b.Issue(ctx, shop, req)
	refused(t, err, broker.ErrFull)
	w.store.set(func(s *tap) { s.beforeIssue = nil })
	w.got(w.b.Issue(ctx, shop, req))
}
