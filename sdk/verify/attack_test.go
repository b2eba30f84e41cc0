package verify_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"math"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk"
	"github.com/dayflyhq/dayfly/sdk/spiffetest"
	"github.com/dayflyhq/dayfly/sdk/verify"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
)

// TestStolenKey is what a thief of a signing key can make of it at a verifier: until the
// key is revoked any token within the caps, at a position that the log has; after it
// nothing, whatever number the token bears, nor what an honest broker derived from it.
func TestStolenKey(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(w *world, c *token.Claims)
		edit   func(payload string) string // what Encode would not write
		before verify.Reason               // of the payments identity's revocation, but the key's
		after  verify.Reason
	}{
		{name: "issued before the revocation", change: func(w *world, c *token.Claims) { c.Position.Rev--; c.Position.Sum = w.sumAt(c.Position.Rev) }, before: verify.TokenRevoked},
		{name: "rev at the head", before: ""},
		{name: "rev one above the head", change: func(_ *world, c *token.Claims) { c.Position.Rev++ }, before: verify.Ahead},
		{name: "rev at its end", change: func(_ *world, c *token.Claims) { c.Position.Rev = math.MaxUint64 }, before: verify.Ahead},
		{name: "rev at the head, with another hash", change: func(_ *world, c *token.Claims) { c.Position.Sum[7] ^= 1 }, before: verify.OffLog},
		{name: "rev at the head, of the era to come", change: func(_ *world, c *token.Claims) { c.Position.Era++ }, before: verify.Ahead},
		{name: "of another issuer", change: func(_ *world, c *token.Claims) { c.Issuer = "https://evil.example" }, before: verify.IssuerMismatch},
		{name: "alive for longer than the feed's cap", change: func(_ *world, c *token.Claims) { c.Expires = c.IssuedAt.Add(30*time.Minute + time.Second) }, before: verify.TokenTooLong},
		{name: "for later", change: func(_ *world, c *token.Claims) {
			c.IssuedAt, c.NotBefore, c.Expires = c.IssuedAt.AddDate(10, 0, 0), c.NotBefore.AddDate(10, 0, 0), c.Expires.AddDate(10, 0, 0)
		}, before: verify.TokenNotYetValid},
		{name: "alive for ten years within the cap", edit: func(p string) string { // iat and exp are 2010, nbf is now
			return strings.NewReplacer(`"iat":946684800`, `"iat":1262304000`, `"exp":946685100`, `"exp":1262304300`).Replace(p)
		}, before: verify.TokenMalformed, after: verify.TokenMalformed},
		{name: "derived from one of it by an honest broker", change: func(_ *world, c *token.Claims) { derived(c) }, before: ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			bubble(t, func(t *testing.T) { // where it is midnight, 1 January 2000
				w := newWorld(t, nil)
				w.ready(t)
				honest := stranger(t)
				public, err := token.NewPublicKey(token.ES256, &honest.PublicKey)
				if err != nil {
					t.Fatal(err)
				}
				w.publish(t, public)
				w.applied(t, w.revoke(t, revocation.Identity(payments)))

				c := w.claims(t)
				if tt.change != nil {
					tt.change(w, c)
				}
				presenter, key := payments, w.key
				if len(c.Lineage) > 1 {
					presenter, key, c.Lineage[1].Key = orders, honest, public.ID
				}
				raw := signWith(t, c, key)
				if tt.edit != nil {
					edited := tt.edit(payloadOf(t, raw))
					if edited == payloadOf(t, raw) {
						t.Fatalf("nothing to edit in %s", edited)
					}
					raw = resign(t, key, raw, edited)
				}
				if tt.after == "" {
					tt.after = verify.KeyRevoked
				}
				if _, err := w.verify(raw, presenter); verify.ReasonOf(err) != tt.before || err != nil && tt.before == "" {
					t.Errorf("got %v, want %q", err, tt.before)
				}
				w.applied(t, w.revoke(t, revocation.Key(w.public.ID)))
				if _, err := w.verify(raw, presenter); verify.ReasonOf(err) != tt.after {
					t.Errorf("after the key is revoked: got %v, want %q", err, tt.after)
				}
			})
		})
	}
}

