package agent

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/proto/wire"
	"github.com/dayflyhq/dayfly/sdk"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/durationpb"
)

const (
	// maxEntries bounds the different credentials in memory; beyond it, the one that
	// was asked for longest ago goes.
	maxEntries = 1024
	// MaxPrefetch bounds Config.Prefetch: it leaves room for what is asked for.
	MaxPrefetch = maxEntries / 2
	// renewFrom and renewTo are between which fractions of a credential's life the agent
	// renews it, at random: earlier than an SDK does. A workload counts on its agent to have
	// used every moment in the second half of a credential's life in which the broker could
	// be reached; whoever first tries later than at its half has missed some.
	renewFrom, renewTo = 0.35, 0.50
	// idleAfter is how long a credential that nobody asks for is kept fresh: twice
	// the default life.
	idleAfter = 10 * time.Minute
	// issueTimeout bounds a call: shorter than a client's own default, so that the reason
	// reaches whoever waits; and it is how soon a broker that doesn't answer is known for it.
	issueTimeout = 5 * time.Second
)

// A Request is a credential to keep: what a caller asks for, and what makes two
// requests the same. Only Audience must be set.
type Request struct {
	Audience string
	Scopes   []string
	TTL      time.Duration // zero: the policy's choice
	Binding  token.Binding // "": the policy's choice
}

// normalize checks what can be checked without the broker and gives equal requests
// equal fields.
func (r *Request) normalize() error {
	if err := token.ValidateAudience(r.Audience); err != nil {
		return fmt.Errorf("audience: %w", err)
	}
	scopes, err := token.NormalizeScopes(r.Scopes)
	if err != nil {
		return fmt.Errorf("scopes: %w", err)
	}
	r.Scopes = scopes
	if r.TTL < 0 || r.TTL > token.MaxTTL || r.TTL > 0 && r.TTL < time.Second {
		return fmt.Errorf("ttl: from 1s to %v, or absent", token.MaxTTL)
	}
	if r.Binding != "" && !r.Binding.Valid() {
		return errors.New("binding: spiffe, x5t or none")
	}
	return nil
}

// A key is what makes two normalized requests the same.
type key struct {
	audience, scopes string
	ttl              time.Duration
	binding          token.Binding
}

func (r *Request) key() key {
	return key{r.Audience, strings.Join(r.Scopes, " "), r.TTL, r.Binding}
}

func (r *Request) message(idempotencyKey string) *dayflyv1.IssueRequest {
	m := &dayflyv1.IssueRequest{Audience: r.Audience, Scopes: r.Scopes, Binding: wire.Binding(r.Binding), IdempotencyKey: idempotencyKey}
	if r.TTL > 0 {
		m.Ttl = durationpb.New(r.TTL)
	}
	return m
}

// A cache keeps credentials fresh and judges each one when it gives it out.
type cache struct {
	tokens dayflyv1.TokenServiceClient
	svids  x509svid.Source
	judge  func(revocation.Subject) revocation.Verdict
	now    func() time.Time
	boot   func() feed.Instant
	jitter func() float64
	log    *slog.Logger
	counts *counters

	ctx    context.Context // ends with close: what renewals run under
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu      sync.Mutex
	entries map[key]*entry
	// limited is the broker's refusal for a limit of this identity, whatever was asked
	// for, and when it came: for as long as it says no call is made.
	limited   *sdk.Error
	limitedAt mark
	upstream  contact
	// hearing are those who keep copies and wait for a change.
	hearing map[*hearer]struct{}
}

// An entry is one request and its credential.
type entry struct {
	req    Request
	pinned bool // from the configuration: kept whether or not anyone asks
	source *sdk.TokenSource
	run    sync.Once
	cancel context.CancelFunc
	ctx    context.Context

	latest atomic.Pointer[held]

	// Guarded by cache.mu.
	waiting int
	asked   time.Time // when somebody last asked

	attempt attempt // the one under way; only fetch touches it
}

// An attempt is a call and its repetitions: they have one idempotency key, and the answer
// may be what the first of them made, so its life is counted from then.
type attempt struct {
	key   string
	asked mark
}

// A mark is a moment by the clocks that nobody sets.
type mark struct {
	time time.Time // with the monotonic clock, which sleeps with the machine
	boot feed.Instant
}

func (c *cache) mark() mark { return mark{c.now(), c.boot()} }

