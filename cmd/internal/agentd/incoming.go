package agentd

import (
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"path/filepath"
	"reflect"
	"time"

	"github.com/dayflyhq/dayfly/agent"
	"github.com/dayflyhq/dayfly/agent/field"
	"github.com/dayflyhq/dayfly/agent/hop"
	"github.com/dayflyhq/dayfly/agent/incoming"
	"github.com/dayflyhq/dayfly/cmd/internal/config"
	"github.com/dayflyhq/dayfly/sdk/verify"
)

// Guard is what listens and judges: a proxy, or what an Envoy asks.
type Guard struct {
	Listen       string      `yaml:"listen,required"`
	Mode         config.Mode `yaml:"mode"`
	Group        string      `yaml:"group"`
	Callers      `yaml:",inline"`
	Audiences    []string      `yaml:"audiences,required"`
	MaxStaleness time.Duration `yaml:"max_staleness"`
	OnStale      string        `yaml:"on_stale"`
	PassToken    bool          `yaml:"pass_token"`
	Routes       []Route       `yaml:"routes,required"`
}

// Incoming is a proxy before a service that has no SDK.
type Incoming struct {
	Guard      `yaml:",inline"`
	Plain      bool   `yaml:"plain"`
	Anonymous  bool   `yaml:"anonymous"`
	MaxConns   int    `yaml:"max_connections"`
	Upstream   string `yaml:"upstream,required"`
	UpstreamCA string `yaml:"upstream_ca"`
}

// Envoy is what an Envoy before a service asks.
type Envoy struct {
	Guard `yaml:",inline"`
	Peer  string `yaml:"peer"`
}

// Route is what a request needs.
type Route struct {
	Path    string   `yaml:"path,required"`
	Host    string   `yaml:"host"`
	Methods []string `yaml:"methods"`
	Scopes  []string `yaml:"scopes"`
	Public  bool     `yaml:"public"`
}

// Validate checks all of it.
func (c *Incoming) Validate() error {
	errs := []error{c.check(), maxConns(c.MaxConns)}
	if c.unix() {
		if c.Plain || c.Anonymous {
			errs = append(errs, config.Wrong("plain", "and anonymous are for TCP: a unix socket is plain"))
		}
	} else if c.Plain {
		if !c.loopback() {
			errs = append(errs, config.Wrong("plain", "needs a loopback address or a unix socket: tokens would go over the network in plain text"))
		}
		if c.Anonymous {
			errs = append(errs, config.Wrong("anonymous", "is for TLS: on a plain listener everybody is"))
		}
	}
	if err := incoming.CheckUpstream(c.Upstream); err != nil && c.Upstream != "" {
		errs = append(errs, config.Wrong("upstream", "%v", err))
	}
	if c.UpstreamCA != "" && !filepath.IsAbs(c.UpstreamCA) {
		errs = append(errs, config.Wrong("upstream_ca", "must be an absolute path"))
	}
	return errors.Join(errs...)
}

// Validate checks all of it.
func (c *Envoy) Validate() error {
	errs := []error{c.check()}
	if !c.unix() && !c.loopback() {
		errs = append(errs, config.Wrong("listen", "must be the absolute path of a unix socket or a loopback address: whoever asks learns which tokens pass"))
	}
	if _, ok := witnesses[c.Peer]; !ok {
		errs = append(errs, config.Wrong("peer", "is certificate or principal"))
	}
	return errors.Join(errs...)
}

var witnesses = map[string]incoming.Witness{"": incoming.Certificate, "certificate": incoming.Certificate, "principal": incoming.Principal}

// checkGuards checks what is to each other.
func (c *Config) checkGuards() error {
	var errs []error
	for _, w := range c.all() {
		if len(w.Incoming)+len(w.Envoy) > 0 && !c.Feed.Follow {
			errs = append(errs, config.Wrong(w.prefix+"incoming", "and envoy need feed.follow: the feed tells them what is revoked"))
		}
	}
	return errors.Join(errs...)
}

func maxConns(n int) error {
	if n < 0 {
		return config.Wrong("max_connections", "is 1 or more; without it, %d", hop.MaxConnections)
	}
	return nil
}

