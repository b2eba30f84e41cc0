package keys

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/url"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/token"
)

const (
	// DefaultRotateEvery is how long a key signs when Config.RotateEvery is zero, and
	// the longest that may be configured.
	DefaultRotateEvery = 12 * time.Hour
	// MinRotateEvery bounds how fast key records can fill the log.
	MinRotateEvery = time.Second
	// DefaultJWKSMaxAge is how long a reader may keep the JWK set when
	// Config.JWKSMaxAge is zero: as long as a revoked key may go unnoticed by those who
	// only read that.
	DefaultJWKSMaxAge = 60 * time.Second
	// MaxJWKSMaxAge is the longest that may be configured.
	MaxJWKSMaxAge = 5 * time.Minute
	// SignGrace is how long a replaced key still signs what was encoded for it: a
	// request that took its signer just before may be waiting for the disk.
	SignGrace = time.Minute

	firstRetry = 100 * time.Millisecond
	maxRetry   = 30 * time.Second
	// publishTimeout bounds one attempt, so that a publisher that hangs is retried.
	publishTimeout = time.Minute
	// lookEvery bounds the wait for what is due: a timer sleeps while the machine does,
	// and Boot doesn't.
	lookEvery = time.Minute
	// minSpreadMargin is for a JWK set that was on its way when a key was published.
	minSpreadMargin = time.Second
)

// SpreadAfter returns how long after its publication a key is in every copy of the JWK
// set that a reader may still use, where that is served with a max-age: a tenth longer,
// at least a second, for those on their way.
func SpreadAfter(maxAge time.Duration) time.Duration {
	return maxAge + max(maxAge/10, minSpreadMargin)
}

// Errors of a signer and of a rotation.
var (
	// ErrRevoked: the key was revoked; it signs nothing any more.
	ErrRevoked = errors.New("signing key is revoked")
	// ErrReplaced: the key was replaced longer than SignGrace ago; take the current one.
	ErrReplaced = errors.New("signing key was replaced")
)

// Config describes a Ring. Issuer, SVID, Publish and Boot must be set.
type Config struct {
	// Issuer is the iss of every token; the key statement names it, so that a key of
	// one broker is none of another's that shares its trust domain.
	Issuer string
	// Algorithm of new keys. Empty means ES256.
	Algorithm token.Algorithm
	// RotateEvery is how long a key signs before the next one replaces it. Zero means
	// DefaultRotateEvery; at least MinRotateEvery, at most DefaultRotateEvery.
	RotateEvery time.Duration
	// JWKSMaxAge is the max-age that the JWK set is served with: a key that is published
	// signs only once SpreadAfter that has passed, unless there is no other one. Zero
	// means DefaultJWKSMaxAge; at least a second, at most MaxJWKSMaxAge.
	JWKSMaxAge time.Duration
	// SVID returns the broker's current X.509-SVID, whose key signs the key statement.
	SVID func() (*x509svid.SVID, error)
	// Publish appends the key to the event log and returns nil once the record is
	// durable and this broker has applied it. Only then does the key sign.
	Publish func(ctx context.Context, key feed.Key) error
	// Boot is elapsed time, on a clock that runs through suspend and never jumps: what
	// rotations and the spreading of keys are measured with. Must be set.
	Boot func() feed.Instant
	// Now dates what vouches for a key. Nil means time.Now.
	Now func() time.Time
	// Log receives rotations and their failures. Nil means nothing does.
	Log *slog.Logger
}

