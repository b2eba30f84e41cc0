package agent

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	mathrand "math/rand/v2"
	"slices"
	"time"

	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/wire"
	"github.com/dayflyhq/dayfly/sdk"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
)

const (
	// minSilence is the least time without an answer after which a stream is given up:
	// a broker may take a while, a dead connection says nothing.
	minSilence = 5 * time.Second
	// firstPause bounds the pause between attempts before the broker was ever reached:
	// nobody depends on this agent yet.
	firstPause = time.Second
	// minPause keeps a refused agent from calling in a circle.
	minPause = 50 * time.Millisecond
	// deniedPause is between attempts that policy refuses.
	deniedPause = 15 * time.Second
	// reportedAtOnce keeps a message below the broker's limit of 64 KiB.
	reportedAtOnce = 64
)

// follower is the agent's own stream of the feed.
type follower struct {
	client    dayflyv1.FeedServiceClient
	k         *knowledge
	instance  string
	audiences []string
	bound     func() time.Duration
	rebound   chan struct{} // has an element when the bound has changed
	source    Source
	rotated   func() <-chan struct{} // closed when the SVID changes; nil channel: never
	applied   func(context.Context)
	reached   func() // the broker is heard again, and could not be perhaps
	distrusts bool   // a relay on another host is above: only what the broker signed counts
	log       *slog.Logger
	counts    *counters
}

type upstream = grpc.BidiStreamingClient[dayflyv1.FollowRequest, dayflyv1.FollowResponse]

// errShow ends a stream whose broker lacks what a signed head that came from below names:
// the next one shows it.
var errShow = errors.New("the broker's log lacks a signed head that one below has kept")

// errSlept ends a stream that the machine slept under: the other end has given it up,
// perhaps, and it would take long to find that out.
var errSlept = errors.New("the machine slept under the stream")

// errRebound ends a stream that stated another bound.
var errRebound = errors.New("the bound was changed")

// errRotated ends a stream that was made with an older SVID.
var errRotated = errors.New("the SVID was rotated")

// run follows the feed until ctx ends, and then returns nil. After a fork nothing is
// relayed until a new era begins.
func (f *follower) run(ctx context.Context) error {
	relay := true
	for ctx.Err() == nil {
		err := f.follow(ctx, relay)
		if ctx.Err() != nil {
			break
		}
		if errors.Is(err, feed.ErrFork) {
			f.log.ErrorContext(ctx, "THE LOG HAS TWO HISTORIES: nothing is relayed, verifiers beside this agent close, until an operator has restored the broker's store", "err", err)
			f.counts.reconnects.Add(1)
			sleep(ctx, f.k.bound(f.bound())+f.pause(err, false)) // only to see whether a new era has begun
			continue
		}
		denied := codeOf(err) == codes.PermissionDenied
		f.note(err, denied)
		if denied && relay && len(f.audiences) > 0 {
			relay = false // policy may let it follow for itself
			f.log.WarnContext(ctx, "policy does not let this identity relay the feed; following without", "err", err)
			continue
		}
		if denied {
			relay = true
		}
		f.counts.reconnects.Add(1)
		pause := f.pause(err, denied)
		level := slog.LevelWarn
		if pause == 0 {
			level = slog.LevelInfo // the agent ended it, to begin another one
		}
		f.log.Log(ctx, level, "the feed ended", "err", err, "again_in", pause)
		sleep(ctx, pause)
	}
	return nil
}

func codeOf(err error) codes.Code {
	var refusal *sdk.Error
	if errors.As(sdk.FromRPC(err), &refusal) {
		return refusal.Code
	}
	return codes.Unknown
}

// note keeps a refusal of policy for those who ask why the agent isn't ready.
func (f *follower) note(err error, denied bool) {
	f.k.mu.Lock()
	defer f.k.mu.Unlock()
	if denied {
		f.k.refused, f.k.relays = err, false
		f.k.ring()
	}
}

// pause is random up to a third of the smallest bound that depends on this stream, so
// that a fleet doesn't reconnect at once and nobody closes for it.
func (f *follower) pause(err error, denied bool) time.Duration {
	longest := f.k.bound(f.bound()) / 3
	f.k.mu.Lock()
	if f.k.welcome == nil {
		longest = min(longest, firstPause)
	}
	f.k.mu.Unlock()
	switch {
	case errors.Is(err, errRotated), errors.Is(err, errShow), errors.Is(err, errSlept), errors.Is(err, errRebound):
		return 0
	case denied:
		longest = deniedPause
	}
	return max(minPause, time.Duration(mathrand.Int64N(int64(longest)+1)))
}

// identity waits for an SVID, so that the first one ends no stream that was begun before it
// and made with it, and returns what says when there is another one.
func (f *follower) identity(ctx context.Context) (<-chan struct{}, error) {
	for {
		rotated := f.rotated()
		if _, err := f.source.GetX509SVID(); err == nil || rotated == nil {
			return rotated, nil
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-rotated:
		}
	}
}

