package attest

import (
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// How often one identity may show a JWT-SVID. Its replicas share the allowance; whoever
// needs more has an X.509-SVID.
const (
	assertionsPerSecond = 50
	assertionBurst      = 100
	// maxRates bounds the identities that are remembered; all of them are real.
	maxRates = 100_000
)

// rates holds what each identity has left.
type rates struct {
	mu   sync.Mutex
	byID map[spiffeid.ID]*rate
}

type rate struct {
	left float64
	at   time.Time
}

// fill is what is left at a moment.
func (r *rate) fill(now time.Time) float64 {
	elapsed := max(0, now.Sub(r.at)) // a clock that was set back gives nothing
	return min(assertionBurst, r.left+elapsed.Seconds()*assertionsPerSecond)
}

// draw reports whether an identity may show one more.
func (rs *rates) draw(id spiffeid.ID, now time.Time) bool {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	r := rs.byID[id]
	if r == nil {
		rs.forget(now)
		r = &rate{left: assertionBurst, at: now}
		rs.byID[id] = r
	}
	r.left, r.at = r.fill(now), now
	if r.left < 1 {
		return false
	}
	r.left--
	return true
}

// forget makes room: those that have all of their allowance need no entry.
func (rs *rates) forget(now time.Time) {
	if rs.byID == nil {
		rs.byID = map[spiffeid.ID]*rate{}
	}
	if len(rs.byID) < maxRates {
		return
	}
	for id, r := range rs.byID {
		if r.fill(now) >= assertionBurst {
			delete(rs.byID, id)
		}
	}
}
