package brokerd

import (
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/policy"
	"github.com/dayflyhq/dayfly/proto/token"
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

// What the audit records of a question is enough to ask it again, to the last detail.
func TestQuestionsCanBeAskedAgain(t *testing.T) {
	id := spiffeid.RequireFromString("spiffe://dayfly.test/ns/shop/orders")
	td := spiffetest.ForTest(t, spiffetest.Config{TrustDomain: id.TrustDomain()})
	svid, err := td.IssueSVID(id, spiffetest.SVIDOptions{})
	if err != nil {
		t.Fatal(err)
	}
	caller := broker.Caller{ID: id, Leaf: svid.Certificates[0], Peer: netip.MustParseAddrPort("192.0.2.7:4711")}
	now := time.Now().UTC()
	grant, err := token.NewGrantID(id, now, zeros{})
	if err != nil {
		t.Fatal(err)
	}
	parent := &token.Claims{Audience: "orders", Scopes: []string{"a", "b"}, Lineage: []token.Member{{Identity: id, Grant: grant}}}
	for _, q := range []broker.Question{
		{Action: broker.ActionIssue, Audience: "orders"},
		{Action: broker.ActionIssue, Audience: "orders", Scopes: []string{"a"}, TTL: time.Minute, Binding: token.BindingX5T},
		{Action: broker.ActionExchange, Audience: "ledger", Parent: parent},
		{Action: broker.ActionRevoke, Selectors: []string{"identity:" + id.String()}, Lock: broker.LockReissue},
		{Action: broker.ActionFollow, Audiences: []string{"orders"}, MaxStaleness: time.Second, AcceptsStale: true},
		{Action: broker.ActionRelay, MaxStaleness: time.Second},
		{Action: broker.ActionList},
		{Action: broker.ActionIssue, Audience: "orders", Caller: broker.Caller{ID: id, JWT: &broker.JWTSVID{IssuedAt: now.Add(-time.Minute), Expires: now.Add(time.Minute)}}},
	} {
		q.Time = now
		if q.Caller.JWT == nil {
			q.Caller = caller
		}
		line, err := json.Marshal(broker.AskedOf(q))
		if err != nil {
			t.Fatal(err)
		}
		var a broker.Asked
		if err := json.Unmarshal(line, &a); err != nil {
			t.Fatal(err)
		}
		got, err := Question(q.Caller.Actor(), a)
		if want := input(q); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %v\n got %+v\nwant %+v", q.Action, err, got, want)
		}
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }

// The broker is told which audiences no feed reaches, templates too.
func TestExternalAudiences(t *testing.T) {
	dir := t.TempDir()
	if err := os.CopyFS(dir, policy.Default()); err != nil {
		t.Fatal(err)
	}
	data := `audiences:
  orders: {owner: o, identities: ["spiffe://example.org/orders"]}
  api: {owner: a, verified_by: introspection}
  sts: {owner: cloud team, verified_by: external}
  "m/{segment.1}": {owner: storage team, verified_by: external}
`
	if err := os.WriteFile(filepath.Join(dir, "data.yaml"), []byte(data), 0o600); err != nil {
		t.Fatal(err)
	}
	p, err := policy.Load(t.Context(), policy.Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	got := decider{p}.External()
	if len(got) != 2 || got[0].Name != "m/{segment.1}" || got[1].Name != "sts" || got[1].Owner != "cloud team" || got[1].VerifiedBy != broker.VerifiedByExternal {
		t.Errorf("got %+v", got)
	}
}
