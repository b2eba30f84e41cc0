package brokerd

import (
	"math"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/broker/boltstore"
	"github.com/dayflyhq/dayfly/broker/rpc"
	"github.com/dayflyhq/dayfly/policy"
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
	unproven  *prometheus.CounterVec
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
			Name: "dayfly_policy_reloads_total", Help: "Reloads of policy that changed something or failed, by outcome.",
		}, []string{"outcome"}),
		unproven: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "dayfly_client_authentication_failures_total", Help: "Calls of clients that have not proved who they are, by door, method and reason.",
		}, []string{"door", "method", "reason"}),
	}
	r.MustRegister(m.decisions, m.alerts, m.commits, m.carried, m.reloads, m.unproven)
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
	m.watchUses(b)
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

// watchConnections counts what the public gRPC listener lets in and closes.
func (m *metrics) watchConnections(s *rpc.Server) {
	open := func(state string, value func(rpc.ConnectionCounts) int) {
		m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "dayfly_connections", Help: "Connections of the gRPC listener: in line for their handshake, in it, or open.", ConstLabels: prometheus.Labels{"state": state},
		}, func() float64 { return float64(value(s.Connections())) }))
	}
	open("waiting", func(c rpc.ConnectionCounts) int { return c.Waiting })
	open("handshake", func(c rpc.ConnectionCounts) int { return c.Handshaking })
	open("open", func(c rpc.ConnectionCounts) int { return c.Open })
	closed := func(why string, value func(rpc.ConnectionCounts) uint64) {
		m.registry.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{
			Name: "dayfly_connections_closed_total", Help: "Connections of the gRPC listener that were closed: before the end of their handshake, for others, or for an identity's or everybody's bound.", ConstLabels: prometheus.Labels{"why": why},
		}, func() float64 { return float64(value(s.Connections())) }))
	}
	closed("crowded", func(c rpc.ConnectionCounts) uint64 { return c.Crowded })
	closed("bound", func(c rpc.ConnectionCounts) uint64 { return c.Refused })
}

// policyInfo tells which policy is in force: one series, with its revision as a label,
// which only who writes policy chooses.
type policyInfo struct {
	desc   *prometheus.Desc
	status func() policy.Status
}

func (p policyInfo) Describe(ch chan<- *prometheus.Desc) { ch <- p.desc }

func (p policyInfo) Collect(ch chan<- prometheus.Metric) {
	if st := p.status(); st.Generation > 0 {
		ch <- prometheus.MustNewConstMetric(p.desc, prometheus.GaugeValue, float64(st.LoadedAt.Unix()), st.Revision)
	}
}

func (m *metrics) watchPolicy(status func() policy.Status) {
	m.registry.MustRegister(policyInfo{
		prometheus.NewDesc("dayfly_policy_info", "Revision of the policy in force; the value is when it came into force, in Unix time.", []string{"revision"}, nil), status,
	}, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "dayfly_policy_stale", Help: "1 while the source of policy holds nothing that can be taken: the last good policy is in force, or none.",
	}, func() float64 {
		if status().Err != nil {
			return 1
		}
		return 0
	}))
}

// watchUses counts what verifiers reported.
func (m *metrics) watchUses(b *broker.Broker) {
	counter := func(name, help string, labels prometheus.Labels, value func(broker.UseCounts) uint64) {
		m.registry.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{Name: name, Help: help, ConstLabels: labels}, func() float64 {
			return float64(value(b.UseCounts()))
		}))
	}
	counter("dayfly_uses_total", "Uses that verifiers reported.", nil, func(c broker.UseCounts) uint64 { return c.Uses })
	const dropped = "Uses without a record: dropped by a verifier for want of room, by the broker for an identity's allowance or a full disk, or not kept after they were looked at."
	counter("dayfly_uses_dropped_total", dropped, prometheus.Labels{"by": "verifier"}, func(c broker.UseCounts) uint64 { return c.Dropped })
	counter("dayfly_uses_dropped_total", dropped, prometheus.Labels{"by": "limit"}, func(c broker.UseCounts) uint64 { return c.Limited })
	counter("dayfly_uses_dropped_total", dropped, prometheus.Labels{"by": "retention"}, func(c broker.UseCounts) uint64 { return c.Unkept })
	const after = "Uses of revoked credentials, after the revocation: refused or accepted by a verifier that knew it, or accepted by one that hadn't heard of it."
	counter("dayfly_revoked_uses_total", after, prometheus.Labels{"outcome": "refused"}, func(c broker.UseCounts) uint64 { return c.Refused })
	counter("dayfly_revoked_uses_total", after, prometheus.Labels{"outcome": "accepted_knowing"}, func(c broker.UseCounts) uint64 { return c.AcceptedKnowing })
	counter("dayfly_revoked_uses_total", after, prometheus.Labels{"outcome": "accepted_unaware"}, func(c broker.UseCounts) uint64 { return c.AcceptedUnaware })
	counter("dayfly_unrecorded_uses_total", "Uses of what was never recorded: somebody holds a signing key, or a verifier lies.", nil, func(c broker.UseCounts) uint64 { return c.Unrecorded })
}
