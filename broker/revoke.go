package broker

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// A Revoke is what an operator asks for: one atomic record, whatever it kills.
type Revoke struct {
	Selectors      []revocation.Selector
	Lock           LockMode  // "": the default of the selectors
	LockEnds       time.Time // zero: until lifted
	Reason         string
	IdempotencyKey string
	// AllowEverything must be set for the selector "everything".
	AllowEverything bool
}

// Revoke records a revocation with its lock. It is durable, applied here and on its
// way to every verifier when it returns. Of everything it takes two operators: the first
// one's call returns *Pending, and nothing is revoked.
func (b *Broker) Revoke(ctx context.Context, c Caller, req Revoke) (Record, error) {
	e := b.entry(ActionRevoke, c)
	e.Selector, e.Lock, e.Why = texts(req.Selectors), req.Lock, auditable(req.Reason)
	rec, err := b.revoke(ctx, c, req, &e)
	if err == nil {
		e.Sequence, e.Lock = rec.Seq, rec.Details.Lock
	}
	return rec, b.outcome(ctx, c, e, rec, err)
}

// loud logs what was done past policy, over the break-glass socket.
func (b *Broker) loud(ctx context.Context, c Caller, what Action, seq uint64) {
	if c.Local != "" {
		b.cfg.Log.WarnContext(ctx, "BREAK-GLASS: policy was not asked", "what", what, "by", c.Local, "sequence", seq)
	}
}

func (b *Broker) revoke(ctx context.Context, c Caller, req Revoke, e *AuditEntry) (Record, error) {
	if err := checkRevoke(&req, b.cfg.Now()); err != nil {
		return Record{}, err
	}
	e.Lock = req.Lock
	if err := b.checkSVID(c); err != nil {
		return Record{}, err
	}
	action := ActionRevoke
	if slices.Contains(req.Selectors, revocation.Everything()) {
		action = ActionRevokeEverything
	}
	e.Action = action
	d, err := b.decide(ctx, Question{Action: action, Caller: c, Time: b.cfg.Now(), Selectors: texts(req.Selectors), Lock: req.Lock}, e)
	if err != nil {
		return Record{}, err
	}
	subject := revokeSubject(req.Selectors, req.Lock, req.LockEnds)
	same := func(rec Record) bool {
		return rec.Revocation != nil && revokeSubject(rec.Revocation.Selectors, rec.Details.Lock, rec.Details.LockEnds) == subject
	}
	if action != ActionRevokeEverything || c.Local != "" {
		next := b.revocationRecord(c, req, nil)
		return b.recordOnce(ctx, c, req.IdempotencyKey, same, func(feed.Position) (Record, error) { return next() })
	}
	b.proposing.Lock()
	defer b.proposing.Unlock()
	if _, ok := b.recorded(c, req.IdempotencyKey); ok {
		return b.recordOnce(ctx, c, req.IdempotencyKey, same, nil)
	}
	want := Proposal{Subject: subject, Actor: c.Actor(), Reason: req.Reason, IdempotencyKey: req.IdempotencyKey}
	proposal, err := b.consent(ctx, want, d.SecondPerson, nil, nil)
	if err != nil {
		return Record{}, err
	}
	rec, err := b.recordOnce(ctx, c, req.IdempotencyKey, same, b.settled(b.revocationRecord(c, req, proposal)))
	if err == nil {
		b.forgetProposal(ctx, proposal)
	}
	return rec, err
}

// revocationRecord returns the function that makes the record at the moment of commit.
func (b *Broker) revocationRecord(c Caller, req Revoke, confirms *Proposal) func() (Record, error) {
	return func() (Record, error) {
		if confirms != nil && b.confirmed(confirms) {
			return Record{}, ErrBusy.because("the proposal was just confirmed by another call")
		}
		now := b.cfg.Now().UTC()
		rec := Record{
			Event: feed.Event{Revocation: &feed.Revocation{Selectors: req.Selectors}},
			Details: Details{
				Time: now, Actor: c.Actor(), Reason: req.Reason, IdempotencyKey: req.IdempotencyKey,
				Proposed: confirms, Lock: req.Lock, LockEnds: req.LockEnds.UTC(),
			},
		}
		rec.Details.SVIDExpires = b.svidExpiries(req.Selectors)
		if req.Lock == LockReissue {
			rec.Details.LockCut = b.cut(req.Selectors, now)
		}
		return rec, nil
	}
}

