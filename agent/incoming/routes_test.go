package incoming_test

import (
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"path"
	"slices"
	"strings"
	"testing"

	"github.com/dayflyhq/dayfly/agent/field"
	"github.com/dayflyhq/dayfly/agent/hop"
	"github.com/dayflyhq/dayfly/agent/incoming"
	"pgregory.net/rapid"
)

func finder(t testing.TB, routes ...incoming.Route) incoming.Finder {
	t.Helper()
	f, err := incoming.NewFinder(routes)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// shop is a service with a little of everything.
var shop = []incoming.Route{
	{Path: "/healthz", Public: true},
	{Path: "/orders/", Methods: []string{"GET"}, Scopes: []string{"orders.read"}},
	{Path: "/orders/", Methods: []string{"POST", "DELETE"}, Scopes: []string{"orders.write", "orders.read"}},
	{Path: "/orders/{id}/audit", Scopes: []string{"audit"}},
	{Path: "/Admin/", Scopes: []string{"admin"}},
	{Path: "/public/{path...}", Public: true},
	{Path: "/café", Scopes: []string{"coffee"}},
	{Path: "/both", Scopes: []string{"a"}},
	{Path: "/both/", Scopes: []string{"b"}},
	{Path: "/", Host: "internal.example", Scopes: []string{"internal"}},
	{Path: "/{$}"},
}

// The most specific path is the request's, then its method; what matches nothing, and what
// can be read in several ways, is refused.
func TestRoutes(t *testing.T) {
	find := finder(t, shop...)
	for _, c := range []struct{ method, host, path, need, reason string }{
		{"GET", "h", "/healthz", "public", ""},
		{"HEAD", "h", "/healthz", "public", ""},
		{"GET", "h", "/", "token", ""},
		{"GET", "h", "/nothing", "", "ROUTE_UNKNOWN"},
		{"GET", "h", "/healthz/", "", "ROUTE_UNKNOWN"},
		{"GET", "h", "/healthz/x", "", "ROUTE_UNKNOWN"},
		{"GET", "h", "/orders/", "token orders.read", ""},
		{"GET", "h", "/orders/1/2/3", "token orders.read", ""},
		{"HEAD", "h", "/orders/1", "token orders.read", ""},
		{"POST", "h", "/orders/1", "token orders.read orders.write", ""},
		{"PUT", "h", "/orders/1", "", "METHOD_NOT_ALLOWED"},
		{"GET", "h", "/orders", "", "ROUTE_UNKNOWN"},
		{"PUT", "h", "/orders/1/audit", "token audit", ""},
		{"GET", "h", "/orders/1/audit/x", "token orders.read", ""},
		{"GET", "h", "/public/a/b", "public", ""},
		{"GET", "h", "/public/a%20b;v=1/c.txt", "public", ""},
		{"GET", "h", "/caf%C3%A9", "token coffee", ""},
		{"GET", "h", "/caf%c3%a9", "token coffee", ""},
		{"GET", "h", "/both", "token a", ""},
		{"GET", "h", "/both/", "token b", ""},
		{"GET", "internal.example", "/x", "token internal", ""},
		{"GET", "Internal.Example.:8080", "/x", "token internal", ""},
		{"GET", "internal.example:8080", "/orders/1", "token internal", ""},
		{"GET", "a@internal.example", "/x", "", "PATH_AMBIGUOUS"},
		{"CONNECT", "h", "/", "", "INVALID_REQUEST"},
		{"get", "h", "/", "", "INVALID_REQUEST"},
		{"", "h", "/", "", "INVALID_REQUEST"},
	} {
		if need, reason := find(c.method, c.host, c.path); need != c.need || reason != c.reason {
			t.Errorf("%s %s%s: needs %q, refused %q; want %q, %q", c.method, c.host, c.path, need, reason, c.need, c.reason)
		}
	}
}

// hostile is how one gets at /admin behind the back of whoever looks at paths.
var hostile = []string{
	"/public/../admin", "/public/%2e%2e/admin", "/public/%2E./admin", "/public/..;/admin", "/public/..%3b/admin", "/public/.;x/../admin",
	"/public/%2e%2e%2fadmin", "/public/..%2fadmin", "/public/%2f../admin", "/public/..%5cadmin", "/public/..\\admin", "/public\\..\\admin", "/public/%252e%252e/admin",
	"/public/%25252e%25252e/admin", "/public/%2525252e%2525252e/admin", "//admin", "/public//admin", "/./admin", "/admin/.", "/public/...", "/public/.%00./admin", "/public/%00", "/public/%0a", "/public/%7f",
	"/public/%c0%ae%c0%ae/admin", "/public/%ff", "/public/%", "/public/%2", "/public/%zz", "/public/a b", "/public/\x00", "/public/é", "/public/a#b", "/public/a?b",
	"admin", "", "*", "http://h/admin", "/public/" + strings.Repeat("a", 9000), "/public/;/admin", "/public/%20/admin", "/public/. /x", "/public/a%2fb", "/public/a%5cb", "/public/a%252fb",
}

// confusing is refused because of the routes: another one is meant by some.
var confusing = []string{
	"/ADMIN/x", "/admin;x/y", "/admin;/", "/%61dmin/x", "/admin%2e/x", "/admin./x", "/admin%20/x", "/admin%3bx/y", "/admin%3fx", "/admin%23x", "/%2561dmin/x",
	"/adm%69n/x", "/%41dmin/x", "/K", "/%E2%84%AA", "/k;a", "/only/", "/page/x/", "/a%2Db",
}

// TestAmbiguousPaths: behind a route that lets everything through, no other spelling of a
// path that needs more comes through.
func TestAmbiguousPaths(t *testing.T) {
	find := finder(t,
		incoming.Route{Path: "/", Public: true}, incoming.Route{Path: "/admin/", Scopes: []string{"admin"}}, incoming.Route{Path: "/k", Scopes: []string{"admin"}},
		incoming.Route{Path: "/only", Scopes: []string{"admin"}}, incoming.Route{Path: "/page/{x}", Scopes: []string{"admin"}}, incoming.Route{Path: "/a-b", Scopes: []string{"admin"}},
	)
	for _, p := range hostile {
		if need, reason := find("GET", "h", p); reason != "PATH_AMBIGUOUS" {
			t.Errorf("%q: needs %q, refused %q", p, need, reason)
		}
	}
	for _, p := range confusing {
		if need, reason := find("GET", "h", p); need == "public" {
			t.Errorf("%q: public, %q", p, reason)
		}
	}
	if need, reason := finder(t, incoming.Route{Path: "/", Scopes: []string{"s"}}, incoming.Route{Path: "/healthz", Public: true})("GET", "h", "/healthz"); need != "public" {
		t.Errorf("an exact exception: %q, %q", need, reason)
	}
	for p, want := range map[string]string{
		"/": "public", "/x": "public", "/X/y.txt": "public", "/x;v=1": "public", "/a%20b": "public", "/100%25": "public", "/x/": "public", "/admin/x": "token admin",
		"/admin/X;v=1": "token admin", "/a:b@c,d": "public", "/%7Ex": "public", "/.well-known/x": "public", "/a..b/.c": "public", "/x.": "public",
	} {
		if need, reason := find("GET", "h", p); need != want {
			t.Errorf("%q: needs %q, refused %q; want %q", p, need, reason, want)
		}
	}
}

// What is wrong with routes is said of each.
func TestRouteErrors(t *testing.T) {
	for _, c := range []struct {
		routes []incoming.Route
		want   string
	}{
		{nil, "routes: there is none"},
		{[]incoming.Route{{Path: "x"}}, `routes[0].path: "x" doesn't begin with a slash`},
		{[]incoming.Route{{Path: "/{"}}, "routes[0].path: at offset 1: bad wildcard segment"},
		{[]incoming.Route{{Path: "/{x...}/y"}}, "routes[0].path: at offset"},
		{[]incoming.Route{{Path: "/a/../b"}}, "routes[0].path: "},
		{[]incoming.Route{{Path: "/a//b"}}, "routes[0].path: "},
		{[]incoming.Route{{Path: "/a;b"}, {Path: "/a", Public: true}}, "routes[0].path: every request for it would be refused"},
		{[]incoming.Route{{Path: "/a%2fb"}}, "routes[0].path: every request for it would be refused"},
		{[]incoming.Route{{Path: "/", Host: "Example.com"}}, "routes[0].host: "},
		{[]incoming.Route{{Path: "/", Host: "example.com:80"}}, "routes[0].host: "},
		{[]incoming.Route{{Path: "/", Methods: []string{"get"}}}, `routes[0].methods: "get"`},
		{[]incoming.Route{{Path: "/", Methods: []string{"CONNECT"}}}, "routes[0].methods: CONNECT"},
		{[]incoming.Route{{Path: "/", Scopes: []string{"a b"}}}, `routes[0].scopes: "a b"`},
		{[]incoming.Route{{Path: "/", Scopes: []string{""}}}, `routes[0].scopes: ""`},
		{[]incoming.Route{{Path: "/", Scopes: []string{"a"}, Public: true}}, "routes[0].scopes: a public route"},
		{[]incoming.Route{{Path: "/a/{x}"}, {Path: "/{x}/b"}}, "routes[1].path: conflicts with that of routes[0]"},
		{[]incoming.Route{{Path: "/a"}, {Path: "/b"}, {Path: "/A"}}, "routes[2].path: conflicts with that of routes[0]"},
		{[]incoming.Route{{Path: "/a/{x}"}, {Path: "/a/{y}"}}, "routes[1].path: is never reached: routes[0] is of the same path"},
		{[]incoming.Route{{Path: "/a", Methods: []string{"GET"}}, {Path: "/a", Methods: []string{"PUT", "GET"}}}, "routes[1].methods: GET is never reached"},
		{make([]incoming.Route, incoming.MaxRoutes+1), "routes: at most 512"},
	} {
		err := incoming.CheckRoutes(c.routes)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v:\n%v\nwant %s", c.routes[:min(len(c.routes), 3)], err, c.want)
		}
		for _, e := range field.Errors(err) {
			if !strings.HasPrefix(c.want, e.Key) {
				t.Errorf("%v is of %s, want %s", e, e.Key, c.want)
			}
		}
		if len(field.Errors(err)) == 0 {
			t.Errorf("%v says of no field", err)
		}
	}
	err := incoming.CheckRoutes([]incoming.Route{{Path: "x"}, {Path: "/", Methods: []string{"a"}, Scopes: []string{""}}})
	for _, want := range []string{"routes[0].path", "routes[1].methods", "routes[1].scopes"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v\nlacks %s", err, want)
		}
	}
}

