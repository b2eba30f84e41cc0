package policy

import (
	"cmp"
	"context"
	"crypto"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"github.com/open-policy-agent/opa/v1/bundle"
)

const (
	defaultPoll = time.Minute
	// MinPoll is the shortest interval at which bundles are asked for.
	MinPoll = time.Second
	// fetchTimeout bounds one fetch as a whole, a server that trickles included.
	fetchTimeout = 30 * time.Second
	// firstRetry is the wait after a first failure; it doubles up to the interval.
	firstRetry = time.Second
	// signedAhead is how far the clock of whoever signs may be ahead of ours. What is
	// signed years ahead, in milliseconds say, would keep out every bundle after it.
	signedAhead = 5 * time.Minute
)

// Bundle says where signed bundles of OPA's format are fetched from.
type Bundle struct {
	// URL of the bundle: https, or http on loopback. Redirects aren't followed.
	URL string
	// Keys verify signatures, by key ID. See ParseBundleKey.
	Keys map[string]crypto.PublicKey
	// Scope must stand in the signature; empty: it must have none.
	Scope string
	// TLS says whom to trust as the server, and who this client is; nil: the system's
	// roots.
	TLS *tls.Config
	// Poll is the mean interval between fetches; 0: a minute.
	Poll time.Duration
	// MaxSize bounds a bundle as it is fetched, in bytes; 0: 32 MiB, which is the most.
	MaxSize int64
	// Kept is the file in which the last good bundle stays, to start from while the
	// server is away. Required.
	Kept string
}

// CheckBundleURL says what is wrong with a URL to fetch bundles from.
func CheckBundleURL(s string) error {
	u, err := url.Parse(s)
	switch {
	case err != nil || u.Host == "":
		return errors.New("isn't an absolute URL, such as https://bundles.example.org/dayfly.tar.gz")
	case u.User != nil || u.Fragment != "":
		return errors.New("must have no user and no fragment")
	case u.Scheme == "https":
		return nil
	case u.Scheme == "http":
		if ip := net.ParseIP(u.Hostname()); u.Hostname() == "localhost" || ip != nil && ip.IsLoopback() {
			return nil
		}
		return errors.New("must begin with https:// (http is for loopback)")
	}
	return errors.New("must begin with https://")
}

func (b Bundle) check() error {
	var errs []error
	if err := CheckBundleURL(b.URL); err != nil {
		errs = append(errs, fmt.Errorf("policy bundle: URL %w", err))
	}
	if b.Kept == "" {
		errs = append(errs, errors.New("policy bundle: Kept is required"))
	}
	if b.Poll != 0 && b.Poll < MinPoll {
		errs = append(errs, fmt.Errorf("policy bundle: Poll is at least %v", MinPoll))
	}
	if b.MaxSize < 0 || b.MaxSize > maxFile {
		errs = append(errs, fmt.Errorf("policy bundle: MaxSize is at most %d", maxFile))
	}
	return errors.Join(errs...)
}

// bundleOrigin fetches signed bundles, and keeps the last good one on disk.
type bundleOrigin struct {
	Bundle
	verify *bundle.VerificationConfig
	client *http.Client
	log    *slog.Logger
	now    func() time.Time

	inForce *folder // without its files; nil: nothing that was fetched
	newest  signed  // that was in force, over restarts
	onDisk  signed
}

// signed is what tells one signed bundle from another.
type signed struct {
	at       int64 // the signature's iat; 0: it has none
	revision string
}

func newBundleOrigin(b Bundle, log *slog.Logger, now func() time.Time) (*bundleOrigin, error) {
	if err := b.check(); err != nil {
		return nil, err
	}
	verify, err := verification(b.Keys, b.Scope)
	if err != nil {
		return nil, err
	}
	b.Poll, b.MaxSize = cmp.Or(b.Poll, defaultPoll), cmp.Or(b.MaxSize, maxFile)
	return &bundleOrigin{
		Bundle: b, verify: verify, log: log, now: now,
		client: &http.Client{
			Transport: &http.Transport{
				Proxy:           http.ProxyFromEnvironment,
				TLSClientConfig: b.TLS,
				// A connection would outlive the SVIDs that both ends were checked by.
				DisableKeepAlives: true,
				// The bundle is compressed; what it unpacks to is bounded later.
				DisableCompression: true,
			},
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
			Timeout:       fetchTimeout,
		},
	}, nil
}

func (*bundleOrigin) trouble() string { return "policy bundle can't be renewed" }

func (s *bundleOrigin) where() slog.Attr { return slog.String("url", s.URL) }

// first reads the bundle that was kept, as strictly as one from the network, but for
// its expiry: it was in force before.
func (s *bundleOrigin) first() (*folder, error) {
	raw, err := readAtMost(s.Kept, maxFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("no bundle is kept in %s, and none was fetched yet", s.Kept)
	}
	if err != nil {
		return nil, fmt.Errorf("reading the policy bundle that was kept: %w", err)
	}
	f, err := readBundle(raw, s.verify)
	if err != nil {
		return nil, fmt.Errorf("in %s: %w", s.Kept, err)
	}
	s.newest = signed{f.fetched.signedAt, f.revision}
	s.onDisk = s.newest
	f.fetched = nil // it isn't what the server has
	s.log.Info("starting with the policy bundle that was kept", "file", s.Kept, "revision", f.revision)
	return f, nil
}