// svidExpiries says until when the locks on single SVIDs must stand, where known.
func (b *Broker) svidExpiries(selectors []revocation.Selector) map[string]time.Time {
	out := map[string]time.Time{}
	for _, s := range selectors {
		if s.Kind() != revocation.KindSVID {
			continue
		}
		if t, err := token.ParseThumbprint(s.Value()); err == nil {
			if at, ok := b.seen.expiry(t); ok {
				out[s.Value()] = at.UTC()
			}
		}
	}
	return out
}

// cut is the moment after which an SVID must have been issued to pass a reissue lock:
// the latest of our clock, the newest NotBefore seen of whom it matches and the time of
// any record, plus the skew that issuers' clocks are allowed. When in doubt it
// refuses, and the next rotation passes.
func (b *Broker) cut(selectors []revocation.Selector, now time.Time) time.Time {
	latest := now
	seen := b.seen.newestNotBefore(func(id spiffeid.ID) bool {
		return slices.ContainsFunc(selectors, func(s revocation.Selector) bool { return s.MatchesCaller(id, [16]byte{}) })
	})
	if seen.After(latest) {
		latest = seen
	}
	if t := b.state.latest(); t.After(latest) {
		latest = t
	}
	return latest.Add(ClockSkew).UTC()
}

func checkRevoke(req *Revoke, now time.Time) error {
	if err := CheckSelectors(req.Selectors); err != nil {
		return err
	}
	if err := checkReason(req.Reason); err != nil {
		return err
	}
	if slices.Contains(req.Selectors, revocation.Everything()) && !req.AllowEverything {
		return ErrEverythingUnflagged
	}
	if len(req.IdempotencyKey) > MaxKeyLength {
		return ErrInvalidRequest.because("idempotency_key: at most %d characters", MaxKeyLength).with("field", "idempotency_key")
	}
	lockable := slices.ContainsFunc(req.Selectors, revocation.Selector.Lockable)
	switch req.Lock {
	case "":
		req.Lock = LockNone
		if lockable {
			req.Lock = LockQuarantine
		}
	case LockNone:
	case LockQuarantine, LockReissue:
		if !lockable {
			return ErrInvalidRequest.because("lock_mode: none of the selectors can be locked; they name no identity").with("field", "lock_mode")
		}
	default:
		return ErrInvalidRequest.because("lock_mode: unknown").with("field", "lock_mode")
	}
	if req.LockEnds.IsZero() {
		return nil
	}
	if req.Lock == LockNone || !req.LockEnds.After(now) {
		return ErrInvalidRequest.because("lock_ends_at: must be in the future, and belongs to a lock").with("field", "lock_ends_at")
	}
	if !slices.ContainsFunc(req.Selectors, func(s revocation.Selector) bool { return s.Lockable() && s.Kind() != revocation.KindSVID }) {
		return ErrInvalidRequest.because("lock_ends_at: a lock on an SVID stands until that SVID has expired").with("field", "lock_ends_at")
	}
	return nil
}

// CheckSelectors checks the number of selectors and that none is the zero value.
func CheckSelectors(selectors []revocation.Selector) error {
	if len(selectors) == 0 || len(selectors) > MaxSelectors {
		return ErrInvalidRequest.because("selectors: 1 to %d, not %d", MaxSelectors, len(selectors)).with("field", "selectors")
	}
	if slices.Contains(selectors, revocation.Selector{}) {
		return ErrInvalidRequest.because("selectors: one of them is empty").with("field", "selectors")
	}
	return nil
}

func checkReason(reason string) error {
	if strings.TrimSpace(reason) == "" {
		return ErrReasonRequired
	}
	if !utf8.ValidString(reason) || utf8.RuneCountInString(reason) > MaxReason {
		return ErrReasonRequired.because("a reason has at most %d characters", MaxReason)
	}
	return nil
}

