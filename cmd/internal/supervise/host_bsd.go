//go:build unix && !linux

package supervise

import "syscall"

var forwarded = []syscall.Signal{
	syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGABRT, syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGALRM,
	syscall.SIGTERM, syscall.SIGCONT, syscall.SIGTSTP, syscall.SIGWINCH,
}

// childAttr: only Linux ends a program when whoever started it dies.
func childAttr() *syscall.SysProcAttr { return nil }

// reap: what is left behind goes to PID 1, which this process is in Linux containers only.
func (r *runner) reap() func() { return func() {} }

func killOrphans() {}

func inMemory(string) bool { return false }

func memoryFolders() []string { return nil }
