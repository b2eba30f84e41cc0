package sdk_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/credentials/local"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

func fixedSource(t *testing.T) *sdk.TokenSource {
	t.Helper()
	s, err := sdk.NewTokenSource(sdk.SourceConfig{Fetch: func(context.Context) (*sdk.Credential, error) {
		return &sdk.Credential{Token: token.NewSecret(secretText), Grant: "g", Expires: time.Now().Add(time.Hour)}, nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

func failingSource(t *testing.T, err error) *sdk.TokenSource {
	t.Helper()
	s, cfgErr := sdk.NewTokenSource(sdk.SourceConfig{Fetch: func(context.Context) (*sdk.Credential, error) { return nil, err }})
	if cfgErr != nil {
		t.Fatal(cfgErr)
	}
	t.Cleanup(s.Close)
	return s
}

// A redirect to another origin goes there without the token, and so does what follows.
func TestTransport(t *testing.T) {
	got := map[string]string{}
	record := func(w http.ResponseWriter, r *http.Request) { got[r.Host+r.URL.Path] = r.Header.Get("Authorization") }
	var home, away *httptest.Server
	away = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		record(w, r)
		if r.URL.Path == "/back" {
			http.Redirect(w, r, home.URL+"/final", http.StatusFound)
		}
	}))
	defer away.Close()
	home = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		record(w, r)
		switch r.URL.Path {
		case "/here":
			http.Redirect(w, r, "/final", http.StatusFound)
		case "/there":
			http.Redirect(w, r, away.URL+"/final", http.StatusFound)
		case "/round":
			http.Redirect(w, r, away.URL+"/back", http.StatusFound)
		}
	}))
	defer home.Close()
	client := &http.Client{Transport: &sdk.Transport{Source: fixedSource(t)}}
	homeHost, awayHost := strings.TrimPrefix(home.URL, "http://"), strings.TrimPrefix(away.URL, "http://")
	const bearer = "Bearer " + secretText
	tests := []struct {
		path string
		want map[string]string
	}{
		{"/final", map[string]string{homeHost + "/final": bearer}},
		{"/here", map[string]string{homeHost + "/here": bearer, homeHost + "/final": bearer}},
		{"/there", map[string]string{homeHost + "/there": bearer, awayHost + "/final": ""}},
		{"/round", map[string]string{homeHost + "/round": bearer, awayHost + "/back": "", homeHost + "/final": ""}},
	}
	for _, tt := range tests {
		clear(got)
		resp, err := client.Get(home.URL + tt.path)
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		for at, want := range tt.want {
			if h, ok := got[at]; !ok || h != want {
				t.Errorf("%s: %s got %q (%v), want %q", tt.path, at, h, ok, want)
			}
		}
	}
}

type closer struct {
	io.Reader
	closed bool
}

func (c *closer) Close() error { c.closed = true; return nil }

type never struct{ t *testing.T }

func (n never) RoundTrip(r *http.Request) (*http.Response, error) {
	n.t.Errorf("sent to %s", r.URL)
	return nil, errors.New("never")
}

func TestTransportRefuses(t *testing.T) {
	away := &sdk.Error{Code: codes.Unavailable, Reason: "STORE_FULL", Message: "full"}
	tests := []struct {
		name, url string
		source    *sdk.TokenSource
		want      error
	}{
		{"plain http", "http://orders.example.org/", fixedSource(t), sdk.ErrPlaintext},
		{"a name that begins like loopback", "http://127.0.0.1.example.org/", fixedSource(t), sdk.ErrPlaintext},
		{"no credential", "https://orders.example.org/", failingSource(t, away), away},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			body := &closer{Reader: strings.NewReader("x")}
			req, err := http.NewRequest("POST", tt.url, body)
			if err != nil {
				t.Fatal(err)
			}
			_, err = (&sdk.Transport{Source: tt.source, Base: never{t}}).RoundTrip(req)
			if !errors.Is(err, tt.want) || !body.closed || req.Header.Get("Authorization") != "" {
				t.Errorf("got %v, body closed %v, header %v", err, body.closed, req.Header)
			}
		})
	}
}

func TestOAuth2(t *testing.T) {
	got, err := fixedSource(t).OAuth2(t.Context()).Token()
	if err != nil || got.AccessToken != secretText || got.TokenType != "Bearer" || !got.Valid() || time.Until(got.Expiry) > time.Hour {
		t.Errorf("got %v, %v", got, err)
	}
	bad := errors.New("bad")
	if _, err := failingSource(t, bad).OAuth2(t.Context()).Token(); !errors.Is(err, bad) {
		t.Errorf("got %v", err)
	}
}

