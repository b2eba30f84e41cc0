package rpc

import (
	"context"
	"errors"
	"log/slog"
	"maps"

	"github.com/dayflyhq/dayfly/broker"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Domain is the domain of every ErrorInfo.
const Domain = "dayfly"

var codeOf = map[broker.Kind]codes.Code{
	broker.Invalid:         codes.InvalidArgument,
	broker.Unauthenticated: codes.Unauthenticated,
	broker.Denied:          codes.PermissionDenied,
	broker.NotFound:        codes.NotFound,
	broker.Conflict:        codes.FailedPrecondition,
	broker.Exhausted:       codes.ResourceExhausted,
	broker.Unavailable:     codes.Unavailable,
}

// toStatus translates what a handler returned: the one place where errors become
// statuses. What it doesn't know goes out as a fixed text and is logged whole.
func toStatus(ctx context.Context, log *slog.Logger, method string, err error) error {
	if err == nil {
		return nil
	}
	var refusal *broker.Refusal
	if errors.As(err, &refusal) {
		return refusalStatus(refusal)
	}
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return status.FromContextError(err).Err()
	}
	if s, ok := status.FromError(err); ok {
		return s.Err() // from gRPC itself: the stream broke
	}
	log.ErrorContext(ctx, "internal error", "method", method, "err", err)
	return status.Error(codes.Internal, "internal error; the broker's log says more")
}

func refusalStatus(r *broker.Refusal) error {
	code, metadata := codeAndMetadata(r)
	s := status.New(code, r.Message)
	if detailed, err := s.WithDetails(&errdetails.ErrorInfo{Domain: Domain, Reason: r.Reason, Metadata: metadata}); err == nil {
		s = detailed
	}
	return s.Err()
}

func codeAndMetadata(r *broker.Refusal) (codes.Code, map[string]string) {
	metadata := map[string]string{}
	maps.Copy(metadata, r.Metadata)
	if r.Hint != "" {
		metadata["hint"] = r.Hint
	}
	return codeOf[r.Kind], metadata
}
