package supervise

import (
	"syscall"
	"time"
)

// restartEvery is the least time between two starts: what is renewed, revoked or broken
// again and again doesn't become a storm.
const restartEvery = 5 * time.Second

// A cause is what happened to the credentials that the program has.
type cause int

const (
	revoked cause = iota
	expired
	renewed
	causes
)

func (c cause) String() string {
	return [...]string{"revoked", "expired", "renewed"}[c]
}

// A view is the world at one moment, for the machine.
type view struct {
	now     time.Time
	ready   bool           // all credentials are there
	refused bool           // one won't come without somebody's doing
	exited  bool           // the program has ended
	code    int            // with that
	stop    syscall.Signal // somebody wants all of it to end; 0 for nobody
	has     [causes]bool
}

// An act is what is to be done now.
type act int

const (
	idle  act = iota
	start     // the program
	tell      // the program, by a signal
	leave     // the program alone: say what happened
	kill      // the program
	sweep     // what it started and left behind: it has ended itself
	exit      // the supervisor
)

// A decision is an act and what goes with it.
type decision struct {
	do     act
	signal syscall.Signal // of tell
	cause  cause          // of tell and leave: settled by it
	ends   bool           // of tell: the program is told to end
	code   int            // of exit
	wait   time.Duration  // of idle: nothing is due by itself before
}

// forever is how long the machine waits when only events matter.
const forever = time.Hour

type phase int

const (
	waiting phase = iota
	running
	stopping
)

// after is what follows when the program has ended while stopping.
type after int

const (
	again       after = iota // it is started anew
	asRevoked                // ExitRevoked
	asItHasDone              // its own code
)

// A machine decides. It knows no process and no clock.
type machine struct {
	spec     *Spec
	deadline time.Time // of the first wait; zero for none

	phase     phase
	started   bool      // at least once
	notBefore time.Time // the next start
	then      after
	killAt    time.Time
	killed    bool
	swept     bool
}

// next is asked until it says idle. What it says is done by then.
func (m *machine) next(v view) decision {
	switch m.phase {
	case waiting:
		return m.wait(v)
	case running:
		return m.run(v)
	}
	return m.stop(v)
}

func (m *machine) wait(v view) decision {
	early := m.notBefore.Sub(v.now)
	left := m.deadline.Sub(v.now)
	bounded := !m.started && !m.deadline.IsZero()
	switch {
	case v.stop != 0:
		return decision{do: exit, code: exitSignal + int(v.stop)}
	case v.ready && early <= 0:
		m.phase, m.started, m.notBefore = running, true, v.now.Add(restartEvery)
		return decision{do: start}
	case !m.started && v.refused:
		return decision{do: exit, code: ExitFailed}
	case bounded && left <= 0:
		return decision{do: exit, code: ExitWaited}
	}
	wait := forever
	if v.ready {
		wait = min(wait, early)
	}
	if bounded {
		wait = min(wait, left)
	}
	return decision{wait: wait}
}

func (m *machine) run(v view) decision {
	if v.exited {
		return decision{do: exit, code: v.code}
	}
	wait := forever
	for c := range causes {
		if !v.has[c] {
			continue
		}
		a := m.spec.on(c)
		switch early := m.notBefore.Sub(v.now); {
		case a.do == doNothing:
			return decision{do: leave, cause: c}
		case a.do == doSignal:
			return decision{do: tell, signal: a.signal, cause: c}
		case a.do == doRestart && c == renewed && early > 0:
			wait = min(wait, early) // what it has is good meanwhile
			continue
		case a.do == doRestart:
			return m.end(v, c, again)
		default:
			return m.end(v, c, asRevoked)
		}
	}
	return decision{wait: wait}
}

// end tells the program to end.
func (m *machine) end(v view, c cause, then after) decision {
	m.phase, m.then, m.killAt, m.killed, m.swept = stopping, then, v.now.Add(m.spec.Grace), false, false
	return decision{do: tell, signal: syscall.SIGTERM, cause: c, ends: true}
}

func (m *machine) stop(v view) decision {
	if m.then == again {
		switch {
		case v.stop != 0:
			m.then = asItHasDone
		case v.has[revoked] && m.spec.OnRevoke.do == doKill:
			m.then = asRevoked
		}
	}
	switch left := m.killAt.Sub(v.now); {
	case v.exited && !m.swept:
		m.swept = true
		return decision{do: sweep}
	case v.exited:
	case m.killed:
		return decision{wait: forever}
	case left <= 0:
		m.killed = true
		return decision{do: kill}
	default:
		return decision{wait: left}
	}
	switch m.then {
	case again:
		m.phase = waiting
		return m.wait(v)
	case asRevoked:
		return decision{do: exit, code: ExitRevoked}
	}
	return decision{do: exit, code: v.code}
}

// on is what is to be done.
func (s *Spec) on(c cause) Action {
	switch c {
	case revoked:
		return s.OnRevoke
	case expired:
		return s.OnExpiry
	}
	return s.OnRenew
}
