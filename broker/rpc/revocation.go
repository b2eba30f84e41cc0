package rpc

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/wire"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
)

type revocationService struct {
	dayflyv1.UnimplementedRevocationServiceServer
	*handlers
}

func (s *revocationService) Plan(ctx context.Context, m *dayflyv1.PlanRequest) (*dayflyv1.PlanResponse, error) {
	if _, err := s.operator(ctx, broker.ActionPlan); err != nil {
		return nil, err
	}
	selectors, err := toSelectors(m.GetSelectors())
	if err != nil {
		return nil, err
	}
	if _, err := toLockMode(m.GetLockMode()); err != nil {
		return nil, err
	}
	var seenFrom netip.Addr
	if m.GetSeenFrom() != "" {
		if seenFrom, err = netip.ParseAddr(m.GetSeenFrom()); err != nil {
			return nil, invalid("seen_from", "is no network address; it has no port")
		}
	}
	head := s.broker.Head()
	plan, err := s.broker.Plan(ctx, selectors, seenFrom)
	if err != nil {
		return nil, err
	}
	out := &dayflyv1.PlanResponse{
		Position: wire.Position(head), LiveGrants: plan.Live, DerivedGrants: plan.Derived,
		Audiences: audienceMessages(plan.Audiences),
	}
	for _, i := range plan.Identities {
		out.Identities = append(out.Identities, &dayflyv1.AffectedIdentity{Identity: i.ID.String(), Presents: i.Presents, Derives: i.Derives})
	}
	for _, w := range plan.Workflows {
		out.Workflows = append(out.Workflows, &dayflyv1.AffectedWorkflow{
			Caller: w.Caller.String(), Callee: w.Audience, Verifier: w.Verifier, ClaimedVerifier: w.Claimed, Count: w.Count,
			LastSeen: timestamp(w.Last), Fallback: fallbackMessage(w.Fallback),
		})
	}
	for _, n := range plan.Narrower {
		out.Narrower = append(out.Narrower, &dayflyv1.NarrowerProposal{Selectors: wire.Selectors(n.Selectors), Why: n.Why})
	}
	for _, l := range plan.Standing {
		out.StandingLocks = append(out.StandingLocks, lockMessage(l))
	}
	return out, nil
}

func (s *revocationService) Revoke(ctx context.Context, m *dayflyv1.RevokeRequest) (*dayflyv1.RevokeResponse, error) {
	c, err := s.caller(ctx)
	if err != nil {
		return nil, err
	}
	req := broker.Revoke{Reason: m.GetReason(), IdempotencyKey: m.GetIdempotencyKey(), AllowEverything: m.GetAllowEverything()}
	if req.Selectors, err = toSelectors(m.GetSelectors()); err != nil {
		return nil, err
	}
	if req.Lock, err = toLockMode(m.GetLockMode()); err != nil {
		return nil, err
	}
	if t := m.GetLockEndsAt(); t != nil {
		if !t.IsValid() {
			return nil, invalid("lock_ends_at", "is no time")
		}
		req.LockEnds = t.AsTime()
	}
	rec, err := s.broker.Revoke(ctx, c, req)
	var pending *broker.Pending
	if errors.As(err, &pending) {
		return &dayflyv1.RevokeResponse{Proposal: proposalMessage(&pending.Proposal, pending.Confirmers)}, nil
	}
	if err != nil {
		return nil, err
	}
	r, err := s.broker.Revocation(rec.Seq)
	if err != nil {
		return nil, err
	}
	containment, _ := s.broker.Containment(r)
	return &dayflyv1.RevokeResponse{Revocation: revocationMessage(r), Containment: containmentMessage(rec.Seq, containment)}, nil
}

func (s *revocationService) Lift(ctx context.Context, m *dayflyv1.LiftRequest) (*dayflyv1.LiftResponse, error) {
	c, err := s.caller(ctx)
	if err != nil {
		return nil, err
	}
	rec, err := s.broker.Lift(ctx, c, m.GetLock(), m.GetReason(), m.GetIdempotencyKey())
	var pending *broker.Pending
	if errors.As(err, &pending) {
		return &dayflyv1.LiftResponse{Lift: proposedLiftMessage(m.GetLock(), &pending.Proposal, pending.Confirmers)}, nil
	}
	if err != nil {
		return nil, err
	}
	return &dayflyv1.LiftResponse{Lift: liftMessage(rec), Lifted: true}, nil
}

