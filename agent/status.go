package agent

import (
	"cmp"
	"errors"
	"net"
	"net/http"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/dayflyhq/dayfly/agent/deliver"
	"github.com/dayflyhq/dayfly/sdk"
)

// A Report is all that the agent says of itself to those who may ask it for credentials:
// GET /v1/status. It holds none of them.
type Report struct {
	Status
	Version   string        `json:"version"`
	StartedAt time.Time     `json:"started_at"`
	UptimeS   int64         `json:"uptime_seconds"`
	Identity  *IdentityInfo `json:"identity,omitempty"` // absent before there is an SVID
	Upstream  UpstreamInfo  `json:"upstream"`
	// Configuration is absent where nobody tells.
	Configuration *ConfigurationInfo `json:"configuration,omitempty"`

	Credentials []CredentialInfo `json:"credentials"`
	Files       []FileInfo       `json:"files"`
	Feed        *FeedInfo        `json:"feed,omitempty"` // absent where it isn't followed
	Listeners   []ListenerInfo   `json:"listeners"`
}

// An IdentityInfo is about the SVID.
type IdentityInfo struct {
	SPIFFEID   string    `json:"spiffe_id"`
	ExpiresAt  time.Time `json:"expires_at"`
	ExpiresInS int64     `json:"expires_in_seconds"`
}

// A ConfigurationInfo is about the configuration that is in force.
type ConfigurationInfo struct {
	ReadAt time.Time `json:"read_at"`
	// ReloadFailedSince is when it was first told in vain to read another one. Why is in the
	// log.
	ReloadFailedSince *time.Time `json:"reload_failed_since,omitempty"`
}

// An UpstreamInfo is about the broker.
type UpstreamInfo struct {
	// Reachable says that it answered the last call, or since then on the feed.
	Reachable bool `json:"reachable"`
	// AnsweredAt is when it last answered a call for a credential, UnreachableSince the first
	// call after that which it didn't.
	AnsweredAt       *time.Time `json:"answered_at,omitempty"`
	UnreachableSince *time.Time `json:"unreachable_since,omitempty"`
}

// A CredentialInfo is about one credential that is kept.
type CredentialInfo struct {
	Audience string   `json:"audience"`
	Scopes   []string `json:"scopes"`
	Binding  string   `json:"binding,omitempty"`
	TTLS     int64    `json:"ttl_seconds,omitempty"` // as it was asked for
	// Configured says that it is kept whether or not anyone asks.
	Configured bool `json:"configured"`
	// Held says that there is one that may be given out now. The rest is absent without.
	Held       bool       `json:"held"`
	Grant      string     `json:"grant,omitempty"`
	AgeS       int64      `json:"age_seconds"`
	ExpiresAt  *time.Time `json:"expires_at,omitempty"`
	ExpiresInS int64      `json:"expires_in_seconds"`
	// RenewInS is until it is renewed, or tried again.
	RenewInS int64    `json:"renew_in_seconds"`
	Failure  *Failure `json:"failure,omitempty"` // of the last fetch

	age, left time.Duration
}

// A Failure is why something can't be had, and since when.
type Failure struct {
	Reason  string    `json:"reason"`
	Message string    `json:"message,omitempty"`
	Since   time.Time `json:"since"`
	Count   int       `json:"count"` // in a row
}

func (f *Failure) text() string {
	if f.Message == "" {
		return f.Reason
	}
	return f.Reason + ": " + f.Message
}

// A FileInfo is about one file, or folder of files.
type FileInfo struct {
	Path        string     `json:"path"`
	Present     bool       `json:"present"`
	Until       *time.Time `json:"until,omitempty"` // when it goes, at the latest
	Error       string     `json:"error,omitempty"`
	ChangeError string     `json:"change_error,omitempty"` // of telling a program
}

// A FeedInfo is about what is known of revocations.
type FeedInfo struct {
	Position  string `json:"position"`
	Known     bool   `json:"known"` // there was a proof
	AgeMS     int64  `json:"age_ms"`
	BoundMS   int64  `json:"bound_ms"`
	Relays    bool   `json:"relays"`
	Verifiers int    `json:"verifiers"` // that learn from here
}

