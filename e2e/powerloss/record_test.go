//go:build linux

package powerloss_test

import (
	"context"
	"encoding/binary"
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"github.com/dayflyhq/dayfly/broker/boltstore"
	"golang.org/x/sys/unix"
)

// The first argument that makes the test binary one of the recorder's two processes.
const (
	roleRecord = "dayfly-record" // FOLDER RECORDINGS COMMAND...
	roleTraced = "dayfly-traced" // COMMAND...
)

// A call is a system call that may change what the disk holds of a folder.
type call string

const (
	callWrite    call = "pwrite"
	callAllocate call = "fallocate"
	callTruncate call = "ftruncate"
	callSync     call = "sync" // fsync or fdatasync
	callCreate   call = "create"
	callLink     call = "link"
	callUnlink   call = "unlink"
	callRename   call = "rename"
)

// An event is the beginning or the end of a call.
type event struct {
	// ID is the same for both; unique within a recording.
	ID   int
	Call call
	// At is CLOCK_MONOTONIC in ns: at the beginning before the kernel does anything, at
	// the end before the caller goes on. The caller is stopped at both times.
	At     int64
	End    bool
	Failed bool // the call did nothing; known at the end

	Inode        uint64 // the file or, of a sync, perhaps the folder
	Name, To     string // in the folder: create, link (from, to), unlink, rename
	Offset, Size int64
	Data         []byte
}

// recorder is a command that runs another and records what it does in a folder.
func recorder(folder, recordings, command string) []string {
	return []string{os.Args[0], roleRecord, folder, recordings, command}
}

func TestMain(m *testing.M) {
	role := append(os.Args, "")[1]
	var err error
	switch role {
	case roleRecord:
		var code int
		if code, err = record(os.Args[2], os.Args[3], os.Args[4:]); err == nil {
			os.Exit(code)
		}
	case roleTraced:
		err = traced(os.Args[2:])
	case roleStore:
		var days int
		if days, err = strconv.Atoi(os.Args[3]); err == nil {
			if err = runStore(os.Args[2], days, os.Stdout); err == nil {
				return
			}
		}
	case roleCheck:
		if _, err = boltstore.Check(context.Background(), os.Args[2]); err == nil {
			return
		}
	default:
		os.Exit(m.Run())
	}
	fmt.Fprintf(os.Stderr, "%s: %v\n", role, err)
	os.Exit(1)
}

// traced becomes the command, with a filter that stops it for the tracer at the calls
// that matter and at no others.
func traced(command []string) error {
	runtime.LockOSThread() // the filter belongs to the thread
	const (
		load  = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
		equal = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
		set   = unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K
		end   = unix.BPF_RET | unix.BPF_K
		// Where seccomp_data has the call's number and the low half of its third argument.
		atNumber, atThird = 0, 32
	)
	filter := []unix.SockFilter{{Code: load, K: atNumber}}
	for _, nr := range []uint32{
		unix.SYS_PWRITE64, unix.SYS_FALLOCATE, unix.SYS_FTRUNCATE, unix.SYS_FSYNC, unix.SYS_FDATASYNC,
		unix.SYS_LINKAT, unix.SYS_UNLINKAT, unix.SYS_RENAMEAT, unix.SYS_RENAMEAT2,
	} {
		filter = append(filter, unix.SockFilter{Code: equal, K: nr, Jf: 1}, unix.SockFilter{Code: end, K: unix.SECCOMP_RET_TRACE})
	}
	filter = append(filter,
		unix.SockFilter{Code: equal, K: unix.SYS_OPENAT, Jf: 3},
		unix.SockFilter{Code: load, K: atThird},
		unix.SockFilter{Code: set, K: unix.O_CREAT, Jf: 1},
		unix.SockFilter{Code: end, K: unix.SECCOMP_RET_TRACE},
		unix.SockFilter{Code: end, K: unix.SECCOMP_RET_ALLOW})
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("setting no_new_privs: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&program)), 0, 0); err != nil {
		return fmt.Errorf("setting the seccomp filter: %w", err)
	}
	return fmt.Errorf("running %s: %w", command[0], unix.Exec(command[0], command, os.Environ()))
}

