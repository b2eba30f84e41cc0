package policy

import (
	"cmp"
	"slices"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
)

// dataset turns what was parsed into what is asked. Everything that a rule looks
// up stands under its key, so a decision costs the same with ten entries and with
// a hundred thousand.
func (p *parser) dataset() *dataset {
	d := &dataset{
		audiences:     p.audiences,
		entitlements:  p.entitlements,
		exchange:      p.exchange,
		operators:     p.operators,
		verifiers:     p.verifiers,
		introspectors: p.introspectors,
		limits:        p.limits,
		lift:          p.lift,
		templates:     p.templates,
		names:         map[string][]string{},
		places:        p.places,
	}
	slices.SortFunc(d.templates, func(a, b *template) int { return cmp.Compare(a.text, b.text) })
	for name, a := range p.audiences {
		for _, pattern := range a.Identities {
			d.names[pattern] = append(d.names[pattern], name)
		}
	}
	d.value = ast.NewObject(
		item("audiences", object(p.audiences, audienceTerm)),
		item("entitlements", object(p.entitlements, targetsTerm)),
		item("exchange", object(p.exchange, func(t table[entitlement]) *ast.Term { return object(t, targetsTerm) })),
		item("operators", object(p.operators, setTerm)),
		item("verifiers", object(p.verifiers, verifierTerm)),
		item("introspectors", object(p.introspectors, setTerm)),
		item("limits", object(p.limits, limitsTerm)),
		item("lift", ast.ObjectTerm(
			item("two_person", ast.BooleanTerm(p.lift.twoPerson)),
			item("within_ns", int64Term(int64(p.lift.within))),
		)),
		item("custom", object(p.custom, ast.NewTerm)),
	)
	return d
}

