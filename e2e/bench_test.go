package e2e_test

import (
	"context"
	"crypto/rand"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/broker/boltstore"
	"github.com/dayflyhq/dayfly/e2e/sandbox"
	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
)

// BenchmarkIssue measures issuing on the real broker over mTLS, by direct clients that
// share a connection. Its floor, measured in the same run, is a call over the same
// connection that does nothing: "x-floor" is how many of those one issue costs.
func BenchmarkIssue(b *testing.B) {
	box := newBox(b)
	client, err := box.Client(b.Context(), sandbox.Payments, box.Info.GRPC)
	if err != nil {
		b.Fatal(err)
	}
	health := healthpb.NewHealthClient(client.Conn())
	for _, callers := range []int{1, 16, 64} {
		b.Run(fmt.Sprintf("callers=%d", callers), func(b *testing.B) {
			floor := measure(b, callers, max(200, b.N/4), func(ctx context.Context) error {
				_, err := health.Check(ctx, &healthpb.HealthCheckRequest{})
				return err
			})
			b.ResetTimer()
			took := measure(b, callers, b.N, func(ctx context.Context) error {
				_, err := client.Issue(ctx, sdk.Request{Audience: "orders"})
				return err
			})
			b.StopTimer()
			report(b, took, floor)
		})
	}
}

// BenchmarkRevoke measures a revoke of an identity with many live grants: its cost must
// not grow with them.
func BenchmarkRevoke(b *testing.B) {
	for _, live := range []int{1_000, 100_000} {
		b.Run(fmt.Sprintf("live=%d", live), func(b *testing.B) {
			box := newBox(b)
			box.StopBroker()
			fillStore(b, box.StorePath(), live)
			if err := box.StartBroker(b.Context()); err != nil {
				b.Fatal(err)
			}
			alice, err := box.Client(b.Context(), sandbox.Alice, box.Info.GRPC)
			if err != nil {
				b.Fatal(err)
			}
			health := healthpb.NewHealthClient(alice.Conn())
			floor := measure(b, 1, 200, func(ctx context.Context) error {
				_, err := health.Check(ctx, &healthpb.HealthCheckRequest{})
				return err
			})
			client := dayflyv1.NewRevocationServiceClient(alice.Conn())
			b.ResetTimer()
			took := measure(b, 1, b.N, func(ctx context.Context) error {
				_, err := client.Revoke(ctx, &dayflyv1.RevokeRequest{
					Selectors: []*dayflyv1.Selector{{Selector: &dayflyv1.Selector_Identity{Identity: sandbox.Payments.String()}}},
					LockMode:  dayflyv1.LockMode_LOCK_MODE_NONE, Reason: "bench",
				})
				return err
			})
			b.StopTimer()
			report(b, took, floor)
		})
	}
}

// latencies of calls, in order, and how long all of them took.
type latencies struct {
	calls []time.Duration
	total time.Duration
}

func (l latencies) at(q float64) time.Duration { return l.calls[int(q*float64(len(l.calls)-1))] }

// measure makes n calls by a number of callers.
func measure(b *testing.B, callers, n int, call func(context.Context) error) latencies {
	b.Helper()
	var (
		next atomic.Int64
		wg   sync.WaitGroup
	)
	l := latencies{calls: make([]time.Duration, n)}
	started := time.Now()
	for range callers {
		wg.Go(func() {
			for i := next.Add(1) - 1; i < int64(n); i = next.Add(1) - 1 {
				t := time.Now()
				if err := call(b.Context()); err != nil {
					b.Error(err)
					return
				}
				l.calls[i] = time.Since(t)
			}
		})
	}
	wg.Wait()
	l.total = time.Since(started)
	slices.Sort(l.calls)
	return l
}

func report(b *testing.B, took, floor latencies) {
	us := func(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1e3 }
	b.ReportMetric(float64(len(took.calls))/took.total.Seconds(), "calls/s")
	b.ReportMetric(us(took.at(0.50)), "p50-us")
	b.ReportMetric(us(took.at(0.99)), "p99-us")
	b.ReportMetric(us(floor.at(0.50)), "floor-p50-us")
	b.ReportMetric(us(took.at(0.50))/us(floor.at(0.50)), "x-floor")
}

// fillStore writes live grants of payments straight into the store.
func fillStore(b *testing.B, path string, n int) {
	b.Helper()
	store, err := boltstore.Open(boltstore.Config{Path: path})
	if err != nil {
		b.Fatal(err)
	}
	defer store.Close()
	st, err := store.State(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	now := time.Now().UTC().Truncate(time.Second)
	key, err := token.ParseKeyID("AAAAAAAA")
	if err != nil {
		b.Fatal(err)
	}
	var (
		next atomic.Int64
		wg   sync.WaitGroup
	)
	for range 256 {
		wg.Go(func() {
			for next.Add(1) <= int64(n) {
				id, err := token.NewGrantID(sandbox.Payments, now, rand.Reader)
				if err != nil {
					b.Error(err)
					return
				}
				g := &broker.Grant{
					Lineage:  []token.Member{{Identity: sandbox.Payments, Grant: id, Key: key}},
					Audience: "orders", Scopes: []string{"orders.read"}, Binding: token.BindingSPIFFE,
					IssuedAt: now, Expires: now.Add(time.Hour), Position: st.Head, Transaction: "bench",
				}
				if err := store.Issue(b.Context(), g, func([]broker.Record) error { return nil }); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
}
