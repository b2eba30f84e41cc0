package agent

import (
	"context"
	"errors"
	"io"
	"sync/atomic"
	"time"

	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/wire"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/durationpb"
)

const (
	// DefaultMaxStreams is how many verifiers may follow at once.
	DefaultMaxStreams = 256
	// maxBelow bounds the verifiers reported upwards, those behind other relays
	// included.
	maxBelow = 4096
	// maxPath bounds the relays between a verifier and this agent.
	maxPath = 7
	// subscribeWithin is how long a new stream may be silent.
	subscribeWithin = 10 * time.Second
	// eventsAtOnce keeps a message well below what receivers accept.
	eventsAtOnce = 256
	// maxNonces bounds the pings of one stream that wait for an answer: the oldest are
	// forgotten, as verifiers forget theirs.
	maxNonces = 64
	// maxUses bounds the use reports that wait for the broker, maxUsesAtOnce those of
	// one message.
	maxUses       = 4096
	maxUsesAtOnce = 256
)

// feedService relays what the agent knows.
type feedService struct {
	dayflyv1.UnimplementedFeedServiceServer
	k          *knowledge
	maxStreams int64
	streams    atomic.Int64
	stopping   <-chan struct{}
	counts     *counters
}

type followStream = grpc.BidiStreamingServer[dayflyv1.FollowRequest, dayflyv1.FollowResponse]

// Follow is one verifier's stream.
func (s *feedService) Follow(stream followStream) error {
	if s.streams.Add(1) > s.maxStreams {
		s.streams.Add(-1)
		return refuse(codes.ResourceExhausted, "TOO_MANY_STREAMS", "too many verifiers follow through this agent", "raise max_streams of the agent's configuration")
	}
	defer s.streams.Add(-1)
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	d := &downstream{
		k: s.k, stream: stream, subscribed: make(chan struct{}), replaced: make(chan struct{}),
	}
	// The reader ends when the handler returns, because Recv then does.
	ended := make(chan error, 1)
	go func() { ended <- d.read() }()
	defer d.leave()

	silent := time.NewTimer(subscribeWithin)
	defer silent.Stop()
	select {
	case <-d.subscribed:
	case err := <-ended:
		return ending(err)
	case <-silent.C:
		return feedInvalid("no Subscribe came")
	case <-s.stopping:
		return errStopping()
	}
	return s.send(ctx, d, ended)
}

