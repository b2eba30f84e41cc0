package spiffetest

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const (
	// DefaultSVIDTTL is the life of an X509-SVID when Config.SVIDTTL is zero.
	DefaultSVIDTTL = time.Hour
	// DefaultJWTSVIDTTL is the life of a JWT-SVID when Config.JWTSVIDTTL is zero.
	DefaultJWTSVIDTTL = 5 * time.Minute
	// DefaultBackdate is how far in the past NotBefore lies when Config.Backdate
	// is zero. It is SPIRE's figure.
	DefaultBackdate = 10 * time.Second
)

// ErrClosed is returned by what is asked of a trust domain after its Close.
var ErrClosed = errors.New("spiffetest: trust domain is closed")

// Config describes a throwaway trust domain. Only TrustDomain must be set.
type Config struct {
	// TrustDomain is its name. Required.
	TrustDomain spiffeid.TrustDomain

	// Dir holds the sockets. It is created with mode 0700 when it doesn't exist;
	// one that others can enter is refused. Keep it short: the path of a unix
	// socket has little more than 100 bytes. Empty means a temporary directory,
	// which Close removes.
	Dir string

	// SVIDTTL is how long an X509-SVID lives, counted from its issue. Zero means
	// DefaultSVIDTTL. SVIDs are replaced at half of it.
	SVIDTTL time.Duration

	// JWTSVIDTTL is how long a JWT-SVID lives. Zero means DefaultJWTSVIDTTL.
	JWTSVIDTTL time.Duration

	// Backdate is how long before its issue an X509-SVID's NotBefore lies. Zero
	// means DefaultBackdate, a negative value none at all.
	Backdate time.Duration

	// Now is the clock that certificates and tokens are dated with. Nil means
	// time.Now. Timers run on time.Now whatever Now says: with a clock of your
	// own an SVID past half of its life is replaced when it is next asked for.
	Now func() time.Time

	// Log receives what happens behind the caller's back. Nil means nothing does.
	Log *slog.Logger
}

// withDefaults returns the configuration with every zero value filled in, or all
// complaints about it in one error.
func (c Config) withDefaults() (Config, error) {
	var complaints []error
	if c.TrustDomain.IsZero() {
		complaints = append(complaints, errors.New("TrustDomain must be set"))
	}
	if c.SVIDTTL < 0 {
		complaints = append(complaints, fmt.Errorf("SVIDTTL %v is negative", c.SVIDTTL))
	}
	if c.JWTSVIDTTL < 0 {
		complaints = append(complaints, fmt.Errorf("JWTSVIDTTL %v is negative", c.JWTSVIDTTL))
	}
	if err := errors.Join(complaints...); err != nil {
		return Config{}, fmt.Errorf("spiffetest: %w", err)
	}
	if c.SVIDTTL == 0 {
		c.SVIDTTL = DefaultSVIDTTL
	}
	if c.JWTSVIDTTL == 0 {
		c.JWTSVIDTTL = DefaultJWTSVIDTTL
	}
	if c.Backdate == 0 {
		c.Backdate = DefaultBackdate
	}
	c.Backdate = max(c.Backdate, 0)
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c, nil
}

// A TrustDomain issues SVIDs and serves them. Its methods may be called from any
// goroutine.
type TrustDomain struct {
	cfg     Config
	dir     string
	ownsDir bool // dir is ours to remove

	closeOnce sync.Once
	closeErr  error
	timers    sync.WaitGroup // one for each rotation timer that may still fire

	mu            sync.Mutex
	closed        bool
	ca            *authority
	previousCA    *authority // still in the bundle, signs nothing more; nil before the first RotateCA
	jwt           *jwtAuthority
	federatedX509 map[spiffeid.TrustDomain]*x509bundle.Bundle
	federatedJWT  map[spiffeid.TrustDomain]*jwtbundle.Bundle
	identities    map[spiffeid.ID]*identity
}

