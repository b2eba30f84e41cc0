package broker

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"slices"
	"time"

	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// A GrantState says whether a grant's credential is good now.
type GrantState string

// The states of a grant.
const (
	GrantLive    GrantState = "live"
	GrantExpired GrantState = "expired"
	GrantRevoked GrantState = "revoked"
)

// GrantState judges a grant as a verifier would, and names the revocation that kills
// it.
func (b *Broker) GrantState(g *Grant) (GrantState, uint64) {
	b.state.mu.RLock()
	v := b.state.set.Judge(g.Subject())
	b.state.mu.RUnlock()
	switch {
	case v.Reason != revocation.Alive && v.Reason != revocation.BelowHorizon:
		return GrantRevoked, v.By
	case !b.cfg.Now().Before(g.Expires):
		return GrantExpired, 0
	}
	return GrantLive, 0
}

// Grant returns one grant.
func (b *Broker) Grant(ctx context.Context, id token.GrantID) (*Grant, error) {
	g, err := b.cfg.Store.Grant(ctx, id)
	if errors.Is(err, ErrNotFound) {
		return nil, ErrNoSuchGrant
	}
	return g, storeRefusal(err)
}

// GrantFilter says which grants to list.
type GrantFilter struct {
	Presenter      spiffeid.ID
	DerivedFrom    revocation.Selector
	Audience       string
	IncludeExpired bool
}

// Grants returns a page of grants.
func (b *Broker) Grants(ctx context.Context, f GrantFilter, limit int, after string) ([]*Grant, string, error) {
	q := GrantQuery{Presenter: f.Presenter, Limit: limit, After: after}
	if !f.IncludeExpired {
		q.LiveAt = b.cfg.Now()
	}
	none := revocation.Selector{}
	if f.DerivedFrom != none || f.Audience != "" {
		q.Match = func(g *Grant) bool {
			return (f.DerivedFrom == none || f.DerivedFrom.Matches(g.Subject())) && (f.Audience == "" || g.Audience == f.Audience)
		}
	}
	grants, next, err := b.cfg.Store.Grants(ctx, q)
	if errors.Is(err, ErrBadPage) {
		return nil, "", ErrBadPageToken
	}
	return grants, next, storeRefusal(err)
}

// A Plan says what a revocation would kill and break.
type Plan struct {
	Live, Derived uint64
	Identities    []PlannedIdentity
	Audiences     []PlannedAudience
	Standing      []Lock
}

// A PlannedIdentity is one that presents, or has derived, what would die.
type PlannedIdentity struct {
	ID                spiffeid.ID
	Presents, Derives uint64
}

// A PlannedAudience is one that what would die is addressed to.
type PlannedAudience struct {
	Audience   Audience
	Live       uint64
	LastExpiry time.Time
}

// Plan looks at every live grant and changes nothing.
func (b *Broker) Plan(ctx context.Context, selectors []revocation.Selector) (*Plan, error) {
	if err := CheckSelectors(selectors); err != nil {
		return nil, err
	}
	reach, err := b.reach(ctx, func(g *Grant) bool {
		state, _ := b.GrantState(g)
		return state == GrantLive && slices.ContainsFunc(selectors, func(s revocation.Selector) bool { return s.Matches(g.Subject()) })
	})
	if err != nil {
		return nil, err
	}
	for _, l := range b.Locks() {
		if slices.ContainsFunc(l.Selectors, func(s revocation.Selector) bool { return slices.Contains(selectors, s) }) {
			reach.Standing = append(reach.Standing, l)
		}
	}
	return reach, nil
}

// reach adds up the live grants that match.
func (b *Broker) reach(ctx context.Context, match func(*Grant) bool) (*Plan, error) {
	p := &Plan{}
	identities := map[spiffeid.ID]*PlannedIdentity{}
	audiences := map[string]*PlannedAudience{}
	q := GrantQuery{LiveAt: b.cfg.Now(), Limit: MaxPageSize, Match: match}
	for {
		grants, next, err := b.cfg.Store.Grants(ctx, q)
		if err != nil {
			return nil, storeRefusal(err)
		}
		for _, g := range grants {
			p.add(g, identities, audiences, b.cfg.Policy)
		}
		if next == "" {
			break
		}
		q.After = next
	}
	for _, i := range identities {
		p.Identities = append(p.Identities, *i)
	}
	slices.SortFunc(p.Identities, func(x, y PlannedIdentity) int { return cmp.Compare(x.ID.String(), y.ID.String()) })
	for _, name := range slices.Sorted(maps.Keys(audiences)) {
		p.Audiences = append(p.Audiences, *audiences[name])
	}
	return p, nil
}

func (p *Plan) add(g *Grant, identities map[spiffeid.ID]*PlannedIdentity, audiences map[string]*PlannedAudience, policy Policy) {
	p.Live++
	if g.Derived() {
		p.Derived++
	}
	for i, m := range g.Lineage {
		pi := identities[m.Identity]
		if pi == nil {
			pi = &PlannedIdentity{ID: m.Identity}
			identities[m.Identity] = pi
		}
		if i == len(g.Lineage)-1 {
			pi.Presents++
		} else {
			pi.Derives++
		}
	}
	pa := audiences[g.Audience]
	if pa == nil {
		a, ok := policy.Audience(g.Audience)
		if !ok {
			a = Audience{Name: g.Audience, VerifiedBy: "external"} // undeclared: promise nothing
		}
		pa = &PlannedAudience{Audience: a}
		audiences[g.Audience] = pa
	}
	pa.Live++
	if g.Expires.After(pa.LastExpiry) {
		pa.LastExpiry = g.Expires
	}
}
