package verify

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/dayflyhq/dayfly/proto/boottime"
	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/proto/wire"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
)

// Bounds of Config.MaxStaleness.
const (
	DefaultMaxStaleness = wire.DefaultBound
	MinMaxStaleness     = wire.MinBound
	MaxMaxStaleness     = wire.MaxBound
)

// OnStale is what a verifier does while its knowledge is older than its bound.
type OnStale int

const (
	// Refuse refuses every token: the default.
	Refuse OnStale = iota
	// Accept runs on with what is known. Nothing but expiry then bounds a revoked
	// token here, and the containment of a revocation says so.
	Accept
)

// Config describes a Verifier. Conn and Audiences must be set.
type Config struct {
	// Conn reaches the FeedService of a broker, or of the agent beside: sdk.Client's
	// Conn. Required.
	Conn grpc.ClientConnInterface

	// BrokerID is set where Conn reaches a relay on another host, which could lie: the
	// SPIFFE ID of the broker whose signature every answer must then bear, made for this
	// very ping, and every record and key be under. Such a relay can delay, which closes
	// the verifier, and no more. It needs Bundles. Zero: what Conn reaches is believed, a
	// broker that the client pins or the agent on this host.
	BrokerID spiffeid.ID

	// Audiences are the names that this service answers to: a token addressed to any
	// other is refused. At least one.
	Audiences []string

	// Issuer is the issuer that tokens must name. Empty takes it from the feed; set,
	// a feed that speaks of another is refused too.
	Issuer string

	// MaxStaleness is the bound: how old the verifier's knowledge may be. Smaller
	// contains a revocation sooner, larger survives a longer outage of the feed. Zero
	// means DefaultMaxStaleness; else MinMaxStaleness to MaxMaxStaleness. A broker
	// may hold it to less.
	MaxStaleness time.Duration

	// OnStale is what to do past the bound. The zero value refuses.
	OnStale OnStale

	// Bundles verifies the certificates of peers at every request, in the middleware.
	// Without it only a certificate that crypto/tls itself has verified proves
	// anything, by whichever of ClientCAs, whatever its trust domain; and that is none
	// of a go-spiffe server: give its source here.
	Bundles x509bundle.Source

	// Leeway is what clocks are granted at exp and nbf. Zero means token.Leeway,
	// which is also the most; a negative value means none.
	Leeway time.Duration

	// Boot is the elapsed time that staleness is measured with: a clock that runs
	// through suspend. Nil means boottime.Now: CLOCK_BOOTTIME on Linux.
	Boot func() feed.Instant

	// Now is the clock for exp and nbf. Nil means time.Now.
	Now func() time.Time

	// Log hears of connections lost and made, and of a fork. Nil means nobody does.
	Log *slog.Logger
}

func (c *Config) validate() error {
	var errs []error
	if c.Conn == nil {
		errs = append(errs, errors.New("conn: must be set"))
	}
	if !c.BrokerID.IsZero() && c.Bundles == nil {
		errs = append(errs, errors.New("bundles: must be set with broker ID, to check its signatures"))
	}
	if n := len(c.Audiences); n == 0 || n > wire.MaxAudiences {
		errs = append(errs, fmt.Errorf("audiences: want 1 to %d, not %d", wire.MaxAudiences, n))
	}
	for _, a := range c.Audiences {
		if err := token.ValidateAudience(a); err != nil {
			errs = append(errs, fmt.Errorf("audiences: %q: %w", a, err))
		}
	}
	if c.MaxStaleness != 0 && (c.MaxStaleness < MinMaxStaleness || c.MaxStaleness > MaxMaxStaleness) {
		errs = append(errs, fmt.Errorf("max staleness: %v is not %v to %v", c.MaxStaleness, MinMaxStaleness, MaxMaxStaleness))
	}
	if c.OnStale != Refuse && c.OnStale != Accept {
		errs = append(errs, fmt.Errorf("on stale: unknown value %d", c.OnStale))
	}
	if c.Leeway > token.Leeway {
		errs = append(errs, fmt.Errorf("leeway: %v is more than %v", c.Leeway, token.Leeway))
	}
	return errors.Join(errs...)
}

