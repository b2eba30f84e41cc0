package web_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"net"
	"net/http"
	"net/url"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/broker/attest"
	"github.com/dayflyhq/dayfly/broker/keys"
	"github.com/dayflyhq/dayfly/broker/storetest"
	"github.com/dayflyhq/dayfly/broker/web"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk/spiffetest"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

var (
	domain   = spiffeid.RequireTrustDomainFromString("example.org")
	brokerID = spiffeid.RequireFromString("spiffe://example.org/dayfly/broker")
	payments = spiffeid.RequireFromString("spiffe://example.org/payments")
	orders   = spiffeid.RequireFromString("spiffe://example.org/orders")
)

// world is a broker, served over HTTPS to whoever has an SVID of the trust domain.
type world struct {
	t       testing.TB
	td      *spiffetest.TrustDomain
	b       *broker.Broker
	handler http.Handler
	base    string

	mu     sync.Mutex
	decide func(broker.Question) (broker.Decision, error)
	audit  []broker.AuditEntry
	failed []attest.Failure
	now    time.Time // as the handler has it; the broker's stands still
}

func newWorld(t testing.TB) *world {
	t.Helper()
	return newWorldOf(t, 0)
}

// newWorldOf starts a broker with a lower maximum of revocations.
func newWorldOf(t testing.TB, maxRevocations int) *world {
	t.Helper()
	w := &world{t: t, td: spiffetest.ForTest(t, spiffetest.Config{TrustDomain: domain})}
	w.set(func(q broker.Question) (broker.Decision, error) {
		if q.Audience != "orders" && q.Audience != "ledger" && q.Audience != orders.String() {
			return broker.Decision{Reason: "audience_unknown", Message: "there is no " + q.Audience}, nil
		}
		scopes := q.Scopes
		if len(scopes) == 0 {
			scopes = []string{"read", "write"}
		}
		return broker.Decision{Allow: true, Scopes: scopes, TTL: 5 * time.Minute, Binding: q.Binding}, nil
	})
	w.start(maxRevocations)
	attestor, err := attest.New(attest.Config{X509: w.td, JWT: w.td, TrustDomains: []spiffeid.TrustDomain{domain}, Audience: issuer})
	if err != nil {
		t.Fatal(err)
	}
	w.handler = mustPublic(t, web.PublicConfig{Broker: w.b, Attestor: attestor, Keys: w.b.Keys, Unproven: func(f attest.Failure) {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.failed = append(w.failed, f)
	}, Now: func() time.Time {
		w.mu.Lock()
		defer w.mu.Unlock()
		return w.now
	}})
	cfg := tlsconfig.TLSServerConfig(w.td.Source(brokerID))
	attest.OptionalTLS(cfg)
	ln := listen(t, "tcp", "127.0.0.1:0")
	w.base = "https://" + ln.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- web.ServeTLS(ctx, ln, cfg, w.handler, nil) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return w
}

