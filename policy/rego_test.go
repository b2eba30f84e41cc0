package policy_test

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/dayflyhq/dayfly/policy"
)

// written returns a folder with the demo policy and files on top; an empty
// content removes one.
func written(t testing.TB, files map[string]string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "policy")
	if err := policy.WriteDemo(dir); err != nil {
		t.Fatal(err)
	}
	for name, content := range files {
		put(t, dir, name, content)
	}
	return dir
}

func put(t testing.TB, dir, name, content string) {
	t.Helper()
	path := filepath.Join(dir, name)
	if content == "" {
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		return
	}
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestDefaultRegoTests(t *testing.T) {
	for name, write := range map[string]func(string) error{"default": policy.WriteDefault, "demo": policy.WriteDemo} {
		dir := filepath.Join(t.TempDir(), name)
		if err := write(dir); err != nil {
			t.Fatal(err)
		}
		if err := policy.Check(dir); err != nil {
			t.Errorf("%s: Check: %v", name, err)
		}
		var out bytes.Buffer
		results, err := policy.Test(t.Context(), dir, &out)
		if err != nil {
			t.Errorf("%s: %v\n%s", name, err, &out)
		}
		if len(results) < 10 {
			t.Errorf("%s: %d results, want the default policy's tests\n%s", name, len(results), &out)
		}
	}
}
