package boltstore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/proto/feed"
	"go.etcd.io/bbolt"
)

// ReadLog reads the log of a store or a backup that nobody serves. Of a damaged file it
// reads what it can, and says in Damage that there may be more; the error is for a file
// that says nothing at all.
func ReadLog(ctx context.Context, path string) (*broker.LogCopy, error) {
	c := &broker.LogCopy{}
	report, err := Check(ctx, path)
	switch {
	case errors.Is(err, ErrCorrupt):
		c.Damage = append([]string{err.Error()}, report.Problems...)
	case err != nil:
		return nil, err
	}
	err = readOnly(path, defaultLockTimeout, func(tx *bbolt.Tx) error {
		if err := checkSchema(tx, path); err != nil {
			return err
		}
		st, err := readState(tx)
		if err != nil {
			return err
		}
		c.Head, c.Horizon, c.Made = st.head, st.horizon, backupMade(tx)
		readEntries(c, tx.Bucket(bucketLog))
		readRoster(c, tx.Bucket(bucketObserved))
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("reading the log of %s: %w", path, err)
	}
	return c, nil
}

// readEntries reads from both ends, since damage in the middle ends a walk.
func readEntries(c *broker.LogCopy, log *bbolt.Bucket) {
	entries := map[uint64]entry{}
	note := func(k, v []byte) {
		e, err := decodeEntry(v)
		switch {
		case err != nil || string(k) != string(logKey(e.position.Seq)):
			c.Damage = append(c.Damage, fmt.Sprintf("record %x can't be read", k))
		case !e.dropped && e.record.Private != e.record.Details.Digest():
			c.Damage = append(c.Damage, fmt.Sprintf("record %d isn't what was sealed", e.position.Seq))
		default:
			entries[e.position.Seq] = e
		}
	}
	salvage(c, func() {
		cursor := log.Cursor()
		for k, v := cursor.First(); k != nil; k, v = cursor.Next() {
			note(k, v)
		}
	})
	if len(c.Damage) > 0 {
		salvage(c, func() {
			cursor := log.Cursor()
			for k, v := cursor.Last(); k != nil; k, v = cursor.Prev() {
				note(k, v)
			}
		})
	}
	for _, e := range entries {
		if e.dropped {
			c.Dropped = append(c.Dropped, e.position)
		} else {
			c.Records = append(c.Records, e.record)
		}
	}
	slices.SortFunc(c.Records, func(a, b broker.Record) int { return int(int64(a.Seq) - int64(b.Seq)) })
}

func readRoster(c *broker.LogCopy, observed *bbolt.Bucket) {
	salvage(c, func() {
		cursor := observed.Cursor()
		for k, v := cursor.Seek([]byte(broker.RosterPrefix)); k != nil && strings.HasPrefix(string(k), broker.RosterPrefix); k, v = cursor.Next() {
			c.Verifiers = append(c.Verifiers, broker.Observation{Key: string(k), Value: append([]byte{}, v...)})
		}
	})
}

// salvage runs f for as long as the file bears it.
func salvage(c *broker.LogCopy, f func()) {
	defer func() {
		if r := recover(); r != nil {
			c.Damage = append(c.Damage, fmt.Sprintf("%v", r))
		}
	}()
	f()
}

// RestoreConfig says what to restore.
type RestoreConfig struct {
	From string // the backup, which nobody serves
	Path string // the store to make; there must be nothing yet
	// Restoration is what broker.PlanRestore made of the backup.
	Restoration *broker.Restoration

	// fault stands in for a disk that fails: tests set it.
	fault func(step string, write func() error) error
}

// Restore makes a store of a backup: its grants, its observations and its locks, and
// behind them the records of a new era. The store appears whole, synced and found good
// by Check, or not at all; an existing file is left as it is (ErrExists).
func Restore(ctx context.Context, cfg RestoreConfig) (Report, error) {
	var report Report
	fault := cfg.fault
	if fault == nil {
		fault = func(_ string, write func() error) error { return write() }
	}
	err := putInPlace(cfg.Path, fault, func(temp string) error {
		err := fault("copy", func() error {
			return write(temp, func(w io.Writer) error { return CopyFile(ctx, cfg.From, func(int64) {}, w) })
		})
		if err != nil {
			return err
		}
		if err := fault("records", func() error { return edit(temp, func(tx *bbolt.Tx) error { return beginEra(tx, cfg.Restoration) }) }); err != nil {
			return err
		}
		report, err = Check(ctx, temp)
		return err
	})
	if err != nil {
		return report, fmt.Errorf("restoring store: %w", err)
	}
	return report, nil
}

// beginEra seals the records of a restoration and forgets what died with earlier eras:
// keys, and the places of dropped records, which the new horizon explains.
func beginEra(tx *bbolt.Tx, r *broker.Restoration) error {
	st, err := readState(tx)
	if err != nil {
		return err
	}
	if st.head != r.Backup {
		return fmt.Errorf("the backup was changed meanwhile: its head is %s, and was %s", st.head, r.Backup)
	}
	log := tx.Bucket(bucketLog)
	var dead []uint64
	err = eachEntry(log, 0, func(e entry) bool {
		if e.dropped || e.record.Key != nil {
			dead = append(dead, e.position.Seq)
		}
		return true
	})
	if err != nil {
		return err
	}
	for _, seq := range dead {
		if err := log.Delete(logKey(seq)); err != nil {
			return err
		}
	}
	head, horizon := r.Behind, feed.Position{}
	for i, rec := range r.Records {
		if _, head, err = putRecord(log, rec, head); err != nil {
			return err
		}
		if i == 0 {
			horizon = head // an era's tokens are issued at its record or later
		}
	}
	if err := putObservations(tx.Bucket(bucketObserved), r.Verifiers); err != nil {
		return err
	}
	meta := tx.Bucket(bucketMeta)
	if err := meta.Delete(keyBackup); err != nil {
		return err
	}
	if err := bumpCommits(tx); err != nil {
		return err
	}
	return writeState(meta, state{head: head, horizon: horizon})
}
