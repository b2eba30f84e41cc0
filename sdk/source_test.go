package sdk_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk"
	"google.golang.org/grpc/codes"
)

// A mint gives out numbered credentials, by a script.
type mint struct {
	mu    sync.Mutex
	calls int
	life  time.Duration
	delay time.Duration
	err   error
}

func (m *mint) fetch(ctx context.Context) (*sdk.Credential, error) {
	m.mu.Lock()
	m.calls++
	n, life, delay, err := m.calls, m.life, m.delay, m.err
	m.mu.Unlock()
	select {
	case <-time.After(delay):
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if err != nil {
		return nil, err
	}
	now := time.Now()
	return &sdk.Credential{
		Token: token.NewSecret(fmt.Sprintf("secret-%d", n)), Grant: fmt.Sprintf("g%d", n),
		IssuedAt: now, Expires: now.Add(life),
	}, nil
}

func (m *mint) count() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.calls
}

func (m *mint) set(f func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	f()
}

func newSource(t *testing.T, m *mint) *sdk.TokenSource {
	t.Helper()
	s, err := sdk.NewTokenSource(sdk.SourceConfig{Fetch: m.fetch})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

func wantGrant(t *testing.T, s *sdk.TokenSource, want string) {
	t.Helper()
	got, err := s.Token(t.Context())
	if err != nil || got.Grant != want {
		t.Errorf("got %v, %v, want %s", got, err, want)
	}
}

func TestSourceServesFromMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &mint{life: 5 * time.Minute, delay: time.Second}
		s := newSource(t, m)
		var wg sync.WaitGroup
		for range 100 {
			wg.Go(func() { wantGrant(t, s, "g1") })
		}
		wg.Wait()
		time.Sleep(2 * time.Minute)
		wantGrant(t, s, "g1")
		m.set(func() {
			if m.calls != 1 {
				t.Errorf("%d fetches for 101 callers, want 1", m.calls)
			}
		})
	})
}

// Renewal begins between 60 and 75 % of the life, and nobody waits for it.
func TestSourceRenewsAhead(t *testing.T) {
	for _, run := range []bool{false, true} {
		t.Run(fmt.Sprintf("run=%v", run), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := &mint{life: 100 * time.Second}
				s := newSource(t, m)
				if run {
					ctx, cancel := context.WithCancel(t.Context())
					ended := make(chan error)
					go func() { ended <- s.Run(ctx) }()
					defer func() {
						cancel()
						if err := <-ended; err != nil {
							t.Error(err)
						}
					}()
				}
				wantGrant(t, s, "g1")
				m.set(func() { m.delay = 10 * time.Second })
				time.Sleep(59 * time.Second)
				wantGrant(t, s, "g1")
				m.set(func() {
					if m.calls != 1 {
						t.Errorf("renewed before 60 %% of the life")
					}
				})
				time.Sleep(17 * time.Second)
				began := time.Now()
				if run {
					m.set(func() {
						if m.calls != 2 {
							t.Errorf("%d fetches after 76 %% of the life, want 2", m.calls)
						}
					})
				}
				if _, err := s.Token(t.Context()); err != nil {
					t.Error(err)
				}
				if time.Since(began) != 0 {
					t.Errorf("waited %v for a renewal", time.Since(began))
				}
				time.Sleep(11 * time.Second)
				wantGrant(t, s, "g2")
			})
		})
	}
}

// While the broker is away the source serves what is valid, never what has expired, and
// recovers by itself.
func TestSourceOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &mint{life: 100 * time.Second}
		s := newSource(t, m)
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() { ended <- s.Run(ctx) }()
		wantGrant(t, s, "g1")
		got := time.Now()
		away := errors.New("away")
		m.set(func() { m.err = away })
		for time.Since(got) < 99*time.Second {
			wantGrant(t, s, "g1")
			time.Sleep(time.Second)
		}
		time.Sleep(time.Second)
		if cred, err := s.Token(t.Context()); !errors.Is(err, away) {
			t.Errorf("got %v, %v after its expiry", cred, err)
		}
		time.Sleep(10 * time.Minute)
		m.set(func() {
			// The pauses grow to a twentieth of the life and are jittered down to half of it.
			if most := 20 + 11*60*2/5; m.calls > most {
				t.Errorf("%d fetches in 11 minutes of outage", m.calls)
			}
			m.err = nil
		})
		time.Sleep(15 * time.Second)
		if _, err := s.Token(t.Context()); err != nil {
			t.Errorf("not recovered: %v", err)
		}
		cancel()
		<-ended
	})
}

func TestSourceInvalidate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &mint{life: 100 * time.Second}
		s := newSource(t, m)
		wantGrant(t, s, "g1")
		s.Invalidate("another")
		wantGrant(t, s, "g1")
		s.Invalidate("g1")
		wantGrant(t, s, "g2")
		s.Invalidate("")
		m.set(func() { m.delay = time.Second })
		got := make(chan *sdk.Credential)
		go func() {
			cred, _ := s.Token(t.Context())
			got <- cred
		}()
		time.Sleep(500 * time.Millisecond)
		s.Invalidate("") // what is under way may be dead already
		if cred := <-got; cred == nil || cred.Grant != "g4" {
			t.Errorf("got %v, want g4", cred)
		}
	})
}

