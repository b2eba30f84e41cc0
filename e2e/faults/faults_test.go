//go:build linux

package faults_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/dayflyhq/dayfly/e2e/sandbox"
	"github.com/dayflyhq/dayfly/sdk"
	"github.com/dayflyhq/dayfly/sdk/verify"
	"golang.org/x/sys/unix"
)

// TestCutVerifier loses a verifier's link in each way while "dayfly revoke" runs: the
// command ends with 0 once the one that is cut off is closed and the other has
// confirmed, and neither accepts anything of it from then on.
func TestCutVerifier(t *testing.T) {
	w := newWorld(t, "")
	near := w.verifier(newHost(t), "near", w.box.Info.GRPC)
	there := newHost(t)
	far := w.verifier(there, "far", w.box.Info.GRPC)
	for _, how := range []cut{hole, unplug} {
		c := w.fresh()
		there.cut(how)
		if exit, out := w.revokeByCommand(c); exit != 0 {
			t.Errorf("%s: the command ended with %d: %s", how, exit, out)
		}
		w.settled(c)
		w.verdict(c, verify.TokenRevoked, near)
		w.verdict(c, verify.VerifierStale, far)
		there.heal(how)
		w.fresh()
		w.verdict(c, verify.TokenRevoked, far)
	}
}

// TestRelayLost kills, pauses and cuts off a relay: everything below it, also behind a second
// relay, closes within the bound, and is fresh by itself once the relay is back. A revocation meanwhile is
// contained all the same.
func TestRelayLost(t *testing.T) {
	w := newWorld(t, "")
	there := newHost(t)
	relay, feed := w.relay(there, "relay", w.box.Info.GRPC)
	_, second := w.relay(there, "second-relay", feed)
	below := []*verifier{w.verifier(there, "below", feed), w.verifier(there, "further-below", second)}
	w.verifier(newHost(t), "beside", w.box.Info.GRPC)
	for _, fault := range []fault{
		{"killed", relay.kill, relay.start},
		{"paused", relay.pause, relay.resume},
		{"cut off", func() { there.cut(hole) }, func() { there.heal(hole) }},
		{"unplugged", func() { there.cut(unplug) }, func() { there.heal(unplug) }},
	} {
		t.Log(fault.name)
		c := w.fresh()
		fault.strike()
		w.closes(below...)
		w.containment(c, w.revoke(c))
		w.settled(c)
		w.opens(below...)
		fault.heal()
		w.fresh()
		w.verdict(c, verify.TokenRevoked)
	}
}

// TestPaused pauses the broker and a verifier, and kills the broker: what was committed
// holds everywhere, and nobody says more than is true.
func TestPaused(t *testing.T) {
	w := newWorld(t, "")
	direct := w.verifier(newHost(t), "direct", w.box.Info.GRPC)
	there := newHost(t)
	_, feed := w.relay(there, "relay", w.box.Info.GRPC)
	w.verifier(there, "below", feed)

	c := w.fresh()
	direct.pause()
	number := w.revoke(c)
	w.containment(c, number)
	direct.resume() // with all that it was asked before and after
	w.settled(c)

	for _, broker := range []fault{
		{"paused", func() { pause(t, w.box.BrokerPID()) }, func() { send(t, w.box.BrokerPID(), unix.SIGCONT) }},
		{"killed", w.box.KillBroker, w.startBroker},
	} {
		t.Log("the broker is", broker.name)
		c = w.fresh()
		number = w.revoke(c)
		broker.strike()
		w.closes(w.verifiers...)
		w.opens(w.verifiers...)
		broker.heal()
		w.containment(c, number)
		w.settled(c)
		w.fresh()
	}
}

// TestSlowPeers has a verifier at a byte a second, one whose network is silent, and one
// that is paused, while large revocations are made: each returns, and the receipt of
// the verifier that is well arrives.
func TestSlowPeers(t *testing.T) {
	w := newWorld(t, "")
	proxies := []*proxy{newProxy(t, w.box.Info.GRPC, 1), newProxy(t, w.box.Info.GRPC, 2)}
	well := w.verifier(newHost(t), "well", w.box.Info.GRPC)
	ill := newHost(t)
	w.verifier(ill, "byte-a-second", proxies[0].addr())
	w.verifier(ill, "silent", proxies[1].addr())
	stopped := w.verifier(ill, "stopped", w.box.Info.GRPC)
	c := w.fresh()
	proxies[0].set(byByte)
	proxies[1].set(silent)
	stopped.pause()
	for i := range 100 {
		w.revokeMuch(i)
	}
	number := w.revoke(c)
	w.verdict(c, verify.TokenRevoked, well)
	if got := w.containment(c, number); got.GetConfirmed() == 0 {
		t.Errorf("nobody confirmed: %v", got)
	}
	w.settled(c, well, w.verifiers[1], w.verifiers[2])
	for _, p := range proxies {
		p.set(clear)
	}
	stopped.resume()
	w.settled(c)
	w.fresh()
}

