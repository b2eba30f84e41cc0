package agent_test

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/dayflyhq/dayfly/agent"
	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/proto/wire"
	"github.com/dayflyhq/dayfly/sdk"
	"google.golang.org/grpc/codes"
)

// What is revoked while it is on its way is dead when it comes: nobody who only waits for
// news would ever ask for another one.
func TestWatchRevokedOnItsWay(t *testing.T) {
	noLeaks(t)
	td := newDomain(t)
	b := newBroker(t, td)
	gate := make(chan struct{})
	b.set(func(b *broker) { b.gate = gate })
	f := start(t, td, b, nil)
	f.ready()
	stream := f.watch(wanted("orders"))
	eventually(t, "the call", func() error {
		if b.issued.Load() == 0 {
			return errors.New("not yet")
		}
		return nil
	})
	at := b.revoke(revocation.Identity(payments))
	b.sent("the receipt", func(m *dayflyv1.FollowRequest) bool { return m.GetAcknowledge().GetPosition().GetSequence() >= at.Seq })
	b.set(func(b *broker) { b.gate = nil })
	close(gate)
	until(t, stream, "one that lives", whole)
}

// Who was let in by a list that has changed since is told nothing more.
func TestWatchEndsWithItsLeave(t *testing.T) {
	noLeaks(t)
	td := newDomain(t)
	b := newBroker(t, td)
	b.set(func(b *broker) { b.ttl = 3 * time.Second }) // there would be news soon
	f := start(t, td, b, nil)
	stream := f.watch(wanted("orders"))
	until(t, stream, "a credential", whole)
	if err := f.agent.Apply(agent.Settings{Allow: agent.Allow{UIDs: []uint32{uint32(os.Getuid()) + 1}}}); err != nil {
		t.Fatal(err)
	}
	for { // what was on its way; it ends by itself in the end, with another reason
		if _, err := stream.Recv(); err != nil {
			if got := reason(err); got != "PEER_NOT_ALLOWED" {
				t.Errorf("got %v", err)
			}
			return
		}
	}
}

// A holder of as much as may be held can tell of all of it.
func TestWatchHeldIsLarge(t *testing.T) {
	noLeaks(t)
	td := newDomain(t)
	b := newBroker(t, td)
	f := start(t, td, b, nil)
	m := wanted("orders")
	var scopes []string
	for i := range token.MaxScopes {
		scopes = append(scopes, fmt.Sprintf("orders:read-%030d", i))
	}
	for range 256 {
		c := b.mint("orders", scopes[:20])
		m.Held = append(m.Held, c.GetToken())
	}
	until(t, f.watch(m), "a credential", whole)
}

// An answer that isn't what was asked for, or isn't the token that it says it is, is given
// to nobody.
func TestBrokerAnswersAnother(t *testing.T) {
	noLeaks(t)
	td := newDomain(t)
	b := newBroker(t, td)
	f := start(t, td, b, nil)
	f.ready()
	c := f.client()
	for name, twist := range map[string]func(*dayflyv1.Credential) *dayflyv1.Credential{
		"another audience": func(m *dayflyv1.Credential) *dayflyv1.Credential { return b.mint("payroll", m.GetScopes()) },
		"another audience's token": func(m *dayflyv1.Credential) *dayflyv1.Credential {
			m.Token = b.mint("payroll", m.GetScopes()).GetToken()
			return m
		},
		"another grant": func(m *dayflyv1.Credential) *dayflyv1.Credential {
			m.Grant = b.mint(m.GetAudience(), m.GetScopes()).GetGrant()
			return m
		},
		"another binding": func(m *dayflyv1.Credential) *dayflyv1.Credential {
			m.Binding = wire.Binding(token.BindingNone)
			return m
		},
		"garbage": func(m *dayflyv1.Credential) *dayflyv1.Credential { m.Token = "eyJ.e30.x"; return m },
		"nothing": func(*dayflyv1.Credential) *dayflyv1.Credential { return nil },
	} {
		b.set(func(b *broker) { b.twist = twist })
		if cred, err := c.Issue(t.Context(), sdk.Request{Audience: "orders-" + strings.ReplaceAll(name, " ", "-")}); reason(err) != "CREDENTIAL_UNAVAILABLE" {
			t.Errorf("%s: %v, %v", name, cred, err)
		}
	}
}

// What was revoked while an exchange was under way is given to nobody.
func TestExchangeOfTheDead(t *testing.T) {
	noLeaks(t)
	td := newDomain(t)
	f := start(t, td, newBroker(t, td), nil, func(a *agent.Agent) {
		a.JudgeBy(func(revocation.Subject) revocation.Verdict { return revocation.Verdict{Reason: revocation.Revoked} })
	})
	f.ready()
	if cred, err := f.client().Exchange(t.Context(), token.NewSecret("subject"), sdk.Request{Audience: "ledger"}); reason(err) != "CREDENTIAL_REVOKED" {
		t.Errorf("%v, %v", cred, err)
	}
}

// A limit of this identity ends for all when the broker said, also for those who heard of it
// from this agent just before.
func TestLimitEndsForAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &direct{b: unservedBroker(t, newDomain(t))}
		d.b.set(func(b *broker) {
			b.refuse = refusalWith(codes.ResourceExhausted, "ISSUE_RATE_LIMITED", "too fast", map[string]string{"hint": "wait", "retry_after": "20s"})
		})
		ask := bubble(t, d)
		if _, err := ask(agent.Request{Audience: "first"}); reason(err) != "ISSUE_RATE_LIMITED" {
			t.Fatalf("got %v", err)
		}
		time.Sleep(19 * time.Second)
		_, err := ask(agent.Request{Audience: "second"})
		var refused *sdk.Error
		if !errors.As(sdk.FromRPC(err), &refused) || refused.Reason != "ISSUE_RATE_LIMITED" || refused.Hint != "wait" || refused.RetryAfter() > time.Second {
			t.Fatalf("a second before its end: %v %v", err, refused.RetryAfter())
		}
		d.b.set(func(b *broker) { b.refuse = nil })
		time.Sleep(time.Second)
		if _, err := ask(agent.Request{Audience: "second"}); err != nil {
			t.Errorf("at its end: %v", err)
		}
	})
}

// Whoever holds a credential hears when its end by the wall clock has moved, as that was set.
func TestWatchAfterClockIsSet(t *testing.T) {
	noLeaks(t)
	td := newDomain(t)
	var back atomic.Int64
	f := start(t, td, newBroker(t, td), func(cfg *agent.Config) {
		cfg.Now = func() time.Time { return time.Now().Add(-time.Duration(back.Load())) }
		began := time.Now()
		cfg.Boot = func() feed.Instant { return feed.Instant(time.Since(began)) }
	})
	stream := f.watch(wanted("orders"))
	first := until(t, stream, "a credential", whole).GetWatched()[0].GetCredential()
	back.Store(int64(time.Hour))
	until(t, stream, "its new end", func(m *dayflyv1.WatchResponse) bool {
		c := m.GetWatched()[0].GetCredential()
		return c.GetGrant() == first.GetGrant() && c.GetExpiresAt().AsTime().Before(first.GetExpiresAt().AsTime().Add(-50*time.Minute))
	})
}
