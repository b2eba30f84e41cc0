// Package brokerd wires a broker from its configuration: what the daemon
// dayfly-broker, and "dayfly dev" and "dayfly demo", run.
package brokerd

import (
	"context"
	"crypto/tls"
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
	"github.com/dayflyhq/dayfly/broker/attest"
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
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
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
	GRPCJWT    string `json:"grpc_jwt,omitempty"`
	Public     string `json:"public,omitempty"`
	HTTPSSVID  string `json:"https_svid,omitempty"`
	HTTPS      string `json:"https,omitempty"`
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
	jwts := &jwtBundles{addr: cfg.WorkloadAPI, log: log}
	go func() {
		var both errgroup.Group
		both.Go(func() error { return identity.Run(asking) })
		both.Go(func() error { return jwts.run(asking) })
		asked <- both.Wait()
	}()
	defer func() { stop(); <-asked }() // after the last call has returned
	ring, err := newKeyring(&cfg, identity, log)
	if err != nil {
		return err
	}
	var patience time.Duration // with a process that has the store; 0: the store's own
	if cfg.TakeOver {
		if err := takeOver(ctx, &cfg, ring, identity, log); err != nil {
			return ended(ctx, err, log)
		}
		patience = cfg.ShutdownGrace + stopTimeout
	}
	ctx, yield := context.WithCancel(ctx) // ends too when another process takes over
	defer yield()
	for {
		d := &daemon{cfg: &cfg, log: log, audit: audit, svids: identity, jwts: jwts, ring: ring, out: out, stop: yield, patience: patience}
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
	jwts  *jwtBundles
	ring  *keyring
	out   io.Writer
	stop  func() // ends the process, as SIGTERM does
	// patience is how long another process may keep the store; 0: as long as the store
	// allows by itself.
	patience time.Duration

	id       spiffeid.ID // of the first SVID; set before keys are checked
	store    *boltstore.Store
	policy   *policy.Policy
	broker   *broker.Broker
	registry *prometheus.Registry
	metrics  *metrics
	traces   traces
	web      *webCertificate // nil: no listener with one
}

func (d *daemon) run(ctx context.Context) (err error) {
	if err := d.open(ctx); err != nil {
		return ended(ctx, err, d.log)
	}
	// Last of all: everything that may still write has ended by then.
	defer func() { err = errors.Join(err, d.store.Close()) }()
	if err := d.assemble(ctx); err != nil {
		return ended(ctx, err, d.log)
	}
	return d.serve(ctx)
}

func (d *daemon) open(ctx context.Context) error {
	d.registry = prometheus.NewRegistry()
	d.registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	d.metrics = newMetrics(d.registry)
	source, err := d.cfg.policySource(d.svids)
	if err != nil {
		return err
	}
	source.Log, source.OnReload = d.log, d.metrics.policyReloaded
	if d.policy, err = policy.Open(ctx, source); err != nil {
		return fmt.Errorf("loading policy: %w", err)
	}
	if d.traces, err = newTraces(ctx, d.cfg.Traces); err != nil {
		return err
	}
	d.store, err = boltstore.Open(boltstore.Config{Path: d.cfg.Store, LockTimeout: d.patience, Log: d.log, OnCommit: d.metrics.committed})
	return err
}

func (d *daemon) assemble(ctx context.Context) error {
	var err error
	d.broker, err = broker.New(broker.Config{
		Issuer: d.cfg.Issuer, Store: d.store, Policy: decider{d.policy}, MaxTTL: d.cfg.MaxTTL, MaxRevocations: d.cfg.MaxRevocations,
		Signer: d.ring.signer,
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
	d.ring.publishTo(d.broker.PublishKey)
	d.metrics.watch(d.broker, d.store)
	d.metrics.watchPolicy(d.policy.Status)
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
	svid, err := awaitSVID(r.edge, d.svids, d.log)
	if err != nil {
		return err
	}
	d.id = svid.ID
	if err := d.broker.CheckKeys(r.edge); err != nil {
		return fmt.Errorf("checking the signing keys on record: %w", err)
	}
	serving, err := d.startPublic(r)
	if err != nil {
		return err
	}
	if err := d.ring.begin(r.edge, d.broker); err != nil {
		return fmt.Errorf("publishing the first signing key: %w", err)
	}
	r.group.Go(func() error { return d.ring.Run(r.core) })
	r.group.Go(func() error { return d.watchKeys(r.core) })
	r.group.Go(func() error { return d.watchSVID(r.core) })
	serving()
	d.announce()
	return nil
}

// awaitSVID returns the first SVID once the Workload API has given it.
func awaitSVID(ctx context.Context, svids *agent.Identity, log *slog.Logger) (*x509svid.SVID, error) {
	for {
		changed := svids.Changed()
		if svid, err := svids.GetX509SVID(); err == nil {
			return svid, nil
		}
		log.InfoContext(ctx, "waiting for an SVID from the workload api")
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// watchKeys tells the ring of its revoked keys; it makes new ones.
func (d *daemon) watchKeys(ctx context.Context) error {
	for {
		changed := d.broker.Changed()
		for _, id := range d.ring.Own() {
			if d.broker.KeyRevoked(id) && d.ring.Revoked(id) {
				d.log.WarnContext(ctx, "a signing key is revoked", "key", id.String())
			}
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
		glass, err := rpc.NewBreakGlass(rpc.Config{Broker: d.broker, Log: d.log, Backup: d.beginBackup, Handover: d.handover()})
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
	domains := append([]spiffeid.TrustDomain{d.id.TrustDomain()}, d.cfg.TrustDomains...)
	told := &unproven{log: d.log, count: d.metrics.unproven, now: time.Now, since: time.Now()}
	cfg := rpc.Config{
		Unproven: told.at("grpc"), Broker: d.broker, SVIDs: d.svids, Bundle: d.svids, BundlesChanged: d.svids.Changed, Log: d.log, Options: d.traces.serverOptions(),
		TrustDomains: domains,
	}
	main, err := rpc.NewServer(cfg)
	if err != nil {
		return nil, err
	}
	servers := []*rpc.Server{main}
	if err := d.startGRPC(r, main, &d.cfg.Listen.GRPC); err != nil {
		return nil, err
	}
	d.metrics.watchConnections(main)
	if d.cfg.Listen.GRPCJWT != "" {
		cfg.Unproven = told.at("grpc_jwt")
		proxied, err := d.proxied(cfg)
		if err != nil {
			return nil, err
		}
		servers = append(servers, proxied)
		if err := d.startGRPC(r, proxied, &d.cfg.Listen.GRPCJWT); err != nil {
			return nil, err
		}
	}
	serving = func() {
		for _, s := range servers {
			s.Health.SetServingStatus("", healthpb.HealthCheckResponse_SERVING)
		}
	}
	return serving, d.startWeb(r, domains, told.at("http"))
}

func (d *daemon) startGRPC(r *running, s *rpc.Server, addr *string) error {
	s.Health.SetServingStatus("", healthpb.HealthCheckResponse_NOT_SERVING)
	l, err := listenTCP(addr)
	if err != nil {
		return err
	}
	r.start(grpcServer(s, l))
	return nil
}

// proxied is the gRPC server for callers with a JWT-SVID.
func (d *daemon) proxied(cfg rpc.Config) (*rpc.Server, error) {
	for _, td := range d.cfg.GRPCJWTTrustDomains {
		if !slices.Contains(cfg.TrustDomains, td) {
			return nil, fmt.Errorf("grpc_jwt_trust_domains: %s is neither the broker's own trust domain nor one of trust_domains", td.Name())
		}
	}
	cfg.TrustDomains, cfg.JWT = d.cfg.GRPCJWTTrustDomains, d.jwts
	return rpc.NewJWTServer(cfg)
}

// startWeb serves the public documents and OAuth.
func (d *daemon) startWeb(r *running, domains []spiffeid.TrustDomain, told func(attest.Failure)) error {
	attestor, err := attest.New(attest.Config{X509: d.svids, JWT: d.jwts, TrustDomains: domains, Audience: d.cfg.Issuer})
	if err != nil {
		return err
	}
	h, err := web.Public(web.PublicConfig{
		Issuer: d.cfg.Issuer, Keys: d.broker.Keys, Algorithm: d.cfg.Algorithm, JWKSMaxAge: d.cfg.JWKSMaxAge, Broker: d.broker, Attestor: attestor, MutualTLS: d.cfg.MutualTLSURL,
		Unproven: told, TracerProvider: d.traces.tracer(), Log: d.log,
	})
	if err != nil {
		return err
	}
	at := &d.cfg.Listen
	if at.HTTPS != "" {
		if d.web, err = newWebCertificate(at.HTTPSCertificate, at.HTTPSKey, d.log); err != nil {
			return err
		}
		r.group.Go(func() error { return d.web.run(r.core, webCertificateEvery) })
	}
	for _, listener := range []struct {
		addr *string
		tls  func() *tls.Config
	}{
		{&at.Public, func() *tls.Config { return nil }},
		{&at.HTTPSSVID, func() *tls.Config { return tlsconfig.TLSServerConfig(d.svids) }},
		{&at.HTTPS, func() *tls.Config { return &tls.Config{GetCertificate: d.web.get} }},
	} {
		if *listener.addr == "" {
			continue
		}
		l, err := listenTCP(listener.addr)
		if err != nil {
			return err
		}
		cfg := listener.tls()
		if cfg != nil {
			attest.OptionalTLS(cfg)
		}
		r.start(webServer(func(ctx context.Context) error { return web.ServeTLS(ctx, l, cfg, h, d.log) }))
	}
	return nil
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
	switch s, ok := d.ring.Current(); {
	case !ok:
		out = append(out, web.Problem{Reason: "NO_SIGNING_KEY", Message: "no signing key is published"})
	case s.SpreadIn > 0:
		out = append(out, web.Problem{
			Reason:  broker.ErrKeyNotSpread.Reason,
			Message: fmt.Sprintf("external audiences get no token for another %s: copies of the JWK set may be in use without the signing key", s.SpreadIn.Round(time.Second)),
			Hint:    "it passes by itself; for a restart without it see docs/operations.md, A planned restart", Warning: true,
		})
	}
	switch st := d.policy.Status(); {
	case st.Generation == 0:
		out = append(out, web.Problem{Reason: broker.ErrNoPolicy.Reason, Message: broker.ErrNoPolicy.Message, Hint: broker.ErrNoPolicy.Hint})
	case st.Err != nil:
		out = append(out, web.Problem{Reason: "POLICY_STALE", Message: "what the source of policy has can't be taken; the last good policy is in force", Hint: "the log says what is wrong with it", Warning: true})
	}
	if d.web != nil {
		if what := d.web.problem(time.Now()); what != "" {
			out = append(out, web.Problem{Reason: "WEB_CERTIFICATE", Message: what, Hint: "renew the files of listen.https_certificate and listen.https_key: they are read again by themselves", Warning: true})
		}
	}
	if d.broker.ClockOff() {
		out = append(out, web.Problem{Reason: "CLOCK_OFF", Message: "this clock is behind the newest record of the log", Hint: "check the clock's synchronisation", Warning: true})
	}
	return out
}

func (d *daemon) announce() {
	at := d.cfg.Listen
	a := Announcement{ID: d.id.String(), GRPC: at.GRPC, GRPCJWT: at.GRPCJWT, Public: at.Public, HTTPSSVID: at.HTTPSSVID, HTTPS: at.HTTPS, Admin: at.Admin, BreakGlass: at.BreakGlass}
	d.log.Info("serving", "id", a.ID, "grpc", a.GRPC, "grpc_jwt", a.GRPCJWT, "public", a.Public, "https_svid", a.HTTPSSVID, "https", a.HTTPS, "admin", a.Admin, "break_glass", a.BreakGlass)
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
