package outgoing

import (
	"context"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"errors"
	"math"
	"net"
	"net/http"
	"os"
	"strconv"
	"time"

	"github.com/dayflyhq/dayfly/agent/hop"
	"github.com/dayflyhq/dayfly/sdk"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// A refusal is the proxy's own answer.
type refusal struct {
	status        int        // of HTTP
	code          codes.Code // of gRPC
	reason        string     // stable, machine-readable
	message, hint string
	retryAfter    time.Duration
	outcome       Outcome
}

func (r *refusal) Error() string { return r.reason + ": " + r.message }

// denied is a refusal of what the caller did.
func denied(status int, code codes.Code, reason, message, hint string) *refusal {
	return &refusal{status: status, code: code, reason: reason, message: message, hint: hint, outcome: Denied}
}

var (
	errRevoked = &refusal{
		status: http.StatusBadGateway, code: codes.Unauthenticated, reason: "CREDENTIAL_REVOKED", message: "the credential of this request is revoked",
		hint: "ask the security team what was revoked: dayfly revocations list", outcome: Cut,
	}
	errStopping = &refusal{
		status: http.StatusServiceUnavailable, code: codes.Unavailable, reason: "AGENT_STOPPING", message: "the agent is stopping",
		hint: "ask again once it has started", retryAfter: time.Second, outcome: Cut,
	}
	errRotating = &refusal{
		status: http.StatusServiceUnavailable, code: codes.Unavailable, reason: "IDENTITY_ROTATING", message: "the credential is bound to another certificate than the current one",
		hint: "it passes by itself: ask again", retryAfter: time.Second, outcome: TokenUnavailable,
	}
	errBound = &refusal{
		status: http.StatusBadGateway, code: codes.Unauthenticated, reason: "BINDING_NEEDS_MTLS", message: "policy gives a credential that is bound to this workload, and the upstream isn't shown who calls",
		hint: "give the upstream's spiffe_id, or let policy allow binding none for its audience", outcome: TokenRefused,
	}
)

// tokenRefusal is the answer where no token can be had.
func tokenRefusal(err error) *refusal {
	var own *refusal
	if errors.As(err, &own) {
		return own
	}
	var e *sdk.Error
	if !errors.As(err, &e) && !errors.As(sdk.FromRPC(err), &e) || e.Reason == "" {
		return &refusal{
			status: http.StatusServiceUnavailable, code: codes.Unavailable, reason: "CREDENTIAL_UNAVAILABLE", message: "no credential can be had now",
			hint: "the agent's log says more", retryAfter: time.Second, outcome: TokenUnavailable,
		}
	}
	r := &refusal{
		status: http.StatusBadGateway, code: codes.Unauthenticated, reason: e.Reason, message: e.Message, hint: e.Hint, outcome: TokenRefused,
	}
	if e.Temporary() && e.Reason != errRevoked.reason { // what is revoked at once isn't away
		r.status, r.code, r.outcome, r.retryAfter = http.StatusServiceUnavailable, codes.Unavailable, TokenUnavailable, max(time.Second, e.RetryAfter())
	}
	return r
}

// certificateError is why an upstream isn't who it must be.
type certificateError struct{ err error }

func (e *certificateError) Error() string { return e.err.Error() }
func (e *certificateError) Unwrap() error { return e.err }

// upstreamRefusal is the answer where an upstream can't be asked. What an upstream said is
// in none of it: it knows the token.
func upstreamRefusal(err error) *refusal {
	var own *refusal
	if errors.As(err, &own) {
		return own
	}
	failed := &refusal{status: http.StatusBadGateway, code: codes.Unavailable, outcome: UpstreamFailed}
	var (
		spiffe *certificateError
		web    *tls.CertificateVerificationError
		record tls.RecordHeaderError
		op     *net.OpError
		timed  net.Error
	)
	switch {
	case errors.As(err, &spiffe), errors.As(err, &web):
		failed.reason, failed.message, failed.hint = "UPSTREAM_CERTIFICATE_INVALID", "the upstream isn't who it must be: "+err.Error(), "no token was sent; see url, spiffe_id and ca_file of the agent's configuration"
	case errors.As(err, &op) && op.Op == "remote error": // an alert of TLS
		failed.reason, failed.message, failed.hint = "UPSTREAM_TLS_FAILED", "the upstream ends the handshake: "+op.Err.Error(), "does it want a certificate that the agent doesn't show (spiffe_id), or refuse this workload's?"
	case errors.As(err, &record):
		failed.reason, failed.message, failed.hint = "UPSTREAM_TLS_FAILED", "the upstream speaks no TLS", "see url of the agent's configuration"
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, context.DeadlineExceeded), errors.As(err, &timed) && timed.Timeout():
		failed.status, failed.reason, failed.message = http.StatusGatewayTimeout, "UPSTREAM_TIMEOUT", "the upstream doesn't answer in time"
	case errors.As(err, &op) && op.Op == "dial":
		failed.reason, failed.message, failed.hint = "UPSTREAM_UNREACHABLE", "the upstream can't be reached: "+op.Error(), "see url of the agent's configuration"
	default:
		failed.reason, failed.message = "UPSTREAM_FAILED", "the upstream broke off, or answered what isn't HTTP"
	}
	return failed
}

