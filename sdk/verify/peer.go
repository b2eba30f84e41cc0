package verify

import (
	"crypto/tls"
	"crypto/x509"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// PeerOf returns who is at the other end of a TLS connection: its certificate is
// verified against bundles now, not as of the handshake, because a connection outlives
// an SVID and may be a resumed one. With nil bundles only a chain that crypto/tls has
// verified counts. A peer that has proven nothing is the zero Peer but for its address,
// and may present bearer tokens. address may have a port.
func PeerOf(state *tls.ConnectionState, bundles x509bundle.Source, address string, now time.Time) Peer {
	return new(peers).of(state, bundles, address, now)
}

// PeerOf is the function PeerOf with the verifier's bundles, now. The signatures of a
// chain are checked once, and not at each call: again when the authorities of its trust
// domain are others.
func (v *Verifier) PeerOf(state *tls.ConnectionState, address string) Peer {
	return v.peers.of(state, v.cfg.Bundles, address, v.cfg.Now())
}

const (
	// maxChains bounds the chains that are remembered, of some 4 KiB for each certificate.
	maxChains = 1024
	// maxChain bounds what is shown in one of them: a peer may put certificates beside its
	// chain for which nobody vouches, a quarter of a megabyte of them.
	maxChain = 8
	// maxChainBytes is the same for those that are large.
	maxChainBytes = 32 << 10
)

// peers remembers the chains whose signatures hold: all that it takes to say the same of
// one again. Only what a bundle's authority has signed enters.
type peers struct {
	mu     sync.RWMutex
	chains map[string]*chain // by the bytes of the leaf
}

type chain struct {
	id          spiffeid.ID
	certs       []*x509.Certificate // as shown
	authorities []*x509.Certificate // of the trust domain, whole
	from, until time.Time           // when all of the chain is valid
}

func (p *peers) of(state *tls.ConnectionState, bundles x509bundle.Source, address string, now time.Time) Peer {
	peer := Peer{Address: withoutPort(address)}
	if state == nil || len(state.PeerCertificates) == 0 {
		return peer
	}
	leaf := state.PeerCertificates[0]
	if now.After(leaf.NotAfter) || now.Before(leaf.NotBefore) {
		return peer
	}
	if bundles != nil {
		if id, err := p.verify(state.PeerCertificates, bundles, now); err == nil {
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

// verify is x509svid.Verify, but for signatures that were checked before.
func (p *peers) verify(certs []*x509.Certificate, bundles x509bundle.Source, now time.Time) (spiffeid.ID, error) {
	id, err := x509svid.IDFromCert(certs[0])
	if err != nil {
		return spiffeid.ID{}, err
	}
	bundle, err := bundles.GetX509BundleForTrustDomain(id.TrustDomain())
	if err != nil {
		return spiffeid.ID{}, err
	}
	authorities := bundle.X509Authorities()
	if c := p.get(certs[0].Raw); c != nil && c.id == id && c.holds(certs, authorities, now) {
		return id, nil
	}
	// Of these authorities, whatever the bundle has meanwhile.
	these := x509bundle.FromX509Authorities(id.TrustDomain(), authorities)
	_, chains, err := x509svid.Verify(certs, these, x509svid.WithTime(now))
	if err != nil {
		return spiffeid.ID{}, err
	}
	if large(certs) {
		return id, nil
	}
	c := &chain{id: id, certs: slices.Clone(certs), authorities: authorities, from: certs[0].NotBefore, until: certs[0].NotAfter}
	for _, cert := range chains[0] {
		if cert.NotBefore.After(c.from) {
			c.from = cert.NotBefore
		}
		if cert.NotAfter.Before(c.until) {
			c.until = cert.NotAfter
		}
	}
	p.put(c)
	return id, nil
}

// large says whether a chain isn't worth its memory.
func large(certs []*x509.Certificate) bool {
	n := 0
	for _, c := range certs {
		n += len(c.Raw)
	}
	return len(certs) > maxChain || n > maxChainBytes
}

// holds reports whether what was found once must be found again.
func (c *chain) holds(certs, authorities []*x509.Certificate, now time.Time) bool {
	same := (*x509.Certificate).Equal // all of their bytes
	return !now.Before(c.from) && !now.After(c.until) &&
		slices.EqualFunc(c.certs, certs, same) && slices.EqualFunc(c.authorities, authorities, same)
}

func (p *peers) get(leaf []byte) *chain {
	p.mu.RLock()
	defer p.mu.RUnlock()
	return p.chains[string(leaf)]
}

// put remembers a chain, in the place of any other where there is no room.
func (p *peers) put(c *chain) {
	p.mu.Lock()
	defer p.mu.Unlock()
	leaf := string(c.certs[0].Raw)
	if p.chains == nil {
		p.chains = map[string]*chain{}
	}
	if _, known := p.chains[leaf]; !known && len(p.chains) == maxChains {
		for any := range p.chains {
			delete(p.chains, any)
			break
		}
	}
	p.chains[leaf] = c
}

// sweep forgets what has expired. It is called with every ping.
func (p *peers) sweep(now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for leaf, c := range p.chains {
		if now.After(c.until) {
			delete(p.chains, leaf)
		}
	}
}

func withoutPort(address string) string {
	if host, _, err := net.SplitHostPort(address); err == nil {
		return host
	}
	return address
}
