// Package feed is how knowledge of revocations travels: the log that brokers write,
// the cursors that read it, the view that a verifier builds, how fresh that view is,
// and who has confirmed what.
//
// These are state machines: no goroutine, no clock, no I/O and no lock. Broker,
// relay and verifier use the same ones, so that one seeded loop can run a whole
// fleet and replay any failure. Time comes in as an Instant, elapsed since some fixed
// moment on a clock that runs through suspend.
//
//   - Log holds the records and hands them out by Cursor.
//   - View applies what a cursor gives, and judges tokens.
//   - Freshness turns pings and their answers into "fresh as of".
//   - Roster adds up receipts into containment.
package feed
