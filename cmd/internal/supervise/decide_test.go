package supervise

import (
	"syscall"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// world is a program and its credentials, for the machine.
type world struct {
	t       *rapid.T
	m       machine
	v       view
	alive   bool
	starts  []time.Time
	termed  time.Time // when this program was told to end
	killed  bool
	swept   bool
	exit    *int
	stopped bool // somebody wanted the end while nothing ran or it had been told to end, or before that
	dead    bool // it must end for a revocation or an expiry
}

func (w *world) step() {
	for range 20 {
		d := w.m.next(w.v)
		switch d.do {
		case idle:
			if d.wait <= 0 {
				w.t.Fatalf("idle for %v: it spins", d.wait)
			}
			return
		case start:
			w.start()
		case tell:
			w.v.has[d.cause] = false
			if !w.alive && !w.v.exited {
				w.t.Fatal("a signal to nobody")
			}
			if d.ends {
				w.termed, w.stopped = w.v.now, w.stopped || w.v.stop != 0
				w.dead = w.dead || w.m.spec.on(d.cause).do == doKill
			}
		case leave:
			w.v.has[d.cause] = false
			if w.m.spec.on(d.cause).do != doNothing {
				w.t.Fatalf("%v: left alone", d.cause)
			}
		case kill:
			if w.killed || w.termed.IsZero() || w.v.now.Sub(w.termed) < w.m.spec.Grace || !w.alive {
				w.t.Fatal("killed twice, too early, without a word, or when it was dead")
			}
			w.killed, w.alive = true, false
			w.v.exited, w.v.code = true, 137
		case sweep:
			if w.alive || w.swept {
				w.t.Fatal("swept too early, or twice")
			}
			w.swept = true
		case exit:
			w.ends(d.code)
			return
		}
	}
	w.t.Fatal("it is never idle")
}

func (w *world) start() {
	if !w.v.ready || w.alive || w.stopped || w.dead {
		w.t.Fatalf("started: ready %v, alive %v, stopped %v, dead %v", w.v.ready, w.alive, w.stopped, w.dead)
	}
	if n := len(w.starts); n > 0 {
		if w.v.now.Sub(w.starts[n-1]) < restartEvery {
			w.t.Fatal("started twice within moments")
		}
		if !w.swept {
			w.t.Fatal("started beside what the last one left behind")
		}
	}
	w.starts = append(w.starts, w.v.now)
	w.alive, w.killed, w.swept, w.termed = true, false, false, time.Time{}
	w.v.exited, w.v.code, w.v.has = false, 0, [causes]bool{}
}

func (w *world) ends(code int) {
	if w.alive {
		w.t.Fatal("the supervisor leaves a program behind")
	}
	w.exit = &code
	want := w.v.code
	switch {
	case w.dead:
		want = ExitRevoked
	case w.v.exited && !(w.m.phase == waiting):
	case w.v.stop != 0:
		want = exitSignal + int(w.v.stop)
	case len(w.starts) == 0 && w.v.refused:
		want = ExitFailed
	default:
		want = ExitWaited
		if len(w.starts) > 0 || w.v.now.Before(w.m.deadline) {
			w.t.Fatal("it gave up early")
		}
	}
	if code != want {
		w.t.Fatalf("exit code %d, want %d", code, want)
	}
}

// Whatever happens in whatever order: nothing is started without its credentials, twice,
// in a storm or after somebody wanted the end; who is told to end has the grace; and the
// exit code says what it was.
func TestDecide(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		action := rapid.SampledFrom([]Action{{}, {doSignal, syscall.SIGHUP}, {do: doRestart}, {do: doKill}})
		spec := &Spec{
			OnRenew: action.Filter(func(a Action) bool { return a.do != doKill }).Draw(t, "on renew"), OnRevoke: action.Draw(t, "on revoke"), OnExpiry: action.Draw(t, "on expiry"),
			Wait: time.Minute, Grace: 10 * time.Second,
		}
		now := time.Unix(1e9, 0)
		w := &world{t: t, m: machine{spec: spec, deadline: now.Add(spec.Wait)}}
		w.v.now = now
		w.v.ready = rapid.Bool().Draw(t, "ready")
		for range rapid.IntRange(1, 80).Draw(t, "steps") {
			w.step()
			if w.exit != nil {
				return
			}
			w.event(rapid.IntRange(0, 99).Draw(t, "event"))
		}
	})
}

// event is something that happens, rare things rarely.
func (w *world) event(n int) {
	switch {
	case n < 40:
		w.v.now = w.v.now.Add(time.Duration(rapid.Int64Range(1, int64(12*time.Second)).Draw(w.t, "for")))
	case n < 60:
		w.v.ready = !w.v.ready
	case n < 62:
		w.v.refused = !w.v.refused
	case n < 80 && w.alive:
		c := cause(rapid.IntRange(0, int(causes)-1).Draw(w.t, "which"))
		w.v.has[c] = true
		w.dead = w.dead || c == revoked && !w.termed.IsZero() && !w.stopped && w.m.spec.OnRevoke.do == doKill
	case n < 93 && w.alive && (!w.termed.IsZero() || n < 83): // told to end, most do
		w.alive = false
		w.v.exited, w.v.code = true, rapid.IntRange(0, 255).Draw(w.t, "code")
	case n >= 93:
		w.v.stop = syscall.SIGTERM
		w.stopped = w.stopped || w.m.phase != running
	}
}

// The rules that a table says better.
func TestDecideRules(t *testing.T) {
	now := time.Unix(1e9, 0)
	started := func(spec *Spec) (*machine, view) {
		m := &machine{spec: spec}
		v := view{now: now, ready: true}
		if d := m.next(v); d.do != start {
			t.Fatalf("got %+v", d)
		}
		return m, v
	}
	// A renewal soon after the start waits; a revocation doesn't.
	m, v := started(&Spec{OnRenew: Action{do: doRestart}, OnRevoke: Action{do: doRestart}})
	v.now, v.has[renewed] = now.Add(time.Second), true
	if d := m.next(v); d.do != idle || d.wait != restartEvery-time.Second {
		t.Errorf("a renewal after a second: %+v", d)
	}
	v.has[revoked] = true
	if d := m.next(v); d.do != tell || !d.ends || d.cause != revoked {
		t.Errorf("a revocation after a second: %+v", d)
	}
	// One that was to be started anew isn't, once what it has is revoked.
	m, v = started(&Spec{OnRenew: Action{do: doRestart}, OnRevoke: Action{do: doKill}})
	v.now, v.has[renewed] = now.Add(time.Minute), true
	m.next(v)
	v.has = [causes]bool{revoked: true}
	m.next(v)
	v.exited = true
	m.next(v) // sweeps
	if d := m.next(v); d.do != exit || d.code != ExitRevoked {
		t.Errorf("revoked while it was to be renewed: %+v", d)
	}
	// A program that ends by itself ends it all, with its code, whatever is due.
	m, v = started(&Spec{OnRevoke: Action{do: doRestart}})
	v.exited, v.code, v.has = true, 7, [causes]bool{true, true, true}
	if d := m.next(v); d.do != exit || d.code != 7 {
		t.Errorf("got %+v", d)
	}
}
