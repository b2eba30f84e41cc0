package verify_test

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk"
	"github.com/dayflyhq/dayfly/sdk/spiffetest"
	"github.com/dayflyhq/dayfly/sdk/verify"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
)

func (b *broker) bearer(t testing.TB) (string, *token.Claims) {
	t.Helper()
	c := b.claims(t)
	c.Binding = token.BindingNone
	return b.sign(t, c), c
}

func TestHTTP(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.ready(t)
		good, _ := w.bearer(t)
		bound := w.good(t)
		handler := w.verifier.HTTP(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
			tok, ok := verify.FromContext(r.Context())
			if !ok || tok.Presenter() != payments {
				t.Errorf("context: %v, %v", tok, ok)
			}
		}), "orders:read")
		narrow := w.verifier.HTTP(verify.HTTPScope(http.NotFoundHandler(), "orders:admin"))
		tests := []struct {
			name      string
			handler   http.Handler
			auth      []string
			code      int
			reason    string
			challenge string // a part of it
		}{
			{"good", handler, []string{"Bearer " + good}, 200, "", ""},
			{"scheme in lower case", handler, []string{"bearer " + good}, 200, "", ""},
			{"none", handler, nil, 401, "TOKEN_MISSING", `Bearer scope="orders:read"`},
			{"basic", handler, []string{"Basic YTpi"}, 401, "TOKEN_MISSING", "Bearer"},
			{"two", handler, []string{"Bearer " + good, "Bearer x"}, 400, "INVALID_REQUEST", `error="invalid_request"`},
			{"garbage", handler, []string{"Bearer x.y.z"}, 401, "TOKEN_MALFORMED", `error="invalid_token"`},
			{"bound, without mTLS", handler, []string{"Bearer " + bound}, 401, "PRESENTER_MISMATCH", `error="invalid_token"`},
			{"scope of the service", w.verifier.HTTP(handler, "orders:admin"), []string{"Bearer " + good}, 403, "SCOPE_MISSING", `error="insufficient_scope"`},
			{"scope of the route", narrow, []string{"Bearer " + good}, 403, "SCOPE_MISSING", `scope="orders:admin"`},
		}
		check := func(rec *httptest.ResponseRecorder, code int, reason, challenge string) {
			t.Helper()
			var body struct{ Reason, Message, Hint string }
			if code != 200 {
				if err := json.Unmarshal(rec.Body.Bytes(), &body); err != nil || body.Message == "" {
					t.Errorf("body %q: %v", rec.Body, err)
				}
			}
			if got := rec.Header().Get("WWW-Authenticate"); rec.Code != code || body.Reason != reason || !strings.Contains(got, challenge) {
				t.Errorf("got %d %s %q, want %d %s %q", rec.Code, body.Reason, got, code, reason, challenge)
			}
		}
		for _, tt := range tests {
			rec := httptest.NewRecorder()
			r := httptest.NewRequest("GET", "/", nil)
			for _, a := range tt.auth {
				r.Header.Add("Authorization", a)
			}
			tt.handler.ServeHTTP(rec, r)
			t.Log(tt.name)
			check(rec, tt.code, tt.reason, tt.challenge)
		}

		w.do(func() { w.mute = true })
		time.Sleep(time.Minute)
		rec := httptest.NewRecorder()
		r := httptest.NewRequest("GET", "/", nil)
		r.Header.Set("Authorization", "Bearer "+good)
		handler.ServeHTTP(rec, r)
		check(rec, 503, "VERIFIER_STALE", "")
		if rec.Header().Get("Retry-After") != "10" {
			t.Errorf("Retry-After %q", rec.Header().Get("Retry-After"))
		}
	})
}

