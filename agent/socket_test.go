package agent_test

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dayflyhq/dayfly/agent"
)

func mode(t *testing.T, path string) fs.FileMode {
	t.Helper()
	info, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	return info.Mode()
}

func TestSocketMode(t *testing.T) {
	dir := tempDir(t)
	path := filepath.Join(dir, "s")
	l, err := agent.Listen(agent.SocketConfig{Path: path})
	if err != nil {
		t.Fatal(err)
	}
	if m := mode(t, path); m != fs.ModeSocket|0o600 {
		t.Errorf("mode %v, want 0600", m)
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 1 {
		t.Errorf("left behind: %v", entries)
	}
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	_ = conn.Close()
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("after Close: %v", err)
	}
	gid := os.Getgid()
	wide, err := agent.Listen(agent.SocketConfig{Path: path, Mode: 0o660, Group: &gid})
	if err != nil {
		t.Fatal(err)
	}
	defer wide.Close()
	if m := mode(t, path); m != fs.ModeSocket|0o660 {
		t.Errorf("mode %v, want 0660", m)
	}
}

func TestSocketRefused(t *testing.T) {
	dir := tempDir(t)
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	live := filepath.Join(dir, "live")
	l, err := agent.Listen(agent.SocketConfig{Path: live})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for _, c := range []struct {
		cfg  agent.SocketConfig
		want string
	}{
		{agent.SocketConfig{Path: "relative"}, "absolute"},
		{agent.SocketConfig{Path: filepath.Join(dir, strings.Repeat("x", 110))}, "107"},
		{agent.SocketConfig{Path: filepath.Join(dir, "s"), Mode: 0o666}, "wider"},
		{agent.SocketConfig{Path: file}, "no socket"},
		{agent.SocketConfig{Path: live}, "another process answers"},
		{agent.SocketConfig{Path: filepath.Join(dir, "missing", "s")}, "no such file"},
	} {
		got, err := agent.Listen(c.cfg)
		if err == nil {
			_ = got.Close()
		}
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %v, want %q", c.cfg, err, c.want)
		}
	}
	if m := mode(t, file); !m.IsRegular() {
		t.Error("the file was touched")
	}
}

// The file of a dead agent is replaced; an agent that was replaced leaves its
// successor's file alone.
func TestStaleSocket(t *testing.T) {
	path := filepath.Join(tempDir(t), "s")
	dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	dead.SetUnlinkOnClose(false)
	if err := dead.Close(); err != nil {
		t.Fatal(err)
	}
	first, err := agent.Listen(agent.SocketConfig{Path: path})
	if err != nil {
		t.Fatalf("over a dead socket: %v", err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	second, err := agent.Listen(agent.SocketConfig{Path: path})
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	_ = first.Close()
	mode(t, path)
}