// TestRevokeAtSaturation revokes while many callers get credentials as fast as they can.
func TestRevokeAtSaturation(t *testing.T) {
	w := newWorld(t, "")
	w.verifier(newHost(t), "verifier", w.box.Info.GRPC)
	c := w.fresh()
	ctx, stop := context.WithCancel(w.ctx)
	var issued atomic.Uint64
	var load sync.WaitGroup
	for range 4 {
		client := must(sdk.New(sdk.Config{Address: w.box.Info.GRPC, Source: must(w.box.Source(ctx, sandbox.Reports))(t), BrokerID: sandbox.Broker}))(t)
		defer client.Close()
		for range 32 {
			load.Go(func() {
				for ctx.Err() == nil {
					if _, err := client.Issue(ctx, sdk.Request{Audience: "orders"}); err == nil {
						issued.Add(1)
						w.mu.Lock()
						w.wake()
						w.mu.Unlock()
					}
				}
			})
		}
	}
	w.until("there is load", func() bool { return issued.Load() > 256 })
	before := issued.Load()
	number := w.revoke(c)
	w.verdict(c, verify.TokenRevoked)
	w.containment(c, number)
	w.until("the load goes on", func() bool { return issued.Load() > before+256 })
	stop()
	load.Wait()
	w.settled(c)
	t.Logf("%d credentials were issued meanwhile", issued.Load())
}

// TestRevokeOnFullTmpfs takes all the room of the file system that holds the store:
// nothing is issued, a revoke is recorded and contained, and with room issuing goes on.
func TestRevokeOnFullTmpfs(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=16m,mode=0700"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	w := newWorld(t, filepath.Join(dir, "dayfly.db"))
	w.verifier(newHost(t), "verifier", w.box.Info.GRPC)
	c := w.fresh()
	ballast := fill(t, dir)
	var full *sdk.Error
	for issued := 0; ; issued++ {
		_, err := w.payments.Issue(w.ctx, sdk.Request{Audience: "orders"})
		if err == nil {
			continue
		}
		if !errors.As(err, &full) || full.Reason != "STORE_FULL" {
			t.Fatalf("on a full disk: %v, want STORE_FULL", err)
		}
		t.Logf("full after %d credentials more", issued)
		break
	}
	// More than the pages hold that issuing left: the reserve is theirs.
	for i := range 64 {
		w.revokeMuch(i)
	}
	w.containment(c, w.revoke(c))
	w.settled(c)
	w.verdict(c, verify.TokenRevoked)
	if _, err := w.payments.Issue(w.ctx, sdk.Request{Audience: "orders"}); !errors.As(err, &full) || full.Reason != "STORE_FULL" {
		t.Errorf("still full: %v", err)
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	w.fresh()
}

// fill writes until nothing more fits.
func fill(t *testing.T, dir string) (path string) {
	t.Helper()
	f := must(os.Create(filepath.Join(dir, "ballast")))(t)
	defer f.Close()
	for piece := make([]byte, 4096); ; {
		if _, err := f.Write(piece); errors.Is(err, unix.ENOSPC) {
			return f.Name()
		} else if err != nil {
			t.Fatal(err)
		}
	}
}

// TestRevokeInCrowd holds a thousand connections to the broker that never finish a
// handshake, takes the link of those who made them, and has others begin handshakes
// without end: a revoke is recorded and contained all the same.
func TestRevokeInCrowd(t *testing.T) {
	w := newWorld(t, "")
	w.verifier(newHost(t), "verifier", w.box.Info.GRPC)
	c := w.fresh()
	there := newHost(t)
	crowd := newProcess(t, w.box.Dir, "crowd", there.command(must(os.Executable())(t), "role-crowd", w.box.Info.GRPC, "1000"))
	crowd.speaks(w.ctx)
	ctx, stop := context.WithCancel(w.ctx)
	var made atomic.Uint64
	var rushing sync.WaitGroup
	for range 16 {
		rushing.Go(func() {
			rush(ctx, w.box.Info.GRPC, func() {
				made.Add(1)
				w.mu.Lock()
				defer w.mu.Unlock()
				w.wake()
			})
		})
	}
	defer rushing.Wait()
	defer stop()
	w.until("there is a rush", func() bool { return made.Load() > 100 })
	number := w.revoke(c)
	w.verdict(c, verify.TokenRevoked)
	w.containment(c, number)
	there.cut(hole) // half-open for the broker, all of them
	c = w.fresh()
	// Somebody who was never there connects in the midst of it.
	if exit, out := w.revokeByCommand(c); exit != 0 {
		t.Errorf("the command ended with %d: %s", exit, out)
	}
	before := made.Load()
	w.until("the rush goes on", func() bool { return made.Load() > before+100 })
	w.settled(c)
}
