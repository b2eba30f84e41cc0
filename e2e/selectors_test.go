package e2e_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/e2e/sandbox"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk"
	"github.com/dayflyhq/dayfly/sdk/spiffetest"
	"github.com/dayflyhq/dayfly/sdk/verify"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// A said is what the command answered.
type said struct {
	code           int
	stdout, stderr string
}

// dayfly runs the command as an operator.
func dayfly(t *testing.T, box *sandbox.Sandbox, as spiffeid.ID, args ...string) said {
	t.Helper()
	socket := must(box.TD.Workload(as))(t)
	cmd := exec.CommandContext(t.Context(), filepath.Join(bin, "dayfly"), append([]string{"--timeout", "60s"}, args...)...)
	cmd.Env = append(os.Environ(), "DAYFLY_BROKER="+box.Info.GRPC, "DAYFLY_BROKER_ID="+sandbox.Broker.String(), "SPIFFE_ENDPOINT_SOCKET="+socket)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return said{cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()}
}

// want ends the test if the command ended otherwise.
func (s said) want(t *testing.T, code int) said {
	t.Helper()
	if s.code != code {
		t.Fatalf("exit code %d, want %d\n%s%s", s.code, code, s.stdout, s.stderr)
	}
	return s
}

// recorded reads the JSON of a revoke.
func (s said) recorded(t *testing.T) (number string, cut time.Time) {
	t.Helper()
	var m struct {
		Revocation struct {
			Position struct{ Sequence string }
			LockCut  time.Time
		}
	}
	if err := json.Unmarshal([]byte(s.stdout), &m); err != nil || m.Revocation.Position.Sequence == "" {
		t.Fatalf("no revocation in %s (%v)", s.stdout, err)
	}
	return m.Revocation.Position.Sequence, m.Revocation.LockCut
}

// oneSVID is a source of one certificate, that no rotation replaces.
type oneSVID struct {
	*x509svid.SVID
	x509bundle.Source
}

// A member is a workload with one SVID of its own, and the tokens it got with it.
type member struct {
	id      spiffeid.ID
	svid    *x509svid.SVID
	client  *sdk.Client
	root    *sdk.Credential // for orders
	derived *sdk.Credential // of orders, for ledger
}

// scene is what every case begins with: two SVIDs of one identity, and somebody else.
type scene struct {
	t                       *testing.T
	box                     *sandbox.Sandbox
	orders                  *sdk.Client
	ordersSvc, ledgerSvc    *sandbox.Service
	stolen, sibling, others *member
}

func (s *scene) member(id spiffeid.ID, opts spiffetest.SVIDOptions) *member {
	s.t.Helper()
	m := &member{id: id, svid: must(s.box.TD.IssueSVID(id, opts))(s.t)}
	m.client = must(sdk.New(sdk.Config{Address: s.box.Info.GRPC, Source: oneSVID{m.svid, s.box.TD}, BrokerID: sandbox.Broker}))(s.t)
	s.t.Cleanup(func() { m.client.Close() })
	return m
}

func (s *scene) fetch(m *member) {
	s.t.Helper()
	ctx := s.t.Context()
	m.root = must(m.client.Issue(ctx, sdk.Request{Audience: "orders"}))(s.t)
	m.derived = must(s.orders.Exchange(ctx, m.root.Token, sdk.Request{Audience: "ledger"}))(s.t)
}

// fates says of stolen's, sibling's and others' root and derived tokens whether they
// live: "rd rd rd", with a dash for a dead one.
func (s *scene) fates() string {
	var out []string
	for _, m := range []*member{s.stolen, s.sibling, s.others} {
		fate := []byte("rd")
		for i, c := range []struct {
			svc  *sandbox.Service
			cred *sdk.Credential
			peer spiffeid.ID
		}{{s.ordersSvc, m.root, m.id}, {s.ledgerSvc, m.derived, sandbox.Orders}} {
			_, err := c.svc.Verifier.Verify(s.t.Context(), c.cred.Token.Reveal(), verify.Peer{ID: c.peer})
			var refused *verify.Refusal
			switch {
			case err == nil:
			case errors.As(err, &refused) && (refused.Reason == verify.TokenRevoked || refused.Reason == verify.KeyRevoked):
				fate[i] = '-'
			default:
				s.t.Errorf("%s at %s: %v", m.id, c.svc.Audience, err)
			}
		}
		out = append(out, string(fate))
	}
	return strings.Join(out, " ")
}

