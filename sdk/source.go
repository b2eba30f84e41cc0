package sdk

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/dayflyhq/dayfly/proto/boottime"
	"github.com/dayflyhq/dayfly/proto/feed"
)

// When a credential is renewed and how failures are spaced.
const (
	// RenewFrom and RenewTo are between which fractions of a credential's life it is
	// renewed, at random: a fleet started together doesn't ask together.
	RenewFrom = 0.60
	RenewTo   = 0.75

	minBackoff = 500 * time.Millisecond
	maxBackoff = 15 * time.Second
	// pauseParts keeps pauses short beside a short life: a twentieth of it at the longest.
	pauseParts = 20
	// maxRetryAfter is the longest pause that a broker's retry_after makes: limits are
	// raised, and revoked credentials make room, before that is over.
	maxRetryAfter = time.Minute
	// lookEvery is how often Run looks at the clocks and at the SVID: timers sleep with the
	// machine, and nothing tells of a clock that was set or of a rotation.
	lookEvery = time.Second
	// revokedSpread is within which a fleet that heard of a revocation fetches anew, where
	// nobody waits.
	revokedSpread = 3 * time.Second
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

	// Unfit is what is said where none that comes fits. Nil says what it means where only
	// certificates are looked at.
	Unfit error

	// Keeps reports whether a credential may be given out from memory. One that may not
	// goes to those who wait for it, and the next Token fetches anew. Nil means that each
	// may.
	Keeps func(*Credential) bool

	// RenewFrom and RenewTo are between which fractions of its life a credential is renewed,
	// at random. Zero means the constants of these names.
	RenewFrom, RenewTo float64

	// Timeout bounds one Fetch. Zero means DefaultTimeout.
	Timeout time.Duration

	// Now is the clock that credentials are aged with. Nil means time.Now.
	Now func() time.Time

	// Boot is the elapsed time that a credential's life is measured with: it runs while the
	// machine sleeps, and nobody sets it. Nil means CLOCK_BOOTTIME.
	Boot func() feed.Instant

	// Jitter returns a number in [0, 1). Nil means math/rand: it spreads load and
	// protects nothing.
	Jitter func() float64

	// Looked says that whoever has many sources calls Look when a clock was set, the machine
	// has slept, or what Fits answers may have changed. Else Run looks every second.
	Looked bool

	// Landed is called after each fetch, once Token and Status answer by it. It must be
	// quick. Nil: nobody is.
	Landed func()

	// Log hears of failed renewals. Nil means nobody does.
	Log *slog.Logger
}

// A TokenSource keeps one credential fresh and gives it out from memory. It renews at a
// random point of 60 to 75 % of its life, one fetch at a time whoever asks; while
// fetching fails it serves what is still valid and tries again with growing pauses; an
// expired credential is never given out, nor one that is bound to a certificate which has
// been rotated since: another one is fetched, which whoever asks waits for.
//
// A wall clock that is set forward, or one that tells of a sleep which CLOCK_BOOTTIME
// doesn't know of (a virtual machine's), makes it renew at once; what has expired by that
// clock alone is given out only once that has failed. One that is set back changes nothing.
//
// Renewal begins when somebody asks; Run renews also while nobody does. Its methods may
// be called from any goroutine.
type TokenSource struct {
	cfg    SourceConfig
	now    func() moment
	ctx    context.Context // ends with Close; what fetches run under
	cancel context.CancelFunc

	mu      sync.Mutex
	current *Credential
	renewAt time.Duration // age of the current credential at which it is renewed
	flight  *flight       // nil while none
	failed  error         // of the last fetch, nil after a success
	at      moment        // of that failure
	since   time.Time     // of the first failure in a row
	fails   int           // how many they are
	retry   time.Duration // not before, after the failure
	soonest time.Duration // not before, for whoever has nothing
	pause   time.Duration
	life    time.Duration // that the newest credential had
	revoked moment        // when Revoked dropped what there was,
	spread  time.Duration // and how long Run leaves it at that
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
	if cfg.Unfit == nil {
		cfg.Unfit = errUnfit
	}
	if cfg.Keeps == nil {
		cfg.Keeps = all
	}
	if cfg.Landed == nil {
		cfg.Landed = func() {}
	}
	if cfg.RenewFrom == 0 && cfg.RenewTo == 0 {
		cfg.RenewFrom, cfg.RenewTo = RenewFrom, RenewTo
	}
	if cfg.RenewFrom <= 0 || cfg.RenewTo < cfg.RenewFrom || cfg.RenewTo >= 1 {
		return nil, errors.New("configuring token source: it renews at fractions of a credential's life, in order")
	}
	if cfg.Timeout <= 0 {
		cfg.Timeout = DefaultTimeout
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Boot == nil {
		cfg.Boot = boottime.Now
	}
	if cfg.Jitter == nil {
		cfg.Jitter = rand.Float64
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	s := &TokenSource{cfg: cfg, changed: make(chan struct{})}
	s.now = func() moment { return readClocks(cfg.Now, cfg.Boot) }
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
		Boot:    c.cfg.Boot,
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
			if cred != nil {
				return cred, nil
			}
			return nil, fmt.Errorf("waiting for a credential: %w", ctx.Err())
		}
	}
}

