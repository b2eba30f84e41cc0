package verify

import (
	"strings"

	"github.com/dayflyhq/dayfly/proto/token"
)

// A signed is a token whose signature holds: what it says, and the key that vouches for
// it. It has no verdict, so that remembering one remembers none: judge is asked each
// time. Nothing in it is ever changed, and nobody outside gets hold of its memory.
type signed struct {
	token.Token
	raw token.Secret // all of its bytes, in memory of its own
	key token.PublicKey
}

// parse reads a token and checks its signature, unless the verifier is closed anyway.
func (v *Verifier) parse(raw string) (*signed, *Refusal) {
	if r := v.closed(); r != nil {
		return nil, r
	}
	var key token.PublicKey
	t, err := token.Parse(raw, func(id token.KeyID) (k token.PublicKey, ok bool) {
		key, ok = v.key(id)
		return key, ok
	})
	if err != nil {
		return nil, v.unparsed(raw, err)
	}
	own := token.NewSecret(strings.Clone(raw)) // what was shown may be a piece of something larger
	return &signed{*t, own, key}, nil
}
