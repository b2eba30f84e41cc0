package rpc_test

import (
	"context"
	"crypto/sha256"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/broker/rpc"
	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk/spiffetest"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"
)

func identity(s string) *dayflyv1.Selector {
	return &dayflyv1.Selector{Selector: &dayflyv1.Selector_Identity{Identity: s}}
}

// What is wrong in itself, in every call: the code, the reason and a hint.
func TestMalformedCalls(t *testing.T) {
	w := newWorld(t)
	conn := w.as(payments)
	tokens, revocations, grants := dayflyv1.NewTokenServiceClient(conn), dayflyv1.NewRevocationServiceClient(conn), dayflyv1.NewGrantServiceClient(conn)
	tenThousand := make([]string, 10_000)
	for i := range tenThousand {
		tenThousand[i] = fmt.Sprintf("scope-%d", i)
	}
	many := tenThousand[:3000]
	long := make([]string, token.MaxScopes)
	for i := range long {
		long[i] = fmt.Sprintf("%0*d", token.MaxScopeBytes, i)
	}
	selectors := make([]*dayflyv1.Selector, broker.MaxSelectors+1)
	for i := range selectors {
		selectors[i] = identity(payments.String())
	}
	one := selectors[:1]
	issue := func(m *dayflyv1.IssueRequest) func(context.Context) error {
		return func(ctx context.Context) error { _, err := tokens.Issue(ctx, m); return err }
	}
	exchange := func(m *dayflyv1.ExchangeRequest) func(context.Context) error {
		return func(ctx context.Context) error { _, err := tokens.Exchange(ctx, m); return err }
	}
	revoke := func(m *dayflyv1.RevokeRequest) func(context.Context) error {
		return func(ctx context.Context) error { _, err := revocations.Revoke(ctx, m); return err }
	}
	head := w.b.Head()
	for _, tc := range []struct {
		name   string
		call   func(context.Context) error
		code   codes.Code
		reason string
		field  string
	}{
		{"issue: nothing", issue(&dayflyv1.IssueRequest{}), codes.InvalidArgument, "INVALID_REQUEST", "audience"},
		{"issue: many scopes", issue(&dayflyv1.IssueRequest{Audience: "orders", Scopes: many}), codes.InvalidArgument, "INVALID_REQUEST", "scopes"},
		{"issue: zero ttl", issue(&dayflyv1.IssueRequest{Audience: "orders", Ttl: durationpb.New(0)}), codes.InvalidArgument, "INVALID_REQUEST", "ttl"},
		{"issue: negative ttl", issue(&dayflyv1.IssueRequest{Audience: "orders", Ttl: durationpb.New(-time.Second)}), codes.InvalidArgument, "INVALID_REQUEST", "ttl"},
		{"issue: huge ttl", issue(&dayflyv1.IssueRequest{Audience: "orders", Ttl: &durationpb.Duration{Seconds: 1 << 38}}), codes.InvalidArgument, "INVALID_REQUEST", "ttl"},
		{"issue: impossible ttl", issue(&dayflyv1.IssueRequest{Audience: "orders", Ttl: &durationpb.Duration{Seconds: 1 << 62}}), codes.InvalidArgument, "INVALID_REQUEST", "ttl"},
		{"issue: unknown binding", issue(&dayflyv1.IssueRequest{Audience: "orders", Binding: 99}), codes.InvalidArgument, "INVALID_REQUEST", "binding"},
		{"exchange: nothing", exchange(&dayflyv1.ExchangeRequest{}), codes.InvalidArgument, "INVALID_REQUEST", "subject_token"},
		{"exchange: no token", exchange(&dayflyv1.ExchangeRequest{Audience: "ledger", SubjectToken: "hunter2"}), codes.InvalidArgument, "SUBJECT_TOKEN_MALFORMED", ""},
		{"revoke: nothing", revoke(&dayflyv1.RevokeRequest{}), codes.InvalidArgument, "INVALID_REQUEST", "selectors"},
		{"revoke: an empty selector", revoke(&dayflyv1.RevokeRequest{Selectors: []*dayflyv1.Selector{identity(payments.String()), {}}, Reason: "r"}), codes.InvalidArgument, "INVALID_REQUEST", "selectors[1]"},
		{"revoke: no identity", revoke(&dayflyv1.RevokeRequest{Selectors: []*dayflyv1.Selector{identity("payments")}, Reason: "r"}), codes.InvalidArgument, "INVALID_REQUEST", "selectors[0]"},
		{"revoke: a subtree without its star", revoke(&dayflyv1.RevokeRequest{Selectors: []*dayflyv1.Selector{{Selector: &dayflyv1.Selector_Subtree{Subtree: "spiffe://example.org/ns"}}}, Reason: "r"}), codes.InvalidArgument, "INVALID_REQUEST", "selectors[0]"},
		{"revoke: a short grant", revoke(&dayflyv1.RevokeRequest{Selectors: []*dayflyv1.Selector{{Selector: &dayflyv1.Selector_Grant{Grant: "x"}}}, Reason: "r"}), codes.InvalidArgument, "INVALID_REQUEST", "selectors[0]"},
		{"revoke: many", revoke(&dayflyv1.RevokeRequest{Selectors: selectors, Reason: "r"}), codes.InvalidArgument, "INVALID_REQUEST", "selectors"},
		{"revoke: no reason", revoke(&dayflyv1.RevokeRequest{Selectors: one}), codes.InvalidArgument, "REASON_REQUIRED", ""},
		{"revoke: unknown lock", revoke(&dayflyv1.RevokeRequest{Selectors: one, Reason: "r", LockMode: 99}), codes.InvalidArgument, "INVALID_REQUEST", "lock_mode"},
		{"revoke: an end that is no time", revoke(&dayflyv1.RevokeRequest{Selectors: one, Reason: "r", LockEndsAt: &timestamppb.Timestamp{Nanos: -1}}), codes.InvalidArgument, "INVALID_REQUEST", "lock_ends_at"},
		{"revoke: an end in the past", revoke(&dayflyv1.RevokeRequest{Selectors: one, Reason: "r", LockEndsAt: &timestamppb.Timestamp{Seconds: 1}}), codes.InvalidArgument, "INVALID_REQUEST", "lock_ends_at"},
		{"revoke: everything without its flag", revoke(&dayflyv1.RevokeRequest{Selectors: []*dayflyv1.Selector{{Selector: &dayflyv1.Selector_Everything_{Everything: &dayflyv1.Selector_Everything{}}}}, Reason: "r"}), codes.InvalidArgument, "EVERYTHING_NOT_ALLOWED", ""},
		{"revoke: a huge key", revoke(&dayflyv1.RevokeRequest{Selectors: one, Reason: "r", IdempotencyKey: strings.Repeat("k", 65)}), codes.InvalidArgument, "INVALID_REQUEST", "idempotency_key"},
		{"plan: nothing", func(ctx context.Context) error { _, err := revocations.Plan(ctx, &dayflyv1.PlanRequest{}); return err }, codes.InvalidArgument, "INVALID_REQUEST", "selectors"},
		{"plan: unknown lock", func(ctx context.Context) error {
			_, err := revocations.Plan(ctx, &dayflyv1.PlanRequest{Selectors: one, LockMode: 99})
			return err
		}, codes.InvalidArgument, "INVALID_REQUEST", "lock_mode"},
		{"plan: an address with a port", func(ctx context.Context) error {
			_, err := revocations.Plan(ctx, &dayflyv1.PlanRequest{Selectors: one, SeenFrom: "203.0.113.9:443"})
			return err
		}, codes.InvalidArgument, "INVALID_REQUEST", "seen_from"},
		{"lift: nothing", func(ctx context.Context) error { _, err := revocations.Lift(ctx, &dayflyv1.LiftRequest{}); return err }, codes.InvalidArgument, "REASON_REQUIRED", ""},
		{"lift: none", func(ctx context.Context) error {
			_, err := revocations.Lift(ctx, &dayflyv1.LiftRequest{Lock: 1, Reason: "r"})
			return err
		}, codes.NotFound, "LOCK_NOT_FOUND", ""},
		{"revocation: none", func(ctx context.Context) error {
			_, err := revocations.GetRevocation(ctx, &dayflyv1.GetRevocationRequest{})
			return err
		}, codes.NotFound, "REVOCATION_NOT_FOUND", ""},
		{"revocations: page size", func(ctx context.Context) error {
			_, err := revocations.ListRevocations(ctx, &dayflyv1.ListRevocationsRequest{PageSize: -1})
			return err
		}, codes.InvalidArgument, "INVALID_REQUEST", "page_size"},
		{"revocations: page token", func(ctx context.Context) error {
			_, err := revocations.ListRevocations(ctx, &dayflyv1.ListRevocationsRequest{PageToken: "!"})
			return err
		}, codes.InvalidArgument, "PAGE_TOKEN_INVALID", ""},
		{"locks: page size", func(ctx context.Context) error {
			_, err := revocations.ListLocks(ctx, &dayflyv1.ListLocksRequest{PageSize: 1 << 30})
			return err
		}, codes.InvalidArgument, "INVALID_REQUEST", "page_size"},
		{"locks: page token", func(ctx context.Context) error {
			_, err := revocations.ListLocks(ctx, &dayflyv1.ListLocksRequest{PageToken: "MA"})
			return err
		}, codes.InvalidArgument, "PAGE_TOKEN_INVALID", ""},
		{"watch: none", func(ctx context.Context) error {
			s, err := revocations.WatchContainment(ctx, &dayflyv1.WatchContainmentRequest{Sequence: 1 << 60})
			if err == nil {
				_, err = s.Recv()
			}
			return err
		}, codes.NotFound, "REVOCATION_NOT_FOUND", ""},
		{"grant: malformed", func(ctx context.Context) error {
			_, err := grants.GetGrant(ctx, &dayflyv1.GetGrantRequest{Grant: "x"})
			return err
		}, codes.InvalidArgument, "INVALID_REQUEST", "grant"},
		{"grant: none", func(ctx context.Context) error {
			_, err := grants.GetGrant(ctx, &dayflyv1.GetGrantRequest{Grant: strings.Repeat("A", 24)})
			return err
		}, codes.NotFound, "GRANT_NOT_FOUND", ""},
		{"grants: presenter", func(ctx context.Context) error {
			_, err := grants.ListGrants(ctx, &dayflyv1.ListGrantsRequest{Presenter: "payments"})
			return err
		}, codes.InvalidArgument, "INVALID_REQUEST", "presenter"},
		{"grants: derived from", func(ctx context.Context) error {
			_, err := grants.ListGrants(ctx, &dayflyv1.ListGrantsRequest{DerivedFrom: &dayflyv1.Selector{}})
			return err
		}, codes.InvalidArgument, "INVALID_REQUEST", "derived_from"},
		{"grants: page size", func(ctx context.Context) error {
			_, err := grants.ListGrants(ctx, &dayflyv1.ListGrantsRequest{PageSize: broker.MaxPageSize + 1})
			return err
		}, codes.InvalidArgument, "INVALID_REQUEST", "page_size"},
		{"grants: page token", func(ctx context.Context) error {
			_, err := grants.ListGrants(ctx, &dayflyv1.ListGrantsRequest{PageToken: "!"})
			return err
		}, codes.InvalidArgument, "PAGE_TOKEN_INVALID", ""},
		{"issue: a token that would be too large", issue(&dayflyv1.IssueRequest{Audience: "orders", Scopes: long}), codes.InvalidArgument, "TOKEN_TOO_LARGE", ""},
		{"65 KiB", issue(&dayflyv1.IssueRequest{Audience: strings.Repeat("a", 65<<10)}), codes.InvalidArgument, "REQUEST_TOO_LARGE", ""},
		// Above what is read gRPC itself answers, and has no room for a reason.
		{"5 MB", issue(&dayflyv1.IssueRequest{Audience: strings.Repeat("a", 5<<20)}), codes.ResourceExhausted, "", ""},
		{"10,000 scopes", issue(&dayflyv1.IssueRequest{Audience: "orders", Scopes: tenThousand}), codes.InvalidArgument, "REQUEST_TOO_LARGE", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			e := refused(t, tc.call(soon(t)), tc.code, tc.reason)
			if e.Metadata["field"] != tc.field {
				t.Errorf("field %q, want %q", e.Metadata["field"], tc.field)
			}
		})
	}
	if w.b.Head() != head {
		t.Error("something was recorded")
	}
	if _, err := tokens.Issue(soon(t), &dayflyv1.IssueRequest{Audience: "orders"}); err != nil {
		t.Errorf("after all that: %v", err)
	}
}

