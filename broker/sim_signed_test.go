package broker_test

import (
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// A simSignature is only made by brokers.
const simSignature = "vouched"

func simSign(h feed.HeadStatement) (feed.SignedHead, error) {
	return feed.SignedHead{Statement: h.Encode(), Signature: []byte(simSignature)}, nil
}

func simVerify(h feed.SignedHead) (feed.HeadStatement, error) {
	if string(h.Signature) != simSignature {
		return feed.HeadStatement{}, errors.New("no broker signed this")
	}
	return feed.ParseHeadStatement(h.Statement)
}

// keep notes the newest head that a broker is known to have signed.
func (f *simFollower) keep(h feed.SignedHead) {
	if _, err := simVerify(h); err == nil {
		f.kept.Note(h)
	}
}

// proven is what an answer is worth to one who distrusts: what is signed, and nothing else.
func (f *simFollower) proven(a *feed.Answer) (feed.HeadStatement, error) {
	if !f.distrusts {
		return feed.HeadStatement{}, nil
	}
	signed, err := feed.VerifyAnswer(a.Nonce, a.Signed, a.Path, simVerify)
	if err != nil {
		return signed, err
	}
	a.Head, a.Age = signed.Head, signed.Age
	return signed, nil
}

// lacks reports whether the log of the store is without a head that a broker signed.
func (s *sim) lacks(h feed.SignedHead, disregard feed.Position) bool {
	signed, err := simVerify(h)
	if err != nil || signed.Head.Era == disregard.Era && signed.Head.Seq <= disregard.Seq {
		return false
	}
	log := s.store.Log()
	if signed.Head.Compare(log.Head) > 0 || signed.Head.ForkOf(log.Head) || signed.Head.ForkOf(log.Horizon) {
		return true
	}
	return signed.Head.Era == log.Head.Era && slices.ContainsFunc(log.Records, func(rec broker.Record) bool {
		return rec.Seq == signed.Head.Seq && rec.Sum != signed.Head.Sum
	})
}

// shows subscribes with a head that was kept: a broker whose log lacks it must go silent,
// and no other.
func (s *sim) shows(b *simBroker, c broker.Caller, sub broker.Subscriber) (*broker.Follower, error) {
	lacks := len(sub.NewestHead.Statement) > 0 && s.lacks(sub.NewestHead, b.disregard)
	f, err := b.b.Subscribe(context.Background(), c, sub)
	if lacks && !b.gagged {
		b.gagged = true
		s.counts["silenced"]++
		s.note("%s was shown a signed head that its log lacks", b.name)
	}
	if silence := b.b.Silent(); silence != nil && !b.gagged {
		s.violation("I8: %s is silent for %s, which no broker signed or its log has", b.name, silence.Head)
	}
	return f, err
}

// claims has somebody show a head that nobody signed.
func (s *sim) claims(b *simBroker, r *rand.Rand) {
	if !b.up() {
		return
	}
	head := s.head()
	h := feed.HeadStatement{Head: head, Horizon: head, SignedAt: simTime(s.now)}
	h.Head.Seq += uint64(1 + r.IntN(5))
	f, err := s.shows(b, broker.Caller{ID: spiffeid.RequireFromString("spiffe://example.org/mallory"), Leaf: simLeaf(s, simEpochLong, "mallory")}, broker.Subscriber{
		Instance: "mallory-instance", Audiences: []string{"any"}, MaxStaleness: time.Second,
		NewestHead: feed.SignedHead{Statement: h.Encode(), Signature: []byte("mine")},
	})
	if err == nil {
		f.Close()
	}
}

// What a relay does to those on other hosts.
const (
	simHonest    = iota
	simReplays   // it answers with what was signed before, and passes no more records on
	simWithholds // it passes no more records on
	simFlatters  // the same, and says that there are none
	simRewrites  // it lets revocations say something else
	simInserts   // it adds a key of its own
	simLies
)

// lie changes what a relay sends to one on another host; false: it sends nothing.
func (st *simStream) lie(s *sim, m *simMessage) bool {
	r := st.relay
	if m.answer != nil && len(m.answer.Signed.Statement) > 0 && len(r.old) < 20 {
		r.old = append(r.old, *m.answer)
	}
	switch {
	case m.welcome || r.lies == simHonest:
		return true
	case m.answer != nil && r.lies == simReplays && len(r.old) > 0:
		old := r.old[s.rnd.IntN(len(r.old))]
		old.Nonce = m.answer.Nonce
		m.answer = &old
	case m.answer != nil && r.lies == simFlatters:
		a := *m.answer
		a.Head, a.Age = st.passed, 0
		m.answer = &a
	case m.delivery != nil && r.lies == simRewrites:
		m.delivery = st.rewritten(*m.delivery)
	case m.delivery != nil && r.lies == simInserts:
		m.delivery = st.inserted(s, *m.delivery)
	case m.delivery != nil:
		return false
	}
	if m.delivery != nil {
		st.passed = m.delivery.Position
	}
	return true
}

// rewritten makes revocations harmless, and chains what follows anew.
func (st *simStream) rewritten(d feed.Delivery) *feed.Delivery {
	d.Events = slices.Clone(d.Events)
	for i := range d.Events {
		e := &d.Events[i]
		follows := e.Seq == st.lieSeq+1 && st.lieSeq > 0
		if e.Revocation != nil && follows {
			nobody, err := revocation.Audience("nobody")
			if err != nil {
				panic(err)
			}
			e.Revocation = &feed.Revocation{Selectors: []revocation.Selector{nobody}}
		}
		if follows {
			e.Sum = e.Chain(st.lieSum)
		}
		st.lieSeq, st.lieSum = e.Seq, e.Sum
	}
	if d.Position.Seq == st.lieSeq {
		d.Position.Sum = st.lieSum
	}
	return &d
}

// inserted adds a key that no broker vouches for.
func (st *simStream) inserted(s *sim, d feed.Delivery) *feed.Delivery {
	if s.liarKey == nil {
		if s.keys == len(simKeys()) {
			return &d
		}
		s.liarKey = s.makeKey()
		s.stolen[s.liarKey.id], s.foreign[s.liarKey.id] = s.liarKey, s.now
	}
	k, err := s.forge(s.liarKey, st.relay.relay.View.Position(), s.rnd)
	if err != nil {
		s.violation("internal: forging: %v", err)
		return &d
	}
	s.tokens = append(s.tokens, k)
	key := simKeyRecord(s.liarKey, simSignature)
	e := feed.Event{Key: &key}
	n := len(d.Events)
	switch {
	case d.Snapshot: // below the horizon, where nothing before or behind it shows that it doesn't chain
		last := uint64(0)
		for i, next := range d.Events {
			if next.Seq > last+3 && last+2 < d.Horizon.Seq {
				e.Seq = last + 2
				d.Events = slices.Insert(slices.Clone(d.Events), i, e)
				break
			}
			last = next.Seq
		}
	case !d.Snapshot && n > 0:
		e.Seq = d.Events[n-1].Seq + 1
		e.Sum = e.Chain(d.Events[n-1].Sum)
		d.Events = append(slices.Clone(d.Events), e)
	}
	return &d
}
