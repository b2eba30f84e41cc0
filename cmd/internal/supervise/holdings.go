package supervise

import (
	"slices"
	"sync"
	"time"

	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk"
)

// A Keeper keeps credentials fresh: an agent in this process, or one at its socket.
type Keeper interface {
	// Newest returns the newest credential that may be given out now, nil for none.
	Newest(sdk.Request) *sdk.Credential
	// Refusal is why the last attempt to get one failed, nil after one that didn't.
	Refusal(sdk.Request) *sdk.Error
	// Changed returns a channel that is closed when any of the other methods may answer
	// otherwise next, but for what expires.
	Changed() <-chan struct{}
	// Alive says whether a credential may still be presented, and Revoked whether that is
	// not so because it was revoked.
	Alive(*token.Claims) bool
	Revoked(*token.Claims) bool
	// Trouble says what else is missing, for people; "" for nothing.
	Trouble() string
}

// A held is one credential that the program was given.
type held struct {
	grant   string
	expires time.Time
	claims  *token.Claims
}

func (h *held) over(now time.Time) bool {
	// By the clock that says less: one sleeps with the machine, the other may be set.
	return min(h.expires.Sub(now), h.expires.Round(0).Sub(now.Round(0))) <= 0
}

// seen remembers what a Keeper has given out, until it has expired: what is in a file is
// known by its grant only.
type seen struct {
	mu sync.Mutex
	of map[string]held
}

// note keeps a credential and returns it; it may be nil.
func (s *seen) note(c *sdk.Credential, now time.Time) *held {
	if c == nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if h, ok := s.of[c.Grant]; ok {
		return &h
	}
	t, err := token.Inspect(c.Token.Reveal())
	if err != nil {
		return nil
	}
	if s.of == nil {
		s.of = map[string]held{}
	}
	for grant, h := range s.of {
		if h.over(now) {
			delete(s.of, grant)
		}
	}
	h := held{c.Grant, c.Expires, &t.Claims}
	s.of[c.Grant] = h
	return &h
}

func (s *seen) get(grant string) *held {
	s.mu.Lock()
	defer s.mu.Unlock()
	if h, ok := s.of[grant]; ok {
		return &h
	}
	return nil
}

// A slot is one place where the program finds a credential: a variable, or a file.
type slot struct {
	now  []held // what is there now, or was there last
	dead bool   // that was noticed to be revoked or expired
	news string // the newest grants that were noticed beside it
	said bool   // that it grows stale
}

// A kind of slot: a variable stays as it was at the start, a file changes before the
// program's eyes, and so does what it gets in other ways, which tell of it themselves.
type kind int

const (
	variable kind = iota
	file
	beside
)

// holdings know what the program holds, and notice what becomes of it.
type holdings struct {
	slots  []slot
	all    map[string]held // whatever it was given since its start and may still present
	events [causes]bool
}

// begin is a new start, with these in its slots.
func (h *holdings) begin(slots [][]held) {
	*h = holdings{slots: make([]slot, len(slots)), all: map[string]held{}}
	for i, list := range slots {
		h.slots[i].now = list
		for _, one := range list {
			h.all[one.grant] = one
		}
	}
}

// look notices what has changed. offered are, by slot, what the program would be given if
// it were started now, nil where that isn't all there; of is what kind of slot each is.
func (h *holdings) look(now time.Time, offered [][]held, of func(int) kind, isRevoked func(*token.Claims) bool) {
	for grant, one := range h.all {
		switch {
		case one.over(now):
			delete(h.all, grant)
		case isRevoked(one.claims):
			delete(h.all, grant)
			h.events[revoked] = true
			for i := range h.slots {
				if s := &h.slots[i]; slices.ContainsFunc(s.now, func(o held) bool { return o.grant == grant }) {
					s.dead = true
				}
			}
		}
	}
	for i := range h.slots {
		s := &h.slots[i]
		if next := offered[i]; next != nil && !sameGrants(next, s.now) {
			if of(i) != variable {
				s.now, s.dead = next, false
				for _, one := range next {
					h.all[one.grant] = one
				}
				h.events[renewed] = h.events[renewed] || of(i) == file
			} else if name := grantsOf(next); name != s.news {
				s.news = name
				h.events[renewed] = true
			}
		}
		if !s.dead && slices.ContainsFunc(s.now, func(o held) bool { return o.over(now) }) {
			s.dead = true
			h.events[expired] = true
		}
	}
}

// due is how long nothing expires.
func (h *holdings) due(now time.Time) time.Duration {
	wait := forever
	for i := range h.slots {
		if h.slots[i].dead {
			continue
		}
		for _, one := range h.slots[i].now {
			wait = min(wait, max(0, one.expires.Sub(now)))
		}
	}
	return wait
}

func sameGrants(a, b []held) bool {
	return slices.EqualFunc(a, b, func(x, y held) bool { return x.grant == y.grant })
}

func grantsOf(list []held) string {
	out := ""
	for _, h := range list {
		out += h.grant + " "
	}
	return out
}
