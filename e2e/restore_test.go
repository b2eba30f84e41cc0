package e2e_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/e2e/sandbox"
	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/sdk"
	"github.com/dayflyhq/dayfly/sdk/verify"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// daemon runs the built broker's command to its end.
func daemon(ctx context.Context, args ...string) (string, string, error) {
	cmd := exec.CommandContext(ctx, filepath.Join(bin, "dayfly-broker"), args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	return out.String(), errs.String(), err
}

func wantDone(t *testing.T, args ...string) string {
	t.Helper()
	out, errs, err := daemon(t.Context(), args...)
	if err != nil {
		t.Fatalf("dayfly-broker %q: %v\n%s", args, err, errs)
	}
	return out
}

func wantFailure(t *testing.T, says string, args ...string) {
	t.Helper()
	if _, errs, err := daemon(t.Context(), args...); err == nil || !strings.Contains(errs, says) {
		t.Errorf("dayfly-broker %q: %v, want %q in\n%s", args, err, says, errs)
	}
}

func config(box *sandbox.Sandbox) string { return filepath.Join(box.Dir, "broker.yaml") }

// quarantine locks an identity, and returns the number.
func quarantine(t *testing.T, box *sandbox.Sandbox, id spiffeid.ID, mode dayflyv1.LockMode) uint64 {
	t.Helper()
	alice := must(box.Client(t.Context(), sandbox.Alice, box.Info.GRPC))(t)
	r := must(dayflyv1.NewRevocationServiceClient(alice.Conn()).Revoke(t.Context(), &dayflyv1.RevokeRequest{
		Selectors: []*dayflyv1.Selector{{Selector: &dayflyv1.Selector_Identity{Identity: id.String()}}},
		LockMode:  mode, Reason: "owned: " + id.String(),
	}))(t)
	return r.GetRevocation().GetPosition().GetSequence()
}

// issues asks with a client of its own: an older one may be backing off.
func issues(t *testing.T, box *sandbox.Sandbox, id spiffeid.ID, audience string) error {
	t.Helper()
	_, err := must(box.Client(t.Context(), id, box.Info.GRPC))(t).Issue(t.Context(), sdk.Request{Audience: audience})
	return err
}

func wantLocked(t *testing.T, box *sandbox.Sandbox, id spiffeid.ID) {
	t.Helper()
	if err := issues(t, box, id, "orders"); !errors.Is(err, sdk.ErrIdentityLocked) {
		t.Errorf("%s got %v, want IDENTITY_LOCKED", id, err)
	}
}

func audited(t *testing.T, box *sandbox.Sandbox, action string) []map[string]any {
	t.Helper()
	var out []map[string]any
	for line := range strings.Lines(string(must(os.ReadFile(box.AuditPath()))(t))) {
		var e map[string]any
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			t.Fatal(err)
		}
		if e["action"] == action {
			out = append(out, e)
		}
	}
	return out
}