// read asks the server, and judges what it gives.
func (s *bundleOrigin) read(ctx context.Context) (*folder, error) {
	raw, etag, err := s.fetch(ctx)
	if err != nil {
		return nil, fmt.Errorf("fetching the policy bundle: %w", err)
	}
	if raw == nil {
		return s.inForce, s.timely(s.inForce)
	}
	f, err := readBundle(raw, s.verify)
	if err != nil {
		return nil, err
	}
	f.fetched.etag = etag
	return f, s.timely(f)
}

// fetch returns nothing where the server says that what is in force is what it has.
func (s *bundleOrigin) fetch(ctx context.Context) (raw []byte, etag string, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.URL, nil)
	if err != nil {
		return nil, "", err
	}
	req.Header.Set("User-Agent", "dayfly-broker")
	if s.inForce != nil && s.inForce.fetched.etag != "" {
		req.Header.Set("If-None-Match", s.inForce.fetched.etag)
	}
	resp, err := s.client.Do(req)
	if err != nil {
		return nil, "", err
	}
	defer resp.Body.Close()
	switch {
	case resp.StatusCode == http.StatusNotModified && req.Header.Get("If-None-Match") != "":
		return nil, "", nil
	case resp.StatusCode >= 300 && resp.StatusCode < 400:
		return nil, "", fmt.Errorf("the server answers %s: redirects aren't followed, give the URL of the bundle itself", resp.Status)
	case resp.StatusCode != http.StatusOK:
		return nil, "", fmt.Errorf("the server answers %s", resp.Status)
	case resp.ContentLength > s.MaxSize:
		return nil, "", fmt.Errorf("the bundle is larger than %d bytes", s.MaxSize)
	}
	if raw, err = atMost(resp.Body, s.MaxSize); err != nil {
		return nil, "", fmt.Errorf("receiving: %w", err)
	}
	return raw, resp.Header.Get("ETag"), nil
}

// timely refuses what was signed too long ago: a server, or whoever is between, could
// otherwise bring an older policy back, which is signed as well. Signatures are ordered
// by their iat, a claim that whoever signs must ask for.
func (s *bundleOrigin) timely(f *folder) error {
	now, at, expires := s.now(), f.fetched.signedAt, f.fetched.expires
	refused := func(format string, args ...any) error {
		return fmt.Errorf("policy bundle %s %s", f.revision, fmt.Sprintf(format, args...))
	}
	switch {
	case !expires.IsZero() && !now.Before(expires):
		return refused("has a signature that expired at %s", expires.Format(time.RFC3339))
	case time.Unix(at, 0).After(now.Add(signedAhead)):
		return refused("was signed in the future: iat is in seconds since 1970")
	case at < s.newest.at || at == s.newest.at && at > 0 && f.revision != s.newest.revision:
		return refused("was signed at iat %d, not after %s, which was in force and has iat %d: to go back to an older policy, sign it anew", at, s.newest.revision, s.newest.at)
	}
	return nil
}

// keep remembers what is in force, and writes it to disk once.
func (s *bundleOrigin) keep(f *folder) error {
	this := signed{f.fetched.signedAt, f.revision}
	if this.at == 0 && this != s.newest {
		s.log.Warn("the policy bundle's signature has no iat: whoever has an older bundle can bring it back", "url", s.URL, "revision", f.revision)
	}
	s.inForce, s.newest = &folder{revision: f.revision, fetched: f.fetched}, this
	if this != s.onDisk {
		if err := writeKept(s.Kept, f.fetched.raw); err != nil {
			return fmt.Errorf("the policy bundle is in force, but a restart would begin without it: %w", err)
		}
	}
	f.fetched.raw, s.onDisk = nil, this
	return nil
}

// writeKept replaces a file as a whole, durably.
func writeKept(path string, raw []byte) error {
	dir := filepath.Dir(path)
	tmp, err := os.CreateTemp(dir, "."+filepath.Base(path)+"-*") // 0600
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name()) // gone already where all went well
	_, err = tmp.Write(raw)
	if err := errors.Join(err, tmp.Sync(), tmp.Close()); err != nil {
		return err
	}
	if err := os.Rename(tmp.Name(), path); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func (s *bundleOrigin) follow(ctx context.Context, look func(context.Context) error) {
	retry := firstRetry
	for {
		wait := s.Poll
		if look(ctx) != nil {
			wait, retry = min(retry, s.Poll), min(2*retry, s.Poll)
		} else {
			retry = firstRetry
		}
		// A fleet that was started at once doesn't ask at once for ever.
		wait += time.Duration((rand.Float64() - 0.5) * float64(wait) / 2)
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
	}
}
