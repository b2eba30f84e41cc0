package brokerd

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/policy"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// decider puts the broker's questions to OPA: neither room knows the other.
type decider struct{ p *policy.Policy }

func (d decider) AnswersTo(id spiffeid.ID, audience string) bool { return d.p.AnswersTo(id, audience) }

func (d decider) Audience(name string) (broker.Audience, bool) {
	a, ok := d.p.Audience(name)
	if !ok {
		return broker.Audience{}, false
	}
	return audience(a), true
}

func (d decider) External() []broker.Audience {
	var out []broker.Audience
	for _, a := range d.p.Audiences() {
		if a.VerifiedBy == policy.VerifiedByExternal {
			out = append(out, audience(a))
		}
	}
	return out
}

func audience(a policy.Audience) broker.Audience {
	return broker.Audience{
		Name: a.Name, Owner: a.Owner, VerifiedBy: a.VerifiedBy, MaxStaleness: a.MaxStaleness,
		Fallback: broker.Fallback(a.Fallback),
	}
}

func (d decider) Fallback(caller spiffeid.ID, audience string) broker.Fallback {
	return broker.Fallback(d.p.Fallback(caller, audience))
}

func (d decider) Decide(ctx context.Context, q broker.Question) (broker.Decision, error) {
	got, err := d.p.Decide(ctx, input(q))
	if errors.Is(err, policy.ErrNone) {
		return broker.Decision{}, broker.ErrNoPolicy
	}
	if err != nil {
		return broker.Decision{}, err
	}
	out := broker.Decision{
		Allow: got.Allow, Scopes: got.Scopes, TTL: got.TTL, Binding: token.Binding(got.Binding),
		Rule: got.Rule, Data: got.Data, Revision: got.Revision, Limits: broker.Limits(got.Limits), SecondPerson: broker.SecondPerson(got.SecondPerson),
	}
	if !got.Allow && len(got.Denials) > 0 {
		first := got.Denials[0]
		out.Reason, out.Message, out.Hint, out.Metadata = first.Reason, first.Message, first.Hint, first.Metadata
	}
	return out, nil
}

func input(q broker.Question) policy.Input {
	in := policy.Input{
		Action: policy.Action(q.Action), Caller: caller(q.Caller, q.Time), Time: q.Time,
		Audience: q.Audience, Scopes: q.Scopes, TTL: q.TTL, Binding: string(q.Binding),
		Selectors: q.Selectors, Lock: string(q.Lock),
	}
	if q.Caller.Peer.IsValid() {
		in.PeerAddress = q.Caller.Peer.String()
	}
	if q.Parent != nil {
		in.ParentAudience, in.ParentScopes = q.Parent.Audience, q.Parent.Scopes
		for _, m := range q.Parent.Lineage {
			in.Lineage = append(in.Lineage, policy.Member{ID: m.Identity, Grant: m.Grant.String(), KeyID: m.Key.String()})
		}
	}
	if q.Action == broker.ActionFollow || q.Action == broker.ActionRelay {
		in.Verifier = verifier(q.Audiences, q.MaxStaleness, q.AcceptsStale)
	}
	return in
}

func verifier(audiences []string, bound time.Duration, acceptsStale bool) policy.Verifier {
	v := policy.Verifier{Audiences: audiences, MaxStaleness: bound, OnStale: policy.OnStaleRefuse}
	if acceptsStale {
		v.OnStale = policy.OnStaleAccept
	}
	return v
}

func caller(c broker.Caller, now time.Time) policy.Caller {
	from, until := c.Attested()
	out := policy.Caller{ID: c.ID, Attestation: policy.AttestationJWT, SVIDAge: now.Sub(from), SVIDRemaining: until.Sub(now)}
	if c.Leaf != nil {
		out.Attestation, out.SVIDSerial = policy.AttestationX509, c.Leaf.SerialNumber.Text(16)
	}
	return out
}

// Question puts a recorded question as the broker put it: input, from the audit.
func Question(actor string, a broker.Asked) (policy.Input, error) {
	id, err := spiffeid.FromString(actor)
	if err != nil {
		return policy.Input{}, fmt.Errorf("the actor: %w", err)
	}
	in := policy.Input{
		Action: policy.Action(a.Action), Caller: policy.Caller{ID: id, Attestation: a.Attestation}, Time: a.Time, PeerAddress: a.Peer,
		Audience: a.Audience, Scopes: a.Scopes, TTL: a.TTL, Binding: string(a.Binding), Selectors: a.Selectors, Lock: string(a.Lock),
	}
	in.Caller.SVIDSerial = a.SVID.Serial
	in.Caller.SVIDAge, in.Caller.SVIDRemaining = a.Time.Sub(a.SVID.NotBefore), a.SVID.NotAfter.Sub(a.Time)
	if p := a.Parent; p != nil {
		in.ParentAudience, in.ParentScopes = p.Audience, p.Scopes
		for _, m := range p.Lineage {
			id, err := spiffeid.FromString(m.Identity)
			if err != nil {
				return policy.Input{}, fmt.Errorf("the lineage: %w", err)
			}
			in.Lineage = append(in.Lineage, policy.Member{ID: id, Grant: m.Grant, KeyID: m.Key})
		}
	}
	if v := a.Verifier; v != nil {
		in.Verifier = verifier(v.Audiences, v.MaxStaleness, v.AcceptsStale)
	}
	return in, nil
}
