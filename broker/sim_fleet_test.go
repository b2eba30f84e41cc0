package broker_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/proto/wire"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// simMessage is what travels on a stream. All but one field is zero.
type simMessage struct {
	due      time.Duration
	welcome  bool
	delivery *feed.Delivery
	answer   *feed.Answer
	ping     string
	ack      *feed.Position
	report   []feed.Relayed
	uses     *dayflyv1.UseReport
}

// simStream is one connection from a follower to a broker or a relay.
type simStream struct {
	open     bool
	delay    time.Duration // of each message, at most
	stalled  time.Duration // the server sends nothing until then
	welcomed bool
	signed   bool // to one on another host
	up, down []simMessage

	broker   *simBroker // the server,
	epoch    int
	follower *broker.Follower
	relay    *simRelay // or this
	below    *feed.Downstream
	instance string // of the follower

	passed feed.Position // by a relay that lies, and what its records chain to
	lieSeq uint64
	lieSum feed.Sum
}

// send puts a message on its way; a stream keeps its order.
func (st *simStream) send(s *sim, queue *[]simMessage, m simMessage) {
	m.due = s.now + time.Duration(s.rnd.Int64N(int64(st.delay+time.Millisecond)))
	if n := len(*queue); n > 0 {
		m.due = max(m.due, (*queue)[n-1].due)
	}
	*queue = append(*queue, m)
	s.after(m.due-s.now, func() {}) // the loop looks at every queue after each event
}

func simDue(s *sim, queue *[]simMessage) (simMessage, bool) {
	if len(*queue) == 0 || (*queue)[0].due > s.now {
		return simMessage{}, false
	}
	m := (*queue)[0]
	*queue = (*queue)[1:]
	return m, true
}

// simFollower is the following half of relays and verifiers.
type simFollower struct {
	simMachine
	s        *sim
	instance string
	starts   int
	bound    time.Duration
	accepts  bool // when stale
	stream   *simStream
	acked    feed.Position
	dialling bool
	alone    time.Duration // until then it reaches nobody

	distrusts bool          // it believes only what a broker signed, and follows only relays
	kept      feed.Newest   // signed head, to be shown
	shown     feed.Position // on this stream
	outbox    *wire.Outbox
}

func (f *simFollower) cut() {
	if f.stream != nil {
		f.stream.open = false
	}
}

// simRelay is an agent that relays.
type simRelay struct {
	simFollower
	index   int
	relay   *feed.Relay
	streams []*simStream
	uses    []*dayflyv1.Use // of those below
	lies    int
	lied    bool          // it ever did
	old     []feed.Answer // that a liar keeps
}

// trusted reports whether somebody follows this relay and takes its word.
func (r *simRelay) trusted() bool {
	return slices.ContainsFunc(r.streams, func(st *simStream) bool { return st.open && !st.signed })
}

// simVerifier is a verifier.
type simVerifier struct {
	simFollower
	view    *feed.View
	screen  *feed.Screen
	fresh   *feed.Freshness
	live    time.Duration // the bound of its welcome; 0 before the first
	refused map[*simToken]string
}

func (s *sim) followers() []*simFollower {
	var all []*simFollower
	for _, r := range s.relays {
		all = append(all, &r.simFollower)
	}
	for _, v := range s.verifiers {
		all = append(all, &v.simFollower)
	}
	return all
}

func (f *simFollower) newInstance() {
	f.starts++
	f.instance = fmt.Sprintf("%s-%d-start", f.name, f.starts)
	f.boot = time.Duration(f.s.rnd.Int64N(int64(1000 * time.Hour)))
	f.cut()
	f.acked = feed.Position{}
	f.kept, f.outbox = feed.Newest{}, new(wire.Outbox)
}

func (r *simRelay) restart() {
	r.newInstance()
	for _, st := range r.streams {
		st.open = false
	}
	r.streams, r.relay, r.uses = nil, new(feed.Relay), nil
	if r.distrusts {
		r.relay.Screen = new(feed.Screen)
	}
}

