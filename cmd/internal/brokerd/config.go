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
	// Policy is the folder of Rego and data. Either this or PolicyBundle.
	Policy string `yaml:"policy"`
	// PolicyBundle is where signed bundles of policy are fetched from.
	PolicyBundle *PolicyBundle `yaml:"policy_bundle"`
	// Audit is the file of audit records, rotated; "-" is standard error.
	Audit string `yaml:"audit,required"`
	// WorkloadAPI is the socket of the broker's own SVID; empty: SPIFFE_ENDPOINT_SOCKET.
	WorkloadAPI string `yaml:"workload_api"`
	// TrustDomains are those served besides the broker's own: federated ones.
	TrustDomains []spiffeid.TrustDomain `yaml:"trust_domains"`
	// GRPCJWTTrustDomains are those of them, or the broker's own, whose identities may show
	// a JWT-SVID over gRPC, at Listen.GRPCJWT. Over HTTP those of all may.
	GRPCJWTTrustDomains []spiffeid.TrustDomain `yaml:"grpc_jwt_trust_domains"`
	Listen              Listen                 `yaml:"listen,required"`
	// MutualTLSURL is the base URL of the OAuth endpoints for clients with a certificate,
	// where something that ends TLS stands before the issuer; empty: the issuer.
	MutualTLSURL string `yaml:"mutual_tls_url"`
	// MaxTTL is a lower cap on the life of tokens than the hard one of 1 h.
	MaxTTL time.Duration `yaml:"max_ttl"`
	// MaxRevocations is a lower maximum of the set of revocations, for give-backs, than
	// 100,000.
	MaxRevocations int `yaml:"max_revocations"`
	// KeyRotation is how long a signing key signs.
	KeyRotation time.Duration `yaml:"key_rotation"`
	// JWKSMaxAge is the max-age of the public documents: how long a reader may use its
	// copy of the JWK set, and so for how long a key is published before it signs.
	JWKSMaxAge time.Duration `yaml:"jwks_max_age"`
	// Algorithm of new signing keys: ES256, EdDSA or RS256.
	Algorithm token.Algorithm `yaml:"algorithm"`
	// Traces is the URL of an OTLP/gRPC collector; empty: no traces.
	Traces   string     `yaml:"traces"`
	LogLevel slog.Level `yaml:"log_level"`
	// Disregard is a flag and no key of the file: the highest signed head that the log may
	// lack, and why.
	Disregard feed.Position
	// TakeOver is a flag too: see takeOver.
	TakeOver        bool
	DisregardReason string
	// ShutdownGrace is how long calls under way may take when the broker stops.
	ShutdownGrace time.Duration `yaml:"shutdown_grace"`
}

// Listen says where. Ports may be 0.
type Listen struct {
	// GRPC is for workloads, verifiers and operators, by mTLS.
	GRPC string `yaml:"grpc,required"`
	// GRPCJWT is for workloads whose mTLS ends before the broker: gRPC over TLS with the
	// broker's SVID, and a JWT-SVID in each call; empty: not served.
	GRPCJWT string `yaml:"grpc_jwt"`
	// Public is plain HTTP on loopback for JWKS, discovery and OAuth; empty: not served.
	Public string `yaml:"public"`
	// HTTPSSVID is the same over TLS with the broker's SVID; empty: not served.
	HTTPSSVID string `yaml:"https_svid"`
	// HTTPS is the same over TLS with a web certificate; empty: not served.
	HTTPS string `yaml:"https"`
	// HTTPSCertificate and HTTPSKey are its PEM files; looked at every few seconds.
	HTTPSCertificate string `yaml:"https_certificate"`
	HTTPSKey         string `yaml:"https_key"`
	// Admin is plain HTTP on loopback for health, readiness and metrics; empty: not served.
	Admin string `yaml:"admin"`
	// BreakGlass is the path of the root-only unix socket; empty: not served.
	BreakGlass string `yaml:"break_glass"`
}

// Defaults returns the configuration that a file is read over.
func Defaults() Config {
	return Config{KeyRotation: 12 * time.Hour, JWKSMaxAge: keys.DefaultJWKSMaxAge, MaxTTL: token.MaxTTL, MaxRevocations: broker.MaxRevocations, Algorithm: token.ES256, ShutdownGrace: 10 * time.Second}
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
	for key, path := range map[string]string{"store": c.Store, "audit": c.Audit} {
		wrong(path == "", key, "is empty: give it a path")
	}
	wrong(c.Policy == "" && c.PolicyBundle == nil, "policy", "is missing: give it the path of a folder, or set policy_bundle")
	wrong(c.Policy != "" && c.PolicyBundle != nil, "policy_bundle", "stands beside policy: a broker has one source of policy")
	if c.WorkloadAPI != "" {
		check(workloadapi.ValidateAddress(c.WorkloadAPI), "workload_api")
	}
	if c.MutualTLSURL != "" {
		check(web.CheckIssuer(c.MutualTLSURL), "mutual_tls_url")
	}
	wrong(len(c.GRPCJWTTrustDomains) == 0 && c.Listen.GRPCJWT != "", "grpc_jwt_trust_domains", "is empty: with listen.grpc_jwt, say whose JWT-SVIDs are taken there")
	wrong(len(c.GRPCJWTTrustDomains) > 0 && c.Listen.GRPCJWT == "", "grpc_jwt_trust_domains", "is of no use without listen.grpc_jwt")
	wrong(c.MaxTTL < time.Second || c.MaxTTL > token.MaxTTL, "max_ttl", "is between 1s and the hard cap of 1h")
	wrong(c.MaxRevocations < 1 || c.MaxRevocations > broker.MaxRevocations, "max_revocations", fmt.Sprintf("is between 1 and %d", broker.MaxRevocations))
	wrong(c.KeyRotation < keys.MinRotateEvery || c.KeyRotation > keys.DefaultRotateEvery, "key_rotation", "is between 1s and 12h")
	wrong(c.JWKSMaxAge < time.Second || c.JWKSMaxAge > keys.MaxJWKSMaxAge || c.JWKSMaxAge%time.Second != 0, "jwks_max_age", "is in whole seconds, between 1s and 5m")
	wrong(!c.Algorithm.Valid(), "algorithm", "is ES256, EdDSA or RS256")
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
	}{
		{"grpc", l.GRPC, config.CheckHostPort}, {"grpc_jwt", l.GRPCJWT, config.CheckHostPort},
		{"public", l.Public, config.CheckLoopback}, {"https_svid", l.HTTPSSVID, config.CheckHostPort}, {"https", l.HTTPS, config.CheckHostPort},
		{"admin", l.Admin, config.CheckLoopback},
	} {
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
	for _, file := range []struct{ key, path string }{{"https_certificate", l.HTTPSCertificate}, {"https_key", l.HTTPSKey}} {
		if (file.path == "") != (l.HTTPS == "") {
			problems = append(problems, config.Wrong(file.key, "and listen.https go together: a PEM file for the address"))
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
