package main

import (
	"context"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dayflyhq/dayfly/e2e/sandbox"
	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk"
	"github.com/dayflyhq/dayfly/sdk/spiffetest"
	"github.com/dayflyhq/dayfly/sdk/verify"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/protobuf/types/known/emptypb"
)

const (
	// perIdentity is how many verifiers share an SVID: less than a broker lets one have.
	perIdentity = 500
	// joining at once: a broker closes handshakes when there are more than a thousand.
	joining = 64
)

// feedRows: verifiers in numbers, each with a connection of its own.
func feedRows(s size) []row {
	var rows []row
	for _, n := range s.verifiers {
		many := n >= 1000
		add := func(what part, r row) {
			r.row, r.fixture, r.rounds = "feed", fmt.Sprintf("feed %d", n), feedBlocks
			r.setup = func(ctx context.Context, l *lab) (pair, error) {
				ours, floor, err := l.fleets(ctx, n)
				if err != nil {
					return pair{}, err
				}
				if l.profiling { // one process from first to last, with all connected
					l.onEnd(ours.close)
					if what == restarted {
						return pair{ours: ours.reopen}, ours.open(ctx)
					}
					return pair{ours: ours.reach}, ours.open(ctx)
				}
				p := pair{ours: ours.take(what)}
				if what != pinged {
					p.floor = floor.take(what)
				}
				return p, nil
			}
			rows = append(rows, r)
		}
		contained := row{name: groups(n) + " verifiers, contained", unit: inSeconds, series: "contained", x: float64(n)}
		if many {
			contained.target = atMost(1.3)
		}
		add(reached, contained)
		if !many && s.name != "tiny" {
			continue
		}
		add(restarted, row{name: groups(n) + " verifiers, fresh after a restart", unit: inSeconds, target: atMost(1.5)})
		add(held, row{name: "memory for each of " + groups(n) + " verifiers", unit: inBytes, target: atMost(1.2)})
		add(pinged, row{name: "pings of " + groups(n) + " verifiers", unit: inCores})
	}
	return rows
}

// A part is one of the figures that a block yields.
type part int

const (
	reached   part = iota // the last verifier, or stream
	restarted             // the last is fresh, or open, again
	held                  // memory
	pinged                // CPU
)

// feedBlocks are the rounds. In one of them a side's connections are opened, everything is
// measured, and they are closed: open beside the other side's, they would take its time and
// this process's descriptors.
const feedBlocks = 3

// A crowd is the connections of one side.
type crowd interface {
	open(context.Context) error
	reach(context.Context) (sample, error)
	restart(context.Context) (sample, error)
	pid() int
	close()
}

// blocks measures one side, a block at a time, whenever a figure is asked for that the
// blocks so far don't have.
type blocks struct {
	crowd
	size    size
	n       int
	idle    float64 // memory of the server without connections
	samples [4][]sample
}

func (b *blocks) take(what part) side {
	return func(ctx context.Context) (sample, error) {
		if len(b.samples[what]) == 0 {
			if err := b.block(ctx); err != nil {
				return sample{}, err
			}
		}
		s := b.samples[what][0]
		b.samples[what] = b.samples[what][1:]
		return s, nil
	}
}

func (b *blocks) keep(what part, s sample) { b.samples[what] = append(b.samples[what], s) }

func (b *blocks) block(ctx context.Context) error {
	runtime.GC() // what the last crowd has left
	defer b.close()
	if err := b.open(ctx); err != nil {
		return fmt.Errorf("opening: %w", err)
	}
	times := 5
	if b.n < 1000 {
		times = 20
	}
	var took []time.Duration
	for range times {
		s, err := b.reach(ctx)
		if err != nil {
			return err
		}
		took = append(took, s.p50)
	}
	s := summarise(took)
	s.value = s.p50.Seconds()
	b.keep(reached, s)
	if b.n < 1000 && b.size.name != "tiny" {
		return nil
	}
	s, err := b.restart(ctx)
	if err != nil {
		return fmt.Errorf("restarting: %w", err)
	}
	b.keep(restarted, s)
	settle(ctx, b.size.rest())
	rss, err := memoryOf(b.pid(), "VmRSS")
	if err != nil {
		return err
	}
	b.keep(held, sample{value: (rss - b.idle) / float64(b.n)})
	if b.size.pings == 0 {
		return nil
	}
	return b.watchCPU(ctx)
}

// reopen does to one process what a restart has the next one do.
func (b *blocks) reopen(ctx context.Context) (sample, error) {
	at := time.Now()
	b.close()
	err := b.open(ctx)
	return stopwatch(at), err
}

// watchCPU is while nothing happens but pings.
func (b *blocks) watchCPU(ctx context.Context) error {
	before, err := cpu(b.pid())
	if err != nil {
		return err
	}
	at := time.Now()
	settle(ctx, b.size.pings)
	after, err := cpu(b.pid())
	b.keep(pinged, sample{value: (after - before).Seconds() / time.Since(at).Seconds()})
	return err
}