// since is how long ago a moment was.
func (c *cache) since(m mark) time.Duration { return c.mark().since(m) }

func (m mark) since(then mark) time.Duration {
	return max(m.time.Sub(then.time), m.boot.Sub(then.boot))
}

// longestAttempt is how long a call is repeated as the same, at the longest: a broker that
// is slower than one call's time has an answer for the next. What it makes for a later one
// is new.
const longestAttempt = 4 * issueTimeout

// attemptFor is how long the entry's call is repeated as the same: a third of the life that
// the answer has, which is counted from the first call.
func (e *entry) attemptFor() time.Duration {
	life := e.req.TTL
	if h := e.latest.Load(); h != nil {
		life = h.life
	}
	if life == 0 {
		return longestAttempt
	}
	return min(max(life/3, issueTimeout), longestAttempt)
}

// held is the newest credential and what it says of itself.
type held struct {
	grant  string
	claims *token.Claims
	cred   *sdk.Credential
	asked  mark
	life   time.Duration
}

func (c *cache) left(h *held) time.Duration { return h.life - c.since(h.asked) }

// told returns the credential with its times by the wall clock as it is now: it may have
// been set since, or the machine may have slept.
func (c *cache) told(h *held) *sdk.Credential {
	now := c.mark()
	age := now.since(h.asked)
	expires := now.time.Add(h.life - age)
	by := max(expires.Round(0).Sub(h.cred.Expires.Round(0)).Abs(), expires.Sub(h.cred.Expires).Abs())
	if by < maxDrift {
		return h.cred // the same for all who ask
	}
	out := *h.cred
	out.IssuedAt, out.Expires = now.time.Add(-age), expires
	return &out
}

// maxDrift is by how much a credential's times may be off before they are told anew.
const maxDrift = time.Second

func (c *cache) open() {
	c.mu.Lock() // somebody may watch already
	defer c.mu.Unlock()
	c.ctx, c.cancel = context.WithCancel(context.Background())
}

// A hearer keeps copies of some credentials: it hears of each change of these, and of all
// that may concern any.
type hearer struct {
	cache *cache
	of    map[key]bool  // nil: of whatever changes
	next  chan struct{} // guarded by cache.mu; nil after it was closed
}

// hear returns who hears of these, or, without any, of none alone.
func (c *cache) hear(of ...key) *hearer {
	h := &hearer{cache: c, of: map[key]bool{}}
	for _, k := range of {
		h.of[k] = true
	}
	return h
}

// changed returns a channel that is closed when newest may answer otherwise next, but for
// what expires. Who doesn't say that it is gone is forgotten at the next change that it would
// have heard of.
func (h *hearer) changed() <-chan struct{} {
	h.cache.mu.Lock()
	defer h.cache.mu.Unlock()
	if h.next == nil {
		h.next = make(chan struct{})
		h.cache.hearing[h] = struct{}{}
	}
	return h.next
}

// gone forgets who hears no more.
func (h *hearer) gone() {
	h.cache.mu.Lock()
	defer h.cache.mu.Unlock()
	delete(h.cache.hearing, h)
	h.next = nil
}

// ring wakes all who keep copies.
func (c *cache) ring() { c.wake(func(*hearer) bool { return true }) }

// landed wakes those who keep copies of one credential.
func (c *cache) landed(k key) { c.wake(func(h *hearer) bool { return h.of == nil || h.of[k] }) }

// delivered wakes those who hear of whatever changes: of files too.
func (c *cache) delivered() { c.wake(func(h *hearer) bool { return h.of == nil }) }

func (c *cache) wake(whom func(*hearer) bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for h := range c.hearing {
		if whom(h) {
			close(h.next)
			h.next = nil
			delete(c.hearing, h)
		}
	}
}