// A token names the certificate of the connection it was asked for over: in its lineage,
// and in cnf if it is bound to it.
func TestBoundToItsConnection(t *testing.T) {
	w := newWorld(t)
	svid := w.svid(payments, spiffetest.SVIDOptions{})
	got, err := dayflyv1.NewTokenServiceClient(w.dial(w.config(svid))).Issue(soon(t), &dayflyv1.IssueRequest{Audience: "orders", Binding: dayflyv1.Binding_BINDING_X5T})
	if err != nil {
		t.Fatal(err)
	}
	tok, err := token.Inspect(got.GetCredential().GetToken())
	if err != nil {
		t.Fatal(err)
	}
	leaf := svid.Certificates[0]
	if tok.Binding != token.BindingX5T || tok.Certificate != sha256.Sum256(leaf.Raw) || tok.Self().SVID != token.ThumbprintOf(leaf) {
		t.Errorf("bound by %q to %x, member %x", tok.Binding, tok.Certificate, tok.Self().SVID)
	}
}

// Policy's no reaches every call of an operator.
func TestOperatorDenied(t *testing.T) {
	w := newWorld(t)
	w.policy.mu.Lock()
	w.policy.denied[payments] = true
	w.policy.mu.Unlock()
	conn := w.as(payments)
	revocations, grants := dayflyv1.NewRevocationServiceClient(conn), dayflyv1.NewGrantServiceClient(conn)
	ctx := soon(t)
	for name, call := range map[string]func() error{
		"plan": func() error {
			_, err := revocations.Plan(ctx, &dayflyv1.PlanRequest{Selectors: []*dayflyv1.Selector{identity(payments.String())}})
			return err
		},
		"revoke": func() error {
			_, err := revocations.Revoke(ctx, &dayflyv1.RevokeRequest{Selectors: []*dayflyv1.Selector{identity(payments.String())}, Reason: "r"})
			return err
		},
		"lift": func() error { _, err := revocations.Lift(ctx, &dayflyv1.LiftRequest{Lock: 1, Reason: "r"}); return err },
		"revocations": func() error {
			_, err := revocations.ListRevocations(ctx, &dayflyv1.ListRevocationsRequest{})
			return err
		},
		"a revocation":  func() error { _, err := revocations.GetRevocation(ctx, &dayflyv1.GetRevocationRequest{}); return err },
		"locks":         func() error { _, err := revocations.ListLocks(ctx, &dayflyv1.ListLocksRequest{}); return err },
		"grants":        func() error { _, err := grants.ListGrants(ctx, &dayflyv1.ListGrantsRequest{}); return err },
		"an absent one": func() error { _, err := grants.GetGrant(ctx, &dayflyv1.GetGrantRequest{Grant: "x"}); return err },
		"watch": func() error {
			s, err := revocations.WatchContainment(ctx, &dayflyv1.WatchContainmentRequest{})
			if err == nil {
				_, err = s.Recv()
			}
			return err
		},
	} {
		t.Run(name, func(t *testing.T) { refused(t, call(), codes.PermissionDenied, "POLICY_DENIED") })
	}
}

