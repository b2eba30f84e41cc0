package deliver_test

import (
	"encoding/binary"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/agent/deliver"
	"golang.org/x/sys/unix"
)

// watch returns the names that are moved into a folder, as the kernel tells of them; each
// time it calls look before it reads on.
func watch(t *testing.T, dir string, look func(name string)) (count func(name string) int64) {
	t.Helper()
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := unix.InotifyAddWatch(fd, dir, unix.IN_MOVED_TO); err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "inotify")
	counts := map[string]*atomic.Int64{"..data": {}, "orders.jwt": {}}
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 4096)
		for {
			n, err := f.Read(buf)
			if err != nil {
				return
			}
			for at := 0; at < n; {
				size := int(binary.NativeEndian.Uint32(buf[at+12:]))
				name := strings.TrimRight(string(buf[at+16:at+16+size]), "\x00")
				at += 16 + size
				look(name)
				if c := counts[name]; c != nil {
					c.Add(1)
				} else {
					t.Errorf("%s was moved into the folder", name)
				}
			}
		}
	}()
	t.Cleanup(func() { _ = f.Close(); <-done })
	return func(name string) int64 { return counts[name].Load() }
}

// A watcher sees one change however many files there are, and after it all of them are of
// one generation.
func TestOneChange(t *testing.T) {
	dir := folder(t)
	s := newShelf(t)
	s.put(time.Hour, "orders")
	all := filepath.Join(dir, "all")
	target := deliver.Target{Path: all, Directory: true}
	for i := range 8 {
		target.Files = append(target.Files, deliver.File{Name: fmt.Sprint("f", i), Format: deliver.Token, Credentials: one("orders")})
	}
	d, _ := begin(t, s.config(target, file(filepath.Join(dir, "orders.jwt"), "orders")))
	eventually(t, "the first", func() bool { return d.Counts.Written.Load() == 2 })
	swaps := watch(t, all, func(string) {
		// Through one opened link, as a program that wants all of one moment does.
		root, err := os.OpenRoot(all + "/..data")
		if err != nil {
			t.Error(err)
			return
		}
		defer root.Close()
		first := ""
		for i := range 8 {
			content, err := root.ReadFile(fmt.Sprint("f", i))
			if i == 0 {
				first = string(content)
			}
			if err != nil || string(content) != first {
				t.Errorf("file %d is of another generation than the first, or: %v", i, err)
			}
		}
	})
	renames := watch(t, dir, func(string) {})
	for i := range int64(20) {
		s.put(time.Hour, "orders")
		eventually(t, "both", func() bool { return d.Counts.Written.Load() == uint64(4+2*i) })
		eventually(t, "one event each", func() bool { return swaps("..data") >= i+1 && renames("orders.jwt") >= i+1 })
	}
	if swaps("..data") != 20 || renames("orders.jwt") != 20 {
		t.Errorf("%d and %d events for 20 changes", swaps("..data"), renames("orders.jwt"))
	}
}

// The process whose number is in a file gets the signal; while there is no file there is
// nobody to tell, and a number that is nobody's is a failure that passes.
func TestSignal(t *testing.T) {
	dir := folder(t)
	s := newShelf(t)
	s.put(time.Hour, "orders")
	hups := make(chan os.Signal, 16)
	signal.Notify(hups, syscall.SIGWINCH)
	defer signal.Stop(hups)
	pidFile := filepath.Join(dir, "pid")
	target := file(filepath.Join(dir, "orders.jwt"), "orders")
	target.Change = &deliver.Change{PIDFile: pidFile, Signal: "WINCH", MinInterval: time.Millisecond}
	d, _ := begin(t, s.config(target))
	eventually(t, "word to nobody", func() bool { return d.Counts.Told.Load() == 1 })
	if d.Status()[0].ChangeErr != nil {
		t.Errorf("nobody there is a failure: %v", d.Status()[0].ChangeErr)
	}
	for content, mode := range map[string]os.FileMode{"-1": 0o600, "1": 0o600, "x": 0o600, fmt.Sprint(os.Getpid()): 0o606, "4194305": 0o600} {
		if err := os.WriteFile(pidFile, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(pidFile, mode); err != nil {
			t.Fatal(err)
		}
		before := d.Counts.TellFailures.Load()
		s.put(time.Hour, "orders")
		eventually(t, "a failure", func() bool { return d.Counts.TellFailures.Load() > before })
		if err := os.Remove(pidFile); err != nil {
			t.Fatal(err)
		}
		eventually(t, "its end", func() bool { return d.Status()[0].ChangeErr == nil })
	}
	if len(hups) != 0 {
		t.Error("signalled by a file that doesn't say whom")
	}
	if err := os.WriteFile(pidFile, fmt.Appendln(nil, os.Getpid()), 0o644); err != nil {
		t.Fatal(err)
	}
	s.put(time.Hour, "orders")
	select {
	case <-hups:
	case <-time.After(patience):
		t.Error("no signal")
	}
}

// A folder of somebody else is no place for a credential, and root may give a file away.
func TestOwners(t *testing.T) {
	if os.Geteuid() != 0 {
		testOwnersUnprivileged(t)
		return
	}
	dir := folder(t)
	s := newShelf(t)
	s.put(time.Hour, "orders")
	uid, gid := 12345, 23456
	mine := file(filepath.Join(dir, "orders.jwt"), "orders")
	mine.UID, mine.GID, mine.Mode = &uid, &gid, 0o440
	all := deliver.Target{Path: filepath.Join(dir, "all"), Directory: true, UID: &uid, Files: []deliver.File{{Name: "one", Format: deliver.Token, Credentials: one("orders")}}}
	d, _ := begin(t, s.config(mine, all))
	eventually(t, "both", func() bool { return d.Counts.Written.Load() == 2 })
	for path, want := range map[string][3]uint32{mine.Path: {0o440, 12345, 23456}, all.Path + "/..data/one": {0o600, 12345, uint32(os.Getegid())}} {
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil || [3]uint32{st.Mode & 0o7777, st.Uid, st.Gid} != want {
			t.Errorf("%s: %v: %o %d %d, want %o", path, err, st.Mode, st.Uid, st.Gid, want)
		}
	}
	var st unix.Stat_t
	if err := unix.Stat(all.Path, &st); err != nil || st.Mode&0o777 != 0o711 || st.Uid != 0 {
		t.Errorf("the folder: %v: %o of %d", err, st.Mode, st.Uid)
	}
	theirs := filepath.Join(dir, "theirs")
	if err := os.Mkdir(theirs, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(theirs, uid, -1); err != nil {
		t.Fatal(err)
	}
	refused, err := deliver.New(s.config(file(theirs+"/f", "orders")))
	if err != nil {
		t.Fatal(err)
	}
	if err := refused.Open(); err == nil || !strings.Contains(err.Error(), "belongs to user 12345") {
		t.Errorf("in another's folder: %v", err)
	}
}

// testOwnersUnprivileged: who isn't root can't give files away, and says so.
func testOwnersUnprivileged(t *testing.T) {
	dir := folder(t)
	s := newShelf(t)
	s.put(time.Hour, "orders")
	uid := os.Geteuid() + 1
	target := file(filepath.Join(dir, "orders.jwt"), "orders")
	target.UID = &uid
	d, _ := begin(t, s.config(target))
	eventually(t, "the refusal", func() bool { return d.Status()[0].Err != nil })
	if left, _ := os.ReadDir(dir); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
}
