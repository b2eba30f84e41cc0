// Package web is the broker's HTTP adapter: what the outside reads without gRPC.
//
// The public handler tells verifiers that know only standards which keys sign:
// OpenID discovery, OAuth authorization server metadata (RFC 8414) and the JWK set
// (RFC 7517). It says only what is true of this broker. A reader of it is bounded by
// the expiry of tokens, never by revocation; the feed is for that. With a broker it also
// serves OAuth to clients that have proved an identity, over the same use cases as gRPC:
// docs/oauth.md and docs/standards.md say how.
//
// The admin handler is for the broker's own host: health, readiness and metrics. It
// is served on loopback or a unix socket, and nowhere else.
//
// The caller brings the listeners:
//
//	public, err := web.Public(web.PublicConfig{Issuer: issuer, Keys: broker.Keys})
//	if err != nil { ... }
//	admin, err := web.Admin(web.AdminConfig{Ready: problems, Metrics: registry})
//	if err != nil { ... }
//	group.Go(func() error { return web.ServeTLS(ctx, publicListener, tlsConfig, public, log) })
//	group.Go(func() error { return web.ServeAdmin(ctx, adminListener, admin, log) })
package web
