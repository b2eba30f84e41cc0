package agent_test

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/agent"
	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
)

func thumb(c *x509.Certificate) [32]byte { return sha256.Sum256(c.Raw) }

func (f *fixture) web() *http.Client {
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", f.http)
	}}
	f.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: patience}
}

func (f *fixture) get(path string) (int, map[string]any, http.Header) {
	f.Helper()
	resp, err := f.web().Get("http://localhost" + path)
	if err != nil {
		f.Fatal(err)
	}
	return answer(f.T, resp)
}

func answer(t *testing.T, resp *http.Response) (int, map[string]any, http.Header) {
	t.Helper()
	defer resp.Body.Close()
	var body map[string]any
	if err := json.NewDecoder(resp.Body).Decode(&body); err != nil {
		t.Fatalf("status %d: %v", resp.StatusCode, err)
	}
	return resp.StatusCode, body, resp.Header
}

func (f *fixture) ready() {
	f.Helper()
	eventually(f.T, "readiness", func() error {
		if code, body, _ := f.get("/readyz"); code != http.StatusOK {
			return fmt.Errorf("%d %v", code, body)
		}
		return nil
	})
}

func reason(err error) string {
	var refusal *sdk.Error
	if errors.As(sdk.FromRPC(err), &refusal) {
		return refusal.Reason
	}
	return fmt.Sprint(err)
}

// One call to the broker serves everyone who asks for the same, at once and later.
func TestSingleFlightAndMemory(t *testing.T) {
	noLeaks(t)
	td := newDomain(t)
	b := newBroker(t, td)
	gate := make(chan struct{})
	b.set(func(b *broker) { b.gate = gate })
	f := start(t, td, b, nil)
	c := f.client()
	var wg sync.WaitGroup
	grants := make([]string, 20)
	for i := range grants {
		wg.Go(func() {
			scopes := []string{"r", "w"}
			if i%2 == 0 {
				scopes = []string{"w", "r", "r"} // the same, said differently
			}
			cred, err := c.Issue(t.Context(), sdk.Request{Audience: "orders", Scopes: scopes})
			if err != nil {
				t.Error(err)
				return
			}
			grants[i] = cred.Grant
		})
	}
	eventually(t, "the call", func() error {
		if b.issued.Load() == 0 {
			return errors.New("none yet")
		}
		return nil
	})
	close(gate)
	wg.Wait()
	for _, g := range grants {
		if g != grants[0] || g == "" {
			t.Fatalf("different credentials: %q", grants)
		}
	}
	if n := b.issued.Load(); n != 1 {
		t.Errorf("the broker was called %d times, want 1", n)
	}
	if other := f.issue(c, sdk.Request{Audience: "orders", Scopes: []string{"r"}}); other.Grant == grants[0] {
		t.Error("another scope got the same credential")
	}
}

// While the broker is away, what is valid is served; what isn't in memory is refused with
// a reason; when it is back, everything works without anyone's doing.
func TestBrokerAway(t *testing.T) {
	noLeaks(t)
	td := newDomain(t)
	b := newBroker(t, td)
	f := start(t, td, b, nil)
	c := f.client()
	cred := f.issue(c, sdk.Request{Audience: "orders"})
	f.ready()
	b.stop()
	again, err := c.Issue(t.Context(), sdk.Request{Audience: "orders"})
	if err != nil || again.Grant != cred.Grant {
		t.Fatalf("while the broker is away: %v", err)
	}
	if _, err := c.Issue(t.Context(), sdk.Request{Audience: "ledger"}); reason(err) != "BROKER_UNREACHABLE" || status.Code(err) != codes.Unavailable {
		t.Errorf("nothing in memory: got %v, want BROKER_UNREACHABLE", err)
	}
	eventually(t, "its knowledge to grow old", func() error { // which takes nobody out of service
		code, body, _ := f.get("/readyz")
		if code != http.StatusOK || body["state"] != "serving" || !strings.Contains(fmt.Sprint(body), "proof") {
			return fmt.Errorf("%d %v", code, body)
		}
		return nil
	})
	b.restart()
	eventually(t, "readiness", func() error {
		if _, body, _ := f.get("/readyz"); body["state"] != "ready" {
			return fmt.Errorf("%v", body)
		}
		return nil
	})
	f.issue(c, sdk.Request{Audience: "ledger"})
}

