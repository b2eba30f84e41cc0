package e2e_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/agent"
	"github.com/dayflyhq/dayfly/e2e/sandbox"
	"github.com/dayflyhq/dayfly/proto/token"
	"golang.org/x/sys/unix"
)

// agentStatus runs dayfly-agent status, and returns what it says and its exit code.
func agentStatus(t *testing.T, box *sandbox.Sandbox, flags ...string) (agent.Report, string, int) {
	t.Helper()
	var out, stderr bytes.Buffer
	cmd := exec.CommandContext(t.Context(), filepath.Join(bin, "dayfly-agent"), append([]string{"status", "--socket", box.AgentHTTP(sandbox.Payments)}, flags...)...)
	cmd.Stdout, cmd.Stderr = &out, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	var r agent.Report
	if len(flags) > 0 && out.Len() > 0 {
		if err := json.Unmarshal(out.Bytes(), &r); err != nil {
			t.Fatalf("%v\n%s", err, &out)
		}
	}
	return r, out.String() + stderr.String(), cmd.ProcessState.ExitCode()
}

// untilStatus waits until the agent's status has an exit code.
func untilStatus(t *testing.T, box *sandbox.Sandbox, code int) agent.Report {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for {
		r, text, got := agentStatus(t, box, "--output", "json")
		if got == code {
			return r
		}
		if time.Now().After(deadline) {
			t.Fatalf("status ends with %d, want %d:\n%s", got, code, text)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// TestStartOrders starts an agent, its Workload API and the broker in every order: it gets
// ready by itself.
func TestStartOrders(t *testing.T) {
	box := newBox(t) // once, for its address
	if err := box.StopBroker(); err != nil {
		t.Fatal(err)
	}
	if _, err := box.TD.Workload(sandbox.Payments); err != nil {
		t.Fatal(err)
	}
	steps := map[string]func() error{
		"agent": func() error {
			_, err := box.SpawnAgent(sandbox.Payments, "--prefetch", "orders")
			return err
		},
		"workload api": func() error { return box.TD.StartSocket(sandbox.Payments) },
		"broker":       func() error { return box.StartBroker(t.Context()) },
	}
	if _, text, code := agentStatus(t, box); code != 1 || !strings.Contains(text, "can't be asked") && !strings.Contains(text, "is it running") {
		t.Errorf("nobody is there: exit code %d: %s", code, text)
	}
	for _, order := range [][]string{
		{"agent", "workload api", "broker"}, {"agent", "broker", "workload api"}, {"workload api", "agent", "broker"},
		{"broker", "agent", "workload api"}, {"broker", "workload api", "agent"}, {"workload api", "broker", "agent"},
	} {
		if err := box.TD.StopSocket(sandbox.Payments); err != nil {
			t.Fatal(err)
		}
		started := map[string]bool{}
		for i, step := range order {
			if err := steps[step](); err != nil {
				t.Fatalf("%v: %s: %v", order, step, err)
			}
			started[step] = true
			if started["agent"] && i < 2 {
				if r := untilStatus(t, box, 4); r.State != agent.Failed || r.Ready {
					t.Errorf("%v, after %s: %+v", order, step, r.Status)
				}
			}
		}
		r := untilStatus(t, box, 0)
		if r.Identity == nil || r.Identity.SPIFFEID != sandbox.Payments.String() || len(r.Credentials) != 1 || !r.Credentials[0].Held || !r.Upstream.Reachable {
			t.Errorf("%v: %+v", order, r)
		}
		if _, text, code := agentStatus(t, box); code != 0 || !strings.Contains(text, "orders") || !strings.Contains(text, sandbox.Payments.String()) {
			t.Errorf("%v: for people: %d\n%s", order, code, text)
		}
		if err := errors.Join(box.StopAgent(sandbox.Payments), box.StopBroker()); err != nil {
			t.Fatal(err)
		}
	}
}

// TestFrozenAgent stops the agent's process until its credential has expired, as a suspend
// does: when it goes on, whoever asks first gets a valid one or none, and it renews by
// itself.
func TestFrozenAgent(t *testing.T) {
	for _, away := range []bool{false, true} {
		t.Run(fmt.Sprintf("broker away %v", away), func(t *testing.T) {
			box := newBox(t)
			file := filepath.Join(box.Dir, "short.yaml")
			if err := os.WriteFile(file, []byte("prefetch: [{audience: orders, ttl: 8s}]\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			must(box.StartAgent(t.Context(), sandbox.Payments, "--config", file))(t)
			first := untilStatus(t, box, 0).Credentials[0]
			pid := box.AgentPID(sandbox.Payments)
			if err := unix.Kill(pid, unix.SIGSTOP); err != nil {
				t.Fatal(err)
			}
			thaw := func() { _ = unix.Kill(pid, unix.SIGCONT) }
			defer thaw()
			frozen(t, pid)
			if away {
				box.KillBroker()
			}
			expired := time.NewTimer(time.Until(first.ExpiresAt.Add(time.Second)))
			type result struct {
				code int
				body map[string]any
				err  error
			}
			got := make(chan result, 1)
			asked := make(chan struct{})
			go func() { // somebody who asks while it is frozen
				var r result
				transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
					conn, err := (&net.Dialer{}).DialContext(ctx, "unix", box.AgentHTTP(sandbox.Payments))
					close(asked)
					return conn, err
				}}
				defer transport.CloseIdleConnections()
				resp, err := (&http.Client{Transport: transport, Timeout: time.Minute}).Get("http://agent/v1/token?audience=orders&ttl=8s")
				if r.err = err; err == nil {
					r.code, r.err = resp.StatusCode, json.NewDecoder(resp.Body).Decode(&r.body)
					_ = resp.Body.Close()
				}
				got <- r
			}()
			<-asked
			<-expired.C
			thawed := time.Now()
			thaw()
			r := <-got
			switch {
			case r.err != nil:
				t.Fatal(r.err)
			case away && (r.code != http.StatusServiceUnavailable || r.body["reason"] != "BROKER_UNREACHABLE"):
				t.Errorf("the broker is away: %d, reason %v", r.code, r.body["reason"])
			case !away:
				parsed, err := token.Inspect(fmt.Sprint(r.body["access_token"]))
				if err != nil || !parsed.Expires.After(thawed) || r.body["grant"] == first.Grant {
					t.Errorf("when it goes on, at %v: %d, %v, grant %v (%v before)", thawed, r.code, err, r.body["grant"], first.Grant)
				}
			}
			if away {
				r := untilStatus(t, box, 4)
				if f := r.Credentials[0].Failure; f == nil || f.Reason != "BROKER_UNREACHABLE" || r.Upstream.Reachable {
					t.Errorf("%+v %+v", r.Credentials[0], r.Upstream)
				}
				if err := box.StartBroker(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			if c := untilStatus(t, box, 0).Credentials[0]; c.Grant == first.Grant {
				t.Error("it hasn't renewed")
			}
		})
	}
}

// frozen waits until every thread of a process that was stopped has: what is asked before
// that may still be answered.
func frozen(t *testing.T, pid int) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		running := 0
		for _, path := range must(filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid)))(t) {
			text, _ := os.ReadFile(path)
			if _, after, _ := strings.Cut(string(text), ") "); !strings.HasPrefix(after, "T") {
				running++
			}
		}
		if running == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d threads of process %d don't stop", running, pid)
		}
	}
}

