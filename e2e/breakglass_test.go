package e2e_test

import (
	"encoding/json"
	"errors"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/e2e/sandbox"
	"github.com/dayflyhq/dayfly/policy"
	"github.com/dayflyhq/dayfly/sdk"
	"github.com/dayflyhq/dayfly/sdk/verify"
)

// TestBreakGlassBeforeAnything: a broker that is started while its Workload API is away
// and its policy folder is empty lets root revoke. That survives SIGKILL, and the broker
// gets ready by itself, with its old keys, once both are back.
func TestBreakGlassBeforeAnything(t *testing.T) {
	ctx := t.Context()
	box := newBox(t)
	payments := must(box.Client(ctx, sandbox.Payments, box.Info.GRPC))(t)
	lives := must(must(box.Client(ctx, sandbox.Reports, box.Info.GRPC))(t).Issue(ctx, sdk.Request{Audience: "orders"}))(t)
	dies := must(payments.Issue(ctx, sdk.Request{Audience: "orders"}))(t)
	box.KillBroker()

	workloadAPI := strings.TrimPrefix(must(box.TD.Workload(sandbox.Broker))(t), "unix://")
	move(t, workloadAPI, workloadAPI+".away")
	move(t, box.PolicyDir(), box.PolicyDir()+".away")
	if err := os.Mkdir(box.PolicyDir(), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := box.SpawnBroker(); err != nil {
		t.Fatal(err)
	}
	breakGlass(t, box, "revoke", "--identity", sandbox.Payments.String(), "--reason", "owned", "--yes", "--wait", "0s")
	if got := problems(t, box); !slices.Equal(got, []string{"NO_SVID", "NO_SIGNING_KEY", "NO_POLICY"}) {
		t.Errorf("not ready for %v", got)
	}
	box.KillBroker()

	if err := box.SpawnBroker(); err != nil {
		t.Fatal(err)
	}
	if out := breakGlass(t, box, "locks"); !strings.Contains(out, sandbox.Payments.String()) {
		t.Errorf("the next start lost the lock:\n%s", out)
	}
	move(t, workloadAPI+".away", workloadAPI)
	if err := box.AwaitBroker(ctx); err != nil {
		t.Fatal(err)
	}
	reports := must(box.Client(ctx, sandbox.Reports, box.Info.GRPC))(t)
	var refused *sdk.Error
	if _, err := reports.Issue(ctx, sdk.Request{Audience: "orders"}); !errors.As(err, &refused) || refused.Reason != "NO_POLICY" || refused.Hint == "" {
		t.Errorf("without a policy: %v", err)
	}
	if got := problems(t, box); !slices.Equal(got, []string{"NO_POLICY"}) {
		t.Errorf("not ready for %v", got)
	}
	if err := policy.WriteDemo(box.PolicyDir()); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(time.Minute)
	for len(problems(t, box)) > 0 {
		if time.Now().After(deadline) {
			t.Fatalf("not ready for %v", problems(t, box))
		}
		time.Sleep(10 * time.Millisecond)
	}
	if _, err := reports.Issue(ctx, sdk.Request{Audience: "orders"}); err != nil {
		t.Errorf("with a policy: %v", err)
	}
	payments = must(box.Client(ctx, sandbox.Payments, box.Info.GRPC))(t)
	if _, err := payments.Issue(ctx, sdk.Request{Audience: "orders"}); !errors.Is(err, sdk.ErrIdentityLocked) {
		t.Errorf("the quarantined identity got %v", err)
	}
	orders := must(box.StartService(ctx, sandbox.ServiceConfig{
		ID: sandbox.Orders, Audience: "orders", Feed: must(box.Client(ctx, sandbox.Orders, box.Info.GRPC))(t),
	}))(t)
	if err := orders.Verifier.WaitReady(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := box.Call(ctx, sandbox.Reports, orders, lives.Token); err != nil {
		t.Errorf("a token whose key nobody revoked: %v", err)
	}
	wantRefused(t, box, sandbox.Payments, orders, dies, verify.TokenRevoked)
}

func move(t *testing.T, from, to string) {
	t.Helper()
	if err := os.Rename(from, to); err != nil {
		t.Fatal(err)
	}
}

// breakGlass runs a verb over the socket once the broker serves it. A revocation without
// its receipts ends with 3.
func breakGlass(t *testing.T, box *sandbox.Sandbox, args ...string) string {
	t.Helper()
	args = append(args, "--break-glass", "unix://"+filepath.Join(box.Dir, "break-glass.sock"))
	for {
		out, err := exec.CommandContext(t.Context(), filepath.Join(bin, "dayfly"), args...).CombinedOutput()
		var exit *exec.ExitError
		switch {
		case err == nil, errors.As(err, &exit) && exit.ExitCode() == 3:
			return string(out)
		case exit == nil || exit.ExitCode() != 5:
			t.Fatalf("%v: %v\n%s\n%s", args, err, out, box.Log("broker"))
		}
		select {
		case <-box.BrokerEnded():
			t.Fatalf("the broker ended:\n%s", box.Log("broker"))
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// problems asks a broker what keeps it from being ready.
func problems(t *testing.T, box *sandbox.Sandbox) []string {
	t.Helper()
	resp := must(http.Get("http://" + box.Info.Admin + "/readyz"))(t)
	defer resp.Body.Close()
	var said struct {
		Problems []struct {
			Reason string `json:"reason"`
		} `json:"problems"`
	}
	if err := json.NewDecoder(resp.Body).Decode(&said); err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, p := range said.Problems {
		out = append(out, p.Reason)
	}
	if (resp.StatusCode == http.StatusOK) != (len(out) == 0) {
		t.Errorf("status %s with problems %v", resp.Status, out)
	}
	return out
}
