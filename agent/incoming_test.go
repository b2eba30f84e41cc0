package agent_test

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
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/agent"
	"github.com/dayflyhq/dayfly/agent/incoming"
	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk"
	"github.com/dayflyhq/dayfly/sdk/spiffetest"
	"github.com/dayflyhq/dayfly/sdk/verify"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

var (
	ordersID = spiffeid.RequireFromString("spiffe://td/orders")
	thiefID  = spiffeid.RequireFromString("spiffe://td/thief")
)

// shop are the routes of the service behind the guards of these tests.
var shop = incoming.Policy{
	Audiences: []string{"shop"}, MaxStaleness: time.Minute, // no pause of a busy machine closes them
	Routes: []incoming.Route{
		{Path: "/healthz", Public: true},
		{Path: "/orders/", Methods: []string{"GET"}, Scopes: []string{"read"}},
		{Path: "/orders/", Methods: []string{"POST"}, Scopes: []string{"read", "write"}},
		{Path: "/any/"},
		{Path: "/grpc.health.v1.Health/", Scopes: []string{"read"}},
	},
}

// seen is a request as the service saw it.
type seen struct {
	method, uri, host, body string
	header, trailer         http.Header
}

// service is one without an SDK. It tells what it saw.
type service struct {
	*httptest.Server
	mu      sync.Mutex
	all     []seen
	grpc    *grpc.Server
	started chan struct{} // for each stream that began
}

func newService(t *testing.T) *service {
	t.Helper()
	s := &service{grpc: grpc.NewServer(), started: make(chan struct{}, 1024)}
	h := health.NewServer()
	healthpb.RegisterHealthServer(s.grpc, h)
	s.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body := make([]byte, 0)
		if !strings.HasPrefix(r.Header.Get("Content-Type"), "application/grpc") && r.Header.Get("Upgrade") == "" {
			body, _ = io.ReadAll(r.Body)
		}
		s.mu.Lock()
		s.all = append(s.all, seen{r.Method, r.RequestURI, r.Host, string(body), r.Header.Clone(), r.Trailer.Clone()})
		s.mu.Unlock()
		switch {
		case strings.HasPrefix(r.Header.Get("Content-Type"), "application/grpc"):
			s.grpc.ServeHTTP(w, r)
		case r.URL.Path == "/any/stream":
			fmt.Fprintln(w, "begun")
			_ = http.NewResponseController(w).Flush()
			s.started <- struct{}{}
			<-r.Context().Done()
		case r.Header.Get("Upgrade") != "":
			conn, buf, err := http.NewResponseController(w).Hijack()
			if err != nil {
				return
			}
			defer conn.Close()
			fmt.Fprintf(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: %s\r\n\r\n", r.Header.Get("Upgrade"))
			_, _ = io.Copy(conn, buf) // an echo
		default:
			fmt.Fprintf(w, "hello from %s", r.URL.Path)
		}
	}))
	s.Config.Protocols = new(http.Protocols)
	s.Config.Protocols.SetHTTP1(true)
	s.Config.Protocols.SetUnencryptedHTTP2(true)
	s.Start()
	t.Cleanup(s.Close)
	return s
}

// last is what it saw last.
func (s *service) last() seen {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.all) == 0 {
		return seen{}
	}
	return s.all[len(s.all)-1]
}

func (s *service) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.all)
}

// front is an agent with a proxy for mTLS, one for TLS without certificates, and plain ones
// on loopback and on a unix socket.
type front struct {
	*fixture
	service                *service
	mtls, anonymous, plain string
	socket                 string
}

