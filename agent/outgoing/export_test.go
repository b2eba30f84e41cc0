package outgoing

import "io"

// Match tells which upstream takes a request, -1 for none.
func Match(upstreams []Upstream, forward bool, host, path string) int {
	var routes []route
	for i := range upstreams {
		routes = append(routes, newRoute(&upstreams[i], forward))
	}
	i, why := match(routes, host, path)
	if why != hit {
		return -1
	}
	return i
}

var (
	// Strip removes what a caller may have put in a token's place.
	Strip = strip
	// SplitHost takes a Host header apart.
	SplitHost = splitHost
)

// A Replay is a body that can be read twice.
type Replay struct{ r *replay }

// NewReplay returns one.
func NewReplay(src io.Reader) Replay { return Replay{newReplay(src, new(pool))} }

// Current is the reading that counts.
func (r Replay) Current() io.ReadCloser { return r.r.current }

// Again begins another.
func (r Replay) Again() bool { return r.r.again() }

// Settle says that there is no other.
func (r Replay) Settle() { r.r.settle() }

// End says that nobody reads.
func (r Replay) End() { r.r.end() }
