package broker_test

import (
	"errors"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/broker"
)

// Until the signing key is in every copy of the JWK set, who only reads that gets no
// token, root or derived, and is told how long to wait; the others are served.
func TestExternalAudiencesWaitForTheKey(t *testing.T) {
	w := newWorld(t)
	w.policy.mu.Lock()
	for name, by := range map[string]string{
		"orders": broker.VerifiedByFeed, "gateway": broker.VerifiedByIntrospection, "cloud": broker.VerifiedByExternal,
	} {
		w.policy.audiences[name] = broker.Audience{Name: name, VerifiedBy: by}
	}
	w.policy.mu.Unlock()
	payments, relay := w.caller("payments"), w.caller("relay")
	parent := w.issue(payments, relay.ID.String())
	w.setSpreadIn(90*time.Second + 1)
	for _, audience := range []string{"orders", "gateway"} {
		w.issue(payments, audience)
		w.exchange(relay, parent.Token, audience)
	}
	for _, audience := range []string{"cloud", "undeclared"} {
		_, issued := w.b.Issue(ctx, payments, broker.Request{Audience: audience})
		_, exchanged := w.b.Exchange(ctx, relay, broker.Request{Audience: audience, Subject: parent.Token})
		for _, err := range []error{issued, exchanged} {
			var r *broker.Refusal
			if !errors.As(err, &r) || !errors.Is(r, broker.ErrKeyNotSpread) || r.Kind != broker.Unavailable {
				t.Fatalf("%s: %v, want %v", audience, err, broker.ErrKeyNotSpread)
			}
			if got := r.Metadata["retry_after"]; got != "1m30.001s" {
				t.Errorf("%s: retry_after %q", audience, got)
			}
		}
		if e := w.last(); e.Outcome != "refused" || e.Reason != broker.ErrKeyNotSpread.Reason {
			t.Errorf("the audit says %s, %s", e.Outcome, e.Reason)
		}
	}
	w.setSpreadIn(0)
	for _, audience := range []string{"cloud", "undeclared"} {
		w.issue(payments, audience)
		w.exchange(relay, parent.Token, audience)
	}
}

func (w *world) setSpreadIn(d time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.spreadIn = d
}
