package agent

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os/exec"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dayflyhq/dayfly/agent/deliver"
	"github.com/dayflyhq/dayfly/agent/outgoing"
	"github.com/dayflyhq/dayfly/proto/boottime"
	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/proto/wire"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
)

const (
	// MaxRequestBytes is the largest message that a caller may send.
	MaxRequestBytes = 64 << 10
	// MaxWatchBytes is the largest message of those who watch, with all the tokens that they
	// may hold.
	MaxWatchBytes = 1 << 20
	// maxReceiveBytes is how much of a larger one is read over gRPC, so that its refusal
	// can have a reason: beyond it gRPC itself answers ResourceExhausted. At the sockets of
	// this host it is MaxWatchBytes.
	maxReceiveBytes = 256 << 10
	// maxWorkers is how many calls at the gRPC socket begin with a stack that was used before.
	// A daemon may be many agents.
	maxWorkers = 16
	// stopWithin is how long calls under way may take to end at shutdown.
	stopWithin = 5 * time.Second
	// lookEvery is how often readiness is looked at: knowledge grows old by itself.
	lookEvery = time.Second
	// tidyEvery is how often idle credentials are looked for.
	tidyEvery = time.Minute
)

// A Source is the workload's SVID: an *Identity, or an *workloadapi.X509Source.
type Source interface{ x509svid.Source }

// Config says what an agent stands between. Upstream, Source and a socket must be set.
type Config struct {
	// Upstream is the connection to the broker, usually sdk.Client.Conn(), which pins
	// the broker's SPIFFE ID and follows the rotation of the SVID.
	Upstream grpc.ClientConnInterface
	// Feed is a connection to a relay on another host, to be followed in place of the
	// broker; nil: Upstream. It is not believed: BrokerID and Bundles must be set.
	Feed grpc.ClientConnInterface
	// BrokerID is the SPIFFE ID of the broker whose signed heads count, and Bundles
	// verifies its SVIDs and those of verifiers on other hosts.
	BrokerID spiffeid.ID
	Bundles  x509bundle.Source

	// Source is this workload's SVID: what readiness and certificate-bound credentials
	// are checked against.
	Source Source
	// Changed returns a channel that is closed when the SVID changes next, so that the
	// feed's stream is made anew in time. Nil: it is only when it breaks.
	Changed func() <-chan struct{}

	// GRPC and HTTP are the listening sockets, from Listen. The agent closes them. One
	// of them may be nil.
	GRPC, HTTP net.Listener
	// NoSockets says that both may be nil: the agent is for its own process, by Newest.
	NoSockets bool
	// Relay is the TCP listener for verifiers on other hosts, by mTLS with this
	// workload's SVID; nil: there is none. The agent closes it. Bundles must be set, and
	// RelayAllow names who may follow there: identities, subtrees and trust domains.
	Relay      net.Listener
	RelayAllow []revocation.Selector
	// Allow is who may call on them.
	Allow Allow

	// Prefetch are credentials that are fetched at start and kept fresh whether or not
	// anyone asks.
	Prefetch []Request
	// Files are where credentials are written for programs that only read files; what they
	// hold is fetched and kept fresh like Prefetch.
	Files []deliver.Target

	// AWS is a container endpoint for AWS's SDKs, and Systemd a socket for
	// LoadCredential= of systemd; nil: there is none.
	AWS     *AWSContainer
	Systemd *Systemd

	// Incoming are proxies before services on this host that have no SDK, and Envoy what
	// Envoys before such services ask. The agent closes their listeners.
	Incoming []Incoming
	Envoy    []Envoy
	// Outgoing are proxies that add tokens to requests for upstreams. Bundles must be set
	// for those upstreams that prove a SPIFFE ID.
	Outgoing []outgoing.Listener
	// Run runs the commands that tell of files, for a process that reaps more than what it
	// started. Nil: (*exec.Cmd).Run.
	Run func(*exec.Cmd) error

	// NoFeed leaves the feed alone: nothing is relayed, and a revoked credential is
	// given out until it expires, to be refused by every verifier.
	NoFeed bool
	// MaxStaleness is the bound that the agent states as a subscriber, and the age
	// beyond which its state isn't Ready. Zero means wire.DefaultBound.
	MaxStaleness time.Duration
	// Audiences are what the agent follows for where policy doesn't let it relay. A
	// relay needs none.
	Audiences []string
	// MaxStreams bounds the verifiers that follow at once. Zero means
	// DefaultMaxStreams.
	MaxStreams int

	// Configuration says how reading the configuration went, for Report. Nil: it isn't told.
	Configuration func() ConfigurationInfo

	// Now is the clock that credentials are aged with. Nil means time.Now.
	Now func() time.Time
	// Boot is the clock that knowledge is aged with; it must run through suspend. Nil
	// means CLOCK_BOOTTIME.
	Boot func() feed.Instant
	// Jitter returns a number in [0, 1). Nil means math/rand.
	Jitter func() float64
	// Log receives what happens; nil: nothing does. It never gets a credential.
	Log *slog.Logger
}

