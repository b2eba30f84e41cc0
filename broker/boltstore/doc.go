// Package boltstore keeps a broker's records in one bbolt file: the event log, the
// grants and what was observed. It is the default broker.Store.
//
//	first := broker.Record{Event: feed.Event{Era: &feed.Era{Era: era}}, Details: ...}
//	err := boltstore.Create(path, first) // once, by "dayfly-broker init"
//
//	store, err := boltstore.Open(boltstore.Config{Path: path})
//	defer store.Close()
//	err = store.Issue(ctx, grant, admit) // nil: it is on the disk
//
// One goroutine writes. It takes everything that waits, appends before issues, into
// one transaction and so one sync of the disk; what arrives meanwhile is the next
// batch. There is no timer: an idle store commits a lone write at once.
//
// # The file
//
//	dayfly/               format, schema, head, horizon, commits, backup
//	log/<number>          a record, or the trace of a dropped one
//	grants/<YYYYMMDD>/<grant ID>   by the day (UTC) on which the grant expires
//	dropped/<YYYYMMDD>/<grant ID>  of a day that was pruned and isn't emptied yet
//	observed/<key>        an observation
//
// Numbers are 8 bytes, big-endian. A grant is one Put, and old ones go by the
// bucket. A child never expires after its parent, so it is never in a later bucket.
//
// # Backups
//
// A backup is a copy of one moment, marked as one so that Open refuses it. Restore
// makes a store of it, in a new era:
//
//	backup, err := store.Backup()
//	report, err := boltstore.SaveBackup(ctx, to, time.Now(), fill) // fill copies the backup
//
//	plan, err := broker.PlanRestore(...) // of what ReadLog reads
//	report, err = boltstore.Restore(ctx, boltstore.RestoreConfig{From: to, Path: path, Restoration: plan})
//
// # A full disk
//
// The file is always a reserve larger than what issuing may use. When the disk has
// no more room, an Issue returns broker.ErrStoreFull before anything is written, and
// appends, proofs and pruning go on within the reserve. Each later Issue asks for
// room again, so the store recovers by itself.
package boltstore
