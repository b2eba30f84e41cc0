package web_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
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
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"

	"github.com/dayflyhq/dayfly/broker/keys"
	"github.com/dayflyhq/dayfly/broker/web"
	"github.com/dayflyhq/dayfly/proto/token"
)

const issuer = "https://broker.example.org"

func ecKey(t *testing.T) token.PublicKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	pub, err := token.NewPublicKey(token.ES256, k.Public())
	if err != nil {
		t.Fatal(err)
	}
	return pub
}

func edKey(t *testing.T) token.PublicKey {
	t.Helper()
	k, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	pub, err := token.NewPublicKey(token.EdDSA, k)
	if err != nil {
		t.Fatal(err)
	}
	return pub
}

func mustPublic(t testing.TB, cfg web.PublicConfig) http.Handler {
	t.Helper()
	if cfg.Issuer == "" {
		cfg.Issuer = issuer
	}
	if cfg.Keys == nil {
		cfg.Keys = func() []token.PublicKey { return nil }
	}
	h, err := web.Public(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func mustAdmin(t *testing.T, problems ...web.Problem) http.Handler {
	t.Helper()
	registry := prometheus.NewRegistry()
	counter := prometheus.NewCounter(prometheus.CounterOpts{Name: "dayfly_test_total", Help: "Of this test."})
	registry.MustRegister(counter)
	counter.Add(7)
	h, err := web.Admin(web.AdminConfig{Ready: func() []web.Problem { return problems }, Metrics: registry})
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func do(h http.Handler, method, path string, header ...string) *http.Response {
	r := httptest.NewRequest(method, "http://localhost"+path, nil)
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w.Result()
}

func body(t *testing.T, r *http.Response) string {
	t.Helper()
	b, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func decode(t *testing.T, r *http.Response) map[string]any {
	t.Helper()
	if ct := r.Header.Get("Content-Type"); ct != "application/json" {
		t.Errorf("Content-Type is %q", ct)
	}
	var v map[string]any
	if err := json.Unmarshal([]byte(body(t, r)), &v); err != nil {
		t.Fatal(err)
	}
	return v
}

func TestDiscovery(t *testing.T) {
	h := mustPublic(t, web.PublicConfig{})
	openID := map[string]any{
		"issuer": issuer, "jwks_uri": issuer + "/jwks.json",
		"response_types_supported": []any{"id_token"}, "grant_types_supported": []any{}, "tls_client_certificate_bound_access_tokens": true,
		"subject_types_supported":               []any{"public"},
		"id_token_signing_alg_values_supported": []any{"ES256"},
		"claims_supported":                      []any{"iss", "sub", "aud", "exp", "nbf", "iat", "jti", "client_id", "scope", "act", "cnf", "txn"},
	}
	oauth := map[string]any{
		"issuer": issuer, "jwks_uri": issuer + "/jwks.json",
		"response_types_supported": []any{"id_token"}, "grant_types_supported": []any{},
		"tls_client_certificate_bound_access_tokens": true,
	}
	for path, want := range map[string]map[string]any{
		"/.well-known/openid-configuration":       openID,
		"/.well-known/oauth-authorization-server": oauth,
	} {
		r := do(h, http.MethodGet, path)
		if r.StatusCode != http.StatusOK {
			t.Fatalf("%s: %s", path, r.Status)
		}
		if got := decode(t, r); !reflect.DeepEqual(got, want) {
			t.Errorf("%s:\ngot  %v\nwant %v", path, got, want)
		}
	}
}

func TestDiscoveryNamesEveryAlgorithmInUse(t *testing.T) {
	published := []token.PublicKey{ecKey(t), edKey(t), ecKey(t)}
	h := mustPublic(t, web.PublicConfig{Algorithm: token.EdDSA, Keys: func() []token.PublicKey { return published }})
	got := decode(t, do(h, http.MethodGet, "/.well-known/openid-configuration"))["id_token_signing_alg_values_supported"]
	if want := []any{"ES256", "EdDSA"}; !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// RFC 8414 section 3.1 puts the well-known part before the issuer's path, OpenID
// Connect Discovery section 4 behind it.
func TestIssuerWithPath(t *testing.T) {
	h := mustPublic(t, web.PublicConfig{Issuer: issuer + "/a/b"})
	for path, want := range map[string]int{
		"/a/b/.well-known/openid-configuration":       200,
		"/.well-known/oauth-authorization-server/a/b": 200,
		"/a/b/jwks.json":                          200,
		"/.well-known/openid-configuration":       404,
		"/.well-known/oauth-authorization-server": 404,
		"/jwks.json":                              404,
	} {
		if r := do(h, http.MethodGet, path); r.StatusCode != want {
			t.Errorf("%s: %d, want %d", path, r.StatusCode, want)
		}
	}
	if got := decode(t, do(h, http.MethodGet, "/a/b/.well-known/openid-configuration"))["jwks_uri"]; got != issuer+"/a/b/jwks.json" {
		t.Errorf("jwks_uri is %v", got)
	}
}

func TestJWKS(t *testing.T) {
	published := []token.PublicKey{ecKey(t)}
	h := mustPublic(t, web.PublicConfig{Keys: func() []token.PublicKey { return published }})
	want, err := keys.JWKS(published)
	if err != nil {
		t.Fatal(err)
	}

	first := do(h, http.MethodGet, "/jwks.json")
	if got := body(t, first); first.StatusCode != http.StatusOK || got != string(want) {
		t.Errorf("got %s %s, want %s", first.Status, got, want)
	}
	if cc := first.Header.Get("Cache-Control"); cc != "public, max-age=60, must-revalidate" {
		t.Errorf("Cache-Control is %q", cc)
	}
	etag := first.Header.Get("ETag")
	if len(etag) != 34 {
		t.Fatalf("ETag is %q", etag)
	}

	again := do(h, http.MethodGet, "/jwks.json", "If-None-Match", etag)
	if b := body(t, again); again.StatusCode != http.StatusNotModified || b != "" {
		t.Errorf("same keys: %s %q", again.Status, b)
	}
	published = append(published, ecKey(t))
	changed := do(h, http.MethodGet, "/jwks.json", "If-None-Match", etag)
	if changed.StatusCode != http.StatusOK || changed.Header.Get("ETag") == etag {
		t.Errorf("other keys: %s, ETag %s", changed.Status, changed.Header.Get("ETag"))
	}
	published = nil
	if got := body(t, do(h, http.MethodGet, "/jwks.json")); got != `{"keys":[]}` {
		t.Errorf("no keys: %s", got)
	}
}

func TestJWKSMaxAge(t *testing.T) {
	h := mustPublic(t, web.PublicConfig{JWKSMaxAge: 5 * time.Second})
	if cc := do(h, http.MethodGet, "/jwks.json").Header.Get("Cache-Control"); cc != "public, max-age=5, must-revalidate" {
		t.Errorf("Cache-Control is %q", cc)
	}
}

func TestKeyThatCannotBeShown(t *testing.T) {
	var log bytes.Buffer
	h := mustPublic(t, web.PublicConfig{
		Keys: func() []token.PublicKey { return []token.PublicKey{{Key: "internal detail"}} },
		Log:  slog.New(slog.NewTextHandler(&log, nil)),
	})
	r := do(h, http.MethodGet, "/jwks.json")
	if r.StatusCode != http.StatusInternalServerError {
		t.Errorf("got %s", r.Status)
	}
	if got := decode(t, r); got["reason"] != "INTERNAL" || strings.Contains(fmt.Sprint(got), "string") {
		t.Errorf("got %v", got)
	}
	if cc := r.Header.Get("Cache-Control"); cc != "no-store" {
		t.Errorf("Cache-Control of an error is %q", cc)
	}
	if !strings.Contains(log.String(), "JWK") {
		t.Errorf("log is %q", log.String())
	}
}

var everyRoute = map[string][]string{
	"public": {"/.well-known/openid-configuration", "/.well-known/oauth-authorization-server", "/jwks.json"},
	"admin":  {"/healthz", "/readyz", "/metrics"},
}

func TestEveryRoute(t *testing.T) {
	handlers := map[string]http.Handler{"public": mustPublic(t, web.PublicConfig{}), "admin": mustAdmin(t)}
	for name, paths := range everyRoute {
		for _, path := range paths {
			t.Run(name+path, func(t *testing.T) {
				h := handlers[name]
				get := do(h, http.MethodGet, path)
				if get.StatusCode != http.StatusOK || body(t, get) == "" {
					t.Errorf("GET: %s", get.Status)
				}
				if head := do(h, http.MethodHead, path); head.StatusCode != http.StatusOK ||
					head.Header.Get("Content-Type") != get.Header.Get("Content-Type") {
					t.Errorf("HEAD: %s %v", head.Status, head.Header)
				}
				for _, method := range []string{"POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"} {
					r := do(h, method, path)
					if r.StatusCode != http.StatusMethodNotAllowed || r.Header.Get("Allow") != "GET, HEAD" {
						t.Errorf("%s: %s, Allow %q", method, r.Status, r.Header.Get("Allow"))
					}
					if got := decode(t, r); got["reason"] != "METHOD_NOT_ALLOWED" || got["code"] != 405.0 || got["hint"] == "" {
						t.Errorf("%s: %v", method, got)
					}
				}
				checkHeaders(t, get)
				if other := do(h, http.MethodGet, path+"/"); other.StatusCode != http.StatusNotFound {
					t.Errorf("with a slash: %s", other.Status)
				}
			})
		}
	}
}

func TestNotFound(t *testing.T) {
	for name, h := range map[string]http.Handler{"public": mustPublic(t, web.PublicConfig{}), "admin": mustAdmin(t)} {
		for _, path := range []string{"/", "/debug/pprof/", "/debug/vars", "//jwks.json", "/../jwks.json", "/JWKS.json"} {
			r := do(h, http.MethodGet, path)
			if r.StatusCode != http.StatusNotFound {
				t.Errorf("%s %s: %s", name, path, r.Status)
			}
			checkHeaders(t, r)
			if got := decode(t, r); got["reason"] != "NOT_FOUND" {
				t.Errorf("%s %s: %v", name, path, got)
			}
		}
	}
	for _, path := range everyRoute["admin"] {
		if r := do(mustPublic(t, web.PublicConfig{}), http.MethodGet, path); r.StatusCode != http.StatusNotFound {
			t.Errorf("public %s: %s", path, r.Status)
		}
	}
}

func checkHeaders(t *testing.T, r *http.Response) {
	t.Helper()
	for name, want := range map[string]string{
		"X-Content-Type-Options":  "nosniff",
		"Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
		"Referrer-Policy":         "no-referrer",
	} {
		if got := r.Header.Get(name); got != want {
			t.Errorf("%s is %q, want %q", name, got, want)
		}
	}
	if r.Header.Get("Cache-Control") == "" {
		t.Error("no Cache-Control")
	}
}

func TestPublicRefusesBadConfig(t *testing.T) {
	none := func() []token.PublicKey { return nil }
	for _, iss := range []string{
		"", "broker", "/broker", "https:", "https:opaque", "ftp://broker.example.org", "http://broker.example.org",
		"https://broker.example.org/", "https://broker.example.org/a/", "https://broker.example.org?a=b",
		"https://broker.example.org?", "https://broker.example.org#a", "https://broker.example.org#",
		"https://user@broker.example.org", "https://%zz", "http://localhost.example.org", "http://127.0.0.1.example.org",
	} {
		if _, err := web.Public(web.PublicConfig{Issuer: iss, Keys: none}); err == nil {
			t.Errorf("issuer %q was accepted", iss)
		}
	}
	for _, iss := range []string{"https://b.example.org", "https://b.example.org:8443/x", "http://127.0.0.1:80", "http://[::1]:80", "http://[::1]", "http://localhost"} {
		if _, err := web.Public(web.PublicConfig{Issuer: iss, Keys: none}); err != nil {
			t.Errorf("issuer %q: %v", iss, err)
		}
	}
	_, err := web.Public(web.PublicConfig{Issuer: "x", Algorithm: "PS256", JWKSMaxAge: time.Hour})
	if err == nil {
		t.Fatal("accepted")
	}
	for _, want := range []string{"issuer", "PS256", "max-age 1h", "keys"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q doesn't mention %q", err, want)
		}
	}
}

func TestAdminRefusesBadConfig(t *testing.T) {
	_, err := web.Admin(web.AdminConfig{})
	if err == nil || !strings.Contains(err.Error(), "readiness") || !strings.Contains(err.Error(), "metrics") {
		t.Errorf("got %v", err)
	}
}

func TestHealth(t *testing.T) {
	r := do(mustAdmin(t, web.Problem{Reason: "STORE_FULL"}), http.MethodGet, "/healthz")
	if got := decode(t, r); r.StatusCode != http.StatusOK || got["status"] != "ok" {
		t.Errorf("got %s %v: a problem isn't a reason to restart the process", r.Status, got)
	}
}

func TestReadiness(t *testing.T) {
	bad := web.Problem{Reason: "STORE_FULL", Message: "the disk is full", Hint: "free space"}
	warn := web.Problem{Reason: "CLOCK_OFF", Message: "the clock is 4 s off", Warning: true}
	badJSON := map[string]any{"reason": "STORE_FULL", "message": "the disk is full", "hint": "free space"}
	warnJSON := map[string]any{"reason": "CLOCK_OFF", "message": "the clock is 4 s off"}
	for _, test := range []struct {
		name     string
		problems []web.Problem
		code     int
		want     map[string]any
	}{
		{"well", nil, 200, map[string]any{"status": "ready", "problems": []any{}, "warnings": []any{}}},
		{"warning", []web.Problem{warn}, 200, map[string]any{"status": "ready", "problems": []any{}, "warnings": []any{warnJSON}}},
		{"both", []web.Problem{bad, warn}, 503, map[string]any{"status": "not_ready", "problems": []any{badJSON}, "warnings": []any{warnJSON}}},
	} {
		r := do(mustAdmin(t, test.problems...), http.MethodGet, "/readyz")
		if got := decode(t, r); r.StatusCode != test.code || !reflect.DeepEqual(got, test.want) {
			t.Errorf("%s: %d %v, want %d %v", test.name, r.StatusCode, got, test.code, test.want)
		}
	}
}

func TestMetrics(t *testing.T) {
	if got := body(t, do(mustAdmin(t), http.MethodGet, "/metrics")); !strings.Contains(got, "dayfly_test_total 7") {
		t.Errorf("got %s", got)
	}
}

func TestAdminAnswersLoopbackHostsOnly(t *testing.T) {
	h := mustAdmin(t)
	for host, want := range map[string]int{
		"localhost": 200, "localhost:9090": 200, "LOCALHOST": 200, "127.0.0.1:9090": 200, "127.9.9.9": 200, "[::1]:9090": 200, "[::1]": 200,
		"evil.example.org": 421, "evil.example.org:9090": 421, "localhost.example.org": 421, "127.0.0.1.example.org": 421, "10.0.0.1": 421, "": 421,
	} {
		r := httptest.NewRequest(http.MethodGet, "/metrics", nil)
		r.Host = host
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if w.Code != want {
			t.Errorf("Host %q: %d, want %d", host, w.Code, want)
		}
		checkHeaders(t, w.Result())
	}
}

func TestTracing(t *testing.T) {
	spans := tracetest.NewSpanRecorder()
	provider := sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(spans))
	h := mustPublic(t, web.PublicConfig{TracerProvider: provider})
	const remote = "4bf92f3577b34da6a3ce929d0e0e4736"
	if r := do(h, http.MethodGet, "/jwks.json", "Traceparent", "00-"+remote+"-00f067aa0ba902b7-01"); r.StatusCode != http.StatusOK {
		t.Fatal(r.Status)
	}
	if r := do(h, http.MethodGet, "/somebodys-token"); r.StatusCode != http.StatusNotFound {
		t.Fatal(r.Status)
	}
	ended := spans.Ended()
	if len(ended) != 1 { // of our own path, and none that holds another
		t.Fatalf("%d spans, want 1", len(ended))
	}
	if got := ended[0].SpanContext().TraceID().String(); got == remote {
		t.Error("a stranger chose the trace ID")
	}
	if links := ended[0].Links(); len(links) != 1 || links[0].SpanContext.TraceID().String() != remote {
		t.Errorf("links are %v", links)
	}
}

// serving is a server under test.
type serving struct {
	addr string
	stop context.CancelFunc
	done chan error
}

func serve(t *testing.T, h http.Handler) *serving {
	t.Helper()
	ln := listen(t, "tcp", "127.0.0.1:0")
	ctx, cancel := context.WithCancel(t.Context())
	s := &serving{ln.Addr().String(), cancel, make(chan error, 1)}
	go func() { s.done <- web.Serve(ctx, ln, h, nil) }()
	t.Cleanup(cancel)
	return s
}

func (s *serving) wait(t *testing.T) error {
	t.Helper()
	select {
	case err := <-s.done:
		return err
	case <-time.After(time.Minute):
		t.Fatal("the server didn't end")
		return nil
	}
}

func listen(t testing.TB, network, addr string) net.Listener {
	t.Helper()
	ln, err := net.Listen(network, addr)
	if err != nil {
		t.Fatal(err)
	}
	return ln
}

func TestServeFinishesWhatWasPromised(t *testing.T) {
	entered, leave := make(chan struct{}), make(chan struct{})
	s := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		close(entered)
		<-leave
		if err := r.Context().Err(); err != nil {
			t.Errorf("the request was cut off: %v", err)
		}
		_, _ = io.WriteString(w, "promised")
	}))
	answer := make(chan string, 1)
	go func() {
		r, err := http.Get("http://" + s.addr)
		if err != nil {
			answer <- err.Error()
			return
		}
		defer r.Body.Close()
		b, _ := io.ReadAll(r.Body)
		answer <- string(b)
	}()
	<-entered
	s.stop()
	// The listener closes first: then a new connection is refused while the old request is under way.
	for deadline := time.Now().Add(time.Minute); ; {
		conn, err := net.Dial("tcp", s.addr)
		if err != nil {
			break
		}
		conn.Close()
		if time.Now().After(deadline) {
			t.Fatal("the listener stays open")
		}
	}
	close(leave)
	if err := s.wait(t); err != nil {
		t.Error(err)
	}
	if got := <-answer; got != "promised" {
		t.Errorf("got %q", got)
	}
}

