package broker

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/token"
)

// A Request is what a caller asks for.
type Request struct {
	Audience       string
	Scopes         []string      // none: what policy gives by default
	TTL            time.Duration // 0: what policy gives
	Binding        token.Binding // "": what policy gives
	IdempotencyKey string
	// Subject is the presented token of an exchange; zero for a root token.
	Subject token.Secret
}

// A Credential is what a caller gets: the token and its record.
type Credential struct {
	Token token.Secret
	Grant *Grant
}

// Issue gives the caller a root credential.
func (b *Broker) Issue(ctx context.Context, c Caller, req Request) (*Credential, error) {
	return b.once(ctx, ActionIssue, c, req, func() (*Credential, error) {
		cred, e, err := b.issue(ctx, c, req)
		if err != nil {
			return nil, b.refuse(e, err)
		}
		return cred, nil
	})
}

func (b *Broker) issue(ctx context.Context, c Caller, req Request) (*Credential, AuditEntry, error) {
	e := b.entry(ActionIssue, c)
	req, err := b.normalize(req)
	e.Audience, e.Scopes = req.Audience, req.Scopes
	if err != nil {
		return nil, e, err
	}
	if err := b.checkWorkload(c); err != nil {
		return nil, e, err
	}
	b.seen.note(c)
	d, err := b.decide(ctx, Question{
		Action: ActionIssue, Caller: c, Time: b.cfg.Now(),
		Audience: req.Audience, Scopes: req.Scopes, TTL: req.TTL, Binding: req.Binding,
	}, &e)
	if err != nil {
		return nil, e, err
	}
	want, err := b.narrow(c, req, d)
	if err != nil {
		return nil, e, err
	}
	return b.grant(ctx, c, want, d.Limits, nil, e)
}

// normalize checks the form of a request before anything looks at it.
func (b *Broker) normalize(req Request) (Request, error) {
	if err := token.ValidateAudience(req.Audience); err != nil {
		req.Audience, req.Scopes = "", nil // whatever was pasted there is not for the audit
		return req, ErrInvalidRequest.because("audience: %v", err).with("field", "audience")
	}
	scopes, err := token.NormalizeScopes(req.Scopes)
	if err != nil {
		req.Scopes = nil
		return req, ErrInvalidRequest.because("scopes: %v", err).with("field", "scopes")
	}
	req.Scopes = scopes
	switch {
	case req.TTL < 0:
		return req, ErrInvalidRequest.because("ttl: must be positive").with("field", "ttl")
	case req.TTL > b.cfg.MaxTTL:
		return req, ErrInvalidRequest.because("ttl: %s is above the cap of %s", req.TTL, b.cfg.MaxTTL).with("field", "ttl").with("max_ttl", b.cfg.MaxTTL.String())
	case req.TTL > 0 && req.TTL < time.Second:
		return req, ErrInvalidRequest.because("ttl: at least a second").with("field", "ttl")
	case req.Binding != "" && !req.Binding.Valid():
		return req, ErrInvalidRequest.because("binding: unknown").with("field", "binding")
	case len(req.IdempotencyKey) > MaxKeyLength:
		return req, ErrInvalidRequest.because("idempotency_key: at most %d characters", MaxKeyLength).with("field", "idempotency_key")
	}
	return req, nil
}

// terms is what a credential will say, after policy and caps.
type terms struct {
	audience string
	scopes   []string
	ttl      time.Duration
	binding  token.Binding
}

// narrow applies the caps to policy's answer: Go code holds them, not Rego.
func (b *Broker) narrow(c Caller, req Request, d Decision) (terms, error) {
	scopes, err := token.NormalizeScopes(d.Scopes)
	if err != nil {
		return terms{}, ErrPolicyFailed.because("policy grants scopes that no token can have: %v", err)
	}
	t := terms{audience: req.Audience, scopes: scopes, ttl: d.TTL, binding: d.Binding}
	if t.ttl <= 0 {
		t.ttl = DefaultTTL
	}
	if req.TTL > 0 {
		t.ttl = min(t.ttl, req.TTL)
	}
	t.ttl = min(t.ttl, b.cfg.MaxTTL)
	if !t.binding.Valid() {
		t.binding = token.BindingSPIFFE
	}
	if req.Binding != "" {
		t.binding = t.binding.Stricter(req.Binding)
	}
	if t.binding == token.BindingX5T && c.Leaf == nil {
		return terms{}, ErrNoCertificate
	}
	return t, nil
}