// follow is one stream, from the Subscribe to its end.
func (f *follower) follow(ctx context.Context, relay bool) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	rotated, err := f.identity(ctx)
	if err != nil {
		return err
	}
	madeBoot, made := f.k.boot(), time.Now() // before there is a stream: the machine may sleep as it begins
	stream, err := f.client.Follow(ctx, grpc.WaitForReady(true))
	if err != nil {
		return err
	}
	f.k.mu.Lock()
	known, kept := f.k.relay.View.Position(), f.k.kept
	f.k.mu.Unlock()
	err = stream.Send(&dayflyv1.FollowRequest{Message: &dayflyv1.FollowRequest_Subscribe{Subscribe: wire.Subscribe(wire.Subscription{
		Instance: f.instance, Audiences: f.audiences, Bound: f.bound(), Position: known, Relay: relay,
		// For each ping of a relay, since those on other hosts need them; a second use is
		// that the newest can be shown to a broker that lost records.
		SignedHeads: true, NewestHead: kept.Signed,
	})}})
	if err != nil {
		return recvError(stream, err)
	}
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	if first.GetWelcome() == nil {
		return fmt.Errorf("%w: the first message is no Welcome", feed.ErrMalformed)
	}
	s := f.begin(stream, first.GetWelcome(), relay)
	s.made, s.madeBoot = made, madeBoot
	if !f.distrusts {
		f.reached()
	}
	s.shown = kept.Head
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		err := s.send(ctx, rotated)
		if errors.Is(err, io.EOF) {
			return nil // the stream broke: receive knows why
		}
		cancel(err)
		return err
	})
	group.Go(func() error {
		err := s.receive(ctx)
		cancel(err)
		return err
	})
	return group.Wait()
}

// recvError is why a stream broke: Send only says that it did.
func recvError(stream upstream, err error) error {
	if _, got := stream.Recv(); got != nil {
		return got
	}
	return err
}

func (f *follower) begin(stream upstream, w *dayflyv1.Welcome, relay bool) *session {
	k := f.k
	k.mu.Lock()
	defer k.mu.Unlock()
	k.relay.Connected(relay)
	k.outbox.Reconnected()
	k.welcome, k.relays, k.refused = w, relay, nil
	k.ring()
	f.log.Info("following the feed", "issuer", w.GetIssuer(), "position", k.relay.View.Position().String(), "relay", relay)
	return &session{follower: f, stream: stream, heard: k.boot(), issuer: w.GetIssuer()}
}

// session is one welcomed stream. send is its only sender, receive its only receiver.
type session struct {
	*follower
	stream upstream
	acked  feed.Position // on this stream, after its first report; of send alone
	heard  feed.Instant  // when an answer last came; guarded by knowledge.mu
	issuer string        // of the welcome
	sweep  bool          // an answer let records through; of receive alone
	shown  feed.Position // the signed head that this stream began with

	made     time.Time // with the monotonic clock, which sleeps with the machine
	madeBoot feed.Instant
}

