//go:build linux

package soak_test

import (
	"context"
	"crypto"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/e2e/sandbox"
	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/wire"
	"github.com/dayflyhq/dayfly/sdk"
)

// Audiences.
const (
	goods    = "goods" // verified by the feed
	exchange = "sts"   // by a token service that knows the JWK set only
)

// A world is a broker, its agents, and those who ask.
type world struct {
	t      *testing.T
	ctx    context.Context
	life   time.Duration // of a token
	bound  time.Duration // of agents and verifiers
	notice time.Duration
	began  time.Time

	box     *sandbox.Sandbox
	pid     atomic.Int64 // of the broker, 0 while it is away
	admin   string       // where it tells of itself
	alice   *sdk.Client
	checker *checker
	sts     *tokenService
	units   map[string]*unit
	streams []*stream
	judges  []*judged // verifiers behind the relay
	book    book
	late    downtime // when this process itself wasn't run in time
	log     tally
}

// must unwraps a result, or ends the test: must(f())(t).
func must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// newWorld starts everything and returns once every agent serves.
func newWorld(t *testing.T, ctx context.Context, life, notice time.Duration) *world {
	t.Helper()
	w := &world{
		t: t, ctx: ctx, life: life, notice: notice, bound: max(life/2, 3*time.Second),
		units: map[string]*unit{}, book: book{revoked: map[string]*revocation{}},
	}
	w.log.init()
	w.box = must(sandbox.New(sandbox.Config{Broker: command("dayfly-broker"), Agent: command("dayfly-agent")}))(t)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("broker: %s", w.box.Log("broker"))
		}
		w.box.Close()
	})
	w.write(filepath.Join(w.box.PolicyDir(), "soak.yaml"), fmt.Sprintf(`
audiences:
  %[1]s: {owner: soak, identities: [%[3]q], max_staleness: %[5]s}
  %[2]s: {owner: soak, verified_by: external}
entitlements:
  spiffe://dayfly.test/ns/soak/*:
    %[1]s: {scopes: [read, write], ttl: %[4]s}
    %[2]s: {scopes: [s3], ttl: %[4]s, binding: none}
verifiers:
  %[3]s: {follow: [%[1]s], relay: true}
  %[6]s: {follow: [%[1]s]}
`, goods, exchange, identity(unitRelay), life, w.bound, identity("edge")))
	if err := w.box.StartBroker(ctx); err != nil {
		t.Fatal(err)
	}
	w.pid.Store(int64(w.box.BrokerPID()))
	w.admin = w.box.Info.Admin
	w.alice = must(w.box.Client(ctx, sandbox.Alice, w.box.Info.GRPC))(t)
	w.checker = &checker{
		issuer: w.box.Issuer, jwks: "http://" + w.box.Info.Public + "/jwks.json", life: life, violate: w.violate,
		keys: map[string]crypto.PublicKey{}, seen: map[string]*checked{}, waiting: map[string]bool{},
	}
	if err := w.checker.refresh(ctx); err != nil {
		t.Fatal(err)
	}
	w.sts = newTokenService(t, w)
	for _, name := range everyUnit {
		w.addUnit(name)
	}
	return w
}

func (w *world) write(path, text string) {
	w.t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		w.t.Fatal(err)
	}
}

// addUnit starts an agent, and those who ask it.
func (w *world) addUnit(name string) {
	w.t.Helper()
	dir := w.box.Dir
	u := &unit{name: name, id: identity(name), http: filepath.Join(dir, name+"-http.sock"), grpc: filepath.Join(dir, name+".sock")}
	w.units[name] = u
	u.path = must(newPath(w.box.Info.GRPC))(w.t)
	w.t.Cleanup(u.path.close)
	api := must(w.box.TD.Workload(u.id))(w.t)
	must(w.box.Source(w.ctx, u.id))(w.t)
	u.reach.begin()
	u.down.begin()
	var more string
	switch name {
	case unitJumps:
		w.startJumping(u, api)
		w.asks(u)
		return
	case unitFiles:
		more = w.files(u)
	case unitAWS:
		more = w.aws(u)
	case unitRelay:
		more = w.relay(u)
	}
	if err := u.writeConfig(dir, api, w.bound.String(), more); err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() {
		if w.t.Failed() {
			w.t.Logf("agent %s: %s", u.name, u.tail())
		}
		select {
		case <-u.ended():
		default:
			_ = u.stop(9)
		}
	})
	if err := u.start(w.ctx); err != nil {
		w.t.Fatal(err)
	}
	u.restarted()
	if name == unitSockets || name == unitRestarted {
		w.asks(u)
	}
}

// probe asks the broker for a credential on the agent's own way, with its SVID, on a new
// connection each time: what it gets the agent could have had.
func (w *world) probe(ctx context.Context, u *unit) {
	every := time.NewTicker(w.notice / 6)
	defer every.Stop()
	asked := slices.ContainsFunc(w.streams, func(s *stream) bool { return s.u == u })
	last, away, unserved := time.Now(), false, u.unserved.Load()
	for {
		select {
		case <-ctx.Done():
			return
		case <-every.C:
		}
		start := time.Now()
		err := w.probeOnce(ctx, u)
		if ctx.Err() != nil {
			return
		}
		u.reach.probed(start, time.Now(), err == nil)
		switch {
		case err != nil:
			away = true
		case away:
			w.log.outage(start.Sub(last), asked && u.unserved.Load() == unserved)
			fallthrough
		default:
			last, away, unserved = time.Now(), false, u.unserved.Load()
		}
	}
}