// TestServingWhileTheBrokerIsAway: what is held is served, and status says until when.
func TestServingWhileTheBrokerIsAway(t *testing.T) {
	box := newBox(t)
	file := filepath.Join(box.Dir, "short.yaml")
	if err := os.WriteFile(file, []byte("prefetch: [{audience: orders, ttl: 20s}]\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	must(box.StartAgent(t.Context(), sandbox.Payments, "--config", file))(t)
	untilStatus(t, box, 0)
	box.KillBroker()
	deadline := time.Now().Add(time.Minute)
	for {
		r := untilStatus(t, box, 3)
		i := 0
		for i < len(r.Checks) && r.Checks[i].Name != "prefetch" {
			i++
		}
		if c := r.Checks[i]; c.State == agent.Serving {
			if !r.Ready || c.Reason != "BROKER_UNREACHABLE" || c.Until == nil || !c.Until.Equal(*r.Credentials[0].ExpiresAt) || c.Since == nil {
				t.Errorf("%+v", c)
			}
			break
		}
		if time.Now().After(deadline) { // the feed is old sooner than the credential is due
			t.Fatalf("%+v", r)
		}
	}
	if _, text, code := agentStatus(t, box); code != 3 || !strings.Contains(text, "can't renew until") {
		t.Errorf("for people: %d\n%s", code, text)
	}
	untilStatus(t, box, 4)
	if err := box.StartBroker(t.Context()); err != nil {
		t.Fatal(err)
	}
	untilStatus(t, box, 0)
}
