package boltstore_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/broker/boltstore"
	"github.com/dayflyhq/dayfly/broker/storetest"
	"github.com/dayflyhq/dayfly/proto/revocation"
)

// from fills a backup with what a reader gives.
func from(r io.Reader) func(io.Writer) error {
	return func(w io.Writer) error { _, err := io.Copy(w, r); return err }
}

func openStore(t *testing.T, configure func(*boltstore.Config)) (string, *boltstore.Store) {
	t.Helper()
	path, open := place(t, storetest.Era(1), configure)
	s, err := open()
	if err != nil {
		t.Fatal(err)
	}
	return path, s.(*boltstore.Store)
}

// TestBackupWhileServing: a copy that is taken under load is one moment of the store, in
// which everything is that was durable when it began.
func TestBackupWhileServing(t *testing.T) {
	_, s := openStore(t, nil)
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer func() { stop(); wg.Wait() }()
	var issued atomic.Int64
	for w := range 4 {
		wg.Go(func() {
			for i := 1; ctx.Err() == nil; i++ {
				st, err := s.State(ctx)
				if err != nil {
					return
				}
				if s.Issue(ctx, storetest.Grant(w*1_000_000+i, storetest.Identity(w), noon, st.Head), storetest.Admit) == nil {
					issued.Add(1)
				}
				if w == 0 {
					_, _ = s.Append(ctx, storetest.Next(storetest.Revocation("r", revocation.Identity(storetest.Identity(i)))))
				}
			}
		})
	}
	for n := range 3 {
		for before := issued.Load(); issued.Load() < before+50; {
			_ = s.Observe(ctx)
		}
		before := issued.Load()
		to := filepath.Join(t.TempDir(), "backup.db")
		b, err := s.Backup()
		if err != nil {
			t.Fatal(err)
		}
		if n == 0 {
			if _, err := s.Backup(); !errors.Is(err, boltstore.ErrBusy) {
				t.Errorf("a second backup at once: %v", err)
			}
		}
		report, err := boltstore.SaveBackup(t.Context(), to, noon, from(b))
		if err := errors.Join(err, b.Close()); err != nil {
			t.Fatal(err)
		}
		if report.Head != b.Head || int64(report.Grants) < before || !report.Backup.Equal(noon) {
			t.Errorf("%d grants up to %s, want at least %d up to %s", report.Grants, report.Head, before, b.Head)
		}
		if info, err := os.Stat(to); err != nil || info.Mode() != 0o600 || info.Size() < b.Size {
			t.Errorf("the file: %v, %v", info, err)
		}
		if again, err := boltstore.Check(t.Context(), to); err != nil || !again.Backup.Equal(noon) {
			t.Errorf("checked again: %+v, %v", again, err)
		}
		if _, err := boltstore.Open(boltstore.Config{Path: to}); !errors.Is(err, boltstore.ErrBackup) {
			t.Errorf("a backup is served: %v", err)
		}
		if _, err := boltstore.SaveBackup(t.Context(), to, noon, func(io.Writer) error { t.Error("written over"); return nil }); !errors.Is(err, boltstore.ErrExists) {
			t.Errorf("over an existing file: %v", err)
		}
	}
}

// gaveWay reads a backup to its end, which must be that it gave way.
func gaveWay(t *testing.T, b *boltstore.Backup) {
	t.Helper()
	if _, err := io.Copy(io.Discard, b); !errors.Is(err, boltstore.ErrGaveWay) {
		t.Errorf("read: %v, want ErrGaveWay", err)
	}
	if err := b.Close(); err != nil {
		t.Error(err)
	}
}

