package agent_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/dayflyhq/dayfly/agent"
	"github.com/dayflyhq/dayfly/proto/boottime"
	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"
)

// direct calls a scripted broker without a socket, so that a bubble's clock can run.
type direct struct {
	b  *broker
	mu sync.Mutex
	at []time.Time
}

func (d *direct) Invoke(ctx context.Context, _ string, args, reply any, _ ...grpc.CallOption) error {
	d.mu.Lock()
	d.at = append(d.at, time.Now())
	d.mu.Unlock()
	resp, err := tokenServer{b: d.b}.Issue(ctx, args.(*dayflyv1.IssueRequest))
	if err != nil {
		return sdk.FromRPC(err)
	}
	proto.Merge(reply.(*dayflyv1.IssueResponse), resp)
	return nil
}

func (d *direct) NewStream(context.Context, *grpc.StreamDesc, string, ...grpc.CallOption) (grpc.ClientStream, error) {
	return nil, errors.New("no streams here")
}

func (d *direct) calls() []time.Time {
	d.mu.Lock()
	defer d.mu.Unlock()
	return append([]time.Time(nil), d.at...)
}

// bubble runs an agent on the bubble's clock, changed as asked, and returns how to ask it.
func bubble(t *testing.T, d *direct, changes ...func(*agent.Config)) func(...agent.Request) (*sdk.Credential, error) {
	t.Helper()
	began := time.Now()
	cfg := agent.Config{
		Upstream: d, Source: d.b.td.Source(payments), GRPC: bufconn.Listen(1 << 10), NoFeed: true,
		Boot: func() feed.Instant { return feed.Instant(time.Since(began)) },
	}
	for _, change := range changes {
		change(&cfg)
	}
	a, err := agent.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- a.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	synctest.Wait()
	return func(asked ...agent.Request) (*sdk.Credential, error) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		return a.Token(ctx, append(asked, agent.Request{Audience: "orders"})[0])
	}
}

// A credential is renewed between 35 and 50 % of its life, whether or not anyone asks,
// and is never given out expired.
func TestRenewsAhead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		td := newDomain(t)
		d := &direct{b: unservedBroker(t, td)}
		ask := bubble(t, d, func(c *agent.Config) { c.Prefetch = []agent.Request{{Audience: "orders"}} })
		time.Sleep(30 * time.Minute)
		calls := d.calls()
		if len(calls) < 12 || len(calls) > 18 {
			t.Fatalf("%d calls in 30 minutes of 5-minute credentials", len(calls))
		}
		for i := 1; i < len(calls); i++ {
			// Times of tokens are whole seconds, so a life may seem a second longer.
			if life := calls[i].Sub(calls[i-1]); life < 104*time.Second || life > 150*time.Second {
				t.Errorf("renewed after %v of 5m", life)
			}
		}
		n := len(calls)
		resp, err := ask()
		if err != nil || resp.Expires.Before(time.Now().Add(time.Minute)) {
			t.Errorf("from memory: %v", err)
		}
		if len(d.calls()) != n {
			t.Error("asking cost a call")
		}
	})
}

// Clocks that leave the timers behind by little at a time, or at once, renew credentials when
// they say that it is time; one that is set back changes nothing.
func TestRenewsByEveryClock(t *testing.T) {
	for name, c := range map[string]struct {
		wall, boot, minutes float64 // by how much they run faster than timers, and until when it must have renewed
		leap                time.Duration
	}{
		"sleeping often": {boot: 0.9, minutes: 1.5},
		"set often":      {wall: 0.9, minutes: 1.5},
		"set at once":    {leap: 4 * time.Minute, minutes: 0.1},
		"set back":       {leap: -4 * time.Minute, minutes: 2.6},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d, began := &direct{b: unservedBroker(t, newDomain(t))}, time.Now()
				var leap atomic.Int64
				faster := func(by float64) time.Duration { return time.Duration(by * float64(time.Since(began))) }
				bubble(t, d, func(cfg *agent.Config) {
					cfg.Prefetch = []agent.Request{{Audience: "orders"}}
					cfg.Boot = func() feed.Instant { return feed.Instant(time.Since(began) + faster(c.boot)) }
					if c.wall > 0 || c.leap != 0 {
						cfg.Now = func() time.Time { return time.Now().Round(0).Add(faster(c.wall) + time.Duration(leap.Load())) }
					}
				})
				if n := len(d.calls()); n != 1 {
					t.Fatalf("%d calls at the start", n)
				}
				leap.Store(int64(c.leap))
				time.Sleep(time.Duration(c.minutes * float64(time.Minute)))
				synctest.Wait()
				if n := len(d.calls()); n != 2 {
					t.Errorf("%d calls after %v minutes, want 2", n, c.minutes)
				}
			})
		})
	}
}

