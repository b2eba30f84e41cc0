package agent_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/agent"
	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/proto/wire"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// verifier follows through the agent with the same state machines that sdk/verify has.
type verifier struct {
	f      *fixture
	stream grpc.BidiStreamingClient[dayflyv1.FollowRequest, dayflyv1.FollowResponse]
	sub    wire.Subscription
	view   feed.View
	fresh  feed.Freshness
	n      int
	cancel context.CancelFunc
}

func (f *fixture) follow(change func(*wire.Subscription)) *verifier {
	f.Helper()
	ctx, cancel := context.WithCancel(f.Context())
	f.Cleanup(cancel)
	stream, err := dayflyv1.NewFeedServiceClient(f.conn()).Follow(ctx, grpc.WaitForReady(true))
	if err != nil {
		f.Fatal(err)
	}
	v := &verifier{f: f, stream: stream, cancel: cancel, sub: wire.Subscription{
		Instance: "verifier-1", Audiences: []string{"orders"}, Bound: 2 * time.Second,
	}}
	if change != nil {
		change(&v.sub)
	}
	// A stream that was refused has ended by now: what is received says why.
	_ = stream.Send(&dayflyv1.FollowRequest{Message: &dayflyv1.FollowRequest_Subscribe{Subscribe: wire.Subscribe(v.sub)}})
	return v
}

func boot() feed.Instant { return feed.Instant(time.Since(began)) }

var began = time.Now()

func (v *verifier) send(m *dayflyv1.FollowRequest) {
	v.f.Helper()
	if err := v.stream.Send(m); err != nil {
		v.f.Fatal(err)
	}
}

func (v *verifier) recv() *dayflyv1.FollowResponse {
	v.f.Helper()
	m, err := v.stream.Recv()
	if err != nil {
		v.f.Fatalf("the verifier's stream: %v", err)
	}
	return m
}

func (v *verifier) welcome() *dayflyv1.Welcome {
	v.f.Helper()
	m := v.recv().GetWelcome()
	if m == nil {
		v.f.Fatal("the first message is no Welcome")
	}
	return m
}

func (v *verifier) ping() string {
	v.f.Helper()
	v.n++
	nonce := fmt.Sprintf("nonce-%06d", v.n)
	v.fresh.Sent(nonce, boot())
	v.send(&dayflyv1.FollowRequest{Message: &dayflyv1.FollowRequest_Ping{Ping: &dayflyv1.Ping{Nonce: []byte(nonce)}}})
	return nonce
}

func (v *verifier) ack() {
	v.f.Helper()
	v.send(&dayflyv1.FollowRequest{Message: &dayflyv1.FollowRequest_Acknowledge{Acknowledge: &dayflyv1.Acknowledge{Position: wire.Position(v.view.Position())}}})
}

// pong receives until the next answer, applying what comes before it.
func (v *verifier) pong() wire.Pong {
	v.f.Helper()
	for {
		m := v.recv()
		if m.GetPong() == nil {
			v.apply(m)
			continue
		}
		p, err := wire.ToPong(m.GetPong())
		if err != nil {
			v.f.Fatal(err)
		}
		if _, err := v.fresh.Answered(p.Nonce, p.Head, p.Age, v.view.Position()); err != nil {
			v.f.Fatal(err)
		}
		return p
	}
}

func (v *verifier) apply(m *dayflyv1.FollowResponse) {
	v.f.Helper()
	d, err := wire.ToDelivery(m)
	if err != nil {
		v.f.Fatal(err)
	}
	if err := v.view.Apply(d, boot()); err != nil {
		v.f.Fatal(err)
	}
	v.fresh.Applied(v.view.Position())
}

// reach applies until the view is at a position.
func (v *verifier) reach(p feed.Position) {
	v.f.Helper()
	for v.view.Position().Compare(p) < 0 {
		v.apply(v.recv())
	}
}

func relayed(m *dayflyv1.FollowRequest, path string) *dayflyv1.RelayedVerifier {
	for _, r := range m.GetRelayReport().GetVerifiers() {
		if strings.Join(r.GetPath(), "/") == path {
			return r
		}
	}
	return nil
}

