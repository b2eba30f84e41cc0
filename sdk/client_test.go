package sdk_test

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk"
	"github.com/dayflyhq/dayfly/sdk/spiffetest"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"
)

var (
	payments = spiffeid.RequireFromString("spiffe://example.org/payments")
	brokerID = spiffeid.RequireFromString("spiffe://example.org/dayfly/broker")
)

const secretText = "eyJhbGciOiJFUzI1NiJ9.c2VjcmV0.c2lnbmF0dXJl"

// A tokenServer answers by a script and remembers what it was asked, by whom.
type tokenServer struct {
	dayflyv1.UnimplementedTokenServiceServer

	mu       sync.Mutex
	err      error
	skew     time.Duration // of its clock
	age      time.Duration // of what it gives out: an agent's memory
	issue    []*dayflyv1.IssueRequest
	exchange []*dayflyv1.ExchangeRequest
	leaves   []*x509.Certificate
}

func (s *tokenServer) credential(ctx context.Context, audience string) (*dayflyv1.Credential, error) {
	if p, ok := peer.FromContext(ctx); ok {
		if info, ok := p.AuthInfo.(credentials.TLSInfo); ok {
			s.leaves = append(s.leaves, info.State.PeerCertificates[0])
		}
	}
	if s.err != nil {
		return nil, s.err
	}
	issued := time.Now().Add(s.skew - s.age)
	return &dayflyv1.Credential{
		Token: secretText, Grant: "grant-1", Audience: audience, Scopes: []string{"a"}, Binding: dayflyv1.Binding_BINDING_SPIFFE,
		IssuedAt: timestamppb.New(issued), ExpiresAt: timestamppb.New(issued.Add(5 * time.Minute)),
	}, nil
}

func (s *tokenServer) Issue(ctx context.Context, r *dayflyv1.IssueRequest) (*dayflyv1.IssueResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.issue = append(s.issue, r)
	c, err := s.credential(ctx, r.GetAudience())
	return &dayflyv1.IssueResponse{Credential: c}, err
}

func (s *tokenServer) Exchange(ctx context.Context, r *dayflyv1.ExchangeRequest) (*dayflyv1.ExchangeResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.exchange = append(s.exchange, r)
	c, err := s.credential(ctx, r.GetAudience())
	return &dayflyv1.ExchangeResponse{Credential: c}, err
}

// startBroker serves s over mTLS as an identity.
func startBroker(t *testing.T, td *spiffetest.TrustDomain, id spiffeid.ID, s *tokenServer, states ...*health.Server) (address string) {
	t.Helper()
	source := td.Source(id)
	server := grpc.NewServer(grpc.Creds(credentials.NewTLS(tlsconfig.MTLSServerConfig(source, source, tlsconfig.AuthorizeAny()))))
	dayflyv1.RegisterTokenServiceServer(server, s)
	for _, state := range states {
		healthpb.RegisterHealthServer(server, state)
	}
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = server.Serve(lis) }()
	t.Cleanup(server.Stop)
	return lis.Addr().String()
}

func newTrustDomain(t *testing.T) *spiffetest.TrustDomain {
	return spiffetest.ForTest(t, spiffetest.Config{TrustDomain: spiffeid.RequireTrustDomainFromString("example.org")})
}

