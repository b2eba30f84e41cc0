package rpc

import (
	"context"
	"crypto/tls"
	"net"
	"strings"
	"sync"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/broker/attest"
	"github.com/dayflyhq/dayfly/broker/gate"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
)

// jwtTransport is TLS without certificates of clients. Its connections prove nothing for
// as long as they last: a full one closes what has been open longest, of the source that
// has the most.
type jwtTransport struct {
	credentials.TransportCredentials
	open *gate.Gate
}

func newJWTTransport(svids x509svid.Source) *jwtTransport {
	cfg := tlsconfig.TLSServerConfig(svids)
	cfg.MinVersion = tls.VersionTLS13
	return &jwtTransport{credentials.NewTLS(cfg), gate.New(maxHandshakes)}
}

func (t *jwtTransport) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	t.open.Enter(raw)
	conn, info, err := t.TransportCredentials.ServerHandshake(raw)
	if err != nil {
		t.open.Leave(raw)
		return nil, nil, err
	}
	return &counted{Conn: conn, release: sync.OnceFunc(func() { t.open.Leave(raw) })}, info, nil
}

func (t *jwtTransport) Clone() credentials.TransportCredentials {
	return &jwtTransport{t.TransportCredentials.Clone(), t.open}
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
		}
		return c, nil
	}
}
