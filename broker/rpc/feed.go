package rpc

import (
	"context"
	"errors"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/proto/wire"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"
)

const (
	// eventsPerMessage keeps a message well below what receivers accept.
	eventsPerMessage = 256
	// answersWaiting bounds the answers that wait for a slow reader; beyond it, its own
	// pings wait.
	answersWaiting = 8
	// pingGap and pingBurst bound the pings of one stream: 50 a second, four times what
	// the smallest bound needs. Each wants a durable write, which all streams share; what
	// comes faster waits, and its own stream with it.
	pingGap   = 20 * time.Millisecond
	pingBurst = 50
)

type feedService struct {
	dayflyv1.UnimplementedFeedServiceServer
	*handlers
}

type followStream = grpc.BidiStreamingServer[dayflyv1.FollowRequest, dayflyv1.FollowResponse]

func (s *feedService) Follow(stream followStream) error {
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	var (
		c broker.Caller
		f *broker.Follower
	)
	err := apart(func() (err error) {
		c, f, err = s.subscribe(ctx, stream)
		return err
	})
	if err != nil {
		return err
	}
	defer f.Close()
	err = stream.Send(&dayflyv1.FollowResponse{Message: &dayflyv1.FollowResponse_Welcome{Welcome: &dayflyv1.Welcome{
		MaxStaleness: durationpb.New(f.Bound()), MaxTokenTtl: durationpb.New(token.MaxTTL), Issuer: s.broker.Issuer(),
	}}})
	if err != nil {
		return err
	}
	up := &upstream{handlers: s.handlers, stream: stream, follower: f, answers: make(chan *dayflyv1.FollowResponse, answersWaiting)}
	// All that ends the stream says so in one place: a thousand streams that wait wake for
	// each event, and for each channel it takes longer.
	ended := make(chan error, 1)
	end := func(err error) {
		select {
		case ended <- err:
		default: // something else was first
		}
	}
	go func() { end(up.read(ctx)) }() // returns when the handler does, or ctx ends: Recv does
	_, until := c.Attested()
	expiry := time.AfterFunc(until.Sub(s.now()), func() { end(broker.ErrSVIDExpired) })
	defer expiry.Stop()
	defer context.AfterFunc(s.serving, func() { end(broker.ErrStoreLost) })()
	return s.send(ctx, stream, f, up, ended)
}

// subscribe proves the peer and has it admitted.
func (s *feedService) subscribe(ctx context.Context, stream followStream) (c broker.Caller, f *broker.Follower, err error) {
	if c, err = s.caller(ctx); err != nil {
		return c, nil, err
	}
	first, err := s.first(ctx, stream)
	if err != nil {
		return c, nil, err
	}
	sub, err := toSubscriber(first.GetSubscribe())
	if err != nil {
		return c, nil, err
	}
	f, err = s.broker.Subscribe(ctx, c, sub)
	return c, f, err
}

// apart does what takes a deep stack, as policy does, on one that goes with it: that of a
// stream would stay as large for as long as it lives.
func apart(f func() error) error {
	done := make(chan error, 1)
	go func() {
		var err error
		defer func() {
			if p := recover(); p != nil {
				err = panicError(p)
			}
			done <- err
		}()
		err = f()
	}()
	return <-done
}