// What is long is ended when its token dies, for each way of dying.
func TestWatch(t *testing.T) {
	tests := []struct {
		name string
		kill func(t *testing.T, w *world, c *token.Claims)
		want verify.Reason
		at   time.Duration // after which it must have ended, and not before
	}{
		{"revoked", func(t *testing.T, w *world, c *token.Claims) { w.revoke(t, revocation.Grant(c.Grant())) }, verify.TokenRevoked, 0},
		{"expired", func(*testing.T, *world, *token.Claims) {}, verify.TokenExpired, 5*time.Minute + 30*time.Second},
		{"stale", func(_ *testing.T, w *world, _ *token.Claims) { w.net.cut() }, verify.VerifierStale, verify.DefaultMaxStaleness},
		{"stale after Run has ended", func(_ *testing.T, w *world, _ *token.Claims) { w.cancel(); <-w.ended }, verify.VerifierStale, verify.DefaultMaxStaleness},
		{"forked", func(_ *testing.T, w *world, _ *token.Claims) {
			w.do(func() { p := w.log.Head(); p.Sum[0] ^= 1; w.pongHead = &p })
		}, verify.VerifierForked, verify.DefaultMaxStaleness},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				w := newWorld(t, nil)
				w.ready(t)
				c := w.claims(t)
				got, err := w.verify(w.sign(t, c), payments)
				if err != nil {
					t.Fatal(err)
				}
				bystander, err := w.verify(w.good(t), payments)
				if err != nil {
					t.Fatal(err)
				}
				ctx, done := w.verifier.Watch(t.Context(), got)
				defer done()
				other, done2 := w.verifier.Watch(t.Context(), bystander)
				defer done2()
				synctest.Wait()
				began := time.Now()
				tt.kill(t, w, c)
				select {
				case <-ctx.Done():
				case <-time.After(time.Hour):
					t.Fatal("goes on")
				}
				if got := verify.ReasonOf(context.Cause(ctx)); got != tt.want {
					t.Errorf("got %v, want %s", context.Cause(ctx), tt.want)
				}
				if took := time.Since(began); took > tt.at+10*time.Millisecond {
					t.Errorf("ended after %v, want %v", took, tt.at)
				}
				if tt.want == verify.TokenRevoked && other.Err() != nil {
					t.Error("ended a bystander")
				}
			})
		})
	}
}

func TestWatchOfTheDead(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.ready(t)
		c := w.claims(t)
		got, err := w.verify(w.sign(t, c), payments)
		if err != nil {
			t.Fatal(err)
		}
		w.applied(t, w.revoke(t, revocation.Grant(c.Grant())))
		ctx, done := w.verifier.Watch(t.Context(), got)
		defer done()
		if ctx.Err() == nil || verify.ReasonOf(context.Cause(ctx)) != verify.TokenRevoked {
			t.Errorf("got %v", context.Cause(ctx))
		}
		live, done := w.verifier.Watch(t.Context(), mustVerify(t, w))
		done()
		if !errors.Is(context.Cause(live), context.Canceled) {
			t.Errorf("done: got %v", context.Cause(live))
		}
	})
}

func mustVerify(t *testing.T, w *world) *verify.Verified {
	t.Helper()
	got, err := w.verify(w.good(t), payments)
	if err != nil {
		t.Fatal(err)
	}
	return got
}

// recvServer waits in Recv, which only the end of the call wakes.
type recvServer struct {
	dayflyv1.UnimplementedFeedServiceServer
	err chan error
}

func (s *recvServer) Follow(rpc dayflyv1.FeedService_FollowServer) error {
	if _, ok := verify.FromContext(rpc.Context()); !ok {
		return errors.New("no token in the context")
	}
	if err := rpc.Send(&dayflyv1.FollowResponse{}); err != nil {
		return err
	}
	_, err := rpc.Recv()
	s.err <- err
	return err
}

// serveGRPC serves health and a feed behind a verifier's interceptors.
func serveGRPC(t *testing.T, v *verify.Verifier, feed dayflyv1.FeedServiceServer, opts ...grpc.ServerOption) *grpc.Server {
	t.Helper()
	opts = append(opts,
		grpc.UnaryInterceptor(v.UnaryInterceptor("/grpc.health.v1.Health/List")),
		grpc.StreamInterceptor(v.StreamInterceptor()))
	server := grpc.NewServer(opts...)
	healthpb.RegisterHealthServer(server, health.NewServer())
	dayflyv1.RegisterFeedServiceServer(server, feed)
	return server
}

