package broker

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
	"golang.org/x/sync/singleflight"
)

// Limits of requests. The numbers are those of the design.
const (
	DefaultTTL   = 5 * time.Minute
	MaxReason    = 1024 // characters of an operator's reason
	MaxSelectors = 64   // in one revocation
	MaxKeyLength = 64   // characters of an idempotency key
	MaxPageSize  = 1000
	PageSize     = 100 // when none is asked for
	// MinStaleness and MaxStaleness bound what a verifier may choose: less would
	// be all pings, more would outlive the tokens.
	MinStaleness = 500 * time.Millisecond
	MaxStaleness = time.Hour
	// ClockSkew is what the cut of a reissue lock allows for clocks of SVID issuers.
	ClockSkew = 30 * time.Second
	// forgetAfter is the age at which a revocation can match no live token. It
	// stands on the hard cap and not on configuration: a lowered TTL must not
	// shorten it while older tokens live.
	forgetAfter = token.MaxTTL + token.Leeway
	// grantsKept is how long expired grants stay on record.
	grantsKept = 30 * 24 * time.Hour
	// pruneEvery is how often the broker looks for what can be forgotten.
	pruneEvery = time.Minute
)

// Config is what a broker is made of. All func fields may be called at once.
type Config struct {
	// Issuer is the iss of every token. Required.
	Issuer string
	// Store keeps the log and the grants. Required; the caller closes it.
	Store Store
	// Policy decides. Required.
	Policy Policy
	// Signer returns the current signing key, and false while none is published.
	// Required.
	Signer func() (Signer, bool)
	// VerifyKey checks that a key record was made by a broker, as of a time: the
	// record's own when it is read back at Load, the present when it arrives. Keys that
	// fail are revoked. It isn't called before CheckKeys is. Required.
	VerifyKey func(feed.Key, time.Time) error
	// SignHead signs a statement of the log with the broker's own SVID as it is now, for
	// those who asked for signed heads. Nil: nobody gets any.
	SignHead func(feed.HeadStatement) (feed.SignedHead, error)
	// VerifyHead checks that a broker of this issuer made a signed head, perhaps long
	// ago. Nil: no verifier that shows one is believed.
	VerifyHead func(feed.SignedHead) (feed.HeadStatement, error)
	// Disregard is the highest signed head that this log may lack: an operator has
	// looked. Only its era and its number count. The zero value disregards none.
	Disregard feed.Position
	// Audit records every decision. Required. An error refuses what was to be done.
	Audit func(AuditEntry) error
	// MaxTTL is a lower cap than the hard one; 0: the hard cap.
	MaxTTL time.Duration
	// MaxRevocations is a lower maximum of the set than the constant, for give-backs; 0:
	// the constant.
	MaxRevocations int

	Log  *slog.Logger        // nil: discard
	Now  func() time.Time    // nil: time.Now
	Boot func() feed.Instant // required: elapsed time on a clock that runs through suspend
	Rand io.Reader           // nil: crypto/rand
}

// A Broker issues, exchanges and revokes. Use Load, then Run beside everything else, and
// CheckKeys as soon as bundles are known. Until that has returned it publishes no key,
// issues nothing and may not be followed; operators may look, revoke and lift.
type Broker struct {
	cfg     Config
	state   *state
	roster  roster
	uses    usage
	seen    seenSVIDs
	retries retries
	signed  token.Memory[*signed]
	issuers issuers
	flight  singleflight.Group
	// proposing is held by lifts, and by whatever takes two persons.
	proposing sync.Mutex
	signing   signing
	silence   atomic.Pointer[Silence]
}

