package token_test

import (
	"crypto"
	"crypto/hmac"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/base64"
	"errors"
	"fmt"
	"math/big"
	"strings"
	"testing"

	"github.com/dayflyhq/dayfly/proto/token"
)

// A hostile token and the refusal that it must get, to the letter. The field that is
// to blame comes first; nothing of the token is quoted.
type hostile struct {
	name  string
	raw   string
	want  string // the whole text of the error
	class error
}

// A forge makes hostile tokens: it holds keys that the verifier trusts, as a thief
// may, for what a signature alone would stop proves nothing of the reader.
type forge struct {
	testing.TB
	ed, es, rs, stranger testKey
}

func newForge(t testing.TB) forge {
	return forge{
		TB:       t,
		ed:       fixedKey(t, token.EdDSA, "vector-eddsa"),
		es:       fixedKey(t, token.ES256, "vector-es256"),
		rs:       fixedKey(t, token.RS256, "vector-rs256"),
		stranger: fixedKey(t, token.ES256, "vector-stranger"),
	}
}

func (f forge) known() func(token.KeyID) (token.PublicKey, bool) { return keySet(f.ed, f.es, f.rs) }

func (f forge) header(alg, kid string) string {
	return fmt.Sprintf(`{"alg":%q,"kid":%q,"typ":"at+jwt"}`, alg, kid)
}

// payload is a good one of two members.
func (f forge) payload(spoil ...func(*token.Claims)) string {
	c := claims(f, f.ed.public.ID, 2)
	for _, s := range spoil {
		s(c)
	}
	_, payload, _ := strings.Cut(f.input(c), ".")
	return unb64(f, payload)
}

func (f forge) input(c *token.Claims) string {
	input, _, _ := cutLast(sign(f, c, f.ed))
	return input
}

func (f forge) signed(payload string) string {
	return f.ed.signRaw(f, f.header("EdDSA", f.ed.public.ID.String()), payload)
}

func (f forge) good() string { return f.signed(f.payload()) }

// replace changes exactly one place of a text, or the test is wrong.
func (f forge) replace(s, from, to string) string {
	f.Helper()
	if strings.Count(s, from) != 1 {
		f.Fatalf("%q is %d times in %s", from, strings.Count(s, from), s)
	}
	return strings.Replace(s, from, to, 1)
}

func (f forge) hostiles() []hostile {
	var all []hostile
	for _, group := range [][]hostile{f.forms(), f.headers(), f.structures(), f.lineages(), f.values(), f.signatures()} {
		all = append(all, group...)
	}
	for i := range all {
		if all[i].class == nil {
			all[i].class = token.ErrMalformed
			all[i].want = "malformed token: " + all[i].want
		}
	}
	return all
}

// forms are about the bytes of a JWS.
func (f forge) forms() []hostile {
	good := f.good()
	input, sig, _ := cutLast(good)
	head, payload, _ := strings.Cut(input, ".")
	spare := func(s string) string { // the same bytes, with a spare bit set
		alphabet := "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
		last := strings.IndexByte(alphabet, s[len(s)-1])
		return s[:len(s)-1] + string(alphabet[last|1])
	}
	// A payload of a length that leaves spare bits.
	loose := f.payload()
	for len(loose)%3 == 0 {
		loose += " "
	}
	return []hostile{
		{name: "empty", raw: "", want: "token is not three parts"},
		{name: "one part", raw: head, want: "token is not three parts"},
		{name: "no signature part", raw: input, want: "token is not three parts"},
		{name: "four parts", raw: good + ".", want: "token is not three parts"},
		{name: "five parts, as a JWE", raw: good + "." + head + "." + head, want: "token is not three parts"},
		{name: "as JSON", raw: `{"payload":"` + payload + `","protected":"` + head + `","signature":"` + sig + `"}`, want: "token is not three parts"},
		{name: "as JSON with dots", raw: `{"a":"` + good + `"}`, want: "header is not base64url"},
		{name: "only dots", raw: "..", want: "header is not exactly alg, kid and typ"},
		{name: "oversize", raw: good + strings.Repeat("A", token.MaxBytes), want: "token is longer than 2048 bytes"},
		{name: "space before", raw: " " + good, want: "header is not base64url"},
		{name: "space after", raw: good + " ", want: "signature is not base64url"},
		{name: "a NUL after", raw: good + "\x00", want: "signature is not base64url"},
		{name: "a percent sign", raw: f.ed.signInput(f, head+"%2e"+"."+payload), want: "header is not base64url"},
		{name: "behind its scheme", raw: "Bearer " + good, want: "header is not base64url"},
		{name: "line break after", raw: good + "\n", want: "signature is not base64url"},
		{name: "line breaks within the signature", raw: input + "." + sig[:9] + "\r\n" + sig[9:], want: "signature is not base64url"},
		{name: "line break within the header", raw: f.ed.signInput(f, head[:4]+"\n"+head[4:]+"."+payload), want: "header is not base64url"},
		{name: "line break within the payload", raw: f.ed.signInput(f, head+"."+payload[:4]+"\n"+payload[4:]), want: "payload is not base64url"},
		{name: "padded header", raw: f.ed.signInput(f, head+"="+"."+payload), want: "header is not base64url"},
		{name: "padded payload", raw: f.ed.signInput(f, head+"."+base64.URLEncoding.EncodeToString([]byte(loose))), want: "payload is not base64url"},
		{name: "padded signature", raw: good + "==", want: "signature is not base64url"},
		{name: "standard alphabet", raw: input + "." + strings.Repeat("+/", 43), want: "signature is not base64url"},
		{name: "spare bits in the payload", raw: f.ed.signInput(f, head+"."+spare(b64(loose))), want: "payload is not base64url"},
		{name: "spare bits in the signature", raw: input + "." + spare(sig), want: "signature is not base64url"},
		{name: "short signature", raw: input + "." + sig[:84], want: "signature is not 64 bytes"},
		{name: "long signature", raw: good + "AA", want: "signature is not 64 bytes"},
		{name: "ES256 signature in ASN.1", raw: f.inASN1(), want: "signature is not 64 bytes"},
		{name: "no signature", raw: input + ".", want: "signature is not 64 bytes"},
	}
}