func (s *revocationService) ListRevocations(ctx context.Context, m *dayflyv1.ListRevocationsRequest) (*dayflyv1.ListRevocationsResponse, error) {
	if _, err := s.operator(ctx, broker.ActionList); err != nil {
		return nil, err
	}
	size, err := pageSize(m.GetPageSize())
	if err != nil {
		return nil, err
	}
	below, err := toNumber(m.GetPageToken())
	if err != nil {
		return nil, err
	}
	out := &dayflyv1.ListRevocationsResponse{}
	page := s.broker.Revocations(below, size+1, m.GetGivenBack())
	for i, r := range page {
		if i == size {
			out.NextPageToken = numberToken(page[size-1].Seq)
			break
		}
		out.Revocations = append(out.Revocations, revocationMessage(r))
	}
	return out, nil
}

func (s *revocationService) GetRevocation(ctx context.Context, m *dayflyv1.GetRevocationRequest) (*dayflyv1.GetRevocationResponse, error) {
	if _, err := s.operator(ctx, broker.ActionList); err != nil {
		return nil, err
	}
	r, err := s.broker.Revocation(m.GetSequence())
	if err != nil {
		return nil, err
	}
	containment, _ := s.broker.Containment(r)
	if containment.External, err = s.broker.External(ctx, r); err != nil {
		return nil, err
	}
	return &dayflyv1.GetRevocationResponse{Revocation: revocationMessage(r), Containment: containmentMessage(r.Seq, containment)}, nil
}

func (s *revocationService) ListLocks(ctx context.Context, m *dayflyv1.ListLocksRequest) (*dayflyv1.ListLocksResponse, error) {
	if _, err := s.operator(ctx, broker.ActionList); err != nil {
		return nil, err
	}
	size, err := pageSize(m.GetPageSize())
	if err != nil {
		return nil, err
	}
	below, err := toNumber(m.GetPageToken())
	if err != nil {
		return nil, err
	}
	proposed, err := s.broker.ProposedLifts(ctx)
	if err != nil {
		return nil, err
	}
	out := &dayflyv1.ListLocksResponse{}
	for _, l := range s.broker.Locks() {
		if below > 0 && l.Number >= below {
			continue
		}
		if len(out.Locks) == size {
			out.NextPageToken = numberToken(out.Locks[size-1].GetNumber())
			break
		}
		lock := lockMessage(l)
		if p, ok := proposed[l.Number]; ok {
			lock.ProposedLift = proposedLiftMessage(l.Number, &p, nil)
		}
		out.Locks = append(out.Locks, lock)
	}
	return out, nil
}

func (s *revocationService) WatchContainment(m *dayflyv1.WatchContainmentRequest, stream grpc.ServerStreamingServer[dayflyv1.WatchContainmentResponse]) error {
	ctx := stream.Context()
	bundles := s.bundlesChanged()
	if _, err := s.operator(ctx, broker.ActionList); err != nil {
		return err
	}
	r, err := s.broker.Revocation(m.GetSequence())
	if err != nil {
		return err
	}
	external, err := s.broker.External(ctx, r)
	if err != nil {
		return err
	}
	var last *dayflyv1.Containment
	for {
		c, changed := s.broker.Containment(r)
		c.External = external
		now := containmentMessage(r.Seq, c)
		if last == nil || news(last, now) {
			if err := stream.Send(&dayflyv1.WatchContainmentResponse{Containment: now}); err != nil {
				return err
			}
			last = now
		}
		if c.Contained {
			return nil
		}
		if err := s.awaitContainment(ctx, c, changed, bundles); err != nil {
			return err
		}
		bundles = s.bundlesChanged()
		if _, err := s.caller(ctx); err != nil { // the operator's SVID may be good no more
			return err
		}
	}
}

// news reports whether anything but the clock changed.
func news(last, now *dayflyv1.Containment) bool {
	a, b := proto.Clone(last).(*dayflyv1.Containment), proto.Clone(now).(*dayflyv1.Containment)
	for _, c := range []*dayflyv1.Containment{a, b} {
		c.ContainedAt, c.ContainedBy = nil, nil
		for _, r := range c.GetReceipts() {
			r.Since, r.ClosesAt = nil, nil
		}
	}
	return !proto.Equal(a, b)
}

// awaitContainment waits for a receipt, for another bundle, or for the next moment at
// which silence changes what can be said.
func (s *revocationService) awaitContainment(ctx context.Context, c *broker.Containment, changed, bundles <-chan struct{}) error {
	next := c.By
	for _, r := range c.Receipts {
		if r.State == feed.Pending && r.At < next {
			next = r.At
		}
	}
	var due <-chan time.Time
	if next > c.NowInstant || c.Counts[feed.Unbounded] == 0 {
		timer := time.NewTimer(next.Sub(c.NowInstant) + time.Millisecond)
		defer timer.Stop()
		due = timer.C
	}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-s.serving.Done():
		return broker.ErrStoreLost
	case <-changed:
	case <-bundles:
	case <-due:
	}
	return nil
}

func splitVia(via string) []string {
	if via == "" {
		return nil
	}
	return strings.Split(via, "/")
}
