package clients_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// recipes are what each page's recipe must print, beside ending well.
var recipes = map[string][]string{
	"agent/exec.md":         {`"service":"web"`, "grant ", "told", "exit code 123", "exit code 125", "IDENTITY_LOCKED", "eyJ"},
	"agent/files.md":        {"spiffe://dayfly.test/ns/shop/payments", `"service":"web"`},
	"agent/health.md":       {`dayfly_agent_state{state="ready"} 1`, `"state":"ready"`, "exit code 4"},
	"agent/incoming.md":     {"X-Dayfly-Subject: spiffe://dayfly.test/ns/shop/payments", "PRESENTER_MISMATCH", "TOKEN_MISSING", "TOKEN_REVOKED"},
	"agent/outgoing.md":     {`"service":"orders","sub":"spiffe://dayfly.test/ns/shop/payments"`, `"service":"web"`, "PROXY_AUTHORIZATION_INVALID", "UPSTREAM_NOT_CONFIGURED", `details="CONNECT_NOT_SUPPORTED"`, "IDENTITY_LOCKED"},
	"agent/workloads.md":    {"workloads: payments, reports", `"audience":"web"`, `"audience":"orders"`, "PEER_NOT_ALLOWED", "reload_failed_since"},
	"helpers/aws.md":        {`"AccessKeyId":"ASIADEV"`, "the SDK has ASIADEV", `"Version":1`},
	"helpers/docker.md":     {`"Username":"dayfly"`, "credentials not found"},
	"helpers/gcp.md":        {`"success":true`, `"success":false`},
	"helpers/git.md":        {"username=dayfly", "a commit by payments"},
	"helpers/kubernetes.md": {`"sub":"spiffe://dayfly.test/ns/shop/payments"`},
	"helpers/systemd.md":    {"eyJ"},
}

// elsewhere are the pages whose recipe needs what isn't here, and the test that holds them.
var elsewhere = map[string]string{"agent/envoy.md": "TestEnvoyPage"}

// recipeTime bounds one recipe; it is for one that hangs.
const recipeTime = 3 * time.Minute

// TestRecipes pastes the recipe of every page of the agent and its helpers into a shell, as
// it is, with the environment that dayfly dev says to export, in a network of its own: each
// may use the ports that it likes.
func TestRecipes(t *testing.T) {
	tools := recipeTools(t)
	var pages []string
	for _, folder := range []string{"agent", "helpers"} {
		for _, page := range must(filepath.Glob("../../docs/" + folder + "/*.md"))(t) {
			pages = append(pages, folder+"/"+filepath.Base(page))
		}
	}
	for page := range recipes {
		if !slices.Contains(pages, page) {
			t.Errorf("there is no page %s any more", page)
		}
	}
	for _, page := range pages {
		if elsewhere[page] != "" {
			continue
		}
		t.Run(page, func(t *testing.T) {
			text := string(must(os.ReadFile("../../docs/" + page))(t))
			recipe := shellOf(section(text, "## With `dayfly dev`"))
			if recipe == "" || len(recipes[page]) == 0 {
				t.Fatal("the page has no recipe under \"With `dayfly dev`\", or the table above doesn't say what it prints")
			}
			out := runRecipe(t, tools, recipe)
			for _, want := range recipes[page] {
				if !strings.Contains(out, want) {
					t.Errorf("the recipe printed nothing with %q:\n%s", want, out)
				}
			}
		})
	}
}

// section returns what is below a heading, until the next of its rank.
func section(text, heading string) string {
	_, rest, _ := strings.Cut(text, "\n"+heading+"\n")
	body, _, _ := strings.Cut(rest, "\n## ")
	return body
}

var fence = regexp.MustCompile("^```(.*)$")

// shellOf returns the lines of a text that are for a shell: fenced as sh, or indented.
func shellOf(text string) string {
	var out strings.Builder
	language, inside := "", false
	for line := range strings.Lines(text) {
		if m := fence.FindStringSubmatch(strings.TrimRight(line, "\n")); m != nil {
			language, inside = m[1], !inside
			continue
		}
		code, indented := strings.CutPrefix(line, "    ")
		switch {
		case inside && language == "sh":
			out.WriteString(line)
		case !inside && indented:
			out.WriteString(code)
		}
	}
	return out.String()
}

