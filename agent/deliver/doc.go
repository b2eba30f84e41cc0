// Package deliver keeps credentials in files, for programs that read a file and know
// nothing else. It gets credentials from whoever keeps them fresh, and owns what is on
// disk: which file is there, since when and until when.
//
//	d, err := deliver.New(deliver.Config{
//		Targets: []deliver.Target{{
//			Path:  "/run/app/orders.jwt",
//			Files: []deliver.File{{Format: deliver.Token, Credentials: map[string]sdk.Request{"orders": {Audience: "orders"}}}},
//		}},
//		Newest: newest, Changed: changed, Alive: alive,
//	})
//	if err != nil { ... }
//	if err := d.Open(); err != nil { ... } // what a dead one left is kept or removed
//	d.Run(ctx)                             // and when it returns no file is left
//
// What it keeps to:
//
//   - A reader finds a whole file of credentials that are alive, or none. A file is
//     replaced by a rename, several files by the swap of one symbolic link.
//   - A file goes before its first credential expires, and as soon as one is revoked; it
//     goes at shutdown; what a killed process left is looked at before anything else.
//   - A file that can't be written anew stays as long as it is good.
//   - Nothing is written, and no link followed, where somebody else could interfere.
//   - No credential is in an error, a log, or the environment of a command.
package deliver
