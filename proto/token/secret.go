package token

import (
	"fmt"
	"io"
	"log/slog"
)

const redacted = "[redacted token]"

// A Secret holds a whole token. However it is printed, logged or marshalled it
// shows nothing of it; Reveal is the one way out. The zero value holds none.
// Secrets can't be compared with ==: compare fingerprints.
type Secret struct {
	_ [0]func() // not comparable: == would compare the pointers

	// Behind a pointer, because fmt calls no methods on unexported fields of a
	// caller's struct, nor after a bad verb: it then prints an address.
	s *string
}

// NewSecret wraps a token that came from elsewhere.
func NewSecret(s string) Secret {
	if s == "" {
		return Secret{}
	}
	return Secret{s: &s}
}

// Reveal returns the token itself, to be sent to whom it is for and nowhere else.
func (s Secret) Reveal() string {
	if s.s == nil {
		return ""
	}
	return *s.s
}

// IsZero reports whether there is no token.
func (s Secret) IsZero() bool { return s.s == nil }

// String returns a fixed text.
func (Secret) String() string { return redacted }

// GoString returns a fixed text.
func (Secret) GoString() string { return redacted }

// Format writes a fixed text, whatever the verb: without it %d would print the
// fields.
func (Secret) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) }

// LogValue returns a fixed text.
func (Secret) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalText returns a fixed text, for every encoder that asks for it.
func (Secret) MarshalText() ([]byte, error) { return []byte(redacted), nil }
