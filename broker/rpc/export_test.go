package rpc

import (
	"context"
	"log/slog"
	"net"

	"github.com/dayflyhq/dayfly/broker/attest"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
)

// Inner doors for the tests of this package.
var (
	ToStatus  = toStatus
	CodeOf    = codeOf
	ErrNoSVID = attest.ErrNoSVID
)

// Unary runs a handler as the server does.
func Unary(ctx context.Context, log *slog.Logger, req any, next grpc.UnaryHandler) (any, error) {
	return (&handlers{log: log}).unary(ctx, req, &grpc.UnaryServerInfo{FullMethod: "/test/Method"}, next)
}

// The bounds of connections and pings.
const (
	MaxHandshakes       = maxHandshakes
	MaxConnections      = maxConnections
	MaxConnectionsOfOne = maxConnectionsOfOne
	PingGap             = pingGap
	PingBurst           = pingBurst
)

// Connections counts what has proved who it is.
type Connections = connections

// Admit counts a connection.
func (c *connections) Admit(conn net.Conn, id spiffeid.ID) (net.Conn, error) {
	return c.admit(conn, id)
}

// Len is how many are counted.
func (c *connections) Len() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.all
}

// OpenConnections is how many the server counts.
func (s *Server) OpenConnections() int { return s.open.Len() }