func (w *world) probeOnce(ctx context.Context, u *unit) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	src, err := w.box.Source(ctx, u.id) // was made before; not made here
	if err != nil {
		return err
	}
	c, err := sdk.New(sdk.Config{Address: u.path.addr(), Source: src, BrokerID: sandbox.Broker})
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = c.Issue(ctx, sdk.Request{Audience: goods})
	return err
}

// watchLateness notes when this process wasn't run in time: on a machine that is that busy
// nothing is said about others.
func (w *world) watchLateness(ctx context.Context) {
	const every, much = 50 * time.Millisecond, 250 * time.Millisecond
	for last := time.Now(); ctx.Err() == nil; last = time.Now() {
		time.Sleep(every)
		if time.Since(last) > every+much {
			w.late.mu.Lock()
			w.late.spans = append(w.late.spans, span{last, time.Now()})
			w.late.mu.Unlock()
			for _, u := range w.units {
				u.reach.breaks()
			}
		}
	}
}

// A book is what was revoked.
type book struct {
	mu      sync.Mutex
	revoked map[string]*revocation // by grant, or by identity
}

// A revocation is one of a grant or of an identity.
type revocation struct {
	began     time.Time
	ended     time.Time            // when the call returned; zero: it has not
	acked     map[string]time.Time // by identity: when its receipt was there
	contained time.Time
}

// of returns what was revoked last of a credential: the grant, or its identity after it
// was issued.
func (b *book) of(s served, id string) (revocation, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if r, ok := b.revoked[s.grant]; ok {
		return r.clone(), true
	}
	// A token's times are whole seconds.
	if r, ok := b.revoked[id]; ok && (r.ended.IsZero() || !s.issued.After(r.ended)) {
		return r.clone(), true
	}
	return revocation{}, false
}

// heard is when an agent knew of the revocation and could fetch anew: it may have heard
// late, on a path that was deaf, but a stream that is deaf ends at its bound.
func (r *revocation) heard(id string) time.Time {
	if r.ended.IsZero() {
		return time.Now() // under way
	}
	at, ok := r.acked[id]
	if late := r.ended.Add(wire.DefaultBound); !ok || at.After(late) {
		at = late
	}
	if at.Before(r.ended) {
		at = r.ended
	}
	return at
}

// clone is for those who look without the lock: the map isn't theirs to change.
func (r *revocation) clone() revocation {
	out := *r
	out.acked = map[string]time.Time{}
	for k, v := range r.acked {
		out.acked[k] = v
	}
	return out
}

// revoke revokes a grant or an identity, however often the broker must be asked, and
// follows the receipts.
func (w *world) revoke(what string, selector *dayflyv1.Selector, lock dayflyv1.LockMode) (number uint64, err error) {
	ctx := w.ctx // to its end: nothing that may have been revoked is left open
	r := &revocation{began: time.Now(), acked: map[string]time.Time{}}
	w.book.mu.Lock()
	w.book.revoked[what] = r
	w.book.mu.Unlock()
	client := dayflyv1.NewRevocationServiceClient(w.alice.Conn())
	key := fmt.Sprintf("%s %d", what, r.began.UnixNano())
	for {
		var resp *dayflyv1.RevokeResponse
		call, cancel := context.WithTimeout(ctx, 5*time.Second)
		resp, err = client.Revoke(call, &dayflyv1.RevokeRequest{
			Selectors: []*dayflyv1.Selector{selector}, LockMode: lock, Reason: "soak", IdempotencyKey: key[max(0, len(key)-60):],
		})
		cancel()
		if err == nil {
			number = resp.GetRevocation().GetPosition().GetSequence()
			break
		}
		if !pause(ctx, 200*time.Millisecond) {
			return 0, err
		}
	}
	w.book.mu.Lock()
	r.ended = time.Now()
	w.book.mu.Unlock()
	go w.receipts(ctx, r, number)
	return number, nil
}

// receipts follows a revocation until it is contained and no receipt is open.
func (w *world) receipts(ctx context.Context, r *revocation, number uint64) {
	client := dayflyv1.NewRevocationServiceClient(w.alice.Conn())
	ctx, cancel := context.WithTimeout(ctx, 3*w.life)
	defer cancel()
	for ctx.Err() == nil {
		watch, err := client.WatchContainment(ctx, &dayflyv1.WatchContainmentRequest{Sequence: number})
		for err == nil {
			var m *dayflyv1.WatchContainmentResponse
			if m, err = watch.Recv(); err == nil {
				w.receipt(r, m.GetContainment())
			}
		}
		pause(ctx, time.Second)
	}
}

func (w *world) receipt(r *revocation, c *dayflyv1.Containment) {
	w.book.mu.Lock()
	defer w.book.mu.Unlock()
	now := time.Now()
	if c.GetContained() && r.contained.IsZero() {
		r.contained = now
	}
	for _, one := range c.GetReceipts() {
		if _, ok := r.acked[one.GetIdentity()]; !ok && one.GetState() == dayflyv1.ReceiptState_RECEIPT_STATE_CONFIRMED && len(one.GetVia()) == 0 {
			r.acked[one.GetIdentity()] = now
		}
	}
}
