package config

import (
	"context"
	"errors"

	"github.com/spf13/cobra"
)

// A UsageError is a command line or a configuration that is wrong: nothing was begun.
type UsageError struct{ Err error }

func (e UsageError) Error() string { return e.Err.Error() }
func (e UsageError) Unwrap() error { return e.Err }

// An ExitError is an exit code of one command alone. Err is nil where there is nothing to
// say.
type ExitError struct {
	Code int
	Err  error
}

func (e ExitError) Error() string {
	if e.Err == nil {
		return ""
	}
	return e.Err.Error()
}

func (e ExitError) Unwrap() error { return e.Err }

// ExitCode says how a daemon that returned err should exit: 0 for none, the code of an
// ExitError, 2 for a UsageError, what an error with an ExitCode of its own says, 1 for
// everything else.
func ExitCode(err error) int {
	var usage UsageError
	var exit ExitError
	var coded interface{ ExitCode() int }
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		return exit.Code
	case errors.As(err, &usage):
		return 2
	case errors.As(err, &coded):
		return coded.ExitCode()
	}
	return 1
}

// Execute runs a daemon's command line. Whatever goes wrong before one of its verbs was
// begun (an unknown verb or flag, a flag's value, an argument) is a UsageError.
func Execute(ctx context.Context, cmd *cobra.Command) error {
	begun := false
	cmd.PersistentPreRun = func(*cobra.Command, []string) { begun = true }
	err := cmd.ExecuteContext(ctx)
	if err != nil && !begun {
		return UsageError{err}
	}
	return err
}