// A verifier beside the agent gets everything, is fresh, and its receipts reach the
// broker as its own.
func TestRelay(t *testing.T) {
	noLeaks(t)
	td := newDomain(t)
	b := newBroker(t, td)
	f := start(t, td, b, nil)
	v := f.follow(nil)
	if w := v.welcome(); w.GetMaxStaleness().AsDuration() != 2*time.Second || w.GetIssuer() != "https://broker.test" || w.GetMaxTokenTtl().AsDuration() != time.Hour {
		t.Errorf("welcome: %v", w)
	}
	v.ping()
	v.pong()
	if !v.fresh.Fresh(boot(), patience) || v.view.Position() != b.head() {
		t.Fatalf("not fresh at the head: %v", v.view.Position())
	}
	if _, ok := v.view.Key(b.pub.ID); !ok {
		t.Error("the signing key did not come through")
	}
	at := b.revoke(revocation.Identity(payments))
	v.reach(at)
	v.ack()
	m := b.sent("the verifier's receipt", func(m *dayflyv1.FollowRequest) bool {
		r := relayed(m, "verifier-1")
		return r != nil && r.GetAcknowledged().GetSequence() == at.Seq
	})
	r := relayed(m, "verifier-1")
	if r.GetMaxStaleness().AsDuration() != 2*time.Second || r.GetAudiences()[0] != "orders" || r.GetOnStale() != dayflyv1.OnStale_ON_STALE_REFUSE || r.GetGone() {
		t.Errorf("report: %v", r)
	}
	// A late one gets a snapshot, and a known one only what it lacks.
	late := f.follow(func(s *wire.Subscription) { s.Instance = "verifier-2" })
	late.welcome()
	late.reach(at)
	known := f.follow(func(s *wire.Subscription) { s.Instance, s.Position = "verifier-3", at })
	known.welcome()
	if m := known.recv(); m.GetEvents() == nil || len(m.GetEvents().GetEvents()) != 0 {
		t.Errorf("for one that knows all: %v", m)
	}
	v.cancel()
	b.sent("that the verifier is gone", func(m *dayflyv1.FollowRequest) bool { return relayed(m, "verifier-1").GetGone() })
}

func (b *broker) head() feed.Position {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.log.Head()
}

// The age of the broker's own answer and of the agent's knowledge are added up.
func TestRelayAddsAge(t *testing.T) {
	noLeaks(t)
	td := newDomain(t)
	b := newBroker(t, td)
	b.set(func(b *broker) { b.age = 700 * time.Millisecond })
	f := start(t, td, b, nil)
	v := f.follow(nil)
	v.welcome()
	v.ping()
	if p := v.pong(); p.Age < 700*time.Millisecond {
		t.Errorf("age %v, though the broker's own knowledge was 700ms old", p.Age)
	}
}

// Cut off from the broker, the agent's answers grow older and the verifier closes.
func TestRelayCutOff(t *testing.T) {
	noLeaks(t)
	td := newDomain(t)
	b := newBroker(t, td)
	f := start(t, td, b, nil)
	v := f.follow(func(s *wire.Subscription) { s.Bound = 600 * time.Millisecond })
	v.welcome()
	v.ping()
	v.pong()
	b.stop()
	cut := boot()
	var last time.Duration
	eventually(t, "the verifier to close", func() error {
		v.ping()
		p := v.pong()
		if p.Age < last {
			return fmt.Errorf("the age fell from %v to %v", last, p.Age)
		}
		last = p.Age
		if asOf, _ := v.fresh.AsOf(); asOf > cut {
			t.Fatalf("fresh as of %v after the cut", asOf.Sub(cut))
		}
		if v.fresh.Fresh(boot(), v.sub.Bound) {
			return errors.New("still fresh")
		}
		return nil
	})
	b.restart()
	eventually(t, "the verifier to open", func() error {
		v.ping()
		v.pong()
		if !v.fresh.Fresh(boot(), v.sub.Bound) {
			return errors.New("still stale")
		}
		return nil
	})
}

