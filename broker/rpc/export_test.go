package rpc

import (
	"context"
	"log/slog"

	"google.golang.org/grpc"
)

// Inner doors for the tests of this package.
var (
	ToStatus  = toStatus
	CodeOf    = codeOf
	ErrNoSVID = errNoSVID
)

// Unary runs a handler as the server does.
func Unary(ctx context.Context, log *slog.Logger, req any, next grpc.UnaryHandler) (any, error) {
	return (&handlers{log: log}).unary(ctx, req, &grpc.UnaryServerInfo{FullMethod: "/test/Method"}, next)
}
