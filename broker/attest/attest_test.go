package attest_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"maps"
	"math/big"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/broker/attest"
	"github.com/dayflyhq/dayfly/sdk/spiffetest"
	"github.com/golang-jwt/jwt/v5"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const issuer = "https://dayfly.example.org"

var (
	domain   = spiffeid.RequireTrustDomainFromString("example.org")
	payments = spiffeid.RequireFromString("spiffe://example.org/payments")
)

// world is an attestor, and the authorities that it believes.
type world struct {
	*attest.Attestor
	key    *ecdsa.PrivateKey // of the JWT authority "one"
	bundle *jwtbundle.Bundle // of domain

	mu  sync.Mutex
	now time.Time
}

func newWorld(t testing.TB) *world {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	authorities := map[string]crypto.PublicKey{"one": key.Public()}
	w := &world{key: key, bundle: jwtbundle.FromJWTAuthorities(domain, authorities), now: time.Now()}
	// A trust domain that is known and not served, with the same key.
	elsewhere := spiffeid.RequireTrustDomainFromString("elsewhere.example")
	w.Attestor, err = attest.New(attest.Config{
		X509:         x509bundle.NewSet(),
		JWT:          jwtbundle.NewSet(w.bundle, jwtbundle.FromJWTAuthorities(elsewhere, authorities)),
		TrustDomains: []spiffeid.TrustDomain{domain}, Audience: issuer, Now: w.Now,
	})
	if err != nil {
		t.Fatal(err)
	}
	return w
}

func (w *world) Now() time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.now
}

func (w *world) advance(d time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.now = w.now.Add(d)
}

// claims are those of a good JWT-SVID.
func (w *world) claims() jwt.MapClaims {
	now := w.Now()
	return jwt.MapClaims{"sub": payments.String(), "aud": []string{issuer}, "iat": now.Unix(), "exp": now.Add(4 * time.Minute).Unix()}
}

