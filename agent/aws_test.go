package agent_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/agent"
	"github.com/dayflyhq/dayfly/agent/deliver"
	"github.com/dayflyhq/dayfly/agent/sts"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"google.golang.org/grpc/codes"
)

// tokenService is a token service of AWS's that counts, and does as a test wants.
type tokenService struct {
	trades atomic.Int64
	status atomic.Int64 // of a refusal; 0: none
	life   atomic.Int64 // seconds
	gate   chan struct{}
}

func (s *tokenService) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if s.gate != nil {
		<-s.gate
	}
	n := s.trades.Add(1)
	if status := int(s.status.Load()); status != 0 {
		w.WriteHeader(status)
		fmt.Fprintf(w, "<ErrorResponse><Error><Code>AccessDenied</Code><Message>no: %s</Message></Error></ErrorResponse>", r.PostFormValue("WebIdentityToken"))
		return
	}
	fmt.Fprintf(w, "<AssumeRoleWithWebIdentityResponse><AssumeRoleWithWebIdentityResult><Credentials><AccessKeyId>ASIA%d</AccessKeyId><SecretAccessKey>secret</SecretAccessKey>"+
		"<SessionToken>session</SessionToken><Expiration>%s</Expiration></Credentials></AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>",
		n, time.Now().Add(time.Duration(s.life.Load())*time.Second).UTC().Format(time.RFC3339Nano))
}

// container is an agent's container endpoint and what is behind it.
type container struct {
	*fixture
	sts  *tokenService
	url  string
	file string
	now  atomic.Int64 // seconds that the agent's clock is ahead
}

func startContainer(t *testing.T, b *broker, gate chan struct{}) *container {
	t.Helper()
	c := &container{sts: &tokenService{gate: gate}, file: filepath.Join(t.TempDir(), "authorization")}
	c.sts.life.Store(3600)
	service := httptest.NewServer(c.sts)
	t.Cleanup(service.Close)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c.url = "http://" + l.Addr().String() + agent.AWSPath
	c.fixture = start(t, b.td, b, func(cfg *agent.Config) {
		cfg.AWS = &agent.AWSContainer{Listener: l, Request: agent.Request{Audience: "sts"}, Role: sts.Role{Endpoint: service.URL, ARN: "arn:aws:iam::1:role/r"}, TokenFile: deliver.Secret{Path: c.file}}
		cfg.Now = func() time.Time { return time.Now().Add(time.Duration(c.now.Load()) * time.Second) }
	})
	c.ready()
	return c
}

// answer is all that the endpoint may say.
type awsAnswer struct {
	Status                                                   int
	AccessKeyId, SecretAccessKey, Token, Expiration, RoleArn string
	Code                                                     string `json:"code"`
	Message                                                  string `json:"message"`
}

func (c *container) get(change func(*http.Request)) awsAnswer {
	c.Helper()
	auth, err := os.ReadFile(c.file)
	if err != nil {
		c.Fatal(err)
	}
	req, err := http.NewRequestWithContext(c.Context(), http.MethodGet, c.url, nil)
	if err != nil {
		c.Fatal(err)
	}
	req.Header.Set("Authorization", string(auth))
	if change != nil {
		change(req)
	}
	resp, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(req)
	if err != nil {
		c.Fatal(err)
	}
	defer resp.Body.Close()
	var out awsAnswer
	if err := json.NewDecoder(resp.Body).Decode(&out); err != nil {
		c.Fatal(err)
	}
	out.Status = resp.StatusCode
	if strings.Contains(out.Message, "eyJ") || strings.Contains(out.Message, string(auth)) {
		c.Errorf("a message with a credential: %s", out.Message)
	}
	return out
}

