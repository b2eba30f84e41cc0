package brokerd

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/broker/keys"
	"github.com/dayflyhq/dayfly/broker/web"
	"github.com/dayflyhq/dayfly/cmd/internal/config"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// Config is the broker's configuration file. deploy/broker.yaml documents every key.
type Config struct {
	// Issuer is the iss of every token: an absolute URL under which verifiers that
	// know only standards find the public documents.
	Issuer string `yaml:"issuer,required"`
	// Store is the bbolt file, which "dayfly-broker init" made.
	Store string `yaml:"store,required"`
	// Policy is the folder of Rego and data.
	Policy string `yaml:"policy,required"`
	// Audit is the file of audit records, rotated; "-" is standard error.
	Audit string `yaml:"audit,required"`
	// WorkloadAPI is the socket of the broker's own SVID; empty: SPIFFE_ENDPOINT_SOCKET.
	WorkloadAPI string `yaml:"workload_api"`
	// TrustDomains are those served besides the broker's own: federated ones.
	TrustDomains []spiffeid.TrustDomain `yaml:"trust_domains"`
	Listen       Listen                 `yaml:"listen,required"`
	// MaxTTL is a lower cap on the life of tokens than the hard one of 1 h.
	MaxTTL time.Duration `yaml:"max_ttl"`
	// MaxRevocations is a lower maximum of the set of revocations, for give-backs, than
	// 100,000.
	MaxRevocations int `yaml:"max_revocations"`
	// KeyRotation is how long a signing key signs.
	KeyRotation time.Duration `yaml:"key_rotation"`
	// Algorithm of new signing keys, ES256 or EdDSA.
	Algorithm token.Algorithm `yaml:"algorithm"`
	// Traces is the URL of an OTLP/gRPC collector; empty: no traces.
	Traces   string     `yaml:"traces"`
	LogLevel slog.Level `yaml:"log_level"`
	// Disregard is a flag and no key of the file: the highest signed head that the log may
	// lack, and why.
	Disregard       feed.Position
	DisregardReason string
	// ShutdownGrace is how long calls under way may take when the broker stops.
	ShutdownGrace time.Duration `yaml:"shutdown_grace"`
}

// Listen says where. Ports may be 0.
type Listen struct {
	// GRPC is for workloads, verifiers and operators, by mTLS.
	GRPC string `yaml:"grpc,required"`
	// Public is plain HTTP for JWKS and discovery; empty: not served.
	Public string `yaml:"public"`
	// Admin is plain HTTP on loopback for health, readiness and metrics; empty: not served.
	Admin string `yaml:"admin"`
	// BreakGlass is the path of the root-only unix socket; empty: not served.
	BreakGlass string `yaml:"break_glass"`
}

// Defaults returns the configuration that a file is read over.
func Defaults() Config {
	return Config{KeyRotation: 12 * time.Hour, MaxTTL: token.MaxTTL, MaxRevocations: broker.MaxRevocations, Algorithm: token.ES256, ShutdownGrace: 10 * time.Second}
}

// Validate checks what the types don't: all that could be wrong with a value whatever
// is on this host, so that nothing starts and ends again without naming a line.
func (c *Config) Validate() error {
	var problems []error
	wrong := func(bad bool, key, what string) {
		if bad {
			problems = append(problems, config.Wrong(key, "%s", what))
		}
	}
	check := func(err error, key string) {
		if err != nil {
			problems = append(problems, config.Wrong(key, "%v", err))
		}
	}
	check(web.CheckIssuer(c.Issuer), "issuer")
	for key, path := range map[string]string{"store": c.Store, "policy": c.Policy, "audit": c.Audit} {
		wrong(path == "", key, "is empty: give it a path")
	}
	if c.WorkloadAPI != "" {
		check(workloadapi.ValidateAddress(c.WorkloadAPI), "workload_api")
	}
	wrong(c.MaxTTL < time.Second || c.MaxTTL > token.MaxTTL, "max_ttl", "is between 1s and the hard cap of 1h")
	wrong(c.MaxRevocations < 1 || c.MaxRevocations > broker.MaxRevocations, "max_revocations", fmt.Sprintf("is between 1 and %d", broker.MaxRevocations))
	wrong(c.KeyRotation < keys.MinRotateEvery || c.KeyRotation > keys.DefaultRotateEvery, "key_rotation", "is between 1s and 12h")
	wrong(c.Algorithm != token.ES256 && c.Algorithm != token.EdDSA, "algorithm", "is ES256 or EdDSA")
	if c.Traces != "" {
		u, err := url.Parse(c.Traces)
		wrong(err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https", "traces", "is an http or https URL, such as http://127.0.0.1:4317")
	}
	return errors.Join(problems...)
}

// Validate checks the addresses.
func (l *Listen) Validate() error {
	var problems []error
	taken := map[string]string{}
	for _, at := range []struct {
		key, addr string
		check     func(string) error
	}{{"grpc", l.GRPC, config.CheckHostPort}, {"public", l.Public, config.CheckHostPort}, {"admin", l.Admin, config.CheckLoopback}} {
		if at.addr == "" && at.key != "grpc" {
			continue
		}
		if err := at.check(at.addr); err != nil {
			problems = append(problems, config.Wrong(at.key, "%v", err))
			continue
		}
		if other, twice := taken[at.addr]; twice {
			problems = append(problems, config.Wrong(at.key, "is the address of listen.%s too", other))
		}
		if _, port, _ := net.SplitHostPort(at.addr); port != "0" {
			taken[at.addr] = at.key
		}
	}
	switch {
	case l.BreakGlass == "":
	case !filepath.IsAbs(l.BreakGlass):
		problems = append(problems, config.Wrong("break_glass", "is an absolute path"))
	case len(l.BreakGlass) > config.MaxSocketPath:
		problems = append(problems, config.Wrong("break_glass", "has %d bytes, a unix socket's path takes %d", len(l.BreakGlass), config.MaxSocketPath))
	}
	return errors.Join(problems...)
}

// checkEnvironment checks what the file leaves to the environment.
func (c *Config) checkEnvironment() error {
	if c.WorkloadAPI != "" {
		return nil
	}
	addr := os.Getenv(workloadapi.SocketEnv)
	if addr == "" {
		return fmt.Errorf("workload_api: give the socket of the Workload API, or set %s", workloadapi.SocketEnv)
	}
	if err := workloadapi.ValidateAddress(addr); err != nil {
		return fmt.Errorf("%s: %w", workloadapi.SocketEnv, err)
	}
	return nil
}
