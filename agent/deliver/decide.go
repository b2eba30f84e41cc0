package deliver

import (
	"time"

	"github.com/dayflyhq/dayfly/proto/token"
)

// early is how long before its first credential expires a file goes. Times in tokens are
// whole seconds, so the token itself may say a second less than is known here; and what
// is read at the last moment has yet to be presented.
const early = 2 * time.Second

// A member is one credential as far as a file is concerned.
type member struct {
	grant   string
	expires time.Time
	claims  *token.Claims
}

// left is how long the member may still be in a file: by the clock that says less, as the
// monotonic one sleeps with the machine and the other may be set.
func (m *member) left(now time.Time) time.Duration {
	return min(m.expires.Sub(now), m.expires.Round(0).Sub(now.Round(0))) - early
}

// act is what is to be done with a target.
type act int

const (
	keep act = iota
	write
	remove
)

// living says whether members may be on disk now; there must be some.
func living(members []*member, now time.Time, alive func(*token.Claims) bool) bool {
	for _, m := range members {
		if m == nil || m.left(now) <= 0 || !alive(m.claims) {
			return false
		}
	}
	return len(members) > 0
}

// decide is the rule of what is on disk: the newest of every credential that the target
// needs, or what there is while that lives, or nothing. disk is empty where nothing is
// there; newest has a nil for a credential that nobody has.
func decide(disk, newest []*member, now time.Time, alive func(*token.Claims) bool) act {
	switch {
	case living(newest, now, alive) && !same(disk, newest):
		return write
	case len(disk) > 0 && !living(disk, now, alive):
		return remove
	}
	return keep
}

func same(a, b []*member) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if a[i].grant != b[i].grant {
			return false
		}
	}
	return true
}

// firstLeft is how long all of the members may still be on disk.
func firstLeft(members []*member, now time.Time) time.Duration {
	left := members[0].left(now)
	for _, m := range members[1:] {
		left = min(left, m.left(now))
	}
	return left
}

// Pauses after a failure.
const (
	minPause = time.Second
	maxPause = time.Minute
)

// A backoff spaces attempts that fail.
type backoff struct {
	pause time.Duration
	at    time.Time // not before, while pause isn't zero
}

func (b *backoff) failed(now time.Time) {
	b.pause = min(max(2*b.pause, minPause), maxPause)
	b.at = now.Add(b.pause)
}

func (b *backoff) reset() { *b = backoff{} }

// left is how long to wait yet, by a clock that isn't set back: never more than the pause.
func (b *backoff) left(now time.Time) time.Duration {
	if b.pause == 0 {
		return 0
	}
	return max(0, min(b.at.Sub(now), b.pause))
}