// take returns a valid credential, or an error, or the flight to wait for; with a flight,
// what there is in case that fails.
func (s *TokenSource) take() (*Credential, *flight, error) {
	now := s.now() // outside of the lock that all callers share
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ctx.Err() != nil {
		return nil, nil, errors.New("the token source is closed")
	}
	cred := s.valid(now)
	if cred != nil && now.apart(cred.asked) < s.renewAt {
		return cred, nil, nil
	}
	if s.flight == nil && !s.pausing(now, cred == nil) {
		s.fetch()
	}
	switch {
	case cred != nil && (s.flight == nil || now.apart(cred.asked) < cred.left):
		return cred, nil, nil
	case s.flight != nil:
		return cred, s.flight, nil
	}
	return nil, nil, fmt.Errorf("fetching a credential: %w", s.failed)
}

// valid returns the current credential if it has not expired and fits.
func (s *TokenSource) valid(now moment) *Credential {
	if s.current == nil || now.since(s.current.asked) >= s.current.left || !s.cfg.Fits(s.current) {
		return nil
	}
	return s.current
}

// pausing reports whether the last failure is too fresh to try again. Whoever asks and
// has nothing waits for the shortest pause only, or as long as the broker said: what was
// refused by a lock that has been lifted since must not look refused for longer.
func (s *TokenSource) pausing(now moment, empty bool) bool {
	if s.failed == nil {
		return false
	}
	pause := s.retry
	if empty {
		pause = min(pause, s.soonest)
	}
	return now.apart(s.at) < pause
}

// A moment is read from all clocks at once.
type moment struct {
	time time.Time // with the monotonic clock, which stands still while the machine sleeps
	wall time.Time // without, so that what it says is told even if it was set
	boot feed.Instant
}

func readClocks(now func() time.Time, boot func() feed.Instant) moment {
	t := now()
	return moment{t, t.Round(0), boot()}
}

// since is how long ago a moment was by the clocks that nobody sets.
func (m moment) since(then moment) time.Duration {
	return max(m.time.Sub(then.time), m.boot.Sub(then.boot))
}

// apart is how long ago a moment was by whichever clock says most.
func (m moment) apart(then moment) time.Duration {
	return max(m.since(then), m.wall.Sub(then.wall))
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
		s.cfg.Landed()
	})
}

// fetchFit fetches until what comes fits, within reason, and says when it was asked for.
func (s *TokenSource) fetchFit(ctx context.Context) (*Credential, moment, error) {
	for i := 0; ; i++ {
		asked := s.now()
		cred, err := s.cfg.Fetch(ctx)
		switch {
		case err != nil, cred == nil, s.cfg.Fits(cred):
			return cred, asked, err
		case i == len(unfitPauses):
			return nil, asked, s.cfg.Unfit
		}
		select {
		case <-time.After(unfitPauses[i]):
		case <-ctx.Done():
			return nil, asked, s.cfg.Unfit
		}
	}
}

// land takes what a flight brought.
func (s *TokenSource) land(f *flight, cred *Credential, err error, asked moment) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.flight = nil
	now := s.now()
	if err == nil && cred == nil {
		err = errors.New("no credential and no error")
	}
	if err == nil {
		cred = cred.dated(asked)
		if now.since(cred.asked) >= cred.left {
			err = errors.New("the credential had expired before it arrived")
		}
	}
	switch {
	case f.discard, s.ctx.Err() != nil:
	case err != nil:
		s.failure(now, err)
	case !s.cfg.Keeps(cred):
		s.succeeded()
		f.cred, s.current, s.passing = cred, nil, true
	default:
		s.succeeded()
		s.current, s.passing, s.life = cred, false, cred.left
		s.renewAt = time.Duration(float64(cred.left) * (s.cfg.RenewFrom + (s.cfg.RenewTo-s.cfg.RenewFrom)*s.cfg.Jitter()))
	}
	close(f.done)
	s.notify()
}