// A ListenerInfo is about one listener.
type ListenerInfo struct {
	Name     string            `json:"name"`
	Address  string            `json:"address"`
	Requests map[string]uint64 `json:"requests,omitempty"` // by outcome
}

// contact is when the broker answered; guarded by cache.mu.
type contact struct{ answered, unreachable time.Time }

// contacted notes how a call to the broker ended.
func (c *cache) contacted(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var refusal *sdk.Error
	switch {
	case outcome(err) == noIdentity: // it wasn't called
	case err == nil, errors.As(sdk.FromRPC(err), &refusal) && refusal.Reason != "":
		c.upstream = contact{answered: c.now()}
	case outcome(err) == unreachable && c.upstream.unreachable.IsZero():
		c.upstream.unreachable = c.now()
	}
}

// list describes every credential, those of the configuration first.
func (c *cache) list() []CredentialInfo {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := make([]CredentialInfo, 0, len(c.entries))
	for _, e := range c.entries {
		out = append(out, c.describe(e))
	}
	slices.SortFunc(out, func(a, b CredentialInfo) int {
		if a.Configured != b.Configured {
			if a.Configured {
				return -1
			}
			return 1
		}
		return cmp.Or(strings.Compare(a.Audience, b.Audience), slices.Compare(a.Scopes, b.Scopes), cmp.Compare(a.TTLS, b.TTLS), strings.Compare(a.Binding, b.Binding))
	})
	return out
}

// describe describes an entry; mu is held.
func (c *cache) describe(e *entry) CredentialInfo {
	out := CredentialInfo{
		Audience: e.req.Audience, Scopes: e.req.Scopes, Binding: string(e.req.Binding), TTLS: seconds(e.req.TTL), Configured: e.pinned,
	}
	source := e.source.Status()
	out.RenewInS = seconds(source.RenewIn)
	if source.Err != nil {
		reason, message := reasonOf(source.Err)
		out.Failure = &Failure{reason, message, source.Since.UTC().Truncate(time.Second), source.Failures}
	}
	if h := c.usable(e); h != nil {
		told := c.told(h)
		expires := told.Expires.UTC().Truncate(time.Second)
		out.Held, out.Grant, out.ExpiresAt = true, h.grant, &expires
		out.Scopes, out.Binding = told.Scopes, string(told.Binding)
		out.age, out.left = c.since(h.asked), c.left(h)
		out.AgeS, out.ExpiresInS = seconds(out.age), seconds(out.left)
	}
	if out.Scopes == nil {
		out.Scopes = []string{}
	}
	return out
}

// holds reports whether there is anything to give out.
func (c *cache) holds() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, e := range c.entries {
		if c.usable(e) != nil {
			return true
		}
	}
	return false
}

func seconds(d time.Duration) int64 { return int64(max(d, 0) / time.Second) }

// Report describes the agent now.
func (a *Agent) Report() Report {
	now := a.cfg.Now()
	r := Report{
		Status: a.Status(), Version: version(), StartedAt: a.started.UTC().Truncate(time.Second), UptimeS: seconds(now.Sub(a.started)),
		Credentials: a.cache.list(), Files: a.fileInfos(), Listeners: a.listenerInfos(),
	}
	if svid, err := a.cfg.Source.GetX509SVID(); err == nil && len(svid.Certificates) > 0 {
		until := svid.Certificates[0].NotAfter
		r.Identity = &IdentityInfo{svid.ID.String(), until.UTC(), seconds(until.Sub(now))}
	}
	if !a.cfg.NoFeed {
		r.Feed = a.feedInfo()
	}
	if a.cfg.Configuration != nil {
		info := a.cfg.Configuration()
		r.Configuration = &info
	}
	var since time.Time
	r.Upstream, since = a.cache.upstreamInfo()
	if a.cfg.Feed == nil && r.Status.state("feed") == Ready && r.Feed != nil {
		proof := now.Add(-time.Duration(r.Feed.AgeMS) * time.Millisecond)
		if since.IsZero() || proof.After(since) { // whole seconds would take an earlier one for later
			r.Upstream.Reachable, r.Upstream.UnreachableSince = true, nil
		}
	}
	return r
}

