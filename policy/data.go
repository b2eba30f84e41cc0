package policy

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.yaml.in/yaml/v3"
)

// Defaults of policy data, as DESIGN's numbers say.
const (
	defaultTTL          = 5 * time.Minute
	defaultMaxStaleness = 30 * time.Second
	// minTTL is the resolution of a token's exp.
	minTTL = time.Second
	// defaultConfirmWithin is how long a proposal waits for its second person;
	// maxConfirmWithin is less than the broker remembers what was confirmed.
	defaultConfirmWithin = 15 * time.Minute
	maxConfirmWithin     = time.Hour
	// maxName bounds audience names and scopes, in bytes: a token is at most 2 KiB.
	maxName = 255
)

// Ways an audience's tokens are verified.
const (
	VerifiedByFeed          = "feed"
	VerifiedByIntrospection = "introspection"
	VerifiedByExternal      = "external"
)

// Audience is what policy data declares about one.
type Audience struct {
	// Name is a SPIFFE ID or a name that Identities answer to.
	Name string `json:"name"`
	// Owner is whom to ask: a person, a team, an address.
	Owner string `json:"owner"`
	// VerifiedBy is VerifiedByFeed, VerifiedByIntrospection or VerifiedByExternal.
	VerifiedBy string `json:"verified_by"`
	// Identities are patterns of those that answer to Name.
	Identities []string `json:"identities,omitempty"`
	// MaxStaleness is the largest bound its verifiers may have.
	MaxStaleness time.Duration `json:"max_staleness_ns"`
	// OnStale is OnStaleAccept where verifiers may run on when stale.
	OnStale string `json:"on_stale"`
	// Fallback is what a workflow does while its credentials are revoked.
	Fallback Fallback `json:"fallback"`
}

// Fallback documents what a workflow does while its credentials are revoked.
type Fallback struct {
	Owner string `json:"owner,omitempty"`
	Text  string `json:"text,omitempty"`
	Link  string `json:"link,omitempty"`
}

// place is where an entry of policy data stands.
type place struct {
	file string
	line int
}

func (p place) String() string { return p.file + ":" + strconv.Itoa(p.line) }

// dataset is the data of one generation: as Rego sees it, as Go asks it, and
// where each entry stands.
type dataset struct {
	value ast.Object

	audiences     map[string]Audience
	entitlements  table[entitlement]
	exchange      map[string]table[entitlement]
	operators     map[string][]string
	verifiers     map[string]verifier
	introspectors map[string][]string
	limits        map[string]Limits
	lift          lift

	// templates are the audiences with placeholders, sorted.
	templates []*template
	// names maps a pattern to the audience names it answers to.
	names map[string][]string
	// places maps dataRef(path) to its file and line.
	places map[string]place
}

type (
	table[V any] map[string]map[string]V

	entitlement struct {
		scopes, defaults []string
		ttl              time.Duration
		binding          string
		fallback         Fallback // zero: the audience's
	}
	verifier struct {
		follow []string
		relay  bool
	}
	// lift says whether ending a lock takes two persons, and how long a proposal
	// waits, that of a revocation of everything too.
	lift struct {
		twoPerson bool
		within    time.Duration
	}
)

// parser collects the data of a folder's files, and everything wrong with it.
type parser struct {
	file     string
	problems *Problems

	audiences     map[string]Audience
	entitlements  table[entitlement]
	exchange      map[string]table[entitlement]
	operators     map[string][]string
	verifiers     map[string]verifier
	introspectors map[string][]string
	limits        map[string]Limits
	lift          lift
	templates     []*template
	custom        map[string]ast.Value

	places map[string]place
	// uses are mentions of audiences, checked once all files are read.
	uses []use
}

type use struct {
	audience string
	place
}