// record runs a command, writes a file of events to the folder of recordings, and
// returns the command's exit code. If it is killed, the command is too.
func record(folder, recordings string, command []string) (int, error) {
	runtime.LockOSThread() // a tracer is a thread
	out, err := os.CreateTemp(recordings, "*.gob")
	if err != nil {
		return 0, err
	}
	r := &recording{folder: folder, out: gob.NewEncoder(out), open: map[int]*event{}}
	cmd := exec.Command(os.Args[0], append([]string{roleTraced}, command...)...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Ptrace: true}
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	if err := cmd.Start(); err != nil {
		return 0, fmt.Errorf("tracing %s, for which ptrace must be allowed (kernel.yama.ptrace_scope below 3; in a container perhaps --cap-add SYS_PTRACE): %w", command[0], err)
	}
	go func() {
		for s := range signals {
			cmd.Process.Signal(s)
		}
	}()
	code, err := r.follow(cmd.Process.Pid)
	return code, errors.Join(err, out.Close())
}

type recording struct {
	folder string
	out    *gob.Encoder
	last   int
	open   map[int]*event // by thread: its call under way
}

const (
	traceOptions = unix.PTRACE_O_TRACESECCOMP | unix.PTRACE_O_TRACESYSGOOD | unix.PTRACE_O_EXITKILL |
		unix.PTRACE_O_TRACECLONE | unix.PTRACE_O_TRACEFORK | unix.PTRACE_O_TRACEVFORK | unix.PTRACE_O_TRACEEXEC
	stopSyscall = unix.SIGTRAP | 0x80
)

// follow traces a process that stops at its exec, until it ends.
func (r *recording) follow(pid int) (int, error) {
	var status unix.WaitStatus
	if _, err := unix.Wait4(pid, &status, unix.WALL, nil); err != nil || !status.Stopped() {
		return 0, fmt.Errorf("the process did not begin: status %x, %w", status, err)
	}
	if err := unix.PtraceSetOptions(pid, traceOptions); err != nil {
		return 0, fmt.Errorf("tracing the process: %w", err)
	}
	if err := unix.PtraceCont(pid, 0); err != nil {
		return 0, fmt.Errorf("tracing the process: %w", err)
	}
	known := map[int]bool{pid: true}
	for {
		thread, err := unix.Wait4(-1, &status, unix.WALL, nil)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return 0, fmt.Errorf("waiting for the process: %w", err)
		case status.Exited() && thread == pid:
			return status.ExitStatus(), nil
		case status.Signaled() && thread == pid:
			return 128 + int(status.Signal()), nil
		case !status.Stopped():
			delete(known, thread)
			continue
		}
		if err := r.stopped(thread, status, known); err != nil && !errors.Is(err, unix.ESRCH) { // ESRCH: it is being killed
			return 0, err
		}
	}
}

// stopped looks at why a thread has stopped, and lets it go on.
func (r *recording) stopped(thread int, status unix.WaitStatus, known map[int]bool) error {
	deliver := status.StopSignal()
	switch {
	case !known[thread] && deliver == unix.SIGSTOP: // a new thread
		known[thread], deliver = true, 0
	case deliver == stopSyscall:
		deliver = 0
		if err := r.end(thread); err != nil {
			return err
		}
	case deliver == unix.SIGTRAP:
		deliver = 0
		if status.TrapCause() != unix.PTRACE_EVENT_SECCOMP {
			break
		}
		if recorded, err := r.begin(thread); err != nil {
			return err
		} else if recorded {
			return unix.PtraceSyscall(thread, 0) // to its end
		}
	}
	return unix.PtraceCont(thread, int(deliver))
}

// syscallInfo is the kernel's struct ptrace_syscall_info.
type syscallInfo struct {
	op      uint8
	_       [3]byte
	arch    uint32
	ip, sp  uint64
	payload [8]uint64 // seccomp: number, arguments; exit: result, is error
}

