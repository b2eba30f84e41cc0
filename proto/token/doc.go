// Package token is the credential's bytes: its claims, its lineage, how it is
// signed, parsed and fingerprinted. Broker and verifiers share it, so there is
// one reading of a token and no other.
//
// A token is a JWT access token (RFC 9068) with one private claim, "dfy", for what
// no standard has: the position in the revocation log that it was issued at, and
// the lineage that it derives from.
//
// The laws of a token:
//
//   - What two places could say is said once, or must agree exactly: the last
//     grant of the lineage is the jti, its key is the kid, the presenter is the
//     client_id. A token that disagrees with itself is malformed.
//   - Nothing unknown is skipped where it could change the meaning: an unknown
//     header field, an unknown field of dfy, act or cnf is malformed, and so is a
//     field given twice, a null, a case variant of our claims, a second spelling of
//     the same bytes. Other top-level claims are read past.
//   - The algorithm belongs to the key, never to the token, and the signature is
//     checked before the claims are read.
//   - No error quotes a token, and no Secret prints one.
//
// TestHostileTokens, TestVectors and TestSecretShowsNothing hold them; testdata has
// vectors for readers in other languages.
//
// Issuing and reading:
//
//	unsigned, err := token.Encode(claims, token.ES256)
//	record(unsigned.Fingerprint())
//	secret, err := unsigned.Sign(key)
//
//	t, err := token.Parse(secret.Reveal(), keys)
package token
