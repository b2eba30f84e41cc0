package sdk_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/sdk"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
)

// clocks are a bubble's: the monotonic one is the bubble's own, the others are off by what
// a test says.
type clocks struct {
	mu          sync.Mutex
	began       time.Time
	slept, wall time.Duration
}

func newClocks() *clocks { return &clocks{began: time.Now()} }

// sleep is a suspend: timers and the monotonic clock stand still meanwhile.
func (c *clocks) sleep(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.slept += d
	c.wall += d
}

// set sets the wall clock alone.
func (c *clocks) set(by time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.wall += by
}

func (c *clocks) boot() feed.Instant {
	c.mu.Lock()
	defer c.mu.Unlock()
	return feed.Instant(time.Since(c.began) + c.slept)
}

// now is the wall clock. It has no monotonic part: time.Time can't be given one that
// differs from it.
func (c *clocks) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return time.Now().Round(0).Add(c.wall)
}

func running(t *testing.T, cfg sdk.SourceConfig) *sdk.TokenSource {
	t.Helper()
	s, err := sdk.NewTokenSource(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		<-done
		s.Close()
	})
	synctest.Wait()
	return s
}

// After a suspend Run renews within a second, though its timer slept too.
func TestSourceRenewsAfterSuspend(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, c := &mint{life: time.Hour}, newClocks()
		running(t, sdk.SourceConfig{Fetch: m.fetch, Boot: c.boot})
		time.Sleep(time.Minute)
		c.sleep(50 * time.Minute)
		time.Sleep(time.Second)
		synctest.Wait()
		m.set(func() {
			if m.calls != 2 {
				t.Errorf("%d fetches a second after a suspend, want 2", m.calls)
			}
		})
	})
}

// What expired in a suspend is never given out, whatever the wall clock says and though
// nothing can be fetched.
func TestSourceExpiresInSuspend(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, c := &mint{life: 5 * time.Minute}, newClocks()
		s := running(t, sdk.SourceConfig{Fetch: m.fetch, Boot: c.boot, Now: c.now})
		wantGrant(t, s, "g1")
		away := errors.New("away")
		m.set(func() { m.err = away })
		c.sleep(5 * time.Minute)
		c.set(-24 * time.Hour)
		if cred, err := s.Token(t.Context()); !errors.Is(err, away) {
			t.Errorf("got %v, %v", cred, err)
		}
	})
}

// A wall clock that is set forward makes a source renew at once, and takes nothing away
// that can't be renewed. One that is set back changes nothing.
func TestSourceWallClockIsSet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &mint{life: 5 * time.Minute}
		s := running(t, sdk.SourceConfig{Fetch: m.fetch})
		wantGrant(t, s, "g1")
		m.set(func() { m.err = errors.New("away") })
		s.SetWall(24 * time.Hour)
		wantGrant(t, s, "g1")
		time.Sleep(2 * time.Second)
		m.set(func() {
			if m.calls < 2 {
				t.Error("it didn't try to renew")
			}
			m.err = nil
		})
		time.Sleep(maxPause)
		wantGrant(t, s, m.newest())
		var calls int
		m.set(func() { calls = m.calls })
		s.SetWall(-48 * time.Hour)
		time.Sleep(4 * time.Minute)
		m.set(func() {
			if m.calls != calls+1 {
				t.Errorf("%d fetches in 4 minutes after the clock was set back, want 1", m.calls-calls)
			}
			m.err = errors.New("away")
		})
		time.Sleep(5 * time.Minute)
		if cred, err := s.Token(t.Context()); err == nil {
			t.Errorf("got %v, which has expired", cred.Grant)
		}
	})
}

// newest is what was given out last.
func (m *mint) newest() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return fmt.Sprintf("g%d", m.calls)
}

// maxPause is the longest between two tries.
const maxPause = 15 * time.Second

