package broker

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/token"
)

const (
	// maxStreams bounds the streams of one identity: an autoscaled set shares one.
	maxStreams = 1024
	// maxRoster bounds the entries of one identity, those behind its relays included.
	// A new one takes the place of those that have closed.
	maxRoster = 16 << 10
)

// maxAudiences bounds the names that one verifier answers to.
const maxAudiences = 64

// A Subscriber is what a verifier says of itself when it begins to follow.
type Subscriber struct {
	Instance     string
	Audiences    []string
	MaxStaleness time.Duration
	AcceptsStale bool
	Position     feed.Position // zero: knows nothing
	Relay        bool
	SignedHeads  bool            // it wants signed heads
	NewestHead   feed.SignedHead // the newest that it was given; zero: none
}

// roster is feed.Roster with a lock, a store behind it and a bell.
type roster struct {
	// dropping is held for reading while verifiers are enrolled, and for writing
	// while some are dropped.
	dropping sync.RWMutex

	mu      sync.Mutex
	feed    feed.Roster
	streams map[string]int // by identity
	// contained is when each revocation was first found contained: later receipts
	// of the same verifiers must not move it.
	contained map[uint64]feed.Instant
	changed   chan struct{}
}

// ring wakes whoever watches containment. The caller holds the lock.
func (r *roster) ring() {
	close(r.changed)
	r.changed = make(chan struct{})
}

const rosterPrefix = "verifier/"

// storedVerifier is a roster entry as the store keeps it. When it was last answered
// is not kept: after a restart, now is the safe assumption.
type storedVerifier struct {
	Identity     string        `json:"identity"`
	Instance     string        `json:"instance"`
	Via          string        `json:"via,omitempty"`
	Claimed      string        `json:"claimed,omitempty"`
	Audiences    []string      `json:"audiences,omitempty"`
	Bound        time.Duration `json:"bound"`
	AcceptsStale bool          `json:"accepts_stale,omitempty"`
	Era          token.Era     `json:"era,omitempty"`
	Seq          uint64        `json:"seq,omitempty"`
	Sum          []byte        `json:"sum,omitempty"`
	Gone         bool          `json:"gone,omitempty"`
}

func observe(v feed.Verifier) Observation {
	return storedVerifier{
		v.ID.Identity, v.ID.Instance, v.ID.Via, v.Claimed, v.Audiences, v.Bound, v.AcceptsStale,
		v.Acked.Era, v.Acked.Seq, v.Acked.Sum[:], v.Gone,
	}.observation()
}

func (s storedVerifier) observation() Observation {
	b, err := json.Marshal(s)
	if err != nil {
		panic("internal error: marshalling a roster entry: " + err.Error())
	}
	return Observation{Key: rosterKey(feed.VerifierID{Identity: s.Identity, Instance: s.Instance, Via: s.Via}), Value: b}
}

func storedVerifierOf(o Observation) (s storedVerifier, err error) {
	if err := json.Unmarshal(o.Value, &s); err != nil {
		return s, fmt.Errorf("reading the roster: entry %q: %w", o.Key, err)
	}
	return s, nil
}

// RosterPrefix begins the keys of the observations that are the roster.
const RosterPrefix = rosterPrefix

// maxKeyText is how long a roster entry's name is before its hash stands for it: a
// SPIFFE ID alone may be longer than the key of an observation.
const maxKeyText = 400

func rosterKey(id feed.VerifierID) string {
	name := strings.Join([]string{id.Identity, id.Via, id.Instance}, "|")
	if len(name) > maxKeyText {
		sum := sha256.Sum256([]byte(name))
		name = hex.EncodeToString(sum[:])
	}
	return rosterPrefix + name
}

// loadRoster reads the roster: each verifier in it may have been fresh until now.
func (b *Broker) loadRoster(ctx context.Context) error {
	now := b.cfg.Boot()
	for o, err := range b.cfg.Store.Observed(ctx, rosterPrefix) {
		if err != nil {
			return fmt.Errorf("reading the roster: %w", err)
		}
		s, err := storedVerifierOf(o)
		if err != nil {
			return err
		}
		v := feed.Verifier{
			ID:      feed.VerifierID{Identity: s.Identity, Instance: s.Instance, Via: s.Via},
			Claimed: s.Claimed, Audiences: s.Audiences, Bound: s.Bound, AcceptsStale: s.AcceptsStale,
			Acked: feed.Position{Era: s.Era, Seq: s.Seq}, Answered: now, Gone: s.Gone,
		}
		copy(v.Acked.Sum[:], s.Sum)
		b.roster.feed.Join(v, now)
	}
	return nil
}

