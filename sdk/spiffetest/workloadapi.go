package spiffetest

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"
)

// maxSocketPath is the longest path of a unix socket that works everywhere: Linux
// has 108 bytes with the final zero, macOS and the BSDs 104.
const maxSocketPath = 103

// securityHeader must accompany every call, so that no web page can be tricked
// into making one.
const securityHeader = "workload.spiffe.io"

// socket is the Workload API of one identity on one path, which may stop and
// start.
type socket struct {
	path string
	api  workload.SpiffeWorkloadAPIServer
	log  *slog.Logger

	mu      sync.Mutex // held over starting and stopping, so neither sees half of the other
	started bool       // ever
	server  *grpc.Server
	done    chan struct{} // closed when server has ended
}

func newSocket(path string, api workload.SpiffeWorkloadAPIServer, log *slog.Logger) *socket {
	return &socket{path: path, api: api, log: log}
}

func (s *socket) addr() string { return "unix://" + s.path }

// startFirst starts a socket that was never started.
func (s *socket) startFirst() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.started {
		return nil
	}
	return s.startLocked()
}

func (s *socket) start() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.startLocked()
}

func (s *socket) startLocked() error {
	if s.server != nil {
		return nil
	}
	if len(s.path) > maxSocketPath {
		return fmt.Errorf("socket path %s has %d bytes, at most %d work: set Config.Dir or TMPDIR to a shorter one",
			s.path, len(s.path), maxSocketPath)
	}
	listener, err := net.Listen("unix", s.path)
	if err != nil {
		return err
	}
	if err := os.Chmod(s.path, 0o600); err != nil {
		return errors.Join(err, listener.Close())
	}
	// Stop returns when the handlers have, so that nothing outlives Close.
	server := grpc.NewServer(grpc.WaitForHandlers(true))
	workload.RegisterSpiffeWorkloadAPIServer(server, s.api)
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := server.Serve(listener); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			s.log.Error("serving the Workload API", "error", err)
		}
	}()
	s.started, s.server, s.done = true, server, done
	return nil
}

// stop ends the server and waits for it. The listener removes its socket file.
func (s *socket) stop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.server == nil {
		return
	}
	s.server.Stop()
	<-s.done
	s.server, s.done = nil, nil
}

// server answers the Workload API for one identity. WIT-SVIDs are answered
// Unimplemented, which clients take for an issuer that has none.
type server struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
	td    *TrustDomain
	ident *identity
}

// FetchX509SVID sends the SVID and all bundles, and again at every change.
func (s *server) FetchX509SVID(_ *workload.X509SVIDRequest, stream grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	return follow(s, stream, s.x509SVIDResponse)
}

// FetchX509Bundles sends the X.509 authorities of this and of all federated trust
// domains, and again at every change.
func (s *server) FetchX509Bundles(_ *workload.X509BundlesRequest, stream grpc.ServerStreamingServer[workload.X509BundlesResponse]) error {
	return follow(s, stream, func() (*workload.X509BundlesResponse, error) {
		bundles := s.federatedX509()
		bundles[s.td.cfg.TrustDomain.IDString()] = rawAuthorities(s.td.x509Bundle())
		return &workload.X509BundlesResponse{Bundles: bundles}, nil
	})
}

// FetchJWTBundles sends the JWT authorities of this and of all federated trust
// domains as JWKS, and again at every change.
func (s *server) FetchJWTBundles(_ *workload.JWTBundlesRequest, stream grpc.ServerStreamingServer[workload.JWTBundlesResponse]) error {
	return follow(s, stream, s.jwtBundlesResponse)
}

// FetchJWTSVID mints a JWT-SVID for the audiences asked for.
func (s *server) FetchJWTSVID(ctx context.Context, req *workload.JWTSVIDRequest) (*workload.JWTSVIDResponse, error) {
	if err := s.admit(ctx); err != nil {
		return nil, err
	}
	if len(req.GetAudience()) == 0 {
		return nil, status.Error(codes.InvalidArgument, "audience must be specified")
	}
	if want := req.GetSpiffeId(); want != "" && want != s.ident.id.String() {
		return nil, errNoIdentity()
	}
	token, err := s.td.IssueJWTSVID(s.ident.id, req.GetAudience(), SVIDOptions{})
	if err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	return &workload.JWTSVIDResponse{Svids: []*workload.JWTSVID{{
		SpiffeId: s.ident.id.String(),
		Svid:     token,
	}}}, nil
}

