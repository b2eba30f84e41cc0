package feed_test

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
)

// The simulation runs a whole fleet in one seeded loop: a store with its broker, a
// relay, and verifiers that follow either. Clocks drift, machines sleep, streams are
// slow, cut and moved, everything restarts, the log is pruned and restored from a
// backup. After every step the invariants of the design are checked against what
// really happened.
const (
	simCap     = 6 * time.Second // life of a token
	simLeeway  = 500 * time.Millisecond
	simBound   = 2 * time.Second // the largest bound of any verifier
	simSeeds   = 10
	simSteps   = 2500
	simTokens  = 40
	brokerName = "broker"
	relayName  = "relay"
)

// A sabotage is a mistake that the machines can't prevent, since their callers make
// it. Each must be found by the simulation.
type sabotage struct {
	sleepingClock   bool // A8: staleness by a clock that stops in suspend
	relayAgeless    bool // E1
	ackOnReceipt    bool // A7
	relayAcksAll    bool // A7: by the relay for others
	noInstance      bool // E4: a receipt survives the restart
	horizonTooHigh  bool // D2: pruning by a clock that runs ahead
	rosterInMemory  bool // K1
	freshOnReceipt  bool // A5
	headNotCompared bool // A6
	keyForgotten    bool // B7: the revocation of a live key is pruned
}

type record struct {
	event   feed.Event
	at      feed.Position
	time    time.Duration // of the commit
	dropped bool
	single  bool // dropped before the horizon passed it
}

type simToken struct {
	subject revocation.Subject
	expires time.Duration
	kills   []*record
	forged  bool
}

type machine struct {
	name   string
	offset time.Duration
	drift  float64
	asleep time.Duration // until then
	slept  time.Duration
}

// message is anything that travels on a stream; due when it may be read.
type message struct {
	due      time.Duration
	delivery *feed.Delivery
	ping     string
	pong     *pong
	ack      *feed.Position
	report   *report
}

type pong struct {
	nonce string
	head  feed.Position
	age   time.Duration
}

type report struct {
	instance string
	bound    time.Duration
	acked    feed.Position
	age      time.Duration
}

// stream is one connection of a follower to a server.
type stream struct {
	server   string
	epoch    int // of the server's process
	cursor   *feed.Cursor
	up, down []message
	delay    time.Duration
	open     bool
	stalled  time.Duration // the server pumps nothing until then
}

// follower is a verifier, or the following half of the relay.
type follower struct {
	machine
	instance string
	bound    time.Duration
	view     *feed.View
	fresh    *feed.Freshness
	stream   *stream
	nextPing time.Duration
	refused  map[*simToken]bool
	acked    feed.Position
	relay    bool
	// The relay's: whom it answers to.
	below map[string]*report
	told  map[string]feed.Instant // when it answered last
	epoch int
}

type fleet struct {
	t    *testing.T
	rnd  *rand.Rand
	bad  sabotage
	now  time.Duration
	seq  int
	fail string // the first violation

	// The store.
	records []*record
	head    feed.Position
	horizon feed.Position
	saved   map[feed.VerifierID]feed.Verifier
	tokens  []*simToken
	keys    []token.KeyID // usable ones, newest last
	keyAge  map[token.KeyID]time.Duration
	killed  map[token.KeyID]*record // stolen, and since when revoked

	// The broker's process.
	broker    machine
	epoch     int
	downUntil time.Duration
	log       *feed.Log
	roster    *feed.Roster
	committed map[feed.Position]feed.Instant

	relay     *follower
	verifiers []*follower

	alive, revoked, contained, eras, snapshots int // to see that the run is not idle
}

func (m *machine) clock(f *fleet) feed.Instant {
	t := f.now
	if f.bad.sleepingClock {
		t -= m.slept
	}
	return feed.Instant(m.offset + t + time.Duration(float64(t)*m.drift))
}

func newFleet(t *testing.T, seed uint64, bad sabotage) *fleet {
	f := &fleet{
		t: t, rnd: rand.New(rand.NewPCG(seed, 0)), bad: bad,
		saved: map[feed.VerifierID]feed.Verifier{}, keyAge: map[token.KeyID]time.Duration{}, killed: map[token.KeyID]*record{},
		log: new(feed.Log), roster: new(feed.Roster), committed: map[feed.Position]feed.Instant{},
	}
	f.broker = f.newMachine(brokerName)
	f.commit(feed.Event{Era: &feed.Era{Era: 1}})
	f.addKey()
	f.relay = &follower{machine: f.newMachine(relayName), relay: true, bound: simBound}
	f.restart(f.relay)
	for i := range 4 {
		v := &follower{machine: f.newMachine(fmt.Sprint("v", i)), bound: simBound >> (i % 2)}
		f.restart(v)
		f.verifiers = append(f.verifiers, v)
	}
	return f
}