// inASN1 is a token whose signature is good but written as X.509 writes them.
func (f forge) inASN1() string {
	raw := f.es.signRaw(f, f.header("ES256", f.es.public.ID.String()), f.payload(func(c *token.Claims) { c.Lineage[1].Key = f.es.public.ID }))
	input, sig, _ := cutLast(raw)
	b := []byte(unb64(f, sig))
	der, err := asn1.Marshal(struct{ R, S *big.Int }{new(big.Int).SetBytes(b[:32]), new(big.Int).SetBytes(b[32:])})
	if err != nil {
		f.Fatal(err)
	}
	return input + "." + b64(string(der))
}

// headers are about algorithms, keys and what a header could smuggle.
func (f forge) headers() []hostile {
	kid, esKid := f.ed.public.ID.String(), f.es.public.ID.String()
	plain := f.header("EdDSA", kid)
	with := func(name, header, want string) hostile {
		return hostile{name: name, raw: f.ed.signRaw(f, header, f.payload()), want: want}
	}
	out := []hostile{
		{name: "alg none", raw: b64(f.header("none", kid)) + "." + b64(f.payload()) + ".", want: "alg is none of ES256, EdDSA and RS256"},
		{name: "HS256 with the public key as secret", raw: f.hmacWithPublicKey(), want: "alg is none of ES256, EdDSA and RS256"},
		with("alg None", f.header("None", kid), "alg is none of ES256, EdDSA and RS256"),
		with("alg NONE", f.header("NONE", kid), "alg is none of ES256, EdDSA and RS256"),
		with("alg nOnE", f.header("nOnE", kid), "alg is none of ES256, EdDSA and RS256"),
		with("alg none with a space", f.header("none ", kid), "alg is none of ES256, EdDSA and RS256"),
		with("alg empty", f.header("", kid), "alg is none of ES256, EdDSA and RS256"),
		with("alg null", f.replace(plain, `"EdDSA"`, `null`), "alg is none of ES256, EdDSA and RS256"),
		with("alg Ed25519", f.header("Ed25519", kid), "alg is none of ES256, EdDSA and RS256"),
		with("alg ES256K", f.header("ES256K", kid), "alg is none of ES256, EdDSA and RS256"),
		with("alg dir", f.header("dir", kid), "alg is none of ES256, EdDSA and RS256"),
		with("alg eddsa", f.header("eddsa", kid), "alg is none of ES256, EdDSA and RS256"),
		with("alg ES384", f.header("ES384", kid), "alg is none of ES256, EdDSA and RS256"),
		with("alg RS256 with an EdDSA signature", f.header("RS256", kid), "signature is not 256 bytes"),
		with("alg RS384", f.header("RS384", kid), "alg is none of ES256, EdDSA and RS256"),
		with("alg PS256", f.header("PS256", kid), "alg is none of ES256, EdDSA and RS256"),
		{name: "RS256 alg with an EdDSA key", raw: f.rs.signRaw(f, f.header("RS256", kid), f.payload()), want: "alg is not that of the key"},
		{name: "RS256 alg with an ES256 key", raw: f.rs.signRaw(f, f.header("RS256", esKid), f.payload()), want: "alg is not that of the key"},
		with("EdDSA alg with an RS256 key", f.header("EdDSA", f.rs.public.ID.String()), "alg is not that of the key"),
		with("ES256 alg with an RS256 key", f.header("ES256", f.rs.public.ID.String()), "alg is not that of the key"),
		with("EdDSA alg with an ES256 key", f.header("EdDSA", esKid), "alg is not that of the key"),
		with("ES256 alg with an EdDSA key", f.header("ES256", kid), "alg is not that of the key"),
		with("no alg", `{"kid":"`+kid+`","typ":"at+jwt"}`, "alg is none of ES256, EdDSA and RS256"),
		with("no kid", `{"alg":"EdDSA","typ":"at+jwt"}`, "kid is not 8 characters of base64url"),
		with("no typ", `{"alg":"EdDSA","kid":"`+kid+`"}`, "typ is not at+jwt"),
		with("kid as a path", f.header("EdDSA", "../../dev/null"), "kid is not 8 characters of base64url"),
		with("kid empty", f.header("EdDSA", ""), "kid is not 8 characters of base64url"),
		with("kid as SQL", f.header("EdDSA", "' OR 1=1"), "kid is not 8 characters of base64url"),
		with("kid as a URL", f.header("EdDSA", "https://evil.example/keys"), "kid is not 8 characters of base64url"),
		with("kid long", f.header("EdDSA", strings.Repeat("A", 512)), "kid is not 8 characters of base64url"),
		with("kid with a NUL", f.replace(plain, kid, kid[:7]+`\u0000`), "kid is not 8 characters of base64url"),
		with("kid a number", f.replace(plain, `"`+kid+`"`, `12345678`), "header is not exactly alg, kid and typ"),
		with("kid twice", f.replace(plain, `"kid"`, `"kid":"AAAAAAAB","kid"`), "header is not exactly alg, kid and typ"),
		with("typ twice", f.replace(plain, `"typ"`, `"typ":"JWT","typ"`), "header is not exactly alg, kid and typ"),
		with("header nested deeply", plain[:len(plain)-1]+`,"x":`+strings.Repeat("[", 300)+strings.Repeat("]", 300)+"}", "header is not exactly alg, kid and typ"),
		with("kid with line breaks", f.header("EdDSA", "AAAA\n\n\n\n"), "kid is not 8 characters of base64url"),
		with("alg twice", f.replace(plain, `"alg"`, `"alg":"none","alg"`), "header is not exactly alg, kid and typ"),
		with("alg in another case", f.replace(plain, `"alg"`, `"ALG":"none","alg"`), "header is not exactly alg, kid and typ"),
		with("alg twice by escape", f.replace(plain, `"alg"`, `"\u0061lg":"none","alg"`), "header is not exactly alg, kid and typ"),
		with("alg as a list", f.replace(plain, `"EdDSA"`, `["EdDSA"]`), "header is not exactly alg, kid and typ"),
		with("header null", `null`, "typ is not at+jwt"),
		with("header a list", `[]`, "header is not exactly alg, kid and typ"),
		with("header with a tail", plain+"{}", "header is not exactly alg, kid and typ"),
		with("header not JSON", "alg", "header is not exactly alg, kid and typ"),
		with("own kid, but that of another in the lineage", f.header("EdDSA", kid), ""),
		{name: "unknown kid", raw: f.stranger.signRaw(f, f.header("ES256", f.stranger.public.ID.String()), f.payload()),
			want: "unknown signing key", class: token.ErrUnknownKey},
	}
	// The case above is one of the payload: another key than the header's.
	swapped := f.payload(func(c *token.Claims) { c.Lineage[1].Key = f.es.public.ID })
	for i := range out {
		if out[i].want == "" {
			out[i].name = "last key of the lineage is not the kid"
			out[i].raw, out[i].want = f.signed(swapped), "kid is not the last key of the lineage"
		}
	}
	for _, typ := range []string{"JWT", "at+JWT", "AT+JWT", "application/at+jwt", "JOSE", "dpop+jwt", "secevent+jwt", " at+jwt", ""} {
		out = append(out, with("typ "+typ, f.replace(plain, "at+jwt", typ), "typ is not at+jwt"))
	}
	for _, extra := range []string{`"jku":"https://evil.example/keys"`, `"jwk":{"kty":"OKP"}`, `"x5u":"https://evil.example/cert"`,
		`"x5c":["MIIB"]`, `"x5t":"AAAA"`, `"x5t#S256":"AAAA"`, `"crit":["exp"]`, `"p2c":1000000`, `"b64":false`, `"cty":"JWT"`, `"zip":"DEF"`, `"enc":"A256GCM"`} {
		name, _, _ := strings.Cut(strings.TrimPrefix(extra, `"`), `"`)
		out = append(out, with(name+" in the header", plain[:len(plain)-1]+","+extra+"}", "header is not exactly alg, kid and typ"))
	}
	return out
}

