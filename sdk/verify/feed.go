package verify

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"sync"
	"time"

	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/proto/vouch"
	"github.com/dayflyhq/dayfly/proto/wire"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// minSilence is the least time without a word after which a stream is given up.
const minSilence = 5 * time.Second

// pingEvery is the time between two pings.
func pingEvery(bound time.Duration) time.Duration { return bound / feed.PingsPerBound }

// Errors that end a stream.
var (
	errSilent   = errors.New("the feed went silent")
	errProtocol = errors.New("the feed broke its protocol")
	errIssuer   = errors.New("the feed speaks of another issuer's tokens")
)

// Run follows the feed until ctx ends, and then returns nil. It reconnects by itself,
// after a random part of a third of the bound, so that a restarted broker isn't stormed.
// Shown two histories the verifier refuses everything until a new era begins: until an
// operator has restored the broker's store.
// Run is called once.
func (v *Verifier) Run(ctx context.Context) error {
	v.mu.Lock()
	if v.state != notRunning {
		v.mu.Unlock()
		return errors.New("running verifier: it was run before")
	}
	v.state = running
	v.mu.Unlock()

	var wg sync.WaitGroup
	defer wg.Wait()
	defer v.stop()
	wg.Go(func() { v.closeWhenStale(ctx) })
	for {
		err := v.follow(ctx)
		if ctx.Err() != nil {
			return nil
		}
		v.lost(ctx, err)
		if errors.Is(err, feed.ErrFork) {
			v.judgeWatches()
		}
		if !sleep(ctx, v.pause(err)) {
			return nil
		}
	}
}

func (v *Verifier) stop() {
	v.mu.Lock()
	v.state = stopped
	v.mu.Unlock()
	v.rearmWatches()
}

// lost notes why a stream ended.
func (v *Verifier) lost(ctx context.Context, err error) {
	v.forget()
	v.mu.Lock()
	v.feedErr = err
	v.notify()
	position := v.view.Position()
	v.mu.Unlock()
	if errors.Is(err, feed.ErrFork) {
		v.cfg.Log.ErrorContext(ctx, "the log has two histories: every token is refused until an operator has restored the broker's store", "err", err, "position", position.String())
		return
	}
	v.cfg.Log.WarnContext(ctx, "feed lost", "err", err, "position", position.String())
}

// pause is how long to wait before the next stream. A gap is nobody's fault, and a
// refusal by policy doesn't change in a moment.
func (v *Verifier) pause(err error) time.Duration {
	third := v.cfg.MaxStaleness / 3
	jittered := time.Duration(mathrand.Int64N(int64(third)))
	switch {
	case errors.Is(err, feed.ErrFork):
		return v.cfg.MaxStaleness + jittered // only to see whether a new era has begun
	case errors.Is(err, feed.ErrGap):
		return jittered / 10
	case status.Code(err) == codes.PermissionDenied, status.Code(err) == codes.InvalidArgument:
		return third + jittered
	}
	return jittered
}

func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// A stream is one connection to the feed. All sending is done by the goroutine of
// follow, all receiving and applying by receive.
type stream struct {
	v        *Verifier
	rpc      grpc.BidiStreamingClient[dayflyv1.FollowRequest, dayflyv1.FollowResponse]
	heard    func() // a word came: not silent
	applied  chan struct{}
	prove    chan struct{} // the screen holds something back: ask now
	welcomed chan struct{}
	acked    feed.Position

	ended chan struct{} // the receiver has ended,
	err   error         // because of this
}

// follow runs one stream and returns why it ended.
func (v *Verifier) follow(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	silence := max(v.cfg.MaxStaleness/2, minSilence)
	watchdog := time.AfterFunc(silence, func() { cancel(errSilent) })
	defer watchdog.Stop()

	rpc, err := v.client.Follow(ctx, grpc.WaitForReady(true))
	if err != nil {
		return ended(ctx, "opening", err)
	}
	s := &stream{
		v:        v,
		rpc:      rpc,
		heard:    func() { watchdog.Reset(silence) },
		applied:  make(chan struct{}, 1),
		prove:    make(chan struct{}, 1),
		welcomed: make(chan struct{}),
		ended:    make(chan struct{}),
	}
	go func() {
		defer close(s.ended)
		s.err = s.receive()
		cancel(s.err) // a send that is stuck ends too
	}()
	if err := s.serve(); err != nil {
		// The receiver knows better why the stream has ended, if it has.
		_ = s.rpc.CloseSend()
		grace := time.AfterFunc(minSilence, func() { cancel(err) })
		defer grace.Stop()
	}
	<-s.ended
	return ended(ctx, "following", s.err)
}

