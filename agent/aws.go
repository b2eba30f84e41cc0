package agent

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/dayflyhq/dayfly/agent/deliver"
	"github.com/dayflyhq/dayfly/agent/sts"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk"
	"golang.org/x/sync/singleflight"
	"google.golang.org/grpc/codes"
)

const (
	// AWSPath is where AWS's SDKs find the session.
	AWSPath = "/v1/credentials"
	// awsRotate is how often the authorization token changes; the one before is taken
	// for awsGrace, by whoever read the file just before.
	awsRotate = time.Hour
	awsGrace  = time.Minute
	// awsMargin is how long before its end a session is renewed, where it is long
	// enough: more than AWS's own clients want to have left.
	awsMargin = 16 * time.Minute
	// awsTimeout bounds a token and a trade.
	awsTimeout = 20 * time.Second
)

// AWSContainer is where AWS's SDKs find a session of a role: their container endpoint.
type AWSContainer struct {
	// Listener is a loopback TCP socket. The agent closes it.
	Listener net.Listener
	// Request is the token to trade.
	Request Request
	// Role is what for.
	Role sts.Role
	// TokenFile is where the agent writes what callers must send as Authorization; it
	// changes every hour and goes when the agent stops.
	TokenFile deliver.Secret
}

func (c *AWSContainer) validate() error {
	if c == nil {
		return nil
	}
	errs := []error{c.Request.normalize(), c.Role.Validate()}
	if addr, ok := c.Listener.Addr().(*net.TCPAddr); !ok || !addr.IP.IsLoopback() {
		errs = append(errs, errors.New("listener: must be on loopback"))
	}
	if err := c.TokenFile.Validate(); err != nil {
		errs = append(errs, fmt.Errorf("token file: %w", err))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("aws container: %w", err)
	}
	return nil
}

// awsServer serves one AWSContainer.
type awsServer struct {
	cfg   *AWSContainer
	cache *cache
	now   func() time.Time
	log   *slog.Logger

	flight singleflight.Group
	mu     sync.Mutex
	held   *heldSession

	authMu        sync.Mutex
	auth, before  [sha256.Size]byte // of the authorization token, and of the one before
	beforeCounts  time.Time         // until when
	authFile      fs.FileInfo
	authEverKnown bool
}

// heldSession is a session and the token that it was traded for.
type heldSession struct {
	session *sts.Session
	claims  *token.Claims
	renew   time.Time
}

// run serves until ctx ends, once there is a first authorization token.
func (s *awsServer) run(ctx context.Context) error {
	defer s.forget()
	server := &http.Server{
		Handler: s, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: awsTimeout + 10*time.Second,
		IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10,
	}
	done := make(chan error, 1)
	go func() { done <- server.Serve(s.cfg.Listener) }()
	every := time.NewTicker(awsRotate)
	defer every.Stop()
	for {
		select {
		case <-ctx.Done():
			stop, cancel := context.WithTimeout(context.Background(), stopWithin)
			defer cancel()
			if err := server.Shutdown(stop); err != nil {
				_ = server.Close()
			}
			<-done
			return nil
		case err := <-done:
			return fmt.Errorf("serving aws_container: %w", err)
		case <-every.C:
			if err := s.rotate(); err != nil { // the old one goes on
				s.log.WarnContext(ctx, "the authorization token file of aws_container can't be written", "err", err)
			}
		}
	}
}

// rotate puts a new authorization token in place. It counts before the file has it, and
// the one before still counts for a while: nobody who reads the file is refused.
func (s *awsServer) rotate() error {
	secret := rand.Text()
	s.authMu.Lock()
	defer s.authMu.Unlock()
	old := s.auth
	s.before, s.beforeCounts = old, s.now().Add(awsGrace)
	s.auth = sha256.Sum256([]byte(secret))
	if !s.authEverKnown {
		s.before = s.auth
	}
	info, err := s.cfg.TokenFile.Write(secret)
	if err != nil {
		if s.authEverKnown {
			s.auth = old
		}
		return err
	}
	s.authFile, s.authEverKnown = info, true
	return nil
}

// forget removes the file, if it is still this agent's.
func (s *awsServer) forget() {
	s.authMu.Lock()
	defer s.authMu.Unlock()
	if err := s.cfg.TokenFile.Remove(s.authFile); err != nil {
		s.log.Error("removing the authorization token file of aws_container", "err", err)
	}
}

func (s *awsServer) authorized(sent string) bool {
	sum := sha256.Sum256([]byte(sent))
	s.authMu.Lock()
	defer s.authMu.Unlock()
	ok := subtle.ConstantTimeCompare(sum[:], s.auth[:])
	if s.now().Before(s.beforeCounts) {
		ok |= subtle.ConstantTimeCompare(sum[:], s.before[:])
	}
	return s.authEverKnown && ok == 1
}

// awsError is a refusal as AWS's SDKs read it.
type awsError struct {
	Code    string `json:"code"`
	Message string `json:"message"`
}

// awsCredentials is a session as AWS's SDKs read it here.
type awsCredentials struct {
	AccessKeyID     string `json:"AccessKeyId"`
	SecretAccessKey string
	Token           string
	Expiration      string
	RoleArn         string `json:",omitempty"`
}