// namesOf lists the audience names that any of patterns answers to, sorted.
func (d *dataset) namesOf(patterns []string) []string {
	var out []string
	for _, p := range patterns {
		out = append(out, d.names[p]...)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

func (d *dataset) facts(in Input) facts {
	patterns := Patterns(in.Caller.ID)
	f := facts{patterns: patterns, names: d.namesOf(patterns)}
	f.match, f.target = d.match(in, patterns)
	return f
}

// match finds the most specific of patterns that has an entry for the question.
// It is a look-up a pattern, in Go because it costs a hundredth of what it would
// in Rego. Empty if there is none. The target is what the audience stands under.
func (d *dataset) match(in Input, patterns []string) (match, target string) {
	var has func(string) bool
	switch in.Action {
	case ActionIssue:
		return d.entitled(in, patterns, func(p string) map[string]entitlement { return d.entitlements[p] })
	case ActionExchange:
		return d.entitled(in, patterns, func(p string) map[string]entitlement { return d.exchange[p][in.ParentAudience] })
	case ActionFollow, ActionRelay, ActionReport:
		has = func(p string) bool { _, ok := d.verifiers[p]; return ok }
	case ActionIntrospect:
		has = func(p string) bool { _, ok := d.introspectors[p]; return ok }
	case ActionGiveBack:
		return "", "" // everybody's own
	default:
		has = func(p string) bool { _, ok := d.operators[p]; return ok }
	}
	return first(patterns, has), ""
}

// entitled finds the first pattern, and of its keys for the audience the first, with an
// entry.
func (d *dataset) entitled(in Input, patterns []string, entries func(pattern string) map[string]entitlement) (match, target string) {
	keys := d.keys(in.Caller.ID, in.Audience)
	for _, p := range patterns {
		e := entries(p)
		if i := slices.IndexFunc(keys, func(k string) bool { _, ok := e[k]; return ok }); i >= 0 {
			return p, keys[i]
		}
	}
	return "", keys[0]
}

// limitsOf returns the limits of the most specific of patterns that has some.
func (d *dataset) limitsOf(patterns []string) Limits {
	return d.limits[first(patterns, func(p string) bool { _, ok := d.limits[p]; return ok })]
}

// secondPerson says what an operator's call needs beside itself.
func (d *dataset) secondPerson(in Input) SecondPerson {
	out := SecondPerson{Within: d.lift.within}
	var confirm Action
	switch in.Action {
	case ActionLift, ActionLiftConfirm:
		out.Required, confirm = d.lift.twoPerson, ActionLiftConfirm
	case ActionRevokeEverything:
		out.Required, confirm = true, ActionRevokeEverything
	default:
		return SecondPerson{}
	}
	if !out.Required {
		return out
	}
	for pattern, actions := range d.operators {
		if slices.Contains(actions, string(confirm)) && pattern != in.Caller.ID.String() {
			out.Confirmers = append(out.Confirmers, pattern)
		}
	}
	slices.Sort(out.Confirmers)
	return out
}

func first(list []string, ok func(string) bool) string {
	if i := slices.IndexFunc(list, ok); i >= 0 {
		return list[i]
	}
	return ""
}

func object[M ~map[string]V, V any](m M, term func(V) *ast.Term) *ast.Term {
	items := make([][2]*ast.Term, 0, len(m))
	for k, v := range m {
		items = append(items, ast.Item(ast.StringTerm(k), term(v)))
	}
	return ast.ObjectTerm(items...)
}

func targetsTerm(m map[string]entitlement) *ast.Term { return object(m, entitlementTerm) }

func entitlementTerm(e entitlement) *ast.Term {
	return ast.ObjectTerm(
		item("scopes", setTerm(e.scopes)),
		item("default_scopes", stringsTerm(e.defaults)),
		item("ttl_ns", int64Term(int64(e.ttl))),
		item("max_ttl", ast.StringTerm(shortDuration(e.ttl))),
		item("binding", ast.StringTerm(e.binding)),
		item("bindings", bindingsTerm(e.binding)),
	)
}

// bindingsTerm maps each binding that may be asked for to what is given: the
// stricter of it and the entitlement's.
func bindingsTerm(least string) *ast.Term {
	var items [][2]*ast.Term
	for _, asked := range []string{BindingNone, BindingSPIFFE, BindingX5T} {
		given := asked
		if strictness(least) > strictness(asked) {
			given = least
		}
		items = append(items, item(asked, ast.StringTerm(given)))
	}
	return ast.ObjectTerm(items...)
}

func audienceTerm(a Audience) *ast.Term {
	return ast.ObjectTerm(
		item("owner", ast.StringTerm(a.Owner)),
		item("verified_by", ast.StringTerm(a.VerifiedBy)),
		item("identities", setTerm(a.Identities)),
		item("max_staleness_ns", int64Term(int64(a.MaxStaleness))),
		item("on_stale", ast.StringTerm(a.OnStale)),
	)
}

func verifierTerm(v verifier) *ast.Term {
	return ast.ObjectTerm(
		item("follow", setTerm(v.follow)),
		item("relay", ast.BooleanTerm(v.relay)),
	)
}

func limitsTerm(l Limits) *ast.Term {
	return ast.ObjectTerm(
		item("issue_per_second", int64Term(int64(l.IssuePerSecond))),
		item("live_grants", int64Term(int64(l.LiveGrants))),
		item("give_backs_per_minute", int64Term(int64(l.GiveBacksPerMinute))),
	)
}

// setTerm is a set as JSON can hold it: an object whose values are true.
func setTerm(list []string) *ast.Term {
	items := make([][2]*ast.Term, len(list))
	for i, s := range list {
		items[i] = ast.Item(ast.StringTerm(s), ast.BooleanTerm(true))
	}
	return ast.ObjectTerm(items...)
}

// shortDuration writes 5m0s as 5m.
func shortDuration(d time.Duration) string {
	s := d.String()
	for _, zero := range []string{"m0s", "h0m"} {
		if len(s) > len(zero) && s[len(s)-len(zero):] == zero {
			s = s[:len(s)-2]
		}
	}
	return s
}
