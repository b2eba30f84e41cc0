package verify_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/proto/wire"
	"github.com/dayflyhq/dayfly/sdk/verify"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"
)

func bubble(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	synctest.Test(t, f)
}

func TestAccepts(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.ready(t)
		raw := w.good(t)
		got, err := w.verify(raw, payments)
		if err != nil {
			t.Fatal(err)
		}
		if got.Presenter() != payments || !got.HasScope("orders:read") || got.HasScope("orders") || got.Token.Reveal() != raw {
			t.Errorf("got %+v", got.Claims)
		}
		if err := got.RequireScope("orders:read", "orders:delete"); verify.ReasonOf(err) != verify.ScopeMissing {
			t.Errorf("RequireScope: got %v", err)
		}
	})
}

func stranger(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func TestRefusals(t *testing.T) {
	cert := &x509.Certificate{Raw: []byte("a certificate")}
	tests := []struct {
		name   string
		change func(*token.Claims)
		raw    func(t testing.TB, b *broker, good string) string
		peer   verify.Peer
		want   verify.Reason
	}{
		{name: "good", want: ""},
		{name: "empty", raw: func(testing.TB, *broker, string) string { return "" }, want: verify.TokenMalformed},
		{name: "huge", raw: func(testing.TB, *broker, string) string { return strings.Repeat("a", 1<<20) }, want: verify.TokenMalformed},
		{name: "alg none", raw: func(_ testing.TB, b *broker, good string) string {
			return encode(`{"alg":"none","kid":"`+b.public.ID.String()+`","typ":"at+jwt"}`) + good[strings.IndexByte(good, '.'):]
		}, want: verify.TokenMalformed},
		{name: "HS256", raw: func(_ testing.TB, b *broker, good string) string {
			return encode(`{"alg":"HS256","kid":"`+b.public.ID.String()+`","typ":"at+jwt"}`) + good[strings.IndexByte(good, '.'):]
		}, want: verify.TokenMalformed},
		{name: "jku", raw: func(_ testing.TB, b *broker, good string) string {
			return encode(`{"alg":"ES256","kid":"`+b.public.ID.String()+`","typ":"at+jwt","jku":"https://evil"}`) + good[strings.IndexByte(good, '.'):]
		}, want: verify.TokenMalformed},
		{name: "tampered", raw: func(t testing.TB, b *broker, good string) string {
			parts := strings.Split(good, ".")
			payload, _ := base64.RawURLEncoding.DecodeString(parts[1])
			parts[1] = encode(strings.Replace(string(payload), "orders:read", "orders:root", 1))
			return strings.Join(parts, ".")
		}, want: verify.SignatureInvalid},
		{name: "unknown dfy field, signed by the broker", raw: func(t testing.TB, b *broker, good string) string {
			payload, _ := base64.RawURLEncoding.DecodeString(strings.Split(good, ".")[1])
			return resign(t, b.key, good, strings.Replace(string(payload), `"dfy":{`, `"dfy":{"admin":true,`, 1))
		}, want: verify.TokenMalformed},
		{name: "signed by a stranger", raw: func(t testing.TB, b *broker, _ string) string {
			return signWith(t, b.claims(t), stranger(t)) // with the broker's kid
		}, want: verify.SignatureInvalid},
		{name: "expired", change: func(c *token.Claims) {
			c.IssuedAt, c.NotBefore, c.Expires = c.IssuedAt.Add(-time.Minute), c.NotBefore.Add(-time.Minute), c.IssuedAt.Add(-30*time.Second)
		}, want: verify.TokenExpired},
		{name: "expired within the leeway", change: func(c *token.Claims) {
			c.IssuedAt, c.NotBefore, c.Expires = c.IssuedAt.Add(-time.Minute), c.NotBefore.Add(-time.Minute), c.IssuedAt.Add(-29*time.Second)
		}, want: ""},
		{name: "not yet valid", change: func(c *token.Claims) { c.NotBefore = c.NotBefore.Add(31 * time.Second) }, want: verify.TokenNotYetValid},
		{name: "valid within the leeway", change: func(c *token.Claims) { c.NotBefore = c.NotBefore.Add(30 * time.Second) }, want: ""},
		{name: "longer than the largest life", change: func(c *token.Claims) { c.Expires = c.IssuedAt.Add(31 * time.Minute) }, want: verify.TokenTooLong},
		{name: "another issuer", change: func(c *token.Claims) { c.Issuer = "https://other.example.org" }, want: verify.IssuerMismatch},
		{name: "another audience", change: func(c *token.Claims) { c.Audience = "ledger" }, want: verify.AudienceMismatch},
		{name: "second audience name", change: func(c *token.Claims) { c.Audience = "spiffe://example.org/orders" }, want: ""},
		{name: "stolen", peer: verify.Peer{ID: thief}, want: verify.PresenterMismatch},
		{name: "nobody", peer: verify.Peer{Address: "192.0.2.1"}, want: verify.PresenterMismatch},
		{name: "bearer", change: func(c *token.Claims) { c.Binding = token.BindingNone }, peer: verify.Peer{Address: "192.0.2.1"}, want: ""},
		{name: "bound to the certificate", change: boundTo(cert), peer: verify.Peer{ID: payments, Certificate: cert}, want: ""},
		{name: "bound to another certificate", change: boundTo(cert), peer: verify.Peer{ID: payments, Certificate: &x509.Certificate{Raw: []byte("rotated")}}, want: verify.CertificateMismatch},
		{name: "bound to a certificate, none shown", change: boundTo(cert), peer: verify.Peer{ID: payments}, want: verify.CertificateMismatch},
		{name: "derived, presented by the actor", change: derived, peer: verify.Peer{ID: orders}, want: ""},
		{name: "derived, presented by the root", change: derived, want: verify.PresenterMismatch},
		{name: "earlier era", change: func(c *token.Claims) { c.Position.Era-- }, want: verify.WrongEra},
		{name: "later era", change: func(c *token.Claims) { c.Position.Era++ }, want: verify.Ahead},
		{name: "off the log", change: func(c *token.Claims) { c.Position.Sum[0] ^= 1 }, want: verify.OffLog},
		{name: "ahead", change: func(c *token.Claims) { c.Position.Rev = 1 << 60 }, want: verify.Ahead},
		{name: "below the horizon", change: func(c *token.Claims) { c.Position.Rev = 0; c.Position.Sum = [8]byte{} }, want: verify.BelowHorizon},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				w := newWorld(t, nil)
				w.ready(t)
				c := w.claims(t)
				if tt.change != nil {
					tt.change(c)
				}
				raw := w.sign(t, c)
				if tt.raw != nil {
					raw = tt.raw(t, w.broker, raw)
				}
				if tt.peer == (verify.Peer{}) {
					tt.peer = verify.Peer{ID: payments}
				}
				_, err := w.verifier.Verify(t.Context(), raw, tt.peer)
				if got := verify.ReasonOf(err); got != tt.want || got == "" && err != nil {
					t.Errorf("got %v, want %q", err, tt.want)
				}
				var refusal *verify.Refusal
				if err != nil && (!errors.As(err, &refusal) || refusal.Message == "" || refusal.Hint == "") {
					t.Errorf("refusal without words: %#v", err)
				}
			})
		})
	}
}

