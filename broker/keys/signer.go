package keys

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"fmt"
	"io"
	"log/slog"
	"time"

	"github.com/dayflyhq/dayfly/proto/token"
)

// A Signer signs with one published key. It converts to a broker.Signer. However it
// is printed, logged or marshalled it shows the key's ID only.
type Signer struct {
	Public token.PublicKey
	// SpreadIn is how long readers of the JWK set may still use a copy without this key;
	// zero: each has it.
	SpreadIn time.Duration
	// Sign completes a token that was encoded for this key's ID and algorithm. It
	// returns ErrRevoked or ErrReplaced once the key may not sign any more.
	Sign func(token.Unsigned) (token.Secret, error)
}

func (s Signer) String() string { return "[signing key " + s.Public.ID.String() + "]" }

// Format writes the key's ID, whatever the verb.
func (s Signer) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, s.String()) }

// LogValue returns the key's ID.
func (s Signer) LogValue() slog.Value { return slog.StringValue(s.String()) }

// MarshalText returns the key's ID, for every encoder that asks for it.
func (s Signer) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

func (r *Ring) String() string {
	if s, ok := r.Current(); ok {
		return "[signing keys, current " + s.Public.ID.String() + "]"
	}
	return "[signing keys, none current]"
}

// Format writes the current key's ID, whatever the verb.
func (r *Ring) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, r.String()) }

// LogValue returns the current key's ID.
func (r *Ring) LogValue() slog.Value { return slog.StringValue(r.String()) }

// MarshalText returns the current key's ID, for every encoder that asks for it.
func (r *Ring) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// generate makes a key. There is no source of randomness to configure: since Go 1.26
// crypto/ecdsa takes the system's whatever it is given, and so should a signing key.
func generate(alg token.Algorithm) (*signingKey, error) {
	private, err := generatePrivate(alg)
	if err != nil {
		return nil, err
	}
	public, err := token.NewPublicKey(alg, private.Public())
	if err != nil {
		return nil, err
	}
	return &signingKey{public: public, private: private}, nil
}

func generatePrivate(alg token.Algorithm) (crypto.Signer, error) {
	switch alg {
	case token.EdDSA:
		_, private, err := ed25519.GenerateKey(rand.Reader)
		return private, err
	case token.RS256:
		return rsa.GenerateKey(rand.Reader, token.RSABits)
	}
	return ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
}
