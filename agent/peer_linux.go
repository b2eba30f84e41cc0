package agent

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// peerUID asks the kernel who was at the other end of a unix socket when it connected.
func peerUID(conn net.Conn) (uint32, error) {
	cred, err := peerCred(conn)
	if err != nil {
		return 0, err
	}
	return cred.Uid, nil
}

// peerGIDs are the caller's group and those that it is in beside.
func peerGIDs(conn net.Conn) ([]uint32, error) {
	cred, err := peerCred(conn)
	if err != nil {
		return nil, err
	}
	var more []uint32
	err = control(conn, func(fd uintptr) (err error) { more, err = peerGroups(fd); return err })
	return append([]uint32{cred.Gid}, more...), err
}

func peerCred(conn net.Conn) (*unix.Ucred, error) {
	var cred *unix.Ucred
	err := control(conn, func(fd uintptr) (err error) {
		cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
		return err
	})
	return cred, err
}

// control does something to a connection's socket.
func control(conn net.Conn, do func(fd uintptr) error) error {
	sc, ok := conn.(syscall.Conn)
	if !ok {
		return errors.New("not a socket")
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return err
	}
	var doErr error
	if err := raw.Control(func(fd uintptr) { doErr = do(fd) }); err != nil {
		return err
	}
	return doErr
}

// peerGroups reads SO_PEERGROUPS, for which the library has no function.
func peerGroups(fd uintptr) ([]uint32, error) {
	const size = 4
	for room := 32; ; {
		groups := make([]uint32, room)
		length := uint32(room * size)
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, fd, unix.SOL_SOCKET, unix.SO_PEERGROUPS,
			uintptr(unsafe.Pointer(&groups[0])), uintptr(unsafe.Pointer(&length)), 0)
		switch n := int(length) / size; {
		case errno == unix.ERANGE && n > room:
			room = n
		case errno != 0:
			return nil, errno
		default:
			return groups[:n], nil
		}
	}
}

// executable is the file that a process runs.
type executable struct {
	pid      int
	path     string // as the kernel shows it; for people only
	dev, ino uint64
}

// peerExecutable says what the process that connected runs now. Its number is taken from a
// pidfd of the socket's, and what was read by that number counts only if the pidfd's process
// still lives afterwards: then nobody else had the number meanwhile.
func peerExecutable(conn net.Conn) (*executable, error) {
	pidfd := -1
	err := control(conn, func(fd uintptr) (err error) {
		pidfd, err = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PEERPIDFD)
		return err
	})
	switch {
	case errors.Is(err, unix.ENOPROTOOPT):
		return nil, &peerError{"it has no SO_PEERPIDFD", "allowed_executables needs Linux 6.5 or newer"}
	case errors.Is(err, unix.ESRCH), errors.Is(err, unix.EINVAL):
		return nil, errPeerEnded
	case err != nil:
		return nil, err
	}
	defer unix.Close(pidfd)
	pid, err := pidOf(pidfd)
	if err != nil {
		return nil, err
	}
	at := "/proc/" + strconv.Itoa(pid) + "/exe"
	var stat unix.Stat_t
	statErr := unix.Stat(at, &stat)
	path, _ := os.Readlink(at)
	switch ended, err := hasEnded(pidfd); {
	case err != nil:
		return nil, err
	case ended:
		return nil, errPeerEnded
	case errors.Is(statErr, unix.EACCES), errors.Is(statErr, unix.EPERM):
		return nil, &peerError{fmt.Sprintf("it doesn't show what process %d runs", pid), "the agent must run as root, or as the caller's own user, to see what the caller runs"}
	case statErr != nil:
		return nil, fmt.Errorf("what process %d runs: %w", pid, statErr)
	}
	return &executable{pid, path, uint64(stat.Dev), stat.Ino}, nil
}

var errPeerEnded = &peerError{"the process that connected has ended", "call from the process that connects"}

// pidOf reads a process's number, as this process's namespace has it.
func pidOf(pidfd int) (int, error) {
	info, err := os.ReadFile("/proc/self/fdinfo/" + strconv.Itoa(pidfd))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(info)) {
		value, is := strings.CutPrefix(line, "Pid:")
		if !is {
			continue
		}
		pid, err := strconv.Atoi(strings.TrimSpace(value))
		switch {
		case err != nil:
			return 0, err
		case pid < 0:
			return 0, errPeerEnded
		case pid == 0:
			return 0, &peerError{"the caller is in another PID namespace", "allowed_executables needs agent and caller in one, such as a pod's with shareProcessNamespace, or the host's"}
		}
		return pid, nil
	}
	return 0, errors.New("/proc/self/fdinfo has no Pid")
}

// hasEnded reports whether a process runs no more, reaped or not.
func hasEnded(pidfd int) (bool, error) {
	fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, 0)
		if !errors.Is(err, unix.EINTR) {
			return n > 0, err
		}
	}
}

// among wants the file to be one of those at these paths, now. A path at which somebody else
// could put a file names nothing.
func (e *executable) among(paths []string) error {
	var reasons []string
	for _, path := range paths {
		var stat unix.Stat_t
		if err := unix.Stat(path, &stat); err != nil || uint64(stat.Dev) != e.dev || stat.Ino != e.ino {
			continue
		}
		if err := guarded(path); err != nil {
			reasons = append(reasons, err.Error())
			continue
		}
		return nil
	}
	why := ""
	if len(reasons) > 0 {
		why = ": " + strings.Join(reasons, "; ")
	}
	return fmt.Errorf("%s (process %d) may not use this socket%s", e.path, e.pid, why)
}

// guarded wants nobody but root and this user to be able to put another file at a path.
func guarded(path string) error {
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return err
	}
	for at := real; ; at = filepath.Dir(at) {
		info, err := os.Lstat(at)
		if err != nil {
			return err
		}
		stat, ok := info.Sys().(*syscall.Stat_t)
		if !ok {
			return errors.New("no owner is known")
		}
		sticky := info.IsDir() && info.Mode()&fs.ModeSticky != 0 && at != filepath.Dir(real)
		if owner := int(stat.Uid); owner != 0 && owner != os.Geteuid() || info.Mode().Perm()&0o022 != 0 && !sticky {
			return fmt.Errorf("others than root and the agent's user may write to %s", at)
		}
		if at == filepath.Dir(at) {
			return nil
		}
	}
}
