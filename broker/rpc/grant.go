package rpc

import (
	"context"

	"github.com/dayflyhq/dayfly/broker"
	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/proto/wire"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

type grantService struct {
	dayflyv1.UnimplementedGrantServiceServer
	*handlers
}

func (s *grantService) GetGrant(ctx context.Context, m *dayflyv1.GetGrantRequest) (*dayflyv1.GetGrantResponse, error) {
	if _, err := s.operator(ctx, broker.ActionList); err != nil {
		return nil, err
	}
	id, err := token.ParseGrantID(m.GetGrant())
	if err != nil {
		return nil, invalid("grant", err.Error())
	}
	g, err := s.broker.Grant(ctx, id)
	if err != nil {
		return nil, err
	}
	return &dayflyv1.GetGrantResponse{Grant: grantMessage(s.broker, g)}, nil
}

func (s *grantService) ListGrants(ctx context.Context, m *dayflyv1.ListGrantsRequest) (*dayflyv1.ListGrantsResponse, error) {
	if _, err := s.operator(ctx, broker.ActionList); err != nil {
		return nil, err
	}
	f := broker.GrantFilter{Audience: m.GetAudience(), IncludeExpired: m.GetIncludeExpired()}
	var err error
	if p := m.GetPresenter(); p != "" {
		if f.Presenter, err = spiffeid.FromString(p); err != nil {
			return nil, invalid("presenter", err.Error())
		}
	}
	if sel := m.GetDerivedFrom(); sel != nil {
		if f.DerivedFrom, err = wire.ToSelector(sel); err != nil {
			return nil, invalid("derived_from", err.Error())
		}
	}
	size, err := pageSize(m.GetPageSize())
	if err != nil {
		return nil, err
	}
	grants, next, err := s.broker.Grants(ctx, f, size, m.GetPageToken())
	if err != nil {
		return nil, err
	}
	out := &dayflyv1.ListGrantsResponse{NextPageToken: next}
	for _, g := range grants {
		out.Grants = append(out.Grants, grantMessage(s.broker, g))
	}
	return out, nil
}
