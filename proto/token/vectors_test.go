package token_test

import (
	"bytes"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/proto/token"
)

var update = flag.Bool("update", false, "write testdata anew")

// The vectors are for whoever reads or writes our tokens in another language. The
// private halves of their keys can be derived from this package: they are for tests.

type keyVector struct {
	Name      string          `json:"name"`
	Algorithm token.Algorithm `json:"alg"`
	ID        string          `json:"kid"`
	PublicKey []byte          `json:"spki"` // base64 of the DER
}

type acceptedVector struct {
	Name        string          `json:"name"`
	Token       string          `json:"token"`
	Algorithm   token.Algorithm `json:"alg"`
	Fingerprint string          `json:"fingerprint"` // hexadecimal
	Claims      claimsVector    `json:"claims"`
}

type claimsVector struct {
	Issuer      string         `json:"issuer"`
	Audience    string         `json:"audience"`
	Lineage     []memberVector `json:"lineage"`
	Scopes      []string       `json:"scopes,omitempty"`
	IssuedAt    time.Time      `json:"issued_at"`
	NotBefore   time.Time      `json:"not_before"`
	Expires     time.Time      `json:"expires"`
	Binding     string         `json:"binding"`
	Certificate string         `json:"certificate,omitempty"`
	Transaction string         `json:"transaction"`
	Era         string         `json:"era"`
	Rev         uint64         `json:"rev"`
	Sum         string         `json:"sum"`
}

type memberVector struct {
	Identity string `json:"identity"`
	Grant    string `json:"grant"`
	Key      string `json:"key"`
	SVID     string `json:"svid,omitempty"`
}

type refusedVector struct {
	Name  string `json:"name"`
	Token string `json:"token"`
	Class string `json:"class"` // of the refusal
	Field string `json:"field,omitempty"`
	Error string `json:"error"`
}

func describe(c *token.Claims) claimsVector {
	v := claimsVector{
		Issuer: c.Issuer, Audience: c.Audience, Scopes: c.Scopes,
		IssuedAt: c.IssuedAt, NotBefore: c.NotBefore, Expires: c.Expires,
		Binding: string(c.Binding), Transaction: c.Transaction,
		Era: c.Position.Era.String(), Rev: c.Position.Rev, Sum: hex.EncodeToString(c.Position.Sum[:]),
	}
	if c.Certificate != [32]byte{} {
		v.Certificate = hex.EncodeToString(c.Certificate[:])
	}
	for _, m := range c.Lineage {
		mv := memberVector{Identity: m.Identity.String(), Grant: m.Grant.String(), Key: m.Key.String()}
		if !m.SVID.IsZero() {
			mv.SVID = m.SVID.String()
		}
		v.Lineage = append(v.Lineage, mv)
	}
	return v
}

func classOf(err error) string {
	for name, class := range map[string]error{
		"malformed": token.ErrMalformed, "unknown_key": token.ErrUnknownKey, "signature": token.ErrSignature,
	} {
		if errors.Is(err, class) {
			return name
		}
	}
	return ""
}

func (f forge) keyVectors() []keyVector {
	var out []keyVector
	for _, k := range []testKey{f.ed, f.es, f.rs} {
		der, err := x509.MarshalPKIXPublicKey(k.public.Key)
		if err != nil {
			f.Fatal(err)
		}
		out = append(out, keyVector{"vector-" + strings.ToLower(string(k.public.Algorithm)), k.public.Algorithm, k.public.ID.String(), der})
	}
	return out
}

func (f forge) acceptedVectors() []acceptedVector {
	var out []acceptedVector
	for _, k := range []testKey{f.ed, f.es, f.rs} {
		for _, tc := range []struct {
			name    string
			members int
			shape   func(*token.Claims)
		}{
			{"root", 1, func(*token.Claims) {}},
			{"root without scopes", 1, func(c *token.Claims) { c.Scopes = nil }},
			{"root with a JWT-SVID", 1, func(c *token.Claims) { c.Lineage[0].SVID = token.Thumbprint{} }},
			{"bearer", 1, func(c *token.Claims) { c.Binding = token.BindingNone }},
			{"bound to a certificate", 1, func(c *token.Claims) { c.Binding, c.Certificate = token.BindingX5T, [32]byte{7} }},
			{"not yet valid at issue", 1, func(c *token.Claims) { c.NotBefore = c.IssuedAt.Add(time.Minute) }},
			{"at the start of a log", 1, func(c *token.Claims) { c.Position.Rev, c.Position.Sum = 0, [8]byte{} }},
			{"derived", 2, func(*token.Claims) {}},
			{"derived across keys", 2, func(c *token.Claims) { c.Lineage[0].Key = f.stranger.public.ID }},
			{"full depth", token.MaxDepth, func(*token.Claims) {}},
			{"the longest life and the highest number", 1, func(c *token.Claims) {
				c.Expires, c.Position.Rev = c.IssuedAt.Add(token.MaxTTL), 1<<64-1
			}},
		} {
			c := claims(f, k.public.ID, tc.members)
			tc.shape(c)
			u := encode(f, c, k.public.Algorithm)
			fp := u.Fingerprint()
			input, _, _ := cutLast(sign(f, c, k))
			out = append(out, acceptedVector{tc.name, k.signInput(f, input), k.public.Algorithm, hex.EncodeToString(fp[:]), describe(c)})
		}
	}
	return out
}

