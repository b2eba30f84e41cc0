package deliver_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/dayflyhq/dayfly/agent/deliver"
)

// A secret is whole, for whom it is for, and removed only by whoever made it.
func TestSecret(t *testing.T) {
	path, group := filepath.Join(t.TempDir(), "secret"), os.Getgid()
	s := deliver.Secret{Path: path, Mode: 0o640, GID: &group}
	if err := s.Validate(); err != nil {
		t.Fatal(err)
	}
	first, err := s.Write("one")
	if err != nil {
		t.Fatal(err)
	}
	second, err := s.Write("two")
	if err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(path)
	if info, statErr := os.Lstat(path); err != nil || statErr != nil || string(content) != "two" || info.Mode() != 0o640 {
		t.Errorf("got %q, %v, %v, %v", content, info, err, statErr)
	}
	if err := s.Remove(first); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("another's file was removed: %v", err)
	}
	if err := s.Remove(second); err != nil {
		t.Error(err)
	}
	if left, _ := os.ReadDir(filepath.Dir(path)); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
	if err := os.Chmod(filepath.Dir(path), 0o777); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Write("three"); err == nil {
		t.Error("written to a folder that all may write to")
	}
}
