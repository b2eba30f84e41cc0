package keys_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"math/big"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/dayflyhq/dayfly/broker/keys"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/token"
)

func publishTo(key *feed.Key) func(context.Context, feed.Key) error {
	return func(_ context.Context, k feed.Key) error {
		*key = k
		return nil
	}
}

// The keys are those of RFC 7517 appendix A.1 (EC) and RFC 8037 appendix A.2 (OKP).
func TestJWKSVector(t *testing.T) {
	decode := func(s string) []byte {
		b, err := base64.RawURLEncoding.DecodeString(s)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	const x, y = "MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4", "4Etl6SRW2YiLUrN5vfvVHuhp7x8PxltmWWlbbM4IFyM"
	const edX = "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"
	ec, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), slices.Concat([]byte{4}, decode(x), decode(y)))
	if err != nil {
		t.Fatal(err)
	}
	var set []token.PublicKey
	for _, k := range []struct {
		alg token.Algorithm
		key crypto.PublicKey
	}{{token.ES256, ec}, {token.EdDSA, ed25519.PublicKey(decode(edX))}} {
		pub, err := token.NewPublicKey(k.alg, k.key)
		if err != nil {
			t.Fatal(err)
		}
		set = append(set, pub)
	}
	members := map[token.KeyID]string{
		set[0].ID: `{"kty":"EC","use":"sig","alg":"ES256","kid":"` + set[0].ID.String() + `","crv":"P-256","x":"` + x + `","y":"` + y + `"}`,
		set[1].ID: `{"kty":"OKP","use":"sig","alg":"EdDSA","kid":"` + set[1].ID.String() + `","crv":"Ed25519","x":"` + edX + `"}`,
	}
	first, last := set[0].ID, set[1].ID
	if first.String() > last.String() {
		first, last = last, first
	}
	want := `{"keys":[` + members[first] + `,` + members[last] + `]}`
	for _, order := range [][]token.PublicKey{{set[0], set[1]}, {set[1], set[0]}, {set[0], set[1], set[0]}} {
		got, err := keys.JWKS(order)
		if err != nil {
			t.Fatal(err)
		}
		if string(got) != want {
			t.Errorf("got  %s\nwant %s", got, want)
		}
	}
}

func TestJWKSEmpty(t *testing.T) {
	got, err := keys.JWKS(nil)
	if err != nil || string(got) != `{"keys":[]}` {
		t.Errorf("got %s (%v)", got, err)
	}
}

func TestJWKSRefusesOtherKeys(t *testing.T) {
	if b, err := keys.JWKS([]token.PublicKey{{Key: "a string"}}); err == nil {
		t.Errorf("got %s", b)
	}
}

// A coordinate with leading zeros keeps its full 32 bytes (RFC 7518 section 6.2.1.2).
// About one key in 256 has one: the first whose private half is a small number will do.
func TestJWKSKeepsLeadingZeros(t *testing.T) {
	curve := elliptic.P256()
	for d := int64(1); d < 10_000; d++ {
		raw := make([]byte, 32)
		big.NewInt(d).FillBytes(raw)
		private, err := ecdsa.ParseRawPrivateKey(curve, raw)
		if err != nil {
			t.Fatal(err)
		}
		point, err := private.PublicKey.Bytes()
		if err != nil {
			t.Fatal(err)
		}
		if point[1] != 0 {
			continue
		}
		pub, err := token.NewPublicKey(token.ES256, private.Public())
		if err != nil {
			t.Fatal(err)
		}
		got := readJWKS(t, []token.PublicKey{pub})[pub.ID.String()]
		if !private.PublicKey.Equal(got) {
			t.Errorf("d = %d: x is %s", d, hex.EncodeToString(point[1:33]))
		}
		return
	}
	t.Fatal("no such key found")
}

// Any set of keys can be read back by somebody who knows only the RFCs.
func TestJWKSRoundTrip(t *testing.T) {
	rsaKey, err := rsa.GenerateKey(rand.Reader, token.RSABits)
	if err != nil {
		t.Fatal(err)
	}
	rapid.Check(t, func(rt *rapid.T) {
		var set []token.PublicKey
		for range rapid.IntRange(0, 4).Draw(rt, "ec") {
			k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
			if err != nil {
				rt.Fatal(err)
			}
			set = append(set, mustPublic(rt, token.ES256, k.Public()))
		}
		for range rapid.IntRange(0, 4).Draw(rt, "ed") {
			k, _, err := ed25519.GenerateKey(rand.Reader)
			if err != nil {
				rt.Fatal(err)
			}
			set = append(set, mustPublic(rt, token.EdDSA, k))
		}
		if rapid.Bool().Draw(rt, "rsa") {
			set = append(set, mustPublic(rt, token.RS256, rsaKey.Public()))
		}
		got := readJWKS(rt, set)
		if len(got) != len(set) {
			rt.Fatalf("%d keys, want %d", len(got), len(set))
		}
		for _, k := range set {
			if !k.Key.(interface{ Equal(crypto.PublicKey) bool }).Equal(got[k.ID.String()]) {
				rt.Errorf("key %s was changed", k.ID)
			}
		}
	})
}

type fataler interface {
	Helper()
	Fatal(...any)
	Fatalf(string, ...any)
}

func mustPublic(t fataler, alg token.Algorithm, key crypto.PublicKey) token.PublicKey {
	t.Helper()
	pub, err := token.NewPublicKey(alg, key)
	if err != nil {
		t.Fatal(err)
	}
	return pub
}

// readJWKS is a reader written from RFC 7517, 7518 and 8037 with the standard library.
func readJWKS(t fataler, set []token.PublicKey) map[string]crypto.PublicKey {
	t.Helper()
	raw, err := keys.JWKS(set)
	if err != nil {
		t.Fatal(err)
	}
	var doc struct {
		Keys []map[string]string `json:"keys"`
	}
	if err := json.Unmarshal(raw, &doc); err != nil {
		t.Fatal(err)
	}
	out := map[string]crypto.PublicKey{}
	for _, k := range doc.Keys {
		x, errX := base64.RawURLEncoding.DecodeString(k["x"])
		y, errY := base64.RawURLEncoding.DecodeString(k["y"])
		if errX != nil || errY != nil || k["use"] != "sig" {
			t.Fatalf("bad key: %v", k)
		}
		switch [3]string{k["kty"], k["crv"], k["alg"]} {
		case [3]string{"EC", "P-256", "ES256"}:
			pub, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), slices.Concat([]byte{4}, x, y))
			if err != nil {
				t.Fatal(err)
			}
			out[k["kid"]] = pub
		case [3]string{"OKP", "Ed25519", "EdDSA"}:
			if len(x) != ed25519.PublicKeySize {
				t.Fatalf("x of %d bytes", len(x))
			}
			out[k["kid"]] = ed25519.PublicKey(x)
		case [3]string{"RSA", "", "RS256"}:
			n, errN := base64.RawURLEncoding.DecodeString(k["n"])
			if errN != nil || len(n) != token.RSABits/8 || k["e"] != "AQAB" {
				t.Fatalf("bad key: %v", k)
			}
			out[k["kid"]] = &rsa.PublicKey{N: new(big.Int).SetBytes(n), E: 65537}
		default:
			t.Fatalf("unknown kind of key: %v", k)
		}
	}
	return out
}
