package agentd

import (
	"errors"
	"fmt"
	"log/slog"
	"net"

	"github.com/dayflyhq/dayfly/agent"
	"github.com/dayflyhq/dayfly/agent/outgoing"
	"github.com/dayflyhq/dayfly/sdk"
)

// workload is a Workload at work: an agent with a connection to the broker, a cache, a
// stream of the feed and sockets of its own, by its own SVID.
type workload struct {
	name    string
	agent   *agent.Agent
	clients []*sdk.Client
	sockets listeners
}

// newWorkload opens its sockets; it starts nothing and calls nobody. It must be closed.
func newWorkload(cfg *Config, w *Workload, identity *agent.Identity, log *slog.Logger) (_ *workload, err error) {
	out := &workload{name: w.name()}
	defer func() {
		if err != nil {
			err = errors.Join(err, out.close())
		}
	}()
	client, err := out.dial(cfg.Broker, identity)
	if err != nil {
		return nil, err
	}
	relay := cfg.Feed.Relay
	if cfg.several() && relay.Workload != w.name() {
		relay = Relay{}
	}
	allow, err := relay.selectors()
	if err != nil {
		return nil, err
	}
	if err := out.sockets.open(w, relay); err != nil {
		return nil, err
	}
	agentCfg := agent.Config{
		Upstream: client.Conn(), Source: identity, Changed: identity.Changed,
		GRPC: out.sockets.grpc, HTTP: out.sockets.http, Allow: w.Sockets.allow(),
		Prefetch: w.requests(), Files: w.targets(), NoFeed: !cfg.Feed.Follow, MaxStaleness: cfg.Feed.MaxStaleness,
		Audiences: cfg.Feed.Audiences, MaxStreams: cfg.Feed.MaxStreams, Log: log,
		BrokerID: cfg.Broker.ID, Bundles: identity, Relay: out.sockets.relay, RelayAllow: allow,
		AWS: w.AWS.agent(out.sockets.aws), Systemd: w.Systemd.agent(out.sockets.systemd), Outgoing: out.sockets.outgoing,
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

// close ends connections and sockets. The agent, if it ran, has closed them.
func (w *workload) close() error {
	var errs []error
	for _, c := range w.clients {
		errs = append(errs, c.Close())
	}
	return errors.Join(append(errs, w.sockets.close())...)
}

// ofWorkload says whose error it is, where there are several.
func ofWorkload(cfg *Config, name string, err error) error {
	if err == nil || !cfg.several() {
		return err
	}
	return fmt.Errorf("workload %s: %w", name, err)
}

// listeners are all that a workload listens on; nil for what isn't configured.
type listeners struct {
	grpc, http, relay, aws, systemd net.Listener
	outgoing                        []outgoing.Listener
}

// open leaves it to close to close what was opened before an error.
func (l *listeners) open(w *Workload, relay Relay) (err error) {
	if l.grpc, err = w.Sockets.listen(w.Sockets.GRPC); err != nil {
		return err
	}
	if l.http, err = w.Sockets.listen(w.Sockets.HTTP); err != nil {
		return err
	}
	if relay.Listen != "" {
		if l.relay, err = net.Listen("tcp", relay.Listen); err != nil {
			return fmt.Errorf("listening for verifiers on other hosts: %w", err)
		}
	}
	if w.AWS.Listen.IsValid() {
		if l.aws, err = net.Listen("tcp", w.AWS.Listen.String()); err != nil {
			return fmt.Errorf("listening for AWS's SDKs: %w", err)
		}
	}
	if w.Systemd.Socket != "" {
		if l.systemd, err = agent.Listen(agent.SocketConfig{Path: w.Systemd.Socket}); err != nil {
			return err
		}
	}
	for i := range w.Outgoing {
		one, err := w.Outgoing[i].open(&w.Sockets)
		if err != nil {
			return fmt.Errorf("outgoing[%d]: %w", i, err)
		}
		l.outgoing = append(l.outgoing, one)
	}
	return nil
}

func (s *Sockets) listen(path string) (net.Listener, error) {
	if path == "" {
		return nil, nil
	}
	socket, err := s.socket(path)
	if err != nil {
		return nil, err
	}
	return agent.Listen(socket)
}

func (l *listeners) close() error {
	var errs []error
	all := []net.Listener{l.grpc, l.http, l.relay, l.aws, l.systemd}
	for _, o := range l.outgoing {
		all = append(all, o.Listener)
	}
	for _, one := range all {
		if one != nil {
			if err := one.Close(); !errors.Is(err, net.ErrClosed) {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}
