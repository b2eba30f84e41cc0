// Package wire is the one translation between the wire messages of dayfly.v1 and the
// ground floor's values (feed, revocation, token), in both directions. Broker, relay,
// SDK and verifier share it, so there is one reading of a message and no other.
//
// Names say the direction: Position makes a message, ToPosition reads one. Reading
// never panics, whatever the message holds; what is malformed gives an error that
// wraps feed.ErrMalformed and quotes nothing that a stranger sent.
package wire
