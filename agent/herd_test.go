package agent_test

import (
	"context"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/dayflyhq/dayfly/agent"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"google.golang.org/grpc/codes"
)

// herdSize is how many agents there are, and life how long the credential of each lives.
const (
	herdSize = 1000
	life     = time.Minute
)

// A herd is agents that were started in one moment, with a credential each.
type herd struct {
	*direct
	began  time.Time
	agents []*agent.Agent
	dead   atomic.Uint64 // revocations up to here kill
}

func newHerd(t *testing.T) *herd {
	h := &herd{direct: &direct{b: unservedBroker(t, newDomain(t))}, began: time.Now()}
	h.b.set(func(b *broker) { b.ttl = life })
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	t.Cleanup(func() {
		cancel()
		wg.Wait()
	})
	for i := range herdSize {
		a, err := agent.New(agent.Config{
			Upstream: h, Source: h.b.td.Source(payments), NoSockets: true, NoFeed: true, Prefetch: []agent.Request{{Audience: "orders"}},
			Boot:   func() feed.Instant { return feed.Instant(time.Since(h.began)) },
			Jitter: rand.New(rand.NewPCG(5, uint64(i))).Float64, // one credential, so one caller
		})
		if err != nil {
			t.Fatal(err)
		}
		a.JudgeBy(func(s revocation.Subject) revocation.Verdict {
			if s.Position.Rev < h.dead.Load() {
				return revocation.Verdict{Reason: revocation.Revoked}
			}
			return revocation.Verdict{Reason: revocation.Alive}
		})
		h.agents = append(h.agents, a)
		wg.Go(func() {
			if err := a.Run(ctx); err != nil {
				t.Error(err)
			}
		})
	}
	synctest.Wait()
	return h
}

// spread counts the calls between two moments, and wants the peak of a bucket to be at most
// three times the mean.
func (h *herd) spread(t *testing.T, what string, from, to time.Time, buckets int) {
	t.Helper()
	width := to.Sub(from) / time.Duration(buckets)
	counts := make([]int, buckets)
	total := 0
	for _, at := range h.calls() {
		if at.Before(from) || !at.Before(to) {
			continue
		}
		counts[min(int(at.Sub(from)/width), buckets-1)]++
		total++
	}
	peak, mean := slices.Max(counts), float64(total)/float64(buckets)
	t.Logf("%s: %d calls in %v, peak %d in %v, mean %.1f: %.2f times", what, total, to.Sub(from), peak, width, mean, float64(peak)/mean)
	if total < herdSize*9/10 {
		t.Errorf("%s: %d calls, want those of %d agents", what, total, herdSize)
	}
	if float64(peak) > 3*mean {
		t.Errorf("%s: a peak of %d calls in %v is more than three times the mean of %.1f", what, peak, width, mean)
	}
}

// A thousand agents that start together don't renew together: not in the first generations,
// each over its window, and in the long run over all time.
func TestHerdRenews(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHerd(t)
		time.Sleep(9 * life)
		for generation := range 2 {
			n := float64(generation + 1)
			from, to := time.Duration(n*agent.RenewFrom*float64(life)), time.Duration(n*agent.RenewTo*float64(life))
			h.spread(t, "a generation", h.began.Add(from), h.began.Add(to+time.Second), int((to-from)/time.Second))
		}
		h.spread(t, "the long run", h.began.Add(6*life), h.began.Add(9*life), 60)
	})
}

// An outage that all notice in one moment, and its end: tries are spread, and all recover.
func TestHerdOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHerd(t)
		h.b.set(func(b *broker) { b.refuse = refusal(codes.Unavailable, "STORE_FULL", "full") })
		time.Sleep(10 * time.Second)
		at := h.kill(t)
		time.Sleep(2 * time.Minute)
		h.spread(t, "the first tries", at, at.Add(8*time.Second), 16)
		h.spread(t, "the outage", at.Add(time.Minute), at.Add(2*time.Minute), 60)
		h.b.set(func(b *broker) { b.refuse = nil })
		at = time.Now()
		time.Sleep(5 * time.Second) // the longest pause is a twentieth of a life
		h.spread(t, "the recovery", at, at.Add(life/20), 3)
		for _, a := range h.agents {
			if s := a.Status(); s.State != agent.Ready {
				t.Fatalf("not recovered: %+v", s)
			}
		}
	})
}

// A hint for everybody is undercut by nobody, and they come back spread.
func TestHerdHint(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHerd(t)
		h.b.set(func(b *broker) {
			b.refuse = refusalWith(codes.ResourceExhausted, "ISSUE_RATE_LIMITED", "too fast", map[string]string{"retry_after": "20s"})
		})
		time.Sleep(10 * time.Second)
		at := h.kill(t)
		time.Sleep(time.Minute)
		h.spread(t, "after the hint", at.Add(20*time.Second), at.Add(29*time.Second), 18)
		first := map[bool]int{}
		for _, c := range h.calls() {
			if d := c.Sub(at); d >= 0 {
				first[d < 20*time.Second]++
			}
		}
		if first[true] != herdSize {
			t.Errorf("%d calls before the hint was over, want one of each", first[true])
		}
	})
}

// A revocation that kills the credentials of all is heard by all in one moment.
func TestHerdRevoked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHerd(t)
		time.Sleep(time.Minute)
		at := h.kill(t)
		time.Sleep(4 * time.Second)
		h.spread(t, "after the revocation", at, at.Add(3*time.Second), 12)
		for _, a := range h.agents {
			if s := a.Status(); s.State != agent.Ready {
				t.Fatalf("not recovered: %+v", s)
			}
		}
	})
}

// kill revokes everything, and lets all hear of it now.
func (h *herd) kill(t *testing.T) time.Time {
	at := time.Now()
	h.dead.Store(h.b.revoke(revocation.Everything()).Seq)
	for _, a := range h.agents {
		a.Sweep(t.Context())
	}
	return at
}
