package e2e_test

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/e2e/sandbox"
	"github.com/dayflyhq/dayfly/sdk"
	"google.golang.org/grpc/codes"
)

const roles = `audiences:
  "minio/{segment.2}": {owner: storage, verified_by: external}
entitlements:
  spiffe://dayfly.test/ns/*: {"minio/{segment.2}": {scopes: [], binding: none}}
`

// TestPolicyReplay: what a real broker recorded is put to candidates: its own policy
// changes nothing; another's denials, shorter lives and new entries are told, whoever
// asked, for whatever: also an exchange, the feed and an operator's call.
func TestPolicyReplay(t *testing.T) {
	box := newBox(t, roles)
	ctx := t.Context()
	payments := must(box.Client(ctx, sandbox.Payments, box.Info.GRPC))(t)
	orders := must(box.Client(ctx, sandbox.Orders, box.Info.GRPC))(t)
	var secrets []string
	for range 3 {
		c := must(payments.Issue(ctx, sdk.Request{Audience: "orders", Scopes: []string{"orders.read", "ledger.read"}}))(t)
		d := must(orders.Exchange(ctx, c.Token, sdk.Request{Audience: "ledger"}))(t)
		secrets = append(secrets, c.Token.Reveal(), d.Token.Reveal())
	}
	// The first key of a broker waits for readers of the JWK set.
	_, err := payments.Issue(ctx, sdk.Request{Audience: "minio/shop"})
	for refused := (*sdk.Error)(nil); errors.As(err, &refused) && refused.Reason == "KEY_NOT_SPREAD_YET"; {
		time.Sleep(50 * time.Millisecond)
		_, err = payments.Issue(ctx, sdk.Request{Audience: "minio/shop"})
	}
	if err != nil {
		t.Fatal(err)
	}
	_, err = payments.Issue(ctx, sdk.Request{Audience: "minio/other"})
	wantError(t, err, codes.PermissionDenied, "POLICY_DENIED")
	if _, err := box.StartService(ctx, sandbox.ServiceConfig{ID: sandbox.Orders, Audience: "orders", Feed: orders}); err != nil {
		t.Fatal(err)
	}
	dayfly(t, box, sandbox.Alice, "locks").want(t, 0)

	audit := string(must(os.ReadFile(box.AuditPath()))(t))
	for _, s := range secrets {
		if strings.Contains(audit, s) || strings.Contains(audit, strings.Split(s, ".")[2]) {
			t.Error("the audit holds a credential")
		}
	}
	for line := range strings.Lines(audit) {
		var e broker.AuditEntry
		if err := json.Unmarshal([]byte(line), &e); err != nil || len(e.Asked) == 0 || !strings.HasPrefix(e.Revision, "sha256:") {
			t.Errorf("a record without its question or revision: %v\n%s", err, line)
		}
	}

	replay := func(dir string, more ...string) said {
		t.Helper()
		return dayfly(t, box, sandbox.Alice, append([]string{"policy", "replay", dir, "--audit", box.AuditPath()}, more...)...)
	}
	if out := replay(box.PolicyDir()).want(t, 0); !strings.Contains(out.stdout, "decisions replayed against sha256:") || strings.Contains(out.stdout, "not replayed") {
		t.Errorf("against itself:\n%s", out.stdout)
	}

	candidate := func(old, now string) string {
		t.Helper()
		dir := t.TempDir()
		for _, e := range must(os.ReadDir(box.PolicyDir()))(t) {
			text := string(must(os.ReadFile(filepath.Join(box.PolicyDir(), e.Name())))(t))
			if err := os.WriteFile(filepath.Join(dir, e.Name()), []byte(strings.Replace(text, old, now, 1)), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		return dir
	}
	out := replay(candidate("        scopes: [ledger.read]\n        ttl: 2m", "        scopes: [ledger.read]\n        ttl: 1m")).want(t, 7)
	if !strings.Contains(out.stdout, "shortened: 3\n  3 x  "+sandbox.Orders.String()+" exchange orders -> ledger") || !strings.Contains(out.stdout, "2m0s -> 1m0s") {
		t.Errorf("a shorter life:\n%s", out.stdout)
	}
	out = replay(candidate("{follow: [orders], relay: true}", "{follow: [], relay: true}"), "-o", "json").want(t, 4)
	var said struct {
		Changes []struct {
			Kinds  []string
			Action string
			Caller string
			Count  int
		}
	}
	if err := json.Unmarshal([]byte(out.stdout), &said); err != nil || len(said.Changes) != 1 || said.Changes[0].Action != "follow" || said.Changes[0].Kinds[0] != "denied" {
		t.Errorf("a follower denied: %v\n%s", err, out.stdout)
	}
	out = replay(candidate("minio/{segment.2}\": {scopes", "minio/{path}\": {scopes")).want(t, 1)
	if !strings.Contains(out.stderr, "isn't declared") {
		t.Errorf("a broken candidate:\n%s", out.stderr)
	}
	replay(box.PolicyDir(), "--since", "1ns").want(t, 1)
}
