package rpc_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/broker/rpc"
	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk/spiffetest"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
)

// proxied serves a world's broker to those whose mTLS ends before it, and connects to it.
func (w *world) proxied() *grpc.ClientConn {
	w.t.Helper()
	srv, err := rpc.NewJWTServer(rpc.Config{
		Broker: w.b, SVIDs: w.td.Source(brokerID), Bundle: w.bundles, JWT: w.td, Now: w.clock.Now, TrustDomains: []spiffeid.TrustDomain{domain},
	})
	if err != nil {
		w.t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		w.t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	w.t.Cleanup(func() {
		srv.Stop()
		if err := <-served; err != nil {
			w.t.Error(err)
		}
	})
	conn, err := grpc.NewClient("passthrough:///"+l.Addr().String(), grpc.WithTransportCredentials(credentials.NewTLS(tlsconfig.TLSClientConfig(w.td, tlsconfig.AuthorizeID(brokerID)))))
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { conn.Close() })
	return conn
}

func (w *world) jwt(id spiffeid.ID, audience ...string) string {
	w.t.Helper()
	w.clock.advance(max(0, time.Since(w.clock.Now()))) // it stood still, and a slow test's document isn't from the future
	s, err := w.td.IssueJWTSVID(id, audience, spiffetest.SVIDOptions{})
	if err != nil {
		w.t.Fatal(err)
	}
	return s
}

// showing is a call's context with metadata.
func showing(t *testing.T, authorization ...string) context.Context {
	t.Helper()
	ctx := soon(t)
	for _, a := range authorization {
		ctx = metadata.AppendToOutgoingContext(ctx, "authorization", a)
	}
	return ctx
}

func TestJWTServer(t *testing.T) {
	w := newWorld(t)
	conn := w.proxied()
	tokens := dayflyv1.NewTokenServiceClient(conn)
	req := &dayflyv1.IssueRequest{Audience: "orders"}
	good := w.jwt(payments, issuer)
	for _, scheme := range []string{"Bearer ", "bearer "} { // a scheme has no case
		resp, err := tokens.Issue(showing(t, scheme+good), req)
		if err != nil {
			t.Fatal(err)
		}
		tok, err := token.Inspect(resp.GetCredential().GetToken())
		if err != nil || tok.Root() != payments || !tok.Self().SVID.IsZero() {
			t.Errorf("got %+v, %v", tok, err)
		}
	}
	root, err := tokens.Issue(showing(t, "Bearer "+good), req)
	if err != nil {
		t.Fatal(err)
	}
	orders := spiffeid.RequireFromString("spiffe://example.org/orders")
	derived, err := tokens.Exchange(showing(t, "Bearer "+w.jwt(orders, issuer)), &dayflyv1.ExchangeRequest{Audience: "ledger", SubjectToken: root.GetCredential().GetToken()})
	if err != nil {
		t.Fatal(err)
	}
	if tok, err := token.Inspect(derived.GetCredential().GetToken()); err != nil || tok.Presenter() != orders || tok.Root() != payments {
		t.Errorf("exchanged for %+v, %v", tok, err)
	}
	_, err = tokens.Issue(showing(t, "Bearer "+good), &dayflyv1.IssueRequest{Audience: "orders", Binding: dayflyv1.Binding_BINDING_X5T})
	refused(t, err, codes.PermissionDenied, "BINDING_NEEDS_CERTIFICATE")

	partner := spiffetest.ForTest(t, spiffetest.Config{TrustDomain: spiffeid.RequireTrustDomainFromString("partner.example")})
	if err := w.td.FederateJWT(partner.JWTBundle()); err != nil {
		t.Fatal(err)
	}
	elsewhere, err := partner.IssueJWTSVID(spiffeid.RequireFromString("spiffe://partner.example/shop"), []string{issuer}, spiffetest.SVIDOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for name, authorization := range map[string][]string{
		"nothing":          {},
		"two":              {"Bearer " + good, "Bearer " + good},
		"another scheme":   {"Basic " + good},
		"no scheme":        {good},
		"another audience": {"Bearer " + w.jwt(payments, "https://other.example.org")},
		"more than one":    {"Bearer " + w.jwt(payments, issuer, "https://other.example.org")},
		"a trust domain that is served with certificates only": {"Bearer " + elsewhere},
		"an access token": {"Bearer " + root.GetCredential().GetToken()},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := tokens.Issue(showing(t, authorization...), req)
			refused(t, err, codes.Unauthenticated, "JWT_SVID_INVALID")
		})
	}
	w.clock.advance(time.Hour)
	_, err = tokens.Issue(showing(t, "Bearer "+good), req)
	refused(t, err, codes.Unauthenticated, "JWT_SVID_INVALID")
}

