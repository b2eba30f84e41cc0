// Package web is the broker's HTTP adapter: what the outside reads without gRPC.
//
// The public handler tells verifiers that know only standards which keys sign:
// OpenID discovery, OAuth authorization server metadata (RFC 8414) and the JWK set
// (RFC 7517). It says only what is true of this broker. A reader of it is bounded by
// the expiry of tokens, never by revocation; the feed is for that.
//
// The admin handler is for the broker's own host: health, readiness and metrics. It
// is served on loopback or a unix socket, and nowhere else.
//
// The caller brings the listeners:
//
//	public, err := web.Public(web.PublicConfig{Issuer: issuer, Keys: broker.PublicKeys})
//	if err != nil { ... }
//	admin, err := web.Admin(web.AdminConfig{Ready: problems, Metrics: registry})
//	if err != nil { ... }
//	group.Go(func() error { return web.Serve(ctx, publicListener, public, log) })
//	group.Go(func() error { return web.ServeAdmin(ctx, adminListener, admin, log) })
package web