// Revoke, find it in the lists, lift, and what the grant's record says meanwhile.
func TestRevokeAndLift(t *testing.T) {
	w := newWorld(t)
	conn := w.as(payments)
	got, err := issue(t, conn)
	if err != nil {
		t.Fatal(err)
	}
	c := got.GetCredential()
	if c.GetToken() == "" || c.GetAudience() != "orders" || len(c.GetScopes()) != 1 || c.GetBinding() != dayflyv1.Binding_BINDING_SPIFFE || !c.GetExpiresAt().AsTime().After(c.GetIssuedAt().AsTime()) {
		t.Errorf("credential without its token: audience %q, scopes %q", c.GetAudience(), c.GetScopes())
	}
	revocations, grants := dayflyv1.NewRevocationServiceClient(conn), dayflyv1.NewGrantServiceClient(conn)
	ctx := soon(t)
	ask := &dayflyv1.RevokeRequest{Selectors: []*dayflyv1.Selector{identity(payments.String())}, Reason: "leak", IdempotencyKey: "k"}
	r, err := revocations.Revoke(ctx, ask)
	if err != nil {
		t.Fatal(err)
	}
	number := r.GetRevocation().GetPosition().GetSequence()
	if r.GetRevocation().GetLockMode() != dayflyv1.LockMode_LOCK_MODE_QUARANTINE || r.GetRevocation().GetReason() != "leak" || r.GetRevocation().GetActor() != payments.String() || r.GetRevocation().GetLockEndsAt() != nil || !r.GetContainment().GetContained() {
		t.Errorf("got %v", r)
	}
	if again, err := revocations.Revoke(ctx, ask); err != nil || again.GetRevocation().GetPosition().GetSequence() != number {
		t.Errorf("the retry: %v, %v", again, err)
	}
	_, err = issue(t, conn)
	if e := refused(t, err, codes.PermissionDenied, "IDENTITY_LOCKED"); e.Metadata["lock"] != fmt.Sprint(number) {
		t.Errorf("metadata %v", e.Metadata)
	}
	g, err := grants.GetGrant(ctx, &dayflyv1.GetGrantRequest{Grant: c.GetGrant()})
	if err != nil || g.GetGrant().GetState() != dayflyv1.GrantState_GRANT_STATE_REVOKED || g.GetGrant().GetRevokedBy() != number || g.GetGrant().GetPeerAddress() != "127.0.0.1" {
		t.Errorf("grant %v, %v", g, err)
	}
	if locks, err := revocations.ListLocks(ctx, &dayflyv1.ListLocksRequest{}); err != nil || len(locks.GetLocks()) != 1 || locks.GetLocks()[0].GetNumber() != number {
		t.Errorf("locks %v, %v", locks, err)
	}
	lift, err := revocations.Lift(ctx, &dayflyv1.LiftRequest{Lock: number, Reason: "over"})
	if err != nil || !lift.GetLifted() || lift.GetLift().GetLock() != number {
		t.Fatalf("lift %v, %v", lift, err)
	}
	if _, err := issue(t, conn); err != nil {
		t.Errorf("after the lift: %v", err)
	}
	page, err := revocations.ListRevocations(ctx, &dayflyv1.ListRevocationsRequest{PageSize: 1})
	if err != nil || len(page.GetRevocations()) != 1 || page.GetRevocations()[0].GetLift().GetReason() != "over" || page.GetNextPageToken() != "" {
		t.Errorf("revocations %v, %v", page, err)
	}

	// What its holder gives back is shown to who asks for it, and marked.
	held, err := issue(t, conn)
	if err != nil {
		t.Fatal(err)
	}
	holder := broker.Caller{ID: payments, Leaf: w.svid(payments, spiffetest.SVIDOptions{}).Certificates[0]}
	if err := w.b.GiveBack(ctx, holder, token.NewSecret(held.GetCredential().GetToken())); err != nil {
		t.Fatal(err)
	}
	if page, err = revocations.ListRevocations(ctx, &dayflyv1.ListRevocationsRequest{}); err != nil || len(page.GetRevocations()) != 1 {
		t.Errorf("revocations %v, %v", page, err)
	}
	page, err = revocations.ListRevocations(ctx, &dayflyv1.ListRevocationsRequest{GivenBack: true})
	if err != nil || len(page.GetRevocations()) != 2 || !page.GetRevocations()[0].GetGivenBack() || page.GetRevocations()[1].GetGivenBack() {
		t.Errorf("with give-backs: %v, %v", page, err)
	}
}