// first waits for the Subscribe, but not for ever: a stream without one holds a place,
// and would hold up a shutdown.
func (s *feedService) first(ctx context.Context, stream followStream) (*dayflyv1.FollowRequest, error) {
	type received struct {
		m   *dayflyv1.FollowRequest
		err error
	}
	came := make(chan received, 1)
	go func() { // ends when the handler returns, because Recv then does
		m, err := stream.Recv()
		came <- received{m, err}
	}()
	patience := time.NewTimer(handshakeTimeout)
	defer patience.Stop()
	select {
	case r := <-came:
		return r.m, r.err
	case <-patience.C:
		return nil, feedInvalid(errors.New("no Subscribe came"))
	case <-s.serving.Done():
		return nil, broker.ErrStoreLost
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// send is the only sender: events as they commit, and the answers to pings. It proves
// the peer before each of them, and whenever a bundle changes.
func (s *feedService) send(ctx context.Context, stream followStream, f *broker.Follower, up *upstream, ended <-chan error) error {
	for {
		bundles := s.bundlesChanged()
		if _, err := s.caller(ctx); err != nil {
			return err
		}
		d, ok, changed := f.Next(eventsPerMessage)
		if ok {
			if err := stream.Send(wire.Delivery(d)); err != nil {
				return err
			}
			continue
		}
		select {
		case <-changed:
		case <-bundles:
		case m := <-up.answers:
			if _, err := s.caller(ctx); err != nil {
				return err
			}
			if err := stream.Send(m); err != nil {
				return err
			}
		case err := <-ended:
			return err
		}
	}
}

// upstream reads what one verifier sends.
type upstream struct {
	*handlers
	stream   followStream
	follower *broker.Follower
	answers  chan *dayflyv1.FollowResponse
	pingAt   time.Time // when pings would have come at their gap
}

func (u *upstream) read(ctx context.Context) error {
	for {
		m, err := u.stream.Recv()
		if err != nil {
			return err
		}
		if _, err := u.caller(ctx); err != nil {
			return err
		}
		if err := u.take(ctx, m); err != nil {
			return err
		}
	}
}

func (u *upstream) take(ctx context.Context, m *dayflyv1.FollowRequest) error {
	switch {
	case m.GetPing() != nil:
		return u.ping(ctx, m.GetPing())
	case m.GetAcknowledge() != nil:
		p, err := wire.ToPosition(m.GetAcknowledge().GetPosition())
		if err != nil {
			return feedInvalid(err)
		}
		return u.follower.Acknowledge(ctx, p)
	case m.GetUseReport() != nil:
		report, err := toReport(m.GetUseReport())
		if err != nil {
			return feedInvalid(err)
		}
		return u.follower.Report(ctx, report)
	case m.GetRelayReport() != nil:
		relayed, err := wire.ToRelayed(m.GetRelayReport().GetVerifiers())
		if err != nil {
			return feedInvalid(err)
		}
		refused, err := u.follower.Relayed(ctx, relayed)
		for _, r := range refused {
			if err := u.answer(ctx, relayRefusal(r)); err != nil {
				return err
			}
		}
		return err
	}
	return broker.ErrFeedRejected
}

func (u *upstream) ping(ctx context.Context, m *dayflyv1.Ping) error {
	nonce, err := wire.ToNonce(m.GetNonce())
	if err != nil {
		return feedInvalid(err)
	}
	if err := u.paced(ctx); err != nil {
		return err
	}
	proof, err := u.follower.Answer(ctx, nonce)
	if err != nil {
		return err
	}
	return u.answer(ctx, wire.PongMessage(wire.Pong{Nonce: nonce, Head: proof.Head, Age: proof.Age, Horizon: proof.Horizon, Signed: proof.Signed, Path: proof.Path}))
}

// paced waits until a ping is due.
func (u *upstream) paced(ctx context.Context) error {
	now := time.Now()
	if full := now.Add(-pingBurst * pingGap); u.pingAt.Before(full) {
		u.pingAt = full
	}
	u.pingAt = u.pingAt.Add(pingGap)
	wait := u.pingAt.Sub(now)
	if wait <= 0 {
		return nil
	}
	select {
	case <-time.After(wait):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// answer hands a message to the sender, in the order of the questions: a refusal of one
// below a relay goes before the pong of any later ping.
func (u *upstream) answer(ctx context.Context, m *dayflyv1.FollowResponse) error {
	select {
	case u.answers <- m:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func relayRefusal(r broker.RelayedRefusal) *dayflyv1.FollowResponse {
	code, metadata := codeAndMetadata(r.Refusal)
	return &dayflyv1.FollowResponse{Message: &dayflyv1.FollowResponse_RelayRefusal{RelayRefusal: &dayflyv1.RelayRefusal{
		Path: r.Path, Code: int32(code), Reason: r.Refusal.Reason, Message: r.Refusal.Message, Metadata: metadata,
	}}}
}

func feedInvalid(err error) error {
	r := *broker.ErrFeedRejected
	r.Message = err.Error()
	return &r
}

func toSubscriber(m *dayflyv1.Subscribe) (broker.Subscriber, error) {
	if m == nil {
		r := *broker.ErrFeedRejected
		r.Message = "the first message must be a Subscribe"
		return broker.Subscriber{}, &r
	}
	sub, err := wire.ToSubscription(m)
	if err != nil {
		return broker.Subscriber{}, feedInvalid(err)
	}
	return broker.Subscriber{
		Instance: sub.Instance, Audiences: sub.Audiences, MaxStaleness: sub.Bound,
		AcceptsStale: sub.AcceptsStale, Position: sub.Position, Relay: sub.Relay,
		SignedHeads: sub.SignedHeads, NewestHead: sub.NewestHead,
	}, nil
}

func toReport(m *dayflyv1.UseReport) (broker.UseReport, error) {
	r := broker.UseReport{Number: m.GetNumber(), Dropped: m.GetDropped(), Uses: make([]broker.Use, len(m.GetUses()))}
	for i, u := range m.GetUses() {
		if err := wire.CheckUse(u); err != nil {
			return broker.UseReport{}, err
		}
		r.Uses[i] = broker.Use{
			Grant: u.GetGrant(), Fingerprint: u.GetFingerprint(), Key: u.GetKeyId(),
			Peer: u.GetPeerIdentity(), Address: u.GetPeerAddress(), Accepted: u.GetAccepted(), Reason: u.GetRefusalReason(),
			Count: u.GetCount(), First: u.GetFirstSeen().AsTime(), Last: u.GetLastSeen().AsTime(), Head: u.GetHead(), Era: u.GetEra(),
			Claimed: u.GetVerifierIdentity(), ClaimedInstance: u.GetVerifierInstance(),
		}
	}
	return r, nil
}