// Whoever learns of a revocation together with a fleet asks at a random moment of three
// seconds, unless somebody waits.
func TestSourceRevoked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &mint{life: time.Hour}
		s := running(t, sdk.SourceConfig{Fetch: m.fetch, Jitter: func() float64 { return 0.9 }})
		wantGrant(t, s, "g1")
		s.Revoked("g1")
		time.Sleep(2600 * time.Millisecond)
		m.set(func() {
			if m.calls != 1 {
				t.Error("it asked at once, though nobody waits")
			}
		})
		time.Sleep(200 * time.Millisecond)
		m.set(func() {
			if m.calls != 2 {
				t.Errorf("%d fetches after the pause, want 2", m.calls)
			}
		})
		wantGrant(t, s, "g2")
		s.Revoked("g2")
		began := time.Now()
		wantGrant(t, s, "g3")
		if time.Since(began) != 0 {
			t.Error("somebody who asks waits for the fleet")
		}
	})
}

// A hint of when to come back is never undercut, and those who got it don't come back
// together. It may be in a RetryInfo.
func TestSourceSpreadsTheHint(t *testing.T) {
	st, err := status.New(codes.Unavailable, "overloaded").WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(20 * time.Second)})
	if err != nil {
		t.Fatal(err)
	}
	for name, refused := range map[string]error{
		"metadata":   &sdk.Error{Code: codes.Unavailable, Reason: "KEY_NOT_SPREAD_YET", Metadata: map[string]string{"retry_after": "20s"}},
		"retry info": sdk.FromRPC(st.Err()),
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var mu sync.Mutex
				var again []time.Duration
				began := time.Now()
				for range 100 {
					first := true
					running(t, sdk.SourceConfig{Fetch: func(context.Context) (*sdk.Credential, error) {
						mu.Lock()
						defer mu.Unlock()
						if first {
							first = false
							return nil, refused
						}
						again = append(again, time.Since(began))
						return &sdk.Credential{Grant: "g", Expires: time.Now().Add(time.Hour)}, nil
					}})
				}
				time.Sleep(time.Minute)
				mu.Lock()
				defer mu.Unlock()
				if len(again) != 100 {
					t.Fatalf("%d of 100 came back", len(again))
				}
				var early, late int
				for _, d := range again {
					if d < 20*time.Second {
						t.Errorf("one came back after %v", d)
					}
					if d < 22*time.Second {
						early++
					}
					if d > 23*time.Second {
						late++
					}
				}
				if early < 10 || late < 10 {
					t.Errorf("%d before 22 s and %d after 23 s of 100: they came back together", early, late)
				}
			})
		})
	}
}

// The pauses between tries fit a short life, so that a moment in which the broker is there
// isn't missed.
func TestSourcePausesFitTheLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &mint{life: time.Minute}
		s := running(t, sdk.SourceConfig{Fetch: m.fetch})
		wantGrant(t, s, "g1")
		m.set(func() { m.err = errors.New("away") })
		time.Sleep(55 * time.Second)
		m.set(func() { m.err = nil })
		time.Sleep(3100 * time.Millisecond)
		wantGrant(t, s, m.newest())
		if s.Status().Failures != 0 {
			t.Error("it hasn't tried in 3 seconds, a twentieth of the life")
		}
	})
}

// What a source says of itself.
func TestSourceStatus(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &mint{life: 100 * time.Second}
		s := running(t, sdk.SourceConfig{Fetch: m.fetch, Boot: newClocks().boot, Jitter: func() float64 { return 0 }, RenewFrom: 0.4, RenewTo: 0.5})
		if got := s.Status(); got.RenewIn != 40*time.Second || got.Err != nil {
			t.Errorf("fresh: %+v", got)
		}
		m.set(func() { m.err = errors.New("away") })
		time.Sleep(50 * time.Second)
		got := s.Status()
		if got.Err == nil || got.Failures < 3 || got.RenewIn <= 0 || time.Since(got.Since) != 10*time.Second {
			t.Errorf("failing: %+v, since %v", got, time.Since(got.Since))
		}
		m.set(func() { m.err = nil })
		time.Sleep(maxPause)
		if got := s.Status(); got.Err != nil || got.Failures != 0 || !got.Since.IsZero() {
			t.Errorf("well again: %+v", got)
		}
	})
	if _, err := sdk.NewTokenSource(sdk.SourceConfig{Fetch: (&mint{}).fetch, RenewFrom: 0.5, RenewTo: 0.4}); err == nil {
		t.Error("accepted fractions out of order")
	}
}

