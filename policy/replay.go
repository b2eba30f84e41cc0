package policy

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"iter"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"
)

// Recorded is one question that was asked in earnest, and what came of it.
type Recorded struct {
	Input  Input
	Answer Answer
	// Given is the life of the credential that was issued, after caps; 0: none was.
	Given time.Duration
}

// Answer is what policy said, as far as two answers are compared.
type Answer struct {
	Allow   bool          `json:"allow"`
	Reason  string        `json:"reason,omitempty"`
	Scopes  []string      `json:"scopes,omitempty"`
	TTL     time.Duration `json:"ttl_ns,omitempty"`
	Binding string        `json:"binding,omitempty"`
}

// ChangeKind says what a candidate policy would do otherwise.
type ChangeKind string

// The kinds, the gravest first.
const (
	NewlyDenied   ChangeKind = "denied"
	Shortened     ChangeKind = "shortened"
	FewerScopes   ChangeKind = "fewer_scopes"
	StricterBound ChangeKind = "stricter_binding"
	NewlyAllowed  ChangeKind = "allowed"
	Lengthened    ChangeKind = "lengthened"
	MoreScopes    ChangeKind = "more_scopes"
	LaxerBound    ChangeKind = "laxer_binding"
)

// ChangeKinds lists all.
var ChangeKinds = []ChangeKind{NewlyDenied, Shortened, FewerScopes, StricterBound, NewlyAllowed, Lengthened, MoreScopes, LaxerBound}

// ReasonFailed stands for an evaluation that failed: the broker refuses then.
const ReasonFailed = "evaluation_failed"

// Change is a question whose answer changes, with how often it was asked. What differs
// from one asking to the next (time, address, SVID, grants) isn't shown.
type Change struct {
	Kinds []ChangeKind `json:"kinds"`

	Action         Action        `json:"action"`
	Caller         string        `json:"caller"`
	Attestation    string        `json:"attestation"`
	Audience       string        `json:"audience,omitempty"`
	Scopes         []string      `json:"scopes,omitempty"`
	TTL            time.Duration `json:"ttl_ns,omitempty"`
	Binding        string        `json:"binding,omitempty"`
	ParentAudience string        `json:"parent_audience,omitempty"`
	ParentScopes   []string      `json:"parent_scopes,omitempty"`
	Lineage        []string      `json:"lineage,omitempty"`
	Selectors      []string      `json:"selectors,omitempty"`
	Lock           string        `json:"lock,omitempty"`
	Verifier       *Verifier     `json:"verifier,omitempty"`

	Before Answer `json:"before"`
	After  Answer `json:"after"`
	// Message says why the candidate denies.
	Message string `json:"message,omitempty"`

	Count int       `json:"count"`
	Last  time.Time `json:"last"`
}

// Has says whether a change is of a kind.
func (c Change) Has(kind ChangeKind) bool { return slices.Contains(c.Kinds, kind) }

// Replayed is what a candidate policy would have done.
type Replayed struct {
	// Revision of the candidate.
	Revision string `json:"revision"`
	// Asked counts the questions, Same those with the same answer.
	Asked int `json:"asked"`
	Same  int `json:"same"`
	// Changes, the gravest first, then those that were asked for most.
	Changes []Change `json:"changes"`
}

// Count adds up the questions whose change is of a kind.
func (r Replayed) Count(kind ChangeKind) int {
	n := 0
	for _, c := range r.Changes {
		if c.Has(kind) {
			n += c.Count
		}
	}
	return n
}

// Replay puts recorded questions to the policy in force and tells whose answers change.
// Each is evaluated as the broker would, on all processors.
func (p *Policy) Replay(ctx context.Context, records iter.Seq[Recorded]) (Replayed, error) {
	g := p.current.Load()
	if g == nil {
		return Replayed{}, ErrNone
	}
	questions := make(chan Recorded)
	parts := make([]replay, runtime.GOMAXPROCS(0))
	var workers sync.WaitGroup
	for i := range parts {
		parts[i].changes = map[string]*Change{}
		workers.Go(func() {
			for r := range questions {
				parts[i].ask(ctx, g, p.cfg, r)
			}
		})
	}
	for r := range records {
		if ctx.Err() != nil {
			break
		}
		questions <- r
	}
	close(questions)
	workers.Wait()
	if err := ctx.Err(); err != nil {
		return Replayed{}, err
	}
	return merged(g.revision, parts), nil
}

// replay is one worker's share.
type replay struct {
	asked, same int
	changes     map[string]*Change // by everything but count and last
}

