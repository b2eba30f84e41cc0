package broker_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// simProposal is what an operator was told to be pending.
type simProposal struct {
	subject, actor string
	made, ends     time.Time // by the clock of the broker that said so
	used           bool
}

// operator is one of two persons; over the socket it would take only one.
func (s *sim) operator(r *rand.Rand) broker.Caller {
	name := []string{"alice", "bob"}[r.IntN(2)]
	return broker.Caller{ID: spiffeid.RequireFromString("spiffe://example.org/" + name), Leaf: simLeaf(s, simEpochLong, name)}
}

// second is the call of an operator for something that takes two.
func (s *sim) second(b *simBroker, r *rand.Rand) {
	if !b.up() {
		return
	}
	who := s.operator(r)
	locks := b.b.Locks()
	if len(locks) > 0 && r.IntN(2) == 0 {
		n := locks[r.IntN(min(len(locks), 2))].Number
		_, err := b.b.Lift(context.Background(), who, n, "sim", "")
		s.tookTwo(b, fmt.Sprint("lift of ", n), who, err)
		return
	}
	_, err := b.b.Revoke(context.Background(), who, broker.Revoke{
		Selectors: []revocation.Selector{revocation.Everything()}, Lock: broker.LockNone, Reason: "sim", AllowEverything: true,
	})
	s.tookTwo(b, "revocation of everything", who, err)
}

// tookTwo compares what became of such a call with what was proposed before.
func (s *sim) tookTwo(b *simBroker, subject string, who broker.Caller, err error) {
	var (
		pending *broker.Pending
		refusal *broker.Refusal
	)
	now := b.Wall(s)
	switch {
	case errors.As(err, &pending):
		s.counts["proposed"]++
		s.note("%s proposes the %s", who.Actor(), subject)
		s.proposals = append(s.proposals, simProposal{subject: subject, actor: who.Actor(), made: now, ends: now.Add(15 * time.Minute)})
	case errors.As(err, &refusal):
		s.note("%s may not confirm the %s: %v", who.Actor(), subject, err)
	case err != nil:
		s.violation("internal: %s: %v", subject, err)
	default:
		s.note("%s confirms the %s", who.Actor(), subject)
		s.counts["confirmed by another"]++
		i := slices.IndexFunc(s.proposals, func(p simProposal) bool {
			return p.subject == subject && p.actor != who.Actor() && !p.used && !now.Before(p.made) && now.Before(p.ends)
		})
		if i < 0 {
			s.violation("O1: the %s was recorded for %s, and nobody else's proposal was open", subject, who.Actor())
			return
		}
		s.proposals[i].used = true
	}
}
