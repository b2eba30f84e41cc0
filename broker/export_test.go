package broker

import (
	"github.com/dayflyhq/dayfly/proto/token"
)

// Inner doors for the tests of this package.
const (
	ForgetAfter = forgetAfter
	MaxStreams  = maxStreams
	MaxRelayed  = maxRelayed
	MaxUses     = maxUses
	MaxAfter    = maxAfter
	GrantsKept  = grantsKept
	RetryWindow = retryWindow
	SignGrace   = signGrace
)

// ErrOvertaken is what Admit refuses with.
var ErrOvertaken = errOvertaken

// Admit is the condition on the head.
func Admit(g *Grant, parent *token.Token, newer []Record) error { return admit(g, parent, newer) }
