package outgoing

import "sync/atomic"

// An Outcome is how a request ended.
type Outcome int

// All outcomes. Those but Denied are of one upstream.
const (
	// Passed is an answer of the upstream, whatever it says but Unauthorized.
	Passed Outcome = iota
	// Unauthorized is a 401 of the upstream that was passed on.
	Unauthorized
	// TokenRefused and TokenUnavailable are where no token could be had: for good, or now.
	TokenRefused
	TokenUnavailable
	// UpstreamFailed is where the upstream could not be asked, or wasn't who it must be.
	UpstreamFailed
	// Cut is one that ended because its token was revoked, or the agent ended.
	Cut
	// Canceled is one whose caller went before the answer came.
	Canceled
	// Denied is a request that no upstream takes, or of a caller who may not.
	Denied

	outcomes = iota
)

// String names the outcome as metrics do.
func (o Outcome) String() string {
	return [...]string{"passed", "unauthorized", "token_refused", "token_unavailable", "upstream_failed", "cut", "canceled", "denied"}[o]
}

// Counts is what happened to the requests of one listener for one upstream, or, where
// Upstream is empty, to those that none takes.
type Counts struct {
	Listener string // its address
	Upstream string // its URL, with the path if it has one
	Requests map[Outcome]uint64
	Fetched  uint64 // times that a 401 made another token be fetched
	Open     uint64 // requests under way
}

// counters counts for one upstream.
type counters struct {
	requests [outcomes]atomic.Uint64
	fetched  atomic.Uint64
	open     atomic.Int64
}

func (c *counters) read(listener, upstream string) Counts {
	out := Counts{Listener: listener, Upstream: upstream, Requests: map[Outcome]uint64{}, Fetched: c.fetched.Load(), Open: uint64(max(0, c.open.Load()))}
	for o := range c.requests {
		if n := c.requests[o].Load(); n > 0 {
			out.Requests[Outcome(o)] = n
		}
	}
	return out
}

// Counts returns what was counted until now.
func (p *Proxy) Counts() []Counts {
	var out []Counts
	for _, s := range p.servers {
		at := s.cfg.Listener.Addr().String()
		out = append(out, s.denied.read(at, ""))
		for _, u := range s.upstreams {
			out = append(out, u.counts.read(at, u.name))
		}
	}
	return out
}