func (c *Config) validate() error {
	var errs []error
	if c.Upstream == nil {
		errs = append(errs, errors.New("upstream: must be set"))
	}
	if c.Source == nil {
		errs = append(errs, errors.New("source: must be set"))
	}
	if c.Feed != nil && (c.BrokerID.IsZero() || c.Bundles == nil) {
		errs = append(errs, errors.New("feed: a relay on another host is followed by the broker's signatures: broker ID and bundles must be set"))
	}
	if c.Relay != nil && (c.Bundles == nil || len(c.RelayAllow) == 0 || c.NoFeed) {
		errs = append(errs, errors.New("relay: bundles and whom to allow must be set, and the feed be followed"))
	}
	if c.GRPC == nil && c.HTTP == nil && !c.NoSockets {
		errs = append(errs, errors.New("sockets: at least one must be set"))
	}
	if c.MaxStaleness < wire.MinBound || c.MaxStaleness > wire.MaxBound {
		errs = append(errs, fmt.Errorf("max staleness: from %v to %v", wire.MinBound, wire.MaxBound))
	}
	if c.MaxStreams < 0 {
		errs = append(errs, errors.New("max streams: is negative"))
	}
	if len(c.Prefetch) > MaxPrefetch {
		errs = append(errs, fmt.Errorf("prefetch: at most %d, those of files included", MaxPrefetch))
	}
	errs = append(errs, c.Allow.Validate(), c.AWS.validate(), c.Systemd.validate(), c.validateGuards())
	for _, a := range c.Audiences {
		if err := token.ValidateAudience(a); err != nil {
			errs = append(errs, fmt.Errorf("audiences: %w", err))
		}
	}
	for i := range c.Prefetch {
		if err := c.Prefetch[i].normalize(); err != nil {
			errs = append(errs, fmt.Errorf("prefetch %d: %w", i+1, err))
		}
	}
	return errors.Join(errs...)
}

