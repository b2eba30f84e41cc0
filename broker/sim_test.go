package broker_test

import (
	"container/heap"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/broker/storetest"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// The simulation runs brokers, relays and verifiers in one seeded loop: the real broker on
// a store, the real state machines of the feed, no goroutine that outlives a step. Clocks
// drift and jump, machines sleep, streams are slow, cut and moved, processes die, the
// store is put back from an old copy, keys are stolen. After every event the promises of
// the design are checked against what really happened, which only the loop knows.
//
// A failing seed is printed with its history, cut down to as few actions as still fail,
// and replays exactly:
//
//	go test ./broker -run TestSimulation -sim.seed=123 -sim.trace
var (
	simSeeds = flag.Int("sim.seeds", 100, "how many histories TestSimulation plays")
	simFirst = flag.Uint64("sim.first", 1, "the first seed")
	simSeed  = flag.Uint64("sim.seed", 0, "play this one history only")
	simTrace = flag.Bool("sim.trace", false, "print the history of -sim.seed")
	simPlain = flag.Bool("sim.noshrink", false, "report a failing seed as it is")
	simFor   = flag.Duration("sim.for", 0, "go on with further seeds for as long as this")
)

const (
	simActions = 160              // of one history
	simEpoch   = 1_800_000_000    // the wall clock's second at its beginning
	simSkew    = 10 * time.Second // what honest wall clocks are off by
)

// An event is something that happens at a moment of true time.
type simEvent struct {
	at time.Duration
	n  int // ties are broken by the order of scheduling
	do func()
}

type simQueue []simEvent

func (q simQueue) Len() int { return len(q) }
func (q simQueue) Less(i, j int) bool {
	return q[i].at < q[j].at || q[i].at == q[j].at && q[i].n < q[j].n
}
func (q simQueue) Swap(i, j int) { q[i], q[j] = q[j], q[i] }
func (q *simQueue) Push(x any)   { *q = append(*q, x.(simEvent)) }
func (q *simQueue) Pop() any {
	old := *q
	e := old[len(old)-1]
	*q = old[:len(old)-1]
	return e
}

// simTB runs the clean-ups of one history at its end, and counts its errors as violations.
type simTB struct {
	testing.TB
	s        *sim
	cleanups []func()
}

func (t *simTB) Helper()                           {}
func (t *simTB) Cleanup(f func())                  { t.cleanups = append(t.cleanups, f) }
func (t *simTB) Errorf(format string, args ...any) { t.s.violation("store: "+format, args...) }

// A sim is one history.
type sim struct {
	tb    *simTB
	seed  uint64
	rnd   *rand.Rand
	now   time.Duration // true time
	queue simQueue
	n     int
	skip  map[int]bool // actions to leave out, for the shrinking
	done  int          // actions so far
	keys  int          // that were used

	store     *storetest.Mem // on disk
	lastStore *storetest.Mem // a copy that somebody keeps
	lastTruth simTruth
	lastMade  time.Time
	brokers   []*simBroker
	relays    []*simRelay
	verifiers []*simVerifier
	callers   []*simCaller
	nonces    int
	acted     bool                          // something happened since the last look
	foreign   map[token.KeyID]time.Duration // when each key was inserted
	made      map[token.KeyID]token.PublicKey
	published []*simKey       // by brokers
	lookNext  time.Duration   // time passes, and what was fresh is stale
	latest    time.Time       // that a broker's wall clock ever showed
	asking    func()          // runs once while policy is asked about an issue,
	inside    func()          // and this between its snapshot and its commit
	shared    bool            // several brokers
	forked    bool            // an old copy was put back: forks are no false alarms
	bounds    []time.Duration // that verifiers begin with
	restored  time.Duration   // when an era last began
	quiet     time.Duration   // at the end: nothing is revoked any more
	clocksOff bool            // a broker's wall clock ever was, by more than is allowed for
	calm      bool            // little is revoked, so that much lives on
	signs     bool            // brokers sign heads
	liarKey   *simKey         // of relays that lie
	byPrint   map[token.Fingerprint]*simToken

	simTruth
	failed string
	trace  []string
	counts map[string]int
}

// simTruth is what happened to the store, as no part of the system knows it.
type simTruth struct {
	tokens  []*simToken
	records []*simRecord
	locks   map[uint64]*simLock
	stolen  map[token.KeyID]*simKey
	// deadKeys are revoked ones, since when: for ever, whatever era.
	deadKeys  map[token.KeyID]time.Duration
	proposals []simProposal
	uses      simUses

	stolenSVIDs []simCaller // copies
}

func (t simTruth) clone() simTruth {
	t.tokens, t.records = append([]*simToken(nil), t.tokens...), append([]*simRecord(nil), t.records...)
	locks, stolen := map[uint64]*simLock{}, map[token.KeyID]*simKey{}
	for n, l := range t.locks {
		c := *l
		locks[n] = &c
	}
	for id, k := range t.stolen {
		stolen[id] = k
	}
	t.locks, t.stolen, t.deadKeys = locks, stolen, maps.Clone(t.deadKeys)
	t.proposals, t.uses = slices.Clone(t.proposals), t.uses.clone()
	return t
}

// simRecord is a committed revocation.
type simRecord struct {
	rec broker.Record
	at  feed.Position
	// committed is the true time of the commit.
	committed time.Duration
	contained bool // somebody was told so
}

type simLock struct {
	number    uint64
	rec       broker.Record
	committed time.Duration
	exact     bool // the broker's wall clock was right
	lifted    bool
}

// simToken is a credential that somebody holds.
type simToken struct {
	name    string
	secret  token.Secret
	claims  token.Claims
	svid    token.Thumbprint // that the broker saw,
	key     token.KeyID      // and that it signed with
	parent  *simToken
	issued  time.Duration
	expires time.Duration // true time
	forged  bool
	print   token.Fingerprint
}

type simKey struct {
	id      token.KeyID
	public  token.PublicKey
	private *ecdsa.PrivateKey
}

// simMachine is a machine with its clocks.
type simMachine struct {
	name   string
	boot   time.Duration // offset of the clock that runs through suspend
	wall   time.Duration // how far the wall clock is off
	drift  float64
	asleep time.Duration // until then
	slept  time.Duration // in all: for a mutant whose clock stops meanwhile
}

func (s *sim) newMachine(name string) simMachine {
	return simMachine{
		name: name, boot: time.Duration(s.rnd.Int64N(int64(1000 * time.Hour))), drift: (s.rnd.Float64() - 0.5) * 2e-4,
		wall: time.Duration(s.rnd.Int64N(int64(2*simSkew))) - simSkew,
	}
}

func (m *simMachine) Boot(s *sim) feed.Instant {
	return feed.Instant(m.boot + s.now + time.Duration(float64(s.now)*m.drift))
}

func (m *simMachine) sleep(s *sim, d time.Duration) {
	m.asleep = s.now + d
	m.slept += d
	s.note("%s sleeps for %s", m.name, d)
	s.after(d, func() {})
}

func (m *simMachine) Wall(s *sim) time.Time { return simTime(s.now + m.wall) }

func (m *simMachine) awake(s *sim) bool { return s.now >= m.asleep }

func simTime(d time.Duration) time.Time { return time.Unix(simEpoch, 0).UTC().Add(d) }

// simCaller is a workload with its SVID of now.
type simCaller struct {
	broker.Caller
	issued time.Duration // true time of the SVID
}

// simRand makes the broker's randomness of the seed.
type simRand struct{ r *rand.Rand }

func (r simRand) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = byte(r.r.Uint32())
	}
	return len(p), nil
}

