package boltstore_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/broker/boltstore"
	"github.com/dayflyhq/dayfly/broker/storetest"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
	"go.etcd.io/bbolt"
)

// The variables that make the test binary a child: the store's path, what to do
// with it, and the run's number.
const (
	childPath = "DAYFLY_TEST_STORE"
	childRole = "DAYFLY_TEST_ROLE"
	childRun  = "DAYFLY_TEST_RUN"
)

func TestMain(m *testing.M) {
	var err error
	switch os.Getenv(childRole) {
	case "load":
		err = load(os.Getenv(childPath), os.Getenv(childRun))
	case "backup":
		err = copyUntilKilled(os.Getenv(childPath))
	case "restore":
		err = restoreUntilKilled(os.Getenv(childPath))
	case "prune":
		err = pruneUntilKilled(os.Getenv(childPath))
	case "full":
		err = fillUp(os.Getenv(childPath))
	default:
		os.Exit(m.Run())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func child(t *testing.T, role, path string, run int) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childRole+"="+role, childPath+"="+path, childRun+"="+strconv.Itoa(run))
	cmd.Stderr = os.Stderr
	return cmd
}

// load issues and appends until it is killed, and says what it was told is durable.
func load(path, run string) error {
	s, err := boltstore.Open(boltstore.Config{Path: path})
	if err != nil {
		return err
	}
	n, err := strconv.Atoi(run)
	if err != nil {
		return err
	}
	var (
		next atomic.Int64
		mu   sync.Mutex
	)
	say := func(what string, v any) {
		mu.Lock()
		defer mu.Unlock()
		fmt.Println(what, v)
	}
	next.Store(int64(n) * 1_000_000)
	failed := make(chan error)
	for w := range 8 {
		go func() {
			for {
				i := int(next.Add(1))
				if w == 0 {
					r, err := s.Append(context.Background(), storetest.Next(storetest.Revocation("r", revocation.Identity(storetest.Identity(i)))))
					if err != nil {
						failed <- err
						return
					}
					say("record", r.Seq)
					continue
				}
				st, err := s.State(context.Background())
				if err != nil {
					failed <- err
					return
				}
				g := storetest.Grant(i, storetest.Identity(w), noon, st.Head)
				if err := s.Issue(context.Background(), g, storetest.Admit); err != nil {
					failed <- err
					return
				}
				say("grant", g.ID())
			}
		}()
	}
	return <-failed
}

// TestKill kills a process under load at moments of chance. What it had been told is
// durable is there.
func TestKill(t *testing.T) {
	path, open := place(t, storetest.Era(1), nil)
	var grants []token.GrantID
	records := uint64(1)
	for run := range 5 {
		cmd := child(t, "load", path, run)
		killAfter(t, cmd, 50+rand.IntN(500), func(what, value string) {
			switch what {
			case "grant":
				if id, err := token.ParseGrantID(value); err == nil { // else cut off in the middle
					grants = append(grants, id)
				}
			case "record":
				if n, err := strconv.ParseUint(value, 10, 64); err == nil {
					records = max(records, n)
				}
			}
		})
		if _, err := boltstore.Check(t.Context(), path); err != nil {
			t.Fatal(err)
		}
	}
	s, err := open()
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range grants {
		if _, err := s.Grant(t.Context(), id); err != nil {
			t.Errorf("grant %s was issued: %v", id, err)
		}
	}
	if st, err := s.State(t.Context()); err != nil || st.Head.Seq < records {
		t.Errorf("record %d was appended, the head is %s, %v", records, st.Head, err)
	}
	t.Logf("%d grants and %d records survived", len(grants), records)
}

// expired is when the last of the days that TestKillWhilePruning prunes has ended.
var expired = noon.AddDate(0, 0, 5).Truncate(24 * time.Hour)

// pruneUntilKilled prunes and issues meanwhile, and says what it was told is durable.
func pruneUntilKilled(path string) error {
	s, err := boltstore.Open(boltstore.Config{Path: path})
	if err != nil {
		return err
	}
	failed := make(chan error)
	go func() {
		report, err := s.Prune(context.Background(), broker.Pruning{GrantsExpiredBefore: expired})
		if err != nil {
			failed <- err
			return
		}
		fmt.Println("pruned", report.Grants)
	}()
	go func() {
		st, err := s.State(context.Background())
		for n := rand.IntN(1 << 30); err == nil; n++ {
			g := storetest.Grant(n, storetest.Identity(n), expired.Add(time.Hour), st.Head)
			if err = s.Issue(context.Background(), g, storetest.Admit); err == nil {
				fmt.Println("grant", g.ID())
			}
		}
		failed <- err
	}()
	return <-failed
}