// parseData reads the data files of a folder, in the order of names. It returns
// what could be read and adds every complaint to problems.
func parseData(names []string, files map[string][]byte, problems *Problems) *dataset {
	p := &parser{
		problems:      problems,
		audiences:     map[string]Audience{},
		entitlements:  table[entitlement]{},
		exchange:      map[string]table[entitlement]{},
		operators:     map[string][]string{},
		verifiers:     map[string]verifier{},
		introspectors: map[string][]string{},
		limits:        map[string]Limits{},
		lift:          lift{within: defaultConfirmWithin},
		custom:        map[string]ast.Value{},
		places:        map[string]place{},
	}
	for _, name := range names {
		p.file = name
		p.parseFile(files[name])
	}
	for _, u := range p.uses {
		if _, ok := p.audiences[u.audience]; !ok {
			problems.addf(u.file, u.line, "audience %q isn't declared under audiences", u.audience)
		}
	}
	return p.dataset()
}

func (p *parser) parseFile(content []byte) {
	if strings.HasSuffix(p.file, ".json") {
		// JSON is YAML but for tabs between tokens; inside its strings they are
		// escaped.
		content = bytes.ReplaceAll(content, []byte("\t"), []byte(" "))
	}
	dec := yaml.NewDecoder(bytes.NewReader(content))
	var doc yaml.Node
	err := dec.Decode(&doc)
	if errors.Is(err, io.EOF) {
		return // empty, or nothing but comments
	}
	if err != nil {
		p.syntax(err)
		return
	}
	if len(doc.Content) != 1 {
		p.problems.addf(p.file, 0, "not one YAML document")
		return
	}
	p.root(doc.Content[0])
	var more yaml.Node
	if err := dec.Decode(&more); err == nil {
		p.failf(&more, "a second YAML document: put everything in one")
	} else if !errors.Is(err, io.EOF) {
		p.syntax(err)
	}
}

// yamlLine is how the YAML library starts its complaints.
var yamlLine = regexp.MustCompile(`^(?:yaml: )?(?:line (\d+): )?`)

func (p *parser) syntax(err error) {
	m := yamlLine.FindStringSubmatch(err.Error())
	line, _ := strconv.Atoi(m[1])
	p.problems.addf(p.file, line, "%s", err.Error()[len(m[0]):])
}

func (p *parser) failf(n *yaml.Node, format string, args ...any) {
	p.problems.addf(p.file, n.Line, format, args...)
}

func (p *parser) root(n *yaml.Node) {
	p.fields(n, "policy data", map[string]func(*yaml.Node){
		"audiences":     p.parseAudiences,
		"entitlements":  p.parseEntitlements,
		"exchange":      p.parseExchange,
		"operators":     p.parseOperators,
		"verifiers":     p.parseVerifiers,
		"introspectors": p.parseIntrospectors,
		"limits":        p.parseLimits,
		"lift":          p.parseLift,
		"custom":        p.parseCustom,
	})
}

func (p *parser) parseAudiences(n *yaml.Node) {
	p.mapping(n, "audiences", func(key, v *yaml.Node) {
		name := key.Value
		if err := checkAudience(name); err != nil {
			p.failf(key, "%v", err)
			return
		}
		if !p.claim(key, "audiences", name) {
			return
		}
		if isTemplate(name) {
			t, _ := parseTemplate(name) // checked above
			p.templates = append(p.templates, t)
		}
		a := Audience{Name: name, VerifiedBy: VerifiedByFeed, MaxStaleness: defaultMaxStaleness, OnStale: OnStaleRefuse}
		p.fields(v, "an audience", map[string]func(*yaml.Node){
			"owner": func(n *yaml.Node) { a.Owner = p.str(n) },
			"verified_by": func(n *yaml.Node) {
				a.VerifiedBy = p.oneOf(n, VerifiedByFeed, VerifiedByIntrospection, VerifiedByExternal)
			},
			"identities":    func(n *yaml.Node) { a.Identities = p.strings(n, checkPattern) },
			"max_staleness": func(n *yaml.Node) { a.MaxStaleness = p.duration(n, time.Millisecond) },
			"on_stale":      func(n *yaml.Node) { a.OnStale = p.oneOf(n, OnStaleRefuse, OnStaleAccept) },
			"fallback":      func(n *yaml.Node) { a.Fallback = p.fallback(n) },
		})
		p.checkDeclaration(key, a)
		p.audiences[name] = a
	})
}

