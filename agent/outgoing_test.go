package agent_test

import (
	"bufio"
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dayflyhq/dayfly/agent"
	"github.com/dayflyhq/dayfly/agent/outgoing"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"google.golang.org/grpc/codes"
)

var upstreamID = spiffeid.RequireFromString("spiffe://td/orders")

// overSocket is a client of what listens on a unix socket.
func overSocket(t *testing.T, path string) *http.Client {
	tr := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", path)
	}}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr}
}

// TestOutgoing: a stream through the proxy ends when the feed says that its token is
// revoked, the next request has another, a 401 makes another be fetched, and the broker's refusal
// is the answer.
func TestOutgoing(t *testing.T) {
	noLeaks(t)
	td := newDomain(t)
	b := newBroker(t, td)
	if _, err := td.Workload(upstreamID); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var refuse string
	seen := make(chan string, 16)
	upstream := &http.Server{ErrorLog: slog.NewLogLogger(slog.DiscardHandler, 0), TLSConfig: tlsconfig.MTLSServerConfig(td.Source(upstreamID), td, tlsconfig.AuthorizeMemberOf(domain)), Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		auth := r.Header.Get("Authorization")
		seen <- auth
		if auth == refuse {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		_, _ = io.WriteString(w, "first\n")
		if r.URL.Path == "/stream" {
			_ = http.NewResponseController(w).Flush()
			<-r.Context().Done()
		}
	})}
	go func() { _ = upstream.ServeTLS(l, "", "") }()
	t.Cleanup(func() { _ = upstream.Close() })
	var path string
	f := start(t, td, b, func(c *agent.Config) {
		path = filepath.Join(tempDir(t), "out.sock")
		socket, err := agent.Listen(agent.SocketConfig{Path: path})
		if err != nil {
			t.Fatal(err)
		}
		c.Bundles = c.Source.(*agent.Identity)
		c.Outgoing = []outgoing.Listener{{Listener: socket, Upstreams: []outgoing.Upstream{{URL: "https://" + l.Addr().String(), SPIFFEID: upstreamID, Request: sdk.Request{Audience: "orders"}}}}}
	})
	f.issue(f.client(), sdk.Request{Audience: "orders"})
	c := overSocket(t, path)
	resp, err := c.Get("http://orders/stream")
	if err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewReader(resp.Body)
	if line, err := lines.ReadString('\n'); err != nil || line != "first\n" {
		t.Fatalf("%d %q %v", resp.StatusCode, line, err)
	}
	used := <-seen
	tok, err := token.Inspect(strings.TrimPrefix(used, "Bearer "))
	if err != nil || tok.Claims.Audience != "orders" {
		t.Fatalf("%v %v", tok, err)
	}
	selector, err := revocation.Parse("grant:" + tok.Claims.Grant().String())
	if err != nil {
		t.Fatal(err)
	}
	b.revoke(selector)
	if _, err := lines.ReadString('\n'); err == nil {
		t.Error("the stream goes on")
	}
	next := func() {
		t.Helper()
		resp, err := c.Get("http://orders/")
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		if body, err := io.ReadAll(resp.Body); err != nil || resp.StatusCode != http.StatusOK {
			t.Errorf("%d %s %v", resp.StatusCode, body, err)
		}
	}
	next()
	if refuse = <-seen; refuse == used {
		t.Error("a revoked token was sent")
	}
	next()
	if first, second := <-seen, <-seen; first != refuse || second == refuse {
		t.Error("a 401 made no other token be sent")
	}
	b.set(func(b *broker) { b.refuse = refusal(codes.PermissionDenied, "IDENTITY_LOCKED", "locked") })
	if selector, err = revocation.Parse("identity:" + payments.String()); err != nil {
		t.Fatal(err)
	}
	b.revoke(selector)
	eventually(t, "the refusal", func() error {
		resp, err := c.Get("http://orders/")
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		var got struct{ Reason string }
		if err := json.NewDecoder(resp.Body).Decode(&got); err != nil || resp.StatusCode != http.StatusBadGateway || got.Reason != "IDENTITY_LOCKED" {
			return os.ErrInvalid
		}
		return nil
	})
}