// TestKillWhilePruning kills a process that empties days of grants, between its steps or
// in one. The days are gone whole or not at all, and no parent before its child; and in
// the end a pruning leaves nothing of them in the file.
func TestKillWhilePruning(t *testing.T) {
	path, open := place(t, storetest.Era(1), nil)
	s, err := open()
	if err != nil {
		t.Fatal(err)
	}
	st, err := s.State(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	const days, chains = 5, 600 // a day takes several steps
	var wg sync.WaitGroup
	for i := range days * chains {
		wg.Go(func() {
			root := storetest.Grant(2*i, storetest.Identity(i), noon.AddDate(0, 0, i%days), st.Head)
			for _, g := range []*broker.Grant{root, storetest.Derive(2*i+1, root, storetest.Identity(-i), st.Head)} {
				if err := s.Issue(context.Background(), g, storetest.Admit); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	var issued []token.GrantID
	began := false
	for range 6 {
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		issued = append(issued, killWhilePruning(t, path)...)
		if _, err := boltstore.Check(t.Context(), path); err != nil {
			t.Fatal(err)
		}
		if s, err = open(); err != nil {
			t.Fatal(err)
		}
		old, _, err := s.Grants(t.Context(), broker.GrantQuery{Limit: 1 << 20, Match: func(g *broker.Grant) bool { return g.Expires.Before(expired) }})
		if err != nil {
			t.Fatal(err)
		}
		if len(old) != 0 && (began || len(old) != 2*days*chains) {
			t.Fatalf("%d old grants are seen", len(old))
		}
		began = len(old) == 0
	}
	report, err := s.Prune(t.Context(), broker.Pruning{GrantsExpiredBefore: expired})
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range issued {
		if _, err := s.Grant(t.Context(), id); err != nil {
			t.Errorf("grant %s was issued: %v", id, err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if n := keysOf(t, path, "dropped"); n != 0 {
		t.Errorf("%d keys are left", n)
	}
	t.Logf("%d grants issued meanwhile, the last pruning had %d left", len(issued), report.Grants)
}

// TestPruneDayTwice: a day of which an earlier pruning has left something waits for the next
// one, and the days behind it, in which its parents are, with it.
func TestPruneDayTwice(t *testing.T) {
	path, open := place(t, storetest.Era(1), nil)
	s, err := open()
	if err != nil {
		t.Fatal(err)
	}
	st, err := s.State(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	root := storetest.Grant(1, storetest.Identity(1), noon.AddDate(0, 0, 1), st.Head)
	child := storetest.Derive(2, root, storetest.Identity(2), st.Head)
	child.Expires = noon // a day before its parent
	for _, g := range []*broker.Grant{root, child} {
		if err := s.Issue(t.Context(), g, storetest.Admit); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	leaveDropped(t, path, noon.Format("20060102"))
	if s, err = open(); err != nil {
		t.Fatal(err)
	}
	for _, want := range []int{2, 0} {
		if _, err := s.Prune(t.Context(), broker.Pruning{GrantsExpiredBefore: expired}); err != nil {
			t.Fatal(err)
		}
		left, _, err := s.Grants(t.Context(), broker.GrantQuery{Limit: 10})
		if err != nil || len(left) != want {
			t.Errorf("%d grants are left, want %d, %v", len(left), want, err)
		}
		if _, err := s.(*boltstore.Store).Check(t.Context()); err != nil {
			t.Error(err)
		}
	}
}

// leaveDropped makes a file that nobody serves one in which a pruning of a day was killed.
func leaveDropped(t *testing.T, path, day string) {
	t.Helper()
	db, err := bbolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		dropped, err := tx.CreateBucket([]byte("dropped"))
		if err != nil {
			return err
		}
		b, err := dropped.CreateBucket([]byte(day))
		if err != nil {
			return err
		}
		return b.Put([]byte("left"), []byte("over"))
	})
	if err := errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
}

// killWhilePruning returns the grants that were issued before the kill.
func killWhilePruning(t *testing.T, path string) (issued []token.GrantID) {
	killAfter(t, child(t, "prune", path, 0), rand.IntN(30), func(what, value string) {
		if id, err := token.ParseGrantID(value); what == "grant" && err == nil { // else cut off in the middle
			issued = append(issued, id)
		}
	})
	return issued
}

// killAfter runs a child until it has said so many lines more than one, and tells of the two
// words of each that came.
func killAfter(t *testing.T, cmd *exec.Cmd, kill int, said func(what, value string)) {
	t.Helper()
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for lines := bufio.NewScanner(out); lines.Scan(); kill-- {
		what, value, _ := strings.Cut(lines.Text(), " ")
		said(what, value)
		if kill == 0 {
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := cmd.Wait(); err == nil {
		t.Fatal("the child ended by itself")
	}
}

// keysOf counts the keys of a bucket and of those in it, of a file that nobody serves.
func keysOf(t *testing.T, path, bucket string) (n int) {
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	err = db.View(func(tx *bbolt.Tx) error {
		n = tx.Bucket([]byte(bucket)).Stats().KeyN
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// fillUp fills a store whose process may not write beyond a size, as if the disk
// were full, and prints each thing that it found right.
func fillUp(path string) error {
	if err := limitFiles(3 << 20); err != nil {
		return err
	}
	s, err := boltstore.Open(boltstore.Config{Path: path, Reserve: 1 << 20})
	if err != nil {
		return err
	}
	if err := exhaust(s); err != nil {
		return err
	}
	// Room comes back.
	if err := limitFiles(64 << 20); err != nil {
		return err
	}
	if _, err := issueUntil(s, 5_000_000, 2000); err != nil {
		return fmt.Errorf("issuing with room again: %w", err)
	}
	fmt.Println("recovered")
	return s.Close()
}

func limitFiles(size uint64) error {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_FSIZE, &limit); err != nil {
		return err
	}
	limit.Cur = size
	return syscall.Setrlimit(syscall.RLIMIT_FSIZE, &limit)
}

// exhaust issues until the store is full, and looks at what still works.
func exhaust(s broker.Store) error {
	ctx := context.Background()
	n, err := issueUntil(s, 0, 100_000)
	if !errors.Is(err, broker.ErrStoreFull) {
		return fmt.Errorf("after %d grants: %w", n, err)
	}
	// Records this large need most of the reserve: more than a batch of issues leaves.
	reason := strings.Repeat("r", 4<<10)
	for i := range 80 {
		if _, err := s.Append(ctx, storetest.Next(storetest.Revocation(reason, revocation.Identity(storetest.Identity(i))))); err != nil {
			return fmt.Errorf("append %d on a full disk: %w", i, err)
		}
		if err := s.Observe(ctx); err != nil {
			return fmt.Errorf("proof %d on a full disk: %w", i, err)
		}
		if err := s.Observe(ctx, broker.Observation{Key: "verifier/1", Value: []byte(strconv.Itoa(i))}); err != nil {
			return fmt.Errorf("observation %d on a full disk: %w", i, err)
		}
	}
	// A lone grant may still fit where a batch of sixteen did not.
	if n, err := issueUntil(s, 1_000_000, 100_000); !errors.Is(err, broker.ErrStoreFull) {
		return fmt.Errorf("issuing %d more on a full disk: %w", n, err)
	}
	return nil
}

// issueUntil issues n grants, or up to the first error. It says how many.
func issueUntil(s broker.Store, from, n int) (int, error) {
	st, err := s.State(context.Background())
	if err != nil {
		return 0, err
	}
	var (
		wg    sync.WaitGroup
		next  atomic.Int64
		done  atomic.Int64
		first atomic.Pointer[error]
	)
	for range 16 {
		wg.Go(func() {
			for first.Load() == nil {
				i := int(next.Add(1))
				if i > n {
					return
				}
				g := storetest.Grant(from+i, storetest.Identity(i), noon, st.Head)
				if err := s.Issue(context.Background(), g, storetest.Admit); err != nil {
					first.CompareAndSwap(nil, &err)
					return
				}
				done.Add(1)
			}
		})
	}
	wg.Wait()
	if err := first.Load(); err != nil {
		return int(done.Load()), *err
	}
	return int(done.Load()), nil
}

// TestFullDisk runs a store in a process that the kernel stops from making files
// larger, which a write meets as it meets a full disk.
func TestFullDisk(t *testing.T) {
	path, _ := place(t, storetest.Era(1), nil)
	cmd := child(t, "full", path, 0)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	said, err := io.ReadAll(out)
	if err := errors.Join(err, cmd.Wait()); err != nil || string(said) != "recovered\n" {
		t.Errorf("%q, %v", said, err)
	}
	if _, err := boltstore.Check(t.Context(), path); err != nil {
		t.Error(err)
	}
}

// TestPruningMakesRoom fills a store that may not grow, and prunes it.
func TestPruningMakesRoom(t *testing.T) {
	_, open := place(t, storetest.Era(1), func(cfg *boltstore.Config) {
		cfg.MaxBytes, cfg.Reserve = 3<<20, 1<<20
	})
	s, err := open()
	if err != nil {
		t.Fatal(err)
	}
	if err := exhaust(s); err != nil {
		t.Fatal(err)
	}
	report, err := s.Prune(t.Context(), broker.Pruning{GrantsExpiredBefore: noon.Add(48 * time.Hour)})
	if err != nil || report.Grants == 0 {
		t.Fatalf("pruned %d grants, %v", report.Grants, err)
	}
	if n, err := issueUntil(s, 2_000_000, 500); err != nil {
		t.Errorf("after pruning, %d grants: %v", n, err)
	}
}
