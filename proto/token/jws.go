package token

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
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

// ES256 is the default: what cloud federation accepts. EdDSA is there by choice.
const (
	ES256 Algorithm = "ES256"
	EdDSA Algorithm = "EdDSA"
)

func (a Algorithm) method() jwt.SigningMethod {
	switch a {
	case ES256:
		return jwt.SigningMethodES256
	case EdDSA:
		return jwt.SigningMethodEdDSA
	}
	return nil
}

// tokenType is the typ of RFC 9068 section 2.1. A JWT-SVID validator refuses it.
const tokenType = "at+jwt"

// Errors of reading and writing tokens. They never quote the token.
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
	if alg.method() == nil {
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
	const signatureChars = 1 + 86 // a dot and 64 bytes, for either algorithm
	if n := len(input) + signatureChars; n > MaxBytes {
		return Unsigned{}, fmt.Errorf("%w: %d bytes, at most %d", ErrTooLarge, n, MaxBytes)
	}
	return Unsigned{input, alg}, nil
}

// Fingerprint returns the fingerprint of the token to be.
func (u Unsigned) Fingerprint() Fingerprint { return sha256.Sum256([]byte(u.input)) }

// Sign completes the token. The key is an *ecdsa.PrivateKey on P-256 or an
// ed25519.PrivateKey, as the algorithm says.
func (u Unsigned) Sign(key crypto.Signer) (Secret, error) {
	var k any = key
	sig, err := u.alg.method().Sign(u.input, k)
	if err != nil {
		return Secret{}, fmt.Errorf("signing token: %w", err)
	}
	return Secret{u.input + "." + base64.RawURLEncoding.EncodeToString(sig)}, nil
}

// A PublicKey verifies what one signing key signed.
type PublicKey struct {
	ID        KeyID
	Algorithm Algorithm
	Key       crypto.PublicKey // *ecdsa.PublicKey on P-256, or ed25519.PublicKey
}

// NewPublicKey checks that the key fits its algorithm and derives its ID.
func NewPublicKey(alg Algorithm, key crypto.PublicKey) (PublicKey, error) {
	ok := false
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		ok = alg == ES256 && k.Curve == elliptic.P256()
	case ed25519.PublicKey:
		ok = alg == EdDSA
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
	h, err := parseHeader(raw)
	if err != nil {
		return nil, err
	}
	kid, err := ParseKeyID(h.KeyID)
	if err != nil {
		return nil, malformed("kid", err.Error())
	}
	key, ok := keys(kid)
	if !ok {
		return nil, fmt.Errorf("%w %s", ErrUnknownKey, kid)
	}
	if key.Algorithm != h.Algorithm {
		return nil, malformed("alg", "is not that of the key")
	}
	t := &Token{Algorithm: h.Algorithm}
	parser := jwt.NewParser(
		jwt.WithValidMethods([]string{string(key.Algorithm)}),
		jwt.WithStrictDecoding(), jwt.WithoutClaimsValidation())
	_, err = parser.ParseWithClaims(raw, (*jwtClaims)(&t.Claims), func(*jwt.Token) (any, error) { return key.Key, nil })
	if err != nil {
		return nil, parseError(err)
	}
	return t.finish(raw, kid)
}

// Inspect reads a token without checking its signature: for showing what it claims,
// never for accepting it.
func Inspect(raw string) (*Token, error) {
	h, err := parseHeader(raw)
	if err != nil {
		return nil, err
	}
	kid, err := ParseKeyID(h.KeyID)
	if err != nil {
		return nil, malformed("kid", err.Error())
	}
	t := &Token{Algorithm: h.Algorithm}
	if _, _, err := jwt.NewParser(jwt.WithStrictDecoding()).ParseUnverified(raw, (*jwtClaims)(&t.Claims)); err != nil {
		return nil, parseError(err)
	}
	return t.finish(raw, kid)
}

func (t *Token) finish(raw string, kid KeyID) (*Token, error) {
	if t.Self().Key != kid {
		return nil, malformed("kid", "is not the last key of the lineage")
	}
	t.Fingerprint = sha256.Sum256([]byte(raw[:strings.LastIndexByte(raw, '.')]))
	return t, nil
}

// parseError keeps our own refusals and hides the library's, which may quote.
func parseError(err error) error {
	switch {
	case errors.Is(err, jwt.ErrTokenSignatureInvalid):
		return ErrSignature
	case errors.Is(err, ErrMalformed):
		for e := err; e != nil; e = errors.Unwrap(e) {
			if m, ok := e.(interface{ Unwrap() []error }); ok {
				for _, sub := range m.Unwrap() {
					if errors.Is(sub, ErrMalformed) {
						return sub
					}
				}
			}
		}
	}
	return ErrMalformed
}

// parseHeader reads the JOSE header and allows alg, kid and typ only: no jku, jwk,
// x5u or crit, whatever it says.
func parseHeader(raw string) (header, error) {
	var h header
	if len(raw) > MaxBytes {
		return h, fmt.Errorf("%w: %d bytes, at most %d", ErrMalformed, len(raw), MaxBytes)
	}
	first, rest, ok := strings.Cut(raw, ".")
	if !ok || strings.Count(rest, ".") != 1 {
		return h, fmt.Errorf("%w: not three parts", ErrMalformed)
	}
	b, err := base64.RawURLEncoding.Strict().DecodeString(first)
	if err != nil {
		return h, fmt.Errorf("%w: header is not base64url", ErrMalformed)
	}
	if err := json.Unmarshal(b, &h, json.RejectUnknownMembers(true)); err != nil {
		return h, malformed("header", "is not exactly alg, kid and typ")
	}
	if h.Type != tokenType {
		return h, malformed("typ", "is not "+tokenType)
	}
	if h.Algorithm.method() == nil {
		return h, malformed("alg", "is neither ES256 nor EdDSA")
	}
	return h, nil
}

// jwtClaims gives golang-jwt the interface it wants; its own validation is off.
type jwtClaims Claims

func (c *jwtClaims) UnmarshalJSON(b []byte) error { return (*Claims)(c).UnmarshalJSON(b) }

func (c *jwtClaims) GetExpirationTime() (*jwt.NumericDate, error) {
	return jwt.NewNumericDate(c.Expires), nil
}
func (c *jwtClaims) GetIssuedAt() (*jwt.NumericDate, error) {
	return jwt.NewNumericDate(c.IssuedAt), nil
}
func (c *jwtClaims) GetNotBefore() (*jwt.NumericDate, error) {
	return jwt.NewNumericDate(c.NotBefore), nil
}
func (c *jwtClaims) GetIssuer() (string, error)             { return c.Issuer, nil }
func (c *jwtClaims) GetSubject() (string, error)            { return (*Claims)(c).Root().String(), nil }
func (c *jwtClaims) GetAudience() (jwt.ClaimStrings, error) { return jwt.ClaimStrings{c.Audience}, nil }
