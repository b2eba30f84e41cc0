package agent_test

import (
	"context"
	"errors"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/agent"
	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/vouch"
	"github.com/dayflyhq/dayfly/proto/wire"
	"github.com/dayflyhq/dayfly/sdk/spiffetest"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
)

var (
	edge     = spiffeid.RequireFromString("spiffe://td/edge/web")
	stranger = spiffeid.RequireFromString("spiffe://td/other")
)

// startRemote runs an agent that relays beyond its host to the identities below /edge,
// and returns how an identity follows there. Hours are what its clock is ahead.
func startRemote(t *testing.T, b *broker) (follow func(spiffeid.ID, wire.Subscription) (*verifier, error), hours *atomic.Int64) {
	t.Helper()
	allow, err := revocation.Subtree("spiffe://td/edge/*")
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	hours = new(atomic.Int64)
	f := start(t, b.td, b, func(c *agent.Config) {
		c.Relay, c.RelayAllow, c.Bundles, c.BrokerID = l, []revocation.Selector{allow}, b.td, brokerID
		c.Now = func() time.Time { return time.Now().Add(time.Duration(hours.Load()) * time.Hour) }
	})
	f.ready()
	return func(id spiffeid.ID, sub wire.Subscription) (*verifier, error) {
		t.Helper()
		conn, err := grpc.NewClient("passthrough:///"+l.Addr().String(), grpc.WithTransportCredentials(credentials.NewTLS(
			tlsconfig.MTLSClientConfig(b.td.Source(id), b.td, tlsconfig.AuthorizeID(payments)))))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		t.Cleanup(cancel)
		v := &verifier{f: f, cancel: cancel, sub: sub}
		if v.stream, err = dayflyv1.NewFeedServiceClient(conn).Follow(ctx); err != nil {
			return nil, err
		}
		_ = v.stream.Send(&dayflyv1.FollowRequest{Message: &dayflyv1.FollowRequest_Subscribe{Subscribe: wire.Subscribe(sub)}})
		return v, nil
	}, hours
}

func remoteSubscription(instance string) wire.Subscription {
	return wire.Subscription{Instance: instance, Audiences: []string{"orders"}, Bound: 2 * time.Second, SignedHeads: true}
}

// On the TCP listener whoever follows has proven who it is and may, by the owner's list,
// wants signed heads, and goes up under the SPIFFE ID that it proved; nobody stays whose
// SVID has expired meanwhile.
func TestRemoteListener(t *testing.T) {
	noLeaks(t)
	b := newBroker(t, newDomain(t))
	follow, hours := startRemote(t, b)
	v, err := follow(edge, remoteSubscription("verifier-1"))
	if err != nil {
		t.Fatal(err)
	}
	m := b.sent("the one on another host", func(m *dayflyv1.FollowRequest) bool { return relayed(m, "verifier-1") != nil })
	if got := relayed(m, "verifier-1").GetIdentity(); got != edge.String() {
		t.Errorf("it goes up as %q", got)
	}
	v.welcome()
	v.send(useReport(0, 0, use(t, 1)))
	if u := b.sent("its use", isUseReport).GetUseReport().GetUses()[0]; u.GetVerifierIdentity() != edge.String() || u.GetVerifierInstance() != "verifier-1" {
		t.Errorf("its use goes up as of %s %s", u.GetVerifierIdentity(), u.GetVerifierInstance())
	}

	other, err := follow(stranger, remoteSubscription("verifier-2"))
	if err == nil {
		err = other.end()
	}
	if status.Code(err) != codes.Unavailable {
		t.Errorf("one whom the owner doesn't allow: %v", err)
	}
	plain := remoteSubscription("verifier-3")
	plain.SignedHeads = false
	believer, err := follow(edge, plain)
	if err != nil {
		t.Fatal(err)
	}
	if err := believer.end(); reason(err) != "SIGNED_HEADS_REQUIRED" {
		t.Errorf("one that would believe the relay: %v", err)
	}
	thief, err := follow(spiffeid.RequireFromString("spiffe://td/edge/thief"), remoteSubscription("verifier-1"))
	if err != nil {
		t.Fatal(err)
	}
	if err := thief.end(); reason(err) != "FEED_MESSAGE_INVALID" {
		t.Errorf("one who follows as another's instance: %v", err)
	}
	v.send(useReport(0, 0, use(t, 1))) // that one follows on
	b.sent("another use of it", isUseReport)
	hours.Store(24 * 365)
	v.send(useReport(0, 0, use(t, 1)))
	if err := v.end(); reason(err) != "SVID_INVALID" {
		t.Errorf("one whose SVID has expired: %v", err)
	}
}

// A broker that lacks a record which one below was given signed is shown that at once, by
// a stream made anew; what the broker didn't sign is shown to nobody.
func TestKeptHeadIsShown(t *testing.T) {
	noLeaks(t)
	td := newDomain(t)
	b := newBroker(t, td)
	f := start(t, td, b, func(c *agent.Config) { c.BrokerID, c.Bundles = brokerID, td })
	f.ready()
	head := func(by spiffeid.ID) feed.SignedHead {
		t.Helper()
		svid, err := td.IssueSVID(by, spiffetest.SVIDOptions{})
		if err != nil {
			t.Fatal(err)
		}
		above := b.head()
		above.Seq += 40
		h, err := vouch.SignHead(svid, "https://broker.test", feed.HeadStatement{Head: above, Horizon: feed.Position{Era: above.Era}, SignedAt: time.Now()})
		if err != nil {
			t.Fatal(err)
		}
		return h
	}
	forged, signed := head(stranger), head(brokerID)
	shown := func(h feed.SignedHead) int {
		b.mu.Lock()
		defer b.mu.Unlock()
		n := 0
		for _, s := range b.subs {
			if string(s.NewestHead.Statement) == string(h.Statement) && string(s.NewestHead.Signature) == string(h.Signature) {
				n++
			}
		}
		return n
	}
	show := func(instance string, h feed.SignedHead) {
		t.Helper()
		v := f.follow(func(s *wire.Subscription) { s.Instance, s.SignedHeads, s.NewestHead = instance, true, h })
		v.welcome()
	}
	show("verifier-1", forged)
	show("verifier-2", signed)
	eventually(t, "the broker to be shown the head", func() error {
		if shown(signed) == 0 {
			return errors.New("it is not shown")
		}
		return nil
	})
	// It was said, and the stream that said it stays.
	before := b.streams.Load()
	v := f.follow(func(s *wire.Subscription) { s.Instance = "verifier-3" })
	v.welcome()
	for range 3 {
		v.ping()
		v.pong()
	}
	if n := b.streams.Load(); n != before {
		t.Errorf("%d more streams for a head that was shown", n-before)
	}
	if shown(forged) > 0 {
		t.Error("a forged head is shown to the broker")
	}
	if n := shown(signed); n != 1 {
		t.Errorf("the head was shown %d times", n)
	}
}
