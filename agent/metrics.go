package agent

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dayflyhq/dayfly/sdk"
)

// Listeners that requests are counted for.
const (
	ListenerGRPC     = "grpc"
	ListenerHTTP     = "http"
	ListenerAWS      = "aws"
	ListenerSystemd  = "systemd"
	ListenerOutgoing = "outgoing"
	ListenerIncoming = "incoming"
	ListenerEnvoy    = "envoy"
)

// A Family is one metric with all its samples, in Prometheus' words. They hold no identity
// and no credential: label values are names of the configuration, and reasons.
type Family struct {
	Name, Kind, Help string // Kind: counter, gauge or histogram
	Samples          []Sample
}

// A Sample is one value. Suffix is for the parts of a histogram.
type Sample struct {
	Suffix string
	Labels []Label
	Value  float64
}

// A Label goes with a sample.
type Label struct{ Name, Value string }

// Metrics are families, each name once.
type Metrics []Family

// With returns the metrics with one more label on every sample, so that those of several
// agents can be told apart on one page.
func (m Metrics) With(name, value string) Metrics {
	out := slices.Clone(m)
	for i := range out {
		out[i].Samples = slices.Clone(out[i].Samples)
		for j := range out[i].Samples {
			s := &out[i].Samples[j]
			s.Labels = append([]Label{{name, value}}, s.Labels...)
		}
	}
	return out
}

// WriteMetrics writes one page in the text format of Prometheus. Families of one name are
// joined: their samples must differ by a label.
func WriteMetrics(w io.Writer, all ...Metrics) error {
	var families Metrics
	at := map[string]int{}
	for _, m := range all {
		for _, f := range m {
			i, ok := at[f.Name]
			if !ok {
				i = len(families)
				at[f.Name] = i
				families = append(families, Family{Name: f.Name, Kind: f.Kind, Help: f.Help})
			}
			families[i].Samples = append(families[i].Samples, f.Samples...)
		}
	}
	b := bufio.NewWriter(w)
	for _, f := range families {
		f.write(b)
	}
	return b.Flush()
}