func (v *simVerifier) restart() {
	v.newInstance()
	if v.s.chance(4) { // with another configuration
		v.bound = simBounds[v.s.rnd.IntN(len(simBounds))]
	}
	v.view, v.screen, v.fresh, v.live, v.refused = new(feed.View), new(feed.Screen), new(feed.Freshness), 0, map[*simToken]string{}
}

// caller is the identity that a follower proves.
func (f *simFollower) caller() broker.Caller {
	return broker.Caller{ID: spiffeid.RequireFromString("spiffe://example.org/service/" + f.name), Leaf: simLeaf(f.s, simEpochLong, f.name)}
}

// pump lets everything that can happen now happen: streams are served and read until
// nothing moves.
func (s *sim) pump() {
	for moved := true; moved && s.failed == ""; {
		moved = false
		for _, r := range s.relays {
			moved = s.pumpFollower(&r.simFollower, r, nil) || moved
		}
		for _, v := range s.verifiers {
			moved = s.pumpFollower(&v.simFollower, nil, v) || moved
		}
	}
}

func (s *sim) pumpFollower(f *simFollower, r *simRelay, v *simVerifier) bool {
	if st := f.stream; st != nil && st.open {
		moved := s.serve(st)
		if st.open && f.awake(s) {
			moved = f.read(r, v) || moved
		}
		return moved
	}
	if f.stream != nil && f.stream.below != nil { // the relay notices, whoever cut it
		f.stream.below.Leave()
		f.stream.below = nil
	}
	if f.stream != nil && f.stream.follower != nil {
		f.stream.follower.Close()
		f.stream.follower = nil
	}
	if !f.dialling {
		f.dialling = true
		s.after(time.Duration(s.rnd.Int64N(int64(f.bound/3)+1)), func() { f.dialling = false; f.dial(r, v) })
		if f.asleep > s.now {
			s.after(f.asleep-s.now, func() {})
		}
	}
	return false
}

// dial opens a stream to a broker or, for all but the first relay, to a relay above.
func (f *simFollower) dial(r *simRelay, v *simVerifier) {
	s := f.s
	if f.stream != nil && f.stream.open || !f.awake(s) || s.now < f.alone {
		return
	}
	st := &simStream{open: true, instance: f.instance, delay: time.Duration(s.rnd.Int64N(int64(200 * time.Millisecond)))}
	above := len(s.relays)
	if r != nil {
		above = r.index
	}
	if above > 0 && (s.chance(2) || f.distrusts && v != nil) {
		st.relay = s.relays[s.rnd.IntN(above)]
		if !st.relay.awake(s) || st.relay.stream == nil || !st.relay.stream.welcomed || st.relay.lies != simHonest && !f.distrusts ||
			f.distrusts && st.relay.index > 0 && !st.relay.distrusts { // its own relay doesn't pass on what is signed
			return
		}
	} else {
		st.broker = s.brokers[s.rnd.IntN(len(s.brokers))]
		if !st.broker.up() {
			return
		}
	}
	position := feed.Position{}
	if r != nil {
		position = r.relay.View.Position()
	} else {
		position = v.view.Position()
	}
	if st.relay != nil {
		self := feed.Relayed{Path: []string{f.instance}, Audiences: []string{"any"}, Bound: f.bound, AcceptsStale: f.accepts, Acked: position}
		below, _, err := st.relay.relay.Follow(self, r != nil, st.relay.Boot(s))
		if err != nil {
			s.violation("internal: following a relay: %v", err)
			return
		}
		if st.signed = f.distrusts; st.signed {
			below.Distrust()
		}
		st.below = below
		st.relay.keep(f.kept.Signed)
		st.relay.streams = append(st.relay.streams, st)
	} else {
		sub := broker.Subscriber{Instance: f.instance, Audiences: []string{"any"}, MaxStaleness: f.bound, AcceptsStale: f.accepts, Position: position, Relay: r != nil, SignedHeads: s.signs, NewestHead: f.kept.Signed}
		f.shown = f.kept.Head
		follower, err := s.shows(st.broker, f.caller(), sub)
		if err != nil {
			s.violation("internal: subscribing: %v", err)
			return
		}
		st.follower, st.epoch = follower, st.broker.epoch
		st.broker.streams = append(st.broker.streams, st)
		st.send(s, &st.down, simMessage{welcome: true})
	}
	if f.stream != nil && f.stream.below != nil {
		f.stream.below.Leave()
	}
	f.stream, f.acked = st, feed.Position{}
	f.outbox.Reconnected()
	s.note("%s (%s) follows %s", f.name, f.instance, st.server())
	if v != nil {
		v.fresh.Reconnected()
		v.view.Reconnected()
		v.screen.Reconnected()
	}
}