// admitted says who gets new credentials: "yes no yes" for stolen, sibling and others.
func (s *scene) admitted(members ...*member) string {
	var out []string
	for _, m := range members {
		_, err := m.client.Issue(s.t.Context(), sdk.Request{Audience: "orders"})
		for e := (*sdk.Error)(nil); errors.As(err, &e) && e.Temporary(); { // the next key is being made
			_, err = m.client.Issue(s.t.Context(), sdk.Request{Audience: "orders"})
		}
		switch {
		case err == nil:
			out = append(out, "yes")
		case errors.Is(err, sdk.ErrIdentityLocked):
			out = append(out, "no")
		default:
			s.t.Errorf("%s: %v", m.id, err)
		}
	}
	return strings.Join(out, " ")
}

// TestSelectors: every selector in every mode of its lock, by the command, over mTLS:
// which tokens die, who gets new ones, and that ending the lock revives nothing. A
// reissue lock is looked at again once its cut has passed.
func TestSelectors(t *testing.T) {
	box := newBox(t, "entitlements:\n  spiffe://dayfly.test/t/*:\n    orders: {scopes: [orders.read, ledger.read]}\n")
	ctx := t.Context()
	base := scene{t: t, box: box, orders: must(box.Client(ctx, sandbox.Orders, box.Info.GRPC))(t)}
	ledger := must(box.Client(ctx, sandbox.Ledger, box.Info.GRPC))(t)
	base.ordersSvc = must(box.StartService(ctx, sandbox.ServiceConfig{ID: sandbox.Orders, Audience: "orders", Feed: base.orders}))(t)
	base.ledgerSvc = must(box.StartService(ctx, sandbox.ServiceConfig{ID: sandbox.Ledger, Audience: "ledger", Feed: ledger}))(t)

	type pending struct {
		scene  scene
		number string
		cut    time.Time
	}
	var reissued []pending
	svid := func(m *member) string { return token.ThumbprintOf(m.svid.Certificates[0]).String() }
	dir := func(s *scene) string { return "spiffe://dayfly.test" + filepath.Dir(s.stolen.id.Path()) }
	for i, tc := range []struct {
		name  string
		flags func(s *scene) []string
		lock  string // "": the default
		fates string
		new   string
	}{
		{"grant", func(s *scene) []string { return []string{"--grant", s.stolen.root.Grant} }, "", "-- rd rd", "yes yes yes"},
		{"derived grant", func(s *scene) []string { return []string{"--grant", s.stolen.derived.Grant} }, "", "r- rd rd", "yes yes yes"},
		{"identity", func(s *scene) []string { return []string{"--identity", s.stolen.id.String()} }, "", "-- -- rd", "no no yes"},
		{"identity, reissue", func(s *scene) []string { return []string{"--identity", s.stolen.id.String()} }, "reissue", "-- -- rd", "no no yes"},
		{"identity, none", func(s *scene) []string { return []string{"--identity", s.stolen.id.String()} }, "none", "-- -- rd", "yes yes yes"},
		{"subtree", func(s *scene) []string { return []string{"--subtree", dir(s) + "/*"} }, "", "-- -- rd", "no no yes"},
		{"subtree, reissue", func(s *scene) []string { return []string{"--subtree", dir(s) + "/*"} }, "reissue", "-- -- rd", "no no yes"},
		{"subtree, none", func(s *scene) []string { return []string{"--subtree", dir(s) + "/*"} }, "none", "-- -- rd", "yes yes yes"},
		{"half a segment", func(s *scene) []string { return []string{"--subtree", strings.TrimSuffix(dir(s), "d") + "/*"} }, "", "rd rd rd", "yes yes yes"},
		{"audience", func(*scene) []string { return []string{"--audience", "orders"} }, "", "-d -d -d", "yes yes yes"},
		{"SVID", func(s *scene) []string { return []string{"--svid", svid(s.stolen)} }, "", "-- rd rd", "no yes yes"},
		{"SVID, reissue", func(s *scene) []string { return []string{"--svid", svid(s.stolen)} }, "reissue", "-- rd rd", "no yes yes"},
		{"SVID, none", func(s *scene) []string { return []string{"--svid", svid(s.stolen)} }, "none", "-- rd rd", "yes yes yes"},
		{"signing key", func(s *scene) []string {
			return []string{"--key", must(token.Inspect(s.stolen.root.Token.Reveal()))(s.t).Self().Key.String()}
		}, "", "-- -- --", "yes yes yes"},
		{"several", func(s *scene) []string {
			return []string{"--svid", svid(s.stolen), "--grant", s.others.derived.Grant, "--audience", "nowhere"}
		}, "", "-- rd r-", "no yes yes"},
		{"trust domain", func(*scene) []string { return []string{"--trust-domain", "dayfly.test"} }, "", "-- -- --", "no no no"},
		{"trust domain, none", func(*scene) []string { return []string{"--trust-domain", "dayfly.test"} }, "none", "-- -- --", "yes yes yes"},
		{"another trust domain", func(*scene) []string { return []string{"--trust-domain", "dayfly.tes"} }, "", "rd rd rd", "yes yes yes"},
		{"everything", func(*scene) []string { return []string{"--everything"} }, "", "-- -- --", "yes yes yes"},
		{"trust domain, reissue", func(*scene) []string { return []string{"--trust-domain", "dayfly.test"} }, "reissue", "-- -- --", "no no no"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := base // with the test of them all: clients are needed after their case
			victim := spiffeid.RequireFromString(fmt.Sprintf("spiffe://dayfly.test/t/%dd/victim", i))
			s.stolen, s.sibling = s.member(victim, spiffetest.SVIDOptions{}), s.member(victim, spiffetest.SVIDOptions{})
			s.others = s.member(spiffeid.RequireFromString(fmt.Sprintf("spiffe://dayfly.test/t/%do/other", i)), spiffetest.SVIDOptions{})
			for _, m := range []*member{s.stolen, s.sibling, s.others} {
				s.fetch(m)
			}
			if got := s.fates(); got != "rd rd rd" {
				t.Fatalf("before: %s", got)
			}
			args := append([]string{"revoke", "--reason", tc.name, "--yes", "-o", "json"}, tc.flags(&s)...)
			if tc.lock != "" {
				args = append(args, "--lock", tc.lock)
			}
			if tc.name == "everything" {
				dayfly(t, box, sandbox.Alice, args...).want(t, 6)
				if got := s.fates(); got != "rd rd rd" {
					t.Errorf("proposed, and the tokens are %s", got)
				}
				if again := dayfly(t, box, sandbox.Alice, args...).want(t, 1); !strings.Contains(again.stderr, "SECOND_PERSON_REQUIRED") {
					t.Errorf("the proposer again: %s", again.stderr)
				}
				args = append(args, "--svid-socket", must(box.TD.Workload(sandbox.Bob))(t))
			}
			number, cut := dayfly(t, box, sandbox.Alice, args...).want(t, 0).recorded(t)
			if got := s.fates(); got != tc.fates {
				t.Errorf("tokens: %s, want %s", got, tc.fates)
			}
			if got := s.admitted(s.stolen, s.sibling, s.others); got != tc.new {
				t.Errorf("new credentials: %s, want %s", got, tc.new)
			}
			lift := []string{"lift", number, "--reason", "over"}
			switch {
			case tc.lock == "reissue" && !strings.HasPrefix(tc.name, "SVID"):
				reissued = append(reissued, pending{s, number, cut})
				return
			case strings.Contains(tc.new, "no") || tc.name == "half a segment" || tc.name == "another trust domain":
				dayfly(t, box, sandbox.Alice, lift...).want(t, 0)
			}
			if again := dayfly(t, box, sandbox.Alice, lift...).want(t, 1); !strings.Contains(again.stderr, "LOCK_NOT_FOUND") {
				t.Errorf("a lock that doesn't stand: %s", again.stderr)
			}
			if got := s.admitted(s.stolen, s.sibling, s.others); got != "yes yes yes" {
				t.Errorf("new credentials after the lift: %s", got)
			}
			if got := s.fates(); got != tc.fates {
				t.Errorf("tokens after the lift: %s, want %s", got, tc.fates)
			}
		})
	}
	if t.Failed() {
		return // don't wait for the cuts
	}
	// The last of the locks covers the whole trust domain, and its cut is the latest.
	notBefore := reissued[len(reissued)-1].cut.Truncate(time.Second).Add(time.Second)
	await(t, notBefore)
	for _, p := range reissued {
		fresh := p.scene.member(p.scene.stolen.id, spiffetest.SVIDOptions{NotBefore: notBefore, NotAfter: notBefore.Add(time.Hour)})
		if got := p.scene.admitted(p.scene.stolen, p.scene.sibling, p.scene.others, fresh); got != "no no no yes" {
			t.Errorf("lock %s after its cut: %s, want the fresh SVID alone", p.number, got)
		}
	}
	for _, p := range reissued {
		before := p.scene.fates()
		dayfly(t, box, sandbox.Alice, "lift", p.number, "--reason", "over").want(t, 0)
		if got := p.scene.fates(); got != before {
			t.Errorf("tokens: %s, before the lift of %s %s", got, p.number, before)
		}
	}
	for _, p := range reissued {
		if got := p.scene.admitted(p.scene.stolen, p.scene.sibling, p.scene.others); got != "yes yes yes" {
			t.Errorf("after the lift of %s: %s", p.number, got)
		}
	}
}

