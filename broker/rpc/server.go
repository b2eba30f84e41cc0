package rpc

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"runtime"
	"strings"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/broker/attest"
	"github.com/dayflyhq/dayfly/broker/gate"
	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/reflection"
	"google.golang.org/protobuf/proto"
)

// Limits of the transport.
const (
	// MaxRequestBytes is the largest message that a caller may send.
	MaxRequestBytes = 64 << 10
	// maxReceiveBytes is how much of a larger one is read, so that its refusal can have
	// a reason: beyond it gRPC itself answers ResourceExhausted, before any code of ours
	// sees the call. Each stream can make the broker hold that much, so it is no more.
	maxReceiveBytes = 256 << 10
	// connectionWindow is how much a connection may send unread.
	connectionWindow = 1 << 20
	// maxStreamsPerConnection bounds the calls under way on one connection.
	maxStreamsPerConnection = 1024
	handshakeTimeout        = 10 * time.Second
	// callTimeout is what a call gets when the caller sets no deadline or a later one.
	callTimeout = 15 * time.Second
)

// Config says what to serve and to whom.
type Config struct {
	Broker *broker.Broker
	SVIDs  x509svid.Source   // the broker's own identity
	Bundle x509bundle.Source // of all trust domains served
	// JWT has the authorities of JWT-SVIDs, for NewJWTServer alone.
	JWT jwtbundle.Source
	// BundlesChanged returns a channel that is closed when a bundle changes next, so that
	// streams of those it no longer vouches for end at once. Nil: they end at their next
	// beat or delivery.
	BundlesChanged func() <-chan struct{}
	// TrustDomains whose identities may connect: the broker's own and those federated
	// by configuration. At least one.
	TrustDomains []spiffeid.TrustDomain
	Log          *slog.Logger
	Now          func() time.Time
	// Backup begins a backup, over the break-glass socket; nil: there is none to have.
	Backup func() (Backup, error)
	// Handover lets the next process take over, over the break-glass socket; nil: none can.
	Handover *Handover
	// Unproven is told of each call whose client hasn't proved who it is. Nil: nobody is.
	Unproven func(attest.Failure)
	// Options are added to the gRPC server: a stats handler for metrics and traces.
	Options []grpc.ServerOption
}

// A Server serves one broker.
type Server struct {
	*grpc.Server
	Health *health.Server

	open       *gate.Proven // nil for break-glass and JWTs, as
	handshakes *gate.Gate
	line       *gate.Line
	stop       context.CancelFunc
}

// NewServer makes the server for workloads, verifiers and operators: mTLS only.
func NewServer(cfg Config) (*Server, error) {
	if cfg.Broker == nil || cfg.SVIDs == nil || cfg.Bundle == nil || len(cfg.TrustDomains) == 0 {
		return nil, errors.New("rpc: Broker, SVIDs, Bundle and TrustDomains are required")
	}
	cfg.setDefaults()
	auth, err := attest.New(attest.Config{X509: cfg.Bundle, TrustDomains: cfg.TrustDomains, Now: cfg.Now})
	if err != nil {
		return nil, err
	}
	h := &handlers{broker: cfg.Broker, log: cfg.Log, now: cfg.Now, caller: telling(cfg.Unproven, attest.MethodX509, certified(auth)), bundlesChanged: cfg.BundlesChanged}
	creds := newTransport(auth, cfg.SVIDs)
	srv := h.server(append(cfg.Options, grpc.Creds(creds)))
	srv.open, srv.handshakes, srv.line = creds.open, creds.handshakes, creds.line
	dayflyv1.RegisterTokenServiceServer(srv.Server, &tokenService{handlers: h})
	dayflyv1.RegisterFeedServiceServer(srv.Server, &feedService{handlers: h})
	dayflyv1.RegisterRevocationServiceServer(srv.Server, &revocationService{handlers: h})
	dayflyv1.RegisterGrantServiceServer(srv.Server, &grantService{handlers: h})
	reflection.Register(srv.Server)
	return srv, nil
}