func (s *awsServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	status, code, message := 0, "", ""
	switch {
	case foreign(r) || !loopbackHost(r.Host):
		status, code, message = http.StatusForbidden, "BROWSER_OR_PROXY", "this request comes through a browser or a proxy, or names a host that isn't this one"
	case !s.authorized(r.Header.Get("Authorization")):
		status, code, message = http.StatusUnauthorized, "AUTHORIZATION_INVALID", "Authorization isn't what the agent's authorization_token_file holds"
	case r.URL.Path != AWSPath:
		status, code, message = http.StatusNotFound, "NO_SUCH_ENDPOINT", "credentials are at "+AWSPath
	case r.Method != http.MethodGet:
		w.Header().Set("Allow", http.MethodGet)
		status, code, message = http.StatusMethodNotAllowed, "METHOD_NOT_ALLOWED", "GET only"
	}
	if status != 0 {
		s.cache.counts.requests.add(ListenerAWS, code)
		writeJSON(w, status, awsError{code, message})
		return
	}
	session, err := s.get(r.Context())
	if err != nil {
		status, refusal := awsRefusal(err)
		s.cache.counts.requests.add(ListenerAWS, refusal.Code)
		writeJSON(w, status, refusal)
		return
	}
	s.cache.counts.requests.add(ListenerAWS, okay)
	writeJSON(w, http.StatusOK, awsCredentials{
		AccessKeyID: session.AccessKeyID, SecretAccessKey: session.SecretAccessKey.Reveal(), Token: session.SessionToken.Reveal(),
		Expiration: session.Expires.Format(time.RFC3339), RoleArn: s.cfg.Role.ARN,
	})
}

// loopbackHost reports whether a Host header names this machine, and not something that
// a DNS server of somebody's says is it.
func loopbackHost(host string) bool {
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	addr, err := netip.ParseAddr(strings.Trim(host, "[]"))
	return host == "localhost" || err == nil && addr.IsLoopback()
}

// awsRefusal says an error to an SDK, which repeats what has a status of 500 or above.
func awsRefusal(err error) (int, awsError) {
	var traded *sts.Error
	if errors.As(err, &traded) {
		code := traded.Code
		if code == "" {
			code = "TOKEN_SERVICE_FAILED"
		}
		if traded.Status >= 400 && traded.Status < 500 {
			return http.StatusForbidden, awsError{code, traded.Error()}
		}
		return http.StatusBadGateway, awsError{code, traded.Error()}
	}
	var refusal *sdk.Error
	if !errors.As(sdk.FromRPC(err), &refusal) || refusal.Reason == "" {
		return http.StatusServiceUnavailable, awsError{"TOKEN_SERVICE_UNREACHABLE", "the token service can't be asked now; the agent's log says more"}
	}
	_, status := httpStatus(refusal.Code)
	message := refusal.Message
	if refusal.Hint != "" {
		message += "; " + refusal.Hint
	}
	return status, awsError{refusal.Reason, message}
}

// get returns the session from memory, or trades a token for a new one, one at a time
// for all who wait. While the broker or the token service is away, what is still valid
// is served.
func (s *awsServer) get(ctx context.Context) (*sts.Session, error) {
	if h := s.usable(); h != nil && s.now().Before(h.renew) {
		return h.session, nil
	}
	type result struct {
		session any
		err     error
	}
	done := make(chan result, 1)
	if !s.cache.start(func(ctx context.Context) {
		session, err, _ := s.flight.Do("", func() (any, error) {
			ctx, cancel := context.WithTimeout(ctx, awsTimeout)
			defer cancel()
			if h := s.usable(); h != nil && s.now().Before(h.renew) { // since it was looked for
				return h.session, nil
			}
			return s.trade(ctx)
		})
		done <- result{session, err}
	}) {
		return nil, stopping()
	}
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case r := <-done:
		if r.err == nil {
			return r.session.(*sts.Session), nil
		}
		if h := s.usable(); h != nil && away(r.err) {
			return h.session, nil
		}
		return nil, r.err
	}
}

// usable is the session in memory, unless it has ended or what it was traded for is dead.
// The session itself can't be called back; the agent doesn't give it out any more.
func (s *awsServer) usable() *heldSession {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.held != nil && (!s.now().Before(s.held.session.Expires) || s.cache.judged(s.held.claims)) {
		s.held = nil
	}
	return s.held
}

// away reports whether an error says that somebody can't be reached, and not that they refuse.
func away(err error) bool {
	var traded *sts.Error
	if errors.As(err, &traded) {
		return traded.Status >= 500
	}
	var refusal *sdk.Error
	return !errors.As(sdk.FromRPC(err), &refusal) || refusal.Reason == "" || refusal.Code == codes.Unavailable || refusal.Code == codes.ResourceExhausted
}

func (s *awsServer) trade(ctx context.Context) (*sts.Session, error) {
	cred, err := s.cache.token(ctx, s.cfg.Request)
	if err != nil {
		return nil, err
	}
	t, err := token.Inspect(cred.Token.Reveal())
	if err != nil {
		return nil, err
	}
	now := s.now()
	session, err := sts.Trade(ctx, s.cfg.Role, cred.Token, now)
	if err != nil {
		s.log.WarnContext(ctx, "trading a token for a session failed", "role", s.cfg.Role.ARN, "grant", cred.Grant, "err", sdk.FromRPC(err))
		return nil, err
	}
	s.log.InfoContext(ctx, "traded a token for a session", "role", s.cfg.Role.ARN, "grant", cred.Grant, "expires", session.Expires)
	life := session.Expires.Sub(now)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.held = &heldSession{session, &t.Claims, session.Expires.Add(-min(awsMargin, life/2))}
	return session, nil
}