func (c *Config) setDefaults() {
	if c.MaxStaleness == 0 {
		c.MaxStaleness = wire.DefaultBound
	}
	if c.MaxStreams == 0 {
		c.MaxStreams = DefaultMaxStreams
	}
	if c.Changed == nil {
		c.Changed = func() <-chan struct{} { return nil }
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Boot == nil {
		c.Boot = boottime.Now
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
}

// An Agent serves one workload. Run makes it work.
type Agent struct {
	cfg      Config
	k        *knowledge
	cache    *cache
	all      *hearer
	follower *follower
	files    *deliver.Deliverer
	outgoing *outgoing.Proxy
	door     *door // of GRPC and HTTP
	guards   *guards
	counts   counters
	health   *health.Server
	grpc     *grpc.Server // nil for none, and before Run: its workers are goroutines
	remote   *grpc.Server // for verifiers on other hosts, nil for none
	http     *http.Server
	stopping chan struct{} // closed when Run begins to stop
	running  chan struct{} // closed when Run serves
	ended    chan struct{} // closed when Run returns
	live     atomic.Pointer[Settings]
	applying sync.Mutex
	started  time.Time
}

// New returns an agent. It starts nothing and calls nobody.
func New(cfg Config) (*Agent, error) {
	cfg.setDefaults()
	settings := Settings{cfg.Allow, cfg.Prefetch, cfg.Files, cfg.MaxStaleness}
	cfg.Prefetch = settings.pins()
	if err := cfg.validate(); err != nil {
		return nil, fmt.Errorf("configuring agent: %w", err)
	}
	cfg.Upstream = proven{cfg.Upstream, cfg.Source, cfg.Changed}
	if cfg.Feed != nil {
		cfg.Feed = proven{cfg.Feed, cfg.Source, cfg.Changed}
	}
	a := &Agent{cfg: cfg, k: newKnowledge(cfg.Boot), door: newDoor(cfg.Allow), health: health.NewServer(), stopping: make(chan struct{}), running: make(chan struct{}), ended: make(chan struct{}), started: cfg.Now()}
	a.live.Store(&settings)
	a.cache = &cache{
		tokens: dayflyv1.NewTokenServiceClient(cfg.Upstream), svids: cfg.Source, judge: a.judge(),
		now: cfg.Now, boot: cfg.Boot, jitter: cfg.Jitter, log: cfg.Log, counts: &a.counts,
		entries: map[key]*entry{}, hearing: map[*hearer]struct{}{},
	}
	a.all = &hearer{cache: a.cache}
	if !cfg.BrokerID.IsZero() && cfg.Bundles != nil {
		a.k.verify = cfg.verifyHead
	}
	above := cfg.Upstream
	if cfg.Feed != nil {
		above, a.k.relay.Screen = cfg.Feed, new(feed.Screen)
	}
	a.follower = &follower{
		client: dayflyv1.NewFeedServiceClient(above), distrusts: cfg.Feed != nil, k: a.k, instance: rand.Text(), audiences: cfg.Audiences,
		bound: func() time.Duration { return a.live.Load().MaxStaleness }, rebound: make(chan struct{}, 1), source: cfg.Source, rotated: cfg.Changed,
		applied: a.cache.sweep, reached: a.cache.reached, log: cfg.Log, counts: &a.counts,
	}
	var err error
	if a.files, err = a.deliverer(); err != nil {
		return nil, fmt.Errorf("configuring agent: files: %w", err)
	}
	if a.guards, err = a.newGuards(); err != nil {
		return nil, fmt.Errorf("configuring agent: %w", err)
	}
	if a.outgoing, err = a.outgoingProxy(); err != nil {
		return nil, fmt.Errorf("configuring agent: %w", err)
	}
	a.serveRemote()
	a.serveHTTP()
	return a, nil
}

func (a *Agent) serveGRPC() {
	a.grpc = grpc.NewServer(
		grpc.Creds(peerCredentials{a.door}),
		grpc.MaxRecvMsgSize(MaxWatchBytes),
		grpc.MaxConcurrentStreams(uint32(a.cfg.MaxStreams)+maxEntries),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: true}),
		grpc.UnaryInterceptor(a.admitUnary),
		grpc.ChainStreamInterceptor(admitStream),
		grpc.WaitForHandlers(true),
		// A call's stack has grown already. Streams stay with their workers; once they have
		// them all, a call gets a goroutine of its own, as without workers.
		grpc.NumStreamWorkers(maxWorkers),
		// Windows that grow cost a ping for nearly every call, and what comes is small.
		grpc.StaticStreamWindowSize(MaxRequestBytes),
		grpc.StaticConnWindowSize(MaxRequestBytes),
	)
	dayflyv1.RegisterTokenServiceServer(a.grpc, &tokenService{agent: a})
	dayflyv1.RegisterWatchServiceServer(a.grpc, &watchService{agent: a})
	if !a.cfg.NoFeed {
		dayflyv1.RegisterFeedServiceServer(a.grpc, &feedService{k: a.k, maxStreams: int64(a.cfg.MaxStreams), stopping: a.stopping, counts: &a.counts})
	}
	healthpb.RegisterHealthServer(a.grpc, a.health)
}

