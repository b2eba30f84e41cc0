package brokerd

import (
	"log/slog"
	"sync"
	"time"

	"github.com/dayflyhq/dayfly/broker/attest"
	"github.com/prometheus/client_golang/prometheus"
)

// So many failed authentications are logged one by one: anybody can cause any number.
const (
	failuresAtOnce = 8
	failuresEvery  = 10 * time.Second
)

// unproven tells of clients that haven't proved who they are: all are counted, and as many
// logged as a person can read.
type unproven struct {
	log   *slog.Logger
	count *prometheus.CounterVec
	now   func() time.Time

	mu     sync.Mutex
	spent  int       // of failuresAtOnce
	since  time.Time // when the last of them came back
	silent int       // were not logged since the last that was
}

// at is told of those at one door.
func (u *unproven) at(door string) func(attest.Failure) {
	return func(f attest.Failure) {
		u.count.WithLabelValues(door, f.Method, f.Reason).Inc()
		if silent, ok := u.draw(); ok {
			u.log.Warn("a client has not proved who it is", "door", door, "method", f.Method, "reason", f.Reason,
				"message", f.Message, "peer", f.Peer.String(), "not_logged_before", silent)
		}
	}
}

// draw reports whether one more is logged, and how many before it weren't.
func (u *unproven) draw() (silent int, ok bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	now := u.now()
	if back := int(now.Sub(u.since) / failuresEvery); back > 0 {
		u.spent, u.since = max(0, u.spent-back), now
	}
	if u.spent >= failuresAtOnce {
		u.silent++
		return 0, false
	}
	u.spent++
	silent, u.silent = u.silent, 0
	return silent, true
}
