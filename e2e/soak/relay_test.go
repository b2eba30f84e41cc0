//go:build linux

package soak_test

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/dayflyhq/dayfly/e2e/sandbox"
	"github.com/dayflyhq/dayfly/sdk"
	"github.com/dayflyhq/dayfly/sdk/verify"
)

// A judged is a verifier behind the relay, and who shows it credentials.
type judged struct {
	w    *world
	u    *unit // the relay
	kind string
	v    *verify.Verifier
}

// relay returns the configuration of the relay, and has verifiers follow it: one on its
// socket, and one that comes over TCP and believes only what the broker signed.
func (w *world) relay(u *unit) string {
	at := must(freePort())(w.t)
	edge := must(w.box.Source(w.ctx, identity("edge")))(w.t)
	beside := must(sdk.New(sdk.Config{Address: "unix://" + u.grpc}))(w.t)
	remote := must(sdk.New(sdk.Config{Address: at, Source: edge, BrokerID: u.id}))(w.t)
	w.t.Cleanup(func() {
		beside.Close()
		remote.Close()
	})
	cfg := verify.Config{Conn: beside.Conn(), Audiences: []string{goods}, MaxStaleness: w.bound, Leeway: -1}
	w.judges = append(w.judges, &judged{w: w, u: u, kind: "verifier beside a relay", v: must(verify.New(cfg))(w.t)})
	cfg.Conn, cfg.BrokerID, cfg.Bundles = remote.Conn(), sandbox.Broker, edge
	w.judges = append(w.judges, &judged{w: w, u: u, kind: "verifier over mTLS", v: must(verify.New(cfg))(w.t)})
	return fmt.Sprintf("feed: {max_staleness: %s, relay: {listen: %q, allow: [\"identity:%s\"]}}\n", w.bound, at, identity("edge"))
}

// run shows the verifier what another agent served, and from time to time what has expired.
func (j *judged) run(ctx context.Context) {
	presenter := j.w.units[unitSockets]
	var old served
	for n := 0; pause(ctx, askEvery); n++ {
		shown := j.w.shown(presenter)
		switch {
		case shown.raw == "":
			continue
		case old.raw == "":
			old = shown
		case n%10 == 0 && !old.expires.After(time.Now()):
			shown, old = old, shown
		}
		start := time.Now()
		_, err := j.v.Verify(ctx, shown.raw, verify.Peer{ID: presenter.id})
		if ctx.Err() != nil {
			return
		}
		j.judge(start, time.Now(), shown, presenter, err)
	}
}

// shown is a token that was served to somebody last.
func (w *world) shown(u *unit) served {
	for _, s := range w.streams {
		if s.u == u && s.kind == "gRPC" {
			s.mu.Lock()
			defer s.mu.Unlock()
			if s.last != nil {
				return *s.last
			}
			return served{}
		}
	}
	return served{}
}

func (j *judged) judge(start, end time.Time, c served, of *unit, err error) {
	n := j.w.log.of(j.kind)
	n.requests.Add(1)
	r, revoked := j.w.book.of(c, of.id.String())
	wrong := func(what string) { j.w.violate(j.kind, "%s %s: %v", what, c.grant, err) }
	var refusal *verify.Refusal
	if err == nil {
		switch {
		case !c.expires.After(start):
			wrong("accepted, expired,")
		case revoked && !r.contained.IsZero() && r.contained.Before(start):
			wrong("accepted, contained,")
		default:
			n.served.Add(1)
		}
		return
	}
	if !errors.As(err, &refusal) {
		wrong("said neither yes nor no of")
		return
	}
	switch refusal.Reason {
	case verify.TokenExpired:
		if c.expires.After(end) {
			wrong("called expired")
			return
		}
		n.served.Add(1)
	case verify.TokenRevoked:
		if !j.w.book.knows(c.grant, of.id.String()) {
			wrong("called revoked")
			return
		}
		n.served.Add(1)
	case verify.VerifierStale, verify.KeyUnknown, verify.Ahead:
		j.closed(n, start, end, c, refusal)
	default:
		wrong("refused")
	}
}

// closed judges a verifier that doesn't know enough: it follows again within a third of its
// bound once the broker is reachable, is good for a bound after that, and knows then what
// was before.
func (j *judged) closed(n *counts, start, end time.Time, c served, refusal *verify.Refusal) {
	from, enough := start.Add(-j.w.bound), j.w.bound/3+j.w.notice
	known := refusal.Reason == verify.VerifierStale || j.u.reach.longest(c.issued, start) >= enough
	switch {
	case j.u.down.meets(from, end), j.w.late.meets(from, end):
		n.down.Add(1)
	case !known, !j.u.reach.fresh(start, enough, j.w.bound/2):
		n.away.Add(1)
	default:
		n.lost.Add(1)
		j.w.complain("LOST: "+j.kind, "%v; the broker had been reachable for %v through the relay", refusal, j.u.reach.longest(time.Time{}, start).Round(time.Millisecond))
	}
}

// knows reports whether anything was ever revoked that a token may be dead of.
func (b *book) knows(grant, id string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	_, one := b.revoked[grant]
	_, all := b.revoked[id]
	return one || all
}