func (f forge) refusedVectors() []refusedVector {
	var out []refusedVector
	for _, h := range f.hostiles() {
		v := refusedVector{Name: h.name, Token: h.raw, Class: classOf(h.class), Error: h.want}
		if rest, ok := strings.CutPrefix(h.want, "malformed token: "); ok {
			v.Field, _, _ = strings.Cut(rest, " ")
		}
		out = append(out, v)
	}
	slices.SortFunc(out, func(a, b refusedVector) int { return strings.Compare(a.Name, b.Name) })
	return out
}

// golden returns the bytes of a file of testdata, which must be what v encodes to.
func golden(t *testing.T, name string, v any) []byte {
	t.Helper()
	var want bytes.Buffer
	enc := json.NewEncoder(&want)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	if err := enc.Encode(v); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, want.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want.Bytes()) {
		t.Errorf("%s is not what the code writes now: if that is meant, the format has changed; run the test with -update", path)
	}
	return got
}

func readVectors[V any](t *testing.T, b []byte) []V {
	t.Helper()
	var out []V
	if err := json.Unmarshal(b, &out); err != nil {
		t.Fatal(err)
	}
	if len(out) == 0 {
		t.Fatal("no vectors")
	}
	return out
}

// TestVectors compares the files with what the code writes, byte by byte, and then
// reads the files alone, as a stranger would. ES256 signatures in them are those of
// RFC 6979, made by the test: the library's own are random.
func TestVectors(t *testing.T) {
	f := newForge(t)
	keys := map[string]token.PublicKey{}
	for _, v := range readVectors[keyVector](t, golden(t, "keys.json", f.keyVectors())) {
		parsed, err := x509.ParsePKIXPublicKey(v.PublicKey)
		if err != nil {
			t.Fatal(err)
		}
		k, err := token.NewPublicKey(v.Algorithm, parsed)
		if err != nil || k.ID.String() != v.ID {
			t.Fatalf("key %s: ID %s, %v, want %s", v.Name, k.ID, err, v.ID)
		}
		keys[v.ID] = k
	}
	known := func(id token.KeyID) (token.PublicKey, bool) {
		k, ok := keys[id.String()]
		return k, ok
	}
	for _, v := range readVectors[acceptedVector](t, golden(t, "accepted.json", f.acceptedVectors())) {
		t.Run(string(v.Algorithm)+" "+v.Name, func(t *testing.T) { checkAccepted(t, v, known) })
	}
	for _, v := range readVectors[refusedVector](t, golden(t, "refused.json", f.refusedVectors())) {
		_, err := token.Parse(v.Token, known)
		if err == nil || err.Error() != v.Error || classOf(err) != v.Class {
			t.Errorf("%s: %v, want %s", v.Name, err, v.Error)
		}
	}
}

func checkAccepted(t *testing.T, v acceptedVector, known func(token.KeyID) (token.PublicKey, bool)) {
	got, err := token.Parse(v.Token, known)
	if err != nil {
		t.Fatal(err)
	}
	if fp := hex.EncodeToString(got.Fingerprint[:]); fp != v.Fingerprint {
		t.Errorf("fingerprint %s, want %s", fp, v.Fingerprint)
	}
	gotJSON, _ := json.Marshal(describe(&got.Claims))
	wantJSON, _ := json.Marshal(v.Claims)
	if !bytes.Equal(gotJSON, wantJSON) {
		t.Errorf("claims\n got %s\nwant %s", gotJSON, wantJSON)
	}
	raw := sign(t, &got.Claims, fixedKey(t, v.Algorithm, "vector-"+strings.ToLower(string(v.Algorithm))))
	if v.Algorithm != token.ES256 { // whose signatures are random
		if raw != v.Token {
			t.Errorf("signed anew:\n got %s\nwant %s", raw, v.Token)
		}
		return
	}
	gotInput, _, _ := cutLast(raw)
	wantInput, _, _ := cutLast(v.Token)
	if gotInput != wantInput {
		t.Errorf("encoded anew:\n got %s\nwant %s", gotInput, wantInput)
	}
}
