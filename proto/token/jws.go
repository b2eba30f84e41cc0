package token

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/golang-jwt/jwt/v5"
)

// An Algorithm is how a key signs. It belongs to the key.
type Algorithm string

// ES256 is the default: what cloud federation accepts, but for Azure, which takes RSA
// alone. RS256 and EdDSA are there by choice.
const (
	ES256 Algorithm = "ES256"
	EdDSA Algorithm = "EdDSA"
	RS256 Algorithm = "RS256"
)

// RSABits is the size of every RS256 key.
const RSABits = 2048

// Valid reports whether a is one of the three.
func (a Algorithm) Valid() bool { return a.method() != nil }

func (a Algorithm) method() jwt.SigningMethod {
	switch a {
	case ES256:
		return jwt.SigningMethodES256
	case EdDSA:
		return jwt.SigningMethodEdDSA
	case RS256:
		return jwt.SigningMethodRS256
	}
	return nil
}

// signatureSize is that of the algorithm's every signature.
func (a Algorithm) signatureSize() int {
	if a == RS256 {
		return RSABits / 8
	}
	return 64
}

// tokenType is the typ of RFC 9068 section 2.1. A JWT-SVID validator refuses it.
const tokenType = "at+jwt"

// Errors of reading and writing tokens. They never quote the token: what was refused
// may be somebody's credential, or text that a stranger wants to see in a log.
var (
	// ErrMalformed: not a token of ours, whoever signed it.
	ErrMalformed = errors.New("malformed token")
	// ErrUnknownKey: the kid is none that the reader knows (yet).
	ErrUnknownKey = errors.New("unknown signing key")
	// ErrSignature: the key is known and did not sign this.
	ErrSignature = errors.New("bad signature")
	// ErrTooLarge: the token would exceed MaxBytes.
	ErrTooLarge = errors.New("token too large")
)

func malformed(field, what string) error {
	return fmt.Errorf("%w: %s %s", ErrMalformed, field, what)
}

// A Fingerprint is the SHA-256 of a token's JWS signing input (RFC 7515 section
// 5.1): known before signing, and one for all spellings of a signature.
type Fingerprint [sha256.Size]byte

type header struct {
	Algorithm Algorithm `json:"alg"`
	KeyID     string    `json:"kid"`
	Type      string    `json:"typ"`
}

// An Unsigned token is complete but for its signature.
type Unsigned struct {
	input string
	alg   Algorithm
}

// Encode makes the signing input of a token. It returns ErrTooLarge when the signed
// token would exceed MaxBytes and ErrMalformed when the claims break a law.
func Encode(c *Claims, alg Algorithm) (Unsigned, error) {
	if !alg.Valid() {
		return Unsigned{}, fmt.Errorf("unknown algorithm %q", alg)
	}
	payload, err := c.MarshalJSON()
	if err != nil {
		return Unsigned{}, err
	}
	head, err := json.Marshal(&header{alg, c.Self().Key.String(), tokenType})
	if err != nil {
		return Unsigned{}, fmt.Errorf("encoding header: %w", err)
	}
	enc := base64.RawURLEncoding.EncodeToString
	input := enc(head) + "." + enc(payload)
	if n := len(input) + 1 + base64.RawURLEncoding.EncodedLen(alg.signatureSize()); n > MaxBytes {
		return Unsigned{}, fmt.Errorf("%w: %d bytes, at most %d", ErrTooLarge, n, MaxBytes)
	}
	return Unsigned{input, alg}, nil
}

// Fingerprint returns the fingerprint of the token to be.
func (u Unsigned) Fingerprint() Fingerprint { return sha256.Sum256([]byte(u.input)) }

// Sign completes the token. The key is an *ecdsa.PrivateKey on P-256, an
// ed25519.PrivateKey or an *rsa.PrivateKey, as the algorithm says.
func (u Unsigned) Sign(key crypto.Signer) (Secret, error) {
	var k any = key
	sig, err := u.alg.method().Sign(u.input, k)
	if err != nil {
		return Secret{}, fmt.Errorf("signing token: %w", err)
	}
	return NewSecret(u.input + "." + base64.RawURLEncoding.EncodeToString(sig)), nil
}

// A PublicKey verifies what one signing key signed.
type PublicKey struct {
	ID        KeyID
	Algorithm Algorithm
	Key       crypto.PublicKey // *ecdsa.PublicKey on P-256, ed25519.PublicKey, or *rsa.PublicKey of RSABits
}

// rsaExponent is the one that everybody's RSA keys have.
const rsaExponent = 65537

