package rpc

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/broker/gate"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
)

// authenticator proves who is at the other end of a connection.
type authenticator struct {
	bundles x509bundle.Source
	domains []spiffeid.TrustDomain
	now     func() time.Time
}

// transport returns server credentials for mTLS with X.509-SVIDs.
func (a *authenticator) transport(svids x509svid.Source) *transport {
	cfg := tlsconfig.MTLSServerConfig(svids, a.bundles, a.authorize)
	cfg.MinVersion = tls.VersionTLS13
	// A resumed session skips VerifyPeerCertificate, where go-spiffe authorises. There
	// is none without tickets; VerifyConnection runs for every handshake all the same.
	cfg.SessionTicketsDisabled = true
	cfg.VerifyConnection = func(cs tls.ConnectionState) error {
		_, err := a.verify(cs.PeerCertificates)
		return err
	}
	return &transport{credentials.NewTLS(cfg), gate.New(maxHandshakes), &connections{}}
}

func (a *authenticator) authorize(id spiffeid.ID, _ [][]*x509.Certificate) error {
	if !slices.Contains(a.domains, id.TrustDomain()) {
		return fmt.Errorf("trust domain %q is not served here", id.TrustDomain().Name())
	}
	return nil
}

func (a *authenticator) verify(certs []*x509.Certificate) (spiffeid.ID, error) {
	id, chains, err := x509svid.Verify(certs, a.bundles, x509svid.WithTime(a.now()))
	if err != nil {
		return spiffeid.ID{}, err
	}
	return id, a.authorize(id, chains)
}

// transport keeps what was proven beside the connection.
type transport struct {
	credentials.TransportCredentials
	handshakes *gate.Gate
	open       *connections
}

func (t *transport) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	t.handshakes.Enter(conn)
	defer t.handshakes.Leave(conn)
	conn, info, err := t.TransportCredentials.ServerHandshake(conn)
	if err != nil {
		return nil, nil, err
	}
	tlsInfo, ok := info.(credentials.TLSInfo)
	if !ok || len(tlsInfo.State.PeerCertificates) == 0 {
		conn.Close()
		return nil, nil, errors.New("no certificate in the handshake")
	}
	id, err := x509svid.IDFromCert(tlsInfo.State.PeerCertificates[0])
	if err == nil {
		conn, err = t.admit(conn, id)
	}
	return conn, &connection{TLSInfo: tlsInfo}, err
}

// admit counts an open connection, or closes it.
func (t *transport) admit(conn net.Conn, id spiffeid.ID) (net.Conn, error) {
	admitted, err := t.open.admit(conn, id)
	if err != nil {
		conn.Close()
	}
	return admitted, err
}

func (t *transport) Clone() credentials.TransportCredentials {
	return &transport{t.TransportCredentials.Clone(), t.handshakes, t.open}
}

// connection is the AuthInfo of one: its chain, and the bundle that it was last
// verified against.
type connection struct {
	credentials.TLSInfo
	verified atomic.Pointer[x509bundle.Bundle]
}

var errNoSVID = &broker.Refusal{
	Kind: broker.Unauthenticated, Reason: "SVID_INVALID",
	Message: "the SVID of this connection is not valid here now",
	Hint:    "connect again with a current X.509-SVID of a trust domain that this broker serves",
}

// caller proves the peer of a call, now: the leaf's NotAfter, and its chain whenever
// the bundle of its trust domain is another than at the last look.
func (a *authenticator) caller(ctx context.Context) (broker.Caller, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return broker.Caller{}, errNoSVID
	}
	conn, ok := p.AuthInfo.(*connection)
	if !ok {
		return broker.Caller{}, errNoSVID
	}
	certs := conn.State.PeerCertificates
	if a.now().After(certs[0].NotAfter) {
		return broker.Caller{}, broker.ErrSVIDExpired
	}
	id, err := x509svid.IDFromCert(certs[0])
	if err != nil {
		return broker.Caller{}, errNoSVID
	}
	bundle, err := a.bundles.GetX509BundleForTrustDomain(id.TrustDomain())
	if err != nil {
		return broker.Caller{}, errNoSVID
	}
	if conn.verified.Load() != bundle {
		if _, err := a.verify(certs); err != nil {
			return broker.Caller{}, errNoSVID
		}
		conn.verified.Store(bundle)
	}
	c := broker.Caller{ID: id, Leaf: certs[0]}
	if addr, err := netip.ParseAddrPort(p.Addr.String()); err == nil {
		c.Peer = addr
	}
	return c, nil
}
