package boltstore

import (
	"errors"
	"fmt"
)

// Errors of Create, Open, Check, Backup and Restore, for errors.Is. Their texts say what to do.
var (
	// ErrMissing: there is no file. Serving never makes one: an empty store at a
	// wrong path would have forgotten every revocation.
	ErrMissing = errors.New("no store")
	// ErrExists: Create found a file and left it as it is.
	ErrExists = errors.New("there is a file already")
	// ErrForeign: the file is no store of dayfly.
	ErrForeign = errors.New("not a dayfly store")
	// ErrCorrupt: the file was a store of dayfly and is damaged.
	ErrCorrupt = errors.New("store is corrupt")
	// ErrLocked: another process has the file open.
	ErrLocked = errors.New("store is in use by another process")
	// ErrBackup: the file is a backup. Served as it is, it would have forgotten every
	// lock made since.
	ErrBackup = errors.New("a backup is not a store")
	// ErrBusy: a backup is under way.
	ErrBusy = errors.New("another backup is under way")
	// ErrGaveWay: a backup was given up, since it would have held up writes.
	ErrGaveWay = errors.New("the backup gave way to the broker's own writes")
	// ErrMode: others than the owner may read or write the file.
	ErrMode = errors.New("store is open to others")
)

// A SchemaError says that the file was written by a program with another schema.
type SchemaError struct {
	Path         string
	Found, Known uint32
}

func (e *SchemaError) Error() string {
	hint := "use a newer dayfly-broker"
	if e.Found < e.Known {
		hint = "use the dayfly-broker that wrote it"
	}
	return fmt.Sprintf("%s has schema %d, this program knows schema %d: %s", e.Path, e.Found, e.Known, hint)
}
