package verify_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"math/big"
	"net/url"
	"slices"
	"testing"
	"time"

	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/proto/vouch"
	"github.com/dayflyhq/dayfly/proto/wire"
	"github.com/dayflyhq/dayfly/sdk/verify"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

var brokerID = spiffeid.RequireFromString("spiffe://example.org/dayfly/broker")

// A signer is an authority and an SVID of it, by the clock of the bubble.
type signer struct {
	svid   *x509svid.SVID
	bundle *x509bundle.Bundle
	ca     *x509.Certificate
	caKey  *ecdsa.PrivateKey
}

func newSigner(t testing.TB) *signer {
	t.Helper()
	s := &signer{caKey: ecKey(t)}
	s.ca = certificate(t, &x509.Certificate{IsCA: true, KeyUsage: x509.KeyUsageCertSign, URIs: []*url.URL{brokerID.TrustDomain().ID().URL()}}, nil, s.caKey, s.caKey)
	s.bundle = x509bundle.FromX509Authorities(brokerID.TrustDomain(), []*x509.Certificate{s.ca})
	s.svid = s.issue(t, brokerID)
	return s
}

func (s *signer) issue(t testing.TB, id spiffeid.ID) *x509svid.SVID {
	t.Helper()
	key := ecKey(t)
	leaf := certificate(t, &x509.Certificate{KeyUsage: x509.KeyUsageDigitalSignature, URIs: []*url.URL{id.URL()}}, s.ca, key, s.caKey)
	return &x509svid.SVID{ID: id, Certificates: []*x509.Certificate{leaf}, PrivateKey: key}
}

func ecKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func certificate(t testing.TB, template, parent *x509.Certificate, key, by *ecdsa.PrivateKey) *x509.Certificate {
	t.Helper()
	template.SerialNumber, template.BasicConstraintsValid = big.NewInt(1), true
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Minute), time.Now().Add(100*time.Hour)
	if parent == nil {
		parent = template
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, by)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func (s *signer) sign(l *feed.Log, root [sha256.Size]byte, age time.Duration) feed.SignedHead {
	h, err := vouch.SignHead(s.svid, issuer, feed.HeadStatement{
		Head: l.Head(), Horizon: l.Horizon(), KeySet: feed.KeySetDigest(l.Events()), NonceRoot: root, Age: age, SignedAt: time.Now(),
	})
	if err != nil {
		panic(err)
	}
	return h
}

const remoteBound = 2 * time.Second

// newRemoteWorld is a verifier that takes nothing from its feed but what the broker
// signed. It begins with an honest relay and is ready.
func newRemoteWorld(t *testing.T) *world {
	t.Helper()
	s := newSigner(t)
	w := newWorld(t, func(c *verify.Config) {
		c.MaxStaleness, c.BrokerID, c.Bundles = remoteBound, brokerID, s.bundle
	})
	w.do(func() { w.signs = s })
	w.ready(t)
	return w
}

// within waits until cond holds, with the clock of the bubble.
func within(t *testing.T, d time.Duration, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(d); !cond(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within %v: %s", d, what)
		}
	}
}

// TestRemoteRelay: behind an honest relay on another host all is as it is elsewhere, but
// that a record counts only once it is proven.
func TestRemoteRelay(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newRemoteWorld(t)
		raw := w.good(t)
		w.want(t, raw, "")
		seq := w.revoke(t, revocation.Identity(payments))
		w.applied(t, seq) // asked at once, not at the next ping
		w.want(t, raw, verify.TokenRevoked)
		w.want(t, w.good(t), "")
		other := stranger(t)
		w.publish(t, mustPublic(t, other))
		w.applied(t, seq+1)
		c := w.claims(t)
		c.Lineage[0].Key = mustPublic(t, other).ID
		w.want(t, signWith(t, c, other), "")

		// It keeps the newest signed head and shows it to whom it follows next.
		w.net.cut()
		w.net.start(w.broker)
		w.until(t, "the next stream", func() bool { return len(w.subs) == 2 })
		shown, err := wire.ToSubscription(w.subs[1])
		if err != nil {
			t.Fatal(err)
		}
		s, err := feed.ParseHeadStatement(shown.NewestHead.Statement)
		if err != nil || s.Head != w.head() || !shown.SignedHeads {
			t.Errorf("showed %+v, %v, want %s", s, err, w.head())
		}
	})
}