// A Follower is one stream of the feed. Next may be called beside the other methods.
type Follower struct {
	b      *Broker
	caller Caller
	id     feed.VerifierID
	bound  time.Duration
	relay  bool
	signed bool                       // it asked for signed heads
	shown  feed.Position              // the head that it was last given signed; of Answer alone
	below  map[feed.VerifierID]string // whom policy let follow through this relay, on what terms

	mu     sync.Mutex // guards cursor
	cursor *feed.Cursor
	close  sync.Once
}

// Subscribe admits a verifier and records it, durably, before it gets anything.
func (b *Broker) Subscribe(ctx context.Context, c Caller, s Subscriber) (*Follower, error) {
	e := b.entry(ActionFollow, c)
	f, err := b.subscribe(ctx, c, s, &e)
	if err != nil {
		return nil, b.refuse(e, err)
	}
	e.Outcome = "allowed"
	if err := b.cfg.Audit(e); err != nil {
		f.Close()
		return nil, fmt.Errorf("writing the audit: %w", err)
	}
	return f, nil
}

func (b *Broker) subscribe(ctx context.Context, c Caller, s Subscriber, e *AuditEntry) (*Follower, error) {
	if err := checkSubscriber(s); err != nil {
		return nil, err
	}
	if err := b.checkSVID(c); err != nil {
		return nil, err
	}
	actions := []Action{ActionFollow}
	if s.Relay {
		actions = append(actions, ActionRelay)
	}
	for _, action := range actions {
		_, err := b.decide(ctx, Question{
			Action: action, Caller: c, Time: b.cfg.Now(),
			Audiences: s.Audiences, MaxStaleness: s.MaxStaleness, AcceptsStale: s.AcceptsStale,
		}, e)
		if err != nil {
			return nil, err
		}
	}
	v := feed.Verifier{
		ID:        feed.VerifierID{Identity: c.ID.String(), Instance: s.Instance},
		Audiences: s.Audiences, Bound: s.MaxStaleness, AcceptsStale: s.AcceptsStale,
	}
	b.state.mu.RLock()
	head := b.state.log.Head()
	// What a relay has is no receipt: it hasn't said yet who is below it.
	if at, ok := b.state.log.At(s.Position.Seq); ok && at == s.Position && !s.Relay {
		v.Acked, v.AckedAt = at, b.cfg.Boot()
	}
	b.state.mu.RUnlock()
	if s.Position.Compare(head) > 0 {
		b.cfg.Log.ErrorContext(ctx, "a verifier claims a position that this log lacks", "verifier", c.Actor(), "claimed", s.Position.String(), "head", head.String())
	}
	if err := b.heard(ctx, c, s.NewestHead); err != nil {
		return nil, err
	}
	if err := b.join(ctx, v); err != nil {
		return nil, err
	}
	return &Follower{b: b, caller: c, id: v.ID, bound: s.MaxStaleness, relay: s.Relay, signed: s.SignedHeads, cursor: feed.NewCursor(s.Position)}, nil
}

func checkSubscriber(s Subscriber) error {
	switch {
	case !feed.ValidInstance(s.Instance):
		return ErrFeedRejected.because("instance: 8 to 64 characters").with("field", "instance")
	case len(s.Audiences) == 0 && !s.Relay || len(s.Audiences) > maxAudiences:
		return ErrFeedRejected.because("audiences: 1 to 64; only a relay may name none").with("field", "audiences")
	case s.MaxStaleness < MinStaleness || s.MaxStaleness > MaxStaleness:
		return ErrBoundTooLarge.with("field", "max_staleness")
	}
	for _, a := range s.Audiences {
		if err := token.ValidateAudience(a); err != nil {
			return ErrFeedRejected.because("audiences: %v", err).with("field", "audiences")
		}
	}
	return nil
}

// join puts a verifier on the roster: in the store first, so that it can't be
// forgotten by a crash once it was let in.
func (b *Broker) join(ctx context.Context, v feed.Verifier) error {
	r := &b.roster
	r.mu.Lock()
	if r.streams == nil {
		r.streams = map[string]int{}
	}
	if r.streams[v.ID.Identity] >= maxStreams {
		r.mu.Unlock()
		return ErrTooManyStreams
	}
	r.streams[v.ID.Identity]++
	r.mu.Unlock()
	err := b.enrol(ctx, v)
	if err != nil {
		b.leave(v.ID.Identity)
	}
	return err
}