func (st *simStream) server() string {
	if st.relay != nil {
		return st.relay.name
	}
	return st.broker.name
}

// serve is the serving half of broker and relay.
func (s *sim) serve(st *simStream) bool {
	switch {
	case st.broker != nil && (st.broker.b == nil || st.broker.epoch != st.epoch):
		st.open = false
		return false
	case st.broker != nil && !st.broker.awake(s), st.relay != nil && !st.relay.awake(s):
		return false
	}
	moved := false
	for m, ok := simDue(s, &st.up); ok && st.open; m, ok = simDue(s, &st.up) {
		moved = true
		var err error
		if st.broker != nil {
			err = s.brokerReads(st, m)
		} else {
			err = s.relayReads(st, m)
		}
		if err != nil {
			s.note("%s refuses a message: %v", st.server(), err)
			st.open = false
		}
	}
	if s.now < st.stalled {
		return moved
	}
	for st.open && len(st.down) < 50 {
		if st.broker != nil {
			d, ok, _ := st.follower.Next(1 + s.rnd.IntN(5))
			if !ok {
				break
			}
			st.send(s, &st.down, simMessage{delivery: &d})
		} else {
			if st.relay.relay.View.Err() != nil {
				st.open = false
				break
			}
			m, ok := st.below.Next(st.relay.Boot(s), 1+s.rnd.IntN(5))
			if !ok {
				break
			}
			if a := m.Answer; a != nil && !st.signed {
				a.Signed = st.relay.kept.Signed
			}
			out := simMessage{welcome: m.Welcome, delivery: m.Delivery, answer: m.Answer}
			if !st.signed || st.lie(s, &out) {
				st.send(s, &st.down, out)
			}
		}
		moved = true
	}
	return moved
}

func (s *sim) brokerReads(st *simStream, m simMessage) error {
	ctx := context.Background()
	switch {
	case m.ping != "":
		st.broker.store.proving = !s.signs // a statement waits for what it speaks of
		proof, err := st.follower.Answer(ctx, m.ping)
		st.broker.store.proving = false
		if err != nil {
			return err
		}
		if st.broker.gagged {
			s.violation("I1: %s answers a ping, though it was shown a signed head that its log lacks", st.broker.name)
		}
		st.send(s, &st.down, simMessage{answer: &feed.Answer{Nonce: m.ping, Head: proof.Head, Horizon: proof.Horizon, Age: proof.Age, Signed: proof.Signed, Path: proof.Path}})
	case m.ack != nil:
		s.acted = true
		return st.follower.Acknowledge(ctx, *m.ack)
	case m.uses != nil:
		return s.keepsReport(st, m.uses)
	case m.report != nil:
		s.acted = true
		refused, err := st.follower.Relayed(ctx, m.report)
		if len(refused) > 0 {
			s.violation("internal: refused below a relay: %v", refused)
		}
		return err
	}
	return nil
}

func (s *sim) relayReads(st *simStream, m simMessage) error {
	r := st.relay
	switch {
	case m.ping != "":
		st.below.Ping(m.ping)
	case m.ack != nil:
		news, err := st.below.Acknowledge(*m.ack)
		if news {
			r.reportUp()
		}
		return err
	case m.uses != nil:
		if st.below.UseReport(m.uses.GetNumber()) {
			r.uses = append(r.uses, m.uses.GetUses()...)
		}
	case m.report != nil:
		err := st.below.Report(m.report, r.Boot(s))
		r.reportUp()
		return err
	}
	return nil
}

