package rpc

import (
	"context"
	"log/slog"

	"github.com/dayflyhq/dayfly/broker/attest"
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
	MaxHandshakes        = maxHandshakes
	MaxStreamsOfStranger = maxStreamsOfStranger
	PingGap              = pingGap
	PingBurst            = pingBurst
)

// OpenConnections is how many the server counts.
func (s *Server) OpenConnections() int { return s.open.Len() }
