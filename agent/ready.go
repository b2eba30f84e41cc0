package agent

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/dayflyhq/dayfly/proto/revocation"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
)

// A State is how the agent, or one thing that it needs, is.
type State string

const (
	// Ready: everything that is configured is there, and is kept fresh.
	Ready State = "ready"
	// Serving: what was asked for is there and valid, but can't be renewed now, or knowledge
	// of revocations is old. Nobody should be taken out of service for it.
	Serving State = "serving"
	// Failed: something that is configured isn't there.
	Failed State = "failed"
)

// worse returns the worse of two.
func worse(a, b State) State {
	rank := []State{Ready, Serving, Failed}
	return rank[max(slices.Index(rank, a), slices.Index(rank, b))]
}

// A Check is one thing that the agent needs to be ready.
type Check struct {
	Name    string `json:"name"` // "identity", "prefetch", "files", "feed" or "incoming"
	OK      bool   `json:"ok"`   // State is Ready
	State   State  `json:"state"`
	Message string `json:"message,omitempty"`
	// Reason is the machine-readable one of what went wrong last, if there is one, and Since
	// when it first did in a row.
	Reason string     `json:"reason,omitempty"`
	Since  *time.Time `json:"since,omitempty"`
	// Until is when the first of what can't be renewed expires.
	Until *time.Time `json:"until,omitempty"`
}

// A Status is what the agent says of itself.
type Status struct {
	// Ready says that the State isn't Failed: the workload can be served.
	Ready  bool    `json:"ready"`
	State  State   `json:"state"`
	Checks []Check `json:"checks"`
}

// waiting says what isn't as it should be.
func (s *Status) waiting() string {
	var out []string
	for _, c := range s.Checks {
		if c.State != Ready {
			out = append(out, c.Name+": "+c.Message)
		}
	}
	return strings.Join(out, "; ")
}

func (s *Status) state(name string) State {
	for _, c := range s.Checks {
		if c.Name == name {
			return c.State
		}
	}
	return Ready
}

// Status looks at what the agent needs, now.
func (a *Agent) Status() Status {
	s := Status{State: Ready, Checks: []Check{a.checkIdentity(), a.checkPrefetch()}}
	if len(a.live.Load().Files) > 0 {
		s.Checks = append(s.Checks, a.checkFiles())
	}
	if !a.cfg.NoFeed {
		s.Checks = append(s.Checks, a.checkFeed())
	}
	if len(a.cfg.Incoming)+len(a.cfg.Envoy) > 0 {
		s.Checks = append(s.Checks, a.guards.check())
	}
	for i := range s.Checks {
		c := &s.Checks[i]
		c.OK = c.State == Ready
		s.State = worse(s.State, c.State)
	}
	s.Ready = s.State != Failed
	return s
}

func (a *Agent) checkIdentity() Check {
	c := Check{Name: "identity", State: Failed}
	svid, err := a.cfg.Source.GetX509SVID()
	switch {
	case err != nil:
		c.Message = err.Error()
	case len(svid.Certificates) == 0 || a.cfg.Now().After(svid.Certificates[0].NotAfter):
		c.Message = "the SVID has expired"
	default:
		c.State, c.Message = Ready, svid.ID.String()
	}
	return c
}

// checkPrefetch is about the configured credentials. One that is there although its last
// renewal failed is served; one that isn't there fails the check.
func (a *Agent) checkPrefetch() Check {
	c := Check{Name: "prefetch", State: Ready}
	var missing, stuck []string
	var reasons, why []string
	for _, one := range a.cache.list() {
		if !one.Configured {
			continue
		}
		switch {
		case !one.Held:
			c.State = Failed
			missing = append(missing, one.Audience)
		case one.Failure != nil:
			c.State = worse(c.State, Serving)
			stuck = append(stuck, one.Audience)
			c.Until = earlier(c.Until, one.ExpiresAt)
		}
		if f := one.Failure; f != nil {
			c.Since = earlier(c.Since, &f.Since)
			reasons, why = append(reasons, f.Reason), append(why, f.text())
		}
	}
	if len(reasons) > 0 {
		c.Reason = reasons[0]
	}
	var says []string
	if len(missing) > 0 {
		says = append(says, "no credential yet for "+list(missing))
	}
	if len(stuck) > 0 {
		says = append(says, fmt.Sprintf("can't renew until %s: %s", clock(*c.Until), list(stuck)))
	}
	if len(why) > 0 {
		says = append(says, fmt.Sprintf("since %s: %s", clock(*c.Since), list(why)))
	}
	c.Message = strings.Join(says, "; ")
	return c
}

// list names each thing once, in order.
func list(names []string) string {
	slices.Sort(names)
	return strings.Join(slices.Compact(names), ", ")
}

