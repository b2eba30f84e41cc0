package agent_test

import (
	"bytes"
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/dayflyhq/dayfly/agent"
	"github.com/dayflyhq/dayfly/proto/feed"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/test/bufconn"
	"pgregory.net/rapid"
)

// parse reads a page as Prometheus does.
func parse(t testing.TB, page string) map[string]*dto.MetricFamily {
	t.Helper()
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(strings.NewReader(page))
	if err != nil {
		t.Fatalf("%v\n%s", err, page)
	}
	return families
}

// value returns the sample that has the labels, given as name=value; NaN if there is none.
func value(f *dto.MetricFamily, labels ...string) float64 {
	for _, m := range f.GetMetric() {
		var has []string
		for _, l := range m.GetLabel() {
			has = append(has, l.GetName()+"="+l.GetValue())
		}
		if slices.ContainsFunc(labels, func(want string) bool { return !slices.Contains(has, want) }) {
			continue
		}
		return m.GetGauge().GetValue() + m.GetCounter().GetValue()
	}
	return math.NaN()
}

func page(t testing.TB, all ...agent.Metrics) string {
	t.Helper()
	var out bytes.Buffer
	if err := agent.WriteMetrics(&out, all...); err != nil {
		t.Fatal(err)
	}
	return out.String()
}

func TestMetrics(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, began := &direct{b: unservedBroker(t, newDomain(t))}, time.Now()
		a := runAgent(t, agent.Config{
			Upstream: d, Source: d.b.td.Source(payments), NoFeed: true, Jitter: func() float64 { return 0 },
			Prefetch: []agent.Request{{Audience: "orders"}, {Audience: "orders", Scopes: []string{"r"}}, {Audience: "web"}},
			Boot:     func() feed.Instant { return feed.Instant(time.Since(began)) },
		})
		d.b.set(func(b *broker) { b.refuse = refusal(codes.PermissionDenied, "POLICY_DENIED", "no") })
		for range 3 {
			if _, err := a.Token(t.Context(), agent.Request{Audience: "ledger"}); reason(err) != "POLICY_DENIED" {
				t.Fatal(err)
			}
			time.Sleep(10 * time.Second)
		}
		a.CountRequest(agent.ListenerEnvoy, nil)
		a.CountRequest(agent.ListenerEnvoy, refusal(codes.PermissionDenied, "SCOPE_MISSING", "no"))
		a.CountRequest(agent.ListenerEnvoy, refusal(codes.PermissionDenied, "not a\nword", "no"))
		text := page(t, a.Metrics())
		f := parse(t, text)
		for _, c := range []struct {
			name   string
			labels []string
			want   float64
		}{
			{"dayfly_agent_ready", nil, 1},
			{"dayfly_agent_state", []string{"state=ready"}, 1},
			{"dayfly_agent_state", []string{"state=failed"}, 0},
			{"dayfly_agent_credential_age_seconds", []string{"audience=orders"}, 30},
			{"dayfly_agent_credential_expires_seconds", []string{"audience=web"}, 270},
			{"dayfly_agent_renewals_total", nil, 3},
			{"dayfly_agent_fetches_total", nil, 6},
			{"dayfly_agent_fetch_failures_total", []string{"reason=POLICY_DENIED"}, 3},
			{"dayfly_agent_fetch_failures_total", []string{"reason=BROKER_UNREACHABLE"}, 0},
			{"dayfly_agent_requests_total", []string{"listener=envoy", "outcome=ok"}, 1},
			{"dayfly_agent_requests_total", []string{"listener=envoy", "outcome=SCOPE_MISSING"}, 1},
			{"dayfly_agent_requests_total", []string{"listener=envoy", "outcome=other"}, 1},
		} {
			if got := value(f[c.name], c.labels...); math.Abs(got-c.want) > 1 || got != c.want && c.want < 10 {
				t.Errorf("%s%v is %v, want %v", c.name, c.labels, got, c.want)
			}
		}
		if h := f["dayfly_agent_fetch_seconds"].GetMetric()[0].GetHistogram(); h.GetSampleCount() != 6 || len(h.GetBucket()) != 13 || h.GetBucket()[12].GetCumulativeCount() != 6 {
			t.Errorf("the histogram: %v", h)
		}
		if left := value(f["dayfly_agent_svid_expires_seconds"]); !(left > 0) {
			t.Errorf("the SVID expires in %v", left)
		}
		// What was asked for once is no label: whoever asks could make as many as they like.
		if strings.Contains(text, "ledger") {
			t.Errorf("an audience that isn't configured is in the metrics:\n%s", text)
		}
		time.Sleep(5 * time.Minute)
		f = parse(t, page(t, a.Metrics()))
		if left := value(f["dayfly_agent_credential_expires_seconds"], "audience=web"); left != 0 {
			t.Errorf("a credential that isn't there expires in %v s, want 0", left)
		}
		if state := value(f["dayfly_agent_state"], "state=failed"); state != 1 {
			t.Error("the state isn't failed")
		}
	})
}