// checkDeclaration says what is missing from an audience or contradicts itself.
func (p *parser) checkDeclaration(key *yaml.Node, a Audience) {
	if a.Owner == "" {
		p.failf(key, "audience %q has no owner: whom to ask when it breaks", a.Name)
	}
	if isTemplate(a.Name) {
		if a.VerifiedBy != VerifiedByExternal || len(a.Identities) > 0 {
			p.failf(key, "audience %q has placeholders: it needs \"verified_by: external\", and no identities", a.Name)
		}
		return
	}
	isID := strings.HasPrefix(a.Name, "spiffe://")
	if isID && len(a.Identities) > 0 {
		p.failf(key, "audience %q is a SPIFFE ID, which only that identity answers to: remove identities, or give the audience a name", a.Name)
	}
	if !isID && len(a.Identities) == 0 && a.VerifiedBy == VerifiedByFeed {
		p.failf(key, "audience %q has no identities, so no verifier answers to it", a.Name)
	}
}

func (p *parser) fallback(n *yaml.Node) Fallback {
	var f Fallback
	p.fields(n, "a fallback", map[string]func(*yaml.Node){
		"owner": func(n *yaml.Node) { f.Owner = p.str(n) },
		"text":  func(n *yaml.Node) { f.Text = p.str(n) },
		"link":  func(n *yaml.Node) { f.Link = p.str(n) },
	})
	return f
}

func (p *parser) parseEntitlements(n *yaml.Node) {
	p.patterns(n, "entitlements", func(pattern string, v *yaml.Node) {
		if p.entitlements[pattern] == nil {
			p.entitlements[pattern] = map[string]entitlement{}
		}
		p.parseTargets(v, p.entitlements[pattern], "entitlements", pattern)
	})
}

func (p *parser) parseExchange(n *yaml.Node) {
	p.patterns(n, "exchange", func(pattern string, v *yaml.Node) {
		if p.exchange[pattern] == nil {
			p.exchange[pattern] = table[entitlement]{}
		}
		byParent := p.exchange[pattern]
		p.mapping(v, "the audiences to exchange from", func(key, v *yaml.Node) {
			if !p.audience(key) {
				return
			}
			if isTemplate(key.Value) {
				p.failf(key, "nobody answers to a name with placeholders, so it can't be exchanged from")
				return
			}
			if byParent[key.Value] == nil {
				byParent[key.Value] = map[string]entitlement{}
			}
			p.parseTargets(v, byParent[key.Value], "exchange", pattern, key.Value)
		})
	})
}

// parseTargets reads audience -> entitlement.
func (p *parser) parseTargets(n *yaml.Node, into map[string]entitlement, path ...string) {
	p.mapping(n, "the audiences", func(key, v *yaml.Node) {
		if !p.audience(key) || !p.claim(key, append(slices.Clone(path), key.Value)...) {
			return
		}
		e := entitlement{ttl: defaultTTL, binding: BindingSPIFFE}
		var hasScopes, hasDefaults bool
		p.fields(v, "an entitlement", map[string]func(*yaml.Node){
			"scopes":         func(n *yaml.Node) { hasScopes, e.scopes = true, p.strings(n, checkScope) },
			"default_scopes": func(n *yaml.Node) { hasDefaults, e.defaults = true, p.strings(n, checkScope) },
			"ttl":            func(n *yaml.Node) { e.ttl = p.duration(n, minTTL) },
			"binding":        func(n *yaml.Node) { e.binding = p.oneOf(n, BindingSPIFFE, BindingX5T, BindingNone) },
			"fallback":       func(n *yaml.Node) { e.fallback = p.fallback(n) },
		})
		if !hasScopes {
			p.failf(key, "no scopes: write \"scopes: []\" for credentials without any")
		}
		if !hasDefaults {
			e.defaults = e.scopes
		}
		for _, s := range e.defaults {
			if !slices.Contains(e.scopes, s) {
				p.failf(key, "default scope %q isn't among the scopes", s)
			}
		}
		into[key.Value] = e
	})
}

