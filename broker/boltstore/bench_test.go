package boltstore_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/broker/boltstore"
	"github.com/dayflyhq/dayfly/broker/storetest"
	"go.etcd.io/bbolt"
)

// BenchmarkIssue is one grant at 1, 16 and 64 callers, beside its floors: what the
// disk takes to sync 4 KiB, and what bbolt takes for one put.
func BenchmarkIssue(b *testing.B) {
	for _, callers := range []int{1, 16, 64} {
		b.Run(fmt.Sprintf("callers=%d", callers), func(b *testing.B) { benchmarkIssue(b, callers) })
	}
	b.Run("floor=fsync", benchmarkSync)
	b.Run("floor=put", benchmarkPut)
}

func benchmarkIssue(b *testing.B, callers int) {
	path := filepath.Join(b.TempDir(), "store.db")
	if err := boltstore.Create(path, storetest.Era(1)); err != nil {
		b.Fatal(err)
	}
	var commits atomic.Int64
	s, err := boltstore.Open(boltstore.Config{Path: path, OnCommit: func(boltstore.Commit) { commits.Add(1) }})
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	st, err := s.State(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	var (
		wg   sync.WaitGroup
		next atomic.Int64
	)
	b.ResetTimer()
	for c := range callers {
		wg.Go(func() {
			for i := next.Add(1); i <= int64(b.N); i = next.Add(1) {
				g := storetest.Grant(int(i), storetest.Identity(c), noon, st.Head)
				if err := s.Issue(context.Background(), g, storetest.Admit); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	b.ReportMetric(float64(b.N)/float64(commits.Load()), "grants/commit")
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "grants/s")
}

func benchmarkSync(b *testing.B) {
	f, err := os.Create(filepath.Join(b.TempDir(), "file"))
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	page := make([]byte, 4096)
	for b.Loop() {
		if _, err := f.Write(page); err != nil {
			b.Fatal(err)
		}
		if err := f.Sync(); err != nil {
			b.Fatal(err)
		}
	}
}

func benchmarkPut(b *testing.B) {
	db, err := bbolt.Open(filepath.Join(b.TempDir(), "db"), 0o600, nil)
	if err != nil {
		b.Fatal(err)
	}
	defer db.Close()
	value, i := make([]byte, 400), 0
	for b.Loop() {
		i++
		err := db.Update(func(tx *bbolt.Tx) error {
			bucket, err := tx.CreateBucketIfNotExists([]byte("b"))
			if err != nil {
				return err
			}
			return bucket.Put(fmt.Appendf(nil, "%08d", i), value)
		})
		if err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkPruneObserved is a day of use reports going, beside as many that stay.
func BenchmarkPruneObserved(b *testing.B) {
	const day = 20_000
	path := filepath.Join(b.TempDir(), "store.db")
	if err := boltstore.Create(path, storetest.Era(1)); err != nil {
		b.Fatal(err)
	}
	s, err := boltstore.Open(boltstore.Config{Path: path})
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	fill := func(day string, n int) {
		for i := 0; i < n; i += 500 {
			var batch []broker.Observation
			for j := range 500 {
				batch = append(batch, broker.Observation{Key: fmt.Sprintf("uses/%s/%08d", day, i+j), Value: make([]byte, 4<<10)})
			}
			if err := s.Observe(b.Context(), batch...); err != nil {
				b.Fatal(err)
			}
		}
	}
	fill("1", day)
	for b.Loop() {
		b.StopTimer()
		fill("0", day)
		b.StartTimer()
		report, err := s.Prune(b.Context(), broker.Pruning{Observations: []broker.KeyRange{{From: "uses/0", Until: "uses/1"}}})
		if err != nil || report.Observations != day {
			b.Fatal(report, err)
		}
	}
	b.ReportMetric(day*float64(b.N)/b.Elapsed().Seconds(), "reports/s")
}
