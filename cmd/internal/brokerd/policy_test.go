package brokerd

import (
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/policy"
	"github.com/dayflyhq/dayfly/sdk/spiffetest"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// What policy data limits reaches the broker, which holds it.
func TestLimitsReachTheBroker(t *testing.T) {
	p, err := policy.Load(t.Context(), policy.Config{FS: policy.Demo()})
	if err != nil {
		t.Fatal(err)
	}
	id := spiffeid.RequireFromString("spiffe://dayfly.test/ns/shop/orders")
	td := spiffetest.ForTest(t, spiffetest.Config{TrustDomain: id.TrustDomain()})
	svid, err := td.IssueSVID(id, spiffetest.SVIDOptions{})
	if err != nil {
		t.Fatal(err)
	}
	d, err := decider{p}.Decide(t.Context(), broker.Question{
		Action: broker.ActionIssue, Caller: broker.Caller{ID: id, Leaf: svid.Certificates[0]}, Time: time.Now(), Audience: "ledger",
	})
	if want := (broker.Limits{IssuePerSecond: 1000, LiveGrants: 100000}); err != nil || d.Limits != want {
		t.Errorf("got %+v, %v, want %+v", d.Limits, err, want)
	}
}

// Policy is told how a caller proved who it is.
func TestAttestationReachesPolicy(t *testing.T) {
	id := spiffeid.RequireFromString("spiffe://dayfly.test/ns/shop/orders")
	td := spiffetest.ForTest(t, spiffetest.Config{TrustDomain: id.TrustDomain()})
	svid, err := td.IssueSVID(id, spiffetest.SVIDOptions{})
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	shown := &broker.JWTSVID{IssuedAt: now.Add(-time.Minute), Expires: now.Add(3 * time.Minute)}
	if got, want := caller(broker.Caller{ID: id, JWT: shown}, now), (policy.Caller{ID: id, Attestation: policy.AttestationJWT, SVIDAge: time.Minute, SVIDRemaining: 3 * time.Minute}); got != want {
		t.Errorf("with a JWT-SVID policy is told %+v, want %+v", got, want)
	}
	if got := caller(broker.Caller{ID: id, Leaf: svid.Certificates[0]}, now); got.Attestation != policy.AttestationX509 || got.SVIDSerial == "" {
		t.Errorf("with a certificate policy is told %+v", got)
	}
}
