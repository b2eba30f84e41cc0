package config

import (
	"encoding"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
)

const (
	mapTag  = "!!map"
	nullTag = "!!null"
	strTag  = "!!str"
	boolTag = "!!bool"
)

// validator is implemented by structs that check more than types.
type validator interface{ Validate() error }

// defaulter is implemented by elements of lists whose zero value isn't the default.
type defaulter interface{ SetDefaults() }

var (
	durationType = reflect.TypeFor[time.Duration]()
	textType     = reflect.TypeFor[encoding.TextUnmarshaler]()
)

// decoder walks the nodes beside the Go value, and goes on after a problem.
type decoder struct {
	file     string
	problems Problems
}

func (d *decoder) addf(line int, key, format string, args ...any) {
	d.problems = append(d.problems, Problem{File: d.file, Line: line, Key: key, Message: fmt.Sprintf(format, args...)})
}

// value reads any node into v; key is the dotted path of it.
func (d *decoder) value(n *yaml.Node, v reflect.Value, key string) {
	if !d.plain(n, key) {
		return
	}
	if v.Kind() == reflect.Pointer {
		if v.IsNil() {
			v.Set(reflect.New(v.Type().Elem()))
		}
		d.value(n, v.Elem(), key)
		return
	}
	if v.Addr().Type().Implements(textType) || v.Type() == durationType {
		d.scalar(n, v, key)
		return
	}
	switch v.Kind() {
	case reflect.Struct:
		d.mapping(n, v, key)
	case reflect.Map:
		d.entries(n, v, key)
	case reflect.Slice:
		d.list(n, v, key)
	default:
		d.scalar(n, v, key)
	}
}

// plain refuses what says something else than it seems to.
func (d *decoder) plain(n *yaml.Node, key string) bool {
	switch {
	case n.Kind == yaml.AliasNode || n.Anchor != "":
		d.addf(n.Line, key, "anchors and aliases are refused: write the value out")
	case n.Tag == nullTag:
		d.addf(n.Line, key, "has no value: give it one, or leave the key out")
	case !strings.HasPrefix(n.Tag, "!!") || n.Style&yaml.TaggedStyle != 0:
		d.addf(n.Line, key, "tags are refused: write the plain value")
	default:
		return true
	}
	return false
}

// pairs calls f for each key of a mapping that is a plain string and new.
func (d *decoder) pairs(n *yaml.Node, key string, f func(k, v *yaml.Node)) bool {
	if n.Kind != yaml.MappingNode {
		d.addf(n.Line, key, "wants keys with values, not %s", kindOf(n))
		return false
	}
	seen := map[string]int{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		k, v := n.Content[i], n.Content[i+1]
		if k.Kind != yaml.ScalarNode || k.Anchor != "" || k.Tag == nullTag || k.Tag == "!!merge" {
			d.addf(k.Line, key, "a key must be a plain word")
			continue
		}
		if first, twice := seen[k.Value]; twice {
			d.addf(k.Line, join(key, k.Value), "is given twice, first in line %d", first)
			continue
		}
		seen[k.Value] = k.Line
		f(k, v)
	}
	return true
}

// mapping reads a struct and lets it validate itself.
func (d *decoder) mapping(n *yaml.Node, v reflect.Value, key string) {
	before := len(d.problems)
	fields := fieldsOf(v.Type())
	given := map[string]*yaml.Node{}
	ok := d.pairs(n, key, func(k, val *yaml.Node) {
		i := slices.IndexFunc(fields, func(f field) bool { return f.name == k.Value })
		if i < 0 {
			d.addf(k.Line, key, "unknown key %s%s", quote(k.Value), suggestion(k.Value, fields))
			return
		}
		given[k.Value] = k
		d.value(val, v.FieldByIndex(fields[i].index), join(key, k.Value))
	})
	if !ok {
		return
	}
	for _, f := range fields {
		if _, there := given[f.name]; f.required && !there {
			d.addf(n.Line, join(key, f.name), "is required")
		}
	}
	if val, is := v.Addr().Interface().(validator); is {
		d.validate(val, n, key, before)
	}
}

