package incoming

import (
	"cmp"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/dayflyhq/dayfly/agent/field"
	"github.com/dayflyhq/dayfly/proto/token"
)

// MaxRoutes is how many routes a guard may have: each request is compared with them by a
// tree, but their conflicts are looked for one by one at start.
const MaxRoutes = 512

// A Route says what a request needs.
type Route struct {
	// Path is a pattern of net/http's ServeMux, without method and host: /orders is that
	// path alone, /orders/ all below it, /orders/{id} one segment, /files/{path...} the
	// rest, /{$} the root alone. The most specific one is the request's.
	Path string
	// Host is the name that the request must be for; empty: any.
	Host string
	// Methods are those that are meant; empty: all. GET is HEAD too.
	Methods []string
	// Scopes must all be in the token.
	Scopes []string
	// Public needs no token, and none is looked at.
	Public bool
}

// A rule is what a route demands.
type rule struct {
	public bool
	scopes []string
}

func (r *rule) equal(other *rule) bool {
	return r.public == other.public && slices.Equal(r.scopes, other.scopes)
}

// covers reports whether whoever may pass by r may pass by other too, which is nil where
// nobody may.
func (r *rule) covers(other *rule) bool {
	if other == nil || r.public && !other.public {
		return false
	}
	return !slices.ContainsFunc(other.scopes, func(s string) bool { return !slices.Contains(r.scopes, s) })
}

// place is all routes of one pattern. Path first, method second: a method that no route of
// the path names is refused, and not looked for at a less specific path.
type place struct {
	byName map[string]*rule
	any    *rule
}

// ServeHTTP makes it a handler; none is ever called.
func (*place) ServeHTTP(http.ResponseWriter, *http.Request) {
	panic("internal error: a route was served")
}

func (p *place) rule(method string) *rule {
	if r := p.byName[method]; r != nil {
		return r
	}
	if method == http.MethodHead && p.byName[http.MethodGet] != nil {
		return p.byName[http.MethodGet]
	}
	return p.any
}

func (p *place) allow() string {
	var out []string
	for m := range p.byName {
		out = append(out, m)
	}
	slices.Sort(out)
	return strings.Join(out, ", ")
}

// routes decide by paths as they are written, and as those read them to whom case is
// nothing.
type routes struct {
	exact, folded *http.ServeMux
	hosts         bool // some route names a host
}

// CheckRoutes says all that is wrong with routes: *field.Error values, joined.
func CheckRoutes(all []Route) error {
	_, err := newRoutes(all)
	return err
}

