package agent_test

import (
	"bytes"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/agent"
	"github.com/dayflyhq/dayfly/agent/deliver"
	"google.golang.org/grpc/codes"
)

// load does what systemd does for LoadCredential=NAME:SOCKET: it binds an abstract address
// that says who it loads for, connects, and reads to the end.
func load(t *testing.T, socket, from string) string {
	t.Helper()
	var local *net.UnixAddr
	if from != "" {
		local = &net.UnixAddr{Net: "unix", Name: from}
	}
	conn, err := net.DialUnix("unix", local, &net.UnixAddr{Net: "unix", Name: socket})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := conn.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if err := conn.SetReadDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(conn)
	if err != nil {
		t.Fatal(err)
	}
	return string(got)
}

// lines is a log that many write.
type lines struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// A unit loads what is named for it and nothing else, by the word of whom the list names.
func TestSystemd(t *testing.T) {
	noLeaks(t)
	b := newBroker(t, newDomain(t))
	uid := uint32(os.Getuid())
	begin := func(uids ...uint32) (*fixture, string, *lines) {
		socket, log := filepath.Join(tempDir(t), "systemd.sock"), new(lines)
		f := start(t, b.td, b, func(c *agent.Config) {
			l, err := agent.Listen(agent.SocketConfig{Path: socket})
			if err != nil {
				t.Fatal(err)
			}
			c.Log = slog.New(slog.NewJSONHandler(log, nil))
			c.Systemd = &agent.Systemd{Listener: l, UIDs: uids, Credentials: []agent.UnitCredential{
				{Unit: "payments.service", Name: "orders-token", Request: agent.Request{Audience: "orders"}},
				{Unit: "payments@1.service", Name: "orders-token", Request: agent.Request{Audience: "orders"}},
			}}
		})
		f.ready()
		return f, socket, log
	}
	f, socket, log := begin(uid)
	for _, unit := range []string{"payments.service", "payments@1.service"} {
		if got := load(t, socket, "@1b3d9f0a2c4e6875/unit/"+unit+"/orders-token"); !strings.HasPrefix(got, "eyJ") || strings.ContainsAny(got, "\n ") {
			t.Errorf("%s loaded %q", unit, got)
		}
	}
	for _, from := range []string{
		"", // who doesn't say who they are
		"@1b3d9f0a2c4e6875/unit/ledger.service/orders-token",
		"@1b3d9f0a2c4e6876/unit/payments.service/ledger-token",
		"@1b3d9f0a2c4e6877/unit/payments@2.service/orders-token",
		"@1b3d9f0a2c4e6878/unit/x/unit/payments.service/orders-token",
		"@1b3d9f0a2c4e6879/unit/payments.service/orders-token/",
		filepath.Join(tempDir(t), "unit"), // a path is nobody's word
	} {
		if got := load(t, socket, from); got != "" {
			t.Errorf("%q loaded %q", from, got)
		}
	}
	b.set(func(b *broker) { b.refuse = refusal(codes.PermissionDenied, "POLICY_DENIED", "no") })
	f.stop()
	if text := log.String(); !strings.Contains(text, `"unit":"ledger.service"`) || !strings.Contains(text, "UNIT_NOT_ALLOWED") || strings.Contains(text, "eyJ") {
		t.Errorf("the log: %s", text)
	}
	_, socket, log = begin(uid + 1)
	if got := load(t, socket, "@2b3d9f0a2c4e6875/unit/payments.service/orders-token"); got != "" {
		t.Errorf("another user loaded %q", got)
	}
	_, socket, _ = begin(uid) // the broker refuses now
	if got := load(t, socket, "@3b3d9f0a2c4e6875/unit/payments.service/orders-token"); got != "" {
		t.Errorf("a refused unit loaded %q", got)
	}
	eventually(t, "the log to say why", func() error {
		if !strings.Contains(log.String(), "may not use this socket") {
			return io.EOF
		}
		return nil
	})
}

func TestHelperConfigRefused(t *testing.T) {
	l, err := net.Listen("tcp", "0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, err = agent.New(agent.Config{
		AWS: &agent.AWSContainer{Listener: l, TokenFile: deliver.Secret{Path: "authorization"}},
		Systemd: &agent.Systemd{Credentials: []agent.UnitCredential{
			{Unit: "payments", Name: "a", Request: agent.Request{Audience: "orders"}}, {Unit: "p.service", Name: "a/b", Request: agent.Request{Audience: "orders"}},
			{Unit: "q.service", Name: "a"}, {Unit: "q.service", Name: "a", Request: agent.Request{Audience: "orders"}},
		}},
	})
	for _, want := range []string{"audience", "must be on loopback", "must be absolute", "credential 1: unit: the whole name", "credential 2: credential:", "credential 3: audience", "credential 4: is given twice"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("the error lacks %q: %v", want, err)
		}
	}
}

func FuzzSystemdPeer(f *testing.F) {
	for _, seed := range []string{"@adf9d86b6eda275e/unit/foobar.service/credx", "@/unit//", "/run/unit/x", "", "@x/unit/a/unit/b/c", "@x/unit/a.service/b\x00"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, address string) {
		unit, name, ok := agent.ParseUnit(address)
		if !ok {
			return
		}
		random, found := strings.CutSuffix(address, "/unit/"+unit+"/"+name)
		if !found || !strings.HasPrefix(random, "@") || strings.Contains(random+unit[1:]+name, "/") || unit == "" || name == "" {
			t.Fatalf("%q: %q %q", address, unit, name)
		}
	})
}