// hmacWithPublicKey is the classic confusion: the public key is no secret.
func (f forge) hmacWithPublicKey() string {
	der, err := x509.MarshalPKIXPublicKey(f.es.public.Key)
	if err != nil {
		f.Fatal(err)
	}
	input := b64(f.header("HS256", f.es.public.ID.String())) + "." + b64(f.payload())
	mac := hmac.New(sha256.New, der)
	mac.Write([]byte(input))
	return input + "." + base64.RawURLEncoding.EncodeToString(mac.Sum(nil))
}

// structures are about JSON that two readers may read in two ways.
func (f forge) structures() []hostile {
	p := f.payload()
	bound := f.payload(func(c *token.Claims) { c.Binding, c.Certificate = token.BindingX5T, [32]byte{1} })
	edit := func(name, from, to, want string) hostile {
		return hostile{name: name, raw: f.signed(f.replace(p, from, to)), want: want}
	}
	root := `"sub":"spiffe://example.org/ns/prod/sa/service-0","aud"`
	out := []hostile{
		{name: "payload null", raw: f.signed("null"), want: "payload has a null"},
		{name: "payload a list", raw: f.signed("[]"), want: "payload is not a JSON object"},
		{name: "payload a string", raw: f.signed(`"sub"`), want: "payload is not a JSON object"},
		{name: "payload empty", raw: f.signed(""), want: "payload is not a JSON object"},
		{name: "payload with a tail", raw: f.signed(p + "{}"), want: "payload is not a JSON object"},
		{name: "payload cut off", raw: f.signed(p[:len(p)-1]), want: "payload is not a JSON object"},
		{name: "payload not UTF-8", raw: f.signed(f.replace(p, "txn-7f3a", "txn-\xff")), want: "payload is not a JSON object"},
		{name: "byte order mark", raw: f.signed("\xef\xbb\xbf" + p), want: "payload is not a JSON object"},
		edit("sub twice", root, `"sub":"spiffe://example.org/root",`+root, "payload has a name twice"),
		edit("sub twice by escape", root, `"\u0073ub":"spiffe://example.org/root",`+root, "payload has a name twice"),
		edit("rev twice", `"rev":1042`, `"rev":1042,"rev":9999`, "payload has a name twice"),
		edit("dfy twice", `"dfy":{`, `"dfy":{},"dfy":{`, "payload has a name twice"),
		edit("act.sub twice", `"act":{`, `"act":{"sub":"spiffe://example.org/x",`, "payload has a name twice"),
		edit("a foreign claim twice", `"txn"`, `"foreign":1,"foreign":2,"txn"`, "payload has a name twice"),
		edit("twice within a foreign claim", `"txn"`, `"foreign":{"a":1,"a":2},"txn"`, "payload has a name twice"),
		edit("DFY beside dfy", `"dfy":{`, `"DFY":{"rev":9999},"dfy":{`, "dfy is spelt in another case"),
		edit("Sub beside sub", root, `"Sub":"spiffe://example.org/root",`+root, "sub is spelt in another case"),
		edit("Sub for sub", root, strings.Replace(root, "sub", "Sub", 1), "sub is spelt in another case"),
		edit("\u017fub beside sub", root, `"`+"\u017f"+`ub":"spiffe://example.org/root",`+root, "sub is spelt in another case"),
		edit("Client_ID", `"client_id"`, `"Client_ID":"x","client_id"`, "client_id is spelt in another case"),
		edit("Rev in dfy", `"rev":1042`, `"rev":1042,"Rev":9999`, "dfy has an unknown field"),
		edit("unknown field of dfy", `"bnd"`, `"new":1,"bnd"`, "dfy has an unknown field"),
		edit("unknown field of act", `"act":{`, `"act":{"iss":"https://evil.example",`, "act has an unknown field"),
		{name: "unknown field of cnf", raw: f.signed(f.replace(bound, `"cnf":{`, `"cnf":{"jkt":"x",`)), want: "cnf has an unknown field"},
		edit("null act in act", `service-1"}`, `service-1","act":null}`, "payload has a null"),
		edit("null cnf", `"txn"`, `"cnf":null,"txn"`, "payload has a null"),
		edit("null in a foreign claim", `"txn"`, `"foreign":[null],"txn"`, "payload has a null"),
		edit("null exp", `"exp":1795435500`, `"exp":null`, "payload has a null"),
	}
	return append(out, f.missing(bound)...)
}

