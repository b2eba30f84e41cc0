//go:build unix

package deliver

import (
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// Who may write a PID file can't have the agent signal what he couldn't signal himself, nor
// keep it waiting.
func TestPIDFileOfOthers(t *testing.T) {
	child := exec.Command("/bin/cat")
	stdin, err := child.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	defer child.Wait()
	defer stdin.Close()
	number := []byte(strconv.Itoa(child.Process.Pid))
	for name, c := range map[string]struct {
		make func(dir, path string) error
		want string // "" for a signal
	}{
		"a plain file": {func(_, path string) error { return os.WriteFile(path, number, 0o600) }, ""},
		"a pipe":       {func(_, path string) error { return syscall.Mkfifo(path, 0o600) }, "no plain file"},
		"a link": {func(dir, path string) error {
			if err := os.WriteFile(dir+"/other", number, 0o600); err != nil {
				return err
			}
			return os.Symlink("other", path)
		}, "symbolic links"},
		"a folder for all": {func(dir, path string) error {
			if err := os.WriteFile(path, number, 0o600); err != nil {
				return err
			}
			return os.Chmod(dir, 0o777)
		}, "others may write to the folder"},
	} {
		dir, err := filepath.EvalSymlinks(t.TempDir())
		if err == nil {
			err = os.Chmod(dir, 0o700)
		}
		path := filepath.Join(dir, "pid")
		if err == nil {
			err = c.make(dir, path)
		}
		if err != nil {
			t.Fatal(err)
		}
		change := Change{PIDFile: path, Signal: "WINCH"} // which does nothing to it
		err = change.signal(slog.New(slog.NewTextHandler(io.Discard, nil)))
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := speaksFor(os.Geteuid(), child.Process.Pid); err != nil {
		t.Errorf("of its owner: %v", err)
	}
	if err := speaksFor(os.Geteuid()+1, child.Process.Pid); err == nil {
		t.Error("it is signalled for a file of somebody else's")
	}
}
