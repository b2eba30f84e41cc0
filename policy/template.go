package policy

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// An audience name with placeholders is a template: each identity has at most one name
// of it, made from its SPIFFE ID and nothing else.
//
//	{trust_domain}   example.org
//	{path}           ns/prod/web, without the slash at its beginning
//	{segment.2}      prod, the second segment of the path
//
// Two identities with different values never get the same name: between two
// placeholders stands a character that no segment has.
const (
	trustDomainHole = "trust_domain"
	pathHole        = "path"
	segmentHole     = "segment."
	// maxSegment bounds {segment.N}; a SPIFFE ID of the longest kind has about that many.
	maxSegment = 99
)

// segmentChars are those of trust domains and of path segments.
const segmentChars = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-_"

// template is an audience's name, cut at its placeholders.
type template struct {
	text  string
	parts []part
	shape *regexp.Regexp // of every name that it can give
}

// part is a literal, or else a placeholder.
type part struct {
	literal string
	hole    string // trustDomainHole, pathHole or segmentHole
	segment int    // from 1
}

func isTemplate(name string) bool { return strings.ContainsAny(name, "{}") }

// parseTemplate says what is wrong with one.
func parseTemplate(s string) (*template, error) {
	refused := func(format string, args ...any) (*template, error) {
		return nil, fmt.Errorf("audience %q: %s", s, fmt.Sprintf(format, args...))
	}
	if strings.HasPrefix(s, "spiffe://") {
		return refused("a SPIFFE ID has no placeholders")
	}
	t := &template{text: s}
	shape := "^"
	for rest := s; rest != ""; {
		literal, after, found := strings.Cut(rest, "{")
		if strings.Contains(literal, "}") {
			return refused("a } without its {")
		}
		if n := len(t.parts); found && n > 0 && strings.Trim(literal, segmentChars) == "" {
			return refused("between two placeholders must stand a character that no path segment has, such as / or :")
		}
		if literal != "" {
			t.parts = append(t.parts, part{literal: literal})
			shape += regexp.QuoteMeta(literal)
		}
		if !found {
			break
		}
		name, after, found := strings.Cut(after, "}")
		if !found {
			return refused("a { without its }")
		}
		p, pattern, err := parseHole(name)
		if err != nil {
			return refused("%v", err)
		}
		t.parts = append(t.parts, p)
		shape += pattern
		rest = after
	}
	t.shape = regexp.MustCompile(shape + "$")
	return t, nil
}

func parseHole(name string) (part, string, error) {
	const one = `[a-zA-Z0-9._-]+`
	switch {
	case name == trustDomainHole:
		return part{hole: trustDomainHole}, one, nil
	case name == pathHole:
		return part{hole: pathHole}, one + `(?:/` + one + `)*`, nil
	}
	digits, ok := strings.CutPrefix(name, segmentHole)
	n, err := strconv.Atoi(digits)
	if !ok || err != nil || n < 1 || n > maxSegment || digits != strconv.Itoa(n) {
		return part{}, "", fmt.Errorf("unknown placeholder {%s}: use {trust_domain}, {path} or {segment.N}, N from 1", name)
	}
	return part{hole: segmentHole, segment: n}, one, nil
}

// gives says whether name is what the template makes of id.
func (t *template) gives(id spiffeid.ID, name string) bool {
	if strings.HasPrefix(name, "spiffe://") {
		return false // an identity's own name is no one's to give
	}
	for _, p := range t.parts {
		value := p.value(id)
		rest, ok := strings.CutPrefix(name, value)
		if value == "" || !ok {
			return false
		}
		name = rest
	}
	return name == ""
}

// value is empty where the identity has none.
func (p part) value(id spiffeid.ID) string {
	path := strings.TrimPrefix(id.Path(), "/")
	switch p.hole {
	case trustDomainHole:
		return id.TrustDomain().Name()
	case pathHole:
		return path
	case segmentHole:
		n := p.segment
		for s := range strings.SplitSeq(path, "/") {
			if n--; n == 0 {
				return s
			}
		}
		return ""
	}
	return p.literal
}

// keys are what the data may have an audience under for a caller: its name where that
// is declared, else each template that gives the name to this caller, sorted.
func (d *dataset) keys(id spiffeid.ID, audience string) []string {
	if _, ok := d.audiences[audience]; ok || len(d.templates) == 0 {
		return []string{audience}
	}
	var keys []string
	for _, t := range d.templates {
		if t.gives(id, audience) {
			keys = append(keys, t.text)
		}
	}
	if len(keys) == 0 {
		return []string{audience} // declared nowhere, and said so
	}
	return keys
}

// declaration finds what is declared of an audience, whoever asks.
func (d *dataset) declaration(name string) (Audience, bool) {
	if a, ok := d.audiences[name]; ok {
		return a, !isTemplate(name)
	}
	for _, t := range d.templates {
		if t.shape.MatchString(name) && !strings.HasPrefix(name, "spiffe://") {
			a := d.audiences[t.text]
			a.Name = name
			return a, true
		}
	}
	return Audience{}, false
}