// missing leaves out each claim in turn.
func (f forge) missing(bound string) []hostile {
	var out []hostile
	for _, tc := range []struct{ claim, want string }{
		{"iss", "iss is not an issuer"},
		{"sub", "sub or an act.sub is no SPIFFE ID"},
		{"aud", "aud is not one audience"},
		{"exp", "exp is not a time after 1970 and before 10000"},
		{"nbf", "nbf is not a time after 1970 and before 10000"},
		{"iat", "iat is not a time after 1970 and before 10000"},
		{"jti", "jti is not the last grant of the lineage"},
		{"client_id", "client_id is not the presenter"},
		{"act", "dfy.lin is not one longer than act is deep"},
		{"cnf", "cnf is there exactly when bnd is x5t"},
		{"x5t#S256", "cnf is no certificate thumbprint"},
		{"txn", "txn is not 1 to 64 printable characters"},
		{"dfy", "dfy.era is not 8 lower-case hexadecimal digits"},
		{"era", "dfy.era is not 8 lower-case hexadecimal digits"},
		{"rev", "dfy.rev is missing"},
		{"sum", "dfy.sum is not 11 characters of base64url"},
		{"bnd", "cnf is there exactly when bnd is x5t"},
		{"lin", "dfy.lin is not one longer than act is deep"},
	} {
		out = append(out, hostile{name: "no " + tc.claim, raw: f.signed(without(f, bound, tc.claim)), want: tc.want})
	}
	return out
}

