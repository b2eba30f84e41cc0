package token

import "log/slog"

const redacted = "[redacted token]"

// A Secret holds a whole token. However it is printed, logged or marshalled it
// shows nothing of it; Reveal is the one way out. The zero value holds none.
type Secret struct{ s string }

// NewSecret wraps a token that came from elsewhere.
func NewSecret(s string) Secret { return Secret{s} }

// Reveal returns the token itself, to be sent to whom it is for and nowhere else.
func (s Secret) Reveal() string { return s.s }

// IsZero reports whether there is no token.
func (s Secret) IsZero() bool { return s.s == "" }

func (Secret) String() string               { return redacted }
func (Secret) GoString() string             { return redacted }
func (Secret) LogValue() slog.Value         { return slog.StringValue(redacted) }
func (Secret) MarshalText() ([]byte, error) { return []byte(redacted), nil }
