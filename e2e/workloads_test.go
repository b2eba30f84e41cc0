package e2e_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/e2e/sandbox"
	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk"
)

// host is one agent of several workloads, and what asks it.
type host struct {
	*testing.T
	box     *sandbox.Sandbox
	file    string
	metrics string
}

// startHost writes a configuration in which %s is the sandbox's folder, and runs an agent of
// what the Workload API of payments returns.
func startHost(t *testing.T, box *sandbox.Sandbox, workloads string) *host {
	t.Helper()
	l := must(net.Listen("tcp", "127.0.0.1:0"))(t)
	h := &host{t, box, filepath.Join(box.Dir, "host.yaml"), l.Addr().String()}
	_ = l.Close()
	h.configure(workloads)
	if err := box.SpawnConfigured(sandbox.Payments, h.file); err != nil {
		t.Fatal(err)
	}
	return h
}

func (h *host) configure(workloads string) {
	h.Helper()
	text := fmt.Sprintf("broker: {address: %q, id: %q}\nworkload_api: %q\nmetrics: %q\n%s",
		h.box.Info.GRPC, sandbox.Broker, must(h.box.TD.Workload(sandbox.Payments))(h.T), h.metrics, strings.ReplaceAll(workloads, "DIR", h.box.Dir))
	if err := os.WriteFile(h.file, []byte(text), 0o600); err != nil {
		h.Fatal(err)
	}
}

// web is a client of a workload's HTTP socket.
func (h *host) web(name string) *http.Client {
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", filepath.Join(h.box.Dir, name+".sock"))
	}}
	h.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: time.Minute}
}

// answer is what any endpoint says.
type hostAnswer struct {
	AccessToken     string `json:"access_token"`
	Grant           string
	Reason, Message string
	State           string
	Checks          []struct{ Name, Message string }
	Configuration   struct {
		ReloadFailedSince *time.Time `json:"reload_failed_since"`
	}
}

func (h *host) ask(c *http.Client, path string) (int, *hostAnswer, error) {
	resp, err := c.Get("http://localhost" + path)
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	out := new(hostAnswer)
	return resp.StatusCode, out, json.NewDecoder(resp.Body).Decode(out)
}