// fleets are so many verifiers of a broker, and as many bare streams of a floor.
func (l *lab) fleets(ctx context.Context, n int) (ours, floor *blocks, err error) {
	both, err := shared(l, "fleets", func() (both [2]*blocks, err error) {
		b, err := l.started(ctx, "feed")
		if err != nil {
			return both, err
		}
		s, err := b.floor(ctx, 0)
		if err != nil {
			return both, err
		}
		control, err := b.conns(1, gateway, s.GRPC, floorID)
		if err != nil {
			return both, err
		}
		both[0] = &blocks{crowd: &fleet{box: b, n: n}, size: l.size, n: n}
		both[1] = &blocks{crowd: &bareFleet{server: s, td: b.TD, control: control[0], n: n, changed: make(chan struct{})}, size: l.size, n: n}
		both[1].size.pings = 0 // its streams have none
		settle(ctx, l.size.rest())
		for _, side := range both {
			if side.idle, err = memoryOf(side.pid(), "VmRSS"); err != nil {
				return both, err
			}
		}
		return both, nil
	})
	return both[0], both[1], err
}

// opened is connections that end together.
type opened struct {
	mu      sync.Mutex
	closers []func() error
	running sync.WaitGroup
	cancel  context.CancelFunc
}

func (o *opened) begin(ctx context.Context) context.Context {
	ctx, o.cancel = context.WithCancel(context.WithoutCancel(ctx))
	return ctx
}

func (o *opened) onClose(f func() error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.closers = append(o.closers, f)
}

func (o *opened) close() {
	o.cancel()
	o.running.Wait()
	for _, f := range o.closers {
		f()
	}
	o.closers = nil
}

// A fleet is verifiers of the SDK.
type fleet struct {
	*box
	opened
	n   int
	all []*verify.Verifier
}

func (f *fleet) pid() int { return f.BrokerPID() }

func (f *fleet) close() { f.opened.close(); f.all = nil }

func (f *fleet) open(ctx context.Context) error {
	f.all = make([]*verify.Verifier, f.n)
	run := f.begin(ctx)
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(joining)
	for i := range f.all {
		group.Go(func() error {
			src := f.TD.Source(benchID(fmt.Sprintf("v/%d", i/perIdentity)))
			c, err := sdk.New(sdk.Config{Address: f.Info.GRPC, Source: src, BrokerID: sandbox.Broker})
			if err != nil {
				return err
			}
			f.onClose(c.Close)
			v, err := verify.New(verify.Config{Conn: c.Conn(), Audiences: []string{audience(1)}, Bundles: src, MaxStaleness: f.lab.size.bound})
			if err != nil {
				return err
			}
			f.all[i] = v
			f.running.Go(func() { v.Run(run) })
			return v.WaitReady(ctx)
		})
	}
	return group.Wait()
}

// reachTries are for verifiers that close at their bound because nothing on the machine gets
// its turn: they refuse then too, but that is no figure.
const reachTries = 3

// reach revokes an identity, and takes the time until the last verifier's set refuses a
// token of it.
func (f *fleet) reach(ctx context.Context) (s sample, err error) {
	ctx, cancel := context.WithTimeout(ctx, reachTries*patience)
	defer cancel()
	for range reachTries {
		settle(ctx, f.lab.size.bound/50) // the receipts of the last revocation are no part of this one
		for _, v := range f.all {
			if err := v.WaitReady(ctx); err != nil {
				return sample{}, err
			}
		}
		if s, err = f.reachOnce(ctx); !errors.Is(err, errClosed) {
			break
		}
	}
	return s, err
}

// errClosed: verifiers that didn't refuse for the revocation.
var errClosed = errors.New("verifiers refuse for another reason than the revocation, or don't")

