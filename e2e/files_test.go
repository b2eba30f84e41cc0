package e2e_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/e2e/sandbox"
	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk/verify"
	"golang.org/x/sys/unix"
)

// shortFile is the life of credentials whose end a test waits for.
const shortFile = 12 * time.Second

// fileAgent writes a configuration of files in a folder of the box, and returns the
// folder and the flags of an agent that delivers there.
func fileAgent(t *testing.T, box *sandbox.Sandbox, ttl time.Duration) (dir string, flags []string) {
	t.Helper()
	dir = filepath.Join(box.Dir, "delivered")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	text := fmt.Sprintf(`
files:
  - path: %[1]s/orders.jwt
    credential: {audience: orders, ttl: %[2]s}
    on_change: {command: [/bin/sh, -c, 'env >%[1]s/env; echo $DAYFLY_CHANGE >>%[1]s/told']}
directories:
  - path: %[1]s/all
    files:
      - {name: orders.json, format: json, credential: {audience: orders, ttl: %[2]s}}
      - name: both
        format: template
        credentials: {o: {audience: orders, ttl: %[2]s}, w: {audience: web, ttl: %[2]s}}
        template: |
          orders {{ token "o" }}
          web {{ token "w" }}
`, dir, ttl)
	file := filepath.Join(box.Dir, "files.yaml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir, []string{"--config", file}
}

// untilFile waits until a file is there, or gone.
func untilFile(t *testing.T, path string, there bool) string {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for {
		content, err := os.ReadFile(path)
		switch {
		case err == nil && there:
			return string(content)
		case errors.Is(err, fs.ErrNotExist) && !there:
			return ""
		case time.Now().After(deadline):
			t.Fatalf("%s there: %v, want %v", path, err == nil, there)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// TestFiles is a program that only reads files, from the first token to the last: what it
// reads is accepted, gone when the identity is revoked, back when it is healed, and gone
// with the agent.
func TestFiles(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	box := newBox(t)
	orders := must(box.Client(ctx, sandbox.Orders, box.Info.GRPC))(t)
	service := must(box.StartService(ctx, sandbox.ServiceConfig{ID: sandbox.Orders, Audience: "orders", Feed: orders}))(t)
	alice := must(box.Client(ctx, sandbox.Alice, box.Info.GRPC))(t)
	revocations := dayflyv1.NewRevocationServiceClient(alice.Conn())
	dir, flags := fileAgent(t, box, 5*time.Minute)
	must(box.StartAgent(ctx, sandbox.Payments, flags...))(t)

	path := dir + "/orders.jwt"
	first := untilFile(t, path, true)
	if info := must(os.Lstat(path))(t); info.Mode() != 0o600 {
		t.Errorf("mode %v", info.Mode())
	}
	if answer := must(box.Call(ctx, sandbox.Payments, service, token.NewSecret(first)))(t); answer == nil {
		t.Error("no answer")
	}
	both := untilFile(t, dir+"/all/both", true)
	if !strings.HasPrefix(both, "orders eyJ") || !strings.Contains(both, "\nweb eyJ") {
		t.Error("the template's file isn't what the template says")
	}

	told := func(want string) {
		t.Helper()
		deadline := time.Now().Add(time.Minute)
		for {
			got, _ := os.ReadFile(dir + "/told")
			if string(got) == want {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("the program was told %q, want %q", got, want)
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
	told("written\n")
	number := must(revocations.Revoke(ctx, &dayflyv1.RevokeRequest{
		Selectors: []*dayflyv1.Selector{{Selector: &dayflyv1.Selector_Identity{Identity: sandbox.Payments.String()}}}, Reason: "files",
	}))(t).GetRevocation().GetPosition().GetSequence()
	untilFile(t, path, false)
	untilFile(t, dir+"/all/both", false)
	untilFile(t, dir+"/all/orders.json", false)
	told("written\nremoved\n")
	must(revocations.Lift(ctx, &dayflyv1.LiftRequest{Lock: number, Reason: "files"}))(t)
	second := untilFile(t, path, true)
	if second == first {
		t.Fatal("the revoked token came back")
	}
	must(box.Call(ctx, sandbox.Payments, service, token.NewSecret(second)))(t)
	var refused *sandbox.Refused
	if _, err := box.Call(ctx, sandbox.Payments, service, token.NewSecret(first)); !errors.As(err, &refused) || refused.Reason != string(verify.TokenRevoked) {
		t.Errorf("the revoked one: %v", err)
	}

	untilFile(t, dir+"/all/both", true)
	told("written\nremoved\nwritten\n")
	if env := string(must(os.ReadFile(dir + "/env"))(t)); strings.Contains(env, "eyJ") || !strings.Contains(env, "DAYFLY_PATH="+path+"\n") {
		t.Errorf("the command's environment: %s", env)
	}
	if err := box.StopAgent(sandbox.Payments); err != nil {
		t.Errorf("stopping: %v", err)
	}
	left := must(filepath.Glob(dir + "/*"))(t)
	if inside := must(os.ReadDir(dir + "/all"))(t); len(left) != 3 || len(inside) != 0 { // all, env, told
		t.Errorf("left: %v and %v", left, inside)
	}
	if log := box.Log("agent-payments"); strings.Contains(log, "eyJ") {
		t.Errorf("a token in the log: %s", log)
	}
}

// TestFilesBrokerAway: files outlive the broker and a killed agent for as long as their
// credentials live, and no longer; one that expired while no agent ran goes at the start,
// with no broker there to ask.
func TestFilesBrokerAway(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	box := newBox(t)
	dir, flags := fileAgent(t, box, shortFile)
	must(box.StartAgent(ctx, sandbox.Payments, flags...))(t)
	path := dir + "/orders.jwt"
	untilFile(t, path, true)
	untilFile(t, dir+"/all/both", true)
	box.KillAgent(sandbox.Payments)
	box.KillBroker()
	kept := must(os.ReadFile(path))(t)
	must(box.SpawnAgent(sandbox.Payments, flags...))(t)
	expires := must(token.Inspect(string(kept)))(t).Claims.Expires
	goneBy := func(path string) {
		untilFile(t, path, false)
		// The agent removes 2 s ahead, and a token's times are whole seconds.
		if at := time.Now(); at.Before(expires.Add(-4 * time.Second)) {
			t.Errorf("%s went %v before its credential expired", path, expires.Sub(at))
		}
	}
	goneBy(path)
	untilFile(t, dir+"/all/both", false)

	// One that died while nobody looked.
	box.KillAgent(sandbox.Payments)
	if err := os.WriteFile(path, kept, 0o600); err != nil {
		t.Fatal(err)
	}
	must(box.SpawnAgent(sandbox.Payments, flags...))(t)
	untilFile(t, path, false)

	// What isn't the agent's isn't touched: it doesn't start.
	box.KillAgent(sandbox.Payments)
	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := box.StartAgent(ctx, sandbox.Payments, flags...); err == nil || !strings.Contains(err.Error(), "that the agent didn't make") {
		t.Errorf("over another's file: %v", err)
	}
	if got := string(must(os.ReadFile(path))(t)); got != "precious" {
		t.Errorf("now it holds %q", got)
	}
}

// TestFilesFullDisk takes the room from a running agent: the file stays while its
// credential lives, the agent says so, and goes on by itself once there is room.
func TestFilesFullDisk(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	box := newBox(t)
	dir, flags := fileAgent(t, box, shortFile)
	must(box.StartAgent(ctx, sandbox.Payments, flags...))(t)
	path := dir + "/orders.jwt"
	first := untilFile(t, path, true)
	untilFile(t, dir+"/all/both", true)
	limitFiles(t, box.AgentPID(sandbox.Payments), 100)
	said := untilNotReady(t, box, path+": writing: ")
	if lives := time.Now().Before(must(token.Inspect(first))(t).Claims.Expires.Add(-4 * time.Second)); lives && !strings.Contains(said, "what is there is good until") || strings.Contains(said, "eyJ") {
		t.Errorf("the agent says %s", said)
	}
	if got, err := os.ReadFile(path); err == nil {
		must(token.Inspect(string(got)))(t) // whole
	}
	untilFile(t, path, false) // nothing new came
	if half := must(filepath.Glob(dir + "/.*"))(t); len(half) != 0 {
		t.Errorf("half a file stays: %v", half)
	}
	limitFiles(t, box.AgentPID(sandbox.Payments), unix.RLIM_INFINITY)
	if second := untilFile(t, path, true); second == first {
		t.Error("the expired one came back")
	}
	untilFile(t, dir+"/all/both", true)
}

// untilNotReady waits until the agent isn't ready for a reason, and returns all it says.
func untilNotReady(t *testing.T, box *sandbox.Sandbox, reason string) string {
	t.Helper()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", box.AgentHTTP(sandbox.Payments))
	}}}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		resp, err := client.Get("http://localhost/readyz")
		if err != nil {
			t.Fatal(err)
		}
		said, err := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if err != nil {
			t.Fatal(err)
		}
		if resp.StatusCode == http.StatusServiceUnavailable && strings.Contains(string(said), reason) {
			return string(said)
		}
		if time.Now().After(deadline) {
			t.Fatalf("the agent says %s", said)
		}
	}
}