// A session is traded for once, kept by its real end, and is out of reach for browsers,
// proxies, other names, and whoever can't read the file.
func TestAWSContainer(t *testing.T) {
	noLeaks(t)
	b := newBroker(t, newDomain(t))
	c := startContainer(t, b, nil)
	got := c.get(nil)
	expires, err := time.Parse(time.RFC3339, got.Expiration)
	if got.Status != 200 || got.AccessKeyId != "ASIA1" || got.SecretAccessKey != "secret" || got.Token != "session" || got.RoleArn != "arn:aws:iam::1:role/r" || err != nil || time.Until(expires) > time.Hour {
		t.Fatalf("got %+v", got)
	}
	info, err := os.Stat(c.file)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the file: %v, %v", info, err)
	}
	for name, r := range map[string]struct {
		change func(*http.Request)
		status int
		code   string
	}{
		"no authorization":    {func(r *http.Request) { r.Header.Del("Authorization") }, 401, "AUTHORIZATION_INVALID"},
		"another":             {func(r *http.Request) { r.Header.Set("Authorization", "x"+r.Header.Get("Authorization")) }, 401, "AUTHORIZATION_INVALID"},
		"as a bearer":         {func(r *http.Request) { r.Header.Set("Authorization", "Bearer "+r.Header.Get("Authorization")) }, 401, "AUTHORIZATION_INVALID"},
		"a rebound name":      {func(r *http.Request) { r.Host = "evil.example:80" }, 403, "BROWSER_OR_PROXY"},
		"a name without dots": {func(r *http.Request) { r.Host = "evil" }, 403, "BROWSER_OR_PROXY"},
		"an address":          {func(r *http.Request) { r.Host = "192.0.2.1" }, 403, "BROWSER_OR_PROXY"},
		"a web page":          {func(r *http.Request) { r.Header.Set("Origin", "http://127.0.0.1") }, 403, "BROWSER_OR_PROXY"},
		"another path":        {func(r *http.Request) { r.URL.Path = "/" }, 404, "NO_SUCH_ENDPOINT"},
		"a POST":              {func(r *http.Request) { r.Method = http.MethodPost }, 405, "METHOD_NOT_ALLOWED"},
	} {
		if got := c.get(r.change); got.Status != r.status || got.Code != r.code || got.Message == "" || got.AccessKeyId+got.Token+got.SecretAccessKey != "" {
			t.Errorf("%s: %+v", name, got)
		}
	}
	for _, host := range []string{"localhost", "[::1]:9", "127.0.0.2:80"} {
		if got := c.get(func(r *http.Request) { r.Host = host }); got.AccessKeyId != "ASIA1" {
			t.Errorf("%s: %+v", host, got)
		}
	}
	if n := c.sts.trades.Load(); n != 1 {
		t.Errorf("%d trades for one session", n)
	}
	// Sixteen minutes before the end there is a new one; while nobody gives one, the old.
	c.now.Store(int64((45 * time.Minute).Seconds()))
	c.sts.status.Store(503)
	if got := c.get(nil); got.AccessKeyId != "ASIA1" {
		t.Errorf("while the service is away: %+v", got)
	}
	c.sts.status.Store(403)
	if got := c.get(nil); got.Status != 403 || got.Code != "AccessDenied" || !strings.Contains(got.Message, "[token]") {
		t.Errorf("refused: %+v", got)
	}
	c.sts.status.Store(0)
	c.sts.life.Store(2 * 3600)
	if got := c.get(nil); got.AccessKeyId != "ASIA4" {
		t.Errorf("renewed: %+v", got)
	}
	c.stop()
	if _, err := os.Stat(c.file); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the file outlived the agent: %v", err)
	}
}

// A session isn't given out any more once what it was traded for is revoked.
func TestAWSContainerRevoked(t *testing.T) {
	noLeaks(t)
	b := newBroker(t, newDomain(t))
	c := startContainer(t, b, nil)
	if got := c.get(nil); got.Status != 200 {
		t.Fatalf("got %+v", got)
	}
	b.set(func(b *broker) { b.refuse = refusal(codes.PermissionDenied, "IDENTITY_LOCKED", "locked") })
	if got := c.get(nil); got.AccessKeyId != "ASIA1" {
		t.Errorf("still good: %+v", got)
	}
	b.revoke(revocation.Identity(payments))
	eventually(t, "the session to be gone", func() error {
		if got := c.get(nil); got.Status != 403 || got.Code != "IDENTITY_LOCKED" || got.Token != "" {
			return fmt.Errorf("got %+v", got)
		}
		return nil
	})
	b.set(func(b *broker) { b.refuse = refusal(codes.Unavailable, "", "") })
	if got := c.get(nil); got.Status < 500 || got.Token != "" {
		t.Errorf("the broker is away: %+v", got)
	}
}

// All who ask at once wait for one trade.
func TestAWSContainerOneTrade(t *testing.T) {
	noLeaks(t)
	b := newBroker(t, newDomain(t))
	gate := make(chan struct{})
	c := startContainer(t, b, gate)
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			if got := c.get(nil); got.Status != 200 {
				t.Errorf("got %+v", got)
			}
		})
	}
	time.Sleep(50 * time.Millisecond) // so that most of them wait; later ones find it in memory
	close(gate)
	wg.Wait()
	if n := c.sts.trades.Load(); n != 1 {
		t.Errorf("%d trades", n)
	}
}

// Whoever read the file just before it changed isn't refused; later they are.
func TestAWSAuthorizationRotates(t *testing.T) {
	file := filepath.Join(t.TempDir(), "authorization")
	now := time.Now()
	rotate, authorized := agent.NewAWSAuthorization(file, func() time.Time { return now })
	read := func() string {
		t.Helper()
		if err := rotate(); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	if authorized("") {
		t.Error("authorized before there was a token")
	}
	first := read()
	second := read()
	if first == second || !authorized(first) || !authorized(second) || authorized("") {
		t.Error("both must count for a while")
	}
	now = now.Add(2 * time.Minute)
	if authorized(first) || !authorized(second) {
		t.Error("the old one must not count for ever")
	}
	// A file that can't be written leaves the old token in force.
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(file, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := rotate(); err == nil || !authorized(second) {
		t.Errorf("after a failure: %v", err)
	}
	left, err := filepath.Glob(filepath.Join(filepath.Dir(file), ".dayfly-*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left %v, %v", left, err)
	}
}
