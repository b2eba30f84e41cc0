package rpc_test

import (
	"context"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/proto/wire"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"
)

type stream = grpc.BidiStreamingClient[dayflyv1.FollowRequest, dayflyv1.FollowResponse]

func subscription() *dayflyv1.Subscribe {
	return &dayflyv1.Subscribe{
		Instance: "instance-0001", Audiences: []string{"orders"}, MaxStaleness: durationpb.New(2 * time.Second),
		OnStale: dayflyv1.OnStale_ON_STALE_REFUSE,
	}
}

func subscribe(s *dayflyv1.Subscribe) *dayflyv1.FollowRequest {
	return &dayflyv1.FollowRequest{Message: &dayflyv1.FollowRequest_Subscribe{Subscribe: s}}
}

func ping(nonce string) *dayflyv1.FollowRequest {
	return &dayflyv1.FollowRequest{Message: &dayflyv1.FollowRequest_Ping{Ping: &dayflyv1.Ping{Nonce: []byte(nonce)}}}
}

func acknowledge(p *dayflyv1.Position) *dayflyv1.FollowRequest {
	return &dayflyv1.FollowRequest{Message: &dayflyv1.FollowRequest_Acknowledge{Acknowledge: &dayflyv1.Acknowledge{Position: p}}}
}

func (w *world) open(conn *grpc.ClientConn) stream {
	w.t.Helper()
	ctx, cancel := context.WithCancel(soon(w.t))
	w.t.Cleanup(cancel)
	s, err := dayflyv1.NewFeedServiceClient(conn).Follow(ctx)
	if err != nil {
		w.t.Fatal(err)
	}
	return s
}

// follow subscribes and returns the stream after its Welcome and the whole snapshot.
func (w *world) follow(conn *grpc.ClientConn, sub *dayflyv1.Subscribe) stream {
	w.t.Helper()
	s := w.open(conn)
	if err := s.Send(subscribe(sub)); err != nil {
		w.t.Fatal(err)
	}
	welcome, err := s.Recv()
	if err != nil {
		w.t.Fatal(err)
	}
	if got := welcome.GetWelcome(); got.GetIssuer() != issuer || got.GetMaxStaleness().AsDuration() != sub.GetMaxStaleness().AsDuration() || got.GetMaxTokenTtl().AsDuration() != time.Hour {
		w.t.Fatalf("welcome %v", welcome)
	}
	for {
		m, err := s.Recv()
		if err != nil {
			w.t.Fatal(err)
		}
		if m.GetSnapshot() == nil || m.GetSnapshot().GetComplete() {
			return s
		}
	}
}

// end reads until the stream's error.
func end(t *testing.T, s stream) error {
	t.Helper()
	for {
		if _, err := s.Recv(); err != nil {
			return err
		}
	}
}

func TestFollow(t *testing.T) {
	w := newWorld(t)
	s := w.follow(w.as(payments), subscription())
	if err := s.Send(ping("nonce-01")); err != nil {
		t.Fatal(err)
	}
	m, err := s.Recv()
	if err != nil {
		t.Fatal(err)
	}
	pong, err := wire.ToPong(m.GetPong())
	if err != nil || pong.Nonce != "nonce-01" || pong.Head != w.b.Head() {
		t.Fatalf("pong %+v, %v", pong, err)
	}
	operator := dayflyv1.NewRevocationServiceClient(w.as(payments))
	r, err := operator.Revoke(soon(t), &dayflyv1.RevokeRequest{Selectors: []*dayflyv1.Selector{{Selector: &dayflyv1.Selector_Identity{Identity: "spiffe://example.org/x"}}}, Reason: "secret reason"})
	if err != nil {
		t.Fatal(err)
	}
	if r.GetContainment().GetContained() || r.GetContainment().GetPending() != 1 {
		t.Errorf("containment %v", r.GetContainment())
	}
	m, err = s.Recv()
	if err != nil {
		t.Fatal(err)
	}
	d, err := wire.ToDelivery(m)
	if err != nil || len(d.Events) != 1 || d.Events[0].Revocation == nil || strings.Contains(m.String(), "secret reason") {
		t.Fatalf("got %v, %v", m, err)
	}
	watch, err := operator.WatchContainment(soon(t), &dayflyv1.WatchContainmentRequest{Sequence: r.GetRevocation().GetPosition().GetSequence()})
	if err != nil {
		t.Fatal(err)
	}
	if c, err := watch.Recv(); err != nil || c.GetContainment().GetContained() {
		t.Fatalf("watched %v, %v", c, err)
	}
	if err := s.Send(acknowledge(r.GetRevocation().GetPosition())); err != nil {
		t.Fatal(err)
	}
	if c, err := watch.Recv(); err != nil || !c.GetContainment().GetContained() || c.GetContainment().GetConfirmed() != 1 {
		t.Fatalf("after the receipt: %v, %v", c, err)
	}
}

