package agent

import (
	"context"
	"fmt"
	"net"
	"slices"
	"strings"

	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/protobuf/proto"
)

// A door decides by the kernel's peer credentials. Without a list, whom the socket's
// mode lets connect is let in.
type door struct{ uids []uint32 }

// admit returns nil or a refusal.
func (d door) admit(conn net.Conn) error {
	if len(d.uids) == 0 {
		return nil
	}
	uid, err := peerUID(conn)
	if err != nil {
		return refuse(codes.PermissionDenied, "PEER_UNKNOWN", "the kernel doesn't say who is calling", "the agent checks uids on Linux only")
	}
	if !slices.Contains(d.uids, uid) {
		return refuse(codes.PermissionDenied, "PEER_NOT_ALLOWED", fmt.Sprintf("user %d may not use this socket", uid), "add the uid to allowed_uids of the agent's configuration")
	}
	return nil
}

// localPeer is what the handshake found out about a connection.
type localPeer struct {
	credentials.CommonAuthInfo
	refusal error
}

// AuthType names the scheme.
func (localPeer) AuthType() string { return "unix-peer" }

// peerCredentials are gRPC's way to look at a connection. A refused peer is let through
// the handshake, so that its call gets a precise answer instead of a broken pipe.
type peerCredentials struct{ door door }

var _ credentials.TransportCredentials = peerCredentials{}

func (c peerCredentials) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return conn, localPeer{
		CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity},
		refusal:        c.door.admit(conn),
	}, nil
}

func (peerCredentials) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	panic("internal error: the agent's socket credentials dial nobody")
}

func (peerCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "unix-peer"}
}
func (c peerCredentials) Clone() credentials.TransportCredentials { return c }
func (peerCredentials) OverrideServerName(string) error           { return nil }

func admitted(ctx context.Context) error {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return refuse(codes.PermissionDenied, "PEER_UNKNOWN", "no peer", "")
	}
	local, ok := p.AuthInfo.(localPeer)
	if !ok {
		return refuse(codes.PermissionDenied, "PEER_UNKNOWN", "no peer credentials", "")
	}
	return local.refusal
}

// countUnary counts what is asked of the TokenService.
func (a *Agent) countUnary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
	resp, err := handle(ctx, req)
	if strings.HasPrefix(info.FullMethod, "/"+dayflyv1.TokenService_ServiceDesc.ServiceName+"/") {
		a.CountRequest(ListenerGRPC, err)
	}
	return resp, err
}

func admitUnary(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
	if err := admitted(ctx); err != nil {
		return nil, err
	}
	if err := fits(req); err != nil {
		return nil, err
	}
	return handle(ctx, req)
}

func admitStream(srv any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, handle grpc.StreamHandler) error {
	if err := admitted(stream.Context()); err != nil {
		return err
	}
	return handle(srv, &fitting{stream})
}

// fits refuses a message that is larger than a caller may send.
func fits(m any) error {
	if p, ok := m.(proto.Message); ok && proto.Size(p) > MaxRequestBytes {
		return tooLarge()
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