func (f *fleet) newMachine(name string) machine {
	return machine{name: name, offset: time.Duration(f.rnd.IntN(1e9)), drift: (f.rnd.Float64() - 0.5) * 2e-4}
}

func (f *fleet) chance(oneIn int) bool { return f.rnd.IntN(oneIn) == 0 }

func (f *fleet) violation(format string, args ...any) {
	if f.fail == "" {
		f.fail = fmt.Sprintf("at %s: ", f.now) + fmt.Sprintf(format, args...)
	}
}

// run steps the fleet and returns the first violation.
func (f *fleet) run(steps int) string {
	for range steps {
		f.step(true)
		if f.fail != "" {
			return f.fail
		}
	}
	// Quiet: everything must heal by itself.
	f.downUntil = 0
	for _, v := range f.followers() {
		if v.stream != nil {
			v.stream.open = false // the next one is quick
		}
	}
	for range 600 {
		f.step(false)
	}
	for _, v := range f.followers() {
		if v.view.Position() != f.head {
			f.violation("%s never caught up: at %s, head %s", v.name, v.view.Position(), f.head)
		}
		if !v.fresh.Fresh(v.clock(f), v.bound) {
			f.violation("%s never got fresh again", v.name)
		}
	}
	if c := f.roster.Containment(f.head, f.committed[f.head], f.broker.clock(f)); !c.Contained && f.up() {
		f.violation("never contained: %v", c.Counts)
	}
	return f.fail
}

func (f *fleet) followers() []*follower { return append([]*follower{f.relay}, f.verifiers...) }

func (f *fleet) up() bool { return f.now >= f.downUntil }

func (f *fleet) step(faults bool) {
	f.now += time.Duration(1+f.rnd.IntN(20)) * time.Millisecond
	if f.up() && f.log == nil {
		f.startBroker()
	}
	if faults {
		f.storeActs()
		f.faults()
	}
	for _, v := range f.followers() {
		f.serve(v)
		if f.now >= v.asleep {
			f.follow(v, faults)
		}
	}
	f.check()
}

// The store and the broker.

func (f *fleet) commit(e feed.Event) *record {
	e.Seq = f.head.Seq + 1
	e.Private[0] = byte(f.rnd.IntN(256))
	e.Sum = e.Chain(f.head.Sum)
	if e.Era != nil {
		f.head.Era = e.Era.Era
	}
	f.head.Seq, f.head.Sum = e.Seq, e.Sum
	r := &record{event: e, at: f.head, time: f.now}
	f.records = append(f.records, r)
	for _, k := range f.tokens {
		if kills(e, f.head, k.subject) {
			k.kills = append(k.kills, r)
		}
	}
	if f.log != nil {
		if err := f.log.Append(e); err != nil {
			f.t.Fatal(err)
		}
		f.committed[f.head] = f.broker.clock(f)
	}
	return r
}

func kills(e feed.Event, at feed.Position, sub revocation.Subject) bool {
	if e.Era != nil {
		return sub.Position.Era < at.Era
	}
	if e.Revocation == nil {
		return false
	}
	for _, s := range e.Revocation.Selectors {
		if sub.Position.Era == at.Era && (sub.Position.Rev < at.Seq || s.Kind() == revocation.KindKey) && s.Matches(sub) {
			return true
		}
	}
	return false
}

func (f *fleet) addKey() {
	k := fakeKey(fmt.Sprint("key", f.rnd.Uint64()))
	f.commit(feed.Event{Key: k})
	f.keys = append(f.keys, k.Public.ID)
	f.keyAge[k.Public.ID] = f.now
}

func (f *fleet) issue() {
	k := &simToken{expires: f.now + time.Duration(f.rnd.Int64N(int64(simCap)))}
	key := f.keys[len(f.keys)-1]
	k.subject = revocation.Subject{Position: f.head.Token(), Audience: "ledger"}
	for range 1 + f.rnd.IntN(2) {
		k.subject.Lineage = append(k.subject.Lineage, member(f.rnd.IntN(6), f.rnd.Uint64(), key))
	}
	f.keepToken(k)
}

