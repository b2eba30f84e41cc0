package agent_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/dayflyhq/dayfly/agent"
	"github.com/dayflyhq/dayfly/proto/boottime"
	"github.com/dayflyhq/dayfly/proto/feed"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/test/bufconn"
)

// A logbook is what an agent logs, as JSON.
type logbook struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *logbook) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *logbook) logger() *slog.Logger {
	return slog.New(agent.QuietLog(slog.NewJSONHandler(l, &slog.HandlerOptions{Level: slog.LevelDebug})))
}

func (l *logbook) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// lines are those of one message.
func (l *logbook) lines(t *testing.T, msg string) []map[string]any {
	t.Helper()
	var out []map[string]any
	for one := range strings.Lines(l.String()) {
		var m map[string]any
		if err := json.Unmarshal([]byte(one), &m); err != nil {
			t.Fatal(err)
		}
		if m["msg"] == msg {
			out = append(out, m)
		}
	}
	return out
}

// runAgent runs an agent on the bubble's clock.
func runAgent(t *testing.T, cfg agent.Config) *agent.Agent {
	t.Helper()
	cfg.GRPC = bufconn.Listen(1 << 10)
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
	return a
}

func check(t *testing.T, s agent.Status, name string) agent.Check {
	t.Helper()
	for _, c := range s.Checks {
		if c.Name == name {
			return c
		}
	}
	t.Fatalf("no check %q", name)
	return agent.Check{}
}

// From ready over serving to failed and back, with the reason, since when and until when,
// and one line in the log at each change.
func TestStates(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, log, began := &direct{b: unservedBroker(t, newDomain(t))}, &logbook{}, time.Now()
		a := runAgent(t, agent.Config{
			Upstream: d, Source: d.b.td.Source(payments), NoFeed: true, Log: log.logger(),
			Prefetch: []agent.Request{{Audience: "orders"}, {Audience: "web"}}, Jitter: func() float64 { return 0 },
			Boot: func() feed.Instant { return feed.Instant(time.Since(began)) },
		})
		if s := a.Status(); s.State != agent.Ready || !s.Ready {
			t.Fatalf("at first: %+v", s)
		}
		d.b.set(func(b *broker) { b.refuse = refusal(codes.PermissionDenied, "POLICY_DENIED", "not any more") })
		time.Sleep(4 * time.Minute) // of 5
		s := a.Status()
		c := check(t, s, "prefetch")
		if s.State != agent.Serving || !s.Ready || c.OK || c.State != agent.Serving || c.Reason != "POLICY_DENIED" {
			t.Fatalf("while it can't renew: %+v", s)
		}
		due := began.Add(time.Duration(agent.RenewFrom * float64(5*time.Minute)))
		if c.Since == nil || c.Since.Sub(due).Abs() > 2*time.Second {
			t.Errorf("since %v, want %v", c.Since, due)
		}
		until := began.Add(5 * time.Minute)
		if c.Until == nil || c.Until.Sub(until).Abs() > 2*time.Second || !strings.Contains(c.Message, "can't renew until "+c.Until.Format("2006-01-02 15:04:05 UTC")+": orders, web") {
			t.Errorf("until %v, want %v: %s", c.Until, until, c.Message)
		}
		if _, err := a.Token(t.Context(), agent.Request{Audience: "orders"}); err != nil {
			t.Errorf("what is valid isn't served: %v", err)
		}
		time.Sleep(time.Minute + 2*time.Second)
		s = a.Status()
		if c := check(t, s, "prefetch"); s.State != agent.Failed || s.Ready || c.Reason != "POLICY_DENIED" || !strings.Contains(c.Message, "no credential yet for orders, web") {
			t.Errorf("after the expiry: %+v", s)
		}
		d.b.set(func(b *broker) { b.refuse = nil })
		time.Sleep(16 * time.Second)
		if s := a.Status(); s.State != agent.Ready || check(t, s, "prefetch").Since != nil {
			t.Errorf("well again: %+v", s)
		}
		time.Sleep(time.Second)
		var states []string
		for _, l := range log.lines(t, "state changed") {
			states = append(states, fmt.Sprint(l["level"], " ", l["state"]))
			if l["state"] == "serving" && (l["reason"] != "POLICY_DENIED" || l["until"] == nil || l["since"] == nil || l["before"] != "ready") {
				t.Errorf("the line lacks something: %v", l)
			}
		}
		want := []string{"INFO ready", "WARN serving", "WARN failed", "INFO ready"}
		if len(states) > 0 && states[0] == "WARN failed" { // it was looked at before the first credential came
			states = states[1:]
		}
		if strings.Join(states, ", ") != strings.Join(want, ", ") {
			t.Errorf("logged %q, want %q", states, want)
		}
	})
}