// NewJWTServer makes the server for workloads whose mTLS ends before the broker: TLS with
// the broker's SVID, and in each call a JWT-SVID in its metadata. Whoever reads one on its
// way can show it too, so credentials can be had here, and nothing else: no feed, and no
// operator's call.
func NewJWTServer(cfg Config) (*Server, error) {
	if cfg.Broker == nil || cfg.SVIDs == nil || cfg.Bundle == nil || cfg.JWT == nil || len(cfg.TrustDomains) == 0 {
		return nil, errors.New("rpc: Broker, SVIDs, Bundle, JWT and TrustDomains are required")
	}
	cfg.setDefaults()
	auth, err := attest.New(attest.Config{X509: cfg.Bundle, JWT: cfg.JWT, TrustDomains: cfg.TrustDomains, Audience: cfg.Broker.Issuer(), Now: cfg.Now})
	if err != nil {
		return nil, err
	}
	h := &handlers{broker: cfg.Broker, log: cfg.Log, now: cfg.Now, caller: telling(cfg.Unproven, attest.MethodJWT, bearer(auth)), bundlesChanged: cfg.BundlesChanged}
	// Fixed windows: those that grow with what arrives grow with what a stranger sends.
	srv := h.server(append(cfg.Options, grpc.Creds(newJWTTransport(cfg.SVIDs)), grpc.InitialWindowSize(strangersWindow), grpc.InitialConnWindowSize(strangersWindow)), grpc.MaxConcurrentStreams(maxStreamsOfStranger), grpc.MaxRecvMsgSize(MaxRequestBytes))
	dayflyv1.RegisterTokenServiceServer(srv.Server, &tokenService{handlers: h})
	return srv, nil
}

func (cfg *Config) setDefaults() {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Unproven == nil {
		cfg.Unproven = func(attest.Failure) {}
	}
	if cfg.BundlesChanged == nil {
		cfg.BundlesChanged = func() <-chan struct{} { return nil }
	}
}

// telling tells of the calls whose client can't be proved.
func telling(told func(attest.Failure), method string, caller func(context.Context) (broker.Caller, error)) func(context.Context) (broker.Caller, error) {
	return func(ctx context.Context) (broker.Caller, error) {
		c, err := caller(ctx)
		if err != nil {
			var from netip.AddrPort
			if p, ok := peer.FromContext(ctx); ok {
				from = addressOf(p)
			}
			told(attest.FailureOf(from, method, err))
		}
		return c, err
	}
}

// handlers is what all services share.
type handlers struct {
	broker *broker.Broker
	log    *slog.Logger
	now    func() time.Time
	caller func(context.Context) (broker.Caller, error)
	// bundlesChanged must be asked before caller, or a change between the two is missed.
	bundlesChanged func() <-chan struct{}
	// serving ends when the server begins to stop.
	serving context.Context
	stop    context.CancelFunc
	calls   warm
}

func (h *handlers) server(options []grpc.ServerOption, more ...grpc.ServerOption) *Server {
	h.serving, h.stop = context.WithCancel(context.Background())
	options = append([]grpc.ServerOption{ // some have others
		grpc.ConnectionTimeout(handshakeTimeout),
		// Fixed windows: to find out how far they could grow gRPC answers each message that
		// comes by itself with a ping, which is half of what a receipt costs.
		grpc.StaticStreamWindowSize(maxReceiveBytes), grpc.StaticConnWindowSize(connectionWindow),
	}, options...)
	options = append(options,
		grpc.MaxRecvMsgSize(maxReceiveBytes),
		grpc.MaxConcurrentStreams(maxStreamsPerConnection),
		// Most connections are verifiers' and idle: 32 KiB for each would be half of what
		// they take. TLS has read whole records, so reading from it costs no call.
		grpc.ReadBufferSize(0),
		grpc.WaitForHandlers(true),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: time.Minute, Timeout: 20 * time.Second}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: true}),
		grpc.ChainUnaryInterceptor(h.unary),
		grpc.ChainStreamInterceptor(h.stream),
	)
	options = append(options, more...)
	srv := &Server{Server: grpc.NewServer(options...), Health: health.NewServer(), stop: h.stop}
	healthpb.RegisterHealthServer(srv.Server, srv.Health)
	return srv
}

