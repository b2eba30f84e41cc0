package keys_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/dayflyhq/dayfly/broker/keys"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk/spiffetest"
)

const issuer = "https://broker.example.org"

var (
	domain   = spiffeid.RequireTrustDomainFromString("example.org")
	brokerID = spiffeid.RequireFromPath(domain, "/dayfly/broker")
)

// publisher is an event log that can be away.
type publisher struct {
	mu       sync.Mutex
	attempts []feed.Key
	accepted []token.PublicKey
	fail     error
	during   func(feed.Key) // runs before the answer
}

func (p *publisher) publish(_ context.Context, key feed.Key) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.attempts = append(p.attempts, key)
	if p.during != nil {
		p.during(key)
	}
	if p.fail != nil {
		return p.fail
	}
	p.accepted = append(p.accepted, key.Public)
	return nil
}

func (p *publisher) setFail(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.fail = err
}

func (p *publisher) counts() (attempts, accepted int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.attempts), len(p.accepted)
}

// newRing returns a ring with a broker's SVID of a fresh trust domain.
func newRing(t *testing.T, p *publisher, change func(*keys.Config)) (*keys.Ring, *spiffetest.TrustDomain) {
	t.Helper()
	td := spiffetest.ForTest(t, spiffetest.Config{TrustDomain: domain})
	svid, err := td.IssueSVID(brokerID, spiffetest.SVIDOptions{NotAfter: time.Now().Add(240 * time.Hour)})
	if err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	cfg := keys.Config{
		Issuer:  issuer,
		Boot:    func() feed.Instant { return feed.Instant(time.Since(begin)) },
		SVID:    func() (*x509svid.SVID, error) { return svid, nil },
		Publish: p.publish,
	}
	if change != nil {
		change(&cfg)
	}
	r, err := keys.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return r, td
}

// start runs the ring until the test's bubble ends.
func start(t *testing.T, r *keys.Ring) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Run returned %v, want %v", err, context.Canceled)
		}
	})
	synctest.Wait()
}

func mustCurrent(t *testing.T, r *keys.Ring) keys.Signer {
	t.Helper()
	s, ok := r.Current()
	if !ok {
		t.Fatal("no current key")
	}
	return s
}

func unsigned(t *testing.T, s keys.Signer) token.Unsigned {
	t.Helper()
	now := time.Now().Truncate(time.Second)
	id := spiffeid.RequireFromPath(domain, "/payments")
	grant, err := token.NewGrantID(id, now, bytes.NewReader(make([]byte, 16)))
	if err != nil {
		t.Fatal(err)
	}
	u, err := token.Encode(&token.Claims{
		Issuer: issuer, Audience: "orders", Binding: token.BindingSPIFFE, Transaction: "txn-1",
		Lineage:  []token.Member{{Identity: id, Grant: grant, Key: s.Public.ID, SVID: token.Thumbprint{1}}},
		Scopes:   []string{"read"},
		IssuedAt: now, NotBefore: now, Expires: now.Add(5 * time.Minute),
		Position: token.Position{Era: 1, Rev: 1},
	}, s.Public.Algorithm)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

func signs(t *testing.T, s keys.Signer) error {
	t.Helper()
	secret, err := s.Sign(unsigned(t, s))
	if err != nil {
		return err
	}
	_, err = token.Parse(secret.Reveal(), func(id token.KeyID) (token.PublicKey, bool) {
		return s.Public, id == s.Public.ID
	})
	return err
}

func TestNewRefusesBadConfig(t *testing.T) {
	_, err := keys.New(keys.Config{Issuer: "broker", Algorithm: "PS256", RotateEvery: 13 * time.Hour})
	if err == nil {
		t.Fatal("accepted")
	}
	for _, want := range []string{"issuer", "PS256", "13h", "SVID", "publish"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q doesn't mention %q", err, want)
		}
	}
}