var (
	escapeHelp  = strings.NewReplacer(`\`, `\\`, "\n", `\n`)
	escapeValue = strings.NewReplacer(`\`, `\\`, "\n", `\n`, `"`, `\"`)
)

func (f *Family) write(w *bufio.Writer) {
	if len(f.Samples) == 0 {
		return
	}
	fmt.Fprintf(w, "# HELP %s %s\n# TYPE %s %s\n", f.Name, escapeHelp.Replace(f.Help), f.Name, f.Kind)
	for _, s := range f.Samples {
		w.WriteString(f.Name + s.Suffix)
		for i, l := range s.Labels {
			w.WriteByte("{,"[min(i, 1)])
			fmt.Fprintf(w, `%s="%s"`, l.Name, escapeValue.Replace(strings.ToValidUTF8(l.Value, "\uFFFD")))
		}
		if len(s.Labels) > 0 {
			w.WriteByte('}')
		}
		w.WriteString(" " + number(s.Value) + "\n")
	}
}

func number(v float64) string {
	if math.IsInf(v, 1) {
		return "+Inf"
	}
	return strconv.FormatFloat(v, 'g', -1, 64)
}

// counters is what the agent counts.
type counters struct {
	hits, misses, fetches, dropped atomic.Uint64 // credentials
	events, reconnects, relayed    atomic.Uint64 // feed
	jumps                          atomic.Uint64 // of the clocks

	renewals tally // by how they ended: "ok" or the reason
	requests tally // by listener and outcome
	latency  histogram
}

// A tally counts by labels. It is bounded: what comes when it is full is counted as
// "other", so that whoever chooses the words can't fill the memory.
type tally struct {
	mu sync.Mutex
	of map[[2]string]uint64
}

const (
	maxTally = 256
	other    = "other"
	okay     = "ok"
)

func (t *tally) add(a, b string) {
	b = word(b)
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.of == nil {
		t.of = map[[2]string]uint64{}
	}
	key := [2]string{a, b}
	if _, ok := t.of[key]; !ok && len(t.of) >= maxTally {
		key[1] = other
	}
	t.of[key]++
}

// each calls f in order.
func (t *tally) each(f func(a, b string, n uint64)) {
	t.mu.Lock()
	all := maps.Clone(t.of)
	t.mu.Unlock()
	for _, key := range slices.SortedFunc(maps.Keys(all), func(x, y [2]string) int { return slices.Compare(x[:], y[:]) }) {
		f(key[0], key[1], all[key])
	}
}

// latencies are the upper ends of the histogram's buckets, in seconds.
var latencies = []float64{0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 60}

type histogram struct {
	mu  sync.Mutex
	n   []uint64 // one for each bucket, and one for beyond
	sum float64
}

func (h *histogram) observe(d time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.n == nil {
		h.n = make([]uint64, len(latencies)+1)
	}
	at, _ := slices.BinarySearch(latencies, d.Seconds())
	h.n[at]++
	h.sum += d.Seconds()
}

func (h *histogram) samples() []Sample {
	h.mu.Lock()
	defer h.mu.Unlock()
	var out []Sample
	var total uint64
	for i, le := range append(slices.Clone(latencies), math.Inf(1)) {
		if h.n != nil {
			total += h.n[i]
		}
		out = append(out, Sample{"_bucket", []Label{{"le", number(le)}}, float64(total)})
	}
	return append(out, Sample{"_sum", nil, h.sum}, Sample{"_count", nil, float64(total)})
}

// outcome is the label of how something ended: "ok", or the reason that callers hear.
func outcome(err error) string {
	if err == nil {
		return okay
	}
	reason, _ := reasonOf(err)
	return reason
}

// reasonOf is the machine-readable reason of a failure, a broker's or the agent's own, and
// its text.
func reasonOf(err error) (reason, message string) {
	var refusal *sdk.Error
	if !errors.As(sdk.FromRPC(upstreamError(sdk.FromRPC(err))), &refusal) {
		return other, ""
	}
	reason = refusal.Reason
	if reason == "" {
		name, _ := httpStatus(refusal.Code)
		reason = strings.ToUpper(name)
	}
	return word(reason), refusal.Message
}

// word is a text that somebody chose, or "other" if it isn't one short word.
func word(s string) string {
	strange := func(r rune) bool { return r != '_' && (r < '0' || r > '9') && (r|0x20 < 'a' || r|0x20 > 'z') }
	if s == "" || len(s) > 64 || strings.ContainsFunc(s, strange) {
		return other
	}
	return s
}

// CountRequest counts one request at a listener by how it ended: nil, or an error with a
// reason.
func (a *Agent) CountRequest(listener string, err error) {
	a.counts.requests.add(listener, outcome(err))
}

func counter(name, help string, n uint64) Family { return single(name, "counter", help, float64(n)) }

func gauge(name, help string, v float64) Family { return single(name, "gauge", help, v) }

func single(name, kind, help string, v float64) Family {
	return Family{name, kind, help, []Sample{{Value: v}}}
}

// Metrics returns what the agent has counted and how it is now.
func (a *Agent) Metrics() Metrics {
	c, files := &a.counts, &a.files.Counts
	status := a.Status()
	m := Metrics{
		gauge("dayfly_agent_ready", "1 if the state is ready or serving.", truth(status.Ready)),
		a.stateFamily(status.State),
		counter("dayfly_agent_cache_hits_total", "Requests for a credential that was known here.", c.hits.Load()),
		counter("dayfly_agent_cache_misses_total", "Requests for a credential that was not.", c.misses.Load()),
		counter("dayfly_agent_fetches_total", "Calls to the broker for a credential.", c.fetches.Load()),
	}
	m = append(m, a.fetchFamilies()...)
	m = append(m,
		Family{"dayfly_agent_fetch_seconds", "histogram", "How long calls to the broker for a credential took, those that failed included.", c.latency.samples()},
		counter("dayfly_agent_dropped_total", "Credentials dropped because they were revoked or their certificate rotated.", c.dropped.Load()),
		gauge("dayfly_agent_credentials", "Different credentials kept.", float64(a.cache.len())),
	)
	m = append(m, a.credentialFamilies()...)
	requests := Family{Name: "dayfly_agent_requests_total", Kind: "counter", Help: "Requests for a credential or with one, by listener and how they ended: ok, or the reason."}
	c.requests.each(func(listener, outcome string, n uint64) {
		requests.Samples = append(requests.Samples, Sample{Labels: []Label{{"listener", listener}, {"outcome", outcome}}, Value: float64(n)})
	})
	m = append(m, requests)
	if svid, err := a.cfg.Source.GetX509SVID(); err == nil && len(svid.Certificates) > 0 {
		m = append(m, gauge("dayfly_agent_svid_expires_seconds", "How long the SVID is valid yet.", svid.Certificates[0].NotAfter.Sub(a.cfg.Now()).Seconds()))
	}
	m = append(m,
		counter("dayfly_agent_clock_jumps_total", "Times that the machine had slept, or that its clock was set.", c.jumps.Load()),
		gauge("dayfly_agent_files", "Files and folders of files to deliver.", float64(len(a.live.Load().Files))),
		gauge("dayfly_agent_files_present", "Those that are on disk.", float64(a.present())),
		gauge("dayfly_agent_files_failing", "Those that can't be written or removed, or whose program can't be told.", float64(a.failing())),
		counter("dayfly_agent_file_writes_total", "Times that one was written.", files.Written.Load()),
		counter("dayfly_agent_file_write_failures_total", "Times that one could not be written.", files.WriteFailures.Load()),
		counter("dayfly_agent_file_removals_total", "Times that one was removed because its credential had died.", files.Removed.Load()),
		counter("dayfly_agent_file_changes_total", "Times that a program was told of a change.", files.Told.Load()),
		counter("dayfly_agent_file_change_failures_total", "Those that failed.", files.TellFailures.Load()),
		counter("dayfly_agent_feed_events_total", "Records received.", c.events.Load()),
		counter("dayfly_agent_feed_reconnects_total", "Streams to the broker that ended.", c.reconnects.Load()),
		counter("dayfly_agent_relay_messages_total", "Messages sent to verifiers.", c.relayed.Load()),
		gauge("dayfly_agent_relay_verifiers", "Verifiers that learn from here, those gone and not yet closed included.", float64(a.k.len())),
	)
	m = append(m, a.outgoingFamilies()...)
	if age, known := a.k.age(); known {
		m = append(m, gauge("dayfly_agent_feed_age_seconds", "How old the newest proof is.", age.Seconds()))
	}
	return m
}

// WriteMetrics writes the page of this agent alone.
func (a *Agent) WriteMetrics(w io.Writer) error { return WriteMetrics(w, a.Metrics()) }

func (a *Agent) stateFamily(now State) Family {
	f := Family{Name: "dayfly_agent_state", Kind: "gauge", Help: "1 for the state that the agent is in: ready, serving (what is held is valid, but something can't be renewed) or failed."}
	for _, s := range []State{Ready, Serving, Failed} {
		f.Samples = append(f.Samples, Sample{Labels: []Label{{"state", string(s)}}, Value: truth(s == now)})
	}
	return f
}

// fetchFamilies tell how calls for a credential ended.
func (a *Agent) fetchFamilies() Metrics {
	renewed := counter("dayfly_agent_renewals_total", "Credentials got from the broker.", 0)
	failed := Family{Name: "dayfly_agent_fetch_failures_total", Kind: "counter", Help: "Calls to the broker for a credential that failed, by reason.",
		Samples: []Sample{{Labels: []Label{{"reason", unreachable}}}}} // there from the start, for rates
	a.counts.renewals.each(func(_, outcome string, n uint64) {
		switch outcome {
		case okay:
			renewed.Samples[0].Value = float64(n)
		case unreachable:
			failed.Samples[0].Value = float64(n)
		default:
			failed.Samples = append(failed.Samples, Sample{Labels: []Label{{"reason", outcome}}, Value: float64(n)})
		}
	})
	return Metrics{renewed, failed}
}

// credentialFamilies tell of the configured credentials by audience, the oldest and the
// first to expire of each, and of all others together.
func (a *Agent) credentialFamilies() Metrics {
	type extreme struct{ age, left time.Duration }
	kept, others := map[string]extreme{}, []time.Duration{}
	for _, c := range a.cache.list() {
		if !c.Configured {
			if c.Held {
				others = append(others, c.left)
			}
			continue
		}
		e, ok := kept[c.Audience]
		if !ok {
			e.left = c.left
		}
		kept[c.Audience] = extreme{max(e.age, c.age), min(e.left, c.left)}
	}
	age := Family{Name: "dayfly_agent_credential_age_seconds", Kind: "gauge", Help: "Age of a configured credential, by audience: of the oldest."}
	left := Family{Name: "dayfly_agent_credential_expires_seconds", Kind: "gauge", Help: "How long a configured credential lives yet, by audience: the first to expire; 0 if it isn't there."}
	for _, audience := range slices.Sorted(maps.Keys(kept)) {
		labels := []Label{{"audience", audience}}
		age.Samples = append(age.Samples, Sample{Labels: labels, Value: kept[audience].age.Seconds()})
		left.Samples = append(left.Samples, Sample{Labels: labels, Value: kept[audience].left.Seconds()})
	}
	m := Metrics{age, left}
	if len(others) > 0 {
		m = append(m, gauge("dayfly_agent_other_credentials_expire_seconds", "How long credentials that were asked for live yet: the first to expire.", slices.Min(others).Seconds()))
	}
	return m
}

func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

func (k *knowledge) len() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.relay.Len()
}