func (f *fleet) keepToken(k *simToken) {
	f.tokens = append(f.tokens, k)
	if len(f.tokens) > simTokens {
		i := f.rnd.IntN(simTokens / 2) // some old ones stay: they must stay dead
		f.tokens = slices.Delete(f.tokens, i, i+1)
	}
}

// steal takes a key: its tokens say what the thief likes.
func (f *fleet) steal() {
	if len(f.keys) < 2 {
		return
	}
	key := f.keys[0]
	f.keys = f.keys[1:]
	k := &simToken{forged: true, expires: f.now + simCap}
	k.subject = revocation.Subject{Position: f.head.Token(), Audience: "ledger", Lineage: []token.Member{member(7, f.rnd.Uint64(), key)}}
	f.keepToken(k)
	r := f.commit(feed.Event{Revocation: &feed.Revocation{Selectors: []revocation.Selector{revocation.Key(key)}}})
	f.killed[key] = r
	late := *k
	late.subject.Position = f.head.Token()
	late.kills = []*record{r}
	f.keepToken(&late)
	f.revoked++
}

func (f *fleet) storeActs() {
	if !f.up() {
		if f.chance(60) && f.head.Era < 4 && len(f.records) > 8 {
			f.restore()
		}
		return
	}
	switch f.rnd.IntN(40) {
	case 0, 1, 2, 3:
		f.issue()
	case 4:
		f.commit(feed.Event{Revocation: &feed.Revocation{Selectors: []revocation.Selector{identity(f.rnd.IntN(6))}}})
		f.revoked++
	case 5:
		if k := f.tokens; len(k) > 0 {
			m := k[f.rnd.IntN(len(k))].subject.Lineage[0]
			f.commit(feed.Event{Revocation: &feed.Revocation{Selectors: []revocation.Selector{revocation.Grant(m.Grant)}}})
			f.revoked++
		}
	case 6:
		if f.chance(2) {
			f.commit(feed.Event{Lift: &feed.Lift{Lock: 1}})
		}
	case 7:
		if f.chance(3) {
			f.addKey()
		}
	case 8:
		if f.chance(8) {
			f.steal()
		}
	case 9, 10:
		f.prune()
	}
}

// prune moves the horizon by elapsed time, and drops what is below it and the
// revocations of single grants that have expired.
func (f *fleet) prune() {
	age := simCap + simLeeway
	if f.bad.horizonTooHigh {
		age = simCap / 4
	}
	horizon := f.horizon
	for _, r := range f.records {
		if f.now-r.time <= age || r.at.Era != f.head.Era {
			if r.at.Era == f.head.Era {
				break
			}
			continue
		}
		horizon = r.at
	}
	f.horizon = horizon
	for _, r := range f.records {
		r.dropped = r.dropped || f.droppable(r)
	}
	f.log.SetHorizon(horizon)
	f.log.Drop(func(e feed.Event) bool { return f.record(e).dropped })
}

func (f *fleet) record(e feed.Event) *record {
	i := slices.IndexFunc(f.records, func(r *record) bool { return r.event.Seq == e.Seq && r.event.Sum == e.Sum })
	return f.records[i]
}

func (f *fleet) droppable(r *record) bool {
	e := r.event
	old := r.at.Era != f.head.Era || r.at.Seq <= f.horizon.Seq
	if r.at == f.head {
		return false
	}
	switch {
	case e.Key != nil:
		_, usable := f.keyAge[e.Key.Public.ID]
		newest := f.keys[len(f.keys)-1] == e.Key.Public.ID
		return old && usable && !newest && f.killed[e.Key.Public.ID] == nil && f.now-f.retired(e.Key.Public.ID) > simCap+simLeeway
	case e.Revocation != nil:
		s := e.Revocation.Selectors[0]
		switch {
		case s.Kind() == revocation.KindKey:
			return f.bad.keyForgotten && old
		case s.Kind() == revocation.KindGrant && !old:
			// Every token of a grant has expired one life after the revocation.
			r.single = r.single || f.now-r.time > simCap && f.chance(3)
			return r.single
		}
	}
	return old
}

// retired returns when the successor of a key was published.
func (f *fleet) retired(id token.KeyID) time.Duration {
	latest := f.now
	for _, k := range f.keys {
		if at := f.keyAge[k]; at > f.keyAge[id] {
			latest = min(latest, at)
		}
	}
	return latest
}