// resign gives a token another payload, whatever it says.
func resign(t testing.TB, key *ecdsa.PrivateKey, like, payload string) string {
	t.Helper()
	input := like[:strings.IndexByte(like, '.')+1] + encode(payload)
	digest := sha256.Sum256([]byte(input))
	r, s, err := ecdsa.Sign(rand.Reader, key, digest[:])
	if err != nil {
		t.Fatal(err)
	}
	return input + "." + encode(string(r.FillBytes(make([]byte, 32)))+string(s.FillBytes(make([]byte, 32))))
}

func encode(s string) string { return base64.RawURLEncoding.EncodeToString([]byte(s)) }

func boundTo(cert *x509.Certificate) func(*token.Claims) {
	return func(c *token.Claims) {
		c.Binding, c.Certificate = token.BindingX5T, sha256.Sum256(cert.Raw)
	}
}

func derived(c *token.Claims) {
	grant, err := token.NewGrantID(orders, c.IssuedAt, rand.Reader)
	if err != nil {
		panic(err)
	}
	c.Lineage = append(c.Lineage, token.Member{Identity: orders, Grant: grant, Key: c.Lineage[0].Key})
}

func TestRevocation(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.ready(t)
		root, child := w.claims(t), w.claims(t)
		child.Lineage = root.Lineage
		derived(child)
		rawRoot, rawChild, other := w.sign(t, root), w.sign(t, child), w.good(t)
		w.want(t, rawRoot, "")

		seq := w.revoke(t, revocation.Grant(root.Grant()))
		w.applied(t, seq)
		w.want(t, rawRoot, verify.TokenRevoked)
		if _, err := w.verify(rawChild, orders); verify.ReasonOf(err) != verify.TokenRevoked {
			t.Errorf("derived: got %v", err)
		}
		w.want(t, other, "")
		var r *verify.Refusal
		if _, err := w.verify(rawRoot, payments); !errors.As(err, &r) || r.By != seq {
			t.Errorf("got %#v, want it to name revocation %d", err, seq)
		}

		w.applied(t, w.revoke(t, revocation.Identity(payments)))
		w.want(t, other, verify.TokenRevoked)
		w.want(t, w.good(t), "") // issued with knowledge of it

		w.applied(t, w.revoke(t, revocation.Key(w.public.ID)))
		late := w.claims(t)
		w.want(t, w.sign(t, late), verify.KeyRevoked)
	})
}

