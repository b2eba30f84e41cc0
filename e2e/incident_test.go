package e2e_test

import (
	"context"
	"flag"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"
)

var updatePage = flag.Bool("update-incident", false, "write what the commands of docs/incident.md print into the page")

// A pageStep is a command of the page and what it printed, or something that the page has
// its reader do otherwise.
type pageStep struct {
	command string
	want    string
	call    int // so often is the service web called with leaked.jwt instead
	line    int // of the page, from 0
}

var callWeb = regexp.MustCompile(`^<!-- test: call web (\d+) -->$`)

// pageSteps reads the blocks of console.
func pageSteps(lines []string) (steps []pageStep) {
	inside := false
	for i, line := range lines {
		command, isCommand := strings.CutPrefix(line, "$ ")
		switch m := callWeb.FindStringSubmatch(line); {
		case m != nil:
			n, _ := strconv.Atoi(m[1])
			steps = append(steps, pageStep{call: n, line: i})
		case strings.HasPrefix(line, "```"):
			inside = line == "```console"
		case inside && isCommand:
			steps = append(steps, pageStep{command: command, line: i})
		case inside:
			steps[len(steps)-1].want += line + "\n"
		}
	}
	return steps
}

// differs are what is another in every run, and what it reads as.
var differs = []struct {
	what *regexp.Regexp
	as   string
}{
	{regexp.MustCompile(` +`), " "},
	{regexp.MustCompile(` +\n`), "\n"},
	{regexp.MustCompile(`\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ`), "TIME"},
	{regexp.MustCompile(`\b(after|in|ago) [\dmsh.]+\b`), "$1 SPAN"},
	{regexp.MustCompile(`\b[A-Z2-7]{26}\b`), "INSTANCE"},
	{regexp.MustCompile(`\b[0-9a-f]{64}\b`), "HASH"},
	{regexp.MustCompile(`\b[0-9a-f]{32}\b`), "SVID"},
	{regexp.MustCompile(`(^|[\s:])[A-Za-z0-9_-]{24}(\s|$)`), "${1}GRANT$2"},
	{regexp.MustCompile(`(^|\s)[A-Za-z0-9_-]{16}(\s|$)`), "${1}TRANSACTION$2"},
	{regexp.MustCompile(`\b(KEY|key) +[A-Za-z0-9_-]{8}(\s)`), "$1 KID$2"},
	{regexp.MustCompile(`(GRANT )[A-Za-z0-9_-]{8}( SVID)`), "${1}KID$2"},
	{regexp.MustCompile(`\b[Ee]ra( +)[0-9a-f]{8}\b`), "era ERA"},
	{regexp.MustCompile(`uid=\d+`), "uid=0"},
	{regexp.MustCompile(`127\.0\.0\.1:\d+`), "ADDRESS"},
	{regexp.MustCompile(` Slowest: \S+\.`), ""}, // all of them take about as long
}

// whenever is what a slow verifier changes in the answer of a revoke.
var whenever = []struct {
	what *regexp.Regexp
	as   string
}{
	{regexp.MustCompile(`\d confirmed, \d closed, \d pending`), "SOME"},
	{regexp.MustCompile(`(?m)^(confirmed|pending|closed) (.*?) (TIME|closes by TIME if it stays silent|refuses everything since TIME)$`), "STATE $2 WHEN"},
}

func comparable(s string, revoke bool) string {
	for _, d := range differs {
		s = d.what.ReplaceAllString(s, d.as)
	}
	if revoke {
		for _, d := range whenever {
			s = d.what.ReplaceAllString(s, d.as)
		}
	}
	return strings.TrimSpace(s)
}