func (f *fleet) stopBroker() {
	f.log, f.roster = nil, nil
	f.downUntil = f.now + time.Duration(f.rnd.IntN(1500))*time.Millisecond
	f.cutAll(brokerName)
}

func (f *fleet) startBroker() {
	f.epoch++
	f.broker.offset = time.Duration(f.rnd.IntN(1e9)) // another boot
	f.log, f.roster, f.committed = new(feed.Log), new(feed.Roster), map[feed.Position]feed.Instant{}
	for _, r := range f.records {
		if !r.dropped && r.at.Era == f.head.Era {
			if err := f.log.Load(r.event); err != nil {
				f.t.Fatal(err)
			}
		}
		f.committed[r.at] = f.broker.clock(f)
	}
	if err := f.log.LoadPositions(f.head, f.horizon); err != nil {
		f.t.Fatal(err)
	}
	for _, v := range f.saved {
		if !f.bad.rosterInMemory {
			f.roster.Join(v, f.broker.clock(f))
		}
	}
}

// restore puts a backup back, which begins an era.
func (f *fleet) restore() {
	cut := len(f.records) - 1 - f.rnd.IntN(5)
	for cut < len(f.records) && f.records[cut].at.Seq <= f.horizon.Seq {
		cut++
	}
	f.records = f.records[:cut]
	era := f.head.Era + 1
	f.head = f.records[cut-1].at
	f.keys, f.eras = nil, f.eras+1
	r := f.commit(feed.Event{Era: &feed.Era{Era: era}})
	f.horizon = r.at
	f.addKey()
}

func (f *fleet) cutAll(server string) {
	for _, v := range f.followers() {
		if v.stream != nil && v.stream.server == server {
			v.stream.open = false
		}
	}
}

// Faults.

func (f *fleet) faults() {
	all := f.followers()
	v := all[f.rnd.IntN(len(all))]
	switch f.rnd.IntN(240) {
	case 0:
		if f.up() && f.chance(3) {
			f.stopBroker()
		}
	case 1, 2:
		f.restart(v)
	case 3, 4:
		if v.stream != nil {
			v.stream.open = false
		}
	case 5, 6:
		pause := time.Duration(f.rnd.IntN(4000)) * time.Millisecond
		v.asleep = f.now + pause
		v.slept += pause
	case 7, 8, 9, 10:
		if v.stream != nil {
			v.stream.stalled = f.now + time.Duration(f.rnd.IntN(2500))*time.Millisecond
		}
	case 11, 12:
		if v.stream != nil {
			v.stream.delay = time.Duration(f.rnd.IntN(900)) * time.Millisecond
		}
	}
}

func (f *fleet) restart(v *follower) {
	f.seq++
	v.instance = fmt.Sprint(v.name, "-", f.seq)
	if f.bad.noInstance {
		v.instance = v.name
	}
	v.epoch++
	v.view, v.fresh, v.stream = new(feed.View), new(feed.Freshness), nil
	v.refused, v.acked = map[*simToken]bool{}, feed.Position{}
	v.below, v.told = map[string]*report{}, map[string]feed.Instant{}
	if v.relay {
		f.cutAll(relayName)
	}
}

// The serving half of broker and relay.

func (f *fleet) serve(v *follower) {
	s := v.stream
	if s == nil || !s.open {
		return
	}
	switch {
	case s.server == brokerName && (f.log == nil || s.epoch != f.epoch),
		s.server == relayName && s.epoch != f.relay.epoch:
		s.open = false
		return
	case s.server == relayName && f.now < f.relay.asleep:
		return
	}
	for len(s.up) > 0 && s.up[0].due <= f.now {
		m := s.up[0]
		s.up = s.up[1:]
		if s.server == brokerName {
			f.brokerReads(v, m)
		} else {
			f.relayReads(v, m)
		}
	}
	log := f.log
	if s.server == relayName {
		log = f.relay.view.Log()
	}
	if f.now >= s.stalled && log.Head().Seq > 0 {
		if d, ok := s.cursor.Next(log, 1+f.rnd.IntN(4)); ok {
			f.send(&s.down, s, message{delivery: &d})
			if d.Snapshot {
				f.snapshots++
			}
		}
	}
}

