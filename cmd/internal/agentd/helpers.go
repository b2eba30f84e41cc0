package agentd

import (
	"errors"
	"io/fs"
	"net"
	"net/netip"
	"time"

	"github.com/dayflyhq/dayfly/agent"
	"github.com/dayflyhq/dayfly/agent/deliver"
	"github.com/dayflyhq/dayfly/agent/field"
	"github.com/dayflyhq/dayfly/agent/sts"
	"github.com/dayflyhq/dayfly/cmd/internal/config"
	"github.com/dayflyhq/dayfly/proto/token"
)

const tokenFileKey = "authorization_token_file"

// AWSContainer is where AWS's SDKs find a session; off without an address.
type AWSContainer struct {
	Listen    netip.AddrPort `yaml:"listen"`
	Audience  string         `yaml:"audience"`
	Scopes    []string       `yaml:"scopes"`
	RoleARN   string         `yaml:"role_arn"`
	Session   string         `yaml:"session_name"`
	Endpoint  string         `yaml:"sts_endpoint"`
	Duration  time.Duration  `yaml:"duration"`
	TokenFile string         `yaml:"authorization_token_file"`
	// Whom the file is for, as of Files.
	TokenMode  config.Mode `yaml:"authorization_token_file_mode"`
	TokenOwner string      `yaml:"authorization_token_file_owner"`
	TokenGroup string      `yaml:"authorization_token_file_group"`
}

func (c *AWSContainer) role() sts.Role {
	return sts.Role{Endpoint: c.Endpoint, ARN: c.RoleARN, Session: c.Session, Duration: c.Duration}
}

// tokenFile reads whom the file is for; an owner that isn't on this host is an error.
func (c *AWSContainer) tokenFile() (deliver.Secret, error) {
	uid, gid, err := owners(tokenFileKey+"_", c.TokenOwner, c.TokenGroup)
	return deliver.Secret{Path: c.TokenFile, Mode: fs.FileMode(c.TokenMode), UID: uid, GID: gid}, err
}

// Validate checks all of it, if there is any.
func (c *AWSContainer) Validate() error {
	if !c.Listen.IsValid() {
		if c.Audience != "" || c.TokenFile != "" || c.RoleARN != "" {
			return config.Wrong("listen", "is missing: a loopback address, such as 127.0.0.1:9911")
		}
		return nil
	}
	var errs []error
	if !c.Listen.Addr().IsLoopback() {
		errs = append(errs, config.Wrong("listen", "must be a loopback address, such as 127.0.0.1:9911"))
	}
	request := Prefetch{Audience: c.Audience, Scopes: c.Scopes}
	errs = append(errs, request.Validate())
	file, err := c.tokenFile()
	errs = append(errs, err)
	for _, p := range field.Errors(file.Validate()) {
		key := tokenFileKey
		if p.Key != "path" {
			key += "_" + p.Key
		}
		errs = append(errs, config.Wrong(key, "%s", p.Message))
	}
	role := c.role()
	keys := map[string]string{"endpoint": "sts_endpoint", "role": "role_arn", "session": "session_name", "duration": "duration"}
	for _, e := range field.Errors(role.Validate()) {
		errs = append(errs, config.Wrong(keys[e.Key], "%s", e.Message))
	}
	return errors.Join(errs...)
}

// agent is the configuration as package agent takes it.
func (c *AWSContainer) agent(l net.Listener) *agent.AWSContainer {
	if l == nil {
		return nil
	}
	file, _ := c.tokenFile() // was checked by Validate
	return &agent.AWSContainer{
		Listener: l, Role: c.role(), TokenFile: file,
		Request: agent.Request{Audience: c.Audience, Scopes: c.Scopes, Binding: token.BindingNone},
	}
}

// Systemd is a socket for LoadCredential=; off without a path.
type Systemd struct {
	Socket      string           `yaml:"socket"`
	AllowedUIDs []uint32         `yaml:"allowed_uids"`
	Credentials []UnitCredential `yaml:"credentials"`
}

// UnitCredential is one that a unit may load.
type UnitCredential struct {
	Unit       string        `yaml:"unit,required"`
	Credential string        `yaml:"credential,required"`
	Audience   string        `yaml:"audience,required"`
	Scopes     []string      `yaml:"scopes"`
	TTL        time.Duration `yaml:"ttl"`
	Binding    string        `yaml:"binding"`
}

// Validate checks names and request.
func (c *UnitCredential) Validate() error {
	var errs []error
	if err := (&agent.UnitCredential{Unit: c.Unit, Name: c.Credential}).Validate(); err != nil {
		errs = append(errs, config.Wrong("unit", "and credential: %v", err))
	}
	request := Prefetch{c.Audience, c.Scopes, c.TTL, c.Binding}
	return errors.Join(append(errs, request.Validate())...)
}

// Validate checks what is given together.
func (s *Systemd) Validate() error {
	if (s.Socket == "") != (len(s.Credentials) == 0) {
		return config.Wrong("credentials", "and socket go together: nobody loads what is not named")
	}
	if s.Socket == "" {
		return nil
	}
	if err := (&agent.SocketConfig{Path: s.Socket}).Validate(); err != nil {
		return config.Wrong("socket", "%v", err)
	}
	return nil
}

// agent is the configuration as package agent takes it.
func (s *Systemd) agent(l net.Listener) *agent.Systemd {
	if l == nil {
		return nil
	}
	out := &agent.Systemd{Listener: l, UIDs: s.AllowedUIDs}
	for _, c := range s.Credentials {
		out.Credentials = append(out.Credentials, agent.UnitCredential{
			Unit: c.Unit, Name: c.Credential,
			Request: agent.Request{Audience: c.Audience, Scopes: c.Scopes, TTL: c.TTL, Binding: token.Binding(c.Binding)},
		})
	}
	return out
}
