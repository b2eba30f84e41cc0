package e2e_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/e2e/sandbox"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk"
	"github.com/dayflyhq/dayfly/sdk/verify"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// TestCertificateBoundTokens: tokens that are bound to the certificate (RFC 8705) follow
// it over its rotations by a Workload API, through the broker and through an agent, while
// many use them at once over connections that are kept open. A stolen one, or yesterday's,
// is refused.
func TestCertificateBoundTokens(t *testing.T) {
	ctx := t.Context()
	box := newBox(t)
	feed := must(box.Client(ctx, sandbox.Orders, box.Info.GRPC))(t)
	orders := must(box.StartService(ctx, sandbox.ServiceConfig{ID: sandbox.Orders, Audience: "orders", Feed: feed}))(t)
	src := must(box.Source(ctx, sandbox.Payments))(t)
	agent := must(box.StartAgent(ctx, sandbox.Payments))(t)
	base := func() *http.Transport {
		return &http.Transport{TLSClientConfig: tlsconfig.MTLSClientConfig(src, src, tlsconfig.AuthorizeID(sandbox.Orders))}
	}
	for name, cfg := range map[string]sdk.Config{
		"broker":                        {Address: box.Info.GRPC, Source: src, BrokerID: sandbox.Broker},
		"agent":                         {Address: agent, Source: src},
		"agent that is asked each time": {Address: agent},
	} {
		t.Run(name, func(t *testing.T) {
			client := must(sdk.New(cfg))(t)
			defer client.Close()
			tokens := client.TokenSource(sdk.Request{Audience: "orders", Binding: token.BindingX5T})
			defer tokens.Close()
			transport := &sdk.Transport{Source: tokens, Base: base()}
			defer transport.CloseIdleConnections()
			before := must(tokens.Token(ctx))(t)
			if shown := must(token.Inspect(before.Token.Reveal()))(t); shown.Binding != token.BindingX5T || shown.Certificate != leafOf(t, src) {
				t.Fatalf("bound by %s to %x", shown.Binding, shown.Certificate)
			}
			wantRefused(t, box, sandbox.Reports, orders, before, verify.CertificateMismatch)

			stop := make(chan struct{})
			var wg sync.WaitGroup
			for range 4 {
				wg.Go(func() {
					for {
						select {
						case <-stop:
							return
						default:
						}
						if !callsOrders(ctx, t, transport, orders.URL, name == "broker") {
							return
						}
					}
				})
			}
			for range 5 {
				rotate(t, box, src)
				if cred := must(tokens.Token(ctx))(t); cfg.Source != nil {
					if shown := must(token.Inspect(cred.Token.Reveal()))(t); shown.Certificate != leafOf(t, src) {
						t.Error("a token that is bound to the certificate from before is given out")
					}
				}
				callsOrders(ctx, t, transport, orders.URL, name == "broker")
			}
			close(stop)
			wg.Wait()
			wantRefused(t, box, sandbox.Payments, orders, before, verify.CertificateMismatch)
		})
	}

	// What is bound to the identity survives.
	client := must(box.Client(ctx, sandbox.Payments, box.Info.GRPC))(t)
	tokens := client.TokenSource(sdk.Request{Audience: "orders"})
	defer tokens.Close()
	before := must(tokens.Token(ctx))(t)
	rotate(t, box, src)
	if after := must(tokens.Token(ctx))(t); after.Grant != before.Grant {
		t.Error("a token that is bound to the identity was dropped with the certificate")
	}
	must(box.Call(ctx, sandbox.Payments, orders, before.Token))(t)
}

// rotate has the Workload API give another SVID, and returns once the source has it.
func rotate(t *testing.T, box *sandbox.Sandbox, src *workloadapi.X509Source) {
	t.Helper()
	old := leafOf(t, src)
	if err := box.TD.Rotate(sandbox.Payments); err != nil {
		t.Fatal(err)
	}
	for leafOf(t, src) == old {
		if t.Context().Err() != nil {
			t.Fatal("the SVID doesn't rotate")
		}
		time.Sleep(time.Millisecond)
	}
}

func leafOf(t *testing.T, src *workloadapi.X509Source) [32]byte {
	t.Helper()
	svid := must(src.GetX509SVID())(t)
	return sha256.Sum256(svid.Certificates[0].Raw)
}

// callsOrders makes one request. Through the broker none may be refused. An agent hears of
// a rotation in its own time: until then what it gives is bound to the other certificate.
func callsOrders(ctx context.Context, t *testing.T, rt http.RoundTripper, url string, first bool) bool {
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			t.Error(err)
			return false
		}
		resp, err := rt.RoundTrip(req)
		if !first && errors.Is(err, sdk.ErrOtherCertificate) {
			time.Sleep(10 * time.Millisecond)
			continue
		}
		if err != nil {
			t.Error(err)
			return false
		}
		body, _ := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if resp.StatusCode == http.StatusOK {
			return true
		}
		if first || resp.StatusCode != http.StatusUnauthorized {
			t.Errorf("%d %s", resp.StatusCode, body)
			return false
		}
		time.Sleep(10 * time.Millisecond)
	}
}
