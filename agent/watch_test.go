package agent_test

import (
	"context"
	"slices"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/agent"
	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/durationpb"
)

type watchStream = grpc.ServerStreamingClient[dayflyv1.WatchResponse]

func (f *fixture) watch(m *dayflyv1.WatchRequest) watchStream {
	f.Helper()
	ctx, cancel := context.WithTimeout(f.Context(), patience)
	f.Cleanup(cancel)
	stream, err := dayflyv1.NewWatchServiceClient(f.conn()).Watch(ctx, m)
	if err != nil {
		f.Fatal(err)
	}
	return stream
}

func wanted(audiences ...string) *dayflyv1.WatchRequest {
	m := &dayflyv1.WatchRequest{}
	for _, a := range audiences {
		m.Wanted = append(m.Wanted, &dayflyv1.IssueRequest{Audience: a})
	}
	return m
}

// until takes messages until one is as wanted.
func until(t *testing.T, stream watchStream, what string, is func(*dayflyv1.WatchResponse) bool) *dayflyv1.WatchResponse {
	t.Helper()
	for {
		m, err := stream.Recv()
		if err != nil {
			t.Fatalf("waiting for %s: %v", what, err)
		}
		if is(m) {
			return m
		}
	}
}

func whole(m *dayflyv1.WatchResponse) bool {
	return !slices.ContainsFunc(m.GetWatched(), func(w *dayflyv1.Watched) bool { return w.GetCredential() == nil })
}

// A holder hears of each credential when it comes, when it is renewed without anyone's
// asking, when it is revoked, and why there is none; also of one that it had before.
func TestWatch(t *testing.T) {
	noLeaks(t)
	td := newDomain(t)
	b := newBroker(t, td)
	b.set(func(b *broker) { b.ttl = 3 * time.Second })
	f := start(t, td, b, nil)
	stream := f.watch(wanted("orders", "web"))
	first := until(t, stream, "both", whole).GetWatched()
	if first[0].GetCredential().GetAudience() != "orders" || first[1].GetCredential().GetAudience() != "web" {
		t.Fatalf("got %v", first)
	}
	renewed := until(t, stream, "a renewal", func(m *dayflyv1.WatchResponse) bool {
		if len(m.GetRevoked()) > 0 {
			t.Errorf("revoked: %v", m.GetRevoked())
		}
		return whole(m) && m.GetWatched()[0].GetCredential().GetGrant() != first[0].GetCredential().GetGrant()
	}).GetWatched()[0].GetCredential()
	b.set(func(b *broker) { b.ttl = 5 * time.Minute })

	// Only that one is told of, and its successor comes.
	grant, err := token.ParseGrantID(renewed.GetGrant())
	if err != nil {
		t.Fatal(err)
	}
	b.revoke(revocation.Grant(grant))
	told := until(t, stream, "the revocation", func(m *dayflyv1.WatchResponse) bool { return len(m.GetRevoked()) > 0 })
	if !slices.Equal(told.GetRevoked(), []string{renewed.GetGrant()}) {
		t.Errorf("revoked: %v, want %s", told.GetRevoked(), renewed.GetGrant())
	}
	last := until(t, stream, "the next", func(m *dayflyv1.WatchResponse) bool {
		return whole(m) && m.GetWatched()[0].GetCredential().GetGrant() != renewed.GetGrant()
	}).GetWatched()[0].GetCredential()

	// Nobody asks at the socket, and what is refused says why.
	b.set(func(b *broker) { b.refuse = refusal(codes.PermissionDenied, "IDENTITY_LOCKED", "locked") })
	b.revoke(revocation.Identity(payments))
	until(t, stream, "the lock", func(m *dayflyv1.WatchResponse) bool {
		w := m.GetWatched()[0]
		return w.GetCredential() == nil && w.GetRefusal().GetReason() == "IDENTITY_LOCKED" && w.GetRefusal().GetHint() != "" && codes.Code(w.GetRefusal().GetCode()) == codes.PermissionDenied
	})

	// Another stream, whose holder has brought what it got on this one.
	m := wanted("orders")
	m.Held = []string{last.GetToken()}
	until(t, f.watch(m), "the revocation of what was held", func(m *dayflyv1.WatchResponse) bool {
		return slices.Equal(m.GetRevoked(), []string{last.GetGrant()})
	})

	b.set(func(b *broker) { b.refuse = nil })
	until(t, stream, "the end of the lock", func(m *dayflyv1.WatchResponse) bool {
		return whole(m) && m.GetWatched()[0].GetRefusal() == nil
	})
	f.stop()
	for {
		if _, err := stream.Recv(); err != nil {
			if got := reason(err); got != "AGENT_STOPPING" {
				t.Errorf("at the agent's end: %v", err)
			}
			return
		}
	}
}

// What a stranger sends is looked at before anything is done about it.
func TestWatchRefused(t *testing.T) {
	noLeaks(t)
	td := newDomain(t)
	b := newBroker(t, td)
	f := start(t, td, b, nil)
	held := wanted("orders")
	held.Held = []string{"eyJ.no.token"}
	many := wanted("orders")
	many.Held = make([]string, 257)
	ttl := wanted("orders")
	ttl.Wanted[0].Ttl = durationpb.New(48 * time.Hour)
	for name, m := range map[string]*dayflyv1.WatchRequest{
		"nothing": {}, "too much": wanted(make([]string, agent.MaxWatched+1)...), "an audience that is none": wanted("orders", "a b"),
		"a life that is too long": ttl, "held that is no token": held, "too many held": many,
	} {
		if _, err := f.watch(m).Recv(); reason(err) != "INVALID_REQUEST" {
			t.Errorf("%s: %v", name, err)
		}
	}
	if n := b.issued.Load(); n != 0 {
		t.Errorf("the broker was asked %d times", n)
	}
}

// Whoever watches in the agent's own process may begin before the agent does.
func TestChangedBeforeRun(t *testing.T) {
	td := newDomain(t)
	a, err := agent.New(agent.Config{Upstream: &grpc.ClientConn{}, Source: td.Source(payments), NoSockets: true})
	if err != nil {
		t.Fatal(err)
	}
	if a.Changed() == nil {
		t.Error("there is no word of what comes")
	}
}
