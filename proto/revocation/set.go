package revocation

import (
	"strings"

	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// A Subject is what the rule needs of a token or of its grant.
type Subject struct {
	Position token.Position
	Audience string
	Lineage  []token.Member
}

// SubjectOf returns the subject of a token.
func SubjectOf(c *token.Claims) Subject {
	return Subject{c.Position, c.Audience, c.Lineage}
}

// A Reason says what the rule found.
type Reason string

// The outcomes of the rule.
const (
	// Alive: nothing known kills it.
	Alive Reason = "alive"
	// Revoked: a revocation with a higher number matches its lineage.
	Revoked Reason = "revoked"
	// KeyRevoked: a key in its lineage is revoked, whatever its number.
	KeyRevoked Reason = "key_revoked"
	// WrongEra: it was issued in an earlier era, which ended with a restore.
	WrongEra Reason = "wrong_era"
	// OffLog: its position is not on this log.
	OffLog Reason = "off_log"
	// BelowHorizon: it was issued so long ago that it has expired by construction.
	BelowHorizon Reason = "below_horizon"
	// Ahead: it was issued at a position that is not known yet. Ask, and judge again.
	Ahead Reason = "ahead"
)

// A Verdict is a reason and, where one revocation is to blame, its number.
type Verdict struct {
	Reason Reason
	By     uint64
}

// A Set is what is known of the log: which numbers revoke what, where the head and
// the horizon are, and the running hash at each known number. It only grows; the
// horizon alone makes it forget. Not safe for concurrent use.
type Set struct {
	era     token.Era
	head    uint64
	horizon uint64
	sums    map[uint64][8]byte

	// The highest number that revokes each thing.
	newest map[Selector]uint64
	keys   map[token.KeyID]uint64
	// What each number selects, to forget it.
	selected map[uint64][]Selector
}

// NewSet returns the set of an era, before its first record.
func NewSet(era token.Era) *Set {
	return &Set{
		era:      era,
		sums:     map[uint64][8]byte{0: {}},
		newest:   map[Selector]uint64{},
		keys:     map[token.KeyID]uint64{},
		selected: map[uint64][]Selector{},
	}
}

// Era returns the era that the set is of.
func (s *Set) Era() token.Era { return s.era }

// Head returns the highest number known.
func (s *Set) Head() uint64 { return s.head }

// Horizon returns the number below which every token has expired.
func (s *Set) Horizon() uint64 { return s.horizon }

// Len returns how many selectors are held.
func (s *Set) Len() int { return len(s.newest) + len(s.keys) }

// SumAt returns the running hash at a number, where it is known.
func (s *Set) SumAt(seq uint64) ([8]byte, bool) {
	sum, ok := s.sums[seq]
	return sum, ok
}

// Know records that number seq exists and what the running hash is there.
func (s *Set) Know(seq uint64, sum [8]byte) {
	if seq >= s.horizon {
		s.sums[seq] = sum
	}
	s.head = max(s.head, seq)
}

// Add records that number seq revokes what the selectors match.
func (s *Set) Add(seq uint64, selectors ...Selector) {
	for _, sel := range selectors {
		if sel.kind == KindKey {
			if kid, err := token.ParseKeyID(sel.value); err == nil {
				s.keys[kid] = max(s.keys[kid], seq)
			}
			continue
		}
		s.newest[sel] = max(s.newest[sel], seq)
		s.selected[seq] = append(s.selected[seq], sel)
	}
}

// SetHorizon moves the horizon up and forgets what no token at or above it can be
// killed by. It never moves down. Revoked keys are not forgotten.
func (s *Set) SetHorizon(horizon uint64) {
	if horizon <= s.horizon {
		return
	}
	s.horizon = horizon
	for seq := range s.selected {
		if seq <= horizon {
			s.Forget(seq)
		}
	}
	for seq := range s.sums {
		if seq < horizon {
			delete(s.sums, seq)
		}
	}
}

// Forget drops what number seq selects. It is for a revocation of which every token
// that it could match has expired.
func (s *Set) Forget(seq uint64) {
	for _, sel := range s.selected[seq] {
		if s.newest[sel] == seq {
			delete(s.newest, sel)
		}
	}
	delete(s.selected, seq)
}

// KeyRevoked reports whether a signing key is revoked.
func (s *Set) KeyRevoked(id token.KeyID) bool {
	_, ok := s.keys[id]
	return ok
}

// Judge is the rule.
func (s *Set) Judge(sub Subject) Verdict {
	for _, m := range sub.Lineage {
		if seq, ok := s.keys[m.Key]; ok {
			return Verdict{KeyRevoked, seq}
		}
	}
	rev := sub.Position.Rev
	switch {
	case sub.Position.Era > s.era:
		return Verdict{Reason: Ahead}
	case sub.Position.Era < s.era:
		return Verdict{Reason: WrongEra}
	case rev > s.head:
		return Verdict{Reason: Ahead}
	case rev < s.horizon:
		return Verdict{Reason: BelowHorizon}
	}
	if sum, ok := s.sums[rev]; ok && sum != sub.Position.Sum {
		return Verdict{Reason: OffLog}
	}
	if seq := s.newestMatch(sub); seq > rev {
		return Verdict{Revoked, seq}
	}
	return Verdict{Reason: Alive}
}

// newestMatch returns the highest number that matches, 0 for none. Every look-up is
// by key: its cost depends on the lineage, not on the set.
func (s *Set) newestMatch(sub Subject) uint64 {
	newest := max(s.newest[Everything()], s.newest[Selector{KindAudience, sub.Audience}])
	for _, m := range sub.Lineage {
		newest = max(newest, s.newest[Grant(m.Grant)], s.newestForIdentity(m.Identity))
		if !m.SVID.IsZero() {
			newest = max(newest, s.newest[SVID(m.SVID)])
		}
	}
	return newest
}

func (s *Set) newestForIdentity(id spiffeid.ID) uint64 {
	newest := max(s.newest[Identity(id)], s.newest[TrustDomain(id.TrustDomain())])
	text := id.String()
	root := len(text) - len(id.Path())
	for end := strings.LastIndexByte(text, '/'); end > root; end = strings.LastIndexByte(text[:end], '/') {
		newest = max(newest, s.newest[Selector{KindSubtree, text[:end]}])
	}
	return newest
}
