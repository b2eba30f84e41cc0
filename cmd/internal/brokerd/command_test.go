package brokerd_test

import (
	"bytes"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dayflyhq/dayfly/cmd/internal/brokerd"
	"github.com/dayflyhq/dayfly/cmd/internal/config"
)

func execute(t *testing.T, args ...string) (string, error) {
	t.Helper()
	cmd := brokerd.Command("dayfly-broker")
	var out bytes.Buffer
	cmd.SetArgs(args)
	cmd.SetOut(&out)
	cmd.SetErr(io.Discard)
	err := config.Execute(t.Context(), cmd)
	return out.String(), err
}

func writeFile(t *testing.T, name, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// 2 is a command line or a configuration that is wrong, 1 is everything else, and
// serve and check read a configuration alike.
func TestExitCodes(t *testing.T) {
	t.Setenv("SPIFFE_ENDPOINT_SOCKET", "")
	good := writeFile(t, "b.yaml", minimal)
	bad := writeFile(t, "b.yaml", strings.Replace(minimal, "https:", "http:", 1)+"  admin: :9090\nmax_ttl: 2h\n")
	complete := writeFile(t, "b.yaml", minimal+"workload_api: unix:///nobody.sock\n")
	nowhere := filepath.Join(t.TempDir(), "nothing")
	problems := []string{":1: issuer: ", ":7: listen.admin: ", ":8: max_ttl: "}
	for name, c := range map[string]struct {
		args []string
		code int
		want []string
	}{
		"an unknown verb":              {[]string{"sever"}, 2, []string{"sever"}},
		"an unknown flag":              {[]string{"serve", "--confg", "x"}, 2, []string{"confg"}},
		"a flag without its value":     {[]string{"serve", "--config"}, 2, []string{"config"}},
		"an argument too many":         {[]string{"serve", "x"}, 2, []string{"x"}},
		"init without a store":         {[]string{"init"}, 2, []string{"name the file of the store"}},
		"check of nothing":             {[]string{"check"}, 2, []string{"name a store"}},
		"an unknown output":            {[]string{"check", "-o", "xml", nowhere}, 2, []string{"xml"}},
		"serve, no file":               {[]string{"serve", "-c", nowhere}, 2, []string{"there is no file"}},
		"check, no file":               {[]string{"check", "-c", nowhere}, 2, []string{"there is no file"}},
		"serve, a bad file":            {[]string{"serve", "-c", bad}, 2, problems},
		"check, a bad file":            {[]string{"check", "-c", bad}, 2, problems},
		"serve without a Workload API": {[]string{"serve", "-c", good}, 2, []string{"SPIFFE_ENDPOINT_SOCKET"}},
		"check, a good file":           {[]string{"check", "-c", good}, 0, nil},
		"serve, no store":              {[]string{"serve", "-c", complete}, 1, []string{"/s"}},
		"check, no store":              {[]string{"check", nowhere}, 1, []string{nowhere}},
		"backup to nowhere":            {[]string{"backup"}, 2, []string{"--to FILE is missing"}},
		"backup, an unknown output":    {[]string{"backup", "--to", "x", "-o", "xml"}, 2, []string{`not "xml"`}},
		"restore of nothing":           {[]string{"restore", "--store", "x"}, 2, []string{"--from BACKUP is missing"}},
		"restore to nowhere":           {[]string{"restore", "--from", "x"}, 2, []string{"--store PATH is missing"}},
		"restore of a missing backup":  {[]string{"restore", "--from", nowhere, "--store", nowhere + "2"}, 1, []string{"--from: there is no file " + nowhere, "hint: name a backup"}},
	} {
		t.Run(name, func(t *testing.T) {
			out, err := execute(t, c.args...)
			if got := config.ExitCode(err); got != c.code {
				t.Errorf("exit code %d, want %d: %v", got, c.code, err)
			}
			if c.code == 0 && out != good+" is good\n" {
				t.Errorf("it prints %q", out)
			}
			if err != nil && strings.Contains(err.Error(), "init") && strings.HasPrefix(name, "restore") {
				t.Errorf("a restore leads to an empty store: %v", err)
			}
			for _, want := range c.want {
				if err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("the error lacks %q:\n%v", want, err)
				}
			}
		})
	}
}

// A check ends with its verdict, and JSON tells positions as everything else does.
func TestCheckGivesItsVerdict(t *testing.T) {
	store := filepath.Join(t.TempDir(), "s.db")
	if _, err := execute(t, "init", store); err != nil {
		t.Fatal(err)
	}
	out, err := execute(t, "check", store)
	if err != nil || !strings.HasSuffix(out, "\nverdict       good\n") {
		t.Errorf("%v:\n%s", err, out)
	}
	out, err = execute(t, "check", "-o", "json", store)
	var said struct {
		Good bool   `json:"good"`
		Head string `json:"head"`
	}
	if err := json.Unmarshal([]byte(out), &said); err != nil {
		t.Fatal(err)
	}
	if parts := strings.Split(said.Head, "/"); err != nil || !said.Good || len(parts) != 3 || parts[1] != "1" || len(parts[2]) != 64 {
		t.Errorf("%v: %+v", err, said)
	}

	// What is wrong is said, and no file is both.
	raw, err := os.ReadFile(store)
	if err != nil {
		t.Fatal(err)
	}
	i := bytes.LastIndex(raw, []byte("dayfly-broker init"))
	if i < 0 {
		t.Fatal("the store doesn't say who made it")
	}
	raw[i] = 'D'
	if err := os.WriteFile(store, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err = execute(t, "check", store); err == nil || !strings.Contains(out, "\nverdict       NOT good") {
		t.Errorf("a record was altered: %v:\n%s", err, out)
	}
}
