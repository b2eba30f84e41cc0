package keys

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
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
	// SignGrace is how long a replaced key still signs what was encoded for it: a
	// request that took its signer just before may be waiting for the disk.
	SignGrace = time.Minute

	firstRetry = 100 * time.Millisecond
	maxRetry   = 30 * time.Second
	// publishTimeout bounds one attempt, so that a publisher that hangs is retried.
	publishTimeout = time.Minute
)

// Errors of a signer and of a rotation.
var (
	// ErrRevoked: the key was revoked; it signs nothing any more.
	ErrRevoked = errors.New("signing key is revoked")
	// ErrReplaced: the key was replaced longer than SignGrace ago; take the current one.
	ErrReplaced = errors.New("signing key was replaced")
)

// Config describes a Ring. Issuer, SVID and Publish must be set.
type Config struct {
	// Issuer is the iss of every token; the key statement names it, so that a key of
	// one broker is none of another's that shares its trust domain.
	Issuer string
	// Algorithm of new keys. Empty means ES256.
	Algorithm token.Algorithm
	// RotateEvery is how long a key signs before the next one replaces it. Zero means
	// DefaultRotateEvery; at least MinRotateEvery, at most DefaultRotateEvery.
	RotateEvery time.Duration
	// SVID returns the broker's current X.509-SVID, whose key signs the key statement.
	SVID func() (*x509svid.SVID, error)
	// Publish appends the key to the event log and returns nil once the record is
	// durable and this broker has applied it. Only then does the key sign.
	Publish func(ctx context.Context, key feed.Key) error
	// Now dates replacements. Nil means time.Now.
	Now func() time.Time
	// Log receives rotations and their failures. Nil means nothing does.
	Log *slog.Logger
}

func (c *Config) validate() error {
	var errs []error
	if u, err := url.Parse(c.Issuer); err != nil || u.Scheme == "" || u.Host == "" {
		errs = append(errs, fmt.Errorf("issuer %q is not an absolute URL", c.Issuer))
	}
	if c.Algorithm != token.ES256 && c.Algorithm != token.EdDSA {
		errs = append(errs, fmt.Errorf("algorithm %q is neither %s nor %s", c.Algorithm, token.ES256, token.EdDSA))
	}
	if c.RotateEvery < MinRotateEvery || c.RotateEvery > DefaultRotateEvery {
		errs = append(errs, fmt.Errorf("key rotation every %v: at least %v, at most %v", c.RotateEvery, MinRotateEvery, DefaultRotateEvery))
	}
	if c.SVID == nil {
		errs = append(errs, errors.New("no source of the broker's SVID"))
	}
	if c.Publish == nil {
		errs = append(errs, errors.New("no way to publish a key"))
	}
	return errors.Join(errs...)
}

// A Ring holds the signing keys of one broker process. Its methods may be called at
// once from any goroutine.
type Ring struct {
	cfg Config
	// wake tells Run that the current key is gone.
	wake chan struct{}
	// rotating is held by the one rotation under way; a channel, so that waiting for
	// it ends with the context.
	rotating chan struct{}

	mu      sync.RWMutex
	current *signingKey
	own     map[token.KeyID]*signingKey // every key of this process that may still sign
}

// signingKey is one key of this process. All but public are guarded by Ring.mu.
type signingKey struct {
	public   token.PublicKey
	private  crypto.Signer // nil once it may sign nothing any more
	revoked  bool
	replaced time.Time // zero while it is pending or current
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
		wake:     make(chan struct{}, 1),
		rotating: make(chan struct{}, 1),
		own:      map[token.KeyID]*signingKey{},
	}, nil
}

// Run makes the first key at once unless Rotate already has, and another one
// whenever RotateEvery has passed, the current one was revoked, or SVIDChanged asks. A rotation that
// fails is tried again, more and more rarely; the old key signs meanwhile. It returns
// ctx.Err() when ctx ends.
func (r *Ring) Run(ctx context.Context) error {
	var wait time.Duration
	if _, ok := r.Current(); ok {
		wait = r.cfg.RotateEvery
	}
	retry := firstRetry
	timer := time.NewTimer(wait)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-timer.C:
		case <-r.wake:
			if r.fresh() {
				continue // somebody else has rotated since
			}
		}
		if err := r.Rotate(ctx); err == nil {
			wait, retry = r.cfg.RotateEvery, firstRetry
		} else if ctx.Err() == nil {
			r.cfg.Log.ErrorContext(ctx, "rotating the signing key failed; it will be tried again", "error", err, "retry_in", retry)
			wait, retry = retry, min(2*retry, maxRetry)
		}
		timer.Reset(wait)
	}
}