// ended prefers our own reason to what gRPC makes of a cancelled context.
func ended(ctx context.Context, doing string, err error) error {
	if cause := context.Cause(ctx); cause != nil && status.Code(err) == codes.Canceled && !errors.Is(cause, context.Canceled) {
		err = errors.Join(cause, err)
	}
	return fmt.Errorf("%s the feed: %w", doing, err)
}

func (s *stream) subscribe() error {
	v := s.v
	v.mu.Lock()
	v.fresh.Reconnected()
	v.view.Reconnected()
	v.screen.Reconnected()
	v.proving, v.arrived = "", false
	known, kept := v.view.Position(), v.kept.Signed
	v.mu.Unlock()
	v.asks.reconnected()
	v.uses.outbox.Reconnected()
	return s.rpc.Send(&dayflyv1.FollowRequest{Message: &dayflyv1.FollowRequest_Subscribe{Subscribe: wire.Subscribe(wire.Subscription{
		Instance:     v.instance,
		Audiences:    v.cfg.Audiences,
		Bound:        v.cfg.MaxStaleness,
		AcceptsStale: v.cfg.OnStale == Accept,
		Position:     known,
		// Asked for by everyone: a broker gives one that is only to be kept at first and
		// with each new head, which costs next to nothing.
		SignedHeads: true,
		NewestHead:  kept,
	})}})
}

// serve sends: pings, acknowledgements, questions out of turn and use reports. It
// returns nil when the receiver has ended.
func (s *stream) serve() error {
	if err := s.subscribe(); err != nil {
		return err
	}
	select {
	case <-s.welcomed:
	case <-s.ended:
		return nil
	}
	if err := s.ping(rand.Text()); err != nil {
		return err
	}
	// The first interval is a random part of one: a fleet that reconnected together
	// doesn't ping together.
	every := pingEvery(s.v.currentBound())
	ticks := time.NewTimer(time.Duration(mathrand.Int64N(int64(every))) + 1)
	defer ticks.Stop()
	questions := time.NewTimer(0)
	defer questions.Stop()
	for {
		var err error
		select {
		case <-s.ended:
			return nil
		case <-ticks.C:
			ticks.Reset(every)
			err = s.tick()
		case <-s.applied:
			err = s.acknowledge()
		case <-s.prove:
			err = s.askProof()
		case <-s.v.asks.wake:
			err = s.question(questions)
		case <-questions.C:
			err = s.question(questions)
		}
		if err != nil {
			return err
		}
	}
}

// tick reports and then pings: the answer says that the reports have arrived. It also
// forgets what has expired.
func (s *stream) tick() error {
	u := &s.v.uses
	u.pack(s.v.cfg.Boot(), s.v.currentBound())
	s.v.forget()
	for m := u.outbox.Next(); m != nil; m = u.outbox.Next() {
		if err := s.rpc.Send(&dayflyv1.FollowRequest{Message: &dayflyv1.FollowRequest_UseReport{UseReport: m}}); err != nil {
			return err
		}
	}
	return s.ping(rand.Text())
}

// forget drops what has expired of what is remembered.
func (v *Verifier) forget() {
	now := v.cfg.Now()
	v.seen.Sweep(now)
	v.peers.sweep(now)
}

func (s *stream) ping(nonce string) error {
	s.v.mu.Lock()
	s.v.fresh.Sent(nonce, s.v.cfg.Boot()) // before it is sent: asOf must err to the old side
	s.v.mu.Unlock()
	s.v.uses.outbox.Pinged(nonce)
	return s.rpc.Send(&dayflyv1.FollowRequest{Message: &dayflyv1.FollowRequest_Ping{Ping: &dayflyv1.Ping{Nonce: []byte(nonce)}}})
}