func ending(err error) error {
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

func errStopping() error {
	return refuse(codes.Unavailable, "AGENT_STOPPING", "the agent is stopping", "reconnect with jitter")
}

// send is the only sender of a stream, so a slow reader makes nobody wait but itself.
func (s *feedService) send(ctx context.Context, d *downstream, ended <-chan error) error {
	for {
		m, changed, err := d.next()
		if err != nil {
			return err
		}
		if m != nil {
			if err := d.stream.Send(m); err != nil {
				return err
			}
			s.counts.relayed.Add(1)
			continue
		}
		select {
		case <-changed:
		case err := <-ended:
			return ending(err)
		case <-d.replaced:
			return refuse(codes.Aborted, "INSTANCE_REPLACED", "another stream speaks for this instance now", "an instance is random, new with every start")
		case <-s.stopping:
			return errStopping()
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// downstream is one stream. All but stream is guarded by knowledge.mu.
type downstream struct {
	k          *knowledge
	stream     followStream
	subscribed chan struct{} // closed by the Subscribe
	replaced   chan struct{} // closed when another stream takes the instance over

	self     *verifier // nil before the Subscribe
	relay    bool
	need     uint64 // the generation that must be confirmed before a ping is answered
	cursor   *feed.Cursor
	welcomed bool
	left     bool // the handler has returned: the reader must not join any more
	nonces   []string
}

// next returns the message to send now, or the channel to wait at. Records go before
// answers: an answer is worth something only to one who has applied up to its head.
func (d *downstream) next() (*dayflyv1.FollowResponse, <-chan struct{}, error) {
	k := d.k
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.view.Err(); err != nil {
		return nil, nil, refuse(codes.FailedPrecondition, "FEED_FORKED", "the log has two histories: nothing is relayed", "it goes on once an operator has restored the broker's store: docs/operations.md")
	}
	if k.refused != nil || k.welcome != nil && !k.relays {
		return nil, nil, refuse(codes.PermissionDenied, "RELAY_NOT_ALLOWED", "policy does not let this agent's identity relay the feed", "ask the policy's owner for relay: true under verifiers")
	}
	if !d.welcomed {
		if k.welcome == nil || d.need > k.confirmed {
			return nil, k.changed, nil
		}
		d.welcomed = true
		return d.welcome(), nil, nil
	}
	if k.view.Position().Era != 0 {
		if delivery, ok := d.cursor.Next(k.view.Log(), eventsAtOnce); ok {
			return wire.Delivery(delivery), nil, nil
		}
		if m := d.pong(); m != nil {
			return m, nil, nil
		}
	}
	return nil, k.changed, nil
}

func (d *downstream) welcome() *dayflyv1.FollowResponse {
	w := d.k.welcome
	return &dayflyv1.FollowResponse{Message: &dayflyv1.FollowResponse_Welcome{Welcome: &dayflyv1.Welcome{
		MaxStaleness: durationpb.New(d.self.bound), MaxTokenTtl: w.GetMaxTokenTtl(), Issuer: w.GetIssuer(),
	}}}
}

// pong answers the oldest ping, if there is a proof to answer from, with the age of the
// agent's own knowledge; mu is held.
func (d *downstream) pong() *dayflyv1.FollowResponse {
	if len(d.nonces) == 0 || d.need > d.k.confirmed {
		return nil
	}
	now := d.k.boot()
	age, known := d.k.fresh.Age(now)
	if !known {
		return nil
	}
	nonce := d.nonces[0]
	d.nonces = d.nonces[1:]
	d.self.answered, d.self.ever = now, true
	return wire.PongMessage(wire.Pong{Nonce: nonce, Head: d.k.view.Position(), Age: age, Horizon: d.k.view.Log().Horizon()})
}

// read takes what the verifier sends until the stream ends.
func (d *downstream) read() error {
	for {
		m, err := d.stream.Recv()
		if err != nil {
			return err
		}
		if err := d.take(m); err != nil {
			return err
		}
	}
}

func (d *downstream) take(m *dayflyv1.FollowRequest) error {
	if sub := m.GetSubscribe(); sub != nil {
		return d.subscribe(sub)
	}
	if d.self == nil { // written by this goroutine alone
		return feedInvalid("the first message must be a Subscribe")
	}
	switch {
	case m.GetPing() != nil:
		return d.ping(m.GetPing())
	case m.GetAcknowledge() != nil:
		return d.acknowledge(m.GetAcknowledge())
	case m.GetUseReport() != nil:
		d.use(m.GetUseReport())
		return nil
	case m.GetRelayReport() != nil:
		return d.relayed(m.GetRelayReport())
	}
	return feedInvalid("an unknown message")
}

func (d *downstream) subscribe(m *dayflyv1.Subscribe) error {
	sub, err := wire.ToSubscription(m)
	switch {
	case err != nil:
		return feedInvalid(err.Error())
	case d.self != nil:
		return feedInvalid("a second Subscribe")
	case sub.SignedHeads:
		return refuse(codes.InvalidArgument, "SIGNED_HEADS_UNSUPPORTED", "this relay gives no signed heads", "follow without them over the agent's unix socket, or follow the broker")
	}
	v := &verifier{path: []string{sub.Instance}, audiences: sub.Audiences, bound: sub.Bound, accepts: sub.AcceptsStale, owner: d}
	k := d.k
	k.mu.Lock()
	defer k.mu.Unlock()
	if d.left {
		return io.EOF
	}
	if at, ok := k.view.Log().At(sub.Position.Seq); ok && at == sub.Position {
		v.acked = at
	}
	if old := k.below[pathKey(v.path)]; old != nil && !old.gone && old.owner != nil {
		close(old.owner.replaced)
	}
	if !k.join(v) {
		return refuse(codes.ResourceExhausted, "TOO_MANY_STREAMS", "too many verifiers are known to this agent", "wait until those that are gone have closed")
	}
	d.self, d.relay, d.need = v, sub.Relay, v.gen
	d.cursor = feed.NewCursor(sub.Position)
	close(d.subscribed)
	return nil
}

func (d *downstream) ping(m *dayflyv1.Ping) error {
	nonce, err := wire.ToNonce(m.GetNonce())
	if err != nil {
		return feedInvalid(err.Error())
	}
	d.k.mu.Lock()
	defer d.k.mu.Unlock()
	if len(d.nonces) == maxNonces {
		d.nonces = append(d.nonces[:0], d.nonces[1:]...)
	}
	d.nonces = append(d.nonces, nonce)
	d.k.ring()
	return nil
}

// acknowledge takes a receipt for what was delivered here, and passes it on as the
// verifier's own.
func (d *downstream) acknowledge(m *dayflyv1.Acknowledge) error {
	p, err := wire.ToPosition(m.GetPosition())
	if err != nil {
		return feedInvalid(err.Error())
	}
	d.k.mu.Lock()
	defer d.k.mu.Unlock()
	if err := d.delivered(p); err != nil {
		return err
	}
	if d.credible(p) && p.Compare(d.self.acked) > 0 {
		d.self.acked, d.self.dirty = p, true
		d.k.kick()
	}
	return nil
}

// credible reports whether the agent knows of the position itself. A verifier that came
// here from elsewhere may be ahead; its receipt counts once the agent has caught up and
// the verifier says so again. mu is held.
func (d *downstream) credible(p feed.Position) bool {
	return p.Compare(d.k.view.Position()) <= 0
}

// delivered refuses a receipt for what this stream hasn't given; mu is held.
func (d *downstream) delivered(p feed.Position) error {
	if at, known := d.k.view.Log().At(p.Seq); d.credible(p) && p.Compare(d.cursor.Position()) > 0 || known && p.ForkOf(at) {
		return feedInvalid("a receipt for what was not delivered on this stream")
	}
	return nil
}

// use keeps reports for the broker, as many as there is room for.
func (d *downstream) use(m *dayflyv1.UseReport) {
	d.k.mu.Lock()
	defer d.k.mu.Unlock()
	d.k.usesDropped += m.GetDropped()
	for _, u := range m.GetUses() {
		if len(d.k.uses) == maxUses || len(u.GetGrant()) > 64 || len(u.GetPeerIdentity()) > 2048 ||
			len(u.GetPeerAddress()) > 64 || len(u.GetRefusalReason()) > 64 {
			d.k.usesDropped++
			continue
		}
		d.k.uses = append(d.k.uses, u)
	}
	d.k.kick()
}

// relayed takes the report of a relay below. Its own pings wait until the broker has
// heard of whoever is new in it.
func (d *downstream) relayed(m *dayflyv1.RelayReport) error {
	if !d.relay {
		return feedInvalid("a relay report from one that is no relay")
	}
	for _, rv := range m.GetVerifiers() {
		v, err := d.toVerifier(rv)
		if err != nil {
			return err
		}
		if err := d.admit(v); err != nil {
			return err
		}
	}
	return nil
}

func (d *downstream) toVerifier(m *dayflyv1.RelayedVerifier) (*verifier, error) {
	if n := len(m.GetPath()); n == 0 || n > maxPath {
		return nil, feedInvalid("a path of 1 to 7 instances")
	}
	for _, instance := range m.GetPath() {
		if !wire.ValidInstance(instance) {
			return nil, feedInvalid("a path of instances")
		}
	}
	sub, err := wire.ToSubscription(&dayflyv1.Subscribe{
		Instance: m.GetPath()[len(m.GetPath())-1], Audiences: m.GetAudiences(), MaxStaleness: m.GetMaxStaleness(),
		OnStale: m.GetOnStale(), Position: m.GetAcknowledged(), Relay: true,
	})
	if err != nil {
		return nil, feedInvalid(err.Error())
	}
	age := time.Duration(0)
	if m.GetLastAnswerAge() != nil {
		if age, err = wire.ToDuration(m.GetLastAnswerAge()); err != nil {
			return nil, feedInvalid(err.Error())
		}
	}
	return &verifier{
		path: append([]string{d.self.path[0]}, m.GetPath()...), audiences: sub.Audiences, bound: sub.Bound,
		accepts: sub.AcceptsStale, acked: sub.Position, answered: d.k.boot().Add(-age), ever: true, gone: m.GetGone(), owner: d,
	}, nil
}

func (d *downstream) admit(v *verifier) error {
	k := d.k
	k.mu.Lock()
	defer k.mu.Unlock()
	if d.left {
		return io.EOF
	}
	if err := d.delivered(v.acked); err != nil {
		return err
	}
	if !d.credible(v.acked) {
		v.acked = feed.Position{}
	}
	answered := v.answered
	if !k.join(v) {
		return refuse(codes.ResourceExhausted, "TOO_MANY_STREAMS", "too many verifiers are known to this agent", "wait until those that are gone have closed")
	}
	v.answered, v.ever = max(v.answered, answered), true
	d.need = max(d.need, v.gen)
	return nil
}

func (d *downstream) leave() {
	d.k.mu.Lock()
	defer d.k.mu.Unlock()
	d.left = true
	d.k.leave(d)
}
