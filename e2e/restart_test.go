package e2e_test

import (
	"context"
	"errors"
	"math/rand/v2"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/e2e/sandbox"
	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk"
	"github.com/dayflyhq/dayfly/sdk/verify"
)

// TestKillUnderLoad kills the broker with SIGKILL while callers get tokens and an
// operator revokes: every credential that a caller received, and every revocation that
// was acknowledged, is in the records afterwards. Promise 1.
func TestKillUnderLoad(t *testing.T) {
	box := newBox(t)
	alice := must(box.Client(t.Context(), sandbox.Alice, box.Info.GRPC))(t)
	var received []*sdk.Credential
	var revoked []uint64
	for range 4 {
		creds, seqs := loadUntilKilled(t, box, alice, time.Duration(100+rand.IntN(300))*time.Millisecond)
		received, revoked = append(received, creds...), append(revoked, seqs...)
		if err := box.StartBroker(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if len(received) == 0 || len(revoked) == 0 {
		t.Fatalf("the load got %d credentials and %d revocations: nothing was tested", len(received), len(revoked))
	}
	t.Logf("%d credentials, %d revocations", len(received), len(revoked))
	alice = must(box.Client(t.Context(), sandbox.Alice, box.Info.GRPC))(t) // the old one is backing off
	wantRecorded(t, alice, received)
	revocations := dayflyv1.NewRevocationServiceClient(alice.Conn())
	for _, seq := range revoked {
		if _, err := revocations.GetRevocation(t.Context(), &dayflyv1.GetRevocationRequest{Sequence: seq}); err != nil {
			t.Errorf("revocation %d was acknowledged and is gone: %v", seq, err)
		}
	}
	box.StopBroker()
	if out, err := exec.Command(filepath.Join(bin, "dayfly-broker"), "check", box.StorePath()).CombinedOutput(); err != nil {
		t.Errorf("the store doesn't hold its promises: %v\n%s", err, out)
	}
}

// loadUntilKilled runs issuing and revoking clients, kills the broker in the midst, and
// returns what they were given.
func loadUntilKilled(t *testing.T, box *sandbox.Sandbox, alice *sdk.Client, after time.Duration) ([]*sdk.Credential, []uint64) {
	t.Helper()
	payments := must(box.Client(t.Context(), sandbox.Payments, box.Info.GRPC))(t)
	ctx, stop := context.WithCancel(t.Context())
	var (
		mu    sync.Mutex
		creds []*sdk.Credential
		seqs  []uint64
		wg    sync.WaitGroup
	)
	for range 8 {
		wg.Go(func() {
			for ctx.Err() == nil {
				if c, err := payments.Issue(ctx, sdk.Request{Audience: "orders"}); err == nil {
					mu.Lock()
					creds = append(creds, c)
					mu.Unlock()
				}
			}
		})
	}
	wg.Go(func() {
		client := dayflyv1.NewRevocationServiceClient(alice.Conn())
		for ctx.Err() == nil {
			r, err := client.Revoke(ctx, &dayflyv1.RevokeRequest{
				Selectors: []*dayflyv1.Selector{{Selector: &dayflyv1.Selector_Identity{Identity: sandbox.Web.String()}}},
				LockMode:  dayflyv1.LockMode_LOCK_MODE_NONE, Reason: "load",
			})
			if err == nil {
				mu.Lock()
				seqs = append(seqs, r.GetRevocation().GetPosition().GetSequence())
				mu.Unlock()
			}
		}
	})
	<-time.After(after) // the kill falls at a random moment of the load
	box.KillBroker()
	stop()
	wg.Wait()
	return creds, seqs
}

func wantRecorded(t *testing.T, alice *sdk.Client, creds []*sdk.Credential) {
	t.Helper()
	grants := dayflyv1.NewGrantServiceClient(alice.Conn())
	for _, c := range creds {
		shown := must(token.Inspect(c.Token.Reveal()))(t)
		g, err := grants.GetGrant(t.Context(), &dayflyv1.GetGrantRequest{Grant: c.Grant})
		if err != nil {
			t.Errorf("grant %s was handed out and is not on record: %v", c.Grant, err)
			continue
		}
		if string(g.GetGrant().GetFingerprint()) != string(shown.Fingerprint[:]) {
			t.Errorf("grant %s is on record with another fingerprint", c.Grant)
		}
	}
}

// TestCutFeedFailsClosed: a verifier that is cut off refuses everything once its bound
// has passed, also what was revoked meanwhile, and recovers. Promise 3.
func TestCutFeedFailsClosed(t *testing.T) {
	ctx := t.Context()
	box := newBox(t)
	link := must(sandbox.NewLink(box.Info.GRPC))(t)
	t.Cleanup(link.Close)
	payments := must(box.Client(ctx, sandbox.Payments, box.Info.GRPC))(t)
	alice := must(box.Client(ctx, sandbox.Alice, box.Info.GRPC))(t)
	feed := must(box.Client(ctx, sandbox.Orders, link.Addr()))(t)
	orders := must(box.StartService(ctx, sandbox.ServiceConfig{ID: sandbox.Orders, Audience: "orders", Feed: feed}))(t)

	cred := must(payments.Issue(ctx, sdk.Request{Audience: "orders"}))(t)
	accepted := must(orders.Verifier.Verify(ctx, cred.Token.Reveal(), verify.Peer{ID: sandbox.Payments}))(t)
	closed, stop := orders.Verifier.Watch(ctx, accepted)
	defer stop()
	link.Cut()
	must(dayflyv1.NewRevocationServiceClient(alice.Conn()).Revoke(ctx, &dayflyv1.RevokeRequest{
		Selectors: []*dayflyv1.Selector{{Selector: &dayflyv1.Selector_Grant{Grant: cred.Grant}}}, Reason: "test",
	}))(t)
	<-closed.Done()
	wantRefused(t, box, sandbox.Payments, orders, cred, verify.VerifierStale)
	link.Restore()
	if err := orders.Verifier.WaitReady(ctx); err != nil {
		t.Fatal(err)
	}
	wantRefused(t, box, sandbox.Payments, orders, cred, verify.TokenRevoked)
	fresh := must(payments.Issue(ctx, sdk.Request{Audience: "orders"}))(t)
	must(box.Call(ctx, sandbox.Payments, orders, fresh.Token))(t)
}

// TestRestartKeepsLocks: the revocation, the lock and the roster survive SIGKILL, and
// verifiers reconnect by themselves.
func TestRestartKeepsLocks(t *testing.T) {
	ctx := t.Context()
	box := newBox(t)
	payments := must(box.Client(ctx, sandbox.Payments, box.Info.GRPC))(t)
	alice := must(box.Client(ctx, sandbox.Alice, box.Info.GRPC))(t)
	feed := must(box.Client(ctx, sandbox.Orders, box.Info.GRPC))(t)
	orders := must(box.StartService(ctx, sandbox.ServiceConfig{ID: sandbox.Orders, Audience: "orders", Feed: feed}))(t)
	cred := must(payments.Issue(ctx, sdk.Request{Audience: "orders"}))(t)
	revocations := dayflyv1.NewRevocationServiceClient(alice.Conn())
	resp := must(revocations.Revoke(ctx, &dayflyv1.RevokeRequest{
		Selectors: []*dayflyv1.Selector{{Selector: &dayflyv1.Selector_Identity{Identity: sandbox.Payments.String()}}}, Reason: "test",
	}))(t)
	box.KillBroker()
	if err := box.StartBroker(ctx); err != nil {
		t.Fatal(err)
	}
	// New clients: the old ones may be backing off.
	payments = must(box.Client(ctx, sandbox.Payments, box.Info.GRPC))(t)
	revocations = dayflyv1.NewRevocationServiceClient(must(box.Client(ctx, sandbox.Alice, box.Info.GRPC))(t).Conn())
	if _, err := payments.Issue(ctx, sdk.Request{Audience: "orders"}); !errors.Is(err, sdk.ErrIdentityLocked) {
		t.Errorf("a locked identity got %v from the restarted broker", err)
	}
	// The old verifier instance is on the roster of the new process.
	watch := must(revocations.WatchContainment(ctx, &dayflyv1.WatchContainmentRequest{Sequence: resp.GetRevocation().GetPosition().GetSequence()}))(t)
	for {
		c := must(watch.Recv())(t).GetContainment()
		if len(c.GetReceipts()) == 0 {
			t.Fatal("the restarted broker has forgotten its roster")
		}
		if c.GetContained() {
			break
		}
	}
	if err := orders.Verifier.WaitReady(ctx); err != nil {
		t.Fatal(err)
	}
	wantRefused(t, box, sandbox.Payments, orders, cred, verify.TokenRevoked)
}
