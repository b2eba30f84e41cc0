package supervise

import (
	"bytes"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// forwarded are all signals but those that are of this process alone (faults, its own
// children, its runtime's, writing to a closed pipe) or that nobody can catch.
var forwarded = func() []syscall.Signal {
	out := []syscall.Signal{
		syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGABRT, syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGALRM,
		syscall.SIGTERM, syscall.SIGCONT, syscall.SIGTSTP, syscall.SIGXCPU, syscall.SIGXFSZ, syscall.SIGVTALRM,
		syscall.SIGWINCH, syscall.SIGIO, syscall.SIGPWR,
	}
	for s := syscall.Signal(35); s <= 64; s++ { // real-time; below are the C library's own
		out = append(out, s)
	}
	return out
}()

// childAttr ends the program when this process dies without having ended it, as by
// SIGKILL: nobody would renew or remove what it reads any more.
func childAttr() *syscall.SysProcAttr { return &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM} }

// lookAgain is between looks while a process that somebody here waits for is the first to
// be reaped.
const lookAgain = 20 * time.Millisecond

// reap makes this process the parent of what its descendants leave behind, as PID 1 is, and
// buries them until the function that it returns is called.
func (r *runner) reap() func() {
	_ = unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) // since Linux 3.4
	died := make(chan os.Signal, 1)
	signal.Notify(died, syscall.SIGCHLD)
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			var again <-chan time.Time
			if reapOrphans() {
				again = time.After(lookAgain)
			}
			select {
			case <-died:
			case <-again:
			case <-stop:
				return
			}
		}
	}()
	return func() { signal.Stop(died); close(stop); <-done }
}

// reapOrphans buries the dead that nobody here waits for, and says whether there may be
// more behind one whom somebody does.
func reapOrphans() (more bool) {
	own.Lock()
	defer own.Unlock()
	for {
		pid := firstDead()
		if pid <= 0 {
			return false
		}
		if own.pids[pid] {
			return true
		}
		if _, err := syscall.Wait4(pid, nil, syscall.WNOHANG, nil); err != nil {
			return true
		}
	}
}

// firstDead is a child that can be waited for, 0 for none. It stays one.
func firstDead() int {
	var info unix.Siginfo
	for {
		err := unix.Waitid(unix.P_ALL, 0, &info, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return 0
		}
		// What follows the three numbers is a union that is aligned as a pointer is.
		const at = (3*4 + unsafe.Alignof(uintptr(0)) - 1) &^ (unsafe.Alignof(uintptr(0)) - 1)
		return int(*(*int32)(unsafe.Add(unsafe.Pointer(&info), at)))
	}
}

// killOrphans kills whatever the program has started and left behind, however deep: what
// the dead leave behind comes to this process.
func killOrphans() {
	for range 100 { // a process that can't die isn't waited for longer than that
		if killChildren() == 0 {
			return
		}
		reapOrphans()
		time.Sleep(10 * time.Millisecond)
	}
}

func killChildren() (n int) {
	own.Lock() // nobody reaps meanwhile, so no number is another process's by now
	defer own.Unlock()
	for _, pid := range children() {
		if !own.pids[pid] && syscall.Kill(pid, syscall.SIGKILL) == nil {
			n++
		}
	}
	return n
}

// children lists this process's children; none where /proc isn't there.
func children() []int {
	var out []int
	files, _ := filepath.Glob("/proc/self/task/*/children")
	for _, f := range files {
		text, _ := os.ReadFile(f)
		for _, word := range bytes.Fields(text) {
			if pid, err := strconv.Atoi(string(word)); err == nil {
				out = append(out, pid)
			}
		}
	}
	return out
}

// Types of file systems that are memory.
const (
	tmpfs = 0x01021994
	ramfs = 0x858458f6
)

func inMemory(path string) bool {
	var st unix.Statfs_t
	return unix.Statfs(path, &st) == nil && (st.Type == tmpfs || int64(uint32(st.Type)) == ramfs)
}

func memoryFolders() []string { return []string{os.Getenv("XDG_RUNTIME_DIR"), "/dev/shm", "/run"} }
