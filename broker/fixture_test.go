package broker_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/asn1"
	"encoding/json"
	"errors"
	"iter"
	"log/slog"
	"math/big"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/broker/boltstore"
	"github.com/dayflyhq/dayfly/broker/keys"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/proto/vouch"
	"github.com/dayflyhq/dayfly/sdk/spiffetest"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const issuer = "https://dayfly.example.org"

var (
	noon     = time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	domain   = spiffeid.RequireTrustDomainFromString("example.org")
	brokerID = spiffeid.RequireFromString("spiffe://example.org/dayfly/broker")
)

// id makes an identity of the test's trust domain.
func id(path string) spiffeid.ID { return spiffeid.RequireFromString("spiffe://example.org/" + path) }

// clock is a wall clock and an elapsed-time clock that a test moves.
type clock struct {
	mu   sync.Mutex
	now  time.Time
	boot feed.Instant
}

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) Boot() feed.Instant {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.boot
}

// advance lets time pass.
func (c *clock) advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now, c.boot = c.now.Add(d), c.boot.Add(d)
}

// set moves the wall clock alone, as an administrator or NTP does.
func (c *clock) set(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

// elapse moves the elapsed-time clock alone.
func (c *clock) elapse(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.boot = c.boot.Add(d)
}

// policy says yes to everything, unless a test scripts it.
type policy struct {
	mu        sync.Mutex
	script    func(broker.Question) (broker.Decision, error)
	names     map[spiffeid.ID]string
	audiences map[string]broker.Audience
	fallbacks map[spiffeid.ID]broker.Fallback
	asked     []broker.Question
}

func (p *policy) Decide(_ context.Context, q broker.Question) (broker.Decision, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.asked = append(p.asked, q)
	if p.script != nil {
		return p.script(q)
	}
	return yes(q), nil
}

func yes(q broker.Question) broker.Decision {
	d := broker.Decision{Allow: true, Scopes: q.Scopes, TTL: broker.DefaultTTL, Rule: "test", Revision: "sha256:test"}
	if len(q.Scopes) == 0 {
		d.Scopes = []string{"read"}
	}
	if q.TTL > 0 {
		d.TTL = q.TTL
	}
	return d
}

func (p *policy) set(script func(broker.Question) (broker.Decision, error)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.script = script
}

func (p *policy) AnswersTo(id spiffeid.ID, audience string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return audience != "" && p.names[id] == audience
}

func (p *policy) Audience(name string) (broker.Audience, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	a, ok := p.audiences[name]
	return a, ok
}

func (p *policy) External() (out []broker.Audience) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, a := range p.audiences {
		if a.VerifiedBy == broker.VerifiedByExternal {
			out = append(out, a)
		}
	}
	return out
}

func (p *policy) Fallback(caller spiffeid.ID, audience string) broker.Fallback {
	p.mu.Lock()
	defer p.mu.Unlock()
	if f, ok := p.fallbacks[caller]; ok {
		return f
	}
	return p.audiences[audience].Fallback
}

// tap is a store in which a test can act or fail at a call.
type tap struct {
	broker.Store
	mu           sync.Mutex
	beforeIssue  func(*broker.Grant) error // an error: nothing is written
	afterIssue   func(*broker.Grant) error // an error: the answer is lost
	beforeAppend func() error
	beforeApply  func() // before the broker hears of a record
	observe      func([]broker.Observation) error
}

func (s *tap) hooks() (before, after func(*broker.Grant) error, appending func() error, observe func([]broker.Observation) error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.beforeIssue, s.afterIssue, s.beforeAppend, s.observe
}

func (s *tap) set(change func(*tap)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change(s)
}

func (s *tap) Issue(ctx context.Context, g *broker.Grant, admit func([]broker.Record) error) error {
	before, after, _, _ := s.hooks()
	if before != nil {
		if err := before(g); err != nil {
			return err
		}
	}
	if err := s.Store.Issue(ctx, g, admit); err != nil {
		return err
	}
	if after != nil {
		return after(g)
	}
	return nil
}

func (s *tap) Append(ctx context.Context, next func(feed.Position) (broker.Record, error)) (broker.Record, error) {
	if _, _, appending, _ := s.hooks(); appending != nil {
		if err := appending(); err != nil {
			return broker.Record{}, err
		}
	}
	return s.Store.Append(ctx, next)
}

