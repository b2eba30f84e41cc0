package broker

import (
	"context"
	"crypto"
	"time"

	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Inner doors for the tests of this package.
const (
	ForgetAfter = forgetAfter
	MaxStreams  = maxStreams
	MaxRelayed  = maxRelayed
	MaxRoster   = maxRoster
	MaxUses     = maxUses
	MaxNamed    = maxNamed
	MaxAfter    = maxAfter
	GrantsKept  = grantsKept
	RetryWindow = retryWindow
	SignGrace   = signGrace
)

// ErrOvertaken is what Admit refuses with.
var ErrOvertaken = errOvertaken

// Admit is the condition on the head.
func Admit(g *Grant, parent *token.Token, newer []Record) error { return admit(g, parent, newer) }

// ApplyUntil applies what the store has up to a number, as Run does beside everything
// else.
func (b *Broker) ApplyUntil(ctx context.Context, seq uint64) error {
	if err := b.follow(ctx, seq); err != nil {
		return err
	}
	_, err := b.revokeForeignKeys(ctx) // as Run does after a key that others wrote
	return err
}

// Waiting returns how many pings wait for the next signed head.
func (b *Broker) Waiting() int {
	b.signing.mu.Lock()
	defer b.signing.mu.Unlock()
	if b.signing.next == nil {
		return 0
	}
	return len(b.signing.next.nonces)
}

// Issuers is how many identities are remembered for their limits.
func (b *Broker) Issuers() int {
	b.issuers.mu.Lock()
	defer b.issuers.mu.Unlock()
	return len(b.issuers.byID)
}

// DrawLimit counts one grant against limits, without a store.
func DrawLimit(l Limits) func() {
	var (
		all issuers
		n   int
	)
	id := spiffeid.RequireFromString("spiffe://example.org/payments")
	return func() {
		n++
		if _, err := all.draw(id, l, time.Duration(n%3600)*time.Second, 1); err != nil {
			panic(err)
		}
	}
}

// SetLen is how many selectors are in force.
func (b *Broker) SetLen() int {
	b.state.mu.RLock()
	defer b.state.mu.RUnlock()
	return b.state.set.Len()
}

// MaxRetries is how many answers are kept for calls that are repeated.
const MaxRetries = maxRetries

// NewRetries returns how answers are entered, which says whether a key is new, and how many
// there are.
func NewRetries() (enter func(key string, now time.Time) bool, n func() int) {
	r := &retries{}
	return func(key string, now time.Time) bool {
		_, first := r.enter(key, [32]byte{}, now)
		return first
	}, func() int { return len(r.answers) }
}

// Remembered is how many tokens are known to have a good signature.
func (b *Broker) Remembered() int { return b.signed.Len() }

// SwapKey puts another key in the place of one, under its ID, until it is undone.
func (b *Broker) SwapKey(id token.KeyID, key crypto.PublicKey) (restore func()) {
	set := func(key crypto.PublicKey) (before crypto.PublicKey) {
		b.state.mu.Lock()
		defer b.state.mu.Unlock()
		k := b.state.keys[id]
		before, k.Public.Key = k.Public.Key, key
		b.state.keys[id] = k
		return before
	}
	before := set(key)
	return func() { set(before) }
}