func mustPublic(t testing.TB, key *ecdsa.PrivateKey) token.PublicKey {
	t.Helper()
	public, err := token.NewPublicKey(token.ES256, &key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	return public
}

// TestLyingRelay: whatever a relay on another host does, a revocation is in force one
// bound after its commit, nothing that the broker didn't say is ever believed, and once
// the relay is honest again the verifier is fresh again: it took no lie for a fork.
func TestLyingRelay(t *testing.T) {
	pong := func(f func(*dayflyv1.Pong)) func(*world, *testing.T) {
		return func(w *world, _ *testing.T) {
			w.tamper = func(m *dayflyv1.FollowResponse) {
				if m.GetPong() != nil {
					f(m.GetPong())
				}
			}
		}
	}
	events := func(f func(*dayflyv1.Events)) func(*world, *testing.T) {
		return func(w *world, _ *testing.T) {
			w.tamper = func(m *dayflyv1.FollowResponse) {
				if m.GetEvents() != nil {
					f(m.GetEvents())
				}
			}
		}
	}
	for name, lie := range map[string]func(*world, *testing.T){
		"withholds answers": func(w *world, _ *testing.T) { w.mute = true },
		"withholds records": func(w *world, _ *testing.T) { w.held = true },
		"withholds signed heads": pong(func(p *dayflyv1.Pong) {
			p.SignedHead, p.NoncePath = nil, nil
		}),
		"answers with an older head": func(w *world, _ *testing.T) {
			tree := feed.NewNonceTree([]string{"nonce-of-somebody", "nonce-of-earlier"})
			old := wire.SignedHead(w.signs.sign(&w.log, tree.Root(), 0))
			w.held = true
			w.tamper = func(m *dayflyv1.FollowResponse) {
				if p := m.GetPong(); p != nil {
					p.SignedHead, p.Head = old, wire.Position(must(feed.ParseHeadStatement(old.GetStatement())).Head)
				}
			}
		},
		"forges the age": func(w *world, _ *testing.T) {
			w.broker.signed, w.held = 2*remoteBound, true // what the broker signs; the pong beside it says 0
		},
		"lies about the head beside a signed one": func(w *world, _ *testing.T) {
			head := w.log.Head()
			w.pongHead, w.held = &head, true
		},
		"replays answers": func(w *world, _ *testing.T) {
			var first *dayflyv1.Pong
			w.held = true
			w.tamper = func(m *dayflyv1.FollowResponse) {
				if p := m.GetPong(); p != nil && first == nil {
					first = p
				} else if p != nil {
					nonce := p.GetNonce()
					*p = dayflyv1.Pong{Nonce: nonce, Head: first.GetHead(), Age: first.GetAge(), Horizon: first.GetHorizon(), SignedHead: first.GetSignedHead(), NoncePath: first.GetNoncePath(), NonceIndex: first.GetNonceIndex()}
				}
			}
		},
		"gives the proof of another's nonce": pong(func(p *dayflyv1.Pong) { p.NonceIndex = 0 }),
		"signs itself, as a workload": func(w *world, t *testing.T) {
			w.signs = &signer{svid: w.signs.issue(t, spiffeid.RequireFromString("spiffe://example.org/relay"))}
			w.held = true
		},
		"signs itself, under an authority of its own": func(w *world, t *testing.T) {
			w.signs, w.held = newSigner(t), true
		},
		"edits the statement": pong(func(p *dayflyv1.Pong) {
			s := must(feed.ParseHeadStatement(p.GetSignedHead().GetStatement()))
			s.Head = feed.Position{Era: s.Head.Era, Seq: 2, Sum: s.Head.Sum}
			s.Horizon = feed.Position{Era: s.Head.Era}
			p.SignedHead = &dayflyv1.SignedHead{Statement: s.Encode(), Signature: p.GetSignedHead().GetSignature(), Certificates: p.GetSignedHead().GetCertificates()}
		}),
		"drops a record": events(func(e *dayflyv1.Events) { e.Events = nil }),
		"drops a record and numbers the next in its place": events(func(e *dayflyv1.Events) {
			for _, x := range e.GetEvents() {
				x.Body = &dayflyv1.Event_Lift{Lift: &dayflyv1.LiftEvent{Lock: 1}}
			}
		}),
		"puts another record in its place, and chains it": func(w *world, _ *testing.T) {
			at := w.log.Head()
			w.tamper = func(m *dayflyv1.FollowResponse) {
				for _, x := range m.GetEvents().GetEvents() {
					x.Body = &dayflyv1.Event_Lift{Lift: &dayflyv1.LiftEvent{Lock: 1}}
					e := must(wire.ToEvent(x))
					at.Seq, at.Sum = e.Seq, e.Chain(at.Sum)
					x.Sum = at.Sum[:]
				}
			}
		},
		"drops a record from the snapshot": func(w *world, t *testing.T) {
			w.tamper = func(m *dayflyv1.FollowResponse) {
				if s := m.GetSnapshot(); s != nil {
					s.Events = slices.DeleteFunc(s.GetEvents(), func(e *dayflyv1.Event) bool { return e.GetRevocation() != nil })
				}
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				w := newRemoteWorld(t)
				raw := w.good(t)
				w.want(t, raw, "")
				honest := w.signs
				w.do(func() { lie(w, t) })
				if name == "drops a record from the snapshot" {
					w.revoke(t, revocation.Identity(payments))
					fresh := w.another(t)
					time.Sleep(5 * remoteBound)
					if fresh.Status().Position != (feed.Position{}) || fresh.Status().Fresh {
						t.Errorf("a new verifier is at %+v", fresh.Status())
					}
				} else {
					w.revoke(t, revocation.Identity(payments))
				}
				time.Sleep(remoteBound + 100*time.Millisecond)
				for range 40 {
					if _, err := w.verify(raw, payments); err == nil {
						t.Fatalf("accepted %v after the revocation", remoteBound)
					}
					time.Sleep(100 * time.Millisecond)
				}
				w.do(func() {
					w.tamper, w.mute, w.held, w.broker.signed, w.pongHead = nil, false, false, 0, nil
					w.signs = honest
				})
				within(t, time.Minute, "fresh again", func() bool { return w.verifier.Status().Fresh })
				w.want(t, raw, verify.TokenRevoked)
				w.want(t, w.good(t), "")
			})
		})
	}
}

