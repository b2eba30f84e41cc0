package boltstore

import (
	"errors"
	"fmt"
	"os"
	"syscall"

	"go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
)

const (
	// minGrow and maxGrow bound the step by which the file grows: a 32nd of it.
	minGrow = 256 << 10
	maxGrow = 64 << 20
	// An operation dirties its leaf and the branch above it, if no other one has; a
	// transaction adds the roots of its buckets, and the pages that split.
	pagesPerOp = 2
	pagesPerTx = 24
)

// A room is the space on the disk that belongs to the file. All of it is allocated,
// so that a write within it can't find the disk full. Only the committer uses it.
type room struct {
	file *os.File
	db   *bbolt.DB
	// allocated is the size of the file, used the part that holds pages, free the
	// part of these that can be written again.
	allocated, used, free int64
	pending               int64 // the part of free that readers may still see
	reserve, max          int64
}

// open takes possession of a file of a size: a copied file may have holes.
func (r *room) open(size int64) error {
	r.allocated = size
	if err := r.refresh(); err != nil {
		return err
	}
	if err := preallocate(r.file, 0, size); err != nil {
		r.allocated = r.used
		return fmt.Errorf("allocating store's file: %w", err)
	}
	return r.ensure(0, r.reserve)
}

// refresh looks at how much of the file is in use.
func (r *room) refresh() error {
	err := r.db.View(func(tx *bbolt.Tx) error {
		r.used = tx.Size()
		return nil
	})
	st := r.db.Stats()
	r.free = int64(st.FreePageN+st.PendingPageN) * int64(r.db.Info().PageSize)
	r.pending = int64(st.PendingPageN) * int64(r.db.Info().PageSize)
	return err
}

// left is what a transaction that keeps off the last `keep` bytes can write.
func (r *room) left(keep int64) int64 { return r.allocated - r.used + r.free - keep }

// needOf estimates what a transaction of these ops writes.
func (r *room) needOf(ops []*op) int64 {
	pages, bytes := int64(len(ops)*pagesPerOp+pagesPerTx), int64(0)
	for _, o := range ops {
		bytes += int64(o.bytes)
	}
	return pages*int64(r.db.Info().PageSize) + 2*bytes
}

// ensure makes the file grow until need bytes fit beside the kept ones.
func (r *room) ensure(need, keep int64) error {
	short := need - r.left(keep)
	if short <= 0 {
		return nil
	}
	step := max(short, min(max(r.allocated/32, minGrow), maxGrow))
	err := r.grow(step)
	if isFull(err) && step > short {
		err = r.grow(short)
	}
	return err
}

// behind makes the file grow until need bytes fit behind its last page, beside the kept
// ones: what is free among the others may be too small, or still be seen by a backup.
func (r *room) behind(need, keep int64) error {
	return r.grow(max(need, need+keep-(r.allocated-r.used)))
}

func (r *room) grow(by int64) error {
	page := int64(r.db.Info().PageSize)
	by = (by + page - 1) / page * page
	if r.max > 0 && r.allocated+by > r.max {
		return syscall.EFBIG
	}
	if err := preallocate(r.file, r.allocated, by); err != nil {
		return fmt.Errorf("growing store's file: %w", err)
	}
	if err := r.file.Sync(); err != nil {
		return fmt.Errorf("growing store's file: %w", err)
	}
	r.allocated += by
	return nil
}

// limit makes a transaction that would leave less than keep bytes fail before it
// writes. It allows for the page that bbolt wants behind the last.
func (r *room) limit(keep int64) { r.db.MaxSize = int(max(r.allocated-keep, 1)) }

// isFull reports whether an error says that there is no room.
func isFull(err error) bool {
	for _, full := range []error{berrors.ErrMaxSizeReached, syscall.ENOSPC, syscall.EDQUOT, syscall.EFBIG} {
		if errors.Is(err, full) {
			return true
		}
	}
	return false
}

// writeZeros allocates where the file system can't be asked to.
func writeZeros(f *os.File, from, size int64) error {
	zeros := make([]byte, min(size, 1<<20))
	for size > 0 {
		n, err := f.WriteAt(zeros[:min(size, int64(len(zeros)))], from)
		if err != nil {
			return err
		}
		from, size = from+int64(n), size-int64(n)
	}
	return nil
}

// zerosBeyond writes zeros to the part of a range that lies beyond the file's end.
func zerosBeyond(f *os.File, end, from, size int64) error {
	start := max(end, from)
	return writeZeros(f, start, from+size-start)
}