// reportUp passes on what changed below.
func (r *simRelay) reportUp() {
	if st := r.stream; st != nil && st.open && st.welcomed {
		if report := r.relay.Report(r.Boot(r.s), false); len(report) > 0 {
			st.send(r.s, &st.up, simMessage{report: report})
		}
	}
}

// read takes what has come down, and pings in time.
func (f *simFollower) read(r *simRelay, v *simVerifier) bool {
	s, st, moved := f.s, f.stream, false
	for m, ok := simDue(s, &st.down); ok && st.open; m, ok = simDue(s, &st.down) {
		moved = true
		var err error
		if r != nil {
			err = r.take(m)
		} else {
			err = v.take(m)
		}
		if err != nil {
			switch {
			case errors.Is(err, feed.ErrFork):
				s.counts["forked"]++
				if !s.forked {
					s.violation("I8: %s (%s) finds a fork: %v", f.name, f.instance, err)
				}
			case errors.Is(err, errShow), errors.Is(err, feed.ErrGap), errors.Is(err, feed.ErrUnknownPing): // pings so old are forgotten
			case !s.excused(st, err):
				s.violation("internal: %s: %v", f.name, err)
			}
			s.note("%s ends its stream: %v", f.name, err)
			st.open = false
		}
	}
	return moved
}

// excused reports whether what was sent is refused because somebody lied, or can't be
// proven because a log has two histories or several brokers.
func (s *sim) excused(st *simStream, err error) bool {
	lied := st.relay != nil && st.relay.lied
	return errors.Is(err, feed.ErrUnproven) && (lied || s.forked || s.shared) || errors.Is(err, feed.ErrMalformed) && lied
}

func (r *simRelay) take(m simMessage) error {
	s, st := r.s, r.stream
	now := r.Boot(s)
	switch {
	case m.welcome:
		st.welcomed = true
		r.relay.Connected(true)
		r.pinging(st)
	case m.delivery != nil:
		if err := r.relay.Deliver(*m.delivery, now); err != nil {
			return err
		}
		r.acknowledge(r.relay.View.Position())
	case m.answer != nil:
		return r.answered(*m.answer, now)
	}
	return nil
}

// errShow ends a stream whose broker lacks a head that came from below, so that the next
// one shows it.
var errShow = errors.New("there is a signed head to show")

func (r *simRelay) answered(a feed.Answer, now feed.Instant) error {
	signed, err := r.proven(&a)
	if err != nil {
		return err
	}
	if err := r.relay.Answered(a.Nonce, a.Head, a.Age); err != nil {
		return err
	}
	r.outbox.Answered(a.Nonce)
	r.relay.Proved(a.Nonce, a.Signed, a.Path)
	r.keep(a.Signed)
	if r.distrusts {
		if err := r.relay.Signed(signed, now); err != nil {
			return err
		}
		r.acknowledge(r.relay.View.Position())
	}
	if r.kept.Head.Compare(r.shown) > 0 && a.Head.Compare(r.kept.Head) < 0 {
		return errShow
	}
	return nil
}

// pinging pings when it is due, for as long as the stream is open.
func (r *simRelay) pinging(st *simStream) {
	s := r.s
	if !st.open || r.stream != st {
		return
	}
	wait := r.asleep - s.now
	if r.awake(s) {
		now := r.Boot(s)
		if wait = r.relay.Due(r.bound, now); wait == 0 {
			report := r.relay.Report(now, r.relay.Overdue(r.bound, now))
			nonce := r.relay.Gather(fmt.Sprint(r.instance, "/", s.nonce()))
			r.relay.Ping(nonce, now)
			r.outbox.Put(r.uses, 0)
			r.uses = nil
			r.reports()
			r.outbox.Pinged(nonce)
			st.send(s, &st.up, simMessage{report: report})
			st.send(s, &st.up, simMessage{ping: nonce})
			wait = r.relay.Due(r.bound, now)
		}
	}
	// Somebody new below is noticed at once by an agent; here within a moment.
	s.after(min(max(wait, time.Millisecond), 300*time.Millisecond), func() { r.pinging(st) })
}