// Before a verifier is answered, the broker has been told of it, and has answered a ping
// that came after the report: else 'contained' could be said without it.
func TestReportedBeforeAnswered(t *testing.T) {
	noLeaks(t)
	td := newDomain(t)
	b := newBroker(t, td)
	f := start(t, td, b, nil)
	f.ready()
	b.set(func(b *broker) { b.silent = true })
	v := f.follow(nil)
	v.ping()
	b.sent("the report", func(m *dayflyv1.FollowRequest) bool { return relayed(m, "verifier-1") != nil })
	b.sent("a ping after it", func(m *dayflyv1.FollowRequest) bool { return m.GetPing() != nil })
	got := make(chan *dayflyv1.FollowResponse, 1)
	go func() {
		m, err := v.stream.Recv()
		if err == nil {
			got <- m
		}
	}()
	select {
	case m := <-got:
		t.Fatalf("answered %v while the broker had confirmed nothing", m)
	case <-time.After(200 * time.Millisecond): // one-sided: a slow machine makes the test weaker, not red
	}
	b.set(func(b *broker) { b.silent = false })
	select {
	case m := <-got:
		if m.GetWelcome() == nil {
			t.Fatalf("got %v, want a Welcome", m)
		}
	case <-time.After(patience):
		t.Fatal("never welcomed")
	}
	v.pong()
}

// Every ping to the broker is preceded by a report of all who may be answered from it:
// the broker must not think one closed that is being answered.
func TestEveryPingIsPrecededByTheLiving(t *testing.T) {
	noLeaks(t)
	td := newDomain(t)
	b := newBroker(t, td)
	f := start(t, td, b, nil)
	v := f.follow(nil)
	v.welcome()
	for len(b.up) > 0 {
		<-b.up
	}
	b.sent("a ping", func(m *dayflyv1.FollowRequest) bool { return m.GetPing() != nil })
	named := 0
	for range 3 {
		b.sent("a ping", func(m *dayflyv1.FollowRequest) bool {
			if relayed(m, "verifier-1") != nil {
				named++
			}
			return m.GetPing() != nil
		})
	}
	if named < 3 {
		t.Errorf("3 pings and %d reports of the living verifier", named)
	}
}

// A relay behind the relay: paths grow, and its pings wait for whoever is new below it.
func TestRelayBehindRelay(t *testing.T) {
	noLeaks(t)
	td := newDomain(t)
	b := newBroker(t, td)
	f := start(t, td, b, nil)
	r := f.follow(func(s *wire.Subscription) { s.Instance, s.Relay, s.Audiences = "relay-001", true, nil })
	r.welcome()
	r.send(&dayflyv1.FollowRequest{Message: &dayflyv1.FollowRequest_RelayReport{RelayReport: &dayflyv1.RelayReport{
		Verifiers: []*dayflyv1.RelayedVerifier{{
			Path: []string{"inner-001", "verifier-9"}, Audiences: []string{"ledger"}, MaxStaleness: durationpb.New(time.Second), LastAnswerAge: durationpb.New(0),
		}},
	}}})
	b.sent("the inner verifier", func(m *dayflyv1.FollowRequest) bool {
		return relayed(m, "relay-001/inner-001/verifier-9") != nil
	})
	r.ping()
	r.pong()
	liar := f.follow(func(s *wire.Subscription) { s.Instance = "verifier-4" })
	liar.welcome()
	liar.send(&dayflyv1.FollowRequest{Message: &dayflyv1.FollowRequest_RelayReport{RelayReport: &dayflyv1.RelayReport{}}})
	if err := liar.end(); reason(err) != "FEED_MESSAGE_INVALID" {
		t.Errorf("a relay report from no relay: %v", err)
	}
}

