//go:build unix

package supervise

import (
	"os"
	"syscall"
)

// lockFolder takes the lock that says that a folder's exec lives; it goes with the process.
func lockFolder(f *os.File) error {
	return syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
}

func ownedByUs(info os.FileInfo) bool {
	st, ok := info.Sys().(*syscall.Stat_t)
	return ok && int(st.Uid) == os.Geteuid()
}