// operatorActions are what an operator may be allowed.
var operatorActions = []Action{ActionRevoke, ActionRevokeEverything, ActionLift, ActionLiftConfirm, ActionList, ActionPlan}

func (p *parser) parseOperators(n *yaml.Node) {
	known := make([]string, len(operatorActions))
	for i, a := range operatorActions {
		known[i] = string(a)
	}
	p.patterns(n, "operators", func(pattern string, v *yaml.Node) {
		if !p.claim(v, "operators", pattern) {
			return
		}
		p.operators[pattern] = p.strings(v, func(s string) error {
			if !slices.Contains(known, s) {
				return fmt.Errorf("unknown action %q: use %s", s, strings.Join(known, ", "))
			}
			return nil
		})
	})
}

func (p *parser) parseVerifiers(n *yaml.Node) {
	p.patterns(n, "verifiers", func(pattern string, v *yaml.Node) {
		if !p.claim(v, "verifiers", pattern) {
			return
		}
		var out verifier
		p.fields(v, "a verifier", map[string]func(*yaml.Node){
			"follow": func(n *yaml.Node) { out.follow = p.followed(n) },
			"relay":  func(n *yaml.Node) { out.relay = p.boolean(n) },
		})
		p.verifiers[pattern] = out
	})
}

func (p *parser) parseIntrospectors(n *yaml.Node) {
	p.patterns(n, "introspectors", func(pattern string, v *yaml.Node) {
		if p.claim(v, "introspectors", pattern) {
			p.introspectors[pattern] = p.followed(v)
		}
	})
}

// followed reads a list of audiences, or of "*" for all that are declared.
func (p *parser) followed(n *yaml.Node) []string {
	list := p.strings(n, func(s string) error {
		switch {
		case s == "*":
			return nil
		case isTemplate(s):
			return fmt.Errorf("audience %q has placeholders: the feed has no verifiers of it", s)
		}
		return checkAudience(s)
	})
	for _, s := range list {
		if s != "*" {
			p.uses = append(p.uses, use{s, place{p.file, n.Line}})
		}
	}
	return list
}

func (p *parser) parseLimits(n *yaml.Node) {
	p.patterns(n, "limits", func(pattern string, v *yaml.Node) {
		if !p.claim(v, "limits", pattern) {
			return
		}
		var l Limits
		p.fields(v, "limits", map[string]func(*yaml.Node){
			"issue_per_second":      func(n *yaml.Node) { l.IssuePerSecond = p.count(n) },
			"live_grants":           func(n *yaml.Node) { l.LiveGrants = p.count(n) },
			"give_backs_per_minute": func(n *yaml.Node) { l.GiveBacksPerMinute = p.count(n) },
		})
		p.limits[pattern] = l
	})
}

func (p *parser) parseLift(n *yaml.Node) {
	if n.Tag == "!!null" || !p.claim(n, "lift") {
		return
	}
	p.fields(n, "lift", map[string]func(*yaml.Node){
		"two_person": func(n *yaml.Node) { p.lift.twoPerson = p.boolean(n) },
		"within": func(n *yaml.Node) {
			if p.lift.within = p.duration(n, time.Second); p.lift.within > maxConfirmWithin {
				p.failf(n, "must be at most %v", maxConfirmWithin)
			}
		},
	})
}

