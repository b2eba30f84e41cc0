// Package field says what is wrong with the fields of a configuration, by the names that
// they have in its file, so that whoever has read the file can say where.
package field

import (
	"errors"
	"fmt"
)

// An Error is what is wrong with one field.
type Error struct{ Key, Message string }

func (e *Error) Error() string { return e.Key + ": " + e.Message }

// Wrong returns an *Error.
func Wrong(key, format string, args ...any) error {
	return &Error{key, fmt.Sprintf(format, args...)}
}

// Errors lists the *Errors that an error is or joins.
func Errors(err error) []*Error {
	switch e := err.(type) {
	case *Error:
		return []*Error{e}
	case interface{ Unwrap() []error }:
		var out []*Error
		for _, one := range e.Unwrap() {
			out = append(out, Errors(one)...)
		}
		return out
	}
	return nil
}

// Within puts the errors of a part below the key of that part.
func Within(key string, err error) error {
	var errs []error
	for _, e := range Errors(err) {
		errs = append(errs, Wrong(key+"."+e.Key, "%s", e.Message))
	}
	return errors.Join(errs...)
}
