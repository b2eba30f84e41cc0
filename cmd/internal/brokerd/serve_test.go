package brokerd_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/cmd/internal/brokerd"
	"github.com/dayflyhq/dayfly/cmd/internal/config"
	"github.com/dayflyhq/dayfly/policy"
	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/sdk"
	"github.com/dayflyhq/dayfly/sdk/spiffetest"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/durationpb"
)

const patience = time.Minute

var (
	domain   = spiffeid.RequireTrustDomainFromString("dayfly.test")
	brokerID = spiffeid.RequireFromPath(domain, "/dayfly/broker")
	reports  = spiffeid.RequireFromPath(domain, "/ns/other/reports")
	partner  = spiffeid.RequireFromString("spiffe://partner.test/shop")
)

// house is a folder with all that a broker needs, but for what a test takes away.
type house struct {
	t             *testing.T
	dir           string
	td, partnerTD *spiffetest.TrustDomain
	cfg           brokerd.Config
}

func newHouse(t *testing.T) *house {
	t.Helper()
	dir, err := os.MkdirTemp("", "df") // short enough for sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	h := &house{
		t: t, dir: dir, td: spiffetest.ForTest(t, spiffetest.Config{TrustDomain: domain}),
		partnerTD: spiffetest.ForTest(t, spiffetest.Config{TrustDomain: partner.TrustDomain()}),
	}
	if err := h.td.Federate(h.partnerTD.Bundle()); err != nil {
		t.Fatal(err)
	}
	h.cfg = brokerd.Defaults()
	text := fmt.Sprintf("issuer: http://127.0.0.1\nstore: %[1]s/s.db\npolicy: %[1]s/policy\naudit: %[1]s/audit\nworkload_api: unix://%[1]s/api.sock\ntrust_domains: [%[2]s]\n"+
		"listen:\n  grpc: 127.0.0.1:0\n  public: 127.0.0.1:0\n  break_glass: %[1]s/bg.sock\n", dir, partner.TrustDomain())
	if err := config.Parse("b.yaml", []byte(text), &h.cfg); err != nil {
		t.Fatal(err)
	}
	if err := brokerd.Init(h.cfg.Store, time.Now()); err != nil {
		t.Fatal(err)
	}
	return h
}

// giveSVID lets the Workload API come up.
func (h *house) giveSVID() {
	h.t.Helper()
	address, err := h.td.Workload(brokerID)
	if err == nil {
		err = os.Symlink(strings.TrimPrefix(address, "unix://"), filepath.Join(h.dir, "api.sock"))
	}
	if err != nil {
		h.t.Fatal(err)
	}
}

func (h *house) writePolicy() {
	h.t.Helper()
	if err := policy.WriteDemo(h.cfg.Policy); err != nil {
		h.t.Fatal(err)
	}
}

// served is one life of the broker.
type served struct {
	t      *testing.T
	stop   func()
	lines  chan brokerd.Announcement
	stderr *lockedBuffer
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func (h *house) serve() *served {
	h.t.Helper()
	s := &served{t: h.t, lines: make(chan brokerd.Announcement, 1), stderr: &lockedBuffer{}}
	out, in := io.Pipe()
	go func() {
		scan := bufio.NewScanner(out)
		for scan.Scan() {
			var a brokerd.Announcement
			if json.Unmarshal(scan.Bytes(), &a) == nil {
				s.lines <- a
			}
		}
	}()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- brokerd.Serve(ctx, h.cfg, in, s.stderr)
		in.Close()
	}()
	s.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			h.t.Errorf("Serve: %v\n%s", err, s.stderr)
		}
	})
	h.t.Cleanup(s.stop)
	return s
}

func (s *served) announced() brokerd.Announcement {
	s.t.Helper()
	select {
	case a := <-s.lines:
		return a
	case <-time.After(patience):
		s.t.Fatalf("it doesn't serve:\n%s", s.stderr)
		panic("unreachable")
	}
}

// breakGlass is a client of the socket; its calls wait until it is served.
func (h *house) breakGlass() dayflyv1.RevocationServiceClient {
	h.t.Helper()
	conn, err := grpc.NewClient("unix://"+h.cfg.Listen.BreakGlass, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDefaultCallOptions(grpc.WaitForReady(true)))
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { conn.Close() })
	return dayflyv1.NewRevocationServiceClient(conn)
}

func (h *house) client(td *spiffetest.TrustDomain, id spiffeid.ID, at brokerd.Announcement) *sdk.Client {
	h.t.Helper()
	svid, err := td.IssueSVID(id, spiffetest.SVIDOptions{})
	if err != nil {
		h.t.Fatal(err)
	}
	c, err := sdk.New(sdk.Config{Address: at.GRPC, Source: source{svid, h.td}, BrokerID: brokerID})
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { c.Close() })
	return c
}