func TestFeedMisuse(t *testing.T) {
	w := newWorld(t)
	conn := w.as(payments)
	first := func(change func(*dayflyv1.Subscribe)) *dayflyv1.FollowRequest {
		s := subscription()
		change(s)
		return subscribe(s)
	}
	for name, m := range map[string]*dayflyv1.FollowRequest{
		"a ping":             ping("12345678"),
		"a receipt":          acknowledge(wire.Position(w.b.Head())),
		"an empty message":   {},
		"an empty Subscribe": subscribe(&dayflyv1.Subscribe{}),
		"no bound":           first(func(s *dayflyv1.Subscribe) { s.MaxStaleness = nil }),
		"a negative bound":   first(func(s *dayflyv1.Subscribe) { s.MaxStaleness = durationpb.New(-1) }),
		"a small bound":      first(func(s *dayflyv1.Subscribe) { s.MaxStaleness = durationpb.New(time.Millisecond) }),
		"a large bound":      first(func(s *dayflyv1.Subscribe) { s.MaxStaleness = durationpb.New(2 * time.Hour) }),
		"a bound of no time": first(func(s *dayflyv1.Subscribe) { s.MaxStaleness = &durationpb.Duration{Seconds: 1, Nanos: -1} }),
		"a short instance":   first(func(s *dayflyv1.Subscribe) { s.Instance = "1" }),
		"no audience":        first(func(s *dayflyv1.Subscribe) { s.Audiences = nil }),
		"an unknown policy":  first(func(s *dayflyv1.Subscribe) { s.OnStale = 77 }),
		"a bad position":     first(func(s *dayflyv1.Subscribe) { s.Position = &dayflyv1.Position{Era: "x", Sequence: 1} }),
	} {
		t.Run("first: "+name, func(t *testing.T) {
			s := w.open(conn)
			if err := s.Send(m); err != nil {
				t.Fatal(err)
			}
			refused(t, end(t, s), codes.InvalidArgument, "FEED_MESSAGE_INVALID")
		})
	}
	unseen := w.b.Head()
	unseen.Seq += 5
	wrong := w.b.Head()
	wrong.Sum[0] ^= 1
	report := func(uses ...*dayflyv1.Use) *dayflyv1.FollowRequest {
		return &dayflyv1.FollowRequest{Message: &dayflyv1.FollowRequest_UseReport{UseReport: &dayflyv1.UseReport{Uses: uses}}}
	}
	for name, m := range map[string]*dayflyv1.FollowRequest{
		"a second Subscribe":         subscribe(subscription()),
		"an empty message":           {},
		"a short nonce":              ping("1"),
		"a long nonce":               ping(strings.Repeat("n", 33)),
		"a receipt of an unseen one": acknowledge(wire.Position(unseen)),
		"a receipt of a wrong sum":   acknowledge(wire.Position(wrong)),
		"a receipt without position": acknowledge(&dayflyv1.Position{Era: "zz"}),
		"too many uses":              report(slices.Repeat([]*dayflyv1.Use{use()}, wire.MaxUses+1)...),
		"a use at no time":           report(use(), &dayflyv1.Use{Grant: use().GetGrant(), Accepted: true, Count: 1}),
		"a relay report of no relay": {Message: &dayflyv1.FollowRequest_RelayReport{RelayReport: &dayflyv1.RelayReport{}}},
	} {
		t.Run("then: "+name, func(t *testing.T) {
			s := w.follow(conn, subscription())
			if err := s.Send(m); err != nil {
				t.Fatal(err)
			}
			refused(t, end(t, s), codes.InvalidArgument, "FEED_MESSAGE_INVALID")
		})
	}
	large := func(n int) *dayflyv1.FollowRequest {
		return report(&dayflyv1.Use{PeerIdentity: strings.Repeat("a", n)})
	}
	t.Run("too large a message", func(t *testing.T) {
		s := w.follow(conn, subscription())
		if err := s.Send(large(65 << 10)); err != nil {
			t.Fatal(err)
		}
		refused(t, end(t, s), codes.InvalidArgument, "REQUEST_TOO_LARGE")
	})
	t.Run("far too large a message", func(t *testing.T) {
		s := w.follow(conn, subscription())
		if err := s.Send(large(5 << 20)); err != nil && err != io.EOF { // it may end while we send
			t.Fatal(err)
		}
		refused(t, end(t, s), codes.ResourceExhausted, "")
	})
	w.follow(conn, subscription()) // and the next is served
}

func use() *dayflyv1.Use {
	seen := timestamppb.New(time.Unix(1_700_000_000, 0))
	return &dayflyv1.Use{Grant: strings.Repeat("A", 24), Accepted: true, Count: 1, FirstSeen: seen, LastSeen: seen}
}