func startFront(t *testing.T, b *broker, service *service, change func(*agent.Config)) *front {
	t.Helper()
	f := &front{service: service}
	listen := func() net.Listener {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	mtls, anonymous, plain := listen(), listen(), listen()
	f.mtls, f.anonymous, f.plain = mtls.Addr().String(), anonymous.Addr().String(), plain.Addr().String()
	f.socket = filepath.Join(tempDir(t), "in.sock")
	unix, err := agent.Listen(agent.SocketConfig{Path: f.socket})
	if err != nil {
		t.Fatal(err)
	}
	f.fixture = start(t, b.td, b, func(c *agent.Config) {
		c.Bundles = b.td
		proxy := incoming.ProxyConfig{Policy: shop, Upstream: service.URL}
		for _, one := range []struct {
			l         net.Listener
			source    x509svid.Source
			anonymous bool
		}{{mtls, c.Source, false}, {anonymous, c.Source, true}, {plain, nil, false}, {unix, nil, false}} {
			proxy.Listener, proxy.Source, proxy.Anonymous = one.l, one.source, one.anonymous
			c.Incoming = append(c.Incoming, agent.Incoming{ProxyConfig: proxy})
		}
		if change != nil {
			change(c)
		}
	})
	f.ready()
	return f
}

// A minting is what a token says that differs from a good one.
type minting struct {
	id       spiffeid.ID
	svid     *x509svid.SVID
	audience string
	scopes   []string
	binding  token.Binding
	life     time.Duration
	key      *ecdsa.PrivateKey
	through  []spiffeid.ID // who exchanged it before
}

// mintFor makes a token as the broker would.
func (b *broker) mintFor(m minting) string {
	b.t.Helper()
	b.mu.Lock()
	head := b.log.Head()
	b.mu.Unlock()
	if m.audience == "" {
		m.audience = "shop"
	}
	if m.life == 0 {
		m.life = 5 * time.Minute
	}
	if m.key == nil {
		m.key = b.key
	}
	if m.binding == "" {
		m.binding = token.BindingSPIFFE
	}
	if m.svid == nil {
		m.svid = b.svid(m.id)
	}
	now := time.Now().Truncate(time.Second)
	issued := now
	if m.life < 0 { // expired, and never longer than a token may live
		issued = now.Add(m.life - time.Minute)
	}
	var lineage []token.Member
	for _, id := range append(slices.Clone(m.through), m.id) {
		grant, err := token.NewGrantID(id, now, rand.Reader)
		if err != nil {
			b.t.Fatal(err)
		}
		lineage = append(lineage, token.Member{Identity: id, Grant: grant, Key: b.pub.ID, SVID: token.ThumbprintOf(m.svid.Certificates[0])})
	}
	claims := &token.Claims{
		Issuer: "https://broker.test", Audience: m.audience, Scopes: m.scopes, Lineage: lineage,
		IssuedAt: issued, NotBefore: issued, Expires: now.Add(m.life), Binding: m.binding, Transaction: "txn-1", Position: head.Token(),
	}
	if m.binding == token.BindingX5T {
		claims.Certificate = thumb(m.svid.Certificates[0])
	}
	unsigned, err := token.Encode(claims, token.ES256)
	if err != nil {
		b.t.Fatal(err)
	}
	secret, err := unsigned.Sign(m.key)
	if err != nil {
		b.t.Fatal(err)
	}
	return secret.Reveal()
}

func (b *broker) svid(id spiffeid.ID) *x509svid.SVID {
	b.t.Helper()
	svid, err := b.td.Source(id).GetX509SVID()
	if err != nil {
		b.t.Fatal(err)
	}
	return svid
}

// as is a TLS configuration that shows one SVID; nil shows none.
func (f *front) as(svid *x509svid.SVID) *tls.Config {
	cfg := tlsconfig.TLSClientConfig(f.td, tlsconfig.AuthorizeID(payments))
	if svid != nil {
		cfg = tlsconfig.MTLSClientConfig(svid, f.td, tlsconfig.AuthorizeID(payments))
	}
	return cfg
}

// reply is what a caller got.
type reply struct {
	status    int
	body      string
	header    http.Header
	reason    string
	challenge string
}

func (f *front) do(client *http.Client, method, url, bearer string, change func(*http.Request)) reply {
	f.Helper()
	req, err := http.NewRequestWithContext(f.Context(), method, url, nil)
	if err != nil {
		f.Fatal(err)
	}
	if bearer != "" {
		req.Header.Set("Authorization", "Bearer "+bearer)
	}
	if change != nil {
		change(req)
	}
	resp, err := client.Do(req)
	if err != nil {
		f.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		f.Fatal(err)
	}
	out := reply{status: resp.StatusCode, body: string(body), header: resp.Header, challenge: resp.Header.Get("WWW-Authenticate")}
	var refusal struct{ Reason, Message string }
	if resp.StatusCode >= 400 && json.Unmarshal(body, &refusal) == nil {
		out.reason = refusal.Reason
	}
	if bearer != "" && strings.Contains(out.body, bearer) {
		f.Errorf("the answer has the token: %s", out.body)
	}
	return out
}

func (f *front) tlsClient(svid *x509svid.SVID, h2 bool) *http.Client {
	tr := &http.Transport{TLSClientConfig: f.as(svid), Protocols: new(http.Protocols)}
	tr.Protocols.SetHTTP1(!h2)
	tr.Protocols.SetHTTP2(h2)
	f.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr}
}

