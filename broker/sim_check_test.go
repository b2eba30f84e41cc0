package broker_test

import (
	"slices"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
)

// The invariants, numbered as the design's traps are:
//
//	P1  recorded before released
//	I1  a verifier accepts nothing later than its revocation's commit and its bound
//	I2  a token isn't refused for a revocation it was issued with knowledge of
//	I3  nothing revives
//	I4  nothing that lives and is unmatched is refused by a verifier that is fresh
//	I5  locks, the parent check and the cut hold
//	I6  receipts, 'contained' and 'closed' are true
//	I7  a derived token never outlives or exceeds its parent
//	I8  no false alarm
//	I9  no laundering of forged tokens
//	O1  what takes two operators had two
//	U1  uses of what is dead, or was never recorded, are counted once, and told

// kills reports whether a record kills a token, itself or through what it derives from.
func (r *simRecord) kills(k *simToken) bool {
	if r.rec.Era != nil {
		return k.claims.Position.Era < r.at.Era
	}
	if k.claims.Position.Era != r.at.Era {
		return false
	}
	for from := k; from != nil; from = from.parent {
		// What is true of it, whatever the token says.
		sub := revocation.SubjectOf(&from.claims)
		self := from.claims.Self()
		self.SVID, self.Key = from.svid, from.key
		sub.Lineage = []token.Member{self}
		for _, sel := range r.rec.Revocation.Selectors {
			switch {
			case sel.Kind() == revocation.KindAudience && from != k: // is of the token itself
			case sel.Matches(sub) && (from.claims.Position.Rev < r.at.Seq || sel.Kind() == revocation.KindKey):
				return true
			}
		}
	}
	return false
}

// reaches is kills, and what is dead by a later era already: who is told that a revocation
// is contained relies on it for all that it names.
func (r *simRecord) reaches(k *simToken) bool {
	if r.rec.Revocation == nil || k.claims.Position.Era >= r.at.Era {
		return r.kills(k)
	}
	for from := k; from != nil; from = from.parent {
		sub := revocation.SubjectOf(&from.claims)
		self := from.claims.Self()
		self.SVID, self.Key = from.svid, from.key
		sub.Lineage = []token.Member{self}
		for _, sel := range r.rec.Revocation.Selectors {
			if (sel.Kind() != revocation.KindAudience || from == k) && sel.Matches(sub) {
				return true
			}
		}
	}
	return false
}

// look notes the latest time that a broker's wall clock ever showed.
func (s *sim) look() {
	for _, b := range s.brokers {
		if w := b.Wall(s); w.After(s.latest) {
			s.latest = w
		}
	}
}

func (s *sim) check() {
	s.look()
	for _, v := range s.verifiers {
		if !v.awake(s) {
			continue
		}
		for _, k := range s.tokens {
			s.checkToken(v, k)
		}
	}
	// A store that was put back by hand has an old roster: its receipts promise nothing.
	if b := s.brokers[0]; !s.shared && !s.forked && b.up() {
		s.checkContainment(b)
	}
}

func (s *sim) checkToken(v *simVerifier, k *simToken) {
	accepted, why := v.judges(k)
	if accepted {
		s.counts["accepted"]++
		if at := v.view.Position(); k.claims.Position.Era == at.Era && k.claims.Position.Rev > at.Seq {
			s.violation("I3: %s at %s accepts %s from the future (rev %d)", v.name, at, k.name, k.claims.Position.Rev)
		}
		if was := v.refused[k]; was != "" {
			s.violation("I3: %s accepts %s, which it refused as %s", v.name, k.name, was)
		}
		if since, ok := s.foreign[k.key]; ok && !v.accepts && s.now-since > v.live+v.live/1000 {
			s.violation("I9: %s accepts %s, signed with a key that a thief inserted %s ago", v.name, k.name, s.now-since)
		}
		if since, ok := s.deadKeys[k.key]; ok && !v.accepts && s.now-since > v.live+v.live/1000 {
			s.violation("I9: %s accepts %s, signed with a key that was revoked %s ago", v.name, k.name, s.now-since)
		}
		for _, r := range s.records {
			if !v.accepts && s.now-r.committed > v.live+v.live/1000 && r.kills(k) {
				s.violation("I1: %s (bound %s) accepts %s, dead by %s for %s", v.name, v.live, k.name, r.at, s.now-r.committed)
			}
			if r.contained && !v.accepts && r.reaches(k) {
				s.violation("I6: %s was said to be contained, and %s accepts %s", r.at, v.name, k.name)
			}
		}
		return
	}
	switch why {
	case "closed", "stale", "time":
		return
	}
	s.counts["refused"]++
	reason := revocation.Reason(why)
	if reason == revocation.Revoked || reason == revocation.KeyRevoked || reason == revocation.BelowHorizon || reason == revocation.WrongEra {
		v.refused[k] = why
	}
	if s.forked || k.forged || s.now >= k.expires || v.accepts || k.claims.Position.Era != s.head().Era ||
		slices.ContainsFunc(s.records, func(r *simRecord) bool { return r.kills(k) }) {
		return
	}
	at := v.view.Position()
	if at.Era < k.claims.Position.Era || at.Era == k.claims.Position.Era && at.Seq < k.claims.Position.Rev {
		return // it hasn't come so far yet
	}
	if s.shared && why == simKeyUnknown {
		return // brokers on one store retire each other's keys: not for bbolt, which one process opens
	}
	if s.shared && reason == revocation.BelowHorizon && s.clocksOff {
		return // how late a grant may commit is told by the clocks of two brokers: not for bbolt either
	}
	invariant := "I4"
	if reason == revocation.Revoked {
		invariant = "I2"
	}
	s.violation("%s: %s at %s refuses the live %s (rev %d) as %s", invariant, v.name, at, k.name, k.claims.Position.Rev, why)
}

