package agent

import (
	"context"
	"encoding/json"
	"errors"
	"math"
	"mime"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"time"

	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/proto/wire"
	"github.com/dayflyhq/dayfly/sdk"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/durationpb"
)

// accessTokenType names what is given out (RFC 8693 section 3).
const accessTokenType = "urn:ietf:params:oauth:token-type:access_token"

// connKey is of the connection of a request, in its context.
type connKey struct{}

func (a *Agent) serveHTTP() {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/token", a.counted(a.getToken))
	mux.HandleFunc("POST /v1/exchange", a.counted(a.postExchange))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		writeJSON(w, http.StatusOK, map[string]string{"status": "ok"})
	})
	mux.HandleFunc("GET /readyz", a.getReady)
	mux.HandleFunc("GET /v1/status", a.getStatus)
	mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) {
		writeError(w, refuse(codes.NotFound, "NO_SUCH_ENDPOINT", "there is nothing here for this method", "GET /v1/token?audience=..., POST /v1/exchange, GET /v1/status, GET /healthz, GET /readyz"))
	})
	a.http = &http.Server{
		Handler:           a.guard(mux),
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      30 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    16 << 10,
		ConnContext: func(ctx context.Context, conn net.Conn) context.Context {
			return context.WithValue(ctx, connKey{}, conn)
		},
	}
}

// guard refuses peers by the kernel's word, and what a browser or a proxy brings: the
// socket is for programs beside the agent, and whoever is led to it by a web page isn't
// one of them.
func (a *Agent) guard(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Cache-Control", "no-store")
		w.Header().Set("X-Content-Type-Options", "nosniff")
		err := a.door.admit(r.Context().Value(connKey{}).(net.Conn))
		if err == nil && foreign(r) {
			err = refuse(codes.PermissionDenied, "BROWSER_OR_PROXY", "this request comes through a browser or a proxy", "call the unix socket itself: curl --unix-socket PATH http://localhost/v1/token?audience=...")
		}
		if err != nil {
			a.CountRequest(ListenerHTTP, err)
			writeError(w, err)
			return
		}
		r.Body = http.MaxBytesReader(w, r.Body, MaxRequestBytes)
		next.ServeHTTP(w, r)
	})
}

func foreign(r *http.Request) bool {
	for _, h := range []string{"Origin", "Referer", "Sec-Fetch-Site", "Sec-Fetch-Mode", "Forwarded", "X-Forwarded-For", "Via"} {
		if r.Header.Get(h) != "" {
			return true
		}
	}
	return !localHost(r.Host)
}

// localHost reports whether a Host header is what a program writes that means no host: a
// rebound name of the DNS has a dot.
func localHost(host string) bool {
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	if addr, err := netip.ParseAddr(strings.Trim(host, "[]")); err == nil {
		return addr.IsLoopback()
	}
	return !strings.Contains(host, ".")
}

// tokenAnswer is the answer of both endpoints.
type tokenAnswer struct {
	AccessToken     string    `json:"access_token"`
	TokenType       string    `json:"token_type"`
	IssuedTokenType string    `json:"issued_token_type"`
	ExpiresIn       int64     `json:"expires_in"` // whole seconds that are left, rounded down
	Scope           string    `json:"scope"`
	Grant           string    `json:"grant"`
	Audience        string    `json:"audience"`
	Binding         string    `json:"binding"`
	ExpiresAt       time.Time `json:"expires_at"` // by this machine's clock
}

func (a *Agent) answer(c *sdk.Credential) tokenAnswer {
	return tokenAnswer{
		AccessToken: c.Token.Reveal(), TokenType: "Bearer", IssuedTokenType: accessTokenType,
		ExpiresIn: int64(a.left(c) / time.Second), Scope: strings.Join(c.Scopes, " "),
		Grant: c.Grant, Audience: c.Audience, Binding: string(c.Binding), ExpiresAt: c.Expires.UTC().Truncate(time.Second),
	}
}

// counted makes a handler of what answers or returns a refusal, and counts which.
func (a *Agent) counted(answer func(http.ResponseWriter, *http.Request) error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		err := answer(w, r)
		a.CountRequest(ListenerHTTP, err)
		if err != nil {
			writeError(w, err)
		}
	}
}

// getToken answers GET /v1/token?audience=A[&scope="r w"][&ttl=60s][&binding=spiffe].
func (a *Agent) getToken(w http.ResponseWriter, r *http.Request) error {
	req, err := queryRequest(r)
	if err != nil {
		return err
	}
	cred, err := a.cache.token(r.Context(), req)
	if err != nil {
		return err
	}
	writeJSON(w, http.StatusOK, a.answer(cred))
	return nil
}

