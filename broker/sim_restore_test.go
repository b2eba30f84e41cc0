package broker_test

import (
	"errors"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
)

// keepCopy makes a backup.
func (s *sim) keepCopy() {
	s.lastStore, s.lastTruth, s.lastMade = s.store.Clone(), s.simTruth.clone(), simTime(s.now)
	s.note("somebody keeps a copy of the store at %s", s.head())
}

// putBack puts an old copy of the store in place by hand, while the broker is down.
func (s *sim) putBack() {
	b := s.brokers[0]
	if s.shared || s.lastStore == nil {
		return
	}
	if b.b != nil {
		b.kill()
	}
	s.store = s.lastStore.Clone()
	tokens, stolen := s.tokens, s.stolen
	s.simTruth = s.lastTruth.clone()
	s.tokens, s.stolen = tokens, stolen // what is out there is out there
	s.counts["old copy"]++
	s.forked = true
	s.note("the store is put back to %s", s.head())
	b.start()
}

// restore begins a new era with the backup, as the command restore does: with the locks
// of the store as it was last, of what can be read of it, or of nothing.
func (s *sim) restore(r *rand.Rand) {
	b := s.brokers[0]
	if s.shared || s.lastStore == nil || s.restored > 0 && s.now-s.restored < 2*time.Second {
		return // an era is named by its second: two of one backup, by nobody's hand so fast, would have one name
	}
	s.restored = s.now
	if b.b != nil {
		b.kill()
	}
	ask := broker.Restore{Backup: s.lastStore.Log(), Actor: "restore", Reason: "sim", Now: simTime(s.now)}
	ask.Backup.Made = s.lastMade
	whole := false
	switch r.IntN(5) {
	case 0:
	case 1:
		ask.LocksFrom = s.store.Log()
		ask.LocksFrom.Damage = []string{"a page is gone"}
		ask.LocksFrom.Records = slices.DeleteFunc(ask.LocksFrom.Records, func(rec broker.Record) bool { return rec.Era == nil && r.IntN(3) == 0 })
	default:
		ask.LocksFrom, whole = s.store.Log(), true
	}
	plan, err := broker.PlanRestore(ask)
	if errors.Is(err, broker.ErrConsent) {
		if whole && !s.forked {
			s.violation("I8: a restore with the whole of the last store wants consent: %v", err)
		}
		ask.AcceptLost = true
		plan, err = broker.PlanRestore(ask)
	} else if !whole {
		s.violation("I5: a restore that may lose locks asks nobody: %v", err)
	}
	if err != nil {
		s.violation("internal: planning a restore: %v", err)
		return
	}
	if s.store, err = s.lastStore.Restore(plan); err != nil {
		s.violation("internal: restoring: %v", err)
		return
	}
	s.counts["era"]++
	s.restoredTruth(ask, plan)
	s.note("the store is restored from %s with locks of %v, and begins at %s", ask.Backup.Head, ask.LocksFrom != nil, s.head())
	b.start()
}

// restoredTruth is what holds in the new era: every lock and every revoked key that the
// backup or the second copy has.
func (s *sim) restoredTruth(ask broker.Restore, plan *broker.Restoration) {
	before, backup := s.simTruth, s.lastTruth.clone()
	held := map[uint64]broker.Record{} // by the second copy
	if ask.LocksFrom != nil {
		for _, rec := range ask.LocksFrom.Records {
			held[rec.Seq] = rec
		}
	}
	s.locks = backup.locks
	for n, l := range before.locks {
		if old := s.locks[n]; old != nil && old.rec.Sum == l.rec.Sum {
			old.lifted = old.lifted || l.lifted
			continue
		}
		if rec, ok := held[n]; !ok || rec.Sum != l.rec.Sum || l.lifted {
			continue
		}
		c := *l
		c.number = carriedAs(plan, n)
		s.locks[c.number] = &c
	}
	s.deadKeys = backup.deadKeys
	for _, rec := range held {
		for _, id := range revokedKeys(rec) {
			if since, ok := before.deadKeys[id]; ok {
				s.deadKeys[id] = since
			}
		}
	}
	s.proposals = backup.proposals
	s.uses = backup.uses
	if w := ask.Now; w.After(s.latest) {
		s.latest = w
	}
	first := s.store.Log()
	for _, rec := range first.Records {
		if rec.Seq != plan.Behind.Seq+1 {
			continue
		}
		at := plan.Behind
		at.Era, at.Seq, at.Sum = rec.Era.Era, rec.Seq, rec.Sum
		s.records = append(s.records, &simRecord{rec: rec, at: at, committed: s.now})
	}
}

// carriedAs returns by which number a lock stands in the new era; where it wasn't carried
// over, one that nobody lifts.
func carriedAs(plan *broker.Restoration, number uint64) uint64 {
	for i, rec := range plan.Records {
		if from := rec.Details.CarriedFrom; from != nil && from.Number == number && rec.Revocation != nil {
			return plan.Behind.Seq + 1 + uint64(i)
		}
	}
	return 1<<62 + number
}

func revokedKeys(rec broker.Record) (ids []token.KeyID) {
	if rec.Revocation == nil {
		return nil
	}
	for _, sel := range rec.Revocation.Selectors {
		if id, err := token.ParseKeyID(sel.Value()); err == nil && sel.Kind() == revocation.KindKey {
			ids = append(ids, id)
		}
	}
	return ids
}

// again is what a process does that can write the store and keeps an old copy of it: it
// inserts a broker's own record of a key that was revoked since, and signs with it.
func (s *sim) again(b *simBroker, r *rand.Rand) {
	if !b.up() {
		return
	}
	var dead []*simKey
	for _, key := range s.published {
		if _, ok := s.deadKeys[key.id]; ok {
			dead = append(dead, key)
		}
	}
	if len(dead) == 0 {
		return
	}
	key := dead[r.IntN(len(dead))]
	s.stolen[key.id] = key
	s.insertKey(b, key, "vouched")
	b.newKey() // or the inserted one would be taken for its successor
}
