package e2e_test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestExitCodes: a wrong command line or configuration is exit code 2 for all three
// commands, and every bad value of a file is named with its line.
func TestExitCodes(t *testing.T) {
	file := func(content string) string {
		path := filepath.Join(t.TempDir(), "c.yaml")
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	broker := file("issuer: http://broker.example.org\nstore: /s\npolicy: /p\naudit: '-'\nlisten:\n  grpc: :0\n  admin: :9090\n")
	agent := file("broker:\n  address: broker\nsockets:\n  grpc: x\n")
	for name, c := range map[string]struct {
		args []string
		code int
		want []string
	}{
		"broker, bad file":  {[]string{"dayfly-broker", "serve", "-c", broker}, 2, []string{":1: issuer: ", ":7: listen.admin: "}},
		"broker, check it":  {[]string{"dayfly-broker", "check", "-c", broker}, 2, []string{":1: issuer: ", ":7: listen.admin: "}},
		"broker, bad flag":  {[]string{"dayfly-broker", "serve", "--x"}, 2, []string{"--x"}},
		"broker, no store":  {[]string{"dayfly-broker", "check", "/nonexistent/store"}, 1, []string{"/nonexistent/store"}},
		"agent, bad file":   {[]string{"dayfly-agent", "-c", agent}, 2, []string{":2: broker.address: ", ":4: sockets.grpc: "}},
		"agent, bad flag":   {[]string{"dayfly-agent", "--x"}, 2, []string{"--x"}},
		"agent, nothing":    {[]string{"dayfly-agent"}, 2, []string{"broker.address", "broker.id", "sockets"}},
		"agent, no folder":  {[]string{"dayfly-agent", "--broker", "127.0.0.1:1", "--broker-id", "spiffe://td/b", "--workload-api", "unix:///x", "--grpc-socket", "/nonexistent/a.sock"}, 1, []string{"/nonexistent"}},
		"dayfly, bad flag":  {[]string{"dayfly", "locks", "--x"}, 2, []string{"--x"}},
		"dayfly, no broker": {[]string{"dayfly", "locks"}, 2, []string{"no broker is named"}},
		"dayfly's broker":   {[]string{"dayfly", "internal-broker", "serve", "-c", broker}, 2, []string{":1: issuer: "}},
		"dayfly's agent":    {[]string{"dayfly", "internal-agent", "-c", agent}, 2, []string{":2: broker.address: "}},
	} {
		t.Run(name, func(t *testing.T) {
			cmd := exec.CommandContext(t.Context(), filepath.Join(bin, c.args[0]), c.args[1:]...)
			cmd.Env = []string{}
			// dayfly's own daemons take the end of their input for that of their parent.
			lifeline, err := cmd.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			defer lifeline.Close()
			out, err := cmd.CombinedOutput()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.ExitCode() != c.code {
				t.Errorf("%v, want exit code %d:\n%s", err, c.code, out)
			}
			for _, want := range c.want {
				if !strings.Contains(string(out), want) {
					t.Errorf("it doesn't say %q:\n%s", want, out)
				}
			}
		})
	}
}