// until asks until the answer is right.
func (h *host) until(c *http.Client, path, what string, right func(int, *hostAnswer) bool) *hostAnswer {
	h.Helper()
	deadline := time.Now().Add(time.Minute)
	for {
		status, a, err := h.ask(c, path)
		if err == nil && right(status, a) {
			return a
		}
		if time.Now().After(deadline) {
			h.Fatalf("waiting for %s: %d %+v %v\n%s", what, status, a, err, h.box.Log("agent-payments"))
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func ok(status int, _ *hostAnswer) bool { return status == http.StatusOK }

func (h *host) page() string {
	h.Helper()
	resp := must(http.Get("http://" + h.metrics + "/metrics"))(h.T)
	defer resp.Body.Close()
	return string(must(io.ReadAll(resp.Body))(h.T))
}

// presenter is whose credential it is.
func presenter(t *testing.T, text string) string {
	t.Helper()
	return must(token.Inspect(text))(t).Presenter().String()
}

// TestWorkloads is one agent of three identities: each gets its own credentials and no
// other's; one that the Workload API doesn't return closes alone, and comes back alone.
func TestWorkloads(t *testing.T) {
	box := newBox(t)
	td := box.TD
	if err := td.SetOthers(sandbox.Payments, sandbox.Reports); err != nil {
		t.Fatal(err)
	}
	h := startHost(t, box, fmt.Sprintf(`workloads:
  - {name: payments, id: %s, sockets: {http: DIR/p.sock}, prefetch: [{audience: orders}]}
  - name: reports
    id: %s
    sockets: {http: DIR/r.sock, grpc: DIR/rg.sock}
    files: [{path: DIR/reports.jwt, credential: {audience: orders}}]
  - {id: %s, sockets: {http: DIR/l.sock}}
`, sandbox.Payments, sandbox.Reports, sandbox.Ledger))
	p, r, l := h.web("p"), h.web("r"), h.web("l")

	ofPayments := h.until(p, "/v1/token?audience=orders", "a credential of payments", ok)
	ofReports := h.until(r, "/v1/token?audience=orders", "a credential of reports", ok)
	for text, want := range map[string]string{ofPayments.AccessToken: sandbox.Payments.String(), ofReports.AccessToken: sandbox.Reports.String()} {
		if got := presenter(t, text); got != want {
			t.Errorf("a credential of %s, want %s", got, want)
		}
	}
	h.until(p, "/readyz", "payments to be ready", ok)
	h.until(r, "/readyz", "reports to be ready", ok)
	if got := presenter(t, untilFile(t, box.Dir+"/reports.jwt", true)); got != sandbox.Reports.String() {
		t.Errorf("the file of reports is of %s", got)
	}
	h.until(l, "/readyz", "ledger to say what is missing", func(status int, a *hostAnswer) bool {
		want := fmt.Sprintf("the Workload API returns no SVID for %s; it returned %s, %s", sandbox.Ledger, sandbox.Payments, sandbox.Reports)
		return status == http.StatusServiceUnavailable && a.Checks[0].Message == want
	})
	if status, a, err := h.ask(l, "/v1/token?audience=orders"); status != http.StatusServiceUnavailable || a.Reason != "IDENTITY_UNAVAILABLE" {
		t.Errorf("ledger: %d %+v %v", status, a, err)
	}
	page := h.page()
	for _, want := range []string{`dayfly_agent_ready{workload="payments"} 1`, `dayfly_agent_ready{workload="reports"} 1`, `dayfly_agent_ready{workload="` + sandbox.Ledger.String() + `"} 0`} {
		if !strings.Contains(page, want) {
			t.Errorf("the metrics lack %s", want)
		}
	}
	if n := strings.Count(page, "# TYPE dayfly_agent_ready "); n != 1 {
		t.Errorf("%d families of one name", n)
	}

	// Another comes, by itself.
	if err := td.SetOthers(sandbox.Payments, sandbox.Reports, sandbox.Ledger); err != nil {
		t.Fatal(err)
	}
	h.until(l, "/readyz", "ledger to be ready", ok)

	// Reports is revoked: payments hears of it, and goes on.
	alice := must(box.Client(t.Context(), sandbox.Alice, box.Info.GRPC))(t)
	revocations := dayflyv1.NewRevocationServiceClient(alice.Conn())
	number := must(revocations.Revoke(t.Context(), &dayflyv1.RevokeRequest{
		Selectors: []*dayflyv1.Selector{{Selector: &dayflyv1.Selector_Identity{Identity: sandbox.Reports.String()}}}, Reason: "workloads",
	}))(t).GetRevocation().GetPosition().GetSequence()
	untilFile(t, box.Dir+"/reports.jwt", false)
	h.until(r, "/v1/token?audience=orders", "a refusal", func(status int, _ *hostAnswer) bool { return status != http.StatusOK })
	if _, a, err := h.ask(p, "/v1/token?audience=orders"); err != nil || a.Grant != ofPayments.Grant {
		t.Errorf("payments: %+v %v", a, err)
	}
	must(revocations.Lift(t.Context(), &dayflyv1.LiftRequest{Lock: number, Reason: "workloads"}))(t)
	untilFile(t, box.Dir+"/reports.jwt", true)

	// Reports' SVID is taken back: what it had isn't given out any more, and payments goes on.
	if err := td.SetOthers(sandbox.Payments); err != nil {
		t.Fatal(err)
	}
	untilFile(t, box.Dir+"/reports.jwt", false)
	h.until(r, "/v1/token?audience=orders", "reports to close", func(status int, a *hostAnswer) bool {
		return status == http.StatusServiceUnavailable && a.Reason == "IDENTITY_UNAVAILABLE"
	})
	if _, a, err := h.ask(p, "/v1/token?audience=orders"); err != nil || a.Grant != ofPayments.Grant {
		t.Errorf("payments: %+v %v", a, err)
	}
	h.until(p, "/readyz", "payments to be ready", ok)
	if err := td.SetOthers(sandbox.Payments, sandbox.Reports); err != nil {
		t.Fatal(err)
	}
	untilFile(t, box.Dir+"/reports.jwt", true)
}

// load asks a workload's sockets all the time until it is told to stop.
type load struct {
	asked, lost atomic.Int64
	why         atomic.Value
	grants      sync.Map
}

func (l *load) done(grant string, err error) {
	l.asked.Add(1)
	if err != nil {
		l.lost.Add(1)
		l.why.CompareAndSwap(nil, err.Error())
		return
	}
	l.grants.Store(grant, true)
}

func (l *load) run(ctx context.Context, h *host, name string, wg *sync.WaitGroup) {
	for range 3 {
		// One connection, and a connection for each request.
		kept, fresh := h.web(name), h.web(name)
		fresh.Transport.(*http.Transport).DisableKeepAlives = true
		for _, web := range []*http.Client{kept, fresh} {
			wg.Go(func() {
				for ctx.Err() == nil {
					status, a, err := h.ask(web, "/v1/token?audience=orders")
					if err == nil && status != http.StatusOK {
						err = fmt.Errorf("%d %s %s", status, a.Reason, a.Message)
					}
					if err != nil {
						a = new(hostAnswer)
					}
					l.done(a.Grant, err)
				}
			})
		}
		client := must(sdk.New(sdk.Config{Address: "unix://" + filepath.Join(h.box.Dir, name+"g.sock"), Timeout: time.Minute}))(h.T)
		h.Cleanup(func() { client.Close() })
		wg.Go(func() {
			for ctx.Err() == nil {
				cred, err := client.Issue(context.Background(), sdk.Request{Audience: "orders"})
				if err != nil {
					cred = new(sdk.Credential)
				}
				l.done(cred.Grant, err)
			}
		})
	}
}

// log is all that the agent wrote.
func (h *host) log() string {
	h.Helper()
	return string(must(os.ReadFile(filepath.Join(h.box.Dir, "agent-payments.log")))(h.T))
}

// hup makes the agent read its configuration, and waits until it has.
func (h *host) hup(outcome string) {
	h.Helper()
	counter := func() (n int) {
		for line := range strings.Lines(h.page()) {
			if rest, is := strings.CutPrefix(line, `dayfly_agent_config_reloads_total{outcome="`+outcome+`"} `); is {
				_, _ = fmt.Sscan(rest, &n)
			}
		}
		return n
	}
	before := counter()
	if err := syscall.Kill(h.box.AgentPID(sandbox.Payments), syscall.SIGHUP); err != nil {
		h.Fatal(err)
	}
	deadline := time.Now().Add(time.Minute)
	for counter() == before {
		if time.Now().After(deadline) {
			h.Fatalf("the configuration was not read: %s", h.box.Log("agent-payments"))
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// TestReload changes everything that can change under an agent that is asked all the time.
// A workload that stays loses no request and nothing that it holds; one that starts anew
// makes its callers wait (net/http drops a connection whose first request it reads while it
// shuts down). A wrong file changes nothing.
func TestReload(t *testing.T) {
	box := newBox(t)
	if err := box.TD.SetOthers(sandbox.Payments, sandbox.Reports, sandbox.Ledger); err != nil {
		t.Fatal(err)
	}
	uid := os.Getuid()
	stays := fmt.Sprintf(`
  - name: payments
    id: %s
    sockets: {http: DIR/p.sock, grpc: DIR/pg.sock`, sandbox.Payments)
	reports := fmt.Sprintf(`
  - name: reports
    id: %s
    sockets: {http: DIR/r.sock, grpc: DIR/rg.sock`, sandbox.Reports)
	ledger := fmt.Sprintf(`
  - name: ledger
    id: %s
    sockets: {http: DIR/l.sock}`, sandbox.Ledger)
	prefetch := "\n    prefetch: [{audience: orders}]"
	first := "workloads:" + stays + "}" + prefetch + reports + "}" + prefetch
	h := startHost(t, box, first)
	p, l := h.web("p"), h.web("l")
	h.until(p, "/readyz", "payments to be ready", ok)
	h.until(h.web("r"), "/readyz", "reports to be ready", ok)

	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	var steady, moved load
	steady.run(ctx, h, "p", &wg)
	moved.run(ctx, h, "r", &wg)

	for round, text := range []string{
		// What may call, what is kept and written, the bound and the level: in place.
		"workloads:" + stays + fmt.Sprintf(", allowed_uids: [%d]}", uid) + "\n    prefetch: [{audience: orders}, {audience: web}]" + reports + "}" + prefetch,
		"workloads:" + stays + "}\n    files: [{path: DIR/file, credential: {audience: orders}}]" + reports + "}" + prefetch + "\nfeed: {max_staleness: 20s}\nlog: {level: debug}",
		"workloads:" + stays + "}\n    directories: [{path: DIR/all, files: [{name: orders, credential: {audience: orders}}]}]" + reports + "}" + prefetch,
		// A workload comes, changes what can't be changed in place, and goes; another starts
		// anew with the same sockets in another mode.
		first + ledger,
		first + ledger + "\n    systemd: {socket: DIR/s.sock, credentials: [{unit: a.service, credential: a, audience: orders}]}",
		"workloads:" + stays + "}" + prefetch + reports + ", mode: \"0660\"}" + prefetch,
		"workloads:" + stays + "}" + prefetch + strings.Replace(reports, "name: reports", "name: renamed", 1) + "}" + prefetch,
		first,
	} {
		h.configure(text)
		h.hup("ok")
		file, all := box.Dir+"/file", box.Dir+"/all/orders"
		untilFile(t, file, round == 1)
		untilFile(t, all, round == 2)
		if round == 3 || round == 4 {
			h.until(l, "/readyz", "ledger to be ready", ok)
		} else if _, _, err := h.ask(l, "/healthz"); err == nil {
			t.Errorf("round %d: ledger is there", round)
		}
		if _, err := os.Lstat(box.Dir + "/s.sock"); (err == nil) != (round == 4) {
			t.Errorf("round %d: systemd's socket: %v", round, err)
		}
	}
	for _, want := range []string{
		`"changed":["workload payments: sockets, prefetch"]`, `"changed":["log.level","feed.max_staleness","workload payments: sockets, prefetch, files"]`,
		`"changed":["workload payments: prefetch, directories","workload ledger: started"]`, `"changed":["workload ledger: systemd, started anew"]`,
		`"workload reports: stopped"`,
	} {
		if log := h.log(); !strings.Contains(log, want) {
			t.Errorf("the log lacks %s: %s", want, log)
		}
	}

	// Nothing of a wrong file counts, and the log says what is wrong, and where.
	for text, want := range map[string]string{
		"workloads:" + stays + ", allowed_uids: [4200000]}" + prefetch + "\nwrong: 1\n":                                                             "host.yaml:9: unknown key",
		"workloads:" + stays + ", allowed_uids: [4200000]}" + prefetch + "\nlog: {format: text}\n":                                                  "log.format: has changed, which needs a restart",
		"workloads:" + stays + ", allowed_uids: [4200000]}" + prefetch + "\n    files: [{path: DIR/no/x, credential: {audience: orders}}]":          "workload payments: changing settings: delivering to",
		"workloads:" + stays + ", allowed_uids: [4200000]}" + prefetch + ledger + "\n    files: [{path: DIR/no/x, credential: {audience: orders}}]": "workload ledger: delivering to",
		"workloads:" + stays + ", allowed_uids: [4200000]}" + prefetch + strings.Replace(ledger, "DIR/l.sock", "/nowhere/l.sock", 1):                "workload ledger: listening on /nowhere/l.sock",
	} {
		h.configure(text)
		h.hup("failed")
		if log := h.log(); !strings.Contains(log, want) {
			t.Errorf("the log lacks %q: %s", want, log)
		}
		if _, a, err := h.ask(p, "/v1/status"); err != nil || a.Configuration.ReloadFailedSince == nil {
			t.Errorf("the status doesn't say that the reload failed: %+v %v", a, err)
		}
		if page := h.page(); !strings.Contains(page, "dayfly_agent_config_last_reload_successful 0\n") {
			t.Error("the metrics don't say that the reload failed")
		}
	}
	h.configure(first)
	h.hup("ok")
	if _, a, err := h.ask(p, "/v1/status"); err != nil || a.Configuration.ReloadFailedSince != nil {
		t.Errorf("the status still says that the reload failed: %+v %v", a, err)
	}
	cancel()
	wg.Wait()
	for name, one := range map[string]*load{"payments": &steady, "reports": &moved} {
		grants := 0
		one.grants.Range(func(any, any) bool { grants++; return true })
		t.Logf("%s: %d requests, %d lost, %d credentials", name, one.asked.Load(), one.lost.Load(), grants)
		if one.asked.Load() == 0 || name == "payments" && one.lost.Load() > 0 {
			t.Errorf("%s: %d of %d requests are lost: %v", name, one.lost.Load(), one.asked.Load(), one.why.Load())
		}
		if name == "payments" && grants != 1 {
			t.Errorf("%d credentials: what was held has gone", grants)
		}
	}
	h.until(h.web("r"), "/v1/token?audience=orders", "reports to serve", ok)
	if err := box.StopAgent(sandbox.Payments); err != nil && !errors.Is(err, os.ErrProcessDone) {
		t.Error(err)
	}
}
