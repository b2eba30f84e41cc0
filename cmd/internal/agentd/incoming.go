package agentd

import (
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"time"

	"github.com/dayflyhq/dayfly/agent"
	"github.com/dayflyhq/dayfly/agent/hop"
	"github.com/dayflyhq/dayfly/agent/incoming"
	"github.com/dayflyhq/dayfly/cmd/internal/config"
	"github.com/dayflyhq/dayfly/sdk/verify"
)

// Incoming is a proxy before a service that has no SDK.
type Incoming struct {
	Listen       string      `yaml:"listen,required"`
	Mode         config.Mode `yaml:"mode"`
	Group        string      `yaml:"group"`
	Callers      `yaml:",inline"`
	Plain        bool          `yaml:"plain"`
	Anonymous    bool          `yaml:"anonymous"`
	MaxConns     int           `yaml:"max_connections"`
	Upstream     string        `yaml:"upstream,required"`
	UpstreamCA   string        `yaml:"upstream_ca"`
	Audiences    []string      `yaml:"audiences,required"`
	MaxStaleness time.Duration `yaml:"max_staleness"`
	OnStale      string        `yaml:"on_stale"`
	PassToken    bool          `yaml:"pass_token"`
	Routes       []Route       `yaml:"routes,required"`
}

// Envoy is what an Envoy before a service asks.
type Envoy struct {
	Listen       string      `yaml:"listen,required"`
	Mode         config.Mode `yaml:"mode"`
	Group        string      `yaml:"group"`
	Callers      `yaml:",inline"`
	Peer         string        `yaml:"peer"`
	Audiences    []string      `yaml:"audiences,required"`
	MaxStaleness time.Duration `yaml:"max_staleness"`
	OnStale      string        `yaml:"on_stale"`
	PassToken    bool          `yaml:"pass_token"`
	Routes       []Route       `yaml:"routes,required"`
}

// Route is what a request needs.
type Route struct {
	Path    string   `yaml:"path,required"`
	Host    string   `yaml:"host"`
	Methods []string `yaml:"methods"`
	Scopes  []string `yaml:"scopes"`
	Public  bool     `yaml:"public"`
}

func (c *Incoming) doorway() doorway { return doorway{c.Listen, c.Mode, c.Group, c.Callers} }

func (c *Envoy) doorway() doorway { return doorway{c.Listen, c.Mode, c.Group, c.Callers} }

