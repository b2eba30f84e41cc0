package brokerd

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync/atomic"

	"github.com/dayflyhq/dayfly/agent"
	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/broker/keys"
	"github.com/dayflyhq/dayfly/proto/boottime"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/token"
)

// keyring is the ring of the whole process: it outlives a store that closed itself, and
// has a key before there is a store if the process takes over from another one. Where it
// publishes is changed meanwhile.
type keyring struct {
	*keys.Ring
	publish atomic.Pointer[publish]
}

type publish func(context.Context, feed.Key) error

func newKeyring(cfg *Config, svids *agent.Identity, log *slog.Logger) (*keyring, error) {
	var k keyring
	var err error
	k.Ring, err = keys.New(keys.Config{
		Issuer: cfg.Issuer, Algorithm: cfg.Algorithm, RotateEvery: cfg.KeyRotation, JWKSMaxAge: cfg.JWKSMaxAge, Log: log,
		SVID:    svids.GetX509SVID,
		Publish: func(ctx context.Context, key feed.Key) error { return (*k.publish.Load())(ctx, key) },
		Boot:    boottime.Now,
	})
	return &k, err
}

func (k *keyring) publishTo(p publish) { k.publish.Store(&p) }

// begin sees to it that there is a signing key on record: that of before, or that the
// last process published for this one, else a new one.
func (k *keyring) begin(ctx context.Context, b *broker.Broker) error {
	if s, ok := k.Current(); ok && slices.ContainsFunc(b.Keys(), func(p token.PublicKey) bool { return p.ID == s.Public.ID }) {
		return nil
	}
	return k.Rotate(ctx)
}

// signer is the ring's current key, for the broker.
func (k *keyring) signer() (broker.Signer, bool) {
	s, ok := k.Current()
	return broker.Signer{Public: s.Public, SpreadIn: s.SpreadIn, Sign: func(u token.Unsigned) (token.Secret, error) {
		secret, err := s.Sign(u)
		if errors.Is(err, keys.ErrRevoked) || errors.Is(err, keys.ErrReplaced) {
			return token.Secret{}, broker.ErrNoSigningKey // it went while the grant was recorded
		}
		return secret, err
	}}, ok
}
