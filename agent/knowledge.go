package agent

import (
	"slices"
	"strings"
	"sync"
	"time"

	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/wire"
)

// knowledge is what the agent knows of the log, how fresh that is, and who learns it
// from the agent. One lock holds it all together: a pong's head and age, and the report
// that must precede it, are of one moment.
type knowledge struct {
	boot func() feed.Instant

	mu      sync.Mutex
	view    feed.View
	fresh   feed.Freshness
	welcome *dayflyv1.Welcome // the broker's newest, nil before the first
	relays  bool              // the broker lets this identity relay
	refused error             // why the broker does not let it follow, nil if it does

	// below is everyone who learns from here, by path.
	below map[string]*verifier
	// gen counts what must be reported before it may be answered; a proof that was
	// asked for after the report of number n confirms up to n. Confirmed reports are on
	// the broker's roster, durably, whatever stream comes next.
	gen, confirmed uint64
	uses           map[useKey]*dayflyv1.Use // what those below reported, on its way up
	usesDropped    uint64
	outbox         wire.Outbox

	changed chan struct{} // closed at every change that a stream below may wait for
	work    chan struct{} // has an element when there is something to send up
}

// A verifier is one that learns from this agent, itself or through another relay.
type verifier struct {
	path      []string
	audiences []string
	bound     time.Duration
	accepts   bool
	acked     feed.Position
	answered  feed.Instant // when one of its pings was last answered
	ever      bool         // answered at all
	gen       uint64
	reported  uint64 // the newest of its use reports
	dirty     bool   // not reported as it is now
	gone      bool
	owner     *downstream
}

func newKnowledge(boot func() feed.Instant) *knowledge {
	return &knowledge{
		boot: boot, below: map[string]*verifier{}, uses: map[useKey]*dayflyv1.Use{},
		changed: make(chan struct{}), work: make(chan struct{}, 1),
	}
}

// ring wakes the streams below; mu is held.
func (k *knowledge) ring() {
	close(k.changed)
	k.changed = make(chan struct{})
}

// kick wakes the stream above.
func (k *knowledge) kick() {
	select {
	case k.work <- struct{}{}:
	default:
	}
}

// judge applies the rule of revocation to what is known.
func (k *knowledge) judge(sub revocation.Subject) revocation.Verdict {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.view.Judge(sub)
}

// age returns how old the knowledge is, false before the first proof.
func (k *knowledge) age() (time.Duration, bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.fresh.Age(k.boot())
}

// bound returns the smallest bound of the agent's own and of those below: what the
// pings above must be frequent enough for.
func (k *knowledge) bound(own time.Duration) time.Duration {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, v := range k.below {
		if !v.gone {
			own = min(own, v.bound)
		}
	}
	return own
}

func pathKey(path []string) string { return strings.Join(path, "/") }

// join takes in a verifier, or takes over its new data; mu is held. What it acknowledged
// under the same instance stands. It returns false if there are too many.
func (k *knowledge) join(v *verifier) bool {
	key := pathKey(v.path)
	old, known := k.below[key]
	switch {
	case !known:
		if len(k.below) >= maxBelow && !k.forget() {
			return false
		}
	case old.acked.Compare(v.acked) > 0:
		v.acked = old.acked
	}
	k.gen++
	v.gen, v.dirty = k.gen, true
	if known {
		v.answered, v.ever, v.reported = old.answered, old.ever, old.reported
		if !old.gone && v.bound <= old.bound && (!v.accepts || old.accepts) && slices.Equal(v.audiences, old.audiences) {
			v.gen = old.gen // every report named it, with no smaller a bound
		}
	}
	k.below[key] = v
	k.kick()
	return true
}

// leave marks all that a stream spoke for as gone; mu is held.
func (k *knowledge) leave(d *downstream) {
	for _, v := range k.below {
		if v.owner == d {
			v.gone, v.dirty = true, true
		}
	}
	k.kick()
}

// forget drops those that are gone, reported as such and closed by now. It reports
// whether there is room; mu is held.
func (k *knowledge) forget() bool {
	now := k.boot()
	for key, v := range k.below {
		if v.gone && !v.dirty && now.Sub(v.answered) > v.bound {
			delete(k.below, key)
		}
	}
	return len(k.below) < maxBelow
}
