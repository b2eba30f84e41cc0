package boltstore

import (
	"bytes"
	"context"
	"fmt"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/proto/feed"
	"go.etcd.io/bbolt"
)

// beyond returns the records that the log has beyond a position, or ErrOffLog.
func (t *txn) beyond(at feed.Position) ([]broker.Record, error) {
	switch {
	case at == t.head && at.Seq > 0:
		return nil, nil
	case at.Seq == 0 || at.Seq >= t.head.Seq:
		return nil, broker.ErrOffLog
	}
	if on, err := t.onLog(at); err != nil {
		return nil, err
	} else if !on {
		return nil, broker.ErrOffLog
	}
	var newer []broker.Record
	err := eachEntry(t.log(), at.Seq, func(e entry) bool {
		if !e.dropped {
			newer = append(newer, e.record)
		}
		return true
	})
	return newer, err
}

func (t *txn) onLog(at feed.Position) (bool, error) {
	if at.Seq <= t.horizon.Seq {
		return at == t.horizon, nil
	}
	v := t.log().Get(logKey(at.Seq))
	if v == nil {
		return false, fmt.Errorf("%w: no record %d", ErrCorrupt, at.Seq)
	}
	e, err := decodeEntry(v)
	if err != nil {
		return false, fmt.Errorf("%w: record %d: %w", ErrCorrupt, at.Seq, err)
	}
	return e.position == at, nil
}

// Prune implements broker.Store: the log in one step, then days of grants and
// observations some at a time. Days leave the grants whole, in one transaction; what
// empties them afterwards is seen by nobody, and the next pruning goes on with what a
// crash left.
func (s *Store) Prune(ctx context.Context, p broker.Pruning) (broker.PruneReport, error) {
	s.pruning.Lock()
	defer s.pruning.Unlock()
	var report broker.PruneReport
	err := s.alone(ctx, func(t *txn) (err error) {
		report.Records, err = t.pruneLog(p)
		report.Horizon = t.horizon
		return err
	})
	if err != nil {
		return broker.PruneReport{}, fmt.Errorf("pruning the log: %w", err)
	}
	if err := s.pruneGrants(ctx, p, &report); err != nil {
		return report, fmt.Errorf("pruning grants: %w", err)
	}
	for _, r := range p.Observations {
		observed := func(tx *bbolt.Tx) *bbolt.Bucket { return tx.Bucket(bucketObserved) }
		n, err := s.deleteKeys(ctx, observed, r.From, func(k []byte) bool { return string(k) < r.Until })
		report.Observations += n
		if err != nil {
			return report, fmt.Errorf("pruning observations from %q on: %w", r.From, err)
		}
	}
	return report, nil
}

func (s *Store) pruneGrants(ctx context.Context, p broker.Pruning, report *broker.PruneReport) error {
	expired, err := s.expiredDays(ctx, p)
	if err != nil {
		return err
	}
	if len(expired) > 0 {
		err := s.alone(ctx, func(t *txn) error { return moveDays(t.tx, expired) })
		if err != nil {
			return err
		}
	}
	dropped, err := s.droppedDays(ctx)
	if err != nil {
		return err
	}
	for _, day := range dropped {
		in := func(tx *bbolt.Tx) *bbolt.Bucket { return tx.Bucket(bucketDropped).Bucket([]byte(day)) }
		n, err := s.deleteKeys(ctx, in, "", func([]byte) bool { return true })
		report.Grants += n
		if err == nil {
			err = s.alone(ctx, func(t *txn) error { return t.tx.Bucket(bucketDropped).DeleteBucket([]byte(day)) })
		}
		if err != nil {
			return fmt.Errorf("emptying %s: %w", day, err)
		}
	}
	return nil
}

// moveDays takes days from the grants, the oldest first. One of which an earlier pruning has
// left something waits for the next, since a clock was set back by a month; and the days
// after it with it, for the parents of its grants may be in these.
func moveDays(tx *bbolt.Tx, days []string) error {
	dropped, err := tx.CreateBucketIfNotExists(bucketDropped)
	if err != nil {
		return err
	}
	for _, day := range days {
		if dropped.Bucket([]byte(day)) != nil {
			break
		}
		if err := tx.Bucket(bucketGrants).MoveBucket([]byte(day), dropped); err != nil {
			return fmt.Errorf("moving %s: %w", day, err)
		}
	}
	return nil
}

