package token_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/hkdf"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"math/big"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// A testKey is a signing key that is the same in every run: it is published in
// testdata and signs nothing else.
type testKey struct {
	public token.PublicKey
	signer crypto.Signer
}

func fixedKey(t testing.TB, alg token.Algorithm, name string) testKey {
	t.Helper()
	seed := sha256.Sum256([]byte("dayfly test vector key " + name))
	var signer crypto.Signer
	switch alg {
	case token.EdDSA:
		signer = ed25519.NewKeyFromSeed(seed[:])
	case token.ES256:
		key, err := ecdsa.ParseRawPrivateKey(elliptic.P256(), seed[:])
		if err != nil {
			t.Fatal(err)
		}
		signer = key
	case token.RS256:
		signer = fixedRSA(t, seed)
	}
	public, err := token.NewPublicKey(alg, signer.Public())
	if err != nil {
		t.Fatal(err)
	}
	return testKey{public, signer}
}

// fixedRSA makes a key from a seed, which the library doesn't: its primes are the first
// above what the seed is stretched to.
func fixedRSA(t testing.TB, seed [32]byte) *rsa.PrivateKey {
	t.Helper()
	if key, ok := fixedRSAs.Load(seed); ok {
		return key.(*rsa.PrivateKey)
	}
	e := big.NewInt(65537)
	prime := func(name string) *big.Int {
		stretched, err := hkdf.Expand(sha256.New, seed[:], name, token.RSABits/16)
		if err != nil {
			t.Fatal(err)
		}
		stretched[0] |= 0xc0 // so that two of them make a modulus of full length
		stretched[len(stretched)-1] |= 1
		p := new(big.Int).SetBytes(stretched)
		for two := big.NewInt(2); !p.ProbablyPrime(20) || new(big.Int).GCD(nil, nil, e, new(big.Int).Sub(p, big.NewInt(1))).Cmp(big.NewInt(1)) != 0; {
			p.Add(p, two)
		}
		return p
	}
	p, q := prime("p"), prime("q")
	one := big.NewInt(1)
	phi := new(big.Int).Mul(new(big.Int).Sub(p, one), new(big.Int).Sub(q, one))
	key := &rsa.PrivateKey{
		PublicKey: rsa.PublicKey{N: new(big.Int).Mul(p, q), E: int(e.Int64())},
		D:         new(big.Int).ModInverse(e, phi), Primes: []*big.Int{p, q},
	}
	key.Precompute()
	if err := key.Validate(); err != nil {
		t.Fatal(err)
	}
	fixedRSAs.Store(seed, key)
	return key
}

var fixedRSAs sync.Map // each takes a while

// signRaw signs any header and payload, as only the key's holder (or thief) can.
func (k testKey) signRaw(t testing.TB, header, payload string) string {
	t.Helper()
	return k.signInput(t, b64(header)+"."+b64(payload))
}

func (k testKey) signInput(t testing.TB, input string) string {
	t.Helper()
	return input + "." + base64.RawURLEncoding.EncodeToString(k.signature(t, input))
}

func (k testKey) signature(t testing.TB, input string) []byte {
	t.Helper()
	switch key := k.signer.(type) {
	case ed25519.PrivateKey:
		return ed25519.Sign(key, []byte(input))
	case *ecdsa.PrivateKey:
		sum := sha256.Sum256([]byte(input))
		der, err := key.Sign(nil, sum[:], crypto.SHA256) // nil: deterministic (RFC 6979)
		if err != nil {
			t.Fatal(err)
		}
		r, s := splitDER(t, der)
		return append(r.FillBytes(make([]byte, 32)), s.FillBytes(make([]byte, 32))...)
	case *rsa.PrivateKey:
		sum := sha256.Sum256([]byte(input))
		sig, err := rsa.SignPKCS1v15(nil, key, crypto.SHA256, sum[:])
		if err != nil {
			t.Fatal(err)
		}
		return sig
	}
	t.Fatalf("no signature with a %T", k.signer)
	return nil
}

func b64(s string) string { return base64.RawURLEncoding.EncodeToString([]byte(s)) }

func unb64(t testing.TB, s string) string {
	t.Helper()
	b, err := base64.RawURLEncoding.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// keySet is what a verifier knows.
func keySet(keys ...testKey) func(token.KeyID) (token.PublicKey, bool) {
	return func(id token.KeyID) (token.PublicKey, bool) {
		for _, k := range keys {
			if k.public.ID == id {
				return k.public, true
			}
		}
		return token.PublicKey{}, false
	}
}

var issued = time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)

