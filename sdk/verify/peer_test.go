package verify_test

import (
	"crypto/tls"
	"crypto/x509"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/sdk/spiffetest"
	"github.com/dayflyhq/dayfly/sdk/verify"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// A connection outlives an SVID and a trust domain: the peer is judged as of now.
func TestPeerOf(t *testing.T) {
	td := spiffetest.ForTest(t, spiffetest.Config{TrustDomain: spiffeid.RequireTrustDomainFromString("example.org")})
	foreign := spiffetest.ForTest(t, spiffetest.Config{TrustDomain: spiffeid.RequireTrustDomainFromString("example.org")})
	now := time.Now()
	mint := func(td *spiffetest.TrustDomain) *tls.ConnectionState {
		svid, err := td.IssueSVID(payments, spiffetest.SVIDOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return &tls.ConnectionState{PeerCertificates: svid.Certificates}
	}
	ours := mint(td)
	verified := *ours
	verified.VerifiedChains = [][]*x509.Certificate{ours.PeerCertificates}
	tests := []struct {
		name    string
		state   *tls.ConnectionState
		bundles bool
		at      time.Time
		want    bool
	}{
		{"ours", ours, true, now, true},
		{"expired since", ours, true, now.Add(2 * spiffetest.DefaultSVIDTTL), false},
		{"not yet valid", ours, true, now.Add(-2 * spiffetest.DefaultSVIDTTL), false},
		{"of an authority that we don't know", mint(foreign), true, now, false},
		{"verified by nobody", ours, false, now, false},
		{"verified by crypto/tls", &verified, false, now, true},
		{"no TLS", nil, true, now, false},
		{"no certificate", &tls.ConnectionState{}, true, now, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got := verify.PeerOf(tt.state, nil, "[::1]:443", tt.at)
			if tt.bundles {
				got = verify.PeerOf(tt.state, td, "[::1]:443", tt.at)
			}
			if (got.ID == payments) != tt.want || (got.Certificate != nil) != tt.want || got.Address != "::1" {
				t.Errorf("got %+v", got)
			}
		})
	}
}