// TestStale is promise 3 at the verifier: cut off, it accepts up to its bound and
// nothing after it; connected again, it recovers.
func TestStale(t *testing.T) {
	bubble(t, func(t *testing.T) {
		const bound = 2 * time.Second
		w := newWorld(t, func(c *verify.Config) { c.MaxStaleness = bound })
		w.ready(t)
		raw := w.good(t)
		w.net.cut()
		cut := time.Now()
		w.revoke(t, revocation.Identity(payments))
		for time.Since(cut) < 10*time.Second {
			_, err := w.verify(raw, payments)
			switch got := verify.ReasonOf(err); {
			case err == nil && time.Since(cut) > bound:
				t.Fatalf("accepted %v after the cut", time.Since(cut))
			case err != nil && got != verify.VerifierStale:
				t.Fatalf("got %v", err)
			case err != nil && time.Since(cut) < bound-bound/feed.PingsPerBound:
				t.Fatalf("stale only %v after the cut: %v", time.Since(cut), err)
			}
			time.Sleep(50 * time.Millisecond)
		}
		w.net.start(w.broker)
		w.ready(t)
		w.want(t, raw, verify.TokenRevoked)
		w.want(t, w.good(t), "")
	})
}

// A connection that stays open proves nothing: only answered pings do, and only as of
// when they were sent, less the age of the answer.
func TestStaleWithoutAnswers(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.ready(t)
		raw := w.good(t)
		w.do(func() { w.mute = true })
		time.Sleep(verify.DefaultMaxStaleness + time.Second)
		w.want(t, raw, verify.VerifierStale)
		w.do(func() { w.mute, w.age = false, verify.DefaultMaxStaleness+time.Second })
		time.Sleep(20 * time.Second) // pings go on, but every answer is too old
		w.want(t, raw, verify.VerifierStale)
		w.do(func() { w.age = time.Second })
		w.ready(t)
		if age := w.verifier.Status().Age; age < time.Second {
			t.Errorf("fresh as of %v ago, want the age of the answer added", age)
		}
	})
}

