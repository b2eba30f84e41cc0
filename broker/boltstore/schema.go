package boltstore

import (
	"encoding/binary"
	"fmt"
	"time"

	"github.com/dayflyhq/dayfly/proto/feed"
	"go.etcd.io/bbolt"
)

const (
	format        = "dayfly store"
	schemaVersion = 1

	// dayLayout names the bucket of a day: sorts by time.
	dayLayout = "20060102"
)

var (
	bucketMeta     = []byte("dayfly")
	bucketLog      = []byte("log")
	bucketGrants   = []byte("grants")
	bucketObserved = []byte("observed")
	bucketDropped  = []byte("dropped") // made by the first pruning

	keyFormat  = []byte("format")
	keySchema  = []byte("schema")
	keyHead    = []byte("head")
	keyHorizon = []byte("horizon")
	keyCommits = []byte("commits")
	keyBackup  = []byte("backup") // when the file was made as a backup
)

// state is where the log is.
type state struct {
	head, horizon feed.Position
}

func logKey(seq uint64) []byte { return binary.BigEndian.AppendUint64(nil, seq) }

func dayOf(t time.Time) string { return t.UTC().Format(dayLayout) }

// dayEnd returns the first moment after a day.
func dayEnd(day []byte) (time.Time, error) {
	t, err := time.Parse(dayLayout, string(day))
	if err != nil {
		return time.Time{}, fmt.Errorf("%w: bucket %q is no day", ErrCorrupt, day)
	}
	return t.AddDate(0, 0, 1), nil
}

// checkSchema tells our files from others.
func checkSchema(tx *bbolt.Tx, path string) error {
	meta := tx.Bucket(bucketMeta)
	if meta == nil || string(meta.Get(keyFormat)) != format {
		return fmt.Errorf("%s: %w: a bbolt file of another program", path, ErrForeign)
	}
	v := meta.Get(keySchema)
	if len(v) != 4 {
		return fmt.Errorf("%s: %w: no schema version", path, ErrCorrupt)
	}
	if found := binary.BigEndian.Uint32(v); found != schemaVersion {
		return &SchemaError{Path: path, Found: found, Known: schemaVersion}
	}
	for _, name := range [][]byte{bucketLog, bucketGrants, bucketObserved} {
		if tx.Bucket(name) == nil {
			return fmt.Errorf("%s: %w: no bucket %q", path, ErrCorrupt, name)
		}
	}
	return nil
}

func readState(tx *bbolt.Tx) (state, error) {
	meta := tx.Bucket(bucketMeta)
	var (
		st  state
		err error
	)
	if st.head, err = decodePosition(meta.Get(keyHead)); err != nil {
		return state{}, fmt.Errorf("%w: head: %w", ErrCorrupt, err)
	}
	if st.horizon, err = decodePosition(meta.Get(keyHorizon)); err != nil {
		return state{}, fmt.Errorf("%w: horizon: %w", ErrCorrupt, err)
	}
	return st, nil
}

func writeState(meta *bbolt.Bucket, st state) error {
	if err := meta.Put(keyHead, encodePosition(st.head)); err != nil {
		return err
	}
	return meta.Put(keyHorizon, encodePosition(st.horizon))
}

// bumpCommits gives every transaction something to write: a proof of ownership is a
// write even when there is nothing to say.
func bumpCommits(tx *bbolt.Tx) error {
	next := binary.BigEndian.AppendUint64(nil, commitsOf(tx)+1)
	return tx.Bucket(bucketMeta).Put(keyCommits, next)
}

// backupMade returns when the file was made as a backup; zero for a store.
func backupMade(tx *bbolt.Tx) time.Time {
	if v := tx.Bucket(bucketMeta).Get(keyBackup); len(v) == 8 {
		return time.Unix(int64(binary.BigEndian.Uint64(v)), 0).UTC()
	}
	return time.Time{}
}

// commitsOf counts the transactions that the file has seen.
func commitsOf(tx *bbolt.Tx) uint64 {
	if v := tx.Bucket(bucketMeta).Get(keyCommits); len(v) == 8 {
		return binary.BigEndian.Uint64(v)
	}
	return 0
}
