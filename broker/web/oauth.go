package web

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/broker/attest"
	"github.com/dayflyhq/dayfly/proto/token"
)

// callTimeout is what a call over HTTP gets, as one over gRPC.
const callTimeout = 15 * time.Second

// assertionType is that of draft-ietf-oauth-spiffe-client-auth.
const assertionType = "urn:ietf:params:oauth:client-assertion-type:jwt-spiffe"

// An endpoint answers a client that has proved who it is. Nil answers with an empty body.
type endpoint func(ctx context.Context, c broker.Caller, f form) (any, error)

// post makes an endpoint of OAuth: a form, from an authenticated client, answered with
// JSON that nobody keeps.
func (p *public) post(serve endpoint) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), callTimeout)
		defer cancel()
		answer, err := p.call(ctx, r, serve)
		w.Header().Set("Pragma", "no-cache")
		switch {
		case err != nil:
			p.writeOAuthError(ctx, w, r, err)
		case answer == nil:
			w.Header().Set("Cache-Control", "no-store")
			w.WriteHeader(http.StatusOK)
		default:
			writeJSON(w, http.StatusOK, answer)
		}
	}
}

// call ends one call, and not the connection, with a panic: its value might hold a request.
func (p *public) call(ctx context.Context, r *http.Request, serve endpoint) (answer any, err error) {
	defer func() {
		if v := recover(); v != nil {
			answer, err = nil, fmt.Errorf("panic: %T", v)
		}
	}()
	f, err := readForm(r)
	if err != nil {
		return nil, err
	}
	c, err := p.client(r, f)
	if err != nil {
		return nil, err
	}
	return serve(ctx, c, f)
}

// client authenticates whoever sent a request, and tells of whoever can't.
func (p *public) client(r *http.Request, f form) (broker.Caller, error) {
	peer, _ := netip.ParseAddrPort(r.RemoteAddr)
	c, method, err := p.authenticate(r, f)
	if err != nil {
		failure := attest.FailureOf(peer, method, err)
		var e *oauthError
		if errors.As(err, &e) {
			failure.Reason, failure.Message = e.refusal.Reason, e.refusal.Message
		}
		p.cfg.Unproven(failure)
		return broker.Caller{}, err
	}
	c.Peer = peer
	return c, nil
}

// authenticate does so in exactly one way: spiffe_x509, the certificate of the connection,
// or spiffe_jwt, an assertion. It says which was tried.
func (p *public) authenticate(r *http.Request, f form) (c broker.Caller, method string, err error) {
	if slices.ContainsFunc(r.Header.Values("Authorization"), func(s string) bool { return s != "" }) || f.get("client_secret") != "" {
		return c, attest.MethodNone, invalidClient("a client authenticates with an SVID: there are no client secrets and no tokens for it")
	}
	assertion, kind := f.get("client_assertion"), f.get("client_assertion_type")
	certified := r.TLS != nil && len(r.TLS.PeerCertificates) > 0
	v := visitorOf(r)
	switch {
	case (assertion == "") != (kind == ""):
		return c, attest.MethodJWT, invalidRequest("client_assertion and client_assertion_type go together")
	case assertion != "" && certified:
		return c, attest.MethodJWT, invalidRequest("a client authenticates once: with its certificate or with an assertion")
	case assertion != "" && kind != assertionType:
		return c, attest.MethodJWT, invalidClient("client_assertion_type must be " + assertionType)
	case assertion != "":
		method = attest.MethodJWT
		c, err = p.cfg.Attestor.JWT(assertion)
	case certified:
		method = attest.MethodX509
		c, err = p.cfg.Attestor.X509(v.chainOf(r))
	default:
		return c, attest.MethodNone, invalidClient("no client authentication: neither a certificate nor an assertion")
	}
	if err != nil {
		return broker.Caller{}, method, err
	}
	if id := f.get("client_id"); id != "" && id != c.ID.String() {
		return broker.Caller{}, method, invalidClient("client_id is not the SPIFFE ID of the SVID")
	}
	v.proved(c.ID)
	return c, method, nil
}

