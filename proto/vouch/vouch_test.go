package vouch_test

import (
	"crypto/sha256"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/vouch"
	"github.com/dayflyhq/dayfly/sdk/spiffetest"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

const issuer = "https://dayfly.example.org"

var (
	domain   = spiffeid.RequireTrustDomainFromString("example.org")
	brokerID = spiffeid.RequireFromPath(domain, "/dayfly/broker")
	workload = spiffeid.RequireFromPath(domain, "/payments")
)

func issue(t *testing.T, td *spiffetest.TrustDomain, id spiffeid.ID, opts spiffetest.SVIDOptions) *x509svid.SVID {
	t.Helper()
	svid, err := td.IssueSVID(id, opts)
	if err != nil {
		t.Fatal(err)
	}
	return svid
}

func statement(at time.Time) feed.HeadStatement {
	p := feed.Position{Era: 7, Seq: 9, Sum: sha256.Sum256([]byte("head"))}
	return feed.HeadStatement{Head: p, Horizon: p, SignedAt: at.UTC().Truncate(0)}
}

func sign(t *testing.T, svid *x509svid.SVID, at time.Time) feed.SignedHead {
	t.Helper()
	h, err := vouch.SignHead(svid, issuer, statement(at))
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// TestVerifyHead: a head counts when the pinned broker signed it, for this issuer, with an
// SVID that is good now.
func TestVerifyHead(t *testing.T) {
	td := spiffetest.ForTest(t, spiffetest.Config{TrustDomain: domain})
	impostor := spiffetest.ForTest(t, spiffetest.Config{TrustDomain: domain}) // same name, other authority
	now := time.Now()
	good := sign(t, issue(t, td, brokerID, spiffetest.SVIDOptions{}), now)
	if s, err := vouch.VerifyHead(issuer, good, td, spiffeid.MatchID(brokerID), now); err != nil || s != statement(now) {
		t.Fatalf("got %+v, %v", s, err)
	}
	changed := good
	changed.Statement = statement(now.Add(time.Second)).Encode()
	malformed := good
	malformed.Statement = append(malformed.Statement[:len(malformed.Statement):len(malformed.Statement)], 0)
	bare := good
	bare.Certificates = nil
	for name, c := range map[string]struct {
		head   feed.SignedHead
		issuer string
		now    time.Time
	}{
		"signed by a workload":           {sign(t, issue(t, td, workload, spiffetest.SVIDOptions{}), now), issuer, now},
		"signed under another authority": {sign(t, issue(t, impostor, brokerID, spiffetest.SVIDOptions{}), now), issuer, now},
		"another statement":              {changed, issuer, now},
		"not canonical":                  {malformed, issuer, now},
		"without a chain":                {bare, issuer, now},
		"for another issuer":             {good, "https://other.example.org", now},
		"an SVID that has expired":       {good, issuer, now.Add(48 * time.Hour)},
	} {
		if s, err := vouch.VerifyHead(c.issuer, c.head, td, spiffeid.MatchID(brokerID), c.now); err == nil {
			t.Errorf("%s: %+v", name, s)
		}
	}
}

// TestVerifyKeptHead: a head that was kept needs an SVID that was good when it was signed.
func TestVerifyKeptHead(t *testing.T) {
	td := spiffetest.ForTest(t, spiffetest.Config{TrustDomain: domain})
	now := time.Now()
	long := issue(t, td, brokerID, spiffetest.SVIDOptions{NotBefore: now.Add(-10 * time.Hour), NotAfter: now.Add(-9 * time.Hour)})
	kept, before := sign(t, long, now.Add(-9*time.Hour-time.Minute)), sign(t, long, now.Add(-11*time.Hour))
	if _, err := vouch.VerifyHead(issuer, kept, td, spiffeid.MatchID(brokerID), now); err == nil {
		t.Error("an expired SVID counts as one that is good now")
	}
	if s, err := vouch.VerifyKeptHead(issuer, kept, td, spiffeid.MatchID(brokerID), now); err != nil || s.Head.Seq != 9 {
		t.Errorf("got %+v, %v", s, err)
	}
	if _, err := vouch.VerifyKeptHead(issuer, before, td, spiffeid.MatchID(brokerID), now); err == nil {
		t.Error("signed before the SVID was good")
	}
	other := sign(t, issue(t, td, workload, spiffetest.SVIDOptions{}), now)
	if _, err := vouch.VerifyKeptHead(issuer, other, td, spiffeid.MatchID(brokerID), now); err == nil {
		t.Error("signed by a workload")
	}
	// Signed with an SVID that is good now, by a clock that was off.
	if _, err := vouch.VerifyKeptHead(issuer, sign(t, issue(t, td, brokerID, spiffetest.SVIDOptions{}), now.Add(-99*time.Hour)), td, spiffeid.MatchID(brokerID), now); err != nil {
		t.Error(err)
	}
}
