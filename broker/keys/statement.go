package keys

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/token"
)

// maxChain bounds the certificates of a key record: a leaf and more intermediates
// than any SPIFFE deployment nests.
const maxChain = 10

// ErrUntrustedKey is wrapped by every complaint of VerifyKey.
var ErrUntrustedKey = errors.New("untrusted signing key")

func untrusted(what string, err error) error {
	return fmt.Errorf("%w: %s: %w", ErrUntrustedKey, what, err)
}

// vouch makes the record of a public key, signed by the broker's SVID.
func (r *Ring) vouch(pub token.PublicKey, svid *x509svid.SVID) (feed.Key, error) {
	der, err := x509.MarshalPKIXPublicKey(pub.Key)
	if err != nil {
		return feed.Key{}, fmt.Errorf("encoding the public key: %w", err)
	}
	signature, err := signStatement(svid.PrivateKey, feed.KeyStatement(r.cfg.Issuer, pub, der))
	if err != nil {
		return feed.Key{}, fmt.Errorf("signing the key statement: %w", err)
	}
	key := feed.Key{Public: pub, DER: der, Signature: signature}
	for _, cert := range svid.Certificates {
		key.Certificates = append(key.Certificates, cert.Raw)
	}
	return key, nil
}

// statementAlgorithm is how an SVID's key signs a key statement. It follows from the
// public key alone, so that there is nothing to negotiate.
func statementAlgorithm(pub crypto.PublicKey) (x509.SignatureAlgorithm, crypto.Hash, error) {
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

func signStatement(key crypto.Signer, statement []byte) ([]byte, error) {
	_, hash, err := statementAlgorithm(key.Public())
	if err != nil {
		return nil, err
	}
	return crypto.SignMessage(key, rand.Reader, statement, hash)
}

// VerifyKey checks a key record: that its ID, algorithm and DER say the same key,
// that its leaf is an X.509-SVID whose SPIFFE ID broker accepts and whose chain was
// good for the bundle at the given time, and that the leaf's key signed the statement
// for this issuer. A key that fails is never published and never checks a token.
// Errors wrap ErrUntrustedKey.
//
// The time is that of the record. It is under the log's running hash, but whoever
// holds a long expired SVID of a broker and writes the store could choose it: give
// the present instead for a record that arrives now.
func VerifyKey(issuer string, key feed.Key, bundle x509bundle.Source, broker spiffeid.Matcher, at time.Time) error {
	if err := verifyPublic(key); err != nil {
		return untrusted("reading the public key", err)
	}
	certs, err := parseChain(key.Certificates)
	if err != nil {
		return untrusted("reading certificates", err)
	}
	id, err := x509svid.IDFromCert(certs[0])
	if err != nil {
		return untrusted("reading the maker's identity", err)
	}
	if err := broker(id); err != nil {
		return untrusted("matching the maker's identity", err)
	}
	if _, _, err := x509svid.Verify(certs, bundle, x509svid.WithTime(at)); err != nil {
		return untrusted("verifying the maker's SVID", err)
	}
	alg, _, err := statementAlgorithm(certs[0].PublicKey)
	if err != nil {
		return untrusted("verifying the key statement", err)
	}
	if err := certs[0].CheckSignature(alg, feed.KeyStatement(issuer, key.Public, key.DER), key.Signature); err != nil {
		return untrusted("verifying the key statement", err)
	}
	return nil
}

func verifyPublic(key feed.Key) error {
	parsed, err := x509.ParsePKIXPublicKey(key.DER)
	if err != nil {
		return err
	}
	pub, err := token.NewPublicKey(key.Public.Algorithm, parsed)
	if err != nil {
		return err
	}
	der, err := x509.MarshalPKIXPublicKey(parsed)
	if err != nil {
		return err
	}
	same, ok := key.Public.Key.(interface{ Equal(crypto.PublicKey) bool })
	switch {
	case !bytes.Equal(der, key.DER):
		return errors.New("its DER has another spelling")
	case pub.ID != key.Public.ID:
		return fmt.Errorf("its ID is %s, not %s", pub.ID, key.Public.ID)
	case !ok || !same.Equal(parsed):
		return errors.New("its DER is that of another key")
	}
	return nil
}

func parseChain(chain [][]byte) ([]*x509.Certificate, error) {
	if len(chain) == 0 || len(chain) > maxChain {
		return nil, fmt.Errorf("%d of them, want 1 to %d", len(chain), maxChain)
	}
	certs := make([]*x509.Certificate, 0, len(chain))
	for _, der := range chain {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, err
		}
		certs = append(certs, cert)
	}
	return certs, nil
}