// lineages are about who stands behind a token.
func (f forge) lineages() []hostile {
	p := f.payload()
	edit := func(name, from, to, want string) hostile {
		return hostile{name: name, raw: f.signed(f.replace(p, from, to)), want: want}
	}
	first, last := member(f, 0, f.ed.public.ID), member(f, 1, f.ed.public.ID)
	entry := func(m token.Member) string {
		return fmt.Sprintf(`[%q,%q,%q]`, m.Grant, m.Key, base64.RawURLEncoding.EncodeToString(m.SVID[:]))
	}
	actor := `"act":{"sub":"spiffe://example.org/ns/prod/sa/service-1"}`
	short := func(id spiffeText, n int) string { // n actors of one short name
		return strings.Repeat(`"act":{"sub":"`+string(id)+`",`, n) + `"act":{"sub":"` + string(id) + `"}` + strings.Repeat("}", n)
	}
	out := []hostile{
		edit("act deeper than the lineage", actor, `"act":{"sub":"spiffe://example.org/ns/prod/sa/service-1","act":{"sub":"spiffe://example.org/x"}}`, "dfy.lin is not one longer than act is deep"),
		edit("lineage longer than act", entry(last), entry(first)+","+entry(last), "dfy.lin is not one longer than act is deep"),
		edit("lineage hides the root", entry(first)+",", "", "dfy.lin is not one longer than act is deep"),
		edit("act nested seven deep", actor, short("spiffe://a/b", 5), "act is nested deeper than 5"),
		edit("act nested fifteen deep", actor, short("spiffe://a/b", 14), "act is nested deeper than 5"),
		edit("last grant is not the jti", `"jti":"`+last.Grant.String(), `"jti":"`+first.Grant.String(), "jti is not the last grant of the lineage"),
		edit("grants in the wrong order", entry(first)+","+entry(last), entry(last)+","+entry(first), "jti is not the last grant of the lineage"),
		edit("client_id is the root", `"client_id":"spiffe://example.org/ns/prod/sa/service-1"`, `"client_id":"spiffe://example.org/ns/prod/sa/service-0"`, "client_id is not the presenter"),
		edit("act is not the client_id", actor, `"act":{"sub":"spiffe://example.org/ns/prod/sa/service-2"}`, "client_id is not the presenter"),
		edit("entry of one", entry(first), `["`+first.Grant.String()+`"]`, "dfy.lin has an entry that is not [grant, key] or [grant, key, SVID]"),
		edit("entry of four", entry(first), strings.TrimSuffix(entry(first), "]")+`,"x"]`, "dfy.lin has an entry that is not [grant, key] or [grant, key, SVID]"),
		edit("entry empty", entry(first), `[]`, "dfy.lin has an entry that is not [grant, key] or [grant, key, SVID]"),
		edit("entry an object", entry(first), `{}`, "dfy has a value of the wrong type"),
		edit("short grant", `"`+first.Grant.String()+`"`, `"AAAA"`, "dfy.lin has a malformed grant ID"),
		edit("grant with line breaks", `"`+first.Grant.String()+`"`, `"`+first.Grant.String()[:20]+`\n\n\n\n"`, "dfy.lin has a malformed grant ID"),
		edit("zero grant", `"`+first.Grant.String()+`"`, `"`+strings.Repeat("A", 24)+`"`, "dfy.lin has an incomplete member"),
		edit("short key", entry(first), strings.Replace(entry(first), first.Key.String(), "AAAA", 1), "dfy.lin has a malformed key ID"),
		edit("zero SVID", "Af4AAAAAAAAAAAAAAAAAAA", "AAAAAAAAAAAAAAAAAAAAAA", "dfy.lin has a malformed SVID thumbprint"),
		edit("spare bits in an SVID", "Af4AAAAAAAAAAAAAAAAAAA", "Af4AAAAAAAAAAAAAAAAAAB", "dfy.lin has a malformed SVID thumbprint"),
		edit("empty SVID", "Af4AAAAAAAAAAAAAAAAAAA", "", "dfy.lin has a malformed SVID thumbprint"),
		edit("sub is no SPIFFE ID", `"sub":"spiffe://example.org/ns/prod/sa/service-0"`, `"sub":"service-0"`, "sub or an act.sub is no SPIFFE ID"),
		edit("sub in another scheme", `"sub":"spiffe://example.org/ns/prod/sa/service-0"`, `"sub":"SPIFFE://example.org/ns"`, "sub or an act.sub is no SPIFFE ID"),
		edit("act.sub climbs", `"act":{"sub":"spiffe://example.org/ns`, `"act":{"sub":"spiffe://example.org/../ns`, "sub or an act.sub is no SPIFFE ID"),
		edit("sub climbs", `"sub":"spiffe://example.org/ns/prod/sa/service-0"`, `"sub":"spiffe://example.org/ns/../sa"`, "sub or an act.sub is no SPIFFE ID"),
	}
	for name, sub := range map[string]string{
		"of another case":           "spiffe://Example.org/ns",
		"with %2e":                  "spiffe://example.org/%2e%2e/ns",
		"with an empty segment":     "spiffe://example.org//ns",
		"with a dot":                "spiffe://example.org/./ns",
		"with a slash at the end":   "spiffe://example.org/ns/",
		"with a NUL":                `spiffe://example.org/ns\u0000`,
		"with a space":              "spiffe://example.org/ns ",
		"with a query":              "spiffe://example.org/ns?x=1",
		"with a fragment":           "spiffe://example.org/ns#x",
		"with a user":               "spiffe://root@example.org/ns",
		"with a port":               "spiffe://example.org:443/ns",
		"with a homoglyph":          `spiffe://ex\u0430mple.org/ns`,
		"with a slash that is none": `spiffe://example.org\u2215ns`,
		"without a trust domain":    "spiffe:///ns",
	} {
		out = append(out, edit("sub "+name, `"sub":"spiffe://example.org/ns/prod/sa/service-0"`, `"sub":"`+sub+`"`, "sub or an act.sub is no SPIFFE ID"))
	}
	return out
}

