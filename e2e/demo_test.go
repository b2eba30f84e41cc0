package e2e_test

import (
	"bufio"
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// TestDemo runs what a newcomer runs first: every observation must be right, and
// nothing may be left behind.
func TestDemo(t *testing.T) {
	tmp := shortTemp(t)
	cmd := exec.CommandContext(t.Context(), filepath.Join(bin, "dayfly"), "demo")
	cmd.Env = append(os.Environ(), "TMPDIR="+tmp)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if n := strings.Count(string(out), "   ok "); n < 20 || strings.Contains(string(out), "WRONG") {
		t.Errorf("%d observations, at least 20 wanted and none wrong:\n%s", n, out)
	}
	wantEmpty(t, tmp)
}

var exported = regexp.MustCompile(`(?m)^  export ([A-Z_]+)="?([^\s"]+)`)

// startDev runs dayfly dev until ctx ends, and returns what it printed and the environment
// that it has one export.
func startDev(ctx context.Context, t *testing.T, tmp string) (*exec.Cmd, string, []string) {
	t.Helper()
	dev := exec.CommandContext(ctx, filepath.Join(bin, "dayfly"), "dev")
	dev.Cancel = func() error { return dev.Process.Signal(os.Interrupt) }
	dev.Env = append(os.Environ(), "TMPDIR="+tmp)
	stdout := must(dev.StdoutPipe())(t)
	if err := dev.Start(); err != nil {
		t.Fatal(err)
	}
	var printed strings.Builder
	for lines := bufio.NewScanner(stdout); lines.Scan(); {
		printed.WriteString(lines.Text() + "\n")
		if strings.HasPrefix(lines.Text(), "break-glass") {
			break
		}
	}
	env := os.Environ()
	for _, m := range exported.FindAllStringSubmatch(printed.String(), -1) {
		env = append(env, m[1]+"="+os.Expand(m[2], os.Getenv))
	}
	return dev, printed.String(), env
}

// TestDevCommandsWork pastes every dayfly command that dev prints into a shell, and asks
// the agent over HTTP as its curl does; what curl is to ask the issuer, it asks.
func TestDevCommandsWork(t *testing.T) {
	tmp := shortTemp(t)
	ctx, stop := context.WithTimeout(t.Context(), 2*time.Minute)
	defer stop()
	dev, printed, env := startDev(ctx, t, tmp)
	m := regexp.MustCompile(`(?m)^  curl --unix-socket (\S+) '(\S+)'$`).FindStringSubmatch(printed)
	if m == nil {
		t.Fatalf("nothing for curl over the agent's socket in:\n%s", printed)
	}
	web := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", m[1])
	}}}
	resp, err := web.Get(m[2])
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(resp.Body)
	if resp.Body.Close(); err != nil {
		t.Fatal(err)
	}
	if resp.StatusCode != http.StatusOK {
		t.Errorf("GET %s over the agent's socket: %s %s", m[2], resp.Status, body)
	}
	checkDevCurls(t, ctx, printed, env)
	checkRevokeCurl(t, ctx, env)
	ran := 0
	for line := range strings.Lines(printed) {
		command, ok := strings.CutPrefix(line, "  dayfly ")
		if !ok || strings.Contains(command, "curl") {
			continue
		}
		// The number that revoke printed is one more: curl has given a token back.
		command = strings.Replace(command, "lift 3 ", "lift 4 ", 1)
		sh := exec.CommandContext(ctx, "sh", "-c", "dayfly "+command)
		sh.Env = env
		if out, err := sh.CombinedOutput(); err != nil {
			t.Errorf("dayfly %s%v\n%s", command, err, out)
		}
		ran++
	}
	if ran < 8 {
		t.Errorf("only %d commands in:\n%s", ran, printed)
	}
	stop()
	dev.Wait() // its error is that we stopped it; the exit code is dev's own
	if code := dev.ProcessState.ExitCode(); code != 0 {
		t.Errorf("dev ended with exit code %d after Ctrl-C", code)
	}
	wantEmpty(t, tmp)
}

// What commands for curl over HTTPS begin with, and what one has that gives a token back.
const begin, revokes = "curl -s --cacert $DAYFLY_WEB_CA ", "$DAYFLY_ISSUER/revoke "

// checkRevokeCurl pastes the command of the documents that gives a token back.
func checkRevokeCurl(t *testing.T, ctx context.Context, env []string) {
	t.Helper()
	page := strings.ReplaceAll(string(must(os.ReadFile("../docs/oauth.md"))(t)), "\\\n", "")
	for line := range strings.Lines(page) {
		command := strings.TrimSpace(line)
		if !strings.HasPrefix(command, begin) || !strings.Contains(command, revokes) {
			continue
		}
		sh := exec.CommandContext(ctx, "sh", "-c", command+" -w '%{http_code}'")
		sh.Env = env
		out, err := sh.CombinedOutput()
		if err != nil || string(out) != "200" {
			t.Errorf("%s: %v\n%s", command, err, out)
		}
		list := exec.CommandContext(ctx, "sh", "-c", "dayfly revocations list --given-back | grep 'given back'")
		list.Env = env
		if out, err := list.CombinedOutput(); err != nil {
			t.Errorf("nothing was given back: %v\n%s", err, out)
		}
		return
	}
	t.Error("no command gives a token back")
}

// checkDevCurls pastes every command for curl over HTTPS into a shell: those that dev
// prints, and those of the documents. Each must be answered with what it asks for.
func checkDevCurls(t *testing.T, ctx context.Context, printed string, env []string) {
	t.Helper()
	pages := must(filepath.Glob("../docs/*.md"))(t)
	texts := map[string]string{"dayfly dev": printed}
	for _, page := range pages {
		texts[page] = strings.ReplaceAll(string(must(os.ReadFile(page))(t)), "\\\n", "")
	}
	ran := map[string]int{}
	for where, text := range texts {
		for line := range strings.Lines(text) {
			command := strings.TrimSpace(line)
			if !strings.HasPrefix(command, begin) || strings.Contains(command, revokes) {
				continue
			}
			sh := exec.CommandContext(ctx, "sh", "-c", command)
			sh.Env = env
			out, err := sh.Output()
			var answer map[string]any
			if err == nil {
				err = json.Unmarshal(out, &answer)
			}
			if asksToken := strings.Contains(command, "$DAYFLY_ISSUER/token "); err != nil || answer["error"] != nil || answer["code"] != nil || asksToken && answer["access_token"] == nil ||
				strings.Contains(command, "$DAYFLY_ISSUER/introspect ") && answer["active"] != true {
				t.Errorf("%s: %s: %v\n%s", where, command, err, out)
			}
			ran[where]++
		}
	}
	if ran["dayfly dev"] < 6 || ran["../docs/oauth.md"] < 7 {
		t.Errorf("curl was run %v times", ran)
	}
}

// shortTemp is a temporary folder whose path leaves room for unix sockets.
func shortTemp(t *testing.T) string {
	t.Helper()
	dir := must(os.MkdirTemp("", "df"))(t)
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func wantEmpty(t *testing.T, dir string) {
	t.Helper()
	for _, e := range must(os.ReadDir(dir))(t) {
		t.Errorf("left behind: %s", e.Name())
	}
}