// Whom the broker refuses is never welcomed and hears why, like one that follows the
// broker itself; a relay below is told whom it concerns, and nobody else is.
func TestRefusedBelow(t *testing.T) {
	noLeaks(t)
	td := newDomain(t)
	b := newBroker(t, td)
	b.set(func(b *broker) { b.below = "refused-1" })
	f := start(t, td, b, nil)
	good := f.follow(nil)
	good.welcome()
	bad := f.follow(func(s *wire.Subscription) { s.Instance = "refused-1" })
	if _, err := bad.stream.Recv(); reason(err) != "POLICY_DENIED" || status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), "not for you") {
		t.Errorf("the refused one got %v", err)
	}
	b.sent("that it has gone", func(m *dayflyv1.FollowRequest) bool { return relayed(m, "refused-1").GetGone() })

	r := f.follow(func(s *wire.Subscription) { s.Instance, s.Relay, s.Audiences = "relay-001", true, nil })
	r.welcome()
	r.send(&dayflyv1.FollowRequest{Message: &dayflyv1.FollowRequest_RelayReport{RelayReport: &dayflyv1.RelayReport{
		Verifiers: []*dayflyv1.RelayedVerifier{{
			Path: []string{"refused-1"}, Audiences: []string{"ledger"}, MaxStaleness: durationpb.New(time.Second), LastAnswerAge: durationpb.New(0),
		}},
	}}})
	r.ping()
	told := 0
	m := r.recv()
	for ; m.GetPong() == nil; m = r.recv() {
		if got := m.GetRelayRefusal(); got != nil {
			told++
			if len(got.GetPath()) != 1 || got.GetPath()[0] != "refused-1" || got.GetReason() != "POLICY_DENIED" || got.GetMetadata()["hint"] != "ask" {
				t.Errorf("passed on %v", got)
			}
		}
	}
	if told == 0 {
		t.Error("a pong, and no refusal before it")
	}
	good.ping()
	good.pong()
}

// One that left is forgotten only once the broker knows that it did.
func TestGoneIsReported(t *testing.T) {
	noLeaks(t)
	td := newDomain(t)
	b := newBroker(t, td)
	f := start(t, td, b, nil)
	v := f.follow(func(s *wire.Subscription) { s.Bound = 500 * time.Millisecond })
	v.welcome()
	v.ping()
	v.pong()
	b.set(func(b *broker) { b.silent = true })
	v.cancel()
	gone := func(m *dayflyv1.FollowRequest) bool { return relayed(m, "verifier-1").GetGone() }
	m := b.sent("that it has gone", gone)
	if relayed(m, "verifier-1").GetLastAnswerAge().AsDuration() == 0 {
		t.Error("it was answered long ago, and reported as if just now")
	}
	time.Sleep(time.Second) // one-sided: past its bound, a forgetful agent would say it no more
	b.stop()
	b.restart()
	b.sent("that it has gone, to the next stream", gone)
}

// end receives until the stream ends.
func (v *verifier) end() error {
	for {
		if _, err := v.stream.Recv(); err != nil {
			return err
		}
	}
}

