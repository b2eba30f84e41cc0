package spiffetest_test

import (
	"context"
	"fmt"
	"log"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/metadata"

	"github.com/dayflyhq/dayfly/sdk/spiffetest"
)

// A program under test finds its identity as in production: by the address in
// SPIFFE_ENDPOINT_SOCKET.
func Example() {
	ctx := context.Background()
	td, err := spiffetest.New(spiffetest.Config{
		TrustDomain: spiffeid.RequireTrustDomainFromString("example.org"),
	})
	if err != nil {
		log.Fatal(err)
	}
	defer td.Close()

	addr, err := td.Workload(spiffeid.RequireFromString("spiffe://example.org/payments"))
	if err != nil {
		log.Fatal(err)
	}
	source, err := workloadapi.NewX509Source(ctx,
		workloadapi.WithClientOptions(workloadapi.WithAddr(addr)))
	if err != nil {
		log.Fatal(err)
	}
	defer source.Close()

	svid, err := source.GetX509SVID()
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(svid.ID)
	// Output: spiffe://example.org/payments
}

// withHeader adds what every caller of a Workload API must send.
func withHeader(ctx context.Context) context.Context {
	return metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
}