func (c *Config) validate() error {
	var errs []error
	if u, err := url.Parse(c.Issuer); err != nil || u.Scheme == "" || u.Host == "" {
		errs = append(errs, fmt.Errorf("issuer %q is not an absolute URL", c.Issuer))
	}
	if !c.Algorithm.Valid() {
		errs = append(errs, fmt.Errorf("algorithm %q is none of %s, %s and %s", c.Algorithm, token.ES256, token.EdDSA, token.RS256))
	}
	if c.RotateEvery < MinRotateEvery || c.RotateEvery > DefaultRotateEvery {
		errs = append(errs, fmt.Errorf("key rotation every %v: at least %v, at most %v", c.RotateEvery, MinRotateEvery, DefaultRotateEvery))
	}
	if c.JWKSMaxAge < time.Second || c.JWKSMaxAge > MaxJWKSMaxAge {
		errs = append(errs, fmt.Errorf("max-age %v of the JWK set: at least 1s, at most %v", c.JWKSMaxAge, MaxJWKSMaxAge))
	}
	if c.SVID == nil {
		errs = append(errs, errors.New("no source of the broker's SVID"))
	}
	if c.Publish == nil {
		errs = append(errs, errors.New("no way to publish a key"))
	}
	if c.Boot == nil {
		errs = append(errs, errors.New("no clock of elapsed time"))
	}
	return errors.Join(errs...)
}

// A Ring holds the signing keys of one broker process. Its methods may be called at
// once from any goroutine.
type Ring struct {
	cfg Config
	// spread is how long a key is published before it is in every copy of the JWK set.
	spread time.Duration
	// wake tells Run to look at once at what is due.
	wake chan struct{}
	// rotating is held by the one rotation under way; a channel, so that waiting for
	// it ends with the context.
	rotating chan struct{}

	mu      sync.RWMutex
	current *signingKey
	next    *signingKey                 // published, and signs nothing before it has spread
	own     map[token.KeyID]*signingKey // every key of this process that may sign, now or later
}

// signingKey is one key of this process. All but public are guarded by Ring.mu.
type signingKey struct {
	public    token.PublicKey
	private   crypto.Signer // nil once it may sign nothing any more
	revoked   bool
	published feed.Instant // when its record was known to be durable and applied
	since     feed.Instant // when it became current
	retired   bool         // another one is current in its place
	until     feed.Instant // when that was
	// vouched is the chain of the SVID that vouches for it, good at vouchedAt.
	vouched   []*x509.Certificate
	vouchedAt time.Time
	outdated  bool // another authority is behind the SVID now
}

// New checks the configuration. The ring is empty until Run or Rotate.
func New(cfg Config) (*Ring, error) {
	if cfg.Algorithm == "" {
		cfg.Algorithm = token.ES256
	}
	if cfg.RotateEvery == 0 {
		cfg.RotateEvery = DefaultRotateEvery
	}
	if cfg.JWKSMaxAge == 0 {
		cfg.JWKSMaxAge = DefaultJWKSMaxAge
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if err := cfg.validate(); err != nil {
		return nil, fmt.Errorf("configuring signing keys: %w", err)
	}
	return &Ring{
		cfg:      cfg,
		spread:   SpreadAfter(cfg.JWKSMaxAge),
		wake:     make(chan struct{}, 1),
		rotating: make(chan struct{}, 1),
		own:      map[token.KeyID]*signingKey{},
	}, nil
}

// Run makes the first key at once unless Rotate already has. It publishes the next one so
// early that it has spread when RotateEvery has passed, and at once when SVIDChanged asks;
// meanwhile the old one signs. When the current one is revoked there is nothing to wait
// with: the new one signs as soon as it is published. A rotation that fails is tried again,
// more and more rarely. It returns ctx.Err() when ctx ends.
func (r *Ring) Run(ctx context.Context) error {
	retry := firstRetry
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-timer.C:
		case <-r.wake:
		}
		do, wait := r.due()
		if do != nil {
			err := do(ctx)
			switch {
			case err == nil:
				wait, retry = 0, firstRetry
			case ctx.Err() == nil:
				r.cfg.Log.ErrorContext(ctx, "rotating the signing key failed; it will be tried again", "error", err, "retry_in", retry)
				wait, retry = retry, min(2*retry, maxRetry)
			}
		}
		timer.Reset(min(wait, lookEvery))
	}
}