// A suspend is noticed within a second: what expired in it is renewed, and is never given
// out, and whoever keeps copies hears of it.
func TestSuspend(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, log, began := &direct{b: unservedBroker(t, newDomain(t))}, &logbook{}, time.Now()
		var mu sync.Mutex
		var slept time.Duration
		a := runAgent(t, agent.Config{
			Upstream: d, Source: d.b.td.Source(payments), NoFeed: true, Log: log.logger(), Prefetch: []agent.Request{{Audience: "orders"}},
			Boot: func() feed.Instant {
				mu.Lock()
				defer mu.Unlock()
				return feed.Instant(time.Since(began) + slept)
			},
		})
		first, err := a.Token(t.Context(), agent.Request{Audience: "orders"})
		if err != nil {
			t.Fatal(err)
		}
		suspend := func(by time.Duration) {
			mu.Lock()
			defer mu.Unlock()
			slept += by
		}
		// By four of five minutes: it lives, and its times are told by what is left.
		d.b.set(func(b *broker) { b.refuse = refusal(codes.Unavailable, "STORE_FULL", "full") })
		suspend(4 * time.Minute)
		got, err := a.Token(t.Context(), agent.Request{Audience: "orders"})
		if err != nil || got.Grant != first.Grant {
			t.Fatalf("what lives yet: %v", err)
		}
		if left := time.Until(got.Expires); left > time.Minute {
			t.Errorf("it says that it lives for %v yet, want at most 1m", left)
		}
		// By another: it has expired, though no timer and no clock in the process says so.
		suspend(time.Minute)
		if got, err := a.Token(t.Context(), agent.Request{Audience: "orders"}); reason(err) != "STORE_FULL" {
			t.Errorf("an expired credential: %v, %v", got, err)
		}
		if s := a.Status(); s.State != agent.Failed {
			t.Errorf("%+v", s)
		}
		d.b.set(func(b *broker) { b.refuse = nil })
		suspend(time.Hour)
		time.Sleep(time.Second)
		synctest.Wait()
		if s := a.Status(); s.State != agent.Ready {
			t.Errorf("a second after it woke: %+v", s)
		}
		if n := len(log.lines(t, "the clock jumped: everything is looked at anew")); n == 0 {
			t.Error("nothing in the log")
		}
	})
}

// The states as probes see them: a workload that is served isn't taken out of service.
func TestProbes(t *testing.T) {
	noLeaks(t)
	td := newDomain(t)
	b := newBroker(t, td)
	var passed atomic.Int64 // of five minutes, at moments that the test chooses
	f := start(t, td, b, func(c *agent.Config) {
		c.Prefetch = []agent.Request{{Audience: "orders"}}
		c.Now = func() time.Time { return time.Now().Add(time.Duration(passed.Load())) }
	})
	f.ready()
	b.set(func(b *broker) { b.refuse = refusal(codes.PermissionDenied, "IDENTITY_LOCKED", "locked") })
	passed.Store(int64(3 * time.Minute))
	health := healthpb.NewHealthClient(f.conn())
	serving := func(service string) error {
		got, err := health.Check(t.Context(), &healthpb.HealthCheckRequest{Service: service})
		if err == nil && got.GetStatus() != healthpb.HealthCheckResponse_SERVING {
			err = fmt.Errorf("%q is %v", service, got.GetStatus())
		}
		return err
	}
	eventually(t, "serving", func() error {
		code, body, _ := f.get("/readyz")
		if code != http.StatusOK || body["state"] != "serving" || body["ready"] != true || !strings.Contains(fmt.Sprint(body), "IDENTITY_LOCKED") {
			return fmt.Errorf("%d %v", code, body)
		}
		return serving("")
	})
	passed.Store(int64(5 * time.Minute))
	eventually(t, "failure", func() error {
		code, body, _ := f.get("/readyz")
		if code != http.StatusServiceUnavailable || body["state"] != "failed" || body["ready"] != false {
			return fmt.Errorf("%d %v", code, body)
		}
		if serving("") == nil || serving("dayfly.v1.TokenService") == nil {
			return fmt.Errorf("gRPC's health isn't told yet")
		}
		return serving("dayfly.v1.FeedService") // it is well
	})
	code, body, _ := f.get("/v1/status")
	if code != http.StatusOK || body["state"] != "failed" {
		t.Errorf("status: %d %v", code, body)
	}
	b.set(func(b *broker) { b.refuse = nil })
	eventually(t, "recovery", func() error {
		if _, body, _ := f.get("/readyz"); body["state"] != "ready" {
			return fmt.Errorf("%v", body)
		}
		return serving("dayfly.v1.TokenService")
	})
}

// A stream that the machine slept under is made anew at once, however seldom the bound
// would have it ask: also one that had hardly begun.
func TestFeedAfterSuspend(t *testing.T) {
	for _, c := range []struct {
		name   string
		begins bool
	}{{"as it runs", false}, {"as it begins", true}} {
		t.Run(c.name, func(t *testing.T) {
			noLeaks(t)
			td := newDomain(t)
			b := newBroker(t, td)
			var slept, before atomic.Int64
			sleep := sync.OnceFunc(func() {
				before.Store(b.streams.Load())
				slept.Add(int64(time.Minute))
			})
			if c.begins {
				b.welcome = sleep
			}
			f := start(t, td, b, func(c *agent.Config) {
				c.MaxStaleness = time.Hour
				c.Boot = func() feed.Instant { return boottime.Now() + feed.Instant(slept.Load()) }
			})
			f.ready()
			sleep()
			eventually(t, "another stream", func() error {
				if b.streams.Load() == before.Load() {
					return errors.New("still the one that slept")
				}
				return nil
			})
			f.ready()
		})
	}
}