func everything(reason string) *dayflyv1.RevokeRequest {
	return &dayflyv1.RevokeRequest{
		Selectors: []*dayflyv1.Selector{{Selector: &dayflyv1.Selector_Everything_{Everything: &dayflyv1.Selector_Everything{}}}},
		Reason:    reason, AllowEverything: true,
	}
}

// What two persons see on the wire.
func TestSecondPersonOnTheWire(t *testing.T) {
	w := newWorld(t)
	ctx := soon(t)
	bob := spiffeid.RequireFromString("spiffe://example.org/ops/bob")
	first, second := dayflyv1.NewRevocationServiceClient(w.as(payments)), dayflyv1.NewRevocationServiceClient(w.as(bob))
	head := w.b.Head()
	r, err := first.Revoke(ctx, everything("r"))
	if err != nil || r.GetRevocation() != nil || r.GetContainment() != nil {
		t.Fatalf("proposed: %v, %v", r, err)
	}
	p := r.GetProposal()
	if p.GetActor() != payments.String() || p.GetReason() != "r" || p.GetExpiresAt().AsTime().Sub(p.GetTime().AsTime()) != 15*time.Minute || w.b.Head() != head {
		t.Errorf("proposal %v", p)
	}
	_, err = dayflyv1.NewRevocationServiceClient(w.as(payments)).Revoke(ctx, everything("r")) // with an SVID of its own
	if e := refused(t, err, codes.FailedPrecondition, "SECOND_PERSON_REQUIRED"); e.Metadata["expires_at"] == "" {
		t.Errorf("metadata %v", e.Metadata)
	}
	if r, err = second.Revoke(ctx, everything("confirmed")); err != nil || r.GetProposal() != nil {
		t.Fatalf("confirmed: %v, %v", r, err)
	}
	if v := r.GetRevocation(); v.GetActor() != bob.String() || v.GetProposal().GetActor() != payments.String() {
		t.Errorf("recorded %v", v)
	}

	w.policy.mu.Lock()
	w.policy.twoPersons = true
	w.policy.mu.Unlock()
	if r, err = first.Revoke(ctx, &dayflyv1.RevokeRequest{Selectors: []*dayflyv1.Selector{identity("spiffe://example.org/x")}, Reason: "r"}); err != nil {
		t.Fatal(err)
	}
	lock := &dayflyv1.LiftRequest{Lock: r.GetRevocation().GetPosition().GetSequence(), Reason: "over"}
	lift, err := first.Lift(ctx, lock)
	if err != nil || lift.GetLifted() || lift.GetLift().GetSequence() != 0 || lift.GetLift().GetActor() != payments.String() || len(lift.GetLift().GetProposal().GetConfirmers()) != 1 {
		t.Errorf("proposed: %v, %v", lift, err)
	}
	locks, err := second.ListLocks(ctx, &dayflyv1.ListLocksRequest{})
	if err != nil || len(locks.GetLocks()) != 1 || locks.GetLocks()[0].GetProposedLift().GetProposal().GetActor() != payments.String() {
		t.Errorf("locks %v, %v", locks, err)
	}
	lift, err = second.Lift(ctx, lock)
	if err != nil || !lift.GetLifted() || lift.GetLift().GetActor() != bob.String() || lift.GetLift().GetProposal().GetActor() != payments.String() {
		t.Errorf("confirmed: %v, %v", lift, err)
	}
}

