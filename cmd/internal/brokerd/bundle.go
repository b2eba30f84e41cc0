package brokerd

import (
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/dayflyhq/dayfly/cmd/internal/config"
	"github.com/dayflyhq/dayfly/policy"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// maxBundle is the largest bundle that the policy room takes.
const maxBundle = 32 * config.MiB

// PolicyBundle says where signed bundles of policy come from.
type PolicyBundle struct {
	// URL is https, or http on loopback.
	URL string `yaml:"url,required"`
	// Keys are the files of the public keys that sign bundles, by key ID.
	Keys map[string]string `yaml:"keys,required"`
	// Scope must stand in signatures; empty: none may.
	Scope string `yaml:"scope"`
	// CA is a file of the roots that the server's web certificate is checked with; empty:
	// the system's.
	CA string `yaml:"ca"`
	// ServerID, instead, is the server's SPIFFE ID: it is checked with the bundles of the
	// Workload API, and shown the broker's SVID.
	ServerID spiffeid.ID `yaml:"server_id"`
	// Poll is the interval between fetches; 0: a minute.
	Poll time.Duration `yaml:"poll"`
	// MaxSize bounds a bundle as it is fetched; 0: 32 MiB.
	MaxSize config.Size `yaml:"max_size"`
	// Keep is the file of the last good bundle; empty: beside the store.
	Keep string `yaml:"keep"`
}

// Validate checks what the types don't.
func (b *PolicyBundle) Validate() error {
	var problems []error
	wrong := func(bad bool, key, what string) {
		if bad {
			problems = append(problems, config.Wrong(key, "%s", what))
		}
	}
	if err := policy.CheckBundleURL(b.URL); err != nil {
		problems = append(problems, config.Wrong("url", "%v", err))
	}
	wrong(len(b.Keys) == 0, "keys", "is empty: give it the file of a public key under its key ID")
	for id, path := range b.Keys {
		wrong(id == "" || path == "", "keys", "has a key without an ID or a file")
	}
	wrong(b.CA != "" && !b.ServerID.IsZero(), "server_id", "stands beside ca: the server has either a web certificate or an SVID")
	wrong(b.Poll != 0 && b.Poll < policy.MinPoll, "poll", "is at least 1s")
	wrong(b.MaxSize > maxBundle, "max_size", "is at most 32MiB")
	return errors.Join(problems...)
}

// identities are the broker's own SVID and the bundles of its peers.
type identities interface {
	x509svid.Source
	x509bundle.Source
}

// policySource is the folder, or the bundle.
func (c *Config) policySource(svids identities) (policy.Config, error) {
	if c.PolicyBundle == nil {
		return policy.Config{Dir: c.Policy}, nil
	}
	bundle, err := c.PolicyBundle.source(c.Store, svids)
	return policy.Config{Bundle: bundle}, err
}

// source reads the files. The store's folder is where a bundle is kept by default.
func (b *PolicyBundle) source(store string, svids identities) (*policy.Bundle, error) {
	out := &policy.Bundle{
		URL: b.URL, Keys: map[string]crypto.PublicKey{}, Scope: b.Scope, Poll: b.Poll, MaxSize: int64(b.MaxSize), Kept: b.Keep,
	}
	if out.Kept == "" {
		out.Kept = filepath.Join(filepath.Dir(store), "policy-bundle.tar.gz")
	}
	for id, path := range b.Keys {
		text, err := os.ReadFile(path)
		if err == nil {
			out.Keys[id], err = policy.ParseBundleKey(text)
		}
		if err != nil {
			return nil, fmt.Errorf("policy_bundle: key %q in %s: %w", id, path, err)
		}
	}
	switch {
	case !b.ServerID.IsZero():
		out.TLS = tlsconfig.MTLSClientConfig(svids, svids, tlsconfig.AuthorizeID(b.ServerID))
	case b.CA != "":
		text, err := os.ReadFile(b.CA)
		if err != nil {
			return nil, fmt.Errorf("policy_bundle: ca: %w", err)
		}
		roots := x509.NewCertPool()
		if !roots.AppendCertsFromPEM(text) {
			return nil, fmt.Errorf("policy_bundle: ca: no certificate in %s", b.CA)
		}
		out.TLS = &tls.Config{RootCAs: roots}
	}
	return out, nil
}
