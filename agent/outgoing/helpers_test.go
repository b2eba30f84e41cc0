package outgoing_test

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/agent/outgoing"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk"
	"github.com/dayflyhq/dayfly/sdk/spiffetest"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
)

// start is where the tests' clocks begin that run through suspend.
var start = time.Now().Add(-time.Hour)

// patience is how long a test waits for what must happen.
const patience = time.Minute

var (
	domain   = spiffeid.RequireTrustDomainFromString("td")
	payments = spiffeid.RequireFromString("spiffe://td/payments")
	orders   = spiffeid.RequireFromString("spiffe://td/orders")
	other    = spiffeid.RequireFromString("spiffe://td/other")
)

// tokens keeps credentials as the agent does, by the SDK's own source, from a broker that is
// a function.
type tokens struct {
	t   testing.TB
	td  *spiffetest.TrustDomain
	key *ecdsa.PrivateKey

	mu      sync.Mutex
	sources map[string]*sdk.TokenSource
	now     func() time.Time
	binding token.Binding
	err     error
	revoked map[string]bool // grants
	changed chan struct{}

	fetched atomic.Int64
}

func newTokens(t testing.TB, td *spiffetest.TrustDomain) *tokens {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	s := &tokens{t: t, td: td, key: key, sources: map[string]*sdk.TokenSource{}, now: time.Now, binding: token.BindingSPIFFE, revoked: map[string]bool{}, changed: make(chan struct{})}
	t.Cleanup(func() {
		for _, source := range s.sources {
			source.Close()
		}
	})
	return s
}

func (s *tokens) set(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
}

func (s *tokens) source(r sdk.Request) *sdk.TokenSource {
	s.mu.Lock()
	defer s.mu.Unlock()
	key := r.Audience + string(r.Binding)
	if s.sources[key] == nil {
		source, err := sdk.NewTokenSource(sdk.SourceConfig{Now: func() time.Time { return s.now() }, Boot: func() feed.Instant { return feed.Instant(s.now().Sub(start)) }, Fetch: func(context.Context) (*sdk.Credential, error) { return s.fetch(r) }})
		if err != nil {
			s.t.Fatal(err)
		}
		s.sources[key] = source
	}
	return s.sources[key]
}

func (s *tokens) fetch(r sdk.Request) (*sdk.Credential, error) {
	s.fetched.Add(1)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return nil, s.err
	}
	binding := s.binding
	if r.Binding == token.BindingNone {
		binding = r.Binding
	}
	return s.mint(r, binding)
}

func (s *tokens) mint(r sdk.Request, binding token.Binding) (*sdk.Credential, error) {
	now := s.now().Truncate(time.Second)
	grant, err := token.NewGrantID(payments, now, rand.Reader)
	if err != nil {
		return nil, err
	}
	svid, err := s.td.Source(payments).GetX509SVID()
	if err != nil {
		return nil, err
	}
	pub, err := token.NewPublicKey(token.ES256, s.key.Public())
	if err != nil {
		return nil, err
	}
	claims := &token.Claims{
		Issuer: "https://broker.test", Audience: r.Audience, Scopes: r.Scopes, Binding: binding, Transaction: "txn",
		Lineage:  []token.Member{{Identity: payments, Grant: grant, Key: pub.ID, SVID: token.ThumbprintOf(svid.Certificates[0])}},
		IssuedAt: now, NotBefore: now, Expires: now.Add(5 * time.Minute),
	}
	claims.Position.Era = 7
	if binding == token.BindingX5T {
		claims.Certificate = thumb(svid.Certificates[0].Raw)
	}
	unsigned, err := token.Encode(claims, token.ES256)
	if err != nil {
		return nil, err
	}
	secret, err := unsigned.Sign(s.key)
	if err != nil {
		return nil, err
	}
	return &sdk.Credential{Token: secret, Grant: grant.String(), Audience: r.Audience, Binding: binding, IssuedAt: now, Expires: now.Add(5 * time.Minute)}, nil
}

// Token is as the agent's: what goes with another certificate than the current one is dropped.
func (s *tokens) Token(ctx context.Context, r sdk.Request) (*sdk.Credential, error) {
	for {
		cred, err := s.source(r).Token(ctx)
		if err != nil {
			return nil, err
		}
		t, err := token.Inspect(cred.Token.Reveal())
		if err != nil {
			return nil, err
		}
		svid, err := s.td.Source(payments).GetX509SVID()
		if err != nil {
			return nil, err
		}
		if !s.Revoked(&t.Claims) && (t.Claims.Binding != token.BindingX5T || t.Claims.Certificate == thumb(svid.Certificates[0].Raw)) {
			return cred, nil
		}
		s.source(r).Invalidate(cred.Grant)
	}
}

func (s *tokens) Refused(r sdk.Request, cred *sdk.Credential) bool {
	return s.source(r).Refused(cred.Grant)
}

func (s *tokens) Revoked(c *token.Claims) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.revoked[c.Grant().String()]
}

func (s *tokens) Changed() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.changed
}

// revoke kills the token that an Authorization header holds.
func (s *tokens) revoke(header string) {
	t, err := token.Inspect(strings.TrimPrefix(header, "Bearer "))
	if err != nil {
		s.t.Fatal(err)
	}
	s.set(func() {
		s.revoked[t.Claims.Grant().String()] = true
		close(s.changed)
		s.changed = make(chan struct{})
	})
}

