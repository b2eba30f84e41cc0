package agent

import (
	"cmp"
	"context"
	"maps"
	"slices"

	"github.com/dayflyhq/dayfly/agent/outgoing"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk"
)

// outgoingProxy returns the proxy of what is configured, with tokens from memory.
func (a *Agent) outgoingProxy() (*outgoing.Proxy, error) {
	cfg := outgoing.Config{
		Listeners: a.cfg.Outgoing, Tokens: outgoingTokens{a.cache, a.cache.hear()}, SVIDs: a.cfg.Source, Bundles: a.cfg.Bundles,
		Admit: a.door.admit, Log: a.cfg.Log,
		Count: func(reason string) { a.counts.requests.add(ListenerOutgoing, cmp.Or(reason, okay)) },
	}
	return outgoing.New(cfg)
}

// outgoingFamilies tell of each upstream how requests ended.
func (a *Agent) outgoingFamilies() Metrics {
	requests := Family{Name: "dayfly_agent_outgoing_requests_total", Kind: "counter", Help: "Requests to an upstream by how they ended; those that no upstream takes have none."}
	fetched := Family{Name: "dayfly_agent_outgoing_unauthorized_total", Kind: "counter", Help: "Times that an upstream's 401 made another token be asked for."}
	open := Family{Name: "dayfly_agent_outgoing_open", Kind: "gauge", Help: "Requests to an upstream under way."}
	for _, c := range a.outgoing.Counts() {
		labels := []Label{{"listener", c.Listener}, {"upstream", c.Upstream}}
		for _, o := range slices.Sorted(maps.Keys(c.Requests)) {
			requests.Samples = append(requests.Samples, Sample{Labels: append(slices.Clip(labels), Label{"outcome", o.String()}), Value: float64(c.Requests[o])})
		}
		if c.Upstream != "" {
			fetched.Samples = append(fetched.Samples, Sample{Labels: labels, Value: float64(c.Fetched)})
			open.Samples = append(open.Samples, Sample{Labels: labels, Value: float64(c.Open)})
		}
	}
	return Metrics{requests, fetched, open}
}

// outgoingTokens is the cache as the proxy knows it.
type outgoingTokens struct {
	cache  *cache
	hearer *hearer // of what may concern any: revocations
}

func (t outgoingTokens) Token(ctx context.Context, r sdk.Request) (*sdk.Credential, error) {
	return t.cache.token(ctx, fileRequest(r))
}

// Refused lets the credential's source decide: it knows when it dropped the one before.
func (t outgoingTokens) Refused(r sdk.Request, cred *sdk.Credential) bool {
	e := t.cache.find(r)
	return e == nil || e.source.Refused(cred.Grant)
}

// Revoked is the feed's word alone: a rotated certificate ends no request on a connection
// that shows it.
func (t outgoingTokens) Revoked(claims *token.Claims) bool { return t.cache.revoked(claims) }

func (t outgoingTokens) Changed() <-chan struct{} { return t.hearer.changed() }
