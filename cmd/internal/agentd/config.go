package agentd

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"os/user"
	"strconv"
	"strings"
	"time"

	"github.com/dayflyhq/dayfly/agent"
	"github.com/dayflyhq/dayfly/cmd/internal/config"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/proto/wire"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// Config is the agent's configuration file; deploy/agent.yaml documents every key.
// Flags come on top of it.
type Config struct {
	Broker      Broker `yaml:"broker"`
	WorkloadAPI string `yaml:"workload_api"`
	// Workload is the only one, and Workloads are several: one excludes the other.
	Workload  `yaml:",inline"`
	Workloads []Workload     `yaml:"workloads"`
	Feed      Feed           `yaml:"feed"`
	Metrics   netip.AddrPort `yaml:"metrics"`
	Log       Log            `yaml:"log"`
}

// Broker is whom the agent calls.
type Broker struct {
	Address string      `yaml:"address"`
	ID      spiffeid.ID `yaml:"id"`
}

// Sockets are where and for whom the agent listens.
type Sockets struct {
	GRPC    string      `yaml:"grpc"`
	HTTP    string      `yaml:"http"`
	Mode    config.Mode `yaml:"mode"`
	Group   string      `yaml:"group"`
	Callers `yaml:",inline"`
}

// Callers are whom a unix socket lets in, beside its mode.
type Callers struct {
	AllowedUIDs []uint32 `yaml:"allowed_uids"`
	AllowedGIDs []uint32 `yaml:"allowed_gids"`
	Executables []string `yaml:"allowed_executables"`
}

func (c *Callers) allow() agent.Allow {
	return agent.Allow{UIDs: c.AllowedUIDs, GIDs: c.AllowedGIDs, Executables: c.Executables}
}

// Prefetch is a credential that is kept fresh before anyone asks.
type Prefetch struct {
	Audience string        `yaml:"audience,required"`
	Scopes   []string      `yaml:"scopes"`
	TTL      time.Duration `yaml:"ttl"`
	Binding  string        `yaml:"binding"`
}

// Feed is how the agent follows and relays revocations.
type Feed struct {
	Follow       bool          `yaml:"follow"`
	MaxStaleness time.Duration `yaml:"max_staleness"`
	Audiences    []string      `yaml:"audiences"`
	MaxStreams   int           `yaml:"max_streams"`
	// Upstream is a relay on another host to follow in place of the broker.
	Upstream Broker `yaml:"upstream"`
	// Relay is where verifiers on other hosts may follow.
	Relay Relay `yaml:"relay"`
}

// Relay is for verifiers on other hosts; off without an address.
type Relay struct {
	// Workload is the name of the one whose SVID it shows, where there are several.
	Workload string   `yaml:"workload"`
	Listen   string   `yaml:"listen"`
	Allow    []string `yaml:"allow"`
}

// selectors reads whom to allow.
func (r *Relay) selectors() ([]revocation.Selector, error) {
	var out []revocation.Selector
	for _, text := range r.Allow {
		s, err := revocation.Parse(text)
		if err != nil {
			return nil, err
		}
		switch s.Kind() {
		case revocation.KindIdentity, revocation.KindSubtree, revocation.KindTrustDomain:
			out = append(out, s)
		default:
			return nil, fmt.Errorf("%q is neither an identity, a subtree nor a trust domain", text)
		}
	}
	return out, nil
}

// Validate checks whom to allow.
func (r *Relay) Validate() error {
	var errs []error
	if _, err := r.selectors(); err != nil {
		errs = append(errs, config.Wrong("allow", "%v", err))
	}
	if (r.Listen == "") != (len(r.Allow) == 0) {
		errs = append(errs, config.Wrong("allow", "and listen go together: a listener admits nobody who is not named"))
	}
	return errors.Join(errs...)
}

// Log is what is written to standard error.
type Log struct {
	Level  slog.Level `yaml:"level"`
	Format string     `yaml:"format"`
}

// defaults are what the file and the flags change.
func defaults() Config {
	c := Config{
		Feed: Feed{Follow: true, MaxStaleness: wire.DefaultBound, MaxStreams: agent.DefaultMaxStreams},
		Log:  Log{Format: "json"},
	}
	c.Workload.SetDefaults()
	return c
}

// Validate checks the address; what is missing may still come from a flag.
func (b *Broker) Validate() error {
	if b.Address == "" || strings.HasPrefix(b.Address, "unix:///") {
		return nil
	}
	if err := config.CheckHostPort(b.Address); err != nil {
		return config.Wrong("address", "%v", err)
	}
	return nil
}

// Validate checks paths, mode and group; what is missing may still come from a flag.
func (s *Sockets) Validate() error {
	var errs []error
	for _, at := range []struct{ key, path string }{{"grpc", s.GRPC}, {"http", s.HTTP}} {
		if at.path == "" {
			continue
		}
		if err := (&agent.SocketConfig{Path: at.path}).Validate(); err != nil {
			errs = append(errs, config.Wrong(at.key, "%v", err))
		}
	}
	if s.GRPC != "" && s.GRPC == s.HTTP {
		errs = append(errs, config.Wrong("http", "is the path of sockets.grpc too"))
	}
	if s.Mode&^0o660 != 0 || s.Mode == 0 {
		errs = append(errs, config.Wrong("mode", "must be within 0660: whoever connects gets this workload's credentials"))
	}
	if s.Group != "" {
		if _, err := groupID(s.Group); err != nil {
			errs = append(errs, config.Wrong("group", "%v", err))
		}
	}
	return errors.Join(append(errs, s.Callers.check())...)
}

