package verify_test

import (
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	"unsafe"

	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk/verify"
)

// TestRememberedForgery: a token that is remembered vouches for its own bytes and no
// others.
func TestRememberedForgery(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.ready(t)
		raw, other := w.good(t), w.good(t)
		w.want(t, raw, "")
		w.want(t, other, "")
		input, signature := cutLast(raw)
		otherInput, otherSignature := cutLast(other)
		for name, forged := range map[string]string{
			"another token's signature":      input + "." + otherSignature,
			"a signature for another token":  otherInput + "." + signature,
			"a stranger's signature":         signWith(t, w.claims(t), stranger(t)),
			"a signature of noise":           input + "." + base64.RawURLEncoding.EncodeToString(noise(64)),
			"a signature of zeros":           input + "." + encode(strings.Repeat("\x00", 64)),
			"the same input by a stranger":   resign(t, stranger(t), raw, payloadOf(t, raw)),
			"one character of the signature": input + "." + flip(signature, 3),
			"one character of the payload":   flip(raw, len(raw)/2),
		} {
			for range 2 {
				w.want(t, forged, verify.SignatureInvalid)
			}
			if w.verifier.Remembers(forged) {
				t.Errorf("%s: remembered", name)
			}
		}
		for _, cut := range []string{input, input + ".", raw[:len(raw)-1], raw + ".", raw + "A", " " + raw, raw + "\n", ""} {
			w.want(t, cut, verify.TokenMalformed)
		}
		if n := w.verifier.Remembered(); n != 2 {
			t.Errorf("%d tokens are remembered, want the 2 good ones", n)
		}

		// The other spelling of the same signature is the same token, and dies with it.
		again := malleated(t, raw)
		w.want(t, again, "")
		w.want(t, again, "")
		got, err := w.verify(again, payments)
		if err != nil || !w.verifier.Remembers(again) {
			t.Fatalf("got %v, remembered %t", err, w.verifier.Remembers(again))
		}
		w.applied(t, w.revoke(t, revocation.Grant(got.Grant())))
		w.want(t, again, verify.TokenRevoked)
		w.want(t, raw, verify.TokenRevoked)
	})
}

func cutLast(raw string) (input, signature string) {
	dot := strings.LastIndexByte(raw, '.')
	return raw[:dot], raw[dot+1:]
}

