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
	"time"

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
	"github.com/spiffe/go-spiffe/v2/workloadapi"
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

// Serve runs a broker until ctx ends. A store that closed itself, after a write whose
// outcome is unknown, is opened again and looked at; every other failure ends it. The
// announcement goes to out as one line of JSON.
func Serve(ctx context.Context, cfg Config, out, stderr io.Writer) error {
	log := slog.New(slog.NewJSONHandler(stderr, &slog.HandlerOptions{Level: cfg.LogLevel}))
	audit, err := openAudit(cfg.Audit, stderr)
	if err != nil {
		return err
	}
	defer audit.close()
	src, err := svids(ctx, cfg, log)
	if err != nil {
		return err
	}
	defer src.Close()
	for {
		d := &daemon{cfg: &cfg, log: log, audit: audit, svids: src, out: out}
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

// svids waits for the broker's own SVID.
func svids(ctx context.Context, cfg Config, log *slog.Logger) (*workloadapi.X509Source, error) {
	var options []workloadapi.X509SourceOption
	if cfg.WorkloadAPI != "" {
		options = append(options, workloadapi.WithClientOptions(workloadapi.WithAddr(cfg.WorkloadAPI)))
	}
	log.InfoContext(ctx, "waiting for an SVID from the workload api")
	src, err := workloadapi.NewX509Source(ctx, options...)
	if err != nil {
		return nil, fmt.Errorf("getting an SVID from the workload api: %w", err)
	}
	return src, nil
}

// daemon is one life of the broker between two openings of its store.
type daemon struct {
	cfg   *Config
	log   *slog.Logger
	audit *auditLog
	svids *workloadapi.X509Source
	out   io.Writer

	id       spiffeid.ID
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
	svid, err := d.svids.GetX509SVID()
	if err != nil {
		return fmt.Errorf("getting the broker's SVID: %w", err)
	}
	d.id = svid.ID
	d.registry = prometheus.NewRegistry()
	d.registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	d.metrics = newMetrics(d.registry)
	d.policy, err = policy.Load(ctx, policy.Config{Dir: d.cfg.Policy, Log: d.log, OnReload: d.metrics.policyReloaded})
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
	listeners, err := listen(d.cfg.Listen)
	if err != nil {
		return err
	}
	defer listeners.close()

	core, stopCore := context.WithCancel(context.WithoutCancel(ctx))
	defer stopCore()
	group, edge := errgroup.WithContext(ctx)
	group.Go(func() error { return d.broker.Run(core) })
	group.Go(func() error { return d.policy.Run(core) })

	servers, err := d.servers(listeners)
	if err != nil {
		return err
	}
	for _, s := range servers {
		group.Go(s.serve)
	}
	group.Go(func() error {
		<-edge.Done()
		graceful, cancel := context.WithTimeout(core, d.cfg.ShutdownGrace)
		defer cancel()
		for _, s := range servers {
			s.stop(graceful)
		}
		if err := d.traces.shutdown(graceful); err != nil {
			d.log.WarnContext(graceful, "sending the last traces failed", "err", err)
		}
		stopCore()
		return nil
	})
	if err := d.ring.Rotate(edge); err != nil && ctx.Err() == nil {
		group.Go(func() error { return fmt.Errorf("publishing the first signing key: %w", err) })
		return group.Wait()
	}
	group.Go(func() error { return d.ring.Run(core) })
	group.Go(func() error { return d.watchKeys(core) })
	for _, s := range servers {
		s.ready()
	}
	d.announce(listeners)
	err = group.Wait()
	if ctx.Err() != nil {
		d.log.Info("stopped")
		return nil
	}
	return err
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

// server is one listener's worth of serving.
type server struct {
	serve func() error
	stop  func(context.Context)
	ready func()
}

func (d *daemon) servers(l *listeners) ([]server, error) {
	main, err := rpc.NewServer(rpc.Config{
		Broker: d.broker, SVIDs: d.svids, Bundle: d.svids, Log: d.log, Options: d.traces.serverOptions(),
		TrustDomains: append([]spiffeid.TrustDomain{d.id.TrustDomain()}, d.cfg.TrustDomains...),
	})
	if err != nil {
		return nil, err
	}
	servers := []server{grpcServer(main, l.grpc)}
	if l.breakGlass != nil {
		glass, err := rpc.NewBreakGlass(rpc.Config{Broker: d.broker, Log: d.log})
		if err != nil {
			return nil, err
		}
		servers = append(servers, grpcServer(glass, l.breakGlass))
	}
	if l.public != nil {
		h, err := web.Public(web.PublicConfig{Issuer: d.cfg.Issuer, Keys: d.broker.Keys, Algorithm: d.cfg.Algorithm, TracerProvider: d.traces.tracer(), Log: d.log})
		if err != nil {
			return nil, err
		}
		servers = append(servers, webServer(func(ctx context.Context) error { return web.Serve(ctx, l.public, h, d.log) }))
	}
	if l.admin != nil {
		h, err := web.Admin(web.AdminConfig{Ready: d.problems, Metrics: d.registry, TracerProvider: d.traces.tracer(), Log: d.log})
		if err != nil {
			return nil, err
		}
		servers = append(servers, webServer(func(ctx context.Context) error { return web.ServeAdmin(ctx, l.admin, h, d.log) }))
	}
	return servers, nil
}

func grpcServer(s *rpc.Server, l net.Listener) server {
	s.Health.SetServingStatus("", healthpb.HealthCheckResponse_NOT_SERVING)
	return server{
		serve: func() error { return s.Serve(l) },
		stop:  s.Shutdown,
		ready: func() { s.Health.SetServingStatus("", healthpb.HealthCheckResponse_SERVING) },
	}
}

func webServer(serve func(context.Context) error) server {
	ctx, cancel := context.WithCancel(context.Background())
	return server{
		serve: func() error { defer cancel(); return serve(ctx) },
		stop:  func(context.Context) { cancel() },
		ready: func() {},
	}
}

// problems is what readiness says.
func (d *daemon) problems() []web.Problem {
	var out []web.Problem
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
	if st := d.policy.Status(); st.Err != nil {
		out = append(out, web.Problem{Reason: "POLICY_STALE", Message: "the policy folder is broken; the last good policy is in force", Warning: true})
	}
	if d.broker.ClockOff() {
		out = append(out, web.Problem{Reason: "CLOCK_OFF", Message: "this clock is behind the newest record of the log", Hint: "check the clock's synchronisation", Warning: true})
	}
	return out
}

func (d *daemon) announce(l *listeners) {
	a := Announcement{ID: d.id.String(), GRPC: l.grpc.Addr().String()}
	if l.public != nil {
		a.Public = l.public.Addr().String()
	}
	if l.admin != nil {
		a.Admin = l.admin.Addr().String()
	}
	if l.breakGlass != nil {
		a.BreakGlass = l.breakGlass.Addr().String()
	}
	d.log.Info("serving", "id", a.ID, "grpc", a.GRPC, "public", a.Public, "admin", a.Admin, "break_glass", a.BreakGlass)
	// Keep the ports over a reopening of the store.
	d.cfg.Listen.GRPC, d.cfg.Listen.Public, d.cfg.Listen.Admin = a.GRPC, a.Public, a.Admin
	if line, err := json.Marshal(a); err == nil {
		fmt.Fprintf(d.out, "%s\n", line)
	}
}

type listeners struct{ grpc, public, admin, breakGlass net.Listener }

func listen(cfg Listen) (_ *listeners, err error) {
	l := &listeners{}
	defer func() {
		if err != nil {
			l.close()
		}
	}()
	for _, at := range []struct {
		addr string
		into *net.Listener
	}{{cfg.GRPC, &l.grpc}, {cfg.Public, &l.public}, {cfg.Admin, &l.admin}} {
		if at.addr == "" {
			continue
		}
		if *at.into, err = net.Listen("tcp", at.addr); err != nil {
			return nil, fmt.Errorf("listening: %w", err)
		}
	}
	if cfg.BreakGlass != "" {
		if l.breakGlass, err = listenUnix(cfg.BreakGlass); err != nil {
			return nil, fmt.Errorf("listening for break-glass: %w", err)
		}
	}
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

func (l *listeners) close() {
	for _, ln := range []net.Listener{l.grpc, l.public, l.admin, l.breakGlass} {
		if ln != nil {
			ln.Close() // a second time for those that a server closed
		}
	}
}
