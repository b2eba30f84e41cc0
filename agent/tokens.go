package agent

import (
	"context"
	"time"

	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/wire"
	"github.com/dayflyhq/dayfly/sdk"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// tokenService is the broker's TokenService, from memory where it may be.
type tokenService struct {
	dayflyv1.UnimplementedTokenServiceServer
	agent *Agent
}

// Issue answers from memory. The caller's idempotency key has no use here: a repeated
// call gets the same credential while that lives.
func (s *tokenService) Issue(ctx context.Context, m *dayflyv1.IssueRequest) (*dayflyv1.IssueResponse, error) {
	req, err := toRequest(m)
	if err != nil {
		return nil, err
	}
	cred, err := s.agent.cache.token(ctx, req)
	if err != nil {
		return nil, err
	}
	return &dayflyv1.IssueResponse{Credential: message(cred)}, nil
}

func toRequest(m *dayflyv1.IssueRequest) (Request, error) {
	r := Request{Audience: m.GetAudience(), Scopes: m.GetScopes()}
	if m.GetTtl() != nil {
		ttl, err := wire.ToDuration(m.GetTtl())
		if err != nil || ttl == 0 {
			return Request{}, invalid("ttl: must be positive")
		}
		r.TTL = ttl
	}
	var err error
	if r.Binding, err = wire.ToBinding(m.GetBinding()); err != nil {
		return Request{}, invalid("binding: unknown")
	}
	return r, nil
}

// Exchange passes through: what it makes depends on the presented token.
func (s *tokenService) Exchange(ctx context.Context, m *dayflyv1.ExchangeRequest) (*dayflyv1.ExchangeResponse, error) {
	cred, err := s.agent.exchange(ctx, m)
	if err != nil {
		return nil, err
	}
	return &dayflyv1.ExchangeResponse{Credential: message(cred)}, nil
}

func (a *Agent) exchange(ctx context.Context, m *dayflyv1.ExchangeRequest) (*sdk.Credential, error) {
	if err := notIssued(a.cfg.Source); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, issueTimeout)
	defer cancel()
	asked := a.cfg.Now()
	if err := a.cache.limit(); err != nil {
		return nil, upstreamError(err)
	}
	resp, err := a.cache.tokens.Exchange(ctx, m, grpc.WaitForReady(true))
	a.cache.contacted(err)
	if err != nil {
		a.cache.heed(err)
		return nil, upstreamError(sdk.FromRPC(err))
	}
	cred, claims, err := read(resp.GetCredential(), m.GetAudience(), asked)
	if err != nil {
		return nil, upstreamError(err)
	}
	if a.cache.judged(claims) { // since it was asked for
		return nil, deadOnArrival()
	}
	return cred, nil
}

func message(c *sdk.Credential) *dayflyv1.Credential {
	return &dayflyv1.Credential{
		Token: c.Token.Reveal(), Grant: c.Grant, Audience: c.Audience, Scopes: c.Scopes,
		Binding: wire.Binding(c.Binding), IssuedAt: timestamppb.New(c.IssuedAt), ExpiresAt: timestamppb.New(c.Expires),
	}
}

// left is how long a credential still lives.
func (a *Agent) left(c *sdk.Credential) time.Duration { return max(0, c.Expires.Sub(a.cfg.Now())) }