// An answer whose head is not applied yet proves nothing (A6).
func TestAnswerOvertakesEvents(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.ready(t)
		raw := w.good(t)
		w.do(func() { w.held = true })
		w.revoke(t, revocation.Identity(payments))
		time.Sleep(verify.DefaultMaxStaleness + time.Second)
		w.want(t, raw, verify.VerifierStale)
		w.do(func() { w.held = false })
		synctest.Wait()
		w.want(t, raw, verify.TokenRevoked)
	})
}

func TestOnStaleAccept(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, func(c *verify.Config) { c.OnStale = verify.Accept })
		w.want(t, "x", verify.VerifierStale) // knows no key at all
		w.ready(t)
		raw := w.good(t)
		w.net.cut()
		time.Sleep(2 * verify.DefaultMaxStaleness)
		w.want(t, raw, "")
		if w.verifier.Status().Fresh {
			t.Error("says that it is fresh")
		}
		w.until(t, "a subscription", func() bool { return w.subs[0].GetOnStale() == dayflyv1.OnStale_ON_STALE_ACCEPT })
	})
}

func TestWelcomeLowersTheBound(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.do(func() { w.bound = 3 * time.Second })
		w.net.cut()
		w.net.start(w.broker)
		time.Sleep(time.Minute)
		w.ready(t)
		if got := w.verifier.Status().Bound; got != 3*time.Second {
			t.Fatalf("bound %v, want the feed's", got)
		}
		raw := w.good(t)
		w.do(func() { w.mute = true })
		time.Sleep(3*time.Second + time.Millisecond)
		w.want(t, raw, verify.VerifierStale)
	})
}

func TestFork(t *testing.T) {
	tests := map[string]func(w *world){
		"another hash at the same number": func(w *world) {
			w.do(func() {
				p := w.log.Head()
				p.Sum[0] ^= 1
				w.pongHead = &p
			})
		},
		"records lost": func(w *world) {
			p := w.head()
			p.Seq--
			w.do(func() { w.pongHead = &p })
		},
	}
	for name, fork := range tests {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				var log bytes.Buffer
				w := newWorld(t, func(c *verify.Config) {
					c.OnStale = verify.Accept // even then
					c.Log = slog.New(slog.NewTextHandler(&log, nil))
				})
				w.applied(t, 2)
				w.ready(t)
				raw := w.good(t)
				fork(w)
				time.Sleep(time.Minute)
				w.want(t, raw, verify.VerifierForked)
				w.do(func() { w.pongHead = nil })
				time.Sleep(time.Minute)
				w.want(t, raw, verify.VerifierForked) // however long nothing more is wrong
				if err := w.verifier.Status().Err; !errors.Is(err, feed.ErrFork) {
					t.Errorf("status: %v", err)
				}
				w.append(t, feed.Event{Era: &feed.Era{Era: 0x2000}}) // the store was restored
				w.publish(t, w.public)
				time.Sleep(2 * time.Minute)
				w.ready(t)
				w.want(t, raw, verify.WrongEra)
				w.want(t, w.good(t), "")
				w.cancel()
				<-w.ended
				if !strings.Contains(log.String(), "level=ERROR") {
					t.Errorf("no loud line in the log:\n%s", &log)
				}
			})
		})
	}
}

func TestIssuerOfTheFeed(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, func(c *verify.Config) { c.Issuer = "https://ours.example.org" })
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		err := w.verifier.WaitReady(ctx)
		if err == nil || !strings.Contains(err.Error(), "another issuer") {
			t.Errorf("got %v", err)
		}
	})
}

