package brokerd

import (
	"context"
	"errors"
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
	return broker.Audience{
		Name: a.Name, Owner: a.Owner, VerifiedBy: a.VerifiedBy, MaxStaleness: a.MaxStaleness,
		Fallback: broker.Fallback(a.Fallback),
	}, true
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
		Rule: got.Rule, Data: got.Data, Limits: broker.Limits(got.Limits), SecondPerson: broker.SecondPerson(got.SecondPerson),
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
		in.Verifier = policy.Verifier{Audiences: q.Audiences, MaxStaleness: q.MaxStaleness, OnStale: policy.OnStaleRefuse}
		if q.AcceptsStale {
			in.Verifier.OnStale = policy.OnStaleAccept
		}
	}
	return in
}

func caller(c broker.Caller, now time.Time) policy.Caller {
	from, until := c.Attested()
	out := policy.Caller{ID: c.ID, Attestation: policy.AttestationJWT, SVIDAge: now.Sub(from), SVIDRemaining: until.Sub(now)}
	if c.Leaf != nil {
		out.Attestation, out.SVIDSerial = policy.AttestationX509, c.Leaf.SerialNumber.Text(16)
	}
	return out
}
