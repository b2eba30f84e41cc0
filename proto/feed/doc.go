// Package feed is how knowledge of revocations travels: the log that brokers write,
// the cursors that read it, the view that a verifier builds, how fresh that view is,
// and who has confirmed what.
//
// These are state machines: no goroutine, no clock, no I/O and no lock. Broker,
// relay and verifier use the same ones, so that one seeded loop can run a whole
// fleet and replay any failure (TestFleet). Time comes in as an Instant, elapsed since
// some fixed moment on a clock that runs through suspend.
//
//   - Log holds the records and hands them out by Cursor.
//   - View applies what a cursor gives, and judges tokens.
//   - Freshness turns pings and their answers into "fresh as of".
//   - Relay is a view that others follow: whom it may answer, and what goes up before.
//   - Roster adds up receipts into containment.
//
// The serving half, for each stream:
//
//	cursor := feed.NewCursor(subscribed)
//	for delivery, ok := cursor.Next(log, 100); ok; delivery, ok = cursor.Next(log, 100) {
//		send(delivery)
//	}
//
// The following half:
//
//	err := view.Apply(delivery, now)        // ErrGap: subscribe again from view.Position()
//	fresh.Applied(view.Position())          // then acknowledge that position
//	fresh.Sent(nonce, now)                  // with each ping, before it goes out
//	asOf, err := fresh.Answered(nonce, head, age, view.Position())
//	err = view.CheckHead(head, asOf)        // a fork closes the view
//	ok := fresh.Fresh(now, bound) && view.Judge(subject).Reason == revocation.Alive
package feed
