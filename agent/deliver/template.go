package deliver

import (
	"cmp"
	"errors"
	"fmt"
	"html"
	"io"
	"net/url"
	"strings"
	"text/template/parse"
)

// A program is a template as text/template reads it, without what looks at data, of which a
// file's has none but by functions: fields, range, and templates in templates. It isn't run
// by that package: because that may call any method by its name, the linker would keep each
// of every package, a seventh of the agent.
type program struct{ tree *parse.Tree }

// A function of a template takes and returns texts, int64, float64 and bool.
type function func(args []any) (any, error)

func parseTemplate(text string, more map[string]function) (*program, error) {
	names := map[string]any{"and": true, "or": true}
	for _, all := range []map[string]function{language, more} {
		for name := range all {
			names[name] = true
		}
	}
	const name = "template"
	trees, err := parse.Parse(name, text, "", "", names)
	if err != nil {
		return nil, err
	}
	if len(trees) != 1 || trees[name] == nil {
		return nil, errors.New("1: a template in a template is none of a file's")
	}
	return &program{trees[name]}, nil
}

// run writes what the template makes with these functions.
func (p *program) run(out io.Writer, more map[string]function) error {
	return (&execution{program: p, out: out, functions: more}).walk(p.tree.Root)
}

// try runs both sides of every branch, so that what can't be run is found at the start.
func (p *program) try(more map[string]function) error {
	return (&execution{program: p, out: io.Discard, functions: more, both: true}).walk(p.tree.Root)
}

type execution struct {
	*program
	out       io.Writer
	functions map[string]function
	variables []variable
	dot       any // of the innermost with
	both      bool
}

type variable struct {
	name  string
	value any
}

// wrong says what is wrong at a place of the template.
func (x *execution) wrong(at parse.Node, format string, a ...any) error {
	place, context := x.tree.ErrorContext(at)
	return fmt.Errorf("template: %s: at <%s>: %w", place, context, fmt.Errorf(format, a...))
}

func (x *execution) walk(n parse.Node) error {
	switch n := n.(type) {
	case *parse.ListNode:
		for _, one := range n.Nodes {
			if err := x.walk(one); err != nil {
				return err
			}
		}
		return nil
	case *parse.TextNode:
		_, err := x.out.Write(n.Text)
		return err
	case *parse.CommentNode:
		return nil
	case *parse.ActionNode:
		v, err := x.pipe(n.Pipe)
		if err != nil || len(n.Pipe.Decl) > 0 {
			return err
		}
		_, err = fmt.Fprint(x.out, v)
		return err
	case *parse.IfNode:
		return x.branch(&n.BranchNode, false)
	case *parse.WithNode:
		return x.branch(&n.BranchNode, true)
	}
	return x.wrong(n, "a file's template has no such action: it has if, with and variables")
}

func (x *execution) branch(n *parse.BranchNode, with bool) error {
	depth, dot := len(x.variables), x.dot
	defer func() { x.variables, x.dot = x.variables[:depth], dot }()
	v, err := x.pipe(n.Pipe)
	if err != nil {
		return err
	}
	if truth(v) || x.both {
		if with {
			x.dot = v
		}
		if err := x.walk(n.List); err != nil || !x.both {
			return err
		}
		x.dot = dot
	}
	if n.ElseList == nil {
		return nil
	}
	return x.walk(n.ElseList)
}

func truth(v any) bool {
	switch v := v.(type) {
	case string:
		return v != ""
	case int64:
		return v != 0
	case float64:
		return v != 0
	}
	return v == true
}

func (x *execution) pipe(n *parse.PipeNode) (v any, err error) {
	for i, one := range n.Cmds {
		var last []any
		if i > 0 {
			last = []any{v}
		}
		if v, err = x.command(one, last); err != nil {
			return nil, err
		}
	}
	for _, d := range n.Decl {
		if !n.IsAssign {
			x.variables = append(x.variables, variable{d.Ident[0], v})
			continue
		}
		at, err := x.variable(d)
		if err != nil {
			return nil, err
		}
		at.value = v
	}
	return v, nil
}

// command is a value, or a call with what came from the left as its last argument.
func (x *execution) command(n *parse.CommandNode, last []any) (any, error) {
	if f, ok := n.Args[0].(*parse.IdentifierNode); ok {
		return x.call(f, n.Args[1:], last)
	}
	if len(n.Args) > 1 || len(last) > 0 {
		return nil, x.wrong(n.Args[0], "can't be called")
	}
	return x.value(n.Args[0])
}

