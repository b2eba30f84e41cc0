package brokerd

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/broker/attest"
	"github.com/prometheus/client_golang/prometheus"
)

// Whoever knocks all day is counted each time, and fills no log.
func TestUnprovenIsBounded(t *testing.T) {
	var log bytes.Buffer
	now, registry := time.Now(), prometheus.NewRegistry()
	u := &unproven{
		log: slog.New(slog.NewJSONHandler(&log, nil)), count: newMetrics(registry).unproven,
		now: func() time.Time { return now }, since: now,
	}
	told := u.at("http")
	knock := func(n int) (lines int) {
		log.Reset()
		for range n {
			told(attest.Failure{Method: attest.MethodJWT, Reason: "JWT_SVID_INVALID"})
		}
		return strings.Count(log.String(), "\n")
	}
	if n := knock(100); n != failuresAtOnce {
		t.Errorf("%d lines at once", n)
	}
	now = now.Add(2 * failuresEvery)
	if n := knock(100); n != 2 || !strings.Contains(log.String(), `"not_logged_before":92`) {
		t.Errorf("%d lines later: %s", n, log.String())
	}
	now = now.Add(time.Hour)
	if n := knock(100); n != failuresAtOnce {
		t.Errorf("%d lines after an hour", n)
	}
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == "dayfly_client_authentication_failures_total" {
			if m := f.GetMetric(); len(m) != 1 || m[0].GetCounter().GetValue() != 300 {
				t.Errorf("counted %v", m)
			}
			return
		}
	}
	t.Error("nothing is counted")
}