// Run serves until ctx ends or a socket fails. When it returns everything that it
// started has ended and its sockets are gone. It may be called once.
func (a *Agent) Run(ctx context.Context) error {
	defer close(a.ended)
	a.cache.open()
	defer a.cache.close()
	if err := a.cache.pin(a.cfg.Prefetch); err != nil {
		return errors.Join(fmt.Errorf("prefetching: %w", err), a.closeListeners())
	}
	aws := &awsServer{cfg: a.cfg.AWS, cache: a.cache, now: a.cfg.Now, log: a.cfg.Log}
	if a.cfg.AWS != nil {
		if err := aws.rotate(); err != nil {
			return errors.Join(fmt.Errorf("writing the authorization token file of aws_container: %w", err), a.closeListeners())
		}
	}
	// Before anything that takes time, and after all that may end the start: what it finds
	// alive has somebody to remove it.
	if err := a.files.Open(); err != nil {
		if a.cfg.AWS != nil {
			aws.forget()
		}
		return errors.Join(err, a.closeListeners())
	}
	group, ctx := errgroup.WithContext(ctx)
	if a.cfg.GRPC != nil {
		a.serveGRPC()
		group.Go(func() error {
			if err := a.grpc.Serve(a.cfg.GRPC); !errors.Is(err, grpc.ErrServerStopped) {
				return wrap("serving grpc", err)
			}
			return nil
		})
	}
	if a.remote != nil {
		group.Go(func() error {
			if err := a.remote.Serve(a.cfg.Relay); !errors.Is(err, grpc.ErrServerStopped) {
				return wrap("serving the relay", err)
			}
			return nil
		})
	}
	if a.cfg.HTTP != nil {
		group.Go(func() error {
			if err := a.http.Serve(a.cfg.HTTP); !errors.Is(err, http.ErrServerClosed) {
				return wrap("serving http", err)
			}
			return nil
		})
	}
	if !a.cfg.NoFeed {
		group.Go(func() error { return a.follower.run(ctx) })
	}
	if a.cfg.AWS != nil {
		group.Go(func() error { return aws.run(ctx) })
	}
	if a.cfg.Systemd != nil {
		s := newSystemd(a.cfg.Systemd, a.cache, a.cfg.Log)
		group.Go(func() error { return s.run(ctx) })
	}
	group.Go(func() error { return a.guards.run(ctx) })
	group.Go(func() error { return a.outgoing.Run(ctx) })
	group.Go(func() error { a.files.Run(ctx); return nil })
	group.Go(func() error { a.look(ctx); return nil })
	group.Go(func() error { <-ctx.Done(); a.stop(); return nil })
	a.cfg.Log.InfoContext(ctx, "serving", "grpc", address(a.cfg.GRPC), "http", address(a.cfg.HTTP), "relay", address(a.cfg.Relay))
	close(a.running)
	return group.Wait()
}

func (a *Agent) closeListeners() error {
	all := []net.Listener{a.cfg.GRPC, a.cfg.HTTP, a.cfg.Relay}
	if a.cfg.AWS != nil {
		all = append(all, a.cfg.AWS.Listener)
	}
	if a.cfg.Systemd != nil {
		all = append(all, a.cfg.Systemd.Listener)
	}
	for _, c := range a.cfg.Incoming {
		all = append(all, c.Listener)
	}
	for _, c := range a.cfg.Envoy {
		all = append(all, c.Listener)
	}
	for _, l := range a.cfg.Outgoing {
		all = append(all, l.Listener)
	}
	var errs []error
	for _, l := range all {
		if l != nil {
			errs = append(errs, l.Close())
		}
	}
	return errors.Join(errs...)
}

func wrap(doing string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", doing, err)
}

func address(l net.Listener) string {
	if l == nil {
		return ""
	}
	return l.Addr().String()
}

// stop ends what serves: first the streams, which would never end by themselves.
func (a *Agent) stop() {
	a.health.Shutdown()
	close(a.stopping)
	ctx, cancel := context.WithTimeout(context.Background(), stopWithin)
	defer cancel()
	done := make(chan struct{})
	go func() {
		defer close(done)
		if a.grpc != nil {
			a.grpc.GracefulStop()
		}
		if a.remote != nil {
			a.remote.GracefulStop()
		}
	}()
	if err := a.http.Shutdown(ctx); err != nil {
		_ = a.http.Close()
	}
	select {
	case <-done:
	case <-ctx.Done():
		if a.grpc != nil {
			a.grpc.Stop()
		}
		if a.remote != nil {
			a.remote.Stop()
		}
		<-done
	}
}

// look keeps health and memory current until ctx ends.
func (a *Agent) look(ctx context.Context) {
	every := time.NewTicker(lookEvery)
	defer every.Stop()
	tidied := a.cfg.Now()
	var state State
	clocks, looked := a.beat(), look{time.Now(), a.cache.mark()}
	rotated := a.cfg.Changed()
	for {
		status := a.Status()
		a.report(status)
		if status.State != state {
			a.tell(ctx, state, status)
			state = status.State
		}
		clocks, looked = a.jumped(ctx, clocks), a.cache.look(ctx, looked)
		if now := a.cfg.Now(); now.Sub(tidied) > tidyEvery {
			tidied = now
			a.cache.tidy()
		}
		a.files.Look()
		a.k.mu.Lock()
		changed := a.k.changed
		a.k.mu.Unlock()
		if state == Ready {
			changed = nil // it can only become unready with time
		}
		select {
		case <-ctx.Done():
			return
		case <-rotated:
			rotated = a.cfg.Changed()
			a.cache.sweep(ctx) // credentials bound to the old certificate
		case <-changed:
		case <-every.C:
		}
	}
}
