package rpc

import (
	"context"
	"errors"
	"net"
	"net/netip"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/broker/attest"
	"github.com/dayflyhq/dayfly/broker/gate"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
)

// newTransport returns server credentials for mTLS with X.509-SVIDs.
func newTransport(a *attest.Attestor, svids x509svid.Source) *transport {
	handshakes := gate.New(maxHandshakes)
	return &transport{
		credentials.NewTLS(a.MutualTLS(svids)), handshakes,
		gate.NewLine(handshakes, maxInLine, pace()), gate.NewProven(bounds),
	}
}

// transport keeps what was proven beside the connection.
type transport struct {
	credentials.TransportCredentials
	handshakes *gate.Gate
	line       *gate.Line
	open       *gate.Proven
}

func (t *transport) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	handshake := t.line.Handshake(raw)
	defer handshake.End()
	conn, info, err := t.TransportCredentials.ServerHandshake(handshake)
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
	return conn, &connection{tlsInfo, attest.NewChain(tlsInfo.State.PeerCertificates)}, err
}

// admit counts an open connection, or closes it.
func (t *transport) admit(conn net.Conn, id spiffeid.ID) (net.Conn, error) {
	leave, ok := t.open.Enter(id.String())
	if !ok {
		conn.Close()
		return nil, errTooManyConnections
	}
	return &counted{conn, leave}, nil
}

func (t *transport) Clone() credentials.TransportCredentials {
	return &transport{t.TransportCredentials.Clone(), t.handshakes, t.line, t.open}
}

// connection is the AuthInfo of one.
type connection struct {
	credentials.TLSInfo
	chain *attest.Chain
}

// certified proves the peer of a call by the certificate of its connection, now.
func certified(a *attest.Attestor) func(context.Context) (broker.Caller, error) {
	return func(ctx context.Context) (broker.Caller, error) {
		p, ok := peer.FromContext(ctx)
		if !ok {
			return broker.Caller{}, attest.ErrNoSVID
		}
		conn, ok := p.AuthInfo.(*connection)
		if !ok {
			return broker.Caller{}, attest.ErrNoSVID
		}
		c, err := a.X509(conn.chain)
		if err != nil {
			return broker.Caller{}, err
		}
		c.Peer = addressOf(p)
		return c, nil
	}
}

// addressOf is where a call comes from; invalid on a unix socket.
func addressOf(p *peer.Peer) netip.AddrPort {
	addr, _ := netip.ParseAddrPort(p.Addr.String())
	return addr
}