// sumAt is what a token issued at a number says of the log.
func (b *broker) sumAt(seq uint64) [8]byte {
	b.mu.Lock()
	defer b.mu.Unlock()
	p, _ := b.log.At(seq)
	return p.Token().Sum
}

// hostileHeaders are the ways in which proxies tell a service who calls. Whoever calls
// can write them too.
var hostileHeaders = [][2]string{
	{"X-Forwarded-Client-Cert", "By=spiffe://example.org/orders;URI=spiffe://example.org/payments"},
	{"X-Spiffe-Id", "spiffe://example.org/payments"},
	{"Client-Cert", ":MIIB:"},
	{"X-Ssl-Client-Cert", "MIIB"},
	{"X-Forwarded-For", "192.0.2.7"},
	{"Forwarded", "for=192.0.2.7;by=spiffe://example.org/payments"},
	{"X-Forwarded-User", "spiffe://example.org/payments"},
	{"X-Original-Authorization", "Bearer x"},
}

// TestRequests writes requests by hand over mTLS: a token counts in one place and in one
// spelling, and its presenter is whom the connection proves.
func TestRequests(t *testing.T) {
	td := spiffetest.ForTest(t, spiffetest.Config{TrustDomain: spiffeid.RequireTrustDomainFromString("example.org")})
	w := newWorld(t, func(cfg *verify.Config) { cfg.Bundles = td })
	w.ready(t)
	server := &http.Server{ErrorLog: log.New(testWriter{t}, "", 0), Handler: w.verifier.HTTP(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		tok, _ := verify.FromContext(r.Context())
		_, _ = io.WriteString(rw, tok.Peer.ID.String()+" "+tok.Peer.Address)
	}))}
	source := td.Source(orders)
	lis, err := tls.Listen("tcp", "127.0.0.1:0", tlsconfig.MTLSServerConfig(source, td, tlsconfig.AuthorizeAny()))
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan struct{})
	go func() { defer close(served); _ = server.Serve(lis) }()
	defer func() { _ = server.Close(); <-served }()

	// do writes the lines of a request, TOKEN in them replaced.
	good := w.good(t)
	do := func(t *testing.T, as spiffeid.ID, request string) (code int, reason, body string) {
		t.Helper()
		src := td.Source(as)
		conn, err := tls.Dial("tcp", lis.Addr().String(), tlsconfig.MTLSClientConfig(src, td, tlsconfig.AuthorizeID(orders)))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(time.Minute))
		request = strings.NewReplacer("TOKEN", good, "\n", "\r\n").Replace(request)
		if _, err := io.WriteString(conn, request); err != nil {
			t.Fatal(err)
		}
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		var refusal struct{ Reason verify.Reason }
		_ = json.Unmarshal(b, &refusal) // net/http's own answers are plain text
		if strings.Contains(string(b), good[len(good)-20:]) {
			t.Error("the answer quotes the token")
		}
		return resp.StatusCode, string(refusal.Reason), string(b)
	}
	get := func(headers string) string {
		return "GET / HTTP/1.1\nHost: orders\nConnection: close\n" + headers + "\n"
	}
	for _, tt := range []struct {
		name    string
		request string
		code    int
		reason  verify.Reason
	}{
		{"as it should be", get("Authorization: Bearer TOKEN\n"), 200, ""},
		{"scheme of another case", get("Authorization: bEaReR TOKEN\n"), 200, ""},
		{"header of another case", get("aUTHORIZATION: Bearer TOKEN\n"), 200, ""},
		{"folded", get("Authorization: Bearer\n TOKEN\n"), 200, ""}, // one header, and one reading of it
		{"twice the same", get("Authorization: Bearer TOKEN\nAuthorization: Bearer TOKEN\n"), 400, verify.RequestInvalid},
		{"twice in two cases", get("Authorization: Bearer x\nauthorization: Bearer TOKEN\n"), 400, verify.RequestInvalid},
		{"twice with an empty one", get("Authorization:\nAuthorization: Bearer TOKEN\n"), 400, verify.RequestInvalid},
		{"twice with another scheme", get("Authorization: Basic eDp5\nAuthorization: Bearer TOKEN\n"), 400, verify.RequestInvalid},
		{"two joined by a comma", get("Authorization: Bearer TOKEN, Bearer TOKEN\n"), 401, verify.TokenMalformed},
		{"two tokens", get("Authorization: Bearer TOKEN TOKEN\n"), 401, verify.TokenMalformed},
		{"two spaces", get("Authorization: Bearer  TOKEN\n"), 401, verify.TokenMalformed},
		{"as a parameter", get("Authorization: Bearer token=\"TOKEN\"\n"), 401, verify.TokenMalformed},
		{"a tab", get("Authorization: Bearer\tTOKEN\n"), 401, verify.TokenMissing},
		{"no scheme", get("Authorization: TOKEN\n"), 401, verify.TokenMissing},
		{"no token", get("Authorization: Bearer\n"), 401, verify.TokenMissing},
		{"another scheme", get("Authorization: DPoP TOKEN\n"), 401, verify.TokenMissing},
		{"a scheme that begins alike", get("Authorization: Bearer2 TOKEN\n"), 401, verify.TokenMissing},
		{"in the query", "GET /?access_token=TOKEN HTTP/1.1\nHost: orders\nConnection: close\n\n", 401, verify.TokenMissing},
		{"in the address", "GET http://Bearer:TOKEN@orders/ HTTP/1.1\nHost: orders\nConnection: close\n\n", 401, verify.TokenMissing},
		{"in a form", "POST / HTTP/1.1\nHost: orders\nConnection: close\nContent-Type: application/x-www-form-urlencoded\nTransfer-Encoding: chunked\n\nd\naccess_token=\n" + fmt.Sprintf("%x", len(good)) + "\nTOKEN\n0\n\n", 401, verify.TokenMissing},
		{"in a trailer", "POST / HTTP/1.1\nHost: orders\nConnection: close\nTrailer: Authorization\nTransfer-Encoding: chunked\n\n1\nx\n0\nAuthorization: Bearer TOKEN\n\n", 401, verify.TokenMissing},
		{"in a cookie", get("Cookie: Authorization=Bearer TOKEN; access_token=TOKEN\n"), 401, verify.TokenMissing},
		{"for the proxy", get("Proxy-Authorization: Bearer TOKEN\n"), 401, verify.TokenMissing},
		{"under another name", get("X-Authorization: Bearer TOKEN\n"), 401, verify.TokenMissing},
		{"as a WebSocket's", get("Upgrade: websocket\nSec-WebSocket-Protocol: bearer, TOKEN\n"), 401, verify.TokenMissing},
		{"as a connection's own", get("Connection: Authorization\nX: y\n"), 401, verify.TokenMissing},
		{"a space before the colon", get("Authorization : Bearer TOKEN\n"), 400, ""}, // net/http's own
		{"a NUL", get("Authorization: Bearer TOKEN\x00\n"), 400, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			code, reason, body := do(t, payments, tt.request)
			if code != tt.code || reason != string(tt.reason) || code == 200 && body != payments.String()+" 127.0.0.1" {
				t.Errorf("got %d %s %s, want %d %s", code, reason, body, tt.code, tt.reason)
			}
		})
	}
	for _, h := range hostileHeaders {
		t.Run(h[0], func(t *testing.T) {
			request := get(h[0] + ": " + h[1] + "\nAuthorization: Bearer TOKEN\n")
			if code, reason, body := do(t, thief, request); code != 401 || reason != string(verify.PresenterMismatch) {
				t.Errorf("the thief: got %d %s", code, body)
			}
			if code, _, body := do(t, payments, request); code != 200 || body != payments.String()+" 127.0.0.1" {
				t.Errorf("its presenter: got %d %s", code, body)
			}
		})
	}
}

