package token_test

import (
	"bytes"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// seeds are whole tokens: all that the vectors hold, good and hostile.
func seeds(t testing.TB) []string {
	f := newForge(t)
	out := []string{f.good()}
	for _, v := range f.acceptedVectors() {
		out = append(out, v.Token)
	}
	for _, h := range f.hostiles() {
		out = append(out, h.raw)
	}
	return out
}

// FuzzParse: whatever text is thrown at the reader, it neither panics nor accepts
// what no known key signed; and what it reads says one thing only, so that writing
// it again gives the same payload, foreign claims aside.
func FuzzParse(f *testing.F) {
	for _, s := range seeds(f) {
		f.Add(s)
	}
	forge := newForge(f)
	f.Fuzz(func(t *testing.T, raw string) {
		if tok, err := token.Parse(raw, forge.known()); err == nil {
			checkRewritten(t, tok, raw)
		}
		// The same payload under a known key reaches the reader of claims.
		parts := strings.Split(raw, ".")
		if len(parts) != 3 {
			return
		}
		signed := forge.ed.signInput(t, b64(forge.header("EdDSA", forge.ed.public.ID.String()))+"."+parts[1])
		tok, err := token.Parse(signed, forge.known())
		inspected, inspectErr := token.Inspect(signed)
		if (err == nil) != (inspectErr == nil) || err == nil && !reflect.DeepEqual(tok, inspected) {
			t.Errorf("Parse: %v, Inspect: %v", err, inspectErr)
		}
		if err == nil {
			checkRewritten(t, tok, signed)
		}
	})
}

func checkRewritten(t *testing.T, tok *token.Token, raw string) {
	t.Helper()
	u, err := token.Encode(&tok.Claims, tok.Algorithm)
	if err != nil {
		t.Fatalf("what parses doesn't encode: %v", err)
	}
	k := fixedKey(t, tok.Algorithm, "any")
	s, err := u.Sign(k.signer)
	if err != nil {
		t.Fatal(err)
	}
	again, err := token.Inspect(s.Reveal())
	if err != nil || !reflect.DeepEqual(again.Claims, tok.Claims) {
		t.Errorf("read again: %+v, %v, want %+v", again, err, tok.Claims)
	}
	got, want := ownClaims(t, s.Reveal()), ownClaims(t, raw)
	if !bytes.Equal(got, want) {
		t.Errorf("the payload says more than the claims\n got %s\nwant %s", got, want)
	}
}

// ownClaims returns the payload without foreign claims, in canonical form: white
// space, order and escapes carry no meaning.
func ownClaims(t *testing.T, raw string) []byte {
	t.Helper()
	var all map[string]jsontext.Value
	payload := unb64(t, strings.Split(raw, ".")[1])
	if err := json.Unmarshal([]byte(payload), &all); err != nil {
		t.Fatal(err)
	}
	for name := range all {
		if !slices.Contains([]string{"iss", "sub", "aud", "exp", "nbf", "iat", "jti", "client_id", "scope", "act", "cnf", "txn", "dfy"}, name) {
			delete(all, name)
		}
	}
	b, err := json.Marshal(all)
	if err != nil {
		t.Fatal(err)
	}
	v := jsontext.Value(b)
	if err := v.Canonicalize(); err != nil {
		t.Fatal(err)
	}
	return v
}

var idSeeds = []string{
	"d5StDUgBoghG_gBhYWFhYWFh", "AAAAAAAAAAAAAAAAAAAAAAAA", "", "AAAA", "d5StDUgBoghG_gBhYWFhYW\n\n", "d5StDUgBoghG/gBhYWFhYWFh",
	"d5StDUgBoghG_gBhYWFhYWF=", "aWT514Vy", "aWT5\n\n\n\n", "3f9c1a7e", "00000000", "3F9C1A7E", "+f9c1a7e", "0xf9c1a7",
	"01fe0000000000000000000000000000", "01FE0000000000000000000000000000",
}

// FuzzParseGrantID, and its neighbours: whatever parses has one spelling.
func FuzzParseGrantID(f *testing.F) {
	for _, s := range idSeeds {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if id, err := token.ParseGrantID(s); err == nil {
			if id.String() != s {
				t.Errorf("grant ID %q is written %q", s, id)
			}
			if back, err := token.GrantIDFromBytes(id.Bytes()); err != nil || back != id {
				t.Errorf("grant ID %q from its bytes: %s, %v", s, back, err)
			}
		}
		if id, err := token.ParseKeyID(s); err == nil && (id.String() != s || len(s) != 8 || strings.ContainsAny(s, "\r\n")) {
			t.Errorf("key ID %q is written %q", s, id)
		}
		if e, err := token.ParseEra(s); err == nil && e.String() != s {
			t.Errorf("era %q is written %q", s, e)
		}
		if p, err := token.ParseThumbprint(s); err == nil && p.String() != s {
			t.Errorf("thumbprint %q is written %q", s, p)
		}
	})
}

// TestSeeds: a fuzz target without seeds that reach its core tests nothing.
func TestSeeds(t *testing.T) {
	f := newForge(t)
	good, bad := 0, 0
	for _, s := range seeds(t) {
		if _, err := token.Parse(s, f.known()); err == nil {
			good++
		} else {
			bad++
		}
	}
	if good < 10 || bad < 100 {
		t.Errorf("%d seeds that parse and %d that don't, want at least 10 and 100", good, bad)
	}
	parsed := 0
	for _, s := range idSeeds {
		if _, err := token.ParseGrantID(s); err == nil {
			parsed++
		}
	}
	if parsed < 2 || len(idSeeds) < 10 {
		t.Errorf("%d of %d ID seeds parse as grants", parsed, len(idSeeds))
	}
}
