//go:build linux

package soak_test

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/agent"
	"github.com/dayflyhq/dayfly/agent/deliver"
	"github.com/dayflyhq/dayfly/e2e/sandbox"
	"github.com/dayflyhq/dayfly/proto/boottime"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/sdk"
)

// A clock is that of a machine that sleeps now and then: to a process the time of day and
// the boot clock jump, and its timers know nothing of it.
type clock struct {
	mu    sync.Mutex
	jumps []leap // the first one at the beginning of time, of nothing
}

// A leap is by how much the clock is ahead from a moment on.
type leap struct {
	at    time.Time
	ahead time.Duration
}

func newClock() *clock { return &clock{jumps: []leap{{}}} }

func (c *clock) jump(by time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.jumps = append(c.jumps, leap{time.Now(), c.jumps[len(c.jumps)-1].ahead + by})
}

// at is what the clock says at a moment.
func (c *clock) at(real time.Time) time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	ahead := time.Duration(0)
	for _, j := range c.jumps {
		if !j.at.After(real) {
			ahead = j.ahead
		}
	}
	return real.Round(0).Add(ahead) // the monotonic clock doesn't jump
}

func (c *clock) now() time.Time { return c.at(time.Now()) }

func (c *clock) boot() feed.Instant {
	c.mu.Lock()
	defer c.mu.Unlock()
	return boottime.Now() + feed.Instant(c.jumps[len(c.jumps)-1].ahead)
}

// real is the first moment at which the clock says a time, or more.
func (c *clock) real(says time.Time) time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i, j := range c.jumps {
		at := says.Add(-j.ahead)
		if at.Before(j.at) {
			return j.at // it was jumped over
		}
		if i == len(c.jumps)-1 || at.Before(c.jumps[i+1].at) {
			return at
		}
	}
	panic("internal error: a clock without a beginning")
}

// startJumping starts the agent whose clock jumps: in this process, as nothing else lets
// us set a clock.
func (w *world) startJumping(u *unit, api string) {
	u.clock = newClock()
	u.log = filepath.Join(w.box.Dir, "agent-"+u.name+".log")
	file := must(os.OpenFile(u.log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600))(w.t)
	log := slog.New(slog.NewTextHandler(file, nil))
	who := agent.NewIdentity(api, log)
	client := must(sdk.New(sdk.Config{Address: u.path.addr(), Source: who, BrokerID: sandbox.Broker, Now: u.clock.now, Boot: u.clock.boot}))(w.t)
	dir := filepath.Join(w.box.Dir, "jumping")
	if err := os.Mkdir(dir, 0o700); err != nil {
		w.t.Fatal(err)
	}
	a := must(agent.New(agent.Config{
		Upstream: client.Conn(), Source: who, Changed: who.Changed, BrokerID: sandbox.Broker, Bundles: who,
		GRPC: must(agent.Listen(agent.SocketConfig{Path: u.grpc}))(w.t), HTTP: must(agent.Listen(agent.SocketConfig{Path: u.http}))(w.t),
		Files: []deliver.Target{{
			Path:  dir + "/raw.jwt",
			Files: []deliver.File{{Format: deliver.Token, Credentials: map[string]sdk.Request{"credential": {Audience: goods}}}},
		}},
		MaxStaleness: w.bound, Now: u.clock.now, Boot: u.clock.boot, Log: log,
	}))(w.t)
	ctx, cancel := context.WithCancel(context.WithoutCancel(w.ctx))
	var wg sync.WaitGroup
	wg.Go(func() { _ = who.Run(ctx) })
	u.done = make(chan struct{})
	wg.Go(func() {
		defer close(u.done)
		if err := a.Run(ctx); err != nil {
			w.t.Errorf("agent %s: %v", u.name, err)
		}
	})
	w.t.Cleanup(func() {
		if w.t.Failed() {
			w.t.Logf("agent %s: %s", u.name, u.tail())
		}
		cancel()
		wg.Wait()
		if err := errors.Join(client.Close(), file.Close()); err != nil {
			w.t.Error(err)
		}
	})
	if err := u.serves(w.ctx); err != nil {
		w.t.Fatal(err)
	}
	u.restarted()
	w.readFile(u, "file", dir+"/raw.jwt", func(text []byte) ([]served, error) {
		s, err := w.read(u, string(text), goods)
		return []served{s}, err
	})
}

// TestClock: a time that was jumped over came with the jump.
func TestClock(t *testing.T) {
	c := newClock()
	began := time.Now()
	c.jump(time.Hour)
	if ahead := c.now().Sub(began.Round(0)); ahead < time.Hour || ahead > time.Hour+time.Minute {
		t.Errorf("ahead by %v", ahead)
	}
	if at := c.at(began); !at.Equal(began) {
		t.Errorf("before the jump it said %v at %v", at, began)
	}
	if got := c.real(began.Add(time.Minute)); !got.Equal(c.jumps[1].at) {
		t.Errorf("a minute on was at %v, and the jump at %v", got, c.jumps[1].at)
	}
	if got := c.real(began.Add(-time.Minute)); !got.Equal(began.Add(-time.Minute)) {
		t.Errorf("a minute before was at %v", got)
	}
	if got := c.real(c.jumps[1].at.Add(2 * time.Hour)); got.Sub(c.jumps[1].at) != time.Hour {
		t.Errorf("two hours on is %v after the jump", got.Sub(c.jumps[1].at))
	}
}
