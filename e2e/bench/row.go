package main

import (
	"context"
	"fmt"
	"regexp"
	"time"
)

// A row is one figure and its floor.
type row struct {
	row, name string
	// fixture names what the row shares with its neighbours: it is ended when a row with
	// another one begins.
	fixture string
	unit    unit
	target  *Target
	rounds  int     // 0: as many as the size has
	series  string  // of a plot of cost against size; "": of none
	x       float64 // the size there
	setup   func(context.Context, *lab) (pair, error)
}

// A pair is the two sides of a row. Floor is nil where a figure is only reported.
type pair struct{ ours, floor side }

func (r *row) id() string { return r.row + "/" + r.name }

// A Target bounds the median ratio of ours to the floor.
type Target struct {
	Ratio   float64 `json:"ratio"`
	AtLeast bool    `json:"at_least,omitempty"` // rates; costs are at most
}

func atLeast(ratio float64) *Target { return &Target{ratio, true} }
func atMost(ratio float64) *Target  { return &Target{ratio, false} }

func (t *Target) met(ratio float64) bool {
	if t.AtLeast {
		return ratio >= t.Ratio
	}
	return ratio <= t.Ratio
}

// A unit is what a figure is in.
type unit string

const (
	perSecond unit = "calls/s"
	inSeconds unit = "s"
	inBytes   unit = "B"
	inCores   unit = "cores"
)

// A Figure is what a row showed.
type Figure struct {
	Row    string    `json:"row"`
	Case   string    `json:"case"`
	Unit   unit      `json:"unit"`
	Ours   *Reading  `json:"ours"`
	Floor  *Reading  `json:"floor,omitempty"`
	Ratio  *Spread   `json:"ratio,omitempty"`
	Target *Target   `json:"target,omitempty"`
	Pass   *bool     `json:"pass,omitempty"`
	Series string    `json:"series,omitempty"`
	X      float64   `json:"x,omitempty"`
	Rounds int       `json:"rounds"`
	Size   string    `json:"size"`
	At     time.Time `json:"at"`
}

// A size says how much of everything. Large has only what normal is too small for.
type size struct {
	name   string
	rounds int
	window time.Duration // of one round of calls

	callers      []int // issuing
	depths       []int // of exchanged and verified tokens
	presented    int   // distinct tokens, to be exchanged for the first time
	jwtLogins    bool
	introspect   bool
	agent        []int // callers
	live         []int // grants, when one revokes
	verifiers    []int
	bound        time.Duration // of those verifiers
	tokens       int           // distinct ones, to be verified for the first time
	revocations  int           // in the set, for the row about that
	entitlements []int
	stored       []int // grants, for bytes on disk and memory
	pruned       int   // grants of the day that is pruned; 0: no such row
	prunes       int   // of such days
	binaries     bool
	pings        time.Duration // of looking at the CPU that pings take
}

var sizes = map[string]size{
	"tiny": {
		rounds: 1, window: 30 * time.Millisecond,
		callers: []int{1, 4}, depths: []int{1, 6}, presented: 100, jwtLogins: true, introspect: true, agent: []int{1, 4},
		live: []int{100, 200}, verifiers: []int{6}, bound: 3 * time.Second, tokens: 10, revocations: 40,
		entitlements: []int{10, 20}, stored: []int{300}, pruned: 300, prunes: 1, binaries: true, pings: 200 * time.Millisecond,
	},
	"normal": {
		rounds: 5, window: 700 * time.Millisecond,
		callers: []int{1, 16, 64, 256}, depths: []int{1, 2, 3, 4, 5, 6}, presented: 20_000, jwtLogins: true, introspect: true, agent: []int{1, 64},
		live: []int{1_000, 10_000, 100_000}, verifiers: []int{10, 100, 1_000}, bound: 30 * time.Second, tokens: 400, revocations: 10_000,
		entitlements: []int{10, 1_000, 100_000}, stored: []int{100_000}, pruned: 100_000, prunes: 3, binaries: true, pings: 5 * time.Second,
	},
	"large": {
		rounds: 5, window: 700 * time.Millisecond,
		live: []int{1_000, 1_000_000}, verifiers: []int{10_000}, bound: 30 * time.Second,
		stored: []int{1_000_000}, pruned: 1_000_000, prunes: 1, pings: 30 * time.Second,
	},
}

// rowsOf is the table: every row of a size, in order.
func rowsOf(s size) []row {
	var rows []row
	for _, of := range []func(size) []row{
		issueRows, exchangeRows, introspectRows, agentRows, verifyRows, revokedSetRows, policyRows,
		revokeRows, storeRows, pruneRows, feedRows, binaryRows,
	} {
		rows = append(rows, of(s)...)
	}
	return rows
}

// matching are the rows whose "row/case" matches.
func matching(rows []row, pattern string) ([]row, error) {
	match, err := regexp.Compile(pattern)
	if err != nil {
		return nil, fmt.Errorf("--row: %w", err)
	}
	var out []row
	for _, r := range rows {
		if match.MatchString(r.id()) {
			out = append(out, r)
		}
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("--row: no row matches %q; the rows are listed by: bench rows", pattern)
	}
	return out, nil
}

// measure runs one row.
func (l *lab) measure(ctx context.Context, r row) (*Figure, error) {
	p, err := r.setup(ctx, l)
	if err != nil {
		return nil, fmt.Errorf("preparing: %w", err)
	}
	rounds := l.size.rounds
	if r.rounds != 0 {
		rounds = min(rounds, r.rounds)
	}
	f := &Figure{Row: r.row, Case: r.name, Unit: r.unit, Target: r.target, Series: r.series, X: r.x, Rounds: rounds, Size: l.size.name, At: time.Now().UTC().Truncate(time.Second)}
	var ratio Spread
	if f.Ours, f.Floor, ratio, err = interleave(ctx, rounds, p); err != nil {
		return nil, err
	}
	if p.floor != nil {
		f.Ratio = &ratio
	}
	if r.target != nil {
		pass := r.target.met(ratio.Median)
		f.Pass = &pass
	}
	return f, nil
}

// groups counts with thousands apart: 100,000.
func groups(n int) string {
	s := fmt.Sprint(n)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

func (f *Figure) id() string { return f.Row + "/" + f.Case }