func TestSigns(t *testing.T) {
	for _, alg := range []token.Algorithm{token.ES256, token.EdDSA, token.RS256} {
		t.Run(string(alg), func(t *testing.T) {
			p := &publisher{}
			r, td := newRing(t, p, func(c *keys.Config) { c.Algorithm = alg })
			if err := r.Rotate(t.Context()); err != nil {
				t.Fatal(err)
			}
			s := mustCurrent(t, r)
			if s.Public.Algorithm != alg {
				t.Errorf("algorithm %s, want %s", s.Public.Algorithm, alg)
			}
			if err := signs(t, s); err != nil {
				t.Error(err)
			}
			if err := keys.VerifyKey(issuer, p.attempts[0], td, spiffeid.MatchID(brokerID), time.Now()); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestRotation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &publisher{}
		r, _ := newRing(t, p, nil)
		if _, ok := r.Current(); ok {
			t.Fatal("a new ring has a key")
		}
		start(t, r)
		first := mustCurrent(t, r)

		time.Sleep(keys.DefaultRotateEvery - time.Second)
		synctest.Wait()
		if got := mustCurrent(t, r); got.Public.ID != first.Public.ID {
			t.Fatal("rotated early")
		}
		time.Sleep(time.Second)
		synctest.Wait()
		second := mustCurrent(t, r)
		if second.Public.ID == first.Public.ID {
			t.Fatal("not rotated after 12 h")
		}
		if err := signs(t, second); err != nil {
			t.Error(err)
		}
		time.Sleep(3 * keys.DefaultRotateEvery)
		synctest.Wait()
		if _, n := p.counts(); n != 5 {
			t.Errorf("%d keys after 48 h, want 5", n)
		}
	})
}

func TestReplacedSignerStops(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, _ := newRing(t, &publisher{}, nil)
		start(t, r)
		old := mustCurrent(t, r)
		if err := r.Rotate(t.Context()); err != nil {
			t.Fatal(err)
		}
		time.Sleep(keys.SignGrace)
		if err := signs(t, old); err != nil {
			t.Errorf("within the grace: %v", err)
		}
		time.Sleep(time.Second)
		if err := signs(t, old); !errors.Is(err, keys.ErrReplaced) {
			t.Errorf("after the grace: %v, want %v", err, keys.ErrReplaced)
		}
		// The same once its private half has been dropped.
		if err := r.Rotate(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := signs(t, old); !errors.Is(err, keys.ErrReplaced) {
			t.Errorf("after another rotation: %v, want %v", err, keys.ErrReplaced)
		}
	})
}

func TestNothingSignsBeforeItIsPublished(t *testing.T) {
	p := &publisher{}
	r, _ := newRing(t, p, nil)
	p.during = func(key feed.Key) {
		if s, ok := r.Current(); ok && s.Public.ID == key.Public.ID {
			t.Error("the key signs while it is being published")
		}
	}
	for range 3 {
		if err := r.Rotate(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	p.fail = errors.New("disk is gone")
	before := mustCurrent(t, r)
	if err := r.Rotate(t.Context()); !errors.Is(err, p.fail) {
		t.Fatalf("Rotate returned %v, want %v", err, p.fail)
	}
	if got := mustCurrent(t, r); got.Public.ID != before.Public.ID {
		t.Error("an unpublished key became current")
	}
}

func TestPublishFailsThenRecovers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &publisher{fail: errors.New("store is closed")}
		r, _ := newRing(t, p, nil)
		start(t, r)
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		if _, ok := r.Current(); ok {
			t.Fatal("an unpublished key signs")
		}
		attempts, _ := p.counts()
		if attempts < 10 || attempts > 60 {
			t.Errorf("%d attempts in 10 min: want a backoff that neither gives up nor hammers", attempts)
		}

		p.setFail(nil)
		time.Sleep(time.Minute)
		synctest.Wait()
		first := mustCurrent(t, r)

		// The old key signs through an outage at the time of rotation, for as long as it lasts.
		p.setFail(errors.New("store is full"))
		time.Sleep(2 * keys.DefaultRotateEvery)
		synctest.Wait()
		if got := mustCurrent(t, r); got.Public.ID != first.Public.ID {
			t.Fatal("the current key changed while none could be published")
		}
		if err := signs(t, first); err != nil {
			t.Errorf("the old key, during the outage: %v", err)
		}
		p.setFail(nil)
		time.Sleep(time.Minute + keys.SpreadAfter(keys.DefaultJWKSMaxAge))
		synctest.Wait()
		if got := mustCurrent(t, r); got.Public.ID == first.Public.ID {
			t.Error("not rotated after the outage")
		}
	})
}

