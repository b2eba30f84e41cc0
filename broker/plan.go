package broker

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// A Plan says what a revocation would kill and break.
type Plan struct {
	Live, Derived uint64
	Identities    []PlannedIdentity
	Audiences     []PlannedAudience
	// Workflows were in use within the last 24 h, as verifiers reported, the busiest
	// first. What no verifier of the feed saw isn't among them.
	Workflows []Workflow
	// Narrower are other selectors that would do.
	Narrower []Narrower
	Standing []Lock
}

// A Workflow is a presenter that calls an audience's verifier, and would break.
type Workflow struct {
	Caller   spiffeid.ID
	Audience string
	Verifier string // identity, or that of the relay before it
	Claimed  string // identity of the verifier behind that relay, by its word
	Count    uint64
	Last     time.Time
	Fallback Fallback
}

// Narrower is a proposal, and in words why it would do.
type Narrower struct {
	Selectors []revocation.Selector
	Why       string
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

// Plan looks at every live grant and changes nothing. A valid address is where the
// attacker is suspected to be.
func (b *Broker) Plan(ctx context.Context, selectors []revocation.Selector, seenFrom netip.Addr) (*Plan, error) {
	if err := CheckSelectors(selectors); err != nil {
		return nil, err
	}
	m := newMatched(selectors, seenFrom)
	p, err := b.reach(ctx, func(g *Grant) bool {
		state, _ := b.GrantState(g)
		if state != GrantLive || !matchesAny(selectors, g.Subject()) {
			return false
		}
		m.add(g)
		return true
	})
	if err != nil {
		return nil, err
	}
	if err := b.seenBefore(ctx, m); err != nil {
		return nil, err
	}
	p.Workflows, p.Narrower = b.workflows(selectors, m), m.narrower(p.Live)
	for _, l := range b.Locks() {
		if slices.ContainsFunc(l.Selectors, func(s revocation.Selector) bool { return slices.Contains(selectors, s) }) {
			p.Standing = append(p.Standing, l)
		}
	}
	return p, nil
}

func matchesAny(selectors []revocation.Selector, sub revocation.Subject) bool {
	return slices.ContainsFunc(selectors, func(s revocation.Selector) bool { return s.Matches(sub) })
}

// matched is what a plan notes of the grants that would die.
type matched struct {
	selectors []revocation.Selector
	seenFrom  netip.Addr
	// one is some matching grant: the only one, where there is one.
	one token.GrantID
	// flows are the ways of calling of the matching grants. They tell which workflows a
	// grant, an SVID or a key has a part in: uses are added up by identities.
	flows map[flowKey]bool
	// by has, for each selector of many identities, those that it reached.
	by []map[spiffeid.ID]bool
	// svids are those of the presenters that got credentials from the address, others
	// those from elsewhere.
	svids, others map[token.Thumbprint]spiffeid.ID
}

func newMatched(selectors []revocation.Selector, seenFrom netip.Addr) *matched {
	m := &matched{
		selectors: selectors, seenFrom: seenFrom.Unmap(), flows: map[flowKey]bool{}, by: make([]map[spiffeid.ID]bool, len(selectors)),
		svids: map[token.Thumbprint]spiffeid.ID{}, others: map[token.Thumbprint]spiffeid.ID{},
	}
	for i := range m.by {
		m.by[i] = map[spiffeid.ID]bool{}
	}
	return m
}

// add notes a grant; again, if the store shows it again.
func (m *matched) add(g *Grant) {
	m.one = g.ID()
	m.flows[flowKey{lineage: lineageText(g), audience: g.Audience}] = true
	for i, s := range m.selectors {
		if s.Kind() != revocation.KindSubtree && s.Kind() != revocation.KindTrustDomain {
			continue
		}
		for _, member := range g.Lineage {
			if s.MatchesCaller(member.Identity, member.SVID) {
				m.by[i][member.Identity] = true
			}
		}
	}
	m.see(g)
}

// see notes from where the grant's own SVID got it, if it is one of whom the selectors
// name. A JWT-SVID has no thumbprint: it stands as one that no selector can name.
func (m *matched) see(g *Grant) {
	self := g.Lineage[len(g.Lineage)-1]
	if !m.seenFrom.IsValid() || !slices.ContainsFunc(m.selectors, func(s revocation.Selector) bool {
		return s.Kind() != revocation.KindEverything && s.MatchesCaller(self.Identity, self.SVID)
	}) {
		return
	}
	if g.Peer.IsValid() && g.Peer.Unmap() == m.seenFrom {
		m.svids[self.SVID] = self.Identity
	} else {
		m.others[self.SVID] = self.Identity
	}
}

// seenBefore adds what the records of the last 24 h tell of single identities: the
// attacker's own credentials may have expired.
func (b *Broker) seenBefore(ctx context.Context, m *matched) error {
	if !m.seenFrom.IsValid() {
		return nil
	}
	for _, s := range m.selectors {
		id, err := spiffeid.FromString(s.Value())
		if s.Kind() != revocation.KindIdentity || err != nil {
			continue
		}
		q := GrantQuery{Presenter: id, LiveAt: b.cfg.Now().Add(-flowsKept), Limit: MaxPageSize}
		for {
			grants, next, err := b.cfg.Store.Grants(ctx, q)
			if err != nil {
				return storeRefusal(err)
			}
			for _, g := range grants {
				m.see(g)
			}
			if next == "" {
				break
			}
			q.After = next
		}
	}
	return nil
}

// narrower proposes what would do instead of the selectors.
func (m *matched) narrower(live uint64) []Narrower {
	var out []Narrower
	if !m.unrecorded() {
		out = m.oneOnly(live)
	}
	if n, ok := m.singles(); ok {
		out = append(out, n)
	}
	return out
}

// unrecorded reports whether the selectors name what no record tells of: what a stolen key
// signed. No recorded grant or SVID does instead of those.
func (m *matched) unrecorded() bool {
	return slices.ContainsFunc(m.selectors, func(s revocation.Selector) bool {
		return s.Kind() == revocation.KindKey || s.Kind() == revocation.KindEverything
	})
}

// oneOnly proposes the only SVID and the only grant, instead of all that is named.
func (m *matched) oneOnly(live uint64) []Narrower {
	var out []Narrower
	if len(m.svids) == 1 {
		for svid, id := range m.svids {
			delete(m.others, svid)
			if !svid.IsZero() && !slices.Contains(m.selectors, revocation.SVID(svid)) {
				rest := "none was seen elsewhere alone"
				if n := len(m.others); n > 0 {
					rest = fmt.Sprintf("%d seen elsewhere alone would go on", n)
				}
				out = append(out, Narrower{[]revocation.Selector{revocation.SVID(svid)}, fmt.Sprintf(
					"only one SVID got credentials from %s, this one of %s; %s. It doesn't do if the attacker can get another SVID",
					m.seenFrom, id, rest)})
			}
		}
	}
	if grant := revocation.Grant(m.one); live == 1 && !slices.Equal(m.selectors, []revocation.Selector{grant}) {
		out = append(out, Narrower{[]revocation.Selector{grant}, "it is the only live grant that matches. It locks nobody out, so it doesn't do if an identity is compromised"})
	}
	return out
}

// singles replaces each selector of many identities by the one that it reaches.
func (m *matched) singles() (Narrower, bool) {
	var why []string
	selectors := slices.Clone(m.selectors)
	for i, reached := range m.by {
		if len(reached) != 1 {
			continue
		}
		for id := range reached {
			why = append(why, fmt.Sprintf("%s is the only identity that %s reaches through live grants", id, selectors[i]))
			selectors[i] = revocation.Identity(id)
		}
	}
	return Narrower{selectors, strings.Join(why, "; ")}, len(why) > 0
}

// workflows adds up the flows of the last 24 h that the selectors match: by audience and
// identities, and where they name a grant, an SVID or a key, by the live grants that
// they match.
func (b *Broker) workflows(selectors []revocation.Selector, m *matched) []Workflow {
	type key struct {
		caller                      spiffeid.ID
		audience, verifier, claimed string
	}
	sums := map[key]*Workflow{}
	for _, fl := range b.uses.recentFlows(b.cfg.Now()) {
		sub := fl.subject()
		if len(sub.Lineage) == 0 || !m.flows[flowKey{lineage: fl.Lineage, audience: fl.Audience}] && !matchesAny(selectors, sub) {
			continue
		}
		at := key{sub.Lineage[len(sub.Lineage)-1].Identity, fl.Audience, fl.Verifier, fl.Claimed}
		if sums[at] == nil {
			sums[at] = &Workflow{Caller: at.caller, Audience: at.audience, Verifier: at.verifier, Claimed: at.claimed}
		}
		sums[at].Count += fl.Count
		if fl.Last.After(sums[at].Last) {
			sums[at].Last = fl.Last
		}
	}
	var out []Workflow
	for _, w := range sums {
		w.Fallback = b.cfg.Policy.Fallback(w.Caller, w.Audience)
		out = append(out, *w)
	}
	slices.SortFunc(out, func(x, y Workflow) int {
		return cmp.Or(cmp.Compare(y.Count, x.Count), cmp.Compare(x.Caller.String(), y.Caller.String()), cmp.Compare(x.Audience, y.Audience), cmp.Compare(x.Verifier, y.Verifier), cmp.Compare(x.Claimed, y.Claimed))
	})
	return out
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
			a = Audience{Name: g.Audience, VerifiedBy: VerifiedByExternal} // undeclared: promise nothing
		}
		pa = &PlannedAudience{Audience: a}
		audiences[g.Audience] = pa
	}
	pa.Live++
	if g.Expires.After(pa.LastExpiry) {
		pa.LastExpiry = g.Expires
	}
}