func (x *execution) call(f *parse.IdentifierNode, nodes []parse.Node, last []any) (any, error) {
	var args []any
	for _, n := range nodes {
		v, err := x.value(n)
		if err != nil {
			return nil, err
		}
		if f.Ident == "and" && !truth(v) || f.Ident == "or" && truth(v) {
			return v, nil // what follows isn't looked at
		}
		args = append(args, v)
	}
	args = append(args, last...)
	if f.Ident == "and" || f.Ident == "or" {
		if len(args) == 0 {
			return nil, x.wrong(f, "needs an argument")
		}
		return args[len(args)-1], nil
	}
	do := x.functions[f.Ident]
	if do == nil {
		do = language[f.Ident]
	}
	v, err := do(args)
	if err != nil {
		return nil, x.wrong(f, "%w", err)
	}
	return v, nil
}

func (x *execution) value(n parse.Node) (any, error) {
	switch n := n.(type) {
	case *parse.StringNode:
		return n.Text, nil
	case *parse.BoolNode:
		return n.True, nil
	case *parse.NumberNode:
		switch {
		case n.IsComplex:
		case n.IsFloat && writtenAsFloat(n.Text):
			return n.Float64, nil
		case n.IsInt:
			return n.Int64, nil
		}
	case *parse.DotNode:
		if x.dot != nil {
			return x.dot, nil
		}
	case *parse.VariableNode:
		v, err := x.variable(n)
		if err != nil {
			return nil, err
		}
		return v.value, nil
	case *parse.PipeNode:
		return x.pipe(n)
	case *parse.IdentifierNode:
		return x.call(n, nil, nil)
	}
	return nil, x.wrong(n, "a file's template has no such value")
}

// writtenAsFloat says whether a number is meant as one with a fraction, which 1.0 is.
func writtenAsFloat(s string) bool {
	switch hex := strings.HasPrefix(strings.ToLower(s), "0x"); {
	case s[0] == '\'':
		return false
	case hex:
		return strings.ContainsAny(s, "pP")
	}
	return strings.ContainsAny(s, ".eE")
}

func (x *execution) variable(n *parse.VariableNode) (*variable, error) {
	for i := len(x.variables) - 1; i >= 0 && len(n.Ident) == 1; i-- {
		if x.variables[i].name == n.Ident[0] {
			return &x.variables[i], nil
		}
	}
	return nil, x.wrong(n, "a file's template has no such variable")
}

// language is what every template has, but for and and or, which look at no more than they
// must.
var language = map[string]function{
	"not": func(args []any) (any, error) {
		if len(args) != 1 {
			return nil, errors.New("needs one argument")
		}
		return !truth(args[0]), nil
	},
	"eq": func(args []any) (any, error) {
		if len(args) < 2 {
			return nil, errors.New("needs two arguments or more")
		}
		for _, other := range args[1:] {
			if c, err := compare(args[0], other); err != nil || c == 0 {
				return c == 0, err
			}
		}
		return false, nil
	},
	"ne":       comparison(func(c int) bool { return c != 0 }),
	"lt":       comparison(func(c int) bool { return c < 0 }),
	"le":       comparison(func(c int) bool { return c <= 0 }),
	"gt":       comparison(func(c int) bool { return c > 0 }),
	"ge":       comparison(func(c int) bool { return c >= 0 }),
	"print":    func(args []any) (any, error) { return fmt.Sprint(args...), nil },
	"println":  func(args []any) (any, error) { return fmt.Sprintln(args...), nil },
	"html":     func(args []any) (any, error) { return html.EscapeString(fmt.Sprint(args...)), nil },
	"urlquery": func(args []any) (any, error) { return url.QueryEscape(fmt.Sprint(args...)), nil },
	"printf": func(args []any) (any, error) {
		format, err := ofText(func(s string) (any, error) { return s, nil })(args[:min(1, len(args))])
		if err != nil {
			return nil, err
		}
		return fmt.Sprintf(format.(string), args[1:]...), nil
	},
	"len": ofText(func(s string) (any, error) { return int64(len(s)), nil }),
}

// ofText is a function of one text.
func ofText(f func(string) (any, error)) function {
	return func(args []any) (any, error) {
		if len(args) != 1 {
			return nil, errors.New("needs one argument")
		}
		s, ok := args[0].(string)
		if !ok {
			return nil, errors.New("needs a text")
		}
		return f(s)
	}
}

func comparison(holds func(int) bool) function {
	return func(args []any) (any, error) {
		if len(args) != 2 {
			return nil, errors.New("needs two arguments")
		}
		c, err := compare(args[0], args[1])
		return err == nil && holds(c), err
	}
}

// compare orders two values of a kind; false comes before true.
func compare(a, b any) (int, error) {
	switch a := a.(type) {
	case string:
		if b, ok := b.(string); ok {
			return strings.Compare(a, b), nil
		}
	case int64:
		if b, ok := b.(int64); ok {
			return cmp.Compare(a, b), nil
		}
	case float64:
		if b, ok := b.(float64); ok {
			return cmp.Compare(a, b), nil
		}
	case bool:
		if b, ok := b.(bool); ok && a == b {
			return 0, nil
		} else if ok && b {
			return -1, nil
		} else if ok {
			return 1, nil
		}
	}
	return 0, errors.New("can't compare values of different kinds")
}