// dated returns the credential with its life by the local clock, which only a Client
// knows better than this.
func (c *Credential) dated(asked moment) *Credential {
	if !c.asked.time.IsZero() {
		return c
	}
	out := *c
	out.asked, out.left = asked, c.Expires.Sub(asked.time)
	return &out
}

func (s *TokenSource) succeeded() {
	s.failed, s.fails, s.pause, s.spread = nil, 0, 0, 0
}

func (s *TokenSource) failure(now moment, err error) {
	if s.failed == nil {
		s.since = now.time
	}
	s.failed, s.at = err, now
	s.fails++
	longest := maxBackoff
	if s.life > 0 {
		longest = min(max(s.life/pauseParts, minBackoff), maxBackoff)
	}
	s.pause = min(max(2*s.pause, minBackoff), longest)
	wait := time.Duration(float64(s.pause) * (0.5 + s.cfg.Jitter()/2))
	least := minBackoff
	var refusal *Error
	if errors.As(err, &refusal) {
		least = max(least, min(refusal.RetryAfter(), maxRetryAfter))
	}
	// Never before the hint, and not all at once after it.
	wait = max(wait, least+time.Duration(float64(max(minBackoff, least/4))*s.cfg.Jitter()))
	s.soonest, s.retry = least, wait
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

// Revoked is Invalidate for whoever learns of it together with a whole fleet: while nobody
// asks, Run waits for a moment, at random up to three seconds, so that a thousand workloads
// whose credentials one revocation kills don't ask together. Token waits for nothing.
func (s *TokenSource) Revoked(grant string) {
	s.mu.Lock()
	if s.current != nil && grant == s.current.Grant {
		s.revoked, s.spread = s.now(), time.Duration(s.cfg.Jitter()*float64(revokedSpread))
	}
	s.mu.Unlock()
	s.Invalidate(grant)
}

// Reached ends the pause after a failure, for whoever learns that what Fetch asks can be
// reached again: Run tries at once, or as soon as the failure's own hint lets it.
func (s *TokenSource) Reached() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.failed != nil && s.soonest < s.retry {
		s.retry = s.soonest
		s.notify()
	}
}

// Look has Run look at the clocks and at what fits.
func (s *TokenSource) Look() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.notify()
}

// A SourceStatus is how a TokenSource is.
type SourceStatus struct {
	// RenewIn is how long until the credential is renewed while all goes well, or until the
	// next try after a failure; zero if there is none, or if it is being fetched.
	RenewIn time.Duration
	// Err is why the last fetch failed, Since when the first of those in a row did, and
	// Failures how many they are; nil and zero after one that didn't.
	Err      error
	Since    time.Time
	Failures int
}

// Status says how the source is.
func (s *TokenSource) Status() SourceStatus {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now()
	out := SourceStatus{Err: s.failed, Failures: s.fails}
	switch {
	case s.failed != nil:
		out.Since = s.since
		out.RenewIn = max(0, s.retry-now.apart(s.at))
	case s.valid(now) != nil:
		out.RenewIn = max(0, s.renewAt-now.apart(s.current.asked))
	}
	if s.flight != nil {
		out.RenewIn = 0
	}
	return out
}

// Refused drops the credential of a grant that a service called invalid, and reports
// whether another one can be had. A service that calls each one invalid causes fetches with growing
// pauses between them.
func (s *TokenSource) Refused(grant string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.current == nil || s.current.Grant != grant {
		return true // dropped or renewed meanwhile
	}
	age := s.now().since(s.current.asked)
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
		if !s.cfg.Looked {
			wait = min(wait, lookEvery)
		}
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
	now := s.now()
	switch {
	case s.ctx.Err() != nil, s.flight != nil:
	case s.pausing(now, false):
		return s.retry - now.apart(s.at), s.changed
	case s.passing: // nothing to keep fresh
	case s.valid(now) != nil && now.apart(s.current.asked) < s.renewAt:
		return s.renewAt - now.apart(s.current.asked), s.changed
	case s.spread > now.apart(s.revoked):
		return s.spread - now.apart(s.revoked), s.changed
	default:
		s.fetch()
	}
	return time.Hour, s.changed // until the flight lands
}
