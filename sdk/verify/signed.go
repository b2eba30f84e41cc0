package verify

import (
	"hash/maphash"
	"math/rand/v2"
	"strings"
	"sync/atomic"
	"time"

	"github.com/dayflyhq/dayfly/proto/token"
)

// A signed is a token whose signature holds: what it says, and the key that vouches for
// it. It has no verdict, so that remembering one remembers none: judge is asked each
// time. Nothing in it is ever changed, and nobody outside gets hold of its memory.
type signed struct {
	token.Token
	raw     token.Secret // all of its bytes, in memory of its own
	key     token.PublicKey
	hash    uint64    // of raw
	expires time.Time // with the leeway: then it may be forgotten
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
	return &signed{Token: *t, raw: own, key: key, hash: v.seen.sum(raw), expires: t.Expires.Add(v.cfg.Leeway)}, nil
}

const (
	// maxSigned bounds the tokens that are remembered. None is longer than
	// token.MaxBytes, nor is what is read out of it twice that: 20 MiB at the very most,
	// and some 6 with tokens of the usual 700 bytes.
	maxSigned = 4096
	// signedWays is in how many places a token may stand.
	signedWays = 4
)

// A cache remembers signed tokens by all of their bytes, in places that the token's hash
// names. Only what was accepted enters, so a stranger drives nothing out of it. Reading
// takes no lock. The hash is seeded and compared whole before the bytes are: how long a
// look-up takes tells nobody how much of a token they have guessed.
type cache struct {
	seed  maphash.Seed
	table atomic.Pointer[[maxSigned]atomic.Pointer[signed]] // nil until the first enters
}

func (c *cache) sum(raw string) uint64 { return maphash.String(c.seed, raw) }

// get returns the token of these very bytes, nil if it isn't remembered.
func (c *cache) get(raw string) *signed {
	table := c.table.Load()
	if table == nil || len(raw) > token.MaxBytes {
		return nil
	}
	hash := c.sum(raw)
	for i := range signedWays {
		if s := table[place(hash, i)].Load(); s != nil && s.hash == hash && s.raw.Reveal() == raw {
			return s
		}
	}
	return nil
}

// put remembers a token, in the place of none, of an expired one or of any.
func (c *cache) put(s *signed, now time.Time) {
	if c.table.Load() == nil {
		c.table.CompareAndSwap(nil, new([maxSigned]atomic.Pointer[signed]))
	}
	table := c.table.Load()
	at := place(s.hash, rand.IntN(signedWays))
	for i := range signedWays {
		if old := table[place(s.hash, i)].Load(); old == nil || !now.Before(old.expires) {
			at = place(s.hash, i)
			break
		}
	}
	table[at].Store(s)
}

// sweep forgets what has expired. It is called at every ping.
func (c *cache) sweep(now time.Time) {
	table := c.table.Load()
	if table == nil {
		return
	}
	for i := range table {
		if s := table[i].Load(); s != nil && !now.Before(s.expires) {
			table[i].CompareAndSwap(s, nil)
		}
	}
}

func place(hash uint64, way int) int {
	return int(hash%(maxSigned/signedWays))*signedWays + way
}