func (s *replay) ask(ctx context.Context, g *generation, cfg Config, r Recorded) {
	after, message := Answer{Reason: ReasonFailed}, ""
	switch d, err := g.decide(ctx, cfg, r.Input); {
	case err != nil:
		message = err.Error()
	case d.Allow:
		after = Answer{Allow: true, Scopes: d.Scopes, TTL: d.TTL, Binding: d.Binding}
	default:
		after, message = Answer{Reason: d.Denials[0].Reason}, d.Denials[0].Message
	}
	s.asked++
	kinds := compare(r, after)
	if len(kinds) == 0 {
		s.same++
		return
	}
	c := change(r.Input)
	c.Kinds, c.Before, c.After, c.Message = kinds, r.Answer, after, message
	slices.Sort(c.Before.Scopes)
	slices.Sort(c.After.Scopes)
	s.add(c, r.Input.Time, 1)
}

func (s *replay) add(c Change, last time.Time, count int) {
	c.Count, c.Last = 0, time.Time{}
	key, err := json.Marshal(c)
	if err != nil {
		panic(fmt.Sprintf("internal error: marshalling a change: %v", err))
	}
	at := s.changes[string(key)]
	if at == nil {
		at = &c
		s.changes[string(key)] = at
	}
	at.Count += count
	if last.After(at.Last) {
		at.Last = last
	}
}

func merged(revision string, parts []replay) Replayed {
	all := replay{changes: map[string]*Change{}}
	for _, p := range parts {
		all.asked += p.asked
		all.same += p.same
		for _, c := range p.changes {
			all.add(*c, c.Last, c.Count)
		}
	}
	out := Replayed{Revision: revision, Asked: all.asked, Same: all.same, Changes: []Change{}}
	for _, c := range all.changes {
		out.Changes = append(out.Changes, *c)
	}
	gravity := func(c Change) int { return slices.Index(ChangeKinds, c.Kinds[0]) }
	slices.SortFunc(out.Changes, func(a, b Change) int {
		return cmp.Or(cmp.Compare(gravity(a), gravity(b)), cmp.Compare(b.Count, a.Count), cmp.Compare(a.Caller, b.Caller),
			cmp.Compare(a.Action, b.Action), cmp.Compare(a.Audience, b.Audience), cmp.Compare(strings.Join(a.Scopes, " "), strings.Join(b.Scopes, " ")))
	})
	return out
}

// change is a question without what differs from one asking to the next.
func change(in Input) Change {
	c := Change{
		Action: in.Action, Caller: in.Caller.ID.String(), Attestation: cmp.Or(in.Caller.Attestation, AttestationX509),
		Audience: in.Audience, Scopes: in.Scopes, TTL: in.TTL, Binding: in.Binding,
		ParentAudience: in.ParentAudience, ParentScopes: in.ParentScopes, Selectors: in.Selectors, Lock: in.Lock,
	}
	for _, m := range in.Lineage {
		c.Lineage = append(c.Lineage, m.ID.String())
	}
	if in.Action == ActionFollow || in.Action == ActionRelay {
		c.Verifier = &in.Verifier
	}
	return c
}

// compare lists how the candidate's answer differs in effect, the gravest first.
func compare(r Recorded, after Answer) []ChangeKind {
	before := r.Answer
	switch {
	case before.Allow && !after.Allow:
		return []ChangeKind{NewlyDenied}
	case !before.Allow && after.Allow:
		return []ChangeKind{NewlyAllowed}
	case !after.Allow:
		return nil
	}
	var kinds []ChangeKind
	note := func(kind ChangeKind, is bool) {
		if is {
			kinds = append(kinds, kind)
		}
	}
	// The broker's cap, or the parent's end, may have cut the life shorter than both.
	capped := r.Given > 0 && r.Given < before.TTL
	effective := before.TTL
	if capped {
		effective = r.Given
	}
	lacks := func(a, b []string) bool {
		return slices.ContainsFunc(a, func(s string) bool { return !slices.Contains(b, s) })
	}
	note(Shortened, after.TTL < effective)
	note(FewerScopes, lacks(before.Scopes, after.Scopes))
	note(StricterBound, strictness(after.Binding) > strictness(before.Binding))
	note(Lengthened, after.TTL > before.TTL && !capped)
	note(MoreScopes, lacks(after.Scopes, before.Scopes))
	note(LaxerBound, strictness(after.Binding) < strictness(before.Binding))
	return kinds
}
