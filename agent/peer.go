package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"

	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/protobuf/proto"
)

// Allow says who may call, by the kernel's word (Linux). Every list that isn't empty must
// let the caller pass; without any, whom the socket's mode lets connect may call.
type Allow struct {
	// UIDs are users, and GIDs groups, the caller's own or those that it is in beside.
	UIDs, GIDs []uint32
	// Executables are the absolute paths of programs: the caller runs one of these very
	// files. Needs Linux 6.5.
	Executables []string
}

// Validate says what is wrong, whatever is on this host.
func (a *Allow) Validate() error {
	var errs []error
	if len(a.Executables) > maxExecutables {
		errs = append(errs, fmt.Errorf("executables: are at most %d: each is looked at with every call", maxExecutables))
	}
	for _, path := range a.Executables {
		if !filepath.IsAbs(path) || filepath.Clean(path) != path {
			errs = append(errs, fmt.Errorf("executables: %q must be absolute and plain", path))
		}
	}
	return errors.Join(errs...)
}

const maxExecutables = 64

// A door decides by the kernel's peer credentials. It is asked with each call and not only
// with each connection: lists change, and so may the program that holds the connection.
type door struct{ allow atomic.Pointer[Allow] }

func newDoor(a Allow) *door {
	d := &door{}
	d.allow.Store(&a)
	return d
}

// admit returns nil or a refusal.
func (d *door) admit(conn net.Conn) error {
	allow := d.allow.Load()
	if len(allow.UIDs) > 0 {
		uid, err := peerUID(conn)
		if err != nil {
			return unknownPeer(err)
		}
		if !slices.Contains(allow.UIDs, uid) {
			return refuse(codes.PermissionDenied, "PEER_NOT_ALLOWED", fmt.Sprintf("user %d may not use this socket", uid), "allowed_uids, allowed_gids and allowed_executables of the agent's configuration say who may")
		}
	}
	if len(allow.GIDs) > 0 {
		gids, err := peerGIDs(conn)
		if err != nil {
			return unknownPeer(err)
		}
		if !slices.ContainsFunc(gids, func(gid uint32) bool { return slices.Contains(allow.GIDs, gid) }) {
			return refuse(codes.PermissionDenied, "PEER_NOT_ALLOWED", fmt.Sprintf("no group of the caller's may use this socket; it is in %v", gids), "allowed_uids, allowed_gids and allowed_executables of the agent's configuration say who may")
		}
	}
	if len(allow.Executables) > 0 {
		running, err := peerExecutable(conn)
		if err != nil {
			return unknownPeer(err)
		}
		if err := running.among(allow.Executables); err != nil {
			return refuse(codes.PermissionDenied, "PEER_NOT_ALLOWED", err.Error(), "allowed_executables of the agent's configuration says which programs may; one that was replaced must be started anew")
		}
	}
	return nil
}

// unknownPeer is the refusal of one of whom the kernel doesn't say what a list needs.
func unknownPeer(err error) error {
	hint := "the agent checks peers on Linux only"
	var hinted *peerError
	if errors.As(err, &hinted) {
		hint = hinted.hint
	}
	return refuse(codes.PermissionDenied, "PEER_UNKNOWN", "the kernel doesn't say who is calling: "+err.Error(), hint)
}

// peerError says why a peer can't be told, and what to do.
type peerError struct{ message, hint string }

func (e *peerError) Error() string { return e.message }

// localPeer is a connection of a unix socket, to be asked about with each call.
type localPeer struct {
	credentials.CommonAuthInfo
	door *door
	conn net.Conn
}

// AuthType names the scheme.
func (localPeer) AuthType() string { return "unix-peer" }

// peerCredentials are gRPC's way to look at a connection. Every peer is let through the
// handshake, so that its call gets a precise answer instead of a broken pipe.
type peerCredentials struct{ door *door }

var _ credentials.TransportCredentials = peerCredentials{}

func (c peerCredentials) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return conn, localPeer{
		CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity},
		door:           c.door, conn: conn,
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
	return local.door.admit(local.conn)
}

var tokenMethods = "/" + dayflyv1.TokenService_ServiceDesc.ServiceName + "/"

// admitUnary also counts what is asked of the TokenService.
func (a *Agent) admitUnary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (resp any, err error) {
	if err = admitted(ctx); err == nil {
		if err = fits(req); err == nil {
			resp, err = handle(ctx, req)
		}
	}
	if strings.HasPrefix(info.FullMethod, tokenMethods) {
		a.CountRequest(ListenerGRPC, err)
	}
	return resp, err
}

func admitStream(srv any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, handle grpc.StreamHandler) error {
	if err := admitted(stream.Context()); err != nil {
		return err
	}
	return handle(srv, &fitting{stream})
}

// fits refuses a message that is larger than a caller may send. What holders bring along is
// bounded by how many tokens there may be.
func fits(m any) error {
	if _, held := m.(*dayflyv1.WatchRequest); held {
		return nil
	}
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
