package agent

import (
	"context"
	"errors"

	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/sdk"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// refuse makes a refusal of the agent's own, in the form that the broker's have.
func refuse(code codes.Code, reason, message, hint string) error {
	var metadata map[string]string
	if hint != "" {
		metadata = map[string]string{"hint": hint}
	}
	return refusal(code, reason, message, metadata)
}

func refusal(code codes.Code, reason, message string, metadata map[string]string) error {
	s := status.New(code, message)
	if detailed, err := s.WithDetails(&errdetails.ErrorInfo{Domain: sdk.ErrorDomain, Reason: reason, Metadata: metadata}); err == nil {
		s = detailed
	}
	return s.Err()
}

// refusedBelow is the broker's refusal of a verifier below, as the broker would have
// given it to the verifier itself.
func refusedBelow(m *dayflyv1.RelayRefusal) error {
	code := codes.Code(uint32(m.GetCode()))
	if code == codes.OK || code > codes.Unauthenticated {
		code = codes.PermissionDenied
	}
	return refusal(code, m.GetReason(), m.GetMessage(), m.GetMetadata())
}

// unreachable is the reason where the broker didn't answer.
const unreachable = "BROKER_UNREACHABLE"

// upstreamError is what a caller hears of a call to the broker that failed: the
// broker's own refusal as it came, or that it can't be reached.
func upstreamError(err error) error {
	if err == nil {
		return nil
	}
	var refusal *sdk.Error
	if !errors.As(err, &refusal) {
		if s, ok := status.FromError(err); ok {
			return s.Err()
		}
		if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
			return status.FromContextError(err).Err()
		}
		return refuse(codes.Unavailable, "CREDENTIAL_UNAVAILABLE", "no credential can be had now", "the agent's log says more")
	}
	if refusal.Reason != "" {
		return refusal.GRPCStatus().Err()
	}
	if refusal.Code == codes.Unavailable || refusal.Code == codes.DeadlineExceeded {
		return refuse(codes.Unavailable, unreachable, "the broker can't be reached now", "the agent keeps trying by itself; ask again, and see /readyz")
	}
	return refusal.GRPCStatus().Err()
}

// deadOnArrival is the refusal where all that the broker gives is dead when it comes.
func deadOnArrival() error {
	return sdk.FromRPC(refuse(codes.Unavailable, "CREDENTIAL_REVOKED", "what the broker gives is revoked when it comes, or of another identity or certificate than this workload's",
		"ask the security team what was revoked: dayfly revocations list"))
}

func stopping() error {
	return refuse(codes.Unavailable, "AGENT_STOPPING", "the agent is stopping", "ask again once it has started")
}

func tooLarge() error {
	return refuse(codes.InvalidArgument, "REQUEST_TOO_LARGE", "the request is larger than 64 KiB", "a token has at most 2 KiB and 32 scopes")
}

func invalid(message string) error {
	return refuse(codes.InvalidArgument, "INVALID_REQUEST", message, "see the message for the field")
}

func feedInvalid(message string) error {
	return refuse(codes.InvalidArgument, "FEED_MESSAGE_INVALID", message, "this is a fault of the verifier's library")
}
