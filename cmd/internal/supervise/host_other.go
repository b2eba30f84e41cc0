//go:build !unix

package supervise

import (
	"errors"
	"os"
	"os/exec"
	"syscall"
)

type result struct{ code int }

type child struct{}

var (
	errUnix   = errors.New("exec is for Unix only")
	forwarded []syscall.Signal
)

// RunOwn is (*exec.Cmd).Run.
func RunOwn(cmd *exec.Cmd) error { return cmd.Run() }

func startChild(string, []string, []string, chan<- result) (*child, error) { return nil, errUnix }
func (c *child) signal(syscall.Signal)                                     {}
func (r *runner) reap() func()                                             { return func() {} }
func killOrphans()                                                         {}
func fromTerminal(syscall.Signal) bool                                     { return false }
func suspend(syscall.Signal)                                               {}
func signalNamed(string) (syscall.Signal, bool)                            { return 0, false }
func lookPath(string) (string, error)                                      { return "", errUnix }
func notRunnable(string, error) *Exit                                      { return &Exit{ExitFailed, errUnix} }
func lockFolder(*os.File) error                                            { return errUnix }
func ownedByUs(os.FileInfo) bool                                           { return false }
func inMemory(string) bool                                                 { return false }
func memoryFolders() []string                                              { return nil }