// world is a trust domain, who keeps tokens, and one upstream over mTLS.
type world struct {
	testing.TB
	td     *spiffetest.TrustDomain
	tokens *tokens
	dir    string
	log    *lines
}

// lines keeps what is logged.
type lines struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

func newWorld(t testing.TB) *world {
	t.Helper()
	td, err := spiffetest.New(spiffetest.Config{TrustDomain: domain})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = td.Close() })
	for _, id := range []spiffeid.ID{payments, orders, other} {
		if _, err := td.Workload(id); err != nil {
			t.Fatal(err)
		}
	}
	dir, err := os.MkdirTemp("", "df")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	w := &world{TB: t, td: td, tokens: newTokens(t, td), dir: dir, log: &lines{}}
	t.Cleanup(func() {
		if strings.Contains(w.log.String(), "eyJ") {
			t.Errorf("a token in the log: %s", w.log)
		}
	})
	return w
}

// upstream serves over mTLS as an identity, by HTTP/1.1 and HTTP/2.
func (w *world) upstream(id spiffeid.ID, h http.HandlerFunc) string {
	w.Helper()
	s := httptest.NewUnstartedServer(h)
	s.EnableHTTP2 = true
	s.TLS = tlsconfig.MTLSServerConfig(w.td.Source(id), w.td, tlsconfig.AuthorizeMemberOf(domain))
	s.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug)
	// httptest would put its own certificate in.
	s.TLS.MinVersion = tls.VersionTLS12
	s.Config.TLSConfig = s.TLS
	s.TLS.NextProtos = []string{"h2", "http/1.1"}
	l := s.Listener
	go func() { _ = s.Config.ServeTLS(l, "", "") }()
	w.Cleanup(func() { _ = s.Config.Close() })
	return "https://" + l.Addr().String()
}

// to is an upstream's configuration.
func to(url string) outgoing.Upstream {
	return outgoing.Upstream{URL: url, SPIFFEID: orders, Request: sdk.Request{Audience: "orders"}}
}

// proxy is one that runs.
type proxy struct {
	*world
	*outgoing.Proxy
	addr string // of TCP
	path string // of the unix socket
	stop func() error
}

// start runs a proxy on a unix socket, or on loopback.
func (w *world) start(tcp bool, l outgoing.Listener, change ...func(*outgoing.Config)) *proxy {
	w.Helper()
	p := &proxy{world: w}
	var err error
	if tcp {
		l.Listener, err = net.Listen("tcp", "127.0.0.1:0")
	} else {
		p.path = filepath.Join(w.dir, fmt.Sprintf("%d.sock", time.Now().UnixNano()))
		l.Listener, err = net.Listen("unix", p.path)
	}
	if err != nil {
		w.Fatal(err)
	}
	p.addr = l.Listener.Addr().String()
	cfg := outgoing.Config{Listeners: []outgoing.Listener{l}, Tokens: w.tokens, SVIDs: w.td.Source(payments), Bundles: w.td, Log: slog.New(slog.NewTextHandler(w.log, nil))}
	for _, c := range change {
		c(&cfg)
	}
	if p.Proxy, err = outgoing.New(cfg); err != nil {
		w.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- p.Run(ctx) }()
	p.stop = sync.OnceValue(func() error {
		cancel()
		select {
		case err := <-done:
			return err
		case <-time.After(patience):
			return errors.New("the proxy doesn't stop")
		}
	})
	w.Cleanup(func() {
		if err := p.stop(); err != nil {
			w.Error(err)
		}
	})
	return p
}

func (p *proxy) dial() (net.Conn, error) {
	if p.path != "" {
		return net.Dial("unix", p.path)
	}
	return net.Dial("tcp", p.addr)
}

// client talks to the proxy as a program does to a service: by HTTP/1.1, or HTTP/2 without TLS.
func (p *proxy) client(http2 bool) *http.Client {
	tr := &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) { return p.dial() }, DisableCompression: true}
	tr.Protocols = new(http.Protocols)
	tr.Protocols.SetHTTP1(!http2)
	tr.Protocols.SetUnencryptedHTTP2(http2)
	p.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}

// through is a client of a forward proxy.
func (p *proxy) through(user *url.Userinfo) *http.Client {
	tr := &http.Transport{Proxy: http.ProxyURL(&url.URL{Scheme: "http", Host: p.addr, User: user})}
	p.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr}
}

// raw sends bytes and reads one answer.
func (p *proxy) raw(text string) (*http.Response, []byte) {
	p.Helper()
	conn, err := p.dial()
	if err != nil {
		p.Fatal(err)
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, text); err != nil {
		p.Fatal(err)
	}
	_ = conn.SetReadDeadline(time.Now().Add(patience))
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		p.Fatalf("%q: %v", text, err)
	}
	body, _ := io.ReadAll(resp.Body)
	return resp, body
}

// wantRefusal checks the proxy's own answer.
func wantRefusal(t testing.TB, resp *http.Response, body []byte, status int, reason string) {
	t.Helper()
	var got struct{ Reason, Message string }
	if err := json.Unmarshal(body, &got); err != nil || resp.StatusCode != status || got.Reason != reason || got.Message == "" {
		t.Errorf("got %d %s, want %d %s", resp.StatusCode, body, status, reason)
	}
	if strings.Contains(string(body), "eyJ") {
		t.Errorf("a token in %s", body)
	}
}

func get(t testing.TB, c *http.Client, url string) (*http.Response, []byte) {
	t.Helper()
	resp, err := c.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, body
}

// eventually tries until it is so.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited for %s", what)
		}
	}
}
