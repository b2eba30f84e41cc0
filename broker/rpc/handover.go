package rpc

import (
	"context"
	"time"

	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/wire"
	"google.golang.org/protobuf/types/known/durationpb"
)

// A Handover is what the next process of a broker needs of this one.
type Handover struct {
	// SpreadIn is how long after its publication a key is in every copy of the JWK set
	// that a reader may still use.
	SpreadIn time.Duration
	// Stop tells this process to end, and doesn't wait for it.
	Stop func()
}

// handoverService is on the break-glass socket only.
type handoverService struct {
	dayflyv1.UnimplementedHandoverServiceServer
	*handlers
	Handover
}

// PublishKey implements dayflyv1.HandoverServiceServer.
func (s *handoverService) PublishKey(ctx context.Context, m *dayflyv1.PublishKeyRequest) (*dayflyv1.PublishKeyResponse, error) {
	caller, err := s.caller(ctx)
	if err != nil {
		return nil, err
	}
	key, err := wire.ToKey(m.GetKey())
	if err != nil {
		return nil, invalid("key", "can't be read: "+err.Error())
	}
	if err := s.broker.PublishSuccessor(ctx, caller, key); err != nil {
		return nil, err
	}
	s.log.InfoContext(ctx, "published the signing key of the next process", "kid", key.Public.ID.String(), "caller", caller.Actor())
	return &dayflyv1.PublishKeyResponse{SpreadIn: durationpb.New(s.SpreadIn)}, nil
}

// Stop implements dayflyv1.HandoverServiceServer.
func (s *handoverService) Stop(ctx context.Context, _ *dayflyv1.StopRequest) (*dayflyv1.StopResponse, error) {
	caller, err := s.caller(ctx)
	if err != nil {
		return nil, err
	}
	if err := s.broker.Yield(caller); err != nil {
		return nil, err
	}
	s.log.InfoContext(ctx, "told to stop, for the next process to take over", "caller", caller.Actor())
	s.Handover.Stop()
	return &dayflyv1.StopResponse{}, nil
}