// await returns at a moment of the wall clock: what an SVID's dates are of.
func await(t *testing.T, at time.Time) {
	t.Helper()
	timer := time.NewTimer(time.Until(at))
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-t.Context().Done():
		t.Fatal(t.Context().Err())
	}
}

// TestSecondPerson: what was proposed survives SIGKILL, the proposer can't confirm, a
// colleague can, and both are on record.
func TestSecondPerson(t *testing.T) {
	ctx := t.Context()
	box := newBox(t, "lift: {two_person: true, within: 30m}\n")
	number, _ := dayfly(t, box, sandbox.Alice, "revoke", "--identity", sandbox.Payments.String(), "--reason", "r", "--yes", "-o", "json").want(t, 0).recorded(t)

	out := dayfly(t, box, sandbox.Alice, "lift", number, "--reason", "host rebuilt", "--idempotency-key", "k").want(t, 6)
	command := fmt.Sprintf("dayfly lift %s --reason 'host rebuilt' --broker %s --broker-id %s\n", number, box.Info.GRPC, sandbox.Broker)
	for _, part := range []string{command, "May confirm, by policy data: " + sandbox.Bob.String() + "\n", "--break-glass"} {
		if !strings.Contains(out.stdout, part) {
			t.Errorf("a lone operator isn't told %q:\n%s", part, out.stdout)
		}
	}
	box.KillBroker()
	if err := box.StartBroker(ctx); err != nil {
		t.Fatal(err)
	}
	payments := must(box.Client(ctx, sandbox.Payments, box.Info.GRPC))(t)
	dayfly(t, box, sandbox.Alice, "lift", number, "--reason", "host rebuilt", "--idempotency-key", "k").want(t, 6)
	if again := dayfly(t, box, sandbox.Alice, "lift", number, "--reason", "r").want(t, 1); !strings.Contains(again.stderr, "SECOND_PERSON_REQUIRED") {
		t.Errorf("the proposer again: %s", again.stderr)
	}
	if err := box.TD.Rotate(sandbox.Alice); err != nil {
		t.Fatal(err)
	}
	dayfly(t, box, sandbox.Alice, "lift", number, "--reason", "another SVID").want(t, 1)
	if locks := dayfly(t, box, sandbox.Bob, "locks").want(t, 0); !strings.Contains(locks.stdout, "lift proposed by "+sandbox.Alice.String()) {
		t.Errorf("locks: %s", locks.stdout)
	}
	if _, err := payments.Issue(ctx, sdk.Request{Audience: "orders"}); !errors.Is(err, sdk.ErrIdentityLocked) {
		t.Errorf("a lift that was only proposed: %v", err)
	}
	both := fmt.Sprintf("Proposed by %s, confirmed by %s.", sandbox.Alice, sandbox.Bob)
	if out := dayfly(t, box, sandbox.Bob, "lift", number, "--reason", "I looked").want(t, 0); !strings.Contains(out.stdout, both) {
		t.Errorf("confirmed: %s", out.stdout)
	}
	must(payments.Issue(ctx, sdk.Request{Audience: "orders"}))(t)
	if out := dayfly(t, box, sandbox.Alice, "lift", number, "--reason", "host rebuilt", "--idempotency-key", "k").want(t, 0); !strings.Contains(out.stdout, both) {
		t.Errorf("the proposer's retry: %s", out.stdout)
	}
	audit := string(must(os.ReadFile(box.AuditPath()))(t))
	for _, part := range []string{`"outcome":"proposed"`, `"action":"lift_confirm"`, `"proposed_by":"` + sandbox.Alice.String() + `"`} {
		if !strings.Contains(audit, part) {
			t.Errorf("the audit lacks %s", part)
		}
	}

	// Root on this host needs nobody else.
	dayfly(t, box, sandbox.Alice, "revoke", "--everything", "--reason", "r", "--yes").want(t, 6)
	glass := []string{"revoke", "--break-glass", "unix://" + box.Info.BreakGlass, "--everything", "--reason", "r", "--yes", "-o", "json"}
	everything, _ := dayfly(t, box, sandbox.Alice, glass...).want(t, 0).recorded(t)
	if n, err := strconv.Atoi(everything); err != nil || n == 0 {
		t.Errorf("recorded as %q", everything)
	}
}

