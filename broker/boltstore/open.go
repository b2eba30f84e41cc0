package boltstore

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"log/slog"
	"os"
	"runtime/debug"
	"sync"
	"time"

	"go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
)

const (
	// defaultReserve holds some thousand revocations.
	defaultReserve = 4 << 20
	// defaultLockTimeout outlasts a predecessor that is shutting down.
	defaultLockTimeout = 5 * time.Second
)

// initialMmap is address space, not memory: growing the map waits for readers. A
// variable for the tests.
var initialMmap = 256 << 20

// Config says how to open a store.
type Config struct {
	// Path of the file, which Create made. Required.
	Path string
	// Log gets warnings. Zero: slog.DiscardHandler.
	Log *slog.Logger
	// LockTimeout bounds the wait for another process to let go of the file.
	// Zero: 5 s.
	LockTimeout time.Duration
	// Reserve is how many bytes of the file issuing leaves to appends. Zero: 4 MiB.
	Reserve int64
	// MaxBytes bounds the file, as a full disk does. Zero: the disk does.
	MaxBytes int64
	// OnCommit is told of every commit, by the goroutine that commits: it must be
	// quick. Zero: nobody is.
	OnCommit func(Commit)

	// fault stands in for a disk that fails: tests set it.
	fault func(commit func() error) error
}

// A Commit is what one transaction did, for metrics.
type Commit struct {
	Appends, Issues, Observations int // operations carried, not bytes
	// Took is the whole transaction; Wrote is its part that wrote and synced.
	Took, Wrote time.Duration
	// Err is why nothing is known to have been written; nil for a commit.
	Err error
}

// Open opens a store that Create made. It refuses, with an error that says what to
// do, a file that is missing (ErrMissing), open to others (ErrMode), held by another
// process (ErrLocked), no store of ours (ErrForeign), of another schema
// (*SchemaError), damaged (ErrCorrupt) or a backup (ErrBackup). It reads the whole file once.
func Open(cfg Config) (*Store, error) {
	cfg.Log = cmp.Or(cfg.Log, slog.New(slog.DiscardHandler))
	cfg.LockTimeout = cmp.Or(cfg.LockTimeout, defaultLockTimeout)
	cfg.Reserve = cmp.Or(cfg.Reserve, defaultReserve)
	s, err := open(cfg)
	if err != nil {
		return nil, fmt.Errorf("opening store: %w", err)
	}
	return s, nil
}

func open(cfg Config) (*Store, error) {
	if err := inspect(cfg.Path, cfg.LockTimeout); err != nil {
		return nil, err
	}
	var file *os.File
	db, err := openDB(cfg.Path, &bbolt.Options{
		Timeout:         cfg.LockTimeout,
		NoFreelistSync:  true, // else every commit would rewrite the list of free pages
		FreelistType:    bbolt.FreelistMapType,
		InitialMmapSize: initialMmap,
		OpenFile: func(path string, flag int, mode os.FileMode) (*os.File, error) {
			f, err := os.OpenFile(path, flag&^os.O_CREATE, mode)
			file = f
			return f, err
		},
	})
	if err != nil {
		return nil, err
	}
	db.AllocSize = 0 // room makes the file grow, and MaxSize exact
	s := &Store{cfg: cfg, db: db, file: file, news: make(chan struct{}), done: make(chan struct{}), stopped: make(chan struct{})}
	s.queued = sync.NewCond(&s.mu)
	if err := s.load(); err != nil {
		return nil, errors.Join(err, db.Close())
	}
	go s.run()
	return s, nil
}

func (s *Store) load() error {
	err := s.db.View(func(tx *bbolt.Tx) (err error) {
		if made := backupMade(tx); !made.IsZero() {
			return fmt.Errorf("%s: %w: it was made at %s: make a store of it with: dayfly-broker restore", s.cfg.Path, ErrBackup, made.Format(time.RFC3339))
		}
		s.committed = commitsOf(tx)
		s.state, err = readState(tx)
		return err
	})
	if err != nil {
		return err
	}
	info, err := s.file.Stat()
	if err != nil {
		return err
	}
	s.identity = info
	s.room.file, s.room.db = s.file, s.db
	s.room.reserve, s.room.max = s.cfg.Reserve, s.cfg.MaxBytes
	if err := s.room.open(info.Size()); err != nil {
		s.cfg.Log.Warn("store has no room to reserve: only appends go through until there is", "path", s.cfg.Path, "error", err)
	}
	return nil
}