// issueAttempts bounds how often a grant is made anew because a record that concerns
// it came between.
const issueAttempts = 4

// errOvertaken: a record between the grant's position and the commit concerns it.
var errOvertaken = errors.New("overtaken by a record of the log")

// grant makes and records the credential: sign || record, and the answer after both.
func (b *Broker) grant(ctx context.Context, c Caller, t terms, limits Limits, parent *token.Token, e AuditEntry) (*Credential, AuditEntry, error) {
	life := t.ttl
	if parent != nil {
		life = min(life, parent.Expires.Sub(b.cfg.Now()))
	}
	counted, err := b.slotFor(ctx, c.ID, limits, life)
	if err != nil {
		return nil, e, err
	}
	recorded := false
	defer func() {
		if !recorded {
			counted.release()
		}
	}()
	for range issueAttempts {
		g, key, err := b.prepare(c, t, parent)
		if err != nil {
			return nil, e, err
		}
		e.Grant, e.Scopes, e.TTL, e.Binding = g.ID().String(), g.Scopes, g.Expires.Sub(g.IssuedAt), g.Binding
		unsigned, err := token.Encode(b.claims(g), key.Public.Algorithm)
		if err != nil {
			if errors.Is(err, token.ErrTooLarge) {
				return nil, e, ErrTokenTooLarge.because("%v", err)
			}
			return nil, e, fmt.Errorf("encoding the token: %w", err)
		}
		g.Fingerprint = unsigned.Fingerprint()

		var secret token.Secret
		secret, recorded, err = b.signAndRecord(ctx, g, key, unsigned, parent)
		if errors.Is(err, errOvertaken) || errors.Is(err, ErrOffLog) {
			if err := b.catchUp(ctx); err != nil {
				return nil, e, err
			}
			continue
		}
		if err != nil {
			return nil, e, err
		}
		if err := b.checkSilence(); err != nil {
			return nil, e, err // recorded, and not released
		}
		e.Outcome = "allowed"
		if err := b.cfg.Audit(e); err != nil {
			return nil, e, fmt.Errorf("writing the audit: %w", err)
		}
		return &Credential{secret, g}, e, nil
	}
	return nil, e, ErrBusy
}

// catchUp waits until this process has applied what the store had a moment ago.
func (b *Broker) catchUp(ctx context.Context) error {
	st, err := b.cfg.Store.State(ctx)
	if err != nil {
		return err
	}
	return b.state.await(ctx, st.Head.Seq)
}

// signAndRecord signs while the group commit syncs, and says whether the grant is on record.
func (b *Broker) signAndRecord(ctx context.Context, g *Grant, key Signer, u token.Unsigned, parent *token.Token) (token.Secret, bool, error) {
	type signed struct {
		secret token.Secret
		err    error
	}
	done := make(chan signed, 1)
	go func() {
		s, err := key.Sign(u)
		done <- signed{s, err}
	}()
	err := b.cfg.Store.Issue(ctx, g, func(newer []Record) error { return admit(g, parent, newer) })
	s := <-done
	if err != nil {
		return token.Secret{}, false, err
	}
	return s.secret, true, s.err
}

// admit is the condition on the head: a grant made at an older position may still
// commit if no record since matches it or its parent, and it expires before the
// first of those records can be forgotten.
func admit(g *Grant, parent *token.Token, newer []Record) error {
	for _, rec := range newer {
		if rec.Era != nil || g.Expires.After(rec.Details.Time.Add(token.MaxTTL+token.Leeway)) {
			return errOvertaken
		}
		if rec.Revocation == nil {
			continue
		}
		for _, sel := range rec.Revocation.Selectors {
			if sel.Matches(g.Subject()) || parent != nil && parent.Audience != "" && sel.Matches(subjectOf(parent)) {
				return errOvertaken
			}
		}
	}
	return nil
}