func TestPublisherThatHangsIsRetried(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &publisher{}
		hung := 0
		r, _ := newRing(t, p, func(c *keys.Config) {
			c.Publish = func(ctx context.Context, key feed.Key) error {
				if hung++; hung == 1 {
					<-ctx.Done()
					return ctx.Err()
				}
				return p.publish(ctx, key)
			}
		})
		start(t, r)
		time.Sleep(5 * time.Minute)
		synctest.Wait()
		mustCurrent(t, r)
	})
}

func TestSVIDIsAway(t *testing.T) {
	away := errors.New("no identity issued")
	p := &publisher{}
	r, _ := newRing(t, p, func(c *keys.Config) {
		c.SVID = func() (*x509svid.SVID, error) { return nil, away }
	})
	if err := r.Rotate(t.Context()); !errors.Is(err, away) {
		t.Errorf("Rotate returned %v, want %v", err, away)
	}
	if n, _ := p.counts(); n != 0 {
		t.Error("published a key that nobody vouches for")
	}
}

func TestRevoked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &publisher{}
		r, _ := newRing(t, p, nil)
		start(t, r)
		stolen := mustCurrent(t, r)
		p.setFail(errors.New("store is full"))

		r.Revoked(stolen.Public.ID)
		if _, ok := r.Current(); ok {
			t.Fatal("a revoked key is current")
		}
		if err := signs(t, stolen); !errors.Is(err, keys.ErrRevoked) {
			t.Errorf("a revoked key signs: %v, want %v", err, keys.ErrRevoked)
		}
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		if _, ok := r.Current(); ok {
			t.Fatal("there is a current key before one was published")
		}
		p.setFail(nil)
		time.Sleep(time.Minute)
		synctest.Wait()
		next := mustCurrent(t, r)
		if next.Public.ID == stolen.Public.ID {
			t.Fatal("the revoked key came back")
		}
		if err := signs(t, next); err != nil {
			t.Error(err)
		}
	})
}

func TestRevokedIsReplacedAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, _ := newRing(t, &publisher{}, nil)
		start(t, r)
		stolen := mustCurrent(t, r)
		begin := time.Now()
		r.Revoked(stolen.Public.ID)
		synctest.Wait()
		mustCurrent(t, r)
		if d := time.Since(begin); d != 0 {
			t.Errorf("took %v", d)
		}
		r.Revoked(stolen.Public.ID) // heard of twice
		r.Revoked(token.KeyID{})    // somebody else's
		synctest.Wait()
		mustCurrent(t, r)
	})
}