// claims returns those of a token with the given number of members, all signed by
// one key: the richest that a broker would issue, but for its binding.
func claims(t testing.TB, key token.KeyID, members int) *token.Claims {
	t.Helper()
	c := &token.Claims{
		Issuer:      "https://dayfly.example.org",
		Audience:    "spiffe://example.org/ns/prod/sa/ledger",
		Scopes:      []string{"orders:read", "orders:write"},
		IssuedAt:    issued,
		NotBefore:   issued,
		Expires:     issued.Add(5 * time.Minute),
		Binding:     token.BindingSPIFFE,
		Transaction: "txn-7f3a",
		Position:    token.Position{Era: 0x3f9c1a7e, Rev: 1042, Sum: [8]byte{1, 2, 3, 4, 5, 6, 7, 8}},
	}
	for i := range members {
		c.Lineage = append(c.Lineage, member(t, i, key))
	}
	return c
}

func member(t testing.TB, i int, key token.KeyID) token.Member {
	t.Helper()
	id := spiffeid.RequireFromString(fmt.Sprintf("spiffe://example.org/ns/prod/sa/service-%d", i))
	random := strings.NewReader(strings.Repeat(string(rune('a'+i)), 7))
	grant, err := token.NewGrantID(id, issued.Add(time.Duration(i)*time.Second), random)
	if err != nil {
		t.Fatal(err)
	}
	return token.Member{Identity: id, Grant: grant, Key: key, SVID: token.Thumbprint{byte(i + 1), 0xfe}}
}

