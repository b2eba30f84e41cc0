package clients_test

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/e2e/sandbox"
	"github.com/dayflyhq/dayfly/sdk"
	"github.com/dayflyhq/dayfly/sdk/verify"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/reflection"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
)

// grpcOrders is the service orders over gRPC and mTLS, with the SDK's verifier before it.
func (b *box) grpcOrders(t *testing.T) string {
	t.Helper()
	src := must(b.Source(t.Context(), sandbox.Orders))(t)
	v := must(verify.New(verify.Config{Conn: b.client(t, sandbox.Orders).Conn(), Audiences: []string{"orders"}, Bundles: src, MaxStaleness: sandbox.Staleness, Leeway: -1}))(t)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() { defer close(ended); _ = v.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-ended })
	if err := v.WaitReady(t.Context()); err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer(grpc.Creds(credentials.NewTLS(tlsconfig.MTLSServerConfig(src, src, tlsconfig.AuthorizeMemberOf(sandbox.TrustDomain)))),
		grpc.UnaryInterceptor(v.UnaryInterceptor()), grpc.StreamInterceptor(v.StreamInterceptor()))
	healthpb.RegisterHealthServer(s, health.NewServer())
	reflection.Register(s)
	l := must(net.Listen("tcp", "127.0.0.1:0"))(t)
	go func() { _ = s.Serve(l) }()
	t.Cleanup(s.Stop)
	return "https://" + l.Addr().String()
}

// TestOutgoingClients: curl and gRPC's own client, without a credential, through the agent
// to services that verify, over mTLS; after a revocation a stream ends, and what comes next
// hears why.
func TestOutgoingClients(t *testing.T) {
	b := newBox(t, "", "")
	orders := must(b.StartService(t.Context(), sandbox.ServiceConfig{ID: sandbox.Orders, Audience: "orders", Feed: b.client(t, sandbox.Orders)}))(t)
	dir := must(os.MkdirTemp("", "df"))(t)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	socket, secret, listen, forward := filepath.Join(dir, "o.sock"), filepath.Join(dir, "secret"), freePort(t), freePort(t)
	b.agentWith(t, sandbox.Payments, fmt.Sprintf(`outgoing:
  - socket: %[1]s
    upstreams:
      - {url: %[5]q, spiffe_id: %[7]q, credential: {audience: orders}}
      - {url: %[6]q, path: /grpc.health.v1.Health, spiffe_id: %[7]q, credential: {audience: orders}}
      - {url: %[6]q, path: /grpc.reflection.v1.ServerReflection, spiffe_id: %[7]q, credential: {audience: orders}}
  - listen: %[3]q
    secret_file: %[2]s
    upstreams: [{url: %[5]q, spiffe_id: %[7]q, credential: {audience: orders, binding: x5t}}]
  - listen: %[4]q
    mode: forward
    open: true
    upstreams: [{url: %[5]q, host: orders.example.org, spiffe_id: %[7]q, credential: {audience: orders}}]
`, socket, secret, listen, forward, orders.URL, b.grpcOrders(t), sandbox.Orders))
	curl := func(args ...string) string {
		t.Helper()
		out, err := exec.CommandContext(t.Context(), "curl", append([]string{"-sS", "--noproxy", ""}, args...)...).CombinedOutput()
		if err != nil {
			t.Errorf("curl %v: %v", args, err)
		}
		return string(out)
	}
	pass := strings.TrimSpace(string(must(os.ReadFile(secret))(t)))
	for _, args := range [][]string{
		{"--unix-socket", socket, "http://orders/"},
		{"--unix-socket", socket, "-H", "Authorization: Bearer evil", "--http2-prior-knowledge", "http://orders/"},
		{"--unix-socket", socket, "--http2", "http://orders/"},
		{"-u", "me:" + pass, "http://" + listen},
		{"-x", forward, "http://orders.example.org/x"},
	} {
		if got := curl(args...); !strings.Contains(got, `"sub":"`+sandbox.Payments.String()) {
			t.Errorf("curl %v: %s", args, got)
		}
	}
	if got := curl("http://" + listen); !strings.Contains(got, "PROXY_AUTHORIZATION_INVALID") {
		t.Errorf("without the secret: %s", got)
	}

	cc := must(grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials())))(t)
	t.Cleanup(func() { _ = cc.Close() })
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if got := must(healthpb.NewHealthClient(cc).Check(ctx, &healthpb.HealthCheckRequest{}))(t); got.GetStatus() != healthpb.HealthCheckResponse_SERVING {
		t.Errorf("health: %v", got)
	}
	stream := must(reflectionpb.NewServerReflectionClient(cc).ServerReflectionInfo(ctx))(t)
	for range 50 {
		if err := stream.Send(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{}}); err != nil {
			t.Fatal(err)
		}
		if got := must(stream.Recv())(t); len(got.GetListServicesResponse().GetService()) < 2 {
			t.Fatalf("reflection: %v", got)
		}
	}
	if out, err := b.dayfly(t, sandbox.Alice, "revoke", "--identity", sandbox.Payments.String(), "--reason", "test", "--yes"); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if _, err := stream.Recv(); grpcCode(err) != codes.Unauthenticated {
		t.Errorf("the stream: %v", err)
	}
	for refused := range 2 {
		_, err := healthpb.NewHealthClient(cc).Check(ctx, &healthpb.HealthCheckRequest{})
		if grpcCode(err) != codes.Unauthenticated || !strings.Contains(fmt.Sprint(sdk.FromRPC(err)), "IDENTITY_LOCKED") {
			t.Errorf("call %d: %v", refused, sdk.FromRPC(err))
		}
	}
	if got := curl("-w", "%{http_code}", "--unix-socket", socket, "http://orders/"); !strings.Contains(got, "IDENTITY_LOCKED") || !strings.HasSuffix(got, "502") {
		t.Errorf("revoked: %s", got)
	}
}

func grpcCode(err error) codes.Code {
	e, ok := sdk.FromRPC(err).(*sdk.Error)
	if !ok {
		return codes.OK
	}
	return e.Code
}