// Validate checks all of it.
func (c *Incoming) Validate() error {
	door := c.doorway()
	policy := c.policy()
	errs := []error{door.check(), maxConns(c.MaxConns), onStale(c.OnStale), routesWrong(policy)}
	if door.unix() {
		if c.Plain || c.Anonymous {
			errs = append(errs, config.Wrong("plain", "and anonymous are for TCP: a unix socket is plain"))
		}
	} else if c.Plain {
		if !door.loopback() {
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

func (c *Incoming) policy() incoming.Policy {
	return policy(c.Audiences, c.MaxStaleness, c.OnStale, c.PassToken, c.Routes)
}

func (c *Incoming) roots() (*x509.CertPool, error) {
	if c.UpstreamCA == "" {
		return nil, nil
	}
	content, err := os.ReadFile(c.UpstreamCA)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(content) {
		return nil, fmt.Errorf("%s has no certificate in PEM", c.UpstreamCA)
	}
	return pool, nil
}

// Validate checks all of it.
func (c *Envoy) Validate() error {
	door := c.doorway()
	errs := []error{door.check(), onStale(c.OnStale), routesWrong(c.policy())}
	if !door.unix() && !door.loopback() {
		errs = append(errs, config.Wrong("listen", "must be the absolute path of a unix socket or a loopback address: whoever asks learns which tokens pass"))
	}
	if _, ok := witnesses[c.Peer]; !ok {
		errs = append(errs, config.Wrong("peer", "is certificate or principal"))
	}
	return errors.Join(errs...)
}

var witnesses = map[string]incoming.Witness{"": incoming.Certificate, "certificate": incoming.Certificate, "principal": incoming.Principal}

func (c *Envoy) policy() incoming.Policy {
	return policy(c.Audiences, c.MaxStaleness, c.OnStale, c.PassToken, c.Routes)
}

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

func onStale(s string) error {
	if s != "" && s != "close" && s != "accept" {
		return config.Wrong("on_stale", "is close or accept")
	}
	return nil
}

func policy(audiences []string, bound time.Duration, stale string, passToken bool, routes []Route) incoming.Policy {
	p := incoming.Policy{Audiences: audiences, MaxStaleness: bound, PassToken: passToken}
	if stale == "accept" {
		p.OnStale = verify.Accept
	}
	for _, r := range routes {
		p.Routes = append(p.Routes, incoming.Route(r))
	}
	return p
}

// routesWrong leaves what is missing to the decoder, which says it better.
func routesWrong(p incoming.Policy) error {
	if len(p.Audiences) == 0 || len(p.Routes) == 0 {
		return nil
	}
	routes := p.Routes
	p.Routes = []incoming.Route{{Path: "/"}}
	var errs []error
	if err := p.Check(); err != nil {
		errs = append(errs, config.Wrong("audiences", "or max_staleness: %v", err))
	}
	var wrong *incoming.RouteError
	for _, err := range flat(incoming.CheckRoutes(routes)) {
		if errors.As(err, &wrong) {
			errs = append(errs, config.Wrong(fmt.Sprintf("routes[%d].%s", wrong.Index, wrong.Field), "%s", wrong.Message))
			continue
		}
		errs = append(errs, config.Wrong("routes", "%v", err))
	}
	return errors.Join(errs...)
}

func flat(err error) []error {
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		return joined.Unwrap()
	}
	if err == nil {
		return nil
	}
	return []error{err}
}

// doorway is where and for whom to listen.
type doorway struct {
	listen string
	mode   config.Mode
	group  string
	Callers
}

func (d *doorway) unix() bool { return filepath.IsAbs(d.listen) }

func (d *doorway) loopback() bool {
	at, err := netip.ParseAddrPort(d.listen)
	return err == nil && at.Addr().IsLoopback()
}

func (d *doorway) check() error {
	if d.listen == "" {
		return nil // said by the decoder
	}
	if !d.unix() {
		if d.mode != 0 || d.group != "" || !reflect.ValueOf(d.Callers).IsZero() {
			return config.Wrong("mode", "group and the lists of who is allowed are for unix sockets")
		}
		if _, err := netip.ParseAddrPort(d.listen); err != nil {
			return config.Wrong("listen", "%q is neither ADDRESS:PORT nor the absolute path of a unix socket", d.listen)
		}
		return nil
	}
	socket, err := d.socket()
	if err != nil {
		return config.Wrong("group", "%v", err)
	}
	if err := socket.Validate(); err != nil {
		return config.Wrong("listen", "%v", err)
	}
	return d.Callers.check()
}

func (d *doorway) socket() (agent.SocketConfig, error) {
	out := agent.SocketConfig{Path: d.listen, Mode: fs.FileMode(d.mode)}
	if d.group != "" {
		gid, err := groupID(d.group)
		if err != nil {
			return out, err
		}
		out.Group = &gid
	}
	return out, nil
}

// open listens. The listener comes from the shelf: see workload.listen.
func (w *workload) open(s *shelf, d doorway) (net.Listener, error) {
	if !d.unix() {
		return w.keep(s.tcp(d.listen, "requests that come in"))
	}
	socket, err := d.socket()
	if err != nil {
		return nil, err
	}
	return w.keep(s.unix(socket))
}

// listenIncoming opens the listeners of incoming and envoy.
func (w *workload) listenIncoming(s *shelf, cfg *agent.Config) error {
	for i := range w.w.Incoming {
		c := &w.w.Incoming[i]
		roots, err := c.roots()
		if err != nil {
			return fmt.Errorf("incoming[%d].upstream_ca: %w", i, err)
		}
		at := c.doorway()
		l, err := w.open(s, at)
		if err != nil {
			return err
		}
		out := agent.Incoming{Allow: c.allow(), ProxyConfig: incoming.ProxyConfig{
			Policy: c.policy(), Listener: l, Anonymous: c.Anonymous, MaxConnections: c.MaxConns, Upstream: c.Upstream, UpstreamCA: roots,
		}}
		if !c.Plain && !at.unix() {
			out.Source = cfg.Source
		}
		cfg.Incoming = append(cfg.Incoming, out)
	}
	for i := range w.w.Envoy {
		c := &w.w.Envoy[i]
		l, err := w.open(s, c.doorway())
		if err != nil {
			return err
		}
		cfg.Envoy = append(cfg.Envoy, agent.Envoy{Allow: c.allow(), EnvoyConfig: incoming.EnvoyConfig{
			Policy: c.policy(), Listener: l, Peer: witnesses[c.Peer],
		}})
	}
	return nil
}
