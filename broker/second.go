package broker

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"slices"
	"strings"
	"time"

	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/revocation"
)

// confirmWithin is how long a proposal waits where policy doesn't say.
const confirmWithin = 15 * time.Minute

// A Proposal is the consent of the first of two persons. It is kept as an observation:
// to forget one is safe, it is made anew. Once it was confirmed, the record bears it.
type Proposal struct {
	// Subject is what it is for: "lift 1043", or "revoke" and a digest of the selectors
	// and their lock.
	Subject        string    `json:"subject"`
	Actor          string    `json:"actor"`
	Reason         string    `json:"reason"`
	Time           time.Time `json:"time"`
	Ends           time.Time `json:"ends"` // from then on it can't be confirmed
	IdempotencyKey string    `json:"idempotency_key,omitempty"`
}

// Pending is what Revoke and Lift return as their error when nothing was done but to
// propose: another operator has to send the same.
type Pending struct {
	Proposal
	// Confirmers are patterns of identities that may confirm, by policy data; known only
	// to the call that proposes.
	Confirmers []string
}

func (p *Pending) Error() string {
	return fmt.Sprintf("proposed by %s: another operator must confirm until %s", p.Actor, p.Ends.Format(time.RFC3339))
}

const proposalPrefix = "proposal/"

// key keeps one proposal for each lock, and one revocation of everything for each
// operator, so that nobody can fill the store with them.
func (p *Proposal) key() string {
	if number, ok := strings.CutPrefix(p.Subject, "lift "); ok {
		return proposalPrefix + "lift/" + number
	}
	sum := sha256.Sum256([]byte(p.Actor))
	return proposalPrefix + "everything/" + hex.EncodeToString(sum[:])
}

func liftSubject(lock uint64) string { return fmt.Sprintf("lift %d", lock) }

// revokeSubject is the same for the same selectors in any order.
func revokeSubject(selectors []revocation.Selector, lock LockMode, ends time.Time) string {
	all := texts(selectors)
	slices.Sort(all)
	text, err := json.Marshal([]any{slices.Compact(all), lock, ends.UTC()})
	if err != nil {
		panic("internal error: marshalling the subject of a proposal: " + err.Error())
	}
	sum := sha256.Sum256(text)
	return "revoke " + hex.EncodeToString(sum[:])
}

// consent is what the call of one of two persons comes to. It returns the proposal of
// another that this call confirms, with the error if it may not; or, as the error, the
// caller's own proposal, made now or by an earlier attempt. The caller holds
// b.proposing.
func (b *Broker) consent(ctx context.Context, want Proposal, second SecondPerson, mayPropose, mayConfirm error) (*Proposal, error) {
	var found *Proposal
	for p, err := range b.proposals(ctx) {
		switch {
		case err != nil:
			return nil, err
		case p.Subject == want.Subject:
			found = p
		case want.IdempotencyKey != "" && p.IdempotencyKey == want.IdempotencyKey && p.Actor == want.Actor:
			return nil, ErrIdempotencyReused
		}
	}
	switch {
	case found != nil && found.Actor != want.Actor:
		return found, mayConfirm
	case mayPropose != nil:
		return nil, mayPropose
	case found != nil && want.IdempotencyKey != "" && found.IdempotencyKey == want.IdempotencyKey:
		return nil, &Pending{*found, second.Confirmers}
	case found != nil:
		return nil, notAlone(*found, second.Confirmers)
	}
	if second.Within <= 0 {
		second.Within = confirmWithin
	}
	want.Time = b.cfg.Now().UTC()
	want.Ends = want.Time.Add(second.Within)
	value, err := json.Marshal(want)
	if err != nil {
		return nil, fmt.Errorf("encoding a proposal: %w", err)
	}
	if err := b.cfg.Store.Observe(ctx, Observation{Key: want.key(), Value: value}); err != nil {
		return nil, storeRefusal(err)
	}
	return nil, &Pending{want, second.Confirmers}
}

// notAlone refuses whoever would confirm what they proposed.
func notAlone(p Proposal, confirmers []string) error {
	r := ErrSecondPerson.because("you proposed this yourself at %s: another operator must confirm it until %s",
		p.Time.Format(time.RFC3339), p.Ends.Format(time.RFC3339)).with("expires_at", p.Ends.Format(time.RFC3339))
	if len(confirmers) > 0 {
		r = r.with("confirmers", strings.Join(confirmers, " "))
		r.Hint = fmt.Sprintf("one of %s runs the same command in time; root on the broker's host needs no second person: --break-glass", strings.Join(confirmers, ", "))
	}
	return r
}

