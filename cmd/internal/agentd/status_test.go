package agentd_test

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/agent"
	"github.com/dayflyhq/dayfly/cmd/internal/agentd"
	"github.com/dayflyhq/dayfly/cmd/internal/config"
)

// answering serves one answer at a unix socket.
func answering(t *testing.T, status int, body string) (socket string) {
	t.Helper()
	socket = tempDir(t) + "/h.sock"
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/v1/status" {
			t.Errorf("asked for %s", r.URL.Path)
		}
		w.WriteHeader(status)
		_, _ = io.WriteString(w, body)
	})}
	go func() { _ = server.Serve(l) }()
	t.Cleanup(func() { _ = server.Close() })
	return socket
}

func report(t *testing.T, r agent.Report) string {
	t.Helper()
	raw, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	return string(raw)
}

func TestStatusExitCodes(t *testing.T) {
	at := time.Date(2026, 11, 27, 12, 4, 0, 0, time.UTC)
	full := agent.Report{
		Status:  agent.Status{Ready: true, State: agent.Serving, Checks: []agent.Check{{Name: "prefetch", State: agent.Serving, Message: "can't renew until 12:04\x1b[31m"}}},
		Version: "v1", UptimeS: 3700, Identity: &agent.IdentityInfo{SPIFFEID: "spiffe://td/payments", ExpiresInS: 60},
		Upstream: agent.UpstreamInfo{UnreachableSince: &at},
		Credentials: []agent.CredentialInfo{
			{Audience: "orders", Scopes: []string{"r", "w"}, Binding: "spiffe", Configured: true, Held: true, Grant: "g1", AgeS: 61, ExpiresInS: 90, RenewInS: 3,
				Failure: &agent.Failure{Reason: "BROKER_UNREACHABLE", Since: at, Count: 4}},
			{Audience: "web", Scopes: []string{}},
		},
		Files:     []agent.FileInfo{{Path: "/run/x", Present: true, Until: &at}},
		Feed:      &agent.FeedInfo{Position: "7/1/ab", Known: true, AgeMS: 1500, BoundMS: 30000, Relays: true, Verifiers: 2},
		Listeners: []agent.ListenerInfo{{Name: "grpc", Address: "/run/g", Requests: map[string]uint64{"ok": 5, "POLICY_DENIED": 1}}},
	}
	for name, c := range map[string]struct {
		status int
		body   string
		flags  []string
		code   int
		want   []string
	}{
		"ready":   {200, report(t, agent.Report{Status: agent.Status{State: agent.Ready}}), nil, 0, []string{"state", "ready", "none yet", "not reached yet"}},
		"failed":  {200, report(t, agent.Report{Status: agent.Status{State: agent.Failed}}), []string{"-o", "json"}, 4, []string{`"state":"failed"`}},
		"serving": {200, report(t, full), nil, 3, []string{"serving", "can't renew until 12:04 [31m", "spiffe://td/payments", "SVID valid for 1m0s", "not reachable since 2026-11-27T12:04:00Z", "up 1h1m40s", "orders", "r w", "in 1m30s", "in 3s", "g1", "BROKER_UNREACHABLE, 4 times since", "web (asked for)", "not there", "/run/x", "7/1/ab, 1.5s old (bound 30s), relays to 2", "POLICY_DENIED 1, ok 5"}},
		"refused": {403, `{"reason":"PEER_NOT_ALLOWED","message":"user 5 may not","hint":"add it"}`, nil, 1, []string{"PEER_NOT_ALLOWED: user 5 may not (add it)"}},
		"strange": {200, `{}`, nil, 1, []string{"no status"}},
		"garbage": {500, `oops`, nil, 1, []string{"status 500"}},
		"output":  {200, ``, []string{"-o", "yaml"}, 2, []string{"--output"}},
		"watch":   {200, ``, []string{"--watch", "1ms"}, 2, []string{"--watch"}},
		"empty":   {200, ``, []string{"--socket", ""}, 2, []string{"--socket"}},
	} {
		t.Run(name, func(t *testing.T) {
			var out bytes.Buffer
			err := agentd.Run(t.Context(), append([]string{"status", "--socket", "unix://" + answering(t, c.status, c.body)}, c.flags...), &out, io.Discard)
			text := out.String()
			if err != nil {
				text += err.Error()
			}
			if code := config.ExitCode(err); code != c.code {
				t.Errorf("exit code %d, want %d: %s", code, c.code, text)
			}
			for _, want := range c.want {
				if !strings.Contains(text, want) {
					t.Errorf("it doesn't say %q:\n%s", want, text)
				}
			}
			if strings.Contains(text, "\x1b") {
				t.Error("a terminal would obey what an agent says")
			}
		})
	}
}

// --watch asks until it is told to stop, and that is no failure.
func TestStatusWatch(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	out, in := io.Pipe()
	done := make(chan error, 1)
	socket := answering(t, 200, report(t, agent.Report{Status: agent.Status{State: agent.Failed}}))
	go func() {
		done <- agentd.Run(ctx, []string{"status", "-s", socket, "-o", "json", "-w", "100ms"}, in, io.Discard)
		_ = in.Close()
	}()
	dec := json.NewDecoder(out)
	for range 3 {
		var r agent.Report
		if err := dec.Decode(&r); err != nil || r.State != agent.Failed {
			t.Fatalf("%v, %v", r.State, err)
		}
	}
	cancel()
	go func() { _, _ = io.Copy(io.Discard, out) }()
	if err := <-done; err != nil {
		t.Errorf("after the end: %v", err)
	}
}
