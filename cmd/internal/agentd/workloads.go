package agentd

import (
	"errors"
	"fmt"
	"reflect"
	"strings"

	"github.com/dayflyhq/dayfly/agent"
	"github.com/dayflyhq/dayfly/agent/deliver"
	"github.com/dayflyhq/dayfly/cmd/internal/config"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// maxWorkloads bounds those of one agent: each has a stream and a connection of its own.
const maxWorkloads = 64

// Workload is one identity and all that it is served by.
type Workload struct {
	// Name is for logs, metrics and errors. Default: the SPIFFE ID.
	Name string `yaml:"name"`
	// ID is one of the SVIDs that the Workload API returns. Default: the first.
	ID          spiffeid.ID  `yaml:"id"`
	Sockets     Sockets      `yaml:"sockets"`
	Prefetch    []Prefetch   `yaml:"prefetch"`
	Files       []File       `yaml:"files"`
	Directories []Directory  `yaml:"directories"`
	AWS         AWSContainer `yaml:"aws_container"`
	Systemd     Systemd      `yaml:"systemd"`
	Incoming    []Incoming   `yaml:"incoming"`
	Envoy       []Envoy      `yaml:"envoy"`
	Outgoing    []Outgoing   `yaml:"outgoing"`
}

// SetDefaults is what the file and the flags change.
func (w *Workload) SetDefaults() {
	w.Sockets.Mode = config.Mode(agent.SocketMode)
}

// name is what it is called.
func (w *Workload) name() string {
	switch {
	case w.Name != "":
		return w.Name
	case w.ID.IsZero():
		return "default"
	}
	return w.ID.String()
}

// places lists what it alone may have, by the keys of the file.
func (w *Workload) places() map[string]string {
	out := map[string]string{
		"sockets.grpc": w.Sockets.GRPC, "sockets.http": w.Sockets.HTTP, "systemd.socket": w.Systemd.Socket,
		"aws_container.authorization_token_file": w.AWS.TokenFile,
	}
	if w.AWS.Listen.IsValid() {
		out["aws_container.listen"] = w.AWS.Listen.String()
	}
	for i := range w.Incoming {
		out[fmt.Sprintf("incoming[%d].listen", i)] = w.Incoming[i].Listen
	}
	for i := range w.Envoy {
		out[fmt.Sprintf("envoy[%d].listen", i)] = w.Envoy[i].Listen
	}
	for i := range w.Outgoing {
		w.Outgoing[i].places(fmt.Sprintf("outgoing[%d].", i), out)
	}
	return out
}

func (w *Workload) requests() []agent.Request {
	out := make([]agent.Request, len(w.Prefetch))
	for i, p := range w.Prefetch {
		out[i] = agent.Request{Audience: p.Audience, Scopes: p.Scopes, TTL: p.TTL, Binding: token.Binding(p.Binding)}
	}
	return out
}

// settings are what can change while it runs.
func (w *Workload) settings(cfg *Config) agent.Settings {
	return agent.Settings{Allow: w.Sockets.allow(), Prefetch: w.requests(), Files: w.targets(), MaxStaleness: cfg.Feed.MaxStaleness}
}

// placed is a workload and what its keys begin with in the file.
type placed struct {
	*Workload
	prefix string
}

// all lists the workloads, the only one or several.
func (c *Config) all() []placed {
	if len(c.Workloads) == 0 {
		return []placed{{&c.Workload, ""}}
	}
	out := make([]placed, len(c.Workloads))
	for i := range c.Workloads {
		out[i] = placed{&c.Workloads[i], fmt.Sprintf("workloads[%d].", i)}
	}
	return out
}

// relayOf is the relay if this workload's SVID is what it shows, else none.
func (c *Config) relayOf(w *Workload) Relay {
	if c.several() && c.Feed.Relay.Workload != w.name() {
		return Relay{}
	}
	return c.Feed.Relay
}

// several says whether names are needed to tell workloads apart.
func (c *Config) several() bool { return len(c.Workloads) > 0 }

// checkWorkloads checks each workload, and what they are to each other.
func (c *Config) checkWorkloads() error {
	var errs []error
	if len(c.Workloads) > maxWorkloads {
		errs = append(errs, config.Wrong("workloads", "are at most %d", maxWorkloads))
	}
	errs = append(errs, c.checkInline(), c.checkRelay())
	names, taken := map[string]bool{}, map[string]string{}
	var targets []placedTarget
	for _, w := range c.all() {
		if names[w.name()] {
			errs = append(errs, config.Wrong(w.prefix+w.nameKey(), "%q is the name of another workload: give them names of their own", w.name()))
		}
		names[w.name()] = true
		if strings.ContainsFunc(w.Name, func(r rune) bool { return r < ' ' || r > '~' || r == '"' || r == '\\' }) || len(w.Name) > 255 {
			errs = append(errs, config.Wrong(w.prefix+"name", "is up to 255 plain characters"))
		}
		if len(w.Prefetch) > agent.MaxPrefetch {
			errs = append(errs, config.Wrong(w.prefix+"prefetch", "are at most %d", agent.MaxPrefetch))
		}
		for key, at := range w.places() {
			if other := taken[at]; at != "" && other != "" {
				errs = append(errs, config.Wrong(w.prefix+key, "is %s too", other))
			}
		}
		for key, at := range w.places() {
			taken[at] = w.prefix + key
		}
		own := w.targets()
		if len(own) > deliver.MaxTargets {
			errs = append(errs, config.Wrong(w.prefix+"files", "and directories are at most %d", deliver.MaxTargets))
		}
		for i := range own {
			targets = append(targets, placedTarget{own[i], w.prefix + w.targetKey(i)})
		}
	}
	return errors.Join(append(errs, apart(targets))...)
}

// nameKey is the key that gives it its name.
func (w *Workload) nameKey() string {
	if w.Name == "" && !w.ID.IsZero() {
		return "id"
	}
	return "name"
}

// checkInline refuses the keys of one workload beside several.
func (c *Config) checkInline() error {
	if !c.several() {
		return nil
	}
	var unset Workload
	unset.SetDefaults()
	var errs []error
	for kind, i := reflect.TypeFor[Workload](), 0; i < kind.NumField(); i++ {
		if !reflect.DeepEqual(reflect.ValueOf(c.Workload).Field(i).Interface(), reflect.ValueOf(unset).Field(i).Interface()) {
			errs = append(errs, config.Wrong(kind.Field(i).Tag.Get("yaml"), "stands beside workloads: each of them has its own, and flags can't say whose"))
		}
	}
	return errors.Join(errs...)
}

// checkRelay wants to know whose SVID a relay shows.
func (c *Config) checkRelay() error {
	r := &c.Feed.Relay
	if r.Workload == "" {
		if c.several() && r.Listen != "" {
			return config.Wrong("feed.relay.workload", "is the name of the workload whose SVID it shows, where there are several")
		}
		return nil
	}
	for _, w := range c.all() {
		if w.name() == r.Workload {
			return nil
		}
	}
	return config.Wrong("feed.relay.workload", "%q is the name of no workload", r.Workload)
}

// placedTarget is a target and its key in the file.
type placedTarget struct {
	deliver.Target
	key string
}

// apart wants each to write where no other does.
func apart(targets []placedTarget) error {
	var errs []error
	for i := range targets {
		for j := range i {
			if deliver.Overlap(&targets[i].Target, &targets[j].Target) {
				errs = append(errs, config.Wrong(targets[i].key, "is in the way of %s", targets[j].Path))
			}
		}
	}
	return errors.Join(errs...)
}