// check says what is wrong with it, but leaves what is missing to the decoder, which says it
// better.
func (g *Guard) check() error {
	errs := []error{g.checkListen()}
	if g.OnStale != "" && g.OnStale != "close" && g.OnStale != "accept" {
		errs = append(errs, config.Wrong("on_stale", "is close or accept"))
	}
	if len(g.Audiences) == 0 || len(g.Routes) == 0 {
		return errors.Join(errs...)
	}
	policy := g.policy()
	for _, e := range field.Errors(incoming.CheckRoutes(policy.Routes)) {
		errs = append(errs, config.Wrong(e.Key, "%s", e.Message))
	}
	policy.Routes = []incoming.Route{{Path: "/"}}
	if err := policy.Check(); err != nil {
		errs = append(errs, config.Wrong("audiences", "or max_staleness: %v", err))
	}
	return errors.Join(errs...)
}

func (g *Guard) policy() incoming.Policy {
	p := incoming.Policy{Audiences: g.Audiences, MaxStaleness: g.MaxStaleness, PassToken: g.PassToken}
	if g.OnStale == "accept" {
		p.OnStale = verify.Accept
	}
	for _, r := range g.Routes {
		p.Routes = append(p.Routes, incoming.Route(r))
	}
	return p
}

func (g *Guard) unix() bool { return filepath.IsAbs(g.Listen) }

func (g *Guard) loopback() bool {
	at, err := netip.ParseAddrPort(g.Listen)
	return err == nil && at.Addr().IsLoopback()
}

func (g *Guard) checkListen() error {
	if g.Listen == "" {
		return nil // said by the decoder
	}
	if !g.unix() {
		if g.Mode != 0 || g.Group != "" || !reflect.ValueOf(g.Callers).IsZero() {
			return config.Wrong("mode", "group and the lists of who is allowed are for unix sockets")
		}
		if _, err := netip.ParseAddrPort(g.Listen); err != nil {
			return config.Wrong("listen", "%q is neither ADDRESS:PORT nor the absolute path of a unix socket", g.Listen)
		}
		return nil
	}
	socket, err := g.socket()
	if err != nil {
		return config.Wrong("group", "%v", err)
	}
	if err := socket.Validate(); err != nil {
		return config.Wrong("listen", "%v", err)
	}
	return g.Callers.check()
}

func (g *Guard) socket() (agent.SocketConfig, error) {
	out := agent.SocketConfig{Path: g.Listen, Mode: fs.FileMode(g.Mode)}
	if g.Group != "" {
		gid, err := groupID(g.Group)
		if err != nil {
			return out, err
		}
		out.Group = &gid
	}
	return out, nil
}

// open listens. The listener comes from the shelf: see workload.listen.
func (w *workload) open(s *shelf, g *Guard) (net.Listener, error) {
	if !g.unix() {
		return w.keep(s.tcp(g.Listen, "requests that come in"))
	}
	socket, err := g.socket()
	if err != nil {
		return nil, err
	}
	return w.keep(s.unix(socket))
}

// listenIncoming opens the listeners of incoming and envoy.
func (w *workload) listenIncoming(s *shelf, cfg *agent.Config) error {
	for i := range w.w.Incoming {
		c := &w.w.Incoming[i]
		var roots *x509.CertPool // nil: the system's
		if c.UpstreamCA != "" {
			roots = x509.NewCertPool()
		}
		if err := addRoots(roots, c.UpstreamCA); err != nil {
			return fmt.Errorf("incoming[%d].upstream_ca: %w", i, err)
		}
		l, err := w.open(s, &c.Guard)
		if err != nil {
			return err
		}
		out := agent.Incoming{Allow: c.allow(), ProxyConfig: incoming.ProxyConfig{
			Policy: c.policy(), Listener: l, Anonymous: c.Anonymous, MaxConnections: c.MaxConns, Upstream: c.Upstream, UpstreamCA: roots,
		}}
		if !c.Plain && !c.unix() {
			out.Source = cfg.Source
		}
		cfg.Incoming = append(cfg.Incoming, out)
	}
	for i := range w.w.Envoy {
		c := &w.w.Envoy[i]
		l, err := w.open(s, &c.Guard)
		if err != nil {
			return err
		}
		cfg.Envoy = append(cfg.Envoy, agent.Envoy{Allow: c.allow(), EnvoyConfig: incoming.EnvoyConfig{
			Policy: c.policy(), Listener: l, Peer: witnesses[c.Peer],
		}})
	}
	return nil
}