// checkLocks: a caller got a credential though a lock stood.
func (s *sim) checkLocks(c simCaller, k *simToken) {
	s.look()
	for _, l := range s.locks {
		ends := l.rec.Details.LockEnds
		if l.lifted {
			continue
		}
		// By the clock of some broker, which may have forgotten the lock since.
		over := !ends.IsZero() && !s.latest.Before(ends)
		for _, sel := range l.rec.Revocation.Selectors {
			if !sel.Lockable() || !sel.MatchesCaller(c.ID, token.ThumbprintOf(c.Leaf)) || over && sel.Kind() != revocation.KindSVID {
				continue
			}
			switch {
			case sel.Kind() == revocation.KindSVID, l.rec.Details.Lock == broker.LockQuarantine:
				s.violation("I5: %s got %s though lock %d (%s) stands on %s", c.ID, k.name, l.number, l.rec.Details.Lock, sel)
			case c.issued < l.committed && l.exact:
				s.violation("I5: %s got %s with an SVID from before the cut of lock %d", c.ID, k.name, l.number)
			}
		}
	}
	// A parent that is dead, or presented by way of one who is quarantined, gives nothing.
	if k.parent == nil {
		return
	}
	for _, r := range s.records {
		if r.kills(k.parent) {
			s.violation("I5: %s derives from %s, dead by %s", k.name, k.parent.name, r.at)
		}
	}
}

func (s *sim) checkNarrow(k, parent *simToken) {
	for _, scope := range k.claims.Scopes {
		if !slices.Contains(parent.claims.Scopes, scope) {
			s.violation("I7: %s has the scope %s, which %s lacks", k.name, scope, parent.name)
		}
	}
	n := len(parent.claims.Lineage)
	switch {
	case k.claims.Expires.After(parent.claims.Expires):
		s.violation("I7: %s outlives %s", k.name, parent.name)
	case len(k.claims.Lineage) != n+1 || !slices.Equal(k.claims.Lineage[:n], parent.claims.Lineage):
		s.violation("I7: %s does not continue the lineage of %s", k.name, parent.name)
	case n+1 > token.MaxDepth:
		s.violation("I7: %s is too deep", k.name)
	}
}

// checkContainment asks a broker about the newest revocations.
func (s *sim) checkContainment(b *simBroker) {
	for _, r := range s.records[max(0, len(s.records)-3):] {
		if r.rec.Revocation == nil || r.at.Era != s.head().Era {
			continue
		}
		rec, err := b.b.Revocation(r.at.Seq)
		if err != nil || rec.Position != r.at {
			continue // forgotten, or lost with a store
		}
		c, _ := b.b.Containment(rec)
		for _, receipt := range c.Receipts {
			s.counts[string(receipt.State)]++
			s.checkReceipt(r, receipt, c.Receipts)
		}
		if !c.Contained {
			continue
		}
		s.counts["contained"]++
		if !r.contained {
			r.contained = true
			s.note("%s is said to be contained", r.at)
		}
		for _, v := range s.verifiers {
			for _, k := range s.tokens {
				if v.accepts && s.now-k.issued > token.MaxTTL {
					continue // by a broker whose clock was ahead: who runs on when stale left the list meanwhile
				}
				if accepted, _ := v.judges(k); accepted && v.awake(s) && r.reaches(k) {
					s.violation("I6: %s is said to be contained, and %s accepts %s", r.at, v.name, k.name)
				}
			}
		}
	}
}

func (s *sim) checkReceipt(r *simRecord, receipt feed.Receipt, all []feed.Receipt) {
	for _, v := range s.verifiers {
		if v.instance != receipt.Verifier.ID.Instance || !v.awake(s) {
			continue
		}
		switch receipt.State {
		case feed.Confirmed:
			if v.view.Position().Compare(r.at) < 0 {
				s.violation("I6: %s is said to have confirmed %s, and is at %s", v.instance, r.at, v.view.Position())
			}
		case feed.Closed:
			open := slices.ContainsFunc(all, func(o feed.Receipt) bool {
				return o.Verifier.ID.Instance == v.instance && o.State != feed.Closed
			})
			// One of an earlier era accepts nothing that the record kills, whatever its bound
			// was raised to since the backup.
			if !open && v.live > 0 && v.view.Position().Era == r.at.Era && v.fresh.Fresh(v.Boot(s), v.live-v.live/1000) {
				s.violation("I6: %s is said to be closed since %s, and is fresh", v.instance, s.now-s.brokers[0].Boot(s).Sub(receipt.At))
			}
		}
	}
}

// checkHealed: after quiet everybody knows everything, and is fresh.
func (s *sim) checkHealed() {
	head := s.head()
	// Brokers on one store forget records and each other's keys at moments of their own,
	// and sign for what they have.
	unproven := func(f *simFollower) bool { return s.shared && f.distrusts }
	for _, r := range s.relays {
		if unproven(&r.simFollower) {
			return
		}
		if at := r.relay.View.Position(); at != head {
			s.violation("L1: %s never caught up: at %s, head %s", r.name, at, head)
		}
	}
	for _, v := range s.verifiers {
		if unproven(&v.simFollower) {
			continue
		}
		if at := v.view.Position(); at != head {
			s.violation("L1: %s never caught up: at %s, head %s", v.name, at, head)
		}
		if !v.fresh.Fresh(v.Boot(s), v.live) {
			s.violation("L1: %s never got fresh", v.name)
		}
	}
}
