package brokerd

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/dayflyhq/dayfly/agent"
	"github.com/dayflyhq/dayfly/broker/keys"
	"github.com/dayflyhq/dayfly/broker/rpc"
	"github.com/dayflyhq/dayfly/policy"
	"github.com/dayflyhq/dayfly/proto/boottime"
	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/wire"
	"github.com/dayflyhq/dayfly/sdk"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

const (
	// publishTimeout bounds the wait for the running broker's record.
	publishTimeout = 15 * time.Second
	// stopTimeout is how long the running broker may need to end beyond its grace.
	stopTimeout = 30 * time.Second
)

// takeOver readies this process to follow the one that serves: that one publishes the
// first signing key of this one, whose private half stays here; once every reader of the
// JWK set knows it, that one is told to end. What can go wrong does so before that. When it
// returns the other one is ending, and its store is next to be had. If none serves there is
// nothing to take over, which is no error: the start is an ordinary one.
func takeOver(ctx context.Context, cfg *Config, ring *keyring, svids *agent.Identity, log *slog.Logger) error {
	socket := cfg.Listen.BreakGlass
	if !answers(socket) {
		log.WarnContext(ctx, "no broker serves to take over from; starting without", "break_glass", socket)
		return nil
	}
	source, err := cfg.policySource(svids)
	if err != nil {
		return err
	}
	if _, err := policy.Load(ctx, source); err != nil {
		return fmt.Errorf("loading policy: %w", err)
	}
	if _, err := awaitSVID(ctx, svids, log); err != nil {
		return err
	}
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	running := dayflyv1.NewHandoverServiceClient(conn)
	var spread time.Duration
	ring.publishTo(func(ctx context.Context, key feed.Key) error {
		ctx, cancel := context.WithTimeout(ctx, publishTimeout)
		defer cancel()
		resp, err := running.PublishKey(ctx, &dayflyv1.PublishKeyRequest{Key: wire.Key(key)})
		if err != nil {
			return sdk.FromRPC(err)
		}
		spread, err = wire.ToDuration(resp.GetSpreadIn())
		return err
	})
	if err := ring.Rotate(ctx); err != nil {
		return fmt.Errorf("asking the running broker to publish this one's signing key: %w", err)
	}
	// The copies in use have the max-age of that process; the ones to come, of this one.
	spread = min(max(spread, keys.SpreadAfter(cfg.JWKSMaxAge)), keys.SpreadAfter(keys.MaxJWKSMaxAge))
	log.InfoContext(ctx, "the running broker published this one's signing key; waiting until readers of the JWK set know it", "for", spread)
	if err := elapse(ctx, spread); err != nil {
		return err
	}
	// An answer that doesn't arrive says nothing: the store does, which is free or isn't.
	if _, err := running.Stop(ctx, &dayflyv1.StopRequest{}); err != nil {
		log.WarnContext(ctx, "telling the running broker to stop", "err", err)
	}
	return nil
}

// elapse waits by the clock that runs through suspend.
func elapse(ctx context.Context, d time.Duration) error {
	until := boottime.Now().Add(d)
	for {
		left := until.Sub(boottime.Now())
		if left <= 0 {
			return nil
		}
		select {
		case <-time.After(min(left, time.Second)):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// handover is what this process does for the one that takes over from it.
func (d *daemon) handover() *rpc.Handover {
	return &rpc.Handover{SpreadIn: keys.SpreadAfter(d.cfg.JWKSMaxAge), Stop: d.stop}
}

// ended makes no error of an end that was asked for: what was under way broke off, and says
// so in as many ways as there are libraries below.
func ended(ctx context.Context, err error, log *slog.Logger) error {
	if ctx.Err() == nil {
		return err
	}
	if err != nil {
		log.InfoContext(ctx, "told to stop before serving", "err", err)
	}
	return nil
}