// A key that was published a moment ago is asked for at once; strangers' keys cost the
// broker no more than the rate.
func TestUnknownKeyAsksOnce(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.ready(t)
		key := stranger(t)
		public, err := token.NewPublicKey(token.ES256, &key.PublicKey)
		if err != nil {
			t.Fatal(err)
		}
		c := w.claims(t)
		c.Lineage[0].Key = public.ID
		raw := signWith(t, c, key)
		synctest.Wait()

		var before, after int
		w.do(func() { before = w.pings })
		w.want(t, raw, verify.KeyUnknown)
		w.do(func() { after = w.pings })
		if after != before+1 {
			t.Errorf("%d pings for an unknown key, want 1", after-before)
		}

		// Published, but its event is still under way: the question brings it.
		w.do(func() { w.held = true })
		w.publish(t, public)
		synctest.Wait()
		go func() {
			time.Sleep(100 * time.Millisecond)
			w.do(func() { w.held = false })
		}()
		w.want(t, raw, "")

		// 200 requests with made-up keys, in one go.
		began := time.Now()
		w.do(func() { before = w.pings })
		done := make(chan error)
		for range 200 {
			junk := w.claims(t)
			k := stranger(t)
			pub, _ := token.NewPublicKey(token.ES256, &k.PublicKey)
			junk.Lineage[0].Key = pub.ID
			raw := signWith(t, junk, k)
			go func() {
				_, err := w.verify(raw, payments)
				done <- err
			}()
		}
		for range 200 {
			if err := <-done; verify.ReasonOf(err) != verify.KeyUnknown {
				t.Errorf("got %v", err)
			}
		}
		w.do(func() { after = w.pings })
		if most := 3 + int(time.Since(began)/(50*time.Millisecond)); after-before > most {
			t.Errorf("%d pings for 200 strangers within %v", after-before, time.Since(began))
		}
	})
}

// A token whose position is above the head is held for one ping: the answer shows
// whether the log gets there.
func TestAheadIsHeldForOnePing(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.ready(t)
		synctest.Wait()
		w.do(func() { w.held = true })
		w.revoke(t, revocation.Identity(thief))
		raw := w.good(t) // issued at a head that the verifier doesn't have
		synctest.Wait()
		go func() {
			time.Sleep(time.Second)
			w.do(func() { w.held = false })
		}()
		began := time.Now()
		w.want(t, raw, "")
		if held := time.Since(began); held < time.Second {
			t.Errorf("judged after %v, before the record came", held)
		}

		forged := w.claims(t)
		forged.Position.Rev += 1000
		var before, after int
		w.do(func() { before = w.pings })
		w.want(t, w.sign(t, forged), verify.Ahead)
		w.do(func() { after = w.pings })
		if after != before+1 {
			t.Errorf("%d pings, want 1", after-before)
		}
	})
}

// Cut off, the wait for an answer is bounded.
func TestAskIsBounded(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.ready(t)
		c := w.claims(t)
		c.Position.Rev += 1000
		raw := w.sign(t, c)
		w.net.cut()
		began := time.Now()
		w.want(t, raw, verify.Ahead)
		if took := time.Since(began); took > 2*time.Second {
			t.Errorf("held for %v", took)
		}
	})
}

// An acknowledgement means that what it names is refused from then on (A7).
func TestAcknowledgesAfterApplying(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.ready(t)
		for range 50 {
			c := w.claims(t)
			raw := w.sign(t, c)
			w.want(t, raw, "")
			w.applied(t, w.revoke(t, revocation.Grant(c.Grant())))
			w.want(t, raw, verify.TokenRevoked)
		}
		w.do(func() {
			for i, p := range w.acks {
				if i > 0 && p.Compare(w.acks[i-1]) <= 0 {
					t.Errorf("acknowledged %s after %s", p, w.acks[i-1])
				}
			}
		})
	})
}

// Half a snapshot is nothing: it is neither acknowledged nor judged by.
func TestHalfASnapshot(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.net.cut()
		for range 9 {
			w.revoke(t, revocation.Identity(thief))
		}
		w.do(func() {
			w.acks = nil
			w.tamper = func(m *dayflyv1.FollowResponse) {
				if s := m.GetSnapshot(); s != nil {
					s.Complete = false
				}
			}
		})
		w.net.start(w.broker)
		time.Sleep(time.Minute)
		w.want(t, w.good(t), verify.VerifierStale)
		w.do(func() {
			if len(w.acks) > 0 {
				t.Errorf("acknowledged %v", w.acks)
			}
			w.tamper = nil
		})
		w.net.cut()
		w.net.start(w.broker)
		w.ready(t)
		w.want(t, w.good(t), "")
	})
}