// auditable is a reason as the audit takes it: one that was refused has any length.
func auditable(reason string) string {
	if checkReason(reason) != nil {
		return ""
	}
	return reason
}

// recordOnce appends a record, unless the same actor's key made one before: then that
// one is the answer, if it is the same kind of thing.
func (b *Broker) recordOnce(ctx context.Context, c Caller, key string, same func(Record) bool, next func(feed.Position) (Record, error)) (Record, error) {
	if key == "" {
		return b.append(ctx, next)
	}
	rec, err := b.inOneFlight(ctx, retryKey(c.Actor(), key), func(ctx context.Context) (Record, error) {
		if rec, ok := b.recorded(c, key); ok {
			return rec, nil
		}
		return b.append(ctx, next)
	})
	if err != nil {
		return Record{}, err
	}
	if !same(rec) {
		return Record{}, ErrIdempotencyReused
	}
	return rec, nil
}

// inOneFlight makes a record for all calls at once with the same key. The work outlives a
// caller that gives up: others may wait for it.
func (b *Broker) inOneFlight(ctx context.Context, key string, make func(context.Context) (Record, error)) (Record, error) {
	done := b.flight.DoChan(key, func() (any, error) { return make(context.WithoutCancel(ctx)) })
	select {
	case answer := <-done:
		rec, _ := answer.Val.(Record)
		return rec, answer.Err
	case <-ctx.Done():
		return Record{}, ctx.Err()
	}
}

// recorded returns the record that a key of the caller's made, or, where another
// confirmed what it proposed, has become.
func (b *Broker) recorded(c Caller, key string) (Record, bool) {
	b.state.mu.RLock()
	defer b.state.mu.RUnlock()
	seq, ok := b.state.retried[retryKey(c.Actor(), key)]
	return b.state.records[seq], ok
}

// Lift ends one standing lock. The revocation stays, and nothing issued before revives.
// Where policy wants two persons, the first one's call returns *Pending.
func (b *Broker) Lift(ctx context.Context, c Caller, number uint64, reason, idempotencyKey string) (Record, error) {
	e := b.entry(ActionLift, c)
	e.Sequence, e.Why = number, auditable(reason)
	rec, err := b.lift(ctx, c, number, reason, idempotencyKey, &e)
	return rec, b.outcome(ctx, c, e, rec, err)
}

func (b *Broker) lift(ctx context.Context, c Caller, number uint64, reason, key string, e *AuditEntry) (Record, error) {
	if err := checkReason(reason); err != nil {
		return Record{}, err
	}
	if len(key) > MaxKeyLength {
		return Record{}, ErrInvalidRequest.because("idempotency_key: at most %d characters", MaxKeyLength).with("field", "idempotency_key")
	}
	if err := b.checkSVID(c); err != nil {
		return Record{}, err
	}
	d, mayPropose := b.decide(ctx, Question{Action: ActionLift, Caller: c, Time: b.cfg.Now()}, e)
	var confirm Decision
	mayConfirm := mayPropose
	if d.SecondPerson.Required {
		confirm, mayConfirm = b.decide(ctx, Question{Action: ActionLiftConfirm, Caller: c, Time: b.cfg.Now()}, e)
		e.Rule = d.Rule // until it has confirmed
	}
	if mayPropose != nil && mayConfirm != nil {
		return Record{}, mayPropose
	}
	b.proposing.Lock() // two lifts of one lock must not both find it standing
	defer b.proposing.Unlock()
	same := func(rec Record) bool { return rec.Lift != nil && rec.Lift.Lock == number }
	if _, ok := b.recorded(c, key); ok {
		return b.recordOnce(ctx, c, key, same, nil)
	}
	if _, ok := b.lock(number); !ok {
		return Record{}, b.notStanding(number)
	}
	var proposal *Proposal
	if d.SecondPerson.Required {
		want := Proposal{Subject: liftSubject(number), Actor: c.Actor(), Reason: reason, IdempotencyKey: key}
		var err error
		proposal, err = b.consent(ctx, want, d.SecondPerson, mayPropose, mayConfirm)
		if proposal != nil {
			e.Action, e.Rule = ActionLiftConfirm, confirm.Rule
		}
		if err != nil {
			return Record{}, err
		}
	}
	rec, err := b.recordOnce(ctx, c, key, same, b.settled(func() (Record, error) {
		if _, ok := b.lock(number); !ok {
			return Record{}, b.notStanding(number)
		}
		return Record{
			Event:   feed.Event{Lift: &feed.Lift{Lock: number}},
			Details: Details{Time: b.cfg.Now().UTC(), Actor: c.Actor(), Reason: reason, IdempotencyKey: key, Proposed: proposal},
		}, nil
	}))
	if err == nil && proposal != nil {
		b.forgetProposal(ctx, proposal)
	}
	return rec, err
}

