package verify_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"net/http"
	"time"

	"github.com/dayflyhq/dayfly/sdk"
	"github.com/dayflyhq/dayfly/sdk/verify"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
)

// A service behind mTLS that lets only holders of a token for "orders" through.
func Example() {
	ctx := context.Background()
	source, err := workloadapi.NewX509Source(ctx)
	if err != nil {
		log.Fatal(err)
	}
	defer source.Close()
	client, err := sdk.New(sdk.Config{Address: "unix:///run/dayfly/agent.sock"})
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()

	verifier, err := verify.New(verify.Config{
		Conn:      client.Conn(),
		Audiences: []string{"orders"},
		Bundles:   source,
	})
	if err != nil {
		log.Fatal(err)
	}
	go func() { _ = verifier.Run(ctx) }()

	mux := http.NewServeMux()
	mux.HandleFunc("GET /orders", func(w http.ResponseWriter, r *http.Request) {
		caller, _ := verify.FromContext(r.Context())
		fmt.Fprintf(w, "for %s, by %s\n", caller.Root(), caller.Presenter())
	})
	mux.Handle("POST /orders", verify.HTTPScope(http.NotFoundHandler(), "orders:write"))
	server := &http.Server{
		Addr:              ":8443",
		Handler:           verifier.HTTP(mux),
		TLSConfig:         tlsconfig.MTLSServerConfig(source, source, tlsconfig.AuthorizeAny()),
		ReadHeaderTimeout: 10 * time.Second,
	}
	log.Fatal(server.ListenAndServeTLS("", ""))
}

// A gRPC service; health checks need no token.
func ExampleVerifier_StreamInterceptor() {
	var verifier *verify.Verifier      // of verify.New
	var source *workloadapi.X509Source // of workloadapi.NewX509Source
	server := grpc.NewServer(
		// credentials.NewTLS shows the peer's certificate to the interceptors.
		grpc.Creds(credentials.NewTLS(tlsconfig.MTLSServerConfig(source, source, tlsconfig.AuthorizeAny()))),
		grpc.UnaryInterceptor(verifier.UnaryInterceptor("/grpc.health.v1.Health/Check")),
		grpc.StreamInterceptor(verifier.StreamInterceptor("/grpc.health.v1.Health/Watch")),
	)
	_ = server
}

// A job that runs for longer than a request, and stops when its token dies.
func ExampleVerifier_Watch() {
	ctx := context.Background()
	var verifier *verify.Verifier // of verify.New
	var rawToken string           // from wherever the protocol carries it
	var peer verify.Peer          // whom the connection has proven

	caller, err := verifier.Verify(ctx, rawToken, peer)
	if errors.Is(err, verify.Because(verify.VerifierStale)) {
		return // try again later: nobody's token is accepted now
	}
	if err != nil {
		log.Print(verify.ReasonOf(err))
		return
	}
	if err := caller.RequireScope("orders:export"); err != nil {
		return
	}
	ctx, done := verifier.Watch(ctx, caller)
	defer done()
	<-ctx.Done()
	log.Print(context.Cause(ctx)) // TOKEN_REVOKED: ...
}