func (f *fleet) send(queue *[]message, s *stream, m message) {
	m.due = f.now + time.Duration(f.rnd.Int64N(int64(s.delay+time.Millisecond)))
	if n := len(*queue); n > 0 {
		m.due = max(m.due, (*queue)[n-1].due) // a stream keeps its order
	}
	*queue = append(*queue, m)
}

func (f *fleet) idOf(v *follower) feed.VerifierID {
	return feed.VerifierID{Identity: v.name, Instance: v.instance}
}

func (f *fleet) brokerReads(v *follower, m message) {
	now := f.broker.clock(f)
	id := f.idOf(v)
	switch {
	case m.ping != "":
		f.roster.Answered(id, now)
		f.send(&v.stream.down, v.stream, message{pong: &pong{m.ping, f.log.Head(), 0}})
	case m.ack != nil:
		f.roster.Acknowledged(id, *m.ack, now)
	case m.report != nil:
		id.Via, id.Instance = id.Instance, m.report.instance
		f.roster.Join(feed.Verifier{ID: id, Bound: m.report.bound}, now.Add(-m.report.age))
		f.roster.Acknowledged(id, m.report.acked, now)
	}
	f.save(id)
}

func (f *fleet) save(id feed.VerifierID) {
	if v, ok := f.roster.Get(id); ok {
		f.saved[id] = v
	}
}

func (f *fleet) relayReads(v *follower, m message) {
	r := f.relay
	now := r.clock(f)
	switch {
	case m.ping != "":
		age, known := r.fresh.Age(now)
		if f.bad.relayAgeless {
			age, known = 0, true
		}
		if !known {
			return
		}
		if _, known := r.told[v.instance]; !known {
			r.below[v.instance] = &report{instance: v.instance, bound: v.bound}
			f.reportUp(v.instance)
		}
		r.told[v.instance] = now
		f.send(&v.stream.down, v.stream, message{pong: &pong{m.ping, r.view.Position(), age}})
	case m.ack != nil:
		if b := r.below[v.instance]; b != nil {
			b.acked = *m.ack
			f.reportUp(v.instance)
		}
	}
}

func (f *fleet) reportUp(instance string) {
	r := f.relay
	if r.stream == nil || !r.stream.open {
		return
	}
	b := *r.below[instance]
	if told, ok := r.told[instance]; ok {
		b.age = r.clock(f).Sub(told)
	}
	if f.bad.relayAcksAll {
		b.acked = r.view.Position()
	}
	f.send(&r.stream.up, r.stream, message{report: &b})
}

// The following half of relay and verifiers.

func (f *fleet) follow(v *follower, faults bool) {
	if v.stream == nil || !v.stream.open {
		f.connect(v, faults)
		return
	}
	now := v.clock(f)
	for s := v.stream; len(s.down) > 0 && s.down[0].due <= f.now && s.open; {
		m := s.down[0]
		s.down = s.down[1:]
		f.followerReads(v, m, now)
	}
	if v.stream.open && f.now >= v.nextPing {
		f.seq++
		nonce := fmt.Sprint(f.seq)
		v.fresh.Sent(nonce, now)
		f.send(&v.stream.up, v.stream, message{ping: nonce})
		v.nextPing = f.now + v.bound/feed.PingsPerBound
	}
}

func (f *fleet) connect(v *follower, faults bool) {
	s := &stream{server: brokerName, epoch: f.epoch, open: true, delay: time.Duration(f.rnd.IntN(60)) * time.Millisecond}
	if !v.relay && f.chance(2) {
		s.server, s.epoch = relayName, f.relay.epoch
	}
	switch {
	case faults && f.chance(2), s.server == brokerName && f.log == nil, s.server == relayName && f.now < f.relay.asleep:
		return
	}
	s.cursor = feed.NewCursor(v.view.Position())
	v.stream = s
	v.fresh.Reconnected()
	v.nextPing = f.now
	v.acked = feed.Position{}
	if s.server == brokerName {
		entry := feed.Verifier{ID: f.idOf(v), Bound: v.bound}
		f.roster.Join(entry, f.broker.clock(f))
		f.save(entry.ID)
	}
	for _, instance := range slices.Sorted(maps.Keys(v.below)) {
		f.reportUp(instance)
	}
}