func (s *tap) Events(ctx context.Context, after uint64) iter.Seq2[broker.Record, error] {
	return func(yield func(broker.Record, error) bool) {
		for rec, err := range s.Store.Events(ctx, after) {
			s.mu.Lock()
			hook := s.beforeApply
			s.mu.Unlock()
			if hook != nil {
				hook()
			}
			if !yield(rec, err) {
				return
			}
		}
	}
}

func (s *tap) Observe(ctx context.Context, o ...broker.Observation) error {
	if _, _, _, observe := s.hooks(); observe != nil {
		if err := observe(o); err != nil {
			return err
		}
	}
	return s.Store.Observe(ctx, o...)
}

// world is one broker on a real store, with a clock, a policy and an audit that the
// test owns.
type world struct {
	t      *testing.T
	path   string
	clock  *clock
	policy *policy
	td     *spiffetest.TrustDomain
	store  *tap
	b      *broker.Broker
	key    *ecdsa.PrivateKey
	public token.PublicKey

	mu       sync.Mutex
	noSigner bool
	spreadIn time.Duration // of the signing key
	audit    []broker.AuditEntry
	auditErr error
	logs     []string
	secrets  []token.Secret
	heads    []feed.SignedHead // those that the broker signed
	headErr  error
	// disregard is what the next broker is told to disregard.
	disregard feed.Position
	// maxRevocations is a lower maximum of the next broker's set.
	maxRevocations int

	stop       func() // ends the broker and closes the store
	stopBroker func() // ends the broker alone
	view       feed.View
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{
		t: t, path: filepath.Join(t.TempDir(), "store.db"),
		clock:  &clock{now: noon, boot: feed.Instant(time.Hour)},
		policy: &policy{names: map[spiffeid.ID]string{}, audiences: map[string]broker.Audience{}},
	}
	w.td = spiffetest.ForTest(t, spiffetest.Config{TrustDomain: domain, Now: w.clock.Now})
	first := broker.Record{
		Event:   feed.Event{Era: &feed.Era{Era: token.NextEra(0, noon)}},
		Details: broker.Details{Time: noon, Actor: issuer},
	}
	if err := boltstore.Create(w.path, first); err != nil {
		t.Fatal(err)
	}
	w.start()
	w.newKey()
	t.Cleanup(func() {
		w.stop()
		if r, err := boltstore.Check(context.Background(), w.path); err != nil {
			t.Errorf("the store after the test: %v %v", err, r.Problems)
		}
		w.noSecrets()
	})
	return w
}

// start opens the store and runs a broker on it.
func (w *world) start() {
	w.t.Helper()
	w.startUnchecked()
	if err := w.b.CheckKeys(ctx); err != nil {
		w.t.Fatal(err)
	}
}

// startUnchecked is start for a broker that knows no bundle yet.
func (w *world) startUnchecked() {
	w.t.Helper()
	store, err := boltstore.Open(boltstore.Config{Path: w.path})
	if err != nil {
		w.t.Fatal(err)
	}
	w.store = &tap{Store: store}
	w.b = w.newBroker()
	ctx, cancel := context.WithCancel(context.Background())
	if err := w.b.Load(ctx); err != nil {
		w.t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- w.b.Run(ctx) }()
	w.stopBroker = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			w.t.Errorf("Run: %v", err)
		}
	})
	w.stop = sync.OnceFunc(func() {
		w.stopBroker()
		if err := store.Close(); err != nil {
			w.t.Errorf("closing the store: %v", err)
		}
	})
}

