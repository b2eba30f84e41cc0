package brokerd_test

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/cmd/internal/brokerd"
	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/sdk"
	"github.com/dayflyhq/dayfly/sdk/spiffetest"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
)

// TestTakeOver: the next process's key is in the JWK set of the one before while that one
// signs, and signs when it has taken over; the one before ends by itself, and what it
// signed stays published. A third one follows likewise.
func TestTakeOver(t *testing.T) {
	h := newHouse(t)
	h.writePolicy()
	h.giveSVID()
	h.cfg.JWKSMaxAge = time.Second
	s := h.serve()
	at := s.announced()
	h.cfg.Listen.GRPC, h.cfg.Listen.Public = at.GRPC, at.Public
	h.cfg.TakeOver = true
	for lives := 1; lives < 3; lives++ {
		before := keyIDs(t, at)
		next := h.serve()
		for ctx := within(t); len(keyIDs(t, at)) == len(before); time.Sleep(10 * time.Millisecond) {
			if ctx.Err() != nil {
				t.Fatalf("the next one's key isn't published:\n%s", next.stderr)
			}
		}
		if got := next.announced(); got.GRPC != at.GRPC {
			t.Fatalf("it serves at %s, not %s", got.GRPC, at.GRPC)
		}
		s.stop() // has ended, without an error
		after := keyIDs(t, at)
		if len(after) != lives+1 || slices.ContainsFunc(before, func(k string) bool { return !slices.Contains(after, k) }) {
			t.Errorf("keys %v, and %v after the takeover", before, after)
		}
		if _, err := h.client(h.td, reports, at).Issue(within(t), sdk.Request{Audience: "orders"}); err != nil {
			t.Error(err)
		}
		s = next
	}
	audit, err := os.ReadFile(h.cfg.Audit)
	if err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(string(audit), `"action":"hand_over"`); n != 4 {
		t.Errorf("%d audit records of two handovers, want 4", n)
	}
}

// TestTakeOverOfNothing is an ordinary start.
func TestTakeOverOfNothing(t *testing.T) {
	h := newHouse(t)
	h.writePolicy()
	h.giveSVID()
	h.cfg.TakeOver = true
	if at := h.serve().announced(); len(keyIDs(t, at)) != 1 {
		t.Errorf("keys %v", keyIDs(t, at))
	}
}

// TestTakeOverFails: a next process that can't take over ends with an error before it has
// touched anything, and the one that serves goes on.
func TestTakeOverFails(t *testing.T) {
	h := newHouse(t)
	h.writePolicy()
	h.giveSVID()
	s := h.serve()
	at := s.announced()
	keys := keyIDs(t, at)
	stranger, err := h.td.Workload(spiffeid.RequireFromPath(domain, "/dayfly/other"))
	if err != nil {
		t.Fatal(err)
	}
	other := spiffetest.ForTest(t, spiffetest.Config{TrustDomain: domain})
	impostor, err := other.Workload(brokerID)
	if err != nil {
		t.Fatal(err)
	}
	broken := filepath.Join(h.dir, "broken")
	if err := os.MkdirAll(broken, 0o700); err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		change func(*brokerd.Config)
		want   string
	}{
		"another issuer":          {func(c *brokerd.Config) { c.Issuer = "http://127.0.0.1:1" }, "KEY_NOT_VOUCHED_FOR"},
		"another SPIFFE ID":       {func(c *brokerd.Config) { c.WorkloadAPI = stranger }, "KEY_NOT_VOUCHED_FOR"},
		"an authority of its own": {func(c *brokerd.Config) { c.WorkloadAPI = impostor }, "KEY_NOT_VOUCHED_FOR"},
		"a broken policy":         {func(c *brokerd.Config) { c.Policy = broken }, "policy"},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := h.cfg
			cfg.TakeOver = true
			cfg.Audit = filepath.Join(t.TempDir(), "audit")
			test.change(&cfg)
			if err := brokerd.Serve(within(t), cfg, io.Discard, io.Discard); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("ended with %v, want %s", err, test.want)
			}
		})
	}
	remote := dayflyv1.NewHandoverServiceClient(h.client(h.td, brokerID, at).Conn())
	_, err = remote.Stop(within(t), &dayflyv1.StopRequest{})
	var refused *sdk.Error
	if !errors.As(err, &refused) || refused.Code != codes.Unimplemented {
		t.Errorf("over the network, as the broker itself: %v", err)
	}
	if got := keyIDs(t, at); !slices.Equal(got, keys) {
		t.Errorf("keys %v, and %v before", got, keys)
	}
	if _, err := h.client(h.td, reports, at).Issue(within(t), sdk.Request{Audience: "orders"}); err != nil {
		t.Error(err)
	}
}

// TestTakeOverIsGivenUp: told to stop while it waits, the next process does, and the one
// that serves goes on.
func TestTakeOverIsGivenUp(t *testing.T) {
	h := newHouse(t)
	h.writePolicy()
	h.giveSVID()
	at := h.serve().announced()
	cfg := h.cfg
	cfg.TakeOver = true
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- brokerd.Serve(ctx, cfg, io.Discard, io.Discard) }()
	for ctx := within(t); len(keyIDs(t, at)) == 1; time.Sleep(10 * time.Millisecond) {
		if ctx.Err() != nil {
			t.Fatal("the next one's key isn't published")
		}
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if _, err := h.client(h.td, reports, at).Issue(within(t), sdk.Request{Audience: "orders"}); err != nil {
		t.Error(err)
	}
}

// deaf is a running broker that takes a call and doesn't answer.
type deaf struct {
	dayflyv1.UnimplementedHandoverServiceServer
	called chan struct{}
}

func (d *deaf) PublishKey(ctx context.Context, _ *dayflyv1.PublishKeyRequest) (*dayflyv1.PublishKeyResponse, error) {
	close(d.called)
	<-ctx.Done()
	return nil, ctx.Err()
}

// TestTakeOverIsGivenUpWhilePublishing: nor is it an error to be told to stop while the
// running broker is asked.
func TestTakeOverIsGivenUpWhilePublishing(t *testing.T) {
	h := newHouse(t)
	h.writePolicy()
	h.giveSVID()
	cfg := h.cfg
	cfg.TakeOver = true
	l, err := net.Listen("unix", cfg.Listen.BreakGlass)
	if err != nil {
		t.Fatal(err)
	}
	running, busy := grpc.NewServer(), &deaf{called: make(chan struct{})}
	dayflyv1.RegisterHandoverServiceServer(running, busy)
	served := make(chan error, 1)
	go func() { served <- running.Serve(l) }()
	t.Cleanup(func() {
		running.Stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- brokerd.Serve(ctx, cfg, io.Discard, io.Discard) }()
	select {
	case <-busy.called:
	case err := <-ended:
		t.Fatal("it ended: ", err)
	case <-within(t).Done():
		t.Fatal("the running broker isn't asked")
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