// An oauthError is an answer of RFC 6749 section 5.2. The standard's error says what a
// library should do; reason and hint are what the other door says too.
type oauthError struct {
	status  int
	refusal broker.Refusal
	code    string
}

func (e *oauthError) Error() string { return e.code + ": " + e.refusal.Message }

// Refusals that only this door knows. Messages may be more precise.
var (
	errBadForm = &broker.Refusal{
		Kind: broker.Invalid, Reason: "FORM_INVALID",
		Message: "the request's form is malformed",
		Hint:    "see the description, and docs/oauth.md for the parameters",
	}
	errNoClient = &broker.Refusal{
		Kind: broker.Unauthenticated, Reason: "CLIENT_UNAUTHENTICATED",
		Message: "the client has not proved who it is",
		Hint:    "connect with an X.509-SVID (spiffe_x509), or send a JWT-SVID for this issuer as client_assertion (spiffe_jwt)",
	}
	errNoTarget = &broker.Refusal{
		Kind: broker.Invalid, Reason: "TARGET_INVALID",
		Message: "a token is for exactly one target",
		Hint:    "send one audience, or one resource that is an absolute URI",
	}
	errTargetRefused = &broker.Refusal{
		Kind: broker.Denied, Reason: "TARGET_REFUSED",
		Message: "there is no token for this target and this client",
		Hint:    "check the spelling; the broker's audit says why, and so does: dayfly policy explain",
	}
	errGrantType = &broker.Refusal{
		Kind: broker.Invalid, Reason: "GRANT_TYPE_UNSUPPORTED",
		Message: "this grant_type is not supported",
		Hint:    "client_credentials, or urn:ietf:params:oauth:grant-type:token-exchange",
	}
)

// errInternal stands for what isn't shown.
var errInternal = &broker.Refusal{
	Kind: broker.Unavailable, Reason: "INTERNAL",
	Message: "internal error", Hint: "try again; if it lasts, the broker's log says why",
}

func oauth(status int, code string, r *broker.Refusal, message string) *oauthError {
	e := &oauthError{status, *r, code}
	if message != "" {
		e.refusal.Message = message
	}
	return e
}

func invalidRequest(message string) error {
	return oauth(http.StatusBadRequest, "invalid_request", errBadForm, message)
}

func invalidClient(message string) error {
	return oauth(http.StatusUnauthorized, "invalid_client", errNoClient, message)
}

func invalidTarget(message string) error {
	return oauth(http.StatusBadRequest, "invalid_target", errNoTarget, message)
}

// ofRefusal is what a refusal of the broker is called by OAuth. RFC 6749 has no error
// for a server that can't answer now: those of its section 4.1.2.1 are used.
func ofRefusal(r *broker.Refusal) *oauthError {
	switch {
	case r.Kind == broker.Unauthenticated:
		return oauth(http.StatusUnauthorized, "invalid_client", r, "")
	case r.Kind == broker.Exhausted:
		return oauth(http.StatusTooManyRequests, "temporarily_unavailable", r, "")
	case r.Kind == broker.Unavailable:
		return oauth(http.StatusServiceUnavailable, "temporarily_unavailable", r, "")
	case r.Is(broker.ErrPolicyDenied):
		return ofDenial(r)
	case r.Is(broker.ErrLocked):
		return oauth(http.StatusBadRequest, "unauthorized_client", r, "")
	case r.Is(broker.ErrScopeWiderParent), r.Is(broker.ErrInvalidRequest) && r.Metadata["field"] == "scopes":
		return oauth(http.StatusBadRequest, "invalid_scope", r, "")
	case r.Is(broker.ErrInvalidRequest) && r.Metadata["field"] == "audience":
		return oauth(http.StatusBadRequest, "invalid_target", r, "")
	}
	// Also a subject token that isn't good, as RFC 8693 section 2.2.2 wants it.
	return oauth(http.StatusBadRequest, "invalid_request", r, "")
}