func infoOf(thread int) (syscallInfo, error) {
	var info syscallInfo
	_, _, errno := unix.RawSyscall6(unix.SYS_PTRACE, unix.PTRACE_GET_SYSCALL_INFO, uintptr(thread), unsafe.Sizeof(info), uintptr(unsafe.Pointer(&info)), 0, 0)
	if errno != 0 {
		return info, fmt.Errorf("reading a system call: %w", errno)
	}
	return info, nil
}

// begin records the call that a thread is about to make, if it concerns the folder.
func (r *recording) begin(thread int) (bool, error) {
	info, err := infoOf(thread)
	if err != nil {
		return false, err
	}
	e, err := r.parse(thread, info.payload[0], info.payload[1:7])
	if err != nil || e == nil {
		return false, err
	}
	r.last++
	e.ID, e.At = r.last, monotonic()
	r.open[thread] = e
	return true, r.out.Encode(e)
}

// end records that it has returned.
func (r *recording) end(thread int) error {
	e := r.open[thread]
	if e == nil {
		return nil
	}
	delete(r.open, thread)
	info, err := infoOf(thread)
	if err != nil {
		return err
	}
	result, failed := int64(info.payload[0]), info.payload[1]&0xff != 0
	done := event{ID: e.ID, Call: e.Call, End: true, Failed: failed, Inode: e.Inode, Name: e.Name, To: e.To}
	if e.Call == callCreate && !failed {
		done.Inode, _ = inodeOf(fmt.Sprintf("/proc/%d/fd/%d", thread, result))
	}
	if e.Call == callWrite && !failed && result != e.Size {
		return fmt.Errorf("a write of %d bytes wrote %d", e.Size, result)
	}
	done.At = monotonic()
	return r.out.Encode(&done)
}

// parse returns what a call is about, or nil if that isn't the folder or what is in it.
func (r *recording) parse(thread int, number uint64, args []uint64) (*event, error) {
	switch number {
	case unix.SYS_PWRITE64:
		return r.onFile(thread, args[0], &event{Call: callWrite, Offset: int64(args[3]), Size: int64(args[2])}, uintptr(args[1]))
	case unix.SYS_FALLOCATE:
		if args[1] != 0 {
			return nil, fmt.Errorf("fallocate with mode %d is not understood", args[1])
		}
		return r.onFile(thread, args[0], &event{Call: callAllocate, Offset: int64(args[2]), Size: int64(args[3])}, 0)
	case unix.SYS_FTRUNCATE:
		return r.onFile(thread, args[0], &event{Call: callTruncate, Size: int64(args[1])}, 0)
	case unix.SYS_FSYNC, unix.SYS_FDATASYNC:
		return r.onFile(thread, args[0], &event{Call: callSync}, 0)
	case unix.SYS_OPENAT:
		return r.onNames(thread, callCreate, args[0], args[1], args[0], 0)
	case unix.SYS_LINKAT:
		return r.onNames(thread, callLink, args[0], args[1], args[2], args[3])
	case unix.SYS_UNLINKAT:
		return r.onNames(thread, callUnlink, args[0], args[1], args[0], 0)
	case unix.SYS_RENAMEAT, unix.SYS_RENAMEAT2:
		return r.onNames(thread, callRename, args[0], args[1], args[2], args[3])
	}
	return nil, fmt.Errorf("system call %d is not understood", number)
}

// onFile completes the event of a call on an open file.
func (r *recording) onFile(thread int, fd uint64, e *event, data uintptr) (*event, error) {
	link := fmt.Sprintf("/proc/%d/fd/%d", thread, int32(fd))
	path, err := os.Readlink(link)
	if err != nil || path != r.folder && filepath.Dir(path) != r.folder {
		return nil, nil // the call will fail by itself, or is none of ours
	}
	if e.Inode, err = inodeOf(link); err != nil {
		return nil, err
	}
	if e.Call == callWrite {
		e.Data = make([]byte, e.Size)
		if err := readMemory(thread, data, e.Data); err != nil {
			return nil, err
		}
	}
	return e, nil
}