// parseCustom takes anything: it is for rules that dayfly doesn't know.
func (p *parser) parseCustom(n *yaml.Node) {
	p.mapping(n, "custom", func(key, v *yaml.Node) {
		if !p.claim(key, "custom", key.Value) || !p.noAlias(v) {
			return
		}
		var x any
		if err := v.Decode(&x); err != nil {
			p.failf(v, "%v", err)
			return
		}
		value, err := ast.InterfaceToValue(x)
		if err != nil {
			p.failf(v, "not a JSON value: %v", err)
			return
		}
		p.custom[key.Value] = value
	})
}

func (p *parser) noAlias(n *yaml.Node) bool {
	if n.Kind == yaml.AliasNode || n.Anchor != "" {
		p.failf(n, "anchors and aliases aren't allowed: write it out")
		return false
	}
	return !slices.ContainsFunc(n.Content, func(c *yaml.Node) bool { return !p.noAlias(c) })
}

// mapping visits the entries of a mapping. An empty value is an empty mapping:
// what is left of a section when all its entries are commented out.
func (p *parser) mapping(n *yaml.Node, what string, fn func(key, v *yaml.Node)) {
	if n.Kind == yaml.ScalarNode && n.Tag == "!!null" {
		return
	}
	if n.Kind == yaml.AliasNode || n.Anchor != "" {
		p.failf(n, "anchors and aliases aren't allowed: write it out")
		return
	}
	if n.Kind != yaml.MappingNode {
		p.failf(n, "%s must be a mapping", what)
		return
	}
	seen := make(map[string]int, len(n.Content)/2)
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, v := n.Content[i], n.Content[i+1]
		if key.Kind != yaml.ScalarNode || key.Tag == "!!merge" || key.Tag == "!!null" {
			p.failf(key, "a key must be plain text")
			continue
		}
		if first, ok := seen[key.Value]; ok {
			p.failf(key, "%q stands here twice, first in line %d", key.Value, first)
			continue
		}
		seen[key.Value] = key.Line
		fn(key, v)
	}
}

// fields reads a mapping of known keys.
func (p *parser) fields(n *yaml.Node, what string, known map[string]func(*yaml.Node)) {
	p.mapping(n, what, func(key, v *yaml.Node) {
		fn, ok := known[key.Value]
		if !ok {
			keys := make([]string, 0, len(known))
			for k := range known {
				keys = append(keys, k)
			}
			slices.Sort(keys)
			p.failf(key, "unknown key %q in %s: it has %s", key.Value, what, strings.Join(keys, ", "))
			return
		}
		fn(v)
	})
}

func (p *parser) patterns(n *yaml.Node, what string, fn func(pattern string, v *yaml.Node)) {
	p.mapping(n, what, func(key, v *yaml.Node) {
		if err := checkPattern(key.Value); err != nil {
			p.failf(key, "%v", err)
			return
		}
		fn(key.Value, v)
	})
}

// audience checks a mention of an audience, now for its form and later for its
// declaration.
func (p *parser) audience(n *yaml.Node) bool {
	if err := checkAudience(n.Value); err != nil {
		p.failf(n, "%v", err)
		return false
	}
	p.uses = append(p.uses, use{n.Value, place{p.file, n.Line}})
	return true
}

// claim records where an entry stands; false if another file already has it.
func (p *parser) claim(n *yaml.Node, path ...string) bool {
	ref := dataRef(path)
	if first, ok := p.places[ref]; ok {
		p.failf(n, "%s is already in %s", strings.TrimPrefix(ref, "data.dayfly."), first)
		return false
	}
	p.places[ref] = place{p.file, n.Line}
	return true
}

func (p *parser) str(n *yaml.Node) string {
	if n.Kind != yaml.ScalarNode || n.Tag != "!!str" {
		p.failf(n, "must be a string")
		return ""
	}
	return n.Value
}

