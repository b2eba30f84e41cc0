package supervise

import (
	"strings"

	"github.com/dayflyhq/dayfly/agent"
)

// OfAgent is the Keeper that an agent in this process is. What is wanted must be among
// what it prefetches.
func OfAgent(a *agent.Agent) Keeper { return inProcess{a} }

type inProcess struct{ *agent.Agent }

// Trouble is what the agent isn't ready for, but for credentials: those are known better.
func (p inProcess) Trouble() string {
	var out []string
	for _, c := range p.Status().Checks {
		if !c.OK && (c.Name == "identity" || c.Name == "files") {
			out = append(out, c.Message)
		}
	}
	return strings.Join(out, "; ")
}

// Prefetch is what an agent must keep fresh for a Spec.
func (s *Spec) Prefetch() []agent.Request {
	var out []agent.Request
	for _, r := range s.Requests() {
		out = append(out, agent.Request{Audience: r.Audience, Scopes: r.Scopes, TTL: r.TTL, Binding: r.Binding})
	}
	return out
}
