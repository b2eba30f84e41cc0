package broker

import (
	"context"
	"errors"
	"strconv"
	"time"

	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Limits of give-backs: the one thing by which a workload makes the log grow, and what
// every verifier has to remember until the horizon passes.
const (
	// MaxRevocations is how many selectors the set of revocations may hold for a give-back
	// to be taken: some 40 MB in each verifier and relay. Operators' revocations may
	// exceed it.
	MaxRevocations = 100_000
	// GiveBacksPerMinute is what an identity may give back, and that many at once, where
	// policy sets no limit.
	GiveBacksPerMinute = 60
	// fullRetry is after how long somebody who met a full set asks again: records are
	// forgotten that often.
	fullRetry = pruneEvery
)

// GiveBack ends a credential before its time, with everything derived from it, for the
// one who holds it: its presenter. For anybody else, and for what is no live credential
// of this broker, nothing happens, which is no error (RFC 7009): nobody learns whether
// there is such a token. It is durable, and on its way to every verifier, when it returns.
func (b *Broker) GiveBack(ctx context.Context, c Caller, secret token.Secret) error {
	e := b.entry(ActionGiveBack, c)
	rec, err := b.giveBack(ctx, c, secret, &e)
	var moot errMoot
	switch {
	case errors.As(err, &moot):
		e.Outcome, e.Reason, e.Message, e.Alert = moot.outcome, moot.reason, moot.message, moot.alert
	case err != nil:
		return b.refuse(e, err)
	default:
		e.Outcome, e.Sequence = "allowed", rec.Seq
	}
	if err := b.cfg.Audit(e); err != nil {
		// It is done and must stay done, or there was nothing to do.
		b.cfg.Log.ErrorContext(ctx, "writing the audit of a give-back failed", "sequence", e.Sequence, "err", err)
	}
	return nil
}

// errMoot: there is nothing to give back. The audit says why, and the caller isn't told.
type errMoot struct {
	outcome, reason, message string
	alert                    bool
}

func (e errMoot) Error() string { return e.reason }

// mootBecause makes an end without an answer of a refusal; other errors pass.
func mootBecause(err error) error {
	var r *Refusal
	if !errors.As(err, &r) {
		return err
	}
	return errMoot{"refused", r.Reason, r.Message, errors.Is(err, ErrSubjectUnknown)}
}

func (b *Broker) giveBack(ctx context.Context, c Caller, secret token.Secret, e *AuditEntry) (Record, error) {
	if err := b.checkSVID(c); err != nil {
		return Record{}, err
	}
	if err := b.checkSilence(); err != nil {
		return Record{}, err
	}
	t, err := b.parse(secret)
	if err != nil {
		return Record{}, mootBecause(err)
	}
	e.Grant, e.Audience = t.Grant().String(), t.Audience
	g, err := b.onRecord(ctx, c, t)
	if err != nil {
		return Record{}, mootBecause(err)
	}
	if c.Local != "" || g.Presenter() != c.ID {
		return Record{}, errMoot{"refused", "NOT_HOLDER", "only its presenter may give a credential back", false}
	}
	if err := b.worthIt(g); err != nil {
		return Record{}, err
	}
	d, err := b.decide(ctx, Question{Action: ActionGiveBack, Caller: c, Time: b.cfg.Now(), Parent: &t.Claims}, e)
	if err != nil {
		return Record{}, err
	}
	if err := b.issuers.drawGiveBack(c.ID, d.Limits, b.cfg.Boot()); err != nil {
		return Record{}, err
	}
	next := b.settled(func() (Record, error) {
		if err := b.worthIt(g); err != nil {
			return Record{}, err
		}
		if err := b.roomToGiveBack(); err != nil {
			return Record{}, err
		}
		return Record{
			Event: feed.Event{Revocation: &feed.Revocation{Selectors: []revocation.Selector{revocation.Grant(g.ID())}}},
			Details: Details{
				Time: b.cfg.Now().UTC(), Actor: c.Actor(), Reason: "given back", Lock: LockNone,
				GivenBack: true,
			},
		}, nil
	})
	// Of calls at once for one credential, one makes the record.
	return b.inOneFlight(ctx, "give back "+g.ID().String(), func(ctx context.Context) (Record, error) {
		return b.append(ctx, next)
	})
}

// worthIt ends a give-back of what is dead anyway, without a record. What a verifier's
// leeway lets live on is worth one.
func (b *Broker) worthIt(g *Grant) error {
	b.state.mu.RLock()
	v := b.state.set.Judge(g.Subject())
	b.state.mu.RUnlock()
	switch {
	case v.Reason == revocation.BelowHorizon || !b.cfg.Now().Before(g.Expires.Add(token.Leeway)):
		return errMoot{outcome: "allowed", reason: "ALREADY_EXPIRED", message: "the credential has expired"}
	case v.Reason != revocation.Alive && v.Reason != revocation.Ahead:
		return errMoot{outcome: "allowed", reason: "ALREADY_REVOKED", message: "the credential is revoked"}
	}
	return nil
}

// roomToGiveBack refuses give-backs that would make the set larger than it may be.
// Operators are never asked to wait.
func (b *Broker) roomToGiveBack() error {
	s := b.state
	s.mu.RLock()
	defer s.mu.RUnlock()
	if most := b.cfg.MaxRevocations; s.set.Len() >= most {
		return ErrGiveBackFull.because("%d revocations in force are as many as there may be for a give-back", most).
			with("limit", strconv.Itoa(most)).with(retryAfter, fullRetry.String())
	}
	return nil
}

// drawGiveBack takes one from what an identity may give back.
func (all *issuers) drawGiveBack(id spiffeid.ID, limits Limits, now feed.Instant) error {
	perMinute := limits.GiveBacksPerMinute
	if perMinute == 0 {
		perMinute = GiveBacksPerMinute
	}
	a := allowance{burst: float64(perMinute), perSecond: float64(perMinute) / 60}
	all.mu.Lock()
	defer all.mu.Unlock()
	i := all.issuer(id)
	i.giveBackBurst = a
	if i.giveBacks.draw(a, 1, now) {
		return nil
	}
	wait := time.Duration((i.giveBacks.drawn + 1 - a.burst) / a.perSecond * float64(time.Second))
	return limited(ErrGiveBackLimited, perMinute, "give-backs a minute", wait)
}
