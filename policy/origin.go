package policy

import (
	"context"
	"log/slog"
)

// origin is where policy comes from. Its methods are called one at a time, but for
// trouble and where.
type origin interface {
	// first returns what there is at a start, without waiting for anyone else.
	first() (*folder, error)
	// read returns what there is now.
	read(ctx context.Context) (*folder, error)
	// keep is told that what was read is in force, each time that it is read.
	keep(f *folder) error
	// follow calls look whenever there may be something new, until ctx ends.
	follow(ctx context.Context, look func(context.Context) error)
	// trouble says in the log that nothing good can be had, where is of whom.
	trouble() string
	where() slog.Attr
}

// fixedOrigin never changes: files in the binary, or a bundle that is tried out.
type fixedOrigin func() (*folder, error)

func (s fixedOrigin) first() (*folder, error) { return s() }

func (s fixedOrigin) read(context.Context) (*folder, error) { return s() }

func (fixedOrigin) keep(*folder) error { return nil }

func (fixedOrigin) follow(ctx context.Context, _ func(context.Context) error) { <-ctx.Done() }

func (fixedOrigin) trouble() string { return "policy is broken" }

func (fixedOrigin) where() slog.Attr { return slog.String("dir", "") }