// due returns what is to be done now, or how long nothing is.
func (r *Ring) due() (do func(context.Context) error, wait time.Duration) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	now := r.cfg.Boot()
	k := r.current
	switch {
	case k == nil:
		return r.Rotate, 0
	case r.next != nil:
		if wait = r.spreadIn(r.next, now); wait <= 0 {
			return r.promote, 0
		}
	case k.outdated:
		return r.publishNext, 0
	default:
		if wait = k.since.Add(r.cfg.RotateEvery - r.spread).Sub(now); wait <= 0 {
			return r.publishNext, 0
		}
	}
	return nil, wait
}

// spreadIn is how long a key must still be published before every copy of the JWK set
// that may be in use has it.
func (r *Ring) spreadIn(k *signingKey, now feed.Instant) time.Duration {
	return k.published.Add(r.spread).Sub(now)
}

// Rotate makes a key, publishes it, and then makes it the current one at once: for the
// first key, and where the current one may sign no more. On an error the old key, if there
// is one, goes on signing. The new one is forgotten then, even if its record did reach the
// log: a published key that never signs does no harm.
func (r *Ring) Rotate(ctx context.Context) error {
	return r.publish(ctx, func(k *signingKey) error {
		r.drop(r.next)
		r.install(k)
		return nil
	})
}

// publishNext publishes the key that becomes the current one when it has spread.
func (r *Ring) publishNext(ctx context.Context) error {
	return r.publish(ctx, func(k *signingKey) error {
		if k.outdated {
			r.drop(k)
			return fmt.Errorf("publishing key %s: another authority is behind the broker's SVID by now", k.public.ID)
		}
		r.drop(r.next)
		r.next = k
		return nil
	})
}

// promote makes the next key the current one, unless it was revoked or replaced meanwhile.
func (r *Ring) promote(context.Context) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if k := r.next; k != nil && r.spreadIn(k, r.cfg.Boot()) <= 0 {
		r.next = nil
		r.install(k)
	}
	return nil
}

// publish makes a key and publishes it. What then becomes of it is the caller's business,
// who holds mu while use runs.
func (r *Ring) publish(ctx context.Context, use func(*signingKey) error) error {
	select {
	case r.rotating <- struct{}{}:
		defer func() { <-r.rotating }()
	case <-ctx.Done():
		return ctx.Err()
	}
	k, err := generate(r.cfg.Algorithm)
	if err != nil {
		return fmt.Errorf("making a signing key: %w", err)
	}
	svid, err := r.cfg.SVID()
	if err != nil {
		return fmt.Errorf("vouching for a signing key: getting the broker's SVID: %w", err)
	}
	k.vouched, k.vouchedAt = svid.Certificates, r.cfg.Now()
	record, err := r.vouch(k.public, svid)
	if err != nil {
		return fmt.Errorf("vouching for a signing key: %w", err)
	}
	// Known before it is published, so that a revocation that follows its record at
	// once finds it.
	r.track(k)
	ctx, cancel := context.WithTimeout(ctx, publishTimeout)
	defer cancel()
	err = r.cfg.Publish(ctx, record)
	r.mu.Lock()
	defer r.mu.Unlock()
	if err != nil {
		r.drop(k)
		return fmt.Errorf("publishing a signing key: %w", err)
	}
	if k.revoked {
		r.drop(k)
		return fmt.Errorf("installing key %s: %w", k.public.ID, ErrRevoked)
	}
	k.published = r.cfg.Boot()
	r.cfg.Log.InfoContext(ctx, "signing key published", "kid", k.public.ID.String(), "algorithm", string(k.public.Algorithm))
	return use(k)
}

func (r *Ring) track(k *signingKey) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.own[k.public.ID] = k
}

// drop forgets a key that is not to sign; mu is held.
func (r *Ring) drop(k *signingKey) {
	if k == nil {
		return
	}
	k.private = nil
	delete(r.own, k.public.ID)
	if r.next == k {
		r.next = nil
	}
}

// install makes a published key the current one; mu is held.
func (r *Ring) install(k *signingKey) {
	now := r.cfg.Boot()
	if r.current != nil {
		r.current.retired, r.current.until = true, now
	}
	r.current, k.since = k, now
	for _, old := range r.own {
		if old.retired && now.Sub(old.until) > SignGrace {
			r.drop(old)
		}
	}
	r.cfg.Log.Info("signing key rotated", "kid", k.public.ID.String(), "spread_in", max(0, r.spreadIn(k, now)))
}