// A bearer document is good for credentials and for nothing else; and where mTLS is
// wanted it is good for nothing.
func TestJWTServerHasOneService(t *testing.T) {
	w := newWorld(t)
	conn := w.proxied()
	ctx := showing(t, "Bearer "+w.jwt(payments, issuer))
	_, err := dayflyv1.NewRevocationServiceClient(conn).Revoke(ctx, &dayflyv1.RevokeRequest{Reason: "r"})
	refused(t, err, codes.Unimplemented, "")
	_, err = dayflyv1.NewGrantServiceClient(conn).ListGrants(ctx, &dayflyv1.ListGrantsRequest{})
	refused(t, err, codes.Unimplemented, "")
	s, err := dayflyv1.NewFeedServiceClient(conn).Follow(ctx)
	if err == nil {
		_, err = s.Recv()
	}
	refused(t, err, codes.Unimplemented, "")
	_, err = dayflyv1.NewTokenServiceClient(w.dial(tlsconfig.TLSClientConfig(w.td, tlsconfig.AuthorizeID(brokerID)))).Issue(ctx, &dayflyv1.IssueRequest{Audience: "orders"})
	refused(t, err, codes.Unavailable, "")
}

// dials counts how often a client connects.
type dials struct{ n atomic.Int32 }

func (d *dials) dial(ctx context.Context, addr string) (net.Conn, error) {
	d.n.Add(1)
	return new(net.Dialer).DialContext(ctx, "tcp", addr)
}

// Connections that have proved nothing give way to others, for as long as they last; one
// that has doesn't.
func TestJWTServerBoundsConnections(t *testing.T) {
	w := newWorld(t)
	conn := w.proxied()
	addr := conn.Target()[len("passthrough:///"):]
	cfg := tlsconfig.TLSClientConfig(w.td, tlsconfig.AuthorizeID(brokerID))
	cfg.NextProtos = []string{"h2"}
	proven := &dials{}
	client, err := grpc.NewClient(conn.Target(), grpc.WithTransportCredentials(credentials.NewTLS(cfg.Clone())), grpc.WithContextDialer(proven.dial))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	issue := func() error {
		_, err := dayflyv1.NewTokenServiceClient(client).Issue(showing(t, "Bearer "+w.jwt(payments, issuer)), &dayflyv1.IssueRequest{Audience: "orders"}, grpc.WaitForReady(true))
		return err
	}
	if err := issue(); err != nil {
		t.Fatal(err)
	}
	var open []net.Conn
	for range rpc.MaxHandshakes + 20 {
		c, err := tls.Dial("tcp", addr, cfg)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		_, _ = c.Write([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00")) // as a client begins
		open = append(open, c)
	}
	for i, c := range open[:20] {
		_ = c.SetReadDeadline(time.Now().Add(time.Minute))
		if _, err := io.Copy(io.Discard, c); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("number %d of the oldest stands", i)
		}
	}
	if _, err := dayflyv1.NewTokenServiceClient(conn).Issue(showing(t, "Bearer "+w.jwt(payments, issuer)), &dayflyv1.IssueRequest{Audience: "orders"}, grpc.WaitForReady(true)); err != nil {
		t.Fatal(err)
	}
	if err := issue(); err != nil || proven.n.Load() != 1 {
		t.Errorf("the connection of a client that has proved who it is was closed for strangers: %d dials, %v", proven.n.Load(), err)
	}
	// What such a connection may have under way, and so in memory.
	head := make([]byte, 9) // RFC 9113 section 4.1; the first frame is SETTINGS
	last := open[len(open)-1]
	if _, err := io.ReadFull(last, head); err != nil || head[3] != 4 {
		t.Fatalf("first frame %x, %v", head, err)
	}
	settings := make([]byte, int(head[1])<<8|int(head[2]))
	if _, err := io.ReadFull(last, settings); err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(settings, []byte{0, 3, 0, 0, 0, rpc.MaxStreamsOfStranger}) { // MAX_CONCURRENT_STREAMS
		t.Errorf("any number of calls on a connection: %x", settings)
	}
}