type spiffeText string

// values are about single claims.
func (f forge) values() []hostile {
	p := f.payload()
	bound := f.payload(func(c *token.Claims) { c.Binding, c.Certificate = token.BindingX5T, [32]byte{1} })
	edit := func(name, from, to, want string) hostile {
		return hostile{name: name, raw: f.signed(f.replace(p, from, to)), want: want}
	}
	aud := `"aud":"spiffe://example.org/ns/prod/sa/ledger"`
	out := []hostile{
		edit("aud a list", aud, `"aud":["spiffe://example.org/ns/prod/sa/ledger"]`, "aud has a value of the wrong type"),
		edit("aud empty", aud, `"aud":""`, "aud is not one audience"),
		edit("aud two in one", aud, `"aud":"ledger orders"`, "aud is not one audience"),
		edit("aud too long", aud, `"aud":"`+strings.Repeat("a", token.MaxAudienceBytes+1)+`"`, "aud is not one audience"),
		edit("aud not ASCII", aud, `"aud":"l\u0435dger"`, "aud is not one audience"),
		edit("iss with a line break", `"iss":"https://dayfly.example.org"`, `"iss":"https://dayfly.example.org\n"`, "iss is not an issuer"),
		edit("scope empty", "orders:read orders:write", "", "scope is not a sorted list of scopes"),
		edit("scope with two spaces", "orders:read orders:write", "orders:read  orders:write", "scope is not a sorted list of scopes"),
		edit("scope unsorted", "orders:read orders:write", "orders:write orders:read", "scope is not a sorted list of scopes"),
		edit("scope twice", "orders:read orders:write", "orders:read orders:read", "scope is not a sorted list of scopes"),
		edit("scope a list", `"orders:read orders:write"`, `["orders:read"]`, "scope has a value of the wrong type"),
		edit("33 scopes", "orders:read orders:write", strings.Join(manyScopes(33), " "), "scope has more than 32 scopes"),
		edit("unknown bnd", `"bnd":"spiffe"`, `"bnd":"dpop"`, "dfy.bnd is unknown"),
		edit("bnd in another case", `"bnd":"spiffe"`, `"bnd":"None"`, "dfy.bnd is unknown"),
		edit("bnd empty", `"bnd":"spiffe"`, `"bnd":""`, "dfy.bnd is unknown"),
		edit("x5t without cnf", `"bnd":"spiffe"`, `"bnd":"x5t"`, "cnf is there exactly when bnd is x5t"),
		edit("cnf without x5t", `"txn"`, `"cnf":{"x5t#S256":"`+strings.Repeat("A", 43)+`"},"txn"`, "cnf is there exactly when bnd is x5t"),
		{name: "cnf of nothing", raw: f.signed(f.replace(bound, "AQ"+strings.Repeat("A", 41), strings.Repeat("A", 43))), want: "cnf is there exactly when bnd is x5t"},
		{name: "cnf too short", raw: f.signed(f.replace(bound, "AQ"+strings.Repeat("A", 41), "AQ")), want: "cnf is no certificate thumbprint"},
		edit("life above the cap", "1795435500", "1795438801", "exp is more than the hard cap after iat"),
		edit("exp in milliseconds", "1795435500", "1795435500000", "exp is not a time after 1970 and before 10000"),
		edit("exp before iat", "1795435500", "1795435199", "exp is not after iat and nbf"),
		edit("exp at iat", "1795435500", "1795435200", "exp is not after iat and nbf"),
		edit("nbf before iat", `"nbf":1795435200`, `"nbf":1795435199`, "nbf is before iat"),
		{name: "alive for ten years, within the cap", raw: f.signed(f.replace(f.replace(p, `"exp":1795435500`, `"exp":2110968300`), `"iat":1795435200`, `"iat":2110968000`)), want: "nbf is before iat"},
		edit("nbf at exp", `"nbf":1795435200`, `"nbf":1795435500`, "exp is not after iat and nbf"),
		edit("rev a string", `"rev":1042`, `"rev":"1042"`, "dfy has a value of the wrong type"),
		edit("rev negative", `"rev":1042`, `"rev":-1`, "dfy has a value of the wrong type"),
		edit("rev a float", `"rev":1042`, `"rev":1042.0`, "dfy has a value of the wrong type"),
		edit("rev with an exponent", `"rev":1042`, `"rev":1e3`, "dfy has a value of the wrong type"),
		edit("rev huge", `"rev":1042`, `"rev":18446744073709551616`, "dfy has a value of the wrong type"),
		edit("rev with a zero before", `"rev":1042`, `"rev":01042`, "payload is not a JSON object"),
		edit("era of capitals", "3f9c1a7e", "3F9C1A7E", "dfy.era is not 8 lower-case hexadecimal digits"),
		edit("era zero", "3f9c1a7e", "00000000", "dfy.era is not 8 lower-case hexadecimal digits"),
		edit("sum short", "AQIDBAUGBwg", "AQIDBAUGBw", "dfy.sum is not 11 characters of base64url"),
		edit("sum with a spare bit", "AQIDBAUGBwg", "AQIDBAUGBwh", "dfy.sum is not 11 characters of base64url"),
		edit("txn too long", "txn-7f3a", strings.Repeat("t", 65), "txn is not 1 to 64 printable characters"),
		edit("txn with a line break", "txn-7f3a", `txn\n7f3a`, "txn is not 1 to 64 printable characters"),
		edit("txn a number", `"txn-7f3a"`, `7`, "txn has a value of the wrong type"),
	}
	for claim, good := range map[string]string{"exp": "1795435500", "nbf": "1795435200", "iat": "1795435200"} {
		from := `"` + claim + `":` + good
		to := func(v string) string { return `"` + claim + `":` + v }
		out = append(out,
			edit(claim+" negative", from, to("-"+good), claim+" is not a time after 1970 and before 10000"),
			edit(claim+" zero", from, to("0"), claim+" is not a time after 1970 and before 10000"),
			edit(claim+" in year 10000", from, to("253402300800"), claim+" is not a time after 1970 and before 10000"),
			edit(claim+" at the end of int64", from, to("9223372036854775807"), claim+" is not a time after 1970 and before 10000"),
			edit(claim+" beyond int64", from, to("9223372036854775808"), claim+" has a value of the wrong type"),
			edit(claim+" with an exponent", from, to("1.7954355e9"), claim+" has a value of the wrong type"),
			edit(claim+" minus zero", from, to("-0"), claim+" is not a time after 1970 and before 10000"),
			edit(claim+" astronomical", from, to("1e400"), claim+" has a value of the wrong type"),
			edit(claim+" a float", from, to(good+".5"), claim+" has a value of the wrong type"),
			edit(claim+" a string", from, to(`"`+good+`"`), claim+" has a value of the wrong type"),
			edit(claim+" a bool", from, to(`true`), claim+" has a value of the wrong type"),
		)
	}
	return out
}

