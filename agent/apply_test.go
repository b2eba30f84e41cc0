package agent_test

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/agent"
	"github.com/dayflyhq/dayfly/agent/deliver"
	"github.com/dayflyhq/dayfly/agent/sts"
	"github.com/dayflyhq/dayfly/sdk"
)

// Settings change under a running agent: connections stay, what is held stays, and what
// can't be is refused whole.
func TestApply(t *testing.T) {
	td := newDomain(t)
	b := newBroker(t, td)
	var a *agent.Agent
	uid := uint32(os.Getuid())
	f := start(t, td, b, func(c *agent.Config) { c.Prefetch = []agent.Request{{Audience: "orders"}, {Audience: "ledger"}} }, func(made *agent.Agent) { a = made })
	f.ready()
	client := f.client()
	first := f.issue(client, sdk.Request{Audience: "orders"})

	// Who may call, on a connection that stands.
	must(t, a.Apply(agent.Settings{Allow: agent.Allow{UIDs: []uint32{uid + 1}}, Prefetch: []agent.Request{{Audience: "orders"}}, MaxStaleness: 3 * time.Second}))
	if _, err := client.Issue(t.Context(), sdk.Request{Audience: "orders"}); reason(err) != "PEER_NOT_ALLOWED" {
		t.Errorf("one who may no longer call: %v", err)
	}
	if code, body, _ := f.get("/v1/token?audience=orders"); body["reason"] != "PEER_NOT_ALLOWED" {
		t.Errorf("over HTTP: %d %v", code, body)
	}

	// What is kept, where it is written, and the bound; the bound makes a new stream.
	dir := tempDir(t)
	next := agent.Settings{
		Allow: agent.Allow{UIDs: []uint32{uid}}, Prefetch: []agent.Request{{Audience: "web"}},
		Files: []deliver.Target{fileTarget(filepath.Join(dir, "file"), 0)}, MaxStaleness: 4 * time.Second,
	}
	must(t, a.Apply(next))
	eventually(t, "the new bound at the broker", func() error {
		b.mu.Lock()
		defer b.mu.Unlock()
		if last := b.subs[len(b.subs)-1]; last.Bound != 4*time.Second {
			return errors.New(last.Bound.String())
		}
		return nil
	})
	f.ready()
	if _, err := os.Stat(filepath.Join(dir, "file")); err != nil {
		t.Error(err)
	}
	if again := f.issue(client, sdk.Request{Audience: "orders"}); again.Grant != first.Grant {
		t.Error("what was held has gone")
	}
	configured := map[string]bool{}
	for _, c := range a.Report().Credentials {
		configured[c.Audience] = c.Configured
	}
	if configured["ledger"] || !configured["web"] || !configured["orders"] {
		t.Errorf("kept by configuration: %v", configured)
	}

	// What can't be.
	streams := b.streams.Load()
	for name, c := range map[string]struct {
		spoil func(*agent.Settings)
		want  string
	}{
		"a request":    {func(s *agent.Settings) { s.Prefetch = []agent.Request{{Audience: "a b"}} }, "prefetch 1: audience"},
		"a program":    {func(s *agent.Settings) { s.Allow.Executables = []string{"sh"} }, `executables: "sh" must be absolute`},
		"a bound":      {func(s *agent.Settings) { s.MaxStaleness = time.Millisecond }, "max staleness"},
		"a file":       {func(s *agent.Settings) { s.Files = []deliver.Target{fileTarget(filepath.Join(dir, "none/file"), 0)} }, "no such file"},
		"a file's way": {func(s *agent.Settings) { s.Files = append(s.Files, s.Files[0]) }, "is in the way of"},
	} {
		s := next
		s.Allow.UIDs, s.Prefetch = []uint32{uid + 1}, []agent.Request{{Audience: "ledger"}}
		c.spoil(&s)
		if err := a.Apply(s); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
	f.issue(client, sdk.Request{Audience: "orders"})
	for _, c := range a.Report().Credentials {
		if c.Configured && c.Audience == "ledger" || !c.Configured && c.Audience == "web" {
			t.Errorf("a refused change left %+v", c)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "file")); err != nil {
		t.Error(err)
	}
	if n := b.streams.Load(); n != streams {
		t.Errorf("%d new streams for changes that were none", n-streams)
	}
	f.stop()
	if err := a.Apply(next); err == nil || !strings.Contains(err.Error(), "has ended") {
		t.Errorf("after the end: %v", err)
	}
}

// Whatever ends the start, no socket is left, and no secret.
func TestRunFailsEarly(t *testing.T) {
	td := newDomain(t)
	dir := tempDir(t)
	aws := func(c *agent.Config) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		must(t, err)
		c.AWS = &agent.AWSContainer{Listener: l, Request: agent.Request{Audience: "a"}, Role: sts.Role{Endpoint: "http://127.0.0.1:1"}, TokenFile: deliver.Secret{Path: filepath.Join(dir, "none", "token")}}
	}
	both := func(c *agent.Config) {
		aws(c)
		c.AWS.TokenFile.Path = filepath.Join(dir, "token")
		c.Files = []deliver.Target{fileTarget(filepath.Join(dir, "none", "other"), 0)}
	}
	files := func(c *agent.Config) { c.Files = []deliver.Target{fileTarget(filepath.Join(dir, "none", "file"), 0)} }
	for name, change := range map[string]func(*agent.Config){"the authorization token file": aws, "delivering to": files, "none/other": both} {
		path := filepath.Join(dir, "s")
		l, err := agent.Listen(agent.SocketConfig{Path: path})
		must(t, err)
		b := unservedBroker(t, td)
		cfg := agent.Config{Upstream: &direct{b: b}, Source: td.Source(payments), GRPC: l, NoFeed: true}
		change(&cfg)
		a, err := agent.New(cfg)
		must(t, err)
		if err := a.Run(t.Context()); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: the socket is left: %v", name, err)
		}
		if _, err := os.Lstat(filepath.Join(dir, "token")); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: the authorization token is left: %v", name, err)
		}
		if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("%s: the listener isn't closed: %v", name, err)
		}
		if cfg.AWS != nil {
			if _, err := cfg.AWS.Listener.Accept(); !errors.Is(err, net.ErrClosed) {
				t.Errorf("%s: the other listener isn't closed: %v", name, err)
			}
		}
		if err := a.Apply(agent.Settings{}); err == nil {
			t.Errorf("%s: changed after the end", name)
		}
	}
}

// A socket's mode and group change in place.
func TestSetAccess(t *testing.T) {
	path := filepath.Join(tempDir(t), "s")
	l, err := agent.Listen(agent.SocketConfig{Path: path})
	must(t, err)
	defer l.Close()
	group := os.Getegid()
	undo, err := agent.SetAccess(l, agent.SocketConfig{Path: path, Mode: 0o660, Group: &group})
	must(t, err)
	mode := func(want os.FileMode) {
		t.Helper()
		if info, err := os.Lstat(path); err != nil || info.Mode().Perm() != want {
			t.Errorf("mode %v, %v; want %v", info.Mode(), err, want)
		}
	}
	mode(0o660)
	must(t, undo())
	mode(0o600)
	if _, err := agent.SetAccess(l, agent.SocketConfig{Path: path, Mode: 0o666}); err == nil {
		t.Error("everybody may connect")
	}
	mode(0o600)
}