// What is bound to a certificate that was rotated is fetched anew within a second, even if
// nothing tells of the rotation and nobody asks.
func TestUntoldRotation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &direct{b: unservedBroker(t, newDomain(t))}
		d.b.set(func(b *broker) { b.binding = token.BindingX5T })
		bubble(t, d, func(c *agent.Config) { c.Prefetch = []agent.Request{{Audience: "orders"}} })
		if err := d.b.td.Rotate(payments); err != nil {
			t.Fatal(err)
		}
		before := len(d.calls())
		time.Sleep(time.Second)
		synctest.Wait()
		if n := len(d.calls()); n <= before {
			t.Errorf("%d calls, as before", n)
		}
	})
}

// What nobody asks for any more is forgotten; what was asked for stays fresh meanwhile.
func TestIdleIsForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		td := newDomain(t)
		d := &direct{b: unservedBroker(t, td)}
		ask := bubble(t, d)
		if _, err := ask(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(9 * time.Minute)
		if n := len(d.calls()); n < 3 {
			t.Errorf("%d calls in 9 minutes: not kept fresh", n)
		}
		time.Sleep(5 * time.Minute)
		n := len(d.calls())
		time.Sleep(time.Hour)
		if got := len(d.calls()); got != n {
			t.Errorf("%d more calls, though nobody asks", got-n)
		}
	})
}

// Renewal that fails costs nothing while the credential lives, and an expired one is
// never given out.
func TestServesUntilExpiry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		td := newDomain(t)
		d := &direct{b: unservedBroker(t, td)}
		ask := bubble(t, d, func(c *agent.Config) { c.Prefetch = []agent.Request{{Audience: "orders"}} })
		d.b.set(func(b *broker) { b.refuse = refusal(codes.Unavailable, "STORE_FULL", "full") })
		first, err := ask()
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Until(first.Expires) - time.Second)
		again, err := ask()
		if err != nil || again.Grant != first.Grant {
			t.Errorf("a second before its expiry: %v", err)
		}
		time.Sleep(2 * time.Second)
		if _, err := ask(); reason(err) != "STORE_FULL" {
			t.Errorf("after its expiry: %v", err)
		}
		d.b.set(func(b *broker) { b.refuse = nil })
		time.Sleep(20 * time.Second) // the longest pause
		if _, err := ask(); err != nil {
			t.Errorf("when the broker is well again: %v", err)
		}
	})
}

// A limit is of the identity: while the broker has said that it stands, this agent asks
// for nothing, whatever those beside it want.
func TestLimitIsHeeded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &direct{b: unservedBroker(t, newDomain(t))}
		d.b.set(func(b *broker) {
			b.refuse = refusalWith(codes.ResourceExhausted, "ISSUE_RATE_LIMITED", "too fast", map[string]string{"hint": "wait", "retry_after": "20s"})
		})
		ask := bubble(t, d)
		began := time.Now()
		for i := range 50 {
			if _, err := ask(agent.Request{Audience: fmt.Sprintf("orders-%d", i)}); reason(err) != "ISSUE_RATE_LIMITED" {
				t.Fatalf("got %v", err)
			}
			time.Sleep(100 * time.Millisecond)
		}
		if n := len(d.calls()); n != 1 {
			t.Errorf("%d calls for 50 credentials, want 1", n)
		}
		d.b.set(func(b *broker) { b.refuse = nil })
		time.Sleep(time.Until(began.Add(20 * time.Second)))
		if _, err := ask(agent.Request{Audience: "orders"}); err != nil {
			t.Errorf("once the limit is over: %v", err)
		}
	})
}

// A refusal of one audience that says when to come back keeps nobody from another one.
func TestRetryAfterOfOneAudience(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &direct{b: unservedBroker(t, newDomain(t))}
		d.b.set(func(b *broker) {
			b.refuse = refusalWith(codes.Unavailable, "KEY_NOT_SPREAD_YET", "not yet", map[string]string{"hint": "wait", "retry_after": "20s"})
		})
		ask := bubble(t, d)
		if _, err := ask(agent.Request{Audience: "cloud"}); reason(err) != "KEY_NOT_SPREAD_YET" {
			t.Fatalf("got %v", err)
		}
		d.b.set(func(b *broker) { b.refuse = nil })
		if _, err := ask(agent.Request{Audience: "orders"}); err != nil {
			t.Errorf("another audience: %v", err)
		}
	})
}

