package main

import (
	"context"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dayflyhq/dayfly/e2e/sandbox"
	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk"
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
		fixture := fmt.Sprintf("feed %d", n)
		add := func(r row, setup func(f *fleet, b *bareFleet) pair) {
			r.row, r.fixture = "feed", fixture
			r.setup = func(ctx context.Context, l *lab) (pair, error) {
				f, b, err := l.fleets(ctx, n)
				if err != nil {
					return pair{}, err
				}
				return setup(f, b), nil
			}
			rows = append(rows, r)
		}
		contained := row{name: groups(n) + " verifiers, contained", unit: inSeconds, series: "contained", x: float64(n)}
		if n >= 1000 {
			contained.target = atMost(1.3)
		}
		add(contained,
			func(f *fleet, b *bareFleet) pair { return pair{f.contain, b.fanOut} })
		if n < 1000 && s.name != "tiny" {
			continue
		}
		add(row{name: groups(n) + " verifiers, fresh after a restart", unit: inSeconds, target: atMost(1.5), rounds: 3},
			func(f *fleet, b *bareFleet) pair { return pair{f.restart, b.restart} })
		add(row{name: "memory for each of " + groups(n) + " verifiers", unit: inBytes, target: atMost(1.2), rounds: 3},
			func(f *fleet, b *bareFleet) pair { return pair{f.memory, b.memory} })
		add(row{name: "pings of " + groups(n) + " verifiers", unit: inCores, rounds: 1},
			func(f *fleet, _ *bareFleet) pair { return pair{ours: f.pings} })
	}
	return rows
}

// fleets are so many verifiers of a broker, and as many bare streams of a floor.
func (l *lab) fleets(ctx context.Context, n int) (*fleet, *bareFleet, error) {
	box, err := l.started(ctx, "feed")
	if err != nil {
		return nil, nil, err
	}
	f, err := shared(l, "fleet", func() (*fleet, error) { return newFleet(ctx, box, n) })
	if err != nil {
		return nil, nil, fmt.Errorf("starting verifiers: %w", err)
	}
	b, err := shared(l, "bare fleet", func() (*bareFleet, error) { return newBareFleet(ctx, box, n) })
	if err != nil {
		return nil, nil, fmt.Errorf("opening bare streams: %w", err)
	}
	return f, b, nil
}

// A fleet is verifiers of the SDK.
type fleet struct {
	*box
	all  []*verify.Verifier
	idle float64 // the broker's memory without them
	rss  []float64
}

func newFleet(ctx context.Context, b *box, n int) (*fleet, error) {
	settle(ctx, b.lab.size.rest())
	idle, err := memoryOf(b.BrokerPID(), "VmRSS")
	if err != nil {
		return nil, err
	}
	f := &fleet{box: b, all: make([]*verify.Verifier, n), idle: idle}
	var running sync.WaitGroup
	run, cancel := context.WithCancel(context.WithoutCancel(ctx))
	b.lab.onEnd(func() { cancel(); running.Wait() })
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(joining)
	var mu sync.Mutex // of the lab
	for i := range f.all {
		group.Go(func() error {
			src := b.TD.Source(benchID(fmt.Sprintf("v/%d", i/perIdentity)))
			c, err := sdk.New(sdk.Config{Address: b.Info.GRPC, Source: src, BrokerID: sandbox.Broker})
			if err != nil {
				return err
			}
			mu.Lock()
			b.lab.onEnd(func() { c.Close() })
			mu.Unlock()
			v, err := verify.New(verify.Config{Conn: c.Conn(), Audiences: []string{audience(1)}, Bundles: src, MaxStaleness: b.lab.size.bound})
			if err != nil {
				return err
			}
			f.all[i] = v
			running.Go(func() { v.Run(run) })
			return v.WaitReady(ctx)
		})
	}
	return f, group.Wait()
}

// contain revokes an identity, and takes the time until the last verifier's set refuses a
// token of it.
func (f *fleet) contain(ctx context.Context) (sample, error) {
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
		return sample{}, fmt.Errorf("%d verifiers refuse for another reason than the revocation, or don't", n)
	}
	return s, nil
}

