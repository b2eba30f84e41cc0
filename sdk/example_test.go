package sdk_test

import (
	"context"
	"errors"
	"log"
	"net/http"

	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
)

// Straight to the broker, with this workload's SVID.
func Example() {
	ctx := context.Background()
	source, err := workloadapi.NewX509Source(ctx)
	if err != nil {
		log.Fatal(err)
	}
	defer source.Close()
	client, err := sdk.New(sdk.Config{
		Address:  "broker.example.org:8443",
		Source:   source,
		BrokerID: spiffeid.RequireFromString("spiffe://example.org/dayfly/broker"),
	})
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()

	orders := client.TokenSource(sdk.Request{Audience: "orders", Scopes: []string{"orders.read"}})
	defer orders.Close()
	web := &http.Client{Transport: &sdk.Transport{Source: orders}}
	resp, err := web.Get("https://orders.example.org/orders")
	if err != nil {
		log.Fatal(err)
	}
	_ = resp.Body.Close()
}

// Through the agent beside: there is nothing but its socket to know.
func ExampleClient_Issue() {
	client, err := sdk.New(sdk.Config{Address: "unix:///run/dayfly/agent.sock"})
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	cred, err := client.Issue(context.Background(), sdk.Request{Audience: "orders"})
	if errors.Is(err, sdk.ErrIdentityLocked) {
		log.Fatal("this identity is locked: ", err)
	}
	if err != nil {
		log.Fatal(err)
	}
	log.Printf("grant %s until %s", cred.Grant, cred.Expires) // never the token
}

// A service exchanges the token that it was called with for one of the next service.
func ExampleClient_Exchange() {
	var client *sdk.Client
	var presented token.Secret // verify.Verified.Token, of whom it was called by
	cred, err := client.Exchange(context.Background(), presented, sdk.Request{Audience: "ledger"})
	if errors.Is(err, sdk.ErrSubjectExpired) {
		return
	}
	_ = cred
}

// Every call of a gRPC client carries the current token.
func ExampleTokenSource_PerRPC() {
	var orders *sdk.TokenSource
	conn, err := grpc.NewClient("orders.example.org:8443",
		grpc.WithPerRPCCredentials(orders.PerRPC()),
		// and grpc.WithTransportCredentials(...) with this workload's SVID
	)
	if err != nil {
		log.Fatal(err)
	}
	defer conn.Close()
}

// Renewal in the background, and the credential dropped when it is known to be revoked.
func ExampleTokenSource_Run() {
	ctx := context.Background()
	var orders *sdk.TokenSource
	go func() { _ = orders.Run(ctx) }()
	orders.Invalidate("the-revoked-grant")
}

// For libraries that speak OAuth.
func ExampleTokenSource_OAuth2() {
	var orders *sdk.TokenSource
	tok, err := orders.OAuth2(context.Background()).Token()
	if err != nil {
		log.Fatal(err)
	}
	_ = tok.Expiry
}
