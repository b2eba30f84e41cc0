// Package outgoing is an HTTP proxy on this host that adds a workload's token to its
// requests for upstreams that are configured, so that the program holds no credential.
// It gets tokens from whoever keeps them fresh, and owns the way to the upstreams.
//
//	p, err := outgoing.New(outgoing.Config{
//		Listeners: []outgoing.Listener{{
//			Listener:  l, // loopback TCP, or a unix socket
//			Secret:    "/run/payments/proxy-secret",
//			Upstreams: []outgoing.Upstream{{
//				URL: "https://orders.example.org", SPIFFEID: orders, Request: sdk.Request{Audience: "orders"},
//			}},
//		}},
//		Tokens: tokens, SVIDs: source, Bundles: source,
//	})
//	if err != nil { ... }
//	return p.Run(ctx)
//
// What it keeps to:
//
//   - A token goes to the upstream that it is configured for and nowhere else: after the
//     upstream has proved who it is, in the one configured header, and never after a redirect.
//   - What the caller sent in a place where an upstream looks for a credential or an
//     identity is gone.
//   - A request that is answered with 401 makes one other token be fetched, at most, and is
//     repeated once, at most, if its body can be had again. An upstream that says 401 to all
//     of them causes fetches with growing pauses between them.
//   - What is revoked ends, also in the middle of a stream.
//   - Who may use it: whom the unix socket lets in, or who knows the secret on loopback.
//   - No body is held in memory but its first 64 KiB, and no credential is in an error, a
//     log, or an answer's header.
package outgoing
