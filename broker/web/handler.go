package web

import (
	"encoding/json"
	"net/http"

	"go.opentelemetry.io/contrib/instrumentation/net/http/otelhttp"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
)

// routes answers by exact path: no pattern, no redirect, no prefix.
type routes map[string]route

// route is what one path is for: reading, with GET and HEAD, or posting to.
type route struct{ get, post http.HandlerFunc }

func (rs routes) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	route, ok := rs[r.URL.Path]
	reading := r.Method == http.MethodGet || r.Method == http.MethodHead
	switch {
	case !ok:
		writeProblem(w, http.StatusNotFound, Problem{
			Reason: "NOT_FOUND", Message: "there is nothing at this path", Hint: "paths are exact; a slash at the end is another path"})
	case reading && route.get != nil:
		route.get(w, r)
	case r.Method == http.MethodPost && route.post != nil:
		route.post(w, r)
	case route.get != nil:
		w.Header().Set("Allow", "GET, HEAD")
		writeProblem(w, http.StatusMethodNotAllowed, Problem{
			Reason: "METHOD_NOT_ALLOWED", Message: "this path is only for reading", Hint: "use GET or HEAD"})
	default:
		w.Header().Set("Allow", "POST")
		writeProblem(w, http.StatusMethodNotAllowed, Problem{
			Reason: "METHOD_NOT_ALLOWED", Message: "this path is only for posting to", Hint: "use POST, with a form in the body"})
	}
}

// hardened sets on every answer what keeps browsers from making more of it than data.
func hardened(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
		h.Set("Referrer-Policy", "no-referrer")
		next.ServeHTTP(w, r)
	})
}

// A Problem is one thing that is wrong, and what to do about it. None of it is secret.
type Problem struct {
	// Reason is stable and machine-readable, in UPPER_SNAKE_CASE.
	Reason  string `json:"reason"`
	Message string `json:"message"`
	Hint    string `json:"hint,omitempty"`
	// Warning marks what an operator should look at though the broker does its work.
	Warning bool `json:"-"`
}

// writeProblem answers with the status and the problem as JSON, never to be cached.
func writeProblem(w http.ResponseWriter, status int, p Problem) {
	writeJSON(w, status, struct {
		Code int `json:"code"`
		Problem
	}{status, p})
}

func writeJSON(w http.ResponseWriter, status int, body any) {
	b, err := json.Marshal(body)
	if err != nil {
		panic("internal error: marshalling an HTTP answer: " + err.Error())
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_, _ = w.Write(append(b, '\n')) // the client may be gone
}

// traced wraps a handler in spans if there is a provider for them: those of its own paths
// only, because a span holds the path, and any other may be a token that somebody pasted.
// What a client says about its own trace becomes a link, never the parent: it is a
// stranger's.
func traced(h http.Handler, rs routes, name string, provider trace.TracerProvider) http.Handler {
	if provider == nil {
		return h
	}
	return otelhttp.NewHandler(h, name,
		otelhttp.WithTracerProvider(provider),
		otelhttp.WithFilter(func(r *http.Request) bool { _, ok := rs[r.URL.Path]; return ok }),
		otelhttp.WithPropagators(propagation.TraceContext{}),
		otelhttp.WithPublicEndpointFn(func(*http.Request) bool { return true }))
}
