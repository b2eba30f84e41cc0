package agentd_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/cmd/internal/agentd"
	"github.com/dayflyhq/dayfly/cmd/internal/config"
)

const patience = 30 * time.Second

func tempDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "df")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

func write(t *testing.T, content string) string {
	t.Helper()
	path := filepath.Join(tempDir(t), "agent.yaml")
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// Everything wrong is said at once, with lines; nothing is started.
func TestConfigurationRefused(t *testing.T) {
	for name, c := range map[string]struct {
		file string
		args []string
		want []string
	}{
		"nothing given": {want: []string{"broker.address", "broker.id", "sockets"}},
		"a bad file": {
			file: "broker:\n  address: b\n  id: not-an-id\nsocket: {}\nsockets:\n  grpc: x\n  mode: \"0666\"\nmetrics: 0.0.0.0:9\nprefetch:\n  - {audience: \"a b\", ttl: 2h}\nfeed: {max_staleness: 1ms, max_streams: 0}\nlog: {format: xml}\nworkload_api: /run/spire.sock\n",
			args: []string{"--log-level", "z"},
			want: []string{":2: broker.address", ":3: broker.id", ":6: sockets.grpc", ":13: workload_api", "--log-level", ":4: ", "did you mean", ":7: sockets.mode", ":8: metrics", ":10: prefetch[0].audience", "prefetch[0].ttl", "feed.max_staleness", "feed.max_streams", "log.format"},
		},
		"bad flags":               {args: []string{"--broker-id", "x", "--metrics", "y", "--log-level", "z"}, want: []string{"--broker-id", `--metrics: "y": is no address with a port`, `--log-level: "z": is none of debug`}},
		"an address of no socket": {file: "workload_api: /run/spire.sock\n", want: []string{":1: workload_api: write unix:// and an absolute path"}},
		"a flag out of range":     {args: []string{"--broker", "b:1", "--broker-id", "spiffe://td/b", "--grpc-socket", "/x", "--max-staleness", "2h", "--metrics", "192.0.2.1:1", "--prefetch", "a b"}, want: []string{"max_staleness", "loopback", "prefetch 1"}},
		"two sockets at one path": {file: "sockets:\n  grpc: /a\n  http: /a\n", want: []string{":3: sockets.http: is the path of sockets.grpc too"}},
		"a path that is too long": {file: "sockets:\n  grpc: /" + strings.Repeat("x", 100) + "/a\n", want: []string{":2: sockets.grpc: the path is too long"}},
		"a short TTL":             {file: "prefetch:\n  - audience: a\n    ttl: 1ms\n", want: []string{":3: prefetch[0].ttl"}},
		"too many audiences":      {file: "feed:\n  audiences: [" + strings.Repeat("a,", 65) + "]\n", want: []string{":2: feed.audiences: are at most 64"}},
		"too much to prefetch":    {file: "prefetch: [" + strings.Repeat("{audience: a},", 513) + "]\n", want: []string{":1: prefetch: are at most 512"}},
		"bad helpers": {
			file: "aws_container: {listen: \"192.0.2.1:1\", role_arn: x, duration: 1s, session_name: s, sts_endpoint: \"http://sts.example.org\", authorization_token_file_mode: \"0644\", authorization_token_file_group: nobody-of-this-name}\nsystemd:\n  credentials:\n    - {unit: a, credential: b, audience: c d}\n",
			want: []string{":1: aws_container.listen: must be a loopback", "aws_container.audience", "aws_container.authorization_token_file: must be absolute", "aws_container.authorization_token_file_mode: must be within 0640", "aws_container.authorization_token_file_group: no group", "aws_container.role_arn: must be an ARN", "aws_container.duration: is 15m", "aws_container.session_name", "aws_container.sts_endpoint", ":4: systemd.credentials[0].unit", "systemd.credentials[0].audience"},
		},
		"a socket for nobody": {file: "systemd: {socket: /run/x.sock}\n", want: []string{":1: systemd.credentials: and socket go together"}},
		"half a helper":       {file: "aws_container: {role_arn: x}\n", want: []string{":1: aws_container.listen: is missing"}},
		"one workload beside several": {
			file: "id: spiffe://td/a\nsockets:\n  grpc: /a\nprefetch: [{audience: a}]\nworkloads:\n  - sockets: {grpc: /b}\n",
			want: []string{":1: id: stands beside workloads", ":2: sockets: stands beside", ":4: prefetch: stands beside"},
		},
		"flags of one workload beside several": {
			file: "workloads:\n  - sockets: {grpc: /b}\n", args: []string{"--grpc-socket", "/a"}, want: []string{"sockets: stands beside workloads: each of them has its own, and flags can't say whose"},
		},
		"workloads in each other's way": {
			file: `workloads:
  - sockets: {grpc: /run/a, http: /run/b}
    files: [{path: /run/x/a, credential: {audience: a}}]
    aws_container: {listen: "127.0.0.1:1", audience: a, authorization_token_file: /x}
  - id: spiffe://td/a
    sockets: {http: /run/a, mode: "0666"}
    prefetch: [{audience: "a b"}]
    directories: [{path: /run/x, files: [{name: a, credential: {audience: a}}]}]
    aws_container: {listen: "127.0.0.1:1", audience: a, authorization_token_file: /x}
  - id: spiffe://td/a
    systemd: {socket: /run/b, credentials: [{unit: a.service, credential: a, audience: a}]}
  - {name: "a\"b", sockets: {grpc: /run/c}, outgoin: x}
  - {id: not-an-id}
feed: {relay: {listen: "127.0.0.1:0", allow: ["trust_domain:td"]}}
`,
			want: []string{
				":6: workloads[1].sockets.http: is workloads[0].sockets.grpc too", ":6: workloads[1].sockets.mode", ":7: workloads[1].prefetch[0].audience",
				":8: workloads[1].directories[0].path: is in the way of /run/x/a", ":9: workloads[1].aws_container.listen: is workloads[0].aws_container.listen too",
				":9: workloads[1].aws_container.authorization_token_file: is workloads[0]", ":10: workloads[2].id: \"spiffe://td/a\" is the name of another workload", ":11: workloads[2].systemd.socket: is workloads[0].sockets.http too",
				":12: workloads[3].name: is up to 255 plain characters", ":12: workloads[3]: unknown key", ":13: workloads[4].id", ":14: feed.relay.workload",
			},
		},
		"a relay of nobody's":         {file: "feed: {relay: {workload: x, listen: \"127.0.0.1:0\", allow: [\"trust_domain:td\"]}}\n", want: []string{`:1: feed.relay.workload: "x" is the name of no workload`}},
		"a workload without a socket": {file: "workloads: [{name: a, sockets: {grpc: /a}}, {name: b}]\n", want: []string{"workloads[1].sockets: give"}},
		"no Workload API":             {args: []string{"--broker", "b:1"}, want: []string{"workload_api: give the socket"}},
		"no file":                     {args: []string{"--config", "/nonexistent/agent.yaml"}, want: []string{"there is no file"}},
		"arguments":                   {args: []string{"serve"}, want: []string{"serve"}},
	} {
		args := c.args
		if c.file != "" {
			args = append(args, "--config", write(t, c.file))
		}
		t.Setenv("SPIFFE_ENDPOINT_SOCKET", "")
		err := agentd.Run(t.Context(), args, io.Discard, io.Discard)
		if code := config.ExitCode(err); code != 2 {
			t.Errorf("%s: exit code %d, want 2", name, code)
		}
		for _, want := range c.want {
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: the error lacks %q:\n%v", name, want, err)
			}
		}
	}
}

