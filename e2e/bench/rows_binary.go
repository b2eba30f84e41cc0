package main

import (
	"context"
	"os"
	"path/filepath"

	"github.com/dayflyhq/dayfly/e2e/sandbox"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
)

// The commands as bench builds them.
const (
	brokerBinary = "dayfly-broker"
	agentBinary  = "dayfly-agent"
	helloBinary  = "hello"
)

// binaryRows: what a daemon adds to a host before it does anything.
func binaryRows(s size) []row {
	if !s.binaries {
		return nil
	}
	idle := map[string]func(context.Context, *box) (int, func(), error){brokerBinary: idleBroker, agentBinary: idleAgent}
	var rows []row
	for _, name := range []string{agentBinary, brokerBinary} {
		var target *Target
		if name == agentBinary {
			target = atMost(1.5)
		}
		rows = append(rows,
			row{row: "binary", name: name + ", size", fixture: "binary", unit: inBytes, target: target, rounds: 1, setup: func(_ context.Context, l *lab) (pair, error) {
				ours, err := os.Stat(filepath.Join(l.bin, name))
				if err != nil {
					return pair{}, err
				}
				floor, err := os.Stat(filepath.Join(l.bin, helloBinary))
				if err != nil {
					return pair{}, err
				}
				return pair{constant(float64(ours.Size())), constant(float64(floor.Size()))}, nil
			}},
			row{row: "binary", name: name + ", idle memory", fixture: "binary", unit: inBytes, target: target, rounds: 3, setup: func(ctx context.Context, l *lab) (pair, error) {
				b, err := l.started(ctx, "binary")
				if err != nil {
					return pair{}, err
				}
				at := func(start func(context.Context, *box) (int, func(), error)) side {
					return func(ctx context.Context) (sample, error) {
						pid, stop, err := start(ctx, b)
						if err != nil {
							return sample{}, err
						}
						defer stop()
						settle(ctx, l.size.rest())
						rss, err := memoryOf(pid, "VmRSS")
						return sample{value: rss}, err
					}
				}
				return pair{at(idle[name]), at(idleHello)}, nil
			}},
		)
	}
	return rows
}

// idleBroker starts it again: one that has served for a while has other memory.
func idleBroker(ctx context.Context, b *box) (int, func(), error) {
	b.KillBroker()
	if err := b.StartBroker(ctx); err != nil {
		return 0, nil, err
	}
	return b.BrokerPID(), func() {}, nil
}

func idleAgent(ctx context.Context, b *box) (int, func(), error) {
	if _, err := b.StartAgent(ctx, sandbox.Payments); err != nil {
		return 0, nil, err
	}
	return b.AgentPID(sandbox.Payments), func() { b.KillAgent(sandbox.Payments) }, nil
}

func idleHello(ctx context.Context, b *box) (int, func(), error) {
	dir := filepath.Join(b.Dir, "hello")
	if err := b.TD.WritePEM(dir, floorID); err != nil {
		return 0, nil, err
	}
	c, err := startChild(filepath.Join(b.lab.bin, helloBinary), dir)
	if err != nil {
		return 0, nil, err
	}
	var at floorAnnouncement
	if err := c.announced(ctx, &at); err != nil {
		return 0, nil, err
	}
	// Ours are ready once their handshakes are made. A server that has made none has not
	// loaded its TLS.
	conns, err := b.conns(1, gateway, at.GRPC, floorID)
	if err != nil {
		return 0, nil, err
	}
	_, err = healthpb.NewHealthClient(conns[0]).Check(ctx, &healthpb.HealthCheckRequest{})
	return c.pid(), func() { conns[0].Close(); c.kill() }, err
}
