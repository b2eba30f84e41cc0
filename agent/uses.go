package agent

import (
	"time"

	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/wire"
)

// maxUses bounds the uses that wait for the broker.
const maxUses = 4096

// useKey is what uses are added up by: verifiers on one host see the same grants.
type useKey struct {
	verifier, instance                                 string
	grant, fingerprint, identity, address, reason, era string
	head                                               uint64
}

// use takes a report for the broker, as much of it as there is room for. Once it is
// here, the verifier's next ping is answered and it forgets the report: what waits here
// dies with the agent. One that comes again on another stream is known by its number.
func (d *downstream) use(m *dayflyv1.UseReport) {
	k := d.k
	k.mu.Lock()
	defer k.mu.Unlock()
	if !d.feed.UseReport(m.GetNumber()) {
		return
	}
	k.usesDropped += m.GetDropped()
	for _, u := range m.GetUses() {
		d.name(u)
		k.count(u)
	}
	k.kick()
}

// name says who saw a use: whoever sent it, or, where that is a relay, the one that it names.
// mu is held.
func (d *downstream) name(u *dayflyv1.Use) {
	if d.feed.Relays() && u.GetVerifierInstance() != "" {
		return
	}
	u.VerifierIdentity, u.VerifierInstance = d.feed.Name()
}

// count adds one entry; mu is held. What the broker would refuse is dropped here: it
// must not end the stream of everyone beside whoever sent it.
func (k *knowledge) count(u *dayflyv1.Use) {
	if wire.CheckUse(u) != nil {
		k.usesDropped++
		return
	}
	key := useKey{
		u.GetVerifierIdentity(), u.GetVerifierInstance(),
		u.GetGrant(), string(u.GetFingerprint()), u.GetPeerIdentity(), u.GetPeerAddress(), u.GetRefusalReason(), u.GetEra(), u.GetHead(),
	}
	old, ok := k.uses[key]
	switch {
	case ok:
		old.Count += u.GetCount()
		if before(u.GetFirstSeen(), old.GetFirstSeen()) {
			old.FirstSeen = u.GetFirstSeen()
		}
		if before(old.GetLastSeen(), u.GetLastSeen()) {
			old.LastSeen = u.GetLastSeen()
		}
	case len(k.uses) == maxUses:
		k.usesDropped += u.GetCount()
	default:
		k.uses[key] = u
	}
}

func before(a, b interface{ AsTime() time.Time }) bool { return a.AsTime().Before(b.AsTime()) }

// passUses passes on what those below reported. The ping that follows tells what has
// arrived.
func (s *session) passUses() error {
	k := s.k
	if !k.outbox.Full() {
		k.mu.Lock()
		uses, dropped := make([]*dayflyv1.Use, 0, len(k.uses)), k.usesDropped
		for _, u := range k.uses {
			uses = append(uses, u)
		}
		clear(k.uses)
		k.usesDropped = 0
		k.mu.Unlock()
		k.outbox.Put(uses, dropped)
	}
	for m := k.outbox.Next(); m != nil; m = k.outbox.Next() {
		if err := s.up(&dayflyv1.FollowRequest{Message: &dayflyv1.FollowRequest_UseReport{UseReport: m}}); err != nil {
			return err
		}
	}
	return nil
}