// validate reports what the struct says of itself, but for what was reported
// already: a value that couldn't be read looks to Validate as if it were not set.
func (d *decoder) validate(val validator, n *yaml.Node, key string, before int) {
	err := val.Validate()
	if err == nil {
		return
	}
	broken := d.problems[before:len(d.problems):len(d.problems)]
	for _, e := range flatten(err) {
		var at *keyError
		if !errors.As(e, &at) {
			if len(broken) == 0 {
				d.addf(n.Line, key, "%v", e)
			}
			continue
		}
		full := join(key, at.key)
		known := func(p Problem) bool {
			return p.Key == full || strings.HasPrefix(p.Key, full+".") || strings.HasPrefix(p.Key, full+"[")
		}
		if !slices.ContainsFunc(broken, known) {
			d.addf(lineOf(n, at.key), full, "%s", at.message)
		}
	}
}

// lineOf finds the line of a dotted key below n, or of as much of it as is there.
func lineOf(n *yaml.Node, key string) int {
	line := n.Line
	for part := range strings.SplitSeq(strings.ReplaceAll(key, "[", ".["), ".") {
		at, value := child(n, part)
		if value == nil {
			break
		}
		line, n = at, value
	}
	return line
}

// child finds one part of a dotted key, a word or an [index], and the line of it.
func child(n *yaml.Node, part string) (line int, value *yaml.Node) {
	if n.Kind == yaml.SequenceNode {
		i, err := strconv.Atoi(strings.Trim(part, "[]"))
		if err != nil || i < 0 || i >= len(n.Content) {
			return 0, nil
		}
		return n.Content[i].Line, n.Content[i]
	}
	for i := 0; n.Kind == yaml.MappingNode && i+1 < len(n.Content); i += 2 {
		if n.Content[i].Value == part {
			return n.Content[i].Line, n.Content[i+1]
		}
	}
	return 0, nil
}

// entries reads a map with string keys.
func (d *decoder) entries(n *yaml.Node, v reflect.Value, key string) {
	if v.Type().Key().Kind() != reflect.String {
		panic(fmt.Sprintf("internal error: config: %s: the keys of a %s aren't strings", key, v.Type()))
	}
	out := reflect.MakeMap(v.Type())
	if d.pairs(n, key, func(k, val *yaml.Node) {
		elem := reflect.New(v.Type().Elem()).Elem()
		d.value(val, elem, join(key, k.Value))
		out.SetMapIndex(reflect.ValueOf(k.Value).Convert(v.Type().Key()), elem)
	}) {
		v.Set(out)
	}
}

func (d *decoder) list(n *yaml.Node, v reflect.Value, key string) {
	if n.Kind != yaml.SequenceNode {
		d.addf(n.Line, key, "wants a list, not %s: write [a, b], or a line with \"- \" for each", kindOf(n))
		return
	}
	out := reflect.MakeSlice(v.Type(), len(n.Content), len(n.Content))
	for i, c := range n.Content {
		if e, is := out.Index(i).Addr().Interface().(defaulter); is {
			e.SetDefaults()
		}
		d.value(c, out.Index(i), fmt.Sprintf("%s[%d]", key, i))
	}
	v.Set(out)
}

func (d *decoder) scalar(n *yaml.Node, v reflect.Value, key string) {
	if n.Kind != yaml.ScalarNode {
		d.addf(n.Line, key, "wants one value, not %s", kindOf(n))
		return
	}
	if err := setScalar(n, v); err != nil {
		d.addf(n.Line, key, "%v", err)
	}
}

// SetText reads a value from a text, as a file has it or a flag. The library's own types say
// of a wrong one what they were at, and not what would be right.
func SetText(text string, into encoding.TextUnmarshaler) error {
	err := into.UnmarshalText([]byte(text))
	if err == nil {
		return nil
	}
	switch into.(type) {
	case *slog.Level:
		err = errors.New("is none of debug, info, warn and error")
	case *netip.AddrPort:
		err = errors.New("is no address with a port, such as 127.0.0.1:9464")
	}
	return fmt.Errorf("%s: %w", quote(text), err)
}

func setScalar(n *yaml.Node, v reflect.Value) error {
	if v.Type() == durationType {
		return setDuration(n.Value, v)
	}
	if into, ok := v.Addr().Interface().(encoding.TextUnmarshaler); ok {
		if n.Value == "" {
			return errors.New("is empty: give it a value, or leave the key out")
		}
		return SetText(n.Value, into)
	}
	switch v.Kind() {
	case reflect.String:
		if n.Tag != strTag {
			return fmt.Errorf("wants text, and YAML reads %s as %s: put it in quotes", quote(n.Value), kindOf(n))
		}
		v.SetString(n.Value)
		return nil
	case reflect.Bool:
		if n.Tag != boolTag || n.Value != "true" && n.Value != "false" {
			return fmt.Errorf("%s is neither true nor false", quote(n.Value))
		}
		v.SetBool(n.Value == "true")
		return nil
	}
	return setNumber(n.Value, v)
}