// TestProxy: a token passes with the identity, audience and scopes that it needs; the
// service hears who calls, and never the token.
func TestProxy(t *testing.T) {
	noLeaks(t)
	b := newBroker(t, newDomain(t))
	f := startFront(t, b, newService(t), nil)
	mine, theirs := b.svid(ordersID), b.svid(thiefID)
	sibling, err := b.td.IssueSVID(ordersID, spiffetest.SVIDOptions{})
	if err != nil {
		t.Fatal(err)
	}
	forger, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	good := minting{id: ordersID, scopes: []string{"read"}}
	with := func(change func(*minting)) string {
		m := good
		change(&m)
		return b.mintFor(m)
	}
	bearer := with(func(m *minting) { m.binding = token.BindingNone })
	for _, c := range []struct {
		name         string
		to           string // "": mtls
		svid         *x509svid.SVID
		token        string
		method, path string
		status       int
		reason       string
		challenge    string
	}{
		{name: "bound, with its SVID", svid: mine, token: with(func(*minting) {}), status: 200},
		{name: "bound, with another SVID of the identity", svid: sibling, token: with(func(*minting) {}), status: 200},
		{name: "stolen by another", svid: theirs, token: with(func(*minting) {}), status: 401, reason: "PRESENTER_MISMATCH", challenge: `error="invalid_token"`},
		{name: "stolen, without a certificate", to: f.anonymous, token: with(func(*minting) {}), status: 401, reason: "PRESENTER_MISMATCH"},
		{name: "certificate-bound", svid: mine, token: with(func(m *minting) { m.binding = token.BindingX5T }), status: 200},
		{name: "certificate-bound, another certificate", svid: sibling, token: with(func(m *minting) { m.binding = token.BindingX5T }), status: 401, reason: "CERTIFICATE_MISMATCH"},
		{name: "bearer", svid: theirs, token: bearer, status: 200},
		{name: "bearer, without a certificate", to: f.anonymous, token: bearer, status: 200},
		{name: "no token", svid: mine, status: 401, reason: "TOKEN_MISSING", challenge: `Bearer scope="read"`},
		{name: "garbage", svid: mine, token: "garbage", status: 401, reason: "TOKEN_MALFORMED"},
		{name: "forged", svid: mine, token: with(func(m *minting) { m.key = forger }), status: 401, reason: "SIGNATURE_INVALID"},
		{name: "expired", svid: mine, token: with(func(m *minting) { m.life = -time.Minute }), status: 401, reason: "TOKEN_EXPIRED"},
		{name: "for another", svid: mine, token: with(func(m *minting) { m.audience = "other" }), status: 401, reason: "AUDIENCE_MISMATCH"},
		{name: "without the scope", svid: mine, token: with(func(m *minting) { m.scopes = nil }), status: 403, reason: "SCOPE_MISSING", challenge: `scope="read"`},
		{name: "with one of two scopes", svid: mine, token: with(func(*minting) {}), method: "POST", status: 403, reason: "SCOPE_MISSING", challenge: `scope="read write"`},
		{name: "a method that no route has", svid: mine, token: with(func(*minting) {}), method: "DELETE", status: 405, reason: "METHOD_NOT_ALLOWED"},
		{name: "a path that no route has", svid: mine, token: with(func(*minting) {}), path: "/other", status: 403, reason: "ROUTE_UNKNOWN"},
		{name: "public", svid: theirs, path: "/healthz", status: 200},
		{name: "public, without a certificate", to: f.anonymous, path: "/healthz", status: 200},
	} {
		for _, h2 := range []bool{false, true} {
			to, method, path := c.to, c.method, c.path
			if to == "" {
				to = f.mtls
			}
			if method == "" {
				method = "GET"
			}
			if path == "" {
				path = "/orders/1"
			}
			before := f.service.count()
			got := f.do(f.tlsClient(c.svid, h2), method, "https://"+to+path, c.token, nil)
			if got.status != c.status || got.reason != c.reason || !strings.Contains(got.challenge, c.challenge) {
				t.Errorf("%s (HTTP/2 %v): %d %s %q", c.name, h2, got.status, got.body, got.challenge)
			}
			if passed := f.service.count() - before; passed != map[bool]int{true: 1}[c.status == 200] {
				t.Errorf("%s: %d requests came through", c.name, passed)
			}
			if c.status == 200 && f.service.last().header.Get("Authorization") != "" {
				t.Errorf("%s: the service got the token", c.name)
			}
		}
	}
	// Who calls, also through others.
	derived := with(func(m *minting) { m.through = []spiffeid.ID{payments, thiefID} })
	if got := f.do(f.tlsClient(mine, true), "GET", "https://"+f.mtls+"/orders/1?a=1;b=%2F", derived, nil); got.status != 200 {
		t.Fatalf("derived: %+v", got)
	}
	saw := f.service.last()
	for name, want := range map[string]string{
		"Subject": "spiffe://td/payments", "Presenter": "spiffe://td/orders", "Actors": "spiffe://td/orders, spiffe://td/thief",
		"Scope": "read", "Audience": "shop", "Txn": "txn-1",
	} {
		if got := saw.header.Values("X-Dayfly-" + name); len(got) != 1 || got[0] != want {
			t.Errorf("X-Dayfly-%s: %q", name, got)
		}
	}
	if saw.uri != "/orders/1?a=1;b=%2F" || saw.host != f.mtls || saw.header.Get("X-Forwarded-For") != "127.0.0.1" || saw.header.Get("X-Forwarded-Proto") != "https" {
		t.Errorf("the service saw %+v", saw)
	}
	if saw.header.Get("X-Dayfly-Grant") == "" || saw.header.Get("X-Dayfly-Expires") == "" {
		t.Errorf("no grant or expiry: %v", saw.header)
	}
	// Without a certificate there is no handshake where one is demanded, nor with one of
	// another trust domain.
	stranger := newBroker(t, newDomain(t)).svid(ordersID)
	for name, svid := range map[string]*x509svid.SVID{"none": nil, "a stranger's": stranger} {
		cfg := f.as(svid)
		conn, err := tls.Dial("tcp", f.mtls, cfg)
		if err == nil {
			fmt.Fprintf(conn, "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
			if line, err := bufio.NewReader(conn).ReadString('\n'); err == nil {
				t.Errorf("certificate %s: %s", name, line)
			}
			_ = conn.Close()
		}
	}
}

// raw sends bytes as they are to the plain proxy, and returns the status line's code.
func (f *front) raw(network, addr, request string) int {
	f.Helper()
	conn, err := net.Dial(network, addr)
	if err != nil {
		f.Fatal(err)
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, request); err != nil {
		return 0
	}
	_ = conn.SetReadDeadline(time.Now().Add(patience))
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return 0
	}
	defer resp.Body.Close()
	_, _ = io.Copy(io.Discard, resp.Body)
	return resp.StatusCode
}

