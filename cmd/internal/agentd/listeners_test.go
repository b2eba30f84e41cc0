package agentd

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/agent"
)

// Listeners go from one lease to the next, and no connection is lost on the way.
func TestShelf(t *testing.T) {
	dir, err := os.MkdirTemp("", "df")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	s := newShelf()
	cfg := agent.SocketConfig{Path: filepath.Join(dir, "s")}
	take := func() *lease {
		t.Helper()
		l, err := s.unix(cfg)
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	now := take()
	const connections = 500
	served := make(chan struct{}, connections)
	serve := func(l *lease) {
		for {
			conn, err := l.Accept()
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil {
				t.Error(err)
				return
			}
			if _, err := conn.Write([]byte("x")); err != nil {
				t.Error(err)
			}
			_ = conn.Close()
			served <- struct{}{}
		}
	}
	var clients sync.WaitGroup
	for range 10 {
		clients.Go(func() {
			for range connections / 10 {
				conn, err := net.Dial("unix", cfg.Path)
				if err != nil {
					t.Error(err)
					continue
				}
				_ = conn.SetReadDeadline(time.Now().Add(30 * time.Second))
				if n, err := conn.Read(make([]byte, 1)); n != 1 {
					t.Errorf("refused: %v", err)
				}
				_ = conn.Close()
			}
		})
	}
	for n := 0; n < connections; {
		done := make(chan struct{})
		go func() { defer close(done); serve(now) }()
		for range min(7, connections-n) {
			<-served
			n++
		}
		next := take()
		_ = now.Close()
		<-done
		for len(served) > 0 {
			<-served
			n++
		}
		now = next
	}
	clients.Wait()

	group := os.Getegid()
	cfg.Mode, cfg.Group = 0o660, &group
	wider := take()
	if info, err := os.Lstat(cfg.Path); err != nil || info.Mode().Perm() != 0o660 {
		t.Errorf("mode: %v, %v", info.Mode(), err)
	}
	if err := wider.undo(); err != nil {
		t.Error(err)
	}
	if info, err := os.Lstat(cfg.Path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode: %v, %v", info.Mode(), err)
	}
	_ = wider.Close()
	_ = wider.Close()
	if _, err := os.Lstat(cfg.Path); err != nil {
		t.Errorf("it went before its last lease: %v", err)
	}
	if err := now.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(cfg.Path); !errors.Is(err, os.ErrNotExist) || len(s.held) != 0 {
		t.Errorf("left: %v, %d", err, len(s.held))
	}
	if _, err := now.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("accepted after the end: %v", err)
	}
}

// Who holds on to as many connections as a socket takes gets no more, until he lets go; and
// the kernel still says who he is.
func TestManyConnections(t *testing.T) {
	dir, err := os.MkdirTemp("", "df")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	s := newShelf()
	s.most = 2
	path := filepath.Join(dir, "s")
	l, err := s.unix(agent.SocketConfig{Path: path})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	taken := make(chan net.Conn, 8)
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			if _, err := conn.Write([]byte("x")); err != nil {
				t.Error(err)
			}
			taken <- conn
		}
	}()
	connect := func() bool {
		t.Helper()
		conn, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		_ = conn.SetReadDeadline(time.Now().Add(30 * time.Second))
		_, err = conn.Read(make([]byte, 1))
		if errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal("it is neither taken nor closed")
		}
		return err == nil
	}
	for range 2 {
		if !connect() {
			t.Fatal("refused")
		}
	}
	for range 3 {
		if connect() {
			t.Error("one more is taken")
		}
	}
	first := <-taken
	if _, ok := first.(syscall.Conn); !ok {
		t.Error("nobody can ask who called")
	}
	_, _ = first.Close(), first.Close() // counted once
	if !connect() {
		t.Error("refused though there is room")
	}
	if connect() {
		t.Error("one more is taken, for one that was closed twice")
	}
}
