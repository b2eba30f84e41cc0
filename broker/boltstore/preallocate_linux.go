package boltstore

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

// preallocate gives the file real room for a range, which keeps what it holds.
func preallocate(f *os.File, from, size int64) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	for {
		err = unix.Fallocate(int(f.Fd()), 0, from, size)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if errors.Is(err, unix.EOPNOTSUPP) {
		return zerosBeyond(f, info.Size(), from, size)
	}
	return err
}