// The agent starts with nobody there, answers, and is gone without a trace when told to.
func TestRun(t *testing.T) {
	dir := tempDir(t)
	metrics, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := metrics.Addr().String()
	_ = metrics.Close()
	file := write(t, fmt.Sprintf(`
broker: {address: "127.0.0.1:1", id: spiffe://td/dayfly/broker}
workload_api: unix://%s/nobody.sock
sockets: {grpc: %s/g.sock, http: %s/other.sock, allowed_uids: [%d]}
metrics: %s
log: {level: debug, format: text}
`, dir, dir, dir, os.Getuid(), address))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var log bytes.Buffer
	done := make(chan error, 1)
	go func() {
		done <- agentd.Run(ctx, []string{"-c", file, "--http-socket", dir + "/h.sock", "--prefetch", "orders=r,w"}, io.Discard, &log)
	}()
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", dir+"/h.sock")
	}}
	defer transport.CloseIdleConnections()
	body := get(t, &http.Client{Transport: transport}, "http://localhost/readyz")
	for _, want := range []string{`"ready":false`, "no SVID yet", "no credential yet for orders"} {
		if !strings.Contains(body, want) {
			t.Errorf("readyz lacks %q: %s", want, body)
		}
	}
	plain := &http.Transport{}
	defer plain.CloseIdleConnections()
	if body := get(t, &http.Client{Transport: plain}, "http://"+address+"/metrics"); !strings.Contains(body, "dayfly_agent_ready 0\n") || !strings.Contains(body, "# TYPE dayfly_agent_fetches_total counter\n") {
		t.Errorf("metrics: %s", body)
	}
	second := agentd.Run(t.Context(), []string{"-c", file}, io.Discard, io.Discard)
	if second == nil || !strings.Contains(second.Error(), "another process answers") {
		t.Errorf("a second agent on the same socket: %v", second)
	}
	cancel()
	select {
	case err := <-done:
		if err != nil {
			t.Errorf("after the end: %v\n%s", err, log.String())
		}
	case <-time.After(patience):
		t.Fatal("it did not stop")
	}
	if left, _ := filepath.Glob(dir + "/*"); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