// restart kills the broker, starts it again, and takes the time until the last verifier is
// fresh by what the new process said.
func (f *fleet) restart(ctx context.Context) (sample, error) {
	at := time.Now()
	f.KillBroker()
	if err := f.StartBroker(ctx); err != nil {
		return sample{}, err
	}
	dead := time.Now() // the old one can't have answered after this
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
	s := stopwatch(at)
	settle(ctx, f.lab.size.rest())
	rss, err := memoryOf(f.BrokerPID(), "VmRSS")
	f.rss = append(f.rss, (rss-f.idle)/float64(len(f.all)))
	return s, err
}

// memory is what a restart found, or the next one finds.
func (f *fleet) memory(ctx context.Context) (sample, error) {
	if len(f.rss) == 0 {
		if _, err := f.restart(ctx); err != nil {
			return sample{}, err
		}
	}
	s := sample{value: f.rss[0]}
	f.rss = f.rss[1:]
	return s, nil
}

// pings is the broker's CPU while nothing happens but pings.
func (f *fleet) pings(ctx context.Context) (sample, error) {
	before, err := cpu(f.BrokerPID())
	if err != nil {
		return sample{}, err
	}
	at := time.Now()
	settle(ctx, f.lab.size.pings)
	after, err := cpu(f.BrokerPID())
	return sample{value: (after - before).Seconds() / time.Since(at).Seconds()}, err
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
	control *grpc.ClientConn
	n       int
	idle    float64
	rss     []float64

	mu      sync.Mutex
	opened  int           // since the restart
	got     int           // messages, since they were last counted
	changed chan struct{} // closed when one of the two is n
}

func newBareFleet(ctx context.Context, b *box, n int) (*bareFleet, error) {
	s, err := b.floor(ctx, 0)
	if err != nil {
		return nil, err
	}
	settle(ctx, b.lab.size.rest())
	idle, err := memoryOf(s.p.pid(), "VmRSS")
	if err != nil {
		return nil, err
	}
	control, err := b.conns(1, gateway, s.GRPC, floorID)
	if err != nil {
		return nil, err
	}
	f := &bareFleet{server: s, control: control[0], n: n, idle: idle, changed: make(chan struct{})}
	var running sync.WaitGroup
	run, cancel := context.WithCancel(context.WithoutCancel(ctx))
	b.lab.onEnd(func() { cancel(); running.Wait() })
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(joining)
	var mu sync.Mutex
	for i := range n {
		group.Go(func() error {
			src := b.TD.Source(benchID(fmt.Sprintf("v/%d", i/perIdentity)))
			cc, err := grpc.NewClient(s.GRPC,
				grpc.WithTransportCredentials(credentials.NewTLS(tlsconfig.MTLSClientConfig(src, src, tlsconfig.AuthorizeID(floorID)))),
				grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.3, MaxDelay: 2 * time.Second}, MinConnectTimeout: 5 * time.Second}))
			if err != nil {
				return err
			}
			mu.Lock()
			b.lab.onEnd(func() { cc.Close() })
			mu.Unlock()
			open := make(chan struct{})
			running.Go(func() { f.follow(run, cc, sync.OnceFunc(func() { close(open) })) })
			select {
			case <-open:
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		})
	}
	return f, group.Wait()
}

// follow keeps a stream open until ctx ends.
func (f *bareFleet) follow(ctx context.Context, cc *grpc.ClientConn, opened func()) {
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
			f.count(&f.opened)
			opened()
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

// fanOut sends every stream what a revocation is on the wire.
func (f *bareFleet) fanOut(ctx context.Context) (sample, error) {
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
	all := f.zero(&f.opened)
	if err := f.start(ctx); err != nil {
		return sample{}, err
	}
	err := f.wait(ctx, all, &f.opened)
	s := stopwatch(at)
	settle(ctx, f.lab.size.rest())
	rss, rssErr := memoryOf(f.p.pid(), "VmRSS")
	f.rss = append(f.rss, (rss-f.idle)/float64(f.n))
	return s, errors.Join(err, rssErr)
}

func (f *bareFleet) memory(ctx context.Context) (sample, error) {
	if len(f.rss) == 0 {
		if _, err := f.restart(ctx); err != nil {
			return sample{}, err
		}
	}
	s := sample{value: f.rss[0]}
	f.rss = f.rss[1:]
	return s, nil
}