// What a verifier reports is in the plan before a revocation, and in its status after;
// who watches is told.
func TestUses(t *testing.T) {
	w := newWorld(t)
	conn := w.as(payments)
	s := w.follow(conn, subscription())
	operator := dayflyv1.NewRevocationServiceClient(conn)
	cred, err := issue(t, conn)
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := token.Inspect(cred.GetCredential().GetToken())
	if err != nil {
		t.Fatal(err)
	}
	number := uint64(0)
	report := func(u *dayflyv1.Use) {
		t.Helper()
		number++
		if err := s.Send(&dayflyv1.FollowRequest{Message: &dayflyv1.FollowRequest_UseReport{UseReport: &dayflyv1.UseReport{Number: number, Uses: []*dayflyv1.Use{u}}}}); err != nil {
			t.Fatal(err)
		}
		if err := s.Send(ping("12345678")); err != nil {
			t.Fatal(err)
		}
		for { // the pong says that it has arrived
			m, err := s.Recv()
			if err != nil {
				t.Fatal(err)
			}
			if m.GetPong() != nil {
				break
			}
		}
		if err := w.b.CheckUses(soon(t)); err != nil {
			t.Fatal(err)
		}
	}
	u := use()
	u.Grant, u.Fingerprint, u.Count = cred.GetCredential().GetGrant(), parsed.Fingerprint[:], 3
	u.PeerIdentity, u.PeerAddress, u.Era, u.Head, u.KeyId = payments.String(), "192.0.2.7", w.b.Head().Era.String(), w.b.Head().Seq, parsed.Self().Key.String()
	u.FirstSeen, u.LastSeen = timestamppb.New(w.clock.Now()), timestamppb.New(w.clock.Now())
	report(u)
	selectors := []*dayflyv1.Selector{{Selector: &dayflyv1.Selector_Subtree{Subtree: "spiffe://example.org/ns/*"}}, identity(payments.String())}
	plan, err := operator.Plan(soon(t), &dayflyv1.PlanRequest{Selectors: selectors, SeenFrom: "127.0.0.1"})
	if err != nil {
		t.Fatal(err)
	}
	if f := plan.GetWorkflows(); len(f) != 1 || f[0].GetCaller() != payments.String() || f[0].GetCallee() != "orders" || f[0].GetVerifier() != payments.String() ||
		f[0].GetCount() != 3 || f[0].GetLastSeen() == nil || f[0].GetFallback().GetText() != "they queue up" {
		t.Errorf("workflows %v", f)
	}
	if n := plan.GetNarrower(); len(n) != 2 || n[0].GetSelectors()[0].GetSvid() != parsed.Self().SVID.String() || n[1].GetSelectors()[0].GetGrant() != u.GetGrant() || n[0].GetWhy() == "" {
		t.Errorf("narrower %v", n)
	}

	r, err := operator.Revoke(soon(t), &dayflyv1.RevokeRequest{Selectors: selectors, Reason: "r"})
	if err != nil {
		t.Fatal(err)
	}
	seq := r.GetRevocation().GetPosition().GetSequence()
	watch, err := operator.WatchContainment(soon(t), &dayflyv1.WatchContainmentRequest{Sequence: seq})
	if err != nil {
		t.Fatal(err)
	}
	if m, err := watch.Recv(); err != nil || len(m.GetContainment().GetUsesAfter()) != 0 {
		t.Fatalf("watched %v, %v", m, err)
	}
	u.Accepted, u.RefusalReason, u.Head = false, "TOKEN_REVOKED", seq
	report(u)
	m, err := watch.Recv()
	if err != nil {
		t.Fatal(err)
	}
	got, err := operator.GetRevocation(soon(t), &dayflyv1.GetRevocationRequest{Sequence: seq})
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]*dayflyv1.Containment{"watched": m.GetContainment(), "got": got.GetContainment()} {
		if a := c.GetUsesAfter(); len(a) != 1 || a[0].GetVerifier() != payments.String() || a[0].GetRefused() != 3 || a[0].GetAcceptedKnowing()+a[0].GetAcceptedUnaware() != 0 ||
			!slices.Equal(a[0].GetPeers(), []string{payments.String()}) || !slices.Equal(a[0].GetAddresses(), []string{"192.0.2.7"}) || !a[0].GetLastSeen().AsTime().Equal(u.GetLastSeen().AsTime().Truncate(time.Millisecond)) {
			t.Errorf("%s: uses after %v", name, a)
		}
	}
}

