package e2e_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/e2e/sandbox"
	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/wire"
	"github.com/dayflyhq/dayfly/sdk"
	"github.com/dayflyhq/dayfly/sdk/verify"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
)

// follow is a client of a relay on another host.
func follow(t *testing.T, box *sandbox.Sandbox, as spiffeid.ID, address string, relay spiffeid.ID) *sdk.Client {
	t.Helper()
	client := must(sdk.New(sdk.Config{Address: address, Source: must(box.Source(t.Context(), as))(t), BrokerID: relay}))(t)
	t.Cleanup(func() { client.Close() })
	return client
}

func revokePayments(t *testing.T, alice *sdk.Client) uint64 {
	t.Helper()
	resp := must(dayflyv1.NewRevocationServiceClient(alice.Conn()).Revoke(t.Context(), &dayflyv1.RevokeRequest{
		Selectors: []*dayflyv1.Selector{{Selector: &dayflyv1.Selector_Identity{Identity: sandbox.Payments.String()}}}, LockMode: dayflyv1.LockMode_LOCK_MODE_NONE, Reason: "test",
	}))(t)
	return resp.GetRevocation().GetPosition().GetSequence()
}

// TestRemoteRelay: a verifier follows two relays on other hosts, one behind the other, by
// mTLS over TCP; what is revoked is confirmed through both, and a relay that is stopped
// closes it within its bound.
func TestRemoteRelay(t *testing.T) {
	ctx := t.Context()
	box := newBox(t)
	near, _, err := box.StartRelay(ctx, sandbox.Orders, "identity:"+sandbox.Ledger.String(), "", spiffeid.ID{})
	if err != nil {
		t.Fatal(err)
	}
	far, pid, err := box.StartRelay(ctx, sandbox.Ledger, "identity:"+sandbox.Orders.String(), near, sandbox.Orders)
	if err != nil {
		t.Fatal(err)
	}
	svc := must(box.StartService(ctx, sandbox.ServiceConfig{ID: sandbox.Orders, Audience: "orders", Feed: follow(t, box, sandbox.Orders, far, sandbox.Ledger), Broker: sandbox.Broker}))(t)
	alice := must(box.Client(ctx, sandbox.Alice, box.Info.GRPC))(t)
	payments := must(box.Client(ctx, sandbox.Payments, box.Info.GRPC))(t)
	issue := func() *sdk.Credential {
		return must(payments.Issue(ctx, sdk.Request{Audience: "orders"}))(t)
	}
	cred := issue()
	must(box.Call(ctx, sandbox.Payments, svc, cred.Token))(t)

	seq := revokePayments(t, alice)
	watch := must(dayflyv1.NewRevocationServiceClient(alice.Conn()).WatchContainment(ctx, &dayflyv1.WatchContainmentRequest{Sequence: seq}))(t)
	for {
		if c := must(watch.Recv())(t).GetContainment(); c.GetContained() {
			if c.GetConfirmed() != 3 { // the verifier and the two relays
				t.Errorf("contained with %d receipts: %v", c.GetConfirmed(), c)
			}
			// What the broker knows itself, and what the relay nearest to it says.
			claimed := map[int]string{}
			for _, r := range c.GetReceipts() {
				if r.GetIdentity() != sandbox.Orders.String() {
					t.Errorf("a receipt by the word of %s", r.GetIdentity())
				}
				claimed[len(r.GetVia())] = r.GetClaimedIdentity()
			}
			if want := map[int]string{0: "", 1: sandbox.Ledger.String(), 2: sandbox.Orders.String()}; !maps.Equal(claimed, want) {
				t.Errorf("the receipts name %v, want %v", claimed, want)
			}
			break
		}
	}
	wantRefused(t, box, sandbox.Payments, svc, cred, verify.TokenRevoked)
	operateUntil(t, box, &dayflyv1.GetRevocationResponse{}, func(r *dayflyv1.GetRevocationResponse) bool {
		uses := r.GetContainment().GetUsesAfter()
		return len(uses) == 1 && uses[0].GetVerifier() == sandbox.Orders.String() && uses[0].GetClaimedIdentity() == sandbox.Orders.String() && uses[0].GetRefused() == 1
	}, "revocations", "show", fmt.Sprint(seq))
	if text, _ := operate(t, box, "revocations", "show", fmt.Sprint(seq)); !strings.Contains(text, sandbox.Ledger.String()+", by the word of "+sandbox.Orders.String()) {
		t.Errorf("a claimed name isn't shown as one:\n%s", text)
	}
	cred = issue()
	must(box.Call(ctx, sandbox.Payments, svc, cred.Token))(t)

	// Who isn't allowed isn't let in, and who wants no signed heads neither.
	stream, err := dayflyv1.NewFeedServiceClient(follow(t, box, sandbox.Payments, far, sandbox.Ledger).Conn()).Follow(ctx)
	if err == nil {
		_, err = stream.Recv()
	}
	if err == nil {
		t.Error("one whom the relay doesn't allow follows")
	}
	plain := must(dayflyv1.NewFeedServiceClient(follow(t, box, sandbox.Orders, far, sandbox.Ledger).Conn()).Follow(ctx))(t)
	if err := plain.Send(&dayflyv1.FollowRequest{Message: &dayflyv1.FollowRequest_Subscribe{Subscribe: wire.Subscribe(wire.Subscription{Instance: "instance-plain", Audiences: []string{"orders"}, Bound: time.Second})}}); err != nil {
		t.Fatal(err)
	}
	_, err = plain.Recv()
	wantError(t, sdk.FromRPC(err), codes.InvalidArgument, "SIGNED_HEADS_REQUIRED")

	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	defer syscall.Kill(pid, syscall.SIGCONT)
	stopped := time.Now()
	revokePayments(t, alice)
	committed := time.Now()
	for time.Since(committed) <= sandbox.Staleness {
		time.Sleep(10 * time.Millisecond)
	}
	if _, err := box.Call(ctx, sandbox.Payments, svc, cred.Token); err == nil {
		t.Errorf("accepted %v after the relay was stopped", time.Since(stopped))
	}
	if err := syscall.Kill(pid, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	ready, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if err := svc.Verifier.WaitReady(ready); err != nil {
		t.Fatal(err)
	}
	wantRefused(t, box, sandbox.Payments, svc, cred, verify.TokenRevoked)
}

// TestSilentBroker: an old copy of the store is put back by hand. A verifier that knows
// more shows the broker what a broker signed: it issues nothing and says why, until an
// operator has looked.
func TestSilentBroker(t *testing.T) {
	ctx := t.Context()
	box := newBox(t)
	if err := box.StopBroker(); err != nil {
		t.Fatal(err)
	}
	old := must(os.ReadFile(box.StorePath()))(t)
	if err := box.StartBroker(ctx); err != nil {
		t.Fatal(err)
	}
	link := must(sandbox.NewLink(box.Info.GRPC))(t)
	t.Cleanup(link.Close)
	svc := must(box.StartService(ctx, sandbox.ServiceConfig{ID: sandbox.Orders, Audience: "orders", Feed: must(box.Client(ctx, sandbox.Orders, link.Addr()))(t)}))(t)
	alice := must(box.Client(ctx, sandbox.Alice, box.Info.GRPC))(t)
	seq := revokePayments(t, alice)
	// The verifier has it, and a signed head of it: one more ping after it was applied.
	deadline := time.Now().Add(time.Minute)
	for svc.Verifier.Status().Position.Seq < seq || svc.Verifier.Status().KeptHead.Seq < seq {
		if time.Now().After(deadline) {
			t.Fatalf("at %+v, want number %d", svc.Verifier.Status(), seq)
		}
		time.Sleep(10 * time.Millisecond)
	}
	link.Cut()
	if err := box.StopBroker(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(box.StorePath(), old, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := box.StartBroker(ctx); err != nil {
		t.Fatal(err)
	}
	payments := must(box.Client(ctx, sandbox.Payments, box.Info.GRPC))(t)
	must(payments.Issue(ctx, sdk.Request{Audience: "orders"}))(t) // nobody has told it yet
	link.Restore()
	reason := func() string {
		resp, err := http.Get(fmt.Sprintf("http://%s/readyz", box.Info.Admin))
		if err != nil {
			return err.Error()
		}
		defer resp.Body.Close()
		b, _ := io.ReadAll(resp.Body)
		var answer struct {
			Problems []struct{ Reason, Message string }
		}
		if err := json.Unmarshal(b, &answer); err != nil || len(answer.Problems) == 0 {
			return string(b)
		}
		return answer.Problems[0].Reason + ": " + answer.Problems[0].Message
	}
	for !strings.HasPrefix(reason(), "LOG_BEHIND_SIGNED_HEAD: ") {
		if time.Now().After(deadline.Add(time.Minute)) {
			t.Fatalf("readiness says %s", reason())
		}
		time.Sleep(50 * time.Millisecond)
	}
	if r := reason(); !strings.Contains(r, fmt.Sprintf("/%d/", svc.Verifier.Status().KeptHead.Seq)) || !strings.Contains(r, sandbox.Orders.String()) {
		t.Errorf("readiness says %s", r)
	}
	_, err := payments.Issue(ctx, sdk.Request{Audience: "orders"})
	wantError(t, err, codes.Unavailable, "LOG_BEHIND_SIGNED_HEAD")
	revokePayments(t, must(box.Client(ctx, sandbox.Alice, box.Info.GRPC))(t))
	if log := box.Log("broker"); !strings.Contains(log, "THIS LOG LACKS A RECORD THAT A BROKER SIGNED FOR") {
		t.Errorf("the log says:\n%s", log)
	}

	// An operator who has looked may say to go on, for what was lost up to there.
	kept := svc.Verifier.Status().KeptHead
	if err := box.StopBroker(); err != nil {
		t.Fatal(err)
	}
	if err := box.StartBroker(ctx, "--disregard-signed-heads", fmt.Sprintf("%s/%d", kept.Era, kept.Seq), "--reason", "INC-9: it was a test"); err != nil {
		t.Fatal(err)
	}
	for !strings.Contains(box.Log("broker"), "that an operator said to disregard") {
		if time.Now().After(deadline.Add(2 * time.Minute)) {
			t.Fatalf("nobody showed it the head:\n%s", box.Log("broker"))
		}
		time.Sleep(50 * time.Millisecond)
	}
	must(payments.Issue(ctx, sdk.Request{Audience: "orders"}))(t)
	if r := reason(); strings.Contains(r, "LOG_BEHIND_SIGNED_HEAD") {
		t.Errorf("readiness says %s", r)
	}
	if a := audited(t, box, "disregard_signed_heads"); len(a) != 1 || a[0]["why"] != "INC-9: it was a test" || !strings.HasPrefix(fmt.Sprint(a[0]["actor"]), "dayfly-broker serve:uid=") {
		t.Errorf("audited %v", a)
	}
}