// TestBackupOnBinaries: a hot backup under load, a cold one, and what is refused.
func TestBackupOnBinaries(t *testing.T) {
	ctx := t.Context()
	box := newBox(t)
	payments := must(box.Client(ctx, sandbox.Payments, box.Info.GRPC))(t)
	load, stop := context.WithCancel(ctx)
	defer stop()
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for load.Err() == nil {
				_, _ = payments.Issue(load, sdk.Request{Audience: "orders"})
			}
		})
	}
	hot := filepath.Join(box.Dir, "hot.db")
	must(payments.Issue(ctx, sdk.Request{Audience: "orders"}))(t)
	var said struct {
		File, From string
		Grants     int
		Backup     time.Time
	}
	if err := json.Unmarshal([]byte(wantDone(t, "backup", "--config", config(box), "--to", hot, "--output", "json")), &said); err != nil {
		t.Fatal(err)
	}
	stop()
	wg.Wait()
	if said.File != hot || said.From != "broker" || said.Grants == 0 || said.Backup.IsZero() {
		t.Errorf("backup said %+v", said)
	}
	if info := must(os.Stat(hot))(t); info.Mode() != 0o600 {
		t.Errorf("mode %v", info.Mode())
	}
	wantDone(t, "check", hot)
	if b := audited(t, box, "backup"); len(b) != 1 || b[0]["actor"] != fmt.Sprintf("break-glass:uid=%d", os.Getuid()) {
		t.Errorf("audited %v", b)
	}
	wantFailure(t, "there is a file already", "backup", "--config", config(box), "--to", hot)
	wantFailure(t, "in use by another process", "backup", "--store", box.StorePath(), "--to", hot+"2")
	// The public listener knows nothing of it.
	alice := must(box.Client(ctx, sandbox.Alice, box.Info.GRPC))(t)
	stream := must(dayflyv1.NewBackupServiceClient(alice.Conn()).Backup(ctx, &dayflyv1.BackupRequest{}))(t)
	var refusal *sdk.Error
	if _, err := stream.Recv(); status.Code(err) != codes.Unimplemented && !(errors.As(err, &refusal) && refusal.Code == codes.Unimplemented) {
		t.Errorf("the public listener answers %v", err)
	}

	if err := box.StopBroker(); err != nil {
		t.Fatal(err)
	}
	cold := filepath.Join(box.Dir, "cold.db")
	if out := wantDone(t, "backup", "--config", config(box), "--to", cold); !strings.Contains(out, "which no broker serves") {
		t.Errorf("it said\n%s", out)
	}
	// Put in the store's place it isn't served.
	if err := errors.Join(os.Rename(box.StorePath(), box.StorePath()+".old"), os.Rename(cold, box.StorePath())); err != nil {
		t.Fatal(err)
	}
	wantFailure(t, "dayfly-broker restore", "serve", "--config", config(box))
	if err := errors.Join(os.Rename(box.StorePath(), cold), os.Rename(box.StorePath()+".old", box.StorePath())); err != nil {
		t.Fatal(err)
	}
}

