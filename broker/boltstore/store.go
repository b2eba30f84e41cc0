package boltstore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"os"
	"sync"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/proto/feed"
	"go.etcd.io/bbolt"
)

// chunk bounds what one read transaction returns.
const chunk = 256

// Limits of an observation, as its type says.
const (
	maxObservationKey   = 512
	maxObservationValue = 64 << 10
)

// A Store is a broker.Store in a bbolt file. Open makes it.
type Store struct {
	cfg      Config
	db       *bbolt.DB
	file     *os.File
	identity fs.FileInfo
	backup   backups
	pruning  sync.Mutex

	// Of the committer alone, once it runs.
	room      room
	committed uint64

	mu      sync.Mutex
	queue   [tiers][]*op
	queued  *sync.Cond
	closing bool
	state   state
	news    chan struct{} // closed and replaced when the log has grown

	done    chan struct{} // closed when the store takes no more calls
	stopped chan struct{} // closed when the committer has ended
}

var _ broker.Store = (*Store)(nil)

// Append implements broker.Store.
func (s *Store) Append(ctx context.Context, next func(feed.Position) (broker.Record, error)) (broker.Record, error) {
	var sealed broker.Record
	err := s.do(ctx, &op{tier: tierAppend, apply: func(t *txn) error {
		r, err := next(t.head)
		if err != nil {
			return err
		}
		var head feed.Position
		if sealed, head, err = putRecord(t.log(), r, t.head); err != nil {
			return fmt.Errorf("appending record: %w", err)
		}
		t.head = head
		return nil
	}})
	if err != nil {
		return broker.Record{}, err
	}
	return sealed, nil
}

// Events implements broker.Store.
func (s *Store) Events(ctx context.Context, after uint64) iter.Seq2[broker.Record, error] {
	return func(yield func(broker.Record, error) bool) {
		for last := after; ; {
			s.mu.Lock()
			news := s.news
			s.mu.Unlock()
			records, seen, err := s.records(ctx, last)
			if err != nil {
				yield(broker.Record{}, err)
				return
			}
			for _, r := range records {
				if !yield(r, nil) {
					return
				}
			}
			if seen > last {
				last = seen
				continue
			}
			select {
			case <-news:
			case <-ctx.Done():
			case <-s.done:
			}
		}
	}
}

// records returns a chunk of the records after a number, and the last number seen.
func (s *Store) records(ctx context.Context, after uint64) (records []broker.Record, last uint64, err error) {
	last = after
	err = s.view(ctx, func(tx *bbolt.Tx) error {
		return eachEntry(tx.Bucket(bucketLog), after, func(e entry) bool {
			last = e.position.Seq
			if !e.dropped {
				records = append(records, e.record)
			}
			return len(records) < chunk
		})
	})
	return records, last, err
}

// eachEntry calls f with the entries after a number until it returns false.
func eachEntry(log *bbolt.Bucket, after uint64, f func(entry) bool) error {
	if after+1 == 0 {
		return nil
	}
	c := log.Cursor()
	for k, v := c.Seek(logKey(after + 1)); k != nil; k, v = c.Next() {
		e, err := decodeEntry(v)
		if err != nil {
			return fmt.Errorf("%w: log %x: %w", ErrCorrupt, k, err)
		}
		if !bytes.Equal(k, logKey(e.position.Seq)) {
			return fmt.Errorf("%w: log %x holds number %d", ErrCorrupt, k, e.position.Seq)
		}
		if !f(e) {
			return nil
		}
	}
	return nil
}

