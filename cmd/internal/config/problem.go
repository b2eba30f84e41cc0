package config

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

// A Problem is one thing wrong with a configuration file.
type Problem struct {
	File string
	// Line counts from 1; 0 where no line can be named.
	Line int
	// Key is the dotted path, such as listen.public; empty for the whole file.
	Key     string
	Message string
}

// String is "file:line: key: message".
func (p Problem) String() string {
	var b strings.Builder
	b.WriteString(p.File)
	if p.Line > 0 {
		fmt.Fprintf(&b, ":%d", p.Line)
	}
	b.WriteString(": ")
	if p.Key != "" {
		b.WriteString(p.Key + ": ")
	}
	b.WriteString(p.Message)
	return b.String()
}

// Problems is everything wrong with a file, by line. Get at it with errors.As.
type Problems []Problem

// Error has one line a problem.
func (ps Problems) Error() string {
	lines := make([]string, len(ps))
	for i, p := range ps {
		lines[i] = p.String()
	}
	return strings.Join(lines, "\n")
}

func (ps Problems) err() error {
	if len(ps) == 0 {
		return nil
	}
	slices.SortStableFunc(ps, func(a, b Problem) int { return a.Line - b.Line })
	return ps
}

// keyError is what Wrong makes.
type keyError struct{ key, message string }

func (e *keyError) Error() string { return e.key + ": " + e.message }

// Wrong is an error about one key, for a Validate method. The key is relative to
// the struct that is validated, with dots and indices for what lies deeper: "tls.cert",
// "files[2].name".
func Wrong(key, format string, args ...any) error {
	return &keyError{key: key, message: fmt.Sprintf(format, args...)}
}

// flatten lists the errors that were joined.
func flatten(err error) []error {
	var list interface{ Unwrap() []error }
	if _, one := err.(*keyError); one || !errors.As(err, &list) {
		return []error{err}
	}
	var out []error
	for _, e := range list.Unwrap() {
		out = append(out, flatten(e)...)
	}
	return out
}
