// Package brokerd wires a broker from its configuration: what the daemon
// dayfly-broker, and "dayfly dev" and "dayfly demo", run.
package brokerd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/dayflyhq/dayfly/agent"
	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/broker/boltstore"
	"github.com/dayflyhq/dayfly/broker/keys"
	"github.com/dayflyhq/dayfly/broker/rpc"
	"github.com/dayflyhq/dayfly/broker/web"
	"github.com/dayflyhq/dayfly/policy"
	"github.com/dayflyhq/dayfly/proto/boottime"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/proto/vouch"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
)

// Init makes an empty store, explicitly: serving never does.
func Init(path string, now time.Time) error {
	return boltstore.Create(path, broker.Record{
		Event:   feed.Event{Era: &feed.Era{Era: token.NextEra(0, now)}},
		Details: broker.Details{Time: now.UTC(), Actor: "dayfly-broker init", Reason: "new store"},
	})
}

// An Announcement says where a broker serves, once it does.
type Announcement struct {
	ID         string `json:"id"` // SPIFFE ID, to be pinned by clients
	GRPC       string `json:"grpc"`
	Public     string `json:"public,omitempty"`
	Admin      string `json:"admin,omitempty"`
	BreakGlass string `json:"break_glass,omitempty"`
}

// reopenAfter spaces out attempts to open a store that closed itself.
const reopenAfter = time.Second

// Serve runs a broker until ctx ends. It needs its store to begin: the break-glass socket
// and the admin listener serve from then on. The rest follows by itself, when the Workload
// API has given an SVID, and with a policy folder that compiles. A store that closed itself, after a write whose
// outcome is unknown, is opened again and looked at; every other failure ends it. The
// announcement goes to out as one line of JSON.
func Serve(ctx context.Context, cfg Config, out, stderr io.Writer) error {
	log := slog.New(slog.NewJSONHandler(stderr, &slog.HandlerOptions{Level: cfg.LogLevel}))
	audit, err := openAudit(cfg.Audit, stderr)
	if err != nil {
		return err
	}
	defer audit.close()
	identity := agent.NewIdentity(cfg.WorkloadAPI, log)
	asking, stop := context.WithCancel(context.WithoutCancel(ctx))
	asked := make(chan error, 1)
	go func() { asked <- identity.Run(asking) }()
	defer func() { stop(); <-asked }() // after the last call has returned
	for {
		d := &daemon{cfg: &cfg, log: log, audit: audit, svids: identity, out: out}
		err := d.run(ctx)
		if ctx.Err() != nil || !errors.Is(err, broker.ErrStoreClosed) {
			return err
		}
		log.ErrorContext(ctx, "the store closed itself; opening it again", "err", err)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(reopenAfter):
		}
	}
}

// daemon is one life of the broker between two openings of its store.
type daemon struct {
	cfg   *Config
	log   *slog.Logger
	audit *auditLog
	svids *agent.Identity
	out   io.Writer

	id       spiffeid.ID // of the first SVID; set before keys are checked
	store    *boltstore.Store
	policy   *policy.Policy
	ring     *keys.Ring
	broker   *broker.Broker
	registry *prometheus.Registry
	metrics  *metrics
	traces   traces
}

func (d *daemon) run(ctx context.Context) (err error) {
	if err := d.open(ctx); err != nil {
		return err
	}
	// Last of all: everything that may still write has ended by then.
	defer func() { err = errors.Join(err, d.store.Close()) }()
	if err := d.assemble(ctx); err != nil {
		return err
	}
	return d.serve(ctx)
}

func (d *daemon) open(ctx context.Context) error {
	var err error
	d.registry = prometheus.NewRegistry()
	d.registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	d.metrics = newMetrics(d.registry)
	d.policy, err = policy.Open(ctx, policy.Config{Dir: d.cfg.Policy, Log: d.log, OnReload: d.metrics.policyReloaded})
	if err != nil {
		return fmt.Errorf("loading policy from %s: %w", d.cfg.Policy, err)
	}
	if d.traces, err = newTraces(ctx, d.cfg.Traces); err != nil {
		return err
	}
	d.store, err = boltstore.Open(boltstore.Config{Path: d.cfg.Store, Log: d.log, OnCommit: d.metrics.committed})
	return err
}

