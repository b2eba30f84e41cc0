package agent

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"slices"

	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/proto/vouch"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
)

// serveRemote makes the server for verifiers on other hosts: the feed and nothing else.
func (a *Agent) serveRemote() {
	if a.cfg.Relay == nil {
		return
	}
	cfg := tlsconfig.MTLSServerConfig(a.cfg.Source, a.cfg.Bundles, func(id spiffeid.ID, _ [][]*x509.Certificate) error { return a.cfg.mayFollow(id) })
	cfg.MinVersion, cfg.SessionTicketsDisabled = tls.VersionTLS13, true
	a.remote = grpc.NewServer(
		grpc.Creds(credentials.NewTLS(cfg)),
		grpc.MaxRecvMsgSize(maxReceiveBytes),
		grpc.MaxConcurrentStreams(uint32(a.cfg.MaxStreams)),
		grpc.ConnectionTimeout(subscribeWithin),
		grpc.ChainStreamInterceptor(func(srv any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, handle grpc.StreamHandler) error {
			return handle(srv, &fitting{stream})
		}),
		grpc.WaitForHandlers(true),
	)
	dayflyv1.RegisterFeedServiceServer(a.remote, &feedService{
		k: a.k, maxStreams: int64(a.cfg.MaxStreams), stopping: a.stopping, counts: &a.counts, peer: a.cfg.remotePeer,
	})
}

func (c *Config) mayFollow(id spiffeid.ID) error {
	if slices.ContainsFunc(c.RelayAllow, func(s revocation.Selector) bool { return s.MatchesCaller(id, token.Thumbprint{}) }) {
		return nil
	}
	return fmt.Errorf("%s may not follow here", id)
}

// remotePeer proves who is at the other end of a stream, now.
func (c *Config) remotePeer(ctx context.Context) (string, error) {
	if p, ok := peer.FromContext(ctx); ok {
		if info, ok := p.AuthInfo.(credentials.TLSInfo); ok {
			id, _, err := x509svid.Verify(info.State.PeerCertificates, c.Bundles, x509svid.WithTime(c.Now()))
			if err == nil && c.mayFollow(id) == nil {
				return id.String(), nil
			}
		}
	}
	return "", refuse(codes.Unauthenticated, "SVID_INVALID", "the SVID of this connection is not valid here now", "connect again with a current X.509-SVID that this relay admits")
}

// verifyHead checks a signed head of the broker, kept for long or made lately.
func (c *Config) verifyHead(issuer string, h feed.SignedHead, kept bool) (feed.HeadStatement, error) {
	verify := vouch.VerifyHead
	if kept {
		verify = vouch.VerifyKeptHead
	}
	return verify(issuer, h, c.Bundles, spiffeid.MatchID(c.BrokerID), c.Now())
}
