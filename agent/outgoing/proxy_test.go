package outgoing_test

import (
	"bufio"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/agent/outgoing"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk"
	"google.golang.org/grpc/codes"
)

func thumb(der []byte) [sha256.Size]byte { return sha256.Sum256(der) }

// seen keeps requests that an upstream got.
type seen struct {
	mu  sync.Mutex
	all []*http.Request
}

func (s *seen) handle(w http.ResponseWriter, r *http.Request) {
	_, _ = io.Copy(io.Discard, r.Body) // and the trailers
	s.mu.Lock()
	defer s.mu.Unlock()
	s.all = append(s.all, r)
	fmt.Fprint(w, "upstream")
}

func (s *seen) take() []*http.Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := s.all
	s.all = nil
	return out
}

// wantToken checks that a request has one token, and that it is for an audience.
func wantToken(t testing.TB, r *http.Request, audience string) {
	t.Helper()
	values := r.Header.Values("Authorization")
	if len(values) != 1 || !strings.HasPrefix(values[0], "Bearer ") {
		t.Errorf("the upstream got %q", values)
		return
	}
	got, err := token.Inspect(values[0][len("Bearer "):])
	if err != nil || got.Claims.Audience != audience {
		t.Errorf("the upstream got a token of %v, %v", got, err)
	}
}

// TestReverse: on a unix socket, whatever the program calls it, the upstream gets its own
// host, the path as it was, and the token; over both versions of HTTP.
func TestReverse(t *testing.T) {
	w := newWorld(t)
	var s seen
	at := w.upstream(orders, s.handle)
	p := w.start(false, outgoing.Listener{Upstreams: []outgoing.Upstream{to(at)}})
	for _, http2 := range []bool{false, true} {
		resp, body := get(t, p.client(http2), "http://whatever.example/a%2Fb/../c?q=1;2&x=%zz")
		if resp.StatusCode != 200 || string(body) != "upstream" {
			t.Fatalf("%d %s", resp.StatusCode, body)
		}
		r := s.take()[0]
		wantToken(t, r, "orders")
		if r.Host != strings.TrimPrefix(at, "https://") || r.RequestURI != "/a%2Fb/../c?q=1;2&x=%zz" {
			t.Errorf("the upstream got %s %s", r.Host, r.RequestURI)
		}
		if len(r.TLS.PeerCertificates) == 0 || r.TLS.PeerCertificates[0].URIs[0].String() != payments.String() {
			t.Error("the upstream saw no SVID")
		}
		for _, name := range []string{"X-Forwarded-For", "Via", "Accept-Encoding"} {
			if r.Header.Get(name) != "" {
				t.Errorf("the upstream got %s", name)
			}
		}
	}
	if n := w.tokens.fetched.Load(); n != 1 {
		t.Errorf("%d tokens were fetched", n)
	}
	eventually(t, "the counts", func() bool {
		c := p.Counts()[1]
		return c.Upstream == at && c.Requests[outgoing.Passed] == 2 && c.Open == 0
	})
}

