package brokerd

import (
	"os"
	"runtime"
	"runtime/debug"
	rtmetrics "runtime/metrics"
)

// spareProcessor has Go run one goroutine more at once than there are processors, unless
// GOMAXPROCS says what is wanted. Whoever commits waits for the disk most of the time, and
// Go gives the place of one that waits in a system call to others only after a while: on
// two processors a busy broker left a sixth of them idle.
func spareProcessor() {
	if os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(runtime.GOMAXPROCS(0) + 1)
	}
}

// garbageRoom is how much garbage a small broker may have before it is collected, in
// bytes. By Go's default the heap may double, so that a broker with 15 MB that are in use
// looks through them for each 15 MB of garbage: at full load thirty times a second. From
// this size on it is as by default.
const garbageRoom = 24 << 20

// collectLess makes room for garbage, unless GOGC says what is wanted. A limit in
// GOMEMLIMIT holds as ever. It is for the whole process, and stays.
func collectLess() {
	if os.Getenv("GOGC") == "" {
		(&garbageRoomer{}).next()
	}
}

// A garbageRoomer is garbage itself, so that it is finalized in each collection: after one
// it is known how much is in use.
type garbageRoomer struct {
	percent int
	// A pointer, so that it has a place of its own: small things without any share one, and
	// are finalized only when all in it are garbage.
	_ *byte
}

func (g *garbageRoomer) next() {
	live := []rtmetrics.Sample{{Name: "/gc/heap/live:bytes"}}
	rtmetrics.Read(live)
	p := garbagePercent(live[0].Value.Uint64())
	if p < g.percent*9/10 || p > g.percent*11/10 { // setting it stops the world
		debug.SetGCPercent(p)
		g.percent = p
	}
	runtime.SetFinalizer(g, (*garbageRoomer).next)
}

// garbagePercent is GOGC for so much in use.
func garbagePercent(live uint64) int {
	live = max(live, 4<<20) // what Go takes as the least, in effect
	return int(max(100, 100*garbageRoom/live))
}