// TestRestoreOnBinaries is a restore as an operator does it, with everything that is
// connected left alone: the era changes under verifiers, an agent, a relay and sources.
func TestRestoreOnBinaries(t *testing.T) {
	ctx := t.Context()
	box := newBox(t)
	agent := must(box.StartAgent(ctx, sandbox.Web))(t)
	beside := must(sdk.New(sdk.Config{Address: agent}))(t)
	defer beside.Close()
	paymentsAgent := must(box.StartAgent(ctx, sandbox.Payments))(t)
	cached := must(sdk.New(sdk.Config{Address: paymentsAgent}))(t)
	defer cached.Close()
	feed := must(box.Client(ctx, sandbox.Orders, box.Info.GRPC))(t)
	orders := must(box.StartService(ctx, sandbox.ServiceConfig{ID: sandbox.Orders, Audience: "orders", Feed: feed}))(t)
	web := must(box.StartService(ctx, sandbox.ServiceConfig{ID: sandbox.Web, Audience: "web", Feed: beside}))(t) // by the relay
	payments := must(box.Client(ctx, sandbox.Payments, box.Info.GRPC))(t)
	source := payments.TokenSource(sdk.Request{Audience: "orders"})
	defer source.Close()
	paymentsSVID := must(box.Source(ctx, sandbox.Payments))(t)
	client := &http.Client{Transport: &sdk.Transport{Source: source, Base: &http.Transport{
		TLSClientConfig: tlsconfig.MTLSClientConfig(paymentsSVID, paymentsSVID, tlsconfig.AuthorizeID(sandbox.Orders)),
	}}}
	get := func() int {
		t.Helper()
		resp := must(client.Get(orders.URL))(t)
		resp.Body.Close()
		return resp.StatusCode
	}

	lifted := quarantine(t, box, sandbox.Ledger, dayflyv1.LockMode_LOCK_MODE_QUARANTINE)
	early := quarantine(t, box, sandbox.Reports, dayflyv1.LockMode_LOCK_MODE_QUARANTINE)
	backup := filepath.Join(box.Dir, "backup.db")
	wantDone(t, "backup", "--config", config(box), "--to", backup)
	late := quarantine(t, box, sandbox.Orders, dayflyv1.LockMode_LOCK_MODE_QUARANTINE)
	alice := must(box.Client(ctx, sandbox.Alice, box.Info.GRPC))(t)
	must(dayflyv1.NewRevocationServiceClient(alice.Conn()).Lift(ctx, &dayflyv1.LiftRequest{Lock: lifted, Reason: "clean"}))(t)

	old := must(cached.Issue(ctx, sdk.Request{Audience: "orders"}))(t)
	oldWeb := must(cached.Issue(ctx, sdk.Request{Audience: "web"}))(t)
	must(box.Call(ctx, sandbox.Payments, orders, old.Token))(t)
	must(box.Call(ctx, sandbox.Payments, web, oldWeb.Token))(t)
	if code := get(); code != http.StatusOK {
		t.Fatalf("before the restore: %d", code)
	}
	position, webPosition := orders.Verifier.Status().Position, web.Verifier.Status().Position

	box.KillBroker()
	lost := filepath.Join(box.Dir, "lost.db")
	wantFailure(t, "move it away", "restore", "--from", backup, "--store", box.StorePath(), "--locks-from", box.StorePath())
	if err := os.Rename(box.StorePath(), lost); err != nil {
		t.Fatal(err)
	}
	wantFailure(t, "--accept-lost-locks", "restore", "--from", backup, "--store", box.StorePath())
	wantFailure(t, "REASON_REQUIRED", "restore", "--from", backup, "--store", box.StorePath(), "--accept-lost-locks")
	wantFailure(t, "no lock made since", "restore", "--from", backup, "--store", box.StorePath(), "--locks-from", backup)
	if _, err := os.Stat(box.StorePath()); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("a refused restore made a store: %v", err)
	}
	out := wantDone(t, "restore", "--from", backup, "--store", box.StorePath(), "--locks-from", lost, "--output", "json")
	var said struct {
		Era     string
		First   uint64
		Kept    int
		Carried []struct {
			Number, Was  uint64
			What, Reason string
		}
		LocksLost bool
	}
	if err := json.Unmarshal([]byte(out), &said); err != nil {
		t.Fatal(err)
	}
	if said.Kept != 1 || len(said.Carried) != 2 || said.LocksLost || said.Carried[0].Was != late || said.Carried[0].What != "lock" || said.Carried[1].What != "lift" {
		t.Errorf("restore said %+v", said)
	}
	wantDone(t, "check", box.StorePath())
	if err := box.StartBroker(ctx); err != nil {
		t.Fatal(err)
	}

	// Whoever was quarantined is, by the old number or by the new one; what was lifted is.
	wantLocked(t, box, sandbox.Reports)
	alice = must(box.Client(ctx, sandbox.Alice, box.Info.GRPC))(t)
	revocations := dayflyv1.NewRevocationServiceClient(alice.Conn())
	locks := must(revocations.ListLocks(ctx, &dayflyv1.ListLocksRequest{}))(t).GetLocks()
	if len(locks) != 2 || locks[0].GetNumber() != said.Carried[0].Number || locks[1].GetNumber() != early || locks[0].GetReason() != "owned: "+sandbox.Orders.String() || locks[0].GetActor() != sandbox.Alice.String() {
		t.Errorf("locks %v", locks)
	}
	_, err := revocations.Lift(ctx, &dayflyv1.LiftRequest{Lock: late, Reason: "an old ticket"})
	if refused := sdk.FromRPC(err); refused == nil || !strings.Contains(refused.Error(), fmt.Sprint(said.Carried[0].Number)) {
		t.Errorf("lifting it by its old number: %v", refused)
	}
	if a := audited(t, box, "restore"); len(a) != 1 || a[0]["why"] != "restored from a backup" || !strings.HasPrefix(fmt.Sprint(a[0]["actor"]), "dayfly-broker restore:uid=") {
		t.Errorf("audited %v", a)
	}

	// The verifiers get the new era by themselves, and refuse what is of the old one.
	for _, v := range []*sandbox.Service{orders, web} {
		for v.Verifier.Status().Position.Era == position.Era || !v.Verifier.Status().Fresh {
			waitABit(t)
		}
	}
	if p := orders.Verifier.Status().Position; p.Era.String() != said.Era || p.Seq <= said.First || p.Compare(webPosition) <= 0 {
		t.Errorf("the verifier is at %s", p)
	}
	wantRefused(t, box, sandbox.Payments, orders, old, verify.WrongEra)
	wantRefused(t, box, sandbox.Payments, web, oldWeb, verify.WrongEra)
	if code := get(); code != http.StatusOK {
		t.Errorf("a source without an agent: %d", code)
	}
	// The agent gives a new one, once it has heard of the new era itself.
	for {
		fresh := must(cached.Issue(ctx, sdk.Request{Audience: "orders"}))(t)
		if fresh.Grant == old.Grant {
			waitABit(t)
			continue
		}
		must(box.Call(ctx, sandbox.Payments, orders, fresh.Token))(t)
		break
	}
	freshWeb := must(cached.Issue(ctx, sdk.Request{Audience: "web"}))(t)
	must(box.Call(ctx, sandbox.Payments, web, freshWeb.Token))(t)

	// A revocation of the era before is shown as what it is: nobody accepts its tokens.
	shown := must(revocations.GetRevocation(ctx, &dayflyv1.GetRevocationRequest{Sequence: early}))(t)
	if shown.GetRevocation().GetPosition().GetEra() != position.Era.String() {
		t.Errorf("shown at %v", shown.GetRevocation().GetPosition())
	}
	watch := must(revocations.WatchContainment(ctx, &dayflyv1.WatchContainmentRequest{Sequence: early}))(t)
	for !must(watch.Recv())(t).GetContainment().GetContained() {
	}

	// A restart audits nothing twice.
	if err := box.StopBroker(); err != nil {
		t.Fatal(err)
	}
	if err := box.StartBroker(ctx); err != nil {
		t.Fatal(err)
	}
	if a := audited(t, box, "restore"); len(a) != 1 {
		t.Errorf("audited %d times", len(a))
	}
	wantLocked(t, box, sandbox.Reports)
}