// understand are ways in which programs get at the path that they act on.
var understand = map[string]func(string) string{
	"as it comes": func(p string) string { return p },
	"decoded":     unescape,
	"decoded twice": func(p string) string {
		return unescape(unescape(p))
	},
	"cleaned":              path.Clean,
	"decoded and cleaned":  func(p string) string { return path.Clean(unescape(p)) },
	"cleaned and decoded":  func(p string) string { return unescape(path.Clean(p)) },
	"backslashes":          func(p string) string { return path.Clean(strings.ReplaceAll(unescape(p), `\`, "/")) },
	"parameters off":       func(p string) string { return path.Clean(parametersOff(p)) },
	"decoded, then off":    func(p string) string { return path.Clean(parametersOff(unescape(p))) },
	"off, then decoded":    func(p string) string { return path.Clean(unescape(parametersOff(p))) },
	"case":                 func(p string) string { return strings.ToLower(path.Clean(unescape(p))) },
	"upper case":           func(p string) string { return strings.ToLower(strings.ToUpper(path.Clean(unescape(p)))) },
	"as C strings":         func(p string) string { p, _, _ = strings.Cut(unescape(p), "\x00"); return p },
	"queries once decoded": func(p string) string { p, _, _ = strings.Cut(unescape(p), "?"); return p },
	"dots off": func(p string) string {
		segments := strings.Split(path.Clean(unescape(p)), "/")
		for i := range segments {
			segments[i] = strings.TrimRight(segments[i], ". ")
		}
		return strings.Join(segments, "/")
	},
	"slash off": func(p string) string { return strings.TrimSuffix(unescape(p), "/") },
	"slash on":  func(p string) string { return strings.TrimSuffix(unescape(p), "/") + "/" },
}

func unescape(p string) string {
	if out, err := url.PathUnescape(p); err == nil {
		return out
	}
	return p
}

func parametersOff(p string) string {
	segments := strings.Split(p, "/")
	for i, s := range segments {
		segments[i], _, _ = strings.Cut(s, ";")
	}
	return strings.Join(segments, "/")
}

// checkPath: whichever way a program reads a path that came through as public, it doesn't
// read one that needs a token.
func checkPath(t rapid.TB, find incoming.Finder, p string) {
	need, reason := find("GET", "h", p)
	if reason != "" {
		return
	}
	for how, read := range understand {
		secret := false
		for s := range strings.SplitSeq("/admin /only /page/x", " ") {
			got := read(p)
			secret = secret || got == s || strings.HasPrefix(got, "/admin/")
		}
		if secret && need == "public" {
			t.Fatalf("%q is public, and read %s it is %q", p, how, read(p))
		}
	}
}

var guarded = []incoming.Route{
	{Path: "/", Public: true}, {Path: "/admin/", Scopes: []string{"admin"}}, {Path: "/admin", Scopes: []string{"admin"}},
	{Path: "/only", Scopes: []string{"admin"}}, {Path: "/page/{x}", Scopes: []string{"admin"}},
}

func TestPathsHaveOneReading(t *testing.T) {
	find := finder(t, guarded...)
	pieces := []string{"/", "/", "admin", "ADMIN", "only", "page", "x", ".", "..", "%2e", "%2f", "%5c", "\\", "%25", "%32%65", "61", "%61", "%41", ";", "%3b", "?", "%3f", "#", "%23", "%00", "%20", " ", "%", "a", "é", "%c3%a9", "%c0%af", "~"}
	rapid.Check(t, func(t *rapid.T) {
		checkPath(t, find, "/"+strings.Join(rapid.SliceOfN(rapid.SampledFrom(pieces), 0, 8).Draw(t, "pieces"), ""))
	})
}

func FuzzPath(f *testing.F) {
	for _, p := range slices.Concat(hostile, confusing, []string{"/", "/admin/x", "/x"}) {
		f.Add(p)
	}
	find := finder(f, guarded...)
	f.Fuzz(func(t *testing.T, p string) { checkPath(t, find, p) })
}

// TestPathsAreForwardedAsChecked: what net/http makes of the path of a request is what its
// reverse proxy sends on, and what the route was chosen by.
func TestPathsAreForwardedAsChecked(t *testing.T) {
	var saw string
	back := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { saw = r.RequestURI }))
	defer back.Close()
	to, err := url.Parse(back.URL)
	if err != nil {
		t.Fatal(err)
	}
	find := finder(t, incoming.Route{Path: "/", Public: true})
	for _, p := range slices.Concat(hostile, confusing, []string{"/", "/x", "/a%20b", "/x;y", "/a|b", "/[x]", "/a'b", "/caf%C3%A9", "/café", "/100%25"}) {
		u, err := url.ParseRequestURI(p)
		if err != nil {
			continue // net/http refuses it itself
		}
		checked := u.EscapedPath()
		if _, reason := find("GET", "h", checked); reason != "" {
			continue
		}
		r := httptest.NewRequest("GET", "/", nil)
		r.URL = u
		saw = ""
		(&httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) { r.Out.URL.Scheme, r.Out.URL.Host = to.Scheme, to.Host }}).ServeHTTP(httptest.NewRecorder(), r)
		if path, _, _ := strings.Cut(saw, "?"); path != checked {
			t.Errorf("%q: checked %q, the service saw %q", p, checked, saw)
		}
	}
}

// Whatever a header is called that becomes one of ours in CGI's variables goes.
func TestHeaderNames(t *testing.T) {
	cgi := func(name string) string { return strings.ToUpper(strings.ReplaceAll(name, "-", "_")) }
	rapid.Check(t, func(t *rapid.T) {
		name := rapid.SampledFrom([]string{"x", "X"}).Draw(t, "x") + rapid.SampledFrom([]string{"-", "_", "."}).Draw(t, "1") +
			rapid.SampledFrom([]string{"dayfly", "Dayfly", "DAYFLY", "dAYFLY"}).Draw(t, "d") + rapid.SampledFrom([]string{"-", "_", "."}).Draw(t, "2") + rapid.StringMatching("[A-Za-z_-]{0,12}").Draw(t, "rest")
		if !incoming.MustGo(name, true) {
			t.Fatalf("%s stays", name)
		}
		other := rapid.StringMatching("[A-Za-z_-]{1,20}").Draw(t, "other")
		if strings.HasPrefix(cgi(other), "X_DAYFLY_") != incoming.MustGo(other, true) && !strings.HasPrefix(hop.Fold(other), "x-") {
			t.Fatalf("%s", other)
		}
	})
	for name, pass := range map[string]bool{"authorization": false, "Authorization": false, "X-HTTP-Method-Override": true, "x_original_url": true} {
		if !incoming.MustGo(name, pass) {
			t.Errorf("%s stays", name)
		}
	}
	if incoming.MustGo("Authorization", true) || incoming.MustGo("X-Request-Id", false) {
		t.Error("too much goes")
	}
}

// BenchmarkFind is what routes cost a request.
func BenchmarkFind(b *testing.B) {
	find := finder(b, shop...)
	for name, p := range map[string]string{"plain": "/orders/4711/items", "escaped": "/orders/a%20b;c=d/%41"} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				find("GET", "example.org", p)
			}
		})
	}
}

// TestPlainOnTheNetwork: tokens don't go over a network in plain text, whoever configures it.
func TestPlainOnTheNetwork(t *testing.T) {
	l, err := net.Listen("tcp", "0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	cfg := incoming.ProxyConfig{Listener: l, Upstream: "http://127.0.0.1:1", Policy: incoming.Policy{Audiences: []string{"a"}, Routes: []incoming.Route{{Path: "/"}}}}
	if _, err := incoming.NewProxy(cfg, incoming.Env{Conn: incoming.NoConn}); err == nil || !strings.Contains(err.Error(), "plain text") {
		t.Errorf("got %v", err)
	}
}
