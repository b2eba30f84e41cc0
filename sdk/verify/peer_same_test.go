package verify_test

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"math/big"
	"net/url"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/sdk/verify"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"pgregory.net/rapid"
)

// TestSamePeers: whatever becomes of bundles, clocks and connections, a verifier that
// remembers chains says of each who it proves, as one does that remembers none.
func TestSamePeers(t *testing.T) {
	hits := map[bool]int{}
	m := newMint(t)
	rapid.Check(t, func(rt *rapid.T) {
		w := &peerWorld{t: t, mint: m, now: time.Unix(1_800_000_000, 0), set: x509bundle.NewSet(), hits: hits}
		w.v = must(verify.New(verify.Config{Conn: noConn{}, Audiences: []string{"orders"}, Bundles: w.set, Now: func() time.Time { return w.now }}))
		for _, td := range mintDomains {
			b := x509bundle.New(td)
			b.AddX509Authority(m.authorities[td][0])
			w.set.Add(b)
		}
		rt.Repeat(map[string]func(*rapid.T){
			"add": w.add, "remove": w.remove, "replace": w.replace, "leave": w.leave,
			"time": w.pass, "sweep": func(*rapid.T) { w.v.Sweep() },
			"": w.show,
		})
	})
	t.Logf("remembered chains that proved: %v", hits)
	if hits[true] == 0 || hits[false] == 0 {
		t.Errorf("the histories show nothing: %v", hits)
	}
}

var mintDomains = []spiffeid.TrustDomain{spiffeid.RequireTrustDomainFromString("example.org"), spiffeid.RequireTrustDomainFromString("example.com")}

// A mint has two authorities for each of two trust domains, and chains of all kinds.
type mint struct {
	t           testing.TB
	serial      int64
	authorities map[spiffeid.TrustDomain][]*x509.Certificate
	chains      [][]*x509.Certificate
}

func newMint(t testing.TB) *mint {
	m := &mint{t: t, authorities: map[spiffeid.TrustDomain][]*x509.Certificate{}}
	for _, td := range mintDomains {
		var between []*x509.Certificate
		for range 2 {
			ca, key := m.sign(td, "", true, nil, nil, time.Hour)
			short, shortKey := m.sign(td, "", true, ca, key, time.Minute)
			m.authorities[td] = append(m.authorities[td], ca)
			between = append(between, short)
			leaf, _ := m.sign(td, "/a", false, ca, key, 10*time.Minute)
			foreign, _ := m.sign(mintDomains[0], "/b", false, ca, key, 10*time.Minute)
			below, _ := m.sign(td, "/c", false, short, shortKey, 10*time.Minute)
			m.chains = append(m.chains, []*x509.Certificate{leaf}, []*x509.Certificate{foreign}, []*x509.Certificate{below, short}, []*x509.Certificate{below}, []*x509.Certificate{ca})
			m.chains = append(m.chains, []*x509.Certificate{below, between[0]}, []*x509.Certificate{leaf, short})
		}
	}
	return m
}

// sign makes a certificate that is valid for a life, and was for half of one.
func (m *mint) sign(td spiffeid.TrustDomain, path string, ca bool, parent *x509.Certificate, by *ecdsa.PrivateKey, life time.Duration) (*x509.Certificate, *ecdsa.PrivateKey) {
	m.serial++
	now := time.Unix(1_800_000_000, 0)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(m.serial), NotBefore: now.Add(-life / 2), NotAfter: now.Add(life),
		IsCA: ca, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature,
		URIs: []*url.URL{must(url.Parse("spiffe://" + td.Name() + path))},
	}
	if ca {
		template.KeyUsage = x509.KeyUsageCertSign
	}
	key := ecKey(m.t)
	if parent == nil {
		parent, by = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, by)
	if err != nil {
		m.t.Fatal(err)
	}
	return must(x509.ParseCertificate(der)), key
}

type peerWorld struct {
	t    testing.TB
	mint *mint
	v    *verify.Verifier
	now  time.Time
	set  *x509bundle.Set
	hits map[bool]int
}

func (w *peerWorld) bundle(t *rapid.T) (spiffeid.TrustDomain, *x509bundle.Bundle, *x509.Certificate) {
	td := rapid.SampledFrom(mintDomains).Draw(t, "trust domain")
	b, ok := w.set.Get(td)
	if !ok {
		b = x509bundle.New(td)
		w.set.Add(b)
	}
	return td, b, rapid.SampledFrom(w.mint.authorities[td]).Draw(t, "authority")
}