// Rotate makes a key, publishes it, and then makes it the current one. On an error
// the old key, if there is one, goes on signing. The new one is forgotten then, even
// if its record did reach the log: a published key that never signs does no harm.
func (r *Ring) Rotate(ctx context.Context) error {
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
	if err := r.cfg.Publish(ctx, record); err != nil {
		r.forget(k)
		return fmt.Errorf("publishing a signing key: %w", err)
	}
	if err := r.install(k); err != nil {
		return err
	}
	r.cfg.Log.InfoContext(ctx, "signing key rotated", "kid", k.public.ID.String(), "algorithm", string(k.public.Algorithm))
	return nil
}

func (r *Ring) track(k *signingKey) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.own[k.public.ID] = k
}

func (r *Ring) forget(k *signingKey) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.own, k.public.ID)
}

func (r *Ring) install(k *signingKey) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if k.revoked {
		return fmt.Errorf("installing key %s: %w", k.public.ID, ErrRevoked)
	}
	now := r.cfg.Now()
	if r.current != nil {
		r.current.replaced = now
	}
	r.current = k
	for id, old := range r.own {
		if !old.replaced.IsZero() && now.Sub(old.replaced) > SignGrace {
			old.private = nil
			delete(r.own, id)
		}
	}
	return nil
}

// Current returns the signer for new tokens. It reports false before the first key
// is published, and from a revocation of the current key until another one is.
func (r *Ring) Current() (Signer, bool) {
	r.mu.RLock()
	k := r.current
	r.mu.RUnlock()
	if k == nil {
		return Signer{}, false
	}
	return Signer{
		Public: k.public,
		Sign:   func(u token.Unsigned) (token.Secret, error) { return r.sign(k, u) },
	}, true
}

// sign leaves the private half here: a Signer that was handed out can be stopped.
func (r *Ring) sign(k *signingKey, u token.Unsigned) (token.Secret, error) {
	r.mu.RLock()
	private, revoked, replaced := k.private, k.revoked, k.replaced
	r.mu.RUnlock()
	switch {
	case revoked:
		return token.Secret{}, fmt.Errorf("key %s: %w", k.public.ID, ErrRevoked)
	case private == nil, !replaced.IsZero() && r.cfg.Now().Sub(replaced) > SignGrace:
		return token.Secret{}, fmt.Errorf("key %s: %w", k.public.ID, ErrReplaced)
	}
	return u.Sign(private)
}

// Revoked says that a key was revoked. If it is one of this ring's it signs nothing
// from now on; if it is the current one, Run publishes another at once. Call it for
// every revocation of a key, whoever's it is.
func (r *Ring) Revoked(id token.KeyID) {
	r.mu.Lock()
	defer r.mu.Unlock()
	k, ok := r.own[id]
	if !ok {
		return
	}
	k.revoked, k.private = true, nil
	if r.current != k {
		return
	}
	k.replaced = r.cfg.Now()
	r.current = nil
	r.rouse()
}

// rouse makes Run look at the current key.
func (r *Ring) rouse() {
	select {
	case r.wake <- struct{}{}:
	default: // Run has yet to look at the last time
	}
}

func (r *Ring) fresh() bool {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.current != nil && !r.current.outdated
}

// SVIDChanged says that the broker's SVID or the bundles may have changed. If another
// authority is behind the SVID than behind the record of the current key, Run publishes a
// new key at once. An authority leaves the bundle long after it has issued its last
// SVID; by then every token of the old key has expired, and a restart, which finds that
// nobody vouches for that key any more, takes nothing from anyone.
func (r *Ring) SVIDChanged(bundles x509bundle.Source) {
	svid, err := r.cfg.SVID()
	if err != nil {
		return
	}
	now := authorities(svid.Certificates, bundles, r.cfg.Now())
	r.mu.Lock()
	defer r.mu.Unlock()
	k := r.current
	if k == nil || k.outdated || len(now) == 0 { // none: the old key is as good as a new one
		return
	}
	then := authorities(k.vouched, bundles, k.vouchedAt)
	if slices.ContainsFunc(now, func(a *x509.Certificate) bool { return slices.ContainsFunc(then, a.Equal) }) {
		return
	}
	k.outdated = true
	r.cfg.Log.Info("another authority is behind the broker's SVID; making a new signing key", "kid", k.public.ID.String())
	r.rouse()
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