// TestIncidentPage runs the commands of the page for an emergency against dayfly dev, in
// their order, and wants the answers that the page shows. With -update-incident it writes
// the answers into the page.
func TestIncidentPage(t *testing.T) {
	const page = "../docs/incident.md"
	tmp := shortTemp(t)
	ctx, stop := context.WithTimeout(t.Context(), 5*time.Minute)
	defer stop()
	dev, printed, env := startDev(ctx, t, tmp)
	defer dev.Wait()
	defer stop()
	url := regexp.MustCompile(`WEB=(http://127\.0\.0\.1:\d+)`).FindStringSubmatch(printed)
	if url == nil {
		t.Fatalf("dev doesn't say where web is:\n%s", printed)
	}
	work := t.TempDir()
	lines := strings.Split(string(must(os.ReadFile(page))(t)), "\n")
	steps := pageSteps(lines)
	if len(steps) < 20 {
		t.Fatalf("only %d steps on the page", len(steps))
	}
	code := 0
	run := func(s *pageStep) string {
		t.Helper()
		sh := exec.CommandContext(ctx, "sh", "-c", fmt.Sprintf("(exit %d)\n%s", code, s.command))
		sh.Env, sh.Dir = env, work
		out, err := sh.CombinedOutput()
		if sh.ProcessState == nil {
			t.Fatal(err)
		}
		code = sh.ProcessState.ExitCode()
		return string(out)
	}
	for i := range steps {
		s := &steps[i]
		if s.call > 0 {
			for range s.call {
				call(ctx, t, url[1], filepath.Join(work, "leaked.jwt"))
			}
			continue
		}
		revoke := strings.Contains(s.command, "dayfly revoke") && !strings.Contains(s.command, "--dry-run")
		before, got := code, run(s)
		if *updatePage {
			if !revoke && strings.Contains(s.command, "dayfly ") && !strings.Contains(s.command, "lift") {
				time.Sleep(3 * time.Second) // for what verifiers report in their own time
				code = before
				got = run(s)
			}
			s.want = got
			continue
		}
		deadline := time.Now().Add(time.Minute)
		slow := revoke && strings.Contains(s.command, "--wait") && code == 0
		for slow || comparable(got, revoke) != comparable(s.want, revoke) {
			if slow { // it took longer than the page waits: contained by then
				code = 3
				break
			}
			// What only looks may have looked too early.
			if revoke || strings.Contains(s.command, "lift") || strings.HasPrefix(s.command, "echo") || time.Now().After(deadline) {
				t.Fatalf("%s:%d: %s\nprints\n%s\n\nas\n%s\n\nwant\n%s", page, s.line+1, s.command, got, comparable(got, revoke), comparable(s.want, revoke))
			}
			time.Sleep(200 * time.Millisecond)
			code = before
			got = run(s)
		}
	}
	if *updatePage {
		rewrite(t, page, lines, steps)
	}
}

// call shows a token to the service web, whatever comes of it.
func call(ctx context.Context, t *testing.T, url, file string) {
	t.Helper()
	req := must(http.NewRequestWithContext(ctx, http.MethodGet, url, nil))(t)
	req.Header.Set("Authorization", "Bearer "+strings.TrimSpace(string(must(os.ReadFile(file))(t))))
	resp := must(http.DefaultClient.Do(req))(t)
	resp.Body.Close()
}

// rewrite puts answers in the place of those on the page.
func rewrite(t *testing.T, page string, lines []string, steps []pageStep) {
	t.Helper()
	answers := map[int]string{}
	for _, s := range steps {
		answers[s.line] = s.want
	}
	var out []string
	inside := false
	for i, line := range lines {
		isFence := strings.HasPrefix(line, "```")
		if isFence {
			inside = line == "```console"
		}
		if inside && !isFence && !strings.HasPrefix(line, "$ ") {
			continue // an old answer
		}
		out = append(out, line)
		if answer := strings.TrimRight(answers[i], "\n"); answer != "" {
			out = append(out, strings.Split(answer, "\n")...)
		}
	}
	if err := os.WriteFile(page, []byte(strings.Join(out, "\n")), 0o600); err != nil {
		t.Fatal(err)
	}
}