func (d *daemon) assemble(ctx context.Context) error {
	var err error
	d.ring, err = keys.New(keys.Config{
		Issuer: d.cfg.Issuer, Algorithm: d.cfg.Algorithm, RotateEvery: d.cfg.KeyRotation, Log: d.log,
		SVID:    d.svids.GetX509SVID,
		Publish: func(ctx context.Context, k feed.Key) error { return d.broker.PublishKey(ctx, k) },
	})
	if err != nil {
		return err
	}
	d.broker, err = broker.New(broker.Config{
		Issuer: d.cfg.Issuer, Store: d.store, Policy: decider{d.policy}, MaxTTL: d.cfg.MaxTTL,
		Signer: d.signer,
		VerifyKey: func(k feed.Key, at time.Time) error {
			return keys.VerifyKey(d.cfg.Issuer, k, d.svids, spiffeid.MatchID(d.id), at)
		},
		SignHead: func(s feed.HeadStatement) (feed.SignedHead, error) {
			svid, err := d.svids.GetX509SVID() // as it is now: it rotates
			if err != nil {
				return feed.SignedHead{}, err
			}
			return vouch.SignHead(svid, d.cfg.Issuer, s)
		},
		VerifyHead: func(h feed.SignedHead) (feed.HeadStatement, error) {
			return vouch.VerifyKeptHead(d.cfg.Issuer, h, d.svids, spiffeid.MatchID(d.id), time.Now())
		},
		Disregard: d.cfg.Disregard,
		Audit: func(e broker.AuditEntry) error {
			d.metrics.decided(e)
			return d.audit.write(e)
		},
		Boot: boottime.Now, Log: d.log,
	})
	if err != nil {
		return err
	}
	d.metrics.watch(d.broker, d.store)
	if err := d.disregard(ctx); err != nil {
		return err
	}
	if err := d.broker.Load(ctx); err != nil {
		return fmt.Errorf("loading the store: %w", err)
	}
	return nil
}

// disregard records that an operator said to go on without what a signed head names.
func (d *daemon) disregard(ctx context.Context) error {
	if d.cfg.Disregard.Seq == 0 {
		return nil
	}
	d.log.WarnContext(ctx, "signed heads that the log lacks are disregarded", "up_to", d.cfg.Disregard.String(), "reason", d.cfg.DisregardReason)
	err := d.audit.write(broker.AuditEntry{
		Time: time.Now().UTC(), Action: "disregard_signed_heads", Actor: fmt.Sprintf("dayfly-broker serve:uid=%d", os.Geteuid()),
		Outcome: "allowed", Message: "up to " + d.cfg.Disregard.String(), Why: d.cfg.DisregardReason, Alert: true,
	})
	if err != nil {
		return fmt.Errorf("writing the audit: %w", err)
	}
	return nil
}

// signer is the ring's current key, for the broker.
func (d *daemon) signer() (broker.Signer, bool) {
	s, ok := d.ring.Current()
	return broker.Signer{Public: s.Public, Sign: func(u token.Unsigned) (token.Secret, error) {
		secret, err := s.Sign(u)
		if errors.Is(err, keys.ErrRevoked) || errors.Is(err, keys.ErrReplaced) {
			return token.Secret{}, broker.ErrNoSigningKey // it went while the grant was recorded
		}
		return secret, err
	}}, ok
}

// serve runs everything until ctx ends or something fails, and stops in order: no new
// calls, streams end, calls under way return, and only then what they stand on.
func (d *daemon) serve(ctx context.Context) error {
	core, stopCore := context.WithCancel(context.WithoutCancel(ctx))
	defer stopCore()
	group, edge := errgroup.WithContext(ctx)
	r := &running{group: group, edge: edge, core: core}
	group.Go(func() error { return d.broker.Run(core) })
	group.Go(func() error { return d.policy.Run(core) })
	if err := d.start(r); err != nil && edge.Err() == nil {
		group.Go(func() error { return err })
	}
	<-edge.Done()
	graceful, cancel := context.WithTimeout(core, d.cfg.ShutdownGrace)
	defer cancel()
	for _, s := range slices.Backward(r.servers) { // break-glass last
		s.stop(graceful)
	}
	if err := d.traces.shutdown(graceful); err != nil {
		d.log.WarnContext(graceful, "sending the last traces failed", "err", err)
	}
	stopCore()
	err := group.Wait()
	if ctx.Err() != nil {
		d.log.Info("stopped")
		return nil
	}
	return err
}

