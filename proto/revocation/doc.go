// Package revocation holds the one rule that says whether a token is dead.
//
// A revocation is one numbered record with one or more selectors. A token carries
// the position in that log that it was issued at, and its lineage. It is dead when
// any revocation with a higher number matches any member of its lineage: no clocks
// are compared, and nothing is looked up that grows with the number of tokens.
//
// A signing key is the exception: whoever stole it writes any number, so a revoked
// key is refused whatever the token says, and never comes back.
//
//	known.Add(1043, revocation.Identity(payments))
//	if v := known.Judge(revocation.SubjectOf(&claims)); v.Reason != revocation.Alive {
//		// refused
//	}
//
// Everything here is pure: no clock, no I/O, no lock. TestCausalRevocation holds the
// rule against its plain meaning, over random histories.
package revocation