func encode(t testing.TB, c *token.Claims, alg token.Algorithm) token.Unsigned {
	t.Helper()
	u, err := token.Encode(c, alg)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

func sign(t testing.TB, c *token.Claims, k testKey) string {
	t.Helper()
	s, err := encode(t, c, k.public.Algorithm).Sign(k.signer)
	if err != nil {
		t.Fatal(err)
	}
	return s.Reveal()
}

func TestRoundTrip(t *testing.T) {
	for _, alg := range []token.Algorithm{token.ES256, token.EdDSA, token.RS256} {
		for members := 1; members <= token.MaxDepth; members++ {
			k := fixedKey(t, alg, "round trip")
			want := claims(t, k.public.ID, members)
			want.Lineage[0].SVID = token.Thumbprint{} // a root with a JWT-SVID
			raw := sign(t, want, k)
			got, err := token.Parse(raw, keySet(k))
			if err != nil {
				t.Fatalf("%s, %d members: %v", alg, members, err)
			}
			if !reflect.DeepEqual(&got.Claims, want) {
				t.Errorf("%s, %d members: got %+v, want %+v", alg, members, got.Claims, *want)
			}
			if got.Fingerprint != encode(t, want, alg).Fingerprint() {
				t.Errorf("%s, %d members: the fingerprint differs from that before signing", alg, members)
			}
			inspected, err := token.Inspect(raw)
			if err != nil || !reflect.DeepEqual(inspected, got) {
				t.Errorf("%s, %d members: Inspect = %+v, %v, want what Parse says", alg, members, inspected, err)
			}
			if last := want.Lineage[members-1]; got.Self() != last || got.Presenter() != last.Identity ||
				got.Grant() != last.Grant || got.Root() != want.Lineage[0].Identity {
				t.Errorf("%s, %d members: self %+v, root %s", alg, members, got.Self(), got.Root())
			}
		}
	}
}

// TestFullDepthFits is the promise of the design: any header takes the token.
func TestFullDepthFits(t *testing.T) {
	k := fixedKey(t, token.ES256, "size")
	c := claims(t, k.public.ID, token.MaxDepth)
	for i := range c.Lineage {
		c.Lineage[i].Identity = longID(t, i, 60)
	}
	c.Issuer = "https://dayfly.prod.example.org"
	c.Audience = longID(t, 9, 60).String()
	c.Scopes = []string{"ledger:read", "ledger:write", "reports:read"}
	c.Transaction = c.Lineage[0].Grant.String()
	c.Position.Rev = 1 << 40
	c.Binding, c.Certificate = token.BindingX5T, sha256.Sum256([]byte("certificate"))
	raw := sign(t, c, k)
	t.Logf("%d bytes", len(raw))
	if len(raw) > token.MaxBytes {
		t.Errorf("a token of full depth is %d bytes, want at most %d", len(raw), token.MaxBytes)
	}
	if _, err := token.Parse(raw, keySet(k)); err != nil {
		t.Errorf("a token of full depth: %v", err)
	}
}

func longID(t testing.TB, i, length int) spiffeid.ID {
	t.Helper()
	base := fmt.Sprintf("spiffe://prod.example.org/ns/payments/sa/service-%d-", i)
	return spiffeid.RequireFromString(base + strings.Repeat("x", length-len(base)))
}

// TestTooLarge walks to the very edge: what Encode allows Parse reads.
func TestTooLarge(t *testing.T) {
	for _, alg := range []token.Algorithm{token.ES256, token.RS256} {
		t.Run(string(alg), func(t *testing.T) { tooLarge(t, fixedKey(t, alg, "size")) })
	}
}

func tooLarge(t *testing.T, k testKey) {
	fitted := 0
	for n := 1; n <= 2*token.MaxBytes; n++ {
		c := claims(t, k.public.ID, 1)
		c.Scopes = nil
		for left := n; left > 0; left -= token.MaxScopeBytes {
			c.Scopes = append(c.Scopes, fmt.Sprintf("%02d", len(c.Scopes))+strings.Repeat("s", min(left, token.MaxScopeBytes-2)))
		}
		if len(c.Scopes) > token.MaxScopes {
			break
		}
		u, err := token.Encode(c, k.public.Algorithm)
		if err != nil {
			if !errors.Is(err, token.ErrTooLarge) {
				t.Fatalf("%d characters of scopes: %v, want ErrTooLarge", n, err)
			}
			if fitted < token.MaxBytes-2 {
				t.Errorf("refused above %d bytes, want every one up to %d used", fitted, token.MaxBytes)
			}
			return
		}
		s, err := u.Sign(k.signer)
		if err != nil {
			t.Fatal(err)
		}
		fitted = len(s.Reveal())
		if fitted > token.MaxBytes {
			t.Fatalf("Encode let a token of %d bytes pass", fitted)
		}
		if n%64 == 0 {
			if _, err := token.Parse(s.Reveal(), keySet(k)); err != nil {
				t.Fatalf("%d bytes: %v", fitted, err)
			}
		}
	}
	t.Error("never too large")
}

// TestMalleatedSignature: the other ECDSA signature (r, n-s) of the same token
// verifies too, so only the signing input may identify a token.
func TestMalleatedSignature(t *testing.T) {
	k := fixedKey(t, token.ES256, "malleable")
	raw := sign(t, claims(t, k.public.ID, 2), k)
	input, sig, _ := cutLast(raw)
	b := []byte(unb64(t, sig))
	s := new(big.Int).SetBytes(b[32:])
	s.Sub(elliptic.P256().Params().N, s).FillBytes(b[32:])
	other := input + "." + base64.RawURLEncoding.EncodeToString(b)
	if other == raw {
		t.Fatal("the malleated token is the same token")
	}
	one, err := token.Parse(raw, keySet(k))
	if err != nil {
		t.Fatal(err)
	}
	two, err := token.Parse(other, keySet(k))
	if err != nil {
		t.Fatalf("the malleated token: %v", err)
	}
	if one.Fingerprint != two.Fingerprint {
		t.Errorf("fingerprints %x and %x, want one", one.Fingerprint, two.Fingerprint)
	}
}

func cutLast(raw string) (input, sig string, ok bool) {
	i := strings.LastIndexByte(raw, '.')
	if i < 0 {
		return raw, "", false
	}
	return raw[:i], raw[i+1:], true
}

// TestEncodeRefuses is the broker's own side of the laws.
func TestEncodeRefuses(t *testing.T) {
	key := fixedKey(t, token.EdDSA, "encode").public.ID
	for _, tc := range []struct {
		name  string
		field string
		spoil func(*token.Claims)
	}{
		{"no lineage", "dfy.lin", func(c *token.Claims) { c.Lineage = nil }},
		{"too deep", "dfy.lin", func(c *token.Claims) { c.Lineage = append(claims(t, key, 6).Lineage, c.Lineage...) }},
		{"no identity", "dfy.lin", func(c *token.Claims) { c.Lineage[0].Identity = spiffeid.ID{} }},
		{"no grant", "dfy.lin", func(c *token.Claims) { c.Lineage[1].Grant = token.GrantID{} }},
		{"no key", "dfy.lin", func(c *token.Claims) { c.Lineage[0].Key = token.KeyID{} }},
		{"no issuer", "iss", func(c *token.Claims) { c.Issuer = "" }},
		{"no audience", "aud", func(c *token.Claims) { c.Audience = "" }},
		{"two audiences", "aud", func(c *token.Claims) { c.Audience = "a b" }},
		{"no transaction", "txn", func(c *token.Claims) { c.Transaction = "" }},
		{"long transaction", "txn", func(c *token.Claims) { c.Transaction = strings.Repeat("t", 65) }},
		{"line break in transaction", "txn", func(c *token.Claims) { c.Transaction = "a\nb" }},
		{"invalid UTF-8", "txn", func(c *token.Claims) { c.Transaction = "\xff" }},
		{"no binding", "dfy.bnd", func(c *token.Claims) { c.Binding = "" }},
		{"bound to no certificate", "cnf", func(c *token.Claims) { c.Binding = token.BindingX5T }},
		{"certificate of another binding", "cnf", func(c *token.Claims) { c.Certificate[0] = 1 }},
		{"no era", "dfy.era", func(c *token.Claims) { c.Position.Era = 0 }},
		{"no exp", "exp", func(c *token.Claims) { c.Expires = time.Time{} }},
		{"no nbf", "nbf", func(c *token.Claims) { c.NotBefore = time.Time{} }},
		{"no iat", "iat", func(c *token.Claims) { c.IssuedAt = time.Time{} }},
		{"over the cap", "exp", func(c *token.Claims) { c.Expires = c.IssuedAt.Add(token.MaxTTL + time.Second) }},
		{"gone within its second", "exp", func(c *token.Claims) { c.Expires = c.IssuedAt.Add(time.Second - 1) }},
		{"unsorted scopes", "scope", func(c *token.Claims) { c.Scopes = []string{"b", "a"} }},
		{"a scope twice", "scope", func(c *token.Claims) { c.Scopes = []string{"a", "a"} }},
		{"a space in a scope", "scope", func(c *token.Claims) { c.Scopes = []string{"a b"} }},
		{"33 scopes", "scope", func(c *token.Claims) { c.Scopes = manyScopes(33) }},
	} {
		c := claims(t, key, 2)
		tc.spoil(c)
		_, err := token.Encode(c, token.EdDSA)
		if !errors.Is(err, token.ErrMalformed) || !strings.HasPrefix(err.Error(), "malformed token: "+tc.field+" ") {
			t.Errorf("%s: %v, want malformed %s", tc.name, err, tc.field)
		}
	}
	if _, err := token.Encode(claims(t, key, 1), "HS256"); err == nil {
		t.Error("Encode took HS256")
	}
}

func manyScopes(n int) []string {
	var out []string
	for i := range n {
		out = append(out, fmt.Sprintf("s%02d", i))
	}
	return out
}

// TestEdges: the last value inside each limit is allowed.
func TestEdges(t *testing.T) {
	k := fixedKey(t, token.EdDSA, "edges")
	c := claims(t, k.public.ID, 1)
	c.Scopes = manyScopes(token.MaxScopes)
	c.Expires = c.IssuedAt.Add(token.MaxTTL)
	c.Transaction = strings.Repeat("t", token.MaxTransactionBytes)
	c.Position.Rev = 1<<64 - 1
	got, err := token.Parse(sign(t, c, k), keySet(k))
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(&got.Claims, c) {
		t.Errorf("got %+v, want %+v", got.Claims, *c)
	}
}

func TestNewPublicKeyRefuses(t *testing.T) {
	ed := fixedKey(t, token.EdDSA, "a").signer.Public()
	ec := fixedKey(t, token.ES256, "a").signer.Public()
	rs := fixedKey(t, token.RS256, "a").signer.Public().(*rsa.PublicKey)
	p384, err := ecdsa.GenerateKey(elliptic.P384(), strings.NewReader(strings.Repeat("x", 4096)))
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name string
		alg  token.Algorithm
		key  crypto.PublicKey
	}{
		{"Ed25519 for ES256", token.ES256, ed},
		{"P-256 for EdDSA", token.EdDSA, ec},
		{"P-384", token.ES256, p384.Public()},
		{"short Ed25519", token.EdDSA, ed.(ed25519.PublicKey)[:31]},
		{"nil", token.ES256, (*ecdsa.PublicKey)(nil)},
		{"P-256 for RS256", token.RS256, ec},
		{"RSA for ES256", token.ES256, rs},
		{"RSA for EdDSA", token.EdDSA, rs},
		{"RSA of 2047 bits", token.RS256, &rsa.PublicKey{N: new(big.Int).Rsh(rs.N, 1), E: rs.E}},
		{"RSA of 4096 bits", token.RS256, &rsa.PublicKey{N: new(big.Int).Mul(rs.N, rs.N), E: rs.E}},
		{"RSA with the exponent 3", token.RS256, &rsa.PublicKey{N: rs.N, E: 3}},
		{"RSA without a modulus", token.RS256, &rsa.PublicKey{E: rs.E}},
		{"nil RSA", token.RS256, (*rsa.PublicKey)(nil)},
		{"PS256", "PS256", rs},
		{"HS256", "HS256", []byte("secret")},
		{"none", "none", nil},
	} {
		if _, err := token.NewPublicKey(tc.alg, tc.key); err == nil {
			t.Errorf("%s: accepted", tc.name)
		}
	}
}