// send reports, acknowledges and pings until ctx ends.
func (s *session) send(ctx context.Context, rotated <-chan struct{}) error {
	if err := s.ping(); err != nil {
		return err
	}
	for {
		wait, err := s.flush()
		if err != nil {
			return err
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return context.Cause(ctx)
		case <-rotated:
			timer.Stop()
			return errRotated
		case <-s.rebound:
			timer.Stop()
			return errRebound
		case <-s.k.work:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// flush sends what waits, and returns how long until the next ping.
func (s *session) flush() (time.Duration, error) {
	if err := s.acknowledge(); err != nil {
		return 0, err
	}
	if err := s.changes(); err != nil {
		return 0, err
	}
	if err := s.passUses(); err != nil {
		return 0, err
	}
	s.k.mu.Lock()
	now := s.k.boot()
	silent := now.Sub(s.heard) > max(s.k.relay.Bound(s.bound())/2, minSilence) // another stream can be heard before the bound
	wait := s.k.relay.Due(s.bound(), now)
	s.k.mu.Unlock()
	switch {
	case now.Sub(s.madeBoot)-time.Since(s.made) > minSilence:
		return 0, errSlept
	case silent:
		return 0, errors.New("the broker no longer answers on this stream")
	case wait > 0:
		return wait, nil
	}
	return 0, s.ping()
}

// ping asks for a proof. Before it goes the report of everyone who may be answered from
// that proof: so the broker's roster never thinks a verifier closed that isn't.
func (s *session) ping() error {
	own := make([]byte, 16)
	_, _ = rand.Read(own) // never fails
	s.k.mu.Lock()
	now := s.k.boot()
	entries := s.k.relay.Report(now, s.k.relay.Overdue(s.bound(), now))
	nonce := s.k.relay.Gather(string(own))
	s.k.relay.Ping(nonce, now)
	s.k.mu.Unlock()
	s.k.outbox.Pinged(string(nonce))
	if err := s.report(entries); err != nil {
		return err
	}
	return s.up(&dayflyv1.FollowRequest{Message: &dayflyv1.FollowRequest_Ping{Ping: &dayflyv1.Ping{Nonce: []byte(nonce)}}})
}

// acknowledge confirms what is applied, if that is news.
func (s *session) acknowledge() error {
	s.k.mu.Lock()
	at := s.k.relay.View.Position()
	s.k.mu.Unlock()
	if at == s.acked {
		return nil
	}
	s.acked = at
	return s.up(&dayflyv1.FollowRequest{Message: &dayflyv1.FollowRequest_Acknowledge{Acknowledge: &dayflyv1.Acknowledge{Position: wire.Position(at)}}})
}

// changes tells what changed below.
func (s *session) changes() error {
	s.k.mu.Lock()
	entries := s.k.relay.Report(s.k.boot(), false)
	s.k.mu.Unlock()
	return s.report(entries)
}

// report sends entries; if the stream breaks, the next one reports everything anew.
func (s *session) report(entries []feed.Relayed) error {
	for batch := range slices.Chunk(entries, reportedAtOnce) {
		m := &dayflyv1.RelayReport{}
		for _, r := range batch {
			m.Verifiers = append(m.Verifiers, wire.Relayed(r))
		}
		if err := s.up(&dayflyv1.FollowRequest{Message: &dayflyv1.FollowRequest_RelayReport{RelayReport: m}}); err != nil {
			return err
		}
	}
	return nil
}

func (s *session) up(m *dayflyv1.FollowRequest) error {
	if err := s.stream.Send(m); err != nil {
		return fmt.Errorf("sending on the feed: %w", err)
	}
	return nil
}

// receive takes what the broker sends until the stream ends.
func (s *session) receive(ctx context.Context) error {
	for {
		m, err := s.stream.Recv()
		if err != nil {
			return err
		}
		switch {
		case m.GetPong() != nil:
			err = s.answered(m.GetPong())
			if s.sweep { // what it proved may kill credentials
				s.sweep = false
				s.applied(ctx)
				s.k.kick()
			}
		case m.GetRelayRefusal() != nil:
			s.refused(ctx, m.GetRelayRefusal())
		default:
			err = s.deliver(ctx, m)
		}
		if err != nil {
			return err
		}
	}
}

func (s *session) refused(ctx context.Context, m *dayflyv1.RelayRefusal) {
	s.log.WarnContext(ctx, "the broker refuses a verifier below", "path", m.GetPath(), "reason", m.GetReason(), "message", m.GetMessage())
	s.k.mu.Lock()
	defer s.k.mu.Unlock()
	s.k.refuse(m)
}

func (s *session) answered(m *dayflyv1.Pong) error {
	pong, err := wire.ToPong(m)
	if err != nil {
		return err
	}
	k := s.k
	var signed feed.HeadStatement
	if s.distrusts {
		signed, err = feed.VerifyAnswer(pong.Nonce, pong.Signed, pong.Path, func(h feed.SignedHead) (feed.HeadStatement, error) {
			return k.verify(s.issuer, h, false)
		})
		if err != nil {
			return err
		}
		pong.Head, pong.Age = signed.Head, signed.Age
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	defer k.ring()
	k.outbox.Answered(pong.Nonce)
	if err := k.relay.Answered(pong.Nonce, pong.Head, pong.Age); err != nil {
		return err
	}
	k.relay.Proved(pong.Nonce, pong.Signed, pong.Path)
	k.kept.Note(pong.Signed)
	before := k.relay.View.Position()
	if s.distrusts {
		if err := k.relay.Signed(signed, k.boot()); err != nil {
			return err
		}
	}
	// Answers that prove nothing new are as good as silence: a relay above may withhold
	// what they speak of.
	if !s.distrusts || k.relay.Fresh.Fresh(k.boot(), s.bound()) {
		s.heard = k.boot()
	}
	k.kick() // perhaps more wait, or there is a receipt to give
	if k.kept.Head.Compare(s.shown) > 0 && pong.Head.Compare(k.kept.Head) < 0 {
		return errShow
	}
	if before != k.relay.View.Position() {
		s.sweep = true
	}
	return nil
}

// deliver applies records, drops what they kill and then lets the receipt go.
func (s *session) deliver(ctx context.Context, m *dayflyv1.FollowResponse) error {
	d, err := wire.ToDelivery(m)
	if err != nil {
		return err
	}
	k := s.k
	k.mu.Lock()
	before := k.relay.View.Position()
	err = k.relay.Deliver(d, k.boot())
	after := k.relay.View.Position()
	k.ring()
	k.mu.Unlock()
	if err != nil {
		return err
	}
	if before.Era != 0 && before.Era != after.Era {
		s.log.WarnContext(ctx, "a new era has begun: every credential of earlier ones is dropped", "before", before.String(), "position", after.String())
	}
	s.counts.events.Add(uint64(len(d.Events)))
	s.applied(ctx)
	k.kick()
	return nil
}
