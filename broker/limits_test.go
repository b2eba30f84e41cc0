package broker_test

import (
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/proto/revocation"
)

// limit makes policy give everybody the same limits.
func (w *world) limit(l broker.Limits) {
	w.policy.set(func(q broker.Question) (broker.Decision, error) {
		d := yes(q)
		d.Limits = l
		return d, nil
	})
}

// ask issues until a refusal, at most n times.
func (w *world) ask(c broker.Caller, n int) (int, error) {
	w.t.Helper()
	for got := range n {
		if _, err := w.b.Issue(ctx, c, broker.Request{Audience: "orders"}); err != nil {
			return got, err
		}
	}
	return n, nil
}

func retryAfter(t *testing.T, r *broker.Refusal) time.Duration {
	t.Helper()
	d, err := time.ParseDuration(r.Metadata["retry_after"])
	if err != nil || d <= 0 {
		t.Fatalf("retry_after of %v: %q", r, r.Metadata["retry_after"])
	}
	return d
}

// An identity gets a burst and then its rate, by elapsed time; after retry_after the next
// one is there, and not before. Exchanges count for who makes them. Others aren't touched.
func TestIssueRate(t *testing.T) {
	w := newWorld(t)
	c, other := w.caller("payments"), w.caller("web")
	w.limit(broker.Limits{IssuePerSecond: 10})
	got, err := w.ask(c, 100)
	r := refused(t, err, broker.ErrRateLimited)
	if got != 10 || r.Metadata["limit"] != "10" || w.last().Reason != "ISSUE_RATE_LIMITED" {
		t.Fatalf("got %d at once, then %+v, audited %+v", got, r, w.last())
	}
	wait := retryAfter(t, r)
	w.clock.set(time.Hour) // a wall clock that jumps gives nothing
	w.clock.set(-time.Hour)
	w.clock.advance(wait - time.Millisecond)
	if got, _ := w.ask(c, 1); got != 0 {
		t.Error("got one before retry_after had passed")
	}
	w.clock.advance(time.Millisecond)
	if got, _ := w.ask(c, 5); got != 1 {
		t.Errorf("got %d after retry_after, want 1", got)
	}
	// A token addressed to the one that has used up its rate: it can't exchange either.
	subject := w.issue(other, c.ID.String())
	_, err = w.b.Exchange(ctx, c, broker.Request{Audience: "orders", Subject: subject.Token})
	refused(t, err, broker.ErrRateLimited)
	// A low rate has a burst that lets a workload start.
	w.limit(broker.Limits{IssuePerSecond: 1})
	if got, _ := w.ask(w.caller("slow"), 100); got != 5 {
		t.Errorf("got %d at once at one a second, want 5", got)
	}
	// What is repeated by its key is no new credential.
	req := broker.Request{Audience: "orders", IdempotencyKey: "12345678"}
	w.clock.advance(time.Minute)
	repeats := w.caller("repeats")
	for range 50 {
		if _, err := w.b.Issue(ctx, repeats, req); err != nil {
			t.Fatal(err)
		}
	}
}

// Live grants are counted over restarts, and are free again once they have expired.
func TestLiveGrants(t *testing.T) {
	w := newWorld(t)
	c := w.caller("payments")
	w.limit(broker.Limits{LiveGrants: 7})
	if got, _ := w.ask(c, 3); got != 3 {
		t.Fatalf("got %d, want 3", got)
	}
	w.clock.advance(time.Minute)
	w.restart()
	w.newKey()
	got, err := w.ask(c, 100)
	r := refused(t, err, broker.ErrLiveLimited)
	if got != 4 {
		t.Fatalf("got %d after a restart with 3 of 7 live, want 4", got)
	}
	if got, _ := w.ask(w.caller("web"), 7); got != 7 {
		t.Errorf("another identity got %d of its 7", got)
	}
	wait := retryAfter(t, r)
	if wait < 4*time.Minute || wait > 4*time.Minute+2*time.Second {
		t.Errorf("retry_after is %v, the first of them expires in 4m", wait)
	}
	w.clock.advance(wait)
	if got, _ := w.ask(c, 100); got != 3 {
		t.Errorf("got %d once 3 have expired, want 3", got)
	}
	w.clock.advance(10 * time.Minute)
	if err := w.b.Prune(ctx); err != nil {
		t.Fatal(err)
	}
	if n := w.b.Issuers(); n != 0 {
		t.Errorf("%d identities are remembered that have nothing", n)
	}
}

// What is revoked isn't live: whoever lost its credentials gets new ones at once.
func TestRevokedMakesRoom(t *testing.T) {
	w := newWorld(t)
	c := w.caller("payments")
	w.limit(broker.Limits{LiveGrants: 4})
	if got, err := w.ask(c, 100); got != 4 {
		t.Fatalf("got %d, %v", got, err)
	}
	w.revoke(broker.LockNone, revocation.Identity(c.ID))
	for round := range 2 { // and again, after more of the same
		if got, err := w.ask(c, 100); got != 4 || !errors.Is(err, broker.ErrLiveLimited) {
			t.Fatalf("round %d: got %d and %v, want 4 more", round, got, err)
		}
		w.revoke(broker.LockNone, revocation.Identity(c.ID))
	}
	w.clock.advance(5*time.Minute + 2*time.Second)
	if got, err := w.ask(c, 100); got != 4 || !errors.Is(err, broker.ErrLiveLimited) {
		t.Errorf("after all have expired: got %d and %v, want 4", got, err)
	}
}

// Calls at once never exceed a limit together, and what isn't recorded isn't counted.
func TestLimitsRace(t *testing.T) {
	w := newWorld(t)
	c := w.caller("payments")
	w.limit(broker.Limits{LiveGrants: 20})
	w.store.set(func(s *tap) { s.beforeIssue = func(*broker.Grant) error { return broker.ErrStoreFull } })
	for range 30 {
		_, err := w.b.Issue(ctx, c, broker.Request{Audience: "orders"})
		refused(t, err, broker.ErrFull)
	}
	w.store.set(func(s *tap) { s.beforeIssue = nil })
	var (
		wg  sync.WaitGroup
		mu  sync.Mutex
		got int
	)
	for range 64 {
		wg.Go(func() {
			n, err := w.ask(c, 2)
			mu.Lock()
			defer mu.Unlock()
			got += n
			if err != nil && !errors.Is(err, broker.ErrLiveLimited) {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if got != 20 {
		t.Errorf("got %d at once, want 20", got)
	}
}

// The cost of a count doesn't depend on how many grants are live.
func BenchmarkLiveGrants(b *testing.B) {
	for _, live := range []int{1, 100_000} {
		b.Run(fmt.Sprint(live), func(b *testing.B) {
			draw := broker.DrawLimit(broker.Limits{IssuePerSecond: 1 << 30, LiveGrants: 1 << 30})
			for range live {
				draw()
			}
			b.ResetTimer()
			for b.Loop() {
				draw()
			}
		})
	}
}
