package verify

import (
	"sync"
	"sync/atomic"
	"time"

	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/proto/wire"
	"google.golang.org/protobuf/types/known/timestamppb"
)

const (
	// useShards spreads the counting, so that verifications don't queue for it.
	useShards = 16
	// maxUsesPerShard bounds the memory of what waits to be reported.
	maxUsesPerShard = 256
)

// uses adds up which grants were seen. Only tokens whose signature holds are counted:
// anybody can write a grant's ID into a token of their own. A verification costs one
// entry of a map under one of many locks; nothing here waits for the feed.
type uses struct {
	shards [useShards]useShard
	// urgent is set by what the next ping should carry along: a refusal, or counts that
	// fill up. What was accepted may wait for a bound.
	urgent atomic.Bool
	outbox wire.Outbox
	taken  feed.Instant // when counts last went to the outbox; of the sender alone
}

type useShard struct {
	mu      sync.Mutex
	counts  map[useKey]*use
	dropped uint64
}

// useKey has the head, so that what was accepted before a revocation was known and what
// was accepted after are never one count.
type useKey struct {
	grant       token.GrantID
	fingerprint token.Fingerprint
	identity    string
	address     string
	refusal     Reason // "" for accepted
	head        uint64
	era         token.Era
	signer      token.KeyID
}

type use struct {
	count       uint64
	first, last time.Time
}

// note counts one use, judged at a position.
func (u *uses) note(t *token.Token, at feed.Position, peer Peer, refusal *Refusal, now time.Time) {
	key := useKey{grant: t.Grant(), fingerprint: t.Fingerprint, address: peer.Address, head: at.Seq, era: at.Era, signer: t.Self().Key}
	if !peer.ID.IsZero() {
		key.identity = peer.ID.String()
	}
	if refusal != nil {
		key.refusal = refusal.Reason
	}
	waiting := u.shards[int(t.Fingerprint[0])%useShards].add(key, now)
	if (refusal != nil || waiting >= maxUsesPerShard/2) && !u.urgent.Load() {
		u.urgent.Store(true)
	}
}

// add returns how many counts wait.
func (s *useShard) add(key useKey, now time.Time) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	old, ok := s.counts[key]
	switch {
	case ok:
		old.count++
		if now.Before(old.first) {
			old.first = now
		}
		if now.After(old.last) {
			old.last = now
		}
	case len(s.counts) == maxUsesPerShard:
		s.dropped++
	default:
		if s.counts == nil {
			s.counts = map[useKey]*use{}
		}
		s.counts[key] = &use{1, now, now}
	}
	return len(s.counts)
}

// pack puts the counts into the outbox, if they are due and there is room for them.
func (u *uses) pack(now feed.Instant, every time.Duration) {
	due := u.taken == 0 || now.Sub(u.taken) >= every
	if !due && !u.urgent.Load() || u.outbox.Full() {
		return
	}
	u.urgent.Store(false) // before the counts: what comes meanwhile sets it again
	if counts, dropped := u.take(); len(counts) > 0 || dropped > 0 {
		u.outbox.Put(counts, dropped)
		u.taken = now
	}
}

func (u *uses) take() (out []*dayflyv1.Use, dropped uint64) {
	for i := range u.shards {
		s := &u.shards[i]
		s.mu.Lock()
		counts := s.counts
		dropped += s.dropped
		s.counts, s.dropped = nil, 0
		s.mu.Unlock()
		for k, n := range counts {
			out = append(out, k.message(n))
		}
	}
	return out, dropped
}

func (k useKey) message(n *use) *dayflyv1.Use {
	return &dayflyv1.Use{
		Grant: k.grant.String(), PeerIdentity: k.identity, PeerAddress: wire.PeerAddress(k.address),
		Accepted: k.refusal == "", RefusalReason: string(k.refusal),
		Count: n.count, FirstSeen: timestamppb.New(n.first), LastSeen: timestamppb.New(n.last),
		Head: k.head, Era: k.era.String(), Fingerprint: k.fingerprint[:], KeyId: k.signer.String(),
	}
}