// TestInjection: what a caller writes on the wire in a credential's place reaches no upstream.
func TestInjection(t *testing.T) {
	w := newWorld(t)
	var s seen
	at := w.upstream(orders, s.handle)
	plain, custom := to(at), to(at)
	custom.Header, custom.Path = "X-Api-Token", "/custom"
	p := w.start(false, outgoing.Listener{Upstreams: []outgoing.Upstream{plain, custom}})
	const evil = "Bearer evil"
	for name, c := range map[string]struct {
		request string
		refused int // instead
	}{
		"simple":                 {"GET / HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer evil\r\n\r\n", 0},
		"twice":                  {"GET / HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer evil\r\nAuthorization: Bearer evil\r\n\r\n", 0},
		"odd case":               {"GET / HTTP/1.1\r\nHost: x\r\naUTHORIZATION: Bearer evil\r\n\r\n", 0},
		"underscore":             {"GET /custom HTTP/1.1\r\nHost: x\r\nX_Api-Token: evil\r\nx-api-token: evil\r\nX_API_TOKEN: evil\r\nAuthorization: evil\r\n\r\n", 0},
		"named by Connection":    {"GET / HTTP/1.1\r\nHost: x\r\nConnection: Authorization, close\r\nAuthorization: Bearer evil\r\n\r\n", 0},
		"custom by Connection":   {"GET /custom HTTP/1.1\r\nHost: x\r\nConnection: X-Api-Token\r\nX-Api-Token: evil\r\n\r\n", 0},
		"proxy and other claims": {"GET / HTTP/1.1\r\nHost: x\r\nProxy-Authorization: Basic evil\r\nDPoP: evil\r\nX-Forwarded-Client-Cert: evil\r\nX_Forwarded_Client-Cert: evil\r\nX-Forwarded-User: evil\r\nForwarded: evil\r\nTE: evil\r\nKeep-Alive: evil\r\n\r\n", 0},
		"dayfly's own":           {"GET / HTTP/1.1\r\nHost: x\r\nX-Dayfly-Subject: evil\r\nx_dayfly_scope: evil\r\n\r\n", 0},
		"dots":                   {"GET /custom HTTP/1.1\r\nHost: x\r\nX.Api.Token: evil\r\nX.Forwarded.Client.Cert: evil\r\n\r\n", 0},
		"RFC 9440's":             {"GET / HTTP/1.1\r\nHost: x\r\nClient-Cert: :evil:\r\nClient-Cert-Chain: :evil:\r\n\r\n", 0},
		"trailers":               {"POST / HTTP/1.1\r\nHost: x\r\nTrailer: Authorization, X-Other\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nAuthorization: Bearer evil\r\nX-Other: evil\r\n\r\n", 0},
		"trailers not announced": {"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nAuthorization: Bearer evil\r\n\r\n", 0},
		"user in the URL":        {"GET http://Bearer:evil@x/ HTTP/1.1\r\nHost: x\r\n\r\n", 0},
		"another host":           {"GET http://evil.example/ HTTP/1.1\r\nHost: evil.example\r\n\r\n", 0},
		"two slashes":            {"GET //evil.example/ HTTP/1.1\r\nHost: x\r\n\r\n", 0},
		"an offer of h2c":        {"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: evil\r\n\r\n", 0},
		"folded":                 {"GET / HTTP/1.1\r\nHost: x\r\nX-A: a\r\n Authorization: Bearer evil\r\n\r\n", 0},
		"space before the colon": {"GET / HTTP/1.1\r\nHost: x\r\nAuthorization : Bearer evil\r\n\r\n", 400},
		"a bare CR":              {"GET / HTTP/1.1\r\nHost: x\r\nX-A: a\rAuthorization: Bearer evil\r\n\r\n", 400},
		"NUL":                    {"GET / HTTP/1.1\r\nHost: x\r\nAuthorization\x00: Bearer evil\r\n\r\n", 400},
		"two lengths":            {"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", 400},
		"two hosts":              {"GET / HTTP/1.1\r\nHost: x\r\nHost: evil.example\r\n\r\n", 400},
		"odd transfer-encoding":  {"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", 501},
		"upgrade to another":     {"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\r\n", 501},
		"TRACE":                  {"TRACE / HTTP/1.1\r\nHost: x\r\n\r\n", 405},
		"CONNECT":                {"CONNECT evil.example:443 HTTP/1.1\r\nHost: evil.example:443\r\n\r\n", 405},
		"OPTIONS *":              {"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", 400},
		"up, out of a path":      {"GET /custom/../x HTTP/1.1\r\nHost: x\r\n\r\n", 400},
	} {
		resp, body := p.raw(c.request)
		got := s.take()
		if c.refused != 0 {
			if resp.StatusCode != c.refused || len(got) != 0 {
				t.Errorf("%s: %d %s, and the upstream got %d requests", name, resp.StatusCode, body, len(got))
			}
			continue
		}
		if resp.StatusCode != 200 || len(got) != 1 {
			t.Errorf("%s: %d %s, and the upstream got %d requests", name, resp.StatusCode, body, len(got))
			continue
		}
		r := got[0]
		if r.Host != strings.TrimPrefix(at, "https://") {
			t.Errorf("%s: the upstream is called %s", name, r.Host)
		}
		if r.URL.Path == "/custom" {
			if v := r.Header.Values("X-Api-Token"); len(v) != 1 || !strings.HasPrefix(v[0], "eyJ") || r.Header.Get("Authorization") != "" {
				t.Errorf("%s: the upstream got %q", name, r.Header)
			}
		} else {
			wantToken(t, r, "orders")
		}
		for _, h := range []http.Header{r.Header, r.Trailer} {
			for key, values := range h {
				if strings.Contains(fmt.Sprint(values), "evil") && key != "X-A" {
					t.Errorf("%s: the upstream got %s: %q", name, key, values)
				}
			}
		}
	}
	// What is behind a request whose length is told in two ways is no request of its own.
	p.raw("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: x\r\nAuthorization: " + evil + "\r\n\r\n")
	for _, r := range s.take() {
		wantToken(t, r, "orders")
	}
}

