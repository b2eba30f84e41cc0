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
	"time"

	"github.com/dayflyhq/dayfly/agent"
	"github.com/dayflyhq/dayfly/agent/incoming"
	"github.com/dayflyhq/dayfly/cmd/internal/config"
	"github.com/dayflyhq/dayfly/sdk/verify"
)

// Incoming is a proxy before a service that has no SDK.
type Incoming struct {
	Listen       string        `yaml:"listen,required"`
	Mode         config.Mode   `yaml:"mode"`
	Group        string        `yaml:"group"`
	AllowedUIDs  []uint32      `yaml:"allowed_uids"`
	Plain        bool          `yaml:"plain"`
	Anonymous    bool          `yaml:"anonymous"`
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
	Listen       string        `yaml:"listen,required"`
	Mode         config.Mode   `yaml:"mode"`
	Group        string        `yaml:"group"`
	AllowedUIDs  []uint32      `yaml:"allowed_uids"`
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

// Validate checks all of it.
func (c *Incoming) Validate() error {
	door := doorway{c.Listen, c.Mode, c.Group, c.AllowedUIDs}
	policy := c.policy()
	errs := []error{door.check(), onStale(c.OnStale), routesWrong(policy)}
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
	door := doorway{c.Listen, c.Mode, c.Group, c.AllowedUIDs}
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
	if len(c.Incoming)+len(c.Envoy) > 0 && !c.Feed.Follow {
		return config.Wrong("incoming", "and envoy need feed.follow: the feed tells them what is revoked")
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
	uids   []uint32
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
		if d.mode != 0 || d.group != "" || len(d.uids) > 0 {
			return config.Wrong("mode", "group and allowed_uids are for unix sockets")
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
	return nil
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

func (d *doorway) open() (net.Listener, error) {
	if !d.unix() {
		l, err := net.Listen("tcp", d.listen)
		if err != nil {
			return nil, fmt.Errorf("listening for requests that come in: %w", err)
		}
		return l, nil
	}
	socket, err := d.socket()
	if err != nil {
		return nil, err
	}
	return agent.Listen(socket)
}

// closeGuards closes what openGuards opened.
func closeGuards(in []agent.Incoming, en []agent.Envoy) error {
	var errs []error
	for _, c := range in {
		errs = append(errs, c.Listener.Close())
	}
	for _, c := range en {
		errs = append(errs, c.Listener.Close())
	}
	return errors.Join(errs...)
}

// openGuards opens the listeners of incoming and envoy, and describes them to package
// agent. What it opened before an error it closes.
func openGuards(proxies []Incoming, envoys []Envoy, source agent.Source) (in []agent.Incoming, en []agent.Envoy, err error) {
	defer func() {
		if err != nil {
			err = errors.Join(err, closeGuards(in, en))
			in, en = nil, nil
		}
	}()
	for i := range proxies {
		c := &proxies[i]
		out := agent.Incoming{AllowedUIDs: c.AllowedUIDs, ProxyConfig: incoming.ProxyConfig{
			Policy: c.policy(), Anonymous: c.Anonymous, Upstream: c.Upstream,
		}}
		if out.UpstreamCA, err = c.roots(); err != nil {
			return in, en, fmt.Errorf("incoming[%d].upstream_ca: %w", i, err)
		}
		at := doorway{c.Listen, c.Mode, c.Group, c.AllowedUIDs}
		if out.Listener, err = at.open(); err != nil {
			return in, en, err
		}
		if !c.Plain && !at.unix() {
			out.Source = source
		}
		in = append(in, out)
	}
	for i := range envoys {
		c := &envoys[i]
		out := agent.Envoy{AllowedUIDs: c.AllowedUIDs, EnvoyConfig: incoming.EnvoyConfig{Policy: c.policy(), Peer: witnesses[c.Peer]}}
		at := doorway{c.Listen, c.Mode, c.Group, c.AllowedUIDs}
		if out.Listener, err = at.open(); err != nil {
			return in, en, err
		}
		en = append(en, out)
	}
	return in, en, nil
}