// simKeys are made once: histories only take turns with them.
var simKeys = sync.OnceValue(func() []*ecdsa.PrivateKey {
	keys := make([]*ecdsa.PrivateKey, 64)
	for i := range keys {
		k, err := ecdsa.ParseRawPrivateKey(elliptic.P256(), binary.BigEndian.AppendUint64(make([]byte, 24), uint64(i+1)*0x9e3779b97f4a7c15))
		if err != nil {
			panic(err)
		}
		keys[i] = k
	}
	return keys
})

func newSim(t testing.TB, seed uint64, skip map[int]bool) *sim {
	s := &sim{seed: seed, rnd: rand.New(rand.NewPCG(seed, 7)), skip: skip, counts: map[string]int{}, foreign: map[token.KeyID]time.Duration{}, made: map[token.KeyID]token.PublicKey{}, byPrint: map[token.Fingerprint]*simToken{}}
	s.tb = &simTB{TB: t, s: s}
	s.locks, s.stolen, s.deadKeys = map[uint64]*simLock{}, map[token.KeyID]*simKey{}, map[token.KeyID]time.Duration{}
	s.store = storetest.Memory(s.tb, broker.Record{
		Event:   feed.Event{Era: &feed.Era{Era: token.NextEra(0, simTime(0))}},
		Details: broker.Details{Time: simTime(0), Actor: issuer},
	})
	s.shared = s.chance(4)
	s.signs, s.calm = !s.chance(3), s.chance(3) || s.shared && s.chance(2)
	s.bounds = simBounds
	if s.chance(2) { // what is raised later, or enrolled, is larger than all there is
		s.bounds = simBounds[:1+s.rnd.IntN(2)]
	}
	brokers := 1
	if s.shared {
		brokers = 2
	}
	for i := range 5 {
		c := &simCaller{Caller: broker.Caller{ID: simID(i)}}
		s.callers = append(s.callers, c)
		s.rotate(c)
	}
	for i := range brokers {
		b := &simBroker{s: s, simMachine: s.newMachine(fmt.Sprint("broker", i))}
		s.brokers = append(s.brokers, b)
		b.start()
	}
	for i := range 1 + s.rnd.IntN(2) {
		r := &simRelay{simFollower: simFollower{s: s, simMachine: s.newMachine(fmt.Sprint("relay", i)), bound: s.bound()}, index: i}
		r.distrusts = s.signs && s.chance(3)
		s.relays = append(s.relays, r)
		r.restart()
	}
	for i := range 3 {
		v := &simVerifier{simFollower: simFollower{s: s, simMachine: s.newMachine(fmt.Sprint("verifier", i)), bound: s.bound(), accepts: s.chance(12)}}
		v.distrusts = s.signs && s.chance(3)
		s.verifiers = append(s.verifiers, v)
		v.restart()
	}
	s.after(s.between(time.Second), s.act)
	return s
}