// signatures are tokens that are well-formed and not what was signed.
func (f forge) signatures() []hostile {
	good := f.good()
	input, sig, _ := cutLast(good)
	head, _, _ := strings.Cut(input, ".")
	bad := func(name, raw string) hostile {
		return hostile{name, raw, "bad signature", token.ErrSignature}
	}
	es := f.es.signRaw(f, f.header("ES256", f.es.public.ID.String()), f.payload(func(c *token.Claims) { c.Lineage[1].Key = f.es.public.ID }))
	esInput, esSig, _ := cutLast(es)
	rs := f.rs.signRaw(f, f.header("RS256", f.rs.public.ID.String()), f.payload(func(c *token.Claims) { c.Lineage[1].Key = f.rs.public.ID }))
	rsInput, _, _ := cutLast(rs)
	modulus := f.rs.signer.Public().(*rsa.PublicKey).N
	n := "_____wAAAAD__________7zm-q2nF56E87nKwvxjJVE" // the order of P-256
	return []hostile{
		bad("tampered payload", head+"."+b64(f.replace(f.payload(), "orders:write", "orders:admin"))+"."+sig),
		bad("tampered into rubbish", head+"."+b64("{")+"."+sig),
		bad("signature of another token", input+"."+base64.RawURLEncoding.EncodeToString(f.ed.signature(f, "other"))),
		bad("zero EdDSA signature", input+"."+strings.Repeat("A", 86)),
		bad("zero ES256 signature", esInput+"."+strings.Repeat("A", 86)),
		bad("ES256 signature of the order", esInput+"."+base64.RawURLEncoding.EncodeToString([]byte(unb64(f, n)+unb64(f, n)))),
		bad("zero RS256 signature", rsInput+"."+b64(strings.Repeat("\x00", 256))),
		bad("RS256 signature of one", rsInput+"."+b64(strings.Repeat("\x00", 255)+"\x01")), // m = 1 for every exponent
		bad("RS256 signature of the modulus", rsInput+"."+b64(string(modulus.Bytes()))),
		bad("RSA-PSS signature under RS256", rsInput+"."+b64(f.inPSS(rsInput))),
		bad("r and s swapped", esInput+"."+swapHalves(f, esSig)),
		bad("a stranger's signature under a known kid", f.stranger.signInput(f, esInput)),
	}
}