func (f *fleet) followerReads(v *follower, m message, now feed.Instant) {
	switch {
	case m.delivery != nil:
		if f.bad.ackOnReceipt {
			f.ack(v, m.delivery.Position)
		}
		err := v.view.Apply(*m.delivery, now)
		if err != nil {
			if v.view.Err() == nil {
				v.stream.open = false
				return
			}
			f.violation("I8: %s: %v", v.name, err)
		}
		v.fresh.Applied(v.view.Position())
		if !f.bad.ackOnReceipt {
			f.ack(v, v.view.Position())
		}
	case m.pong != nil:
		if f.bad.freshOnReceipt {
			v.fresh.Reconnected()
			v.fresh.Sent(m.pong.nonce, now)
		}
		if f.bad.headNotCompared {
			m.pong.head = v.view.Position()
		}
		asOf, err := v.fresh.Answered(m.pong.nonce, m.pong.head, m.pong.age, v.view.Position())
		if err != nil {
			f.violation("%s: %v", v.name, err)
		}
		if err := v.view.CheckHead(m.pong.head, asOf); err != nil {
			f.violation("I8: %s: %v", v.name, err)
		}
	}
}

func (f *fleet) ack(v *follower, p feed.Position) {
	if v.acked != p {
		v.acked = p
		f.send(&v.stream.up, v.stream, message{ack: &p})
	}
}

// The invariants.

// slack is how far two clocks may drift apart within a bound.
const slack = 2 * time.Millisecond

func (f *fleet) check() {
	for _, v := range f.followers() {
		if f.now < v.asleep {
			continue
		}
		fresh := v.fresh.Fresh(v.clock(f), v.bound-slack)
		for _, k := range f.tokens {
			f.checkToken(v, k, fresh)
		}
		f.checkForged(v, fresh)
	}
	if f.log != nil {
		f.checkContainment()
	}
}

func (f *fleet) checkToken(v *follower, k *simToken, fresh bool) {
	verdict := v.view.Judge(k.subject)
	key := k.subject.Lineage[0].Key
	_, known := v.view.Key(key)
	accepted := fresh && known && verdict.Reason == revocation.Alive
	live := f.now < k.expires && k.subject.Position.Era == f.head.Era && !k.forged
	switch verdict.Reason {
	case revocation.Alive:
		if v.refused[k] {
			f.violation("I3: %s revived %v", v.name, k.subject.Position)
		}
		f.alive++
	case revocation.Revoked:
		if !slices.ContainsFunc(k.kills, func(r *record) bool { return r.at.Seq == verdict.By }) && k.subject.Position.Era == f.head.Era {
			f.violation("I2: %s refuses %v by %d", v.name, k.subject.Position, verdict.By)
		}
		v.refused[k] = true
	case revocation.KeyRevoked:
		v.refused[k] = true
	case revocation.BelowHorizon, revocation.WrongEra, revocation.OffLog:
		if live {
			f.violation("I4: %s finds live %v %s", v.name, k.subject.Position, verdict.Reason)
		}
		v.refused[k] = true
	}
	if fresh && live && !known && v.view.Position() == f.head {
		f.violation("I4: %s does not know key %s of a live token", v.name, key)
	}
	for _, r := range k.kills {
		if accepted && !r.single && f.now-r.time > v.bound {
			f.violation("I1: %s accepts %v, dead by %s for %s", v.name, k.subject.Position, r.at, f.now-r.time)
		}
	}
}

// checkForged tries what a thief of a key writes: any number, before and after the
// theft is known.
func (f *fleet) checkForged(v *follower, fresh bool) {
	at := v.view.Position().Token()
	for key, r := range f.killed {
		sub := revocation.Subject{Position: at, Audience: "ledger", Lineage: []token.Member{member(7, 7, key)}}
		_, known := v.view.Key(key)
		if fresh && known && f.now-r.time > v.bound && v.view.Judge(sub).Reason == revocation.Alive {
			f.violation("I1: %s accepts forged %v, whose key is dead by %s", v.name, at, r.at)
		}
	}
	at.Rev += 1000
	sub := revocation.Subject{Position: at, Audience: "ledger", Lineage: []token.Member{member(1, 1, f.keys[len(f.keys)-1])}}
	if got := v.view.Judge(sub).Reason; got != revocation.Ahead {
		f.violation("I3: %s finds a number above its head %s", v.name, got)
	}
}

