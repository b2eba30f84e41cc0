//go:build unix

package supervise

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// A result is how a child ended.
type result struct{ code int }

// A child is the program, running.
type child struct{ process *os.Process }

// own are the processes that this one has started and waits for itself: the reaper leaves
// them to whoever waits. A fork and its entry here are one for the reaper.
var own = struct {
	sync.Mutex
	pids map[int]bool
}{pids: map[int]bool{}}

func startOwn(cmd *exec.Cmd) error {
	own.Lock()
	defer own.Unlock()
	if err := cmd.Start(); err != nil {
		return err
	}
	own.pids[cmd.Process.Pid] = true
	return nil
}

func waitOwn(cmd *exec.Cmd) error {
	err := cmd.Wait()
	own.Lock()
	defer own.Unlock()
	delete(own.pids, cmd.Process.Pid)
	return err
}

// RunOwn is (*exec.Cmd).Run for whoever else starts processes where Run reaps.
func RunOwn(cmd *exec.Cmd) error {
	if err := startOwn(cmd); err != nil {
		return err
	}
	return waitOwn(cmd)
}

// startChild starts the program, in this process's group and on its terminal: Ctrl-C and
// Ctrl-Z reach both, and a pipe's other end that reads the terminal is in no way of it.
func startChild(path string, args, env []string, exited chan<- result) (*child, error) {
	started := make(chan error)
	c := &child{}
	go func() {
		// The kernel signals the program when the thread ends that started it.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		cmd := &exec.Cmd{Path: path, Args: args, Env: env, Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr, SysProcAttr: childAttr()}
		err := startOwn(cmd)
		c.process = cmd.Process
		started <- err
		if err != nil {
			return
		}
		_ = waitOwn(cmd) // the state says it
		exited <- result{codeOf(cmd.ProcessState)}
	}()
	return c, <-started
}

func codeOf(s *os.ProcessState) int {
	if w, ok := s.Sys().(syscall.WaitStatus); ok && w.Signaled() {
		return exitSignal + int(w.Signal())
	}
	return s.ExitCode()
}

// signal sends one; to a program that has ended it does nothing.
func (c *child) signal(s syscall.Signal) { _ = c.process.Signal(s) }

// byTerminal are the signals that a terminal sends to the whole group in its foreground.
var byTerminal = []syscall.Signal{syscall.SIGINT, syscall.SIGQUIT, syscall.SIGTSTP, syscall.SIGWINCH, syscall.SIGCONT}

// fromTerminal says whether the program has got a signal itself, which came to this process
// now: it is in the foreground of a terminal, so the key's signal went to the whole group.
// Sent again, one Ctrl-C would count as two.
func fromTerminal(s syscall.Signal) bool {
	if !slices.Contains(byTerminal, s) {
		return false
	}
	tty, err := os.OpenFile("/dev/tty", os.O_RDONLY|syscall.O_NOCTTY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return false
	}
	defer tty.Close()
	group, err := unix.IoctlGetInt(int(tty.Fd()), unix.TIOCGPGRP)
	return err == nil && group == syscall.Getpgrp()
}

// suspend stops this process if that is what a signal means; the shell says when it goes on.
func suspend(s syscall.Signal) {
	if s == syscall.SIGTSTP {
		_ = syscall.Kill(os.Getpid(), syscall.SIGSTOP)
	}
}

func signalNamed(name string) (syscall.Signal, bool) {
	s := unix.SignalNum("SIG" + name)
	return s, slices.Contains(forwarded, s)
}

func lookPath(name string) (string, error) {
	path, err := exec.LookPath(name)
	if errors.Is(err, exec.ErrDot) {
		err = nil // as in a shell whose PATH has it
	}
	return path, err
}

func notRunnable(name string, err error) *Exit {
	if errors.Is(err, exec.ErrNotFound) || errors.Is(err, fs.ErrNotExist) {
		return &Exit{ExitNotFound, fmt.Errorf("there is no command %q", short(name))}
	}
	return &Exit{ExitNotExecutable, fmt.Errorf("running %q: %w", short(name), err)}
}
