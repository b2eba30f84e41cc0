package boltstore_test

import (
	"context"
	"path/filepath"
	"testing"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/broker/boltstore"
	"github.com/dayflyhq/dayfly/broker/storetest"
)

// place returns how to open a new store, which is checked when the test ends.
func place(t testing.TB, first broker.Record, configure func(*boltstore.Config)) (path string, open storetest.Opener) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "store.db")
	if err := boltstore.Create(path, first); err != nil {
		t.Fatal(err)
	}
	var last *boltstore.Store
	t.Cleanup(func() {
		if last != nil {
			if err := last.Close(); err != nil {
				t.Error(err)
			}
		}
		if _, err := boltstore.Check(context.Background(), path); err != nil {
			t.Error(err)
		}
	})
	return path, func() (broker.Store, error) {
		cfg := boltstore.Config{Path: path}
		if configure != nil {
			configure(&cfg)
		}
		s, err := boltstore.Open(cfg)
		if err != nil {
			return nil, err
		}
		last = s
		return s, nil
	}
}

func TestStore(t *testing.T) {
	storetest.Run(t, func(t *testing.T, first broker.Record) storetest.Opener {
		_, open := place(t, first, nil)
		return open
	})
}
