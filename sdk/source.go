package sdk

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/dayflyhq/dayfly/proto/token"
)

// When a credential is renewed and how failures are spaced.
const (
	// RenewFrom and RenewTo are between which fractions of a credential's life it is
	// renewed, at random: a fleet started together doesn't ask together.
	RenewFrom = 0.60
	RenewTo   = 0.75

	minBackoff = 500 * time.Millisecond
	maxBackoff = 15 * time.Second
	// maxRetryAfter is the longest pause that a broker's retry_after makes: limits are
	// raised, and revoked credentials make room, before that is over.
	maxRetryAfter = time.Minute
	// lookEvery is how often Run looks whether a certificate-bound credential still goes
	// with the SVID: nothing tells of a rotation.
	lookEvery = time.Second
)

// unfitPauses are between fetches of what doesn't fit when it comes: the SVID rotated
// meanwhile, or an agent hears of it a moment later.
var unfitPauses = []time.Duration{0, 50 * time.Millisecond, 100 * time.Millisecond, 200 * time.Millisecond, 400 * time.Millisecond, 800 * time.Millisecond}

var errUnfit = errors.New("the credential is bound to another certificate than the current SVID's: does something end TLS between here and the broker?")

// SourceConfig describes a TokenSource. Only Fetch must be set.
type SourceConfig struct {
	// Fetch gets a new credential, usually Client.Issue. It is called by one
	// goroutine at a time.
	Fetch func(ctx context.Context) (*Credential, error)

	// Fits reports whether a credential may still be presented. One that doesn't fit is
	// not given out, and another is fetched at once. It must be quick, and is called with
	// every Token. Nil means that each does.
	Fits func(*Credential) bool

	// Keeps reports whether a credential may be given out from memory. One that may not
	// goes to those who wait for it, and the next Token fetches anew. Nil means that each
	// may.
	Keeps func(*Credential) bool

	// Timeout bounds one Fetch. Zero means DefaultTimeout.
	Timeout time.Duration

	// Now is the clock that credentials are aged with. Nil means time.Now.
	Now func() time.Time

	// Jitter returns a number in [0, 1). Nil means math/rand: it spreads load and
	// protects nothing.
	Jitter func() float64

	// Log hears of failed renewals. Nil means nobody does.
	Log *slog.Logger
}

// A TokenSource keeps one credential fresh and gives it out from memory. It renews at a
// random point of 60 to 75 % of its life, one fetch at a time whoever asks; while
// fetching fails it serves what is still valid and tries again with growing pauses; an
// expired credential is never given out, nor one that is bound to a certificate which has
// been rotated since: another one is fetched, which whoever asks waits for.
//
// Renewal begins when somebody asks; Run renews also while nobody does. Its methods may
// be called from any goroutine.
type TokenSource struct {
	cfg    SourceConfig
	ctx    context.Context // ends with Close; what fetches run under
	cancel context.CancelFunc

	mu      sync.Mutex
	current *Credential
	renewAt time.Duration // age of the current credential at which it is renewed
	flight  *flight       // nil while none
	failed  error         // of the last fetch, nil after a success
	retryAt time.Time     // not before, while failed
	soonest time.Time     // not before, for whoever has nothing
	pause   time.Duration
	passing bool          // the last credential was not to be kept
	spared  time.Duration // age below which a refused credential is not dropped
	changed chan struct{} // closed and replaced at every change: wakes Run
	wg      sync.WaitGroup
}

// A flight is one fetch and those who wait for it.
type flight struct {
	done    chan struct{}
	cred    *Credential // not to be kept: for those who wait
	discard bool        // Invalidate came meanwhile: what arrives may be dead already
}

