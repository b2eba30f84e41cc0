package keys_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"math/big"
	"net/url"
	"slices"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/dayflyhq/dayfly/broker/keys"
	"github.com/dayflyhq/dayfly/proto/boottime"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk/spiffetest"
)

// record returns what a ring publishes with the given SVID.
func record(t testing.TB, issuer string, svid *x509svid.SVID) feed.Key {
	t.Helper()
	var key feed.Key
	r, err := keys.New(keys.Config{
		Issuer:  issuer,
		Boot:    boottime.Now,
		SVID:    func() (*x509svid.SVID, error) { return svid, nil },
		Publish: publishTo(&key),
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Rotate(t.Context()); err != nil {
		t.Fatal(err)
	}
	return key
}

func mustIssue(t testing.TB, td *spiffetest.TrustDomain, id spiffeid.ID, opts spiffetest.SVIDOptions) *x509svid.SVID {
	t.Helper()
	svid, err := td.IssueSVID(id, opts)
	if err != nil {
		t.Fatal(err)
	}
	return svid
}

func clone(k feed.Key) feed.Key {
	k.DER, k.Signature = bytes.Clone(k.DER), bytes.Clone(k.Signature)
	k.Certificates = slices.Clone(k.Certificates)
	for i := range k.Certificates {
		k.Certificates[i] = bytes.Clone(k.Certificates[i])
	}
	return k
}

func TestVerifyKey(t *testing.T) {
	td := spiffetest.ForTest(t, spiffetest.Config{TrustDomain: domain})
	impostor := spiffetest.ForTest(t, spiffetest.Config{TrustDomain: domain}) // same name, other authority
	elsewhere := spiffetest.ForTest(t, spiffetest.Config{TrustDomain: spiffeid.RequireTrustDomainFromString("other.org")})
	now := time.Now()
	svid := mustIssue(t, td, brokerID, spiffetest.SVIDOptions{})
	good := record(t, issuer, svid)
	second := record(t, issuer, svid)
	workload := spiffeid.RequireFromPath(domain, "/payments")
	foreignID := spiffeid.RequireFromPath(elsewhere.Name(), brokerID.Path())

	tests := []struct {
		name   string
		key    func() feed.Key
		issuer string
		bundle x509bundle.Source
		at     time.Time
		ok     bool
	}{
		{name: "good", ok: true},
		{name: "good at its time, though the SVID has expired since", at: now.Add(-2 * time.Hour), ok: true, key: func() feed.Key {
			return record(t, issuer, mustIssue(t, td, brokerID, spiffetest.SVIDOptions{
				NotBefore: now.Add(-3 * time.Hour), NotAfter: now.Add(-time.Hour)}))
		}},
		{name: "another issuer", issuer: "https://other.example.org"},
		{name: "a workload's SVID", key: func() feed.Key {
			return record(t, issuer, mustIssue(t, td, workload, spiffetest.SVIDOptions{}))
		}},
		{name: "an authority outside the bundle", key: func() feed.Key {
			return record(t, issuer, mustIssue(t, impostor, brokerID, spiffetest.SVIDOptions{}))
		}},
		{name: "the broker's path in another trust domain", key: func() feed.Key {
			return record(t, issuer, mustIssue(t, elsewhere, foreignID, spiffetest.SVIDOptions{}))
		}},
		{name: "a bundle without the trust domain", bundle: elsewhere},
		{name: "SVID expired at the time", at: now.Add(2 * time.Hour)},
		{name: "SVID not yet valid at the time", at: now.Add(-2 * time.Hour)},
		{name: "no certificate", key: func() feed.Key {
			k := clone(good)
			k.Certificates = nil
			return k
		}},
		{name: "too many certificates", key: func() feed.Key {
			k := clone(good)
			for range 10 {
				k.Certificates = append(k.Certificates, k.Certificates[0])
			}
			return k
		}},
		{name: "a broken certificate", key: func() feed.Key {
			k := clone(good)
			k.Certificates[0] = k.Certificates[0][:100]
			return k
		}},
		{name: "the authority's certificate as leaf", key: func() feed.Key {
			k := clone(good)
			k.Certificates = [][]byte{td.Bundle().X509Authorities()[0].Raw}
			return k
		}},
		{name: "no signature", key: func() feed.Key {
			k := clone(good)
			k.Signature = nil
			return k
		}},
		{name: "another key's signature", key: func() feed.Key {
			k := clone(good)
			k.Signature = second.Signature
			return k
		}},
		{name: "a key put in place of the signed one", key: func() feed.Key {
			k := clone(good)
			k.Public, k.DER = second.Public, second.DER
			return k
		}},
		{name: "DER of another key", key: func() feed.Key {
			k := clone(good)
			k.DER = second.DER
			return k
		}},
		{name: "DER with a tail", key: func() feed.Key {
			k := clone(good)
			k.DER = append(k.DER, 0)
			return k
		}},
		{name: "no DER", key: func() feed.Key {
			k := clone(good)
			k.DER = nil
			return k
		}},
		{name: "Public of another key under the signed ID", key: func() feed.Key {
			k := clone(good)
			k.Public.Key = second.Public.Key
			return k
		}},
		{name: "no Public", key: func() feed.Key {
			k := clone(good)
			k.Public.Key = nil
			return k
		}},
		{name: "an ID that isn't derived", key: func() feed.Key {
			k := clone(good)
			k.Public.ID = second.Public.ID
			return k
		}},
		{name: "another algorithm", key: func() feed.Key {
			k := clone(good)
			k.Public.Algorithm = token.EdDSA
			return k
		}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			key, iss, bundle, at := good, issuer, x509bundle.Source(td), now
			if test.key != nil {
				key = test.key()
			}
			if test.issuer != "" {
				iss = test.issuer
			}
			if test.bundle != nil {
				bundle = test.bundle
			}
			if !test.at.IsZero() {
				at = test.at
			}
			err := keys.VerifyKey(iss, key, bundle, spiffeid.MatchID(brokerID), at)
			switch {
			case test.ok && err != nil:
				t.Error(err)
			case !test.ok && !errors.Is(err, keys.ErrUntrustedKey):
				t.Errorf("got %v, want %v", err, keys.ErrUntrustedKey)
			}
		})
	}
}

// A broker's SVID vouches for the record as it is, and the record is odd: each rule
// about the public key alone.
func TestVerifyKeyRefusesOddKeysThatWereSigned(t *testing.T) {
	td := spiffetest.ForTest(t, spiffetest.Config{TrustDomain: domain})
	svid := mustIssue(t, td, brokerID, spiffetest.SVIDOptions{})
	good, other := record(t, issuer, svid), record(t, issuer, svid)
	for name, change := range map[string]func(*feed.Key){
		"nothing":                  func(*feed.Key) {},
		"an ID that isn't derived": func(k *feed.Key) { k.Public.ID = other.Public.ID },
		"DER of another key":       func(k *feed.Key) { k.DER = other.DER },
		"another algorithm":        func(k *feed.Key) { k.Public.Algorithm = token.EdDSA },
		"DER with a tail":          func(k *feed.Key) { k.DER = append(k.DER, 0) },
		// The point's first byte is 4. Without its five leading zero bits the bit string is
		// another one of the same length, which Go's parser reads as the same point.
		"DER spelt otherwise": func(k *feed.Key) {
			point := k.DER[len(k.DER)-65:]
			k.DER[len(k.DER)-66] = 5
			copy(point, new(big.Int).Lsh(new(big.Int).SetBytes(point), 5).Bytes())
		},
	} {
		t.Run(name, func(t *testing.T) {
			key := clone(good)
			change(&key)
			digest := sha256.Sum256(feed.KeyStatement(issuer, key.Public, key.DER))
			signature, err := svid.PrivateKey.Sign(rand.Reader, digest[:], crypto.SHA256)
			if err != nil {
				t.Fatal(err)
			}
			key.Signature = signature
			err = keys.VerifyKey(issuer, key, td, spiffeid.MatchID(brokerID), time.Now())
			if good := name == "nothing"; good != (err == nil) {
				t.Errorf("got %v", err)
			}
		})
	}
}

// The identity alone is in question here: with any matcher but the broker's the
// workload's record is good.
func TestVerifyKeyAsksTheMatcher(t *testing.T) {
	td := spiffetest.ForTest(t, spiffetest.Config{TrustDomain: domain})
	workload := spiffeid.RequireFromPath(domain, "/payments")
	key := record(t, issuer, mustIssue(t, td, workload, spiffetest.SVIDOptions{}))
	if err := keys.VerifyKey(issuer, key, td, spiffeid.MatchID(workload), time.Now()); err != nil {
		t.Error(err)
	}
}

// SPIFFE leaves the SVID's kind of key to the issuer.
func TestVerifyKeyOfEveryKindOfSVID(t *testing.T) {
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	_, edKey, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for name, key := range map[string]crypto.Signer{
		"P-256": ecKey(t, elliptic.P256()), "P-384": ecKey(t, elliptic.P384()), "P-521": ecKey(t, elliptic.P521()),
		"RSA": rsaKey, "Ed25519": edKey,
	} {
		t.Run(name, func(t *testing.T) {
			svid, bundle := certify(t, key)
			k := record(t, issuer, svid)
			if err := keys.VerifyKey(issuer, k, bundle, spiffeid.MatchID(brokerID), time.Now()); err != nil {
				t.Error(err)
			}
			k.Signature[len(k.Signature)-1] ^= 1
			if err := keys.VerifyKey(issuer, k, bundle, spiffeid.MatchID(brokerID), time.Now()); err == nil {
				t.Error("a changed signature is good")
			}
		})
	}
}

func ecKey(t *testing.T, curve elliptic.Curve) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// certify makes an SVID of the broker for a key, and the bundle that trusts it.
func certify(t *testing.T, key crypto.Signer) (*x509svid.SVID, *x509bundle.Bundle) {
	t.Helper()
	caKey := ecKey(t, elliptic.P256())
	ca := newCertificate(t, &x509.Certificate{
		IsCA: true, KeyUsage: x509.KeyUsageCertSign, URIs: []*url.URL{domain.ID().URL()},
	}, nil, caKey.Public(), caKey)
	leaf := newCertificate(t, &x509.Certificate{
		KeyUsage: x509.KeyUsageDigitalSignature, URIs: []*url.URL{brokerID.URL()},
	}, ca, key.Public(), caKey)
	return &x509svid.SVID{ID: brokerID, Certificates: []*x509.Certificate{leaf}, PrivateKey: key},
		x509bundle.FromX509Authorities(domain, []*x509.Certificate{ca})
}

func newCertificate(t *testing.T, template, parent *x509.Certificate, pub crypto.PublicKey, signer crypto.Signer) *x509.Certificate {
	t.Helper()
	template.SerialNumber = big.NewInt(1)
	template.BasicConstraintsValid = true
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Minute), time.Now().Add(time.Hour)
	if parent == nil {
		parent = template
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, pub, signer)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// FuzzVerifyKey: whatever bytes the store holds, only the key that the broker's SVID
// vouched for is ever good.
func FuzzVerifyKey(f *testing.F) {
	td := spiffetest.ForTest(f, spiffetest.Config{TrustDomain: domain})
	svid, err := td.IssueSVID(brokerID, spiffetest.SVIDOptions{})
	if err != nil {
		f.Fatal(err)
	}
	good := record(f, issuer, svid)
	now := time.Now()
	f.Add(good.Public.ID.String(), string(good.Public.Algorithm), good.DER, good.Certificates[0], good.Signature)
	f.Add(good.Public.ID.String(), "EdDSA", good.DER, good.Certificates[0], []byte{})
	f.Add("AAAAAAAA", "ES256", []byte{0x30}, []byte{0x30, 0}, []byte{0x30, 6, 2, 1, 1, 2, 1, 1})
	f.Fuzz(func(t *testing.T, id, alg string, der, cert, signature []byte) {
		kid, err := token.ParseKeyID(id)
		if err != nil {
			return
		}
		pub, _ := x509.ParsePKIXPublicKey(der)
		key := feed.Key{
			Public: token.PublicKey{ID: kid, Algorithm: token.Algorithm(alg), Key: pub},
			DER:    der, Certificates: [][]byte{cert}, Signature: signature,
		}
		if err := keys.VerifyKey(issuer, key, td, spiffeid.MatchID(brokerID), now); err == nil &&
			(kid != good.Public.ID || !bytes.Equal(der, good.DER) || key.Public.Algorithm != good.Public.Algorithm) {
			t.Errorf("a key that nobody vouched for is good: %s", kid)
		}
	})
}