// What the feed brought before a call failed doesn't say that the broker is there.
func TestStatusOfABrokerThatIsAway(t *testing.T) {
	noLeaks(t)
	td := newDomain(t)
	b := newBroker(t, td)
	f := start(t, td, b, func(c *agent.Config) { c.MaxStaleness = 20 * time.Second })
	f.ready()
	if u := f.agent.Report().Upstream; !u.Reachable {
		t.Errorf("it answers on the feed: %+v", u)
	}
	b.stop()
	if _, err := f.client().Issue(t.Context(), sdk.Request{Audience: "orders"}); reason(err) != "BROKER_UNREACHABLE" {
		t.Fatalf("got %v, want BROKER_UNREACHABLE", err)
	}
	if u := f.agent.Report().Upstream; u.Reachable || u.UnreachableSince == nil {
		t.Errorf("it is away: %+v", u)
	}
	b.restart()
	eventually(t, "an answer", func() error {
		if u := f.agent.Report().Upstream; !u.Reachable || u.UnreachableSince != nil {
			return fmt.Errorf("%+v", u)
		}
		return nil
	})
}

// The agent first, then its Workload API, then the broker: it gets ready by itself.
func TestStartOrder(t *testing.T) {
	noLeaks(t)
	td := newDomain(t)
	b := newBroker(t, td)
	b.stop()
	if _, err := td.Workload(payments); err != nil {
		t.Fatal(err)
	}
	if err := td.StopSocket(payments); err != nil {
		t.Fatal(err)
	}
	f := start(t, td, b, func(c *agent.Config) {
		c.Prefetch = []agent.Request{{Audience: "orders", Scopes: []string{"r"}}}
	})
	code, body, _ := f.get("/readyz")
	if code != http.StatusServiceUnavailable || !strings.Contains(fmt.Sprint(body), "no SVID yet") {
		t.Errorf("before the Workload API: %d %v", code, body)
	}
	if code, _, _ := f.get("/healthz"); code != http.StatusOK {
		t.Errorf("healthz: %d", code)
	}
	if err := td.StartSocket(payments); err != nil {
		t.Fatal(err)
	}
	eventually(t, "an identity", func() error {
		if _, body, _ := f.get("/readyz"); !strings.Contains(fmt.Sprint(body), payments.String()) {
			return fmt.Errorf("%v", body)
		}
		return nil
	})
	b.restart()
	f.ready()
	if b.issued.Load() != 1 {
		t.Errorf("prefetched %d times", b.issued.Load())
	}
	eventually(t, "grpc health", func() error { // looked at every second
		h, err := healthpb.NewHealthClient(f.conn()).Check(t.Context(), &healthpb.HealthCheckRequest{})
		if err == nil && h.GetStatus() != healthpb.HealthCheckResponse_SERVING {
			err = errors.New(h.GetStatus().String())
		}
		return err
	})
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.subs) != 1 {
		t.Errorf("followed %d times: the first SVID is no rotation", len(b.subs))
	}
}

// A credential that the feed revokes is gone at once: once the agent has acknowledged the
// record, nobody gets it any more; a new one is fetched.
func TestRevokedIsDropped(t *testing.T) {
	noLeaks(t)
	td := newDomain(t)
	b := newBroker(t, td)
	f := start(t, td, b, func(c *agent.Config) { c.Prefetch = []agent.Request{{Audience: "orders"}} })
	f.ready()
	c := f.client()
	cred := f.issue(c, sdk.Request{Audience: "orders"})
	grant, err := token.ParseGrantID(cred.Grant)
	if err != nil {
		t.Fatal(err)
	}
	at := b.revoke(revocation.Grant(grant))
	b.sent("a receipt", func(m *dayflyv1.FollowRequest) bool {
		return m.GetAcknowledge().GetPosition().GetSequence() >= at.Seq
	})
	again := f.issue(c, sdk.Request{Audience: "orders"})
	if again.Grant == cred.Grant {
		t.Fatal("the revoked credential was given out after the receipt")
	}
	// Everyone locked out: the old one is not given out in place of none.
	b.set(func(b *broker) { b.refuse = refusal(codes.PermissionDenied, "IDENTITY_LOCKED", "locked") })
	at = b.revoke(revocation.Identity(payments))
	b.sent("a receipt", func(m *dayflyv1.FollowRequest) bool {
		return m.GetAcknowledge().GetPosition().GetSequence() >= at.Seq
	})
	_, err = c.Issue(t.Context(), sdk.Request{Audience: "orders"})
	if !errors.Is(err, sdk.ErrIdentityLocked) {
		t.Errorf("locked: got %v, want IDENTITY_LOCKED", err)
	}
	// Lifted: the agent finds out by itself.
	b.set(func(b *broker) { b.refuse = nil })
	f.issue(c, sdk.Request{Audience: "orders"})
}