func (w *world) newBroker() *broker.Broker {
	w.t.Helper()
	b, err := broker.New(broker.Config{
		Issuer: issuer, Store: w.store, Policy: w.policy,
		Signer: w.signer,
		VerifyKey: func(k feed.Key, at time.Time) error {
			return keys.VerifyKey(issuer, k, w.td, spiffeid.MatchID(brokerID), at)
		},
		SignHead: w.signHead,
		VerifyHead: func(h feed.SignedHead) (feed.HeadStatement, error) {
			return vouch.VerifyKeptHead(issuer, h, w.td, spiffeid.MatchID(brokerID), w.clock.Now())
		},
		Disregard: w.disregard, MaxRevocations: w.maxRevocations,
		Audit: w.record, Log: slog.New(slog.NewJSONHandler(w, nil)),
		Now: w.clock.Now, Boot: w.clock.Boot,
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return b
}

func (w *world) signHead(s feed.HeadStatement) (feed.SignedHead, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.headErr != nil {
		return feed.SignedHead{}, w.headErr
	}
	svid, err := w.td.IssueSVID(brokerID, spiffetest.SVIDOptions{}) // another each time: it rotates
	if err != nil {
		return feed.SignedHead{}, err
	}
	h, err := vouch.SignHead(svid, issuer, s)
	w.heads = append(w.heads, h)
	return h, err
}

func (w *world) headsSigned() []feed.SignedHead {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]feed.SignedHead(nil), w.heads...)
}

// restart ends the process, as far as a test can, and begins another on its store.
func (w *world) restart() {
	w.t.Helper()
	w.stop()
	w.start()
}

func (w *world) signer() (broker.Signer, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.noSigner {
		return broker.Signer{}, false
	}
	s := broker.PrivateSigner(w.public, w.key)
	s.SpreadIn = w.spreadIn
	return s, true
}

func (w *world) record(e broker.AuditEntry) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.auditErr != nil {
		return w.auditErr
	}
	w.audit = append(w.audit, e)
	return nil
}

// Write takes a line of the broker's log.
func (w *world) Write(line []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.logs = append(w.logs, string(line))
	return len(line), nil
}

// logged returns the lines of the log that hold a text.
func (w *world) logged(text string) (lines []string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, line := range w.logs {
		if strings.Contains(line, text) {
			lines = append(lines, line)
		}
	}
	return lines
}

func (w *world) entries() []broker.AuditEntry {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]broker.AuditEntry(nil), w.audit...)
}

// last returns the newest audit record.
func (w *world) last() broker.AuditEntry {
	w.t.Helper()
	all := w.entries()
	if len(all) == 0 {
		w.t.Fatal("the audit is empty")
	}
	return all[len(all)-1]
}

// noSecrets looks for every token of the test in the audit.
func (w *world) noSecrets() {
	text, err := json.Marshal(w.entries())
	if err != nil {
		w.t.Error(err)
	}
	text = append(text, strings.Join(w.logged(""), "")...)
	for _, s := range w.secrets {
		for _, part := range strings.Split(s.Reveal(), ".") {
			if len(part) > 16 && strings.Contains(string(text), part) {
				w.t.Error("the audit or the log holds a part of a token")
			}
		}
	}
}

// vouched makes the record of a key, signed by an SVID.
func (w *world) vouched(key *ecdsa.PrivateKey, by spiffeid.ID) (feed.Key, token.PublicKey) {
	w.t.Helper()
	public, err := token.NewPublicKey(token.ES256, &key.PublicKey)
	if err != nil {
		w.t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		w.t.Fatal(err)
	}
	svid, err := w.td.IssueSVID(by, spiffetest.SVIDOptions{})
	if err != nil {
		w.t.Fatal(err)
	}
	signature, err := crypto.SignMessage(svid.PrivateKey, rand.Reader, feed.KeyStatement(issuer, public, der), crypto.SHA256)
	if err != nil {
		w.t.Fatal(err)
	}
	out := feed.Key{Public: public, DER: der, Signature: signature}
	for _, c := range svid.Certificates {
		out.Certificates = append(out.Certificates, c.Raw)
	}
	return out, public
}