func (w *world) sign(t testing.TB, header map[string]any, claims jwt.MapClaims) string {
	t.Helper()
	tok := jwt.NewWithClaims(jwt.SigningMethodES256, claims)
	tok.Header["kid"] = "one"
	maps.Copy(tok.Header, header)
	for k, v := range header {
		if v == nil {
			delete(tok.Header, k)
		}
	}
	s, err := tok.SignedString(w.key)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestJWTSVID(t *testing.T) {
	w := newWorld(t)
	claims := w.claims()
	for name, header := range map[string]map[string]any{"JWT": nil, "JOSE": {"typ": "JOSE"}, "no typ": {"typ": nil}} {
		c, err := w.JWT(w.sign(t, header, claims))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if c.ID != payments || c.Leaf != nil || c.JWT.IssuedAt.Unix() != claims["iat"] || c.JWT.Expires.Unix() != claims["exp"] {
			t.Errorf("%s: %+v, %+v", name, c, c.JWT)
		}
	}
	alone := w.claims()
	alone["aud"] = issuer // RFC 7519 lets one audience stand alone
	if _, err := w.JWT(w.sign(t, nil, alone)); err != nil {
		t.Error(err)
	}
	// It isn't one-time: a Workload API shares it.
	again := w.sign(t, nil, claims)
	for range 3 {
		if _, err := w.JWT(again); err != nil {
			t.Error(err)
		}
	}
}

func TestBadJWTSVIDs(t *testing.T) {
	w := newWorld(t)
	now := w.Now()
	with := func(k string, v any) jwt.MapClaims {
		c := w.claims()
		if c[k] = v; v == nil {
			delete(c, k)
		}
		return c
	}
	other, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	forged := jwt.NewWithClaims(jwt.SigningMethodES256, w.claims())
	forged.Header["kid"] = "one"
	stolen, err := forged.SignedString(other)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(w.key.Public())
	if err != nil {
		t.Fatal(err)
	}
	mac := jwt.NewWithClaims(jwt.SigningMethodHS256, w.claims())
	mac.Header["kid"] = "one"
	symmetric, err := mac.SignedString(der)
	if err != nil {
		t.Fatal(err)
	}
	unsigned := jwt.NewWithClaims(jwt.SigningMethodNone, w.claims())
	unsigned.Header["kid"] = "one"
	none, err := unsigned.SignedString(jwt.UnsafeAllowNoneSignatureType)
	if err != nil {
		t.Fatal(err)
	}
	for name, assertion := range map[string]string{
		"nothing":                     "",
		"no JWT":                      "a.b.c",
		"two for the price of one":    w.sign(t, nil, w.claims()) + "." + w.sign(t, nil, w.claims()),
		"too large":                   w.sign(t, nil, with("pad", strings.Repeat("x", 8<<10))),
		"another audience":            w.sign(t, nil, with("aud", []string{"https://other.example.org"})),
		"the token endpoint":          w.sign(t, nil, with("aud", []string{issuer + "/token"})),
		"the issuer among others":     w.sign(t, nil, with("aud", []string{issuer, "https://other.example.org"})),
		"the issuer twice":            w.sign(t, nil, with("aud", []string{issuer, issuer})),
		"a slash after the issuer":    w.sign(t, nil, with("aud", []string{issuer + "/"})),
		"no audience":                 w.sign(t, nil, with("aud", nil)),
		"no sub":                      w.sign(t, nil, with("sub", nil)),
		"a sub that is no SPIFFE ID":  w.sign(t, nil, with("sub", "payments")),
		"a sub that is a domain":      w.sign(t, nil, with("sub", "spiffe://example.org")),
		"a domain that isn't served":  w.sign(t, nil, with("sub", "spiffe://elsewhere.example/payments")),
		"a domain that isn't known":   w.sign(t, nil, with("sub", "spiffe://stranger.example/payments")),
		"no exp":                      w.sign(t, nil, with("exp", nil)),
		"expired":                     w.sign(t, nil, with("exp", now.Add(-time.Second).Unix())),
		"long expired":                w.sign(t, nil, with("exp", now.Add(-time.Hour).Unix())),
		"no iat":                      w.sign(t, nil, with("iat", nil)),
		"an iat after exp":            w.sign(t, nil, with("iat", now.Add(5*time.Minute).Unix())),
		"an iat before time":          w.sign(t, nil, with("iat", -1)),
		"an iat that is no number":    w.sign(t, nil, with("iat", "now")),
		"from the future":             w.sign(t, nil, with("iat", now.Add(broker.ClockSkew+2*time.Second).Unix())),
		"more than five minutes long": w.sign(t, nil, with("exp", now.Add(5*time.Minute+time.Second).Unix())),
		"not valid yet":               w.sign(t, nil, with("nbf", now.Add(2*time.Minute).Unix())),
		"an access token":             w.sign(t, map[string]any{"typ": "at+jwt"}, w.claims()),
		"no kid":                      w.sign(t, map[string]any{"kid": nil}, w.claims()),
		"an unknown kid":              w.sign(t, map[string]any{"kid": "two"}, w.claims()),
		"a critical header":           w.sign(t, map[string]any{"crit": []string{"x"}, "x": 1}, w.claims()),
		"signed by somebody else":     stolen,
		"HS256 with the public key":   symmetric,
		"alg none":                    none,
		"another payload":             swapPayload(w.sign(t, nil, w.claims()), `{"sub":"spiffe://example.org/admin"}`),
	} {
		c, err := w.JWT(assertion)
		var r *broker.Refusal
		if !errors.As(err, &r) || r.Reason != attest.ErrJWTSVID.Reason || r.Kind != broker.Unauthenticated {
			t.Errorf("%s: got %+v, %v", name, c, err)
			continue
		}
		if len(assertion) > 40 && strings.Contains(r.Message, assertion[:40]) {
			t.Errorf("%s: the message quotes the assertion", name)
		}
	}
}

func swapPayload(assertion, payload string) string {
	parts := strings.Split(assertion, ".")
	parts[1] = base64.RawURLEncoding.EncodeToString([]byte(payload))
	return strings.Join(parts, ".")
}

// Expiry is judged in every call, and by our clock.
func TestJWTSVIDExpires(t *testing.T) {
	w := newWorld(t)
	assertion := w.sign(t, nil, w.claims())
	if _, err := w.JWT(assertion); err != nil {
		t.Fatal(err)
	}
	w.advance(4*time.Minute + time.Second)
	if _, err := w.JWT(assertion); !errors.Is(err, attest.ErrJWTSVID) {
		t.Errorf("after its exp: %v", err)
	}
}

// TestJWTSVIDSignatureOnce: what is remembered of a JWT-SVID is that its signature holds,
// for its very bytes and as long as the bundle is the same.
func TestJWTSVIDSignatureOnce(t *testing.T) {
	w := newWorld(t)
	assertion := w.sign(t, nil, w.claims())
	shop := w.claims()
	shop["sub"] = "spiffe://example.org/shop"
	other := w.sign(t, nil, shop)
	good := func(why string) {
		t.Helper()
		for range 2 {
			if c, err := w.JWT(assertion); err != nil || c.ID != payments {
				t.Errorf("%s: %v, %v", why, c.ID, err)
			}
		}
		if c, err := w.JWT(other); err != nil || c.ID.Path() != "/shop" {
			t.Errorf("another one, %s: %v, %v", why, c.ID, err)
		}
	}
	refused := func(why, assertion string) {
		t.Helper()
		for range 2 {
			if c, err := w.JWT(assertion); !errors.Is(err, attest.ErrJWTSVID) {
				t.Errorf("%s: %v, %v", why, c.ID, err)
			}
		}
	}
	good("for the first time")
	input, signature := assertion[:strings.LastIndexByte(assertion, '.')], other[strings.LastIndexByte(other, '.'):]
	refused("another one's signature", input+signature)
	refused("no signature", input+".")

	stranger, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for why, key := range map[string]crypto.PublicKey{"the authority has gone": nil, "it has another key": stranger.Public()} {
		w.bundle.RemoveJWTAuthority("one")
		if key != nil {
			if err := w.bundle.AddJWTAuthority("one", key); err != nil {
				t.Fatal(err)
			}
		}
		refused(why, assertion)
		if err := w.bundle.AddJWTAuthority("one", w.key.Public()); err != nil {
			t.Fatal(err)
		}
		good("with the authority back")
	}
	if err := w.bundle.AddJWTAuthority("two", stranger.Public()); err != nil {
		t.Fatal(err)
	}
	good("with a second authority")
	w.advance(4*time.Minute + time.Second)
	refused("expired", assertion)
}

// TestJWTSVIDForgotten: what has expired is forgotten when others come, and what is refused
// for its times is never remembered.
func TestJWTSVIDForgotten(t *testing.T) {
	w := newWorld(t)
	forAYear := w.claims()
	forAYear["exp"] = w.Now().AddDate(1, 0, 0).Unix()
	if _, err := w.JWT(w.sign(t, nil, forAYear)); !errors.Is(err, attest.ErrJWTSVID) {
		t.Fatal(err)
	}
	if n := w.Remembered(); n != 0 {
		t.Errorf("%d that were refused are remembered", n)
	}
	for range 20 {
		claims := w.claims()
		claims["jti"] = rand.Text()
		claims["exp"] = w.Now().Add(time.Minute).Unix()
		if _, err := w.JWT(w.sign(t, nil, claims)); err != nil {
			t.Fatal(err)
		}
	}
	assertion := w.sign(t, nil, w.claims())
	if _, err := w.JWT(assertion); err != nil || w.Remembered() != 21 {
		t.Fatalf("%d are remembered, %v", w.Remembered(), err)
	}
	w.advance(2 * time.Minute)
	if _, err := w.JWT(assertion); err != nil || w.Remembered() != 1 {
		t.Errorf("%d are remembered where one is good, %v", w.Remembered(), err)
	}
}

// One identity that shows assertions without end is told to wait, others are not, and a
// stranger who names it uses up nothing of its allowance.
func TestJWTSVIDRate(t *testing.T) {
	w := newWorld(t)
	claims := w.claims()
	assertion := w.sign(t, nil, claims)
	bad := w.claims()
	bad["aud"] = "x"
	for range 2 * attest.AssertionBurst {
		if _, err := w.JWT(w.sign(t, nil, bad)); !errors.Is(err, attest.ErrJWTSVID) {
			t.Fatal(err)
		}
	}
	for i := range attest.AssertionBurst {
		if _, err := w.JWT(assertion); err != nil {
			t.Fatalf("number %d: %v", i, err)
		}
	}
	_, err := w.JWT(assertion)
	var r *broker.Refusal
	if !errors.As(err, &r) || r.Reason != attest.ErrJWTSVIDRate.Reason || r.Kind != broker.Exhausted || r.Metadata["retry_after"] == "" {
		t.Fatalf("beyond the burst: %v", err)
	}
	claims["sub"] = "spiffe://example.org/shop"
	if _, err := w.JWT(w.sign(t, nil, claims)); err != nil {
		t.Errorf("another identity: %v", err)
	}
	w.advance(-time.Second) // a clock that is set back gives nothing
	if _, err := w.JWT(assertion); !errors.Is(err, attest.ErrJWTSVIDRate) {
		t.Errorf("after the clock went back: %v", err)
	}
	w.advance(2 * time.Second)
	if _, err := w.JWT(assertion); err != nil {
		t.Errorf("later: %v", err)
	}
}

func TestWithoutJWTBundles(t *testing.T) {
	td := spiffetest.ForTest(t, spiffetest.Config{TrustDomain: domain})
	a, err := attest.New(attest.Config{X509: td, TrustDomains: []spiffeid.TrustDomain{domain}})
	if err != nil {
		t.Fatal(err)
	}
	assertion, err := td.IssueJWTSVID(payments, []string{issuer}, spiffetest.SVIDOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.JWT(assertion); !errors.Is(err, attest.ErrJWTSVID) {
		t.Errorf("got %v", err)
	}
}

func TestNewRefuses(t *testing.T) {
	for name, cfg := range map[string]attest.Config{
		"nothing":     {},
		"no domain":   {X509: x509bundle.NewSet()},
		"no audience": {X509: x509bundle.NewSet(), JWT: jwtbundle.NewSet(), TrustDomains: []spiffeid.TrustDomain{domain}},
	} {
		if _, err := attest.New(cfg); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// What the SPIFFE standard wants of a leaf.
func TestX509Leaf(t *testing.T) {
	ca, caKey := certificate(t, &x509.Certificate{IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}, nil, nil)
	a, err := attest.New(attest.Config{
		X509: x509bundle.FromX509Authorities(domain, []*x509.Certificate{ca}), TrustDomains: []spiffeid.TrustDomain{domain},
	})
	if err != nil {
		t.Fatal(err)
	}
	good := func() *x509.Certificate {
		return &x509.Certificate{KeyUsage: x509.KeyUsageDigitalSignature, URIs: []*url.URL{payments.URL()}, BasicConstraintsValid: true}
	}
	for name, tt := range map[string]struct {
		change func(*x509.Certificate)
		ok     bool
	}{
		"good":                 {func(*x509.Certificate) {}, true},
		"not for signatures":   {func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyEncipherment }, false},
		"an authority":         {func(c *x509.Certificate) { c.IsCA = true }, false},
		"that signs others":    {func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign }, false},
		"two IDs":              {func(c *x509.Certificate) { c.URIs = append(c.URIs, c.URIs[0]) }, false},
		"no ID":                {func(c *x509.Certificate) { c.URIs = nil }, false},
		"of the domain itself": {func(c *x509.Certificate) { c.URIs[0] = domain.ID().URL() }, false},
	} {
		template := good()
		tt.change(template)
		leaf, _ := certificate(t, template, ca, caKey)
		c, err := a.X509(attest.NewChain([]*x509.Certificate{leaf}))
		if (err == nil) != tt.ok || tt.ok && (c.ID != payments || c.Leaf != leaf || c.JWT != nil) {
			t.Errorf("%s: %+v, %v", name, c, err)
		}
	}
	if _, err := a.X509(attest.NewChain(nil)); !errors.Is(err, attest.ErrNoSVID) {
		t.Errorf("no certificate: %v", err)
	}
}

func certificate(t *testing.T, template, parent *x509.Certificate, parentKey *ecdsa.PrivateKey) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template.SerialNumber = big.NewInt(time.Now().UnixNano())
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	if parent == nil {
		parent, parentKey = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), parentKey)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert, key
}

// Nothing that a stranger sends is taken for an identity, or brings the broker down.
func FuzzJWT(f *testing.F) {
	w := newWorld(f)
	good := w.sign(f, nil, w.claims())
	f.Add(good)
	f.Add(swapPayload(good, `{}`))
	f.Add(good + ".")
	f.Add("..")
	f.Add(`{"payload":"","signatures":[]}`)
	f.Fuzz(func(t *testing.T, assertion string) {
		c, err := w.JWT(assertion)
		if err == nil && c.ID != payments {
			t.Fatalf("%q was taken for %s", assertion, c.ID)
		}
		if err != nil && !errors.Is(err, attest.ErrJWTSVID) && !errors.Is(err, attest.ErrJWTSVIDRate) {
			t.Fatalf("an error that is no refusal: %v", err)
		}
	})
}