// prepare reads position, locks and parent from one snapshot and makes the grant.
func (b *Broker) prepare(c Caller, t terms, parent *token.Token) (*Grant, Signer, error) {
	if err := b.checkSilence(); err != nil {
		return nil, Signer{}, err
	}
	now := b.cfg.Now().UTC().Truncate(time.Second)
	key, ok := b.signer()
	if !ok {
		return nil, key, ErrNoSigningKey
	}
	if err := b.checkSpread(key, t.audience); err != nil {
		return nil, key, err
	}
	position, err := b.admissible(c, parent, key.Public.ID, now)
	if err != nil {
		return nil, key, err
	}
	id, err := token.NewGrantID(c.ID, now, b.cfg.Rand)
	if err != nil {
		return nil, key, err
	}
	g := &Grant{
		Audience: t.audience, Scopes: t.scopes, Binding: t.binding,
		IssuedAt: now, Expires: now.Add(t.ttl).Truncate(time.Second), Position: position,
		Peer: c.Peer.Addr(),
	}
	if t.binding == token.BindingX5T {
		g.Certificate = c.certificate()
	}
	if parent != nil {
		g.Lineage = slices.Clone(parent.Lineage)
		g.Transaction = parent.Transaction
		if g.Expires.After(parent.Expires) {
			g.Expires = parent.Expires
		}
	} else if g.Transaction, err = newTransaction(b.cfg.Rand); err != nil {
		return nil, key, err
	}
	g.Lineage = append(g.Lineage, token.Member{Identity: c.ID, Grant: id, Key: key.Public.ID, SVID: c.thumbprint()})
	return g, key, nil
}

// signer returns the current signing key, and notes which one that is: it stays in the
// JWK set as long as a token that it signed may live.
func (b *Broker) signer() (Signer, bool) {
	key, ok := b.cfg.Signer()
	if ok {
		b.state.signs(key.Public.ID, b.cfg.Boot())
	}
	return key, ok
}

// checkSpread refuses an audience that may not know the signing key yet: those who only
// read the JWK set, and those of whom nobody says how they verify.
func (b *Broker) checkSpread(key Signer, audience string) error {
	if key.SpreadIn <= 0 {
		return nil
	}
	if a, ok := b.cfg.Policy.Audience(audience); ok && (a.VerifiedBy == VerifiedByFeed || a.VerifiedBy == VerifiedByIntrospection) {
		return nil
	}
	return ErrKeyNotSpread.with(retryAfter, roundUp(key.SpreadIn).String())
}

// admissible is the snapshot: the head, the locks, the parent and the key, all of
// one moment.
func (b *Broker) admissible(c Caller, parent *token.Token, key token.KeyID, now time.Time) (feed.Position, error) {
	s := b.state
	s.mu.RLock()
	defer s.mu.RUnlock()
	attested, _ := c.Attested()
	if l := s.locked(c.ID, c.thumbprint(), attested, b.cfg.Now()); l != nil {
		return feed.Position{}, lockedRefusal(l)
	}
	if _, ok := s.keys[key]; !ok || s.set.KeyRevoked(key) {
		return feed.Position{}, ErrNoSigningKey
	}
	if parent != nil {
		if err := s.checkParent(parent, now); err != nil {
			return feed.Position{}, err
		}
	}
	return s.log.Head(), nil
}

func lockedRefusal(l *Lock) error {
	r := ErrLocked.because("lock %d (%s) refuses this identity", l.Number, l.Mode).with("lock", fmt.Sprint(l.Number)).with("mode", string(l.Mode))
	r.Hint = fmt.Sprintf("the security team lifts it with: dayfly lift %d --reason ...", l.Number)
	if l.Mode == LockReissue {
		r = r.with("cut", l.Cut.Format(time.RFC3339))
		r.Hint = "only SVIDs issued after the cut are served: rotate the SVID"
	}
	return r
}

func (b *Broker) claims(g *Grant) *token.Claims {
	return &token.Claims{
		Issuer: b.cfg.Issuer, Audience: g.Audience, Lineage: g.Lineage, Scopes: g.Scopes,
		IssuedAt: g.IssuedAt, NotBefore: g.IssuedAt, Expires: g.Expires,
		Binding: g.Binding, Certificate: g.Certificate, Transaction: g.Transaction,
		Position: g.Position.Token(),
	}
}

func newTransaction(random io.Reader) (string, error) {
	var b [12]byte
	if _, err := io.ReadFull(random, b[:]); err != nil {
		return "", fmt.Errorf("reading randomness: %w", err)
	}
	return base64.RawURLEncoding.EncodeToString(b[:]), nil
}
