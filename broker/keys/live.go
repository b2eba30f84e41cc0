package keys

import (
	"cmp"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/dayflyhq/dayfly/proto/token"
)

// Published is a key that the log holds: verified, not revoked, of the current era.
type Published struct {
	Public token.PublicKey
	Maker  spiffeid.ID // the broker whose SVID vouches for it
	At     time.Time   // of its record
}

// Live returns those keys, given in the order of the log, that a live token may have
// been signed with, in the same order: what belongs in the JWKS and what pruning must
// keep. A key of this process is live until Retention after it was replaced. Any
// other one is live until Retention after its maker published the next, since a
// broker that starts anew has lost the private halves of its past. Brokers that share
// a store therefore need SPIFFE IDs of their own.
func (r *Ring) Live(published []Published, at time.Time) []token.PublicKey {
	var live []token.PublicKey
	superseded := map[spiffeid.ID]time.Time{}
	r.mu.RLock()
	defer r.mu.RUnlock()
	for _, p := range slices.Backward(published) {
		end := superseded[p.Maker]
		if k, ok := r.own[p.Public.ID]; ok {
			end = k.replaced
		}
		if end.IsZero() || at.Sub(end) <= Retention {
			live = append(live, p.Public)
		}
		superseded[p.Maker] = p.At
	}
	slices.Reverse(live)
	return live
}

// sorted returns the keys by ID, each once.
func sorted(keys []token.PublicKey) []token.PublicKey {
	byID := func(a, b token.PublicKey) int { return cmp.Compare(a.ID.String(), b.ID.String()) }
	out := slices.SortedFunc(slices.Values(keys), byID)
	return slices.CompactFunc(out, func(a, b token.PublicKey) bool { return a.ID == b.ID })
}
