package boltstore_test

import (
	"errors"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/broker/boltstore"
	"github.com/dayflyhq/dayfly/broker/storetest"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"go.etcd.io/bbolt"
)

var day = []byte(noon.Format("20060102"))

// put stores a grant behind the store's back.
func put(tx *bbolt.Tx, g *broker.Grant) error {
	b, err := boltstore.EncodeGrant(g)
	if err != nil {
		return err
	}
	return tx.Bucket([]byte("grants")).Bucket(day).Put(g.ID().Bytes(), b)
}

func record(n byte) []byte { return []byte{0, 0, 0, 0, 0, 0, 0, n} }

// TestCheck damages a store in one place each, and wants that named.
func TestCheck(t *testing.T) {
	for _, c := range []struct {
		name, want string
		edit       func(tx *bbolt.Tx, root, child *broker.Grant) error
	}{
		{"nothing", "", func(*bbolt.Tx, *broker.Grant, *broker.Grant) error { return nil }},
		{"a parent is gone", "is not in the records", func(tx *bbolt.Tx, root, _ *broker.Grant) error {
			return tx.Bucket([]byte("grants")).Bucket(day).Delete(root.ID().Bytes())
		}},
		{"a child outlives its parent", "after its parent", func(tx *bbolt.Tx, _, child *broker.Grant) error {
			child.Expires = child.Expires.Add(time.Second)
			return put(tx, child)
		}},
		{"a lineage is not the parent's", "is not its parent's", func(tx *bbolt.Tx, _, child *broker.Grant) error {
			child.Lineage[0].SVID[0]++
			return put(tx, child)
		}},
		{"a position is not on the log", "not on the log", func(tx *bbolt.Tx, root, _ *broker.Grant) error {
			root.Position.Sum[0]++
			return put(tx, root)
		}},
		{"a grant in another's place", "is ", func(tx *bbolt.Tx, root, child *broker.Grant) error {
			b, err := boltstore.EncodeGrant(root)
			if err != nil {
				return err
			}
			return tx.Bucket([]byte("grants")).Bucket(day).Put(child.ID().Bytes(), b)
		}},
		{"a grant of garbage", "decoding grant", func(tx *bbolt.Tx, root, _ *broker.Grant) error {
			return tx.Bucket([]byte("grants")).Bucket(day).Put(root.ID().Bytes(), []byte("garbage"))
		}},
		{"a number is missing", "record 4 follows record 2", func(tx *bbolt.Tx, _, _ *broker.Grant) error {
			return tx.Bucket([]byte("log")).Delete(record(3))
		}},
		{"the last is missing", "not at its head", func(tx *bbolt.Tx, _, _ *broker.Grant) error {
			return tx.Bucket([]byte("log")).Delete(record(4))
		}},
		{"a reason was changed", "private digest of record 3", func(tx *bbolt.Tx, _, _ *broker.Grant) error {
			v := string(tx.Bucket([]byte("log")).Get(record(3)))
			return tx.Bucket([]byte("log")).Put(record(3), []byte(strings.Replace(v, "because", "BECAUSE", 1)))
		}},
		{"a selector was changed", "running hash of record 3", func(tx *bbolt.Tx, _, _ *broker.Grant) error {
			v := string(tx.Bucket([]byte("log")).Get(record(3)))
			return tx.Bucket([]byte("log")).Put(record(3), []byte(strings.Replace(v, "workload-3", "workload-9", 1)))
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "store.db")
			root, child := checked(t, path)
			edit(t, path, func(tx *bbolt.Tx) error { return c.edit(tx, root, child) })
			report, err := boltstore.Check(t.Context(), path)
			if c.want == "" {
				if err != nil || report.Grants != 2 || report.Records != 4 || report.Observations != 1 {
					t.Errorf("a sound store: %+v, %v", report, err)
				}
				return
			}
			if !errors.Is(err, boltstore.ErrCorrupt) || !strings.Contains(strings.Join(report.Problems, "\n"), c.want) {
				t.Errorf("got %v and %q, want %q", err, report.Problems, c.want)
			}
		})
	}
}

// checked makes a store with four records and two grants.
func checked(t *testing.T, path string) (root, child *broker.Grant) {
	t.Helper()
	if err := boltstore.Create(path, storetest.Era(1)); err != nil {
		t.Fatal(err)
	}
	s, err := boltstore.Open(boltstore.Config{Path: path})
	if err != nil {
		t.Fatal(err)
	}
	var at feed.Position
	for i := 2; i <= 4; i++ {
		_, err := s.Append(t.Context(), func(head feed.Position) (broker.Record, error) {
			return storetest.Revocation("because", revocation.Identity(storetest.Identity(i))), nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	st, err := s.State(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	at = st.Head
	root = storetest.Grant(1, storetest.Identity(1), noon, at)
	child = storetest.Derive(2, root, storetest.Identity(2), at)
	for _, g := range []*broker.Grant{root, child} {
		if err := s.Issue(t.Context(), g, storetest.Admit); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Observe(t.Context(), broker.Observation{Key: "k/1", Value: []byte("v")}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Check(t.Context()); err != nil {
		t.Error(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	return root, child
}