// find returns the entry of a request that is kept, nil for none.
func (c *cache) find(r sdk.Request) *entry {
	want := fileRequest(r)
	if want.normalize() != nil {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.entries[want.key()]
}

// newest returns what may be given out of an entry now, and what it says of itself; nil for
// nothing. It asks nobody.
func (c *cache) newest(e *entry) (*sdk.Credential, *token.Claims) {
	h := c.usable(e)
	if h == nil {
		return nil, nil
	}
	return c.told(h), h.claims
}

// close drops every credential and waits for what is under way.
func (c *cache) close() {
	c.mu.Lock()
	entries := c.entries
	c.entries = map[key]*entry{}
	c.cancel()
	c.mu.Unlock()
	for _, e := range entries {
		e.source.Close()
	}
	c.wg.Wait()
}

// pin keeps these credentials whether or not anyone asks for them, and no others: those
// that were pinned before are kept while somebody asks.
func (c *cache) pin(requests []Request) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ctx.Err() != nil {
		return stopping()
	}
	wanted := map[key]bool{}
	for _, r := range requests {
		wanted[r.key()] = true
	}
	for key, e := range c.entries {
		if e.pinned && !wanted[key] {
			e.pinned, e.asked = false, c.now()
		}
	}
	for _, r := range requests {
		e, ok := c.entries[r.key()]
		if !ok {
			if err := c.makeRoom(); err != nil {
				return err
			}
			var err error
			if e, err = c.add(r, true); err != nil {
				return err
			}
		}
		e.pinned = true
		c.keep(e)
	}
	return nil
}

// add makes an entry; mu is held.
func (c *cache) add(r Request, pinned bool) (*entry, error) {
	e, k := &entry{req: r, pinned: pinned, asked: c.now()}, r.key()
	e.ctx, e.cancel = context.WithCancel(c.ctx)
	source, err := sdk.NewTokenSource(sdk.SourceConfig{
		Fetch: func(ctx context.Context) (*sdk.Credential, error) { return c.fetch(ctx, e) },
		// What dies on its way must not wait for somebody who asks: files and watchers don't.
		Fits: func(cred *sdk.Credential) bool { return !c.dead(e, cred) }, Unfit: deadOnArrival(),
		Looked: true, Landed: func() { c.landed(k) },
		RenewFrom: renewFrom, RenewTo: renewTo,
		Timeout: issueTimeout, Now: c.now, Boot: c.boot, Jitter: c.jitter,
		Log: c.log.With("audience", r.Audience),
	})
	if err != nil {
		return nil, err
	}
	e.source = source
	c.entries[k] = e
	return e, nil
}

// keep renews the entry's credential before anyone asks, from now on; mu is held.
func (c *cache) keep(e *entry) {
	if c.ctx.Err() != nil {
		return
	}
	e.run.Do(func() { c.wg.Go(func() { _ = e.source.Run(e.ctx) }) })
}

// start runs a job that ends with the cache, whoever waits for it. It reports false if
// that has begun to end.
func (c *cache) start(job func(context.Context)) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ctx.Err() != nil {
		return false
	}
	c.wg.Go(func() { job(c.ctx) })
	return true
}

// token returns a credential from memory, or fetches one; it is alive as far as the
// agent knows at this moment.
func (c *cache) token(ctx context.Context, r Request) (*sdk.Credential, error) {
	if err := r.normalize(); err != nil {
		return nil, invalid(err.Error())
	}
	if err := notIssued(c.svids); err != nil {
		return nil, err
	}
	e, err := c.acquire(r)
	if err != nil {
		return nil, err
	}
	cred, err := e.source.Token(ctx)
	c.release(e, err)
	if err != nil {
		return nil, upstreamError(err)
	}
	if h := e.latest.Load(); h != nil && h.grant == cred.Grant {
		cred = c.told(h)
	}
	return cred, nil
}

func (c *cache) acquire(r Request) (*entry, error) {
	key := r.key()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ctx.Err() != nil {
		return nil, stopping()
	}
	e, ok := c.entries[key]
	if !ok {
		if err := c.makeRoom(); err != nil {
			return nil, err
		}
		var err error
		if e, err = c.add(r, false); err != nil {
			return nil, err
		}
		c.counts.misses.Add(1)
	} else {
		c.counts.hits.Add(1)
	}
	e.waiting++
	e.asked = c.now()
	return e, nil
}

// release lets go of an entry. One that never got a credential is not worth keeping,
// and must not be asked for again and again when nobody waits.
func (c *cache) release(e *entry, err error) {
	c.mu.Lock()
	e.waiting--
	useless := err != nil && e.waiting == 0 && !e.pinned && c.usable(e) == nil && c.entries[e.req.key()] == e
	if useless {
		delete(c.entries, e.req.key())
	} else if err == nil {
		c.keep(e)
	}
	c.mu.Unlock()
	if useless {
		e.end()
	}
}

func (e *entry) end() {
	e.cancel()
	e.source.Close()
}

