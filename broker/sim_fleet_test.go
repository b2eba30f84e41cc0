package broker_test

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
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
}

// simStream is one connection from a follower to a broker or a relay.
type simStream struct {
	open     bool
	delay    time.Duration // of each message, at most
	stalled  time.Duration // the server sends nothing until then
	welcomed bool
	up, down []simMessage

	broker   *simBroker // the server,
	epoch    int
	follower *broker.Follower
	relay    *simRelay // or this
	below    *feed.Downstream
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
}

// simVerifier is a verifier.
type simVerifier struct {
	simFollower
	view    *feed.View
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
}

func (r *simRelay) restart() {
	r.newInstance()
	for _, st := range r.streams {
		st.open = false
	}
	r.streams, r.relay = nil, new(feed.Relay)
}

func (v *simVerifier) restart() {
	v.newInstance()
	v.view, v.fresh, v.live, v.refused = new(feed.View), new(feed.Freshness), 0, map[*simToken]string{}
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
	if f.stream != nil && f.stream.open || !f.awake(s) {
		return
	}
	st := &simStream{open: true, delay: time.Duration(s.rnd.Int64N(int64(200 * time.Millisecond)))}
	above := len(s.relays)
	if r != nil {
		above = r.index
	}
	if above > 0 && s.chance(2) {
		st.relay = s.relays[s.rnd.IntN(above)]
		if !st.relay.awake(s) || st.relay.stream == nil || !st.relay.stream.welcomed {
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
		st.below = below
		st.relay.streams = append(st.relay.streams, st)
	} else {
		sub := broker.Subscriber{Instance: f.instance, Audiences: []string{"any"}, MaxStaleness: f.bound, AcceptsStale: f.accepts, Position: position, Relay: r != nil}
		follower, err := st.broker.b.Subscribe(context.Background(), f.caller(), sub)
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
	s.note("%s (%s) follows %s", f.name, f.instance, st.server())
	if v != nil {
		v.fresh.Reconnected()
		v.view.Reconnected()
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
			st.send(s, &st.down, simMessage{welcome: m.Welcome, delivery: m.Delivery, answer: m.Answer})
		}
		moved = true
	}
	return moved
}

func (s *sim) brokerReads(st *simStream, m simMessage) error {
	ctx := context.Background()
	switch {
	case m.ping != "":
		st.broker.store.proving = true
		proof, err := st.follower.Prove(ctx)
		st.broker.store.proving = false
		if err != nil {
			return err
		}
		st.send(s, &st.down, simMessage{answer: &feed.Answer{Nonce: m.ping, Head: proof.Head, Horizon: proof.Horizon, Age: proof.Age}})
	case m.ack != nil:
		s.acted = true
		return st.follower.Acknowledge(ctx, *m.ack)
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
			if errors.Is(err, feed.ErrFork) {
				s.counts["forked"]++
				if !s.forked {
					s.violation("I8: %s (%s) finds a fork: %v", f.name, f.instance, err)
				}
			} else if !errors.Is(err, feed.ErrGap) && !errors.Is(err, feed.ErrUnknownPing) { // pings so old are forgotten
				s.violation("internal: %s: %v", f.name, err)
			}
			s.note("%s ends its stream: %v", f.name, err)
			st.open = false
		}
	}
	return moved
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
		return r.relay.Answered(m.answer.Nonce, m.answer.Head, m.answer.Age)
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
			report := r.relay.Report(now, true)
			nonce := fmt.Sprint(r.instance, "/", s.nonce())
			r.relay.Ping(nonce, now)
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
		if err := v.view.Apply(*m.delivery, now); err != nil {
			return err
		}
		v.fresh.Applied(v.view.Position())
		v.acknowledge(v.view.Position())
	case m.answer != nil:
		asOf, err := v.fresh.Answered(m.answer.Nonce, m.answer.Head, m.answer.Age, v.view.Position())
		if err != nil {
			return err
		}
		return v.view.CheckHead(m.answer.Head, asOf)
	}
	return nil
}

func (v *simVerifier) pinging(st *simStream) {
	s := v.s
	if !st.open || v.stream != st {
		return
	}
	if v.awake(s) {
		nonce := fmt.Sprint(v.instance, "/", s.nonce())
		v.fresh.Sent(nonce, v.Boot(s))
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