func (c *Config) setDefaults() {
	c.Audiences = slices.Clone(c.Audiences)
	if c.MaxStaleness == 0 {
		c.MaxStaleness = DefaultMaxStaleness
	}
	switch {
	case c.Leeway == 0:
		c.Leeway = token.Leeway
	case c.Leeway < 0:
		c.Leeway = 0
	}
	if c.Boot == nil {
		c.Boot = boottime.Now
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
}

// A Verifier judges tokens by what the feed told it. Its methods may be called from any
// goroutine.
type Verifier struct {
	cfg      Config
	client   dayflyv1.FeedServiceClient
	instance string                // random, of this verifier and no other
	seen     token.Memory[*signed] // only what was accepted: a stranger drives nothing out of it
	peers    peers
	uses     uses
	asks     asks
	watches  watches

	mu      sync.RWMutex
	view    feed.View
	fresh   feed.Freshness
	screen  feed.Screen   // before the view, behind a relay on another host
	proving string        // nonce of the ping that is to prove what the screen holds back
	arrived bool          // something more, since that ping was sent
	kept    feed.Newest   // to be shown to a broker that may have lost records
	bound   time.Duration // 0 before the first Welcome
	maxTTL  time.Duration
	issuer  string
	feedErr error // why the last stream ended, nil while one is open
	state   runState
	changed chan struct{} // closed and replaced whenever the above changes
}

type runState int

const (
	notRunning runState = iota
	running
	stopped
)

// New returns a verifier that knows nothing and refuses everything until Run has
// followed the feed.
func New(cfg Config) (*Verifier, error) {
	if err := cfg.validate(); err != nil {
		return nil, fmt.Errorf("configuring verifier: %w", err)
	}
	cfg.setDefaults()
	v := &Verifier{
		cfg:      cfg,
		client:   dayflyv1.NewFeedServiceClient(cfg.Conn),
		instance: rand.Text(),
		issuer:   cfg.Issuer,
		changed:  make(chan struct{}),
	}
	v.asks.wake = make(chan struct{}, 1)
	return v, nil
}

// A Peer is who presents a token. The zero value is nobody in particular, who may
// present bearer tokens only.
type Peer struct {
	// ID is the SPIFFE ID that the peer has proven.
	ID spiffeid.ID
	// Certificate is the leaf that it has proven it with, nil for none.
	Certificate *x509.Certificate
	// Address is its network address without port, for the records.
	Address string
}

// A Verified is a token that was accepted, and what it said. It is its receiver's own.
type Verified struct {
	token.Claims
	// Token is the token itself, to be exchanged for one of the next service. It
	// redacts itself.
	Token token.Secret
	// Peer is who presented it.
	Peer Peer
}

// HasScope reports whether the token has a scope.
func (t *Verified) HasScope(scope string) bool {
	_, found := slices.BinarySearch(t.Scopes, scope)
	return found
}

// RequireScope returns a *Refusal unless the token has all the scopes.
func (t *Verified) RequireScope(scopes ...string) error {
	for _, s := range scopes {
		if !t.HasScope(s) {
			r := Because(ScopeMissing)
			r.Message = fmt.Sprintf("the token lacks the scope %q", s)
			return r
		}
	}
	return nil
}

// Verify judges a token by what is known now. It makes no call, with one exception: a
// token that names a signing key or a position that is not known yet is held for one
// ping of the feed, for two seconds at most. Errors are *Refusal.
//
// A token that was accepted is remembered until it expires, for its signature and nothing
// else: it is judged anew each time.
func (v *Verifier) Verify(ctx context.Context, rawToken string, peer Peer) (*Verified, error) {
	s, j := v.try(rawToken, peer)
	if r := j.refusal; r != nil && (r.Reason == KeyUnknown || r.Reason == Ahead) && v.asks.ask(ctx) {
		s, j = v.try(rawToken, peer)
	}
	if s != nil {
		v.uses.note(&s.Token, j.at, peer, j.refusal, j.now)
	}
	if j.refusal != nil {
		return nil, j.refusal
	}
	return &Verified{Claims: s.Claims.Clone(), Token: s.raw, Peer: peer}, nil
}

// A judgement is of one token at one moment.
type judgement struct {
	at      feed.Position // of what was known
	now     time.Time
	refusal *Refusal
}

// try judges a token once. It returns nil for it where nothing proves that it is one.
func (v *Verifier) try(raw string, peer Peer) (*signed, judgement) {
	if s, ok := v.seen.Get(raw); ok {
		if j, ok := v.judge(s, peer); ok {
			return s, j
		}
	}
	s, r := v.parse(raw)
	if r != nil {
		return nil, judgement{refusal: r}
	}
	j, ok := v.judge(s, peer)
	if !ok {
		return nil, j
	}
	if j.refusal == nil {
		v.seen.Put(s.raw, s, s.Expires.Add(v.cfg.Leeway), j.now)
	}
	return s, j
}

// judge is all that is asked of a token whose signature holds, each time that it is
// shown. It returns false where the verifier is closed, or where the key that vouches for
// the token is no longer what the feed publishes under its ID: then nothing is proven.
func (v *Verifier) judge(s *signed, peer Peer) (j judgement, proven bool) {
	j, proven = v.judgeByFeed(s)
	j.now = v.cfg.Now()
	if j.refusal == nil {
		j.refusal = v.expired(&s.Claims, j.now)
	}
	if j.refusal == nil && !slices.Contains(v.cfg.Audiences, s.Audience) {
		j.refusal = Because(AudienceMismatch)
	}
	if j.refusal == nil {
		j.refusal = unbound(&s.Claims, peer)
	}
	return j, proven
}

// judgeByFeed is one moment: that what is known is fresh, the rule of revocation by it,
// and its position: a later one would make a use that was accepted rightly look like one
// that was not.
func (v *Verifier) judgeByFeed(s *signed) (j judgement, proven bool) {
	v.mu.RLock()
	defer v.mu.RUnlock()
	if j.refusal = v.closedLocked(); j.refusal != nil {
		return j, false
	}
	if key, ok := v.view.Key(s.Self().Key); !ok || !key.Equal(s.key) {
		j.refusal = Because(KeyUnknown)
		return j, false
	}
	j.at, j.refusal = v.view.Position(), v.deadLocked(&s.Claims)
	return j, true
}

// unparsed says why a token proves nothing. The keys of earlier eras are forgotten: a
// token that names such an era itself need not wait for an answer about its key.
func (v *Verifier) unparsed(raw string, err error) *Refusal {
	r := unparsed(err)
	if r.Reason != KeyUnknown {
		return r
	}
	v.mu.RLock()
	era := v.view.Position().Era
	v.mu.RUnlock()
	if shown, err := token.Inspect(raw); err == nil && shown.Position.Era < era {
		return Because(WrongEra)
	}
	return r
}

// key looks a signing key up.
func (v *Verifier) key(id token.KeyID) (token.PublicKey, bool) {
	v.mu.RLock()
	defer v.mu.RUnlock()
	return v.view.Key(id)
}

// closed returns why the verifier refuses whatever it is shown, nil if it doesn't.
func (v *Verifier) closed() *Refusal {
	v.mu.RLock()
	defer v.mu.RUnlock()
	return v.closedLocked()
}

func (v *Verifier) closedLocked() *Refusal {
	switch {
	case v.view.Err() != nil:
		return Because(VerifierForked)
	case v.view.Position().Era == 0 || v.bound == 0:
		return Because(VerifierStale)
	case v.cfg.OnStale == Refuse && !v.fresh.Fresh(v.cfg.Boot(), v.bound):
		return Because(VerifierStale)
	}
	return nil
}

// dead says why a token that was accepted would not be now, whatever the clock says.
func (v *Verifier) dead(c *token.Claims) *Refusal {
	v.mu.RLock()
	defer v.mu.RUnlock()
	if r := v.closedLocked(); r != nil {
		return r
	}
	return v.deadLocked(c)
}

// deadLocked applies the rule of revocation, and the terms of the feed.
func (v *Verifier) deadLocked(c *token.Claims) *Refusal {
	if r := killed(v.view.Judge(revocation.SubjectOf(c))); r != nil {
		return r
	}
	switch {
	case c.Issuer != v.issuer:
		return Because(IssuerMismatch)
	case c.Expires.Sub(c.IssuedAt) > v.maxTTL:
		return Because(TokenTooLong)
	}
	return nil
}

func (v *Verifier) expired(c *token.Claims, now time.Time) *Refusal {
	switch {
	case !now.Before(c.Expires.Add(v.cfg.Leeway)):
		return Because(TokenExpired)
	case now.Before(c.NotBefore.Add(-v.cfg.Leeway)):
		return Because(TokenNotYetValid)
	}
	return nil
}

// unbound checks that the peer may present the token.
func unbound(c *token.Claims, peer Peer) *Refusal {
	switch c.Binding {
	case token.BindingNone:
		return nil
	case token.BindingSPIFFE:
		if !peer.ID.IsZero() && peer.ID == c.Presenter() {
			return nil
		}
		return Because(PresenterMismatch)
	case token.BindingX5T:
		if peer.Certificate != nil && sha256.Sum256(peer.Certificate.Raw) == c.Certificate {
			return nil
		}
		return Because(CertificateMismatch)
	}
	return Because(TokenMalformed)
}

// A Status is what a verifier knows of itself, for health checks and metrics.
type Status struct {
	Position feed.Position
	// Fresh: tokens are judged. Otherwise everything is refused, or, with Accept,
	// judged by old knowledge.
	Fresh bool
	// Age is how old the knowledge is; meaningless before the first proof.
	Age time.Duration
	// Bound is the staleness bound in force, 0 before the feed has welcomed the
	// verifier.
	Bound time.Duration
	// KeptHead is the newest position that a broker signed for and that is shown to
	// brokers, zero for none.
	KeptHead feed.Position
	// Err is a fork that closed the verifier until a new era begins, else why the last stream
	// ended, nil while one is open.
	Err error
}

// Status returns what the verifier knows of itself.
func (v *Verifier) Status() Status {
	v.mu.RLock()
	defer v.mu.RUnlock()
	now := v.cfg.Boot()
	age, _ := v.fresh.Age(now)
	s := Status{Position: v.view.Position(), Age: age, Bound: v.bound, KeptHead: v.kept.Head, Err: v.feedErr}
	s.Fresh = v.view.Err() == nil && v.bound > 0 && v.fresh.Fresh(now, v.bound)
	if err := v.view.Err(); err != nil {
		s.Err = err
	}
	return s
}

// WaitReady waits until the verifier is fresh. Its error says what the feed's last one
// was.
func (v *Verifier) WaitReady(ctx context.Context) error {
	for {
		v.mu.RLock()
		changed := v.changed
		v.mu.RUnlock()
		s := v.Status()
		if s.Fresh {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("waiting for the feed: %w", errors.Join(ctx.Err(), s.Err))
		}
	}
}

// notify wakes those who wait for a change; mu is held for writing.
func (v *Verifier) notify() {
	close(v.changed)
	v.changed = make(chan struct{})
}