// makeRoom drops the entry that was asked for longest ago if there are too many; mu is
// held.
func (c *cache) makeRoom() error {
	if len(c.entries) < maxEntries {
		return nil
	}
	var oldest *entry
	for _, e := range c.entries {
		if !e.pinned && e.waiting == 0 && (oldest == nil || e.asked.Before(oldest.asked)) {
			oldest = e
		}
	}
	if oldest == nil {
		return refuse(codes.ResourceExhausted, "CACHE_FULL", fmt.Sprintf("%d different credentials are in use", maxEntries), "ask for fewer combinations of audience and scopes")
	}
	delete(c.entries, oldest.req.key())
	oldest.cancel()
	c.wg.Go(oldest.source.Close) // may wait for a call
	return nil
}

// tidy drops what nobody has asked for lately.
func (c *cache) tidy() {
	var idle []*entry
	c.mu.Lock()
	for key, e := range c.entries {
		if !e.pinned && e.waiting == 0 && c.now().Sub(e.asked) > idleAfter {
			delete(c.entries, key)
			idle = append(idle, e)
		}
	}
	c.mu.Unlock()
	for _, e := range idle {
		e.end()
	}
}

// sweep is drop where something is known anew.
func (c *cache) sweep(ctx context.Context) {
	c.drop(ctx)
	c.ring() // whether or not anything was dropped: there may be copies of what isn't here
}

// A look is when the clocks were last found to go as timers do.
type look struct {
	timers time.Time
	clocks mark
}

// minLeap is what counts as a leap of a clock: they aren't read at one moment.
const minLeap = 20 * time.Millisecond

// look is called every second, and does for all entries what timers can't: those sleep with
// the machine, and nothing need tell of a clock that was set or of a rotation. It returns
// what to call it with next.
func (c *cache) look(ctx context.Context, last look) look {
	if c.drop(ctx) {
		c.ring()
	}
	now := look{time.Now(), c.mark()}
	went := now.timers.Sub(last.timers)
	leapt := func(d time.Duration) bool { return (d - went).Abs() >= minLeap }
	if !leapt(now.clocks.time.Sub(last.clocks.time)) && !leapt(now.clocks.time.Round(0).Sub(last.clocks.time.Round(0))) && !leapt(now.clocks.boot.Sub(last.clocks.boot)) {
		return last // so that small leaps add up
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, e := range c.entries {
		e.source.Look()
	}
	return now
}

// drop drops every credential that is dead by what is known now, so that what is
// renewed ahead is fetched at once and not when somebody asks. It reports whether it did.
func (c *cache) drop(ctx context.Context) (dropped bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, e := range c.entries {
		h := e.latest.Load()
		if h == nil || !c.judged(h.claims) {
			continue
		}
		if c.outdated(h.claims) {
			e.source.Invalidate(h.grant)
		} else {
			e.source.Revoked(h.grant)
		}
		if e.latest.CompareAndSwap(h, nil) {
			dropped = true
			c.counts.dropped.Add(1)
			c.log.InfoContext(ctx, "dropped a dead credential", "grant", h.grant, "audience", e.req.Audience)
		}
	}
	return dropped
}

// reached ends the pauses of what could not be fetched: the broker is heard again. A fleet
// hears it at moments that are spread as its streams' reconnects are.
func (c *cache) reached() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, e := range c.entries {
		e.source.Reached()
	}
}

func (c *cache) len() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.entries)
}

// usable returns what may be given out of an entry, nil for nothing.
func (c *cache) usable(e *entry) *held {
	h := e.latest.Load()
	if h == nil || c.left(h) <= 0 || c.judged(h.claims) {
		return nil
	}
	return h
}

// dead reports whether a credential must not be given out any more.
func (c *cache) dead(e *entry, cred *sdk.Credential) bool {
	if h := e.latest.Load(); h != nil && h.grant == cred.Grant {
		return c.judged(h.claims)
	}
	t, err := token.Inspect(cred.Token.Reveal()) // renewed this moment: read the one in hand
	return err != nil || c.judged(&t.Claims)
}

// judged reports whether claims are dead: revoked, of an identity that the Workload API no
// longer gives this workload, or bound to a certificate that it has no longer.
func (c *cache) judged(claims *token.Claims) bool {
	if c.revoked(claims) {
		return true
	}
	if svid, err := c.svids.GetX509SVID(); disowned(svid, err, claims) {
		return true
	}
	return c.outdated(claims)
}

