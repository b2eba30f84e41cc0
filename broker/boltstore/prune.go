package boltstore

import (
	"bytes"
	"context"
	"fmt"

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

// Prune implements broker.Store: the log in one step, then each day of grants, then
// observations some at a time.
func (s *Store) Prune(ctx context.Context, p broker.Pruning) (broker.PruneReport, error) {
	var report broker.PruneReport
	err := s.alone(ctx, func(t *txn) (err error) {
		report.Records, err = t.pruneLog(p)
		report.Horizon = t.horizon
		return err
	})
	if err != nil {
		return broker.PruneReport{}, fmt.Errorf("pruning the log: %w", err)
	}
	days, err := s.expiredDays(ctx, p)
	if err != nil {
		return report, fmt.Errorf("pruning grants: %w", err)
	}
	for _, day := range days {
		var n int
		err := s.alone(ctx, func(t *txn) (err error) {
			n, err = dropDay(t.tx.Bucket(bucketGrants), day)
			return err
		})
		if err != nil {
			return report, fmt.Errorf("pruning grants of %s: %w", day, err)
		}
		report.Grants += n
	}
	for _, r := range p.Observations {
		n, err := s.pruneObserved(ctx, r)
		report.Observations += n
		if err != nil {
			return report, fmt.Errorf("pruning observations from %q on: %w", r.From, err)
		}
	}
	return report, nil
}

// observationsAtOnce bounds the deletions of one transaction: an append may wait for it.
const observationsAtOnce = 1000

func (s *Store) pruneObserved(ctx context.Context, r broker.KeyRange) (total int, err error) {
	for n := observationsAtOnce; n == observationsAtOnce; total += n {
		err := s.alone(ctx, func(t *txn) (err error) {
			n, err = dropObserved(t.tx.Bucket(bucketObserved), r)
			return err
		})
		if err != nil {
			return total, err
		}
	}
	return total, nil
}

// dropObserved deletes the first keys of a range. They are collected before the first
// goes: a cursor is undefined after a deletion.
func dropObserved(b *bbolt.Bucket, r broker.KeyRange) (int, error) {
	var gone [][]byte
	c := b.Cursor()
	for k, _ := c.Seek([]byte(r.From)); k != nil && string(k) < r.Until && len(gone) < observationsAtOnce; k, _ = c.Next() {
		gone = append(gone, bytes.Clone(k))
	}
	for _, k := range gone {
		if err := b.Delete(k); err != nil {
			return 0, err
		}
	}
	return len(gone), nil
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

func dropDay(grants *bbolt.Bucket, day string) (int, error) {
	b := grants.Bucket([]byte(day))
	if b == nil {
		return 0, nil
	}
	n := b.Stats().KeyN
	return n, grants.DeleteBucket([]byte(day))
}