func simID(i int) spiffeid.ID {
	return spiffeid.RequireFromString([]string{
		"spiffe://example.org/ns/prod/a", "spiffe://example.org/ns/prod/b", "spiffe://example.org/ns/production/c",
		"spiffe://example.org/ns/dev/d", "spiffe://partner.example/e",
	}[i])
}

func (s *sim) chance(oneIn int) bool { return s.rnd.IntN(oneIn) == 0 }

// between returns a random duration, mostly short, on average about d.
func (s *sim) between(d time.Duration) time.Duration {
	return time.Duration(s.rnd.ExpFloat64()*float64(d)) + time.Millisecond
}

var simBounds = []time.Duration{2 * time.Second, 10 * time.Second, 30 * time.Second}

func (s *sim) bound() time.Duration { return s.bounds[s.rnd.IntN(len(s.bounds))] }

// after schedules.
func (s *sim) after(d time.Duration, do func()) {
	s.n++
	heap.Push(&s.queue, simEvent{s.now + d, s.n, do})
}

func (s *sim) violation(format string, args ...any) {
	if s.failed == "" {
		s.failed = fmt.Sprintf(format, args...)
		s.note("VIOLATION %s", s.failed)
	}
}

func (s *sim) note(format string, args ...any) {
	if *simTrace {
		s.trace = append(s.trace, fmt.Sprintf("%12s  ", s.now.Truncate(time.Millisecond))+fmt.Sprintf(format, args...))
	}
}

// play runs the history and returns the first violation.
func (s *sim) play() string {
	defer func() {
		for _, f := range s.tb.cleanups {
			f()
		}
	}()
	for s.done < simActions && s.failed == "" {
		s.step()
	}
	if s.failed == "" {
		s.settle()
	}
	return s.failed
}

func (s *sim) step() {
	e := heap.Pop(&s.queue).(simEvent)
	s.now = max(s.now, e.at)
	e.do()
	s.pump()
	if look := s.now >= s.lookNext; look || s.acted {
		s.check()
		s.lookNext, s.acted = s.now+200*time.Millisecond, false
	}
}

