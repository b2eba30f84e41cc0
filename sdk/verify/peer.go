package verify

import (
	"crypto/tls"
	"net"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// PeerOf returns who is at the other end of a TLS connection: its certificate is
// verified against bundles now, not as of the handshake, because a connection outlives
// an SVID and may be a resumed one. With nil bundles only a chain that crypto/tls has
// verified counts. A peer that has proven nothing is the zero Peer but for its address,
// and may present bearer tokens. address may have a port.
func PeerOf(state *tls.ConnectionState, bundles x509bundle.Source, address string, now time.Time) Peer {
	peer := Peer{Address: withoutPort(address)}
	if state == nil || len(state.PeerCertificates) == 0 {
		return peer
	}
	leaf := state.PeerCertificates[0]
	if now.After(leaf.NotAfter) || now.Before(leaf.NotBefore) {
		return peer
	}
	if bundles != nil {
		id, _, err := x509svid.Verify(state.PeerCertificates, bundles, x509svid.WithTime(now))
		if err == nil {
			peer.ID, peer.Certificate = id, leaf
		}
		return peer
	}
	if len(state.VerifiedChains) == 0 {
		return peer
	}
	peer.Certificate = leaf
	if id, err := x509svid.IDFromCert(leaf); err == nil {
		peer.ID = id
	}
	return peer
}

func withoutPort(address string) string {
	if host, _, err := net.SplitHostPort(address); err == nil {
		return host
	}
	return address
}