// The largest reports that an honest verifier makes are taken: one that is refused would
// come again and again, and its stream end each time.
func TestLargestReports(t *testing.T) {
	w := newWorld(t)
	s := w.follow(w.as(payments), subscription())
	var outbox wire.Outbox
	for _, peer := range []int{0, 20, 60, 200, 2000} {
		u := use()
		u.Accepted, u.RefusalReason, u.PeerAddress = false, "CERTIFICATE_MISMATCH", "2001:db8:1111:2222:3333:4444:5555:6666"
		u.Head, u.Count, u.Era, u.KeyId, u.Fingerprint = 1<<62, 1<<40, "ffffffff", "AAAAAAAA", make([]byte, 32)
		u.LastSeen = &timestamppb.Timestamp{Seconds: 1_700_000_000, Nanos: 999_999_999}
		if peer > 0 {
			u.PeerIdentity = "spiffe://example.org/" + strings.Repeat("p", peer)
		}
		outbox.Put(slices.Repeat([]*dayflyv1.Use{u}, 2*wire.MaxUses), 1)
		bare := use() // many of them
		bare.Head = 1 << 62
		outbox.Put(slices.Repeat([]*dayflyv1.Use{bare}, 2*wire.MaxUses), 1)
	}
	sent := 0
	for m := outbox.Next(); m != nil; m = outbox.Next() {
		sent++
		if err := s.Send(&dayflyv1.FollowRequest{Message: &dayflyv1.FollowRequest_UseReport{UseReport: m}}); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Send(ping("12345678")); err != nil {
		t.Fatal(err)
	}
	for {
		m, err := s.Recv()
		if err != nil {
			t.Fatalf("after %d reports: %v", sent, err)
		}
		if m.GetPong() != nil {
			break
		}
	}
	if c := w.b.UseCounts(); c.Dropped+c.Limited < 10 || c.Uses == 0 {
		t.Errorf("%d reports: counts %+v", sent, c)
	}
}

// Shutdown ends streams with a reason, also those that never subscribed, finishes at
// once, and may be called again.
func TestShutdown(t *testing.T) {
	w := newWorld(t)
	conn := w.as(payments)
	idle := w.open(conn)
	if err := idle.Send(subscribe(subscription())); err != nil { // so that it is there for sure
		t.Fatal(err)
	}
	if _, err := idle.Recv(); err != nil {
		t.Fatal(err)
	}
	following, silent := w.follow(conn, subscription()), w.open(conn)
	if _, err := issue(t, conn); err != nil { // the silent one's headers are before this call on the connection
		t.Fatal(err)
	}
	grace, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	w.srv.Shutdown(grace)
	w.srv.Shutdown(grace)
	if grace.Err() != nil {
		t.Error("the shutdown waited for its deadline")
	}
	refused(t, end(t, following), codes.Unavailable, "STORE_UNAVAILABLE")
	refused(t, end(t, idle), codes.Unavailable, "STORE_UNAVAILABLE")
	if err := end(t, silent); status.Code(err) != codes.Unavailable {
		t.Errorf("a stream without a Subscribe ends with %v", err)
	}
	if _, err := issue(t, conn); status.Code(err) != codes.Unavailable {
		t.Errorf("after it: %v", err)
	}
}

// A relay hears of whom policy refuses before the answer to its next ping, and goes on.
func TestRelayRefusal(t *testing.T) {
	w := newWorld(t)
	w.policy.mu.Lock()
	w.policy.noLedger = true
	w.policy.mu.Unlock()
	sub := subscription()
	sub.Relay, sub.Audiences = true, nil
	s := w.follow(w.as(payments), sub)
	verifier := func(instance, audience string) *dayflyv1.RelayedVerifier {
		return &dayflyv1.RelayedVerifier{
			Path: []string{instance}, Audiences: []string{audience}, MaxStaleness: durationpb.New(time.Second),
			OnStale: dayflyv1.OnStale_ON_STALE_REFUSE,
		}
	}
	for _, m := range []*dayflyv1.FollowRequest{
		{Message: &dayflyv1.FollowRequest_RelayReport{RelayReport: &dayflyv1.RelayReport{Verifiers: []*dayflyv1.RelayedVerifier{
			verifier("instance-0002", "orders"), verifier("instance-0003", "ledger"),
		}}}},
		ping("nonce-01"),
	} {
		if err := s.Send(m); err != nil {
			t.Fatal(err)
		}
	}
	m, err := s.Recv()
	if err != nil {
		t.Fatal(err)
	}
	got := m.GetRelayRefusal()
	if got == nil || got.GetPath()[0] != "instance-0003" || codes.Code(got.GetCode()) != codes.PermissionDenied ||
		got.GetReason() != "POLICY_DENIED" || got.GetMessage() == "" || got.GetMetadata()["hint"] == "" {
		t.Fatalf("got %v, want the refusal", m)
	}
	if m, err := s.Recv(); err != nil || m.GetPong() == nil {
		t.Fatalf("got %v, %v, want the pong", m, err)
	}
}