func within(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

// keyIDs reads the JWKS.
func keyIDs(t *testing.T, at brokerd.Announcement) []string {
	t.Helper()
	resp, err := http.Get("http://" + at.Public + "/jwks.json")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var set struct {
		Keys []struct {
			ID string `json:"kid"`
		} `json:"keys"`
	}
	if err := json.NewDecoder(resp.Body).Decode(&set); err != nil {
		t.Fatal(err)
	}
	var ids []string
	for _, k := range set.Keys {
		ids = append(ids, k.ID)
	}
	return ids
}

// TestServeByAndBy: with its store alone a broker lets root revoke; it serves the rest
// when the SVID and the policy come, and what it recorded and signed before stands.
func TestServeByAndBy(t *testing.T) {
	h := newHouse(t)
	glass := h.breakGlass()
	s := h.serve()
	r, err := glass.Revoke(within(t), &dayflyv1.RevokeRequest{
		Selectors: []*dayflyv1.Selector{{Selector: &dayflyv1.Selector_Identity{Identity: reports.String()}}}, Reason: "r"})
	if err != nil {
		t.Fatal(err)
	}
	number := r.GetRevocation().GetPosition().GetSequence()
	h.giveSVID()
	at := s.announced()
	var refused *sdk.Error
	if _, err := h.client(h.td, reports, at).Issue(within(t), sdk.Request{Audience: "orders"}); !errors.As(err, &refused) || refused.Reason != "NO_POLICY" {
		t.Errorf("without a policy: %v", err)
	}
	before := keyIDs(t, at)
	s.stop()

	// Again without an SVID: the key that the first life published isn't revoked for it.
	if err := os.Remove(filepath.Join(h.dir, "api.sock")); err != nil {
		t.Fatal(err)
	}
	h.writePolicy()
	s = h.serve()
	if _, err := glass.GetRevocation(within(t), &dayflyv1.GetRevocationRequest{Sequence: number}); err != nil {
		t.Errorf("the next start lost the revocation: %v", err)
	}
	h.giveSVID()
	at = s.announced()
	if after := keyIDs(t, at); len(before) != 1 || len(after) != 2 || !strings.Contains(strings.Join(after, " "), before[0]) {
		t.Errorf("keys %v, and after the restart %v", before, after)
	}
	c := h.client(h.td, reports, at)
	if _, err := c.Issue(within(t), sdk.Request{Audience: "orders"}); !errors.Is(err, sdk.ErrIdentityLocked) {
		t.Errorf("the locked identity got %v", err)
	}
	if _, err := glass.Lift(within(t), &dayflyv1.LiftRequest{Lock: number, Reason: "r"}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Issue(within(t), sdk.Request{Audience: "orders"}); err != nil {
		t.Errorf("after the lift: %v", err)
	}
}

// TestWorkloadAPIChanges: what the Workload API says while the broker runs takes effect at
// once: the idle stream of a trust domain that was removed ends, and another authority
// behind the broker's SVID gets a new signing key.
func TestWorkloadAPIChanges(t *testing.T) {
	h := newHouse(t)
	h.writePolicy()
	entry := "\n  spiffe://partner.test/shop: {follow: [orders]}\n"
	data := filepath.Join(h.cfg.Policy, "data.yaml")
	text, err := os.ReadFile(data)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(data, []byte(strings.Replace(string(text), "\nverifiers:", "\nverifiers:"+entry, 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	h.giveSVID()
	s := h.serve()
	at := s.announced()
	stream, err := dayflyv1.NewFeedServiceClient(h.client(h.partnerTD, partner, at).Conn()).Follow(within(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&dayflyv1.FollowRequest{Message: &dayflyv1.FollowRequest_Subscribe{Subscribe: &dayflyv1.Subscribe{
		Instance: "instance-0001", Audiences: []string{"orders"}, MaxStaleness: durationpb.New(10 * time.Second), OnStale: dayflyv1.OnStale_ON_STALE_REFUSE,
	}}}); err != nil {
		t.Fatal(err)
	}
	if m, err := stream.Recv(); err != nil || m.GetWelcome() == nil {
		t.Fatalf("welcomed with %v, %v", m, err)
	}
	if err := h.td.Unfederate(partner.TrustDomain()); err != nil {
		t.Fatal(err)
	}
	for err == nil {
		_, err = stream.Recv()
	}
	var refused *sdk.Error
	if !errors.As(sdk.FromRPC(err), &refused) || refused.Reason != "SVID_INVALID" {
		t.Errorf("the idle stream ended with %v", err)
	}

	first := keyIDs(t, at)
	if err := h.td.RotateCA(); err != nil {
		t.Fatal(err)
	}
	for ctx := within(t); len(keyIDs(t, at)) == len(first); time.Sleep(10 * time.Millisecond) {
		if ctx.Err() != nil {
			t.Fatal("no new signing key")
		}
	}
	s.stop()
	if log := s.stderr.String(); strings.Contains(log, "no broker vouches for") {
		t.Errorf("a key was revoked:\n%s", log)
	}
}

// source is an SVID of one trust domain and the bundles of another.
type source struct {
	*x509svid.SVID
	x509bundle.Source
}

// TestStoppedWhileStarting: told to stop before it serves, a broker ends without an error.
func TestStoppedWhileStarting(t *testing.T) {
	h := newHouse(t)
	h.writePolicy()
	stopped, cancel := context.WithCancel(t.Context())
	cancel()
	if err := brokerd.Serve(stopped, h.cfg, io.Discard, io.Discard); err != nil {
		t.Error(err)
	}
}
