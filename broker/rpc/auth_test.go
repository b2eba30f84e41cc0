package rpc_test

import (
	"crypto/tls"
	"errors"
	"io"
	"testing"
	"time"

	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/sdk/spiffetest"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func TestHandshake(t *testing.T) {
	w := newWorld(t)
	stranger := spiffetest.ForTest(t, spiffetest.Config{TrustDomain: spiffeid.RequireTrustDomainFromString("stranger.example")})
	imposter := spiffetest.ForTest(t, spiffetest.Config{TrustDomain: domain}) // our name, another authority
	strange, err := stranger.IssueSVID(spiffeid.RequireFromString("spiffe://stranger.example/x"), spiffetest.SVIDOptions{})
	if err != nil {
		t.Fatal(err)
	}
	forged, err := imposter.IssueSVID(payments, spiffetest.SVIDOptions{})
	if err != nil {
		t.Fatal(err)
	}
	plain := w.config(w.svid(payments, spiffetest.SVIDOptions{}))
	plain.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &tls.Certificate{}, nil }
	now := time.Now()
	for name, cfg := range map[string]*tls.Config{
		"no SVID":                 plain,
		"an expired SVID":         w.config(w.svid(payments, spiffetest.SVIDOptions{NotBefore: now.Add(-2 * time.Hour), NotAfter: now.Add(-time.Minute)})),
		"an SVID from the future": w.config(w.svid(payments, spiffetest.SVIDOptions{NotBefore: now.Add(time.Hour), NotAfter: now.Add(2 * time.Hour)})),
		"an unknown trust domain": w.config(strange),
		"a forged SVID":           w.config(forged),
	} {
		t.Run(name, func(t *testing.T) {
			_, err := issue(t, w.dial(cfg))
			if status.Code(err) != codes.Unavailable {
				t.Errorf("got %v, want no connection", err)
			}
		})
	}
	if _, err := issue(t, w.as(payments)); err != nil {
		t.Errorf("a good one: %v", err)
	}

	// A domain whose bundle is known is served only if it is configured.
	w.bundles.Add(stranger.Bundle())
	if _, err := issue(t, w.dial(w.config(strange))); status.Code(err) != codes.Unavailable {
		t.Errorf("a trust domain that isn't served: %v", err)
	}
}

// A connection outlives its SVID; a call on it doesn't.
func TestSVIDExpiresOnConnection(t *testing.T) {
	w := newWorld(t)
	conn := w.as(payments)
	if _, err := issue(t, conn); err != nil {
		t.Fatal(err)
	}
	w.clock.advance(2 * time.Hour)
	_, err := issue(t, conn)
	refused(t, err, codes.Unauthenticated, "SVID_EXPIRED")
	_, err = dayflyv1.NewGrantServiceClient(conn).ListGrants(soon(t), &dayflyv1.ListGrantsRequest{})
	refused(t, err, codes.Unauthenticated, "SVID_EXPIRED")
	_, err = dayflyv1.NewRevocationServiceClient(conn).Revoke(soon(t), &dayflyv1.RevokeRequest{})
	refused(t, err, codes.Unauthenticated, "SVID_EXPIRED")
}

// A stream ends when its SVID does, even if nothing is sent on it.
func TestSVIDExpiresOnStream(t *testing.T) {
	w := newWorld(t)
	svid := w.svid(payments, spiffetest.SVIDOptions{NotAfter: time.Now().Add(3 * time.Second)})
	s := w.follow(w.dial(w.config(svid)), subscription())
	for {
		if _, err := s.Recv(); err != nil {
			refused(t, err, codes.Unauthenticated, "SVID_EXPIRED")
			return
		}
	}
}

// The next beat of a stream meets an expired SVID too.
func TestSVIDExpiresBetweenPings(t *testing.T) {
	w := newWorld(t)
	s := w.follow(w.as(payments), subscription())
	w.clock.advance(2 * time.Hour)
	if err := s.Send(ping("12345678")); err != nil {
		t.Fatal(err)
	}
	refused(t, end(t, s), codes.Unauthenticated, "SVID_EXPIRED")
}

// A trust domain is removed while its connections are open.
func TestTrustDomainRemoved(t *testing.T) {
	w := newWorld(t)
	partner := spiffetest.ForTest(t, spiffetest.Config{TrustDomain: spiffeid.RequireTrustDomainFromString("partner.example")})
	id := spiffeid.RequireFromString("spiffe://partner.example/shop")
	svid, err := partner.IssueSVID(id, spiffetest.SVIDOptions{})
	if err != nil {
		t.Fatal(err)
	}
	w.bundles.Add(partner.Bundle())
	conn := w.dial(w.config(svid))
	if _, err := issue(t, conn); err != nil {
		t.Fatal(err)
	}
	s := w.follow(conn, subscription())
	w.bundles.Remove(partner.Name())
	_, err = issue(t, conn)
	refused(t, err, codes.Unauthenticated, "SVID_INVALID")
	if err := s.Send(ping("12345678")); err != nil {
		t.Fatal(err)
	}
	refused(t, end(t, s), codes.Unauthenticated, "SVID_INVALID")
	// Its authority is replaced: the name alone is no proof.
	other := spiffetest.ForTest(t, spiffetest.Config{TrustDomain: partner.Name()})
	w.bundles.Add(other.Bundle())
	_, err = issue(t, conn)
	refused(t, err, codes.Unauthenticated, "SVID_INVALID")
	w.bundles.Add(partner.Bundle())
	if _, err := issue(t, conn); err != nil {
		t.Errorf("back again: %v", err)
	}
	if _, err := issue(t, w.as(payments)); err != nil {
		t.Errorf("another domain: %v", err)
	}
}

