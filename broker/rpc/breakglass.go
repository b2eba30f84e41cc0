package rpc

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/broker/attest"
	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
)

// NewBreakGlass makes the server for the unix socket on the broker's own host, for
// when everything else is broken: revocations without SPIFFE and without policy, loudly
// recorded. The kernel says who is at the other end; only root, and the user that the
// broker itself runs as, who could write its store anyway, are let in.
func NewBreakGlass(cfg Config) (*Server, error) {
	if cfg.Broker == nil {
		return nil, errors.New("rpc: Broker is required")
	}
	cfg.setDefaults()
	h := &handlers{broker: cfg.Broker, log: cfg.Log, now: cfg.Now, caller: localCaller, bundlesChanged: cfg.BundlesChanged}
	srv := h.server(append(cfg.Options, grpc.Creds(localCredentials{allowed: []uint32{0, uint32(os.Geteuid())}})))
	dayflyv1.RegisterRevocationServiceServer(srv.Server, &revocationService{handlers: h})
	if cfg.Backup != nil {
		dayflyv1.RegisterBackupServiceServer(srv.Server, &backupService{handlers: h, begin: cfg.Backup})
	}
	if cfg.Handover != nil {
		dayflyv1.RegisterHandoverServiceServer(srv.Server, &handoverService{handlers: h, Handover: *cfg.Handover})
	}
	return srv, nil
}

// local is the AuthInfo of a unix socket: the peer's user, as the kernel tells it.
type local struct {
	credentials.CommonAuthInfo
	uid uint32
}

func (local) AuthType() string { return "unix" }

func localCaller(ctx context.Context) (broker.Caller, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return broker.Caller{}, attest.ErrNoSVID
	}
	l, ok := p.AuthInfo.(local)
	if !ok {
		return broker.Caller{}, attest.ErrNoSVID
	}
	return broker.Caller{Local: fmt.Sprintf("break-glass:uid=%d", l.uid)}, nil
}

// localCredentials lets in the users that the kernel vouches for.
type localCredentials struct{ allowed []uint32 }

func (c localCredentials) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	uid, err := peerUID(conn)
	if err != nil {
		conn.Close()
		return nil, nil, err
	}
	for _, ok := range c.allowed {
		if uid == ok {
			return conn, local{credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}, uid}, nil
		}
	}
	conn.Close()
	return nil, nil, fmt.Errorf("user %d may not use the break-glass socket", uid)
}

func peerUID(conn net.Conn) (uint32, error) {
	sc, ok := conn.(syscall.Conn)
	if !ok {
		return 0, errors.New("not a socket")
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return 0, err
	}
	var (
		cred    *unix.Ucred
		credErr error
	)
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return 0, err
	}
	if credErr != nil {
		return 0, fmt.Errorf("asking the kernel for the peer: %w", credErr)
	}
	return cred.Uid, nil
}

func (localCredentials) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("the break-glass credentials are for servers")
}
func (localCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "unix"}
}
func (c localCredentials) Clone() credentials.TransportCredentials { return c }
func (localCredentials) OverrideServerName(string) error           { return nil }
