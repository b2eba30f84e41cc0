// Package sdk is what a workload needs of dayfly: credentials that live for minutes,
// fetched over mTLS from the broker or over a unix socket from the agent beside it,
// and kept fresh before anyone asks.
//
//	client, err := sdk.New(sdk.Config{
//		Address:  "broker.example.org:8443",
//		Source:   source, // *workloadapi.X509Source: this workload's SVID
//		BrokerID: spiffeid.RequireFromString("spiffe://example.org/dayfly/broker"),
//	})
//	if err != nil { ... }
//	defer client.Close()
//
//	orders := client.TokenSource(sdk.Request{Audience: "orders", Scopes: []string{"orders.read"}})
//	defer orders.Close()
//	web := &http.Client{Transport: &sdk.Transport{Source: orders}}
//
// Through the agent there is nothing but its socket to know:
//
//	client, err := sdk.New(sdk.Config{Address: "unix:///run/dayfly/agent.sock"})
//
// Refusals come as *Error: a gRPC code, a stable reason and a hint. A token is a
// token.Secret, which shows nothing of itself however it is printed; Reveal is the one
// way out. The other end, the service that verifies tokens, is package verify.
package sdk