// recipeTools makes what recipes need beside the commands, and returns a folder for PATH and
// one with Node's modules.
func recipeTools(t *testing.T) (paths struct{ bin, node string }) {
	t.Helper()
	paths.bin, paths.node = t.TempDir(), t.TempDir()
	for _, step := range []*exec.Cmd{
		exec.CommandContext(t.Context(), "go", "build", "-o", paths.bin, "./kubectl"),
		exec.CommandContext(t.Context(), "cp", "recipes/package.json", "recipes/package-lock.json", paths.node),
		exec.CommandContext(t.Context(), "npm", "ci", "--prefix", paths.node, "--ignore-scripts", "--no-audit", "--no-fund", "--no-update-notifier"),
	} {
		if out, err := step.CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", step.Args, err, out)
		}
	}
	return paths
}

// frame is what a person does around a recipe. The commands are echoed on descriptor 3.
const frame = `set -eu
ip link set lo up
dayfly dev >dev.out 2>&1 &
until grep -q '^break-glass' dev.out; do kill -0 $!; sleep 0.1; done
eval "$(grep '^  export ' dev.out)"
PATH="$TOOLS:$PATH"; unset TOOLS
mkdir work; cd work; ln -s "$NODE" node_modules
set -x
. ../recipe
`

func runRecipe(t *testing.T, tools struct{ bin, node string }, recipe string) string {
	t.Helper()
	dir := must(os.MkdirTemp("", "df"))(t) // short, for unix sockets
	defer os.RemoveAll(dir)
	if err := os.WriteFile(filepath.Join(dir, "recipe"), []byte(recipe), 0o600); err != nil {
		t.Fatal(err)
	}
	commands := must(os.Create(filepath.Join(dir, "commands")))(t)
	defer commands.Close()
	ctx, cancel := context.WithTimeout(t.Context(), recipeTime)
	defer cancel()
	run := func(namespaces uintptr) (string, error) {
		sh := exec.CommandContext(ctx, "bash", "-c", frame)
		sh.Dir, sh.ExtraFiles = dir, []*os.File{commands}
		sh.Env = append(os.Environ(), "TMPDIR="+dir, "HOME="+dir, "TOOLS="+tools.bin, "NODE="+filepath.Join(tools.node, "node_modules"), "BASH_XTRACEFD=3", "PATH="+bin+":"+os.Getenv("PATH"))
		sh.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Cloneflags: namespaces}
		if namespaces&syscall.CLONE_NEWUSER != 0 {
			sh.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{HostID: os.Geteuid(), Size: 1}}
			sh.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getegid(), Size: 1}}
		}
		out := must(os.Create(filepath.Join(dir, "printed")))(t) // no pipe: what runs on in the background has it too
		defer out.Close()
		sh.Stdout, sh.Stderr = out, out
		if err := sh.Start(); err != nil {
			return "", err
		}
		err := sh.Wait()
		end(sh.Process.Pid)
		return string(must(os.ReadFile(out.Name()))(t)), err
	}
	var out string
	var err error
	if os.Geteuid() == 0 {
		out, err = run(syscall.CLONE_NEWNET)
	}
	if os.Geteuid() != 0 || errors.Is(err, syscall.EPERM) {
		out, err = run(syscall.CLONE_NEWNET | syscall.CLONE_NEWUSER)
	}
	if err != nil {
		ran, _ := os.ReadFile(filepath.Join(dir, "commands"))
		t.Fatalf("%v\n%s\nit ran:\n%s", err, out, ran)
	}
	return out
}

// end ends what a recipe left running: first as a person does, for dev to tidy up.
func end(group int) {
	for _, signal := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		_ = syscall.Kill(-group, signal)
		for range 100 {
			if syscall.Kill(-group, 0) != nil {
				return
			}
			time.Sleep(100 * time.Millisecond)
		}
	}
	panic(fmt.Sprintf("process group %d doesn't end", group))
}