func queryRequest(r *http.Request) (Request, error) {
	q := r.URL.Query()
	for name, values := range q {
		switch name {
		case "audience", "ttl", "binding":
			if len(values) != 1 {
				return Request{}, invalid(name + ": is given twice")
			}
		case "scope":
		default:
			return Request{}, invalid("an unknown parameter; known are audience, scope, ttl and binding")
		}
	}
	req := Request{Audience: q.Get("audience"), Binding: token.Binding(q.Get("binding"))}
	for _, s := range q["scope"] {
		req.Scopes = append(req.Scopes, strings.Fields(s)...)
	}
	if s := q.Get("ttl"); s != "" {
		ttl, err := time.ParseDuration(s)
		if err != nil || ttl <= 0 {
			return Request{}, invalid("ttl: a positive duration such as 60s or 5m")
		}
		req.TTL = ttl
	}
	return req, nil
}

// exchangeBody is what POST /v1/exchange takes.
type exchangeBody struct {
	SubjectToken string `json:"subject_token"`
	Audience     string `json:"audience"`
	Scope        string `json:"scope"`
	TTL          string `json:"ttl"`
	Binding      string `json:"binding"`
}

func (a *Agent) postExchange(w http.ResponseWriter, r *http.Request) error {
	m, err := exchangeRequest(r)
	if err != nil {
		return err
	}
	cred, err := a.exchange(r.Context(), m)
	if err != nil {
		return err
	}
	writeJSON(w, http.StatusOK, a.answer(cred))
	return nil
}

func exchangeRequest(r *http.Request) (*dayflyv1.ExchangeRequest, error) {
	if kind, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || kind != "application/json" {
		return nil, invalid("Content-Type: must be application/json")
	}
	var body exchangeBody
	dec := json.NewDecoder(r.Body)
	dec.DisallowUnknownFields()
	if err := dec.Decode(&body); err != nil {
		var large *http.MaxBytesError
		if errors.As(err, &large) {
			return nil, tooLarge()
		}
		return nil, invalid("the body is not the JSON object that is wanted: subject_token, audience, scope, ttl, binding")
	}
	m := &dayflyv1.ExchangeRequest{
		SubjectToken: body.SubjectToken, Audience: body.Audience, Scopes: strings.Fields(body.Scope),
	}
	if b := token.Binding(body.Binding); b != "" {
		if !b.Valid() {
			return nil, invalid("binding: spiffe, x5t or none")
		}
		m.Binding = wire.Binding(b)
	}
	if body.TTL != "" {
		ttl, err := time.ParseDuration(body.TTL)
		if err != nil || ttl <= 0 {
			return nil, invalid("ttl: a positive duration such as 60s or 5m")
		}
		m.Ttl = durationpb.New(ttl)
	}
	return m, nil
}

func (a *Agent) getReady(w http.ResponseWriter, _ *http.Request) {
	s := a.Status()
	code := http.StatusOK
	if !s.Ready {
		code = http.StatusServiceUnavailable
	}
	writeJSON(w, code, s)
}

// errorAnswer is every refusal over HTTP.
type errorAnswer struct {
	Error   string `json:"error"`  // the gRPC code, lower case
	Reason  string `json:"reason"` // stable, machine-readable
	Message string `json:"message"`
	Hint    string `json:"hint,omitempty"`
}

// names of the codes that the agent answers with, and their HTTP statuses.
func httpStatus(code codes.Code) (string, int) {
	switch code {
	case codes.InvalidArgument:
		return "invalid_argument", http.StatusBadRequest
	case codes.Unauthenticated:
		return "unauthenticated", http.StatusUnauthorized
	case codes.PermissionDenied:
		return "permission_denied", http.StatusForbidden
	case codes.NotFound:
		return "not_found", http.StatusNotFound
	case codes.ResourceExhausted:
		return "resource_exhausted", http.StatusTooManyRequests
	case codes.FailedPrecondition:
		return "failed_precondition", http.StatusConflict
	case codes.Unavailable, codes.DeadlineExceeded, codes.Canceled:
		return "unavailable", http.StatusServiceUnavailable
	}
	return "internal", http.StatusInternalServerError
}

func writeError(w http.ResponseWriter, err error) {
	var refusal *sdk.Error
	if !errors.As(sdk.FromRPC(err), &refusal) {
		refusal = &sdk.Error{Code: codes.Internal, Message: "internal error; the agent's log says more"}
	}
	name, status := httpStatus(refusal.Code)
	if refusal.Reason == "REQUEST_TOO_LARGE" {
		status = http.StatusRequestEntityTooLarge
	}
	if refusal.Reason == "" {
		refusal.Reason = strings.ToUpper(name)
	}
	if wait := refusal.RetryAfter(); wait > 0 {
		w.Header().Set("Retry-After", strconv.Itoa(int(math.Ceil(wait.Seconds()))))
	}
	writeJSON(w, status, errorAnswer{Error: name, Reason: refusal.Reason, Message: refusal.Message, Hint: refusal.Hint})
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	b, err := json.Marshal(v)
	if err != nil {
		panic("internal error: marshalling an answer: " + err.Error())
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(append(b, '\n')) // to one who has gone, perhaps
}
