package keys_test

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/dayflyhq/dayfly/broker/keys"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk/spiffetest"
)

// spread is how long a key is published before it signs, in these tests.
var spread = keys.SpreadAfter(keys.DefaultJWKSMaxAge)

func TestSpreadAfter(t *testing.T) {
	for maxAge, want := range map[time.Duration]time.Duration{
		time.Second: 2 * time.Second, time.Minute: 66 * time.Second, 5 * time.Minute: 330 * time.Second,
	} {
		if got := keys.SpreadAfter(maxAge); got != want {
			t.Errorf("%v after %v, want %v", maxAge, got, want)
		}
	}
}

// The first key of a process is in nobody's copy of the JWK set; the next one is in
// everybody's before it signs.
func TestSpreadBeforeItSigns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &publisher{}
		r, _ := newRing(t, p, nil)
		start(t, r)
		first := mustCurrent(t, r)
		if first.SpreadIn != spread {
			t.Errorf("the first key has spread in %v, want %v", first.SpreadIn, spread)
		}
		time.Sleep(spread - time.Millisecond)
		if got := mustCurrent(t, r).SpreadIn; got != time.Millisecond {
			t.Errorf("it has spread in %v, want 1ms", got)
		}
		time.Sleep(time.Millisecond)
		if got := mustCurrent(t, r).SpreadIn; got != 0 {
			t.Errorf("it has spread in %v, want at once", got)
		}

		time.Sleep(keys.DefaultRotateEvery - 2*spread)
		synctest.Wait()
		if _, n := p.counts(); n != 2 {
			t.Fatalf("%d keys are published %v before the rotation, want 2", n, spread)
		}
		time.Sleep(spread - time.Millisecond)
		synctest.Wait()
		if got := mustCurrent(t, r); got.Public.ID != first.Public.ID {
			t.Fatal("the next key signs before it has spread")
		}
		time.Sleep(time.Millisecond)
		synctest.Wait()
		second := mustCurrent(t, r)
		if second.Public.ID == first.Public.ID || second.SpreadIn != 0 {
			t.Errorf("after 12h key %s signs, and has spread in %v", second.Public.ID, second.SpreadIn)
		}
	})
}

// However short RotateEvery is, a key spreads before it signs.
func TestRotationIsNoFasterThanKeysSpread(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &publisher{}
		r, _ := newRing(t, p, func(c *keys.Config) { c.RotateEvery = time.Second })
		start(t, r)
		time.Sleep(spread)
		synctest.Wait()
		seen := mustCurrent(t, r).Public.ID
		for range 5 {
			time.Sleep(spread)
			synctest.Wait()
			s := mustCurrent(t, r)
			if s.Public.ID == seen || s.SpreadIn != 0 {
				t.Fatalf("key %s after %s, spread in %v", s.Public.ID, seen, s.SpreadIn)
			}
			seen = s.Public.ID
		}
	})
}

// Who revokes the current key has one that was born later, though the next one was
// published already.
func TestRevokedTakesTheNextKeyWithIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &publisher{}
		r, _ := newRing(t, p, nil)
		start(t, r)
		time.Sleep(keys.DefaultRotateEvery - time.Second)
		synctest.Wait()
		if len(r.Own()) != 2 {
			t.Fatalf("%d keys, want the current and the next one", len(r.Own()))
		}
		r.Revoked(mustCurrent(t, r).Public.ID)
		synctest.Wait()
		s := mustCurrent(t, r)
		if p.accepted[1].ID == s.Public.ID || s.SpreadIn != spread {
			t.Errorf("key %s signs, spread in %v", s.Public.ID, s.SpreadIn)
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if got := mustCurrent(t, r).Public.ID; got != s.Public.ID {
			t.Error("the next key from before took over")
		}
	})
}

// A next key that was revoked never signs; another one is published in its place.
func TestNextKeyIsRevoked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &publisher{}
		r, _ := newRing(t, p, nil)
		start(t, r)
		time.Sleep(keys.DefaultRotateEvery - time.Second)
		synctest.Wait()
		first := mustCurrent(t, r).Public.ID
		r.Revoked(p.accepted[1].ID)
		time.Sleep(spread - time.Millisecond)
		synctest.Wait()
		if got := mustCurrent(t, r).Public.ID; got != first {
			t.Fatalf("key %s signs before it has spread", got)
		}
		time.Sleep(time.Millisecond)
		synctest.Wait()
		if got := mustCurrent(t, r).Public.ID; got != p.accepted[2].ID {
			t.Errorf("key %s signs, want the third", got)
		}
	})
}