// onNames makes the event of a call on names in the folder.
func (r *recording) onNames(thread int, c call, fromDir, from, toDir, to uint64) (*event, error) {
	e := &event{Call: c}
	path, err := pathAt(thread, fromDir, from)
	if err != nil {
		return nil, err
	}
	e.Name = r.inFolder(path)
	if to != 0 {
		target, err := pathAt(thread, toDir, to)
		if err != nil {
			return nil, err
		}
		e.To = r.inFolder(target)
	}
	if e.Name == "" && e.To == "" {
		return nil, nil
	}
	switch e.Inode, err = inodeOf(path); {
	case c == callCreate && err == nil:
		return nil, nil // it only opens
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return nil, err
	}
	return e, nil
}

// inFolder returns the name that a path has in the folder, or "".
func (r *recording) inFolder(path string) string {
	if filepath.Dir(path) != r.folder {
		return ""
	}
	return filepath.Base(path)
}

func pathAt(thread int, dir, address uint64) (string, error) {
	var path []byte
	for buf := make([]byte, 1); ; {
		if err := readMemory(thread, uintptr(address)+uintptr(len(path)), buf); err != nil {
			return "", err
		}
		if buf[0] == 0 || len(path) == unix.PathMax {
			break
		}
		path = append(path, buf[0])
	}
	if filepath.IsAbs(string(path)) {
		return filepath.Clean(string(path)), nil
	}
	base := fmt.Sprintf("/proc/%d/fd/%d", thread, int32(dir))
	if int32(dir) == unix.AT_FDCWD {
		base = fmt.Sprintf("/proc/%d/cwd", thread)
	}
	folder, err := os.Readlink(base)
	return filepath.Join(folder, string(path)), err
}

func readMemory(thread int, address uintptr, into []byte) error {
	if len(into) == 0 {
		return nil
	}
	local := []unix.Iovec{{Base: &into[0]}}
	local[0].SetLen(len(into))
	n, err := unix.ProcessVMReadv(thread, local, []unix.RemoteIovec{{Base: address, Len: len(into)}}, 0)
	if err != nil || n != len(into) {
		return fmt.Errorf("reading %d bytes of the process: got %d, %w", len(into), n, err)
	}
	return nil
}

func inodeOf(path string) (uint64, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return 0, fmt.Errorf("looking at %s: %w", path, err)
	}
	return st.Ino, nil
}

// monotonic is a clock that all processes of a machine share, in ns.
func monotonic() int64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		panic(fmt.Sprintf("internal error: reading the clock: %v", err))
	}
	return ts.Nano()
}

// readRecordings returns the events of all recordings in a folder in their order.
func readRecordings(folder string) ([]event, error) {
	paths, err := filepath.Glob(filepath.Join(folder, "*.gob"))
	if err != nil {
		return nil, err
	}
	var events []event
	for i, path := range paths {
		f, err := os.Open(path)
		if err != nil {
			return nil, err
		}
		for dec := gob.NewDecoder(f); ; {
			var e event
			if err := dec.Decode(&e); errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				return nil, errors.Join(fmt.Errorf("reading %s: %w", path, err), f.Close())
			}
			e.ID += i << 32
			events = append(events, e)
		}
		f.Close()
	}
	slices.SortStableFunc(events, func(a, b event) int { return int(min(max(a.At-b.At, -1), 1)) })
	return events, nil
}

func (e event) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s", e.Call)
	switch e.Call {
	case callWrite:
		fmt.Fprintf(&b, " %d bytes at page %d", e.Size, e.Offset/4096)
		if len(e.Data) >= 24 && binary.NativeEndian.Uint16(e.Data[8:]) == 4 {
			b.WriteString(" (meta)")
		}
	case callAllocate, callTruncate:
		fmt.Fprintf(&b, " %d+%d", e.Offset, e.Size)
	case callSync:
	default:
		fmt.Fprintf(&b, " %s %s", e.Name, e.To)
	}
	return b.String()
}
