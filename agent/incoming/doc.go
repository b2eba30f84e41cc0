// Package incoming checks the requests that come in for a service without our SDK: as a
// reverse proxy before it (Proxy), or for an Envoy that asks (Envoy). Both are a Guard: a
// verifier that follows the agent's feed like any other, and routes that say what a
// request needs.
//
// What it holds to:
//
//   - What matches no route is refused. TestRoutes, TestProxyRoutes.
//   - The path that the route was chosen by is the path that the service sees, byte for
//     byte; one that programs read in several ways, with different demands, is refused.
//     TestPathsAreForwardedAsChecked, FuzzPath.
//   - Nobody but the guard says who calls. TestSpoofedHeaders, TestEnvoySpoofedHeaders.
//   - Past its bound it refuses every token, and what is under way ends with its token.
//     TestProxyClosesWhenStale, TestProxyCutsStreams.
package incoming