func payloadOf(t testing.TB, raw string) string {
	t.Helper()
	b, err := base64.RawURLEncoding.DecodeString(strings.Split(raw, ".")[1])
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func noise(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.Read(b)
	return b
}

// flip changes one character of base64url.
func flip(s string, at int) string {
	c := byte('A')
	if s[at] == c {
		c = 'B'
	}
	return s[:at] + string(c) + s[at+1:]
}

// TestRememberedIsJudged: whatever ends a token ends one that is remembered, as it does
// one that was never seen.
func TestRememberedIsJudged(t *testing.T) {
	cert := &x509.Certificate{Raw: []byte("a certificate")}
	for _, tt := range []struct {
		name   string
		change func(*token.Claims)
		before verify.Peer // payments, if nobody
		happen func(t *testing.T, w *world, c *token.Claims)
		after  verify.Peer // before, if nobody
		want   verify.Reason
	}{
		{name: "nothing happens", happen: func(*testing.T, *world, *token.Claims) {}},
		{name: "its grant is revoked", happen: func(t *testing.T, w *world, c *token.Claims) {
			w.applied(t, w.revoke(t, revocation.Grant(c.Grant())))
		}, want: verify.TokenRevoked},
		{name: "its root's grant is revoked", change: derived, before: verify.Peer{ID: orders}, happen: func(t *testing.T, w *world, c *token.Claims) {
			w.applied(t, w.revoke(t, revocation.Grant(c.Lineage[0].Grant)))
		}, want: verify.TokenRevoked},
		{name: "its identity is revoked", happen: func(t *testing.T, w *world, _ *token.Claims) {
			w.applied(t, w.revoke(t, revocation.Identity(payments)))
		}, want: verify.TokenRevoked},
		{name: "its SVID is revoked", happen: func(t *testing.T, w *world, c *token.Claims) {
			w.applied(t, w.revoke(t, revocation.SVID(c.Lineage[0].SVID)))
		}, want: verify.TokenRevoked},
		{name: "everything is revoked", happen: func(t *testing.T, w *world, _ *token.Claims) {
			w.applied(t, w.revoke(t, revocation.Everything()))
		}, want: verify.TokenRevoked},
		{name: "its key is revoked", happen: func(t *testing.T, w *world, _ *token.Claims) {
			w.applied(t, w.revoke(t, revocation.Key(w.public.ID)))
		}, want: verify.KeyRevoked},
		{name: "a new era begins", happen: func(t *testing.T, w *world, _ *token.Claims) {
			w.append(t, feed.Event{Era: &feed.Era{Era: 0x2000}})
			w.applied(t, w.publish(t, mustPublic(t, stranger(t))))
			time.Sleep(verify.DefaultMaxStaleness / feed.PingsPerBound)
		}, want: verify.WrongEra},
		{name: "a new era begins, with the same key", happen: func(t *testing.T, w *world, _ *token.Claims) {
			w.append(t, feed.Event{Era: &feed.Era{Era: 0x2000}})
			w.applied(t, w.publish(t, w.public))
			time.Sleep(verify.DefaultMaxStaleness / feed.PingsPerBound)
		}, want: verify.WrongEra},
		{name: "the feed is silent", happen: func(_ *testing.T, w *world, _ *token.Claims) {
			w.do(func() { w.mute = true })
			time.Sleep(verify.DefaultMaxStaleness + time.Second)
		}, want: verify.VerifierStale},
		{name: "the feed is silent, and it is revoked", happen: func(t *testing.T, w *world, _ *token.Claims) {
			w.net.cut()
			w.revoke(t, revocation.Identity(payments))
			time.Sleep(verify.DefaultMaxStaleness + time.Second)
		}, want: verify.VerifierStale},
		{name: "the log forks", happen: func(_ *testing.T, w *world, _ *token.Claims) {
			w.do(func() {
				p := w.log.Head()
				p.Sum[0] ^= 1
				w.pongHead = &p
			})
			time.Sleep(time.Minute)
		}, want: verify.VerifierForked},
		{name: "it expires", happen: func(*testing.T, *world, *token.Claims) { time.Sleep(5*time.Minute + token.Leeway) }, want: verify.TokenExpired},
		{name: "it expires, and the leeway hasn't passed", happen: func(*testing.T, *world, *token.Claims) {
			time.Sleep(5*time.Minute + token.Leeway - time.Second)
		}},
		{name: "the horizon passes it", happen: func(t *testing.T, w *world, _ *token.Claims) {
			w.applied(t, w.revoke(t, revocation.Identity(thief)))
			w.do(func() { w.log.SetHorizon(w.log.Head()) })
			w.applied(t, w.revoke(t, revocation.Identity(thief)))
			synctest.Wait()
		}, want: verify.BelowHorizon},
		{name: "the feed speaks of another issuer", happen: func(t *testing.T, w *world, _ *token.Claims) {
			w.do(func() { w.issuer = "https://other.example.org" })
			w.net.cut()
			w.net.start(w.broker)
			time.Sleep(time.Minute)
			w.ready(t)
		}, want: verify.IssuerMismatch},
		{name: "a thief shows it", happen: func(*testing.T, *world, *token.Claims) {}, after: verify.Peer{ID: thief, Address: "192.0.2.1"}, want: verify.PresenterMismatch},
		{name: "nobody shows it", happen: func(*testing.T, *world, *token.Claims) {}, after: verify.Peer{Address: "192.0.2.1"}, want: verify.PresenterMismatch},
		{name: "another certificate shows it", change: boundTo(cert), before: verify.Peer{ID: payments, Certificate: cert}, happen: func(*testing.T, *world, *token.Claims) {},
			after: verify.Peer{ID: payments, Certificate: &x509.Certificate{Raw: []byte("rotated")}}, want: verify.CertificateMismatch},
	} {
		t.Run(tt.name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				w := newWorld(t, nil)
				w.ready(t)
				c := w.claims(t)
				if tt.change != nil {
					tt.change(c)
				}
				raw := w.sign(t, c)
				if tt.before == (verify.Peer{}) {
					tt.before = verify.Peer{ID: payments, Address: "192.0.2.1"}
				}
				if tt.after == (verify.Peer{}) {
					tt.after = tt.before
				}
				for range 3 {
					if _, err := w.verifier.Verify(t.Context(), raw, tt.before); err != nil {
						t.Fatal(err)
					}
				}
				if !w.verifier.Remembers(raw) {
					t.Fatal("not remembered")
				}
				tt.happen(t, w, c)
				_, got := w.verifier.Verify(t.Context(), raw, tt.after)
				w.verifier.Forget()
				_, want := w.verifier.Verify(t.Context(), raw, tt.after)
				if verify.ReasonOf(got) != tt.want || fmt.Sprint(got) != fmt.Sprint(want) {
					t.Errorf("got %v, want %q, and one that is seen for the first time: %v", got, tt.want, want)
				}
			})
		})
	}
}