// inspect looks at the file without changing it, before it is opened for writing.
func inspect(path string, wait time.Duration) error {
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%w at %s: check the path, or make one with: dayfly-broker init", ErrMissing, path)
	case err != nil:
		return err
	case !info.Mode().IsRegular():
		return fmt.Errorf("%s: %w: not a regular file", path, ErrForeign)
	case info.Mode().Perm()&^0o600 != 0:
		return fmt.Errorf("%s: %w: mode %04o: run chmod 600 on it", path, ErrMode, info.Mode().Perm())
	}
	return readOnly(path, wait, func(tx *bbolt.Tx) error {
		if err := checkSchema(tx, path); err != nil {
			return err
		}
		if _, err := readState(tx); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		return walk(tx)
	})
}

// readOnly runs f on a file that may be anything. A damaged file makes bbolt panic,
// or fault on its map: both come back as ErrCorrupt.
func readOnly(path string, wait time.Duration, f func(*bbolt.Tx) error) (err error) {
	if err := checkPages(path); err != nil {
		return err
	}
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("%s: %w: %v", path, ErrCorrupt, r)
		}
	}()
	db, err := openDB(path, &bbolt.Options{ReadOnly: true, Timeout: wait})
	if err != nil {
		return err
	}
	return errors.Join(db.View(f), db.Close())
}

func openDB(path string, options *bbolt.Options) (*bbolt.DB, error) {
	db, err := bbolt.Open(path, 0o600, options)
	switch {
	case errors.Is(err, berrors.ErrTimeout):
		return nil, fmt.Errorf("%s: %w: stop the other dayfly-broker first", path, ErrLocked)
	case errors.Is(err, berrors.ErrInvalid), errors.Is(err, berrors.ErrChecksum), errors.Is(err, berrors.ErrVersionMismatch):
		return nil, fmt.Errorf("%s: %w: %w", path, ErrCorrupt, err)
	}
	return db, err
}

// maxDepth is how deep buckets lie in one another: grants, and days in it.
const maxDepth = 2

// walk touches every page and every key, so that damage shows now and not in the
// middle of a commit. In a damaged file a bucket may hold itself.
func walk(tx *bbolt.Tx) error {
	var visit func(b *bbolt.Bucket, depth int) error
	visit = func(b *bbolt.Bucket, depth int) error {
		if depth > maxDepth {
			return fmt.Errorf("%w: a bucket lies too deep", ErrCorrupt)
		}
		var last []byte
		return b.ForEach(func(k, v []byte) error {
			if last != nil && string(last) >= string(k) {
				return fmt.Errorf("%w: keys out of order", ErrCorrupt)
			}
			last = append(last[:0], k...)
			if v == nil {
				return visit(b.Bucket(k), depth+1)
			}
			return nil
		})
	}
	return tx.ForEach(func(_ []byte, b *bbolt.Bucket) error { return visit(b, 1) })
}

// The head of a bbolt page that holds meta data: the page's header, then these.
const (
	boltMagic     = 0xED0CDAED
	metaOffset    = 16 // of the magic in its page
	metaSize      = 64
	maxMetaSearch = 64 << 10
)

// checkPages finds out, without mapping the file, whether it is a bbolt file and
// holds all the pages that it claims: a map of a shorter file would fault.
func checkPages(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	head := make([]byte, min(info.Size(), maxMetaSearch+metaOffset+metaSize))
	if _, err := f.ReadAt(head, 0); err != nil {
		return err
	}
	claims, magic := int64(0), false
	offsets := []int{0}
	for page := 1 << 10; page <= maxMetaSearch; page <<= 1 {
		offsets = append(offsets, page)
	}
	for _, at := range offsets {
		if at+metaOffset+metaSize > len(head) {
			break
		}
		m := head[at+metaOffset:][:metaSize]
		if binary.NativeEndian.Uint32(m) != boltMagic {
			continue
		}
		magic = true
		sum := fnv.New64a()
		sum.Write(m[:56])
		if sum.Sum64() == binary.NativeEndian.Uint64(m[56:]) {
			claims = max(claims, int64(binary.NativeEndian.Uint64(m[40:]))*int64(binary.NativeEndian.Uint32(m[8:])))
		}
	}
	switch {
	case !magic:
		return fmt.Errorf("%s: %w", path, ErrForeign)
	case claims == 0:
		return fmt.Errorf("%s: %w: neither copy of its first page is whole", path, ErrCorrupt)
	case claims > info.Size():
		return fmt.Errorf("%s: %w: %d bytes of at least %d are there", path, ErrCorrupt, info.Size(), claims)
	}
	return nil
}