func setDuration(s string, v reflect.Value) error {
	dur, err := time.ParseDuration(s)
	if err != nil {
		return fmt.Errorf("%s isn't a duration: write a number with a unit, such as 500ms, 30s, 5m or 1h", quote(s))
	}
	if dur < 0 {
		return fmt.Errorf("%s is negative", quote(s))
	}
	v.SetInt(int64(dur))
	return nil
}

func setNumber(s string, v reflect.Value) error {
	bits := v.Type().Bits // panics for kinds that aren't numbers
	switch {
	case v.CanInt():
		i, err := strconv.ParseInt(s, 10, bits())
		if err != nil {
			return numberError(s, err, fmt.Sprintf("from %d to %d", int64(-1)<<(bits()-1), int64(1)<<(bits()-1)-1))
		}
		v.SetInt(i)
	case v.CanUint():
		u, err := strconv.ParseUint(s, 10, bits())
		if err != nil {
			return numberError(s, err, fmt.Sprintf("from 0 to %d", ^uint64(0)>>(64-bits())))
		}
		v.SetUint(u)
	case v.CanFloat():
		f, err := strconv.ParseFloat(s, bits())
		if err != nil || f != f || f-f != 0 {
			return fmt.Errorf("%s isn't a number", quote(s))
		}
		v.SetFloat(f)
	default:
		panic(fmt.Sprintf("internal error: config can't read a %s", v.Type()))
	}
	return nil
}

func numberError(s string, err error, limits string) error {
	if errors.Is(err, strconv.ErrRange) || strings.HasPrefix(s, "-") {
		return fmt.Errorf("%s is out of range: %s", quote(s), limits)
	}
	return fmt.Errorf("%s isn't a whole number", quote(s))
}

// field is one key that a struct takes.
type field struct {
	name     string
	index    []int
	required bool
}

func fieldsOf(t reflect.Type) []field {
	var out []field
	for i := range t.NumField() {
		name, opts, _ := strings.Cut(t.Field(i).Tag.Get("yaml"), ",")
		switch {
		case opts == "inline":
			for _, f := range fieldsOf(t.Field(i).Type) {
				out = append(out, field{f.name, append([]int{i}, f.index...), f.required})
			}
		case name != "" && name != "-":
			out = append(out, field{name, []int{i}, opts == "required"})
		}
	}
	return out
}

// suggestion names the known key nearest to a wrong one, or lists them all where
// none is near.
func suggestion(wrong string, fields []field) string {
	const near = 2 // a swap of two letters costs 2
	best, dist := "", near+1
	names := make([]string, len(fields))
	for i, f := range fields {
		names[i] = f.name
		if n := distance(wrong, f.name, near); n < dist {
			best, dist = f.name, n
		}
	}
	switch {
	case best != "":
		return fmt.Sprintf(": did you mean %q?", best)
	case len(names) == 0:
		return ""
	}
	return ": known here are " + strings.Join(names, ", ")
}

// distance is Levenshtein's, or limit+1 for words that differ by more in length.
func distance(a, b string, limit int) int {
	if len(a)-len(b) > limit || len(b)-len(a) > limit {
		return limit + 1
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal, row[j+1] = row[j+1], min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

func join(key, name string) string {
	if key == "" {
		return name
	}
	return key + "." + name
}

// quote shows a value, and of a long one only how it begins: whatever was pasted
// there by mistake need not be in a log.
func quote(s string) string {
	const most = 60
	if len(s) <= most {
		return strconv.Quote(s)
	}
	return fmt.Sprintf("%q... (%d bytes)", s[:12], len(s))
}

func kindOf(n *yaml.Node) string {
	switch {
	case n.Kind == yaml.MappingNode:
		return "keys with values"
	case n.Kind == yaml.SequenceNode:
		return "a list"
	case n.Tag == "!!int" || n.Tag == "!!float":
		return "a number"
	case n.Tag == boolTag:
		return "true or false"
	case n.Tag == "!!timestamp":
		return "a date"
	}
	return "a single value"
}
