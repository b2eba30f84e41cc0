package rpc_test

import (
	"context"
	"log/slog"
	"strings"
	"testing"

	"github.com/dayflyhq/dayfly/broker/rpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// A panic ends its call alone. The log says where it was, and neither the caller nor the
// log learns what it said.
func TestPanic(t *testing.T) {
	var log strings.Builder
	_, err := rpc.Unary(t.Context(), slog.New(slog.NewTextHandler(&log, nil)), nil, func(context.Context, any) (any, error) {
		var none []any
		return none[len(none)], nil
	})
	if status.Code(err) != codes.Internal {
		t.Errorf("a panic of the runtime: %v", err)
	}
	_, err = rpc.Unary(t.Context(), slog.New(slog.NewTextHandler(&log, nil)), nil, func(context.Context, any) (any, error) {
		panic("a token, for instance")
	})
	if status.Code(err) != codes.Internal || strings.Contains(err.Error(), "instance") || strings.Contains(err.Error(), "panic_test") {
		t.Errorf("the caller hears %v", err)
	}
	if n := strings.Count(log.String(), "rpc_test.TestPanic.func"); n != 2 {
		t.Errorf("the log says %d times where it was, want 2:\n%s", n, log.String())
	}
	if strings.Contains(log.String(), "instance") {
		t.Errorf("the log says what it said:\n%s", log.String())
	}
}
