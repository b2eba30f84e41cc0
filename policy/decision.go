package policy

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
)

// Decision is the answer to one question. The zero Decision denies.
type Decision struct {
	// Allow is true only if a rule said so and none gave a denial.
	Allow bool `json:"allow"`

	// Scopes granted: those asked for, all of them, or the policy's default set
	// where none were asked for.
	Scopes []string `json:"scopes,omitempty"`
	// TTL granted: the one asked for, or the policy's where none was asked for.
	// Caps and the parent's remaining life come on top, in Go.
	TTL time.Duration `json:"ttl_ns,omitempty"`
	// Binding is the stricter of what was asked for and what policy says.
	Binding string `json:"binding,omitempty"`
	// Limits of the caller, for issue, exchange and give_back; zero fields set none. They come
	// from the data, allowed or not. A rule may set lower ones and can't raise them.
	Limits Limits `json:"limits"`
	// SecondPerson is set for lift, lift_confirm and revoke_everything, allowed or
	// not. It comes from the data, and no rule can waive it.
	SecondPerson SecondPerson `json:"second_person,omitzero"`

	// Names are the audience names that the caller answers to, sorted.
	Names []string `json:"names,omitempty"`

	// Template is the audience of the data, with placeholders, that gives the caller the
	// name that it asked for; empty where the name itself is declared.
	Template string `json:"template,omitempty"`

	// Denials say why not, at least one where Allow is false.
	Denials []Denial `json:"denials,omitempty"`

	// Rule names the rule that decided.
	Rule string `json:"rule,omitempty"`
	// Data lists the entries of policy data that it was decided on, as Rego spells
	// them: data.dayfly.entitlements["spiffe://td/a/*"]["orders"].
	Data []string `json:"data,omitempty"`
	// Generation is that of the policy that decided; see [Status].
	Generation uint64 `json:"generation"`
	// Revision names the policy that decided, over restarts and brokers: a digest of
	// the folder, "sha256:..."; of a bundle, its manifest's revision and the digest,
	// "v42@sha256:...".
	Revision string `json:"revision,omitempty"`

	paths [][]string
}

// Denial is one reason against a request.
type Denial struct {
	// Reason is stable and machine-readable: scope_not_entitled. docs/policy.md
	// lists those of the default policy.
	Reason string `json:"reason"`
	// Message says in words what was refused, Hint what to try next.
	Message string `json:"message"`
	Hint    string `json:"hint,omitempty"`
	// Metadata holds what a program may want: "scopes" (space-separated),
	// "max_ttl" (a Go duration).
	Metadata map[string]string `json:"metadata,omitempty"`
}

// Limits of one identity. Go code holds them; zero is no limit from policy.
type Limits struct {
	IssuePerSecond int `json:"issue_per_second,omitempty"`
	LiveGrants     int `json:"live_grants,omitempty"`
	// GiveBacksPerMinute in place of the broker's default.
	GiveBacksPerMinute int `json:"give_backs_per_minute,omitempty"`
}

// SecondPerson says whether one operator's call only proposes, and another's confirms.
type SecondPerson struct {
	Required bool `json:"required"`
	// Within is how long a proposal waits for its confirmation.
	Within time.Duration `json:"within_ns"`
	// Confirmers are the patterns under operators that may confirm, sorted, without
	// the caller. Rules of one's own may say otherwise.
	Confirmers []string `json:"confirmers,omitempty"`
}

// denied returns a decision that no rule made.
func denied(reason, message, hint string) Decision {
	return Decision{Denials: []Denial{{Reason: reason, Message: message, Hint: hint}}}
}

// decodeDecision reads the answer of Rego. It is strict, because a misspelt key
// of an answer is a decision that nobody meant.
func decodeDecision(v ast.Value) (Decision, error) {
	var d Decision
	obj, ok := v.(ast.Object)
	if !ok {
		return d, fmt.Errorf("the decision is a %s, not an object", ast.ValueName(v))
	}
	err := eachKey(obj, func(key string, v ast.Value) (err error) {
		switch key {
		case "allow":
			b, ok := v.(ast.Boolean)
			if !ok {
				return fmt.Errorf("allow is a %s, not a boolean", ast.ValueName(v))
			}
			d.Allow = bool(b)
		case "scopes":
			d.Scopes, err = stringList(v)
		case "ttl_ns":
			var n int64
			n, err = integer(v)
			d.TTL = time.Duration(n)
		case "binding":
			d.Binding, err = text(v)
		case "limits":
			d.Limits, err = decodeLimits(v)
		case "denials":
			d.Denials, err = decodeDenials(v)
		case "rule":
			d.Rule, err = text(v)
		case "data":
			d.paths, err = decodePaths(v)
		default:
			err = errors.New("unknown key")
		}
		return err
	})
	if err != nil {
		return Decision{}, err
	}
	for _, p := range d.paths {
		d.Data = append(d.Data, dataRef(p))
	}
	return d, nil
}

func decodeLimits(v ast.Value) (Limits, error) {
	var l Limits
	obj, ok := v.(ast.Object)
	if !ok {
		return l, fmt.Errorf("a %s, not an object", ast.ValueName(v))
	}
	err := eachKey(obj, func(key string, v ast.Value) error {
		n, err := integer(v)
		switch {
		case err != nil:
			return err
		case n < 1 || n > math.MaxInt32:
			return fmt.Errorf("%d is no limit: at least 1", n)
		case key == "issue_per_second":
			l.IssuePerSecond = int(n)
		case key == "live_grants":
			l.LiveGrants = int(n)
		case key == "give_backs_per_minute":
			l.GiveBacksPerMinute = int(n)
		default:
			return errors.New("unknown key")
		}
		return nil
	})
	return l, err
}