func (f *fleet) reachOnce(ctx context.Context) (sample, error) {
	raw, err := f.issued(ctx)
	if err != nil {
		return sample{}, err
	}
	claims, err := token.Inspect(raw)
	if err != nil {
		return sample{}, err
	}
	alice, err := f.client(sandbox.Alice)
	if err != nil {
		return sample{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, patience) // ends the watches, for another reason
	defer cancel()
	var left sync.WaitGroup
	var wrong atomic.Int64
	watched := &verify.Verified{Claims: claims.Claims}
	for _, v := range f.all {
		left.Add(1)
		refuses, stop := v.Watch(ctx, watched)
		defer stop()
		context.AfterFunc(refuses, func() {
			var r *verify.Refusal
			if !errors.As(context.Cause(refuses), &r) || r.Reason != verify.TokenRevoked {
				wrong.Add(1)
			}
			left.Done()
		})
	}
	at := time.Now()
	if err := revoke(ctx, dayflyv1.NewRevocationServiceClient(alice.Conn()), hop(0).String()); err != nil {
		return sample{}, err
	}
	left.Wait()
	s := stopwatch(at)
	if n := wrong.Load(); n > 0 {
		return sample{}, fmt.Errorf("%d of %d %w", n, f.n, errClosed)
	}
	return s, nil
}

// restart kills the broker, starts it again, and takes the time until the last verifier is
// fresh by what the new process said.
func (f *fleet) restart(ctx context.Context) (sample, error) {
	at := time.Now()
	f.KillBroker()
	dead := time.Now() // what was asked since, a new process has answered
	if err := f.StartBroker(ctx); err != nil {
		return sample{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for i, v := range f.all {
		for s := v.Status(); !s.Fresh || s.Err != nil || s.Age >= time.Since(dead); s = v.Status() {
			settle(ctx, 2*time.Millisecond)
			if ctx.Err() != nil {
				return sample{}, fmt.Errorf("waiting for verifier %d: %w: %w", i, ctx.Err(), s.Err)
			}
		}
	}
	return stopwatch(at), nil
}

// rest is how long a process is left alone before its memory is read.
func (s *size) rest() time.Duration {
	if s.name == "tiny" {
		return 10 * time.Millisecond
	}
	return 2 * time.Second
}

// A bareFleet is streams without a verifier, which reconnect as verifiers do.
type bareFleet struct {
	*server
	opened
	td      *spiffetest.TrustDomain
	control *grpc.ClientConn
	n       int

	mu      sync.Mutex
	streams int           // opened since the count began
	got     int           // messages, since the count began
	changed chan struct{} // closed when one of the two is n
}

func (f *bareFleet) pid() int { return f.p.pid() }

func (f *bareFleet) open(ctx context.Context) error {
	run := f.begin(ctx)
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(joining)
	for i := range f.n {
		group.Go(func() error {
			src := f.td.Source(benchID(fmt.Sprintf("v/%d", i/perIdentity)))
			cc, err := grpc.NewClient(f.GRPC,
				grpc.WithTransportCredentials(credentials.NewTLS(tlsconfig.MTLSClientConfig(src, src, tlsconfig.AuthorizeID(floorID)))),
				grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.3, MaxDelay: 2 * time.Second}, MinConnectTimeout: 5 * time.Second}))
			if err != nil {
				return err
			}
			f.onClose(cc.Close)
			open := make(chan struct{})
			f.running.Go(func() { f.follow(run, cc, sync.OnceFunc(func() { close(open) })) })
			select {
			case <-open:
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		})
	}
	return group.Wait()
}

// follow keeps a stream open until ctx ends.
func (f *bareFleet) follow(ctx context.Context, cc *grpc.ClientConn, first func()) {
	third := int64(f.lab.size.bound / 3)
	for ctx.Err() == nil {
		stream, err := dayflyv1.NewFeedServiceClient(cc).Follow(ctx, grpc.WaitForReady(true))
		if err == nil {
			err = stream.Send(&dayflyv1.FollowRequest{})
		}
		if err == nil {
			_, err = stream.Recv()
		}
		if err == nil {
			f.count(&f.streams)
			first()
			for err == nil {
				if _, err = stream.Recv(); err == nil {
					f.count(&f.got)
				}
			}
		}
		settle(ctx, time.Duration(mathrand.Int64N(third)))
	}
}

func (f *bareFleet) count(what *int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if *what++; *what == f.n {
		close(f.changed)
		f.changed = make(chan struct{})
	}
}

// zero starts a count, and returns what is closed when it is complete.
func (f *bareFleet) zero(what *int) <-chan struct{} {
	f.mu.Lock()
	defer f.mu.Unlock()
	*what = 0
	return f.changed
}

// wait waits for a count to be complete.
func (f *bareFleet) wait(ctx context.Context, done <-chan struct{}, what *int) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		f.mu.Lock()
		defer f.mu.Unlock()
		return fmt.Errorf("waiting for %d streams, of which %d answered: %w", f.n, *what, ctx.Err())
	}
}

// reach sends every stream what a revocation is on the wire.
func (f *bareFleet) reach(ctx context.Context) (sample, error) {
	m := &dayflyv1.FollowResponse{Message: &dayflyv1.FollowResponse_Events{Events: &dayflyv1.Events{Events: []*dayflyv1.Event{{
		Sequence: 1000, PrivateDigest: zeros[:32], Sum: zeros[:32], Body: &dayflyv1.Event_Revocation{Revocation: &dayflyv1.RevocationEvent{
			Selectors: []*dayflyv1.Selector{{Selector: &dayflyv1.Selector_Identity{Identity: hop(0).String()}}},
		}},
	}}}}}
	all := f.zero(&f.got)
	at := time.Now()
	if err := f.control.Invoke(ctx, fanOutMethod, m, &emptypb.Empty{}); err != nil {
		return sample{}, err
	}
	err := f.wait(ctx, all, &f.got)
	return stopwatch(at), err
}

// restart kills the floor and takes the time until every stream is open again.
func (f *bareFleet) restart(ctx context.Context) (sample, error) {
	at := time.Now()
	f.p.kill()
	all := f.zero(&f.streams)
	if err := f.start(ctx); err != nil {
		return sample{}, err
	}
	err := f.wait(ctx, all, &f.streams)
	return stopwatch(at), err
}