// outdated reports whether claims are bound to a certificate that was rotated.
func (c *cache) outdated(claims *token.Claims) bool {
	if claims.Binding != token.BindingX5T {
		return false
	}
	svid, err := c.svids.GetX509SVID()
	return err == nil && len(svid.Certificates) > 0 && sha256.Sum256(svid.Certificates[0].Raw) != claims.Certificate
}

// fetch gets a new credential from the broker.
func (c *cache) fetch(ctx context.Context, e *entry) (*sdk.Credential, error) {
	if err := c.limit(); err != nil {
		return nil, err
	}
	began := c.now()
	if e.attempt.key == "" || c.since(e.attempt.asked) > e.attemptFor() {
		e.attempt = attempt{rand.Text(), c.mark()}
	}
	asked := e.attempt.asked
	c.counts.fetches.Add(1)
	resp, err := c.tokens.Issue(ctx, e.req.message(e.attempt.key), grpc.WaitForReady(true))
	c.counts.latency.observe(c.now().Sub(began))
	c.contacted(err)
	if err != nil {
		c.counts.renewals.add("", outcome(sdk.FromRPC(err)))
		c.heed(err)
		if refusal := sdk.FromRPC(err); !temporary(refusal) {
			e.attempt = attempt{}
		}
		return nil, err
	}
	e.attempt = attempt{}
	cred, claims, err := read(resp.GetCredential(), e.req.Audience, asked.time)
	c.counts.renewals.add("", outcome(err))
	if err != nil {
		return nil, err
	}
	e.latest.Store(&held{grant: cred.Grant, claims: claims, cred: cred, asked: asked, life: cred.Expires.Sub(asked.time)})
	return cred, nil
}

// maxLimited is the longest that the agent stays away from the broker on its word: a
// limit may be raised meanwhile.
const maxLimited = time.Minute

// heed remembers a refusal for a limit of this identity: all who ask this agent share it.
// Other refusals that say when to come back are about one audience.
func (c *cache) heed(err error) {
	var refusal *sdk.Error
	if !errors.As(sdk.FromRPC(err), &refusal) || refusal.Code != codes.ResourceExhausted || refusal.RetryAfter() == 0 {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.limited, c.limitedAt = refusal, c.mark()
}

// limit returns the broker's refusal while it holds, with what is left of its time: who hears
// of it late must not wait as long as the first.
func (c *cache) limit() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.limited == nil {
		return nil
	}
	left := min(c.limited.RetryAfter(), maxLimited) - c.since(c.limitedAt)
	if left <= 0 {
		c.limited = nil
		return nil
	}
	metadata := map[string]string{"hint": c.limited.Hint}
	maps.Copy(metadata, c.limited.Metadata)
	metadata["retry_after"] = left.String()
	return sdk.FromRPC(refusal(c.limited.Code, c.limited.Reason, c.limited.Message, metadata))
}

func temporary(err error) bool {
	var refusal *sdk.Error
	return errors.As(err, &refusal) && refusal.Temporary()
}

// read makes a credential of the broker's answer and tells its times by the local
// clock: what matters to a caller is how long it still lives, and the broker's clock
// may be off. Its life began no earlier than the call that asked for it. What is said beside
// the token must be what the token says: it is judged by the one and told by the other.
func read(m *dayflyv1.Credential, audience string, asked time.Time) (*sdk.Credential, *token.Claims, error) {
	binding, err := wire.ToBinding(m.GetBinding())
	if err != nil {
		return nil, nil, fmt.Errorf("reading the broker's credential: %w", err)
	}
	if !m.GetIssuedAt().IsValid() || !m.GetExpiresAt().IsValid() {
		return nil, nil, errors.New("reading the broker's credential: it has no times")
	}
	t, err := token.Inspect(m.GetToken())
	if err != nil {
		return nil, nil, fmt.Errorf("reading the broker's credential: %w", err)
	}
	if t.Grant().String() != m.GetGrant() || t.Audience != m.GetAudience() || t.Binding != binding {
		return nil, nil, errors.New("reading the broker's credential: the token is another one than the answer says")
	}
	if t.Audience != audience {
		return nil, nil, errors.New("reading the broker's credential: it is for another audience than was asked for")
	}
	return &sdk.Credential{
		Token: token.NewSecret(m.GetToken()), Grant: m.GetGrant(), Audience: m.GetAudience(), Scopes: m.GetScopes(),
		Binding: binding, IssuedAt: asked, Expires: asked.Add(wire.Life(m)),
	}, &t.Claims, nil
}