// Several agents are on one page: each family once, the workload as a label.
func TestMetricsOfSeveral(t *testing.T) {
	m := agent.Metrics{{Name: "a_total", Kind: "counter", Help: `one \ and a
line`, Samples: []agent.Sample{{Value: 1}}}}
	text := page(t, m.With("workload", "one"), append(m.With("workload", "two"), agent.Family{Name: "none", Kind: "gauge"}))
	if strings.Count(text, "# TYPE a_total") != 1 || strings.Contains(text, "none") {
		t.Errorf("got %s", text)
	}
	f := parse(t, text)
	if value(f["a_total"], "workload=one") != 1 || value(f["a_total"], "workload=two") != 1 || f["a_total"].GetHelp() != m[0].Help {
		t.Errorf("got %s", text)
	}
	if len(m[0].Samples[0].Labels) != 0 {
		t.Error("With changed what it was called on")
	}
}

// Whatever is in a label comes back as it was.
func TestMetricsEscape(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		want := strings.ToValidUTF8(rapid.String().Draw(r, "value"), "\uFFFD")
		text := page(t, agent.Metrics{{Name: "a", Kind: "gauge", Samples: []agent.Sample{{Labels: []agent.Label{{Name: "l", Value: want}}, Value: 2}}}})
		if got := parse(t, text)["a"].GetMetric()[0].GetLabel()[0].GetValue(); got != want {
			r.Fatalf("got %q, want %q", got, want)
		}
	})
}

// However many outcomes somebody makes up, the page stays small.
func TestMetricsAreBounded(t *testing.T) {
	d := &direct{b: unservedBroker(t, newDomain(t))}
	a, err := agent.New(agent.Config{Upstream: d, Source: d.b.td.Source(payments), GRPC: bufconn.Listen(1)})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 10000 {
		a.CountRequest(agent.ListenerIncoming, refusal(codes.Aborted, fmt.Sprintf("R%d", i), ""))
	}
	f := parse(t, page(t, a.Metrics()))["dayfly_agent_requests_total"]
	if n := len(f.GetMetric()); n > 300 {
		t.Errorf("%d samples", n)
	}
	if n := value(f, "outcome=other"); n < 9000 {
		t.Errorf("%v others", n)
	}
}

// A failure is told the first time, and from then on once a minute with how often.
func TestQuietLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &logbook{}
		log := l.logger().With("audience", "orders")
		for i := range 121 {
			log.Warn("renewing", "err", fmt.Errorf("dial 127.0.0.1:%d: refused", 40000+i), "retry_in", time.Duration(i))
			log.Info("not a failure")
			time.Sleep(time.Second)
		}
		log.Warn("renewing", "err", fmt.Errorf("denied"))
		l.logger().Warn("another")
		log.With("audience", "web").Warn("renewing", "err", fmt.Errorf("denied"))
		var repeated []any
		for _, one := range l.lines(t, "renewing") {
			repeated = append(repeated, one["repeated"])
		}
		if fmt.Sprint(repeated) != "[<nil> 59 59 <nil> <nil>]" {
			t.Errorf("repeated: %v", repeated)
		}
		if n := len(l.lines(t, "not a failure")); n != 121 {
			t.Errorf("%d of 121 lines that tell no failure", n)
		}
	})
}