// TestForward: a program's http_proxy gives tokens to the hosts that are configured, and
// refuses all else.
func TestForward(t *testing.T) {
	w := newWorld(t)
	var s seen
	at := w.upstream(orders, s.handle)
	named := to(at)
	named.Host = "orders.example.org"
	v2 := to(at)
	v2.Host, v2.Path, v2.Request.Audience = "orders.example.org", "/v2", "orders2"
	p := w.start(true, outgoing.Listener{Forward: true, Open: true, Upstreams: []outgoing.Upstream{named, v2}})
	c := p.through(nil)
	for path, audience := range map[string]string{"/": "orders", "/v1/x": "orders", "/v2": "orders2", "/v2/x?y": "orders2", "/v20": "orders"} {
		resp, body := get(t, c, "http://ORDERS.example.org"+path)
		got := s.take()
		if resp.StatusCode != 200 || len(got) != 1 {
			t.Fatalf("%s: %d %s", path, resp.StatusCode, body)
		}
		wantToken(t, got[0], audience)
	}
	for _, refused := range []string{"http://other.example.org/", "http://orders.example.org:81/", "http://" + strings.TrimPrefix(at, "https://") + "/", "http://orders.example.org.evil.test/"} {
		resp, body := get(t, c, refused)
		wantRefusal(t, resp, body, 403, "UPSTREAM_NOT_CONFIGURED")
	}
	resp, body := p.raw("CONNECT orders.example.org:443 HTTP/1.1\r\nHost: orders.example.org:443\r\n\r\n")
	wantRefusal(t, resp, body, 405, "CONNECT_NOT_SUPPORTED")
	if got := resp.Header.Get("Proxy-Status"); got != `dayfly-agent; details="CONNECT_NOT_SUPPORTED"` {
		t.Errorf("Proxy-Status: %s", got)
	}
	if !strings.Contains(string(body), "http://orders.example.org/") {
		t.Errorf("what to do is not said: %s", body)
	}
	resp, body = p.raw("GET / HTTP/1.1\r\nHost: orders.example.org\r\n\r\n")
	wantRefusal(t, resp, body, 400, "NOT_A_PROXY_REQUEST")
	resp, body = p.raw("GET ftp://orders.example.org/ HTTP/1.1\r\nHost: orders.example.org\r\n\r\n")
	wantRefusal(t, resp, body, 400, "REQUEST_INVALID")
	resp, body = p.raw("GET http://orders.example.org/v2/%2e%2e/x HTTP/1.1\r\nHost: orders.example.org\r\n\r\n")
	wantRefusal(t, resp, body, 400, "PATH_AMBIGUOUS")
	resp, body = p.raw("GET http://orders.example.org/ HTTP/1.1\r\nHost: evil.example\r\n\r\n") // the URL counts
	if got := s.take(); resp.StatusCode != 200 || len(got) != 1 || got[0].Host != strings.TrimPrefix(at, "https://") {
		t.Errorf("%d %s", resp.StatusCode, body)
	}
	if got := s.take(); len(got) != 0 {
		t.Errorf("the upstream got %d more requests", len(got))
	}
}

// TestRefusesAtOnce: whoever is refused hears it without having sent its body; and a listener
// has no more connections than it may.
func TestRefusesAtOnce(t *testing.T) {
	w := newWorld(t)
	var s seen
	up := to(w.upstream(orders, s.handle))
	up.Path = "/only"
	p := w.start(false, outgoing.Listener{MaxConnections: 1, Upstreams: []outgoing.Upstream{up}})
	conn, err := p.dial()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(patience))
	if _, err := io.WriteString(conn, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	from := bufio.NewReader(conn)
	resp, err := http.ReadResponse(from, nil)
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	wantRefusal(t, resp, body, 403, "UPSTREAM_NOT_CONFIGURED")
	if second, err := p.client(false).Get("http://x/only"); err == nil {
		t.Errorf("a second connection: %d", second.StatusCode)
	}
	if rest, err := io.ReadAll(from); err != nil || len(rest) > 0 {
		t.Errorf("the connection stays: %q, %v", rest, err)
	}
}