// askProof asks for the signed head that covers what the screen holds back: once for what
// has arrived, since a lie is never proven, and one such ping is under way at a time.
func (s *stream) askProof() error {
	nonce := rand.Text()
	s.v.mu.Lock()
	ask := s.v.unproven()
	if ask {
		s.v.proving, s.v.arrived = nonce, false
	}
	s.v.mu.Unlock()
	if !ask {
		return nil
	}
	return s.ping(nonce)
}

func (s *stream) question(again *time.Timer) error {
	nonce := rand.Text()
	send, wait := s.v.asks.due(nonce, s.v.cfg.Boot())
	if wait > 0 {
		again.Reset(wait)
	}
	if !send {
		return nil
	}
	return s.ping(nonce)
}

// acknowledge says up to where everything is applied: only now is it refused.
func (s *stream) acknowledge() error {
	s.v.mu.RLock()
	p := s.v.view.Position()
	s.v.mu.RUnlock()
	if p == s.acked {
		return nil
	}
	s.acked = p
	return s.rpc.Send(&dayflyv1.FollowRequest{Message: &dayflyv1.FollowRequest_Acknowledge{Acknowledge: &dayflyv1.Acknowledge{Position: wire.Position(p)}}})
}

// receive applies what comes until the stream ends.
func (s *stream) receive() error {
	m, err := s.rpc.Recv()
	if err != nil {
		return err
	}
	if m.GetWelcome() == nil {
		return fmt.Errorf("%w: no welcome", errProtocol)
	}
	if err := s.v.welcome(m.GetWelcome()); err != nil {
		return err
	}
	close(s.welcomed)
	s.heard()
	for {
		m, err := s.rpc.Recv()
		if err != nil {
			return err
		}
		// Answers that don't make the verifier fresh are as good as silence where the
		// relay may be withholding what they speak of: another stream begins anew.
		if m.GetPong() == nil || !s.v.distrusts() || s.v.Status().Fresh {
			s.heard()
		}
		if err := s.handle(m); err != nil {
			return err
		}
	}
}

func (s *stream) handle(m *dayflyv1.FollowResponse) error {
	var moved, waits bool
	var err error
	if pong := m.GetPong(); pong != nil {
		moved, waits, err = s.v.answered(pong)
	} else {
		moved, waits, err = s.v.delivered(m)
	}
	if err != nil {
		return err
	}
	if moved {
		s.v.judgeWatches() // before the acknowledgement: it says that this is done
		poke(s.applied)
	}
	if waits {
		poke(s.prove)
	}
	return nil
}

func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

func (v *Verifier) currentBound() time.Duration {
	v.mu.RLock()
	defer v.mu.RUnlock()
	return v.bound
}

