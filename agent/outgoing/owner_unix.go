//go:build unix

package outgoing

import (
	"io/fs"
	"os"
	"syscall"
)

// ours reports whether a file is root's or this user's.
func ours(info fs.FileInfo) bool {
	st, ok := info.Sys().(*syscall.Stat_t)
	return ok && (st.Uid == 0 || st.Uid == uint32(os.Geteuid()))
}
