// Package broker is the core of dayfly: grants and their lineage, locks, revocations,
// and the feed that carries them. It knows no transport, no database and no policy
// language; those are its adapters, which it meets through Store, Policy and the func
// fields of Config.
//
// The laws, and the tests that hold them:
//
//   - Nothing leaves before its grant is durable (TestRecordedBeforeReleased; on the
//     real binary TestKillUnderLoad and TestPowerLoss).
//   - A token's position, the locks and its parent are read in one moment, and the
//     commit is conditional on the log since then (TestAdmit, TestOvertakenByRevocation).
//   - A child never outlives or exceeds its parent (TestExchangeOnlyNarrows).
//   - A dead ancestor kills every descendant, and nothing derives from it
//     (TestExchangeRefusals; TestDeadAncestor; proto/revocation's TestCausalRevocation).
//   - Every standing lock must admit the caller; the newest does not win
//     (TestEveryLockMustAdmit). A lift ends one lock, by its number, and revives nothing
//     (TestLiftRevivesNothing).
//   - A verifier is on the roster, durably, before it gets anything, and a receipt counts
//     only for what was delivered to whom sent it (TestReceipts).
//   - No key is published, and none is revoked as foreign, before it was checked
//     (TestKeysUnchecked, TestForeignKey).
//   - What verifiers report is a word, and named as theirs: it raises alarms and counts
//     exactly over crashes (TestUnrecordedUse, TestChecksAreExact), costs a bounded amount
//     (TestReporterIsBounded), and ends no stream (TestReportOnFullDisk).
//   - A restore begins a new era, loses no lock without an operator's word, and lifts
//     nothing that it isn't sure of (TestRestoreConsent, TestRestoreCarries,
//     TestRestoreFork, TestRestorePruned).
//   - Only its presenter gives a credential back; nobody else changes or learns anything
//     (TestGiveBackMoot). Give-backs are bounded, operators are not (TestGiveBackMaximum).
//   - The log is trimmed only where nothing it names can still be alive (TestPrune).
//
// Usage:
//
//	b, err := broker.New(broker.Config{Store: store, Policy: policy, ...})
//	if err != nil { ... }
//	if err := b.Load(ctx); err != nil { ... }
//	go b.Run(ctx)
//	if err := b.CheckKeys(ctx); err != nil { ... } // once bundles are known
//	cred, err := b.Issue(ctx, caller, broker.Request{Audience: "orders"})
package broker
