//go:build !linux

package boltstore

import "os"

// preallocate gives the file real room for a range, which keeps what it holds.
func preallocate(f *os.File, from, size int64) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	return zerosBeyond(f, info.Size(), from, size)
}