func (s *sim) nonce() int { s.nonces++; return s.nonces }

func (v *simVerifier) take(m simMessage) error {
	s, st := v.s, v.stream
	now := v.Boot(s)
	switch {
	case m.welcome:
		st.welcomed = true
		if v.live != 0 && v.bound > v.live {
			*v.fresh = feed.Freshness{} // as sdk/verify does with a raised bound
		}
		v.live = v.bound
		v.pinging(st)
	case m.delivery != nil:
		s.acted = true
		deliveries := []feed.Delivery{*m.delivery}
		if v.distrusts {
			var err error
			if deliveries, err = v.screen.Deliver(v.view, *m.delivery); err != nil {
				return err
			}
		}
		return v.apply(deliveries, now)
	case m.answer != nil:
		return v.answered(*m.answer, now)
	}
	return nil
}

func (v *simVerifier) apply(deliveries []feed.Delivery, now feed.Instant) error {
	for _, d := range deliveries {
		if err := v.view.Apply(d, now); err != nil {
			return err
		}
	}
	v.fresh.Applied(v.view.Position())
	v.acknowledge(v.view.Position())
	return nil
}

func (v *simVerifier) answered(a feed.Answer, now feed.Instant) error {
	signed, err := v.proven(&a)
	if err != nil {
		return err
	}
	asOf, err := v.fresh.Answered(a.Nonce, a.Head, a.Age, v.view.Position())
	if err != nil {
		return err
	}
	if err := v.view.CheckHead(a.Head, asOf); err != nil {
		return err
	}
	v.keep(a.Signed)
	v.outbox.Answered(a.Nonce)
	if !v.distrusts {
		return nil
	}
	deliveries, err := v.screen.Signed(v.view, signed)
	if err != nil {
		return err
	}
	return v.apply(deliveries, now)
}

func (v *simVerifier) pinging(st *simStream) {
	s := v.s
	if !st.open || v.stream != st {
		return
	}
	if v.awake(s) {
		nonce := fmt.Sprint(v.instance, "/", s.nonce())
		v.reports()
		v.fresh.Sent(nonce, v.Boot(s))
		v.outbox.Pinged(nonce)
		st.send(s, &st.up, simMessage{ping: nonce})
	}
	s.after(max(v.bound/feed.PingsPerBound, v.asleep-s.now), func() { v.pinging(st) })
}

func (f *simFollower) acknowledge(p feed.Position) {
	if p != f.acked && p.Seq > 0 {
		f.acked = p
		f.stream.send(f.s, &f.stream.up, simMessage{ack: &p})
	}
}

const simKeyUnknown = "key unknown"

// judges reports whether a verifier would accept a token, as sdk/verify decides it, and
// why not.
func (v *simVerifier) judges(k *simToken) (bool, string) {
	s := v.s
	if v.view.Err() != nil || v.live == 0 || v.view.Position().Era == 0 {
		return false, "closed"
	}
	if !v.accepts && !v.fresh.Fresh(v.Boot(s), v.live) {
		return false, "stale"
	}
	if _, ok := v.view.Key(k.claims.Self().Key); !ok {
		return false, simKeyUnknown
	}
	if verdict := v.view.Judge(revocation.SubjectOf(&k.claims)); verdict.Reason != revocation.Alive {
		return false, string(verdict.Reason)
	}
	wall := v.Wall(s)
	switch {
	case !wall.Before(k.claims.Expires.Add(token.Leeway)), wall.Before(k.claims.NotBefore.Add(-token.Leeway)):
		return false, "time"
	}
	return true, ""
}