func TestServeFailsWithItsListener(t *testing.T) {
	ln := listen(t, "tcp", "127.0.0.1:0")
	ln.Close()
	if err := web.Serve(t.Context(), ln, http.NotFoundHandler(), nil); !errors.Is(err, net.ErrClosed) {
		t.Errorf("got %v, want %v", err, net.ErrClosed)
	}
}

func TestServeBoundsRequests(t *testing.T) {
	read := make(chan error, 1)
	s := serve(t, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		_, err := io.Copy(io.Discard, r.Body)
		read <- err
	}))
	r, err := http.Post("http://"+s.addr, "text/plain", bytes.NewReader(make([]byte, 100<<10)))
	if err == nil {
		r.Body.Close()
	}
	var tooLarge *http.MaxBytesError
	if err := <-read; !errors.As(err, &tooLarge) {
		t.Errorf("reading a body of 100 KiB: %v, want a %T", err, tooLarge)
	}

	conn, err := net.Dial("tcp", s.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	go func() { // the server may stop reading before the end
		_, _ = fmt.Fprintf(conn, "GET / HTTP/1.1\r\nHost: localhost\r\nX: %s\r\n\r\n", strings.Repeat("a", 64<<10))
	}()
	answer, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
		t.Errorf("64 KiB of headers: %s", answer.Status)
	}
	s.stop()
	if err := s.wait(t); err != nil {
		t.Error(err)
	}
}