// The break-glass socket: its user is known to the kernel, may revoke and lift, and
// gets no credentials.
func TestBreakGlass(t *testing.T) {
	w := newWorld(t)
	dir, err := os.MkdirTemp("", "df")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "bg.sock")
	listener, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	glass, err := rpc.NewBreakGlass(rpc.Config{Broker: w.b})
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- glass.Serve(listener) }()
	defer func() { glass.Stop(); <-served }()
	w.policy.mu.Lock()
	w.policy.denied[payments] = true // policy is of no account here
	w.policy.mu.Unlock()
	conn, err := grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	revocations := dayflyv1.NewRevocationServiceClient(conn)
	r, err := revocations.Revoke(soon(t), &dayflyv1.RevokeRequest{Selectors: []*dayflyv1.Selector{identity(payments.String())}, Reason: "all is broken"})
	if err != nil {
		t.Fatal(err)
	}
	if want := fmt.Sprintf("break-glass:uid=%d", os.Geteuid()); r.GetRevocation().GetActor() != want {
		t.Errorf("recorded as %q, want %q", r.GetRevocation().GetActor(), want)
	}
	if _, err := revocations.ListRevocations(soon(t), &dayflyv1.ListRevocationsRequest{}); err != nil {
		t.Error(err)
	}
	all, err := revocations.Revoke(soon(t), everything("all is theirs"))
	if err != nil || all.GetProposal() != nil || all.GetRevocation().GetProposal() != nil || all.GetRevocation().GetPosition().GetSequence() == 0 {
		t.Errorf("everything: %v, %v", all, err)
	}
	if _, err := revocations.Lift(soon(t), &dayflyv1.LiftRequest{Lock: r.GetRevocation().GetPosition().GetSequence(), Reason: "r"}); err != nil {
		t.Error(err)
	}
	_, err = issue(t, conn)
	refused(t, err, codes.Unimplemented, "")
	_, err = dayflyv1.NewTokenServiceClient(conn).Exchange(soon(t), &dayflyv1.ExchangeRequest{})
	refused(t, err, codes.Unimplemented, "")
	_, err = dayflyv1.NewGrantServiceClient(conn).ListGrants(soon(t), &dayflyv1.ListGrantsRequest{})
	refused(t, err, codes.Unimplemented, "")
	if s, err := dayflyv1.NewFeedServiceClient(conn).Follow(soon(t)); err == nil {
		_, err = s.Recv()
		refused(t, err, codes.Unimplemented, "")
	}
}