// New checks the configuration. It starts nothing.
func New(cfg Config) (*Broker, error) {
	var problems []error
	need := func(ok bool, what string) {
		if !ok {
			problems = append(problems, errors.New("broker: "+what+" is required"))
		}
	}
	need(cfg.Issuer != "", "Issuer")
	need(cfg.Store != nil, "Store")
	need(cfg.Policy != nil, "Policy")
	need(cfg.Signer != nil, "Signer")
	need(cfg.VerifyKey != nil, "VerifyKey")
	need(cfg.Audit != nil, "Audit")
	need(cfg.Boot != nil, "Boot")
	if cfg.MaxTTL < 0 || cfg.MaxTTL > token.MaxTTL {
		problems = append(problems, fmt.Errorf("broker: MaxTTL is at most the hard cap of %s", token.MaxTTL))
	}
	if cfg.MaxRevocations < 0 || cfg.MaxRevocations > MaxRevocations {
		problems = append(problems, fmt.Errorf("broker: MaxRevocations is at most %d", MaxRevocations))
	}
	if err := errors.Join(problems...); err != nil {
		return nil, err
	}
	if cfg.MaxRevocations == 0 {
		cfg.MaxRevocations = MaxRevocations
	}
	if cfg.MaxTTL == 0 {
		cfg.MaxTTL = token.MaxTTL
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Rand == nil {
		cfg.Rand = rand.Reader
	}
	b := &Broker{cfg: cfg, state: newState()}
	b.roster.changed = make(chan struct{})
	b.uses.init()
	return b, nil
}

// Load applies everything that the store holds. Nothing is served before it has
// returned.
func (b *Broker) Load(ctx context.Context) error {
	st, err := b.cfg.Store.State(ctx)
	if err != nil {
		return fmt.Errorf("reading the store's state: %w", err)
	}
	if err := b.follow(ctx, st.Head.Seq); err != nil {
		return err
	}
	b.state.mu.Lock()
	err = b.state.log.LoadPositions(st.Head, st.Horizon)
	if err == nil && st.Horizon.Seq > 0 {
		b.state.set.SetHorizon(st.Horizon.Seq)
	}
	b.state.mu.Unlock()
	if err != nil {
		return fmt.Errorf("loading the log: %w", err)
	}
	if err := b.loadRoster(ctx); err != nil {
		return err
	}
	if err := b.loadIssuers(ctx); err != nil {
		return err
	}
	if err := b.auditRestore(ctx); err != nil {
		return err
	}
	return b.loadUses(ctx)
}

// CheckKeys checks the key records that were read so far, and from then on each as it
// comes. It returns once those that no broker vouches for are revoked. Run must be
// running. A second call does nothing.
func (b *Broker) CheckKeys(ctx context.Context) error {
	b.state.checkKeys(b.verifier(ctx))
	seq, err := b.revokeForeignKeys(ctx)
	if err != nil || seq == 0 {
		return err
	}
	return b.state.await(ctx, seq)
}

// verifier is VerifyKey, with a line in the log for a key that fails.
func (b *Broker) verifier(ctx context.Context) func(Record, time.Time) error {
	return func(rec Record, at time.Time) error {
		err := b.cfg.VerifyKey(*rec.Key, at)
		if err != nil {
			b.cfg.Log.ErrorContext(ctx, "a key record that no broker vouches for", "sequence", rec.Seq, "key", rec.Key.Public.ID.String(), "err", err)
		}
		return err
	}
}

// Run follows the store until ctx ends, looks at use reports, and prunes. The broker
// serves only while it runs.
func (b *Broker) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var beside sync.WaitGroup
	beside.Go(func() { b.pruneLoop(ctx) })
	beside.Go(func() { b.checkLoop(ctx) })
	defer func() { cancel(); beside.Wait() }()
	err := b.follow(ctx, 0)
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// follow applies records as they come, up to a number (0: without end).
func (b *Broker) follow(ctx context.Context, until uint64) error {
	after := b.Head().Seq
	if until > 0 && after >= until {
		return nil
	}
	for rec, err := range b.cfg.Store.Events(ctx, after) {
		if err != nil {
			return fmt.Errorf("following the log: %w", err)
		}
		recorded := b.cfg.Now()
		if until > 0 {
			recorded = rec.Details.Time
		}
		horizon, err := b.explains(ctx, rec)
		if err != nil {
			return err
		}
		if err := b.state.apply(rec, horizon, b.cfg.Boot(), recorded, b.verifier(ctx)); err != nil {
			return err
		}
		if until > 0 && rec.Seq >= until {
			return nil
		}
		if until == 0 && rec.Key != nil { // a shared store is written while we run
			if _, err := b.revokeForeignKeys(ctx); err != nil {
				return err
			}
		}
	}
	return nil
}

// explains returns the horizon of what is missing before a record: another broker has
// pruned the store while this one was behind.
func (b *Broker) explains(ctx context.Context, rec Record) (feed.Position, error) {
	if rec.Seq <= b.Head().Seq+1 {
		return feed.Position{}, nil
	}
	st, err := b.cfg.Store.State(ctx)
	if err != nil {
		return feed.Position{}, fmt.Errorf("reading the horizon: %w", err)
	}
	return st.Horizon, nil
}

// Head returns the newest position that this broker has applied.
func (b *Broker) Head() feed.Position {
	b.state.mu.RLock()
	defer b.state.mu.RUnlock()
	return b.state.log.Head()
}

// Keys returns the published signing keys that are good, oldest first.
func (b *Broker) Keys() []token.PublicKey { return b.state.publicKeys() }

// KeyRevoked reports whether a signing key is revoked.
func (b *Broker) KeyRevoked(id token.KeyID) bool {
	b.state.mu.RLock()
	defer b.state.mu.RUnlock()
	return b.state.set != nil && b.state.set.KeyRevoked(id)
}

// Changed returns a channel that is closed at the next record.
func (b *Broker) Changed() <-chan struct{} {
	b.state.mu.RLock()
	defer b.state.mu.RUnlock()
	return b.state.changed
}

// ClockOff reports whether the wall clock is behind a record of the log: it was set back,
// or it or another broker's was ahead. It is a warning and never a reason to refuse.
func (b *Broker) ClockOff() bool { return b.state.latest().After(b.cfg.Now().Add(ClockSkew)) }

// Issuer returns the iss of every token.
func (b *Broker) Issuer() string { return b.cfg.Issuer }

// PublishKey records a signing key and returns once it is durable and applied.
func (b *Broker) PublishKey(ctx context.Context, key feed.Key) error {
	_, err := b.append(ctx, func(feed.Position) (Record, error) {
		return Record{Event: feed.Event{Key: &key}, Details: Details{Time: b.cfg.Now().UTC(), Actor: b.cfg.Issuer}}, nil
	})
	return err
}

// append adds a record and waits until this process has applied it.
func (b *Broker) append(ctx context.Context, next func(feed.Position) (Record, error)) (Record, error) {
	rec, err := b.cfg.Store.Append(ctx, next)
	for late := (behind{}); errors.As(err, &late); {
		if err := b.state.await(ctx, late.head); err != nil {
			return Record{}, fmt.Errorf("waiting for record %d: %w", late.head, err)
		}
		rec, err = b.cfg.Store.Append(ctx, next)
	}
	if err != nil {
		return Record{}, storeRefusal(err)
	}
	if err := b.state.await(ctx, rec.Seq); err != nil {
		return Record{}, fmt.Errorf("waiting for record %d: %w", rec.Seq, err)
	}
	return rec, nil
}

// revokeForeignKeys, once keys are checked, kills the keys that someone wrote into the store: whoever can
// write there still mints nothing. It returns the number of the revocation, 0 if there
// was none to make.
func (b *Broker) revokeForeignKeys(ctx context.Context) (uint64, error) {
	foreign := b.foreignKeys()
	if len(foreign) == 0 {
		return 0, nil
	}
	b.cfg.Log.ErrorContext(ctx, "revoking signing keys that no broker vouches for", "keys", len(foreign))
	rec, err := b.cfg.Store.Append(ctx, func(feed.Position) (Record, error) {
		return Record{
			Event:   feed.Event{Revocation: &feed.Revocation{Selectors: foreign}},
			Details: Details{Time: b.cfg.Now().UTC(), Actor: b.cfg.Issuer, Reason: "signing key without a broker's signature", Lock: LockNone},
		}, nil
	})
	if err != nil {
		return 0, fmt.Errorf("revoking foreign keys: %w", err)
	}
	return rec.Seq, nil
}

func (b *Broker) foreignKeys() []revocation.Selector {
	b.state.mu.RLock()
	defer b.state.mu.RUnlock()
	if !b.state.keysChecked {
		return nil // nobody could have vouched for them yet
	}
	var foreign []revocation.Selector
	for _, rec := range b.state.records {
		if rec.Key == nil || rec.Seq < b.state.eraSeq {
			continue // keys of earlier eras are dead with them
		}
		id := rec.Key.Public.ID
		if _, ok := b.state.keys[id]; !ok && !b.state.set.KeyRevoked(id) {
			foreign = append(foreign, revocation.Key(id))
		}
	}
	return foreign
}

// refuse audits a refusal and returns it; other errors pass.
func (b *Broker) refuse(e AuditEntry, err error) error {
	err = storeRefusal(err)
	e.Outcome = "refused"
	var r *Refusal
	if errors.As(err, &r) {
		e.Reason, e.Message = r.Reason, r.Message
	} else {
		e.Reason = "INTERNAL"
	}
	if auditErr := b.cfg.Audit(e); auditErr != nil {
		b.cfg.Log.Error("writing the audit failed", "err", auditErr)
	}
	return err
}

func (b *Broker) entry(action Action, c Caller) AuditEntry {
	e := AuditEntry{Time: b.cfg.Now().UTC(), Action: action, Actor: c.Actor()}
	if c.Peer.IsValid() {
		e.Peer = c.Peer.Addr().String()
	}
	if c.JWT != nil {
		e.Attestation = "jwt"
	}
	return e
}

// checkSVID refuses a caller whose SVID has expired, perhaps while its connection was open.
func (b *Broker) checkSVID(c Caller) error {
	if c.Local != "" {
		return nil
	}
	if _, until := c.Attested(); c.ID.IsZero() || b.cfg.Now().After(until) {
		return ErrSVIDExpired
	}
	return nil
}

// checkWorkload is checkSVID for who wants a credential: break-glass has no identity to
// issue to.
func (b *Broker) checkWorkload(c Caller) error {
	if c.Local != "" {
		return ErrSVIDExpired.because("a credential needs an SVID")
	}
	return b.checkSVID(c)
}

// decide asks policy, and writes question and answer into the entry; break-glass is not
// asked.
func (b *Broker) decide(ctx context.Context, q Question, e *AuditEntry) (Decision, error) {
	if q.Caller.Local != "" {
		e.Rule = "break-glass"
		return Decision{Allow: true, Rule: e.Rule}, nil
	}
	e.Rule = ""
	e.Asked = append(e.Asked, AskedOf(q))
	d, err := b.cfg.Policy.Decide(ctx, q)
	if errors.Is(err, ErrNoPolicy) {
		return Decision{}, ErrNoPolicy
	}
	if err != nil {
		b.cfg.Log.ErrorContext(ctx, "policy could not be evaluated", "action", q.Action, "caller", q.Caller.Actor(), "err", err)
		return Decision{}, ErrPolicyFailed
	}
	e.Rule, e.Revision = d.Rule, d.Revision
	e.Asked[len(e.Asked)-1].Answer = answer(d)
	if !d.Allow {
		r := *ErrPolicyDenied
		if d.Message != "" {
			r.Message = d.Message
		}
		if d.Hint != "" {
			r.Hint = d.Hint
		}
		refusal := &r
		for k, v := range d.Metadata {
			refusal = refusal.with(k, v)
		}
		return d, refusal.with("policy_reason", d.Reason)
	}
	return d, nil
}
