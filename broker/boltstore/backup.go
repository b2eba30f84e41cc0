package boltstore

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/proto/feed"
	"go.etcd.io/bbolt"
)

const (
	// maxBackup is how long a backup may see the store as it was.
	maxBackup = 10 * time.Minute
	// patience is how long a commit waits for a backup that is in its way: bbolt can't
	// make its map of the file larger while anybody reads.
	patience = 250 * time.Millisecond
)

// maxPinned bounds by how many bytes the file grows because a backup still sees pages
// that were replaced. A variable for the tests.
var maxPinned int64 = 256 << 20

// backups is the backup that is under way, if there is one.
type backups struct {
	mu      sync.Mutex
	running *Backup
}

// A Backup is a copy of the store as it was at one moment, to be read to its end and
// closed. Reading as slowly as may be holds up nobody: once the store needs what the
// backup holds it gives the backup up, and Read returns ErrGaveWay.
type Backup struct {
	Size int64         // bytes that Read gives in all
	Head feed.Position // of the log in the copy

	out  *io.PipeReader
	in   *io.PipeWriter
	done chan struct{} // closed when the store holds nothing for it any more
}

// Backup begins a backup. One runs at a time; another is ErrBusy.
func (s *Store) Backup() (*Backup, error) {
	b := &Backup{done: make(chan struct{})}
	b.out, b.in = io.Pipe()
	s.backup.mu.Lock()
	if s.backup.running != nil {
		s.backup.mu.Unlock()
		return nil, ErrBusy
	}
	s.backup.running = b // before looking whether the store closes, which gives way
	s.backup.mu.Unlock()
	tx, err := s.begin()
	if err != nil {
		s.backup.ended(b)
		return nil, fmt.Errorf("beginning a backup: %w", err)
	}
	st, err := readState(tx)
	if err != nil {
		_ = tx.Rollback()
		s.backup.ended(b)
		return nil, fmt.Errorf("beginning a backup: %w", err)
	}
	b.Size, b.Head = tx.Size(), st.head
	late := time.AfterFunc(maxBackup, func() { b.abort(fmt.Sprintf("it took longer than %s", maxBackup)) })
	go func() {
		defer s.backup.ended(b)
		defer late.Stop()
		_, err := tx.WriteTo(b.in)
		err = errors.Join(err, tx.Rollback())
		b.in.CloseWithError(err) // nil: the end
	}()
	return b, nil
}

func (s *Store) begin() (tx *bbolt.Tx, err error) {
	s.mu.Lock()
	closed := s.closing
	s.mu.Unlock()
	if closed {
		return nil, broker.ErrStoreClosed
	}
	return s.db.Begin(false)
}

// Read implements io.Reader.
func (b *Backup) Read(p []byte) (int, error) { return b.out.Read(p) }

// Close ends the backup and lets go of what it holds.
func (b *Backup) Close() error {
	err := b.out.Close()
	<-b.done
	return err
}

// abort ends the backup: whoever reads it learns why.
func (b *Backup) abort(why string) { b.in.CloseWithError(fmt.Errorf("%w: %s", ErrGaveWay, why)) }

func (bs *backups) ended(b *Backup) {
	bs.mu.Lock()
	bs.running = nil
	bs.mu.Unlock()
	close(b.done)
}

// giveWay ends a backup that is under way, and reports whether there was one.
func (bs *backups) giveWay(why string) bool {
	bs.mu.Lock()
	b := bs.running
	bs.mu.Unlock()
	if b == nil {
		return false
	}
	b.abort(why)
	<-b.done
	return true
}

// watch ends the backup under way if what begins now takes too long, until the returned
// function is called.
func (bs *backups) watch() (stop func()) {
	bs.mu.Lock()
	defer bs.mu.Unlock()
	if bs.running == nil {
		return func() {}
	}
	timer := time.AfterFunc(patience, func() { bs.giveWay(fmt.Sprintf("a write took longer than %s", patience)) })
	return func() { timer.Stop() }
}

// CopyFile writes the bytes of a store that nobody serves, after telling begin how many
// there are.
func CopyFile(ctx context.Context, path string, begin func(size int64), w io.Writer) error {
	err := inspect(path, defaultLockTimeout)
	if err == nil {
		err = readOnly(path, defaultLockTimeout, func(tx *bbolt.Tx) error {
			begin(tx.Size())
			_, err := tx.WriteTo(interruptible{ctx, w})
			return err
		})
	}
	if err != nil {
		return fmt.Errorf("copying store: %w", err)
	}
	return nil
}

// interruptible is a writer that a context ends.
type interruptible struct {
	ctx context.Context
	w   io.Writer
}

func (i interruptible) Write(p []byte) (int, error) {
	if err := i.ctx.Err(); err != nil {
		return 0, err
	}
	return i.w.Write(p)
}

// SaveBackup makes a backup of what fill writes, the bytes of a store. The file is there
// once it has been synced and found good by Check, and marked as made at a time, so that
// nobody serves it for the store that it is a copy of; before that there is none. An
// existing file is left as it is (ErrExists).
func SaveBackup(ctx context.Context, path string, made time.Time, fill func(io.Writer) error) (Report, error) {
	var report Report
	err := putInPlace(path, nil, func(temp string) (err error) {
		if err := write(temp, fill); err != nil {
			return err
		}
		if report, err = Check(ctx, temp); err != nil {
			return err
		}
		if err := edit(temp, func(tx *bbolt.Tx) error {
			value := binary.BigEndian.AppendUint64(nil, uint64(made.Unix()))
			return tx.Bucket(bucketMeta).Put(keyBackup, value)
		}); err != nil {
			return fmt.Errorf("marking the backup: %w", err)
		}
		report.Backup = made.UTC().Truncate(time.Second)
		return inspect(temp, defaultLockTimeout)
	})
	if err != nil {
		return report, fmt.Errorf("saving backup: %w", err)
	}
	return report, nil
}

// write fills a file and syncs it.
func write(path string, fill func(io.Writer) error) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_TRUNC, 0)
	if err != nil {
		return err
	}
	err = fill(f)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// edit changes a file that nobody serves, in one synced transaction.
func edit(path string, change func(*bbolt.Tx) error) error {
	db, err := openDB(path, &bbolt.Options{Timeout: defaultLockTimeout, NoFreelistSync: true, FreelistType: bbolt.FreelistMapType})
	if err != nil {
		return err
	}
	db.AllocSize = 0 // no larger than it must be
	err = db.Update(change)
	if err == nil {
		err = db.Sync()
	}
	return errors.Join(err, db.Close())
}