// A connection that the machine slept under isn't trusted: the next call goes over a new
// one, while the peer at the other end of the old one is gone without a word.
func TestClientRedialsAfterSuspend(t *testing.T) {
	td, s := newTrustDomain(t), &tokenServer{}
	way := newWay(t, startBroker(t, td, brokerID, s))
	c := newClocks()
	client := newClient(t, sdk.Config{Address: way.address, Source: td.Source(payments), BrokerID: brokerID, Boot: c.boot, Timeout: 30 * time.Second})
	for range 2 {
		if _, err := client.Issue(t.Context(), sdk.Request{Audience: "orders"}); err != nil {
			t.Fatal(err)
		}
	}
	if n := way.swallow(); n != 1 {
		t.Fatalf("%d connections for two calls, want 1", n)
	}
	c.sleep(time.Minute)
	if _, err := client.Issue(t.Context(), sdk.Request{Audience: "orders"}); err != nil {
		t.Errorf("after a suspend: %v", err)
	}
}

// A connection on which a call runs out of time while nothing comes isn't trusted either:
// the next one goes over a new one. Where something came, the broker is slow, and a new
// connection would only be more work for it.
func TestClientLeavesSilentConnection(t *testing.T) {
	td, s := newTrustDomain(t), &tokenServer{}
	way := newWay(t, startBroker(t, td, brokerID, s))
	client := newClient(t, sdk.Config{Address: way.address, Source: td.Source(payments), BrokerID: brokerID, Timeout: 30 * time.Second})
	issue := func(within time.Duration) error {
		ctx, cancel := context.WithTimeout(t.Context(), within)
		defer cancel()
		_, err := client.Issue(ctx, sdk.Request{Audience: "orders"})
		return err
	}
	if err := issue(30 * time.Second); err != nil {
		t.Fatal(err)
	}
	way.swallow()
	if err := issue(100 * time.Millisecond); err == nil {
		t.Fatal("an answer on a connection that swallows")
	}
	if err := issue(30 * time.Second); err != nil {
		t.Errorf("after a call without a word: %v", err)
	}
	if n := way.swallow(); n != 2 {
		t.Errorf("%d connections, want 2", n)
	}
}

// A way leads to an address, until it swallows what comes.
type way struct {
	address string
	mu      sync.Mutex
	open    []*atomic.Bool // of each connection: it swallows
}

func newWay(t *testing.T, to string) *way {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w := &way{address: lis.Addr().String()}
	var wg sync.WaitGroup
	ctx, cancel := context.WithCancel(context.Background())
	wg.Go(func() {
		for {
			conn, err := lis.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { w.lead(ctx, conn, to) })
		}
	})
	t.Cleanup(func() {
		_ = lis.Close()
		cancel()
		wg.Wait()
	})
	return w
}

func (w *way) lead(ctx context.Context, from net.Conn, to string) {
	there, err := net.Dial("tcp", to)
	if err != nil {
		_ = from.Close()
		return
	}
	swallows := new(atomic.Bool)
	w.mu.Lock()
	w.open = append(w.open, swallows)
	w.mu.Unlock()
	stop := context.AfterFunc(ctx, func() { _, _ = from.Close(), there.Close() })
	defer stop()
	var wg sync.WaitGroup
	for _, pair := range [][2]net.Conn{{from, there}, {there, from}} {
		wg.Go(func() {
			buf := make([]byte, 16<<10)
			for {
				n, err := pair[0].Read(buf)
				if err == nil && !swallows.Load() {
					_, err = pair[1].Write(buf[:n])
				}
				if err != nil {
					_, _ = from.Close(), there.Close()
					return
				}
			}
		})
	}
	wg.Wait()
}

// swallow makes the connections that there are dead without a word, and counts them.
func (w *way) swallow() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, s := range w.open {
		s.Store(true)
	}
	return len(w.open)
}
