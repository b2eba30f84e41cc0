//go:build !unix

package deliver

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"syscall"
)

var signals = map[string]syscall.Signal{}

// ownerOf fails, so that no folder is trusted: credentials are put in files only where it
// can be said whose they are.
func ownerOf(fs.FileInfo) (int, error) { return 0, errors.New("files are delivered on Unix only") }

func openPlain(path string) (*os.File, error) { return os.Open(path) }

func inGroup(*exec.Cmd) {}