// A stream on which nothing is said ends when the authority behind its SVID is removed,
// and one whose authority stays goes on.
func TestAuthorityRemovedFromIdleStream(t *testing.T) {
	w := newWorld(t)
	partner := spiffetest.ForTest(t, spiffetest.Config{TrustDomain: spiffeid.RequireTrustDomainFromString("partner.example")})
	svid, err := partner.IssueSVID(spiffeid.RequireFromString("spiffe://partner.example/shop"), spiffetest.SVIDOptions{})
	if err != nil {
		t.Fatal(err)
	}
	w.bundles.Add(partner.Bundle())
	conn := w.dial(w.config(svid))
	idle := w.follow(conn, subscription())
	stays := w.follow(w.as(payments), subscription())
	watch := w.watch(conn)

	// The authority alone is replaced: the trust domain is there still.
	other := spiffetest.ForTest(t, spiffetest.Config{TrustDomain: partner.Name()})
	w.bundles.Add(other.Bundle())
	w.bundles.ring()
	refused(t, end(t, idle), codes.Unauthenticated, "SVID_INVALID")
	_, err = watch.Recv()
	refused(t, err, codes.Unauthenticated, "SVID_INVALID")
	if err := stays.Send(ping("12345678")); err != nil {
		t.Fatal(err)
	}
	for {
		m, err := stays.Recv()
		if err != nil {
			t.Fatalf("another trust domain's stream: %v", err)
		}
		if m.GetPong() != nil {
			return
		}
	}
}

// watch watches a revocation that isn't contained, and has read what is said at once.
func (w *world) watch(conn *grpc.ClientConn) grpc.ServerStreamingClient[dayflyv1.WatchContainmentResponse] {
	w.t.Helper()
	c := dayflyv1.NewRevocationServiceClient(conn)
	r, err := c.Revoke(soon(w.t), &dayflyv1.RevokeRequest{
		Selectors: []*dayflyv1.Selector{{Selector: &dayflyv1.Selector_Audience{Audience: "elsewhere"}}}, Reason: "r"})
	if err != nil {
		w.t.Fatal(err)
	}
	s, err := c.WatchContainment(soon(w.t), &dayflyv1.WatchContainmentRequest{Sequence: r.GetRevocation().GetPosition().GetSequence()})
	if err != nil {
		w.t.Fatal(err)
	}
	if m, err := s.Recv(); err != nil || m.GetContainment().GetContained() {
		w.t.Fatalf("watched %v, %v", m, err)
	}
	return s
}

// Nothing is delivered to one whose authority is gone, even if nobody told of the change.
func TestNoDeliveryAfterAuthorityRemoved(t *testing.T) {
	w := newWorld(t)
	partner := spiffetest.ForTest(t, spiffetest.Config{TrustDomain: spiffeid.RequireTrustDomainFromString("partner.example")})
	svid, err := partner.IssueSVID(spiffeid.RequireFromString("spiffe://partner.example/shop"), spiffetest.SVIDOptions{})
	if err != nil {
		t.Fatal(err)
	}
	w.bundles.Add(partner.Bundle())
	s := w.follow(w.dial(w.config(svid)), subscription())
	w.bundles.Remove(partner.Name())
	if _, err := dayflyv1.NewRevocationServiceClient(w.as(payments)).Revoke(soon(t), &dayflyv1.RevokeRequest{
		Selectors: []*dayflyv1.Selector{{Selector: &dayflyv1.Selector_Audience{Audience: "elsewhere"}}}, Reason: "r"}); err != nil {
		t.Fatal(err)
	}
	m, err := s.Recv()
	if err == nil {
		t.Fatalf("delivered %v", m)
	}
	refused(t, err, codes.Unauthenticated, "SVID_INVALID")
}

// A client that would resume its TLS session can't: after its trust domain is gone it
// must prove itself anew, and fails.
func TestNoResumption(t *testing.T) {
	w := newWorld(t)
	cfg := w.config(w.svid(payments, spiffetest.SVIDOptions{}))
	cfg.ServerName = "broker"
	cfg.ClientSessionCache = tls.NewLRUClientSessionCache(8)
	cfg.NextProtos = []string{"h2"}
	connect := func() (tls.ConnectionState, error) {
		conn, err := tls.Dial("tcp", w.addr, cfg)
		if err != nil {
			return tls.ConnectionState{}, err
		}
		defer conn.Close()
		if err := conn.SetDeadline(time.Now().Add(time.Minute)); err != nil {
			t.Fatal(err)
		}
		// The server's first frame comes after whatever tickets it would send, and a
		// refused certificate shows at the first read only.
		if _, err := io.ReadFull(conn, make([]byte, 9)); err != nil {
			return tls.ConnectionState{}, err
		}
		return conn.ConnectionState(), nil
	}
	for range 3 {
		state, err := connect()
		if err != nil {
			t.Fatal(err)
		}
		if state.DidResume || state.Version != tls.VersionTLS13 {
			t.Fatalf("resumed %t, version %x", state.DidResume, state.Version)
		}
	}
	w.bundles.Remove(domain)
	if _, err := connect(); err == nil {
		t.Error("let in after its trust domain was removed")
	} else if errors.Is(err, io.ErrUnexpectedEOF) {
		t.Logf("cut: %v", err)
	}
}
