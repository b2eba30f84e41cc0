// Package storetest is the suite that every broker.Store passes, and a store in
// memory that polices its callers.
//
// A store's own test runs the suite with a function that makes an empty place for
// one store and returns how to open it, again and again:
//
//	func TestStore(t *testing.T) {
//		storetest.Run(t, func(t *testing.T, first broker.Record) storetest.Opener {
//			path := filepath.Join(t.TempDir(), "store.db")
//			if err := boltstore.Create(path, first); err != nil {
//				t.Fatal(err)
//			}
//			return func() (broker.Store, error) { return boltstore.Open(boltstore.Config{Path: path}) }
//		})
//	}
//
// Tests of the store's users take the one in memory:
//
//	store := storetest.Memory(t, storetest.Era(1))
package storetest
