package keys

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/proto/vouch"
)

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
	signature, certificates, err := vouch.Sign(svid, feed.KeyStatement(r.cfg.Issuer, pub, der))
	if err != nil {
		return feed.Key{}, fmt.Errorf("signing the key statement: %w", err)
	}
	return feed.Key{Public: pub, DER: der, Certificates: certificates, Signature: signature}, nil
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
	if err := vouch.Verify(feed.KeyStatement(issuer, key.Public, key.DER), key.Signature, key.Certificates, bundle, broker, at); err != nil {
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
