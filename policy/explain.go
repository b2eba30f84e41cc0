package policy

import (
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/rego"
	"github.com/open-policy-agent/opa/v1/topdown"
)

// Explanation is a decision with how it came about. It marshals to JSON.
type Explanation struct {
	Decision Decision `json:"decision"`
	// Input is the question as the rules saw it.
	Input any `json:"input"`
	// Rules that held, in the order in which they did, each once.
	Rules []FiredRule `json:"rules"`
	// Entries of policy data that the decision names.
	Entries []Entry `json:"entries"`
}

// FiredRule is a rule whose conditions held for this question.
type FiredRule struct {
	Name string `json:"name"`
	File string `json:"file"`
	Line int    `json:"line"`
}

// Entry is one entry of policy data, as the rules saw it.
type Entry struct {
	// Ref is how Rego spells it: data.dayfly.entitlements["spiffe://td/a"]["orders"].
	Ref string `json:"ref"`
	// File and Line are where it stands; empty for one that a rule made up.
	File  string `json:"file,omitempty"`
	Line  int    `json:"line,omitempty"`
	Value any    `json:"value,omitempty"`
}

// Explain answers one question as Decide does, on the policy in force, and says
// how. It costs many times a decision. Errors are those of Decide.
func (p *Policy) Explain(ctx context.Context, in Input) (Explanation, error) {
	g := p.current.Load()
	if g == nil {
		return Explanation{}, ErrNone
	}
	if in.Time.IsZero() {
		in.Time = p.cfg.Now()
	}
	var t ruleTracer
	d, err := g.decide(ctx, p.cfg, in, rego.EvalQueryTracer(&t))
	if err != nil {
		return Explanation{}, err
	}
	e := Explanation{Decision: d, Rules: t.rules}
	if e.Input, err = ast.JSON(in.value(g.data.facts(in))); err != nil {
		return Explanation{}, fmt.Errorf("explaining the input: %w", err)
	}
	for _, path := range d.paths {
		e.Entries = append(e.Entries, g.data.entry(path))
	}
	return e, nil
}

func (d *dataset) entry(path []string) Entry {
	e := Entry{Ref: dataRef(path)}
	if at, ok := d.places[e.Ref]; ok {
		e.File, e.Line = at.file, at.line
	}
	var v ast.Value = d.value
	for _, key := range path {
		obj, ok := v.(ast.Object)
		if !ok {
			return e
		}
		t := obj.Get(ast.StringTerm(key))
		if t == nil {
			return e
		}
		v = t.Value
	}
	if x, err := ast.JSON(v); err == nil {
		e.Value = x
	}
	return e
}

// WriteText writes the explanation for a reader.
func (e Explanation) WriteText(w io.Writer) error {
	var b strings.Builder
	d := e.Decision
	if d.Allow {
		b.WriteString("allowed")
	} else {
		b.WriteString("denied")
	}
	fmt.Fprintf(&b, " by rule %s (policy generation %d, revision %s)\n", d.Rule, d.Generation, d.Revision)
	if d.TTL > 0 {
		fmt.Fprintf(&b, "  scopes   %s\n  ttl      %s\n  binding  %s\n", strings.Join(d.Scopes, " "), shortDuration(d.TTL), d.Binding)
	}
	if d.Limits.IssuePerSecond > 0 {
		fmt.Fprintf(&b, "  limit    %d a second\n", d.Limits.IssuePerSecond)
	}
	if d.Limits.LiveGrants > 0 {
		fmt.Fprintf(&b, "  limit    %d live grants\n", d.Limits.LiveGrants)
	}
	if d.Limits.GiveBacksPerMinute > 0 {
		fmt.Fprintf(&b, "  limit    %d give-backs a minute\n", d.Limits.GiveBacksPerMinute)
	}
	if d.SecondPerson.Required {
		fmt.Fprintf(&b, "  takes a second person within %s; may confirm: %s\n", shortDuration(d.SecondPerson.Within), strings.Join(d.SecondPerson.Confirmers, " "))
	}
	if len(d.Names) > 0 {
		fmt.Fprintf(&b, "  answers to  %s\n", strings.Join(d.Names, " "))
	}
	if d.Template != "" {
		fmt.Fprintf(&b, "  template %s gives this caller its audience\n", d.Template)
	}
	for _, x := range d.Denials {
		fmt.Fprintf(&b, "  %s: %s\n", x.Reason, x.Message)
		if x.Hint != "" {
			fmt.Fprintf(&b, "    hint: %s\n", x.Hint)
		}
	}
	b.WriteString("decided on\n")
	for _, x := range e.Entries {
		fmt.Fprintf(&b, "  %s", x.Ref)
		if x.File != "" {
			fmt.Fprintf(&b, "  (%s:%d)", x.File, x.Line)
		}
		b.WriteByte('\n')
	}
	if len(e.Entries) == 0 {
		b.WriteString("  no entry of the data\n")
	}
	b.WriteString("rules that held\n")
	for _, r := range e.Rules {
		fmt.Fprintf(&b, "  %s  (%s:%d)\n", r.Name, r.File, r.Line)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// String is what WriteText writes.
func (e Explanation) String() string {
	var b strings.Builder
	_ = e.WriteText(&b) // a strings.Builder takes everything
	return b.String()
}

// ruleTracer collects the rules that an evaluation leaves with success.
type ruleTracer struct {
	rules []FiredRule
	seen  map[FiredRule]bool
}

func (*ruleTracer) Enabled() bool { return true }

func (*ruleTracer) Config() topdown.TraceConfig { return topdown.TraceConfig{} }

func (t *ruleTracer) TraceEvent(e topdown.Event) {
	rule, ok := e.Node.(*ast.Rule)
	if e.Op != topdown.ExitOp || !ok || rule.Location == nil {
		return
	}
	r := FiredRule{Name: rule.Ref().GroundPrefix().String(), File: rule.Location.File, Line: rule.Location.Row}
	if t.seen[r] {
		return
	}
	if t.seen == nil {
		t.seen = map[FiredRule]bool{}
	}
	t.seen[r] = true
	t.rules = append(t.rules, r)
}