// TestProxyRoutes: over raw sockets, what reaches the service is for a route, and what a
// route can't tell doesn't reach it.
func TestProxyRoutes(t *testing.T) {
	noLeaks(t)
	b := newBroker(t, newDomain(t))
	f := startFront(t, b, newService(t), nil)
	tok := b.mintFor(minting{id: ordersID, binding: token.BindingNone, scopes: []string{"read"}})
	for line, want := range map[string]int{
		"GET /orders/1 HTTP/1.1":                  200,
		"GET http://x/orders/1 HTTP/1.1":          200,
		"GET /orders/a%20b;c=d?e=/../f HTTP/1.1":  200,
		"GET /any/../orders/1 HTTP/1.1":           400,
		"GET /any/%2e%2e/orders/1 HTTP/1.1":       400,
		"GET /any/..%2forders/1 HTTP/1.1":         400,
		"GET /any/..;/orders/1 HTTP/1.1":          400,
		"GET //orders/1 HTTP/1.1":                 400,
		"GET /any\\..\\orders HTTP/1.1":           400,
		"GET /any/%00 HTTP/1.1":                   400,
		"GET /any/%252e%252e/x HTTP/1.1":          400,
		"GET http://x//orders/1 HTTP/1.1":         400,
		"OPTIONS * HTTP/1.1":                      400,
		"CONNECT /orders/1 HTTP/1.1":              400,
		"CONNECT upstream:80 HTTP/1.1":            400,
		"get /orders/1 HTTP/1.1":                  400,
		"GET /ORDERS/1 HTTP/1.1":                  403,
		"GET /x HTTP/1.1":                         403,
		"PUT /orders/1 HTTP/1.1":                  405,
		"GET /healthz/ HTTP/1.1":                  403,
		"GET /healthz#/../orders/1 HTTP/1.1":      403,
		"GET /any/" + strings.Repeat("a", 70<<10): 431,
	} {
		before := f.service.count()
		got := f.raw("tcp", f.plain, line+"\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer "+tok+"\r\n\r\n")
		if got != want && !(want == 403 && got == 400) {
			t.Errorf("%.60q: %d, want %d", line, got, want)
		}
		if passed := f.service.count() - before; (passed == 1) != (want == 200) {
			t.Errorf("%.60q: %d came through: %+v", line, passed, f.service.last())
		}
		if want == 200 {
			target := strings.TrimPrefix(strings.Fields(line)[1], "http://x")
			if saw := f.service.last().uri; saw != target {
				t.Errorf("%q: the service saw %q", line, saw)
			}
		}
	}
	if got := f.raw("unix", f.socket, "GET /orders/1 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer "+tok+"\r\n\r\n"); got != 200 {
		t.Errorf("the unix socket: %d", got)
	}
	bound := b.mintFor(minting{id: ordersID, scopes: []string{"read"}})
	if got := f.raw("unix", f.socket, "GET /orders/1 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer "+bound+"\r\n\r\n"); got != 401 {
		t.Errorf("a bound token on the unix socket: %d", got)
	}
}

// TestSpoofedHeaders: what a caller says of who calls, or of another method or path, never
// reaches the service, however it is written.
func TestSpoofedHeaders(t *testing.T) {
	noLeaks(t)
	b := newBroker(t, newDomain(t))
	f := startFront(t, b, newService(t), nil)
	tok := b.mintFor(minting{id: ordersID, binding: token.BindingNone, scopes: []string{"read"}})
	auth := "Authorization: Bearer " + tok + "\r\n"
	for name, headers := range map[string]string{
		"plain":               "X-Dayfly-Subject: spiffe://td/root\r\n",
		"twice":               "X-Dayfly-Subject: spiffe://td/root\r\nX-Dayfly-Subject: spiffe://td/root\r\n",
		"odd case":            "x-dAYFLY-sUBJECT: spiffe://td/root\r\n",
		"underscores":         "X_Dayfly_Subject: spiffe://td/root\r\nX-Dayfly_Scope: admin\r\nx_dayfly-grant: g\r\n",
		"dots":                "X.Dayfly.Subject: spiffe://td/root\r\nX-Dayfly.Scope: admin\r\n",
		"one we don't have":   "X-Dayfly-Admin: true\r\n",
		"named by Connection": "Connection: close, X-Dayfly-Subject, X-Dayfly-Scope, X-Dayfly-Presenter\r\nX-Dayfly-Subject: spiffe://td/root\r\n",
		"other methods":       "X-HTTP-Method-Override: DELETE\r\nX_HTTP_Method: DELETE\r\nX-Method-Override: DELETE\r\n",
		"other paths":         "X-Original-URL: /admin\r\nX-Rewrite-Url: /admin\r\n",
		"forwarding":          "X-Forwarded-Host: admin\r\nX-Forwarded-For: 192.0.2.1\r\nForwarded: host=admin\r\n",
		"forwarding, spelt":   "X_Forwarded_For: 192.0.2.1\r\nX_Forwarded-Host: admin\r\nX.Forwarded.Proto: admin\r\n",
		"certificates":        "X-Forwarded-Client-Cert: URI=spiffe://td/root\r\nClient-Cert: :root:\r\nX-Forwarded-User: admin\r\n",
		"addresses":           "X-Real-IP: 192.0.2.1\r\nx_real_ip: 192.0.2.1\r\n",
		"an upgrade to h2c":   "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n",
		"two upgrades":        "Connection: Upgrade\r\nUpgrade: websocket\r\nUpgrade: h2c\r\n",
		"a list of upgrades":  "Connection: Upgrade\r\nUpgrade: websocket, h2c\r\n",
	} {
		if got := f.raw("tcp", f.plain, "GET /orders/1 HTTP/1.1\r\nHost: x\r\n"+auth+headers+"\r\n"); got != 200 {
			t.Errorf("%s: %d", name, got)
		}
		f.clean(name, f.service.last(), "spiffe://td/orders")
		if got := f.raw("tcp", f.plain, "GET /healthz HTTP/1.1\r\nHost: x\r\n"+auth+headers+"\r\n"); got != 200 {
			t.Errorf("%s, public: %d", name, got)
		}
		f.clean(name+", public", f.service.last(), "")
	}
	// In trailers, which programs may merge.
	got := f.raw("tcp", f.plain, "GET /orders/1 HTTP/1.1\r\nHost: x\r\n"+auth+"Trailer: X-Dayfly-Subject\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX-Dayfly-Subject: spiffe://td/root\r\nX_Dayfly_Scope: admin\r\n\r\n")
	if saw := f.service.last(); got != 200 || saw.body != "abc" || len(saw.trailer) > 0 {
		t.Errorf("trailers: %d, %+v", got, saw)
	}
	f.clean("trailers", f.service.last(), "spiffe://td/orders")
	// Two readings of one request.
	for name, request := range map[string]string{
		"two tokens":   "GET /orders/1 HTTP/1.1\r\nHost: x\r\n" + auth + auth + "\r\n",
		"two hosts":    "GET /orders/1 HTTP/1.1\r\nHost: x\r\nHost: y\r\n" + auth + "\r\n",
		"two lengths":  "POST /any/ HTTP/1.1\r\nHost: x\r\n" + auth + "Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
		"te twice":     "POST /any/ HTTP/1.1\r\nHost: x\r\n" + auth + "Transfer-Encoding: identity\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
		"a space":      "GET /orders/1 HTTP/1.1\r\nHost: x\r\nX-Dayfly-Subject : spiffe://td/root\r\n" + auth + "\r\n",
		"a folded one": "GET /orders/1 HTTP/1.1\r\nHost: x\r\n X-Dayfly-Subject: spiffe://td/root\r\n" + auth + "\r\n",
	} {
		before := f.service.count()
		if got := f.raw("tcp", f.plain, request); got == 200 && name != "a folded one" {
			t.Errorf("%s: let through: %+v", name, f.service.last())
		}
		if f.service.count() > before {
			f.clean(name, f.service.last(), "spiffe://td/orders")
		}
	}
}

