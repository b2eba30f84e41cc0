package deliver_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/base64"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/agent/deliver"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// patience is for what must happen, however slow the machine.
const patience = time.Minute

var payments = spiffeid.RequireFromString("spiffe://td/payments")

// shelf stands for the agent's memory: a credential of each audience, and which are dead.
type shelf struct {
	t   testing.TB
	key *ecdsa.PrivateKey
	pub token.PublicKey

	mu      sync.Mutex
	creds   map[string]*sdk.Credential
	dead    map[string]bool // grants
	changed chan struct{}
}

func newShelf(t testing.TB) *shelf {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	pub, err := token.NewPublicKey(token.ES256, key.Public())
	if err != nil {
		t.Fatal(err)
	}
	return &shelf{t: t, key: key, pub: pub, creds: map[string]*sdk.Credential{}, dead: map[string]bool{}, changed: make(chan struct{})}
}

// mint makes a real token.
func (s *shelf) mint(audience string, life time.Duration) *sdk.Credential {
	s.t.Helper()
	asked := time.Now()
	now := asked.Truncate(time.Second)
	grant, err := token.NewGrantID(payments, now, rand.Reader)
	if err != nil {
		s.t.Fatal(err)
	}
	claims := &token.Claims{
		Issuer: "https://broker.test", Audience: audience, Scopes: []string{"r"},
		Lineage:  []token.Member{{Identity: payments, Grant: grant, Key: s.pub.ID}},
		IssuedAt: now, NotBefore: now, Expires: now.Add(life), Binding: token.BindingNone, Transaction: "txn", Position: token.Position{Era: 7},
	}
	unsigned, err := token.Encode(claims, token.ES256)
	if err != nil {
		s.t.Fatal(err)
	}
	secret, err := unsigned.Sign(s.key)
	if err != nil {
		s.t.Fatal(err)
	}
	return &sdk.Credential{Token: secret, Grant: grant.String(), Audience: audience, Scopes: []string{"r"}, Binding: token.BindingNone, IssuedAt: asked, Expires: asked.Add(life)}
}

// put shelves new credentials at one moment.
func (s *shelf) put(life time.Duration, audiences ...string) {
	s.t.Helper()
	var made []*sdk.Credential
	for _, a := range audiences {
		made = append(made, s.mint(a, life))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range made {
		s.creds[c.Audience] = c
	}
	s.ring()
}

// kill revokes what there is of an audience.
func (s *shelf) kill(audience string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.dead[s.creds[audience].Grant] = true
	delete(s.creds, audience)
	s.ring()
}

func (s *shelf) ring() { close(s.changed); s.changed = make(chan struct{}) }

func (s *shelf) token(audience string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.creds[audience].Token.Reveal()
}

func (s *shelf) config(targets ...deliver.Target) deliver.Config {
	return deliver.Config{
		Targets: targets,
		Newest: func(r sdk.Request) *sdk.Credential {
			s.mu.Lock()
			defer s.mu.Unlock()
			if c := s.creds[r.Audience]; c != nil && time.Now().Before(c.Expires) {
				return c
			}
			return nil
		},
		Changed: func([]sdk.Request) func() <-chan struct{} {
			return func() <-chan struct{} {
				s.mu.Lock()
				defer s.mu.Unlock()
				return s.changed
			}
		},
		Alive: func(c *token.Claims) bool {
			s.mu.Lock()
			defer s.mu.Unlock()
			return !s.dead[c.Grant().String()]
		},
	}
}

func one(audience string) map[string]sdk.Request {
	return map[string]sdk.Request{audience: {Audience: audience}}
}

func file(path, audience string) deliver.Target {
	return deliver.Target{Path: path, Files: []deliver.File{{Format: deliver.Token, Credentials: one(audience)}}}
}

// begin opens and runs a deliverer, and returns how to end it.
func begin(t testing.TB, cfg deliver.Config) (*deliver.Deliverer, func()) {
	t.Helper()
	d, err := deliver.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Open(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); d.Run(ctx) }()
	end := func() { cancel(); <-done }
	t.Cleanup(end)
	return d, end
}

func folder(t testing.TB) string {
	t.Helper()
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waiting for %s", what)
		}
	}
}

func holds(path, content string) bool {
	got, err := os.ReadFile(path)
	return err == nil && string(got) == content
}

func gone(path string) bool {
	_, err := os.Lstat(path)
	return os.IsNotExist(err)
}

func base64Of(s string) string { return base64.StdEncoding.EncodeToString([]byte(s)) }

func itoa(n int64) string { return strconv.FormatInt(n, 10) }
