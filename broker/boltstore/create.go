package boltstore

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/proto/feed"
	"go.etcd.io/bbolt"
)

// Create makes a new store at path with the first records of its log, which begin
// with an era. The records come unsealed. It never touches an existing file
// (ErrExists), and after a crash there is either a whole store or none.
func Create(path string, first ...broker.Record) error {
	if len(first) == 0 || first[0].Era == nil {
		return errors.New("creating store: a log begins with an era")
	}
	if err := putInPlace(path, nil, func(temp string) error { return initialise(temp, first) }); err != nil {
		return fmt.Errorf("creating store: %w", err)
	}
	return nil
}

// putInPlace makes a file whole or not at all: make fills, and syncs, a temporary one
// beside it, for nobody but its owner. It never touches an existing file (ErrExists).
// Each write goes through fault, if there is one.
func putInPlace(path string, fault func(step string, write func() error) error, make func(temp string) error) (err error) {
	if fault == nil {
		fault = func(_ string, write func() error) error { return write() }
	}
	if _, err := os.Lstat(path); err == nil {
		return fmt.Errorf("%s: %w", path, ErrExists)
	}
	dir := filepath.Dir(path)
	temp, err := os.CreateTemp(dir, ".dayfly-store-*")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.Remove(temp.Name())) }()
	if err := temp.Close(); err != nil {
		return err
	}
	if err := make(temp.Name()); err != nil {
		return err
	}
	// A link, unlike a rename, never replaces.
	if err := fault("link", func() error { return os.Link(temp.Name(), path) }); errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%s: %w", path, ErrExists)
	} else if err != nil {
		return err
	}
	return fault("directory", func() error { return syncDir(dir) })
}

func initialise(path string, first []broker.Record) error {
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{NoFreelistSync: true, FreelistType: bbolt.FreelistMapType})
	if err != nil {
		return err
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		for _, name := range [][]byte{bucketMeta, bucketLog, bucketGrants, bucketObserved} {
			if _, err := tx.CreateBucket(name); err != nil {
				return err
			}
		}
		meta := tx.Bucket(bucketMeta)
		if err := meta.Put(keyFormat, []byte(format)); err != nil {
			return err
		}
		if err := meta.Put(keySchema, binary.BigEndian.AppendUint32(nil, schemaVersion)); err != nil {
			return err
		}
		var head feed.Position
		for _, r := range first {
			if _, head, err = putRecord(tx.Bucket(bucketLog), r, head); err != nil {
				return err
			}
		}
		return writeState(meta, state{head: head})
	})
	if err == nil {
		err = db.Sync()
	}
	return errors.Join(err, db.Close())
}

// putRecord seals a record behind the head and stores it. It returns the record as
// it reads from the disk, so that no one holds one that says something else.
func putRecord(log *bbolt.Bucket, r broker.Record, head feed.Position) (broker.Record, feed.Position, error) {
	sealed, next := r.Seal(head)
	if err := sealed.Validate(); err != nil {
		return broker.Record{}, head, err
	}
	if sealed.Era != nil && sealed.Era.Era <= head.Era {
		return broker.Record{}, head, fmt.Errorf("era %s does not follow era %s", sealed.Era.Era, head.Era)
	}
	value, err := encodeRecord(sealed, next.Era)
	if err != nil {
		return broker.Record{}, head, err
	}
	stored, err := decodeEntry(value)
	if err != nil {
		return broker.Record{}, head, fmt.Errorf("record cannot be stored: %w", err)
	}
	if err := verifyRecord(stored.record, head.Sum); err != nil {
		return broker.Record{}, head, fmt.Errorf("record cannot be stored: %w", err)
	}
	log.FillPercent = 0.9 // numbers only grow
	if err := log.Put(logKey(sealed.Seq), value); err != nil {
		return broker.Record{}, head, err
	}
	return stored.record, next, nil
}

// verifyRecord checks a record against the sum before it.
func verifyRecord(r broker.Record, previous feed.Sum) error {
	if r.Private != r.Details.Digest() {
		return fmt.Errorf("private digest of record %d does not match its details", r.Seq)
	}
	if r.Sum != r.Chain(previous) {
		return fmt.Errorf("running hash of record %d does not follow its predecessor", r.Seq)
	}
	return nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("syncing directory: %w", err)
	}
	if err := errors.Join(d.Sync(), d.Close()); err != nil {
		return fmt.Errorf("syncing directory: %w", err)
	}
	return nil
}
