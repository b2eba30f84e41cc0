package broker_test

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"

	"github.com/dayflyhq/dayfly/broker"
	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// simUses is what was reported to the store, as no part of the system counts it.
type simUses struct {
	seen      map[string]bool // instance and number of reports that were kept
	unchecked []simUse
	after     map[feed.Position]simAfter
}

type simUse struct {
	token    *simToken
	era      string
	head     uint64
	accepted bool
	count    uint64
}

// simAfter is the uses of what a revocation killed by those who knew it.
type simAfter struct {
	refused, accepted uint64
	inexact           bool // the horizon or an era came between
}

func (u simUses) clone() simUses {
	return simUses{maps.Clone(u.seen), slices.Clone(u.unchecked), maps.Clone(u.after)}
}

// use has somebody present a credential to a verifier, which will report it.
func (v *simVerifier) use(k *simToken, r *rand.Rand) {
	s := v.s
	accepted, why := v.judges(k)
	if !v.awake(s) || why == "closed" || why == "stale" || why == simKeyUnknown {
		return
	}
	at, wall := v.view.Position(), v.Wall(s)
	u := &dayflyv1.Use{
		Grant: k.claims.Self().Grant.String(), Fingerprint: k.print[:], KeyId: k.claims.Self().Key.String(),
		Accepted: accepted, RefusalReason: strings.ToUpper(why), Count: uint64(1 + r.IntN(5)),
		FirstSeen: timestamppb.New(wall), LastSeen: timestamppb.New(wall), Head: at.Seq, Era: at.Era.String(),
	}
	if r.IntN(10) == 0 && (why == string(revocation.Revoked) || why == string(revocation.KeyRevoked)) { // it doesn't do its job
		u.Accepted, u.RefusalReason = true, ""
	}
	v.outbox.Put([]*dayflyv1.Use{u}, 0)
	s.counts["used"]++
}

// reports sends what waits, before a ping that will tell what has arrived.
func (f *simFollower) reports() {
	for m := f.outbox.Next(); m != nil; m = f.outbox.Next() {
		f.stream.send(f.s, &f.stream.up, simMessage{uses: m})
	}
}

// keepsReport is a broker that takes a report.
func (s *sim) keepsReport(st *simStream, m *dayflyv1.UseReport) error {
	b := st.broker
	report := broker.UseReport{Number: m.GetNumber()}
	for _, u := range m.GetUses() {
		report.Uses = append(report.Uses, broker.Use{
			Grant: u.GetGrant(), Fingerprint: u.GetFingerprint(), Key: u.GetKeyId(), Accepted: u.GetAccepted(), Reason: u.GetRefusalReason(),
			Count: u.GetCount(), First: u.GetFirstSeen().AsTime(), Last: u.GetLastSeen().AsTime(), Head: u.GetHead(), Era: u.GetEra(),
		})
	}
	if err := st.follower.Report(context.Background(), report); err != nil {
		return err
	}
	name := fmt.Sprint(st.instance, "/", m.GetNumber())
	if s.uses.seen == nil {
		s.uses.seen, s.uses.after = map[string]bool{}, map[feed.Position]simAfter{}
	}
	if !s.uses.seen[name] {
		s.uses.seen[name] = true
		for _, u := range m.GetUses() {
			if k := s.byPrint[token.Fingerprint(u.GetFingerprint())]; k != nil {
				s.uses.unchecked = append(s.uses.unchecked, simUse{k, u.GetEra(), u.GetHead(), u.GetAccepted(), u.GetCount()})
			}
		}
	}
	s.looksAtUses(b)
	return nil
}

// looksAtUses has a broker look at reports in a while, as it does beside everything else.
func (s *sim) looksAtUses(b *simBroker) {
	epoch := b.epoch
	s.after(s.between(3*1e9), func() {
		if b.epoch == epoch && b.up() {
			s.checkUses(b)
		}
	})
}

// checkUses: each use is counted once for each revocation that had killed it, and one of
// what was never recorded is an alarm.
func (s *sim) checkUses(b *simBroker) {
	before, told := b.b.UseCounts().Unrecorded, b.alarms
	if err := b.b.CheckUses(context.Background()); err != nil {
		s.violation("internal: looking at uses: %v", err)
		return
	}
	if s.shared || s.forked {
		return // one that lags behind doesn't know what killed it; or records were lost
	}
	era, horizon := s.head().Era, s.horizon()
	var unrecorded, older uint64
	for _, u := range s.uses.unchecked {
		switch {
		case u.era != era.String():
		case u.token.claims.Position.Era != era:
			// Nobody notes it but where a thief brought its key back. The backup may lack it.
			older += u.count
			s.countUse(b, u, horizon)
		case u.token.forged:
			unrecorded += u.count
		default:
			s.countUse(b, u, horizon)
		}
	}
	s.uses.unchecked = nil
	if got := b.b.UseCounts().Unrecorded - before; got < unrecorded || got > unrecorded+older {
		s.violation("U1: %s found %d uses of what was never recorded, and %d were reported", b.name, got, unrecorded)
	}
	if unrecorded > 0 {
		s.counts["alarmed"]++
		if b.alarms == 0 {
			s.violation("U1: %s was told of %d uses of what was never recorded, and raised no alarm", b.name, unrecorded)
		}
	}
	if unrecorded+older == 0 && b.alarms > told {
		s.violation("I8: %s raises an alarm for what is on record", b.name)
	}
	s.checkAfter(b)
}

func (s *sim) countUse(b *simBroker, u simUse, horizon feed.Position) {
	for _, r := range s.records {
		if r.rec.Revocation == nil || r.at.Era.String() != u.era || r.at.Seq > u.head || !r.reaches(u.token) {
			continue
		}
		if rec, err := b.b.Revocation(r.at.Seq); err != nil || rec.Position != r.at {
			continue // forgotten
		}
		a := s.uses.after[r.at]
		a.inexact = a.inexact || u.token.claims.Position.Rev < horizon.Seq || u.token.claims.Position.Era != r.at.Era
		if u.accepted {
			a.accepted += u.count
		} else {
			a.refused += u.count
		}
		s.uses.after[r.at] = a
	}
}

func (s *sim) checkAfter(b *simBroker) {
	for _, r := range s.records[max(0, len(s.records)-20):] {
		want := s.uses.after[r.at]
		if rec, err := b.b.Revocation(r.at.Seq); err != nil || rec.Position != r.at || want.inexact {
			continue
		}
		var got simAfter
		for _, a := range b.b.UsesAfter(r.at.Seq) {
			got.refused += a.Refused
			got.accepted += a.AcceptedKnowing
		}
		if got.refused > 0 {
			s.counts["presented when dead"]++
		}
		if got != want {
			s.violation("U1: of what %s killed %+v are counted, and %+v were reported", r.at, got, want)
		}
	}
}