// New makes a trust domain with fresh authorities. Nothing is served, and no
// goroutine runs, before the first Workload.
func New(cfg Config) (*TrustDomain, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	ca, err := newAuthority(cfg.TrustDomain, cfg.Now())
	if err != nil {
		return nil, fmt.Errorf("spiffetest: %w", err)
	}
	jwt, err := newJWTAuthority()
	if err != nil {
		return nil, fmt.Errorf("spiffetest: %w", err)
	}
	dir, owns, err := socketDir(cfg.Dir)
	if err != nil {
		return nil, fmt.Errorf("spiffetest: %w", err)
	}
	return &TrustDomain{
		cfg:           cfg,
		dir:           dir,
		ownsDir:       owns,
		ca:            ca,
		jwt:           jwt,
		federatedX509: make(map[spiffeid.TrustDomain]*x509bundle.Bundle),
		federatedJWT:  make(map[spiffeid.TrustDomain]*jwtbundle.Bundle),
		identities:    make(map[spiffeid.ID]*identity),
	}, nil
}

// socketDir returns the directory for sockets and whether Close should remove it.
// An existing directory is never changed (it might be /tmp), only refused.
func socketDir(dir string) (string, bool, error) {
	if dir == "" {
		dir, err := os.MkdirTemp("", "spiffe")
		if err != nil {
			return "", false, fmt.Errorf("creating a directory for sockets: %w", err)
		}
		return dir, true, nil
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", false, fmt.Errorf("finding the directory for sockets: %w", err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", false, fmt.Errorf("creating a directory for sockets: %w", err)
	}
	info, err := os.Stat(dir)
	if err != nil {
		return "", false, fmt.Errorf("inspecting the directory for sockets: %w", err)
	}
	if !info.IsDir() || info.Mode().Perm()&0o077 != 0 {
		return "", false, fmt.Errorf("directory for sockets %s has mode %v: whoever reaches a socket gets its identity; make it 0700 or name one that doesn't exist",
			dir, info.Mode())
	}
	return dir, false, nil
}

// Close stops every socket, waits for what was running behind them, and removes
// the directory if New made it. Calling it again does nothing and returns the
// same error.
func (td *TrustDomain) Close() error {
	td.closeOnce.Do(func() { td.closeErr = td.close() })
	return td.closeErr
}

func (td *TrustDomain) close() error {
	td.mu.Lock()
	td.closed = true
	var all []*identity
	for _, ident := range td.identities {
		td.stopTimer(ident)
		all = append(all, ident)
	}
	td.mu.Unlock()

	for _, ident := range all {
		ident.socket.stop()
	}
	td.timers.Wait()
	if !td.ownsDir {
		return nil
	}
	if err := os.RemoveAll(td.dir); err != nil {
		return fmt.Errorf("spiffetest: removing the directory for sockets: %w", err)
	}
	return nil
}

// Name returns the name of the trust domain.
func (td *TrustDomain) Name() spiffeid.TrustDomain { return td.cfg.TrustDomain }

// Dir returns the directory that holds the sockets.
func (td *TrustDomain) Dir() string { return td.dir }

// Bundle returns a copy of the X.509 authorities as they are now. For a view that
// follows RotateCA and Federate, use the TrustDomain itself: it is an
// x509bundle.Source and a jwtbundle.Source.
func (td *TrustDomain) Bundle() *x509bundle.Bundle {
	td.mu.Lock()
	defer td.mu.Unlock()
	return td.x509Bundle()
}

// JWTBundle returns a copy of the JWT authorities as they are now.
func (td *TrustDomain) JWTBundle() *jwtbundle.Bundle {
	td.mu.Lock()
	defer td.mu.Unlock()
	return td.jwt.bundle(td.cfg.TrustDomain)
}

// GetX509BundleForTrustDomain returns the authorities of this trust domain or of
// a federated one. It makes the TrustDomain an x509bundle.Source.
func (td *TrustDomain) GetX509BundleForTrustDomain(name spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	td.mu.Lock()
	defer td.mu.Unlock()
	if name == td.cfg.TrustDomain {
		return td.x509Bundle(), nil
	}
	if b, ok := td.federatedX509[name]; ok {
		return b.Clone(), nil
	}
	return nil, fmt.Errorf("spiffetest: no X.509 bundle for trust domain %q", name)
}