// ofDenial says of a target that is denied what it says of one that doesn't exist: policy's
// words would tell them apart. Of what is asked for at a target that the client may have
// tokens for, policy's words go out.
func ofDenial(r *broker.Refusal) *oauthError {
	switch r.Metadata["policy_reason"] {
	case "scope_not_entitled", "no_scope_left":
		return oauth(http.StatusBadRequest, "invalid_scope", r, "")
	case "ttl_not_entitled", "binding_not_allowed":
		return oauth(http.StatusBadRequest, "invalid_request", r, "")
	}
	return oauth(http.StatusBadRequest, "invalid_target", errTargetRefused, "")
}

// oauthErrorOf finds the answer for whatever an endpoint returned.
func oauthErrorOf(err error) (e *oauthError, known bool) {
	var refusal *broker.Refusal
	switch {
	case errors.As(err, &e):
		return e, true
	case errors.As(err, &refusal):
		return ofRefusal(refusal), true
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return oauth(http.StatusServiceUnavailable, "temporarily_unavailable", broker.ErrBusy, "the call took too long"), true
	}
	return oauth(http.StatusInternalServerError, "server_error", errInternal, ""), false
}

func (p *public) writeOAuthError(ctx context.Context, w http.ResponseWriter, r *http.Request, err error) {
	e, known := oauthErrorOf(err)
	if !known {
		p.cfg.Log.ErrorContext(ctx, "internal error", "path", r.URL.Path, "err", err)
	}
	switch e.status {
	case http.StatusUnauthorized:
		w.Header().Set("WWW-Authenticate", p.challenge(r))
	case http.StatusTooManyRequests, http.StatusServiceUnavailable:
		w.Header().Set("Retry-After", retryAfter(e.refusal.Metadata["retry_after"]))
	}
	writeJSON(w, e.status, struct {
		Error       string            `json:"error"`
		Description string            `json:"error_description"`
		Reason      string            `json:"reason"`
		Hint        string            `json:"hint,omitempty"`
		Details     map[string]string `json:"details,omitempty"`
	}{e.code, described(e.refusal.Message), e.refusal.Reason, e.refusal.Hint, e.refusal.Metadata})
}

// challenge answers the scheme that a client tried, as RFC 6749 section 5.2 wants it. Our
// ways of authenticating have none in HTTP, so SPIFFE stands for them.
func (p *public) challenge(r *http.Request) string {
	for _, tried := range r.Header.Values("Authorization") {
		scheme, _, _ := strings.Cut(tried, " ")
		for _, known := range []string{"Basic", "Bearer"} {
			if strings.EqualFold(scheme, known) {
				return fmt.Sprintf("%s realm=%q", known, p.cfg.Issuer)
			}
		}
	}
	return fmt.Sprintf("SPIFFE realm=%q", p.cfg.Issuer)
}

// retryAfter is whole seconds, at least one.
func retryAfter(duration string) string {
	d, err := time.ParseDuration(duration)
	if err != nil || d < time.Second {
		d = time.Second
	}
	return strconv.Itoa(int(math.Ceil(d.Seconds())))
}

// described is a message in the characters that error_description may have.
func described(message string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == '"' || r == '\\':
			return '\''
		case r < ' ' || r > '~':
			return '?'
		}
		return r
	}, message)
}

// scopesOf splits a scope parameter (RFC 6749 section 3.3).
func scopesOf(f form) ([]string, error) {
	s := f.get("scope")
	if s == "" {
		return nil, nil
	}
	scopes := strings.Split(s, " ")
	for _, scope := range scopes {
		if err := token.ValidateScope(scope); err != nil {
			return nil, oauth(http.StatusBadRequest, "invalid_scope", errBadForm, "scope: "+err.Error())
		}
	}
	return scopes, nil
}
