package rpc

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"strings"
	"sync"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/broker/attest"
	"github.com/dayflyhq/dayfly/broker/gate"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
)

// maxStreamsOfStranger bounds the calls under way on a connection to the JWT server, each of
// which may hold a message before anybody has proved who it is. A proxy opens another.
const maxStreamsOfStranger = 8

// strangersWindow is how much such a connection may send unread, and each call on it.
const strangersWindow = 64 << 10

// jwtTransport is TLS without certificates of clients. A new connection proves nothing: a
// full gate closes what has been open longest, of the source that has the most. Once a call
// on it has proved an identity no stranger can have it closed.
type jwtTransport struct {
	credentials.TransportCredentials
	strangers *gate.Gate
	proven    *gate.Proven
}

func newJWTTransport(svids x509svid.Source) *jwtTransport {
	cfg := tlsconfig.TLSServerConfig(svids)
	cfg.MinVersion = tls.VersionTLS13
	return &jwtTransport{credentials.NewTLS(cfg), gate.New(maxHandshakes), gate.NewProven(bounds)}
}

func (t *jwtTransport) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	t.strangers.Enter(raw)
	conn, info, err := t.TransportCredentials.ServerHandshake(raw)
	if err != nil {
		t.strangers.Leave(raw)
		return nil, nil, err
	}
	tlsInfo, ok := info.(credentials.TLSInfo)
	if !ok {
		t.strangers.Leave(raw)
		conn.Close()
		return nil, nil, errors.New("no TLS in the handshake")
	}
	p := &proxy{TLSInfo: tlsInfo, door: t, raw: raw}
	return &counted{conn, p.closed}, p, nil
}

func (t *jwtTransport) Clone() credentials.TransportCredentials {
	return &jwtTransport{t.TransportCredentials.Clone(), t.strangers, t.proven}
}

// proxy is the AuthInfo of a connection to the JWT server: the first identity that a call on
// it proves is the one that it counts for.
type proxy struct {
	credentials.TLSInfo
	door *jwtTransport
	raw  net.Conn

	mu    sync.Mutex
	leave func() // of those that are proven
}

func (p *proxy) proved(id spiffeid.ID) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.leave != nil {
		return
	}
	leave, ok := p.door.proven.Enter(id.String())
	if !ok {
		return // it has too many beside: this one stays a stranger's
	}
	if !p.door.strangers.Leave(p.raw) { // it is closed, or about to be
		leave()
		return
	}
	p.leave = leave
}

func (p *proxy) closed() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.door.strangers.Leave(p.raw)
	if p.leave != nil {
		p.leave()
	}
}

var errNoJWT = func() error {
	r := *attest.ErrJWTSVID
	r.Message = "this call shows no JWT-SVID"
	r.Hint = "send one in the metadata, as authorization: Bearer ...; with a certificate, call the listener for mTLS"
	return &r
}()

// bearer proves the peer of a call by the JWT-SVID in its metadata.
func bearer(a *attest.Attestor) func(context.Context) (broker.Caller, error) {
	return func(ctx context.Context) (broker.Caller, error) {
		values := metadata.ValueFromIncomingContext(ctx, "authorization")
		if len(values) != 1 {
			return broker.Caller{}, errNoJWT
		}
		scheme, assertion, ok := strings.Cut(values[0], " ")
		if !ok || !strings.EqualFold(scheme, "Bearer") {
			return broker.Caller{}, errNoJWT
		}
		c, err := a.JWT(assertion)
		if err != nil {
			return broker.Caller{}, err
		}
		if p, ok := peer.FromContext(ctx); ok {
			c.Peer = addressOf(p)
			if conn, ok := p.AuthInfo.(*proxy); ok {
				conn.proved(c.ID)
			}
		}
		return c, nil
	}
}
