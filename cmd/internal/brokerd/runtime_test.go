package brokerd

import (
	"runtime"
	"runtime/debug"
	rtmetrics "runtime/metrics"
	"sync/atomic"
	"testing"
	"time"
)

func TestGarbagePercent(t *testing.T) {
	for live, want := range map[uint64]int{
		0: 600, 4 << 20: 600, 12 << 20: 200, 16 << 20: 150, 24 << 20: 100, 1 << 40: 100,
	} {
		if got := garbagePercent(live); got != want {
			t.Errorf("with %d MiB in use GOGC is %d, want %d", live>>20, got, want)
		}
	}
}

// TestCollectLess: a process with little in use has room for garbage, one with more is as
// by default, and one whose owner set GOGC is left alone.
func TestCollectLess(t *testing.T) {
	before := debug.SetGCPercent(100)
	t.Cleanup(func() { debug.SetGCPercent(before) })
	t.Setenv("GOGC", "100")
	collectLess()
	if p := gogc(); p != 100 {
		t.Fatalf("GOGC is %d where its owner set 100", p)
	}

	t.Setenv("GOGC", "")
	collectLess()
	until := func(what string, ok func(p uint64) bool) {
		t.Helper()
		for deadline := time.Now().Add(time.Minute); !ok(gogc()); time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("GOGC is %d with %s in use", gogc(), what)
			}
			runtime.GC()
		}
	}
	until("little", func(p uint64) bool { return p > 100 })
	kept := make([]byte, 2*garbageRoom)
	until("much", func(p uint64) bool { return p == 100 })
	runtime.KeepAlive(kept)
	until("little again", func(p uint64) bool { return p > 100 })
}

// TestGarbageRoomerAlone: what stays in use for ever beside a roomer doesn't keep it from
// being finalized, or a broker would have for ever the room that it had at its start.
func TestGarbageRoomerAlone(t *testing.T) {
	const all = 64
	var finalized atomic.Int64
	var beside []*int64 // small, and without pointers: Go puts such things together
	for range all {
		beside = append(beside, new(int64))
		runtime.SetFinalizer(new(garbageRoomer), func(*garbageRoomer) { finalized.Add(1) })
		beside = append(beside, new(int64))
	}
	for deadline := time.Now().Add(time.Minute); finalized.Load() < all; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d of %d were finalized", finalized.Load(), all)
		}
		runtime.GC()
	}
	runtime.KeepAlive(beside)
}

func gogc() uint64 {
	s := []rtmetrics.Sample{{Name: "/gc/gogc:percent"}}
	rtmetrics.Read(s)
	return s[0].Value.Uint64()
}

// TestSpareProcessor: one more than there are, and as many as their owner said.
func TestSpareProcessor(t *testing.T) {
	before := runtime.GOMAXPROCS(0)
	t.Cleanup(func() { runtime.GOMAXPROCS(before) })
	t.Setenv("GOMAXPROCS", "1")
	spareProcessor()
	if n := runtime.GOMAXPROCS(0); n != before {
		t.Errorf("%d processors where GOMAXPROCS is set, want %d", n, before)
	}
	t.Setenv("GOMAXPROCS", "")
	spareProcessor()
	if n := runtime.GOMAXPROCS(0); n != before+1 {
		t.Errorf("%d processors, want %d", n, before+1)
	}
}