// A next key of an authority that was replaced meanwhile never signs: one of the new
// authority does, once that has spread.
func TestAuthorityOfTheNextKeyIsReplaced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &publisher{}
		td := spiffetest.ForTest(t, spiffetest.Config{TrustDomain: domain})
		r, _ := newRing(t, p, func(c *keys.Config) { c.SVID = td.Source(brokerID).GetX509SVID })
		start(t, r)
		first := mustCurrent(t, r).Public.ID
		for range 2 { // the second drops the first authority from the bundle
			if err := td.RotateCA(); err != nil {
				t.Fatal(err)
			}
			r.SVIDChanged(td)
			time.Sleep(spread / 2)
			synctest.Wait()
			if got := mustCurrent(t, r).Public.ID; got != first {
				t.Fatalf("key %s signs before it has spread", got)
			}
		}
		time.Sleep(spread / 2)
		synctest.Wait()
		if s := mustCurrent(t, r); s.Public.ID != p.accepted[2].ID || s.SpreadIn != 0 {
			t.Errorf("key %s signs, spread in %v", s.Public.ID, s.SpreadIn)
		}
	})
}

// Whatever happens, no signer says that its key has spread before it was published for
// that long, nothing that isn't published signs, and what is planned makes nobody wait:
// while no key is revoked, one that has spread is followed only by others that have.
func TestNoKeySignsForReadersBeforeItHasSpread(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		rapid.Check(struct{ testing.TB }{t}, spreadHistory(t)) // without a deadline, which a bubble hasn't
	})
}

func spreadHistory(t *testing.T) func(*rapid.T) {
	return func(rt *rapid.T) {
		td := spiffetest.ForTest(t, spiffetest.Config{TrustDomain: domain})
		begin := time.Now()
		var mu sync.Mutex // guards published
		published := map[token.KeyID]time.Time{}
		maxAge := time.Duration(rapid.IntRange(1, 300).Draw(rt, "max-age")) * time.Second
		needs := keys.SpreadAfter(maxAge)
		var failing atomic.Bool
		r, err := keys.New(keys.Config{
			Issuer: issuer, SVID: td.Source(brokerID).GetX509SVID,
			Boot:        func() feed.Instant { return feed.Instant(time.Since(begin)) },
			JWKSMaxAge:  maxAge,
			RotateEvery: time.Duration(rapid.IntRange(1, 3600).Draw(rt, "rotation")) * time.Second,
			Publish: func(_ context.Context, k feed.Key) error {
				time.Sleep(time.Second) // the disk
				if failing.Load() {
					return errors.New("the store is away")
				}
				mu.Lock()
				defer mu.Unlock()
				published[k.Public.ID] = time.Now()
				return nil
			},
		})
		if err != nil {
			rt.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- r.Run(ctx) }()
		defer func() { cancel(); <-done }()

		// excused is the key that was current at the last revocation: what follows it may
		// not have spread.
		var excused *token.KeyID
		excuse := func() {
			s, _ := r.Current()
			excused = &s.Public.ID
		}
		excuse() // nothing signs yet
		check := func() {
			synctest.Wait()
			s, ok := r.Current()
			if !ok {
				return
			}
			mu.Lock()
			at, known := published[s.Public.ID]
			mu.Unlock()
			if !known {
				rt.Fatalf("key %s signs and isn't published", s.Public.ID)
			}
			if s.SpreadIn == 0 && time.Since(at) < needs {
				rt.Fatalf("key %s is said to have spread %v after it was published, want %v", s.Public.ID, time.Since(at), needs)
			}
			switch {
			case s.SpreadIn > 0 && excused == nil:
				rt.Fatalf("key %s signs before it has spread, and nobody's doing is why", s.Public.ID)
			case s.SpreadIn == 0 && excused != nil && *excused != s.Public.ID:
				excused = nil
			}
		}
		rt.Repeat(map[string]func(*rapid.T){
			"": func(*rapid.T) { check() },
			"time passes": func(rt *rapid.T) {
				for range rapid.IntRange(1, 60).Draw(rt, "steps") {
					time.Sleep(time.Duration(rapid.IntRange(1, 20).Draw(rt, "seconds")) * time.Second)
					check()
				}
			},
			"the store goes or comes": func(*rapid.T) { failing.Store(!failing.Load()) },
			"a key is revoked": func(rt *rapid.T) {
				own := r.Own()
				if len(own) == 0 {
					return
				}
				slices.SortFunc(own, func(a, b token.KeyID) int {
					mu.Lock()
					defer mu.Unlock()
					return published[a].Compare(published[b])
				})
				k := own[rapid.IntRange(0, len(own)-1).Draw(rt, "which")]
				excuse()
				r.Revoked(k)
				if s, ok := r.Current(); ok && s.Public.ID == k {
					rt.Fatal("a revoked key is current")
				}
			},
			"the authority is replaced": func(rt *rapid.T) {
				n := rapid.IntRange(1, 2).Draw(rt, "times") // the second drops the first
				for range n {
					if err := td.RotateCA(); err != nil {
						rt.Fatal(err)
					}
				}
				r.SVIDChanged(td)
			},
		})
	}
}