// One that was on its way when it was revoked is not given out when it arrives.
func TestRevokedOnItsWay(t *testing.T) {
	noLeaks(t)
	td := newDomain(t)
	b := newBroker(t, td)
	gate := make(chan struct{})
	b.set(func(b *broker) { b.gate = gate })
	f := start(t, td, b, nil)
	f.ready()
	c := f.client()
	got := make(chan *sdk.Credential, 1)
	go func() {
		cred, err := c.Issue(t.Context(), sdk.Request{Audience: "orders"})
		if err != nil {
			t.Error(err)
		}
		got <- cred
	}()
	eventually(t, "the call", func() error {
		if b.issued.Load() == 0 {
			return errors.New("none yet")
		}
		return nil
	})
	at := b.revoke(revocation.Identity(payments))
	b.sent("a receipt", func(m *dayflyv1.FollowRequest) bool {
		return m.GetAcknowledge().GetPosition().GetSequence() >= at.Seq
	})
	b.set(func(b *broker) { b.gate = nil })
	close(gate)
	cred := <-got
	if cred == nil {
		return
	}
	claims, err := token.Inspect(cred.Token.Reveal())
	if err != nil || claims.Position.Rev < at.Seq {
		t.Errorf("issued at %d, revoked at %d: %v", claims.Position.Rev, at.Seq, err)
	}
}

// A credential bound to a certificate is fetched anew when the certificate rotates.
func TestCertificateBoundFollowsRotation(t *testing.T) {
	noLeaks(t)
	td := newDomain(t)
	b := newBroker(t, td)
	b.set(func(b *broker) { b.binding = token.BindingX5T })
	f := start(t, td, b, nil)
	c := f.client()
	old := f.issue(c, sdk.Request{Audience: "orders"})
	if again := f.issue(c, sdk.Request{Audience: "orders"}); again.Grant != old.Grant {
		t.Fatal("not served from memory")
	}
	if err := td.Rotate(payments); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a credential for the new certificate", func() error {
		cred, err := c.Issue(t.Context(), sdk.Request{Audience: "orders"})
		if err == nil && cred.Grant == old.Grant {
			return errors.New("still the old one")
		}
		return err
	})
	eventually(t, "the feed's stream with the new SVID", func() error {
		if b.streams.Load() < 2 {
			return errors.New("still the old stream")
		}
		return nil
	})
}

func TestHTTPToken(t *testing.T) {
	noLeaks(t)
	td := newDomain(t)
	b := newBroker(t, td)
	f := start(t, td, b, nil)
	var code int
	var body map[string]any
	var header http.Header
	eventually(t, "a token", func() error {
		if code, body, header = f.get("/v1/token?audience=orders&scope=r+w"); code != http.StatusOK {
			return fmt.Errorf("%d %v", code, body)
		}
		return nil
	})
	if header.Get("Cache-Control") != "no-store" || header.Get("Content-Type") != "application/json" {
		t.Errorf("headers: %v", header)
	}
	if in, ok := body["expires_in"].(float64); !ok || in > 300 || in < 200 {
		t.Errorf("expires_in: %v", body["expires_in"])
	}
	if body["token_type"] != "Bearer" || body["scope"] != "r w" || body["audience"] != "orders" || body["binding"] != "spiffe" {
		t.Errorf("answer: %v", body)
	}
	if _, err := token.Inspect(fmt.Sprint(body["access_token"])); err != nil {
		t.Errorf("access_token: %v", err)
	}
	for _, c := range []struct{ path, reason string }{
		{"/v1/token", "INVALID_REQUEST"},
		{"/v1/token?audience=a&audience=b", "INVALID_REQUEST"},
		{"/v1/token?audience=orders&scopes=r", "INVALID_REQUEST"},
		{"/v1/token?audience=orders&ttl=-1s", "INVALID_REQUEST"},
		{"/v1/token?audience=orders&ttl=3h", "INVALID_REQUEST"},
		{"/v1/token?audience=orders&binding=dns", "INVALID_REQUEST"},
		{"/v1/token?audience=orders&scope=" + strings.Repeat("s+", 40), ""},
		{"/v1/token?audience=orders&scope=" + many(40), "INVALID_REQUEST"},
		{"/v2", "NO_SUCH_ENDPOINT"},
	} {
		code, body, _ := f.get(c.path)
		if c.reason == "" {
			if code != http.StatusOK {
				t.Errorf("%s: %d %v", c.path, code, body)
			}
			continue
		}
		if code == http.StatusOK || body["reason"] != c.reason || body["hint"] == "" || body["message"] == "" {
			t.Errorf("%s: %d %v, want %s", c.path, code, body, c.reason)
		}
	}
	b.set(func(b *broker) { b.refuse = refusal(codes.PermissionDenied, "POLICY_DENIED", "no") })
	code, body, _ = f.get("/v1/token?audience=ledger")
	if code != http.StatusForbidden || body["reason"] != "POLICY_DENIED" || body["hint"] != "a hint" || body["error"] != "permission_denied" {
		t.Errorf("the broker's refusal: %d %v", code, body)
	}
	b.set(func(b *broker) {
		b.refuse = refusalWith(codes.ResourceExhausted, "LIVE_GRANTS_LIMITED", "too many", map[string]string{"hint": "wait", "retry_after": "12.3s"})
	})
	code, body, header = f.get("/v1/token?audience=ledger&ttl=1m")
	if code != http.StatusTooManyRequests || body["reason"] != "LIVE_GRANTS_LIMITED" || header.Get("Retry-After") != "13" {
		t.Errorf("a limit: %d %v %v", code, body, header)
	}
}