// enrol records verifiers of one identity, durably, before the roster counts on it.
// What the roster has already costs no write.
func (b *Broker) enrol(ctx context.Context, verifiers ...feed.Verifier) error {
	r := &b.roster
	if !r.hasRoom(verifiers) {
		identity := verifiers[0].ID.Identity
		err := b.drop(ctx, func(f *feed.Roster) []feed.VerifierID { return f.MakeRoom(identity, b.cfg.Boot()) })
		switch {
		case err != nil:
			return err
		case !r.hasRoom(verifiers):
			return ErrRosterFull
		}
	}
	r.dropping.RLock()
	defer r.dropping.RUnlock()
	var observations []Observation
	r.mu.Lock()
	for i, v := range verifiers {
		old, known := r.feed.Get(v.ID)
		if known {
			// It may still live by the larger of its bounds after our restart.
			v.Bound = max(v.Bound, old.Bound)
			if old.Acked.Compare(v.Acked) > 0 {
				v.Acked = old.Acked
			}
			verifiers[i] = v
		}
		if o := observe(v); !known || !bytes.Equal(o.Value, observe(old).Value) {
			observations = append(observations, o)
		}
	}
	r.mu.Unlock()
	if len(observations) > 0 {
		if err := b.cfg.Store.Observe(ctx, observations...); err != nil {
			return storeRefusal(err)
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	now := b.cfg.Boot()
	for _, v := range verifiers {
		r.feed.Join(v, now)
	}
	if len(observations) > 0 {
		r.ring()
	}
	return nil
}

// hasRoom reports whether an identity's new entries have a place.
func (r *roster) hasRoom(verifiers []feed.Verifier) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	wanted := r.feed.LenOf(verifiers[0].ID.Identity)
	for _, v := range verifiers {
		if _, known := r.feed.Get(v.ID); !known {
			wanted++
		}
	}
	return wanted <= maxRoster
}

// drop takes entries off the roster and out of the store. Nobody is enrolled meanwhile:
// a deletion must not overtake the same verifier's return.
func (b *Broker) drop(ctx context.Context, which func(*feed.Roster) []feed.VerifierID) error {
	r := &b.roster
	r.dropping.Lock()
	defer r.dropping.Unlock()
	r.mu.Lock()
	dropped := which(&r.feed)
	if len(dropped) > 0 {
		r.ring()
	}
	r.mu.Unlock()
	if len(dropped) == 0 {
		return nil
	}
	deletions := make([]Observation, len(dropped))
	for i, id := range dropped {
		deletions[i].Key = rosterKey(id)
	}
	return storeRefusal(b.cfg.Store.Observe(ctx, deletions...))
}

func (b *Broker) leave(identity string) {
	r := &b.roster
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.streams[identity]--; r.streams[identity] <= 0 {
		delete(r.streams, identity)
	}
}

// Close ends the stream. The verifier stays on the roster: it may still accept tokens.
func (f *Follower) Close() { f.close.Do(func() { f.b.leave(f.id.Identity) }) }

// Bound returns the staleness bound that is recorded for the verifier.
func (f *Follower) Bound() time.Duration { return f.bound }

// Check refuses to go on once the SVID of the stream has expired.
func (f *Follower) Check() error { return f.b.checkSVID(f.caller) }

// Next returns what to send next, if anything, and a channel that is closed when
// there may be more.
func (f *Follower) Next(limit int) (feed.Delivery, bool, <-chan struct{}) {
	s := f.b.state
	s.mu.RLock()
	defer s.mu.RUnlock()
	f.mu.Lock()
	defer f.mu.Unlock()
	d, ok := f.cursor.Next(&s.log, limit)
	return d, ok, s.changed
}

// A Proof is what a ping is answered with.
type Proof struct {
	Head, Horizon feed.Position
	Age           time.Duration
	// Signed says the same over a broker's name, and Path that the ping was there when it
	// was said; zero for those who get none.
	Signed feed.SignedHead
	Path   feed.NoncePath
}

// Prove shows that this broker still owns its store, by a durable write that began
// after the call and is shared by all that wait. The head is read after it, so
// everything committed before the ping is at or below it.
func (f *Follower) Prove(ctx context.Context) (Proof, error) {
	b := f.b
	if err := f.Check(); err != nil {
		return Proof{}, err
	}
	if err := b.checkSilence(); err != nil {
		return Proof{}, err
	}
	if err := b.owns(ctx); err != nil {
		return Proof{}, storeRefusal(err)
	}
	st, err := b.cfg.Store.State(ctx)
	if err != nil {
		return Proof{}, storeRefusal(err)
	}
	b.state.mu.RLock()
	horizon := b.state.log.Horizon()
	b.state.mu.RUnlock()
	if !f.answering() {
		return Proof{}, ErrForgotten
	}
	return Proof{Head: st.Head, Horizon: horizon}, nil
}

// owns is a durable write, which shows that this process still has its store.
func (b *Broker) owns(ctx context.Context) error { return b.cfg.Store.Observe(ctx) }

// answering notes that a ping of a verifier is being answered. Who was silent for long
// may have left the roster while its stream stayed open: an answer would open again
// what no containment counts any more, so it must subscribe anew.
func (f *Follower) answering() bool {
	r := &f.b.roster
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, ok := r.feed.Get(f.id); !ok {
		return false
	}
	r.feed.Answered(f.id, f.b.cfg.Boot())
	return true
}

// Acknowledge takes a receipt: for the verifier that sent it, and for nothing that it
// wasn't given.
func (f *Follower) Acknowledge(ctx context.Context, p feed.Position) error {
	if err := f.Check(); err != nil {
		return err
	}
	if !f.delivered(p) {
		return ErrFeedRejected.because("a receipt for %s, which was not delivered on this stream", p)
	}
	return f.b.acknowledge(ctx, f.id, p)
}

// delivered reports whether this stream was given what a receipt is for.
func (f *Follower) delivered(p feed.Position) bool {
	f.mu.Lock()
	until := f.cursor.Position()
	f.mu.Unlock()
	f.b.state.mu.RLock()
	at, known := f.b.state.log.At(p.Seq)
	f.b.state.mu.RUnlock()
	return p.Compare(until) <= 0 && (!known || p.Era != at.Era || p == at)
}

func (b *Broker) acknowledge(ctx context.Context, id feed.VerifierID, p feed.Position) error {
	r := &b.roster
	r.mu.Lock()
	news := r.feed.Acknowledged(id, p, b.cfg.Boot())
	v, _ := r.feed.Get(id)
	if news {
		r.ring()
	}
	r.mu.Unlock()
	if !news {
		return nil
	}
	return storeRefusal(b.cfg.Store.Observe(ctx, observe(v)))
}

// A Containment is feed.Containment with wall-clock times and what the feed can't
// reach.
type Containment struct {
	feed.Containment
	// Now is the instant and the time it was made at, to tell its instants as times.
	NowInstant feed.Instant
	Now        time.Time
	// External are the audiences outside the feed that it reaches.
	External []PlannedAudience
	// UsesAfter are uses of what was revoked, after it was.
	UsesAfter []UsesAfter
}

// Time tells an instant of the containment as a time.
func (c *Containment) Time(i feed.Instant) time.Time { return c.Now.Add(i.Sub(c.NowInstant)) }

// Containment adds up the receipts of one revocation, and returns a channel that is
// closed at the next receipt.
func (b *Broker) Containment(rec RevocationRecord) (*Containment, <-chan struct{}) {
	b.state.mu.RLock()
	committed := b.state.known[rec.Seq]
	b.state.mu.RUnlock()
	r := &b.roster
	r.mu.Lock()
	defer r.mu.Unlock()
	now := b.cfg.Boot()
	c := r.feed.Containment(rec.Position, committed, now)
	if c.Contained {
		c.By = r.firstContained(rec.Seq, c.By)
	}
	return &Containment{Containment: c, NowInstant: now, Now: b.cfg.Now(), UsesAfter: b.UsesAfter(rec.Seq)}, r.changed
}

// firstContained remembers when a revocation was contained, as far as this process
// knows. The caller holds the lock.
func (r *roster) firstContained(seq uint64, at feed.Instant) feed.Instant {
	if r.contained == nil {
		r.contained = map[uint64]feed.Instant{}
	}
	if first, ok := r.contained[seq]; ok {
		return min(first, at)
	}
	r.contained[seq] = at
	return at
}

// External finds the audiences outside the feed that a revocation reaches: a scan of
// the live grants, so never part of Revoke. Of a key no record tells: whoever stole it
// signs for any audience, and those outside the feed accept it until they read the JWK set
// again, so each that is declared is reached, for as long as an honest token lives.
func (b *Broker) External(ctx context.Context, rec RevocationRecord) ([]PlannedAudience, error) {
	reach, err := b.reach(ctx, func(g *Grant) bool {
		if g.Position.Era == rec.Position.Era && g.Position.Seq >= rec.Seq {
			return false
		}
		for _, s := range rec.Record.Revocation.Selectors {
			if s.Matches(g.Subject()) {
				return true
			}
		}
		return false
	})
	if err != nil {
		return nil, err
	}
	var out []PlannedAudience
	for _, a := range reach.Audiences {
		if a.Audience.VerifiedBy != VerifiedByFeed {
			out = append(out, a)
		}
	}
	until := rec.Details.Time.Add(token.MaxTTL + token.Leeway)
	if !revokesKey(rec.Record) || !b.cfg.Now().Before(until) {
		return out, nil
	}
	for _, a := range b.cfg.Policy.External() {
		i := slices.IndexFunc(out, func(p PlannedAudience) bool { return p.Audience.Name == a.Name })
		if i < 0 {
			out, i = append(out, PlannedAudience{Audience: a}), len(out)
		}
		out[i].LastExpiry = until // later than that of any grant
	}
	slices.SortFunc(out, func(x, y PlannedAudience) int { return cmp.Compare(x.Audience.Name, y.Audience.Name) })
	return out, nil
}