func newClient(t *testing.T, cfg sdk.Config) *sdk.Client {
	t.Helper()
	c, err := sdk.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func TestIssueAndExchange(t *testing.T) {
	td, s := newTrustDomain(t), &tokenServer{}
	c := newClient(t, sdk.Config{Address: startBroker(t, td, brokerID, s), Source: td.Source(payments), BrokerID: brokerID})
	got, err := c.Issue(t.Context(), sdk.Request{Audience: "orders", Scopes: []string{"a"}, TTL: time.Minute, Binding: token.BindingX5T})
	if err != nil {
		t.Fatal(err)
	}
	if got.Token.Reveal() != secretText || got.Grant != "grant-1" || got.Audience != "orders" || got.Binding != token.BindingSPIFFE || got.Expires.Sub(got.IssuedAt) != 5*time.Minute {
		t.Errorf("got %+v", got)
	}
	r := s.issue[0]
	if r.GetAudience() != "orders" || r.GetTtl().AsDuration() != time.Minute || r.GetBinding() != dayflyv1.Binding_BINDING_X5T || len(r.GetIdempotencyKey()) < 16 {
		t.Errorf("asked %v", r)
	}
	if _, err := c.Exchange(t.Context(), got.Token, sdk.Request{Audience: "ledger", IdempotencyKey: "k"}); err != nil {
		t.Fatal(err)
	}
	x := s.exchange[0]
	if x.GetSubjectToken() != secretText || x.GetAudience() != "ledger" || x.GetTtl() != nil || x.GetIdempotencyKey() != "k" {
		t.Errorf("asked %v", x)
	}
	id, err := spiffeid.FromURI(s.leaves[0].URIs[0])
	if err != nil || id != payments {
		t.Errorf("called as %v, %v", id, err)
	}
}

// Whoever stands at the broker's address without its identity gets nothing.
func TestBrokerIsPinned(t *testing.T) {
	td, s := newTrustDomain(t), &tokenServer{}
	other := spiffeid.RequireFromString("spiffe://example.org/other")
	c := newClient(t, sdk.Config{Address: startBroker(t, td, other, s), Source: td.Source(payments), BrokerID: brokerID})
	_, err := c.Issue(t.Context(), sdk.Request{Audience: "orders"})
	var e *sdk.Error
	if !errors.As(err, &e) || e.Code != codes.Unavailable || !strings.Contains(e.Message, "unexpected ID") {
		t.Errorf("got %v", err)
	}
	if len(s.issue) > 0 {
		t.Error("it was asked")
	}
}

// After a rotation calls go over a new connection with the new SVID; a stream on the old
// one goes on until it ends.
func TestRotation(t *testing.T) {
	td, s := newTrustDomain(t), &tokenServer{}
	source := td.Source(payments)
	state := health.NewServer()
	c := newClient(t, sdk.Config{Address: startBroker(t, td, brokerID, s, state), Source: source, BrokerID: brokerID})
	stream, err := healthpb.NewHealthClient(c.Conn()).Watch(t.Context(), &healthpb.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if _, err := c.Issue(t.Context(), sdk.Request{Audience: "orders"}); err != nil {
			t.Fatal(err)
		}
	}
	if err := td.Rotate(payments); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if _, err := c.Issue(t.Context(), sdk.Request{Audience: "orders"}); err != nil {
			t.Fatal(err)
		}
	}
	now, err := source.GetX509SVID()
	if err != nil {
		t.Fatal(err)
	}
	if !s.leaves[0].Equal(s.leaves[1]) || s.leaves[1].Equal(s.leaves[2]) || !s.leaves[3].Equal(now.Certificates[0]) {
		t.Error("the calls were not made with the SVID of their time")
	}
	// The stream on the old connection lives: a change still arrives.
	state.SetServingStatus("", healthpb.HealthCheckResponse_NOT_SERVING)
	if m, err := stream.Recv(); err != nil || m.GetStatus() != healthpb.HealthCheckResponse_NOT_SERVING {
		t.Fatalf("the rotation ended a stream: %v, %v", m, err)
	}
	done := make(chan error, 1)
	go func() { _, err := stream.Recv(); done <- err }()
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if err := <-done; err == nil { // Close ends it, on the old connection too
		t.Error("a message after Close")
	}
	if _, err := c.Issue(t.Context(), sdk.Request{Audience: "orders"}); err == nil || !strings.Contains(err.Error(), "closed") {
		t.Errorf("after Close: %v", err)
	}
}

func startAgent(t *testing.T, s *tokenServer) (address string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "df")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	path := filepath.Join(dir, "a.sock")
	lis, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	dayflyv1.RegisterTokenServiceServer(server, s)
	go func() { _ = server.Serve(lis) }()
	t.Cleanup(server.Stop)
	return "unix://" + path
}

func TestThroughTheAgent(t *testing.T) {
	c := newClient(t, sdk.Config{Address: startAgent(t, &tokenServer{})})
	got, err := c.Issue(t.Context(), sdk.Request{Audience: "orders"})
	if err != nil || got.Token.Reveal() != secretText {
		t.Errorf("got %v, %v", got, err)
	}
}

// A broker's clock may be off by hours: its answer is new all the same. An agent's is
// not, but the agent's clock is ours.
func TestClocks(t *testing.T) {
	td := newTrustDomain(t)
	for _, skew := range []time.Duration{-2 * time.Hour, 0, 2 * time.Hour} {
		s := &tokenServer{skew: skew}
		c := newClient(t, sdk.Config{Address: startBroker(t, td, brokerID, s), Source: td.Source(payments), BrokerID: brokerID})
		source := c.TokenSource(sdk.Request{Audience: "orders"})
		for range 3 {
			if _, err := source.Token(t.Context()); err != nil {
				t.Errorf("skew %v: %v", skew, err)
			}
		}
		source.Close()
		s.mu.Lock()
		if len(s.issue) != 1 {
			t.Errorf("skew %v: %d calls, want 1", skew, len(s.issue))
		}
		s.mu.Unlock()
	}

	s := &tokenServer{age: 6 * time.Minute}
	source := newClient(t, sdk.Config{Address: startAgent(t, s)}).TokenSource(sdk.Request{Audience: "orders"})
	defer source.Close()
	if cred, err := source.Token(t.Context()); err == nil {
		t.Errorf("an agent's expired credential was served: %v", cred)
	}
}

