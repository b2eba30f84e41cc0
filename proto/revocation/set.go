package revocation

import (
	"maps"
	"slices"
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

	// The highest number that revokes each thing, by the types of a token's own
	// fields: a look-up makes no text, and one among no selectors of a kind costs nothing.
	everything   uint64
	grants       map[token.GrantID]uint64
	svids        map[token.Thumbprint]uint64
	identities   map[string]uint64
	subtrees     map[string]uint64
	trustDomains map[string]uint64
	audiences    map[string]uint64
	keys         map[token.KeyID]uint64
	// What each number selects, keys excepted, to forget it.
	selected map[uint64][]Selector
}

// NewSet returns the set of an era, before its first record.
func NewSet(era token.Era) *Set {
	return &Set{
		era:          era,
		sums:         map[uint64][8]byte{0: {}},
		grants:       map[token.GrantID]uint64{},
		svids:        map[token.Thumbprint]uint64{},
		identities:   map[string]uint64{},
		subtrees:     map[string]uint64{},
		trustDomains: map[string]uint64{},
		audiences:    map[string]uint64{},
		keys:         map[token.KeyID]uint64{},
		selected:     map[uint64][]Selector{},
	}
}

// Era returns the era that the set is of.
func (s *Set) Era() token.Era { return s.era }

// Head returns the highest number known.
func (s *Set) Head() uint64 { return s.head }

// Horizon returns the number below which every token has expired.
func (s *Set) Horizon() uint64 { return s.horizon }

// Len returns how many different selectors are held.
func (s *Set) Len() int {
	n := len(s.grants) + len(s.svids) + len(s.identities) + len(s.subtrees) + len(s.trustDomains) + len(s.audiences) + len(s.keys)
	if s.everything > 0 {
		n++
	}
	return n
}

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

// Add records that number seq revokes what the selectors match. Adding it again
// changes nothing, nor does adding what the horizon has made needless.
func (s *Set) Add(seq uint64, selectors ...Selector) {
	for _, sel := range selectors {
		switch {
		case sel.kind == KindKey:
			if kid, err := token.ParseKeyID(sel.value); err == nil {
				s.keys[kid] = max(s.keys[kid], seq)
			}
		case sel.kind == "" || seq <= s.horizon || slices.Contains(s.selected[seq], sel):
		default:
			s.raise(sel, seq)
			s.selected[seq] = append(s.selected[seq], sel)
		}
	}
}

// raise makes seq the newest number that revokes what sel names, if it is.
func (s *Set) raise(sel Selector, seq uint64) {
	switch sel.kind {
	case KindEverything:
		s.everything = max(s.everything, seq)
	case KindGrant:
		if id, err := token.ParseGrantID(sel.value); err == nil {
			s.grants[id] = max(s.grants[id], seq)
		}
	case KindSVID:
		if t, err := token.ParseThumbprint(sel.value); err == nil {
			s.svids[t] = max(s.svids[t], seq)
		}
	default:
		named := s.named(sel.kind)
		named[sel.value] = max(named[sel.value], seq)
	}
}

// named returns where the selectors of a kind are that is text anyway.
func (s *Set) named(kind Kind) map[string]uint64 {
	switch kind {
	case KindIdentity:
		return s.identities
	case KindSubtree:
		return s.subtrees
	case KindTrustDomain:
		return s.trustDomains
	case KindAudience:
		return s.audiences
	}
	panic("internal error: a selector of no kind that is named: " + string(kind))
}

// SetHorizon moves the horizon up and forgets what no token at or above it can be
// killed by. It never moves down. Revoked keys are not forgotten.
func (s *Set) SetHorizon(horizon uint64) {
	if horizon <= s.horizon {
		return
	}
	passed := horizon - s.horizon
	if passed > uint64(len(s.sums)+len(s.selected)) { // a leap: visit what is held
		for seq := range s.selected {
			if seq <= horizon {
				s.Forget(seq)
			}
		}
		maps.DeleteFunc(s.sums, func(seq uint64, _ [8]byte) bool { return seq < horizon })
	} else { // the usual step costs what it passes, not what is held
		for seq := s.horizon; seq < horizon; seq++ {
			delete(s.sums, seq)
			s.Forget(seq + 1)
		}
	}
	s.horizon = horizon
}

// Forget drops what number seq selects, keys excepted. It is for a revocation of
// which every token that it could match has expired.
func (s *Set) Forget(seq uint64) {
	for _, sel := range s.selected[seq] {
		s.drop(sel, seq)
	}
	delete(s.selected, seq)
}

// drop ends what raise began, unless a newer number revokes the same.
func (s *Set) drop(sel Selector, seq uint64) {
	switch sel.kind {
	case KindEverything:
		if s.everything == seq {
			s.everything = 0
		}
	case KindGrant:
		if id, err := token.ParseGrantID(sel.value); err == nil && s.grants[id] == seq {
			delete(s.grants, id)
		}
	case KindSVID:
		if t, err := token.ParseThumbprint(sel.value); err == nil && s.svids[t] == seq {
			delete(s.svids, t)
		}
	default:
		if named := s.named(sel.kind); named[sel.value] == seq {
			delete(named, sel.value)
		}
	}
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
	newest := max(s.everything, s.audiences[sub.Audience])
	for _, m := range sub.Lineage {
		newest = max(newest, s.grants[m.Grant], s.newestForIdentity(m.Identity))
		if !m.SVID.IsZero() {
			newest = max(newest, s.svids[m.SVID])
		}
	}
	return newest
}

func (s *Set) newestForIdentity(id spiffeid.ID) uint64 {
	text := id.String()
	newest := max(s.identities[text], s.trustDomains[id.TrustDomain().Name()])
	if len(s.subtrees) == 0 {
		return newest
	}
	root := len(text) - len(id.Path())
	for end := strings.LastIndexByte(text, '/'); end > root; end = strings.LastIndexByte(text[:end], '/') {
		newest = max(newest, s.subtrees[text[:end]])
	}
	return newest
}