// settle ends all faults: everything must heal by itself.
func (s *sim) settle() {
	s.done = simActions // no more actions
	for _, b := range s.brokers {
		b.asleep, b.deaf = 0, 0
		if b.b == nil {
			b.start()
		}
		b.catchUp()
	}
	for _, r := range s.relays {
		r.lies = simHonest
	}
	for _, f := range s.followers() {
		f.asleep, f.alone = 0, 0
		f.cut() // the next stream is quick
	}
	s.quiet = s.now + 15*time.Second
	for end := s.now + 75*time.Second; s.now < end && s.failed == "" && s.queue.Len() > 0; {
		s.step()
	}
	if s.failed == "" && !s.forked {
		s.checkHealed()
	}
}

// jump lets a long time pass in which machines run and nothing is delivered.
func (s *sim) jump(d time.Duration) {
	for _, f := range s.followers() {
		f.cut()
	}
	s.now += d
}

func simPlay(t testing.TB, seed uint64, skip map[int]bool) *sim {
	s := newSim(t, seed, skip)
	s.play()
	return s
}

// shrink leaves out actions for as long as the history still fails in the same way.
func simShrink(t testing.TB, seed uint64, failed string) map[int]bool {
	kind, _, _ := strings.Cut(failed, ":")
	skip := map[int]bool{}
	for size := simActions / 2; size > 0; size /= 2 {
		for from := 0; from < simActions; from += size {
			try := map[int]bool{}
			for i := range skip {
				try[i] = true
			}
			for i := from; i < from+size; i++ {
				try[i] = true
			}
			if len(try) > len(skip) && strings.HasPrefix(simPlay(t, seed, try).failed, kind+":") {
				skip = try
			}
		}
	}
	return skip
}

func TestSimulation(t *testing.T) {
	if *simSeed != 0 {
		s := simPlay(t, *simSeed, nil)
		for _, line := range s.trace {
			t.Log(line)
		}
		if s.failed != "" {
			t.Fatalf("seed %d: %s", s.seed, s.failed)
		}
		return
	}
	began := time.Now()
	total := map[string]int{}
	histories := 0
	for seed := *simFirst; histories < *simSeeds || time.Since(began) < *simFor; seed++ {
		s := simPlay(t, seed, nil)
		histories++
		switch {
		case s.failed != "" && *simPlain:
			t.Fatalf("seed %d: %s", seed, s.failed)
		case s.failed != "":
			simReport(t, s)
		}
		for k, n := range s.counts {
			total[k] += n
		}
	}
	t.Logf("%d histories in %s: %v", histories, time.Since(began).Truncate(time.Millisecond), total)
	for _, what := range []string{"issued", "exchanged", "revoked", "locked", "lifted", "accepted", "refused", "contained", "confirmed", "closed", "pruned", "crashed", "forged", "forked", "era", "proposed", "confirmed by another", "silenced", "presented when dead", "alarmed", "given back"} {
		if total[what] == 0 {
			t.Errorf("nothing was ever %s", what)
		}
	}
}

// simReport prints a failing history, shrunk.
func simReport(t *testing.T, s *sim) {
	skip := simShrink(t, s.seed, s.failed)
	*simTrace = true
	small := simPlay(t, s.seed, skip)
	*simTrace = false
	for _, line := range small.trace {
		t.Log(line)
	}
	t.Fatalf("seed %d: %s\n%d of %d actions suffice; the whole of it: go test ./broker -run TestSimulation -sim.seed=%d -sim.trace -v",
		s.seed, s.failed, simActions-len(skip), simActions, s.seed)
}

// TestSimulationReplays: one seed, one history.
func TestSimulationReplays(t *testing.T) {
	*simTrace = true
	defer func() { *simTrace = false }()
	for seed := range uint64(10) {
		a, b := simPlay(t, seed+1, nil), simPlay(t, seed+1, nil)
		if x, y := strings.Join(a.trace, "\n"), strings.Join(b.trace, "\n"); x != y {
			t.Fatalf("seed %d: two histories:\n%s\n\n%s", seed+1, x, y)
		}
	}
}

// Brokers.