// start runs the broker, on a store in memory.
func (w *world) start(maxRevocations int) {
	t := w.t
	t.Helper()
	start := time.Now().UTC()
	w.now = start.Truncate(time.Second).Add(time.Second / 2)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	public, err := token.NewPublicKey(token.ES256, &key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	w.b, err = broker.New(broker.Config{
		MaxRevocations: maxRevocations,
		Issuer:         issuer, Policy: w, Store: storetest.Memory(t, storetest.Era(token.NextEra(0, start))),
		Signer: func() (broker.Signer, bool) { return broker.PrivateSigner(public, key), true },
		VerifyKey: func(k feed.Key, at time.Time) error {
			return keys.VerifyKey(issuer, k, w.td, spiffeid.MatchID(brokerID), at)
		},
		Audit: func(e broker.AuditEntry) error {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.audit = append(w.audit, e)
			return nil
		},
		Now:  func() time.Time { return start }, // a store in memory wants pure records
		Boot: func() feed.Instant { return feed.Instant(time.Since(start) + time.Hour) },
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	if err := w.b.Load(ctx); err != nil {
		t.Fatal(err)
	}
	running := make(chan error, 1)
	go func() { running <- w.b.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-running; err != nil {
			t.Error(err)
		}
	})
	if err := w.b.CheckKeys(ctx); err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	svid := w.svid(brokerID)
	signature, err := crypto.SignMessage(svid.PrivateKey, rand.Reader, feed.KeyStatement(issuer, public, der), crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.b.PublishKey(ctx, feed.Key{Public: public, DER: der, Signature: signature, Certificates: [][]byte{svid.Certificates[0].Raw}}); err != nil {
		t.Fatal(err)
	}
}

// The policy: w.decide decides, and an identity answers to the last segment of its path.

func (w *world) set(decide func(broker.Question) (broker.Decision, error)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.decide = decide
}

func (w *world) Decide(_ context.Context, q broker.Question) (broker.Decision, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.decide(q)
}

func (w *world) AnswersTo(id spiffeid.ID, audience string) bool { return id.Path() == "/"+audience }

func (w *world) Audience(name string) (broker.Audience, bool) {
	return broker.Audience{Name: name, VerifiedBy: "feed"}, true
}

func (w *world) External() []broker.Audience { return nil }

func (w *world) Fallback(spiffeid.ID, string) broker.Fallback { return broker.Fallback{} }

func (w *world) last() broker.AuditEntry {
	w.t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.audit) == 0 {
		w.t.Fatal("the audit is empty")
	}
	return w.audit[len(w.audit)-1]
}

func (w *world) svid(id spiffeid.ID) *x509svid.SVID {
	w.t.Helper()
	s, err := w.td.IssueSVID(id, spiffetest.SVIDOptions{})
	if err != nil {
		w.t.Fatal(err)
	}
	return s
}

// client connects as an identity; with the zero ID, as a stranger.
func (w *world) client(id spiffeid.ID) *http.Client {
	w.t.Helper()
	cfg := tlsconfig.TLSClientConfig(w.td, tlsconfig.AuthorizeID(brokerID))
	if !id.IsZero() {
		cfg = tlsconfig.MTLSClientConfig(w.svid(id), w.td, tlsconfig.AuthorizeID(brokerID))
	}
	return w.over(cfg)
}

func (w *world) over(cfg *tls.Config) *http.Client {
	transport := &http.Transport{TLSClientConfig: cfg, ForceAttemptHTTP2: true}
	w.t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: time.Minute}
}

// assertion adds a JWT-SVID to a form.
func (w *world) assertion(id spiffeid.ID, f url.Values) url.Values {
	w.t.Helper()
	jwt, err := w.td.IssueJWTSVID(id, []string{issuer}, spiffetest.SVIDOptions{})
	if err != nil {
		w.t.Fatal(err)
	}
	f.Set("client_assertion_type", "urn:ietf:params:oauth:client-assertion-type:jwt-spiffe")
	f.Set("client_assertion", jwt)
	return f
}

// answer is what an endpoint of OAuth said.
type answer struct {
	status int
	header http.Header
	body   map[string]any
}

func (a answer) text(name string) string { s, _ := a.body[name].(string); return s }

func (w *world) send(c *http.Client, r *http.Request) answer {
	w.t.Helper()
	resp, err := c.Do(r)
	if err != nil {
		w.t.Fatal(err)
	}
	defer resp.Body.Close()
	a := answer{resp.StatusCode, resp.Header, map[string]any{}}
	if resp.ContentLength != 0 {
		if err := json.NewDecoder(resp.Body).Decode(&a.body); err != nil {
			w.t.Fatalf("%s: %v", resp.Status, err)
		}
	}
	return a
}

func (w *world) post(c *http.Client, path, form string) answer {
	w.t.Helper()
	r, err := http.NewRequest(http.MethodPost, w.base+path, strings.NewReader(form))
	if err != nil {
		w.t.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	return w.send(c, r)
}

// credentials is a form for a token of one's own.
func credentials(more ...string) url.Values {
	f := url.Values{"grant_type": {"client_credentials"}, "audience": {"orders"}}
	for i := 0; i < len(more); i += 2 {
		f.Set(more[i], more[i+1])
	}
	return f
}

func exchange(subject string, more ...string) url.Values {
	f := url.Values{
		"grant_type": {"urn:ietf:params:oauth:grant-type:token-exchange"}, "audience": {"ledger"},
		"subject_token": {subject}, "subject_token_type": {"urn:ietf:params:oauth:token-type:access_token"},
	}
	for i := 0; i < len(more); i += 2 {
		f.Set(more[i], more[i+1])
	}
	return f
}

func (a answer) wantToken(t *testing.T, issuedType string) *token.Token {
	t.Helper()
	if a.status != http.StatusOK {
		t.Fatalf("got %d %v", a.status, a.body)
	}
	if cc := a.header.Get("Cache-Control"); cc != "no-store" || a.header.Get("Pragma") != "no-cache" || a.header.Get("Content-Type") != "application/json" {
		t.Errorf("headers: %v", a.header)
	}
	tok, err := token.Inspect(a.text("access_token"))
	if err != nil {
		t.Fatal(err)
	}
	if a.text("token_type") != "Bearer" || !leftOf(tok, a.body["expires_in"]) ||
		a.text("scope") != strings.Join(tok.Scopes, " ") || a.text("issued_token_type") != issuedType ||
		a.text("dayfly_grant") != tok.Grant().String() || a.text("dayfly_binding") != string(tok.Binding) {
		delete(a.body, "access_token")
		t.Errorf("the answer is %v, of token %+v", a.body, tok.Claims)
	}
	return tok
}

// wantError checks an answer of RFC 6749 section 5.2, with what we add to it.
func (a answer) wantError(t *testing.T, status int, code, reason string) {
	t.Helper()
	if a.status != status || a.text("error") != code || a.text("reason") != reason {
		t.Fatalf("got %d %v, want %d %s %s", a.status, a.body, status, code, reason)
	}
	if a.text("error_description") == "" || reason != "INTERNAL" && a.text("hint") == "" {
		t.Errorf("without words: %v", a.body)
	}
	if a.header.Get("Cache-Control") != "no-store" || a.header.Get("Content-Type") != "application/json" {
		t.Errorf("headers: %v", a.header)
	}
	if challenged := a.header.Get("WWW-Authenticate") != ""; challenged != (status == http.StatusUnauthorized) {
		t.Errorf("%d with WWW-Authenticate %q", status, a.header.Get("WWW-Authenticate"))
	}
	if later := a.header.Get("Retry-After") != ""; later != (status == http.StatusServiceUnavailable || status == http.StatusTooManyRequests) {
		t.Errorf("%d with Retry-After %q", status, a.header.Get("Retry-After"))
	}
}

const (
	accessToken = "urn:ietf:params:oauth:token-type:access_token"
	jwtType     = "urn:ietf:params:oauth:token-type:jwt"
)

func TestTokenWithCertificate(t *testing.T) {
	w := newWorld(t)
	c := w.client(payments)
	tok := w.post(c, "/token", credentials().Encode()).wantToken(t, "")
	if tok.Root() != payments || tok.Audience != "orders" || tok.Self().SVID.IsZero() || len(tok.Scopes) != 2 || tok.Issuer != issuer {
		t.Errorf("got %+v", tok.Claims)
	}
	if e := w.last(); e.Action != broker.ActionIssue || e.Outcome != "allowed" || e.Attestation != "" || e.Peer != "127.0.0.1" || e.Grant != tok.Grant().String() {
		t.Errorf("audited as %+v", e)
	}
	// What a client may ask for.
	tok = w.post(c, "/token", credentials("client_id", payments.String(), "scope", "write", "dayfly_ttl", "60", "dayfly_binding", "x5t", "unknown", "ignored").Encode()).wantToken(t, "")
	if len(tok.Scopes) != 1 || tok.Scopes[0] != "write" || tok.Expires.Sub(tok.IssuedAt) != time.Minute || tok.Binding != token.BindingX5T {
		t.Errorf("got %+v", tok.Claims)
	}
	if leaf := c.Transport.(*http.Transport).TLSClientConfig; tok.Certificate == [32]byte{} || leaf == nil {
		t.Error("no cnf in a token that is bound to a certificate")
	}
	// A resource of RFC 8707 is an audience that is a URI.
	f := credentials("resource", orders.String())
	f.Del("audience")
	if tok := w.post(c, "/token", f.Encode()).wantToken(t, ""); tok.Audience != orders.String() {
		t.Errorf("for a resource, aud is %q", tok.Audience)
	}
}

// A client that never heard the answer asks again with the same key, and has one token and
// not two; what is left of its life is said as of then.
func TestTokenRepeated(t *testing.T) {
	w := newWorld(t)
	c := w.client(payments)
	first := w.post(c, "/token", credentials("dayfly_idempotency_key", "k").Encode())
	first.wantToken(t, "")
	w.mu.Lock()
	w.now = w.now.Add(40 * time.Second)
	w.mu.Unlock()
	again := w.post(c, "/token", credentials("dayfly_idempotency_key", "k").Encode())
	if again.text("access_token") != first.text("access_token") {
		t.Error("another token")
	}
	if first.body["expires_in"] != 299. || again.body["expires_in"] != 259. {
		t.Errorf("expires in %v, then in %v", first.body["expires_in"], again.body["expires_in"])
	}
	w.post(c, "/token", credentials("dayfly_idempotency_key", "k", "scope", "read").Encode()).wantError(t, 400, "invalid_request", "IDEMPOTENCY_KEY_REUSED")
	w.post(c, "/token", credentials("dayfly_idempotency_key", strings.Repeat("k", 65)).Encode()).wantError(t, 400, "invalid_request", "INVALID_REQUEST")
	if other := w.post(c, "/token", credentials("dayfly_idempotency_key", "j").Encode()); other.text("access_token") == first.text("access_token") {
		t.Error("the same token for another key")
	}
}

func TestTokenWithAssertion(t *testing.T) {
	w := newWorld(t)
	stranger := w.client(spiffeid.ID{})
	tok := w.post(stranger, "/token", w.assertion(payments, credentials("client_id", payments.String())).Encode()).wantToken(t, "")
	if tok.Root() != payments || !tok.Self().SVID.IsZero() {
		t.Errorf("got %+v", tok.Claims)
	}
	if e := w.last(); e.Attestation != "jwt" {
		t.Errorf("audited as %+v", e)
	}
	w.post(stranger, "/token", w.assertion(payments, credentials("dayfly_binding", "x5t")).Encode()).
		wantError(t, 400, "invalid_request", "BINDING_NEEDS_CERTIFICATE")
}

func TestTokenExchange(t *testing.T) {
	w := newWorld(t)
	root := w.post(w.client(payments), "/token", credentials().Encode())
	subject := root.text("access_token")
	c := w.client(orders)
	tok := w.post(c, "/token", exchange(subject).Encode()).wantToken(t, accessToken)
	if tok.Root() != payments || tok.Presenter() != orders || tok.Audience != "ledger" || len(tok.Lineage) != 2 {
		t.Errorf("got %+v", tok.Claims)
	}
	w.post(c, "/token", exchange(subject, "requested_token_type", accessToken).Encode()).wantToken(t, accessToken)
	w.post(c, "/token", exchange(subject, "requested_token_type", jwtType, "subject_token_type", jwtType).Encode()).wantToken(t, jwtType)
	w.post(w.client(spiffeid.ID{}), "/token", w.assertion(orders, exchange(subject)).Encode()).wantToken(t, accessToken)

	for name, tt := range map[string]struct {
		form                 url.Values
		code, reason, inText string
	}{
		"no subject token":        {exchange("", "scope", "read"), "invalid_request", "FORM_INVALID", "subject_token"},
		"no type of it":           {exchange(subject, "subject_token_type", ""), "invalid_request", "FORM_INVALID", "subject_token_type"},
		"of another type":         {exchange(subject, "subject_token_type", "urn:ietf:params:oauth:token-type:id_token"), "invalid_request", "FORM_INVALID", "subject_token_type"},
		"another type wanted":     {exchange(subject, "requested_token_type", "urn:ietf:params:oauth:token-type:refresh_token"), "invalid_request", "FORM_INVALID", "requested_token_type"},
		"an actor token":          {exchange(subject, "actor_token", subject, "actor_token_type", accessToken), "invalid_request", "FORM_INVALID", "actor"},
		"a type without an actor": {exchange(subject, "actor_token_type", accessToken), "invalid_request", "FORM_INVALID", "actor"},
		"no token of ours":        {exchange("a.b.c"), "invalid_request", "SUBJECT_TOKEN_MALFORMED", ""},
		"more scopes":             {exchange(subject, "scope", "read admin"), "invalid_scope", "SCOPE_EXCEEDS_SUBJECT", "admin"},
		"a longer life":           {exchange(subject, "dayfly_ttl", "3000"), "invalid_request", "TTL_EXCEEDS_SUBJECT", ""},
		"an unknown target":       {exchange(subject, "audience", "nowhere"), "invalid_target", "TARGET_REFUSED", ""},
	} {
		a := w.post(c, "/token", tt.form.Encode())
		a.wantError(t, 400, tt.code, tt.reason)
		if !strings.Contains(a.text("error_description"), tt.inText) {
			t.Errorf("%s: %v", name, a.body)
		}
	}
	// Addressed to somebody else.
	w.post(w.client(payments), "/token", exchange(subject).Encode()).wantError(t, 400, "invalid_request", "SUBJECT_TOKEN_NOT_ADDRESSED")
}

func TestTokenForms(t *testing.T) {
	w := newWorld(t)
	c := w.client(payments)
	good := credentials().Encode()
	for name, tt := range map[string]struct{ form, code, reason string }{
		"nothing":             {"", "invalid_request", "FORM_INVALID"},
		"no grant type":       {"audience=orders", "invalid_request", "FORM_INVALID"},
		"an empty one":        {"grant_type=&audience=orders", "invalid_request", "FORM_INVALID"},
		"a password":          {"grant_type=password&audience=orders", "unsupported_grant_type", "GRANT_TYPE_UNSUPPORTED"},
		"a refresh token":     {"grant_type=refresh_token&refresh_token=x", "unsupported_grant_type", "GRANT_TYPE_UNSUPPORTED"},
		"twice the same":      {good + "&grant_type=client_credentials", "invalid_request", "FORM_INVALID"},
		"an unknown one, too": {good + "&x=1&x=2", "invalid_request", "FORM_INVALID"},
		"bad escapes":         {good + "&x=%zz", "invalid_request", "FORM_INVALID"},
		"a semicolon":         {good + ";x=1", "invalid_request", "FORM_INVALID"},
		"no UTF-8":            {good + "&x=%ff", "invalid_request", "FORM_INVALID"},
		"too large":           {good + "&x=" + strings.Repeat("x", 64<<10), "invalid_request", "FORM_INVALID"},
		"no target":           {"grant_type=client_credentials", "invalid_target", "TARGET_INVALID"},
		"two audiences":       {good + "&audience=ledger", "invalid_target", "TARGET_INVALID"},
		"the same twice":      {good + "&audience=orders", "invalid_target", "TARGET_INVALID"},
		"one of each":         {good + "&resource=spiffe://example.org/orders", "invalid_target", "TARGET_INVALID"},
		"a relative resource": {"grant_type=client_credentials&resource=orders", "invalid_target", "TARGET_INVALID"},
		"with a fragment":     {"grant_type=client_credentials&resource=https://a.example/%23x", "invalid_target", "TARGET_INVALID"},
		"a bad audience":      {"grant_type=client_credentials&audience=a%20b", "invalid_target", "INVALID_REQUEST"},
		"a bad scope":         {good + "&scope=%22", "invalid_scope", "FORM_INVALID"},
		"two spaces":          {good + "&scope=read%20%20write", "invalid_scope", "FORM_INVALID"},
		"too many scopes":     {good + "&scope=" + strings.Repeat("a+", 40) + "b0+b1+b2+b3+b4+b5+b6+b7+b8+b9+c0+c1+c2+c3+c4+c5+c6+c7+c8+c9+d0+d1+d2+d3+d4+d5+d6+d7+d8+d9+e0+e1+e2+e3", "invalid_scope", "INVALID_REQUEST"},
		"a bad binding":       {good + "&dayfly_binding=dpop", "invalid_request", "FORM_INVALID"},
		"a bad ttl":           {good + "&dayfly_ttl=5m", "invalid_request", "FORM_INVALID"},
		"no ttl at all":       {good + "&dayfly_ttl=0", "invalid_request", "FORM_INVALID"},
		"a negative ttl":      {good + "&dayfly_ttl=-1", "invalid_request", "FORM_INVALID"},
		"beyond the cap":      {good + "&dayfly_ttl=3601", "invalid_request", "INVALID_REQUEST"},
	} {
		t.Run(name, func(t *testing.T) {
			w.post(c, "/token", tt.form).wantError(t, 400, tt.code, tt.reason)
		})
	}
	for name, change := range map[string]func(*http.Request){
		"JSON":              func(r *http.Request) { r.Header.Set("Content-Type", "application/json") },
		"no type":           func(r *http.Request) { r.Header.Del("Content-Type") },
		"multipart":         func(r *http.Request) { r.Header.Set("Content-Type", "multipart/form-data; boundary=x") },
		"query and body":    func(r *http.Request) { r.URL.RawQuery = "audience=orders" },
		"a query of a sort": func(r *http.Request) { r.URL.RawQuery = "x" },
	} {
		r, err := http.NewRequest(http.MethodPost, w.base+"/token", strings.NewReader(good))
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded; charset=UTF-8")
		change(r)
		if a := w.send(c, r); a.status != 400 || a.text("error") != "invalid_request" {
			t.Errorf("%s: %d %v", name, a.status, a.body)
		}
	}
	for _, method := range []string{http.MethodGet, http.MethodPut, http.MethodDelete} {
		r, err := http.NewRequest(method, w.base+"/token", nil)
		if err != nil {
			t.Fatal(err)
		}
		if a := w.send(c, r); a.status != http.StatusMethodNotAllowed || a.header.Get("Allow") != "POST" {
			t.Errorf("%s: %d, Allow %q", method, a.status, a.header.Get("Allow"))
		}
	}
}

func TestClientAuthentication(t *testing.T) {
	w := newWorld(t)
	stranger, certified := w.client(spiffeid.ID{}), w.client(payments)
	elsewhere := spiffetest.ForTest(t, spiffetest.Config{TrustDomain: domain}) // our name, another authority
	forged, err := elsewhere.IssueSVID(payments, spiffetest.SVIDOptions{})
	if err != nil {
		t.Fatal(err)
	}
	imposter := w.over(tlsconfig.MTLSClientConfig(forged, w.td, tlsconfig.AuthorizeID(brokerID)))
	wrongAudience, err := w.td.IssueJWTSVID(payments, []string{issuer + "/token"}, spiffetest.SVIDOptions{})
	if err != nil {
		t.Fatal(err)
	}
	assertion := w.assertion(payments, url.Values{}).Get("client_assertion")
	const bearer = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
	for name, tt := range map[string]struct {
		client       *http.Client
		form         url.Values
		status       int
		code, reason string
	}{
		"none":                        {stranger, credentials(), 401, "invalid_client", "CLIENT_UNAUTHENTICATED"},
		"a client_id alone":           {stranger, credentials("client_id", payments.String()), 401, "invalid_client", "CLIENT_UNAUTHENTICATED"},
		"a secret":                    {certified, credentials("client_secret", "x"), 401, "invalid_client", "CLIENT_UNAUTHENTICATED"},
		"a forged certificate":        {imposter, credentials(), 401, "invalid_client", "SVID_INVALID"},
		"another client_id":           {certified, credentials("client_id", orders.String()), 401, "invalid_client", "CLIENT_UNAUTHENTICATED"},
		"another, with an assertion":  {stranger, w.assertion(payments, credentials("client_id", orders.String())), 401, "invalid_client", "CLIENT_UNAUTHENTICATED"},
		"an assertion without a type": {stranger, credentials("client_assertion", assertion), 400, "invalid_request", "FORM_INVALID"},
		"a type without an assertion": {stranger, credentials("client_assertion_type", bearer), 400, "invalid_request", "FORM_INVALID"},
		"another type":                {stranger, credentials("client_assertion", assertion, "client_assertion_type", bearer), 401, "invalid_client", "CLIENT_UNAUTHENTICATED"},
		"both ways at once":           {certified, w.assertion(payments, credentials()), 400, "invalid_request", "FORM_INVALID"},
		"for the token endpoint": {stranger, credentials("client_assertion", wrongAudience,
			"client_assertion_type", "urn:ietf:params:oauth:client-assertion-type:jwt-spiffe"), 401, "invalid_client", "JWT_SVID_INVALID"},
	} {
		t.Run(name, func(t *testing.T) {
			w.failed = nil
			w.post(tt.client, "/token", tt.form.Encode()).wantError(t, tt.status, tt.code, tt.reason)
			if len(w.failed) != 1 || w.failed[0].Reason != tt.reason || !w.failed[0].Peer.IsValid() || strings.Contains(w.failed[0].Message, assertion) {
				t.Errorf("told %+v", w.failed)
			}
		})
	}
	// A library that tries its luck with a header is told the scheme, and asks again.
	r, err := http.NewRequest(http.MethodPost, w.base+"/token", strings.NewReader(credentials().Encode()))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	r.SetBasicAuth(payments.String(), "")
	a := w.send(certified, r)
	a.wantError(t, 401, "invalid_client", "CLIENT_UNAUTHENTICATED")
	if got := a.header.Get("WWW-Authenticate"); got != `Basic realm="`+issuer+`"` {
		t.Errorf("WWW-Authenticate is %q", got)
	}
	// Not only in the first: another reader would take the second.
	r, err = http.NewRequest(http.MethodPost, w.base+"/token", strings.NewReader(credentials("audience", "orders").Encode()))
	if err != nil {
		t.Fatal(err)
	}
	r.Header = http.Header{"Content-Type": {"application/x-www-form-urlencoded"}, "Authorization": {"", "Bearer x"}}
	a = w.send(certified, r)
	a.wantError(t, 401, "invalid_client", "CLIENT_UNAUTHENTICATED")
	if got := a.header.Get("WWW-Authenticate"); got != `Bearer realm="`+issuer+`"` {
		t.Errorf("WWW-Authenticate is %q", got)
	}
	if got := w.post(stranger, "/token", "x=%zz").header.Get("WWW-Authenticate"); got != "" { // a bad form, whoever sent it
		t.Errorf("WWW-Authenticate of a bad form is %q", got)
	}
}

// Each request is judged anew: an authority that is gone ends what its connections can do.
func TestAuthorityRemovedFromConnection(t *testing.T) {
	w := newWorld(t)
	c := w.client(payments)
	w.post(c, "/token", credentials().Encode()).wantToken(t, "")
	for range 2 { // the first leaves the old authority in the bundle
		if err := w.td.RotateCA(); err != nil {
			t.Fatal(err)
		}
	}
	w.post(c, "/token", credentials().Encode()).wantError(t, 401, "invalid_client", "SVID_INVALID")
}

// What doesn't exist and what isn't allowed are one answer, byte for byte.
func TestUnknownAndForbiddenTarget(t *testing.T) {
	w := newWorld(t)
	c := w.client(payments)
	var answers []string
	for _, reason := range []string{"audience_unknown", "no_entitlement", "exchange_not_allowed", "a rule of your own", ""} {
		w.set(func(q broker.Question) (broker.Decision, error) {
			return broker.Decision{Reason: reason, Message: "because of " + reason, Hint: "ask " + reason, Metadata: map[string]string{"x": reason}}, nil
		})
		a := w.post(c, "/token", credentials("audience", reason+"x").Encode())
		a.wantError(t, 400, "invalid_target", map[bool]string{true: "INVALID_REQUEST", false: "TARGET_REFUSED"}[strings.Contains(reason, " ")])
		if !strings.Contains(reason, " ") {
			b, _ := json.Marshal(a.body)
			answers = append(answers, string(b))
		}
	}
	for _, a := range answers {
		if a != answers[0] {
			t.Errorf("%s differs from %s", a, answers[0])
		}
	}
	// Policy's words go out on what is asked for at a target that there is.
	for reason, code := range map[string]string{
		"scope_not_entitled": "invalid_scope", "no_scope_left": "invalid_scope", "ttl_not_entitled": "invalid_request", "binding_not_allowed": "invalid_request",
	} {
		w.set(func(broker.Question) (broker.Decision, error) {
			return broker.Decision{Reason: reason, Message: `said "so"`, Hint: "ask for less"}, nil
		})
		a := w.post(c, "/token", credentials().Encode())
		a.wantError(t, 400, code, "POLICY_DENIED")
		if a.text("error_description") != "said 'so'" || a.text("hint") != "ask for less" || a.body["details"].(map[string]any)["policy_reason"] != reason {
			t.Errorf("%s: %v", reason, a.body)
		}
	}
}

// Every kind of refusal has its error, and what is none is not shown.
func TestOAuthErrors(t *testing.T) {
	w := newWorld(t)
	c := w.client(payments)
	lock, err := w.b.Revoke(t.Context(), broker.Caller{Local: "break-glass:uid=0"}, broker.Revoke{Selectors: []revocation.Selector{revocation.Identity(orders)}, Reason: "r"})
	if err != nil {
		t.Fatal(err)
	}
	a := w.post(w.client(orders), "/token", credentials().Encode())
	a.wantError(t, 400, "unauthorized_client", "IDENTITY_LOCKED")
	if a.body["details"].(map[string]any)["lock"] == "" || lock.Seq == 0 {
		t.Errorf("got %v", a.body)
	}
	w.set(func(broker.Question) (broker.Decision, error) {
		return broker.Decision{Allow: true, TTL: time.Minute, Limits: broker.Limits{LiveGrants: 1}}, nil
	})
	w.post(c, "/token", credentials().Encode()).wantToken(t, "")
	a = w.post(c, "/token", credentials().Encode())
	a.wantError(t, 429, "temporarily_unavailable", "LIVE_GRANTS_LIMITED")
	if s := a.header.Get("Retry-After"); s == "1" {
		t.Errorf("Retry-After is %q for a grant of a minute", s)
	}
	w.set(func(broker.Question) (broker.Decision, error) { return broker.Decision{}, broker.ErrNoPolicy })
	w.post(c, "/token", credentials().Encode()).wantError(t, 503, "temporarily_unavailable", "NO_POLICY")
	w.set(func(broker.Question) (broker.Decision, error) { panic("a secret") })
	a = w.post(c, "/token", credentials().Encode())
	a.wantError(t, 500, "server_error", "INTERNAL")
	if strings.Contains(a.text("error_description"), "secret") {
		t.Errorf("got %v", a.body)
	}
}

// Strangers get the documents and nothing else.
func TestStrangersReadDocumentsOnly(t *testing.T) {
	w := newWorld(t)
	stranger := w.client(spiffeid.ID{})
	for path, status := range map[string]int{
		"/.well-known/openid-configuration": 200, "/.well-known/oauth-authorization-server": 200, "/jwks.json": 200, "/token": 405, "/healthz": 404, "/metrics": 404,
	} {
		resp, err := stranger.Get(w.base + path)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != status {
			t.Errorf("%s: %s", path, resp.Status)
		}
		if resp.ProtoMajor != 2 {
			t.Errorf("%s is served over %s", path, resp.Proto)
		}
	}
}

// The address in the records is that of the connection.
func TestPeerOfUnixSocket(t *testing.T) {
	w := newWorld(t)
	dir := t.TempDir()
	ln := listen(t, "unix", dir+"/s")
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- web.Serve(ctx, ln, w.handler, nil) }()
	defer func() { cancel(); <-done }()
	c := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", dir+"/s")
	}}}
	resp, err := c.PostForm("http://localhost/token", w.assertion(payments, credentials()))
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if e := w.last(); resp.StatusCode != 200 || e.Peer != "" || e.Attestation != "jwt" {
		t.Errorf("%s, audited as %+v", resp.Status, e)
	}
	c.CloseIdleConnections()
}

