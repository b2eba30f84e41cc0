package broker

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/token"
)

// A RelayedRefusal is why one of those below a relay may not follow.
type RelayedRefusal struct {
	Path    []string
	Refusal *Refusal
}

// maxRelayed bounds the verifiers that one relay may report in one message.
const maxRelayed = 1024

// Relayed takes a relay's report of those below it: their receipts count as that
// relay's word. Whom policy refuses is not on the roster, so the relay must be told
// before any later ping of its own is answered.
func (f *Follower) Relayed(ctx context.Context, verifiers []feed.Relayed) ([]RelayedRefusal, error) {
	if err := f.Check(); err != nil {
		return nil, err
	}
	if !f.relay || len(verifiers) > maxRelayed {
		return nil, ErrFeedRejected.because("a relay report from one that is no relay, or too large")
	}
	var refused []RelayedRefusal
	var below []feed.Verifier
	for _, rv := range verifiers {
		v, err := f.relayed(rv)
		if err != nil {
			return nil, err
		}
		if v.Gone {
			if f.b.enrolled(v.ID) {
				below = append(below, v)
			}
			continue
		}
		err = f.admit(ctx, v, rv.Identity)
		var refusal *Refusal
		switch {
		case errors.As(err, &refusal):
			refused = append(refused, RelayedRefusal{rv.Path, refusal})
		case err != nil:
			return nil, err
		default:
			below = append(below, v)
		}
	}
	if len(below) == 0 {
		return refused, nil
	}
	err := f.b.enrol(ctx, below...)
	if !errors.Is(err, ErrRosterFull) {
		return refused, err
	}
	// Those that are new have no place. The others, and the relay's stream, go on.
	var known []feed.Verifier
	for _, v := range below {
		if f.b.enrolled(v.ID) {
			known = append(known, v)
			continue
		}
		path := append(strings.Split(v.ID.Via, "/")[1:], v.ID.Instance)
		refused = append(refused, RelayedRefusal{path, ErrRosterFull})
	}
	if len(known) == 0 {
		return refused, nil
	}
	return refused, f.b.enrol(ctx, known...)
}

func (b *Broker) enrolled(id feed.VerifierID) bool {
	b.roster.mu.Lock()
	defer b.roster.mu.Unlock()
	_, ok := b.roster.feed.Get(id)
	return ok
}

// admit asks policy about one below, once on this stream for the same terms: as a
// verifier of the relay's identity, which is the workload's that it stands beside.
func (f *Follower) admit(ctx context.Context, v feed.Verifier, identity string) error {
	terms := fmt.Sprint(v.Bound, v.AcceptsStale, v.Audiences) // an audience holds no space
	if f.below[v.ID] == terms {
		return nil
	}
	e := f.b.entry(ActionFollow, f.caller)
	e.Message = "behind a relay: " + v.ID.Via + "/" + v.ID.Instance
	if identity != "" {
		e.Message += ", by the relay's word " + identity
	}
	_, err := f.b.decide(ctx, Question{
		Action: ActionFollow, Caller: f.caller, Time: f.b.cfg.Now(),
		Audiences: v.Audiences, MaxStaleness: v.Bound, AcceptsStale: v.AcceptsStale,
	}, &e)
	if err != nil {
		return f.b.refuse(e, err)
	}
	e.Outcome = "allowed"
	if err := f.b.cfg.Audit(e); err != nil {
		return fmt.Errorf("writing the audit: %w", err)
	}
	if f.below == nil || len(f.below) >= maxRoster {
		f.below = map[feed.VerifierID]string{}
	}
	f.below[v.ID] = terms
	return nil
}

func (f *Follower) relayed(rv feed.Relayed) (feed.Verifier, error) {
	bad := func(a string) bool { return token.ValidateAudience(a) != nil }
	if len(rv.Path) == 0 || len(rv.Path) > feed.MaxPath || !f.delivered(rv.Acked) ||
		rv.Bound < MinStaleness || rv.Bound > MaxStaleness || rv.LastAnswerAge < 0 ||
		slices.ContainsFunc(rv.Path, func(s string) bool { return !feed.ValidInstance(s) }) ||
		len(rv.Audiences) > maxAudiences || slices.ContainsFunc(rv.Audiences, bad) {
		return feed.Verifier{}, ErrFeedRejected.because("a relay report with an impossible entry")
	}
	last := len(rv.Path) - 1
	return feed.Verifier{
		ID: feed.VerifierID{
			Identity: f.id.Identity, Instance: rv.Path[last],
			Via: strings.Join(append([]string{f.id.Instance}, rv.Path[:last]...), "/"),
		},
		Claimed: rv.Identity, Audiences: rv.Audiences, Bound: rv.Bound, AcceptsStale: rv.AcceptsStale, Acked: rv.Acked,
		// The report was under way for a while: later than it was, which is safe.
		Answered: f.b.cfg.Boot().Add(-min(rv.LastAnswerAge, forgetAfter)), Gone: rv.Gone,
	}, nil
}