func earlier(a, b *time.Time) *time.Time {
	if a == nil || b != nil && b.Before(*a) {
		return b
	}
	return a
}

// clock is how a time is told to people.
func clock(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05 UTC") }

// checkFeed is about revocations. While the newest proof is too old, verifiers beside this
// agent have closed by themselves, each at its bound; the workload is served what it holds,
// which every verifier judges anyway. With nothing to serve the check fails.
func (a *Agent) checkFeed() Check {
	c := Check{Name: "feed", State: Failed}
	bound := a.live.Load().MaxStaleness
	a.k.mu.Lock()
	age, known := a.k.relay.Fresh.Age(a.k.boot())
	forked, refused, position := a.k.relay.View.Err() != nil, a.k.refused, a.k.relay.View.Position()
	a.k.mu.Unlock()
	switch {
	case forked:
		c.Message = "the log has two histories: closed until the broker's store is restored"
	case refused != nil:
		c.Reason, c.Message = reasonOf(refused)
		c.Message = c.Reason + ": " + c.Message
	case !known:
		c.Message = "the broker was not reached yet"
	case age > bound:
		if a.cache.holds() {
			c.State = Serving
		}
		since := a.cfg.Now().Add(-age).UTC().Truncate(time.Second)
		c.Since = &since
		c.Message = fmt.Sprintf("the newest proof is %v old, the bound is %v", age.Round(time.Millisecond), bound)
	default:
		c.State, c.Message = Ready, position.String()
	}
	return c
}

// report tells gRPC's health service.
func (a *Agent) report(s Status) {
	a.health.SetServingStatus("", serving(s.Ready))
	a.health.SetServingStatus(dayflyv1.TokenService_ServiceDesc.ServiceName, serving(worse(s.state("identity"), s.state("prefetch")) != Failed))
	if !a.cfg.NoFeed {
		a.health.SetServingStatus(dayflyv1.FeedService_ServiceDesc.ServiceName, serving(s.state("feed") == Ready))
	}
}

func serving(ok bool) healthpb.HealthCheckResponse_ServingStatus {
	if ok {
		return healthpb.HealthCheckResponse_SERVING
	}
	return healthpb.HealthCheckResponse_NOT_SERVING
}

// tell logs a change of the state, and nothing else.
func (a *Agent) tell(ctx context.Context, before State, s Status) {
	level := slog.LevelWarn
	if s.State == Ready {
		level = slog.LevelInfo
	}
	attrs := []slog.Attr{slog.String("state", string(s.State)), slog.String("before", cmp.Or(string(before), "starting")), slog.Bool("ready", s.Ready)}
	if why := s.waiting(); why != "" {
		attrs = append(attrs, slog.String("waiting_for", why))
	}
	for _, c := range s.Checks {
		if c.State == Ready {
			continue
		}
		if c.Reason != "" {
			attrs = append(attrs, slog.String("reason", c.Reason))
		}
		if c.Since != nil {
			attrs = append(attrs, slog.Time("since", *c.Since))
		}
		if c.Until != nil {
			attrs = append(attrs, slog.Time("until", *c.Until))
		}
		break
	}
	a.cfg.Log.LogAttrs(ctx, level, "state changed", attrs...)
}

// A beat is what the clocks say at one moment.
type beat struct {
	now  time.Time
	boot time.Duration
}

// minJump is the least that counts as a jump of a clock: lookEvery is late, perhaps.
const minJump = time.Second

func (a *Agent) beat() beat { return beat{a.cfg.Now(), time.Duration(a.cfg.Boot())} }

// jumped looks whether the machine has slept or its clock was set since the last beat, and
// wakes what sleeps on timers: those slept too, and know nothing of a clock that was set.
// For credentials cache.look does.
func (a *Agent) jumped(ctx context.Context, last beat) beat {
	now := a.beat()
	boot := now.boot - last.boot
	slept := boot - now.now.Sub(last.now)
	set := now.now.Round(0).Sub(last.now.Round(0)) - boot
	if slept < minJump && set.Abs() < minJump {
		return now
	}
	a.counts.jumps.Add(1)
	a.cfg.Log.InfoContext(ctx, "the clock jumped: everything is looked at anew", "slept", slept.Round(time.Millisecond), "set_by", set.Round(time.Millisecond))
	a.cache.ring()
	a.k.kick()
	return now
}

// judge is the rule that credentials are judged by: the feed's, if it is followed.
func (a *Agent) judge() func(revocation.Subject) revocation.Verdict {
	if a.cfg.NoFeed {
		return func(revocation.Subject) revocation.Verdict { return revocation.Verdict{Reason: revocation.Alive} }
	}
	return a.k.judge
}
