package incoming

import (
	"net/http"
	"slices"
	"strconv"
	"strings"

	"github.com/dayflyhq/dayfly/sdk/verify"
)

// prefix of every header that says who calls.
const prefix = "X-Dayfly-"

// identityNames are all headers that a guard sets.
var identityNames = []string{
	prefix + "Subject", prefix + "Presenter", prefix + "Actors", prefix + "Scope", prefix + "Audience",
	prefix + "Grant", prefix + "Txn", prefix + "Expires",
}

// overriding are headers by which programs are told another method or path than the
// request's, behind the back of whoever looked at that.
var overriding = []string{"x-http-method-override", "x-http-method", "x-method-override", "x-original-url", "x-rewrite-url"}

type field struct{ name, value string }

// identity is what an accepted token says, in the order of identityNames; what it doesn't
// say is left out.
func identity(t *verify.Verified) []field {
	var actors []string
	for _, m := range slices.Backward(t.Lineage[1:]) {
		actors = append(actors, m.Identity.String())
	}
	all := []field{
		{"Subject", t.Root().String()}, {"Presenter", t.Presenter().String()}, {"Actors", strings.Join(actors, ", ")},
		{"Scope", strings.Join(t.Scopes, " ")}, {"Audience", t.Audience},
		{"Grant", t.Grant().String()}, {"Txn", t.Transaction}, {"Expires", strconv.FormatInt(t.Expires.Unix(), 10)},
	}
	out := all[:0]
	for _, f := range all {
		if f.value != "" {
			out = append(out, field{prefix + f.name, f.value})
		}
	}
	return out
}

// foldName is a header's name as CGI, WSGI and their like make a variable of it: whatever
// is no letter or digit is one and the same.
func foldName(name string) string {
	return strings.Map(func(c rune) rune {
		if 'a' <= c && c <= 'z' || '0' <= c && c <= '9' {
			return c
		}
		return '-'
	}, strings.ToLower(name))
}

// mustGo reports whether a caller's header doesn't reach the service.
func mustGo(name string, passToken bool) bool {
	folded := foldName(name)
	return strings.HasPrefix(folded, "x-dayfly-") || slices.Contains(overriding, folded) || folded == "authorization" && !passToken
}

// stamp takes out what the caller must not say and says who calls; t is nil on a public
// route.
func stamp(h http.Header, t *verify.Verified, passToken bool) {
	for name := range h {
		if mustGo(name, passToken) {
			delete(h, name)
		}
	}
	if t == nil {
		return
	}
	for _, f := range identity(t) {
		h.Set(f.name, f.value)
	}
}
