package agent

import (
	"context"

	"github.com/dayflyhq/dayfly/agent/outgoing"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk"
)

// outgoingProxy returns the proxy of what is configured, with tokens from memory.
func (a *Agent) outgoingProxy() (*outgoing.Proxy, error) {
	cfg := outgoing.Config{
		Listeners: a.cfg.Outgoing, Tokens: outgoingTokens{a.cache}, SVIDs: a.cfg.Source, Bundles: a.cfg.Bundles,
		Admit: door{a.cfg.AllowedUIDs}.admit, Log: a.cfg.Log,
	}
	return outgoing.New(cfg)
}

// outgoingTokens is the cache as the proxy knows it.
type outgoingTokens struct{ cache *cache }

func (t outgoingTokens) Token(ctx context.Context, r sdk.Request) (*sdk.Credential, error) {
	return t.cache.token(ctx, fileRequest(r))
}

// Refused lets the credential's source decide: it knows when it dropped the one before.
func (t outgoingTokens) Refused(r sdk.Request, cred *sdk.Credential) bool {
	want := fileRequest(r)
	if want.normalize() != nil {
		return false
	}
	t.cache.mu.Lock()
	e, ok := t.cache.entries[want.key()]
	t.cache.mu.Unlock()
	return !ok || e.source.Refused(cred)
}

// Revoked is the feed's word alone: a rotated certificate ends no request on a connection
// that shows it.
func (t outgoingTokens) Revoked(claims *token.Claims) bool {
	switch t.cache.judge(revocation.SubjectOf(claims)).Reason {
	case revocation.Alive, revocation.Ahead:
		return false
	}
	return true
}

func (t outgoingTokens) Changed() <-chan struct{} { return t.cache.whenChanged() }
