package web_test

import (
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// lends makes policy give everything, and let those introspect whom a token is for.
func (w *world) lends() {
	w.set(func(q broker.Question) (broker.Decision, error) {
		allow := q.Action != broker.ActionIntrospect || w.AnswersTo(q.Caller.ID, q.Audience) || q.Audience == q.Caller.ID.String()
		return broker.Decision{Allow: allow, Scopes: []string{"read", "write"}, TTL: 5 * time.Minute, Binding: q.Binding}, nil
	})
}

// raw posts a form and returns the answer as it came.
func (w *world) raw(c *http.Client, path string, form url.Values) (int, string) {
	w.t.Helper()
	resp, err := c.PostForm(w.base+path, form)
	if err != nil {
		w.t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		w.t.Fatal(err)
	}
	if cc := resp.Header.Get("Cache-Control"); cc != "no-store" {
		w.t.Errorf("Cache-Control is %q", cc)
	}
	return resp.StatusCode, strings.TrimSpace(string(body))
}

// presented is a form with a token.
func presented(secret string, more ...string) url.Values {
	f := url.Values{"token": {secret}}
	for i := 0; i < len(more); i += 2 {
		f.Set(more[i], more[i+1])
	}
	return f
}

const inactive = `{"active":false}`

func TestIntrospection(t *testing.T) {
	w := newWorld(t)
	w.lends()
	p, o, l := w.client(payments), w.client(orders), w.client(spiffeid.RequireFromString("spiffe://example.org/ledger"))
	root := w.post(p, "/token", credentials("audience", orders.String()).Encode()).text("access_token")
	derived := w.post(o, "/token", exchange(root, "dayfly_binding", "x5t").Encode()).text("access_token")
	tok, err := token.Inspect(derived)
	if err != nil {
		t.Fatal(err)
	}
	a := w.post(l, "/introspect", presented(derived, "token_type_hint", "refresh_token", "unknown", "ignored").Encode())
	if a.status != http.StatusOK || a.body["active"] != true || a.header.Get("Content-Type") != "application/json" {
		t.Fatalf("got %d %v", a.status, a.body)
	}
	for name, want := range map[string]any{
		"iss": issuer, "sub": payments.String(), "aud": "ledger", "client_id": orders.String(), "token_type": "Bearer",
		"scope": "read write", "exp": float64(tok.Expires.Unix()), "iat": float64(tok.IssuedAt.Unix()), "nbf": float64(tok.NotBefore.Unix()),
		"jti": tok.Grant().String(), "txn": tok.Transaction,
	} {
		if a.body[name] != want {
			t.Errorf("%s is %v, want %v", name, a.body[name], want)
		}
	}
	if _, ok := a.body["username"]; ok {
		t.Error("nobody has a username")
	}
	act, _ := a.body["act"].(map[string]any)
	cnf, _ := a.body["cnf"].(map[string]any)
	dfy, _ := a.body["dfy"].(map[string]any)
	if act["sub"] != orders.String() || cnf["x5t#S256"] != base64.RawURLEncoding.EncodeToString(tok.Certificate[:]) || dfy["bnd"] != "x5t" {
		t.Errorf("act %v, cnf %v, dfy %v", act, cnf, dfy)
	}
	// With a JWT-SVID, too; a bound token has no cnf where no certificate is.
	a = w.post(w.client(spiffeid.ID{}), "/introspect", w.assertion(orders, presented(root)).Encode())
	if a.body["active"] != true || a.body["cnf"] != nil || a.body["act"] != nil || a.body["dfy"].(map[string]any)["bnd"] != "spiffe" {
		t.Errorf("got %d %v", a.status, a.body)
	}

	// Whoever may not ask is told what is told of anything else.
	for name, tt := range map[string]struct {
		c      *http.Client
		secret string
	}{
		"another's": {o, derived}, "one's own": {p, root}, "no token": {l, "x"}, "no signature": {l, derived[:len(derived)-9]}, "a JWT-SVID": {l, w.assertion(orders, url.Values{}).Get("client_assertion")},
	} {
		if status, body := w.raw(tt.c, "/introspect", presented(tt.secret)); status != http.StatusOK || body != inactive {
			t.Errorf("%s: %d %s", name, status, body)
		}
	}
	// A revocation is known at once.
	if _, err := w.b.Revoke(t.Context(), broker.Caller{Local: "break-glass:uid=0"}, broker.Revoke{
		Selectors: []revocation.Selector{revocation.Identity(payments)}, Lock: broker.LockNone, Reason: "r",
	}); err != nil {
		t.Fatal(err)
	}
	if status, body := w.raw(l, "/introspect", presented(derived)); status != http.StatusOK || body != inactive {
		t.Errorf("revoked: %d %s", status, body)
	}
}

func TestRevocation(t *testing.T) {
	w := newWorld(t)
	w.lends()
	p, o, l := w.client(payments), w.client(orders), w.client(spiffeid.RequireFromString("spiffe://example.org/ledger"))
	root := w.post(p, "/token", credentials("audience", orders.String()).Encode()).text("access_token")
	derived := w.post(o, "/token", exchange(root).Encode()).text("access_token")
	gone := func(name string, c *http.Client, secret string) {
		t.Helper()
		if status, body := w.raw(c, "/revoke", presented(secret, "token_type_hint", "refresh_token")); status != http.StatusOK || body != "" {
			t.Errorf("%s: %d %q", name, status, body)
		}
	}
	active := func(c *http.Client, secret string) bool {
		return w.post(c, "/introspect", presented(secret).Encode()).body["active"] == true
	}
	gone("nonsense", p, "nonsense")
	gone("another's", o, root)
	gone("its root's", p, derived)
	gone("a forged one", p, root[:len(root)-9]+"AAAAAAAAA")
	if !active(o, root) || !active(l, derived) {
		t.Fatal("somebody revoked what isn't theirs")
	}
	gone("its own", p, root)
	if active(o, root) || active(l, derived) {
		t.Error("given back, and active")
	}
	gone("its own, once more", p, root)
	if e := w.last(); e.Action != broker.ActionGiveBack || e.Outcome != "allowed" || e.Reason != "ALREADY_REVOKED" {
		t.Errorf("audited as %+v", e)
	}
	// With a JWT-SVID.
	root = w.post(p, "/token", credentials("audience", orders.String()).Encode()).text("access_token")
	if a := w.post(w.client(spiffeid.ID{}), "/revoke", w.assertion(payments, presented(root)).Encode()); a.status != http.StatusOK || active(o, root) {
		t.Errorf("with a JWT-SVID: %d %v", a.status, a.body)
	}
	svid := w.assertion(payments, url.Values{}).Get("client_assertion")
	w.post(p, "/revoke", presented(svid).Encode()).wantError(t, 400, "unsupported_token_type", "TOKEN_TYPE_UNSUPPORTED")
}

// Both want an authenticated client and a token, and say in time when they can't answer.
func TestIntrospectionAndRevocationErrors(t *testing.T) {
	w := newWorld(t)
	w.lends()
	p, stranger := w.client(payments), w.client(spiffeid.ID{})
	root := w.post(p, "/token", credentials("audience", payments.String()).Encode()).text("access_token")
	for _, path := range []string{"/introspect", "/revoke"} {
		w.post(stranger, path, presented(root).Encode()).wantError(t, 401, "invalid_client", "CLIENT_UNAUTHENTICATED")
		w.post(p, path, "").wantError(t, 400, "invalid_request", "FORM_INVALID")
		w.post(p, path, "token_type_hint=access_token").wantError(t, 400, "invalid_request", "FORM_INVALID")
		w.post(p, path, presented(root).Encode()+"&token=x").wantError(t, 400, "invalid_request", "FORM_INVALID")
		w.post(p, path+"?token=x", presented(root).Encode()).wantError(t, 400, "invalid_request", "FORM_INVALID")
		resp, err := p.Get(w.base + path)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusMethodNotAllowed {
			t.Errorf("GET %s: %s", path, resp.Status)
		}
		w.set(func(broker.Question) (broker.Decision, error) { return broker.Decision{}, broker.ErrNoPolicy })
		w.post(p, path, presented(root).Encode()).wantError(t, 503, "temporarily_unavailable", "NO_POLICY")
		w.lends()
	}
	w.set(func(broker.Question) (broker.Decision, error) {
		return broker.Decision{Allow: true, Scopes: []string{"read"}, TTL: time.Minute, Limits: broker.Limits{GiveBacksPerMinute: 1}}, nil
	})
	second := w.post(p, "/token", credentials().Encode()).text("access_token")
	w.post(p, "/revoke", presented(root).Encode())
	a := w.post(p, "/revoke", presented(second).Encode())
	a.wantError(t, 429, "temporarily_unavailable", "GIVE_BACK_RATE_LIMITED")
	if s := a.header.Get("Retry-After"); s == "1" {
		t.Errorf("Retry-After is %q at one a minute", s)
	}
	w.set(func(broker.Question) (broker.Decision, error) {
		return broker.Decision{Reason: "not_here", Message: "we don't"}, nil
	})
	w.post(p, "/revoke", presented(second).Encode()).wantError(t, 400, "unauthorized_client", "POLICY_DENIED")
}

// The set of revocations is at its maximum: 503, and when to ask again.
func TestRevocationFull(t *testing.T) {
	w := newWorldOf(t, 1)
	w.lends()
	p := w.client(payments)
	first := w.post(p, "/token", credentials().Encode()).text("access_token")
	second := w.post(p, "/token", credentials().Encode()).text("access_token")
	if a := w.post(p, "/revoke", presented(first).Encode()); a.status != http.StatusOK {
		t.Fatalf("got %d %v", a.status, a.body)
	}
	a := w.post(p, "/revoke", presented(second).Encode())
	a.wantError(t, 503, "temporarily_unavailable", "GIVE_BACK_FULL")
	if s := a.header.Get("Retry-After"); s != "60" {
		t.Errorf("Retry-After is %q", s)
	}
}

// The discovery documents name both, and how a client authenticates there.
func TestIntrospectionIsDiscovered(t *testing.T) {
	w := newWorld(t)
	stranger := w.client(spiffeid.ID{})
	for _, path := range []string{"/.well-known/openid-configuration", "/.well-known/oauth-authorization-server"} {
		r, err := http.NewRequest(http.MethodGet, w.base+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		doc := w.send(stranger, r)
		for name, at := range map[string]string{"introspection": "/introspect", "revocation": "/revoke"} {
			methods, _ := json.Marshal(doc.body[name+"_endpoint_auth_methods_supported"])
			if doc.text(name+"_endpoint") != issuer+at || string(methods) != `["spiffe_x509","spiffe_jwt"]` {
				t.Errorf("%s: %s at %q by %s", path, name, doc.text(name+"_endpoint"), methods)
			}
		}
	}
}

// Whatever a client presents, introspection says yes to what is good and nothing of the
// rest, and giving back ends what is the client's.
func FuzzIntrospectAndRevoke(f *testing.F) {
	w := newWorld(f)
	w.lends()
	shown := &tls.ConnectionState{PeerCertificates: w.svid(orders).Certificates}
	good := w.post(w.client(payments), "/token", credentials("audience", orders.String()).Encode()).text("access_token")
	f.Add(presented(good).Encode())
	f.Add(presented(good, "token_type_hint", "access_token", "client_id", orders.String()).Encode())
	f.Add(presented(w.assertion(orders, url.Values{}).Get("client_assertion")).Encode())
	f.Add(presented("eyJhbGciOiJub25lIn0.e30.").Encode())
	f.Add("token=eyJ0eXAiOiJBVCtKV1QiLCJhbGciOiJFUzI1NiJ9..&token_type_hint=%F0%9F%90%9F")
	f.Add("token=&token=x")
	f.Fuzz(func(t *testing.T, body string) {
		for _, path := range []string{"/introspect", "/revoke"} {
			r := httptest.NewRequest(http.MethodPost, path, strings.NewReader(body))
			r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
			r.TLS = shown
			resp := httptest.NewRecorder()
			w.handler.ServeHTTP(resp, r)
			got := strings.TrimSpace(resp.Body.String())
			values, _ := url.ParseQuery(body)
			switch {
			case resp.Code == http.StatusBadRequest || resp.Code == http.StatusUnauthorized:
				a := answer{status: resp.Code}
				if err := json.Unmarshal(resp.Body.Bytes(), &a.body); err != nil || a.text("error") == "" {
					t.Fatalf("%s of %q: %d %q", path, body, resp.Code, got)
				}
			case resp.Code != http.StatusOK:
				t.Fatalf("%s of %q: %d %q", path, body, resp.Code, got)
			case path == "/revoke":
				if got != "" {
					t.Fatalf("%s of %q says %q", path, body, got)
				}
			default: // the one that orders may ask about, and it isn't orders' to end
				if want := values.Get("token") == good; (got != inactive) != want {
					t.Fatalf("%s of %q says %q", path, body, got)
				}
			}
		}
	})
}