// TestMetadata is the same for gRPC.
func TestMetadata(t *testing.T) {
	td := spiffetest.ForTest(t, spiffetest.Config{TrustDomain: spiffeid.RequireTrustDomainFromString("example.org")})
	w := newWorld(t, func(cfg *verify.Config) { cfg.Bundles = td })
	w.ready(t)
	address, stop := serveTLS(t, td, orders, func(s *grpc.Server) { healthpb.RegisterHealthServer(s, health.NewServer()) },
		grpc.UnaryInterceptor(w.verifier.UnaryInterceptor("/grpc.health.v1.Health/List")), grpc.StreamInterceptor(w.verifier.StreamInterceptor("/grpc.health.v1.Health/List")))
	defer stop()
	clients := map[spiffeid.ID]healthpb.HealthClient{}
	for _, id := range []spiffeid.ID{payments, thief} {
		src := td.Source(id)
		conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(credentials.NewTLS(tlsconfig.MTLSClientConfig(src, td, tlsconfig.AuthorizeID(orders)))))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		clients[id] = healthpb.NewHealthClient(conn)
	}
	good := "Bearer " + w.good(t)
	type test struct {
		name   string
		as     spiffeid.ID
		pairs  []string
		code   codes.Code
		reason verify.Reason
	}
	tests := []test{
		{"as it should be", payments, []string{"authorization", good}, codes.OK, ""},
		{"another case", payments, []string{"Authorization", good}, codes.OK, ""},
		{"nothing", payments, nil, codes.Unauthenticated, verify.TokenMissing},
		{"twice the same", payments, []string{"authorization", good, "authorization", good}, codes.InvalidArgument, verify.RequestInvalid},
		{"twice in two cases", payments, []string{"authorization", "Bearer x", "AUTHORIZATION", good}, codes.InvalidArgument, verify.RequestInvalid},
		{"twice with an empty one", payments, []string{"authorization", "", "authorization", good}, codes.InvalidArgument, verify.RequestInvalid},
		{"two joined by a comma", payments, []string{"authorization", good + ", " + good}, codes.Unauthenticated, verify.TokenMalformed},
		{"binary", payments, []string{"authorization-bin", good}, codes.Unauthenticated, verify.TokenMissing},
		{"through a gateway", payments, []string{"grpcgateway-authorization", good}, codes.Unauthenticated, verify.TokenMissing},
		{"a public method as metadata", payments, []string{"path", "/grpc.health.v1.Health/List"}, codes.Unauthenticated, verify.TokenMissing},
	}
	for _, h := range hostileHeaders {
		tests = append(tests, test{h[0], thief, []string{"authorization", good, h[0], h[1]}, codes.Unauthenticated, verify.PresenterMismatch})
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(t.Context(), tt.pairs...), time.Minute)
			defer cancel()
			check := func(kind string, err error) {
				var e *sdk.Error
				if err != nil {
					e, _ = sdk.FromRPC(err).(*sdk.Error)
				} else {
					e = &sdk.Error{}
				}
				if e == nil || e.Code != tt.code || e.Reason != string(tt.reason) || tt.code != codes.OK && e.Hint == "" {
					t.Errorf("%s: got %v, want %s %s", kind, err, tt.code, tt.reason)
				}
			}
			_, err := clients[tt.as].Check(ctx, &healthpb.HealthCheckRequest{})
			check("a call", err)
			watch, err := clients[tt.as].Watch(ctx, &healthpb.HealthCheckRequest{})
			if err == nil {
				_, err = watch.Recv()
			}
			check("a stream", err)
		})
	}
}
