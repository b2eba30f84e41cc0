//go:build linux

package soak_test

import (
	"cmp"
	"math/rand/v2"
	"reflect"
	"slices"
	"testing"
	"time"
)

// A kind is what goes wrong.
type kind string

const (
	// The broker.
	restart  kind = "broker restarted"
	crash    kind = "broker killed"
	handover kind = "broker handed over"
	freeze   kind = "broker paused"
	// The path of one agent to it.
	stall  kind = "path stalled"
	deafen kind = "path deaf to the broker"
	forget kind = "path forgot its connections"
	refuse kind = "path refused"
	// An agent's process.
	suspend   kind = "agent paused"
	stopAgent kind = "agent restarted"
	killAgent kind = "agent killed"
	jump      kind = "clock jumped"
	// An identity.
	rotate kind = "SVID rotated"
	api    kind = "Workload API restarted"
	// What an operator does.
	revoke  kind = "grant revoked"
	reissue kind = "identity revoked, reissue lock"
)

// A track is faults of which one ends before the next begins. Those of different tracks
// meet as they like.
type track struct {
	kinds   []kind
	targets map[kind][]string
	gap     [2]float64 // between two, in lives
	// How long one lasts, in lives: from one of these ranges. A fault that lasts has each
	// range in turn.
	lasts [][2]float64
}

var (
	// away are times that end well before a credential has to be renewed, after half of a
	// life, and after a whole one.
	away  = [][2]float64{{0.02, 0.3}, {0.55, 0.95}, {1.05, 1.8}}
	brief = [][2]float64{{0, 0.1}, {0.1, 0.5}}

	tracks = []track{
		{kinds: []kind{restart, crash, handover, freeze}, gap: [2]float64{0.4, 1.8}, lasts: away},
		{kinds: []kind{stall, deafen, forget, refuse}, gap: [2]float64{0.3, 1.2}, lasts: away, targets: map[kind][]string{"": everyUnit}},
		{
			kinds: []kind{suspend, stopAgent, killAgent, jump, jump}, gap: [2]float64{0.3, 1.2}, lasts: [][2]float64{{0.02, 0.3}, {0.3, 0.95}, {1.05, 1.5}},
			targets: map[kind][]string{suspend: {unitSockets, unitRestarted, unitFiles, unitAWS}, "": {unitRestarted, unitRestarted, unitFiles, unitRelay}, jump: {unitJumps}},
		},
		{kinds: []kind{rotate, rotate, api}, gap: [2]float64{0.1, 0.6}, lasts: brief, targets: map[kind][]string{"": everyUnit}},
		{kinds: []kind{revoke, revoke, reissue}, gap: [2]float64{0.5, 2}, lasts: [][2]float64{{0.1, 0.4}, {0.8, 1.2}}, targets: map[kind][]string{"": {unitSockets, unitRestarted, unitFiles, unitJumps}}},
	}
)

// A fault is one that is planned.
type fault struct {
	At     time.Duration `json:"at"`
	Kind   kind          `json:"kind"`
	Target string        `json:"target,omitempty"`
	For    time.Duration `json:"for,omitempty"`
}

// A bag gives each of some things once, in random order, and then all of them again.
type bag[T any] struct {
	random *rand.Rand
	all    []T
	left   []T
}

func (b *bag[T]) draw() T {
	if len(b.left) == 0 {
		b.left = slices.Clone(b.all)
		b.random.Shuffle(len(b.left), func(i, j int) { b.left[i], b.left[j] = b.left[j], b.left[i] })
	}
	last := b.left[len(b.left)-1]
	b.left = b.left[:len(b.left)-1]
	return last
}

// plan is what goes wrong, by track; the same for the same seed.
func plan(seed uint64, total, life time.Duration) [][]fault {
	out := make([][]fault, len(tracks))
	for i, t := range tracks {
		random := rand.New(rand.NewPCG(seed, uint64(i)))
		kinds, lasts := bag[kind]{random: random, all: t.kinds}, bag[[2]float64]{random: random, all: t.lasts}
		targets := map[kind]*bag[string]{}
		for k, all := range t.targets {
			targets[k] = &bag[string]{random: random, all: all}
		}
		between := func(r [2]float64) time.Duration {
			return time.Duration((r[0] + random.Float64()*(r[1]-r[0])) * float64(life))
		}
		for at := between(t.gap); at < total; at += between(t.gap) {
			f := fault{At: at, Kind: kinds.draw()}
			if b := cmp.Or(targets[f.Kind], targets[""]); b != nil {
				f.Target = b.draw()
			}
			switch f.Kind {
			case handover, forget, rotate, revoke: // are over at once
			default:
				f.For = between(lasts.draw())
			}
			at += f.For
			out[i] = append(out[i], f)
		}
	}
	return out
}

// TestPlan: a seed gives one plan; every kind is in an hour of it, and outages of every
// length.
func TestPlan(t *testing.T) {
	const life = time.Minute
	p := plan(7, time.Hour, life)
	if !reflect.DeepEqual(p, plan(7, time.Hour, life)) {
		t.Error("the same seed gives another plan")
	}
	if reflect.DeepEqual(p, plan(8, time.Hour, life)) {
		t.Error("another seed gives the same plan")
	}
	count, long := map[kind]int{}, map[kind]int{}
	for i, faults := range p {
		for j, f := range faults {
			count[f.Kind]++
			if f.For > life {
				long[f.Kind]++
			}
			if j > 0 && f.At < faults[j-1].At+faults[j-1].For {
				t.Errorf("track %d: %v begins before %v has ended", i, f, faults[j-1])
			}
		}
	}
	for _, t2 := range tracks {
		for _, k := range t2.kinds {
			if count[k] == 0 {
				t.Errorf("nothing of %q in an hour", k)
			}
		}
	}
	for _, k := range []kind{restart, crash, freeze, stall, deafen, refuse, suspend, jump} {
		if long[k] == 0 {
			t.Errorf("%q never lasts longer than a life", k)
		}
	}
}
