package e2e_test

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/e2e/sandbox"
	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk"
	collectorpb "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
)

// A collector is an OTLP receiver that keeps what it gets, as it came.
type collector struct {
	collectorpb.UnimplementedTraceServiceServer

	mu    sync.Mutex
	names map[string]int
	wire  []byte
}

func (c *collector) Export(_ context.Context, m *collectorpb.ExportTraceServiceRequest) (*collectorpb.ExportTraceServiceResponse, error) {
	raw, err := proto.Marshal(m)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.wire = append(c.wire, raw...)
	for _, r := range m.GetResourceSpans() {
		for _, s := range r.GetScopeSpans() {
			for _, span := range s.GetSpans() {
				c.names[span.GetName()]++
			}
		}
	}
	return &collectorpb.ExportTraceServiceResponse{}, nil
}

// TestTraces: with a collector in the configuration every call becomes a span there,
// those of the last moment too, and no span holds a credential, not even a part of one.
func TestTraces(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	listener := must(net.Listen("tcp", "127.0.0.1:0"))(t)
	got := &collector{names: map[string]int{}}
	server := grpc.NewServer()
	collectorpb.RegisterTraceServiceServer(server, got)
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	t.Cleanup(func() { server.Stop(); <-served })

	box := makeBox(t, fmt.Sprintf("traces: http://%s\n", listener.Addr()))
	if err := box.StartBroker(ctx); err != nil {
		t.Fatal(err)
	}
	payments := must(box.Client(ctx, sandbox.Payments, box.Info.GRPC))(t)
	orders := must(box.Client(ctx, sandbox.Orders, box.Info.GRPC))(t)
	alice := must(box.Client(ctx, sandbox.Alice, box.Info.GRPC))(t)
	root := must(payments.Issue(ctx, sdk.Request{Audience: "orders"}))(t)
	derived := must(orders.Exchange(ctx, root.Token, sdk.Request{Audience: "ledger"}))(t)
	// Credentials where they don't belong: a token that is refused, as an audience, as a
	// scope, and in the path and the query of a URL.
	secrets := []token.Secret{root.Token, derived.Token}
	_, err := payments.Exchange(ctx, root.Token, sdk.Request{Audience: "ledger"})
	wantError(t, err, codes.PermissionDenied, "SUBJECT_TOKEN_NOT_ADDRESSED")
	_, err = payments.Issue(ctx, sdk.Request{Audience: root.Token.Reveal()})
	wantError(t, err, codes.InvalidArgument, "INVALID_REQUEST")
	_, err = payments.Issue(ctx, sdk.Request{Audience: "orders", Scopes: []string{root.Token.Reveal()}})
	wantError(t, err, codes.InvalidArgument, "INVALID_REQUEST")
	for _, path := range []string{"/jwks.json", "/" + root.Token.Reveal(), "/jwks.json?access_token=" + root.Token.Reveal()} {
		resp := must(http.Get("http://" + box.Info.Public + path))(t)
		resp.Body.Close()
	}
	must(dayflyv1.NewRevocationServiceClient(alice.Conn()).Revoke(ctx, &dayflyv1.RevokeRequest{
		Selectors: []*dayflyv1.Selector{{Selector: &dayflyv1.Selector_Grant{Grant: root.Grant}}}, Reason: "test",
	}))(t)
	if err := box.StopBroker(); err != nil { // it sends what still waits
		t.Fatal(err)
	}

	got.mu.Lock()
	defer got.mu.Unlock()
	for name, n := range map[string]int{
		"dayfly.v1.TokenService/Issue": 3, "dayfly.v1.TokenService/Exchange": 2, "dayfly.v1.RevocationService/Revoke": 1,
	} {
		if got.names[name] != n {
			t.Errorf("%d spans %q, want %d; all: %v", got.names[name], name, n, got.names)
		}
	}
	if n := got.names["GET"] + got.names["GET /jwks.json"]; n < 2 {
		t.Errorf("no spans of the public listener: %v", got.names)
	}
	for _, s := range secrets {
		for _, part := range strings.Split(s.Reveal(), ".")[1:] { // the header is the same in all
			for i := 0; i+24 <= len(part); i += 24 {
				if bytes.Contains(got.wire, []byte(part[i:i+24])) {
					t.Fatal("a span holds a part of a credential")
				}
			}
		}
	}
}
