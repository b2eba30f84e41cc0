package broker

import (
	"context"
	"errors"
	"fmt"

	"github.com/dayflyhq/dayfly/proto/token"
)

// An Introspection is the truth about a presented token at the moment of asking.
type Introspection struct {
	// Claims are those of a token that is good; nil for any other, and for one that the
	// caller may not ask about.
	Claims *token.Claims
}

// Active reports whether the token is good.
func (i Introspection) Active() bool { return i.Claims != nil }

// Introspect says whether a token is good now: on record, neither expired nor revoked,
// and nobody in its chain under quarantine. It stands on a proof, begun after the call,
// that this broker still owns its store, and on everything committed before; without one
// it is an error and no answer. Whoever may not ask is told what is told of a token that
// doesn't exist (RFC 7662 section 2.2).
//
// It doesn't say who may present the token: whoever asks compares its binding.
func (b *Broker) Introspect(ctx context.Context, c Caller, secret token.Secret) (Introspection, error) {
	e := b.entry(ActionIntrospect, c)
	t, err := b.introspect(ctx, c, secret, &e)
	var inactive errInactive
	switch {
	case errors.As(err, &inactive) && inactive.refused:
		_ = b.refuse(e, inactive.why) // to the audit, and to nobody else
		return Introspection{}, nil
	case errors.As(err, &inactive):
		e.Reason, e.Message = inactive.why.Reason, inactive.why.Message
	case err != nil:
		return Introspection{}, b.refuse(e, err)
	}
	e.Outcome = "allowed"
	if err := b.cfg.Audit(e); err != nil {
		return Introspection{}, fmt.Errorf("writing the audit: %w", err)
	}
	if t == nil {
		return Introspection{}, nil
	}
	return Introspection{Claims: &t.Claims}, nil
}

// errInactive: the answer is that the token isn't good. Refused, the caller may not know.
type errInactive struct {
	why     *Refusal
	refused bool
}

func (e errInactive) Error() string { return e.why.Error() }

// inactive makes an answer of what is wrong with the token. What is wrong with the broker
// is none, and passes.
func inactive(err error, refused bool) error {
	var r *Refusal
	if !errors.As(err, &r) || r.Kind == Unavailable {
		return err
	}
	return errInactive{r, refused}
}

func (b *Broker) introspect(ctx context.Context, c Caller, secret token.Secret, e *AuditEntry) (*token.Token, error) {
	if err := b.checkSVID(c); err != nil {
		return nil, err
	}
	if err := b.checkSilence(); err != nil {
		return nil, err
	}
	t, err := b.parse(secret)
	if err != nil {
		return nil, inactive(err, true)
	}
	e.Grant, e.Audience = t.Grant().String(), t.Audience
	if _, err := b.onRecord(ctx, c, t); err != nil {
		e.Alert = errors.Is(err, ErrSubjectUnknown)
		return nil, inactive(err, true)
	}
	if _, err := b.decide(ctx, Question{Action: ActionIntrospect, Caller: c, Time: b.cfg.Now(), Audience: t.Audience, Parent: &t.Claims}, e); err != nil {
		return nil, inactive(err, true)
	}
	// Only now: a stranger costs no write.
	if err := b.owns(ctx); err != nil {
		return nil, err
	}
	if err := b.catchUp(ctx); err != nil {
		return nil, err
	}
	now := b.cfg.Now()
	if t.NotBefore.After(now.Add(token.Leeway)) {
		return nil, inactive(ErrSubjectMalformed.because("the token is not valid yet"), false)
	}
	b.state.mu.RLock()
	err = b.state.checkParent(t, now)
	b.state.mu.RUnlock()
	if err != nil {
		return nil, inactive(err, false)
	}
	// It may have been told of records that it lacks meanwhile.
	return t, b.checkSilence()
}