// NewPublicKey checks that the key fits its algorithm and derives its ID.
func NewPublicKey(alg Algorithm, key crypto.PublicKey) (PublicKey, error) {
	ok := false
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		ok = alg == ES256 && k != nil && k.Curve == elliptic.P256()
	case ed25519.PublicKey:
		ok = alg == EdDSA && len(k) == ed25519.PublicKeySize
	case *rsa.PublicKey:
		ok = alg == RS256 && k != nil && k.N != nil && k.N.BitLen() == RSABits && k.E == rsaExponent
	}
	if !ok {
		return PublicKey{}, fmt.Errorf("a %T is no key for %s", key, alg)
	}
	id, err := KeyIDOf(key)
	if err != nil {
		return PublicKey{}, err
	}
	return PublicKey{id, alg, key}, nil
}

// Equal reports whether two keys are the same: not whether their IDs are, which are short.
func (k PublicKey) Equal(other PublicKey) bool {
	if k.Algorithm != other.Algorithm {
		return false
	}
	switch key := k.Key.(type) {
	case *ecdsa.PublicKey:
		return key == other.Key || key.Equal(other.Key)
	case *rsa.PublicKey:
		return key == other.Key || key.Equal(other.Key)
	case ed25519.PublicKey:
		return key.Equal(other.Key)
	}
	return false
}

// A Token is one that was read.
type Token struct {
	Claims
	Algorithm   Algorithm
	Fingerprint Fingerprint
}

// Parse reads a token and checks its form and signature, with the key that keys
// returns for its kid. Time, audience, binding and revocation are for the caller to
// judge. Errors: ErrMalformed, ErrUnknownKey, ErrSignature.
func Parse(raw string, keys func(KeyID) (PublicKey, bool)) (*Token, error) {
	p, err := split(raw)
	if err != nil {
		return nil, err
	}
	key, ok := keys(p.kid)
	if !ok {
		return nil, ErrUnknownKey
	}
	if key.Algorithm != p.alg {
		return nil, malformed("alg", "is not that of the key")
	}
	// Before the payload: a stranger's bytes never reach the reader of claims.
	if key.Algorithm.method().Verify(p.input, p.signature, key.Key) != nil {
		return nil, ErrSignature
	}
	return p.token()
}

// Inspect reads a token without checking its signature: for showing what it claims,
// never for accepting it.
func Inspect(raw string) (*Token, error) {
	p, err := split(raw)
	if err != nil {
		return nil, err
	}
	return p.token()
}

// The parts of a token whose header is in order.
type parts struct {
	alg       Algorithm
	kid       KeyID
	input     string // of the signature
	payload   []byte
	signature []byte
}

func split(raw string) (p parts, err error) {
	if len(raw) > MaxBytes {
		return p, malformed("token", fmt.Sprintf("is longer than %d bytes", MaxBytes))
	}
	if strings.Count(raw, ".") != 2 {
		return p, malformed("token", "is not three parts")
	}
	dot := strings.LastIndexByte(raw, '.')
	p.input = raw[:dot]
	head, payload, _ := strings.Cut(p.input, ".")
	if p.alg, p.kid, err = parseHeader(head); err != nil {
		return p, err
	}
	if p.payload, err = decode(payload); err != nil {
		return p, malformed("payload", "is not base64url")
	}
	if p.signature, err = decode(raw[dot+1:]); err != nil {
		return p, malformed("signature", "is not base64url")
	}
	if size := p.alg.signatureSize(); len(p.signature) != size {
		return p, malformed("signature", fmt.Sprintf("is not %d bytes", size))
	}
	return p, nil
}

// parseHeader reads the JOSE header and allows alg, kid and typ only: no jku, jwk,
// x5u or crit, whatever it says.
func parseHeader(s string) (Algorithm, KeyID, error) {
	b, err := decode(s)
	if err != nil {
		return "", KeyID{}, malformed("header", "is not base64url")
	}
	var h header
	if err := json.Unmarshal(b, &h, json.RejectUnknownMembers(true)); err != nil {
		return "", KeyID{}, malformed("header", "is not exactly alg, kid and typ")
	}
	if h.Type != tokenType {
		return "", KeyID{}, malformed("typ", "is not "+tokenType)
	}
	if !h.Algorithm.Valid() {
		return "", KeyID{}, malformed("alg", "is none of ES256, EdDSA and RS256")
	}
	kid, err := ParseKeyID(h.KeyID)
	if err != nil {
		return "", KeyID{}, malformed("kid", "is not 8 characters of base64url")
	}
	return h.Algorithm, kid, nil
}

func (p *parts) token() (*Token, error) {
	t := &Token{Algorithm: p.alg, Fingerprint: sha256.Sum256([]byte(p.input))}
	if err := t.UnmarshalJSON(p.payload); err != nil {
		return nil, err
	}
	if t.Self().Key != p.kid {
		return nil, malformed("kid", "is not the last key of the lineage")
	}
	return t, nil
}
