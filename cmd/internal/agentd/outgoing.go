package agentd

import (
	"crypto/x509"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/dayflyhq/dayfly/agent"
	"github.com/dayflyhq/dayfly/agent/outgoing"
	"github.com/dayflyhq/dayfly/cmd/internal/config"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Outgoing is a proxy that adds tokens to requests for its upstreams.
type Outgoing struct {
	Listen     netip.AddrPort     `yaml:"listen"`
	Socket     string             `yaml:"socket"`
	Mode       string             `yaml:"mode"`
	SecretFile string             `yaml:"secret_file"`
	Open       bool               `yaml:"open"`
	MaxConns   int                `yaml:"max_connections"`
	Upstreams  []OutgoingUpstream `yaml:"upstreams,required"`
}

// OutgoingUpstream is a service, and the token that it gets.
type OutgoingUpstream struct {
	URL        string      `yaml:"url,required"`
	Host       string      `yaml:"host"`
	Path       string      `yaml:"path"`
	Credential Prefetch    `yaml:"credential,required"`
	SPIFFEID   spiffeid.ID `yaml:"spiffe_id"`
	CAFile     string      `yaml:"ca_file"`
	Insecure   bool        `yaml:"insecure"`
	Header     string      `yaml:"header"`
	Scheme     string      `yaml:"scheme"`
	OnRevoke   string      `yaml:"on_revoke"`
}

// upstream is the configuration as package outgoing takes it, but for the certificates of
// the file.
func (u *OutgoingUpstream) upstream() outgoing.Upstream {
	out := outgoing.Upstream{
		URL: u.URL, Host: u.Host, Path: u.Path, Request: u.Credential.request(), SPIFFEID: u.SPIFFEID,
		Insecure: u.Insecure, Header: u.Header, Scheme: u.Scheme, KeepRevoked: u.OnRevoke == "keep",
	}
	if u.CAFile != "" {
		out.Roots = x509.NewCertPool()
	}
	return out
}

func (o *Outgoing) listener() outgoing.Listener {
	out := outgoing.Listener{Forward: o.Mode == "forward", Secret: o.SecretFile, Open: o.Open, MaxConnections: o.MaxConns}
	for i := range o.Upstreams {
		out.Upstreams = append(out.Upstreams, o.Upstreams[i].upstream())
	}
	return out
}

// Validate checks all but the files on the host.
func (o *Outgoing) Validate() error {
	var errs []error
	switch {
	case o.Listen.IsValid() == (o.Socket != ""):
		errs = append(errs, config.Wrong("listen", "or socket must be there, and not both"))
	case o.Socket != "":
		if err := (&agent.SocketConfig{Path: o.Socket}).Validate(); err != nil {
			errs = append(errs, config.Wrong("socket", "%v", err))
		}
	case !o.Listen.Addr().IsLoopback():
		errs = append(errs, config.Wrong("listen", "must be a loopback address, such as 127.0.0.1:9801"))
	}
	errs = append(errs, maxConns(o.MaxConns))
	if o.Mode != "" && o.Mode != "reverse" && o.Mode != "forward" {
		errs = append(errs, config.Wrong("mode", "is reverse or forward"))
	}
	l := o.listener()
	for _, p := range append(outgoing.Problems(l.Validate()), outgoing.Problems(l.ValidateSocket(o.Socket != ""))...) {
		errs = append(errs, config.Wrong(p.Key, "%s", p.Message))
	}
	for i, u := range o.Upstreams {
		if u.CAFile != "" && !filepath.IsAbs(u.CAFile) {
			errs = append(errs, config.Wrong(fmt.Sprintf("upstreams[%d].ca_file", i), "must be an absolute path"))
		}
		if u.OnRevoke != "" && u.OnRevoke != "cut" && u.OnRevoke != "keep" {
			errs = append(errs, config.Wrong(fmt.Sprintf("upstreams[%d].on_revoke", i), "is cut or keep"))
		}
	}
	return errors.Join(errs...)
}

// places lists what it alone may have, by the keys of the file.
func (o *Outgoing) places(prefix string, out map[string]string) {
	out[prefix+"socket"], out[prefix+"secret_file"] = o.Socket, o.SecretFile
	if o.Listen.IsValid() && o.Listen.Port() != 0 {
		out[prefix+"listen"] = o.Listen.String()
	}
}

// listenOutgoing opens the listeners of outgoing, and reads the certificates.
func (w *workload) listenOutgoing(s *shelf, cfg *agent.Config) error {
	for i := range w.w.Outgoing {
		o := &w.w.Outgoing[i]
		l := o.listener()
		for j, u := range o.Upstreams {
			if err := addRoots(l.Upstreams[j].Roots, u.CAFile); err != nil {
				return fmt.Errorf("outgoing[%d].upstreams[%d].ca_file: %w", i, j, err)
			}
		}
		var err error
		if o.Socket != "" {
			l.Listener, err = w.unix(s, o.Socket)
		} else {
			l.Listener, err = w.keep(s.tcp(o.Listen.String(), "requests that go out"))
		}
		if err != nil {
			return err
		}
		cfg.Outgoing = append(cfg.Outgoing, l)
	}
	return nil
}

func addRoots(to *x509.CertPool, file string) error {
	if file == "" {
		return nil
	}
	raw, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	if !to.AppendCertsFromPEM(raw) {
		return fmt.Errorf("%s holds no certificate in PEM", file)
	}
	return nil
}