// simBroker is a broker's process and its machine.
type simBroker struct {
	simMachine
	s         *sim
	b         *broker.Broker // nil while it is down
	store     *simStore
	epoch     int
	key       *simKey
	streams   []*simStream
	gagged    bool          // this process was shown a signed head that its log lacks,
	disregard feed.Position // and that an operator knows
	alarms    int           // of uses that were never recorded, that this process raised
	deaf      time.Duration // until then it hears nothing of what others append
}

// simStore is the store as one broker has it open.
type simStore struct {
	*storetest.Mem
	b       *simBroker
	proving bool
}

func (t *simStore) Append(ctx context.Context, next func(feed.Position) (broker.Record, error)) (broker.Record, error) {
	rec, err := t.Mem.Append(ctx, next)
	if err == nil {
		t.b.s.committed(t.b, rec)
	}
	return rec, errors.Join(err, t.b.catchUp()) // it waits for its record, or for what it lacked
}

// Issue lets something happen between the snapshot of an issue and its commit.
func (t *simStore) Issue(ctx context.Context, g *broker.Grant, admit func([]broker.Record) error) error {
	if f := t.b.s.inside; f != nil {
		t.b.s.inside = nil
		f()
	}
	return t.Mem.Issue(ctx, g, admit)
}

// State applies what a broker asks for because it waits until it has it; a proof waits
// for nothing.
func (t *simStore) State(ctx context.Context) (broker.StoreState, error) {
	st, err := t.Mem.State(ctx)
	if t.b.key != nil && !t.proving {
		t.b.applyUntil(st.Head.Seq)
	}
	return st, err
}

func (b *simBroker) start() {
	s := b.s
	b.epoch++
	b.boot = time.Duration(s.rnd.Int64N(int64(1000 * time.Hour)))
	if b.gagged && s.chance(4) {
		b.disregard = feed.Position{Era: s.head().Era, Seq: 1 << 60}
	}
	b.key, b.gagged, b.alarms = nil, false, 0
	b.store = &simStore{Mem: s.store.Reopen(), b: b}
	cfg := broker.Config{
		Issuer: issuer, Store: b.store, Policy: simPolicy{s},
		Signer: func() (broker.Signer, bool) {
			if b.key == nil {
				return broker.Signer{}, false
			}
			return broker.PrivateSigner(b.key.public, b.key.private), true
		},
		VerifyKey: func(k feed.Key, _ time.Time) error {
			if string(k.Signature) != "vouched" {
				return errors.New("nobody vouches for this key")
			}
			return nil
		},
		VerifyHead: simVerify,
		Disregard:  b.disregard,
		Audit: func(e broker.AuditEntry) error {
			if e.Reason == "GRANT_UNRECORDED" {
				b.alarms++
			}
			return nil
		},
		Now:  func() time.Time { return b.Wall(s) },
		Boot: func() feed.Instant { return b.Boot(s) },
		Rand: simRand{s.rnd},
	}
	if s.signs {
		cfg.SignHead = simSign
	}
	var err error
	b.b, err = broker.New(cfg)
	if err != nil {
		s.violation("internal: %v", err)
		return
	}
	if err := errors.Join(b.b.Load(context.Background()), b.b.CheckKeys(context.Background())); err != nil {
		s.violation("internal: loading: %v", err)
		return
	}
	s.note("%s starts at %s", b.name, b.b.Head())
	b.newKey()
	s.looksAtUses(b)
}

// newKey makes and publishes the key of a process, or its next one.
func (b *simBroker) newKey() {
	s := b.s
	if s.keys == len(simKeys()) {
		return // enough of them in one history
	}
	key := s.makeKey()
	if b.key == nil {
		b.key = key // the store may be asked now
	}
	if err := b.b.PublishKey(context.Background(), simKeyRecord(key, "vouched")); err != nil {
		s.violation("internal: publishing a key: %v", err)
	}
	b.key = key
	s.published = append(s.published, key)
	s.note("%s signs with %s", b.name, key.id)
}

func (s *sim) makeKey() *simKey {
	private := simKeys()[s.keys]
	s.keys++
	public, err := token.NewPublicKey(token.ES256, &private.PublicKey)
	if err != nil {
		panic(err)
	}
	s.made[public.ID] = public
	return &simKey{public.ID, public, private}
}

