package e2e_test

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/e2e/sandbox"
	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/sdk"
	"github.com/dayflyhq/dayfly/sdk/spiffetest"
	"github.com/dayflyhq/dayfly/sdk/verify"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/durationpb"
)

// TestFederatedTrustDomain: a trust domain named in the configuration is served as policy
// says, and no other, whatever bundles the Workload API gives; once its bundle is gone its
// calls and its stream are refused on connections that were open, until it is back.
func TestFederatedTrustDomain(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	partner := spiffeid.RequireFromString("spiffe://partner.test/shop")
	box := makeBox(t, "trust_domains: [partner.test]\n")
	allowPartner(t, box, partner)
	foreign := federate(t, box, partner.TrustDomain())
	if err := box.StartBroker(ctx); err != nil {
		t.Fatal(err)
	}
	orders := must(box.Client(ctx, sandbox.Orders, box.Info.GRPC))(t)
	service := must(box.StartService(ctx, sandbox.ServiceConfig{ID: sandbox.Orders, Audience: "orders", Feed: orders}))(t)
	payments := must(box.Client(ctx, sandbox.Payments, box.Info.GRPC))(t)

	client := foreignClient(ctx, t, foreign, partner, box.Info.GRPC)
	cred := must(client.Issue(ctx, sdk.Request{Audience: "orders"}))(t)
	accepted := must(service.Verifier.Verify(ctx, cred.Token.Reveal(), verify.Peer{ID: partner}))(t)
	if accepted.Root() != partner {
		t.Errorf("the token's sub is %s", accepted.Root())
	}
	_, err := client.Issue(ctx, sdk.Request{Audience: "ledger"})
	wantError(t, err, codes.PermissionDenied, "POLICY_DENIED")

	// A domain that the Workload API knows and the configuration doesn't.
	stranger := spiffeid.RequireFromString("spiffe://stranger.test/shop")
	strange := foreignClient(ctx, t, federate(t, box, stranger.TrustDomain()), stranger, box.Info.GRPC)
	_, err = strange.Issue(ctx, sdk.Request{Audience: "orders"})
	wantNoConnection(t, err)

	follow := must(dayflyv1.NewFeedServiceClient(client.Conn()).Follow(ctx))(t)
	if err := follow.Send(&dayflyv1.FollowRequest{Message: &dayflyv1.FollowRequest_Subscribe{Subscribe: &dayflyv1.Subscribe{
		Instance: "partner-0001", Audiences: []string{"orders"}, MaxStaleness: durationpb.New(2 * time.Second), OnStale: dayflyv1.OnStale_ON_STALE_REFUSE,
	}}}); err != nil {
		t.Fatal(err)
	}
	if m := must(follow.Recv())(t); m.GetWelcome() == nil {
		t.Fatalf("the feed begins with %v", m)
	}

	if err := box.TD.Unfederate(partner.TrustDomain()); err != nil {
		t.Fatal(err)
	}
	// The broker hears of it from the Workload API in its own time.
	for err = nil; err == nil; {
		_, err = client.Issue(ctx, sdk.Request{Audience: "orders"})
	}
	wantError(t, err, codes.Unauthenticated, "SVID_INVALID")
	// An EOF says that the stream has ended already; Recv says why.
	_ = follow.Send(&dayflyv1.FollowRequest{Message: &dayflyv1.FollowRequest_Ping{Ping: &dayflyv1.Ping{Nonce: []byte("12345678")}}})
	for err = nil; err == nil; {
		_, err = follow.Recv()
	}
	wantError(t, err, codes.Unauthenticated, "SVID_INVALID")
	_, err = foreignClient(ctx, t, foreign, partner, box.Info.GRPC).Issue(ctx, sdk.Request{Audience: "orders"})
	wantNoConnection(t, err)
	must(payments.Issue(ctx, sdk.Request{Audience: "orders"}))(t) // nobody else's business

	if err := box.TD.Federate(foreign.Bundle()); err != nil {
		t.Fatal(err)
	}
	for err = context.Canceled; err != nil && ctx.Err() == nil; {
		_, err = client.Issue(ctx, sdk.Request{Audience: "orders"})
	}
	if err != nil {
		t.Errorf("back again: %v", err)
	}
}

// allowPartner lets an identity of another trust domain in, before the broker starts.
func allowPartner(t *testing.T, box *sandbox.Sandbox, id spiffeid.ID) {
	t.Helper()
	path := filepath.Join(box.PolicyDir(), "data.yaml")
	data := string(must(os.ReadFile(path))(t))
	for at, more := range map[string]string{
		"\nentitlements:\n": "  " + id.String() + ":\n    orders: {scopes: [orders.read]}\n",
		"\nverifiers:\n":    "  " + id.String() + ": {follow: [orders]}\n",
	} {
		if !strings.Contains(data, at) {
			t.Fatalf("policy data has no%s", at)
		}
		data = strings.Replace(data, at, at+more, 1)
	}
	if err := os.WriteFile(path, []byte(data), 0o600); err != nil {
		t.Fatal(err)
	}
}

// federate makes another trust domain, whose Workload API and the sandbox's give each
// other's bundle.
func federate(t *testing.T, box *sandbox.Sandbox, name spiffeid.TrustDomain) *spiffetest.TrustDomain {
	t.Helper()
	td := spiffetest.ForTest(t, spiffetest.Config{TrustDomain: name})
	if err := td.Federate(box.TD.Bundle()); err != nil {
		t.Fatal(err)
	}
	if err := box.TD.Federate(td.Bundle()); err != nil {
		t.Fatal(err)
	}
	return td
}

// foreignClient is a client of the broker with an identity of another trust domain.
func foreignClient(ctx context.Context, t *testing.T, td *spiffetest.TrustDomain, id spiffeid.ID, broker string) *sdk.Client {
	t.Helper()
	socket := must(td.Workload(id))(t)
	source := must(workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr(socket))))(t)
	t.Cleanup(func() { source.Close() })
	client := must(sdk.New(sdk.Config{Address: broker, Source: source, BrokerID: sandbox.Broker}))(t)
	t.Cleanup(func() { client.Close() })
	return client
}

// wantNoConnection checks that a client was refused in the handshake.
func wantNoConnection(t *testing.T, err error) {
	t.Helper()
	if e, ok := sdk.FromRPC(err).(*sdk.Error); !ok || e.Code != codes.Unavailable || e.Reason != "" {
		t.Errorf("got %v, want no connection", err)
	}
}
