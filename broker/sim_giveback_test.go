package broker_test

import (
	"context"
	"errors"
	"math/rand/v2"

	"github.com/dayflyhq/dayfly/broker"
)

// giveBack has somebody give a credential back, mostly its holder. That it dies with what
// derives from it, everywhere and in time, and nothing else does, is checked as of every
// revocation. It draws from a source of its own, so that other acts stay what they were.
func (s *sim) giveBack(i int) {
	r := rand.New(rand.NewPCG(s.seed, uint64(1_000_000+i)))
	b := s.brokers[r.IntN(len(s.brokers))]
	if r.IntN(8) > 0 || !b.up() || len(s.tokens) == 0 {
		return
	}
	k := s.tokens[len(s.tokens)-1-r.IntN(min(len(s.tokens), 20))]
	by := s.callers[r.IntN(len(s.callers))]
	if r.IntN(4) > 0 {
		for _, c := range s.callers {
			if c.ID == k.claims.Presenter() {
				by = c
			}
		}
	}
	before := len(s.records)
	err := b.b.GiveBack(context.Background(), by.Caller, k.secret)
	made := s.records[before:]
	var refusal *broker.Refusal
	switch {
	case err != nil && !errors.As(err, &refusal):
		s.violation("internal: giving back: %v", err)
	case len(made) == 0:
		return // nothing to give back, or not now
	case by.ID != k.claims.Presenter():
		s.violation("G1: %s gave back %s, which is %s's", by.ID, k.name, k.claims.Presenter())
	case k.forged:
		s.violation("G1: %s gave back %s, which was never recorded", by.ID, k.name)
	case len(made) != 1 || !made[0].rec.Details.GivenBack || !made[0].kills(k):
		s.violation("G1: giving back %s made %d records, the first at %s", k.name, len(made), made[0].at)
	default:
		s.counts["given back"]++
	}
}
