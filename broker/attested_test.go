package broker_test

import (
	"net/netip"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
)

// jwtCaller is an identity that shows a JWT-SVID of five minutes.
func (w *world) jwtCaller(path string) broker.Caller {
	now := w.clock.Now()
	return broker.Caller{ID: id(path), JWT: &broker.JWTSVID{IssuedAt: now, Expires: now.Add(5 * time.Minute)}, Peer: netip.MustParseAddrPort("192.0.2.7:4711")}
}

// Who shows a JWT-SVID gets what policy allows; no certificate is in the records.
func TestJWTSVIDCaller(t *testing.T) {
	w := newWorld(t)
	w.policy.names[id("orders")] = "orders"
	c := w.jwtCaller("payments")
	root := w.issue(c, "orders")
	if m := root.Grant.Lineage[0]; m.Identity != c.ID || !m.SVID.IsZero() {
		t.Errorf("the lineage is %+v", root.Grant.Lineage)
	}
	if e := w.last(); e.Attestation != "jwt" || e.Outcome != "allowed" {
		t.Errorf("audited as %+v", e)
	}
	derived := w.got(w.b.Exchange(ctx, w.jwtCaller("orders"), broker.Request{Audience: "ledger", Subject: root.Token}))
	tok, err := token.Inspect(derived.Token.Reveal())
	if err != nil || len(tok.Lineage) != 2 || !tok.Lineage[0].SVID.IsZero() || !tok.Lineage[1].SVID.IsZero() {
		t.Errorf("the derived token's lineage is %+v (%v)", tok, err)
	}
	if w.issue(w.caller("payments"), "orders"); w.last().Attestation != "" {
		t.Errorf("with a certificate, audited as %+v", w.last())
	}
	req := broker.Request{Audience: "orders", IdempotencyKey: "key"}
	if first, again := w.got(w.b.Issue(ctx, c, req)), w.got(w.b.Issue(ctx, c, req)); first.Grant.ID() != again.Grant.ID() {
		t.Error("a retry got another credential")
	}
	w.clock.advance(5*time.Minute + time.Second)
	_, err = w.b.Issue(ctx, c, broker.Request{Audience: "orders"})
	refused(t, err, broker.ErrSVIDExpired)
}

// There is no certificate to bind a token to, whoever wants it bound.
func TestJWTSVIDIsNoCertificate(t *testing.T) {
	w := newWorld(t)
	c := w.jwtCaller("payments")
	_, err := w.b.Issue(ctx, c, broker.Request{Audience: "orders", Binding: token.BindingX5T})
	refused(t, err, broker.ErrNoCertificate)
	w.policy.set(func(broker.Question) (broker.Decision, error) {
		return broker.Decision{Allow: true, Binding: token.BindingX5T}, nil
	})
	_, err = w.b.Issue(ctx, c, broker.Request{Audience: "orders", Binding: token.BindingNone})
	refused(t, err, broker.ErrNoCertificate)
	if g := w.issue(w.caller("payments"), "orders").Grant; g.Binding != token.BindingX5T {
		t.Errorf("with a certificate the binding is %q", g.Binding)
	}
}

// A reissue lock lets a JWT-SVID pass that was issued after the cut, and no other; a
// quarantine lets none pass.
func TestLocksOnJWTSVIDs(t *testing.T) {
	w := newWorld(t)
	before, other := w.jwtCaller("payments"), w.jwtCaller("shop")
	// An issuer whose clock is ahead of ours, as far as this was seen.
	ahead := w.jwtCaller("payments")
	ahead.JWT.IssuedAt = ahead.JWT.IssuedAt.Add(20 * time.Second)
	w.issue(ahead, "orders")
	w.revoke(broker.LockReissue, revocation.Identity(before.ID))
	for _, c := range []broker.Caller{before, ahead} {
		_, err := w.b.Issue(ctx, c, broker.Request{Audience: "orders"})
		refused(t, err, broker.ErrLocked)
	}
	w.issue(other, "orders")
	w.clock.advance(broker.ClockSkew + 20*time.Second)
	atCut := w.jwtCaller("payments") // in the very second of the cut
	_, err := w.b.Issue(ctx, atCut, broker.Request{Audience: "orders"})
	refused(t, err, broker.ErrLocked)
	w.clock.advance(time.Second)
	_, err = w.b.Issue(ctx, before, broker.Request{Audience: "orders"}) // it is good still, and older than the cut
	refused(t, err, broker.ErrLocked)
	after := w.jwtCaller("payments")
	w.issue(after, "orders")
	w.revoke(broker.LockQuarantine, revocation.Identity(before.ID))
	_, err = w.b.Issue(ctx, after, broker.Request{Audience: "orders"})
	refused(t, err, broker.ErrLocked)
}