const (
	// keysAtOnce bounds the deletions of one transaction: an append may wait for it.
	keysAtOnce = 500
	// restAfterStep is how often the time of a step passes before the next one: pruning
	// has all day, and who issues meanwhile should seldom meet it.
	restAfterStep = 2
)

// deleteKeys deletes a bucket's keys from one on, as long as they are wanted, in steps,
// and returns how many went. Pages are read before the transaction that writes, which
// holds up everybody: by then they are in memory.
func (s *Store) deleteKeys(ctx context.Context, in func(*bbolt.Tx) *bbolt.Bucket, from string, wanted func(key []byte) bool) (total int, err error) {
	for {
		var keys [][]byte
		err := s.view(ctx, func(tx *bbolt.Tx) error {
			c := in(tx).Cursor()
			for k, _ := c.Seek([]byte(from)); k != nil && wanted(k) && len(keys) < keysAtOnce; k, _ = c.Next() {
				keys = append(keys, bytes.Clone(k))
			}
			return nil
		})
		if err != nil {
			return total, err
		}
		if len(keys) == 0 {
			return total, nil
		}
		began := time.Now()
		err = s.alone(ctx, func(t *txn) error {
			b := in(t.tx)
			for _, k := range keys {
				if err := b.Delete(k); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return total, err
		}
		if total += len(keys); len(keys) < keysAtOnce {
			return total, nil
		}
		select {
		case <-time.After(restAfterStep * time.Since(began)):
		case <-ctx.Done():
			return total, ctx.Err()
		case <-s.done:
			return total, broker.ErrStoreClosed
		}
	}
}

// alone runs f in a transaction of its own.
func (s *Store) alone(ctx context.Context, f func(*txn) error) error {
	return s.do(ctx, &op{tier: tierAppend, alone: true, apply: f})
}

// pruneLog returns how many records went. The numbers above the horizon stay, a
// dropped one as a trace: tokens are still at its position, and the chain needs it.
func (t *txn) pruneLog(p broker.Pruning) (int, error) {
	if p.Horizon > t.head.Seq {
		return 0, fmt.Errorf("horizon %d is beyond the head %d", p.Horizon, t.head.Seq)
	}
	horizon := t.horizon
	var gone []feed.Position
	n := 0
	err := eachEntry(t.log(), 0, func(e entry) bool {
		if e.position.Seq > max(p.Horizon, t.horizon.Seq) {
			return false
		}
		if e.position.Seq > horizon.Seq {
			horizon = e.position
		}
		if !e.dropped && p.Keep != nil && p.Keep(e.record) {
			return true
		}
		if !e.dropped {
			n++
		}
		gone = append(gone, e.position)
		return true
	})
	if err != nil {
		return 0, err
	}
	for _, g := range gone {
		if err := t.log().Delete(logKey(g.Seq)); err != nil {
			return 0, err
		}
	}
	t.horizon = horizon
	for _, seq := range p.Drop {
		dropped, err := t.drop(seq)
		if err != nil {
			return 0, err
		}
		if dropped {
			n++
		}
	}
	return n, nil
}

// drop leaves of one record above the horizon nothing but its trace.
func (t *txn) drop(seq uint64) (bool, error) {
	v := t.log().Get(logKey(seq))
	if v == nil || seq <= t.horizon.Seq {
		return false, nil
	}
	e, err := decodeEntry(v)
	if err != nil || e.dropped {
		return false, err
	}
	return true, t.log().Put(logKey(seq), encodeDropped(e.position))
}

// expiredDays lists the days that ended before all grants to keep.
func (s *Store) expiredDays(ctx context.Context, p broker.Pruning) (days []string, err error) {
	if p.GrantsExpiredBefore.IsZero() {
		return nil, nil
	}
	err = s.view(ctx, func(tx *bbolt.Tx) error {
		return tx.Bucket(bucketGrants).ForEachBucket(func(day []byte) error {
			end, err := dayEnd(day)
			if err == nil && !end.After(p.GrantsExpiredBefore) {
				days = append(days, string(day))
			}
			return err
		})
	})
	return days, err
}

// droppedDays lists the days that are gone from the grants and not yet from the file.
func (s *Store) droppedDays(ctx context.Context) (days []string, err error) {
	err = s.view(ctx, func(tx *bbolt.Tx) error {
		dropped := tx.Bucket(bucketDropped)
		if dropped == nil {
			return nil // nothing was ever pruned
		}
		return dropped.ForEachBucket(func(day []byte) error {
			days = append(days, string(day))
			return nil
		})
	})
	return days, err
}