// Current returns the signer for new tokens. It reports false before the first key
// is published, and from a revocation of the current key until another one is.
func (r *Ring) Current() (Signer, bool) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	k := r.current
	if k == nil {
		return Signer{}, false
	}
	return Signer{
		Public:   k.public,
		SpreadIn: max(0, r.spreadIn(k, r.cfg.Boot())),
		Sign:     func(u token.Unsigned) (token.Secret, error) { return r.sign(k, u) },
	}, true
}

// sign leaves the private half here: a Signer that was handed out can be stopped.
func (r *Ring) sign(k *signingKey, u token.Unsigned) (token.Secret, error) {
	r.mu.RLock()
	private, revoked, retired, until := k.private, k.revoked, k.retired, k.until
	r.mu.RUnlock()
	switch {
	case revoked:
		return token.Secret{}, fmt.Errorf("key %s: %w", k.public.ID, ErrRevoked)
	case private == nil, retired && r.cfg.Boot().Sub(until) > SignGrace:
		return token.Secret{}, fmt.Errorf("key %s: %w", k.public.ID, ErrReplaced)
	}
	return u.Sign(private)
}

// Own returns the keys of this process that may sign, now or later.
func (r *Ring) Own() []token.KeyID {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return slices.Collect(maps.Keys(r.own))
}

// Revoked says that a key was revoked. If it is one of this ring's it signs nothing
// from now on; if it is the current one, Run publishes another at once, born after that:
// what took the current key from this process may have taken the next one too. Call it for
// every revocation of a key, whoever's it is; it reports whether that was one of this ring's
// and is news.
func (r *Ring) Revoked(id token.KeyID) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	k, ok := r.own[id]
	if !ok || k.revoked {
		return false
	}
	k.revoked, k.private = true, nil
	switch k {
	case r.current:
		k.retired, k.until = true, r.cfg.Boot()
		r.current = nil
		r.drop(r.next)
	case r.next:
		r.drop(k)
	}
	r.rouse()
	return true
}

// rouse makes Run look at what is due.
func (r *Ring) rouse() {
	select {
	case r.wake <- struct{}{}:
	default: // Run has yet to look at the last time
	}
}

// SVIDChanged says that the broker's SVID or the bundles may have changed. If another
// authority is behind the SVID than behind the record of a key, Run replaces that key: the
// current one signs until the new one has spread. An authority leaves the bundle long after
// it has issued its last SVID; by then every token of the old key has expired, and a
// restart, which finds that nobody vouches for that key any more, takes nothing from anyone.
func (r *Ring) SVIDChanged(bundles x509bundle.Source) {
	svid, err := r.cfg.SVID()
	if err != nil {
		return
	}
	now := authorities(svid.Certificates, bundles, r.cfg.Now())
	if len(now) == 0 { // the old key is as good as a new one
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, k := range r.own {
		if k.retired || k.outdated {
			continue
		}
		then := authorities(k.vouched, bundles, k.vouchedAt)
		if slices.ContainsFunc(now, func(a *x509.Certificate) bool { return slices.ContainsFunc(then, a.Equal) }) {
			continue
		}
		k.outdated = true
		if k == r.next {
			r.drop(k)
		}
		r.cfg.Log.Info("another authority is behind the broker's SVID; making a new signing key", "kid", k.public.ID.String())
		r.rouse()
	}
}

// authorities are the certificates of the bundle that a chain ends at.
func authorities(chain []*x509.Certificate, bundles x509bundle.Source, at time.Time) []*x509.Certificate {
	_, found, err := x509svid.Verify(chain, bundles, x509svid.WithTime(at))
	if err != nil {
		return nil
	}
	var out []*x509.Certificate
	for _, c := range found {
		out = append(out, c[len(c)-1])
	}
	return out
}
