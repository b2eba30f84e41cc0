package brokerd

import (
	"math"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/broker/boltstore"
	"github.com/prometheus/client_golang/prometheus"
)

// metrics are the broker's collectors. None has a label that a stranger can choose.
type metrics struct {
	registry  *prometheus.Registry
	decisions *prometheus.CounterVec
	alerts    prometheus.Counter
	commits   prometheus.Histogram
	carried   *prometheus.CounterVec
	reloads   *prometheus.CounterVec
}

func newMetrics(r *prometheus.Registry) *metrics {
	m := &metrics{
		registry: r,
		decisions: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "dayfly_decisions_total", Help: "Decisions by action, outcome and reason.",
		}, []string{"action", "outcome", "reason"}),
		alerts: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "dayfly_alerts_total", Help: "Signs of a stolen signing key: credentials presented that were never recorded.",
		}),
		commits: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "dayfly_store_commit_seconds", Help: "Duration of one group commit.",
			Buckets: prometheus.ExponentialBuckets(100e-6, 2, 16),
		}),
		carried: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "dayfly_store_operations_total", Help: "Operations that group commits carried, by kind.",
		}, []string{"kind"}),
		reloads: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "dayfly_policy_reloads_total", Help: "Reloads of the policy folder, by outcome.",
		}, []string{"outcome"}),
	}
	r.MustRegister(m.decisions, m.alerts, m.commits, m.carried, m.reloads)
	return m
}

func (m *metrics) decided(e broker.AuditEntry) {
	m.decisions.WithLabelValues(string(e.Action), e.Outcome, e.Reason).Inc()
	if e.Alert {
		m.alerts.Inc()
	}
}

func (m *metrics) committed(c boltstore.Commit) {
	m.commits.Observe(c.Took.Seconds())
	m.carried.WithLabelValues("append").Add(float64(c.Appends))
	m.carried.WithLabelValues("issue").Add(float64(c.Issues))
	m.carried.WithLabelValues("observe").Add(float64(c.Observations))
}

func (m *metrics) policyReloaded(err error) {
	outcome := "ok"
	if err != nil {
		outcome = "failed"
	}
	m.reloads.WithLabelValues(outcome).Inc()
}

// watch registers what is read at each scrape.
func (m *metrics) watch(b *broker.Broker, s *boltstore.Store) {
	gauge := func(name, help string, value func() float64) {
		m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, value))
	}
	gauge("dayfly_log_head", "Number of the newest record applied.", func() float64 { return float64(b.Head().Seq) })
	gauge("dayfly_silent", "1 while the broker is silent: its log lacks a record that a broker signed for.", func() float64 {
		if b.Silent() != nil {
			return 1
		}
		return 0
	})
	gauge("dayfly_locks", "Standing locks.", func() float64 { return float64(len(b.Locks())) })
	stat := func(of func(boltstore.Stats) float64) func() float64 {
		return func() float64 {
			st, err := s.Stats()
			if err != nil {
				return math.NaN()
			}
			return of(st)
		}
	}
	gauge("dayfly_store_bytes", "Size of the store's file.", stat(func(st boltstore.Stats) float64 { return float64(st.File) }))
	gauge("dayfly_store_waiting", "Calls that wait for a commit.", stat(func(st boltstore.Stats) float64 { return float64(st.Waiting) }))
}