// clean: there is no header of whoever the service is to believe but the proxy's own.
func (f *front) clean(name string, saw seen, subject string) {
	f.Helper()
	for header, values := range saw.header {
		folded := strings.NewReplacer("_", "-", ".", "-").Replace(strings.ToLower(header))
		for _, v := range values {
			if strings.Contains(v, "root") || strings.Contains(v, "admin") || strings.Contains(v, "192.0.2.1") || v == "DELETE" {
				f.Errorf("%s: the service got %s: %s", name, header, v)
			}
		}
		if strings.HasPrefix(folded, "x-dayfly-") && (len(values) != 1 || header != http.CanonicalHeaderKey(folded)) || folded == "authorization" || folded == "upgrade" || folded == "http2-settings" {
			f.Errorf("%s: the service got %s: %q", name, header, values)
		}
	}
	if got := saw.header.Get("X-Dayfly-Subject"); got != subject {
		f.Errorf("%s: the subject is %q, want %q", name, got, subject)
	}
}

// TestProxyRevokeUnderLoad: of requests that begin later than the bound after a revocation,
// or after its receipt, none comes through; others go on.
func TestProxyRevokeUnderLoad(t *testing.T) {
	noLeaks(t)
	b := newBroker(t, newDomain(t))
	f := startFront(t, b, newService(t), nil)
	bad := b.mintFor(minting{id: ordersID, scopes: []string{"read"}})
	fine := b.mintFor(minting{id: thiefID, scopes: []string{"read"}})
	var passed, after atomic.Int64
	var revoked atomic.Int64 // from when on everything must be refused, in UnixNano
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var wg sync.WaitGroup
	for i := range 4 {
		client := f.tlsClient(b.svid([]spiffeid.ID{ordersID, thiefID}[i%2]), i < 2)
		wg.Go(func() {
			for ctx.Err() == nil {
				begun := time.Now().UnixNano()
				req, _ := http.NewRequest("GET", "https://"+f.mtls+"/orders/1", nil)
				req.Header.Set("Authorization", "Bearer "+[]string{bad, fine}[i%2])
				resp, err := client.Do(req)
				if err != nil {
					t.Errorf("a request was lost: %v", err)
					return
				}
				_, _ = io.Copy(io.Discard, resp.Body)
				_ = resp.Body.Close()
				at := revoked.Load()
				switch {
				case i%2 == 1 && resp.StatusCode != 200:
					t.Errorf("one that isn't revoked: %d", resp.StatusCode)
				case i%2 == 0 && resp.StatusCode == 200 && at != 0 && begun > at:
					t.Errorf("passed, begun %v after it was revoked everywhere", time.Duration(begun-at))
				case resp.StatusCode == 200:
					passed.Add(1)
				case i%2 == 0:
					after.Add(1)
				}
			}
		})
	}
	eventually(t, "some requests", func() error {
		if passed.Load() < 50 {
			return errors.New("few")
		}
		return nil
	})
	at := b.revoke(revocation.Identity(ordersID))
	// Each verifier says that it has it.
	receipts := map[string]bool{}
	for len(receipts) < 4 {
		m := b.sent("the receipts of four proxies", func(m *dayflyv1.FollowRequest) bool { return m.GetRelayReport() != nil })
		for _, v := range m.GetRelayReport().GetVerifiers() {
			if v.GetAcknowledged().GetSequence() >= at.Seq && slices.Equal(v.GetAudiences(), []string{"shop"}) {
				receipts[v.GetPath()[len(v.GetPath())-1]] = true
			}
		}
	}
	revoked.Store(time.Now().UnixNano())
	eventually(t, "refusals", func() error {
		if after.Load() < 50 {
			return errors.New("few")
		}
		return nil
	})
	stop()
	wg.Wait()
}