func must[A any](a A, err error) A {
	if err != nil {
		panic(err)
	}
	return a
}

// another starts one more verifier on the same feed.
func (w *world) another(t *testing.T) *verify.Verifier {
	t.Helper()
	v, err := verify.New(verify.Config{
		Conn: w.conn, Audiences: []string{"orders"}, MaxStaleness: remoteBound, BrokerID: brokerID, Bundles: w.signs.bundle,
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = v.Run(ctx)
	}()
	t.Cleanup(func() { cancel(); <-ended })
	return v
}

// TestForgedKey: a relay that publishes a key of its own has it believed at no moment,
// in a snapshot or behind one.
func TestForgedKey(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newRemoteWorld(t)
		forger := stranger(t)
		public := mustPublic(t, forger)
		der, err := x509.MarshalPKIXPublicKey(public.Key)
		if err != nil {
			t.Fatal(err)
		}
		forge := func(at feed.Position) *dayflyv1.Event {
			e := feed.Event{Seq: at.Seq + 1, Key: &feed.Key{Public: public, DER: der}}
			e.Sum = e.Chain(at.Sum)
			return wire.Event(e)
		}
		w.do(func() {
			at := w.log.Head()
			w.tamper = func(m *dayflyv1.FollowResponse) {
				switch {
				case m.GetEvents() != nil:
					m.GetEvents().Events = []*dayflyv1.Event{forge(at)}
				case m.GetSnapshot().GetComplete():
					e := forge(must(wire.ToPosition(m.GetSnapshot().GetPosition())))
					m.GetSnapshot().Events = append(m.GetSnapshot().GetEvents(), e)
					m.GetSnapshot().Position = &dayflyv1.Position{Era: m.GetSnapshot().GetPosition().GetEra(), Sequence: e.GetSequence(), Sum: e.GetSum()}
				}
			}
		})
		fresh := w.another(t)
		w.revoke(t, revocation.Identity(orders)) // so that it has something to deliver
		c := w.claims(t)
		c.Lineage[0].Key = public.ID
		raw := signWith(t, c, forger)
		for range 60 {
			if _, err := w.verify(raw, payments); err == nil {
				t.Fatal("a token under a forged key is accepted")
			}
			if _, err := fresh.Verify(t.Context(), raw, verify.Peer{ID: payments}); err == nil {
				t.Fatal("a new verifier accepts a token under a forged key")
			}
			time.Sleep(100 * time.Millisecond)
		}
		if w.verifier.Status().Fresh || fresh.Status().Fresh {
			t.Error("fresh on a lie")
		}
	})
}