// TestRestoreWithoutLocks: nothing is left but the backup. The operator's word is on
// record, and for as long as a verifier that nobody knows of may accept what is revoked,
// nothing is called contained.
func TestRestoreWithoutLocks(t *testing.T) {
	ctx := t.Context()
	box := newBox(t)
	backup := filepath.Join(box.Dir, "backup.db")
	wantDone(t, "backup", "--break-glass", "unix://"+box.Info.BreakGlass, "--to", backup)
	box.KillBroker()
	if err := os.Remove(box.StorePath()); err != nil {
		t.Fatal(err)
	}
	wantDone(t, "restore", "--from", backup, "--store", box.StorePath(), "--accept-lost-locks", "--reason", "disk lost, INC-9")
	if err := box.StartBroker(ctx); err != nil {
		t.Fatal(err)
	}
	if a := audited(t, box, "restore"); len(a) != 1 || a[0]["why"] != "disk lost, INC-9" || !strings.Contains(fmt.Sprint(a[0]["message"]), `"locks_lost":true`) {
		t.Errorf("audited %v", a)
	}
	if err := issues(t, box, sandbox.Payments, "orders"); err != nil {
		t.Error(err)
	}
	number := quarantine(t, box, sandbox.Payments, dayflyv1.LockMode_LOCK_MODE_QUARANTINE)
	alice := must(box.Client(ctx, sandbox.Alice, box.Info.GRPC))(t)
	shown := must(dayflyv1.NewRevocationServiceClient(alice.Conn()).GetRevocation(ctx, &dayflyv1.GetRevocationRequest{Sequence: number}))(t).GetContainment()
	if shown.GetContained() || shown.GetPending() != 1 || len(shown.GetReceipts()) != 1 {
		t.Errorf("containment %v", shown)
	}
}

// waitABit yields between two looks at what another process does; the test's own
// deadline ends it.
func waitABit(t *testing.T) {
	t.Helper()
	select {
	case <-t.Context().Done():
		t.Fatal(t.Context().Err())
	case <-time.After(20 * time.Millisecond):
	}
}

