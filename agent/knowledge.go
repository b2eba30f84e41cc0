package agent

import (
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
	relay   feed.Relay
	welcome *dayflyv1.Welcome // the broker's newest, nil before the first
	relays  bool              // the broker lets this identity relay
	refused error             // why the broker does not let it follow, nil if it does
	streams map[*feed.Downstream]*downstream
	kept    feed.Newest // shown to the broker at each new stream
	// verify says whether the broker signed a head, made lately or kept for long; nil:
	// nobody can tell.
	verify func(issuer string, h feed.SignedHead, kept bool) (feed.HeadStatement, error)

	uses        map[useKey]*dayflyv1.Use // what those below reported, on its way up
	usesDropped uint64
	outbox      wire.Outbox

	changed chan struct{} // closed at every change that a stream below may wait for
	work    chan struct{} // has an element when there is something to send up
}

func newKnowledge(boot func() feed.Instant) *knowledge {
	return &knowledge{
		boot: boot, streams: map[*feed.Downstream]*downstream{}, uses: map[useKey]*dayflyv1.Use{},
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
	return k.relay.View.Judge(sub)
}

// age returns how old the knowledge is, false before the first proof.
func (k *knowledge) age() (time.Duration, bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.relay.Fresh.Age(k.boot())
}

// bound returns the smallest bound of the agent's own and of those below.
func (k *knowledge) bound(own time.Duration) time.Duration {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.relay.Bound(own)
}

// note keeps what one below was given, if the broker did sign it; mu is held.
func (k *knowledge) note(h feed.SignedHead) {
	if len(h.Statement) == 0 || k.verify == nil || k.welcome == nil {
		return
	}
	if _, err := k.verify(k.welcome.GetIssuer(), h, true); err == nil {
		k.kept.Note(h)
	}
}

// refuse ends the following of one below whom the broker refused, or passes the
// refusal on to the relay that it stands behind; mu is held.
func (k *knowledge) refuse(m *dayflyv1.RelayRefusal) {
	d := k.streams[k.relay.Refused(m.GetPath())]
	if d == nil || len(d.refusals) == maxRefusals {
		return
	}
	d.refusals = append(d.refusals, m)
	k.ring()
}
