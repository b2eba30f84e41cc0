//go:build linux

package soak_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"golang.org/x/sys/unix"
)

// follow does what a track plans, one thing after the other. Whatever it began is over when
// it returns. What is late stays late: nothing of one track meets.
func (w *world) follow(ctx context.Context, faults []fault) {
	for _, f := range faults {
		if !pause(ctx, time.Until(w.began.Add(f.At))) {
			return
		}
		did, err := w.inflict(ctx, f)
		if err != nil {
			w.t.Errorf("%v of %s: %v", f.Kind, f.Target, err)
			return
		}
		if did {
			w.log.fault(f.Kind)
		}
	}
}

// pause waits, and reports whether it waited for all of that time.
func pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// inflict does one thing and ends it. It reports whether there was anything to do.
func (w *world) inflict(ctx context.Context, f fault) (bool, error) {
	u := w.units[f.Target]
	switch f.Kind {
	case restart, crash, handover, freeze:
		return true, w.breakBroker(ctx, f)
	case stall, deafen, forget, refuse:
		w.breakPath(ctx, u, f)
		return true, nil
	case suspend:
		return true, w.suspend(ctx, u, f.For)
	case stopAgent, killAgent:
		return true, w.restartAgent(ctx, u, f)
	case jump:
		if u.clock.now().Add(f.For).After(time.Now().Add(maxAhead)) {
			return false, nil
		}
		u.reach.breaks()
		u.clock.jump(f.For)
		return true, nil
	case rotate:
		return true, w.rotate(u)
	case api:
		return true, w.restartAPI(ctx, u, f.For)
	case revoke, reissue:
		return w.operate(ctx, u, f)
	}
	return false, fmt.Errorf("unknown fault %q", f.Kind)
}

// maxAhead is how far a clock may jump in all: by then an SVID, of an hour and half gone at
// the most, has nearly expired by it.
const maxAhead = 25 * time.Minute

// hang is how long a call may take to notice that nobody answers on its connection, 5 s,
// and another one to be made. What falls silent without a word is over that much later.
const hang = 6 * time.Second

// breakPath does something to the path of one agent.
func (w *world) breakPath(ctx context.Context, u *unit, f fault) {
	u.reach.begin()
	switch f.Kind {
	case forget:
		u.path.forget()
	case stall:
		u.path.stall(true)
		pause(ctx, f.For)
		u.path.stall(false)
	case deafen:
		u.path.deafen(true)
		pause(ctx, f.For)
		u.path.deafen(false)
	case refuse:
		u.path.refuse(true)
		pause(ctx, f.For)
		u.path.refuse(false)
		u.reach.end()
		return
	}
	u.reach.endAfter(hang)
}

// breakBroker does something to the broker, which is in the way of all.
func (w *world) breakBroker(ctx context.Context, f fault) error {
	for _, u := range w.units {
		u.reach.begin()
		if f.Kind == freeze {
			defer u.reach.endAfter(hang)
		} else {
			defer u.reach.end()
		}
	}
	switch f.Kind {
	case freeze:
		if err := unix.Kill(int(w.pid.Load()), unix.SIGSTOP); err != nil {
			return err
		}
		pause(ctx, f.For)
		return unix.Kill(int(w.pid.Load()), unix.SIGCONT)
	case handover:
		if err := w.box.TakeOver(w.ctx); err != nil {
			return err
		}
		w.pid.Store(int64(w.box.BrokerPID()))
		return w.checker.refresh(w.ctx)
	case restart:
		w.pid.Store(0)
		if err := w.box.StopBroker(); err != nil {
			return fmt.Errorf("stopping the broker: %w", err)
		}
	case crash:
		w.pid.Store(0)
		w.box.KillBroker()
	}
	pause(ctx, f.For)
	if err := w.box.StartBroker(w.ctx); err != nil {
		return err
	}
	w.pid.Store(int64(w.box.BrokerPID()))
	return w.checker.refresh(w.ctx)
}

// suspend has an agent's process stand still: time passes without it. Its timers run out
// meanwhile, unlike in a machine that sleeps: that is what jumps are for.
func (w *world) suspend(ctx context.Context, u *unit, d time.Duration) error {
	u.reach.begin()
	defer u.reach.end()
	u.down.begin()
	defer u.down.end(true)
	if err := u.signal(unix.SIGSTOP); err != nil {
		return err
	}
	pause(ctx, d)
	return u.signal(unix.SIGCONT)
}

func (w *world) restartAgent(ctx context.Context, u *unit, f fault) error {
	u.reach.begin()
	u.down.begin()
	s := unix.SIGTERM
	if f.Kind == killAgent {
		s = unix.SIGKILL
	}
	if err := u.stop(s); err != nil {
		return err
	}
	pause(ctx, f.For)
	if err := u.start(w.ctx); err != nil {
		return err
	}
	u.restarted()
	return nil
}

func (w *world) rotate(u *unit) error {
	err := w.box.TD.Rotate(u.id)
	u.mu.Lock()
	defer u.mu.Unlock()
	u.rotated = time.Now()
	return err
}

func (w *world) restartAPI(ctx context.Context, u *unit, d time.Duration) error {
	u.mu.Lock()
	u.noAPI = true
	u.mu.Unlock()
	if err := w.box.TD.StopSocket(u.id); err != nil {
		return err
	}
	pause(ctx, d)
	defer u.apiBack()
	return w.box.TD.StartSocket(u.id)
}

// operate revokes the credential that was served last, or the identity, which then heals
// itself by another SVID if that is late enough, and by a lift in any case.
func (w *world) operate(ctx context.Context, u *unit, f fault) (bool, error) {
	if f.Kind == revoke {
		grant := w.newest(u)
		if grant == "" {
			return false, nil
		}
		_, err := w.revoke(grant, &dayflyv1.Selector{Selector: &dayflyv1.Selector_Grant{Grant: grant}}, dayflyv1.LockMode_LOCK_MODE_NONE)
		return true, err
	}
	number, err := w.revoke(u.id.String(), &dayflyv1.Selector{Selector: &dayflyv1.Selector_Identity{Identity: u.id.String()}}, dayflyv1.LockMode_LOCK_MODE_REISSUE)
	if err != nil {
		return false, err
	}
	pause(ctx, f.For)
	if err := w.rotate(u); err != nil {
		return true, err
	}
	pause(ctx, w.life/2)
	client := dayflyv1.NewRevocationServiceClient(w.alice.Conn())
	for {
		call, cancel := context.WithTimeout(w.ctx, 5*time.Second)
		_, err := client.Lift(call, &dayflyv1.LiftRequest{Lock: number, Reason: "soak", IdempotencyKey: fmt.Sprint("lift ", number)})
		cancel()
		if err == nil {
			return true, nil
		}
		if !pause(w.ctx, 200*time.Millisecond) {
			return true, fmt.Errorf("lifting: %w", err)
		}
	}
}

// checkStore has the broker's command look at the store, once nobody serves it.
func (w *world) checkStore() {
	w.pid.Store(0)
	if err := w.box.StopBroker(); err != nil {
		w.t.Errorf("stopping the broker: %v", err)
	}
	if out, err := exec.Command(filepath.Join(bin, "dayfly-broker"), "check", w.box.StorePath()).CombinedOutput(); err != nil {
		w.t.Errorf("the store doesn't hold its promises: %v\n%s", err, out)
	}
	if info, err := os.Stat(w.box.StorePath()); err == nil {
		w.log.store(info.Size())
	}
}
