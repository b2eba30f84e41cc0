package e2e_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/dayflyhq/dayfly/e2e/sandbox"
)

// bin is where the built commands are.
var bin string

func TestMain(m *testing.M) {
	if os.Getenv(signalCounter) != "" {
		os.Exit(countSignals())
	}
	os.Exit(testMain(m))
}

func testMain(m *testing.M) int {
	dir, err := os.MkdirTemp("", "dayfly-bin")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	bin = dir
	build := exec.Command("go", "build", "-o", dir, "../cmd/...")
	build.Stdout, build.Stderr = os.Stderr, os.Stderr
	if err := build.Run(); err != nil {
		fmt.Fprintln(os.Stderr, "building the commands:", err)
		return 1
	}
	return m.Run()
}

// newBox returns a dayfly made of the built commands, with its broker started. More
// policy data, if any, is a file of its own beside the demo's.
func newBox(t testing.TB, data ...string) *sandbox.Sandbox {
	t.Helper()
	box := makeBox(t, "")
	for i, text := range data {
		if err := os.WriteFile(filepath.Join(box.PolicyDir(), fmt.Sprintf("more%d.yaml", i)), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := box.StartBroker(t.Context()); err != nil {
		t.Fatal(err)
	}
	return box
}

// makeBox is newBox with more lines in the broker's configuration, and no broker yet.
func makeBox(t testing.TB, brokerConfig string) *sandbox.Sandbox {
	t.Helper()
	box, err := sandbox.New(sandbox.Config{
		Broker:       []string{filepath.Join(bin, "dayfly-broker")},
		Agent:        []string{filepath.Join(bin, "dayfly-agent")},
		BrokerConfig: brokerConfig,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(box.Log("broker"))
		}
		box.Close()
	})
	return box
}