// upstreamInfo also says exactly since when the broker can't be reached, zero if it can.
func (c *cache) upstreamInfo() (UpstreamInfo, time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := UpstreamInfo{AnsweredAt: told(c.upstream.answered), UnreachableSince: told(c.upstream.unreachable)}
	out.Reachable = out.AnsweredAt != nil && out.UnreachableSince == nil
	return out, c.upstream.unreachable
}

// told is a time in an answer: absent if there is none.
func told(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	t = t.UTC().Truncate(time.Second)
	return &t
}

func (a *Agent) fileInfos() []FileInfo {
	out := []FileInfo{}
	for _, s := range a.files.Status() {
		out = append(out, fileInfo(s))
	}
	return out
}

func fileInfo(s deliver.Status) FileInfo {
	out := FileInfo{Path: s.Path, Present: s.Present}
	if s.Present {
		out.Until = told(s.Until)
	}
	if s.Err != nil {
		out.Error = s.Err.Error()
	}
	if s.ChangeErr != nil {
		out.ChangeError = s.ChangeErr.Error()
	}
	return out
}

func (a *Agent) feedInfo() *FeedInfo {
	a.k.mu.Lock()
	defer a.k.mu.Unlock()
	age, known := a.k.relay.Fresh.Age(a.k.boot())
	return &FeedInfo{
		Position: a.k.relay.View.Position().String(), Known: known, AgeMS: age.Milliseconds(), BoundMS: a.live.Load().MaxStaleness.Milliseconds(),
		Relays: a.k.relays, Verifiers: a.k.relay.Len(),
	}
}

func (a *Agent) listenerInfos() []ListenerInfo {
	var out []ListenerInfo
	for _, l := range []struct {
		name string
		at   net.Listener
	}{{ListenerGRPC, a.cfg.GRPC}, {ListenerHTTP, a.cfg.HTTP}, {"relay", a.cfg.Relay}, {ListenerAWS, a.aws()}, {ListenerSystemd, a.systemd()}} {
		if l.at != nil {
			out = append(out, ListenerInfo{Name: l.name, Address: l.at.Addr().String()})
		}
	}
	for _, l := range a.cfg.Outgoing {
		out = append(out, ListenerInfo{Name: ListenerOutgoing, Address: l.Listener.Addr().String()})
	}
	for _, p := range a.cfg.Incoming {
		out = append(out, ListenerInfo{Name: ListenerIncoming, Address: p.Listener.Addr().String()})
	}
	for _, e := range a.cfg.Envoy {
		out = append(out, ListenerInfo{Name: ListenerEnvoy, Address: e.Listener.Addr().String()})
	}
	a.counts.requests.each(func(listener, outcome string, n uint64) {
		i := slices.IndexFunc(out, func(l ListenerInfo) bool { return l.Name == listener })
		if i < 0 {
			i = len(out)
			out = append(out, ListenerInfo{Name: listener})
		}
		if out[i].Requests == nil {
			out[i].Requests = map[string]uint64{}
		}
		out[i].Requests[outcome] = n
	})
	return out
}

func (a *Agent) aws() net.Listener {
	if a.cfg.AWS == nil {
		return nil
	}
	return a.cfg.AWS.Listener
}

func (a *Agent) systemd() net.Listener {
	if a.cfg.Systemd == nil {
		return nil
	}
	return a.cfg.Systemd.Listener
}

// Version names this build.
func Version() string { return version() }

var version = sync.OnceValue(func() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	v := cmp.Or(info.Main.Version, "unknown")
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" && !strings.Contains(v, s.Value[:min(12, len(s.Value))]) {
			v += " " + s.Value[:min(12, len(s.Value))]
		}
	}
	return v
})

func (a *Agent) getStatus(w http.ResponseWriter, _ *http.Request) {
	writeJSON(w, http.StatusOK, a.Report())
}
