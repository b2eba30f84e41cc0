package boltstore

import (
	"errors"
	"fmt"
)

// Errors of Create, Open and Check, for errors.Is. Their texts say what to do.
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