func TestRelayRefuses(t *testing.T) {
	noLeaks(t)
	td := newDomain(t)
	b := newBroker(t, td)
	f := start(t, td, b, func(c *agent.Config) { c.MaxStreams = 2 })
	ping := &dayflyv1.FollowRequest{Message: &dayflyv1.FollowRequest_Ping{Ping: &dayflyv1.Ping{Nonce: []byte("12345678")}}}
	for name, c := range map[string]struct {
		change func(*wire.Subscription)
		then   []*dayflyv1.FollowRequest
		reason string
	}{
		"no audience": {change: func(s *wire.Subscription) { s.Audiences = nil }, reason: "FEED_MESSAGE_INVALID"},
		"bound":       {change: func(s *wire.Subscription) { s.Bound = 2 * time.Hour }, reason: "FEED_MESSAGE_INVALID"},
		"instance":    {change: func(s *wire.Subscription) { s.Instance = "a/b/c/d/e" }, reason: "FEED_MESSAGE_INVALID"},
		"twice":       {then: []*dayflyv1.FollowRequest{{Message: &dayflyv1.FollowRequest_Subscribe{Subscribe: wire.Subscribe(wire.Subscription{Instance: "verifier-1", Audiences: []string{"a"}, Bound: time.Second})}}}, reason: "FEED_MESSAGE_INVALID"},
		"short nonce": {then: []*dayflyv1.FollowRequest{ping, {Message: &dayflyv1.FollowRequest_Ping{Ping: &dayflyv1.Ping{Nonce: []byte("1")}}}}, reason: "FEED_MESSAGE_INVALID"},
		"empty":       {then: []*dayflyv1.FollowRequest{{}}, reason: "FEED_MESSAGE_INVALID"},
		"not delivered": {then: []*dayflyv1.FollowRequest{{Message: &dayflyv1.FollowRequest_Acknowledge{Acknowledge: &dayflyv1.Acknowledge{
			Position: wire.Position(feed.Position{Era: 7, Seq: 2, Sum: feed.Sum{1}})}}}}, reason: "FEED_MESSAGE_INVALID"},
	} {
		v := f.follow(c.change)
		if c.then != nil {
			v.welcome()
		}
		for _, m := range c.then {
			_ = v.stream.Send(m) // the stream may have ended by the first of them: its end says why
		}
		if err := v.end(); reason(err) != c.reason {
			t.Errorf("%s: %v, want %s", name, err, c.reason)
		}
	}
	eventually(t, "the streams to end", func() error {
		one := f.follow(nil)
		m, err := one.stream.Recv()
		defer one.cancel()
		if err != nil || m.GetWelcome() == nil {
			return err
		}
		return nil
	})
	for _, instance := range []string{"verifier-5", "verifier-6"} {
		// The agent may not have noticed yet that an earlier stream has ended.
		eventually(t, instance+" to be welcomed", func() error {
			_, err := f.follow(func(s *wire.Subscription) { s.Instance = instance }).stream.Recv()
			return err
		})
	}
	if err := f.follow(func(s *wire.Subscription) { s.Instance = "verifier-7" }).end(); reason(err) != "TOO_MANY_STREAMS" {
		t.Errorf("too many: %v", err)
	}
}

// An instance that comes back takes over its old stream.
func TestInstanceReplaced(t *testing.T) {
	noLeaks(t)
	td := newDomain(t)
	f := start(t, td, newBroker(t, td), nil)
	old := f.follow(nil)
	old.welcome()
	again := f.follow(nil)
	again.welcome()
	if err := old.end(); reason(err) != "INSTANCE_REPLACED" {
		t.Errorf("the old stream: %v", err)
	}
	again.ping()
	again.pong()
}