// proposals yields what still waits for its second person.
func (b *Broker) proposals(ctx context.Context) iter.Seq2[*Proposal, error] {
	return func(yield func(*Proposal, error) bool) {
		now := b.cfg.Now()
		for o, err := range b.cfg.Store.Observed(ctx, proposalPrefix) {
			if err != nil {
				yield(nil, storeRefusal(err))
				return
			}
			if p, ok := b.live(o, now); ok && !yield(p, nil) {
				return
			}
		}
	}
}

// live reads a proposal that was neither confirmed nor lapsed. One from the future was
// made by a clock that was set back since: it counts for nothing either.
func (b *Broker) live(o Observation, now time.Time) (*Proposal, bool) {
	var p Proposal
	if json.Unmarshal(o.Value, &p) != nil || now.Before(p.Time) || !now.Before(p.Ends) {
		return nil, false
	}
	return &p, !b.confirmed(&p)
}

// confirmed reports whether a record bears the proposal: it counts once, also if the
// broker died before it was forgotten. Records outlive proposals by far.
func (b *Broker) confirmed(p *Proposal) bool {
	b.state.mu.RLock()
	defer b.state.mu.RUnlock()
	for _, rec := range b.state.records {
		if q := rec.Details.Proposed; q != nil && q.Subject == p.Subject && q.Actor == p.Actor && q.Time.Equal(p.Time) {
			return true
		}
	}
	return false
}

// ProposedLifts returns the lifts that wait for a second person, by the lock's number.
func (b *Broker) ProposedLifts(ctx context.Context) (map[uint64]Proposal, error) {
	out := map[uint64]Proposal{}
	for p, err := range b.proposals(ctx) {
		if err != nil {
			return nil, err
		}
		var number uint64
		if _, err := fmt.Sscanf(p.Subject, "lift %d", &number); err == nil {
			out[number] = *p
		}
	}
	return out, nil
}

// forgetProposal drops what was confirmed. If it fails, the record says the same.
func (b *Broker) forgetProposal(ctx context.Context, p *Proposal) {
	if err := b.cfg.Store.Observe(context.WithoutCancel(ctx), Observation{Key: p.key()}); err != nil {
		b.cfg.Log.WarnContext(ctx, "forgetting a confirmed proposal failed", "err", err)
	}
}

// pruneProposals drops those that have lapsed.
func (b *Broker) pruneProposals(ctx context.Context) error {
	b.proposing.Lock()
	defer b.proposing.Unlock()
	now := b.cfg.Now()
	var lapsed []Observation
	for o, err := range b.cfg.Store.Observed(ctx, proposalPrefix) {
		if err != nil {
			return err
		}
		if _, ok := b.live(o, now); !ok {
			lapsed = append(lapsed, Observation{Key: o.Key})
		}
	}
	if len(lapsed) == 0 {
		return nil
	}
	return b.cfg.Store.Observe(ctx, lapsed...)
}

// behind is what next of an append returns when it must know every record up to the
// head, and this process hasn't applied them yet.
type behind struct{ head uint64 }

func (behind) Error() string { return "records are still to be applied" }

// settled makes next judge the state as of the head: what another call has appended,
// and perhaps given up on, is seen.
func (b *Broker) settled(next func() (Record, error)) func(feed.Position) (Record, error) {
	return func(head feed.Position) (Record, error) {
		if b.Head().Seq < head.Seq {
			return Record{}, behind{head.Seq}
		}
		return next()
	}
}

// outcome audits what an operator's call came to.
func (b *Broker) outcome(ctx context.Context, c Caller, e AuditEntry, rec Record, err error) error {
	var pending *Pending
	switch {
	case errors.As(err, &pending):
		e.Outcome = "proposed"
	case err != nil:
		return b.refuse(e, err)
	default:
		e.Outcome = "allowed"
		if p := rec.Details.Proposed; p != nil {
			e.ProposedBy = p.Actor
		}
		b.loud(ctx, c, e.Action, rec.Seq)
	}
	if auditErr := b.cfg.Audit(e); auditErr != nil {
		// It is done and must stay done: say so where operators look.
		b.cfg.Log.ErrorContext(ctx, "writing the audit of a recorded call failed", "action", e.Action, "sequence", e.Sequence, "err", auditErr)
	}
	return err
}