// welcome takes the terms of the feed. The bound is never more than was asked for.
func (v *Verifier) welcome(m *dayflyv1.Welcome) error {
	bound, err := wire.ToDuration(m.GetMaxStaleness())
	if err != nil || bound < MinMaxStaleness {
		return fmt.Errorf("%w: a welcome without a bound", errProtocol)
	}
	maxTTL := token.MaxTTL
	if m.GetMaxTokenTtl() != nil {
		ttl, err := wire.ToDuration(m.GetMaxTokenTtl())
		if err != nil || ttl == 0 {
			return fmt.Errorf("%w: a welcome with a malformed largest life", errProtocol)
		}
		maxTTL = min(maxTTL, ttl)
	}
	if m.GetIssuer() == "" {
		return fmt.Errorf("%w: a welcome without an issuer", errProtocol)
	}
	if v.cfg.Issuer != "" && v.cfg.Issuer != m.GetIssuer() {
		return fmt.Errorf("%w: %q, not %q", errIssuer, m.GetIssuer(), v.cfg.Issuer)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	bound = min(bound, v.cfg.MaxStaleness)
	if v.bound != 0 && bound > v.bound {
		// What was proven while brokers counted on the smaller bound must not count
		// under the larger one.
		v.fresh = feed.Freshness{}
	}
	v.bound, v.maxTTL, v.issuer, v.feedErr = bound, maxTTL, m.GetIssuer(), nil
	v.notify()
	return nil
}

// delivered takes a delivery and reports whether it moved the position, and whether
// something waits to be proven.
func (v *Verifier) delivered(m *dayflyv1.FollowResponse) (moved, waits bool, err error) {
	d, err := wire.ToDelivery(m)
	if err != nil {
		return false, false, fmt.Errorf("%w: %w", errProtocol, err)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	deliveries := []feed.Delivery{d}
	if v.distrusts() {
		if deliveries, err = v.screen.Deliver(&v.view, d); err != nil {
			return false, false, fmt.Errorf("screening events: %w", err)
		}
		v.arrived = true
	}
	moved, err = v.apply(deliveries)
	return moved, v.unproven(), err
}

// distrusts reports whether what the feed says counts only under a broker's signature.
func (v *Verifier) distrusts() bool { return !v.cfg.BrokerID.IsZero() }

// unproven reports whether a ping is to be sent for what the screen holds back; mu is
// held.
func (v *Verifier) unproven() bool { return v.arrived && v.screen.Waits() && v.proving == "" }

// apply takes deliveries that may be believed, in order; mu is held.
func (v *Verifier) apply(deliveries []feed.Delivery) (moved bool, err error) {
	before, fork := v.view.Position(), v.view.Err()
	for _, d := range deliveries {
		if err := v.view.Apply(d, v.cfg.Boot()); err != nil {
			return false, fmt.Errorf("applying events: %w", err)
		}
	}
	after := v.view.Position()
	if before.Era != 0 && before.Era != after.Era {
		v.cfg.Log.Warn("a new era has begun: every token of earlier ones is dead", "before", before.String(), "position", after.String(), "ended_fork", fork != nil && v.view.Err() == nil)
	}
	v.fresh.Applied(after)
	v.asks.applied(after)
	v.notify()
	return after != before, nil
}

// answered takes the answer to a ping, and reports as delivered does.
func (v *Verifier) answered(m *dayflyv1.Pong) (moved, waits bool, err error) {
	pong, err := wire.ToPong(m)
	if err != nil {
		return false, false, fmt.Errorf("%w: %w", errProtocol, err)
	}
	var signed feed.HeadStatement
	if v.distrusts() {
		// Head and age are the statement's: what the relay says of them is nothing.
		if signed, err = feed.VerifyAnswer(pong.Nonce, pong.Signed, pong.Path, v.verifyHead); err != nil {
			return false, false, fmt.Errorf("checking an answer: %w", err)
		}
		pong.Head, pong.Age = signed.Head, signed.Age
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	asOf, err := v.fresh.Answered(pong.Nonce, pong.Head, pong.Age, v.view.Position())
	if err != nil {
		return false, false, fmt.Errorf("%w: %w", errProtocol, err)
	}
	if err := v.view.CheckHead(pong.Head, asOf); err != nil {
		return false, false, fmt.Errorf("comparing heads: %w", err)
	}
	v.kept.Note(pong.Signed)
	v.asks.answered(pong.Nonce, pong.Head)
	v.uses.outbox.Answered(pong.Nonce)
	if v.proving == pong.Nonce {
		v.proving = ""
	}
	var deliveries []feed.Delivery
	if v.distrusts() {
		if deliveries, err = v.screen.Signed(&v.view, signed); err != nil {
			return false, false, fmt.Errorf("screening events: %w", err)
		}
	}
	moved, err = v.apply(deliveries)
	return moved, v.unproven(), err
}

// verifyHead checks that the broker signed a head for the issuer that the feed speaks of.
func (v *Verifier) verifyHead(h feed.SignedHead) (feed.HeadStatement, error) {
	v.mu.RLock()
	issuer := v.issuer
	v.mu.RUnlock()
	return vouch.VerifyHead(issuer, h, v.cfg.Bundles, spiffeid.MatchID(v.cfg.BrokerID), v.cfg.Now())
}
