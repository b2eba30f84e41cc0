package e2e_test

import (
	"errors"
	"testing"

	"github.com/dayflyhq/dayfly/e2e/sandbox"
	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/sdk"
	"github.com/dayflyhq/dayfly/sdk/verify"
)

// TestRevokeReachesVerifiers walks the main job by direct clients: issue, exchange,
// revoke, receipts, refusals, quarantine, lift.
func TestRevokeReachesVerifiers(t *testing.T) {
	ctx := t.Context()
	box := newBox(t)
	payments := must(box.Client(ctx, sandbox.Payments, box.Info.GRPC))(t)
	orders := must(box.Client(ctx, sandbox.Orders, box.Info.GRPC))(t)
	ledger := must(box.Client(ctx, sandbox.Ledger, box.Info.GRPC))(t)
	alice := must(box.Client(ctx, sandbox.Alice, box.Info.GRPC))(t)
	ordersSvc := must(box.StartService(ctx, sandbox.ServiceConfig{ID: sandbox.Orders, Audience: "orders", Feed: orders}))(t)
	ledgerSvc := must(box.StartService(ctx, sandbox.ServiceConfig{ID: sandbox.Ledger, Audience: "ledger", Feed: ledger}))(t)

	root := must(payments.Issue(ctx, sdk.Request{Audience: "orders"}))(t)
	derived := must(orders.Exchange(ctx, root.Token, sdk.Request{Audience: "ledger"}))(t)
	must(box.Call(ctx, sandbox.Payments, ordersSvc, root.Token))(t)
	answer := must(box.Call(ctx, sandbox.Orders, ledgerSvc, derived.Token))(t)
	if answer.Subject != sandbox.Payments.String() || len(answer.Actors) != 1 || answer.Actors[0] != sandbox.Orders.String() {
		t.Fatalf("derived token says sub %s, act %v", answer.Subject, answer.Actors)
	}

	revocations := dayflyv1.NewRevocationServiceClient(alice.Conn())
	resp := must(revocations.Revoke(ctx, &dayflyv1.RevokeRequest{
		Selectors: []*dayflyv1.Selector{{Selector: &dayflyv1.Selector_Identity{Identity: sandbox.Payments.String()}}},
		Reason:    "test", IdempotencyKey: "k1",
	}))(t)
	seq := resp.GetRevocation().GetPosition().GetSequence()
	again := must(revocations.Revoke(ctx, &dayflyv1.RevokeRequest{
		Selectors: []*dayflyv1.Selector{{Selector: &dayflyv1.Selector_Identity{Identity: sandbox.Payments.String()}}},
		Reason:    "test", IdempotencyKey: "k1",
	}))(t)
	if got := again.GetRevocation().GetPosition().GetSequence(); got != seq {
		t.Errorf("a retried revoke made revocation %d after %d", got, seq)
	}
	watch := must(revocations.WatchContainment(ctx, &dayflyv1.WatchContainmentRequest{Sequence: seq}))(t)
	for {
		m := must(watch.Recv())(t)
		if c := m.GetContainment(); c.GetContained() {
			if c.GetConfirmed() != 2 {
				t.Errorf("contained with %d of 2 receipts", c.GetConfirmed())
			}
			break
		}
	}
	wantRefused(t, box, sandbox.Payments, ordersSvc, root, verify.TokenRevoked)
	wantRefused(t, box, sandbox.Orders, ledgerSvc, derived, verify.TokenRevoked)
	if _, err := payments.Issue(ctx, sdk.Request{Audience: "orders"}); !errors.Is(err, sdk.ErrIdentityLocked) {
		t.Errorf("a quarantined identity got %v", err)
	}
	must(revocations.Lift(ctx, &dayflyv1.LiftRequest{Lock: seq, Reason: "test"}))(t)
	fresh := must(payments.Issue(ctx, sdk.Request{Audience: "orders"}))(t)
	must(box.Call(ctx, sandbox.Payments, ordersSvc, fresh.Token))(t)
	wantRefused(t, box, sandbox.Payments, ordersSvc, root, verify.TokenRevoked)
}