func TestRevokedOldKeyStopsWithinItsGrace(t *testing.T) {
	r, _ := newRing(t, &publisher{}, nil)
	if err := r.Rotate(t.Context()); err != nil {
		t.Fatal(err)
	}
	old := mustCurrent(t, r)
	if err := r.Rotate(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.Revoked(old.Public.ID)
	if err := signs(t, old); !errors.Is(err, keys.ErrRevoked) {
		t.Errorf("got %v, want %v", err, keys.ErrRevoked)
	}
	mustCurrent(t, r)
}

func TestRevokedWhileItIsPublished(t *testing.T) {
	p := &publisher{}
	r, _ := newRing(t, p, nil)
	p.during = func(key feed.Key) { r.Revoked(key.Public.ID) }
	if err := r.Rotate(t.Context()); !errors.Is(err, keys.ErrRevoked) {
		t.Errorf("Rotate returned %v, want %v", err, keys.ErrRevoked)
	}
	if _, ok := r.Current(); ok {
		t.Error("a key that was revoked before its first use is current")
	}
}

func TestRotateWaitsNoLongerThanItsContext(t *testing.T) {
	p := &publisher{}
	entered, leave := make(chan struct{}), make(chan struct{})
	p.during = func(feed.Key) { close(entered); <-leave }
	r, _ := newRing(t, p, nil)
	done := make(chan error, 1)
	go func() { done <- r.Rotate(t.Context()) }()
	<-entered
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := r.Rotate(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want %v", err, context.Canceled)
	}
	close(leave)
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// A new key is made when another authority is behind the SVID, while the old one is still
// in the bundle, and for no other change.
func TestAuthorityReplaced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &publisher{}
		td := spiffetest.ForTest(t, spiffetest.Config{TrustDomain: domain})
		source := td.Source(brokerID)
		r, _ := newRing(t, p, func(c *keys.Config) { c.SVID = source.GetX509SVID })
		start(t, r)
		first, made := mustCurrent(t, r).Public, time.Now()
		for range 3 { // the same SVID, and then renewed ones
			r.SVIDChanged(td)
			synctest.Wait()
			if got := mustCurrent(t, r).Public; got.ID != first.ID {
				t.Fatal("rotated though the authority is the same")
			}
			time.Sleep(spiffetest.DefaultSVIDTTL)
		}
		if err := td.RotateCA(); err != nil {
			t.Fatal(err)
		}
		r.SVIDChanged(td)
		synctest.Wait()
		if got := mustCurrent(t, r).Public; got.ID != first.ID {
			t.Fatal("the new key signs before it has spread")
		}
		time.Sleep(keys.SpreadAfter(keys.DefaultJWKSMaxAge))
		synctest.Wait()
		second := mustCurrent(t, r).Public
		if second.ID == first.ID {
			t.Fatal("the key of the old authority goes on")
		}
		r.SVIDChanged(td)
		time.Sleep(keys.SpreadAfter(keys.DefaultJWKSMaxAge))
		synctest.Wait()
		if got := mustCurrent(t, r).Public; got.ID != second.ID {
			t.Error("rotated twice")
		}
		// The old authority leaves: the second key's record is good still.
		if err := td.RotateCA(); err != nil {
			t.Fatal(err)
		}
		if err := keys.VerifyKey(issuer, p.attempts[0], td, spiffeid.MatchID(brokerID), made); err == nil {
			t.Error("the first key's record outlives its authority")
		}
		if err := keys.VerifyKey(issuer, p.attempts[1], td, spiffeid.MatchID(brokerID), time.Now()); err != nil {
			t.Error(err)
		}
	})
}

func TestRedaction(t *testing.T) {
	var logs bytes.Buffer
	logger := slog.New(slog.NewTextHandler(&logs, nil))
	r, _ := newRing(t, &publisher{}, func(c *keys.Config) { c.Log = logger })
	empty := fmt.Sprintf("%v", r)
	if err := r.Rotate(t.Context()); err != nil {
		t.Fatal(err)
	}
	s := mustCurrent(t, r)
	kid := s.Public.ID.String()
	if empty != "[signing keys, none current]" {
		t.Errorf("an empty ring prints %q", empty)
	}
	for _, v := range []any{r, s} {
		want := "[signing keys, current " + kid + "]"
		if _, ok := v.(keys.Signer); ok {
			want = "[signing key " + kid + "]"
		}
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%d", "%x", "%q"} {
			if got := fmt.Sprintf(verb, v); got != want {
				t.Errorf("%s prints %q, want %q", verb, got, want)
			}
		}
		if b, err := json.Marshal(v); err != nil || string(b) != `"`+want+`"` {
			t.Errorf("JSON is %s (%v), want %q", b, err, want)
		}
		logs.Reset()
		logger.Info("x", "key", v)
		if !strings.Contains(logs.String(), want) {
			t.Errorf("log line %q, want %q", logs.String(), want)
		}
	}
}
