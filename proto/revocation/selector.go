package revocation

import (
	"errors"
	"fmt"
	"strings"

	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// A Kind is what a selector looks at.
type Kind string

// The kinds of selectors. Each can be checked from a token alone.
const (
	KindGrant       Kind = "grant"
	KindIdentity    Kind = "identity"
	KindSubtree     Kind = "subtree"
	KindTrustDomain Kind = "trust_domain"
	KindAudience    Kind = "audience"
	KindSVID        Kind = "svid"
	KindKey         Kind = "key"
	KindEverything  Kind = "everything"
)

// A Selector names what a revocation matches. It can only be made well-formed, is
// comparable, and the zero value matches nothing.
type Selector struct {
	kind  Kind
	value string // the text of the thing; for a subtree without its "/*"
}

// Grant selects one grant and everything derived from it.
func Grant(id token.GrantID) Selector { return named(KindGrant, id.String(), id.IsZero()) }

// Identity selects every token with the identity in its lineage.
func Identity(id spiffeid.ID) Selector { return named(KindIdentity, id.String(), id.IsZero()) }

// TrustDomain selects every token with an identity of the trust domain.
func TrustDomain(td spiffeid.TrustDomain) Selector {
	return named(KindTrustDomain, td.Name(), td.IsZero())
}

// SVID selects every token with a member that one certificate proved.
func SVID(t token.Thumbprint) Selector { return named(KindSVID, t.String(), t.IsZero()) }

// Key selects every token with a member signed by the key.
func Key(id token.KeyID) Selector { return named(KindKey, id.String(), id.IsZero()) }

// named makes a selector; of nothing it makes the zero value.
func named(kind Kind, value string, zero bool) Selector {
	if zero {
		return Selector{}
	}
	return Selector{kind, value}
}

// Everything selects every token.
func Everything() Selector { return Selector{kind: KindEverything} }

// Audience selects every token addressed to the audience.
func Audience(name string) (Selector, error) {
	if err := token.ValidateAudience(name); err != nil {
		return Selector{}, err
	}
	return Selector{KindAudience, name}, nil
}

// Subtree selects every identity below a path, by whole segments: the pattern
// "spiffe://td/ns/prod/*" matches /ns/prod/db, neither /ns/prod nor /ns/production.
func Subtree(pattern string) (Selector, error) {
	base, ok := strings.CutSuffix(pattern, "/*")
	if !ok {
		return Selector{}, errors.New(`a subtree is a SPIFFE ID that ends in "/*"`)
	}
	id, err := spiffeid.FromString(base)
	if err != nil {
		return Selector{}, fmt.Errorf(`a subtree is a SPIFFE ID that ends in "/*": %w`, err)
	}
	if id.Path() == "" {
		return Selector{}, errors.New("a whole trust domain is selected by trust_domain, not by a subtree")
	}
	return Selector{KindSubtree, id.String()}, nil
}

// Parse reads the text form of String. Its errors never quote s.
func Parse(s string) (Selector, error) {
	if s == string(KindEverything) {
		return Everything(), nil
	}
	kind, value, ok := strings.Cut(s, ":")
	if !ok || kind == string(KindEverything) {
		return Selector{}, errors.New(`a selector is KIND:VALUE, or "everything"`)
	}
	return New(Kind(kind), value)
}

// New makes a selector of a kind from the text of its value.
func New(kind Kind, value string) (Selector, error) {
	var (
		sel Selector
		err error
	)
	switch kind {
	case KindGrant:
		var id token.GrantID
		id, err = token.ParseGrantID(value)
		sel = Grant(id)
	case KindIdentity:
		var id spiffeid.ID
		id, err = spiffeid.FromString(value)
		sel = Identity(id)
	case KindSubtree:
		sel, err = Subtree(value)
	case KindTrustDomain:
		var td spiffeid.TrustDomain
		td, err = trustDomain(value)
		sel = TrustDomain(td)
	case KindAudience:
		sel, err = Audience(value)
	case KindSVID:
		var t token.Thumbprint
		t, err = token.ParseThumbprint(value)
		sel = SVID(t)
	case KindKey:
		var id token.KeyID
		id, err = token.ParseKeyID(value)
		sel = Key(id)
	case KindEverything:
		if value != "" {
			err = errors.New("takes no value")
		}
		sel = Everything()
	default:
		// Not quoted: it may be half of a token, pasted in the wrong place.
		return Selector{}, errors.New("unknown kind of selector: it is grant, identity, subtree, trust_domain, audience, svid, key or everything")
	}
	if err == nil && sel == (Selector{}) {
		err = errors.New("names nothing")
	}
	if err != nil {
		return Selector{}, fmt.Errorf("selector %s: %w", kind, err)
	}
	return sel, nil
}

// trustDomain accepts a bare name only: a SPIFFE ID here would be a slip that
// revokes far more than was meant.
func trustDomain(name string) (spiffeid.TrustDomain, error) {
	td, err := spiffeid.TrustDomainFromString(name)
	if err == nil && td.Name() != name {
		err = errors.New("a trust domain is a bare name, without scheme and path")
	}
	return td, err
}

// Kind returns the selector's kind; "" for the zero value.
func (s Selector) Kind() Kind { return s.kind }

// Value returns the text that New made the selector from.
func (s Selector) Value() string {
	if s.kind == KindSubtree {
		return s.value + "/*"
	}
	return s.value
}

// String returns "KIND:VALUE", or "everything".
func (s Selector) String() string {
	if s.kind == KindEverything {
		return string(KindEverything)
	}
	return string(s.kind) + ":" + s.Value()
}

// Lockable reports whether a standing lock makes sense for the selector: it must
// say something of a caller before there is a grant.
func (s Selector) Lockable() bool {
	switch s.kind {
	case KindIdentity, KindSubtree, KindTrustDomain, KindSVID:
		return true
	}
	return false
}

// MatchesCaller reports whether the selector matches an identity and its SVID.
func (s Selector) MatchesCaller(id spiffeid.ID, svid token.Thumbprint) bool {
	switch s.kind {
	case KindIdentity:
		return s.value == id.String()
	case KindSubtree:
		return strings.HasPrefix(id.String(), s.value+"/")
	case KindTrustDomain:
		return s.value == id.TrustDomain().Name()
	case KindSVID:
		return !svid.IsZero() && s.value == svid.String()
	case KindEverything:
		return true
	}
	return false
}

// Matches reports whether the selector matches a token, whatever its number. It is
// the plain meaning of a selector, for plans and as the model that Set is tested
// against; Set answers faster.
func (s Selector) Matches(sub Subject) bool {
	switch s.kind {
	case KindAudience:
		return s.value == sub.Audience
	case KindEverything:
		return true
	}
	for _, m := range sub.Lineage {
		switch {
		case s.kind == KindGrant && s.value == m.Grant.String(),
			s.kind == KindKey && s.value == m.Key.String(),
			s.MatchesCaller(m.Identity, m.SVID):
			return true
		}
	}
	return false
}
