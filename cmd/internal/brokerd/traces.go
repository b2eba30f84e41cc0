package brokerd

import (
	"context"
	"fmt"

	"go.opentelemetry.io/contrib/instrumentation/google.golang.org/grpc/otelgrpc"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc"
)

// traces sends spans to an OTLP collector. The zero value makes none.
type traces struct{ provider *sdktrace.TracerProvider }

func newTraces(ctx context.Context, collector string) (traces, error) {
	if collector == "" {
		return traces{}, nil
	}
	exporter, err := otlptracegrpc.New(ctx, otlptracegrpc.WithEndpointURL(collector))
	if err != nil {
		return traces{}, fmt.Errorf("connecting to the trace collector: %w", err)
	}
	return traces{sdktrace.NewTracerProvider(sdktrace.WithBatcher(exporter))}, nil
}

// tracer is what the web adapters take; nil for none.
func (t traces) tracer() trace.TracerProvider {
	if t.provider == nil {
		return nil
	}
	return t.provider
}

func (t traces) serverOptions() []grpc.ServerOption {
	if t.provider == nil {
		return nil
	}
	return []grpc.ServerOption{grpc.StatsHandler(otelgrpc.NewServerHandler(otelgrpc.WithTracerProvider(t.provider)))}
}

// shutdown sends what still waits.
func (t traces) shutdown(ctx context.Context) error {
	if t.provider == nil {
		return nil
	}
	return t.provider.Shutdown(ctx)
}
