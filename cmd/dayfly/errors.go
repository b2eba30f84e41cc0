package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/dayflyhq/dayfly/sdk"
	"google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/grpc/codes"
)

// The exit codes; root's help and docs/cli.md list them.
const (
	exitOK          = 0
	exitFailure     = 1
	exitUsage       = 2
	exitIncomplete  = 3
	exitRefused     = 4
	exitUnavailable = 5
	exitProposed    = 6
	exitChanged     = 7
)

// usageError is a mistake in the command line.
type usageError struct{ message, hint string }

func (e *usageError) Error() string { return e.message }

func usagef(hint, format string, args ...any) error {
	return &usageError{message: fmt.Sprintf(format, args...), hint: hint}
}

// failure is an error with its hint and exit code.
type failure struct {
	err  error
	hint string
	code int
}

func (e *failure) Error() string { return e.err.Error() }
func (e *failure) Unwrap() error { return e.err }

func failf(code int, hint, format string, args ...any) error {
	return &failure{err: fmt.Errorf(format, args...), hint: hint, code: code}
}

// report is an error as --output json writes it to stderr, in an object under the
// key "error".
type report struct {
	What     string            `json:"what"`
	Code     string            `json:"code,omitempty"`   // gRPC status code, where a server answered
	Reason   string            `json:"reason,omitempty"` // stable, see docs/errors.md
	Message  string            `json:"message"`
	Hint     string            `json:"hint,omitempty"`
	Metadata map[string]string `json:"metadata,omitempty"`
	ExitCode int               `json:"exitCode"`
}

// fail prints an error and returns its exit code.
func (a *app) fail(err error) int {
	r := reportOf(err)
	r.What = a.verb
	if a.output == outputJSON {
		enc := json.NewEncoder(a.stderr)
		enc.SetIndent("", "  ")
		_ = enc.Encode(map[string]report{"error": r})
		return r.ExitCode
	}
	prefix := "dayfly: "
	if r.What != "" {
		prefix += r.What + ": "
	}
	// Further lines are indented, so that none of them passes for a line of ours.
	message := strings.ReplaceAll(cleanLines(r.Message), "\n", "\n  ")
	if r.Reason != "" {
		message += " (" + clean(r.Reason) + ")"
	}
	fmt.Fprintln(a.stderr, prefix+message)
	if r.Hint != "" {
		fmt.Fprintln(a.stderr, "hint: "+clean(r.Hint))
	}
	return r.ExitCode
}

func reportOf(err error) report {
	r := report{Message: err.Error(), ExitCode: exitFailure}
	var (
		refused *sdk.Error
		usage   *usageError
		known   *failure
	)
	switch {
	case errors.As(err, &usage):
		r.Hint, r.ExitCode = usage.hint, exitUsage
	case errors.As(err, &refused):
		r.Code, r.Reason, r.Hint, r.Metadata = code.Code(refused.Code).String(), refused.Reason, refused.Hint, refused.Metadata
		r.Message = strings.Replace(r.Message, refused.Error(), remoteMessage(refused), 1)
		r.ExitCode = exitOf(refused.Code)
		switch {
		case r.Hint != "":
		case strings.Contains(refused.Message, "handshake failed"):
			r.Hint = "the other end did not prove to be the broker that --broker-id names, or does not accept your SVID"
		default:
			r.Hint = hintOf(refused.Code)
		}
	case errors.Is(err, context.DeadlineExceeded):
		r.Message, r.Hint, r.ExitCode = "no answer in time", hintOf(codes.DeadlineExceeded), exitUnavailable
	case errors.Is(err, context.Canceled):
		r.Message = "interrupted"
	}
	if errors.As(err, &known) {
		r.ExitCode = known.code
		if known.hint != "" {
			r.Hint = known.hint
		}
	}
	return r
}

// remoteMessage is what a server said, or the plain words for what the transport
// says where no server of ours answered.
func remoteMessage(e *sdk.Error) string {
	switch {
	case e.Reason != "":
		return e.Message
	case e.Code == codes.DeadlineExceeded:
		return "no answer in time"
	case e.Code == codes.Canceled:
		return "interrupted"
	}
	return e.Message
}

func exitOf(c codes.Code) int {
	switch c {
	case codes.PermissionDenied, codes.Unauthenticated:
		return exitRefused
	case codes.Unavailable, codes.DeadlineExceeded, codes.ResourceExhausted:
		return exitUnavailable
	}
	return exitFailure
}

func hintOf(c codes.Code) string {
	switch c {
	case codes.Unavailable, codes.DeadlineExceeded:
		return "is the address right, and does the other end run? --timeout waits longer"
	case codes.Unauthenticated:
		return "the SVID wasn't accepted: is it current, and does the other end trust its trust domain?"
	case codes.Unimplemented:
		return "this end doesn't serve that: an agent serves token, exec and helper only"
	}
	return ""
}

// fileError says what is wrong with a file of the user's.
func fileError(what, path string, err error) error {
	var pathErr *os.PathError
	if errors.As(err, &pathErr) {
		err = pathErr.Err
	}
	return failf(exitFailure, "", "reading %s %s: %w", what, path, err)
}