// A call whose answer was lost is repeated with its key, and what the broker made for the
// first one isn't thought to be younger than that. A later one is a new call.
func TestRepeatedCallIsOfItsFirstAge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &losing{direct: direct{b: unservedBroker(t, newDomain(t))}, lost: true}
		began := time.Now()
		a := runAgent(t, agent.Config{
			Upstream: l, Source: l.b.td.Source(payments), NoFeed: true, Prefetch: []agent.Request{{Audience: "orders"}},
			Jitter: func() float64 { return 0 },
			Boot:   func() feed.Instant { return feed.Instant(time.Since(began)) },
		})
		time.Sleep(3 * time.Second)
		l.set(false)
		time.Sleep(3 * time.Second)
		got, err := a.Token(t.Context(), agent.Request{Audience: "orders"})
		if err != nil {
			t.Fatal(err)
		}
		if left := got.Expires.Sub(began); left > 5*time.Minute {
			t.Errorf("what was made at first is said to live %v from then, want at most 5m", left)
		}
		keys := l.keys()
		if len(keys) != 1 {
			t.Errorf("%d keys for one call", len(keys))
		}
		l.set(true)
		time.Sleep(4 * time.Minute) // it's renewed again and again
		if n := len(l.keys()) - 1; n < 3 {
			t.Errorf("%d keys for calls over half a minute", n)
		}
	})
}

// A broker that takes longer for a call than a call may take is heard all the same: it has
// the answer when the call is repeated, and makes no second credential.
func TestSlowBroker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &slow{direct: direct{b: unservedBroker(t, newDomain(t))}, begun: map[string]time.Time{}}
		began := time.Now()
		a := runAgent(t, agent.Config{
			Upstream: l, Source: l.b.td.Source(payments), NoFeed: true, Prefetch: []agent.Request{{Audience: "orders"}},
			Boot: func() feed.Instant { return feed.Instant(time.Since(began)) },
		})
		time.Sleep(30 * time.Second)
		if _, err := a.Token(t.Context(), agent.Request{Audience: "orders"}); err != nil {
			t.Error(err)
		}
		if n := len(l.begun); n != 1 {
			t.Errorf("%d keys for one credential", n)
		}
	})
}

// slow answers what is asked with a key 8 s after it was first asked.
type slow struct {
	direct
	smu   sync.Mutex
	begun map[string]time.Time
}

func (l *slow) Invoke(ctx context.Context, method string, args, reply any, opts ...grpc.CallOption) error {
	key := args.(*dayflyv1.IssueRequest).GetIdempotencyKey()
	l.smu.Lock()
	if l.begun[key].IsZero() {
		l.begun[key] = time.Now()
	}
	left := time.Until(l.begun[key].Add(8 * time.Second))
	l.smu.Unlock()
	select {
	case <-time.After(left):
		return l.direct.Invoke(ctx, method, args, reply, opts...)
	case <-ctx.Done():
		return status.FromContextError(ctx.Err()).Err()
	}
}

// losing makes credentials by idempotency key, and loses its answers.
type losing struct {
	direct
	lmu  sync.Mutex
	lost bool
	made map[string]*dayflyv1.IssueResponse
}

func (l *losing) set(lost bool) {
	l.lmu.Lock()
	defer l.lmu.Unlock()
	l.lost = lost
}

func (l *losing) keys() []string {
	l.lmu.Lock()
	defer l.lmu.Unlock()
	return slices.Collect(maps.Keys(l.made))
}

func (l *losing) Invoke(ctx context.Context, _ string, args, reply any, _ ...grpc.CallOption) error {
	m := args.(*dayflyv1.IssueRequest)
	l.lmu.Lock()
	defer l.lmu.Unlock()
	if l.made == nil {
		l.made = map[string]*dayflyv1.IssueResponse{}
	}
	if l.made[m.GetIdempotencyKey()] == nil {
		resp, err := tokenServer{b: l.b}.Issue(ctx, m)
		if err != nil {
			return err
		}
		l.made[m.GetIdempotencyKey()] = resp
	}
	if l.lost {
		return sdk.FromRPC(status.Error(codes.Unavailable, "lost"))
	}
	proto.Merge(reply.(*dayflyv1.IssueResponse), l.made[m.GetIdempotencyKey()])
	return nil
}

// A broker that is heard again on the feed ends the pause after a failure. The clocks stand
// still at half of that pause: by itself it would never be over.
func TestReachedAgain(t *testing.T) {
	noLeaks(t)
	td := newDomain(t)
	b := newBroker(t, td)
	b.stop()
	base, boot := time.Now(), boottime.Now()
	var passed atomic.Int64
	f := start(t, td, b, func(c *agent.Config) {
		c.Prefetch = []agent.Request{{Audience: "orders"}}
		c.Now = func() time.Time { return base.Add(time.Duration(passed.Load())) }
		c.Boot = func() feed.Instant { return boot.Add(time.Duration(passed.Load())) }
		c.Jitter = func() float64 { return 0.999 }
	})
	eventually(t, "a failure", func() error {
		if _, body, _ := f.get("/readyz"); !strings.Contains(fmt.Sprint(body), "BROKER_UNREACHABLE") {
			return fmt.Errorf("%v", body)
		}
		return nil
	})
	b.restart()
	eventually(t, "the feed", func() error {
		if b.streams.Load() == 0 {
			return errors.New("no stream")
		}
		return nil
	})
	passed.Store(int64(700 * time.Millisecond))
	eventually(t, "another call", func() error {
		if b.issued.Load() == 0 {
			return errors.New("none")
		}
		return nil
	})
}