// stricter takes the lower of each limit, where there are two.
func (l Limits) stricter(m Limits) Limits {
	lower := func(a, b int) int {
		if a == 0 || b != 0 && b < a {
			return b
		}
		return a
	}
	return Limits{
		lower(l.IssuePerSecond, m.IssuePerSecond), lower(l.LiveGrants, m.LiveGrants),
		lower(l.GiveBacksPerMinute, m.GiveBacksPerMinute),
	}
}

// check holds the answer against the question: policy narrows, it never widens.
func (d *Decision) check(in Input) error {
	if len(d.Denials) > 0 {
		d.Allow = false
	}
	if !d.Allow {
		if len(d.Denials) == 0 {
			d.Denials = denied("denied", "policy denied the request without a reason", "").Denials
		}
		d.Scopes, d.TTL, d.Binding = nil, 0, ""
		return nil
	}
	if in.Action != ActionIssue && in.Action != ActionExchange {
		return nil
	}
	if len(in.Scopes) > 0 && !sameSet(d.Scopes, in.Scopes) {
		return fmt.Errorf("policy granted scopes %q where %q were asked for", d.Scopes, in.Scopes)
	}
	if d.TTL <= 0 || in.TTL > 0 && d.TTL > in.TTL {
		return fmt.Errorf("policy granted a TTL of %v where %v was asked for", d.TTL, in.TTL)
	}
	if strictness(d.Binding) < 0 || strictness(d.Binding) < strictness(in.Binding) {
		return fmt.Errorf("policy granted the binding %q where %q was asked for", d.Binding, in.Binding)
	}
	return nil
}

// strictness orders bindings; -1 for none at all.
func strictness(binding string) int {
	return slices.Index([]string{BindingNone, BindingSPIFFE, BindingX5T}, binding)
}

func sameSet(a, b []string) bool {
	for _, s := range a {
		if !slices.Contains(b, s) {
			return false
		}
	}
	for _, s := range b {
		if !slices.Contains(a, s) {
			return false
		}
	}
	return true
}

func decodeDenials(v ast.Value) ([]Denial, error) {
	var out []Denial
	err := each(v, func(v ast.Value) error {
		obj, ok := v.(ast.Object)
		if !ok {
			return fmt.Errorf("a denial is a %s, not an object", ast.ValueName(v))
		}
		var d Denial
		err := eachKey(obj, func(key string, v ast.Value) (err error) {
			switch key {
			case "reason":
				d.Reason, err = text(v)
			case "message":
				d.Message, err = text(v)
			case "hint":
				d.Hint, err = text(v)
			case "metadata":
				d.Metadata, err = stringMap(v)
			default:
				err = errors.New("unknown key")
			}
			return err
		})
		if err != nil {
			return err
		}
		if d.Reason == "" {
			return errors.New("a denial has no reason")
		}
		out = append(out, d)
		return nil
	})
	return out, err
}

func decodePaths(v ast.Value) ([][]string, error) {
	var out [][]string
	err := each(v, func(v ast.Value) error {
		p, err := stringList(v)
		out = append(out, p)
		return err
	})
	return out, err
}

// dataRef spells a path below data.dayfly as Rego does.
func dataRef(path []string) string {
	var b strings.Builder
	b.WriteString("data.dayfly")
	for i, p := range path {
		if i == 0 {
			b.WriteString("." + p)
			continue
		}
		b.WriteString("[" + strconv.Quote(p) + "]")
	}
	return b.String()
}

func eachKey(obj ast.Object, fn func(string, ast.Value) error) error {
	return obj.Iter(func(k, v *ast.Term) error {
		key, err := text(k.Value)
		if err != nil {
			return err
		}
		if err := fn(key, v.Value); err != nil {
			return fmt.Errorf("%s: %w", key, err)
		}
		return nil
	})
}

// each visits an array or a set: what Rego authors write lists as.
func each(v ast.Value, fn func(ast.Value) error) error {
	visit := func(t *ast.Term) error { return fn(t.Value) }
	switch list := v.(type) {
	case *ast.Array:
		return list.Iter(visit)
	case ast.Set:
		return list.Iter(visit)
	}
	return fmt.Errorf("a %s, not a list", ast.ValueName(v))
}

func text(v ast.Value) (string, error) {
	s, ok := v.(ast.String)
	if !ok {
		return "", fmt.Errorf("a %s, not a string", ast.ValueName(v))
	}
	return string(s), nil
}

func stringList(v ast.Value) ([]string, error) {
	var out []string
	err := each(v, func(v ast.Value) error {
		s, err := text(v)
		out = append(out, s)
		return err
	})
	return out, err
}

func stringMap(v ast.Value) (map[string]string, error) {
	obj, ok := v.(ast.Object)
	if !ok {
		return nil, fmt.Errorf("a %s, not an object", ast.ValueName(v))
	}
	out := make(map[string]string, obj.Len())
	err := eachKey(obj, func(key string, v ast.Value) (err error) {
		out[key], err = text(v)
		return err
	})
	return out, err
}

func integer(v ast.Value) (int64, error) {
	n, ok := v.(ast.Number)
	if !ok {
		return 0, fmt.Errorf("a %s, not a number", ast.ValueName(v))
	}
	i, err := json.Number(n).Int64()
	if err != nil {
		return 0, fmt.Errorf("%s is not a whole number", n)
	}
	return i, nil
}

func int64Term(n int64) *ast.Term {
	if i := int(n); int64(i) == n && ast.HasInternedIntNumberTerm(i) {
		return ast.InternedTerm(i)
	}
	return ast.NumberTerm(json.Number(strconv.FormatInt(n, 10)))
}