// Both documents say where the endpoints are and how to authenticate there, and nothing
// of an endpoint that isn't served.
func TestDiscoveryOfOAuth(t *testing.T) {
	w := newWorld(t)
	attestor, err := attest.New(attest.Config{X509: w.td, JWT: w.td, TrustDomains: []spiffeid.TrustDomain{domain}, Audience: issuer})
	if err != nil {
		t.Fatal(err)
	}
	methods := []any{"spiffe_x509", "spiffe_jwt"}
	for _, mutual := range []string{"", "https://mtls.example.org/d"} {
		const base = "https://b.example.org/path"
		h := mustPublic(t, web.PublicConfig{Issuer: base, Broker: w.b, Attestor: attestor, MutualTLS: mutual})
		for _, path := range []string{"/path/.well-known/openid-configuration", "/.well-known/oauth-authorization-server/path"} {
			m := decode(t, do(h, http.MethodGet, path))
			if m["token_endpoint"] != base+"/token" || !reflect.DeepEqual(m["token_endpoint_auth_methods_supported"], methods) || m["tls_client_certificate_bound_access_tokens"] != true ||
				!reflect.DeepEqual(m["grant_types_supported"], []any{"client_credentials", "urn:ietf:params:oauth:grant-type:token-exchange"}) {
				t.Errorf("%s: %v", path, m)
			}
			aliases, _ := m["mtls_endpoint_aliases"].(map[string]any)
			if (mutual == "") != (aliases == nil) || mutual != "" && aliases["token_endpoint"] != mutual+"/token" {
				t.Errorf("%s: aliases %v with the base URL %q", path, aliases, mutual)
			}
		}
		if r := do(h, http.MethodPost, "/path/token"); r.StatusCode != http.StatusBadRequest {
			t.Errorf("the endpoint that is named answers %s", r.Status)
		}
	}
	if m := decode(t, do(mustPublic(t, web.PublicConfig{}), http.MethodGet, "/.well-known/openid-configuration")); m["token_endpoint"] != nil {
		t.Errorf("without a broker: %v", m)
	}
	if _, err := web.Public(web.PublicConfig{Issuer: issuer, Keys: w.b.Keys, Broker: w.b}); err == nil {
		t.Error("a broker without an attestor is served")
	}
	if _, err := web.Public(web.PublicConfig{Issuer: issuer, Keys: w.b.Keys, Broker: w.b, Attestor: attestor, MutualTLS: "broker:1"}); err == nil {
		t.Error("a base URL that is none is taken")
	}
}

// leftOf reports whether a number of seconds is not more than what a token had left when
// this was asked, up to what passed since.
func leftOf(tok *token.Token, seconds any) bool {
	left, ok := seconds.(float64)
	return ok && left > 0 && left < tok.Expires.Sub(tok.IssuedAt).Seconds()
}