func TestReconnects(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.ready(t)
		synctest.Wait()
		w.net.cut()
		known := w.head()
		w.applied(t, known.Seq)
		raw := w.good(t)
		seq := w.revoke(t, revocation.Identity(payments))
		w.net.start(w.broker)
		w.applied(t, seq)
		w.want(t, raw, verify.TokenRevoked)
		w.do(func() {
			if len(w.subs) != 2 || w.subs[0].GetInstance() != w.subs[1].GetInstance() {
				t.Fatalf("subscriptions %v", w.subs)
			}
			if p := w.subs[1].GetPosition(); p.GetSequence() != known.Seq {
				t.Errorf("resubscribed at %v, want %s", p, known)
			}
		})
		// Within the default bound, so the verifier was never stale.
		w.want(t, w.good(t), "")
	})
}

// A feed that skips records is asked again from where the verifier stands.
func TestGap(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.ready(t)
		synctest.Wait()
		lost := false
		w.do(func() {
			w.tamper = func(m *dayflyv1.FollowResponse) {
				if e := m.GetEvents(); e != nil && len(e.Events) > 0 && !lost {
					lost = true
					e.Events = e.Events[1:]
					e.Horizon.Era = "00001000"
				}
			}
		})
		raw := w.good(t)
		w.revoke(t, revocation.Identity(thief))
		seq := w.revoke(t, revocation.Identity(payments))
		w.applied(t, seq)
		w.want(t, raw, verify.TokenRevoked)
	})
}

// What a feed sends that makes no sense ends the stream and changes nothing.
func TestMalformedFeed(t *testing.T) {
	tests := map[string]func(*dayflyv1.FollowResponse){
		"no welcome":     func(m *dayflyv1.FollowResponse) { m.Message = nil },
		"no bound":       func(m *dayflyv1.FollowResponse) { m.GetWelcome().MaxStaleness = nil },
		"negative bound": func(m *dayflyv1.FollowResponse) { m.GetWelcome().MaxStaleness = durationpb.New(-1) },
		"no issuer":      func(m *dayflyv1.FollowResponse) { m.GetWelcome().Issuer = "" },
		"negative life":  func(m *dayflyv1.FollowResponse) { m.GetWelcome().MaxTokenTtl = durationpb.New(-1) },
	}
	for name, tamper := range tests {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				w := newWorld(t, nil)
				w.net.cut()
				w.do(func() {
					w.tamper = func(m *dayflyv1.FollowResponse) {
						if m.GetWelcome() != nil {
							tamper(m)
						}
					}
				})
				w.net.start(w.broker)
				ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
				defer cancel()
				if err := w.verifier.WaitReady(ctx); err == nil || !strings.Contains(err.Error(), "protocol") {
					t.Errorf("got %v", err)
				}
				w.do(func() { w.tamper = nil })
				w.ready(t)
			})
		})
	}
}

