package verify

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
)

// errorDomain is that of all of dayfly's refusals.
const errorDomain = "dayfly"

// UnaryInterceptor lets only calls with an accepted token through; the handler's context
// carries it (FromContext). The token comes as "authorization" metadata, and the peer
// is that of the mTLS connection (credentials.NewTLS, whose certificates gRPC shows).
// Calls of the public methods ("/grpc.health.v1.Health/Check") need no token.
//
// Refusals are a status with an ErrorInfo, domain "dayfly": UNAUTHENTICATED for a missing
// or bad token, INVALID_ARGUMENT for several, PERMISSION_DENIED for a missing scope, UNAVAILABLE while the verifier
// itself is closed.
func (v *Verifier) UnaryInterceptor(public ...string) grpc.UnaryServerInterceptor {
	return func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
		if slices.Contains(public, info.FullMethod) {
			return handler(ctx, req)
		}
		t, err := v.call(ctx)
		if err != nil {
			return nil, toStatus(err)
		}
		resp, err := handler(NewContext(ctx, t), req)
		return resp, toStatus(err)
	}
}

// StreamInterceptor is UnaryInterceptor for streams. A stream ends, with the refusal as
// its status, when its token is revoked or expires or the verifier closes: the handler's
// context ends, and whatever the handler is doing, the caller hears no more. A handler
// that returns a *Refusal (of RequireScope) has it translated too.
func (v *Verifier) StreamInterceptor(public ...string) grpc.StreamServerInterceptor {
	return func(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
		if slices.Contains(public, info.FullMethod) {
			return handler(srv, ss)
		}
		t, err := v.call(ss.Context())
		if err != nil {
			return toStatus(err)
		}
		ctx, done := v.Watch(NewContext(ss.Context(), t), t)
		return watched(srv, &watchedStream{ss, ctx}, handler, done)
	}
}

// watched runs a handler until it returns or its token dies. The handler has a goroutine
// of its own, since one that waits in RecvMsg is woken only by the end of the call, which
// is when this returns.
func watched(srv any, ss *watchedStream, handler grpc.StreamHandler, done func()) error {
	type outcome struct {
		err      error
		panicked any
	}
	result := make(chan outcome, 1)
	go func() {
		defer done()
		var out outcome
		defer func() {
			if p := recover(); p != nil {
				out.panicked = p
			}
			result <- out
		}()
		out.err = handler(srv, ss)
	}()
	select {
	case out := <-result:
		if out.panicked != nil {
			panic(out.panicked) // where interceptors that recover expect it
		}
		return toStatus(cmpRefusal(ss.ctx, out.err))
	case <-ss.ctx.Done():
	}
	if refusal := refusalOf(ss.ctx); refusal != nil {
		return toStatus(refusal)
	}
	out := <-result // the caller has gone: the handler notices by itself
	if out.panicked != nil {
		panic(out.panicked)
	}
	return toStatus(out.err)
}

// refusalOf returns why a watched context ended, nil if the token is not to blame.
func refusalOf(ctx context.Context) *Refusal {
	var r *Refusal
	if errors.As(context.Cause(ctx), &r) {
		return r
	}
	return nil
}

// cmpRefusal prefers the reason for the end of the context to what the handler made of
// it.
func cmpRefusal(ctx context.Context, err error) error {
	if err != nil {
		if r := refusalOf(ctx); r != nil {
			return r
		}
	}
	return err
}

// A watchedStream gives the handler the context that ends with the token, and takes
// nothing from the caller and sends nothing to it after that.
type watchedStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s *watchedStream) Context() context.Context { return s.ctx }

func (s *watchedStream) SendMsg(m any) error {
	if r := refusalOf(s.ctx); r != nil {
		return toStatus(r)
	}
	return s.ServerStream.SendMsg(m)
}

func (s *watchedStream) RecvMsg(m any) error {
	if r := refusalOf(s.ctx); r != nil {
		return toStatus(r)
	}
	err := s.ServerStream.RecvMsg(m)
	if r := refusalOf(s.ctx); r != nil {
		return toStatus(r)
	}
	return err
}

// call verifies the token of a gRPC call.
func (v *Verifier) call(ctx context.Context) (*Verified, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	raw, err := Bearer(md.Get("authorization"))
	if err != nil {
		return nil, err
	}
	return v.Verify(ctx, raw, v.grpcPeer(ctx))
}

func (v *Verifier) grpcPeer(ctx context.Context) Peer {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return Peer{}
	}
	address := ""
	if p.Addr != nil {
		address = p.Addr.String()
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok {
		return Peer{Address: withoutPort(address)}
	}
	return v.PeerOf(&info.State, address)
}

// toStatus translates refusals; every other error passes.
func toStatus(err error) error {
	var r *Refusal
	if err == nil || !errors.As(err, &r) {
		return err
	}
	return r.GRPCStatus().Err()
}

// GRPCStatus is the refusal as gRPC tells it, with an ErrorInfo: status.FromError finds it.
func (r *Refusal) GRPCStatus() *status.Status {
	st := status.New(grpcCode(r.Reason), r.Message)
	info := &errdetails.ErrorInfo{Domain: errorDomain, Reason: string(r.Reason), Metadata: map[string]string{}}
	if r.Hint != "" {
		info.Metadata["hint"] = r.Hint
	}
	if r.By != 0 {
		info.Metadata["revocation"] = fmt.Sprint(r.By)
	}
	if detailed, err := st.WithDetails(info); err == nil {
		st = detailed
	}
	return st
}

func grpcCode(reason Reason) codes.Code {
	switch reason {
	case RequestInvalid:
		return codes.InvalidArgument
	case ScopeMissing:
		return codes.PermissionDenied
	case VerifierStale, VerifierForked:
		return codes.Unavailable
	}
	return codes.Unauthenticated
}
