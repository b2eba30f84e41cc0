package agent_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/dayflyhq/dayfly/agent"
	"github.com/dayflyhq/dayfly/agent/deliver"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk"
	"google.golang.org/grpc/codes"
)

func fileTarget(path string, ttl time.Duration) deliver.Target {
	return deliver.Target{Path: path, Files: []deliver.File{{Format: deliver.Token, Credentials: map[string]sdk.Request{"orders": {Audience: "orders", TTL: ttl}}}}}
}

// untilFile waits for a file that isn't the one before, or, for "", for none.
func untilFile(t *testing.T, path, before string, there bool) string {
	t.Helper()
	var got []byte
	eventually(t, "the file", func() error {
		var err error
		got, err = os.ReadFile(path)
		switch {
		case there && err == nil && string(got) != before:
			return nil
		case !there && errors.Is(err, fs.ErrNotExist):
			return nil
		}
		return fmt.Errorf("there: %v", err == nil)
	})
	return string(got)
}

// A file follows the feed: one that is revoked goes, and what is issued instead comes;
// nobody who only reads it finds the dead one for longer. Readiness and metrics say how it is.
func TestFilesFollowTheFeed(t *testing.T) {
	noLeaks(t)
	td := newDomain(t)
	b := newBroker(t, td)
	path := filepath.Join(tempDir(t), "orders.jwt")
	f := start(t, td, b, func(c *agent.Config) { c.Files = []deliver.Target{fileTarget(path, 0)} })
	f.ready()
	first := untilFile(t, path, "", true)
	parsed, err := token.Inspect(first)
	if err != nil {
		t.Fatal(err)
	}
	if c := f.issue(f.client(), sdk.Request{Audience: "orders"}); c.Token.Reveal() != first {
		t.Error("the file holds another credential than the sockets give")
	}
	b.revoke(revocation.Grant(parsed.Claims.Grant()))
	untilFile(t, path, first, true)
	b.set(func(b *broker) { b.refuse = refusal(codes.PermissionDenied, "IDENTITY_LOCKED", "locked") })
	b.revoke(revocation.Identity(payments))
	untilFile(t, path, "", false)
	if code, body, _ := f.get("/readyz"); code != 503 || !strings.Contains(fmt.Sprint(body), path+": waits for its credentials") {
		t.Errorf("readyz: %d %v", code, body)
	}
	b.set(func(b *broker) { b.refuse = nil })
	untilFile(t, path, "", true)
	f.ready()
	f.stop()
	untilFile(t, path, "", false)
}

// What is bound to a certificate goes with it.
func TestFileFollowsRotation(t *testing.T) {
	noLeaks(t)
	td := newDomain(t)
	b := newBroker(t, td)
	b.set(func(b *broker) { b.binding = token.BindingX5T })
	path := filepath.Join(tempDir(t), "orders.jwt")
	f := start(t, td, b, func(c *agent.Config) { c.Files = []deliver.Target{fileTarget(path, 0)} })
	f.ready()
	first := untilFile(t, path, "", true)
	if err := td.Rotate(payments); err != nil {
		t.Fatal(err)
	}
	untilFile(t, path, first, true)
}

// Over two hours of renewals, and an outage that outlasts a credential, on a clock that
// runs by itself: whatever is read is alive, and there is something to read until the
// last two seconds.
func TestFilesRenewedAhead(t *testing.T) {
	dir := tempDir(t)
	synctest.Test(t, func(t *testing.T) {
		td := newDomain(t)
		d := &direct{b: unservedBroker(t, td)}
		path := filepath.Join(dir, "orders.jwt")
		bubble(t, d, func(c *agent.Config) { c.Files = []deliver.Target{fileTarget(path, 0)} })
		read := func() *token.Claims {
			synctest.Wait()
			content, err := os.ReadFile(path)
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			parsed, err := token.Inspect(string(content))
			if err != nil || !time.Now().Before(parsed.Claims.Expires) {
				t.Fatalf("torn or expired: %v", err)
			}
			return &parsed.Claims
		}
		seen := map[token.GrantID]bool{}
		for range 2 * 60 * 60 {
			time.Sleep(time.Second)
			c := read()
			if c == nil {
				t.Fatal("no file")
			}
			if seen[c.Grant()] = true; time.Until(c.Expires) < time.Minute {
				t.Fatalf("not renewed with %v left", time.Until(c.Expires))
			}
		}
		if len(seen) < 30 {
			t.Errorf("%d credentials in two hours", len(seen))
		}
		d.b.set(func(b *broker) { b.refuse = refusal(codes.Unavailable, "", "away") })
		last := read()
		for {
			time.Sleep(100 * time.Millisecond)
			c := read()
			if c == nil {
				break
			}
			last = c
		}
		if left := time.Until(last.Expires); left < 0 || left > 3*time.Second {
			t.Errorf("it went with %v left", left)
		}
		d.b.set(func(b *broker) { b.refuse = nil })
		time.Sleep(time.Minute)
		if read() == nil {
			t.Error("not back")
		}
	})
}

// A machine that slept, or whose clock was set: no timer has run out, and the file goes at
// the next look.
func TestFilesAfterSleep(t *testing.T) {
	noLeaks(t)
	td := newDomain(t)
	b := newBroker(t, td)
	path := filepath.Join(tempDir(t), "orders.jwt")
	var slept atomic.Int64
	start(t, td, b, func(c *agent.Config) {
		c.Files = []deliver.Target{fileTarget(path, 0)}
		c.Now = func() time.Time { return time.Now().Round(0).Add(time.Duration(slept.Load())) }
	})
	untilFile(t, path, "", true)
	b.set(func(b *broker) { b.refuse = refusal(codes.Unavailable, "", "away") })
	slept.Store(int64(10 * time.Minute))
	untilFile(t, path, "", false)
}

// A place that others can write to, or that holds somebody's file, ends the start.
func TestFilesRefused(t *testing.T) {
	td := newDomain(t)
	b := unservedBroker(t, td)
	dir := tempDir(t)
	if err := os.WriteFile(filepath.Join(dir, "mine"), []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "g.sock")
	l, err := agent.Listen(agent.SocketConfig{Path: socket})
	if err != nil {
		t.Fatal(err)
	}
	cfg := agent.Config{Upstream: &direct{b: b}, Source: td.Source(payments), GRPC: l, NoFeed: true, Files: []deliver.Target{fileTarget(filepath.Join(dir, "mine"), 0)}}
	a, err := agent.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := a.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "didn't make") {
		t.Errorf("got %v", err)
	}
	if _, err := os.Lstat(socket); !errors.Is(err, fs.ErrNotExist) {
		t.Error("its socket stays")
	}
	cfg.Files = []deliver.Target{fileTarget("relative", time.Second)}
	if _, err := agent.New(cfg); err == nil || !strings.Contains(err.Error(), "path: must be absolute") || !strings.Contains(err.Error(), "at least 10s") {
		t.Errorf("got %v", err)
	}
}