func (p *parser) strings(n *yaml.Node, check func(string) error) []string {
	if n.Kind != yaml.SequenceNode || n.Anchor != "" {
		p.failf(n, "must be a list, as in [a, b]")
		return nil
	}
	var out []string
	for _, c := range n.Content {
		if c.Kind != yaml.ScalarNode || c.Tag != "!!str" {
			p.failf(c, "must be a string")
			continue
		}
		if err := check(c.Value); err != nil {
			p.failf(c, "%v", err)
			continue
		}
		if slices.Contains(out, c.Value) {
			p.failf(c, "%q stands in the list twice", c.Value)
			continue
		}
		out = append(out, c.Value)
	}
	return out
}

func (p *parser) oneOf(n *yaml.Node, allowed ...string) string {
	if n.Kind != yaml.ScalarNode || !slices.Contains(allowed, n.Value) {
		p.failf(n, "must be one of %s", strings.Join(allowed, ", "))
		return allowed[0]
	}
	return n.Value
}

func (p *parser) duration(n *yaml.Node, least time.Duration) time.Duration {
	d, err := time.ParseDuration(n.Value)
	if n.Kind != yaml.ScalarNode || err != nil {
		p.failf(n, "must be a duration such as 5m or 90s")
		return least
	}
	if d < least {
		p.failf(n, "must be at least %v", least)
		return least
	}
	return d
}

func (p *parser) boolean(n *yaml.Node) bool {
	if n.Kind != yaml.ScalarNode || n.Tag != "!!bool" {
		p.failf(n, "must be true or false")
		return false
	}
	var b bool
	if err := n.Decode(&b); err != nil {
		p.failf(n, "must be true or false")
	}
	return b
}

func (p *parser) count(n *yaml.Node) int {
	i, err := strconv.ParseInt(n.Value, 10, 32)
	if n.Kind != yaml.ScalarNode || n.Tag != "!!int" || err != nil || i < 1 {
		p.failf(n, "must be a whole number of at least 1")
		return 0
	}
	return int(i)
}

// checkPattern accepts an identity, or a subtree or trust domain ending in "/*".
func checkPattern(s string) error {
	base, subtree := strings.CutSuffix(s, "/*")
	if _, err := spiffeid.FromString(base); err != nil {
		if strings.Contains(base, "*") {
			return fmt.Errorf("pattern %q: the star stands for whole segments and only at the end, as in spiffe://td/ns/prod/*", s)
		}
		return fmt.Errorf("pattern %q isn't a SPIFFE ID: %w", s, err)
	}
	if !subtree && !strings.Contains(strings.TrimPrefix(base, "spiffe://"), "/") {
		return fmt.Errorf("pattern %q has no path: write %q for the whole trust domain", s, s+"/*")
	}
	return nil
}

func checkAudience(s string) error {
	if isTemplate(s) {
		if _, err := parseTemplate(s); err != nil {
			return err
		}
	}
	if strings.HasPrefix(s, "spiffe://") {
		if _, err := spiffeid.FromString(s); err != nil {
			return fmt.Errorf("audience %q isn't a SPIFFE ID: %w", s, err)
		}
		return nil
	}
	if s == "*" || !isName(s) {
		return fmt.Errorf("audience %q: a SPIFFE ID or a name of 1 to %d printable ASCII characters without spaces, quotes and backslashes", s, maxName)
	}
	return nil
}

func checkScope(s string) error {
	if !isName(s) {
		return fmt.Errorf("scope %q: 1 to %d printable ASCII characters without spaces, quotes and backslashes (RFC 6749 section 3.3)", s, maxName)
	}
	return nil
}

// isName holds for a scope-token of RFC 6749 section 3.3.
func isName(s string) bool {
	if s == "" || len(s) > maxName {
		return false
	}
	for i := range len(s) {
		if c := s[i]; c <= ' ' || c == '"' || c == '\\' || c > '~' {
			return false
		}
	}
	return true
}