// Serve accepts connections until the listener is closed, each in its turn.
func (s *Server) Serve(l net.Listener) error {
	if s.line != nil {
		l = s.line.Listen(l)
	}
	return s.Server.Serve(l)
}

// Shutdown finishes what was promised: it says NOT_SERVING, ends the feed's streams,
// lets calls under way return until ctx ends, and then cuts what is left. Safe twice.
func (s *Server) Shutdown(ctx context.Context) {
	s.Health.Shutdown()
	s.stop()
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.GracefulStop()
	}()
	select {
	case <-done:
	case <-ctx.Done():
		s.Stop()
		<-done
	}
}

// unary runs a call on a goroutine whose stack is deep already.
func (h *handlers) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (resp any, err error) {
	h.calls.do(func() { resp, err = h.call(ctx, req, info, next) })
	return resp, err
}

func (h *handlers) call(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (resp any, err error) {
	defer func() { err = h.finish(ctx, info.FullMethod, recover(), err) }()
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	if err := fits(req); err != nil {
		return nil, err
	}
	return next(ctx, req)
}

func (h *handlers) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) (err error) {
	defer func() { err = h.finish(ss.Context(), info.FullMethod, recover(), err) }()
	return next(srv, &fitting{ss})
}

var errRequestTooLarge = &broker.Refusal{
	Kind: broker.Invalid, Reason: "REQUEST_TOO_LARGE",
	Message: "the message is larger than 64 KiB",
	Hint:    "ask for less: a token has at most 32 scopes, a revocation 64 selectors",
}

// fits refuses a message that is larger than a caller may send.
func fits(m any) error {
	if p, ok := m.(proto.Message); ok && proto.Size(p) > MaxRequestBytes {
		return errRequestTooLarge
	}
	return nil
}

// fitting is a stream of messages that fit.
type fitting struct{ grpc.ServerStream }

func (s *fitting) RecvMsg(m any) error {
	if err := s.ServerStream.RecvMsg(m); err != nil {
		return err
	}
	return fits(m)
}

// finish translates an error, or a panic, which ends one call and not the process.
func (h *handlers) finish(ctx context.Context, method string, panicked any, err error) error {
	if panicked != nil {
		err = panicError(panicked)
	}
	return toStatus(ctx, h.log, method, err)
}

// panicError is what is said of a panic that was just recovered: its value might hold a
// request.
func panicError(panicked any) error {
	return fmt.Errorf("panic: %T at %s", panicked, panickedAt())
}

// panickedAt says where a panic that was just recovered began, innermost first: functions
// and lines, no arguments.
func panickedAt() string {
	var pcs [64]uintptr
	frames := runtime.CallersFrames(pcs[:runtime.Callers(2, pcs[:])])
	var out []string
	for panicking, more := false, true; more && len(out) < 8; {
		var f runtime.Frame
		f, more = frames.Next()
		if panicking && !strings.HasPrefix(f.Function, "runtime.") {
			out = append(out, fmt.Sprintf("%s:%d", f.Function, f.Line))
		}
		panicking = panicking || f.Function == "runtime.gopanic"
	}
	return strings.Join(out, " < ")
}

// operator proves an operator who wants to read.
func (h *handlers) operator(ctx context.Context, action broker.Action) (broker.Caller, error) {
	c, err := h.caller(ctx)
	if err != nil {
		return c, err
	}
	return c, h.broker.May(ctx, c, action)
}