// TestSecret: on loopback, who doesn't know the secret is refused, and what it shows goes no
// further; the file is made once, and kept.
func TestSecret(t *testing.T) {
	w := newWorld(t)
	var s seen
	up := to(w.upstream(orders, s.handle))
	file := filepath.Join(w.dir, "secret")
	p := w.start(true, outgoing.Listener{Secret: file, Upstreams: []outgoing.Upstream{up}})
	var text string
	eventually(t, "the secret", func() bool {
		raw, err := os.ReadFile(file)
		text = strings.TrimSpace(string(raw))
		return err == nil
	})
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 || len(text) < 26 {
		t.Errorf("%v %v, %d bytes", info.Mode(), err, len(text))
	}
	for _, header := range []string{"X-None: x", "Authorization: Bearer x", "Authorization: Basic " + text, "Authorization: " + text, "Proxy-Authorization: Bearer " + text + "x"} {
		resp, body := p.raw("GET / HTTP/1.1\r\nHost: localhost\r\n" + header + "\r\n\r\n")
		wantRefusal(t, resp, body, 401, "PROXY_AUTHORIZATION_INVALID")
	}
	basic, err := http.NewRequest("GET", "http://localhost/", nil)
	if err != nil {
		t.Fatal(err)
	}
	basic.SetBasicAuth("anybody", text)
	for _, header := range []string{"Authorization: " + basic.Header.Get("Authorization"), "Authorization: bearer " + text, "Proxy-Authorization: Bearer " + text} {
		resp, body := p.raw("GET / HTTP/1.1\r\nHost: " + p.addr + "\r\n" + header + "\r\n\r\n")
		got := s.take()
		if resp.StatusCode != 200 || len(got) != 1 {
			t.Fatalf("%s: %d %s", header, resp.StatusCode, body)
		}
		wantToken(t, got[0], "orders")
	}
	for header, reason := range map[string]string{
		"Host: localhost\r\nOrigin: null": "BROWSER_OR_PROXY", "Host: localhost\r\nSec-Fetch-Site: none": "BROWSER_OR_PROXY", "Host: localhost\r\nVia: 1.1 x": "BROWSER_OR_PROXY",
		"Host: rebound.example": "HOST_NOT_LOOPBACK", "Host: 127.0.0.1.rebound.example": "HOST_NOT_LOOPBACK", "Host: 10.0.0.1": "HOST_NOT_LOOPBACK",
	} {
		resp, body := p.raw("GET / HTTP/1.1\r\n" + header + "\r\nAuthorization: Bearer " + text + "\r\n\r\n")
		wantRefusal(t, resp, body, 403, reason)
	}
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	forward := up
	forward.Host = "orders"
	p = w.start(true, outgoing.Listener{Forward: true, Secret: file, Upstreams: []outgoing.Upstream{forward}})
	if resp, body := get(t, p.through(url.UserPassword("me", text)), "http://orders/"); resp.StatusCode != 200 {
		t.Errorf("after a restart: %d %s", resp.StatusCode, body)
	}
	resp, body := get(t, p.through(nil), "http://orders/")
	wantRefusal(t, resp, body, 407, "PROXY_AUTHORIZATION_INVALID")
	if resp.Header.Get("Proxy-Authenticate") == "" {
		t.Error("no challenge")
	}
}

// TestSecretFile: a file that others may know is refused.
func TestSecretFile(t *testing.T) {
	w := newWorld(t)
	up := to(w.upstream(orders, func(http.ResponseWriter, *http.Request) {}))
	for name, make := range map[string]func(path string) error{
		"wide":   func(path string) error { return os.WriteFile(path, []byte(strings.Repeat("x", 20)), 0o644) },
		"short":  func(path string) error { return os.WriteFile(path, []byte("x"), 0o600) },
		"odd":    func(path string) error { return os.WriteFile(path, []byte(strings.Repeat("x:", 20)), 0o600) },
		"link":   func(path string) error { return os.Symlink("/dev/null", path) },
		"folder": func(path string) error { return os.Mkdir(path, 0o700) },
	} {
		path := filepath.Join(w.dir, name)
		if err := make(path); err != nil {
			t.Fatal(err)
		}
		p := w.start(true, outgoing.Listener{Secret: path, Upstreams: []outgoing.Upstream{up}})
		eventually(t, "the proxy to end", func() bool { _, err := p.dial(); return err != nil })
		if err := p.stop(); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v", name, err)
		}
		p.stop = func() error { return nil }
	}
}

