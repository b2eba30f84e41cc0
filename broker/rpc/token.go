package rpc

import (
	"context"

	"github.com/dayflyhq/dayfly/broker"
	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/token"
)

type tokenService struct {
	dayflyv1.UnimplementedTokenServiceServer
	*handlers
}

func (s *tokenService) Issue(ctx context.Context, m *dayflyv1.IssueRequest) (*dayflyv1.IssueResponse, error) {
	c, err := s.caller(ctx)
	if err != nil {
		return nil, err
	}
	req, err := toRequest(m)
	if err != nil {
		return nil, err
	}
	cred, err := s.broker.Issue(ctx, c, req)
	if err != nil {
		return nil, err
	}
	return &dayflyv1.IssueResponse{Credential: credential(cred)}, nil
}

func (s *tokenService) Exchange(ctx context.Context, m *dayflyv1.ExchangeRequest) (*dayflyv1.ExchangeResponse, error) {
	c, err := s.caller(ctx)
	if err != nil {
		return nil, err
	}
	req, err := toRequest(m)
	if err != nil {
		return nil, err
	}
	if m.GetSubjectToken() == "" {
		return nil, invalid("subject_token", "is required")
	}
	req.Subject = token.NewSecret(m.GetSubjectToken())
	cred, err := s.broker.Exchange(ctx, c, req)
	if err != nil {
		return nil, err
	}
	return &dayflyv1.ExchangeResponse{Credential: credential(cred)}, nil
}

func credential(c *broker.Credential) *dayflyv1.Credential {
	return &dayflyv1.Credential{
		Token:     c.Token.Reveal(),
		Grant:     c.Grant.ID().String(),
		Audience:  c.Grant.Audience,
		Scopes:    c.Grant.Scopes,
		Binding:   bindingMessage(c.Grant.Binding),
		IssuedAt:  timestamp(c.Grant.IssuedAt),
		ExpiresAt: timestamp(c.Grant.Expires),
	}
}
