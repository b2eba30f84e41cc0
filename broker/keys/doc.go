// Package keys makes the keys that sign tokens. A private half is born in this
// process's memory, rotated, and gone with the process: nothing here writes, marshals
// or prints one. Public halves travel as records of the event log, each vouched for
// by the X.509-SVID of the broker that made it, so that whoever can write the store
// still can't mint a token.
//
// The laws of a signing key, and the tests that hold them:
//
//   - It signs only once its record is durable and applied
//     (TestNothingSignsBeforeItIsPublished, TestPublishFailsThenRecovers).
//   - It signs only once it is in every copy of the JWK set that a reader may still use,
//     unless there is no other one to sign with: then it says how long that takes, and
//     the broker gives no token to those who only read the JWK set until then
//     (TestRotation, TestSpreadBeforeItSigns).
//   - It goes on signing until another one has spread, but no longer than SignGrace after
//     that (TestRotation, TestReplacedSignerStops).
//   - It is replaced when another authority is behind the broker's SVID
//     (TestAuthorityReplaced, TestAuthorityOfTheNextKeyIsReplaced).
//   - Once revoked it never signs again (TestRevoked).
//   - A record that its broker's SVID didn't sign is no key (TestVerifyKey).
//
// Use:
//
//	ring, err := keys.New(keys.Config{Issuer: issuer, SVID: source.GetX509SVID, Publish: appendKey, Boot: boottime.Now})
//	if err != nil { ... }
//	go ring.Run(ctx)
//	...
//	signer, ok := ring.Current()
//	claims.Lineage[last].Key = signer.Public.ID
//	unsigned, err := token.Encode(claims, signer.Public.Algorithm)
//	secret, err := signer.Sign(unsigned)
package keys
