package deliver_test

import (
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/agent/deliver"
)

// What is delivered changes while it is delivered: the same stays as it is, what changed is
// never missing, what is gone goes, and a change that can't be made is none.
func TestApply(t *testing.T) {
	dir := folder(t)
	s := newShelf(t)
	s.put(time.Hour, "orders", "web", "ledger")
	at := func(name string) string { return filepath.Join(dir, name) }
	stays, changes, goes := file(at("stays"), "orders"), file(at("changes"), "web"), file(at("goes"), "ledger")
	all := deliver.Target{Path: at("all"), Directory: true, Files: []deliver.File{
		{Name: "one", Format: deliver.Token, Credentials: one("orders")}, {Name: "two", Format: deliver.Token, Credentials: one("web")},
	}}
	d, end := begin(t, s.config(stays, changes, goes, all))
	eventually(t, "all", func() bool { return d.Counts.Written.Load() == 4 })
	before, err := os.Lstat(stays.Path)
	if err != nil {
		t.Fatal(err)
	}

	// Somebody reads what changes all the time, and never misses it.
	var missed, reads atomic.Int64
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
			}
			reads.Add(1)
			for _, path := range []string{changes.Path, all.Path + "/one"} {
				if content, err := os.ReadFile(path); err != nil || len(content) == 0 {
					missed.Add(1)
				}
			}
		}
	}()
	changed := changes
	changed.Files = []deliver.File{{Format: deliver.Env, Variable: "WEB", Credentials: one("web")}}
	other := all
	other.Files = []deliver.File{all.Files[0], {Name: "three", Format: deliver.Token, Credentials: one("ledger")}}
	fresh := file(at("fresh"), "ledger")
	if err := d.Apply([]deliver.Target{stays, changed, fresh, other}); err != nil {
		t.Fatal(err)
	}
	if !gone(goes.Path) {
		t.Error("what is no target any more is still there")
	}
	eventually(t, "the new ones", func() bool {
		content, _ := os.ReadFile(changes.Path)
		return strings.HasPrefix(string(content), "WEB=") && holds(fresh.Path, s.token("ledger")) && holds(all.Path+"/three", s.token("ledger")) && gone(all.Path+"/two")
	})
	close(stop)
	<-done
	if missed.Load() > 0 {
		t.Errorf("%d of %d times there was nothing to read", missed.Load(), reads.Load())
	}
	if after, err := os.Lstat(stays.Path); err != nil || !os.SameFile(before, after) || after.ModTime() != before.ModTime() {
		t.Errorf("what stays was touched: %v", err)
	}
	if n := len(d.Status()); n != 4 {
		t.Errorf("status of %d targets, want 4", n)
	}

	// A change that can't be made.
	if err := os.WriteFile(at("foreign"), []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, bad := range map[string]deliver.Target{
		"foreign": file(at("foreign"), "orders"), "overlap": file(all.Path+"/x", "orders"), "no folder": file(at("none/x"), "orders"), "invalid": file("x", "orders"),
	} {
		if err := d.Apply([]deliver.Target{other, bad}); err == nil {
			t.Errorf("%s: it was applied", name)
		}
	}
	s.put(time.Hour, "orders")
	eventually(t, "the renewal of what there was before", func() bool { return holds(stays.Path, s.token("orders")) && holds(all.Path+"/one", s.token("orders")) })
	if !holds(at("foreign"), "mine") {
		t.Error("a foreign file was touched")
	}

	// What can't be written yet as it should be stays as it was, and goes when it dies.
	waits := changed
	waits.Files = []deliver.File{{Format: deliver.Token, Credentials: one("unknown")}}
	if err := d.Apply([]deliver.Target{waits}); err != nil {
		t.Fatal(err)
	}
	if gone(changes.Path) || !gone(stays.Path) || !gone(all.Path+"/one") {
		t.Error("what waits has gone, or what is no target is there")
	}
	s.kill("web")
	eventually(t, "the end of what was revoked", func() bool { return gone(changes.Path) })
	s.put(time.Hour, "unknown")
	eventually(t, "the new content", func() bool { return holds(changes.Path, s.token("unknown")) })
	end()
	if !gone(changes.Path) {
		t.Error("left at the end")
	}
	if err := d.Apply(nil); err == nil {
		t.Error("applied after the end")
	}
}
