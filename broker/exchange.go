package broker

import (
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
)

// Exchange makes a derived credential out of a presented one: always delegation, only
// narrower, never longer.
func (b *Broker) Exchange(ctx context.Context, c Caller, req Request) (*Credential, error) {
	return b.once(ctx, ActionExchange, c, req, func() (*Credential, error) {
		cred, e, err := b.exchange(ctx, c, req)
		if err != nil {
			return nil, b.refuse(e, err)
		}
		return cred, nil
	})
}

func (b *Broker) exchange(ctx context.Context, c Caller, req Request) (*Credential, AuditEntry, error) {
	e := b.entry(ActionExchange, c)
	req, err := b.normalize(req)
	e.Audience, e.Scopes = req.Audience, req.Scopes
	if err != nil {
		return nil, e, err
	}
	if err := b.checkWorkload(c); err != nil {
		return nil, e, err
	}
	b.seen.note(c)
	parent, err := b.subject(ctx, c, req.Subject)
	if parent != nil {
		e.Parent = parent.Grant().String()
	}
	if err != nil {
		e.Alert = errors.Is(err, ErrSubjectUnknown)
		return nil, e, err
	}
	remaining := parent.Expires.Sub(b.cfg.Now())
	if req.TTL > remaining {
		return nil, e, ErrTTLLongerParent.with("max_ttl", remaining.Truncate(time.Second).String())
	}
	d, err := b.decide(ctx, Question{
		Action: ActionExchange, Caller: c, Time: b.cfg.Now(), Parent: &parent.Claims,
		Audience: req.Audience, Scopes: req.Scopes, TTL: req.TTL, Binding: req.Binding,
	}, &e)
	if err != nil {
		return nil, e, err
	}
	want, err := b.narrow(c, req, d)
	if err != nil {
		return nil, e, err
	}
	if want.scopes, err = narrowScopes(req.Scopes, want.scopes, parent.Scopes); err != nil {
		return nil, e, err
	}
	return b.grant(ctx, c, want, d.Limits, parent, e)
}

// narrowScopes keeps to the parent's scopes: what was asked for must all be there;
// of a default set, what is there, unless that is nothing. Scopes are compared whole, as names.
func narrowScopes(asked, granted, parent []string) ([]string, error) {
	within := func(s string) bool { return slices.Contains(parent, s) }
	if len(asked) > 0 {
		if i := slices.IndexFunc(granted, func(s string) bool { return !within(s) }); i >= 0 {
			return nil, ErrScopeWiderParent.because("the subject token lacks the scope %q", granted[i]).with("scope", granted[i])
		}
		return granted, nil
	}
	var out []string
	for _, s := range granted {
		if within(s) {
			out = append(out, s)
		}
	}
	if len(granted) > 0 && len(out) == 0 {
		// A token without any would be refused by whom it is for, and nobody would know why.
		return nil, ErrScopeWiderParent.because("the subject token has none of the scopes that policy gives: %s", strings.Join(granted, " "))
	}
	return out, nil
}

// subject checks a presented token: its form and signature, its time, that it is
// addressed to the caller, that it is alive, and that it is on record.
func (b *Broker) subject(ctx context.Context, c Caller, secret token.Secret) (*token.Token, error) {
	t, err := b.parse(secret)
	if err != nil {
		return nil, err
	}
	now := b.cfg.Now()
	switch {
	case !now.Before(t.Expires):
		return t, ErrSubjectExpired
	case t.NotBefore.After(now.Add(token.Leeway)):
		return t, ErrSubjectMalformed.because("the subject token is not valid yet")
	case t.Audience != c.ID.String() && !b.cfg.Policy.AnswersTo(c.ID, t.Audience):
		return t, ErrSubjectNotAddressed
	case len(t.Lineage) >= token.MaxDepth:
		return t, ErrChainTooDeep
	}
	b.state.mu.RLock()
	err = b.state.checkParent(t, now)
	b.state.mu.RUnlock()
	if err != nil {
		return t, err
	}
	_, err = b.onRecord(ctx, c, t)
	return t, err
}

// A signed is a presented token whose signature holds, and the key that vouches for it.
type signed struct {
	token token.Token
	key   token.PublicKey
}

// parse reads a presented token of this broker, and checks form and signature: once, as
// long as the key that vouches for it is the one of that name.
func (b *Broker) parse(secret token.Secret) (*token.Token, error) {
	raw := secret.Reveal()
	if s, ok := b.signed.Get(raw); ok {
		if key, ok := b.state.key(s.token.Self().Key); ok && key.Equal(s.key) {
			return s.copy(), nil
		}
	}
	var s signed
	t, err := token.Parse(raw, func(id token.KeyID) (key token.PublicKey, ok bool) {
		s.key, ok = b.state.key(id)
		return s.key, ok
	})
	switch {
	case errors.Is(err, token.ErrUnknownKey):
		return nil, ErrSubjectKeyUnknown
	case errors.Is(err, token.ErrSignature):
		return nil, ErrSubjectSignature
	case err != nil:
		return nil, ErrSubjectMalformed.because("%v", err)
	case t.Issuer != b.cfg.Issuer:
		return nil, ErrSubjectMalformed.because("the subject token is of another issuer")
	}
	s.token = *t
	b.signed.Put(token.NewSecret(strings.Clone(raw)), &s, t.Expires, b.cfg.Now())
	return s.copy(), nil
}

// copy is what a caller may change.
func (s *signed) copy() *token.Token {
	t := s.token
	t.Claims = s.token.Claims.Clone()
	return &t
}

// onRecord returns the grant of a presented token. One that verifies and was never
// recorded is an alarm.
func (b *Broker) onRecord(ctx context.Context, c Caller, t *token.Token) (*Grant, error) {
	g, err := b.cfg.Store.Grant(ctx, t.Grant())
	if errors.Is(err, ErrNotFound) || err == nil && g.Fingerprint != t.Fingerprint {
		b.cfg.Log.ErrorContext(ctx, "a presented token was never recorded: somebody holds a signing key",
			"grant", t.Grant().String(), "key", t.Self().Key.String(), "presented_by", c.Actor())
		return nil, ErrSubjectUnknown
	}
	return g, err
}

// checkParent judges a presented token. The caller holds the lock of the state.
func (s *state) checkParent(t *token.Token, now time.Time) error {
	if !now.Before(t.Expires) {
		return ErrSubjectExpired
	}
	v := s.set.Judge(subjectOf(t))
	switch v.Reason {
	case revocation.Alive:
	case revocation.BelowHorizon:
		return ErrSubjectExpired
	case revocation.Ahead, revocation.OffLog:
		return ErrSubjectUnknown
	default:
		return ErrSubjectRevoked.with("reason", string(v.Reason))
	}
	for _, m := range t.Lineage {
		for _, l := range s.locks {
			// The thumbprint stands for the SVID; a reissue lock is the caller's matter.
			if l.Mode == LockQuarantine && l.matches(m, now) {
				return lockedRefusal(l)
			}
		}
	}
	return nil
}

func (l *Lock) matches(m token.Member, now time.Time) bool {
	return slices.ContainsFunc(l.Selectors, func(s revocation.Selector) bool {
		return s.MatchesCaller(m.Identity, m.SVID) && l.stands(s, now)
	})
}

func subjectOf(t *token.Token) revocation.Subject { return revocation.SubjectOf(&t.Claims) }