// TestCertificate: an upstream that isn't who it must be gets no token, and no request.
func TestCertificate(t *testing.T) {
	w := newWorld(t)
	var s seen
	at := w.upstream(other, s.handle)
	bearer := outgoing.Upstream{URL: at, Path: "/bearer", Request: sdk.Request{Audience: "orders"}}
	gone := to("https://127.0.0.1:1")
	gone.Path = "/gone"
	p := w.start(false, outgoing.Listener{Upstreams: []outgoing.Upstream{to(at), bearer, gone}})
	c := p.client(false)
	for path, reason := range map[string]string{"/": "UPSTREAM_CERTIFICATE_INVALID", "/bearer": "UPSTREAM_CERTIFICATE_INVALID", "/gone": "UPSTREAM_UNREACHABLE"} {
		resp, body := get(t, c, "http://x"+path)
		wantRefusal(t, resp, body, 502, reason)
	}
	if len(s.take()) != 0 {
		t.Error("the upstream got a request")
	}
	if log := w.log.String(); strings.Count(log, "UPSTREAM_CERTIFICATE_INVALID") != 2 {
		t.Errorf("the log: %s", log)
	}
}

// TestNoToken: a refusal of the broker's is a 502 with its reason; one that passes is a 503
// that says when to come back.
func TestNoToken(t *testing.T) {
	w := newWorld(t)
	var s seen
	at := w.upstream(orders, s.handle)
	p := w.start(false, outgoing.Listener{Upstreams: []outgoing.Upstream{to(at)}})
	c := p.client(false)
	for _, k := range []struct {
		err    *sdk.Error
		status int
		reason string
		after  string
	}{
		{&sdk.Error{Code: codes.PermissionDenied, Reason: "POLICY_DENIED", Message: "no"}, 502, "POLICY_DENIED", ""},
		{&sdk.Error{Code: codes.PermissionDenied, Reason: "IDENTITY_LOCKED", Message: "no"}, 502, "IDENTITY_LOCKED", ""},
		{&sdk.Error{Code: codes.Unavailable, Reason: "CREDENTIAL_REVOKED", Message: "no"}, 502, "CREDENTIAL_REVOKED", ""},
		{&sdk.Error{Code: codes.Unavailable, Reason: "BROKER_UNREACHABLE", Message: "no"}, 503, "BROKER_UNREACHABLE", "1"},
		{&sdk.Error{Code: codes.ResourceExhausted, Reason: "ISSUE_RATE_LIMITED", Message: "no", Metadata: map[string]string{"retry_after": "6500ms"}}, 503, "ISSUE_RATE_LIMITED", "7"},
		{&sdk.Error{Code: codes.Unavailable}, 503, "CREDENTIAL_UNAVAILABLE", "1"},
	} {
		w.tokens.set(func() { w.tokens.err = k.err; clear(w.tokens.sources) })
		resp, body := get(t, c, "http://x/")
		wantRefusal(t, resp, body, k.status, k.reason)
		if got := resp.Header.Get("Retry-After"); got != k.after {
			t.Errorf("%s: Retry-After: %q", k.reason, got)
		}
	}
	if len(s.take()) != 0 {
		t.Error("the upstream got a request")
	}
}

// TestBinding: a bound token goes to no upstream that isn't shown who calls, whatever was
// asked for.
func TestBinding(t *testing.T) {
	w := newWorld(t)
	var s seen
	at := "http://" + plainServer(t, s.handle)
	up := outgoing.Upstream{URL: at, Insecure: true, Request: sdk.Request{Audience: "web"}}
	p := w.start(false, outgoing.Listener{Upstreams: []outgoing.Upstream{up}})
	if resp, body := get(t, p.client(false), "http://x/"); resp.StatusCode != 200 {
		t.Fatalf("%d %s", resp.StatusCode, body)
	}
	wantToken(t, s.take()[0], "web")
	strict := &strictTokens{w.tokens}
	p = w.start(false, outgoing.Listener{Upstreams: []outgoing.Upstream{up}}, func(c *outgoing.Config) { c.Tokens = strict })
	resp, body := get(t, p.client(false), "http://x/")
	wantRefusal(t, resp, body, 502, "BINDING_NEEDS_MTLS")
	if len(s.take()) != 0 {
		t.Error("the upstream got a request")
	}
}

// strictTokens binds what was to be a bearer, as policy may.
type strictTokens struct{ *tokens }

func (s *strictTokens) Token(context.Context, sdk.Request) (*sdk.Credential, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mint(sdk.Request{Audience: "web"}, token.BindingSPIFFE)
}

func plainServer(t testing.TB, h http.HandlerFunc) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	s := &http.Server{Handler: h, Protocols: protocols}
	go func() { _ = s.Serve(l) }()
	t.Cleanup(func() { _ = s.Close() })
	return l.Addr().String()
}