func TestGRPC(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.ready(t)
		rs := &recvServer{err: make(chan error, 1)}
		server := serveGRPC(t, w.verifier, rs)
		lis := bufconn.Listen(1 << 16)
		go func() { _ = server.Serve(lis) }()
		defer server.Stop()
		conn, err := grpc.NewClient("passthrough:///resource", grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return lis.DialContext(ctx) }))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()

		raw, claims := w.bearer(t)
		ctx := metadata.AppendToOutgoingContext(t.Context(), "authorization", "Bearer "+raw)
		client := healthpb.NewHealthClient(conn)
		if _, err := client.Check(ctx, &healthpb.HealthCheckRequest{}); err != nil {
			t.Fatal(err)
		}
		if _, err := client.List(t.Context(), &healthpb.HealthListRequest{}); err != nil {
			t.Errorf("public method: %v", err)
		}
		_, err = client.Check(t.Context(), &healthpb.HealthCheckRequest{})
		wantStatus(t, err, codes.Unauthenticated, "TOKEN_MISSING")
		twice := metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+raw)
		if _, err = client.Check(twice, &healthpb.HealthCheckRequest{}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("two tokens: got %v", err)
		}

		// One stream that waits for its context, one that waits in Recv.
		waits, err := client.Watch(ctx, &healthpb.HealthCheckRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := waits.Recv(); err != nil {
			t.Fatal(err)
		}
		stuck, err := dayflyv1.NewFeedServiceClient(conn).Follow(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := stuck.Recv(); err != nil {
			t.Fatal(err)
		}
		w.revoke(t, revocation.Grant(claims.Grant()))
		_, err = waits.Recv()
		wantStatus(t, err, codes.Unauthenticated, "TOKEN_REVOKED")
		_, err = stuck.Recv()
		wantStatus(t, err, codes.Unauthenticated, "TOKEN_REVOKED")
		if err := <-rs.err; err == nil {
			t.Error("the handler was given a message")
		}
		_, err = client.Check(ctx, &healthpb.HealthCheckRequest{})
		wantStatus(t, err, codes.Unauthenticated, "TOKEN_REVOKED")

		w.do(func() { w.mute = true })
		time.Sleep(time.Minute)
		_, err = client.Check(ctx, &healthpb.HealthCheckRequest{})
		wantStatus(t, err, codes.Unavailable, "VERIFIER_STALE")
	})
}

// wantStatus also shows that sdk.FromRPC reads what the middleware writes.
func wantStatus(t *testing.T, err error, code codes.Code, reason string) {
	t.Helper()
	var e *sdk.Error
	if !errors.As(sdk.FromRPC(err), &e) || e.Code != code || e.Reason != reason || e.Hint == "" {
		t.Errorf("got %v (%+v), want %s %s with a hint", err, e, code, reason)
	}
}

// A panic of the handler comes out where an interceptor that recovers stands.
func TestStreamPanics(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.ready(t)
		raw, _ := w.bearer(t)
		ss := &fakeStream{ctx: metadata.NewIncomingContext(t.Context(), metadata.Pairs("authorization", "Bearer "+raw))}
		defer func() {
			if p := recover(); p != "handler" {
				t.Errorf("recovered %v", p)
			}
		}()
		_ = w.verifier.StreamInterceptor()(nil, ss, &grpc.StreamServerInfo{}, func(any, grpc.ServerStream) error { panic("handler") })
	})
}

type fakeStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s *fakeStream) Context() context.Context { return s.ctx }