// A credential that is dead on arrival is an error and no endless loop, whichever way
// the clocks are off.
func TestSourceExpiredOnArrival(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSource(t, &mint{life: -time.Second})
		if cred, err := s.Token(t.Context()); err == nil || !strings.Contains(err.Error(), "expired") {
			t.Errorf("got %v, %v", cred, err)
		}
	})
}

// While a machine sleeps the monotonic clock stands still: the wall clock tells. Set
// back, that one lies, and the monotonic one tells.
func TestSourceAgesByBothClocks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &mint{life: time.Minute}
		var wall time.Duration // what was added to the wall clock alone
		asked := time.Now()
		s, err := sdk.NewTokenSource(sdk.SourceConfig{
			Fetch: m.fetch,
			Now: func() time.Time {
				if wall == 0 {
					return time.Now()
				}
				return asked.Round(0).Add(wall) // no monotonic part
			},
		})
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		wantGrant(t, s, "g1")
		wall = 2 * time.Minute // asleep for two minutes
		m.set(func() { m.life = time.Hour })
		wantGrant(t, s, "g2")
	})
}

func TestSourceWaitIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSource(t, &mint{life: time.Minute, delay: 5 * time.Second})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := s.Token(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
		s.Close()
		s.Close()
		if _, err := s.Token(t.Context()); err == nil || !strings.Contains(err.Error(), "closed") {
			t.Errorf("got %v", err)
		}
	})
}

func TestSourceConfig(t *testing.T) {
	if _, err := sdk.NewTokenSource(sdk.SourceConfig{}); err == nil {
		t.Error("accepted no fetch")
	}
}

// A long pause after failures is for renewing in the background: whoever asks and has
// nothing is refused anew after the shortest pause, and served once it can be.
func TestSourceAsksAgainForTheEmptyHanded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &mint{life: 5 * time.Minute, err: errors.New("locked")}
		s := newSource(t, m)
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); s.Run(ctx) }()
		time.Sleep(2 * time.Minute) // by now it pauses for many seconds
		m.set(func() { m.err = nil })
		for tries := 0; ; tries++ {
			if _, err := s.Token(t.Context()); err == nil {
				break
			}
			if tries > 1 {
				t.Fatal("still refused after the lock was lifted")
			}
			time.Sleep(time.Second)
		}
		stop()
		<-done
	})
}

// However long an outage lasts, also beyond the credential's end, it is over for a source
// soon: a pause is a twentieth of the life that there was, and less for whoever is told.
func TestSourceOutageEnds(t *testing.T) {
	for i := range 20 {
		told := i%2 == 0
		synctest.Test(t, func(t *testing.T) {
			m := &mint{life: 2 * time.Minute}
			s := newSource(t, m)
			if _, err := s.Token(t.Context()); err != nil {
				t.Fatal(err)
			}
			m.set(func() { m.err = errors.New("away") })
			ctx, stop := context.WithCancel(t.Context())
			done := make(chan struct{})
			go func() { defer close(done); s.Run(ctx) }()
			time.Sleep(10*time.Minute + time.Duration(i)*time.Second)
			m.set(func() { m.err = nil })
			synctest.Wait()
			calls, within := m.count(), 6*time.Second
			if told {
				within = 500 * time.Millisecond
				s.Reached()
			}
			time.Sleep(within)
			synctest.Wait()
			if m.count() == calls || s.Status().Err != nil {
				t.Errorf("told %v: nothing was fetched within %v of the outage's end: %+v", told, within, s.Status())
			}
			stop()
			<-done
		})
	}
}

// A broker that says how long a limit stands is not asked before, neither ahead of need
// nor by whoever has nothing; what it says is believed up to a minute.
func TestSourceHonoursRetryAfter(t *testing.T) {
	for said, want := range map[string]time.Duration{"20s": 20 * time.Second, "3h": time.Minute, "": 500 * time.Millisecond, "-1s": 500 * time.Millisecond} {
		synctest.Test(t, func(t *testing.T) {
			refused := &sdk.Error{Code: codes.ResourceExhausted, Reason: "ISSUE_RATE_LIMITED", Metadata: map[string]string{"retry_after": said}}
			m := &mint{life: 5 * time.Minute, err: fmt.Errorf("issuing: %w", refused)}
			s := newSource(t, m)
			ctx, stop := context.WithCancel(t.Context())
			done := make(chan struct{})
			go func() { defer close(done); s.Run(ctx) }()
			synctest.Wait()
			began := time.Now()
			for time.Since(began) < want-10*time.Millisecond {
				if _, err := s.Token(t.Context()); !errors.Is(err, sdk.ErrRateLimited) {
					t.Fatalf("said %q: got %v", said, err)
				}
				time.Sleep(10 * time.Millisecond)
			}
			if m.calls != 1 {
				t.Errorf("said %q: %d calls within %v, want 1", said, m.calls, want)
			}
			m.set(func() { m.err = nil })
			time.Sleep(20 * time.Millisecond)
			if _, err := s.Token(t.Context()); err != nil {
				t.Errorf("said %q: %v after it had passed", said, err)
			}
			stop()
			<-done
		})
	}
}
