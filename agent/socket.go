package agent

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// SocketMode is the default mode of a socket: its owner's alone.
const SocketMode fs.FileMode = 0o600

// widestMode is the most that a socket may allow: owner and group. Whoever connects
// gets the workload's credentials, so "others" is never meant.
const widestMode fs.FileMode = 0o660

// maxSocketPath is the longest path that the kernel takes, with room for its final zero.
const maxSocketPath = 107

// roomInFolder is the longest that listen adds to the folder of a socket.
const roomInFolder = "/.4294967295/s"

// A SocketConfig says where to listen and for whom.
type SocketConfig struct {
	// Path is absolute. Its folder must exist.
	Path string
	// Mode is 0600 if zero; 0660 at the widest.
	Mode fs.FileMode
	// Group is the ID of the group that owns the socket; nil for the process's own.
	Group *int
}

// Listen makes a unix socket with the right mode from its first moment on. The socket
// file of an agent that died is replaced; one that somebody answers at is refused.
// Closing the listener removes the file, if it is still this one.
func Listen(cfg SocketConfig) (net.Listener, error) {
	l, err := listen(cfg)
	if err != nil {
		return nil, fmt.Errorf("listening on %s: %w", cfg.Path, err)
	}
	return l, nil
}

func listen(cfg SocketConfig) (_ net.Listener, err error) {
	if cfg.Mode == 0 {
		cfg.Mode = SocketMode
	}
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if err := vacant(cfg.Path); err != nil {
		return nil, err
	}
	// Made in a folder of our own and moved into place: there is no moment at which
	// others could connect, and no umask to change under other goroutines' feet.
	dir, err := os.MkdirTemp(filepath.Dir(cfg.Path), ".")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	made := filepath.Join(dir, "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: made, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	info, err := place(made, cfg)
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return &socket{UnixListener: l, path: cfg.Path, info: info, access: cfg}, nil
}

// Validate says what is wrong with the configuration, whatever is on this host.
func (c *SocketConfig) Validate() error {
	switch dir := filepath.Dir(c.Path); {
	case !filepath.IsAbs(c.Path):
		return errors.New("the path must be absolute")
	case len(c.Path) > maxSocketPath:
		return fmt.Errorf("the path has %d bytes, a unix socket takes %d", len(c.Path), maxSocketPath)
	case len(dir)+len(roomInFolder) > maxSocketPath:
		return fmt.Errorf("the path is too long for a unix socket: use a folder of at most %d bytes", maxSocketPath-len(roomInFolder))
	case c.Mode&^widestMode != 0:
		return fmt.Errorf("mode %04o is wider than %04o: whoever connects gets this workload's credentials", c.Mode, widestMode)
	}
	return nil
}

func place(made string, cfg SocketConfig) (fs.FileInfo, error) {
	if cfg.Group != nil {
		if err := os.Chown(made, -1, *cfg.Group); err != nil {
			return nil, err
		}
	}
	if err := os.Chmod(made, cfg.Mode); err != nil {
		return nil, err
	}
	info, err := os.Lstat(made)
	if err != nil {
		return nil, err
	}
	return info, os.Rename(made, cfg.Path)
}

// vacant returns an error unless nothing is at the path, or the socket of a dead process.
func vacant(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Mode().Type() != fs.ModeSocket {
		return errors.New("there is a file that is no socket: remove it, or choose another path")
	}
	conn, err := net.DialTimeout("unix", path, time.Second)
	if err == nil {
		_ = conn.Close()
		return errors.New("another process answers there: stop it, or choose another path")
	}
	if errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return fmt.Errorf("is its process alive? %w", err)
}

// socket removes its own file at Close.
type socket struct {
	*net.UnixListener
	path   string
	info   fs.FileInfo
	access SocketConfig // mode and group as they were set last
}

func (s *socket) Close() error {
	if now, err := os.Lstat(s.path); err == nil && os.SameFile(now, s.info) {
		_ = os.Remove(s.path)
	}
	return s.UnixListener.Close()
}

// Addr is the path in its place.
func (s *socket) Addr() net.Addr { return &net.UnixAddr{Name: s.path, Net: "unix"} }

// SetAccess gives a socket of Listen another mode and group, from the next connection on,
// and returns how to go back. It changes nothing where they are as wanted. It isn't called
// at once for one socket.
func SetAccess(l net.Listener, cfg SocketConfig) (undo func() error, err error) {
	s, ok := l.(*socket)
	if !ok {
		return nil, fmt.Errorf("%s is no socket of the agent's", cfg.Path)
	}
	if cfg.Mode == 0 {
		cfg.Mode = SocketMode
	}
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	before := s.access
	if err := s.set(cfg); err != nil {
		return nil, errors.Join(err, s.set(before))
	}
	return func() error { return s.set(before) }, nil
}

// set never lets in, not even for a moment, who is neither in the group before nor in the
// one after.
func (s *socket) set(cfg SocketConfig) error {
	group := func(c SocketConfig) int {
		if c.Group == nil {
			return os.Getegid()
		}
		return *c.Group
	}
	if s.access.Mode == cfg.Mode && group(s.access) == group(cfg) {
		return nil
	}
	if now, err := os.Lstat(s.path); err != nil || !os.SameFile(now, s.info) {
		return errors.Join(fmt.Errorf("the socket %s is no longer this agent's", s.path), err)
	}
	s.access = cfg
	if err := os.Chmod(s.path, cfg.Mode&SocketMode); err != nil {
		return err
	}
	if err := os.Chown(s.path, -1, group(cfg)); err != nil {
		return err
	}
	return os.Chmod(s.path, cfg.Mode)
}