// elsewhere is a listener that claims an address of its own.
type elsewhere struct {
	net.Listener
	addr net.Addr
}

func (l elsewhere) Addr() net.Addr { return l.addr }

// Connections that say nothing, or a byte now and then, give way to others.
func TestServeBoundsConnections(t *testing.T) {
	s := serve(t, http.NotFoundHandler())
	began := time.Now()
	var conns []net.Conn
	for range web.MaxConnections + 50 {
		c, err := net.Dial("tcp", s.addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		_, _ = c.Write([]byte("G"))
		conns = append(conns, c)
	}
	slow := time.Since(began) > web.ReadHeaderTimeout/2 // then they may be answered that they are
	for _, c := range conns[:50] {
		_ = c.SetReadDeadline(time.Now().Add(time.Minute))
		if _, err := c.Read(make([]byte, 1)); errors.Is(err, os.ErrDeadlineExceeded) || err == nil && !slow {
			t.Fatalf("one of the oldest stands: %v", err)
		}
	}
	r, err := http.Get("http://" + s.addr + "/")
	if err != nil || r.StatusCode != http.StatusNotFound {
		t.Fatalf("beside them: %v, %v", r, err)
	}
	r.Body.Close()
}

func TestServeAdminRefusesOtherListeners(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel() // one that isn't refused ends at once
	for _, addr := range []net.Addr{
		&net.TCPAddr{IP: net.IPv4zero, Port: 9090}, &net.TCPAddr{IP: net.IPv6zero, Port: 9090}, &net.TCPAddr{Port: 9090},
		&net.TCPAddr{IP: net.IPv4(10, 0, 0, 1), Port: 9090}, &net.IPAddr{IP: net.IPv4(127, 0, 0, 1)},
	} {
		ln := listen(t, "tcp", "127.0.0.1:0")
		err := web.ServeAdmin(ctx, elsewhere{ln, addr}, mustAdmin(t), nil)
		if !errors.Is(err, web.ErrNotLoopback) {
			t.Errorf("%v: got %v, want %v", addr, err, web.ErrNotLoopback)
		}
		if err := ln.Close(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("%v: the listener was left open (%v)", addr, err)
		}
	}
}

func TestServeAdmin(t *testing.T) {
	dir, err := os.MkdirTemp("", "df")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	for network, addr := range map[string]string{"tcp": "127.0.0.1:0", "unix": filepath.Join(dir, "a.sock")} {
		t.Run(network, func(t *testing.T) {
			ln := listen(t, network, addr)
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error, 1)
			go func() { done <- web.ServeAdmin(ctx, ln, mustAdmin(t), nil) }()
			transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, network, ln.Addr().String())
			}}
			defer transport.CloseIdleConnections()
			r, err := (&http.Client{Transport: transport}).Get("http://localhost/healthz")
			if err != nil {
				t.Fatal(err)
			}
			defer r.Body.Close()
			if r.StatusCode != http.StatusOK {
				t.Error(r.Status)
			}
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
	}
}
