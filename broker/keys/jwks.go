package keys

import (
	"cmp"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"math/big"
	"slices"

	"github.com/dayflyhq/dayfly/proto/token"
)

// jwk is a public key of RFC 7517: kty "EC" and "RSA" as in RFC 7518 sections 6.2 and
// 6.3, or "OKP" as in RFC 8037 section 2.
type jwk struct {
	Type      string `json:"kty"`
	Use       string `json:"use"`
	Algorithm string `json:"alg"`
	ID        string `json:"kid"`
	Curve     string `json:"crv,omitempty"`
	X         string `json:"x,omitempty"`
	Y         string `json:"y,omitempty"`
	Modulus   string `json:"n,omitempty"`
	Exponent  string `json:"e,omitempty"`
}

// JWKS returns the JWK set (RFC 7517 section 5) of the keys, ordered by kid, so that
// the same keys give the same bytes.
func JWKS(keys []token.PublicKey) ([]byte, error) {
	set := struct {
		Keys []jwk `json:"keys"`
	}{Keys: []jwk{}}
	for _, key := range sorted(keys) {
		k, err := jwkOf(key)
		if err != nil {
			return nil, fmt.Errorf("encoding key %s as JWK: %w", key.ID, err)
		}
		set.Keys = append(set.Keys, k)
	}
	return json.Marshal(set)
}

func jwkOf(key token.PublicKey) (jwk, error) {
	enc := base64.RawURLEncoding.EncodeToString
	k := jwk{Use: "sig", Algorithm: string(key.Algorithm), ID: key.ID.String()}
	switch pub := key.Key.(type) {
	case *ecdsa.PublicKey:
		point, err := pub.Bytes() // 4, then x and y of equal, full length
		if err != nil {
			return jwk{}, err
		}
		half := (len(point) - 1) / 2
		k.Type, k.Curve = "EC", pub.Curve.Params().Name
		k.X, k.Y = enc(point[1:1+half]), enc(point[1+half:])
	case ed25519.PublicKey:
		k.Type, k.Curve, k.X = "OKP", "Ed25519", enc(pub)
	case *rsa.PublicKey:
		k.Type, k.Modulus, k.Exponent = "RSA", enc(pub.N.Bytes()), enc(big.NewInt(int64(pub.E)).Bytes())
	default:
		return jwk{}, fmt.Errorf("a %T has no JWK here", key.Key)
	}
	return k, nil
}

// sorted returns the keys by ID, each once.
func sorted(keys []token.PublicKey) []token.PublicKey {
	byID := func(a, b token.PublicKey) int { return cmp.Compare(a.ID.String(), b.ID.String()) }
	out := slices.SortedFunc(slices.Values(keys), byID)
	return slices.CompactFunc(out, func(a, b token.PublicKey) bool { return a.ID == b.ID })
}
