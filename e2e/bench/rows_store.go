package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/broker/boltstore"
	"github.com/dayflyhq/dayfly/e2e/sandbox"
	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.etcd.io/bbolt"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/types/known/emptypb"
)

// fillers write at once.
const fillers = 256

// A filling says what grants to write into a store.
type filling struct {
	n          int
	presenters int       // 1: all are w0's
	issued     time.Time // of the first; zero: such that all live
}

// filledOver is the time over which the grants of a filling are issued, one after the
// other as in life: by it they are sorted.
const filledOver = 50 * time.Minute

// fill writes grants that live for an hour straight into a store, by the code that the
// broker writes with.
func fill(ctx context.Context, store *boltstore.Store, f filling) error {
	st, err := store.State(ctx)
	if err != nil {
		return err
	}
	if f.issued.IsZero() {
		f.issued = time.Now().Add(-filledOver)
	}
	at := func(i int64) time.Time { return f.issued.Add(filledOver * time.Duration(i) / time.Duration(f.n)) }
	ids := []spiffeid.ID{hop(0)}
	for i := 1; i < f.presenters; i++ {
		ids = append(ids, benchID(fmt.Sprintf("n/%d", i)))
	}
	var next atomic.Int64
	group, ctx := errgroup.WithContext(ctx)
	for range fillers {
		group.Go(func() error {
			for i := next.Add(1); i <= int64(f.n); i = next.Add(1) {
				if err := put(ctx, store, st.Head, ids[int(i)%len(ids)], at(i)); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return group.Wait()
}

// put records one grant, like those that a broker issues.
func put(ctx context.Context, store *boltstore.Store, head feed.Position, id spiffeid.ID, issued time.Time) error {
	grant, err := token.NewGrantID(id, issued, rand.Reader)
	if err != nil {
		return err
	}
	issued = issued.UTC().Truncate(time.Second)
	g := &broker.Grant{
		Lineage: []token.Member{{Identity: id, Grant: grant, Key: benchKey}}, Audience: audience(1), Scopes: []string{"a.read", "a.write"},
		Binding: token.BindingSPIFFE, IssuedAt: issued, Expires: issued.Add(time.Hour), Position: head, Transaction: rand.Text()[:16],
	}
	rand.Read(g.Lineage[0].SVID[:])
	rand.Read(g.Fingerprint[:])
	return store.Issue(ctx, g, func([]broker.Record) error { return nil })
}

var benchKey = func() token.KeyID {
	id, err := token.ParseKeyID("AAAAAAAA")
	if err != nil {
		panic("internal error: " + err.Error())
	}
	return id
}()

func withStore(path string, f func(*boltstore.Store) error) error {
	store, err := boltstore.Open(boltstore.Config{Path: path})
	if err != nil {
		return err
	}
	return errors.Join(f(store), store.Close())
}

// filled is a box with live grants of w0 in its store, and its broker started.
func (l *lab) filled(ctx context.Context, n int) (*box, error) {
	b, err := l.box(fmt.Sprintf("live %d", n))
	if err != nil {
		return nil, err
	}
	if b.Info.GRPC == "" {
		if err := withStore(b.StorePath(), func(s *boltstore.Store) error { return fill(ctx, s, filling{n: n}) }); err != nil {
			return nil, fmt.Errorf("filling the store: %w", err)
		}
	}
	return l.started(ctx, fmt.Sprintf("live %d", n))
}

// revokesARound bounds what a round leaves in the log.
const revokesARound = 200

// revokeRows: the call at 3 a.m., which may not cost more the more it kills.
func revokeRows(s size) []row {
	var rows []row
	for _, n := range s.live {
		rows = append(rows, row{
			row: "revoke", name: groups(n) + " live grants", fixture: "revoke", unit: inSeconds, target: atMost(2), series: "revoke", x: float64(n),
			setup: func(ctx context.Context, l *lab) (pair, error) {
				ours, err := l.revoking(ctx, n)
				if err != nil {
					return pair{}, err
				}
				floor, err := l.updating(ctx)
				return pair{ours, floor}, err
			},
		})
	}
	rows = append(rows, row{
		row: "revoke", name: groups(s.live[0]) + " live grants against a bare call that updates", fixture: "revoke", unit: inSeconds,
		setup: func(ctx context.Context, l *lab) (pair, error) {
			ours, err := l.revoking(ctx, s.live[0])
			if err != nil {
				return pair{}, err
			}
			floor, err := l.calledUpdating(ctx, s.live[0])
			return pair{ours, floor}, err
		},
	}, row{
		row: "revoke", name: "a bare call that updates", fixture: "revoke", unit: inSeconds,
		setup: func(ctx context.Context, l *lab) (pair, error) {
			ours, err := l.calledUpdating(ctx, s.live[0])
			if err != nil {
				return pair{}, err
			}
			floor, err := l.updating(ctx)
			return pair{ours, floor}, err
		},
	})
	if least, most := s.live[0], s.live[len(s.live)-1]; least != most {
		rows = append(rows, row{
			row: "revoke", name: fmt.Sprintf("%s live grants against %s", groups(most), groups(least)), fixture: "revoke", unit: inSeconds, target: atMost(1.25),
			setup: func(ctx context.Context, l *lab) (pair, error) {
				ours, err := l.revoking(ctx, most)
				if err != nil {
					return pair{}, err
				}
				floor, err := l.revoking(ctx, least)
				return pair{ours, floor}, err
			},
		})
	}
	return rows
}

func (l *lab) revoking(ctx context.Context, live int) (side, error) {
	b, err := l.filled(ctx, live)
	if err != nil {
		return nil, err
	}
	conns, err := b.conns(1, sandbox.Alice, b.Info.GRPC, sandbox.Broker)
	if err != nil {
		return nil, err
	}
	client := dayflyv1.NewRevocationServiceClient(conns[0])
	return calls(byP50, 1, l.size.window, revokesARound, func(ctx context.Context, _ int) error {
		return revoke(ctx, client, hop(0).String())
	}), nil
}

// updating is one fsynced update of a bbolt file, in this process.
func (l *lab) updating(context.Context) (side, error) {
	u, err := shared(l, "bbolt", func() (*updates, error) {
		u, err := openUpdates(filepath.Join(l.newDir("bbolt"), "db"))
		if err == nil {
			l.onEnd(func() { u.db.Close() })
		}
		return u, err
	})
	if err != nil {
		return nil, err
	}
	return calls(byP50, 1, l.size.window, revokesARound, func(context.Context, int) error { return u.update() }), nil
}

// calledUpdating is such an update in another process, by a bare call with mTLS.
func (l *lab) calledUpdating(ctx context.Context, live int) (side, error) {
	b, err := l.filled(ctx, live)
	if err != nil {
		return nil, err
	}
	floor, err := b.floor(ctx, 0)
	if err != nil {
		return nil, err
	}
	conns, err := b.conns(1, sandbox.Alice, floor.GRPC, floorID)
	if err != nil {
		return nil, err
	}
	return calls(byP50, 1, l.size.window, revokesARound, func(ctx context.Context, _ int) error {
		return conns[0].Invoke(ctx, updateMethod, &emptypb.Empty{}, &emptypb.Empty{})
	}), nil
}

// updates is a bbolt file that is updated once for each record.
type updates struct {
	db *bbolt.DB
	n  atomic.Int64
}

func openUpdates(path string) (*updates, error) {
	db, err := openBbolt(path)
	return &updates{db: db}, err
}

func (u *updates) update() error {
	return u.db.Update(func(tx *bbolt.Tx) error {
		b, err := tx.CreateBucketIfNotExists([]byte("b"))
		if err != nil {
			return err
		}
		return b.Put(fmt.Appendf(nil, "%020d", u.n.Add(1)), make([]byte, recordBytes))
	})
}

// storeRows: what grants take up, on disk and in a broker's memory.
func storeRows(s size) []row {
	var rows []row
	for _, n := range s.stored {
		rows = append(rows,
			row{row: "store", name: "on disk, each of " + groups(n) + " live grants", fixture: "store", unit: inBytes, target: atMost(1.8), rounds: 1, setup: func(ctx context.Context, l *lab) (pair, error) {
				disk, raw, err := l.stored(ctx, n)
				return pair{constant(disk), constant(raw)}, err
			}},
			row{row: "store", name: "peak memory, " + groups(n) + " live grants against none", fixture: "store", unit: inBytes, rounds: 3, setup: func(ctx context.Context, l *lab) (pair, error) {
				if _, _, err := l.stored(ctx, n); err != nil {
					return pair{}, err
				}
				full, err := l.box(fmt.Sprintf("stored %d", n))
				if err != nil {
					return pair{}, err
				}
				empty, err := l.box("none")
				return pair{full.peak, empty.peak}, err
			}},
		)
	}
	return rows
}

func constant(v float64) side {
	return func(context.Context) (sample, error) { return sample{value: v}, nil }
}

// stored fills a store as a day's work does, by many identities, and returns the bytes of a
// grant: on disk, and of its key and record. What an empty store takes is no grant's.
func (l *lab) stored(ctx context.Context, n int) (disk, raw float64, err error) {
	sizes, err := shared(l, fmt.Sprintf("sizes %d", n), func() (sizes [2]float64, err error) {
		b, err := l.box(fmt.Sprintf("stored %d", n))
		if err != nil {
			return sizes, err
		}
		// The first opening sets room aside.
		if err := withStore(b.StorePath(), func(*boltstore.Store) error { return nil }); err != nil {
			return sizes, err
		}
		empty, err := onDisk(b.StorePath())
		if err != nil {
			return sizes, err
		}
		if err := withStore(b.StorePath(), func(s *boltstore.Store) error { return fill(ctx, s, filling{n: n, presenters: 1000}) }); err != nil {
			return sizes, err
		}
		full, err := onDisk(b.StorePath())
		if err != nil {
			return sizes, err
		}
		records, err := recordsOf(b.StorePath())
		return [2]float64{(full - empty) / float64(n), records / float64(n)}, err
	})
	return sizes[0], sizes[1], err
}

// recordsOf adds up the keys and values of the grants in a store.
func recordsOf(path string) (total float64, err error) {
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{ReadOnly: true})
	if err != nil {
		return 0, err
	}
	defer db.Close()
	return total, db.View(func(tx *bbolt.Tx) error {
		grants := tx.Bucket([]byte("grants"))
		return grants.ForEachBucket(func(day []byte) error {
			return grants.Bucket(day).ForEach(func(k, v []byte) error {
				total += float64(len(k) + len(v))
				return nil
			})
		})
	})
}

// peak is the most memory that a broker has had from its start until it serves and issues.
func (b *box) peak(ctx context.Context) (sample, error) {
	if err := b.StartBroker(ctx); err != nil {
		return sample{}, err
	}
	defer b.KillBroker()
	conns, err := b.conns(16, hop(0), b.Info.GRPC, sandbox.Broker)
	if err != nil {
		return sample{}, err
	}
	if _, err := calls(byRate, 16, b.lab.size.window, 0, issue(conns))(ctx); err != nil {
		return sample{}, err
	}
	bytes, err := memoryOf(b.BrokerPID(), "VmHWM")
	return sample{value: bytes}, err
}

// expiredFor is longer than grants are kept after their expiry.
const expiredFor = 40 * 24 * time.Hour

// pruneRows: a day of expired grants goes while others are issued.
func pruneRows(s size) []row {
	if s.pruned == 0 {
		return nil
	}
	return []row{{row: "store", name: "issuing while a day of " + groups(s.pruned) + " is pruned", fixture: "prune", unit: inSeconds, target: atMost(2), rounds: s.prunes, setup: func(ctx context.Context, l *lab) (pair, error) {
		path := filepath.Join(l.newDir("prune"), "store.db")
		now := time.Now()
		err := boltstore.Create(path, broker.Record{
			Event:   feed.Event{Era: &feed.Era{Era: token.NextEra(0, now)}},
			Details: broker.Details{Time: now.UTC(), Actor: "bench", Reason: "new store"},
		})
		if err != nil {
			return pair{}, err
		}
		day := func(i int) time.Time {
			return now.Add(-expiredFor).AddDate(0, 0, i).UTC().Truncate(24 * time.Hour).Add(time.Hour)
		}
		err = withStore(path, func(s *boltstore.Store) error {
			for i := range l.size.prunes {
				if err := fill(ctx, s, filling{n: l.size.pruned, presenters: 1000, issued: day(i)}); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return pair{}, err
		}
		store, err := boltstore.Open(boltstore.Config{Path: path})
		if err != nil {
			return pair{}, err
		}
		l.onEnd(func() { store.Close() })
		st, err := store.State(ctx)
		if err != nil {
			return pair{}, err
		}
		one := func(ctx context.Context, _ int) error {
			return put(ctx, store, st.Head, hop(0), time.Now())
		}
		var pruned int
		return pair{
			ours: func(ctx context.Context) (sample, error) {
				before := day(pruned).Truncate(24*time.Hour).AddDate(0, 0, 1)
				pruned++
				return whilePruning(ctx, store, before, l.size.pruned, one)
			},
			floor: calls(byP50, 1, l.size.window, 0, one),
		}, nil
	}}}
}

// whilePruning issues, one call after the other, until a pruning has ended.
func whilePruning(ctx context.Context, store *boltstore.Store, before time.Time, want int, issue func(context.Context, int) error) (sample, error) {
	var (
		wg     sync.WaitGroup
		ended  atomic.Bool
		report broker.PruneReport
		err    error
	)
	wg.Go(func() {
		defer ended.Store(true)
		report, err = store.Prune(ctx, broker.Pruning{GrantsExpiredBefore: before})
	})
	var took []time.Duration
	var issueErr error
	for !ended.Load() && issueErr == nil {
		at := time.Now()
		issueErr = issue(ctx, 0)
		took = append(took, time.Since(at))
	}
	wg.Wait()
	if err := errors.Join(err, issueErr); err != nil {
		return sample{}, err
	}
	if report.Grants != want {
		return sample{}, fmt.Errorf("%d grants were pruned, not %d", report.Grants, want)
	}
	s := summarise(took)
	s.value = s.p50.Seconds()
	return s, nil
}
