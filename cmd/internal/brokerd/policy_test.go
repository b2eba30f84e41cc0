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