// TestProxyCutsStreams: what is under way ends with its token.
func TestProxyCutsStreams(t *testing.T) {
	noLeaks(t)
	b := newBroker(t, newDomain(t))
	f := startFront(t, b, newService(t), nil)
	for name, revoke := range map[string]func(id spiffeid.ID){
		"revoked": func(id spiffeid.ID) { b.revoke(revocation.Identity(id)) },
	} {
		id := spiffeid.RequireFromString("spiffe://td/caller/" + name)
		tok := b.mintFor(minting{id: id, scopes: []string{"read"}})
		bearer := b.mintFor(minting{id: id, binding: token.BindingNone, scopes: []string{"read"}})
		ends := make(chan error, 8)
		for _, h2 := range []bool{false, true} {
			req, err := http.NewRequestWithContext(t.Context(), "GET", "https://"+f.mtls+"/any/stream", nil)
			if err != nil {
				t.Fatal(err)
			}
			req.Header.Set("Authorization", "Bearer "+tok)
			resp, err := f.tlsClient(b.svid(id), h2).Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			if line, err := bufio.NewReader(resp.Body).ReadString('\n'); err != nil || line != "begun\n" {
				t.Fatalf("%q, %v", line, err)
			}
			<-f.service.started
			go func() {
				_, err := io.Copy(io.Discard, resp.Body)
				if err == nil {
					err = errors.New("it looks complete")
				} else {
					err = nil
				}
				ends <- err
			}()
		}
		// A websocket, which isn't HTTP any more.
		conn, err := net.Dial("tcp", f.plain)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		fmt.Fprintf(conn, "GET /any/socket HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nAuthorization: Bearer %s\r\n\r\n", bearer)
		buf := bufio.NewReader(conn)
		resp, err := http.ReadResponse(buf, nil)
		if err != nil || resp.StatusCode != 101 {
			t.Fatalf("upgrading: %v, %v", resp, err)
		}
		fmt.Fprintln(conn, "hello")
		if line, err := buf.ReadString('\n'); err != nil || line != "hello\n" {
			t.Fatalf("the echo: %q, %v", line, err)
		}
		go func() {
			_, _ = io.Copy(io.Discard, buf)
			ends <- nil
		}()
		// gRPC, which says why.
		watch, err := healthpb.NewHealthClient(f.grpcConn(f.mtls, f.as(b.svid(id)))).Watch(authorized(t.Context(), tok), &healthpb.HealthCheckRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if m, err := watch.Recv(); err != nil || m.GetStatus() != healthpb.HealthCheckResponse_SERVING {
			t.Fatalf("watching: %v, %v", m, err)
		}
		go func() {
			_, err := watch.Recv()
			var refusal *sdk.Error
			if !errors.As(sdk.FromRPC(err), &refusal) || refusal.Code != codes.Unauthenticated || refusal.Reason != "TOKEN_REVOKED" {
				ends <- fmt.Errorf("gRPC ended with %v", err)
				return
			}
			ends <- nil
		}()
		revoke(id)
		for range 4 {
			select {
			case err := <-ends:
				if err != nil {
					t.Errorf("%s: %v", name, err)
				}
			case <-time.After(patience):
				t.Fatalf("%s: a stream goes on\n%s", name, stacks())
			}
		}
	}
}

func (f *front) grpcConn(addr string, cfg *tls.Config) *grpc.ClientConn {
	f.Helper()
	creds := insecure.NewCredentials()
	if cfg != nil {
		creds = credentials.NewTLS(cfg)
	}
	cc, err := grpc.NewClient("passthrough:"+addr, grpc.WithTransportCredentials(creds))
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = cc.Close() })
	return cc
}

func authorized(ctx context.Context, tok string) context.Context {
	return metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+tok)
}

// TestProxyGRPC: calls pass with the token's identity, refusals are gRPC's, and the service
// hears who calls.
func TestProxyGRPC(t *testing.T) {
	noLeaks(t)
	b := newBroker(t, newDomain(t))
	f := startFront(t, b, newService(t), nil)
	tok := b.mintFor(minting{id: ordersID, scopes: []string{"read"}})
	bearer := b.mintFor(minting{id: ordersID, scopes: []string{"read"}, binding: token.BindingNone})
	bare := b.mintFor(minting{id: ordersID})
	mine := f.as(b.svid(ordersID))
	check := func(cc *grpc.ClientConn, ctx context.Context) error {
		_, err := healthpb.NewHealthClient(cc).Check(ctx, &healthpb.HealthCheckRequest{})
		return err
	}
	if err := check(f.grpcConn(f.mtls, mine), authorized(t.Context(), tok)); err != nil {
		t.Error(err)
	}
	if saw := f.service.last(); saw.header.Get("X-Dayfly-Presenter") != "spiffe://td/orders" || saw.header.Get("Authorization") != "" {
		t.Errorf("the service saw %v", saw.header)
	}
	if err := check(f.grpcConn(f.plain, nil), authorized(t.Context(), bearer)); err != nil {
		t.Errorf("in plain text: %v", err)
	}
	for name, c := range map[string]struct {
		tls    *tls.Config
		addr   string
		token  string
		code   codes.Code
		reason string
	}{
		"stolen":        {f.as(b.svid(thiefID)), f.mtls, tok, codes.Unauthenticated, "PRESENTER_MISMATCH"},
		"without scope": {mine, f.mtls, bare, codes.PermissionDenied, "SCOPE_MISSING"},
		"bound":         {nil, f.plain, tok, codes.Unauthenticated, "PRESENTER_MISMATCH"},
		"garbage":       {mine, f.mtls, "x", codes.Unauthenticated, "TOKEN_MALFORMED"},
	} {
		err := check(f.grpcConn(c.addr, c.tls), authorized(t.Context(), c.token))
		var refusal *sdk.Error
		if !errors.As(sdk.FromRPC(err), &refusal) || refusal.Code != c.code || refusal.Reason != c.reason {
			t.Errorf("%s: %v", name, err)
		}
	}
	err := f.grpcConn(f.mtls, mine).Invoke(authorized(t.Context(), tok), "/other.Service/Call", &healthpb.HealthCheckRequest{}, &healthpb.HealthCheckResponse{})
	if status.Code(err) != codes.PermissionDenied {
		t.Errorf("a service that no route has: %v", err)
	}
}

