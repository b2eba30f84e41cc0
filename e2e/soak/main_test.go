//go:build linux

package soak_test

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

var (
	soakFor    = flag.Duration("soak.for", 70*time.Second, "how long to soak")
	soakLife   = flag.Duration("soak.life", 12*time.Second, "the life of a token, in whole seconds; what else takes time goes with it")
	soakNotice = flag.Duration("soak.notice", 0, "how long the broker must have been reachable, without a break, for a request to be counted as lost (default: a tenth of a life, at least 4s)")
	soakSeed   = flag.Uint64("soak.seed", 0, "of the plan of faults (default: the time)")
	soakJSON   = flag.String("soak.json", "", "file to write the result to, as JSON")
)

// bin is where the built commands are.
var bin string

func TestMain(m *testing.M) {
	if len(os.Args) > 2 && os.Args[1] == tiedRole {
		fmt.Fprintln(os.Stderr, tied(os.Args[2:]))
		os.Exit(1)
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
	build := exec.Command("go", "build", "-o", dir, "../../cmd/...")
	build.Stdout, build.Stderr = os.Stderr, os.Stderr
	if err := build.Run(); err != nil {
		fmt.Fprintln(os.Stderr, "building the commands:", err)
		return 1
	}
	return m.Run()
}

const tiedRole = "role-tied"

// command is the line that starts a built command such that it ends with this process,
// however that ends and paused or not.
func command(name string) []string {
	self, err := os.Executable()
	if err != nil {
		panic(err)
	}
	return []string{self, tiedRole, filepath.Join(bin, name)}
}

// tied becomes another command.
func tied(line []string) error {
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0); err != nil {
		return err
	}
	return syscall.Exec(line[0], line, os.Environ())
}
