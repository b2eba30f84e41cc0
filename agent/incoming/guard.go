package incoming

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/sdk/verify"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"google.golang.org/grpc"
)

// A Policy is what a guard lets through. Audiences and Routes must be set.
type Policy struct {
	// Audiences are the names that the service answers to.
	Audiences []string
	// MaxStaleness and OnStale are the verifier's.
	MaxStaleness time.Duration
	OnStale      verify.OnStale
	// Routes are what is let through; nothing else is.
	Routes []Route
	// PassToken leaves the token in the request, for a service that exchanges it.
	PassToken bool
}

// Env is what a guard works with, the same for all of an agent. Conn must be set.
type Env struct {
	// Conn reaches the FeedService of the agent.
	Conn grpc.ClientConnInterface
	// Bundles verifies the certificates of peers.
	Bundles x509bundle.Source
	// Now and Boot are the clocks, as verify.Config has them.
	Now  func() time.Time
	Boot func() feed.Instant
	// Count hears how each request ended: "ok", "public", or the reason of its refusal. Nil:
	// nobody counts.
	Count func(outcome string)
	// Log hears of the feed and of an upstream that is away; nil: nobody does.
	Log *slog.Logger
}

// Check says all that is wrong with a policy.
func (p *Policy) Check() error {
	_, routesErr := newRoutes(p.Routes)
	_, err := verify.New(p.config(Env{Conn: noConn{}}))
	return errors.Join(routesErr, err)
}

// noConn is for a verifier that is only configured.
type noConn struct{ grpc.ClientConnInterface }

func (p *Policy) config(env Env) verify.Config {
	return verify.Config{
		Conn: env.Conn, Audiences: p.Audiences, MaxStaleness: p.MaxStaleness, OnStale: p.OnStale,
		Bundles: env.Bundles, Now: env.Now, Boot: env.Boot, Log: env.Log,
	}
}

// A guard is what proxy and Envoy's service share.
type guard struct {
	v         *verify.Verifier
	routes    *routes
	passToken bool
	accepts   bool
	count     func(outcome string)
}

func newGuard(p Policy, env Env) (*guard, error) {
	if env.Count == nil {
		env.Count = func(string) {}
	}
	routes, err := newRoutes(p.Routes)
	if err != nil {
		return nil, err
	}
	v, err := verify.New(p.config(env))
	if err != nil {
		return nil, err
	}
	return &guard{v: v, routes: routes, passToken: p.PassToken, accepts: p.OnStale == verify.Accept, count: env.Count}, nil
}

// request is what is judged. Path and host are as they came, without the query.
type request struct {
	method, host, path string
	authorization      []string
	peer               verify.Peer
}

// check returns the token of a request that may pass, nil on a public route, or why it may
// not.
func (g *guard) check(ctx context.Context, r request) (*verify.Verified, *refusal) {
	t, no := g.judge(ctx, r)
	switch {
	case no != nil:
		g.count(no.reason)
	case t == nil:
		g.count("public")
	default:
		g.count("ok")
	}
	return t, no
}

func (g *guard) judge(ctx context.Context, r request) (*verify.Verified, *refusal) {
	need, no := g.routes.find(r.method, r.host, r.path)
	if no != nil || need.public {
		return nil, no
	}
	raw, err := verify.Bearer(r.authorization)
	if err != nil {
		return nil, refused(g.v, err, need.scopes)
	}
	t, err := g.v.Verify(ctx, raw, r.peer)
	if err == nil {
		err = t.RequireScope(need.scopes...)
	}
	if err != nil {
		return nil, refused(g.v, err, need.scopes)
	}
	return t, nil
}

// ready says why a guard would refuse every token, nil if it wouldn't.
func (g *guard) ready() error {
	s := g.v.Status()
	switch {
	case s.Fresh:
		return nil
	case g.accepts && s.Bound > 0 && s.Position.Era != 0 && !errors.Is(s.Err, feed.ErrFork):
		return nil // it runs on
	case s.Err != nil:
		return s.Err
	}
	return fmt.Errorf("nothing was heard of the feed within %v", s.Bound)
}