func (f *fleet) checkContainment() {
	now := f.broker.clock(f)
	for _, r := range f.records[max(0, len(f.records)-6):] {
		if r.event.Revocation == nil {
			continue
		}
		c := f.roster.Containment(r.at, f.committed[r.at], now)
		for _, receipt := range c.Receipts {
			f.checkReceipt(r, receipt, c.Receipts)
		}
		if !c.Contained {
			continue
		}
		f.contained++
		for _, k := range f.tokens {
			if slices.Contains(k.kills, r) && !r.single {
				f.checkContained(r, k)
			}
		}
	}
}

func (f *fleet) checkContained(r *record, k *simToken) {
	for _, v := range f.followers() {
		_, known := v.view.Key(k.subject.Lineage[0].Key)
		if f.now >= v.asleep && v.fresh.Fresh(v.clock(f), v.bound-slack) && known && v.view.Judge(k.subject).Reason == revocation.Alive {
			f.violation("I6: contained, but %s accepts %v, dead by %s", v.name, k.subject.Position, r.at)
		}
	}
}

func (f *fleet) checkReceipt(r *record, receipt feed.Receipt, all []feed.Receipt) {
	for _, v := range f.followers() {
		if v.instance != receipt.Verifier.ID.Instance || f.now < v.asleep {
			continue
		}
		switch {
		case receipt.State == feed.Confirmed && v.view.Position().Compare(r.at) < 0:
			f.violation("I6: %s is said to have confirmed %s, but is at %s", v.name, r.at, v.view.Position())
		case receipt.State == feed.Closed && !f.livesElsewhere(v, all) && v.fresh.Fresh(v.clock(f), v.bound-slack):
			f.violation("I6: %s is said to be closed, but is fresh", v.name)
		}
	}
}

// livesElsewhere reports whether a verifier that moved between broker and relay is
// open by another of its entries, or by one that hasn't reached the broker yet.
func (f *fleet) livesElsewhere(v *follower, all []feed.Receipt) bool {
	for _, r := range all {
		if r.Verifier.ID.Instance == v.instance && r.State != feed.Closed {
			return true
		}
	}
	_, answered := f.relay.told[v.instance]
	_, known := f.roster.Get(feed.VerifierID{Identity: relayName, Instance: v.instance, Via: f.relay.instance})
	return answered && !known
}

func TestFleet(t *testing.T) {
	for seed := range uint64(simSeeds) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			t.Parallel()
			f := newFleet(t, seed, sabotage{})
			if err := f.run(simSteps); err != "" {
				t.Fatal(err)
			}
			t.Logf("%d alive, %d revoked, %d contained, %d eras, %d snapshots", f.alive, f.revoked, f.contained, f.eras, f.snapshots)
			if f.alive == 0 || f.revoked == 0 || f.contained == 0 || f.snapshots == 0 {
				t.Errorf("an idle run: %d alive, %d revoked, %d contained, %d eras, %d snapshots", f.alive, f.revoked, f.contained, f.eras, f.snapshots)
			}
		})
	}
}

// TestFleetSeesSabotage shows that the invariants have teeth.
func TestFleetSeesSabotage(t *testing.T) {
	for name, c := range map[string]struct {
		bad  sabotage
		want string // the invariant that breaks
	}{
		"A5 fresh as of receipt":               {sabotage{freshOnReceipt: true}, "I1"},
		"A6 heads not compared":                {sabotage{headNotCompared: true}, "I1"},
		"A7 acknowledged on receipt":           {sabotage{ackOnReceipt: true}, "I6"},
		"A7 acknowledged for others":           {sabotage{relayAcksAll: true}, "I6"},
		"A8 a clock that sleeps":               {sabotage{sleepingClock: true}, "I1"},
		"B7 a live key's revocation is pruned": {sabotage{keyForgotten: true}, "I1"},
		"D2 pruned by a clock ahead":           {sabotage{horizonTooHigh: true}, "I4"},
		"E1 a relay answers age 0":             {sabotage{relayAgeless: true}, "I1"},
		"E4 a receipt survives the restart":    {sabotage{noInstance: true}, "I6"},
		"K1 the roster is in memory":           {sabotage{rosterInMemory: true}, "I6"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for seed := range uint64(60) {
				found := newFleet(t, seed, c.bad).run(simSteps)
				if strings.Contains(found, c.want+":") {
					t.Logf("seed %d: %s", seed, found)
					return
				}
				if found != "" {
					t.Logf("seed %d: something else: %s", seed, found)
				}
			}
			t.Errorf("%s was not found broken", c.want)
		})
	}
}
