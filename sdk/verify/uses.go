package verify

import (
	"sync"
	"time"

	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/token"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
)

const (
	// useShards spreads the counting, so that verifications don't queue for it.
	useShards = 16
	// maxUsesPerShard bounds the memory of what waits to be reported.
	maxUsesPerShard = 256
	// maxReportBytes keeps a report below the size of a request.
	maxReportBytes = 32 << 10
)

// uses adds up which grants were seen. Only tokens whose signature holds are counted:
// anybody can write a grant's ID into a token of their own.
type uses struct{ shards [useShards]useShard }

type useShard struct {
	mu      sync.Mutex
	counts  map[useKey]*use
	dropped uint64
}

type useKey struct {
	grant    token.GrantID
	identity string
	address  string
	refusal  Reason // "" for accepted
}

type use struct {
	count       uint64
	first, last time.Time
	head        uint64
}

func (v *Verifier) noteUse(t *token.Token, peer Peer, refusal *Refusal) {
	key := useKey{grant: t.Grant(), address: peer.Address}
	if !peer.ID.IsZero() {
		key.identity = peer.ID.String()
	}
	if refusal != nil {
		key.refusal = refusal.Reason
	}
	v.mu.RLock()
	head := v.view.Position().Seq
	v.mu.RUnlock()
	now := v.cfg.Now()
	v.uses.shard(key).add(key, use{1, now, now, head})
}

// shard picks by the fingerprint's worth of randomness that ends a grant ID.
func (u *uses) shard(key useKey) *useShard {
	b := key.grant.Bytes()
	return &u.shards[int(b[len(b)-1])%useShards]
}

func (s *useShard) add(key useKey, n use) {
	s.mu.Lock()
	defer s.mu.Unlock()
	old, ok := s.counts[key]
	switch {
	case ok:
		old.count += n.count
		if n.first.Before(old.first) {
			old.first = n.first
		}
		if n.last.After(old.last) {
			old.last, old.head = n.last, n.head
		}
	case len(s.counts) == maxUsesPerShard:
		s.dropped += n.count
	default:
		if s.counts == nil {
			s.counts = map[useKey]*use{}
		}
		s.counts[key] = &n
	}
}

// A report is what was taken out to be sent.
type report struct {
	uses    map[useKey]*use
	dropped uint64
}

func (u *uses) take() report {
	out := report{uses: map[useKey]*use{}}
	for i := range u.shards {
		s := &u.shards[i]
		s.mu.Lock()
		for k, n := range s.counts {
			out.uses[k] = n
		}
		out.dropped += s.dropped
		s.counts, s.dropped = nil, 0
		s.mu.Unlock()
	}
	return out
}

// put back what could not be sent.
func (u *uses) put(r report) {
	for k, n := range r.uses {
		u.shard(k).add(k, *n)
	}
	s := &u.shards[0]
	s.mu.Lock()
	defer s.mu.Unlock()
	s.dropped += r.dropped
}

// send gives the report to a function in messages of bounded size, and puts back what
// it refuses.
func (u *uses) send(send func(*dayflyv1.UseReport) error) error {
	r := u.take()
	m := &dayflyv1.UseReport{Dropped: r.dropped}
	size := 0
	var batch []useKey
	flush := func() error {
		if len(m.Uses) == 0 && m.Dropped == 0 {
			return nil
		}
		if err := send(m); err != nil {
			u.put(r)
			return err
		}
		for _, k := range batch {
			delete(r.uses, k)
		}
		r.dropped = 0
		m, size, batch = &dayflyv1.UseReport{}, 0, nil
		return nil
	}
	for k, n := range r.uses {
		one := k.message(n)
		if size += proto.Size(one) + 4; size > maxReportBytes {
			if err := flush(); err != nil {
				return err
			}
			size = proto.Size(one) + 4
		}
		m.Uses, batch = append(m.Uses, one), append(batch, k)
	}
	return flush()
}

func (k useKey) message(n *use) *dayflyv1.Use {
	return &dayflyv1.Use{
		Grant: k.grant.String(), PeerIdentity: k.identity, PeerAddress: k.address,
		Accepted: k.refusal == "", RefusalReason: string(k.refusal),
		Count: n.count, FirstSeen: timestamppb.New(n.first), LastSeen: timestamppb.New(n.last), Head: n.head,
	}
}
