package attest

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"sync/atomic"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// MutualTLS returns a server's configuration that lets nobody in without an X.509-SVID.
func (a *Attestor) MutualTLS(svids x509svid.Source) *tls.Config {
	cfg := tlsconfig.MTLSServerConfig(svids, a.cfg.X509, func(id spiffeid.ID, _ [][]*x509.Certificate) error { return a.serves(id) })
	cfg.MinVersion = tls.VersionTLS13
	// A resumed session skips VerifyPeerCertificate, where go-spiffe authorises. There
	// is none without tickets; VerifyConnection runs for every handshake all the same, and
	// once is enough.
	cfg.SessionTicketsDisabled = true
	cfg.VerifyPeerCertificate = nil
	cfg.VerifyConnection = func(cs tls.ConnectionState) error {
		_, err := a.verify(cs.PeerCertificates)
		return err
	}
	return cfg
}

// OptionalTLS changes a server's configuration so that it asks for a certificate and
// takes none as well. What is shown proves nothing yet, but that the peer holds its key:
// Caller judges it.
func OptionalTLS(cfg *tls.Config) {
	cfg.ClientAuth = tls.RequestClientCert
	cfg.SessionTicketsDisabled = true
}

func (a *Attestor) verify(certs []*x509.Certificate) (spiffeid.ID, error) {
	id, _, err := x509svid.Verify(certs, a.cfg.X509, x509svid.WithTime(a.cfg.Now()))
	if err != nil {
		return spiffeid.ID{}, err
	}
	if certs[0].KeyUsage&x509.KeyUsageDigitalSignature == 0 {
		return spiffeid.ID{}, errors.New("the certificate is not for digital signatures")
	}
	return id, a.serves(id)
}

// A Chain is the certificates that a peer showed in its handshake, leaf first, and the
// bundle that they were last verified against.
type Chain struct {
	certs    []*x509.Certificate
	id       spiffeid.ID // zero: the leaf has none
	verified atomic.Pointer[x509bundle.Bundle]
}

// NewChain returns the chain of a handshake that has ended.
func NewChain(certs []*x509.Certificate) *Chain {
	c := &Chain{certs: certs}
	if len(certs) > 0 {
		c.id, _ = x509svid.IDFromCert(certs[0])
	}
	return c
}

// X509 proves the peer that showed a chain, now: the leaf's NotAfter, and the chain
// whenever the bundle of its trust domain is another than at the last look.
func (a *Attestor) X509(c *Chain) (broker.Caller, error) {
	if len(c.certs) == 0 {
		return broker.Caller{}, ErrNoSVID
	}
	leaf := c.certs[0]
	if a.cfg.Now().After(leaf.NotAfter) {
		return broker.Caller{}, broker.ErrSVIDExpired
	}
	if c.id.IsZero() {
		return broker.Caller{}, ErrNoSVID
	}
	bundle, err := a.cfg.X509.GetX509BundleForTrustDomain(c.id.TrustDomain())
	if err != nil {
		return broker.Caller{}, ErrNoSVID
	}
	if c.verified.Load() != bundle {
		if _, err := a.verify(c.certs); err != nil {
			return broker.Caller{}, ErrNoSVID
		}
		c.verified.Store(bundle)
	}
	return broker.Caller{ID: c.id, Leaf: leaf}, nil
}
