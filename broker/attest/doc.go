// Package attest proves who a peer is, for every door of the broker: by the X.509-SVID
// of its connection, or by a JWT-SVID that it sends where no certificate can reach.
//
// An X.509-SVID is proven in the handshake and again in every call, since a connection
// outlives what it began with: the leaf's NotAfter is looked at, and the chain is
// verified whenever the bundle of its trust domain is another than at the last look.
//
// A JWT-SVID is a bearer document, so less is taken: as draft-ietf-oauth-spiffe-client-auth
// wants it, its audience is this issuer and nobody else, and it lives for five minutes at
// most. It isn't one-time: Workload APIs cache JWT-SVIDs and share them between processes.
// How often one identity may show one is bounded.
package attest
