//go:build linux

package faults_test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A fault strikes, and is healed.
type fault struct {
	name         string
	strike, heal func()
}

// TestScenarios has random faults, several at once, around a revocation, again and
// again: two short scenarios, or for DAYFLY_FAULTS (10m) as many as fit. Each prints its
// seed; DAYFLY_FAULTS_SEED begins with a given one. The same seed has the same faults in the same
// order, for the same times; the rest is up to the machine.
func TestScenarios(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	if text := os.Getenv("DAYFLY_FAULTS_SEED"); text != "" {
		seed = must(strconv.ParseUint(text, 10, 64))(t)
	}
	end := time.Now()
	if text := os.Getenv("DAYFLY_FAULTS"); text != "" {
		end = end.Add(must(time.ParseDuration(text))(t))
	}
	var total tally
	for n := 0; n < 2 || time.Now().Before(end); n++ {
		ok := t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Logf("DAYFLY_FAULTS_SEED=%d", seed)
			scenario(t, seed, &total)
		})
		if !ok {
			break
		}
		seed++
	}
	t.Logf("%d faults around %d revocations; %d verdicts accepted, %d refused when they had to be", total.faults, total.revocations, total.accepted, total.refused)
}

// A tally is what was tried.
type tally struct{ faults, revocations, accepted, refused int }

// rounds is how many revocations a scenario has.
const rounds = 4

func scenario(t *testing.T, seed uint64, total *tally) {
	random := rand.New(rand.NewPCG(seed, 0))
	w := newWorld(t, "")
	faults := w.troubles(seed)
	for range rounds {
		c := w.fresh()
		w.round(random, faults, c, total)
	}
	w.fresh()
	w.mu.Lock()
	defer w.mu.Unlock()
	total.accepted += w.accepted
	total.refused += w.refused
}

// troubles starts relays and verifiers of every kind, and returns what can happen to
// them. No two faults of a round are about the same process or link.
func (w *world) troubles(seed uint64) [][]fault {
	t := w.t
	east, west, south, north := newHost(t), newHost(t), newHost(t), newHost(t)
	toWest, toNorth := newProxy(t, w.box.Info.GRPC, seed), newProxy(t, w.box.Info.GRPC, seed+1)
	eastRelay, eastFeed := w.relay(east, "east-relay", w.box.Info.GRPC)
	westRelay, westFeed := w.relay(west, "west-relay", toWest.addr())
	secondRelay, secondFeed := w.relay(east, "second-relay", eastFeed)
	east1, east2 := w.verifier(east, "east1", eastFeed), w.verifier(east, "east2", secondFeed)
	west1 := w.verifier(west, "west1", westFeed)
	south1 := w.verifier(south, "south1", w.box.Info.GRPC)
	north1 := w.verifier(north, "north1", toNorth.addr())

	all := [][]fault{{
		{"the broker is killed", w.box.KillBroker, w.startBroker},
		{"the broker is paused", func() { pause(t, w.box.BrokerPID()) }, func() { send(t, w.box.BrokerPID(), unix.SIGCONT) }},
	}}
	for _, p := range []*process{eastRelay, secondRelay, westRelay, east1.process, east2.process, west1.process, south1.process, north1.process} {
		all = append(all, []fault{{p.name + " is killed", p.kill, p.start}, {p.name + " is paused", p.pause, p.resume}})
	}
	for _, h := range []struct {
		name string
		*host
	}{{"the broker", w.broker}, {"east", east}, {"west", west}, {"south", south}, {"north", north}} {
		all = append(all, h.faults(h.name))
	}
	return append(all, toWest.faults("west"), toNorth.faults("north"))
}

func (h *host) faults(name string) (all []fault) {
	for _, how := range []cut{hole, unplug} {
		all = append(all, fault{"the link of " + name + " is " + string(how), func() { h.cut(how) }, func() { h.heal(how) }})
	}
	return all
}

func (p *proxy) faults(name string) (all []fault) {
	for _, how := range []weather{delayed, lossy, byByte, silent, refused} {
		all = append(all, fault{"the path of " + name + " is " + how.name, func() { p.set(how) }, func() { p.set(clear) }})
	}
	return all
}

// round has some faults, with the revocation of a credential somewhere among them, and
// waits until all is well and it is contained.
func (w *world) round(random *rand.Rand, faults [][]fault, c *credential, total *tally) {
	var revoking sync.WaitGroup
	revoke := func() {
		revoking.Go(func() { w.containment(c, w.revoke(c)) })
	}
	n := 1 + random.IntN(4)
	at := random.IntN(n + 1)
	var struck []fault
	for i, which := range random.Perm(len(faults))[:n] {
		if i == at {
			w.t.Log("revoke")
			revoke()
		}
		f := faults[which][random.IntN(len(faults[which]))]
		w.t.Log(f.name)
		f.strike()
		struck = append(struck, f)
		w.rest(random, bound/4)
	}
	if at == n {
		w.t.Log("revoke")
		revoke()
	}
	w.rest(random, 2*bound)
	for _, i := range random.Perm(n) {
		struck[i].heal()
		w.rest(random, bound/4)
	}
	revoking.Wait()
	w.settled(c)
	total.faults += n
	total.revocations++
}

// rest lets a fault last for a random time.
func (w *world) rest(random *rand.Rand, most time.Duration) {
	select {
	case <-time.After(time.Duration(random.Int64N(int64(most)))):
	case <-w.ctx.Done():
	}
}
