package boltstore_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/broker/boltstore"
	"github.com/dayflyhq/dayfly/broker/storetest"
	"go.etcd.io/bbolt"
)

func rename(t *testing.T, from, to string) {
	t.Helper()
	if err := os.Rename(from, to); err != nil {
		t.Fatal(err)
	}
}

func TestCreate(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store.db")
	if err := boltstore.Create(path); err == nil {
		t.Error("a store without an era was made")
	}
	if err := boltstore.Create(path, storetest.Era(1)); err != nil {
		t.Fatal(err)
	}
	if err := boltstore.Create(path, storetest.Era(2)); !errors.Is(err, boltstore.ErrExists) {
		t.Errorf("creating over a store: %v", err)
	}
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode().Perm() != 0o600 {
		t.Errorf("mode %04o", info.Mode().Perm())
	}
	files, err := os.ReadDir(filepath.Dir(path))
	if err != nil || len(files) != 1 {
		t.Errorf("%d files are left, %v", len(files), err)
	}
	if _, err := boltstore.Check(t.Context(), path); err != nil {
		t.Error(err)
	}
}

// edit changes a store behind dayfly's back.
func edit(t *testing.T, path string, f func(tx *bbolt.Tx) error) {
	t.Helper()
	db, err := bbolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(db.Update(f), db.Close()); err != nil {
		t.Fatal(err)
	}
}

func TestOpenRefuses(t *testing.T) {
	write := func(b []byte) func(*testing.T, string) {
		return func(t *testing.T, path string) {
			if err := os.WriteFile(path, b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	damage := func(from, n int) func(*testing.T, string) {
		return func(t *testing.T, path string) {
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			for i := range n {
				b[from+i] ^= 0xa5
			}
			write(b)(t, path)
		}
	}
	for _, c := range []struct {
		name   string
		break_ func(*testing.T, string)
		want   error
		text   string
	}{
		{"missing", func(t *testing.T, path string) { rename(t, path, path+".away") }, boltstore.ErrMissing, "dayfly-broker init"},
		{"empty", write(nil), boltstore.ErrForeign, ""},
		{"text", write([]byte(strings.Repeat("not a store\n", 1000))), boltstore.ErrForeign, ""},
		{"a directory", func(t *testing.T, path string) {
			rename(t, path, path+".away")
			if err := os.Mkdir(path, 0o700); err != nil {
				t.Fatal(err)
			}
		}, boltstore.ErrForeign, ""},
		{"of another program", func(t *testing.T, path string) {
			edit(t, path, func(tx *bbolt.Tx) error { return tx.DeleteBucket([]byte("dayfly")) })
		}, boltstore.ErrForeign, ""},
		{"newer", func(t *testing.T, path string) {
			edit(t, path, func(tx *bbolt.Tx) error {
				return tx.Bucket([]byte("dayfly")).Put([]byte("schema"), []byte{0, 0, 0, 7})
			})
		}, nil, "has schema 7, this program knows schema 1"},
		{"older", func(t *testing.T, path string) {
			edit(t, path, func(tx *bbolt.Tx) error {
				return tx.Bucket([]byte("dayfly")).Put([]byte("schema"), []byte{0, 0, 0, 0})
			})
		}, nil, "has schema 0, this program knows schema 1"},
		{"without a log", func(t *testing.T, path string) {
			edit(t, path, func(tx *bbolt.Tx) error { return tx.DeleteBucket([]byte("log")) })
		}, boltstore.ErrCorrupt, "log"},
		{"cut short", func(t *testing.T, path string) {
			if err := os.Truncate(path, 3*4096); err != nil {
				t.Fatal(err)
			}
		}, boltstore.ErrCorrupt, "are there"},
		{"with both first pages damaged", func(t *testing.T, path string) {
			damage(40, 8)(t, path)
			damage(4096+40, 8)(t, path)
		}, boltstore.ErrCorrupt, ""},
		{"with damaged pages", damage(2*4096, 4*4096), boltstore.ErrCorrupt, ""},
		{"open to others", func(t *testing.T, path string) {
			if err := os.Chmod(path, 0o640); err != nil {
				t.Fatal(err)
			}
		}, boltstore.ErrMode, "chmod 600"},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "store.db")
			if err := boltstore.Create(path, storetest.Era(1)); err != nil {
				t.Fatal(err)
			}
			c.break_(t, path)
			s, err := boltstore.Open(boltstore.Config{Path: path})
			if err == nil {
				s.Close()
				t.Fatal("it was opened")
			}
			var schema *boltstore.SchemaError
			if c.want != nil && !errors.Is(err, c.want) || c.want == nil && !errors.As(err, &schema) || !strings.Contains(err.Error(), c.text) {
				t.Errorf("got %v, want %v with %q", err, c.want, c.text)
			}
		})
	}
}

func TestOpenLocked(t *testing.T) {
	path, open := place(t, storetest.Era(1), nil)
	s, err := open()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := boltstore.Open(boltstore.Config{Path: path, LockTimeout: 100 * time.Millisecond}); !errors.Is(err, boltstore.ErrLocked) {
		t.Errorf("a second Open: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err = open(); err != nil {
		t.Errorf("after the first let go: %v", err)
	}
}

// TestBucketInItself makes a day's bucket one that holds itself: found and refused, where
// walking it would end the process.
func TestBucketInItself(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store.db")
	checked(t, path)
	var root, page int
	edit(t, path, func(tx *bbolt.Tx) error {
		root, page = int(tx.Bucket([]byte("grants")).Root()), tx.DB().Info().PageSize
		return nil
	})
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	_, value, found := bytes.Cut(b[root*page:][:page], day) // a bucket's value begins with its root
	if !found || root == 0 {
		t.Fatal("the bucket of grants is elsewhere")
	}
	binary.NativeEndian.PutUint64(value, uint64(root))
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := boltstore.Open(boltstore.Config{Path: path}); !errors.Is(err, boltstore.ErrCorrupt) {
		t.Errorf("opening: %v", err)
	}
	if _, err := boltstore.Check(t.Context(), path); !errors.Is(err, boltstore.ErrCorrupt) {
		t.Errorf("checking: %v", err)
	}
}
