package e2e_test

import (
	"crypto/rand"
	"encoding/json"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/e2e/sandbox"
	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/proto/wire"
	"github.com/dayflyhq/dayfly/sdk"
	"github.com/dayflyhq/dayfly/sdk/verify"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// operate runs the operator's command against the broker, as alice, and returns what it
// printed and its exit code.
func operate(t *testing.T, box *sandbox.Sandbox, args ...string) (string, int) {
	t.Helper()
	socket := must(box.TD.Workload(sandbox.Alice))(t)
	cmd := exec.CommandContext(t.Context(), filepath.Join(bin, "dayfly"), append(args, "--timeout", "60s")...)
	cmd.Env = append(os.Environ(), "DAYFLY_BROKER="+box.Info.GRPC, "DAYFLY_BROKER_ID="+sandbox.Broker.String(), "SPIFFE_ENDPOINT_SOCKET="+socket)
	out, err := cmd.Output()
	if err != nil && cmd.ProcessState == nil {
		t.Fatal(err)
	}
	return string(out), cmd.ProcessState.ExitCode()
}

// operateUntil runs a command again and again until the message that it prints is as
// wanted: a verifier reports in its own time.
func operateUntil[M proto.Message](t *testing.T, box *sandbox.Sandbox, m M, wanted func(M) bool, args ...string) {
	t.Helper()
	deadline := time.Now().Add(2 * time.Minute)
	for {
		out, code := operate(t, box, append(args, "--output", "json")...)
		if code == 0 {
			if err := protojson.Unmarshal([]byte(out), m); err != nil {
				t.Fatal(err)
			}
			if wanted(m) {
				return
			}
		}
		if time.Now().After(deadline) {
			t.Fatalf("dayfly %s: exit code %d: %s", strings.Join(args, " "), code, out)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// TestUsesThroughTheCLI: what verifiers saw is in the dry run, with the fallbacks of
// policy data; what is presented after the revocation is in its status, behind an agent
// too, and is there after SIGKILL.
func TestUsesThroughTheCLI(t *testing.T) {
	ctx := t.Context()
	box := newBox(t)
	payments := must(box.Client(ctx, sandbox.Payments, box.Info.GRPC))(t)
	orders := must(box.Client(ctx, sandbox.Orders, box.Info.GRPC))(t)
	agent := must(box.StartAgent(ctx, sandbox.Ledger))(t)
	beside := must(sdk.New(sdk.Config{Address: agent}))(t)
	t.Cleanup(func() { beside.Close() })
	ordersSvc := must(box.StartService(ctx, sandbox.ServiceConfig{ID: sandbox.Orders, Audience: "orders", Feed: orders}))(t)
	ledgerSvc := must(box.StartService(ctx, sandbox.ServiceConfig{ID: sandbox.Ledger, Audience: "ledger", Feed: beside}))(t)
	root := must(payments.Issue(ctx, sdk.Request{Audience: "orders"}))(t)
	derived := must(orders.Exchange(ctx, root.Token, sdk.Request{Audience: "ledger"}))(t)
	for range 3 {
		must(box.Call(ctx, sandbox.Payments, ordersSvc, root.Token))(t)
	}
	must(box.Call(ctx, sandbox.Orders, ledgerSvc, derived.Token))(t)

	plan := &dayflyv1.PlanResponse{}
	dry := []string{"revoke", "--subtree", "spiffe://dayfly.test/ns/shop/*", "--dry-run", "--seen-from", "127.0.0.1"}
	operateUntil(t, box, plan, func(p *dayflyv1.PlanResponse) bool {
		return len(p.GetWorkflows()) == 2 && p.GetWorkflows()[0].GetCount() == 3 && p.GetWorkflows()[1].GetCount() == 1
	}, dry...)
	for i, want := range []struct{ caller, callee, fallback string }{
		{sandbox.Payments.String(), "orders", "payments retries orders for an hour, then asks a person"},
		{sandbox.Orders.String(), "ledger", "bookings wait in the journal"},
	} {
		f := plan.GetWorkflows()[i]
		if f.GetCaller() != want.caller || f.GetCallee() != want.callee || f.GetFallback().GetText() != want.fallback || f.GetLastSeen() == nil {
			t.Errorf("workflow %v, want %+v", f, want)
		}
	}
	text, code := operate(t, box, append(dry, "--identity", sandbox.Payments.String())...)
	for _, want := range []string{"would break", "asks a person, https://wiki.dayfly.test/orders-degraded, shop on-call", "nothing was changed"} {
		if code != 0 || !strings.Contains(text, want) {
			t.Errorf("the dry run doesn't say %q:\n%s", want, text)
		}
	}

	resp := &dayflyv1.RevokeResponse{}
	operateUntil(t, box, resp, func(*dayflyv1.RevokeResponse) bool { return true }, "revoke", "--identity", sandbox.Payments.String(), "--reason", "test", "--yes")
	wantRefused(t, box, sandbox.Payments, ordersSvc, root, verify.TokenRevoked)
	wantRefused(t, box, sandbox.Orders, ledgerSvc, derived, verify.TokenRevoked)
	number := strconv.FormatUint(resp.GetRevocation().GetPosition().GetSequence(), 10)
	seen := func(r *dayflyv1.GetRevocationResponse) bool {
		uses := r.GetContainment().GetUsesAfter()
		return len(uses) == 2 && uses[0].GetRefused() == 1 && uses[1].GetRefused() == 1
	}
	show := &dayflyv1.GetRevocationResponse{}
	operateUntil(t, box, show, seen, "revocations", "show", number)
	for i, want := range []struct{ verifier, peer string }{
		{sandbox.Ledger.String(), sandbox.Orders.String()}, {sandbox.Orders.String(), sandbox.Payments.String()},
	} {
		u := show.GetContainment().GetUsesAfter()[i]
		if u.GetVerifier() != want.verifier || len(u.GetPeers()) != 1 || u.GetPeers()[0] != want.peer || len(u.GetAddresses()) != 1 || u.GetAddresses()[0] != "127.0.0.1" || u.GetAcceptedKnowing() != 0 {
			t.Errorf("used after: %v, want %+v", u, want)
		}
	}
	box.KillBroker()
	if err := box.StartBroker(ctx); err != nil {
		t.Fatal(err)
	}
	operateUntil(t, box, &dayflyv1.GetRevocationResponse{}, seen, "revocations", "show", number)
	if text, _ := operate(t, box, "revocations", "show", number); !strings.Contains(text, "Used after the revocation") || strings.Contains(text, "BROKEN") {
		t.Errorf("after a restart:\n%s", text)
	}
}

// TestUnrecordedUseIsAlarm: a verifier that reports a use of what was never recorded is
// named in the log, the audit and the metrics.
func TestUnrecordedUseIsAlarm(t *testing.T) {
	ctx := t.Context()
	box := newBox(t)
	ledger := must(box.Client(ctx, sandbox.Ledger, box.Info.GRPC))(t)
	stream := must(dayflyv1.NewFeedServiceClient(ledger.Conn()).Follow(ctx))(t)
	send := func(m *dayflyv1.FollowRequest) {
		t.Helper()
		if err := stream.Send(m); err != nil {
			t.Fatal(err)
		}
	}
	send(&dayflyv1.FollowRequest{Message: &dayflyv1.FollowRequest_Subscribe{Subscribe: wire.Subscribe(wire.Subscription{
		Instance: "instance-0001", Audiences: []string{"ledger"}, Bound: 2 * time.Second,
	})}})
	invented := must(token.NewGrantID(sandbox.Payments, time.Now(), rand.Reader))(t)
	now := timestamppb.Now()
	send(&dayflyv1.FollowRequest{Message: &dayflyv1.FollowRequest_UseReport{UseReport: &dayflyv1.UseReport{Number: 1, Uses: []*dayflyv1.Use{{
		Grant: invented.String(), PeerAddress: "203.0.113.9", Accepted: true, Count: 1, FirstSeen: now, LastSeen: now,
	}}}}})

	var alarm struct{ Action, Actor, Outcome, Reason, Grant, Message string }
	deadline := time.Now().Add(2 * time.Minute)
	for alarm.Outcome != "alarm" {
		if time.Now().After(deadline) {
			t.Fatal("no alarm in the audit")
		}
		for line := range strings.Lines(string(must(os.ReadFile(box.AuditPath()))(t))) {
			if strings.Contains(line, `"alarm"`) {
				if err := json.Unmarshal([]byte(line), &alarm); err != nil {
					t.Fatal(err)
				}
			}
		}
		time.Sleep(20 * time.Millisecond)
	}
	if alarm.Action != "report" || alarm.Actor != sandbox.Ledger.String() || alarm.Reason != "GRANT_UNRECORDED" || alarm.Grant != invented.String() || !strings.Contains(alarm.Message, "203.0.113.9") {
		t.Errorf("audit %+v", alarm)
	}
	if log := box.Log("broker"); !strings.Contains(log, "somebody holds a signing key") || !strings.Contains(log, `"reported_by":"`+sandbox.Ledger.String()) {
		t.Errorf("log: %s", log)
	}
	for {
		page := must(http.Get("http://" + box.Info.Admin + "/metrics"))(t)
		metrics := string(must(io.ReadAll(page.Body))(t))
		page.Body.Close()
		if strings.Contains(metrics, "\ndayfly_unrecorded_uses_total 1\n") && strings.Contains(metrics, "\ndayfly_alerts_total 1\n") && strings.Contains(metrics, "\ndayfly_uses_total 1\n") {
			for _, want := range []string{`dayfly_connections{state="open"} 1`, `dayfly_connections{state="handshake"} 0`, `dayfly_connections_closed_total{why="crowded"} 0`, `dayfly_connections_closed_total{why="bound"} 0`} {
				if !strings.Contains(metrics, "\n"+want+"\n") {
					t.Errorf("no %s in the metrics:\n%s", want, metrics)
				}
			}
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("metrics:\n%s", metrics)
		}
		time.Sleep(20 * time.Millisecond)
	}
}