func use(t *testing.T, count uint64) *dayflyv1.Use {
	t.Helper()
	grant, err := token.NewGrantID(payments, time.Unix(1_700_000_000, 0), zeros{})
	if err != nil {
		t.Fatal(err)
	}
	seen := timestamppb.New(time.Unix(1_700_000_000, 0))
	return &dayflyv1.Use{Grant: grant.String(), Accepted: true, Count: count, FirstSeen: seen, LastSeen: seen, Head: 2}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

func useReport(number, dropped uint64, uses ...*dayflyv1.Use) *dayflyv1.FollowRequest {
	return &dayflyv1.FollowRequest{Message: &dayflyv1.FollowRequest_UseReport{UseReport: &dayflyv1.UseReport{Uses: uses, Dropped: dropped, Number: number}}}
}

func isUseReport(m *dayflyv1.FollowRequest) bool { return m.GetUseReport() != nil }

// Use reports reach the broker, added up; what it would refuse doesn't, and is counted
// as dropped. A report that a verifier repeats counts once.
func TestUseReports(t *testing.T) {
	noLeaks(t)
	td := newDomain(t)
	b := newBroker(t, td)
	f := start(t, td, b, nil)
	v := f.follow(nil)
	v.welcome()
	long := use(t, 1)
	long.PeerAddress = strings.Repeat("1", 100)
	v.send(useReport(1, 2, use(t, 3), long, use(t, 4)))
	m := b.sent("the use report", isUseReport).GetUseReport()
	if len(m.GetUses()) != 1 || m.GetUses()[0].GetCount() != 7 || m.GetDropped() != 3 {
		t.Errorf("got %v", m)
	}
	again := f.follow(func(s *wire.Subscription) { s.Instance = v.sub.Instance })
	again.welcome()
	again.send(useReport(1, 2, use(t, 7)))
	again.send(useReport(2, 0, use(t, 5)))
	m = b.sent("the next use report", isUseReport).GetUseReport()
	if len(m.GetUses()) != 1 || m.GetUses()[0].GetCount() != 5 || m.GetDropped() != 0 {
		t.Errorf("got %v", m)
	}
}

// A use goes up under the name of who saw it. A verifier can't put it on another: only a
// relay names those behind it.
func TestUsesNameTheirVerifier(t *testing.T) {
	noLeaks(t)
	td := newDomain(t)
	b := newBroker(t, td)
	f := start(t, td, b, nil)
	sent := func(what string, v *verifier, u *dayflyv1.Use) *dayflyv1.Use {
		t.Helper()
		v.send(useReport(0, 0, u))
		return b.sent(what, isUseReport).GetUseReport().GetUses()[0]
	}
	innocent := func() *dayflyv1.Use {
		u := use(t, 1)
		u.VerifierIdentity, u.VerifierInstance = "spiffe://example.org/innocent", "instance-of-another"
		return u
	}
	v := f.follow(nil)
	v.welcome()
	if u := sent("the verifier's use", v, innocent()); u.GetVerifierIdentity() != "" || u.GetVerifierInstance() != v.sub.Instance {
		t.Errorf("a verifier's use goes up as of %s %s", u.GetVerifierIdentity(), u.GetVerifierInstance())
	}
	r := f.follow(func(s *wire.Subscription) { s.Instance, s.Relay, s.Audiences = "relay-001", true, nil })
	r.welcome()
	if u := sent("a use from behind the relay", r, innocent()); u.GetVerifierIdentity() != "spiffe://example.org/innocent" || u.GetVerifierInstance() != "instance-of-another" {
		t.Errorf("a use from behind a relay goes up as of %s %s", u.GetVerifierIdentity(), u.GetVerifierInstance())
	}
	if u := sent("the relay's own use", r, use(t, 1)); u.GetVerifierIdentity() != "" || u.GetVerifierInstance() != "relay-001" {
		t.Errorf("a relay's own use goes up as of %s %s", u.GetVerifierIdentity(), u.GetVerifierInstance())
	}
	// Two verifiers' uses of one grant are two.
	w := f.follow(func(s *wire.Subscription) { s.Instance = "verifier-2" })
	w.welcome()
	var names []string
	v.send(useReport(0, 0, use(t, 1)))
	w.send(useReport(0, 0, use(t, 1)))
	for len(names) < 2 {
		for _, u := range b.sent("both uses", isUseReport).GetUseReport().GetUses() {
			names = append(names, u.GetVerifierInstance())
		}
	}
	slices.Sort(names)
	if !slices.Equal(names, []string{"verifier-1", "verifier-2"}) {
		t.Errorf("uses of %v", names)
	}
}

// What the broker didn't answer for comes again on the next stream, under its number.
func TestUseReportsSurviveAStream(t *testing.T) {
	noLeaks(t)
	td := newDomain(t)
	b := newBroker(t, td)
	f := start(t, td, b, nil)
	v := f.follow(nil)
	v.welcome()
	b.set(func(b *broker) { b.silent = true })
	v.send(useReport(1, 0, use(t, 3)))
	first := b.sent("the use report", isUseReport).GetUseReport()
	b.sent("a ping after it", func(m *dayflyv1.FollowRequest) bool { return m.GetPing() != nil })
	b.sent("another", func(m *dayflyv1.FollowRequest) bool { return m.GetPing() != nil })
	b.stop()
	b.set(func(b *broker) { b.silent = false })
	b.restart()
	again := b.sent("the use report again", isUseReport).GetUseReport()
	if first.GetNumber() == 0 || !proto.Equal(first, again) {
		t.Errorf("first %v, then %v", first, again)
	}
}

// One that never reads makes nobody wait.
func TestSlowReader(t *testing.T) {
	noLeaks(t)
	td := newDomain(t)
	b := newBroker(t, td)
	f := start(t, td, b, nil)
	slow := f.follow(func(s *wire.Subscription) { s.Instance = "slow-reader" })
	slow.welcome() // and never again
	v := f.follow(nil)
	v.welcome()
	var at feed.Position
	selectors := make([]revocation.Selector, 0, 100)
	for i := range 100 {
		s, err := revocation.Subtree(fmt.Sprintf("spiffe://td/%s/%d/*", strings.Repeat("x", 400), i))
		if err != nil {
			t.Fatal(err)
		}
		selectors = append(selectors, s)
	}
	for range 40 { // more than all buffers between hold
		at = b.append(feed.Event{Revocation: &feed.Revocation{Selectors: selectors}})
	}
	v.reach(at)
	v.ping()
	v.pong()
}

// Where policy lets it follow but not relay, credentials still die at once, and
// verifiers are told why they can't follow here.
func TestFollowWithoutRelay(t *testing.T) {
	noLeaks(t)
	td := newDomain(t)
	b := newBroker(t, td)
	b.set(func(b *broker) { b.norelay = true })
	f := start(t, td, b, func(c *agent.Config) { c.Audiences = []string{"payments"} })
	f.ready()
	if err := f.follow(nil).end(); reason(err) != "RELAY_NOT_ALLOWED" {
		t.Errorf("follow: %v", err)
	}
	b.mu.Lock()
	sub := b.subs[0]
	b.mu.Unlock()
	if sub.Relay || len(sub.Audiences) != 1 {
		t.Errorf("subscribed as %+v", sub)
	}
}

// Two histories: nothing is relayed, everyone is told, and the agent isn't ready.
func TestFork(t *testing.T) {
	noLeaks(t)
	td := newDomain(t)
	b := newBroker(t, td)
	f := start(t, td, b, nil)
	v := f.follow(nil)
	v.welcome()
	v.reach(b.head())
	b.stop()
	other := newBroker(t, td) // another key: another record number 2
	other.stop()
	b.set(func(b *broker) { b.log = other.log })
	b.restart()
	if err := v.end(); reason(err) != "FEED_FORKED" {
		t.Errorf("the stream ended with %v", err)
	}
	if _, body, _ := f.get("/readyz"); !strings.Contains(fmt.Sprint(body), "two histories") {
		t.Errorf("readyz: %v", body)
	}
	// The broker's store is restored: a new era. The agent goes on by itself.
	b.append(feed.Event{Era: &feed.Era{Era: 8}})
	b.append(feed.Event{Key: &feed.Key{Public: b.pub, DER: b.der, Signature: []byte("x")}})
	b.stop() // its streams have the old era's records on their way
	b.restart()
	eventually(t, "a relay of the new era", func() error {
		_, body, _ := f.get("/readyz")
		if !strings.Contains(fmt.Sprint(body), b.head().String()) {
			return fmt.Errorf("%v", body)
		}
		return nil
	})
	v = f.follow(nil)
	v.welcome()
	v.reach(b.head())
}

// A policy that denies the feed is named by readiness.
func TestFeedDenied(t *testing.T) {
	noLeaks(t)
	td := newDomain(t)
	b := newBroker(t, td)
	b.set(func(b *broker) { b.follow = refusal(codes.PermissionDenied, "NOT_VERIFIER", "may not follow") })
	f := start(t, td, b, nil)
	f.issue(f.client(), sdkRequest("orders"))
	eventually(t, "the reason", func() error {
		if _, body, _ := f.get("/readyz"); !strings.Contains(fmt.Sprint(body), "NOT_VERIFIER") {
			return fmt.Errorf("%v", body)
		}
		return nil
	})
	if err := f.follow(nil).end(); reason(err) != "RELAY_NOT_ALLOWED" {
		t.Errorf("follow: %v", err)
	}
}