// TestRememberedKey: an ID is 48 bits of a key's hash. What one key signed is not vouched
// for by another of the same ID that takes its place.
func TestRememberedKey(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		keys := collidingKeys(t)
		w.publish(t, keys[0].public)
		w.ready(t)
		c := w.claims(t)
		c.Lineage[0].Key = keys[0].public.ID
		first, second := signWith(t, c, keys[0].private), signWith(t, c, keys[1].private)
		w.want(t, first, "")
		w.want(t, first, "")
		w.want(t, second, verify.SignatureInvalid)

		w.applied(t, w.publish(t, keys[1].public))
		w.want(t, first, verify.SignatureInvalid)
		w.want(t, second, "")
		w.want(t, second, "")

		w.applied(t, w.publish(t, keys[0].public))
		w.want(t, first, "")
		w.want(t, second, verify.SignatureInvalid)
	})
}

// TestRememberedEnds: nothing is remembered for longer than it could be accepted, whether
// anybody shows it or not, nor while the feed is away.
func TestRememberedEnds(t *testing.T) {
	for _, cut := range []bool{false, true} {
		bubble(t, func(t *testing.T) {
			w := newWorld(t, nil)
			w.ready(t)
			for range 5 {
				w.want(t, w.good(t), "")
			}
			if n := w.verifier.Remembered(); n != 5 {
				t.Fatalf("%d are remembered", n)
			}
			if cut {
				w.net.cut()
			}
			time.Sleep(5*time.Minute + token.Leeway - time.Second)
			if n := w.verifier.Remembered(); n != 5 {
				t.Errorf("%d are remembered while they live", n)
			}
			time.Sleep(time.Minute)
			if n := w.verifier.Remembered(); n != 0 {
				t.Errorf("cut %t: %d are remembered after they have expired", cut, n)
			}
		})
	}
}

