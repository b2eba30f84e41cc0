package verify_test

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/sdk/spiffetest"
	"github.com/dayflyhq/dayfly/sdk/verify"
)

// BenchmarkVerify is the cost of one verification, with a set of revocations of the size
// of a bad day. "uncounted" is the same without the use report, "counting" is the
// difference alone. BenchmarkFloor is the signature alone.
func BenchmarkVerify(b *testing.B) {
	w := newWorld(b, nil)
	for range 1000 {
		c := w.claims(b)
		w.revoke(b, revocation.Grant(c.Grant()))
	}
	w.ready(b)
	w.applied(b, w.head().Seq)
	raw := w.good(b)
	peer := verify.Peer{ID: payments, Address: "192.0.2.1"}
	b.Run("one", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := w.verifier.Verify(b.Context(), raw, peer); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("uncounted", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if err := w.verifier.Judge(raw, peer); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("counting", func(b *testing.B) {
		count := w.verifier.Counter(raw, peer)
		b.ReportAllocs()
		for b.Loop() {
			count()
		}
	})
	b.Run("parallel", func(b *testing.B) {
		b.ReportAllocs()
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				if _, err := w.verifier.Verify(b.Context(), raw, peer); err != nil {
					b.Error(err)
				}
			}
		})
	})
}

// BenchmarkPeerOf is what the middleware does beside it: "first" has never seen the chain.
func BenchmarkPeerOf(b *testing.B) {
	td := spiffetest.ForTest(b, spiffetest.Config{TrustDomain: payments.TrustDomain()})
	svid, err := td.IssueSVID(payments, spiffetest.SVIDOptions{})
	if err != nil {
		b.Fatal(err)
	}
	bundle := td.Bundle()
	v, err := verify.New(verify.Config{Conn: noConn{}, Audiences: []string{"orders"}, Bundles: bundle})
	if err != nil {
		b.Fatal(err)
	}
	state := &tls.ConnectionState{PeerCertificates: svid.Certificates}
	for name, of := range map[string]func() verify.Peer{
		"first": func() verify.Peer { return verify.PeerOf(state, bundle, "192.0.2.1:443", time.Now()) },
		"again": func() verify.Peer { return v.PeerOf(state, "192.0.2.1:443") },
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if of().ID != payments {
					b.Fatal("not believed")
				}
			}
		})
	}
}

func BenchmarkFloor(b *testing.B) {
	key := stranger(b)
	digest := sha256.Sum256([]byte("a token's signing input"))
	sig, err := ecdsa.SignASN1(rand.Reader, key, digest[:])
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if !ecdsa.VerifyASN1(&key.PublicKey, digest[:], sig) {
			b.Fatal("bad signature")
		}
	}
}