func TestUseReports(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.ready(t)
		c := w.claims(t)
		raw := w.sign(t, c)
		for range 3 {
			w.want(t, raw, "")
		}
		if _, err := w.verify(raw, thief); err == nil {
			t.Fatal("stolen token accepted")
		}
		w.want(t, signWith(t, w.claims(t), stranger(t)), verify.SignatureInvalid) // says nothing of a grant
		w.until(t, "a report", func() bool { return len(w.uses) >= 2 })
		time.Sleep(time.Minute)
		w.do(func() {
			if len(w.uses) != 2 {
				t.Fatalf("got %v", w.uses)
			}
			for _, u := range w.uses {
				if u.GetGrant() != c.Grant().String() || u.GetPeerAddress() != "192.0.2.1" || u.GetHead() != 2 || u.GetEra() != "00001000" {
					t.Errorf("got %v", u)
				}
				if parsed, err := token.Inspect(raw); err != nil || !bytes.Equal(u.GetFingerprint(), parsed.Fingerprint[:]) {
					t.Errorf("fingerprint %x, %v", u.GetFingerprint(), err)
				}
				if err := wire.CheckUse(u); err != nil {
					t.Errorf("a broker won't take it: %v", err)
				}
				switch u.GetPeerIdentity() {
				case payments.String():
					if !u.GetAccepted() || u.GetCount() != 3 || u.GetRefusalReason() != "" {
						t.Errorf("got %v", u)
					}
				case thief.String():
					if u.GetAccepted() || u.GetCount() != 1 || u.GetRefusalReason() != string(verify.PresenterMismatch) {
						t.Errorf("got %v", u)
					}
				default:
					t.Errorf("got %v", u)
				}
			}
		})
	})
}

// Memory is bounded, and what was dropped is said; nothing is lost with a stream.
func TestUseReportsAreBounded(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.ready(t)
		w.net.cut()
		c := w.claims(t)
		raw := w.sign(t, c)
		const peers = 1000 // all of one grant: one shard
		for i := range peers {
			_, err := w.verifier.Verify(t.Context(), raw, verify.Peer{ID: payments, Address: fmt.Sprintf("192.0.2.%d", i)})
			if err != nil {
				t.Fatal(err)
			}
		}
		w.net.start(w.broker)
		w.until(t, "all uses", func() bool {
			total := w.dropped
			for _, u := range w.uses {
				total += u.GetCount()
			}
			return total == peers
		})
		w.do(func() {
			if w.dropped == 0 || len(w.uses) == 0 {
				t.Errorf("%d dropped, %d reported", w.dropped, len(w.uses))
			}
		})
	})
}

// What a stream did not take is reported on the next one.
func TestUseReportsSurviveAStream(t *testing.T) {
	bubble(t, func(t *testing.T) {
		failing := &failingConn{fail: 1}
		w := newWorld(t, func(c *verify.Config) {
			failing.ClientConnInterface = c.Conn
			c.Conn = failing
		})
		w.ready(t)
		w.want(t, w.good(t), "")
		w.until(t, "the report", func() bool { return len(w.uses) == 1 && w.uses[0].GetCount() == 1 })
		w.do(func() {
			if len(w.subs) != 2 {
				t.Errorf("%d streams, want a second one", len(w.subs))
			}
		})
	})
}

// A report that arrived, but whose stream broke before the verifier could know, comes
// again under its own number; one that was answered for doesn't.
func TestUseReportsAreNumbered(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.ready(t)
		w.want(t, w.good(t), "")
		w.until(t, "the first report", func() bool { return len(w.uses) == 1 })
		w.applied(t, w.head().Seq)
		time.Sleep(10 * time.Second) // two pings: it was answered for
		w.do(func() { w.mute = true })
		w.want(t, w.good(t), "")
		if _, err := w.verify(w.good(t), thief); err == nil { // makes it urgent
			t.Fatal("stolen token accepted")
		}
		w.until(t, "the second report", func() bool { return len(w.uses) == 3 })
		w.net.cut()
		w.do(func() { w.mute = false })
		w.net.start(w.broker)
		w.until(t, "it again", func() bool { return w.reports[2] == 2 })
		w.ready(t)
		time.Sleep(time.Minute)
		w.do(func() {
			if w.reports[1] != 1 || w.reports[2] != 2 || len(w.reports) != 2 || len(w.uses) != 3 || w.dropped != 0 {
				t.Errorf("reports %v, %d uses, %d dropped", w.reports, len(w.uses), w.dropped)
			}
		})
	})
}