// TestRememberedIsBounded: whoever floods a verifier with what it doesn't accept drives
// nothing out and puts nothing in; who floods it with good tokens fills a table that has
// an end, and keeps nothing of theirs alive but the tokens.
func TestRememberedIsBounded(t *testing.T) {
	w := newWorld(t, nil)
	w.ready(t)
	raw := w.good(t)
	w.want(t, raw, "")

	input, _ := cutLast(raw)
	elsewhere := w.claims(t)
	elsewhere.Audience = "ledger"
	expired := w.claims(t)
	expired.IssuedAt, expired.NotBefore, expired.Expires = expired.IssuedAt.Add(-time.Hour), expired.IssuedAt.Add(-time.Hour), expired.IssuedAt.Add(-time.Minute)
	for _, bad := range []string{w.sign(t, elsewhere), w.sign(t, expired), strings.Repeat("a", 1<<20), strings.Repeat("a.", token.MaxBytes)} {
		if _, err := w.verify(bad, payments); err == nil {
			t.Fatal("accepted")
		}
	}
	if _, err := w.verify(w.good(t), thief); err == nil {
		t.Fatal("a stolen token is accepted")
	}
	for range 500 {
		w.want(t, input+"."+base64.RawURLEncoding.EncodeToString(noise(64)), verify.SignatureInvalid)
	}
	if n := w.verifier.Remembered(); n != 1 || !w.verifier.Remembers(raw) {
		t.Fatalf("%d are remembered, the good one: %t", n, w.verifier.Remembers(raw))
	}

	// A program may cut its tokens out of something large.
	const pieces = 8
	before := heap()
	for range pieces {
		large := strings.Repeat(" ", 8<<20) + w.good(t)
		piece := strings.TrimSpace(large)
		got, err := w.verify(piece, payments)
		if err != nil {
			t.Fatal(err)
		}
		if unsafe.StringData(got.Token.Reveal()) == unsafe.StringData(piece) {
			t.Fatal("the caller's memory is kept")
		}
	}
	if grown := heap() - before; grown > pieces<<22 {
		t.Errorf("%d bytes are kept", grown)
	}

	// As large as they come: 32 scopes and a full lineage.
	const n = 5000
	large := w.claims(t)
	for len(large.Lineage) < token.MaxDepth {
		derived(large)
	}
	large.Scopes = nil
	for i := range 8 {
		large.Scopes = append(large.Scopes, fmt.Sprintf("scope-%02d", i))
	}
	large.Binding = token.BindingNone
	size := len(w.sign(t, large))
	for i := range n {
		large.Transaction = fmt.Sprint(i)
		if _, err := w.verify(w.sign(t, large), payments); err != nil {
			t.Fatal(err)
		}
	}
	grown, held := heap()-before, w.verifier.Remembered()
	t.Logf("%d of %d tokens of %d bytes are remembered, in %d bytes: %d for each", held, n, size, grown, grown/held)
	if held > token.MaxRemembered || held < token.MaxRemembered/2 || grown > 20<<20 {
		t.Errorf("%d are remembered, in %d bytes", held, grown)
	}
}

func heap() int {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return int(m.HeapAlloc)
}

// TestRememberedRace shows the same tokens from many goroutines that write over what they
// are given, while tokens die: after the acknowledgement of a revocation none that it
// kills is accepted, and nobody ever sees another's writing.
func TestRememberedRace(t *testing.T) {
	w := newWorld(t, nil)
	w.ready(t)
	const n = 24
	var raws [n]string
	var grants [n]token.GrantID
	var dead [n]atomic.Bool
	for i := range raws {
		c := w.claims(t)
		raws[i], grants[i] = w.sign(t, c), c.Grant()
	}
	var wg sync.WaitGroup
	var accepted atomic.Int64
	done := make(chan struct{})
	for g := range 8 {
		wg.Go(func() {
			for i := g; ; i++ {
				select {
				case <-done:
					return
				default:
				}
				k := i % n
				was := dead[k].Load()
				got, err := w.verify(raws[k], payments)
				switch {
				case err == nil && was:
					t.Errorf("token %d: accepted after its revocation was acknowledged", k)
					return
				case err == nil:
					accepted.Add(1)
					if got.Grant() != grants[k] || got.Scopes[0] != "orders:read" {
						t.Errorf("token %d says what another caller wrote: %+v", k, got.Claims)
						return
					}
					got.Lineage[0], got.Scopes[0] = token.Member{}, "admin"
				case verify.ReasonOf(err) != verify.TokenRevoked:
					t.Errorf("token %d: %v", k, err)
					return
				}
				if i%97 == 0 {
					w.verifier.Sweep()
				}
			}
		})
	}
	for k := range raws {
		w.applied(t, w.revoke(t, revocation.Grant(grants[k])))
		dead[k].Store(true)
		_, _ = w.verify(w.good(t), payments) // others come and go
	}
	close(done)
	wg.Wait()
	if accepted.Load() == 0 {
		t.Error("none was ever accepted")
	}
}

// TestRememberedCosts: no more than what the caller gets is allocated.
func TestRememberedCosts(t *testing.T) {
	w := newWorld(t, nil)
	w.ready(t)
	raw := w.good(t)
	peer := verify.Peer{ID: payments, Address: "192.0.2.1"}
	if n := testing.AllocsPerRun(1000, func() {
		if _, err := w.verifier.Verify(t.Context(), raw, peer); err != nil {
			t.Fatal(err)
		}
	}); n > 6 { // a ping in between allocates too
		t.Errorf("%v allocations", n)
	}
}