// check says what a start would, and starts nothing.
func TestCheck(t *testing.T) {
	t.Setenv("SPIFFE_ENDPOINT_SOCKET", "")
	right := write(t, "broker: {address: \"b:1\", id: spiffe://td/b}\nworkload_api: unix:///x.sock\nworkloads:\n  - {id: spiffe://td/a, sockets: {grpc: /a.sock}}\n  - {name: second, sockets: {grpc: /b.sock}}\n")
	var out bytes.Buffer
	if err := agentd.Run(t.Context(), []string{"check", "-c", right}, &out, io.Discard); err != nil {
		t.Fatal(err)
	}
	if want := "the configuration is right; workloads: spiffe://td/a, second\n"; out.String() != want {
		t.Errorf("got %q, want %q", out.String(), want)
	}
	out.Reset()
	err := agentd.Run(t.Context(), []string{"check", "-c", right, "--http-socket", "/c.sock"}, &out, io.Discard)
	if code := config.ExitCode(err); code != 2 || !strings.Contains(err.Error(), "sockets: stands beside workloads") || out.Len() > 0 {
		t.Errorf("flags count too: %d %v %q", code, err, out.String())
	}
	wrong := write(t, "sockets:\n  grpc: x\n")
	if err := agentd.Run(t.Context(), []string{"check", "-c", wrong}, &out, io.Discard); config.ExitCode(err) != 2 || !strings.Contains(err.Error(), ":2: sockets.grpc") {
		t.Errorf("a wrong file: %v", err)
	}
}