// TestRemoteIssuer: the issuer that a relay names must be the one that the broker signed
// for; a horizon that it names counts for nothing.
func TestRemoteIssuer(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newRemoteWorld(t)
		raw := w.good(t)
		w.do(func() {
			head := w.log.Head()
			w.tamper = func(m *dayflyv1.FollowResponse) {
				if e := m.GetEvents(); e != nil {
					e.Horizon = wire.Position(head)
				}
				if p := m.GetPong(); p != nil {
					p.Horizon = wire.Position(head)
				}
			}
		})
		w.revoke(t, revocation.Identity(orders))
		w.applied(t, 3)
		w.want(t, raw, "")

		w.do(func() { w.issuer = "https://other.example.org" })
		w.net.cut()
		w.net.start(w.broker)
		time.Sleep(3 * remoteBound)
		w.want(t, raw, verify.VerifierStale)
	})
}

// TestSignedFork: two histories that the broker itself signed close the verifier for good.
func TestSignedFork(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newRemoteWorld(t)
		seq := w.revoke(t, revocation.Identity(payments))
		w.applied(t, seq)
		other := newBroker(t)
		other.signs = w.signs
		for range 3 {
			other.revoke(t, revocation.Identity(orders))
		}
		w.net.cut()
		w.net.start(other)
		within(t, time.Minute, "closed for good", func() bool {
			_, err := w.verify(w.good(t), payments)
			return verify.ReasonOf(err) == verify.VerifierForked
		})
	})
}

func TestBrokerIDNeedsBundles(t *testing.T) {
	if _, err := verify.New(verify.Config{Audiences: []string{"orders"}, BrokerID: brokerID}); err == nil {
		t.Error("signatures that nothing can check are accepted")
	}
}

// TestRemoteProvesNothing: an answer under an old age, or under somebody else's signature,
// keeps nobody fresh, even where nothing is withheld.
func TestRemoteProvesNothing(t *testing.T) {
	for name, lie := range map[string]func(*world, *testing.T){
		"an old age": func(w *world, _ *testing.T) { w.broker.signed = 2 * remoteBound },
		"a workload's signature": func(w *world, t *testing.T) {
			w.signs = &signer{svid: w.signs.issue(t, spiffeid.RequireFromString("spiffe://example.org/relay"))}
		},
		"another authority": func(w *world, t *testing.T) { w.signs = newSigner(t) },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				w := newRemoteWorld(t)
				raw := w.good(t)
				w.do(func() { lie(w, t) })
				time.Sleep(remoteBound + 100*time.Millisecond)
				w.want(t, raw, verify.VerifierStale)
			})
		})
	}
}