// NewTokenSource returns a source. It fetches nothing before it is asked or Run.
func NewTokenSource(cfg SourceConfig) (*TokenSource, error) {
	if cfg.Fetch == nil {
		return nil, errors.New("configuring token source: fetch must be set")
	}
	all := func(*Credential) bool { return true }
	if cfg.Fits == nil {
		cfg.Fits = all
	}
	if cfg.Keeps == nil {
		cfg.Keeps = all
	}
	if cfg.Timeout <= 0 {
		cfg.Timeout = DefaultTimeout
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Jitter == nil {
		cfg.Jitter = rand.Float64
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	s := &TokenSource{cfg: cfg, changed: make(chan struct{})}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	return s, nil
}

// TokenSource returns a source of credentials for one request. It belongs to the
// caller, who closes it.
func (c *Client) TokenSource(r Request) *TokenSource {
	s, err := NewTokenSource(SourceConfig{
		Fetch:   func(ctx context.Context) (*Credential, error) { return c.Issue(ctx, r) },
		Fits:    c.fits,
		Keeps:   c.keeps,
		Timeout: c.cfg.Timeout,
		Now:     c.cfg.Now,
	})
	if err != nil {
		panic(fmt.Sprintf("internal error: %v", err)) // Fetch is set
	}
	return s
}

// Close ends a fetch that is under way and waits for it. What is in memory is dropped.
func (s *TokenSource) Close() {
	s.mu.Lock()
	s.cancel() // under mu: no flight begins after it
	s.current = nil
	s.mu.Unlock()
	s.wg.Wait()
}

// Token returns a credential that is valid now, from memory where there is one. Else it
// waits for a fetch, until ctx ends. After a failed fetch it returns that failure at
// once, without a call, until the pause before the next try is over. The caller must not
// change what is returned.
func (s *TokenSource) Token(ctx context.Context) (*Credential, error) {
	for {
		cred, f, err := s.take()
		if f == nil {
			return cred, err
		}
		select {
		case <-f.done:
			if f.cred != nil {
				return f.cred, nil
			}
		case <-ctx.Done():
			return nil, fmt.Errorf("waiting for a credential: %w", ctx.Err())
		}
	}
}

// take returns a valid credential, or an error, or the flight to wait for.
func (s *TokenSource) take() (*Credential, *flight, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ctx.Err() != nil {
		return nil, nil, errors.New("the token source is closed")
	}
	now := s.cfg.Now()
	cred := s.valid(now)
	if cred != nil && cred.age(now) < s.renewAt {
		return cred, nil, nil
	}
	if s.flight == nil && !s.pausing(now, cred == nil) {
		s.fetch()
	}
	switch {
	case cred != nil:
		return cred, nil, nil
	case s.flight != nil:
		return nil, s.flight, nil
	}
	return nil, nil, fmt.Errorf("fetching a credential: %w", s.failed)
}

// valid returns the current credential if it has not expired and fits.
func (s *TokenSource) valid(now time.Time) *Credential {
	if s.current == nil || s.current.age(now) >= s.current.left || !s.cfg.Fits(s.current) {
		return nil
	}
	return s.current
}

// pausing reports whether the last failure is too fresh to try again. Whoever asks and
// has nothing waits for the shortest pause only, or as long as the broker said: what was
// refused by a lock that has been lifted since must not look refused for longer.
func (s *TokenSource) pausing(now time.Time, empty bool) bool {
	if s.failed == nil {
		return false
	}
	until := s.retryAt
	if empty && s.soonest.Before(until) {
		until = s.soonest
	}
	return now.Before(until)
}

// age is how long ago the credential was asked for, by whichever clock says more: the
// monotonic one stands still while the machine sleeps, the other may be set back.
func (c *Credential) age(now time.Time) time.Duration {
	return max(now.Sub(c.asked), now.Round(0).Sub(c.asked.Round(0)))
}

// fetch begins a flight; mu is held.
func (s *TokenSource) fetch() {
	f := &flight{done: make(chan struct{})}
	s.flight = f
	s.wg.Go(func() {
		ctx, cancel := context.WithTimeout(s.ctx, s.cfg.Timeout)
		defer cancel()
		cred, asked, err := s.fetchFit(ctx)
		s.land(f, cred, err, asked)
	})
}

// fetchFit fetches until what comes fits, within reason, and says when it was asked for.
func (s *TokenSource) fetchFit(ctx context.Context) (*Credential, time.Time, error) {
	for i := 0; ; i++ {
		asked := s.cfg.Now()
		cred, err := s.cfg.Fetch(ctx)
		switch {
		case err != nil, cred == nil, s.cfg.Fits(cred):
			return cred, asked, err
		case i == len(unfitPauses):
			return nil, asked, errUnfit
		}
		select {
		case <-time.After(unfitPauses[i]):
		case <-ctx.Done():
			return nil, asked, errUnfit
		}
	}
}

// land takes what a flight brought.
func (s *TokenSource) land(f *flight, cred *Credential, err error, asked time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.flight = nil
	now := s.cfg.Now()
	if err == nil && cred == nil {
		err = errors.New("no credential and no error")
	}
	if err == nil {
		cred = cred.dated(asked)
		if cred.age(now) >= cred.left {
			err = errors.New("the credential had expired before it arrived")
		}
	}
	switch {
	case f.discard, s.ctx.Err() != nil:
	case err != nil:
		s.failure(now, err)
	case !s.cfg.Keeps(cred):
		f.cred, s.current, s.failed, s.pause, s.passing = cred, nil, nil, 0, true
	default:
		s.current, s.failed, s.pause, s.passing = cred, nil, 0, false
		s.renewAt = time.Duration(float64(cred.left) * (RenewFrom + (RenewTo-RenewFrom)*s.cfg.Jitter()))
	}
	close(f.done)
	s.notify()
}

// dated returns the credential with its life by the local clock, which only a Client
// knows better than this.
func (c *Credential) dated(asked time.Time) *Credential {
	if !c.asked.IsZero() {
		return c
	}
	out := *c
	out.asked, out.left = asked, c.Expires.Sub(asked)
	return &out
}

func (s *TokenSource) failure(now time.Time, err error) {
	s.failed = err
	s.pause = min(max(2*s.pause, minBackoff), maxBackoff)
	wait := time.Duration(float64(s.pause) * (0.5 + s.cfg.Jitter()/2))
	least := minBackoff
	var refusal *Error
	if errors.As(err, &refusal) {
		least = max(least, min(refusal.RetryAfter(), maxRetryAfter))
	}
	wait = max(wait, least+time.Duration(float64(least-minBackoff)*s.cfg.Jitter()/4))
	s.soonest, s.retryAt = now.Add(least), now.Add(wait)
	if s.ctx.Err() == nil {
		s.cfg.Log.Warn("renewing credential", "err", err, "retry_in", wait, "still_valid", s.valid(now) != nil)
	}
}

func (s *TokenSource) notify() {
	close(s.changed)
	s.changed = make(chan struct{})
}

// Invalidate drops the credential of a grant, for whoever learns that it is revoked;
// the next Token fetches anew. The empty grant drops whatever there is, and what a fetch
// under way will bring.
func (s *TokenSource) Invalidate(grant string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.flight != nil && grant == "" {
		s.flight.discard = true
	}
	if s.current != nil && (grant == "" || grant == s.current.Grant) {
		s.current = nil
		s.notify()
	}
}

// Refused drops a credential that a service called invalid, and reports whether another
// one can be had. A service that calls each one invalid causes fetches with growing
// pauses between them.
func (s *TokenSource) Refused(cred *Credential) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.current != cred {
		return true // dropped or renewed meanwhile
	}
	age := cred.age(s.cfg.Now())
	if age > 2*maxBackoff {
		s.spared = 0
	}
	if age < s.spared {
		return false
	}
	s.spared = min(max(2*s.spared, minBackoff), maxBackoff)
	s.current = nil
	s.notify()
	return true
}

// Run keeps the credential fresh while nobody asks, until ctx ends, and then returns
// nil.
func (s *TokenSource) Run(ctx context.Context) error {
	for {
		wait, changed := s.tend()
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-s.ctx.Done():
			timer.Stop()
			return nil
		case <-changed:
			timer.Stop()
		case <-timer.C:
		}
	}
}

// tend begins a fetch if one is due, and returns how long nothing will be.
func (s *TokenSource) tend() (time.Duration, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.cfg.Now()
	switch {
	case s.ctx.Err() != nil, s.flight != nil:
	case s.pausing(now, false):
		return s.retryAt.Sub(now), s.changed
	case s.passing: // nothing to keep fresh
	case s.valid(now) != nil && s.current.age(now) < s.renewAt:
		wait := s.renewAt - s.current.age(now)
		if s.current.Binding == token.BindingX5T {
			wait = min(wait, lookEvery)
		}
		return wait, s.changed
	default:
		s.fetch()
	}
	return time.Hour, s.changed // until the flight lands
}