func get(t *testing.T, c *http.Client, url string) string {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		resp, err := c.Get(url)
		if err == nil {
			defer resp.Body.Close()
			body, err := io.ReadAll(resp.Body)
			if err != nil {
				t.Fatal(err)
			}
			return string(body)
		}
		if time.Now().After(deadline) {
			t.Fatal(errors.Join(errors.New("nobody answers"), err))
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// Everything wrong with files is said at once, each at its line.
func TestFilesRefused(t *testing.T) {
	file := write(t, `broker: {address: "b:1", id: spiffe://td/b}
workload_api: unix:///x.sock
sockets: {grpc: /run/x/g.sock}
files:
  - path: relative
    mode: "0644"
    credential: {audience: a}
  - path: /run/x/a
    format: yaml
    owner: nobody-of-this-name
    group: nobody-of-this-name
    credential:
      audience: "a b"
      ttl: 5s
  - path: /run/x/b
    format: template
    credentials:
      orders: {audience: orders, ttl: 3s}
    template: |
      one
      {{ token "web" }}
    on_change:
      command: [sh]
      timeout: 10m
      pid_file: x
  - path: /run/x/c
    credential: {audience: a}
    credentials: {b: {audience: b}}
  - path: /run/x/a
  - credential: {audience: a}
directories:
  - path: /run/x
    mode: "0640"
    files:
      - name: a/b
        credential: {audience: a}
      - name: same
        variable: X
        credential: {audience: a}
      - name: same
        credential: {audiense: a}
`)
	err := agentd.Run(t.Context(), []string{"-c", file}, io.Discard, io.Discard)
	if code := config.ExitCode(err); code != 2 {
		t.Errorf("exit code %d, want 2", code)
	}
	for _, want := range []string{
		":5: files[0].path: must be absolute", ":6: files[0].mode: must be within 0640",
		":9: files[1].format", ":10: files[1].owner: no user", ":11: files[1].group: no group", ":13: files[1].credential.audience", ":14: files[1].credential.ttl: is at least 10s",
		":18: files[2].credentials.orders.ttl", `:19: files[2].template: 2:3: `, `no credential is named "web"`,
		":23: files[2].on_change.command: begins", ":24: files[2].on_change.timeout", ":25: files[2].on_change.pid_file", ":22: files[2].on_change.signal",
		":28: files[3].credentials: and credential exclude", ":29: files[4].credentials: are 0", ":30: files[5].path: is required",
		":29: files[4].path: is in the way of /run/x/a", ":32: directories[0].path: is in the way of",
		":32: directories[0].group: must be named", ":35: directories[0].files[0].name: must be a plain name",
		":38: directories[0].files[1].variable", `:40: directories[0].files[2].name: "same" is there twice`, "did you mean \"audience\"",
	} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("the error lacks %q:\n%v", want, err)
		}
	}
}

// A template may be in a file of its own.
func TestTemplateFile(t *testing.T) {
	dir := tempDir(t)
	for name, text := range map[string]string{"good": `{{ token "credential" }}`, "bad": "\n{{ nothing }}", "empty": ""} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	run := func(key, value string) error {
		one := fmt.Sprintf("format: template, credential: {audience: a}, %s: %q", key, value)
		file := write(t, fmt.Sprintf("files:\n  - {path: /run/x, %s}\ndirectories:\n  - path: /run/y\n    files: [{name: n, %s}]\n", one, one))
		return agentd.Run(t.Context(), []string{"--config", file}, io.Discard, io.Discard)
	}
	for value, want := range map[string]string{
		"relative": "must be an absolute path", dir + "/none": "no such file", dir + "/empty": "is empty", dir + "/bad": `function "nothing" not defined`,
	} {
		err := run("template_file", value)
		for _, key := range []string{":2: files[0].template", ":5: directories[0].files[0].template"} {
			if err == nil || !strings.Contains(err.Error(), key) || strings.Count(err.Error(), want) != 2 {
				t.Errorf("%s: the error lacks %q at %s:\n%v", value, want, key, err)
			}
		}
	}
	if err := run("template_file", dir+"/good"); err == nil || strings.Contains(err.Error(), "template") {
		t.Errorf("a good one: %v", err)
	}
	if err := run("template: x, template_file", dir+"/good"); err == nil || strings.Count(err.Error(), "template_file: and template exclude each other") != 2 {
		t.Errorf("both: %v", err)
	}
}