func TestErrors(t *testing.T) {
	st, err := status.New(codes.PermissionDenied, "locked").WithDetails(
		&errdetails.ErrorInfo{Domain: "other", Reason: "IDENTITY_LOCKED"},
		&errdetails.ErrorInfo{Domain: "dayfly", Reason: "IDENTITY_LOCKED", Metadata: map[string]string{"hint": "lift it", "lock": "7"}})
	if err != nil {
		t.Fatal(err)
	}
	s := &tokenServer{err: st.Err()}
	c := newClient(t, sdk.Config{Address: startAgent(t, s)})
	_, err = c.Issue(t.Context(), sdk.Request{Audience: "orders"})
	var e *sdk.Error
	if !errors.As(err, &e) {
		t.Fatalf("got %T %v", err, err)
	}
	if e.Code != codes.PermissionDenied || e.Reason != "IDENTITY_LOCKED" || e.Message != "locked" || e.Hint != "lift it" || e.Metadata["lock"] != "7" || len(e.Metadata) != 1 {
		t.Errorf("got %+v", e)
	}
	if !errors.Is(err, sdk.ErrIdentityLocked) || errors.Is(err, sdk.ErrPolicyDenied) || status.Code(err) != codes.PermissionDenied || e.Temporary() {
		t.Errorf("got %v", err)
	}
	if got, want := err.Error(), "IDENTITY_LOCKED: locked (lift it)"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}

	s.mu.Lock()
	s.err = status.Error(codes.Unavailable, "away")
	s.mu.Unlock()
	_, err = c.Issue(t.Context(), sdk.Request{Audience: "orders"})
	if !errors.As(err, &e) || e.Reason != "" || !e.Temporary() || errors.Is(err, &sdk.Error{}) {
		t.Errorf("got %+v", err)
	}
	if sdk.FromRPC(nil) != nil || sdk.FromRPC(os.ErrExist) != os.ErrExist {
		t.Error("FromRPC invents errors")
	}
}

// A call that no server would read is refused here, with a reason; nothing is sent.
func TestRequestTooLarge(t *testing.T) {
	s := &tokenServer{err: status.Error(codes.Internal, "it arrived")}
	c := newClient(t, sdk.Config{Address: startAgent(t, s)})
	for _, n := range []int{sdk.MaxSendBytes + 1, 5 << 20} {
		_, err := c.Issue(t.Context(), sdk.Request{Audience: strings.Repeat("a", n)})
		var e *sdk.Error
		if !errors.Is(err, sdk.ErrRequestTooLarge) || !errors.As(err, &e) || e.Code != codes.InvalidArgument || e.Message == "" || e.Hint == "" || e.Temporary() {
			t.Errorf("%d bytes: got %+v", n, err)
		}
		if details := e.GRPCStatus().Details(); len(details) != 1 {
			t.Errorf("passed on it says %v", details)
		}
	}
}

func TestConfig(t *testing.T) {
	td := newTrustDomain(t)
	tests := []struct {
		cfg  sdk.Config
		want []string // "" words: accepted
	}{
		{sdk.Config{}, []string{"address", "source", "broker ID"}},
		{sdk.Config{Address: "host"}, []string{"host:port"}},
		{sdk.Config{Address: "unix://relative"}, []string{"absolute"}},
		{sdk.Config{Address: "h:1", Source: td.Source(payments)}, []string{"pinned"}},
		{sdk.Config{Address: "h:1", Source: td.Source(payments), BrokerID: brokerID}, nil},
		{sdk.Config{Address: "unix:///run/x"}, nil},
	}
	for _, tt := range tests {
		c, err := sdk.New(tt.cfg)
		if (err == nil) != (tt.want == nil) {
			t.Errorf("%+v: got %v", tt.cfg, err)
		}
		for _, w := range tt.want {
			if !strings.Contains(fmt.Sprint(err), w) {
				t.Errorf("%+v: got %v, want a word on %s", tt.cfg, err, w)
			}
		}
		if c != nil {
			_ = c.Close()
		}
	}
}

func TestCredentialRedacts(t *testing.T) {
	c := newClient(t, sdk.Config{Address: startAgent(t, &tokenServer{})})
	cred, err := c.Issue(t.Context(), sdk.Request{Audience: "orders"})
	if err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	slog.New(slog.NewJSONHandler(&log, nil)).Info("got", "cred", cred)
	slog.New(slog.NewTextHandler(&log, nil)).Info("got", "cred", cred)
	b, _ := json.Marshal(cred)
	out := log.String() + string(b) + fmt.Sprintf("%v %+v %#v", cred, *cred, cred)
	if strings.Contains(out, secretText[:12]) {
		t.Error("the token shows")
	}
}