func many(n int) string {
	var s []string
	for i := range n {
		s = append(s, fmt.Sprintf("s%d", i))
	}
	return strings.Join(s, "+")
}

func TestHTTPRefusesBrowsers(t *testing.T) {
	td := newDomain(t)
	f := start(t, td, newBroker(t, td), nil)
	for name, change := range map[string]func(*http.Request){
		"origin":     func(r *http.Request) { r.Header.Set("Origin", "https://evil.example") },
		"fetch":      func(r *http.Request) { r.Header.Set("Sec-Fetch-Site", "none") },
		"proxy":      func(r *http.Request) { r.Header.Set("X-Forwarded-For", "192.0.2.1") },
		"rebound":    func(r *http.Request) { r.Host = "evil.example" },
		"other host": func(r *http.Request) { r.Host = "192.0.2.1:80" },
	} {
		req, err := http.NewRequestWithContext(t.Context(), "GET", "http://localhost/v1/token?audience=orders", nil)
		if err != nil {
			t.Fatal(err)
		}
		change(req)
		resp, err := f.web().Do(req)
		if err != nil {
			t.Fatal(err)
		}
		if code, body, _ := answer(t, resp); code != http.StatusForbidden || body["reason"] != "BROWSER_OR_PROXY" {
			t.Errorf("%s: %d %v", name, code, body)
		}
	}
}

