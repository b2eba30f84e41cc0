package e2e_test

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/e2e/sandbox"
	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/sdk"
	"github.com/dayflyhq/dayfly/sdk/verify"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
)

// TestBrokerOnFullDisk takes the room from a running broker: nothing is issued and the refusal
// says why, a revoke is recorded and reaches the verifiers, a lift works, and issuing
// goes on by itself once there is room. The limit is the kernel's on the size of a file
// of that process, which a write meets as it meets a full disk.
func TestBrokerOnFullDisk(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	box := newBox(t)
	payments := must(box.Client(ctx, sandbox.Payments, box.Info.GRPC))(t)
	reports := must(box.Client(ctx, sandbox.Reports, box.Info.GRPC))(t)
	alice := must(box.Client(ctx, sandbox.Alice, box.Info.GRPC))(t)
	orders := must(box.Client(ctx, sandbox.Orders, box.Info.GRPC))(t)
	service := must(box.StartService(ctx, sandbox.ServiceConfig{ID: sandbox.Orders, Audience: "orders", Feed: orders}))(t)
	revocations := dayflyv1.NewRevocationServiceClient(alice.Conn())
	early := must(payments.Issue(ctx, sdk.Request{Audience: "orders"}))(t)

	limitFiles(t, box.BrokerPID(), uint64(must(os.Stat(box.StorePath()))(t).Size()))
	issue := func(c *sdk.Client) func() (*sdk.Credential, error) {
		return func() (*sdk.Credential, error) { return c.Issue(ctx, sdk.Request{Audience: "orders"}) }
	}
	received, err := untilRefused(issue(payments))
	e := wantError(t, err, codes.Unavailable, "STORE_FULL")
	if !e.Temporary() {
		t.Error("a full disk isn't for ever")
	}
	t.Logf("full after %d grants: %v", len(received), e)
	// The pages that a commit frees may hold one more.
	more, err := untilRefused(func() (*sdk.Credential, error) {
		return orders.Exchange(ctx, early.Token, sdk.Request{Audience: "ledger"})
	})
	wantError(t, err, codes.Unavailable, "STORE_FULL")
	received = append(received, more...)

	revoked := must(revocations.Revoke(ctx, &dayflyv1.RevokeRequest{
		Selectors: []*dayflyv1.Selector{{Selector: &dayflyv1.Selector_Identity{Identity: sandbox.Payments.String()}}}, Reason: "on a full disk",
	}))(t)
	number := revoked.GetRevocation().GetPosition().GetSequence()
	watch := must(revocations.WatchContainment(ctx, &dayflyv1.WatchContainmentRequest{Sequence: number}))(t)
	for !must(watch.Recv())(t).GetContainment().GetContained() {
	}
	wantRefused(t, box, sandbox.Payments, service, early, verify.TokenRevoked)
	// More of them, and larger, than what issuing left would hold: the reserve is theirs.
	for i := range 64 {
		large := make([]*dayflyv1.Selector, 64)
		for j := range large {
			large[j] = &dayflyv1.Selector{Selector: &dayflyv1.Selector_Identity{Identity: fmt.Sprintf("spiffe://dayfly.test/ns/gone/%d-%d", i, j)}}
		}
		must(revocations.Revoke(ctx, &dayflyv1.RevokeRequest{
			Selectors: large, LockMode: dayflyv1.LockMode_LOCK_MODE_NONE, Reason: strings.Repeat("r", 1024),
		}))(t)
	}
	must(revocations.Lift(ctx, &dayflyv1.LiftRequest{Lock: number, Reason: "on a full disk"}))(t)

	// Still full, for everybody.
	more, err = untilRefused(issue(reports))
	wantError(t, err, codes.Unavailable, "STORE_FULL")
	received = append(received, more...)

	limitFiles(t, box.BrokerPID(), unix.RLIM_INFINITY)
	fresh := must(payments.Issue(ctx, sdk.Request{Audience: "orders"}))(t)
	must(box.Call(ctx, sandbox.Payments, service, fresh.Token))(t)
	wantRecorded(t, alice, append(received, early, fresh))
	if err := box.StopBroker(); err != nil {
		t.Errorf("the broker ended with %v", err)
	}
	out, err := exec.Command(filepath.Join(bin, "dayfly-broker"), "check", "--output", "json", box.StorePath()).CombinedOutput()
	if err != nil {
		t.Fatalf("the store doesn't hold its promises: %v\n%s", err, out)
	}
	var report struct{ Grants int }
	if err := json.Unmarshal(out, &report); err != nil || report.Grants != len(received)+2 {
		t.Errorf("%d grants are on record, %d were handed out, %v", report.Grants, len(received)+2, err)
	}
}

// limitFiles bounds the size of the files that a running process may write.
func limitFiles(t *testing.T, pid int, size uint64) {
	t.Helper()
	limit := unix.Rlimit{Cur: size, Max: unix.RLIM_INFINITY}
	if err := unix.Prlimit(pid, unix.RLIMIT_FSIZE, &limit, nil); err != nil {
		t.Fatal(err)
	}
}

// untilRefused makes a call until it fails, and returns what it gave until then.
func untilRefused(call func() (*sdk.Credential, error)) ([]*sdk.Credential, error) {
	var creds []*sdk.Credential
	for {
		cred, err := call()
		if err != nil {
			return creds, err
		}
		creds = append(creds, cred)
	}
}