// add and remove change a bundle that is in use, in place.
func (w *peerWorld) add(t *rapid.T) {
	_, b, ca := w.bundle(t)
	b.AddX509Authority(ca)
}

func (w *peerWorld) remove(t *rapid.T) {
	_, b, ca := w.bundle(t)
	b.RemoveX509Authority(ca)
}

func (w *peerWorld) replace(t *rapid.T) {
	td, _, ca := w.bundle(t)
	w.set.Add(x509bundle.FromX509Authorities(td, []*x509.Certificate{ca}))
}

func (w *peerWorld) leave(t *rapid.T) {
	if usually(t, "leaves", false, true) {
		w.set.Remove(rapid.SampledFrom(mintDomains).Draw(t, "trust domain"))
	}
}

func (w *peerWorld) pass(t *rapid.T) {
	w.now = w.now.Add(time.Duration(usually(t, "seconds", 1, 59, 60, 61, -45, -121, 600)) * time.Second)
}

// show shows a chain to the verifier, and to one that has never seen any.
func (w *peerWorld) show(t *rapid.T) {
	chain := rapid.SampledFrom(w.mint.chains).Draw(t, "chain")
	if usually(t, "connection", "known", "new") == "new" { // each parses for itself
		var parsed []*x509.Certificate
		for _, c := range chain {
			parsed = append(parsed, must(x509.ParseCertificate(c.Raw)))
		}
		chain = parsed
	}
	state := &tls.ConnectionState{PeerCertificates: chain}
	remembered := w.v.RemembersChain(chain[0])
	got := w.v.PeerOf(state, "192.0.2.1:443")
	want := verify.PeerOf(state, w.set, "192.0.2.1:443", w.now)
	if got != want {
		t.Fatalf("remembered %t: got %+v, want %+v", remembered, got, want)
	}
	if remembered {
		w.hits[!got.ID.IsZero()]++
	} else if got.ID.IsZero() && w.v.RemembersChain(chain[0]) {
		t.Fatal("what proves nothing is remembered")
	}
}

// TestChainsAreBounded: as many identities as there may be, and one more.
func TestChainsAreBounded(t *testing.T) {
	m := &mint{t: t}
	td := mintDomains[0]
	ca, key := m.sign(td, "", true, nil, nil, time.Hour)
	stranger, strangersKey := m.sign(td, "", true, nil, nil, time.Hour)
	now := time.Unix(1_800_000_000, 0)
	v := must(verify.New(verify.Config{
		Conn: noConn{}, Audiences: []string{"orders"}, Bundles: x509bundle.FromX509Authorities(td, []*x509.Certificate{ca}), Now: func() time.Time { return now },
	}))
	show := func(by *x509.Certificate, byKey *ecdsa.PrivateKey, i int) verify.Peer {
		leaf, _ := m.sign(td, fmt.Sprintf("/%d", i), false, by, byKey, time.Minute)
		return v.PeerOf(&tls.ConnectionState{PeerCertificates: []*x509.Certificate{leaf}}, "")
	}
	for i := range 100 {
		if show(stranger, strangersKey, i).Certificate != nil || v.Chains() != 0 {
			t.Fatal("a stranger's chain is believed, or remembered")
		}
	}
	// Nobody vouches for what stands beside the authority's own.
	padded, _ := m.sign(td, "/padded", false, ca, key, time.Minute)
	all := []*x509.Certificate{padded}
	for len(all) < 100 {
		all = append(all, stranger)
	}
	if v.PeerOf(&tls.ConnectionState{PeerCertificates: all}, "").ID.IsZero() || v.Chains() != 0 {
		t.Errorf("a chain with much beside it isn't believed, or is among the %d that are remembered", v.Chains())
	}
	for i := range verify.MaxChains + 10 {
		if show(ca, key, i).ID.IsZero() {
			t.Fatal("not believed")
		}
	}
	if n := v.Chains(); n != verify.MaxChains {
		t.Errorf("%d are remembered, at most %d", n, verify.MaxChains)
	}
	now = now.Add(time.Minute)
	if v.Sweep(); v.Chains() != verify.MaxChains {
		t.Error("forgotten in their last second")
	}
	now = now.Add(time.Second)
	if v.Sweep(); v.Chains() != 0 {
		t.Errorf("%d are remembered after they have expired", v.Chains())
	}
}