// ValidateJWTSVID checks a JWT-SVID of this or a federated trust domain.
func (s *server) ValidateJWTSVID(ctx context.Context, req *workload.ValidateJWTSVIDRequest) (*workload.ValidateJWTSVIDResponse, error) {
	if err := s.admit(ctx); err != nil {
		return nil, err
	}
	if req.GetAudience() == "" {
		return nil, status.Error(codes.InvalidArgument, "audience must be specified")
	}
	id, claims, err := validateJWTSVID(req.GetSvid(), req.GetAudience(), s.td, s.td.cfg.Now)
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "JWT-SVID refused: %v", err)
	}
	fields, err := structpb.NewStruct(claims)
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "JWT-SVID refused: %v", err)
	}
	return &workload.ValidateJWTSVIDResponse{SpiffeId: id.String(), Claims: fields}, nil
}

// admit refuses a call without the security header, and a denied identity.
func (s *server) admit(ctx context.Context) error {
	if err := checkHeader(ctx); err != nil {
		return err
	}
	s.td.mu.Lock()
	defer s.td.mu.Unlock()
	if s.ident.denied {
		return errNoIdentity()
	}
	return nil
}

func checkHeader(ctx context.Context) error {
	md, _ := metadata.FromIncomingContext(ctx)
	if values := md.Get(securityHeader); len(values) != 1 || values[0] != "true" {
		return status.Errorf(codes.InvalidArgument, "security header %q missing from request", securityHeader)
	}
	return nil
}

func errNoIdentity() error {
	return status.Error(codes.PermissionDenied, "no identity issued")
}

// follow sends what build makes, then again whenever that has become something
// else, until the stream ends or its identity is denied. build is called with
// TrustDomain.mu held.
func follow[M proto.Message](s *server, stream interface {
	Send(M) error
	Context() context.Context
}, build func() (M, error)) error {
	if err := checkHeader(stream.Context()); err != nil {
		return err
	}
	var last proto.Message
	for {
		next, changed, err := snapshot(s, build)
		if err != nil {
			return err
		}
		if last == nil || !proto.Equal(last, next) {
			if err := stream.Send(next); err != nil {
				return err
			}
			last = next
		}
		select {
		case <-changed:
		case <-stream.Context().Done():
			return status.FromContextError(stream.Context().Err()).Err()
		}
	}
}

// snapshot builds an answer and says what to wait for before the next one.
func snapshot[M proto.Message](s *server, build func() (M, error)) (answer M, changed <-chan struct{}, err error) {
	s.td.mu.Lock()
	defer s.td.mu.Unlock()
	if s.ident.denied && len(s.ident.others) == 0 {
		return answer, nil, errNoIdentity()
	}
	answer, err = build()
	if errors.Is(err, ErrDenied) {
		return answer, nil, errNoIdentity()
	}
	if err != nil {
		return answer, nil, status.Error(codes.Internal, err.Error())
	}
	return answer, s.ident.changed, nil
}

// x509SVIDResponse needs TrustDomain.mu.
func (s *server) x509SVIDResponse() (*workload.X509SVIDResponse, error) {
	out := &workload.X509SVIDResponse{FederatedBundles: s.federatedX509()}
	for _, ident := range append([]*identity{s.ident}, s.ident.others...) {
		svid, err := s.td.current(ident)
		if errors.Is(err, ErrDenied) {
			continue
		}
		if err != nil {
			return nil, err
		}
		chain, key, err := svid.MarshalRaw()
		if err != nil {
			return nil, err
		}
		out.Svids = append(out.Svids, &workload.X509SVID{
			SpiffeId:    svid.ID.String(),
			X509Svid:    chain,
			X509SvidKey: key,
			Bundle:      rawAuthorities(s.td.x509Bundle()),
		})
	}
	if len(out.Svids) == 0 {
		return nil, ErrDenied
	}
	return out, nil
}

// jwtBundlesResponse needs TrustDomain.mu.
func (s *server) jwtBundlesResponse() (*workload.JWTBundlesResponse, error) {
	own, err := s.td.jwt.bundle(s.td.cfg.TrustDomain).Marshal()
	if err != nil {
		return nil, err
	}
	bundles := map[string][]byte{s.td.cfg.TrustDomain.IDString(): own}
	for name, b := range s.td.federatedJWT {
		if bundles[name.IDString()], err = b.Marshal(); err != nil {
			return nil, err
		}
	}
	return &workload.JWTBundlesResponse{Bundles: bundles}, nil
}

// federatedX509 needs TrustDomain.mu.
func (s *server) federatedX509() map[string][]byte {
	bundles := make(map[string][]byte, len(s.td.federatedX509)+1)
	for name, b := range s.td.federatedX509 {
		bundles[name.IDString()] = rawAuthorities(b)
	}
	return bundles
}

// rawAuthorities concatenates the DER certificates of a bundle, the Workload
// API's form of one.
func rawAuthorities(b *x509bundle.Bundle) []byte {
	var raw []byte
	for _, cert := range b.X509Authorities() {
		raw = append(raw, cert.Raw...)
	}
	return raw
}
