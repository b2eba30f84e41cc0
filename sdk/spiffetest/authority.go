package spiffetest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// An authority's certificate is valid for longer than any test or trial, and from
// long enough ago that SVIDs may be minted for the past.
const (
	caBackdate = 365 * 24 * time.Hour
	caLifetime = 10 * 365 * 24 * time.Hour
)

// SVIDOptions dates an SVID. A zero time means what the Workload API would have
// given: now less Config.Backdate, and now plus the configured TTL.
type SVIDOptions struct {
	NotBefore time.Time
	NotAfter  time.Time
}

// authority is an X.509 authority: it signs the SVIDs of one trust domain.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(td spiffeid.TrustDomain, now time.Time) (*authority, error) {
	key, err := newKey()
	if err != nil {
		return nil, err
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{Organization: []string{"spiffetest"}, CommonName: td.Name()},
		NotBefore:             now.Add(-caBackdate),
		NotAfter:              now.Add(caLifetime),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		URIs:                  []*url.URL{td.ID().URL()},
	}
	cert, err := createCertificate(template, template, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("creating an X.509 authority: %w", err)
	}
	return &authority{cert: cert, key: key}, nil
}

// issue mints an X509-SVID with a key and a serial number of its own.
func (a *authority) issue(id spiffeid.ID, notBefore, notAfter time.Time) (*x509svid.SVID, error) {
	key, err := newKey()
	if err != nil {
		return nil, err
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{Organization: []string{"spiffetest"}},
		NotBefore:             notBefore,
		NotAfter:              notAfter,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
		URIs:                  []*url.URL{id.URL()},
	}
	cert, err := createCertificate(template, a.cert, key.Public(), a.key)
	if err != nil {
		return nil, fmt.Errorf("creating an X509-SVID: %w", err)
	}
	return &x509svid.SVID{ID: id, Certificates: []*x509.Certificate{cert}, PrivateKey: key}, nil
}

func createCertificate(template, parent *x509.Certificate, pub crypto.PublicKey, key *ecdsa.PrivateKey) (*x509.Certificate, error) {
	der, err := x509.CreateCertificate(rand.Reader, template, parent, pub, key)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

func newKey() (*ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("creating a key: %w", err)
	}
	return key, nil
}

// newSerial returns a random positive serial number of at most 127 bits, within
// the 20 octets of RFC 5280, section 4.1.2.2.
func newSerial() (*big.Int, error) {
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, fmt.Errorf("creating a serial number: %w", err)
	}
	return n.Add(n, big.NewInt(1)), nil
}

// jwtAuthority signs JWT-SVIDs.
type jwtAuthority struct {
	kid string
	key *ecdsa.PrivateKey
}

func newJWTAuthority() (*jwtAuthority, error) {
	key, err := newKey()
	if err != nil {
		return nil, err
	}
	kid := make([]byte, 8)
	rand.Read(kid) // never fails: it ends the process instead
	return &jwtAuthority{kid: hex.EncodeToString(kid), key: key}, nil
}

func (a *jwtAuthority) bundle(td spiffeid.TrustDomain) *jwtbundle.Bundle {
	return jwtbundle.FromJWTAuthorities(td, map[string]crypto.PublicKey{a.kid: a.key.Public()})
}

// issue mints a JWT-SVID with the claims of the JWT-SVID specification and no
// others (so no jti, as SPIRE's).
func (a *jwtAuthority) issue(id spiffeid.ID, audience []string, issued, expires time.Time) (string, error) {
	token := jwt.NewWithClaims(jwt.SigningMethodES256, jwt.MapClaims{
		"sub": id.String(),
		"aud": audience,
		"iat": issued.Unix(),
		"exp": expires.Unix(),
	})
	token.Header["kid"] = a.kid
	signed, err := token.SignedString(a.key)
	if err != nil {
		return "", fmt.Errorf("signing a JWT-SVID: %w", err)
	}
	return signed, nil
}

// validateJWTSVID checks a JWT-SVID for an audience as the JWT-SVID specification
// wants it, by the given clock, and returns its subject and claims.
func validateJWTSVID(token, audience string, bundles jwtbundle.Source, now func() time.Time) (spiffeid.ID, jwt.MapClaims, error) {
	var subject spiffeid.ID
	claims := jwt.MapClaims{}
	parser := jwt.NewParser(
		jwt.WithValidMethods([]string{"RS256", "RS384", "RS512", "ES256", "ES384", "ES512", "PS256", "PS384", "PS512"}),
		jwt.WithAudience(audience), jwt.WithExpirationRequired(), jwt.WithTimeFunc(now))
	_, err := parser.ParseWithClaims(token, claims, func(t *jwt.Token) (any, error) {
		if typ, ok := t.Header["typ"]; ok && typ != "JWT" && typ != "JOSE" {
			return nil, fmt.Errorf("header typ is %q, want JWT or JOSE", typ)
		}
		sub, err := claims.GetSubject()
		if err != nil {
			return nil, err
		}
		if subject, err = spiffeid.FromString(sub); err != nil {
			return nil, err
		}
		bundle, err := bundles.GetJWTBundleForTrustDomain(subject.TrustDomain())
		if err != nil {
			return nil, err
		}
		kid, _ := t.Header["kid"].(string)
		key, ok := bundle.FindJWTAuthority(kid)
		if !ok {
			return nil, errors.New("signed by an unknown authority")
		}
		return key, nil
	})
	if err != nil {
		return spiffeid.ID{}, nil, err
	}
	return subject, claims, nil
}
