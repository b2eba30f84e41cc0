package sdk

import (
	"fmt"
	"maps"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// ErrorDomain is the domain of dayfly's reasons in a google.rpc.ErrorInfo.
const ErrorDomain = "dayfly"

// hintKey is the metadata key of an ErrorInfo that says what to try next.
const hintKey = "hint"

// An Error is a refusal of the broker or of the agent. Reason is stable and
// machine-readable (docs/errors.md lists them all); Message and Hint are for people.
// It is also what a call ends with that never reached anyone: then Reason is empty and
// Code says what the transport knows.
type Error struct {
	Code     codes.Code
	Reason   string // UPPER_SNAKE_CASE
	Message  string
	Hint     string            // what to try next
	Metadata map[string]string // facts of the refusal, without the hint

	status *status.Status
}

// Error names the reason, the message and the hint.
func (e *Error) Error() string {
	name := e.Reason
	if name == "" {
		name = e.Code.String()
	}
	text := name
	if e.Message != "" {
		text += ": " + e.Message
	}
	if e.Hint != "" {
		text += " (" + e.Hint + ")"
	}
	return text
}

// Is makes two errors equal when their reasons are, so that
// errors.Is(err, sdk.ErrIdentityLocked) asks for one refusal.
func (e *Error) Is(target error) bool {
	other, ok := target.(*Error)
	return ok && other.Reason != "" && other.Reason == e.Reason
}

// GRPCStatus returns the status as it came, for those who ask package status.
func (e *Error) GRPCStatus() *status.Status {
	if e.status == nil {
		return status.New(e.Code, e.Message)
	}
	return e.status
}

// Temporary reports whether the same call may succeed later without anyone's doing.
func (e *Error) Temporary() bool {
	switch e.Code {
	case codes.Unavailable, codes.ResourceExhausted, codes.DeadlineExceeded, codes.Aborted:
		return true
	}
	return false
}

// retryAfterKey is the metadata key that says how long to wait, as a Go duration.
const retryAfterKey = "retry_after"

// RetryAfter is how long the same call would be refused again, where a limit of this
// identity is reached or an audience may not know the signing key yet; zero if the refusal
// says nothing of it. What stands before a broker may say it as a google.rpc.RetryInfo.
func (e *Error) RetryAfter() time.Duration {
	if d, err := time.ParseDuration(e.Metadata[retryAfterKey]); err == nil {
		return max(d, 0)
	}
	for _, detail := range e.status.Details() {
		if info, ok := detail.(*errdetails.RetryInfo); ok && info.GetRetryDelay().IsValid() {
			return max(info.GetRetryDelay().AsDuration(), 0)
		}
	}
	return 0
}

// The refusals that a workload meets, for errors.Is. Any other reason is compared by
// Error.Reason.
var (
	ErrInvalidRequest      = refusal(codes.InvalidArgument, "INVALID_REQUEST")
	ErrRequestTooLarge     = refusal(codes.InvalidArgument, "REQUEST_TOO_LARGE")
	ErrTokenTooLarge       = refusal(codes.InvalidArgument, "TOKEN_TOO_LARGE")
	ErrRateLimited         = refusal(codes.ResourceExhausted, "ISSUE_RATE_LIMITED")
	ErrLiveLimited         = refusal(codes.ResourceExhausted, "LIVE_GRANTS_LIMITED")
	ErrKeyNotSpread        = refusal(codes.Unavailable, "KEY_NOT_SPREAD_YET")
	ErrSVIDExpired         = refusal(codes.Unauthenticated, "SVID_EXPIRED")
	ErrPolicyDenied        = refusal(codes.PermissionDenied, "POLICY_DENIED")
	ErrIdentityLocked      = refusal(codes.PermissionDenied, "IDENTITY_LOCKED")
	ErrSubjectMalformed    = refusal(codes.InvalidArgument, "SUBJECT_TOKEN_MALFORMED")
	ErrSubjectExpired      = refusal(codes.PermissionDenied, "SUBJECT_TOKEN_EXPIRED")
	ErrSubjectRevoked      = refusal(codes.PermissionDenied, "SUBJECT_TOKEN_REVOKED")
	ErrSubjectNotAddressed = refusal(codes.PermissionDenied, "SUBJECT_TOKEN_NOT_ADDRESSED")
	ErrSubjectUnknown      = refusal(codes.PermissionDenied, "SUBJECT_TOKEN_UNKNOWN")
)

func refusal(code codes.Code, reason string) *Error { return &Error{Code: code, Reason: reason} }

// FromRPC turns the error of a call into an *Error: the inverse of what the broker
// does with its refusals. Nil stays nil, and what is no gRPC status stays as it is.
// Calls through Client.Conn have been through it.
func FromRPC(err error) error {
	if err == nil {
		return nil
	}
	if _, ok := err.(*Error); ok {
		return err
	}
	st, ok := status.FromError(err)
	if !ok {
		return err
	}
	e := &Error{Code: st.Code(), Message: st.Message(), status: st}
	for _, detail := range st.Details() {
		info, ok := detail.(*errdetails.ErrorInfo)
		if !ok || info.GetDomain() != ErrorDomain {
			continue
		}
		e.Reason, e.Metadata = info.GetReason(), maps.Clone(info.GetMetadata())
		e.Hint = e.Metadata[hintKey]
		delete(e.Metadata, hintKey)
		break
	}
	return e
}

func wrapf(err error, format string, args ...any) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", fmt.Sprintf(format, args...), err)
}
