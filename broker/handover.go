package broker

import (
	"context"
	"fmt"

	"github.com/dayflyhq/dayfly/proto/feed"
)

// PublishSuccessor records the first signing key of the process that will take over from
// this one, so that readers of the JWK set have it by then. It returns once the record is
// durable and applied. A key that no broker of this issuer vouches for is refused.
func (b *Broker) PublishSuccessor(ctx context.Context, c Caller, key feed.Key) error {
	e := b.entry(ActionHandOver, c)
	e.Message = "signing key " + key.Public.ID.String() + " of the next process"
	if err := b.publishSuccessor(ctx, key); err != nil {
		return b.refuse(e, err)
	}
	return b.handOver(e)
}

func (b *Broker) publishSuccessor(ctx context.Context, key feed.Key) error {
	b.state.mu.RLock()
	checked := b.state.keysChecked
	b.state.mu.RUnlock()
	if !checked {
		return ErrNoSigningKey // this process knows no bundle yet
	}
	if err := b.cfg.VerifyKey(key, b.cfg.Now()); err != nil {
		return ErrForeignKey.because("signing key %s: %v", key.Public.ID, err)
	}
	return b.PublishKey(ctx, key)
}

// Yield records that this process is told to end, for the next one to take over.
func (b *Broker) Yield(c Caller) error {
	e := b.entry(ActionHandOver, c)
	e.Message = "this process ends"
	return b.handOver(e)
}

func (b *Broker) handOver(e AuditEntry) error {
	e.Outcome = "allowed"
	if err := b.cfg.Audit(e); err != nil {
		return fmt.Errorf("writing the audit: %w", err)
	}
	return nil
}