// running is what serve has started.
type running struct {
	group   *errgroup.Group
	edge    context.Context // ends first: no new calls
	core    context.Context // ends last: what calls stand on
	servers []server
}

func (r *running) start(s server) {
	r.servers = append(r.servers, s)
	r.group.Go(s.serve)
}

// start brings everything up, as far as what it needs is there. It returns when all is
// up, or when edge has ended.
func (d *daemon) start(r *running) error {
	if err := d.startLocal(r); err != nil {
		return err
	}
	if err := d.awaitSVID(r.edge); err != nil {
		return err
	}
	if err := d.broker.CheckKeys(r.edge); err != nil {
		return fmt.Errorf("checking the signing keys on record: %w", err)
	}
	serving, err := d.startPublic(r)
	if err != nil {
		return err
	}
	if err := d.ring.Rotate(r.edge); err != nil {
		return fmt.Errorf("publishing the first signing key: %w", err)
	}
	r.group.Go(func() error { return d.ring.Run(r.core) })
	r.group.Go(func() error { return d.watchKeys(r.core) })
	r.group.Go(func() error { return d.watchSVID(r.core) })
	serving()
	d.announce()
	return nil
}

// awaitSVID returns once the Workload API has given an SVID.
func (d *daemon) awaitSVID(ctx context.Context) error {
	for {
		changed := d.svids.Changed()
		if svid, err := d.svids.GetX509SVID(); err == nil {
			d.id = svid.ID
			return nil
		}
		d.log.InfoContext(ctx, "waiting for an SVID from the workload api", "break_glass", d.cfg.Listen.BreakGlass)
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// watchKeys tells the ring of a revoked key; it makes a new one.
func (d *daemon) watchKeys(ctx context.Context) error {
	for {
		changed := d.broker.Changed()
		if s, ok := d.ring.Current(); ok && d.broker.KeyRevoked(s.Public.ID) {
			d.log.WarnContext(ctx, "the current signing key is revoked; making a new one", "key", s.Public.ID.String())
			d.ring.Revoked(s.Public.ID)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil
		}
	}
}

// watchSVID tells the ring of every change of the SVID and of the bundles.
func (d *daemon) watchSVID(ctx context.Context) error {
	for {
		changed := d.svids.Changed()
		d.ring.SVIDChanged(d.svids)
		select {
		case <-changed:
		case <-ctx.Done():
			return nil
		}
	}
}

// server is one listener's worth of serving.
type server struct {
	serve func() error
	stop  func(context.Context)
}

// startLocal serves what works without SPIFFE and without policy: break-glass, and the
// admin listener that says what is missing.
func (d *daemon) startLocal(r *running) error {
	if path := d.cfg.Listen.BreakGlass; path != "" {
		l, err := listenUnix(path)
		if err != nil {
			return fmt.Errorf("listening for break-glass: %w", err)
		}
		glass, err := rpc.NewBreakGlass(rpc.Config{Broker: d.broker, Log: d.log, Backup: d.beginBackup})
		if err != nil {
			return errors.Join(err, l.Close())
		}
		r.start(grpcServer(glass, l))
	}
	if d.cfg.Listen.Admin == "" {
		return nil
	}
	h, err := web.Admin(web.AdminConfig{Ready: d.problems, Metrics: d.registry, TracerProvider: d.traces.tracer(), Log: d.log})
	if err != nil {
		return err
	}
	l, err := listenTCP(&d.cfg.Listen.Admin)
	if err != nil {
		return err
	}
	r.start(webServer(func(ctx context.Context) error { return web.ServeAdmin(ctx, l, h, d.log) }))
	return nil
}

// startPublic serves those who come over the network. Health says so once the function
// it returns is called.
func (d *daemon) startPublic(r *running) (serving func(), err error) {
	main, err := rpc.NewServer(rpc.Config{
		Broker: d.broker, SVIDs: d.svids, Bundle: d.svids, BundlesChanged: d.svids.Changed, Log: d.log, Options: d.traces.serverOptions(),
		TrustDomains: append([]spiffeid.TrustDomain{d.id.TrustDomain()}, d.cfg.TrustDomains...),
	})
	if err != nil {
		return nil, err
	}
	main.Health.SetServingStatus("", healthpb.HealthCheckResponse_NOT_SERVING)
	l, err := listenTCP(&d.cfg.Listen.GRPC)
	if err != nil {
		return nil, err
	}
	d.metrics.watchConnections(main)
	r.start(grpcServer(main, l))
	serving = func() { main.Health.SetServingStatus("", healthpb.HealthCheckResponse_SERVING) }
	if d.cfg.Listen.Public == "" {
		return serving, nil
	}
	h, err := web.Public(web.PublicConfig{Issuer: d.cfg.Issuer, Keys: d.broker.Keys, Algorithm: d.cfg.Algorithm, TracerProvider: d.traces.tracer(), Log: d.log})
	if err != nil {
		return nil, err
	}
	public, err := listenTCP(&d.cfg.Listen.Public)
	if err != nil {
		return nil, err
	}
	r.start(webServer(func(ctx context.Context) error { return web.Serve(ctx, public, h, d.log) }))
	return serving, nil
}

func grpcServer(s *rpc.Server, l net.Listener) server {
	return server{serve: func() error { return s.Serve(l) }, stop: s.Shutdown}
}

func webServer(serve func(context.Context) error) server {
	ctx, cancel := context.WithCancel(context.Background())
	return server{
		serve: func() error { defer cancel(); return serve(ctx) },
		stop:  func(context.Context) { cancel() },
	}
}

// problems is what readiness says.
func (d *daemon) problems() []web.Problem {
	var out []web.Problem
	if _, err := d.svids.GetX509SVID(); err != nil {
		out = append(out, web.Problem{Reason: "NO_SVID", Message: "the workload api has given no SVID: only break-glass is served", Hint: "does the SPIFFE agent run, and has it an entry for the broker?"})
	}
	if s := d.broker.Silent(); s != nil {
		out = append(out, web.Problem{
			Reason:  broker.ErrLogBehind.Reason,
			Message: fmt.Sprintf("the log lacks %s, which a broker signed for at %s; shown by %s", s.Head, s.SignedAt.Format(time.RFC3339), s.ShownBy),
			Hint:    broker.ErrLogBehind.Hint,
		})
	}
	if _, ok := d.ring.Current(); !ok {
		out = append(out, web.Problem{Reason: "NO_SIGNING_KEY", Message: "no signing key is published"})
	}
	switch st := d.policy.Status(); {
	case st.Generation == 0:
		out = append(out, web.Problem{Reason: broker.ErrNoPolicy.Reason, Message: broker.ErrNoPolicy.Message, Hint: broker.ErrNoPolicy.Hint})
	case st.Err != nil:
		out = append(out, web.Problem{Reason: "POLICY_STALE", Message: "the policy folder is broken; the last good policy is in force", Warning: true})
	}
	if d.broker.ClockOff() {
		out = append(out, web.Problem{Reason: "CLOCK_OFF", Message: "this clock is behind the newest record of the log", Hint: "check the clock's synchronisation", Warning: true})
	}
	return out
}

func (d *daemon) announce() {
	at := d.cfg.Listen
	a := Announcement{ID: d.id.String(), GRPC: at.GRPC, Public: at.Public, Admin: at.Admin, BreakGlass: at.BreakGlass}
	d.log.Info("serving", "id", a.ID, "grpc", a.GRPC, "public", a.Public, "admin", a.Admin, "break_glass", a.BreakGlass)
	if line, err := json.Marshal(a); err == nil {
		fmt.Fprintf(d.out, "%s\n", line)
	}
}

// listenTCP listens, and keeps the port that it got over a reopening of the store.
func listenTCP(addr *string) (net.Listener, error) {
	l, err := net.Listen("tcp", *addr)
	if err != nil {
		return nil, fmt.Errorf("listening: %w", err)
	}
	*addr = l.Addr().String()
	return l, nil
}

// listenUnix replaces the socket of a dead broker and refuses to take a live one's.
func listenUnix(path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, err
	}
	if conn, err := net.Dial("unix", path); err == nil {
		conn.Close()
		return nil, fmt.Errorf("%s is served by another process", path)
	}
	if fi, err := os.Lstat(path); err == nil && fi.Mode()&os.ModeSocket != 0 {
		if err := os.Remove(path); err != nil {
			return nil, err
		}
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o600); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}
