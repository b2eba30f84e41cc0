package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"

	"github.com/dayflyhq/dayfly/agent/incoming"
	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// An Incoming is a proxy before a service. Allow is whom its unix socket lets in.
type Incoming struct {
	incoming.ProxyConfig
	Allow Allow
}

// An Envoy is a service that Envoys ask. Allow is whom its unix socket lets in.
type Envoy struct {
	incoming.EnvoyConfig
	Allow Allow
}

// guards are the proxies and services, and the feed that they follow: the agent's own, by
// a connection within the process, so that each is a verifier of its own to the broker.
type guards struct {
	proxies []*incoming.Proxy
	envoys  []*incoming.Envoy
	feed    *grpc.Server
	inside  *inside
	conn    *grpc.ClientConn
}

func (c *Config) validateGuards() error {
	var errs []error
	if len(c.Incoming)+len(c.Envoy) > 0 && c.NoFeed {
		errs = append(errs, errors.New("incoming and envoy: the feed must be followed, which tells them what is revoked"))
	}
	for i := range c.Incoming {
		errs = append(errs, c.Incoming[i].Allow.Validate())
	}
	for i := range c.Envoy {
		errs = append(errs, c.Envoy[i].Allow.Validate())
	}
	return errors.Join(errs...)
}

func (a *Agent) newGuards() (_ *guards, err error) {
	n := len(a.cfg.Incoming) + len(a.cfg.Envoy)
	if n == 0 {
		return &guards{}, nil
	}
	g := &guards{feed: grpc.NewServer(grpc.WaitForHandlers(true)), inside: newInside()}
	defer func() {
		if err != nil {
			g.close()
		}
	}()
	dayflyv1.RegisterFeedServiceServer(g.feed, &feedService{k: a.k, maxStreams: int64(2 * n), stopping: a.stopping, counts: &a.counts})
	g.conn, err = grpc.NewClient("passthrough:inside", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return g.inside.dial(ctx) }))
	if err != nil {
		return nil, err
	}
	env := incoming.Env{Conn: g.conn, Bundles: a.cfg.Bundles, Now: a.cfg.Now, Boot: a.cfg.Boot, Log: a.cfg.Log}
	env.Count = func(outcome string) { a.counts.requests.add(ListenerIncoming, outcome) }
	for i, c := range a.cfg.Incoming {
		c.Admit = newDoor(c.Allow).admit
		p, err := incoming.NewProxy(c.ProxyConfig, env)
		if err != nil {
			return nil, fmt.Errorf("%d: %w", i+1, err)
		}
		g.proxies = append(g.proxies, p)
	}
	env.Count = func(outcome string) { a.counts.requests.add(ListenerEnvoy, outcome) }
	for i, c := range a.cfg.Envoy {
		c.Credentials, c.Admit = peerCredentials{newDoor(c.Allow)}, admitted
		e, err := incoming.NewEnvoy(c.EnvoyConfig, env)
		if err != nil {
			return nil, fmt.Errorf("%d: %w", i+1, err)
		}
		g.envoys = append(g.envoys, e)
	}
	return g, nil
}

// run serves until ctx ends. The feed is served until the last of them has stopped.
func (g *guards) run(ctx context.Context) error {
	if g.feed == nil {
		return nil
	}
	defer g.close()
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { _ = g.feed.Serve(g.inside) })
	defer g.feed.Stop()
	group, ctx := errgroup.WithContext(ctx)
	for _, p := range g.proxies {
		group.Go(func() error { return p.Run(ctx) })
	}
	for _, e := range g.envoys {
		group.Go(func() error { return e.Run(ctx) })
	}
	return group.Wait()
}

func (g *guards) close() {
	if g.conn != nil {
		_ = g.conn.Close()
	}
	_ = g.inside.Close()
}

// check says whether all of them judge tokens.
func (g *guards) check() Check {
	for i, p := range g.proxies {
		if err := p.Ready(); err != nil {
			return Check{Name: "incoming", State: Failed, Message: fmt.Sprintf("incoming %d: %v", i+1, err)}
		}
	}
	for i, e := range g.envoys {
		if err := e.Ready(); err != nil {
			return Check{Name: "incoming", State: Failed, Message: fmt.Sprintf("envoy %d: %v", i+1, err)}
		}
	}
	return Check{Name: "incoming", State: Ready}
}

// inside is a listener for connections within the process.
type inside struct {
	conns chan net.Conn
	once  sync.Once
	done  chan struct{}
}

func newInside() *inside { return &inside{conns: make(chan net.Conn), done: make(chan struct{})} }

func (i *inside) dial(ctx context.Context) (net.Conn, error) {
	ours, theirs := net.Pipe()
	select {
	case i.conns <- theirs:
		return ours, nil
	case <-i.done:
		return nil, net.ErrClosed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// Accept returns the next connection.
func (i *inside) Accept() (net.Conn, error) {
	select {
	case c := <-i.conns:
		return c, nil
	case <-i.done:
		return nil, io.EOF
	}
}

// Close ends the listener.
func (i *inside) Close() error {
	i.once.Do(func() { close(i.done) })
	return nil
}

// Addr names it.
func (i *inside) Addr() net.Addr { return &net.UnixAddr{Name: "inside", Net: "unix"} }