func (c *Callers) check() error {
	allow := c.allow()
	if err := allow.Validate(); err != nil {
		return config.Wrong("allowed_executables", "%v", err)
	}
	return nil
}

// Validate checks one request.
func (p *Prefetch) Validate() error {
	var errs []error
	if err := token.ValidateAudience(p.Audience); err != nil {
		errs = append(errs, config.Wrong("audience", "%v", err))
	}
	if _, err := token.NormalizeScopes(p.Scopes); err != nil {
		errs = append(errs, config.Wrong("scopes", "%v", err))
	}
	if p.TTL > token.MaxTTL || p.TTL > 0 && p.TTL < time.Second {
		errs = append(errs, config.Wrong("ttl", "is 1s to %v, or absent", token.MaxTTL))
	}
	if p.Binding != "" && !token.Binding(p.Binding).Valid() {
		errs = append(errs, config.Wrong("binding", "is spiffe, x5t or none"))
	}
	return errors.Join(errs...)
}

// maxStreams bounds what may be configured: the server's own bound is a uint32.
const maxStreams = 1 << 16

// Validate checks bounds.
func (f *Feed) Validate() error {
	var errs []error
	if f.MaxStaleness < wire.MinBound || f.MaxStaleness > wire.MaxBound {
		errs = append(errs, config.Wrong("max_staleness", "is %v to %v", wire.MinBound, wire.MaxBound))
	}
	if f.MaxStreams < 1 || f.MaxStreams > maxStreams {
		errs = append(errs, config.Wrong("max_streams", "is 1 to %d", maxStreams))
	}
	if len(f.Audiences) > wire.MaxAudiences {
		errs = append(errs, config.Wrong("audiences", "are at most %d", wire.MaxAudiences))
	}
	if (f.Upstream.Address == "") != f.Upstream.ID.IsZero() {
		errs = append(errs, config.Wrong("upstream", "needs both the address and the SPIFFE ID of the relay"))
	}
	if !f.Follow && (f.Upstream.Address != "" || f.Relay.Listen != "") {
		errs = append(errs, config.Wrong("follow", "is needed by upstream and by relay"))
	}
	for _, a := range f.Audiences {
		if err := token.ValidateAudience(a); err != nil {
			errs = append(errs, config.Wrong("audiences", "%v", err))
		}
	}
	return errors.Join(errs...)
}

// Validate checks what nothing else does.
func (c *Config) Validate() error {
	var errs []error
	if c.Metrics.IsValid() && !c.Metrics.Addr().IsLoopback() {
		errs = append(errs, config.Wrong("metrics", "must be a loopback address, such as 127.0.0.1:9464"))
	}
	if c.WorkloadAPI != "" {
		if err := workloadapi.ValidateAddress(c.WorkloadAPI); err != nil {
			errs = append(errs, config.Wrong("workload_api", "write unix:// and an absolute path: %v", err))
		}
	}
	errs = append(errs, c.checkWorkloads(), c.checkGuards())
	if c.Log.Format != "json" && c.Log.Format != "text" {
		errs = append(errs, config.Wrong("log.format", "is json or text"))
	}
	return errors.Join(errs...)
}

// complete reports what neither the file nor a flag gave, and checks the flags' values
// by the file's rules.
func (c *Config) complete() error {
	errs := []error{c.Validate(), c.Broker.Validate(), c.Sockets.Validate(), c.Feed.Validate()}
	if c.Broker.Address == "" {
		errs = append(errs, errors.New("broker.address: give the broker's host:port, here or as --broker"))
	}
	if c.Broker.ID.IsZero() {
		errs = append(errs, errors.New("broker.id: give the SPIFFE ID that the broker must prove, here or as --broker-id"))
	}
	if c.WorkloadAPI == "" {
		if addr := os.Getenv(workloadapi.SocketEnv); addr == "" {
			errs = append(errs, fmt.Errorf("workload_api: give the socket of the Workload API, here, as --workload-api or in %s", workloadapi.SocketEnv))
		} else if err := workloadapi.ValidateAddress(addr); err != nil {
			errs = append(errs, fmt.Errorf("%s: write unix:// and an absolute path: %w", workloadapi.SocketEnv, err))
		}
	}
	for _, w := range c.all() {
		if w.Sockets.GRPC == "" && w.Sockets.HTTP == "" {
			errs = append(errs, fmt.Errorf("%ssockets: give sockets.grpc or sockets.http, here or as --grpc-socket or --http-socket", w.prefix))
		}
	}
	for i := range c.Prefetch {
		if err := c.Prefetch[i].Validate(); err != nil {
			errs = append(errs, fmt.Errorf("prefetch %d: %w", i+1, err))
		}
	}
	return errors.Join(errs...)
}

func (s *Sockets) socket(path string) (agent.SocketConfig, error) {
	cfg := agent.SocketConfig{Path: path, Mode: fs.FileMode(s.Mode)}
	if s.Group != "" {
		gid, err := groupID(s.Group)
		if err != nil {
			return agent.SocketConfig{}, err
		}
		cfg.Group = &gid
	}
	return cfg, nil
}

// groupID reads a number or looks up a name.
func groupID(name string) (int, error) {
	if n, err := strconv.ParseUint(name, 10, 31); err == nil {
		return int(n), nil
	}
	g, err := user.LookupGroup(name)
	if err != nil {
		return 0, fmt.Errorf("no group %q on this host", name)
	}
	return strconv.Atoi(g.Gid)
}