// putBack puts a copy of a store, taken by hand, in the store's place.
func putBack(t *testing.T, box *sandbox.Sandbox, copied, aside string) {
	t.Helper()
	if err := os.Rename(box.StorePath(), aside); err != nil {
		t.Fatal(err)
	}
	b := must(os.ReadFile(copied))(t)
	if err := os.WriteFile(box.StorePath(), b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestOlderStorePutBack: G4c. An older file is put back by hand; a verifier that knew
// more closes and says so, whether the head is lower or has been run on past what it
// knew. A restore from both files opens it again, without a restart, and what was locked
// in either history is locked.
func TestOlderStorePutBack(t *testing.T) {
	for _, runOn := range []int{0, 6} {
		t.Run(fmt.Sprintf("run on by %d", runOn), func(t *testing.T) {
			ctx := t.Context()
			box := newBox(t)
			if err := box.StopBroker(); err != nil {
				t.Fatal(err)
			}
			byHand := filepath.Join(box.Dir, "by-hand.db")
			if err := os.WriteFile(byHand, must(os.ReadFile(box.StorePath()))(t), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := box.StartBroker(ctx); err != nil {
				t.Fatal(err)
			}
			link := must(sandbox.NewLink(box.Info.GRPC))(t)
			t.Cleanup(link.Close)
			feed := must(box.Client(ctx, sandbox.Orders, link.Addr()))(t)
			orders := must(box.StartService(ctx, sandbox.ServiceConfig{ID: sandbox.Orders, Audience: "orders", Feed: feed}))(t)
			quarantine(t, box, sandbox.Ledger, dayflyv1.LockMode_LOCK_MODE_NONE)
			inLost := quarantine(t, box, sandbox.Reports, dayflyv1.LockMode_LOCK_MODE_QUARANTINE)
			for orders.Verifier.Status().Position.Seq < inLost {
				waitABit(t)
			}
			link.Cut()
			box.KillBroker()
			lost := filepath.Join(box.Dir, "lost.db")
			putBack(t, box, byHand, lost)
			if err := box.StartBroker(ctx); err != nil {
				t.Fatal(err)
			}
			for range runOn {
				quarantine(t, box, sandbox.Web, dayflyv1.LockMode_LOCK_MODE_QUARANTINE)
			}
			payments := must(box.Client(ctx, sandbox.Payments, box.Info.GRPC))(t)
			cred := must(payments.Issue(ctx, sdk.Request{Audience: "orders"}))(t)
			link.Restore()
			for verify.ReasonOf(refusalOf(orders, cred)) != verify.VerifierForked {
				waitABit(t)
			}
			wantRefused(t, box, sandbox.Payments, orders, cred, verify.VerifierForked)

			box.KillBroker()
			forked := filepath.Join(box.Dir, "forked.db")
			if err := os.Rename(box.StorePath(), forked); err != nil {
				t.Fatal(err)
			}
			out := wantDone(t, "restore", "--from", forked, "--store", box.StorePath(), "--locks-from", lost, "--verifiers-at", orders.Verifier.Status().Position.String())
			if !strings.Contains(out, "FORK") {
				t.Errorf("the fork isn't said loudly:\n%s", out)
			}
			if err := box.StartBroker(ctx); err != nil {
				t.Fatal(err)
			}
			wantLocked(t, box, sandbox.Reports)
			alice := must(box.Client(ctx, sandbox.Alice, box.Info.GRPC))(t)
			locks := must(dayflyv1.NewRevocationServiceClient(alice.Conn()).ListLocks(ctx, &dayflyv1.ListLocksRequest{}))(t).GetLocks()
			if len(locks) != runOn+1 {
				t.Errorf("%d locks stand, want the lost one and %d of the history that was run on", len(locks), runOn)
			}
			for !orders.Verifier.Status().Fresh {
				waitABit(t)
			}
			wantRefused(t, box, sandbox.Payments, orders, cred, verify.WrongEra)
			fresh := must(must(box.Client(ctx, sandbox.Payments, box.Info.GRPC))(t).Issue(ctx, sdk.Request{Audience: "orders"}))(t)
			must(box.Call(ctx, sandbox.Payments, orders, fresh.Token))(t)
		})
	}
}

func refusalOf(svc *sandbox.Service, cred *sdk.Credential) error {
	_, err := svc.Verifier.Verify(context.Background(), cred.Token.Reveal(), verify.Peer{ID: sandbox.Payments})
	return err
}

// TestKillBackupOfBroker kills the command, and the broker, in the midst of a hot backup:
// no file is left that isn't whole, and the broker that lives serves on.
func TestKillBackupOfBroker(t *testing.T) {
	ctx := t.Context()
	box := newBox(t)
	to := filepath.Join(box.Dir, "backup.db")
	for n := range 8 {
		cmd := exec.Command(filepath.Join(bin, "dayfly-broker"), "backup", "--config", config(box), "--to", to)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		<-time.After(time.Duration(5*n) * time.Millisecond) // any moment will do
		if n%4 == 3 {
			box.KillBroker()
		} else if err := cmd.Process.Signal(syscall.SIGKILL); err != nil && !errors.Is(err, os.ErrProcessDone) {
			t.Fatal(err)
		}
		_ = cmd.Wait()
		if n%4 == 3 {
			if err := box.StartBroker(ctx); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := os.Stat(to); err == nil {
			wantDone(t, "check", to)
			if err := os.Remove(to); err != nil {
				t.Fatal(err)
			}
		}
	}
	wantDone(t, "backup", "--config", config(box), "--to", to)
	if err := issues(t, box, sandbox.Payments, "orders"); err != nil {
		t.Error(err)
	}
}
