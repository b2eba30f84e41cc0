package verify

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"strconv"
	"strings"
	"time"
)

type contextKey struct{}

// NewContext returns a context that carries an accepted token.
func NewContext(ctx context.Context, t *Verified) context.Context {
	return context.WithValue(ctx, contextKey{}, t)
}

// FromContext returns the token that the middleware accepted for a request.
func FromContext(ctx context.Context) (*Verified, bool) {
	t, ok := ctx.Value(contextKey{}).(*Verified)
	return t, ok
}

// RequireScope returns a *Refusal unless the token of the context has all the scopes.
func RequireScope(ctx context.Context, scopes ...string) error {
	t, ok := FromContext(ctx)
	if !ok {
		return Because(TokenMissing)
	}
	return t.RequireScope(scopes...)
}

// HTTP returns a handler that lets only requests with an accepted token through to next,
// with all the scopes if any are named. The token comes as Authorization: Bearer
// (RFC 6750 section 2.1) and from nowhere else; the request's context carries it
// (FromContext) and ends when the token is revoked or expires, so a long response ends
// too.
//
// Refusals: 401 with WWW-Authenticate for a missing or bad token, 400 for several, 403
// for a missing scope, 503 with Retry-After while the verifier itself is closed. The body is JSON:
// {"reason","message","hint"}.
func (v *Verifier) HTTP(next http.Handler, scopes ...string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		t, err := v.request(r, scopes)
		if err != nil {
			v.refuse(w, err, scopes)
			return
		}
		ctx, done := v.Watch(NewContext(r.Context(), t), t)
		defer done()
		next.ServeHTTP(w, r.WithContext(ctx))
	})
}

// HTTPScope returns a handler for one route behind HTTP that demands more scopes.
func HTTPScope(next http.Handler, scopes ...string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err := RequireScope(r.Context(), scopes...); err != nil {
			(*Verifier)(nil).refuse(w, err, scopes)
			return
		}
		next.ServeHTTP(w, r)
	})
}

func (v *Verifier) request(r *http.Request, scopes []string) (*Verified, error) {
	raw, err := Bearer(r.Header.Values("Authorization"))
	if err != nil {
		return nil, err
	}
	t, err := v.Verify(r.Context(), raw, v.PeerOf(r.TLS, r.RemoteAddr))
	if err != nil {
		return nil, err
	}
	return t, t.RequireScope(scopes...)
}

// Bearer returns the token of a request's Authorization headers, or of gRPC metadata. Its
// error is a *Refusal.
func Bearer(headers []string) (string, error) {
	switch len(headers) {
	case 0:
		return "", Because(TokenMissing)
	case 1:
	default:
		return "", Because(RequestInvalid)
	}
	scheme, raw, _ := strings.Cut(headers[0], " ")
	if !strings.EqualFold(scheme, "Bearer") || raw == "" {
		return "", Because(TokenMissing)
	}
	return raw, nil
}

// refuse writes a refusal. v is nil where the verifier itself has let the token pass.
func (v *Verifier) refuse(w http.ResponseWriter, err error, scopes []string) {
	var r *Refusal
	if !errors.As(err, &r) {
		panic("internal error: a refusal that is none: " + err.Error())
	}
	code, header, body := v.HTTPAnswer(r, scopes...)
	maps.Copy(w.Header(), header)
	w.WriteHeader(code)
	_, _ = w.Write(body)
}

// HTTPAnswer returns the answer that HTTP gives to a refusal, for whoever writes it by
// other means: scopes are those that the route demands.
func (v *Verifier) HTTPAnswer(r *Refusal, scopes ...string) (code int, header http.Header, body []byte) {
	code = httpCode(r.Reason)
	header = http.Header{"Content-Type": {"application/json"}, "Cache-Control": {"no-store"}}
	if challenge := challenge(code, r.Reason, r.Message, scopes); challenge != "" {
		header.Set("WWW-Authenticate", challenge)
	}
	if v != nil && r.Reason == VerifierStale {
		header.Set("Retry-After", strconv.Itoa(retryAfter(v.cfg.MaxStaleness)))
	}
	body, err := json.Marshal(struct {
		Reason  Reason `json:"reason"`
		Message string `json:"message"`
		Hint    string `json:"hint,omitempty"`
	}{r.Reason, r.Message, r.Hint})
	if err != nil {
		panic("internal error: marshalling a refusal: " + err.Error())
	}
	return code, header, append(body, '\n')
}

func httpCode(reason Reason) int {
	switch reason {
	case RequestInvalid:
		return http.StatusBadRequest
	case ScopeMissing:
		return http.StatusForbidden
	case VerifierStale, VerifierForked:
		return http.StatusServiceUnavailable
	}
	return http.StatusUnauthorized
}

// challenge is that of RFC 6750 section 3. Without a token it says no more than that one
// is needed.
func challenge(code int, reason Reason, message string, scopes []string) string {
	description := strings.NewReplacer(`"`, `'`, `\`, `/`).Replace(message)
	scope := ""
	if len(scopes) > 0 {
		scope = fmt.Sprintf(`, scope="%s"`, strings.Join(scopes, " "))
	}
	switch {
	case code == http.StatusServiceUnavailable:
		return ""
	case reason == TokenMissing:
		return "Bearer" + strings.TrimPrefix(scope, ",")
	case code == http.StatusForbidden:
		return fmt.Sprintf(`Bearer error="insufficient_scope", error_description="%s"%s`, description, scope)
	case code == http.StatusBadRequest:
		return fmt.Sprintf(`Bearer error="invalid_request", error_description="%s"`, description)
	}
	return fmt.Sprintf(`Bearer error="invalid_token", error_description="%s"`, description)
}

// retryAfter is in whole seconds, a third of the bound: about when a reconnect is due.
func retryAfter(bound time.Duration) int {
	return int(max(1, bound/3/time.Second))
}