// TestProxyClosesWhenStale: cut off from the broker, it refuses every token at its bound,
// and opens again by itself; public routes stay. An upstream that is away is a 502.
func TestProxyClosesWhenStale(t *testing.T) {
	noLeaks(t)
	b := newBroker(t, newDomain(t))
	service := newService(t)
	f := startFront(t, b, service, func(c *agent.Config) {
		for i := range c.Incoming {
			c.Incoming[i].MaxStaleness = 3 * time.Second
		}
	})
	tok := b.mintFor(minting{id: ordersID, scopes: []string{"read"}})
	client := f.tlsClient(b.svid(ordersID), true)
	b.set(func(b *broker) { b.silent = true })
	var got reply
	eventually(t, "a refusal", func() error {
		if got = f.do(client, "GET", "https://"+f.mtls+"/orders/1", tok, nil); got.reason != "VERIFIER_STALE" {
			return fmt.Errorf("%+v", got)
		}
		return nil
	})
	if got.status != 503 || got.header.Get("Retry-After") == "" {
		t.Errorf("stale: %+v", got)
	}
	if got := f.do(client, "GET", "https://"+f.mtls+"/healthz", "", nil); got.status != 200 {
		t.Errorf("a public route: %+v", got)
	}
	err := healthCheck(f.grpcConn(f.mtls, f.as(b.svid(ordersID))), authorized(t.Context(), tok))
	if status.Code(err) != codes.Unavailable {
		t.Errorf("gRPC: %v", err)
	}
	b.set(func(b *broker) { b.silent = false })
	eventually(t, "it to open", func() error {
		if got := f.do(client, "GET", "https://"+f.mtls+"/orders/1", tok, nil); got.status != 200 {
			return fmt.Errorf("%+v", got)
		}
		return nil
	})
	service.CloseClientConnections()
	service.Close()
	if got := f.do(client, "GET", "https://"+f.mtls+"/orders/1", tok, nil); got.status != 502 || got.reason != "UPSTREAM_UNREACHABLE" {
		t.Errorf("an upstream that is away: %+v", got)
	}
	err = healthCheck(f.grpcConn(f.mtls, f.as(b.svid(ordersID))), authorized(t.Context(), tok))
	if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "behind this proxy") {
		t.Errorf("gRPC to an upstream that is away: %v", err)
	}
}

func healthCheck(cc *grpc.ClientConn, ctx context.Context) error {
	_, err := healthpb.NewHealthClient(cc).Check(ctx, &healthpb.HealthCheckRequest{})
	return err
}

// TestProxySVIDExpires: a connection outlives an SVID and the bundle that it was verified
// with, and what they proved doesn't.
func TestProxySVIDExpires(t *testing.T) {
	noLeaks(t)
	b := newBroker(t, newDomain(t))
	var ahead atomic.Int64
	bundles := x509bundle.NewSet(b.td.Bundle())
	f := startFront(t, b, newService(t), func(c *agent.Config) {
		c.Now = func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) }
		c.Bundles = bundles
	})
	bearer := b.mintFor(minting{id: ordersID, scopes: []string{"read"}, binding: token.BindingNone, life: 50 * time.Minute})
	svid := b.svid(ordersID)
	client := f.tlsClient(svid, true)
	for _, step := range []struct {
		name, reason string
		change       func()
	}{
		{"at first", "", func() {}},
		{"another authority", "SVID_INVALID", func() { bundles.Add(newDomain(t).Bundle()) }},
		{"its own again", "", func() { bundles.Add(b.td.Bundle()) }},
		{"no bundle", "SVID_INVALID", func() { bundles.Remove(domain) }},
		{"once more its own", "", func() { bundles.Add(b.td.Bundle()) }},
	} {
		step.change()
		if got := f.do(client, "GET", "https://"+f.mtls+"/orders/1", bearer, nil); got.reason != step.reason || (got.status == 200) != (step.reason == "") {
			t.Fatalf("%s: %+v", step.name, got)
		}
	}
	ahead.Store(int64(time.Until(svid.Certificates[0].NotAfter) + time.Second))
	if got := f.do(client, "GET", "https://"+f.mtls+"/orders/1", bearer, nil); got.reason != "SVID_INVALID" {
		t.Errorf("on the connection of an expired SVID: %+v", got)
	}
	if got := f.do(client, "GET", "https://"+f.mtls+"/healthz", "", nil); got.reason != "SVID_INVALID" {
		t.Errorf("a public route: %+v", got)
	}
}

// TestProxyRefusesAtOnce: whoever is refused hears it without having sent its body, and can't
// stay for that; and one connection too many gets none.
func TestProxyRefusesAtOnce(t *testing.T) {
	noLeaks(t)
	b := newBroker(t, newDomain(t))
	f := startFront(t, b, newService(t), func(c *agent.Config) {
		for i := range c.Incoming {
			c.Incoming[i].MaxConnections = 1
		}
	})
	conn, err := net.Dial("tcp", f.plain)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(patience))
	if _, err := io.WriteString(conn, "POST /orders/1 HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	from := bufio.NewReader(conn)
	resp, err := http.ReadResponse(from, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, resp.Body); err != nil || resp.StatusCode != 401 {
		t.Fatal(resp.StatusCode, err)
	}
	if got := f.raw("tcp", f.plain, "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"); got != 0 {
		t.Errorf("a second connection: %d", got)
	}
	if rest, err := io.ReadAll(from); len(rest) > 0 || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the connection stays: %q, %v", rest, err)
	}
	eventually(t, "room", func() error {
		if got := f.raw("tcp", f.plain, "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"); got != 200 {
			return fmt.Errorf("%d", got)
		}
		return nil
	})
}