func TestExchange(t *testing.T) {
	noLeaks(t)
	td := newDomain(t)
	f := start(t, td, newBroker(t, td), nil)
	f.ready()
	c := f.client()
	cred, err := c.Exchange(t.Context(), token.NewSecret("subject"), sdk.Request{Audience: "ledger"})
	if err != nil || cred.Audience != "ledger" {
		t.Fatalf("exchange: %v", err)
	}
	if _, err := c.Exchange(t.Context(), token.NewSecret("other"), sdk.Request{Audience: "ledger"}); !errors.Is(err, sdk.ErrSubjectMalformed) {
		t.Errorf("a refusal of the broker: %v", err)
	}
	post := func(contentType, body string) (int, map[string]any) {
		resp, err := f.web().Post("http://localhost/v1/exchange", contentType, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		code, got, _ := answer(t, resp)
		return code, got
	}
	code, body := post("application/json", `{"subject_token":"subject","audience":"ledger","scope":"r"}`)
	if code != http.StatusOK || body["audience"] != "ledger" || body["issued_token_type"] == "" {
		t.Errorf("over http: %d %v", code, body)
	}
	for _, c := range []struct {
		contentType, body, reason string
		code                      int
	}{
		{"application/json", `{"subject_token":"x"}`, "SUBJECT_TOKEN_MALFORMED", 400},
		{"application/json", `{"token":"x"}`, "INVALID_REQUEST", 400},
		{"text/plain", `{}`, "INVALID_REQUEST", 400},
		{"application/json", `{"subject_token":"` + strings.Repeat("a", 5<<20) + `"}`, "REQUEST_TOO_LARGE", 413},
	} {
		if code, body := post(c.contentType, c.body); code != c.code || body["reason"] != c.reason {
			t.Errorf("%.40s: %d %v, want %s", c.body, code, body, c.reason)
		}
	}
}

// 5 MB over gRPC is refused before anybody reads it.
func TestLargeMessage(t *testing.T) {
	td := newDomain(t)
	f := start(t, td, newBroker(t, td), nil)
	_, err := dayflyv1.NewTokenServiceClient(f.conn()).Issue(t.Context(), &dayflyv1.IssueRequest{Audience: strings.Repeat("a", 5<<20)}, grpc.WaitForReady(true))
	if status.Code(err) != codes.ResourceExhausted {
		t.Errorf("got %v", err)
	}
	scopes := make([]string, 10000)
	for i := range scopes {
		scopes[i] = fmt.Sprint(i)
	}
	_, err = dayflyv1.NewTokenServiceClient(f.conn()).Issue(t.Context(), &dayflyv1.IssueRequest{Audience: strings.Repeat("a", 65<<10)})
	if reason(err) != "REQUEST_TOO_LARGE" || status.Code(err) != codes.InvalidArgument {
		t.Errorf("65 KiB: %v", err)
	}
	stream, err := dayflyv1.NewFeedServiceClient(f.conn()).Follow(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&dayflyv1.FollowRequest{Message: &dayflyv1.FollowRequest_Subscribe{Subscribe: &dayflyv1.Subscribe{Instance: strings.Repeat("a", 65<<10)}}}); err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); reason(err) != "REQUEST_TOO_LARGE" {
		t.Errorf("65 KiB on the feed: %v", err)
	}
	_, err = dayflyv1.NewTokenServiceClient(f.conn()).Issue(t.Context(), &dayflyv1.IssueRequest{Audience: "orders", Scopes: scopes})
	if reason(err) != "INVALID_REQUEST" {
		t.Errorf("10,000 scopes: %v", err)
	}
}

// The kernel's word decides, on both sockets and for every service.
func TestPeerUIDRefused(t *testing.T) {
	td := newDomain(t)
	uid := uint32(os.Getuid())
	f := start(t, td, newBroker(t, td), func(c *agent.Config) { c.Allow.UIDs = []uint32{uid + 1} })
	_, err := f.client().Issue(t.Context(), sdk.Request{Audience: "orders"})
	if reason(err) != "PEER_NOT_ALLOWED" || status.Code(err) != codes.PermissionDenied {
		t.Errorf("issue: %v", err)
	}
	stream, err := dayflyv1.NewFeedServiceClient(f.conn()).Follow(t.Context())
	if err == nil {
		_, err = stream.Recv()
	}
	if reason(err) != "PEER_NOT_ALLOWED" {
		t.Errorf("follow: %v", err)
	}
	if _, err := healthpb.NewHealthClient(f.conn()).Check(t.Context(), &healthpb.HealthCheckRequest{}); reason(err) != "PEER_NOT_ALLOWED" {
		t.Errorf("health: %v", err)
	}
	if code, body, _ := f.get("/v1/token?audience=orders"); code != http.StatusForbidden || body["reason"] != "PEER_NOT_ALLOWED" {
		t.Errorf("http: %d %v", code, body)
	}
	allowed := start(t, td, f.broker, func(c *agent.Config) { c.Allow.UIDs = []uint32{uid} })
	allowed.issue(allowed.client(), sdk.Request{Audience: "orders"})
}

// Shutdown ends streams and calls, and removes the sockets.
func TestShutdown(t *testing.T) {
	noLeaks(t)
	td := newDomain(t)
	f := start(t, td, newBroker(t, td), nil)
	f.ready()
	v := f.follow(nil)
	v.welcome()
	f.stop()
	for {
		if _, err := v.stream.Recv(); err != nil {
			if reason(err) != "AGENT_STOPPING" {
				t.Errorf("the stream ended with %v", err)
			}
			break
		}
	}
	for _, path := range []string{f.grpc, f.http} {
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is still there: %v", path, err)
		}
	}
}

func TestConfig(t *testing.T) {
	_, err := agent.New(agent.Config{
		MaxStaleness: time.Millisecond, MaxStreams: -1, Audiences: []string{"a b"},
		Prefetch: []agent.Request{{Audience: "orders", TTL: 2 * time.Hour}},
	})
	for _, want := range []string{"upstream", "source", "sockets", "max staleness", "max streams", "audiences", "prefetch 1: ttl"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("the error lacks %q: %v", want, err)
		}
	}
}