func TestPerRPC(t *testing.T) {
	dir, err := os.MkdirTemp("", "df")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	var auth []string
	server := grpc.NewServer(grpc.UnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
		md, _ := metadata.FromIncomingContext(ctx)
		auth = md.Get("authorization")
		return h(ctx, req)
	}))
	healthpb.RegisterHealthServer(server, health.NewServer())
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	sock, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = server.Serve(tcp) }()
	go func() { _ = server.Serve(sock) }()
	defer server.Stop()

	call := func(target string, opts ...grpc.DialOption) error {
		conn, err := grpc.NewClient(target, opts...)
		if err != nil {
			return err
		}
		defer conn.Close()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		_, err = healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{})
		return err
	}
	with := grpc.WithPerRPCCredentials(fixedSource(t).PerRPC())
	unix := "unix://" + filepath.Join(dir, "s")
	if err := call(unix, with, grpc.WithTransportCredentials(local.NewCredentials())); err != nil || len(auth) != 1 || auth[0] != "Bearer "+secretText {
		t.Errorf("over a socket: %v, %d headers", err, len(auth))
	}
	auth = nil
	if err := call(tcp.Addr().String(), with, grpc.WithTransportCredentials(insecure.NewCredentials())); err == nil || auth != nil {
		t.Errorf("in plain text: %v, %d headers", err, len(auth))
	}
	if err := call(tcp.Addr().String(), with, grpc.WithTransportCredentials(local.NewCredentials())); err == nil || auth != nil {
		t.Errorf("in plain text, called local: %v, %d headers", err, len(auth))
	}
	for want, cause := range map[codes.Code]error{
		codes.Unauthenticated: &sdk.Error{Code: codes.PermissionDenied, Reason: "POLICY_DENIED"},
		codes.Unavailable:     &sdk.Error{Code: codes.Unavailable},
	} {
		err := call(unix, grpc.WithPerRPCCredentials(failingSource(t, cause).PerRPC()), grpc.WithTransportCredentials(local.NewCredentials()))
		if status.Code(err) != want {
			t.Errorf("got %v, want %s", err, want)
		}
	}
}

// TestTransportDropsInvalidTokens: what a service calls invalid is fetched anew and the
// request made once more; one that calls each token invalid isn't a storm on the broker.
func TestTransportDropsInvalidTokens(t *testing.T) {
	fetched, now := 0, time.Now()
	source, err := sdk.NewTokenSource(sdk.SourceConfig{Now: func() time.Time { return now }, Fetch: func(context.Context) (*sdk.Credential, error) {
		fetched++
		grant := strings.Repeat("g", fetched)
		return &sdk.Credential{Token: token.NewSecret(grant), Grant: grant, Expires: now.Add(time.Hour)}, nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	challenge, good := `Bearer error="invalid_token"`, "Bearer gg"
	var seen []string
	service := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		seen = append(seen, r.Header.Get("Authorization")+" "+string(body))
		if r.Header.Get("Authorization") != good {
			w.Header().Set("WWW-Authenticate", challenge)
			w.WriteHeader(http.StatusUnauthorized)
		}
	}))
	defer service.Close()
	client := &http.Client{Transport: &sdk.Transport{Source: source}}
	post := func(body io.Reader) int {
		t.Helper()
		seen = nil
		resp, err := client.Post(service.URL, "text/plain", body)
		if err != nil {
			t.Fatal(err)
		}
		if err := resp.Body.Close(); err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode
	}
	if code := post(strings.NewReader("hello")); code != http.StatusOK || len(seen) != 2 || seen[0] != "Bearer g hello" || seen[1] != "Bearer gg hello" {
		t.Errorf("%d after %q", code, seen)
	}
	good = "none"
	for range 50 {
		if code := post(nil); code != http.StatusUnauthorized {
			t.Errorf("%d after %q", code, seen)
		}
	}
	if fetched != 2 {
		t.Errorf("%d fetches in one moment", fetched)
	}
	for range 3 {
		now = now.Add(600 * time.Millisecond)
		post(nil)
	}
	if fetched != 4 { // half a second, then a second
		t.Errorf("%d fetches after two seconds", fetched)
	}
	now = now.Add(time.Minute)
	// A refusal of another kind drops nothing.
	before := fetched
	challenge = `Bearer error="insufficient_scope"`
	if code := post(nil); code != http.StatusUnauthorized || len(seen) != 1 || fetched != before {
		t.Errorf("%d after %q, %d fetches", code, seen, fetched-before)
	}
}

// TestTransportReplaysNoStream: a body that can't be had again is sent once, and the next
// request has a new token.
func TestTransportReplaysNoStream(t *testing.T) {
	fetched := 0
	source, err := sdk.NewTokenSource(sdk.SourceConfig{Fetch: func(context.Context) (*sdk.Credential, error) {
		fetched++
		return &sdk.Credential{Token: token.NewSecret("t"), Grant: strings.Repeat("g", fetched), Expires: time.Now().Add(time.Hour)}, nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	calls := 0
	service := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		calls++
		w.Header().Set("WWW-Authenticate", `Bearer error="invalid_token"`)
		w.WriteHeader(http.StatusUnauthorized)
	}))
	defer service.Close()
	resp, err := (&http.Client{Transport: &sdk.Transport{Source: source}}).Post(service.URL, "text/plain", io.MultiReader(strings.NewReader("x")))
	if err != nil {
		t.Fatal(err)
	}
	if err := resp.Body.Close(); err != nil || resp.StatusCode != http.StatusUnauthorized || calls != 1 {
		t.Errorf("%d after %d calls, %v", resp.StatusCode, calls, err)
	}
	if cred, err := source.Token(t.Context()); err != nil || cred.Grant != "gg" {
		t.Errorf("the next token is of %v, %v", cred, err)
	}
}