func simKeyRecord(k *simKey, signature string) feed.Key {
	der, err := x509.MarshalPKIXPublicKey(&k.private.PublicKey)
	if err != nil {
		panic(err)
	}
	return feed.Key{Public: k.public, DER: der, Signature: []byte(signature), Certificates: [][]byte{{1}}}
}

func (b *simBroker) kill() {
	b.s.note("%s dies", b.name)
	b.s.counts["crashed"]++
	b.b = nil
	_ = b.store.Close()
	for _, st := range b.streams {
		st.open = false
	}
	b.streams = nil
}

// catchUp applies everything that the store has.
func (b *simBroker) catchUp() error {
	if b.b == nil {
		return nil
	}
	st, err := b.store.Mem.State(context.Background())
	if err != nil {
		return err
	}
	b.applyUntil(st.Head.Seq)
	return nil
}

func (b *simBroker) applyUntil(seq uint64) {
	defer func(was bool) { b.store.proving = was }(b.store.proving)
	b.store.proving = true // it waits for nothing
	if err := b.b.ApplyUntil(context.Background(), seq); err != nil {
		b.s.violation("internal: applying: %v", err)
	}
}

func (b *simBroker) up() bool { return b.b != nil && b.awake(b.s) }

// committed is the truth about a record of the log.
func (s *sim) committed(b *simBroker, rec broker.Record) {
	st, _ := b.store.Mem.State(context.Background())
	switch {
	case rec.Revocation != nil:
		s.records = append(s.records, &simRecord{rec: rec, at: st.Head, committed: s.now})
		for _, id := range revokedKeys(rec) {
			if _, ok := s.deadKeys[id]; !ok {
				s.deadKeys[id] = s.now
			}
		}
		if rec.Details.Lock != broker.LockNone && rec.Details.Lock != "" {
			s.locks[rec.Seq] = &simLock{number: rec.Seq, rec: rec, committed: s.now, exact: b.wall.Abs() <= simSkew}
		}
	case rec.Lift != nil:
		if l := s.locks[rec.Lift.Lock]; l != nil {
			l.lifted = true
		}
	}
	s.note("%s commits %s: %s", b.name, st.Head, simDescribe(rec))
	if s.shared { // others hear of it later
		for _, other := range s.brokers {
			if other != b {
				epoch := other.epoch
				s.after(max(s.between(2*time.Second), other.deaf-s.now), func() {
					if other.epoch == epoch && other.up() && s.now >= other.deaf {
						_ = other.catchUp()
					}
				})
			}
		}
	}
}

func simDescribe(rec broker.Record) string {
	switch {
	case rec.Revocation != nil:
		return fmt.Sprintf("revocation of %v, lock %s", rec.Revocation.Selectors, rec.Details.Lock)
	case rec.Lift != nil:
		return fmt.Sprintf("lift of %d", rec.Lift.Lock)
	case rec.Key != nil:
		return fmt.Sprintf("key %s", rec.Key.Public.ID)
	}
	return fmt.Sprintf("era %s", rec.Era.Era)
}

// simPolicy gives everything that is asked for: what narrows is Go code.
type simPolicy struct{ s *sim }

func (p simPolicy) Decide(_ context.Context, q broker.Question) (broker.Decision, error) {
	if f := p.s.asking; f != nil && (q.Action == broker.ActionIssue || q.Action == broker.ActionExchange) {
		p.s.asking = nil
		f()
	}
	scopes := q.Scopes
	if len(scopes) == 0 {
		scopes = []string{"read", "write"}
	}
	return broker.Decision{Allow: true, Scopes: scopes, TTL: token.MaxTTL, SecondPerson: broker.SecondPerson{Required: true}}, nil
}
func (simPolicy) AnswersTo(id spiffeid.ID, audience string) bool {
	return audience == simAudience(id)
}
func (simPolicy) Audience(name string) (broker.Audience, bool) {
	return broker.Audience{Name: name, VerifiedBy: "feed"}, true
}

func (simPolicy) External() []broker.Audience { return nil }

func (simPolicy) Fallback(spiffeid.ID, string) broker.Fallback { return broker.Fallback{} }

func simAudience(id spiffeid.ID) string { return "aud" + strings.ReplaceAll(id.Path(), "/", "-") }
