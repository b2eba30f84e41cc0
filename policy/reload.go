package policy

import (
	"context"
	"fmt"
)

// Run follows the source until ctx ends and then returns nil. What doesn't compile,
// has invalid data, is empty, gone or not rightly signed leaves the last good
// generation in force (or none, see [Open]), and is said loudly: an error in the log,
// OnReload, Status.
// With Config.FS and Config.File there is nothing to follow and Run only waits.
func (p *Policy) Run(ctx context.Context) error {
	p.from.follow(ctx, p.Reload)
	return nil
}

// Reload reads the source now and returns what is wrong with it. One that holds
// what is in force already stays as it is, and the same mistake is complained
// about once.
func (p *Policy) Reload(ctx context.Context) error {
	p.turn.Lock()
	defer p.turn.Unlock()
	old := p.current.Load()
	f, err := p.from.read(ctx)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		return p.stale(ctx, err, err.Error())
	}
	same := old != nil && f.revision == old.revision
	if !same {
		if f.revision == p.lastBad {
			return p.broken()
		}
		g, err := build(ctx, f, p.cfg.Now())
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			return p.stale(ctx, fmt.Errorf("reloading policy: %w", err), f.revision)
		}
		p.renew(ctx, g)
	}
	if err := p.from.keep(f); err != nil {
		return p.stale(ctx, err, err.Error())
	}
	if same && p.broken() != nil {
		p.fail(nil, "")
		p.cfg.Log.InfoContext(ctx, "the source of policy holds again what is in force", p.from.where(), "generation", old.number, "revision", old.revision)
		p.cfg.OnReload(nil)
	}
	return nil
}

// fail notes what is wrong, and what it is about; nil: nothing any more.
func (p *Policy) fail(err error, about string) {
	p.lastBad = about
	p.mu.Lock()
	defer p.mu.Unlock()
	p.lastErr = err
}

// broken returns what is wrong with the source.
func (p *Policy) broken() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.lastErr
}

// stale keeps what is in force, and says so unless it said the same before.
func (p *Policy) stale(ctx context.Context, err error, about string) error {
	if said := p.broken(); said != nil && about == p.lastBad {
		return said
	}
	p.fail(err, about)
	p.complain(ctx, err)
	return err
}

func (p *Policy) complain(ctx context.Context, err error) {
	if g := p.current.Load(); g != nil {
		p.cfg.Log.ErrorContext(ctx, p.from.trouble()+", the last good policy stays in force",
			p.from.where(), "generation", g.number, "revision", g.revision, "error", err)
	} else {
		p.cfg.Log.ErrorContext(ctx, p.from.trouble()+", and no policy is in force: everything is denied", p.from.where(), "error", err)
	}
	p.cfg.OnReload(err)
}

// renew puts a new generation in force.
func (p *Policy) renew(ctx context.Context, g *generation) {
	number := uint64(1)
	if old := p.current.Load(); old != nil {
		number += old.number
	}
	p.fail(nil, "")
	p.install(g, number)
	p.cfg.Log.InfoContext(ctx, "policy reloaded", p.from.where(), "generation", number, "revision", g.revision)
	p.cfg.OnReload(nil)
}