// GetJWTBundleForTrustDomain returns the JWT authorities of this trust domain or
// of a federated one. It makes the TrustDomain a jwtbundle.Source.
func (td *TrustDomain) GetJWTBundleForTrustDomain(name spiffeid.TrustDomain) (*jwtbundle.Bundle, error) {
	td.mu.Lock()
	defer td.mu.Unlock()
	if name == td.cfg.TrustDomain {
		return td.jwt.bundle(name), nil
	}
	if b, ok := td.federatedJWT[name]; ok {
		return b.Clone(), nil
	}
	return nil, fmt.Errorf("spiffetest: no JWT bundle for trust domain %q", name)
}

// x509Bundle needs td.mu.
func (td *TrustDomain) x509Bundle() *x509bundle.Bundle {
	b := x509bundle.New(td.cfg.TrustDomain)
	b.AddX509Authority(td.ca.cert)
	if td.previousCA != nil {
		b.AddX509Authority(td.previousCA.cert)
	}
	return b
}

// RotateCA replaces the X.509 authority and every SVID, and pushes both. The
// authority before it stays in the bundle, so that SVIDs already handed out
// still verify; the one before that leaves it. So calling RotateCA twice ends
// the trust in everything issued earlier.
func (td *TrustDomain) RotateCA() error {
	td.mu.Lock()
	defer td.mu.Unlock()
	if td.closed {
		return ErrClosed
	}
	ca, err := newAuthority(td.cfg.TrustDomain, td.cfg.Now())
	if err != nil {
		return fmt.Errorf("spiffetest: rotating the authority: %w", err)
	}
	td.previousCA, td.ca = td.ca, ca
	for _, ident := range td.identities {
		if err := td.rotate(ident); err != nil {
			return err
		}
	}
	return nil
}

// Federate adds the X.509 authorities of another trust domain to what the
// Workload API answers, or replaces them, and pushes the change.
func (td *TrustDomain) Federate(bundle *x509bundle.Bundle) error {
	return td.changeBundles(bundle.TrustDomain(), func() {
		td.federatedX509[bundle.TrustDomain()] = bundle.Clone()
	})
}

// FederateJWT is Federate for JWT authorities.
func (td *TrustDomain) FederateJWT(bundle *jwtbundle.Bundle) error {
	return td.changeBundles(bundle.TrustDomain(), func() {
		td.federatedJWT[bundle.TrustDomain()] = bundle.Clone()
	})
}

// Unfederate removes both kinds of authorities of another trust domain from what
// the Workload API answers, and pushes the change. Removing what isn't there is
// no error.
func (td *TrustDomain) Unfederate(name spiffeid.TrustDomain) error {
	return td.changeBundles(name, func() {
		delete(td.federatedX509, name)
		delete(td.federatedJWT, name)
	})
}

// changeBundles makes a change to the bundles of another trust domain and tells
// every open stream.
func (td *TrustDomain) changeBundles(other spiffeid.TrustDomain, change func()) error {
	td.mu.Lock()
	defer td.mu.Unlock()
	switch {
	case td.closed:
		return ErrClosed
	case other == td.cfg.TrustDomain:
		return fmt.Errorf("spiffetest: a trust domain can't be federated with itself (%s)", other)
	}
	change()
	for _, ident := range td.identities {
		ident.announce()
	}
	return nil
}

// Identities returns the identities known so far, sorted.
func (td *TrustDomain) Identities() []spiffeid.ID {
	td.mu.Lock()
	defer td.mu.Unlock()
	ids := make([]spiffeid.ID, 0, len(td.identities))
	for id := range td.identities {
		ids = append(ids, id)
	}
	slices.SortFunc(ids, func(a, b spiffeid.ID) int {
		return strings.Compare(a.String(), b.String())
	})
	return ids
}

// TB is the part of testing.TB that ForTest needs; it is declared here so that a
// program using this package doesn't link package testing.
type TB interface {
	Helper()
	Errorf(format string, args ...any)
	Fatalf(format string, args ...any)
	Cleanup(func())
}

// ForTest is New for tests: it fails the test when New does, and closes the
// trust domain at its end.
func ForTest(tb TB, cfg Config) *TrustDomain {
	tb.Helper()
	td, err := New(cfg)
	if err != nil {
		tb.Fatalf("making a trust domain: %v", err)
	}
	tb.Cleanup(func() {
		if err := td.Close(); err != nil {
			tb.Errorf("closing the trust domain: %v", err)
		}
	})
	return td
}
