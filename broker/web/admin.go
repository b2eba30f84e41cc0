package web

import (
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"go.opentelemetry.io/otel/trace"
)

const (
	// maxScrapes bounds the collections of metrics under way.
	maxScrapes    = 4
	scrapeTimeout = 10 * time.Second
)

// AdminConfig describes the admin handler. Ready and Metrics must be set.
type AdminConfig struct {
	// Ready returns what keeps the broker from its work, and warnings; empty when all
	// is well. It is called for every request, perhaps at once, and must not block.
	Ready func() []Problem
	// Metrics is what /metrics collects from.
	Metrics prometheus.Gatherer
	// TracerProvider makes a span of every request. Nil: none.
	TracerProvider trace.TracerProvider
	// Log receives what goes wrong inside. Nil: nothing does.
	Log *slog.Logger
}

// Admin returns the handler for the broker's own host. Give it to ServeAdmin.
//
//	GET /healthz    200 while the process answers
//	GET /readyz     200 with status "ready", or 503 with "not_ready"; problems and warnings as JSON
//	GET /metrics    Prometheus exposition
//
// It answers only to a Host of loopback, so that a web page in a browser on this host
// can't read it under a name of its own (DNS rebinding).
func Admin(cfg AdminConfig) (http.Handler, error) {
	var errs []error
	if cfg.Ready == nil {
		errs = append(errs, errors.New("no source of readiness"))
	}
	if cfg.Metrics == nil {
		errs = append(errs, errors.New("no source of metrics"))
	}
	if len(errs) > 0 {
		return nil, fmt.Errorf("configuring the admin HTTP handler: %w", errors.Join(errs...))
	}
	metrics := promhttp.HandlerFor(cfg.Metrics, promhttp.HandlerOpts{
		ErrorLog:            slog.NewLogLogger(orDiscard(cfg.Log).Handler(), slog.LevelError),
		MaxRequestsInFlight: maxScrapes,
		Timeout:             scrapeTimeout,
	})
	rs := routes{
		"/healthz": {get: func(w http.ResponseWriter, _ *http.Request) {
			writeJSON(w, http.StatusOK, map[string]string{"status": "ok"})
		}},
		"/readyz": {get: func(w http.ResponseWriter, _ *http.Request) { writeReadiness(w, cfg.Ready()) }},
		"/metrics": {get: func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Cache-Control", "no-store")
			metrics.ServeHTTP(w, r)
		}},
	}
	return traced(hardened(onlyLoopbackHost(rs)), rs, "admin", cfg.TracerProvider), nil
}

func writeReadiness(w http.ResponseWriter, problems []Problem) {
	answer := struct {
		Status   string    `json:"status"`
		Problems []Problem `json:"problems"`
		Warnings []Problem `json:"warnings"`
	}{"ready", []Problem{}, []Problem{}}
	status := http.StatusOK
	for _, p := range problems {
		if p.Warning {
			answer.Warnings = append(answer.Warnings, p)
			continue
		}
		answer.Problems = append(answer.Problems, p)
		answer.Status, status = "not_ready", http.StatusServiceUnavailable
	}
	writeJSON(w, status, answer)
}

func onlyLoopbackHost(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !loopbackHost(r.Host) {
			writeProblem(w, http.StatusMisdirectedRequest, Problem{
				Reason: "HOST_NOT_LOOPBACK", Message: "this server answers to loopback only", Hint: "ask for http://localhost or http://127.0.0.1"})
			return
		}
		next.ServeHTTP(w, r)
	})
}