func newRoutes(all []Route) (*routes, error) {
	if len(all) == 0 {
		return nil, field.Wrong("routes", "there is none, so that every request would be refused")
	}
	if len(all) > MaxRoutes {
		return nil, field.Wrong("routes", "at most %d", MaxRoutes)
	}
	b := builder{
		routes: routes{exact: http.NewServeMux(), folded: http.NewServeMux()},
		places: map[string]*place{}, first: map[string]int{},
	}
	var errs []error
	for i, r := range all {
		errs = append(errs, field.Within(fmt.Sprintf("routes[%d]", i), b.add(i, r)))
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	for i, r := range all {
		errs = append(errs, field.Within(fmt.Sprintf("routes[%d]", i), b.routes.reachable(r)))
	}
	return &b.routes, errors.Join(errs...)
}

type builder struct {
	routes routes
	places map[string]*place
	order  []string
	first  map[string]int // the route that made a place
}

var (
	wildcard   = regexp.MustCompile(`\{[^{}$]*?(\.\.\.)?\}`)
	methodName = regexp.MustCompile(`^[A-Z][A-Z0-9_-]*$`)
	hostName   = regexp.MustCompile(`^[a-z0-9_-]+(\.[a-z0-9_-]+)*$|^\[[0-9a-f:.]+\]$`)
)

// unnamed numbers a pattern's wildcards, so that their names are no difference.
func unnamed(pattern string) string {
	n := 0
	return wildcard.ReplaceAllStringFunc(pattern, func(w string) string {
		n++
		if strings.HasSuffix(w, "...}") {
			return "{w" + strconv.Itoa(n) + "...}"
		}
		return "{w" + strconv.Itoa(n) + "}"
	})
}

func (b *builder) add(i int, r Route) error {
	need, err := r.demand()
	if err != nil {
		return err
	}
	pattern := unnamed(r.Host + r.Path)
	p := b.places[pattern]
	if p == nil {
		p = &place{byName: map[string]*rule{}}
		if register(b.routes.exact, pattern, p) != nil || register(b.routes.folded, fold(pattern), p) != nil {
			return field.Wrong("path", "conflicts with that of %s: some paths match both, perhaps in another case, and neither is more specific", b.partner(pattern))
		}
		b.places[pattern], b.first[pattern] = p, i
		b.order = append(b.order, pattern)
	}
	b.routes.hosts = b.routes.hosts || r.Host != ""
	if len(r.Methods) == 0 {
		if p.any != nil {
			return field.Wrong("path", "is never reached: routes[%d] is of the same path", b.first[pattern])
		}
		p.any = need
	}
	var errs []error
	for _, m := range r.Methods {
		if p.byName[m] != nil {
			errs = append(errs, field.Wrong("methods", "%s is never reached: another route of the same path has it", m))
			continue
		}
		p.byName[m] = need
	}
	return errors.Join(errs...)
}

// demand checks all that needs no other route.
func (r *Route) demand() (*rule, error) {
	var errs []error
	if !strings.HasPrefix(r.Path, "/") {
		errs = append(errs, field.Wrong("path", "%q doesn't begin with a slash", r.Path))
	} else if err := register(http.NewServeMux(), r.Path, &place{}); err != nil {
		_, what, _ := strings.Cut(err.Error(), `": `)
		errs = append(errs, field.Wrong("path", "%s", cmp.Or(what, err.Error())))
	}
	if r.Host != "" && !hostName.MatchString(r.Host) {
		errs = append(errs, field.Wrong("host", "%q is no lower-case host name without port", r.Host))
	}
	for _, m := range r.Methods {
		switch {
		case !methodName.MatchString(m):
			errs = append(errs, field.Wrong("methods", "%q is no method in capitals", m))
		case m == http.MethodConnect:
			errs = append(errs, field.Wrong("methods", "CONNECT is never let through"))
		}
	}
	for _, s := range r.Scopes {
		if err := token.ValidateScope(s); err != nil {
			errs = append(errs, field.Wrong("scopes", "%q: %v", s, err))
		}
	}
	if r.Public && len(r.Scopes) > 0 {
		errs = append(errs, field.Wrong("scopes", "a public route looks at no token: leave them or public out"))
	}
	scopes := slices.Clone(r.Scopes)
	slices.Sort(scopes)
	return &rule{r.Public, slices.Compact(scopes)}, errors.Join(errs...)
}

// register adds a pattern to a mux, which panics about what it doesn't like.
func register(mux *http.ServeMux, pattern string, h http.Handler) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%v", p)
		}
	}()
	mux.Handle(pattern, h)
	return nil
}

// partner names an earlier route that a pattern conflicts with.
func (b *builder) partner(pattern string) string {
	for _, other := range b.order {
		for _, read := range []func(string) string{strings.Clone, fold} {
			mux := http.NewServeMux()
			if errors.Join(register(mux, read(other), &place{}), register(mux, read(pattern), &place{})) != nil {
				return fmt.Sprintf("routes[%d]", b.first[other])
			}
		}
	}
	return "another route"
}