// inPSS is the signature that PS256 would have.
func (f forge) inPSS(input string) string {
	sum := sha256.Sum256([]byte(input))
	sig, err := rsa.SignPSS(constant{}, f.rs.signer.(*rsa.PrivateKey), crypto.SHA256, sum[:], &rsa.PSSOptions{SaltLength: 0})
	if err != nil {
		f.Fatal(err)
	}
	return string(sig)
}

// constant is no randomness: the vectors are the same in every run.
type constant struct{}

func (constant) Read(b []byte) (int, error) { return len(b), nil }

func swapHalves(t testing.TB, sig string) string {
	b := unb64(t, sig)
	return b64(b[32:] + b[:32])
}

func TestHostileTokens(t *testing.T) {
	f := newForge(t)
	if _, err := token.Parse(f.good(), f.known()); err != nil {
		t.Fatalf("the good token that all others come from: %v", err)
	}
	seen := map[string]bool{}
	for _, h := range f.hostiles() {
		if seen[h.name] {
			t.Errorf("two cases are named %q", h.name)
		}
		seen[h.name] = true
		tok, err := token.Parse(h.raw, f.known())
		if tok != nil || !errors.Is(err, h.class) || err.Error() != h.want {
			t.Errorf("%s: %v, want %q", h.name, err, h.want)
			continue
		}
		quotesNothing(t, h.name, h.raw, err)
		// Inspect reads the same form; only what a key would tell is left open.
		tok, err = token.Inspect(h.raw)
		if err == nil && errors.Is(h.class, token.ErrMalformed) && h.want != "malformed token: alg is not that of the key" {
			t.Errorf("%s: Inspect accepted %+v", h.name, tok)
		}
		if err != nil {
			quotesNothing(t, h.name, h.raw, err)
		}
	}
}

// quotesNothing wants no run of 6 characters of the token, encoded or decoded, in
// the error, but for words that the refusal itself must say.
func quotesNothing(t *testing.T, name, raw string, err error) {
	t.Helper()
	texts := strings.Split(raw, ".")
	for _, part := range texts {
		if b, decodeErr := base64.RawURLEncoding.DecodeString(part); decodeErr == nil {
			texts = append(texts, string(b))
		}
	}
	text := err.Error()
	for _, ours := range []string{"at+jwt", "client_id", "base64url", "EdDSA", "SPIFFE"} {
		text = strings.ReplaceAll(text, ours, "#")
	}
	for _, part := range texts {
		for i := 0; i+6 <= len(text); i++ {
			if strings.Contains(part, text[i:i+6]) {
				t.Errorf("%s: the error %q quotes the token: %q", name, err, text[i:i+6])
			}
		}
	}
}

// TestForeignClaims: others may add claims of their own at the top.
func TestForeignClaims(t *testing.T) {
	f := newForge(t)
	p := f.replace(f.payload(), `"txn"`, `"acr":"2","nullable":"not null","foreign":{"sub":1,"DFY":[]},"deep":`+
		strings.Repeat("[", 200)+strings.Repeat("]", 200)+`,"txn"`)
	got, err := token.Parse(f.signed(p), f.known())
	if err != nil {
		t.Fatal(err)
	}
	if got.Transaction != "txn-7f3a" {
		t.Errorf("txn %q after foreign claims", got.Transaction)
	}
}