// TestProxyAnswersEarly: an answer of the service's comes while the request is still being
// sent, also over HTTP/1, and what is sent after it is no request.
func TestProxyAnswersEarly(t *testing.T) {
	noLeaks(t)
	b := newBroker(t, newDomain(t))
	service := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_ = http.NewResponseController(w).EnableFullDuplex()
		if r.URL.Path == "/any/no" {
			w.WriteHeader(http.StatusRequestEntityTooLarge)
			return
		}
		_ = http.NewResponseController(w).Flush()
		_, _ = io.Copy(w, io.LimitReader(r.Body, 6))
	}))
	defer service.Close()
	f := startFront(t, b, newService(t), func(c *agent.Config) {
		for i := range c.Incoming {
			c.Incoming[i].Upstream = service.URL
		}
	})
	bearer := b.mintFor(minting{id: ordersID, binding: token.BindingNone})
	for path, want := range map[string]int{"/any/no": 413, "/any/echo": 200} {
		conn, err := net.Dial("tcp", f.plain)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(patience))
		fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n", path, bearer)
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		if resp.StatusCode != want || !resp.Close {
			t.Errorf("%s: %d, the last one: %v", path, resp.StatusCode, resp.Close)
		}
		if want == 200 {
			fmt.Fprint(conn, "3\r\ndef\r\n")
			if body, err := io.ReadAll(resp.Body); err != nil || string(body) != "abcdef" {
				t.Errorf("the echo: %q, %v", body, err)
			}
		}
	}
}

// TestProxyCutsWhoDoesntRead: nor does it help against a revocation to leave an answer unread.
func TestProxyCutsWhoDoesntRead(t *testing.T) {
	noLeaks(t)
	b := newBroker(t, newDomain(t))
	var written atomic.Int64
	service := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		for {
			n, err := w.Write(make([]byte, 32<<10))
			if err != nil {
				return
			}
			written.Add(int64(n))
		}
	}))
	defer service.Close()
	f := startFront(t, b, newService(t), func(c *agent.Config) {
		for i := range c.Incoming {
			c.Incoming[i].Upstream = service.URL
		}
	})
	bearer := b.mintFor(minting{id: ordersID, binding: token.BindingNone})
	conn, err := net.Dial("unix", f.socket)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "GET /any/flood HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\n\r\n", bearer)
	if _, err := conn.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	before := int64(-1)
	eventually(t, "everything on the way to be full", func() error {
		now := written.Load()
		defer func() { before = now }()
		if now != before {
			return errors.New("more was written")
		}
		return nil
	})
	b.revoke(revocation.Identity(ordersID))
	eventually(t, "the connection to be closed", func() error {
		if _, err := conn.Write([]byte("x")); err == nil {
			return errors.New("it is open")
		}
		return nil
	})
}

// TestProxyPassesTheToken where it is told to, and admits by uid.
func TestProxyPassesTheToken(t *testing.T) {
	noLeaks(t)
	b := newBroker(t, newDomain(t))
	service := newService(t)
	f := startFront(t, b, service, func(c *agent.Config) {
		for i := range c.Incoming {
			c.Incoming[i].PassToken = true
		}
		c.Incoming[3].Allow.UIDs = []uint32{4242424242}
	})
	bearer := b.mintFor(minting{id: ordersID, scopes: []string{"read"}, binding: token.BindingNone})
	if got := f.raw("tcp", f.plain, "GET /orders/1 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer "+bearer+"\r\n\r\n"); got != 200 || service.last().header.Get("Authorization") != "Bearer "+bearer {
		t.Errorf("%d, %v", got, service.last().header)
	}
	// Where no token is looked at none is passed on: the service would take it for one that was.
	if got := f.raw("tcp", f.plain, "GET /healthz HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer forged\r\n\r\n"); got != 200 || service.last().header.Get("Authorization") != "" {
		t.Errorf("a public route: %d, %v", got, service.last().header)
	}
	before := service.count()
	if got := f.raw("unix", f.socket, "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"); got != 403 || service.count() != before {
		t.Errorf("another user: %d", got)
	}
}

// TestIncomingNeedsTheFeed.
func TestIncomingNeedsTheFeed(t *testing.T) {
	_, err := agent.New(agent.Config{NoFeed: true, Incoming: []agent.Incoming{{}}})
	if err == nil || !strings.Contains(err.Error(), "the feed must be followed") {
		t.Error(err)
	}
}

// TestGuardsHoldNoCredential: neither logs nor counts do.
func TestGuardsHoldNoCredential(t *testing.T) {
	noLeaks(t)
	b := newBroker(t, newDomain(t))
	log := new(lines)
	f := startFront(t, b, newService(t), func(c *agent.Config) {
		c.Log = slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	})
	bearer := b.mintFor(minting{id: ordersID, scopes: []string{"read"}, binding: token.BindingNone})
	f.service.Close()
	for _, path := range []string{"/orders/1", "/x", "/any/../x"} {
		f.raw("tcp", f.plain, "GET "+path+" HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer "+bearer+"\r\n\r\n")
	}
	f.stop()
	if text := log.String(); strings.Contains(text, bearer[len(bearer)-20:]) || !strings.Contains(text, "doesn't answer") {
		t.Errorf("the log: %s", text)
	}
}

// TestProxyRunsOn where its owner chose so: past the bound what is known counts.
func TestProxyRunsOn(t *testing.T) {
	noLeaks(t)
	b := newBroker(t, newDomain(t))
	f := startFront(t, b, newService(t), func(c *agent.Config) {
		for i := range c.Incoming {
			c.Incoming[i].OnStale, c.Incoming[i].MaxStaleness = verify.Accept, 500*time.Millisecond
		}
	})
	tok := b.mintFor(minting{id: ordersID, scopes: []string{"read"}})
	b.set(func(b *broker) { b.silent = true })
	var body map[string]any
	eventually(t, "the agent to be stale", func() error {
		code, got, _ := f.get("/readyz")
		body = got
		if code != http.StatusServiceUnavailable {
			return fmt.Errorf("%d", code)
		}
		return nil
	})
	if got := f.do(f.tlsClient(b.svid(ordersID), true), "GET", "https://"+f.mtls+"/orders/1", tok, nil); got.status != 200 {
		t.Errorf("%+v", got)
	}
	if checks := fmt.Sprint(body["checks"]); !strings.Contains(checks, "name:incoming ok:true") {
		t.Errorf("readiness: %s", checks)
	}
}