// newKey publishes a signing key of the broker and signs with it from now on.
func (w *world) newKey() {
	w.t.Helper()
	key := newKey(w.t)
	record, public := w.vouched(key, brokerID)
	if err := w.b.PublishKey(context.Background(), record); err != nil {
		w.t.Fatal(err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.key, w.public = key, public
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// caller connects an identity with a fresh SVID.
func (w *world) caller(path string) broker.Caller {
	w.t.Helper()
	return w.callerWith(id(path), spiffetest.SVIDOptions{})
}

func (w *world) callerWith(id spiffeid.ID, opts spiffetest.SVIDOptions) broker.Caller {
	w.t.Helper()
	svid, err := w.td.IssueSVID(id, opts)
	if err != nil {
		w.t.Fatal(err)
	}
	return broker.Caller{ID: id, Leaf: svid.Certificates[0], Peer: netip.MustParseAddrPort("192.0.2.7:4711")}
}

func (w *world) operator() broker.Caller { return w.caller("operator") }

// issue gets a credential or fails the test.
func (w *world) issue(c broker.Caller, audience string) *broker.Credential {
	w.t.Helper()
	cred, err := w.b.Issue(context.Background(), c, broker.Request{Audience: audience})
	return w.got(cred, err)
}

func (w *world) exchange(c broker.Caller, subject token.Secret, audience string) *broker.Credential {
	w.t.Helper()
	cred, err := w.b.Exchange(context.Background(), c, broker.Request{Audience: audience, Subject: subject})
	return w.got(cred, err)
}

func (w *world) got(cred *broker.Credential, err error) *broker.Credential {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
	w.mu.Lock()
	w.secrets = append(w.secrets, cred.Token)
	w.mu.Unlock()
	return cred
}

// revoke records a revocation or fails the test.
func (w *world) revoke(mode broker.LockMode, selectors ...revocation.Selector) broker.Record {
	w.t.Helper()
	rec, err := w.b.Revoke(context.Background(), w.operator(), broker.Revoke{Selectors: selectors, Lock: mode, Reason: "test"})
	if err != nil {
		w.t.Fatal(err)
	}
	return rec
}

// follow subscribes a verifier.
func (w *world) follow(path, instance string, bound time.Duration) *broker.Follower {
	w.t.Helper()
	f, err := w.b.Subscribe(context.Background(), w.caller(path), broker.Subscriber{
		Instance: instance, Audiences: []string{"orders"}, MaxStaleness: bound,
	})
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(f.Close)
	return f
}

// drain takes what a stream has and returns up to where.
func drain(t *testing.T, f *broker.Follower, view *feed.View) feed.Position {
	t.Helper()
	for {
		d, ok, _ := f.Next(100)
		if !ok {
			return view.Position()
		}
		if err := view.Apply(d, 1); err != nil {
			t.Fatal(err)
		}
	}
}

// verdict is what a verifier that follows the feed says of a token.
func (w *world) verdict(secret token.Secret) revocation.Reason {
	w.t.Helper()
	f, err := w.b.Subscribe(context.Background(), w.caller("verdict"), broker.Subscriber{
		Instance: "verdict-0001", Audiences: []string{"orders"}, MaxStaleness: time.Second, Position: w.view.Position(),
	})
	if err != nil {
		w.t.Fatal(err)
	}
	defer f.Close()
	drain(w.t, f, &w.view)
	tok, err := token.Parse(secret.Reveal(), w.view.Key)
	if errors.Is(err, token.ErrUnknownKey) {
		return "unknown_key"
	}
	if err != nil {
		w.t.Fatal(err)
	}
	return w.view.Judge(revocation.SubjectOf(&tok.Claims)).Reason
}

// refused checks that an error is one refusal, with something to say.
func refused(t *testing.T, err error, want *broker.Refusal) *broker.Refusal {
	t.Helper()
	var r *broker.Refusal
	if !errors.As(err, &r) {
		t.Fatalf("got error %v, want %s", err, want.Reason)
	}
	if r.Reason != want.Reason {
		t.Fatalf("got %v, want %s", err, want.Reason)
	}
	if r.Kind != want.Kind || r.Message == "" || r.Hint == "" {
		t.Errorf("%s: kind %d, message %q, hint %q", r.Reason, r.Kind, r.Message, r.Hint)
	}
	return r
}

// spiffeOptions dates an SVID as the Workload API would.
var spiffeOptions = spiffetest.SVIDOptions{}

// rawSignature is an ECDSA signature as JWS wants it.
func rawSignature(t *testing.T, der []byte) []byte {
	t.Helper()
	var rs struct{ R, S *big.Int }
	if _, err := asn1.Unmarshal(der, &rs); err != nil {
		t.Fatal(err)
	}
	out := make([]byte, 64)
	rs.R.FillBytes(out[:32])
	rs.S.FillBytes(out[32:])
	return out
}