// reachable finds out whether a request for a path of the route comes to it.
func (r *routes) reachable(route Route) error {
	var sample []string
	for s := range strings.SplitSeq(strings.TrimSuffix(wildcard.ReplaceAllString(route.Path, "zqx-wildcard"), "{$}"), "/") {
		if literal, err := url.PathUnescape(s); err == nil {
			s = literal
		}
		sample = append(sample, url.PathEscape(s))
	}
	method := "ZQX" // which no other route of the path names
	if len(route.Methods) > 0 {
		method = route.Methods[0]
	}
	got, refused := r.find(method, cmp.Or(route.Host, "zqx.invalid"), strings.Join(sample, "/"))
	switch want, _ := route.demand(); {
	case refused != nil:
		return field.Wrong("path", "every request for it would be refused: %s", refused.message)
	case !got.equal(want):
		return field.Wrong("path", "a request for it would come to another route")
	}
	return nil
}

// look returns the place of a path that is read as it stands, and the pattern that the mux
// chose, which may be one that it would only redirect to.
func look(mux *http.ServeMux, host, path string) (*place, string) {
	h, pattern := mux.Handler(&http.Request{Method: http.MethodGet, Host: host, URL: &url.URL{Path: path}})
	p, _ := h.(*place)
	return p, pattern
}

// find returns what a request needs. Host and path are as they came, without the query.
func (r *routes) find(method, host, raw string) (*rule, *refusal) {
	paths, err := readings(raw)
	if err != nil {
		return nil, ambiguous(err.Error())
	}
	if !methodName.MatchString(method) || method == http.MethodConnect {
		return nil, refuse(invalidRequest, "the method is none that is let through", "methods are written in capitals, and CONNECT is none of them")
	}
	if host, err = r.host(host); err != nil {
		return nil, ambiguous(err.Error())
	}
	at, pattern := look(r.exact, host, paths[0])
	if at == nil {
		return nil, refuse(routeUnknown, "no route lets this path through", "the agent's configuration lists what is let through")
	}
	found := at.rule(method)
	if found == nil {
		no := refuse(methodNotAllowed, "no route of this path lets this method through", "")
		no.header.Set("Allow", at.allow())
		return nil, no
	}
	for _, p := range paths {
		for _, as := range []struct {
			mux  *http.ServeMux
			path string
		}{{r.exact, p}, {r.folded, fold(p)}} {
			if other, _ := look(as.mux, host, as.path); other == nil || !found.covers(other.rule(method)) {
				return nil, ambiguous("programs read it in several ways, and some of them as that of a route that demands more")
			}
			if !sameWithSlash(as.mux, host, as.path, method, pattern, found) {
				return nil, ambiguous("with or without the slash at its end it is that of a route that demands more")
			}
		}
	}
	return found, nil
}

// sameWithSlash compares a path with itself with, or without, a slash at its end: to many
// programs that is the same. What matters is a route of just that other path; where the
// routes name both, there is nothing to confuse.
func sameWithSlash(mux *http.ServeMux, host, p, method, pattern string, found *rule) bool {
	toggled := p + "/"
	if strings.HasSuffix(p, "/") {
		toggled = strings.TrimSuffix(p, "/")
	}
	if toggled == "" {
		return true
	}
	other, at := look(mux, host, toggled)
	if other == nil || trimSlash(fold(at)) == trimSlash(fold(pattern)) {
		return true
	}
	if strings.HasSuffix(at, "...}") || strings.Count(trimSlash(at), "/") != strings.Count(trimSlash(toggled), "/") {
		return true // of all below some path
	}
	return found.covers(other.rule(method))
}

func trimSlash(pattern string) string {
	return strings.TrimSuffix(strings.TrimSuffix(pattern, "{$}"), "/")
}

// host returns the name by which routes are chosen.
func (r *routes) host(host string) (string, error) {
	if !r.hosts {
		return "", nil
	}
	host = strings.ToLower(host)
	name := host
	if i := strings.LastIndexByte(host, ':'); i >= 0 && !strings.HasSuffix(host, "]") {
		name = host[:i]
	}
	name = strings.TrimSuffix(name, ".")
	if !hostName.MatchString(name) {
		return "", errors.New("its host is no name")
	}
	return name, nil
}
