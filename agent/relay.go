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
	// subscribeWithin is how long a new stream may be silent.
	subscribeWithin = 10 * time.Second
	// eventsAtOnce keeps a message well below what receivers accept.
	eventsAtOnce = 256
	// maxRefusals bounds the refusals that wait for a relay below. One that was dropped
	// comes again with the answer to the next report.
	maxRefusals = 4096
)

// feedService relays what the agent knows.
type feedService struct {
	dayflyv1.UnimplementedFeedServiceServer
	k          *knowledge
	maxStreams int64
	streams    atomic.Int64
	stopping   <-chan struct{}
	counts     *counters
	peer       func(context.Context) (string, error) // who is at the other end; nil: on this host
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
		k: s.k, stream: stream, peer: s.peer, subscribed: make(chan struct{}), replaced: make(chan struct{}),
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
	peer       func(context.Context) (string, error)
	subscribed chan struct{} // closed by the Subscribe
	replaced   chan struct{} // closed when another stream takes the instance over

	feed     *feed.Downstream         // nil before the Subscribe
	refusals []*dayflyv1.RelayRefusal // of the broker, for those that this stream speaks for
	keeps    bool                     // it wants the newest signed head
	kept     feed.Position            // of which it was given the last
	left     bool                     // the handler has returned: the reader must not join any more
}

// next returns the message to send now, or the channel to wait at.
func (d *downstream) next() (*dayflyv1.FollowResponse, <-chan struct{}, error) {
	k := d.k
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.relay.View.Err(); err != nil {
		return nil, nil, refuse(codes.FailedPrecondition, "FEED_FORKED", "the log has two histories: nothing is relayed", "it goes on once an operator has restored the broker's store: docs/operations.md")
	}
	if k.refused != nil || k.welcome != nil && !k.relays {
		return nil, nil, refuse(codes.PermissionDenied, "RELAY_NOT_ALLOWED", "policy does not let this agent's identity relay the feed", "ask the policy's owner for relay: true under verifiers")
	}
	if len(d.refusals) > 0 {
		m := d.refusals[0]
		d.refusals = d.refusals[1:]
		if len(m.GetPath()) == 1 {
			return nil, nil, refusedBelow(m)
		}
		return &dayflyv1.FollowResponse{Message: &dayflyv1.FollowResponse_RelayRefusal{RelayRefusal: &dayflyv1.RelayRefusal{
			Path: m.GetPath()[1:], Code: m.GetCode(), Reason: m.GetReason(), Message: m.GetMessage(), Metadata: m.GetMetadata(),
		}}}, nil, nil
	}
	m, ok := d.feed.Next(k.boot(), eventsAtOnce)
	switch {
	case !ok:
		return nil, k.changed, nil
	case m.Welcome:
		return &dayflyv1.FollowResponse{Message: &dayflyv1.FollowResponse_Welcome{Welcome: &dayflyv1.Welcome{
			MaxStaleness: durationpb.New(d.feed.Bound()), MaxTokenTtl: k.welcome.GetMaxTokenTtl(), Issuer: k.welcome.GetIssuer(),
		}}}, nil, nil
	case m.Delivery != nil:
		return wire.Delivery(*m.Delivery), nil, nil
	}
	pong := wire.Pong{Nonce: m.Answer.Nonce, Head: m.Answer.Head, Age: m.Answer.Age, Horizon: m.Answer.Horizon, Signed: m.Answer.Signed, Path: m.Answer.Path}
	if d.keeps && k.kept.Head != d.kept {
		pong.Signed, d.kept = k.kept.Signed, k.kept.Head
	}
	return wire.PongMessage(pong), nil, nil
}

// read takes what the verifier sends until the stream ends.
func (d *downstream) read() error {
	for {
		m, err := d.stream.Recv()
		if err != nil {
			return err
		}
		if d.peer != nil { // an SVID may expire, and a bundle change, while a stream is open
			if _, err := d.peer(d.stream.Context()); err != nil {
				return err
			}
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
	if d.feed == nil { // written by this goroutine alone
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
	case d.feed != nil:
		return feedInvalid("a second Subscribe")
	case d.peer != nil && !sub.SignedHeads:
		return refuse(codes.InvalidArgument, "SIGNED_HEADS_REQUIRED", "a relay on another host is followed by signed heads", "set BrokerID of the verifier's configuration")
	}
	var identity string
	if d.peer != nil {
		if identity, err = d.peer(d.stream.Context()); err != nil {
			return err
		}
	}
	k := d.k
	k.mu.Lock()
	defer k.mu.Unlock()
	if d.left {
		return io.EOF
	}
	self := feed.Relayed{Path: []string{sub.Instance}, Audiences: sub.Audiences, Bound: sub.Bound, AcceptsStale: sub.AcceptsStale, Acked: sub.Position, Identity: identity}
	stream, replaced, err := k.relay.Follow(self, sub.Relay, k.boot())
	if err != nil {
		return belowRefused(err)
	}
	if d.peer != nil {
		stream.Distrust()
	}
	d.keeps = d.peer == nil && sub.SignedHeads
	k.note(sub.NewestHead)
	if old := k.streams[replaced]; old != nil {
		close(old.replaced)
	}
	d.feed, k.streams[stream] = stream, d
	close(d.subscribed)
	k.kick()
	return nil
}

// belowRefused is what one below hears of a message that the relay didn't take.
func belowRefused(err error) error {
	if errors.Is(err, feed.ErrCrowded) {
		return refuse(codes.ResourceExhausted, "TOO_MANY_STREAMS", "too many verifiers are known to this agent", "wait until those that are gone have closed")
	}
	return feedInvalid(err.Error())
}

func (d *downstream) ping(m *dayflyv1.Ping) error {
	nonce, err := wire.ToNonce(m.GetNonce())
	if err != nil {
		return feedInvalid(err.Error())
	}
	d.k.mu.Lock()
	defer d.k.mu.Unlock()
	d.feed.Ping(nonce)
	if d.peer != nil {
		d.k.kick() // it goes up
	}
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
	news, err := d.feed.Acknowledge(p)
	if err != nil {
		return feedInvalid(err.Error())
	}
	if news {
		d.k.kick()
	}
	return nil
}

// relayed takes the report of a relay below.
func (d *downstream) relayed(m *dayflyv1.RelayReport) error {
	below, err := wire.ToRelayed(m.GetVerifiers())
	if err != nil {
		return feedInvalid(err.Error())
	}
	d.k.mu.Lock()
	defer d.k.mu.Unlock()
	if d.left {
		return io.EOF
	}
	if err := d.feed.Report(below, d.k.boot()); err != nil {
		return belowRefused(err)
	}
	d.k.kick()
	return nil
}

func (d *downstream) leave() {
	d.k.mu.Lock()
	defer d.k.mu.Unlock()
	d.left = true
	if d.feed != nil {
		d.feed.Leave()
		delete(d.k.streams, d.feed)
		d.k.kick()
	}
}