// An answer is every refusal over HTTP, in the form of the agent's other sockets.
type answer struct {
	Error   string `json:"error"` // the gRPC code, lower case
	Reason  string `json:"reason"`
	Message string `json:"message"`
	Hint    string `json:"hint,omitempty"`
}

var codeNames = map[codes.Code]string{
	codes.InvalidArgument: "invalid_argument", codes.Unauthenticated: "unauthenticated", codes.PermissionDenied: "permission_denied",
	codes.Unavailable: "unavailable", codes.Unimplemented: "unimplemented",
}

func (r *refusal) write(w http.ResponseWriter, req *http.Request) {
	h := w.Header()
	h.Set("Cache-Control", "no-store")
	if hop.IsGRPC(req) {
		h.Set("Content-Type", "application/grpc")
		for name, value := range r.grpc() {
			h[name] = value
		}
		w.WriteHeader(http.StatusOK)
		return
	}
	h.Set("Content-Type", "application/json")
	h.Set("Proxy-Status", `dayfly-agent; details="`+r.reason+`"`) // RFC 9209; all that many clients show of an answer to CONNECT
	h.Set("X-Content-Type-Options", "nosniff")
	if r.retryAfter > 0 {
		h.Set("Retry-After", strconv.Itoa(int(math.Ceil(r.retryAfter.Seconds()))))
	}
	switch r.status {
	case http.StatusProxyAuthRequired:
		h.Set("Proxy-Authenticate", `Basic realm="dayfly-agent"`)
	case http.StatusUnauthorized:
		h.Set("WWW-Authenticate", `Basic realm="dayfly-agent"`)
	}
	body, err := json.Marshal(answer{codeNames[r.code], r.reason, r.message, r.hint})
	if err != nil {
		panic("internal error: marshalling an answer: " + err.Error())
	}
	w.WriteHeader(r.status)
	if req.Method != http.MethodHead {
		_, _ = w.Write(append(body, '\n')) // to one who has gone, perhaps
	}
}

// grpc is the refusal as a gRPC status, in headers or trailers.
func (r *refusal) grpc() http.Header {
	metadata := map[string]string{}
	if r.hint != "" {
		metadata["hint"] = r.hint
	}
	if r.retryAfter > 0 {
		metadata["retry_after"] = r.retryAfter.String()
	}
	h := http.Header{"Grpc-Status": {strconv.Itoa(int(r.code))}, "Grpc-Message": {hop.GRPCMessage(r.message)}}
	st, err := status.New(r.code, r.message).WithDetails(&errdetails.ErrorInfo{Domain: sdk.ErrorDomain, Reason: r.reason, Metadata: metadata})
	if err != nil {
		return h
	}
	if raw, err := proto.Marshal(st.Proto()); err == nil {
		h.Set("Grpc-Status-Details-Bin", base64.RawStdEncoding.EncodeToString(raw))
	}
	return h
}
