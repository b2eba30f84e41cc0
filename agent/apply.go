package agent

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/dayflyhq/dayfly/agent/deliver"
	"github.com/dayflyhq/dayfly/proto/wire"
)

// Settings are the fields of a Config that may change while the agent runs.
type Settings struct {
	Allow        Allow
	Prefetch     []Request
	Files        []deliver.Target
	MaxStaleness time.Duration
}

// pins are the credentials to keep, in memory and in files.
func (s *Settings) pins() []Request { return slices.Concat(s.Prefetch, filesRequests(s.Files)) }

// Apply changes the settings of an agent that runs, or is about to. No connection ends and
// nothing that is held is dropped: lists of who may call count from the next call on, what
// isn't prefetched any more is kept while somebody asks, and a new bound makes a new stream
// of the feed. After an error nothing has changed.
func (a *Agent) Apply(s Settings) error {
	a.applying.Lock()
	defer a.applying.Unlock()
	if s.MaxStaleness == 0 {
		s.MaxStaleness = wire.DefaultBound
	}
	next := a.cfg
	next.Allow, next.Prefetch, next.Files, next.MaxStaleness = s.Allow, s.pins(), s.Files, s.MaxStaleness
	if err := next.validate(); err != nil {
		return fmt.Errorf("changing settings: %w", err)
	}
	select {
	case <-a.running:
	case <-a.ended:
	}
	select {
	case <-a.ended:
		return errors.New("changing settings: the agent has ended")
	default:
	}
	old := a.live.Load()
	err := a.cache.pin(next.Prefetch)
	if err == nil {
		err = a.files.Apply(s.Files)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("changing settings: %w", err), a.unpin(old))
	}
	a.door.allow.Store(&s.Allow)
	a.live.Store(&s)
	a.cache.ring() // those who watch may not, any more
	if s.MaxStaleness != old.MaxStaleness {
		select {
		case a.follower.rebound <- struct{}{}:
		default:
		}
	}
	return nil
}

// Try looks at what could keep the agent from running that New can't see: the places of its
// files, but for those at these paths, and of its authorization token file.
func (a *Agent) Try(except []string) error {
	if a.cfg.AWS != nil {
		if err := a.cfg.AWS.TokenFile.Try(); err != nil {
			return fmt.Errorf("the authorization token file of aws_container: %w", err)
		}
	}
	return a.files.Try(except)
}

// unpin goes back to what was kept before.
func (a *Agent) unpin(old *Settings) error {
	before := old.pins()
	for i := range before {
		_ = before[i].normalize() // was checked
	}
	return a.cache.pin(before)
}