// TestLockEnds: a lock with an end ends by itself, and revives nothing.
func TestLockEnds(t *testing.T) {
	ctx := t.Context()
	box := newBox(t)
	payments := must(box.Client(ctx, sandbox.Payments, box.Info.GRPC))(t)
	feed := must(box.Client(ctx, sandbox.Orders, box.Info.GRPC))(t)
	orders := must(box.StartService(ctx, sandbox.ServiceConfig{ID: sandbox.Orders, Audience: "orders", Feed: feed}))(t)
	old := must(payments.Issue(ctx, sdk.Request{Audience: "orders"}))(t)
	number, _ := dayfly(t, box, sandbox.Alice, "revoke", "--identity", sandbox.Payments.String(), "--lock-for", "1s", "--reason", "r", "--yes", "-o", "json").want(t, 0).recorded(t)
	var fresh *sdk.Credential
	for fresh == nil {
		time.Sleep(5 * time.Millisecond) // within the rate that policy allows
		var err error
		if fresh, err = payments.Issue(ctx, sdk.Request{Audience: "orders"}); err != nil && !errors.Is(err, sdk.ErrIdentityLocked) {
			t.Fatal(err)
		}
	}
	must(box.Call(ctx, sandbox.Payments, orders, fresh.Token))(t)
	wantRefused(t, box, sandbox.Payments, orders, old, verify.TokenRevoked)
	dayfly(t, box, sandbox.Alice, "lift", number, "--reason", "r").want(t, 1)
}
