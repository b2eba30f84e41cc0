package brokerd

import (
	"errors"
	"log/slog"
	"net"
	"net/url"
	"path/filepath"
	"time"

	"github.com/dayflyhq/dayfly/cmd/internal/config"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
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
	return Config{KeyRotation: 12 * time.Hour, MaxTTL: token.MaxTTL, Algorithm: token.ES256, ShutdownGrace: 10 * time.Second}
}

// Validate checks what the types don't.
func (c *Config) Validate() error {
	var problems []error
	wrong := func(bad bool, key, what string) {
		if bad {
			problems = append(problems, config.Wrong(key, "%s", what))
		}
	}
	u, err := url.Parse(c.Issuer)
	wrong(err != nil || u.Scheme == "" || u.Host == "", "issuer", "is an absolute URL, such as https://broker.example.org")
	wrong(c.MaxTTL < time.Second || c.MaxTTL > token.MaxTTL, "max_ttl", "is between 1s and the hard cap of 1h")
	wrong(c.KeyRotation < time.Second || c.KeyRotation > 12*time.Hour, "key_rotation", "is between 1s and 12h")
	wrong(c.Algorithm != token.ES256 && c.Algorithm != token.EdDSA, "algorithm", "is ES256 or EdDSA")
	wrong(c.Listen.BreakGlass != "" && !filepath.IsAbs(c.Listen.BreakGlass), "listen.break_glass", "is an absolute path")
	for key, addr := range map[string]string{"listen.grpc": c.Listen.GRPC, "listen.public": c.Listen.Public, "listen.admin": c.Listen.Admin} {
		if addr != "" {
			_, _, err := net.SplitHostPort(addr)
			wrong(err != nil, key, "is HOST:PORT")
		}
	}
	return errors.Join(problems...)
}