// State implements broker.Store.
func (s *Store) State(ctx context.Context) (broker.StoreState, error) {
	if err := ctx.Err(); err != nil {
		return broker.StoreState{}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing {
		return broker.StoreState{}, broker.ErrStoreClosed
	}
	return broker.StoreState{Head: s.state.head, Horizon: s.state.horizon}, nil
}

// Observe implements broker.Store. A call writes all of its observations or none.
func (s *Store) Observe(ctx context.Context, observations ...broker.Observation) error {
	o := &op{tier: tierObserve, observes: true}
	if len(observations) == 0 {
		o.tier = tierAppend // pings are answered on a full disk, too
	}
	for _, ob := range observations {
		if err := validateObservation(ob); err != nil {
			return err
		}
		o.bytes += len(ob.Key) + len(ob.Value)
	}
	o.apply = func(t *txn) error { return putObservations(t.tx.Bucket(bucketObserved), observations) }
	return s.do(ctx, o)
}

// putObservations can't fail half-way: bbolt refuses only what was refused before.
func putObservations(b *bbolt.Bucket, observations []broker.Observation) error {
	for _, ob := range observations {
		var err error
		if ob.Value == nil {
			err = b.Delete([]byte(ob.Key))
		} else {
			err = b.Put([]byte(ob.Key), ob.Value)
		}
		if err != nil {
			return fmt.Errorf("keeping observation %q: %w", ob.Key, err)
		}
	}
	return nil
}

func validateObservation(ob broker.Observation) error {
	if len(ob.Key) == 0 || len(ob.Key) > maxObservationKey {
		return fmt.Errorf("the key of an observation has 1 to %d bytes, not %d", maxObservationKey, len(ob.Key))
	}
	for i := range len(ob.Key) {
		if c := ob.Key[i]; c < ' ' || c > '~' {
			return fmt.Errorf("the key %q of an observation is not printable", ob.Key)
		}
	}
	if len(ob.Value) > maxObservationValue {
		return fmt.Errorf("the value of observation %q has %d bytes, more than %d", ob.Key, len(ob.Value), maxObservationValue)
	}
	return nil
}

// Observed implements broker.Store.
func (s *Store) Observed(ctx context.Context, prefix string) iter.Seq2[broker.Observation, error] {
	return func(yield func(broker.Observation, error) bool) {
		from := []byte(prefix)
		for {
			page, err := s.observations(ctx, from, []byte(prefix))
			if err != nil {
				yield(broker.Observation{}, err)
				return
			}
			for _, ob := range page {
				if !yield(ob, nil) {
					return
				}
			}
			if len(page) < chunk {
				return
			}
			from = append([]byte(page[len(page)-1].Key), 0)
		}
	}
}

func (s *Store) observations(ctx context.Context, from, prefix []byte) (page []broker.Observation, err error) {
	err = s.view(ctx, func(tx *bbolt.Tx) error {
		c := tx.Bucket(bucketObserved).Cursor()
		for k, v := c.Seek(from); k != nil && bytes.HasPrefix(k, prefix) && len(page) < chunk; k, v = c.Next() {
			page = append(page, broker.Observation{Key: string(k), Value: append([]byte{}, v...)})
		}
		return nil
	})
	return page, err
}

// Close implements broker.Store: what was queued is still written.
func (s *Store) Close() error {
	s.mu.Lock()
	s.refuse()
	s.mu.Unlock()
	<-s.stopped
	s.backup.giveWay("the store closes")
	if err := s.db.Close(); err != nil {
		return fmt.Errorf("closing store: %w", err)
	}
	return nil
}

// refuse takes no more calls. The caller holds s.mu.
func (s *Store) refuse() {
	if !s.closing {
		s.closing = true
		close(s.done)
		s.queued.Signal()
	}
}

// shut closes the store at once: what is queued is refused.
func (s *Store) shut() {
	s.mu.Lock()
	s.refuse()
	for t, q := range s.queue {
		for _, o := range q {
			o.taken, o.err = true, broker.ErrStoreClosed
			close(o.done)
		}
		s.queue[t] = nil
	}
	s.mu.Unlock()
	s.backup.giveWay("the store closes")
	if err := s.db.Close(); err != nil {
		s.cfg.Log.Error("closing store after a failure", "path", s.cfg.Path, "error", err)
	}
}

// Stats is what a store looks like now, for metrics. Sizes are in bytes.
type Stats struct {
	File    int64 // the size of the file
	Unused  int64 // the part of it that holds nothing
	Waiting int   // calls that wait for a commit
}

// Stats returns the store's figures.
func (s *Store) Stats() (Stats, error) {
	var st Stats
	err := s.view(context.Background(), func(tx *bbolt.Tx) error {
		info, err := s.file.Stat()
		if err != nil {
			return err
		}
		bolt := s.db.Stats()
		st.File = info.Size()
		st.Unused = st.File - tx.Size() + int64(bolt.FreePageN+bolt.PendingPageN)*int64(s.db.Info().PageSize)
		return nil
	})
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, q := range s.queue {
		st.Waiting += len(q)
	}
	if errors.Is(err, os.ErrClosed) {
		err = broker.ErrStoreClosed
	}
	return st, err
}
