package boltstore_test

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/broker/boltstore"
	"github.com/dayflyhq/dayfly/broker/storetest"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/revocation"
)

var errDisk = errors.New("the disk is on fire")

// contents is all that a store says.
func contents(t *testing.T, s broker.Store) string {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	st, err := s.State(ctx)
	if err != nil {
		t.Fatal(err)
	}
	out := fmt.Sprintln(st)
	grants, _, err := s.Grants(ctx, broker.GrantQuery{Limit: 1000})
	if err != nil {
		t.Fatal(err)
	}
	for _, g := range grants {
		out += fmt.Sprintln("grant", g.ID())
	}
	for o, err := range s.Observed(ctx, "") {
		if err != nil {
			t.Fatal(err)
		}
		out += fmt.Sprintf("%s=%s\n", o.Key, o.Value)
	}
	return out
}

// TestFaults breaks each write once with the data lost and once with the data kept.
// Either way the caller gets an error, the store is closed, and what is found after
// opening it again is the old state or the new one, whole.
func TestFaults(t *testing.T) {
	writes := map[string]func(context.Context, broker.Store, feed.Position) error{
		"issue": func(ctx context.Context, s broker.Store, at feed.Position) error {
			return s.Issue(ctx, storetest.Grant(2, storetest.Identity(2), noon, at), storetest.Admit)
		},
		"append": func(ctx context.Context, s broker.Store, at feed.Position) error {
			_, err := s.Append(ctx, storetest.Next(storetest.Revocation("r", revocation.Everything())))
			return err
		},
		"observe": func(ctx context.Context, s broker.Store, at feed.Position) error {
			return s.Observe(ctx, broker.Observation{Key: "k/1", Value: []byte("new")})
		},
		"prune": func(ctx context.Context, s broker.Store, at feed.Position) error {
			_, err := s.Prune(ctx, broker.Pruning{Horizon: at.Seq})
			return err
		},
	}
	for name, write := range writes {
		for _, kept := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s kept %v", name, kept), func(t *testing.T) { testFault(t, write, kept) })
		}
	}
}

func testFault(t *testing.T, write func(context.Context, broker.Store, feed.Position) error, kept bool) {
	broken := false
	_, open := place(t, storetest.Era(1), func(cfg *boltstore.Config) {
		boltstore.SetFault(cfg, func(commit func() error) error {
			if broken && !kept {
				return errDisk
			}
			err := commit()
			if broken {
				return errDisk
			}
			return err
		})
	})
	s, err := open()
	if err != nil {
		t.Fatal(err)
	}
	st, err := s.State(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Issue(t.Context(), storetest.Grant(1, storetest.Identity(1), noon, st.Head), storetest.Admit); err != nil {
		t.Fatal(err)
	}
	before := contents(t, s)
	broken = true
	err = write(t.Context(), s, st.Head)
	if !errors.Is(err, errDisk) || !errors.Is(err, broker.ErrStoreClosed) || errors.Is(err, broker.ErrStoreFull) {
		t.Errorf("a write of unknown outcome: %v", err)
	}
	if err := s.Observe(t.Context()); !errors.Is(err, broker.ErrStoreClosed) {
		t.Errorf("the next call: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	broken = false
	if s, err = open(); err != nil {
		t.Fatal(err)
	}
	if got := contents(t, s); (got != before) != kept {
		t.Errorf("kept %v, and the store went from\n%s to\n%s", kept, before, got)
	}
	if err := s.Observe(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestFaultOfRoom lets the disk be full in the middle of a write: when it can be
// read that nothing was written, the store goes on; when not, it closes.
func TestFaultOfRoom(t *testing.T) {
	for _, kept := range []bool{false, true} {
		broken := false
		_, open := place(t, storetest.Era(1), func(cfg *boltstore.Config) {
			boltstore.SetFault(cfg, func(commit func() error) error {
				if broken && !kept {
					return fmt.Errorf("writing: %w", syscall.ENOSPC)
				}
				if err := commit(); err != nil || !broken {
					return err
				}
				return fmt.Errorf("writing: %w", syscall.ENOSPC)
			})
		})
		s, err := open()
		if err != nil {
			t.Fatal(err)
		}
		broken = true
		err = s.Observe(t.Context(), broker.Observation{Key: "k/1", Value: []byte("v")})
		want := broker.ErrStoreFull
		if kept {
			want = broker.ErrStoreClosed
		}
		if !errors.Is(err, want) || errors.Is(err, broker.ErrStoreFull) == kept {
			t.Errorf("kept %v: %v", kept, err)
		}
		broken = false
		if err := s.Observe(t.Context()); kept == (err == nil) {
			t.Errorf("kept %v, the next write: %v", kept, err)
		}
	}
}

// TestReplaced puts another file in the place of an open store.
func TestReplaced(t *testing.T) {
	path, open := place(t, storetest.Era(1), nil)
	s, err := open()
	if err != nil {
		t.Fatal(err)
	}
	other := filepath.Join(t.TempDir(), "other.db")
	if err := boltstore.Create(other, storetest.Era(2)); err != nil {
		t.Fatal(err)
	}
	rename(t, other, path)
	if err := s.Observe(t.Context()); !errors.Is(err, broker.ErrStoreClosed) {
		t.Errorf("a proof of owning a file that was replaced: %v", err)
	}
}
