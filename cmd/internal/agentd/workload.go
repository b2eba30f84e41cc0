package agentd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"

	"github.com/dayflyhq/dayfly/agent"
	"github.com/dayflyhq/dayfly/cmd/internal/supervise"
	"github.com/dayflyhq/dayfly/sdk"
)

// workload is a Workload at work: an agent with a connection to the broker, a cache, a
// stream of the feed and sockets of its own, by its own SVID.
type workload struct {
	cfg     *Config
	w       *Workload
	name    string
	log     *slog.Logger
	agent   *agent.Agent
	clients []*sdk.Client
	leases  []*lease

	cancel context.CancelFunc
	done   chan struct{}
}

// newWorkload opens its sockets; it starts nothing and calls nobody. It must be closed.
func (d *daemon) newWorkload(cfg *Config, w *Workload) (_ *workload, err error) {
	out := &workload{cfg: cfg, w: w, name: w.name(), log: d.log, done: make(chan struct{})}
	defer func() {
		if err != nil {
			err = ofWorkload(cfg, out.name, errors.Join(err, out.abandon()))
		}
	}()
	if cfg.several() {
		out.log = d.log.With("workload", out.name)
	}
	identity := d.identities.Identity(w.ID)
	client, err := out.dial(cfg.Broker, identity)
	if err != nil {
		return nil, err
	}
	relay := cfg.relayOf(w)
	allow, err := relay.selectors()
	if err != nil {
		return nil, err
	}
	settings := w.settings(cfg)
	agentCfg := agent.Config{
		Upstream: client.Conn(), Source: identity, Changed: identity.Changed, Allow: settings.Allow,
		Prefetch: settings.Prefetch, Files: settings.Files, NoFeed: !cfg.Feed.Follow, MaxStaleness: settings.MaxStaleness,
		Audiences: cfg.Feed.Audiences, MaxStreams: cfg.Feed.MaxStreams, Log: out.log,
		BrokerID: cfg.Broker.ID, Bundles: identity, RelayAllow: allow,
		Configuration: d.reloads.state, Run: supervise.RunOwn,
	}
	if err := out.listen(d.shelf, relay, &agentCfg); err != nil {
		return nil, err
	}
	if cfg.Feed.Upstream.Address != "" {
		above, err := out.dial(cfg.Feed.Upstream, identity)
		if err != nil {
			return nil, fmt.Errorf("feed.upstream: %w", err)
		}
		agentCfg.Feed = above.Conn()
	}
	out.agent, err = agent.New(agentCfg)
	return out, err
}

// dial makes a client that proves this workload's identity.
func (w *workload) dial(b Broker, identity *agent.Identity) (*sdk.Client, error) {
	client, err := sdk.New(sdk.Config{Address: b.Address, Source: identity, BrokerID: b.ID})
	if err == nil {
		w.clients = append(w.clients, client)
	}
	return client, err
}

// listen opens all that the workload listens on. Whatever is opened comes from the shelf: a
// workload that starts anew has the same listeners.
func (w *workload) listen(s *shelf, relay Relay, cfg *agent.Config) (err error) {
	if cfg.GRPC, err = w.unix(s, w.w.Sockets.GRPC); err != nil {
		return err
	}
	if cfg.HTTP, err = w.unix(s, w.w.Sockets.HTTP); err != nil {
		return err
	}
	if relay.Listen != "" {
		if cfg.Relay, err = w.keep(s.tcp(relay.Listen, "verifiers on other hosts")); err != nil {
			return err
		}
	}
	if w.w.AWS.Listen.IsValid() {
		l, err := w.keep(s.tcp(w.w.AWS.Listen.String(), "AWS's SDKs"))
		if err != nil {
			return err
		}
		cfg.AWS = w.w.AWS.agent(l)
	}
	if path := w.w.Systemd.Socket; path != "" {
		l, err := w.keep(s.unix(agent.SocketConfig{Path: path}))
		if err != nil {
			return err
		}
		cfg.Systemd = w.w.Systemd.agent(l)
	}
	return errors.Join(w.listenOutgoing(s, cfg), w.listenIncoming(s, cfg))
}

// unix opens a socket with the mode and group of the workload's; nil for no path.
func (w *workload) unix(s *shelf, path string) (net.Listener, error) {
	if path == "" {
		return nil, nil
	}
	cfg, err := w.w.Sockets.socket(path)
	if err != nil {
		return nil, err
	}
	return w.keep(s.unix(cfg))
}

// keep notes what was opened, for the end.
func (w *workload) keep(l *lease, err error) (net.Listener, error) {
	if err != nil {
		return nil, err
	}
	w.leases = append(w.leases, l)
	return l, nil
}

// run serves until ctx ends or stop is called.
func (w *workload) run(ctx context.Context) error {
	defer close(w.done)
	return ofWorkload(w.cfg, w.name, errors.Join(w.agent.Run(ctx), w.close()))
}

// close ends connections and sockets.
func (w *workload) close() error {
	var errs []error
	for _, c := range w.clients {
		errs = append(errs, c.Close())
	}
	for _, l := range w.leases {
		errs = append(errs, l.Close())
	}
	return errors.Join(errs...)
}

// abandon closes one that never ran, and leaves its sockets to others as they were.
func (w *workload) abandon() error {
	var errs []error
	for _, l := range w.leases {
		if l.undo != nil {
			errs = append(errs, l.undo())
		}
	}
	return errors.Join(append(errs, w.close())...)
}

// ofWorkload says whose error it is, where there are several.
func ofWorkload(cfg *Config, name string, err error) error {
	if err == nil || !cfg.several() {
		return err
	}
	return fmt.Errorf("workload %s: %w", name, err)
}