// TestSlowBackup: a backup that nobody reads holds up no commit, and the file grows by a
// bounded amount.
func TestSlowBackup(t *testing.T) {
	for name, c := range map[string]struct {
		pinned    int64
		mapped    int
		configure func(*boltstore.Config)
	}{
		"pinned pages are bounded": {pinned: 1 << 20, mapped: 256 << 20},
		"the map must grow":        {pinned: 1 << 40, mapped: 1 << 20, configure: func(c *boltstore.Config) { c.Reserve = 64 << 10 }},
		"the disk is full":         {pinned: 1 << 40, mapped: 256 << 20, configure: func(c *boltstore.Config) { c.Reserve, c.MaxBytes = 64<<10, 2<<20 }},
	} {
		t.Run(name, func(t *testing.T) {
			defer boltstore.SetMaxPinned(c.pinned)()
			defer boltstore.SetMap(c.mapped)()
			path, s := openStore(t, c.configure)
			b, err := s.Backup()
			if err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(b, make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
			st, err := s.State(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			for i := range 300 {
				o := broker.Observation{Key: fmt.Sprintf("k/%d", i%8), Value: bytes.Repeat([]byte{byte(i)}, 30<<10)}
				if err := s.Observe(t.Context(), o); err != nil {
					t.Fatalf("observation %d: %v", i, err)
				}
				if err := s.Issue(t.Context(), storetest.Grant(i, storetest.Identity(i), noon, st.Head), storetest.Admit); err != nil {
					t.Fatalf("issue %d: %v", i, err)
				}
			}
			gaveWay(t, b)
			if info, err := os.Stat(path); err != nil || info.Size() > 20<<20 {
				t.Errorf("the file has %d bytes, %v", info.Size(), err)
			}
			next, err := s.Backup()
			if err != nil {
				t.Fatal(err)
			}
			if _, err := boltstore.SaveBackup(t.Context(), filepath.Join(t.TempDir(), "b"), noon, from(next)); err != nil {
				t.Errorf("the next backup: %v", err)
			}
			if err := next.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestBackupOfClosingStore: a backup that nobody reads doesn't keep a store from closing.
func TestBackupOfClosingStore(t *testing.T) {
	_, s := openStore(t, nil)
	b, err := s.Backup()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	gaveWay(t, b)
	if _, err := s.Backup(); !errors.Is(err, broker.ErrStoreClosed) {
		t.Errorf("of a closed store: %v", err)
	}
}

// TestBackupIsChecked: what isn't a whole store is no backup, and leaves no file.
func TestBackupIsChecked(t *testing.T) {
	path, s := openStore(t, nil)
	if _, err := issueUntil(s, 0, 200); err != nil {
		t.Fatal(err)
	}
	if err := boltstore.CopyFile(t.Context(), path, func(int64) {}, io.Discard); !errors.Is(err, boltstore.ErrLocked) {
		t.Errorf("copying a store that is served: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	var good bytes.Buffer
	size := int64(-1)
	if err := boltstore.CopyFile(t.Context(), path, func(n int64) { size = n }, &good); err != nil || size != int64(good.Len()) {
		t.Fatalf("%d of %d bytes, %v", good.Len(), size, err)
	}
	damaged := bytes.Clone(good.Bytes())
	for i := 4 * 4096; i < len(damaged); i++ {
		damaged[i] ^= 0x5a
	}
	dir := t.TempDir()
	for name, fill := range map[string]func(io.Writer) error{
		"nothing":   func(io.Writer) error { return nil },
		"cut off":   from(bytes.NewReader(good.Bytes()[:good.Len()/2])),
		"garbage":   from(strings.NewReader(strings.Repeat("garbage ", 1000))),
		"damaged":   from(bytes.NewReader(damaged)),
		"a failure": func(w io.Writer) error { _, _ = w.Write(good.Bytes()); return errDisk },
	} {
		if _, err := boltstore.SaveBackup(t.Context(), filepath.Join(dir, "backup.db"), noon, fill); err == nil {
			t.Errorf("%s is a backup", name)
		}
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	if _, err := boltstore.SaveBackup(t.Context(), filepath.Join(dir, "backup.db"), noon, from(&good)); err != nil {
		t.Error(err)
	}
}

// backupOf makes a store with grants and locks, and a backup of it.
func backupOf(t *testing.T, dir string) (path, backup string) {
	t.Helper()
	path, backup = filepath.Join(dir, "store.db"), filepath.Join(dir, "backup.db")
	if err := boltstore.Create(path, storetest.Era(1)); err != nil {
		t.Fatal(err)
	}
	s, err := boltstore.Open(boltstore.Config{Path: path})
	if err != nil {
		t.Fatal(err)
	}
	fill(t, s, 0)
	b, err := s.Backup()
	if err != nil {
		t.Fatal(err)
	}
	_, err = boltstore.SaveBackup(t.Context(), backup, noon, from(b))
	fill(t, s, 1000)
	if err := errors.Join(err, b.Close(), s.Close()); err != nil {
		t.Fatal(err)
	}
	return path, backup
}

func fill(t *testing.T, s broker.Store, n int) {
	t.Helper()
	if _, err := issueUntil(s, n, 100); err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		if _, err := s.Append(t.Context(), storetest.Next(storetest.Revocation("r", revocation.Identity(storetest.Identity(n+i))))); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.Prune(t.Context(), broker.Pruning{Drop: []uint64{3}}); err != nil {
		t.Fatal(err)
	}
}

func planOf(t *testing.T, backup, locksFrom string) *broker.Restoration {
	t.Helper()
	p, err := planFrom(t.Context(), backup, locksFrom)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func planFrom(ctx context.Context, backup, locksFrom string) (*broker.Restoration, error) {
	b, err := boltstore.ReadLog(ctx, backup)
	if err != nil {
		return nil, err
	}
	c, err := boltstore.ReadLog(ctx, locksFrom)
	if err != nil {
		return nil, err
	}
	return broker.PlanRestore(broker.Restore{Backup: b, LocksFrom: c, Actor: "test", Now: noon})
}

// TestRestore: a restored store begins a new era behind all numbers, has the backup's
// grants and locks, and those of the second copy as new records.
func TestRestore(t *testing.T) {
	dir := t.TempDir()
	store, backup := backupOf(t, dir)
	path := filepath.Join(dir, "restored.db")
	plan := planOf(t, backup, store)
	report, err := boltstore.Restore(t.Context(), boltstore.RestoreConfig{From: backup, Path: path, Restoration: plan})
	if err != nil || report.Grants != 100 || !report.Backup.IsZero() || report.Dropped != 0 {
		t.Fatalf("%+v, %v", report, err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	if _, err := boltstore.Restore(t.Context(), boltstore.RestoreConfig{From: backup, Path: path, Restoration: plan}); !errors.Is(err, boltstore.ErrExists) {
		t.Errorf("over an existing file: %v", err)
	}
	s, err := boltstore.Open(boltstore.Config{Path: path})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	st, err := s.State(t.Context())
	if err != nil || st.Head.Era <= 1 || st.Horizon.Seq != 2_000_000 || st.Head.Seq != 2_000_003 {
		t.Errorf("%+v, %v", st, err)
	}
	var numbers []uint64
	for r, err := range s.Events(t.Context(), 0) {
		if err != nil {
			t.Fatal(err)
		}
		if numbers = append(numbers, r.Seq); r.Seq == st.Head.Seq {
			break
		}
	}
	if want := []uint64{1, 2, 4, 2_000_000, 2_000_001, 2_000_002, 2_000_003}; !slices.Equal(numbers, want) {
		t.Errorf("records %d, want %d", numbers, want)
	}
	old := storetest.Grant(50_000, storetest.Identity(1), noon, plan.Backup)
	if err := s.Issue(t.Context(), old, storetest.Admit); !errors.Is(err, broker.ErrOffLog) {
		t.Errorf("a grant of the era before: %v", err)
	}
	if err := s.Issue(t.Context(), storetest.Grant(50_001, storetest.Identity(1), noon, st.Head), storetest.Admit); err != nil {
		t.Error(err)
	}
	// A changed backup isn't what was planned.
	if _, err := boltstore.Restore(t.Context(), boltstore.RestoreConfig{From: store, Path: path + "2", Restoration: plan}); err == nil {
		t.Error("another file than the one that was read is restored")
	}
}

// TestRestoreFaults fails each write of a restore once with the data lost and once with
// it kept: the store is whole or not there, and doing it again works.
func TestRestoreFaults(t *testing.T) {
	dir := t.TempDir()
	store, backup := backupOf(t, dir)
	plan := planOf(t, backup, store)
	var steps []string
	cfg := boltstore.RestoreConfig{From: backup, Path: filepath.Join(dir, "all.db"), Restoration: plan}
	boltstore.SetRestoreFault(&cfg, func(step string, write func() error) error { steps = append(steps, step); return write() })
	if _, err := boltstore.Restore(t.Context(), cfg); err != nil || len(steps) != 4 {
		t.Fatalf("steps %q, %v", steps, err)
	}
	for i, broken := range steps {
		for _, kept := range []bool{false, true} {
			name := fmt.Sprintf("%s kept %v", broken, kept)
			cfg.Path = filepath.Join(dir, fmt.Sprintf("%d-%v.db", i, kept))
			boltstore.SetRestoreFault(&cfg, func(step string, write func() error) error {
				if step != broken {
					return write()
				}
				if kept {
					if err := write(); err != nil {
						return err
					}
				}
				return errDisk
			})
			if _, err := boltstore.Restore(t.Context(), cfg); !errors.Is(err, errDisk) {
				t.Errorf("%s: %v", name, err)
			}
			wholeOrNot(t, cfg.Path, plan)
			if _, err := os.Stat(cfg.Path); err == nil {
				continue // the link was kept
			}
			boltstore.SetRestoreFault(&cfg, nil)
			if _, err := boltstore.Restore(t.Context(), cfg); err != nil {
				t.Errorf("%s, again: %v", name, err)
			}
		}
	}
	if left, err := filepath.Glob(filepath.Join(dir, ".dayfly-*")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// wholeOrNot checks that a restored store is whole, or not there.
func wholeOrNot(t *testing.T, path string, plan *broker.Restoration) {
	t.Helper()
	report, err := boltstore.Check(t.Context(), path)
	if errors.Is(err, boltstore.ErrMissing) {
		return
	}
	if err != nil || report.Head.Era != plan.Records[0].Era.Era || report.Head.Seq != plan.Behind.Seq+uint64(len(plan.Records)) {
		t.Errorf("half a store: %+v, %v", report, err)
	}
}

// copyUntilKilled makes backups of a store, one after the other.
func copyUntilKilled(path string) error {
	fmt.Println("begun")
	for {
		to := path + ".backup"
		_, err := boltstore.SaveBackup(context.Background(), to, noon, func(w io.Writer) error {
			return boltstore.CopyFile(context.Background(), path, func(int64) {}, w)
		})
		if err != nil {
			return err
		}
		if err := os.Rename(to, to+".whole"); err != nil {
			return err
		}
	}
}

// restoreUntilKilled restores a backup, again and again.
func restoreUntilKilled(path string) error {
	fmt.Println("begun")
	for {
		plan, err := planFrom(context.Background(), path, filepath.Join(filepath.Dir(path), "store.db"))
		if err != nil {
			return err
		}
		to := path + ".restored"
		if _, err := boltstore.Restore(context.Background(), boltstore.RestoreConfig{From: path, Path: to, Restoration: plan}); err != nil {
			return err
		}
		if err := os.Rename(to, to+".whole"); err != nil {
			return err
		}
	}
}

// TestKillBackupAndRestore kills a process at moments of chance: what is there by its
// name is whole, and the source is as it was.
func TestKillBackupAndRestore(t *testing.T) {
	dir := t.TempDir()
	store, backup := backupOf(t, dir)
	plan := planOf(t, backup, store)
	seen := 0
	for run := range 12 {
		role, source, made := "backup", store, store+".backup"
		if run%2 == 1 {
			role, source, made = "restore", backup, backup+".restored"
		}
		before, err := os.ReadFile(source)
		if err != nil {
			t.Fatal(err)
		}
		cmd := child(t, role, source, run)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(out, make([]byte, 6)); err != nil {
			t.Fatal(err)
		}
		<-time.After(time.Duration(rand.IntN(60)) * time.Millisecond) // any moment will do
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Wait(); err == nil {
			t.Fatal("the child ended by itself")
		}
		for _, path := range []string{made, made + ".whole"} {
			if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
				continue
			}
			seen++
			if role == "restore" {
				wholeOrNot(t, path, plan)
			} else if _, err := boltstore.Check(t.Context(), path); err != nil {
				t.Error(err)
			}
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
		}
		if after, err := os.ReadFile(source); err != nil || !bytes.Equal(before, after) {
			t.Errorf("%s changed what it reads: %v", role, err)
		}
	}
	t.Logf("%d files were there", seen)
}

// TestReadLogOfDamaged: of a damaged file what can be read is read, and it is said that
// there may be more.
func TestReadLogOfDamaged(t *testing.T) {
	_, backup := backupOf(t, t.TempDir())
	good, err := boltstore.ReadLog(t.Context(), backup)
	if err != nil || len(good.Damage) > 0 || len(good.Records) != 3 || len(good.Dropped) != 1 {
		t.Fatalf("%d records, %d dropped, damage %q, %v", len(good.Records), len(good.Dropped), good.Damage, err)
	}
	whole, err := os.ReadFile(backup)
	if err != nil {
		t.Fatal(err)
	}
	// Only what records hold is damaged: bbolt's own pointers into a page would end a
	// process that was built with the race detector, which checks them.
	var places []int
	for at := range whole {
		if bytes.HasPrefix(whole[at:], []byte(`"actor"`)) {
			places = append(places, at)
		}
	}
	salvaged := 0
	for range 100 {
		damaged := slices.Clone(whole)
		for range 1 + rand.IntN(2*len(places)) {
			at := places[rand.IntN(len(places))]
			for i := range 1 + rand.IntN(16) {
				damaged[at+i] = byte(rand.Int())
			}
		}
		path := filepath.Join(t.TempDir(), "damaged.db")
		if err := os.WriteFile(path, damaged, 0o600); err != nil {
			t.Fatal(err)
		}
		c, err := boltstore.ReadLog(t.Context(), path)
		if err != nil {
			continue
		}
		if len(c.Damage) == 0 && len(c.Records) != len(good.Records) {
			t.Fatalf("%d of %d records, and no damage", len(c.Records), len(good.Records))
		}
		if len(c.Damage) > 0 && len(c.Records) > 0 {
			salvaged++
		}
	}
	if salvaged == 0 {
		t.Error("nothing was read of any damaged file")
	}
}