// A use says at which head it was judged, also where another came before it was counted;
// what was accepted before a revocation and what was refused after are two counts, and a
// refusal doesn't wait for a bound to pass.
func TestUseNamesItsHead(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, func(c *verify.Config) { c.MaxStaleness = 5 * time.Minute })
		w.ready(t)
		c := w.claims(t)
		raw := w.sign(t, c)
		w.want(t, raw, "")
		before := w.head().Seq
		w.until(t, "the first use", func() bool { return len(w.uses) == 1 }) // the next isn't due for five minutes
		w.revoke(t, revocation.Grant(w.claims(t).Grant()))                   // somebody else's
		w.applied(t, before+1)
		w.want(t, raw, "")
		w.revoke(t, revocation.Grant(c.Grant()))
		w.applied(t, before+2)
		w.want(t, raw, verify.TokenRevoked)
		w.until(t, "the uses", func() bool { return len(w.uses) == 3 })
		w.do(func() {
			got := map[uint64]string{}
			for _, u := range w.uses {
				got[u.GetHead()] = u.GetRefusalReason()
			}
			if want := map[uint64]string{before: "", before + 1: "", before + 2: string(verify.TokenRevoked)}; !maps.Equal(got, want) {
				t.Errorf("by head: %v, want %v", got, want)
			}
		})
	})
}

// A failingConn breaks the stream at the first use reports.
type failingConn struct {
	grpc.ClientConnInterface
	fail int
}

func (c *failingConn) NewStream(ctx context.Context, desc *grpc.StreamDesc, method string, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	ctx, cancel := context.WithCancel(ctx)
	s, err := c.ClientConnInterface.NewStream(ctx, desc, method, opts...)
	return &failingStream{s, c, cancel}, err
}

type failingStream struct {
	grpc.ClientStream
	conn   *failingConn
	cancel context.CancelFunc
}

func (s *failingStream) SendMsg(m any) error {
	if r, ok := m.(*dayflyv1.FollowRequest); ok && r.GetUseReport() != nil && s.conn.fail > 0 {
		s.conn.fail--
		s.cancel()
		return io.EOF
	}
	return s.ClientStream.SendMsg(m)
}

// Nothing that a verifier prints, logs or returns shows the token.
func TestRedaction(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var log bytes.Buffer
		w := newWorld(t, func(c *verify.Config) {
			c.Log = slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))
		})
		w.ready(t)
		raw := w.good(t)
		secret := raw[strings.LastIndexByte(raw, '.')+1:]
		got, err := w.verify(raw, payments)
		if err != nil {
			t.Fatal(err)
		}
		b, _ := json.Marshal(got)
		slog.New(slog.NewTextHandler(&log, nil)).Info("verified", "token", got)
		out := fmt.Sprintf("%v %+v %#v %s", got, *got, got, b)
		if !w.verifier.Remembers(raw) {
			t.Fatal("not remembered")
		}
		for _, bad := range []string{raw + "x", "x" + raw, raw[:len(raw)-3], raw} {
			_, err := w.verify(bad, thief)
			out += fmt.Sprintf("%v %+v %#v", err, err, err)
		}
		w.cancel()
		<-w.ended
		out += fmt.Sprintf("%v %+v %#v", w.verifier, w.verifier, w.verifier)
		if strings.Contains(out+log.String(), secret[:20]) {
			t.Error("the token shows")
		}
	})
}

func TestConfig(t *testing.T) {
	_, err := verify.New(verify.Config{
		Audiences:    []string{"two words"},
		MaxStaleness: time.Millisecond,
		OnStale:      7,
		Leeway:       time.Hour,
	})
	for _, want := range []string{"conn", "audiences", "max staleness", "on stale", "leeway"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want a word on %s", err, want)
		}
	}
	if _, err := verify.New(verify.Config{}); err == nil || !strings.Contains(err.Error(), "1 to") {
		t.Errorf("no audience: got %v", err)
	}
}

func TestRunOnce(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.ready(t)
		if err := w.verifier.Run(t.Context()); err == nil {
			t.Error("ran twice")
		}
	})
}