func (b *Broker) lock(number uint64) (Lock, bool) {
	b.state.mu.RLock()
	defer b.state.mu.RUnlock()
	l, ok := b.state.locks[number]
	if !ok || !l.standing(b.cfg.Now()) {
		return Lock{}, false
	}
	return *l, true
}

func texts(selectors []revocation.Selector) []string {
	out := make([]string, len(selectors))
	for i, s := range selectors {
		out[i] = s.String()
	}
	return out
}

// May asks policy whether an operator may read, and audits the answer.
func (b *Broker) May(ctx context.Context, c Caller, action Action) error {
	e := b.entry(action, c)
	err := b.checkSVID(c)
	if err == nil {
		_, err = b.decide(ctx, Question{Action: action, Caller: c, Time: b.cfg.Now()}, &e)
	}
	if err != nil {
		return b.refuse(e, err)
	}
	e.Outcome = "allowed"
	if err := b.cfg.Audit(e); err != nil {
		return fmt.Errorf("writing the audit: %w", err)
	}
	return nil
}

// Locks returns the standing locks, newest first.
func (b *Broker) Locks() []Lock {
	b.state.mu.RLock()
	defer b.state.mu.RUnlock()
	var out []Lock
	for _, l := range b.state.locks {
		if l.standing(b.cfg.Now()) {
			out = append(out, *l)
		}
	}
	slices.SortFunc(out, func(x, y Lock) int { return int(int64(y.Number) - int64(x.Number)) })
	return out
}

// A RevocationRecord is a revocation and, once its lock was lifted, the lift.
type RevocationRecord struct {
	Record
	Position feed.Position
	Lift     *Record
}

// Revocation returns one revocation by its number.
func (b *Broker) Revocation(seq uint64) (RevocationRecord, error) {
	b.state.mu.RLock()
	defer b.state.mu.RUnlock()
	rec, ok := b.state.records[seq]
	if !ok || rec.Revocation == nil {
		return RevocationRecord{}, ErrNoSuchRevocation.because("there is no revocation %d", seq)
	}
	return b.state.withLift(rec), nil
}

// Revocations returns up to limit revocations below a number (0: the newest), newest
// first; those of grants that their holders gave back only where givenBack is set.
func (b *Broker) Revocations(below uint64, limit int, givenBack bool) []RevocationRecord {
	b.state.mu.RLock()
	defer b.state.mu.RUnlock()
	var numbers []uint64
	for seq, rec := range b.state.records {
		if rec.Revocation != nil && (below == 0 || seq < below) && (givenBack || !rec.Details.GivenBack) {
			numbers = append(numbers, seq)
		}
	}
	slices.Sort(numbers)
	slices.Reverse(numbers)
	var out []RevocationRecord
	for _, seq := range numbers[:min(limit, len(numbers))] {
		out = append(out, b.state.withLift(b.state.records[seq]))
	}
	return out
}

func (s *state) withLift(rec Record) RevocationRecord {
	out := RevocationRecord{Record: rec, Position: feed.Position{Era: s.eraOf(rec.Seq), Seq: rec.Seq, Sum: rec.Sum}}
	if lift, ok := s.lifts[rec.Seq]; ok {
		out.Lift = &lift
	}
	return out
}
