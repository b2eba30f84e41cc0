// Package vouch is how a broker's SVID puts its name to a statement, and how both ends
// check that: a broker that reads a store, and whoever a relay on another host stands
// before.
//
// The signature follows from the SVID's key alone, so there is nothing to negotiate:
// ECDSA with SHA-256, -384 or -512 by the size of the curve (ASN.1), RSA PKCS #1 v1.5
// with SHA-256, or Ed25519.
package vouch

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/dayflyhq/dayfly/proto/feed"
)

// maxChain bounds the certificates of a statement: a leaf and more intermediates than any
// SPIFFE deployment nests.
const maxChain = 10

// Sign signs a statement with an SVID, and returns the SVID's chain in DER.
func Sign(svid *x509svid.SVID, statement []byte) (signature []byte, certificates [][]byte, err error) {
	_, hash, err := algorithm(svid.PrivateKey.Public())
	if err != nil {
		return nil, nil, err
	}
	signature, err = crypto.SignMessage(svid.PrivateKey, rand.Reader, statement, hash)
	if err != nil {
		return nil, nil, err
	}
	for _, cert := range svid.Certificates {
		certificates = append(certificates, cert.Raw)
	}
	return signature, certificates, nil
}

// Verify checks that the leaf is an X.509-SVID whose SPIFFE ID who accepts, that its
// chain was good for the bundle at the given time, and that its key signed the statement.
func Verify(statement, signature []byte, certificates [][]byte, bundle x509bundle.Source, who spiffeid.Matcher, at time.Time) error {
	certs, err := Chain(certificates)
	if err != nil {
		return fmt.Errorf("reading certificates: %w", err)
	}
	id, err := x509svid.IDFromCert(certs[0])
	if err != nil {
		return fmt.Errorf("reading the signer's identity: %w", err)
	}
	if err := who(id); err != nil {
		return fmt.Errorf("matching the signer's identity: %w", err)
	}
	if _, _, err := x509svid.Verify(certs, bundle, x509svid.WithTime(at)); err != nil {
		return fmt.Errorf("verifying the signer's SVID: %w", err)
	}
	alg, _, err := algorithm(certs[0].PublicKey)
	if err != nil {
		return fmt.Errorf("verifying the statement: %w", err)
	}
	if err := certs[0].CheckSignature(alg, statement, signature); err != nil {
		return fmt.Errorf("verifying the statement: %w", err)
	}
	return nil
}

// Chain parses a chain of certificates, leaf first.
func Chain(certificates [][]byte) ([]*x509.Certificate, error) {
	if len(certificates) == 0 || len(certificates) > maxChain {
		return nil, fmt.Errorf("%d of them, want 1 to %d", len(certificates), maxChain)
	}
	certs := make([]*x509.Certificate, 0, len(certificates))
	for _, der := range certificates {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, err
		}
		certs = append(certs, cert)
	}
	return certs, nil
}

func algorithm(pub crypto.PublicKey) (x509.SignatureAlgorithm, crypto.Hash, error) {
	switch k := pub.(type) {
	case *ecdsa.PublicKey:
		switch bits := k.Curve.Params().BitSize; {
		case bits >= 512:
			return x509.ECDSAWithSHA512, crypto.SHA512, nil
		case bits >= 384:
			return x509.ECDSAWithSHA384, crypto.SHA384, nil
		}
		return x509.ECDSAWithSHA256, crypto.SHA256, nil
	case *rsa.PublicKey:
		return x509.SHA256WithRSA, crypto.SHA256, nil
	case ed25519.PublicKey:
		return x509.PureEd25519, 0, nil
	}
	return 0, 0, fmt.Errorf("an SVID with a %T can't sign", pub)
}

// SignHead signs a head for an issuer.
func SignHead(svid *x509svid.SVID, issuer string, s feed.HeadStatement) (feed.SignedHead, error) {
	h := feed.SignedHead{Statement: s.Encode()}
	var err error
	h.Signature, h.Certificates, err = Sign(svid, feed.HeadText(issuer, h.Statement))
	if err != nil {
		return feed.SignedHead{}, fmt.Errorf("signing a head: %w", err)
	}
	return h, nil
}

// VerifyHead checks a signed head of an issuer, made by an SVID that who accepts and that
// is good now, and returns what it says.
func VerifyHead(issuer string, h feed.SignedHead, bundle x509bundle.Source, who spiffeid.Matcher, now time.Time) (feed.HeadStatement, error) {
	s, err := feed.ParseHeadStatement(h.Statement)
	if err != nil {
		return feed.HeadStatement{}, err
	}
	if err := Verify(feed.HeadText(issuer, h.Statement), h.Signature, h.Certificates, bundle, who, now); err != nil {
		return feed.HeadStatement{}, fmt.Errorf("verifying a signed head: %w", err)
	}
	return s, nil
}

// VerifyKeptHead is VerifyHead for one that was kept for a while: its SVID, which lives
// for an hour, need only have been good when it says it signed. Whoever holds the key of a
// broker's expired SVID can so make one.
func VerifyKeptHead(issuer string, h feed.SignedHead, bundle x509bundle.Source, who spiffeid.Matcher, now time.Time) (feed.HeadStatement, error) {
	s, err := VerifyHead(issuer, h, bundle, who, now)
	if err == nil {
		return s, nil
	}
	kept, parseErr := feed.ParseHeadStatement(h.Statement)
	if parseErr != nil {
		return feed.HeadStatement{}, err
	}
	return VerifyHead(issuer, h, bundle, who, kept.SignedAt)
}