// TestMutualTLS is the whole way over real sockets: a verifier that follows through
// sdk.Client with a pinned broker, and peers whose identity is that of their SVID.
func TestMutualTLS(t *testing.T) {
	td := spiffetest.ForTest(t, spiffetest.Config{TrustDomain: spiffeid.RequireTrustDomainFromString("example.org")})
	brokerID := spiffeid.RequireFromString("spiffe://example.org/dayfly/broker")
	b := newBroker(t)
	address, stop := serveTLS(t, td, brokerID, func(s *grpc.Server) { dayflyv1.RegisterFeedServiceServer(s, b) })
	defer stop()
	source := td.Source(orders)
	client, err := sdk.New(sdk.Config{Address: address, Source: source, BrokerID: brokerID})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	v, err := verify.New(verify.Config{Conn: client.Conn(), Audiences: []string{"orders"}, Bundles: source, Log: nil})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); _ = v.Run(ctx) }()
	defer func() { cancel(); <-ended }()
	ready, stopWaiting := context.WithTimeout(ctx, time.Minute)
	defer stopWaiting()
	if err := v.WaitReady(ready); err != nil {
		t.Fatal(err)
	}

	server := &http.Server{
		ErrorLog: log.New(testWriter{t}, "", 0),
		Handler: v.HTTP(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			tok, _ := verify.FromContext(r.Context())
			_, _ = io.WriteString(w, tok.Peer.ID.String()+" "+tok.Peer.Address)
		})),
	}
	lis, err := tls.Listen("tcp", "127.0.0.1:0", tlsconfig.MTLSServerConfig(source, source, tlsconfig.AuthorizeAny()))
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan struct{})
	go func() { defer close(served); _ = server.Serve(lis) }()
	defer func() { _ = server.Close(); <-served }()
	raw := b.good(t)
	get := func(as spiffeid.ID, want int) string {
		t.Helper()
		src := td.Source(as)
		transport := &http.Transport{TLSClientConfig: tlsconfig.MTLSClientConfig(src, src, tlsconfig.AuthorizeID(orders))}
		defer transport.CloseIdleConnections()
		req, _ := http.NewRequest("GET", "https://"+lis.Addr().String(), nil)
		req.Header.Set("Authorization", "Bearer "+raw)
		resp, err := (&http.Client{Transport: transport}).Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, _ := io.ReadAll(resp.Body)
		if resp.StatusCode != want {
			t.Errorf("as %s: %s %s, want %d", as, resp.Status, body, want)
		}
		return string(body)
	}
	if got := get(payments, 200); got != payments.String()+" 127.0.0.1" {
		t.Errorf("peer %q", got)
	}
	if got := get(thief, 401); !strings.Contains(got, "PRESENTER_MISMATCH") {
		t.Errorf("got %q", got)
	}

	address, stop = serveTLS(t, td, orders, func(s *grpc.Server) { healthpb.RegisterHealthServer(s, health.NewServer()) },
		grpc.UnaryInterceptor(v.UnaryInterceptor()))
	defer stop()
	for id, want := range map[spiffeid.ID]codes.Code{payments: codes.OK, thief: codes.Unauthenticated} {
		src := td.Source(id)
		conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(credentials.NewTLS(tlsconfig.MTLSClientConfig(src, src, tlsconfig.AuthorizeID(orders)))))
		if err != nil {
			t.Fatal(err)
		}
		_, err = healthpb.NewHealthClient(conn).Check(metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+raw), &healthpb.HealthCheckRequest{})
		if status.Code(err) != want {
			t.Errorf("as %s: got %v, want %s", id, err, want)
		}
		_ = conn.Close()
	}
}

// A client resumes its TLS session after its trust domain has gone: crypto/tls asks
// nobody again, and the middleware does.
func TestResumedSession(t *testing.T) {
	td := spiffetest.ForTest(t, spiffetest.Config{TrustDomain: spiffeid.RequireTrustDomainFromString("example.org")})
	bundles := x509bundle.NewSet(td.Bundle())
	w := newWorld(t, func(cfg *verify.Config) { cfg.Bundles = bundles })
	ready, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := w.verifier.WaitReady(ready); err != nil {
		t.Fatal(err)
	}
	server := httptest.NewUnstartedServer(w.verifier.HTTP(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})))
	server.Config.ErrorLog = log.New(testWriter{t}, "", 0)
	server.TLS = tlsconfig.MTLSServerConfig(td.Source(orders), bundles, tlsconfig.AuthorizeAny())
	server.StartTLS()
	defer server.Close()

	cfg := tlsconfig.MTLSClientConfig(td.Source(payments), td, tlsconfig.AuthorizeID(orders))
	cfg.ClientSessionCache, cfg.ServerName = tls.NewLRUClientSessionCache(8), "orders"
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: cfg, DisableKeepAlives: true}}
	raw := w.good(t)
	get := func() (resumed bool, code int, body string) {
		t.Helper()
		req, err := http.NewRequestWithContext(ready, http.MethodGet, server.URL, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer "+raw)
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.TLS.DidResume, resp.StatusCode, string(b)
	}
	for _, want := range []bool{false, true} {
		if resumed, code, body := get(); resumed != want || code != http.StatusOK {
			t.Fatalf("resumed %t, want %t: %d %s", resumed, want, code, body)
		}
	}
	bundles.Remove(td.Name())
	if resumed, code, body := get(); !resumed || code != http.StatusUnauthorized || !strings.Contains(body, "PRESENTER_MISMATCH") {
		t.Errorf("after its trust domain was removed: resumed %t, %d %s", resumed, code, body)
	}
}

// serveTLS serves gRPC as an identity, on loopback.
func serveTLS(t *testing.T, td *spiffetest.TrustDomain, id spiffeid.ID, register func(*grpc.Server), opts ...grpc.ServerOption) (address string, stop func()) {
	t.Helper()
	source := td.Source(id)
	cfg := tlsconfig.MTLSServerConfig(source, source, tlsconfig.AuthorizeAny())
	cfg.SessionTicketsDisabled = true
	server := grpc.NewServer(append(opts, grpc.Creds(credentials.NewTLS(cfg)))...)
	register(server)
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = server.Serve(lis) }()
	return lis.Addr().String(), server.Stop
}
