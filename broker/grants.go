package broker

import (
	"context"
	"errors"

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
