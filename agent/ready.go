package agent

import (
	"fmt"
	"strings"
	"time"

	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/sdk"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
)

// A Check is one thing that the agent needs to be ready.
type Check struct {
	Name    string `json:"name"` // "identity", "prefetch", "files", "feed" or "incoming"
	OK      bool   `json:"ok"`
	Message string `json:"message,omitempty"`
}

// A Status is what the agent says of itself.
type Status struct {
	Ready  bool    `json:"ready"`
	Checks []Check `json:"checks"`
}

func (s *Status) waiting() string {
	var out []string
	for _, c := range s.Checks {
		if !c.OK {
			out = append(out, c.Name+": "+c.Message)
		}
	}
	return strings.Join(out, "; ")
}

func (s *Status) ok(name string) bool {
	for _, c := range s.Checks {
		if c.Name == name {
			return c.OK
		}
	}
	return true
}

// Status looks at what the agent needs, now.
func (a *Agent) Status() Status {
	s := Status{Ready: true, Checks: []Check{a.checkIdentity(), a.checkPrefetch()}}
	if len(a.cfg.Files) > 0 {
		s.Checks = append(s.Checks, a.checkFiles())
	}
	if !a.cfg.NoFeed {
		s.Checks = append(s.Checks, a.checkFeed())
	}
	if len(a.cfg.Incoming)+len(a.cfg.Envoy) > 0 {
		s.Checks = append(s.Checks, a.guards.check())
	}
	for _, c := range s.Checks {
		s.Ready = s.Ready && c.OK
	}
	return s
}

func (a *Agent) checkIdentity() Check {
	c := Check{Name: "identity"}
	svid, err := a.cfg.Source.GetX509SVID()
	switch {
	case err != nil:
		c.Message = err.Error()
	case len(svid.Certificates) == 0 || a.cfg.Now().After(svid.Certificates[0].NotAfter):
		c.Message = "the SVID has expired"
	default:
		c.OK, c.Message = true, svid.ID.String()
	}
	return c
}

func (a *Agent) checkPrefetch() Check {
	missing := a.cache.missing()
	if len(missing) == 0 {
		return Check{Name: "prefetch", OK: true}
	}
	return Check{Name: "prefetch", Message: "no credential yet for " + strings.Join(missing, ", ")}
}

func (a *Agent) checkFeed() Check {
	c := Check{Name: "feed"}
	a.k.mu.Lock()
	defer a.k.mu.Unlock()
	age, known := a.k.relay.Fresh.Age(a.k.boot())
	switch {
	case a.k.relay.View.Err() != nil:
		c.Message = "the log has two histories: closed until the broker's store is restored"
	case a.k.refused != nil:
		c.Message = sdk.FromRPC(a.k.refused).Error()
	case !known:
		c.Message = "the broker was not reached yet"
	case age > a.cfg.MaxStaleness:
		c.Message = fmt.Sprintf("the newest proof is %v old, the bound is %v", age.Round(time.Millisecond), a.cfg.MaxStaleness)
	default:
		c.OK, c.Message = true, a.k.relay.View.Position().String()
	}
	return c
}

// report tells gRPC's health service.
func (a *Agent) report(s Status) {
	a.health.SetServingStatus("", serving(s.Ready))
	a.health.SetServingStatus(dayflyv1.TokenService_ServiceDesc.ServiceName, serving(s.ok("identity") && s.ok("prefetch")))
	if !a.cfg.NoFeed {
		a.health.SetServingStatus(dayflyv1.FeedService_ServiceDesc.ServiceName, serving(s.ok("feed")))
	}
}

func serving(ok bool) healthpb.HealthCheckResponse_ServingStatus {
	if ok {
		return healthpb.HealthCheckResponse_SERVING
	}
	return healthpb.HealthCheckResponse_NOT_SERVING
}

// judge is the rule that credentials are judged by: the feed's, if it is followed.
func (a *Agent) judge() func(revocation.Subject) revocation.Verdict {
	if a.cfg.NoFeed {
		return func(revocation.Subject) revocation.Verdict { return revocation.Verdict{Reason: revocation.Alive} }
	}
	return a.k.judge
}
