package incoming

import (
	"net/http"
	"slices"
	"strconv"
	"strings"

	"github.com/dayflyhq/dayfly/agent/hop"
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
var overriding = []string{"x-http-method-override", "x-http-method", "x-method-override", "x-original-url", "x-original-uri", "x-original-method", "x-rewrite-url"}

type header struct{ name, value string }

// identity is what an accepted token says, in the order of identityNames; what it doesn't
// say is left out.
func identity(t *verify.Verified) []header {
	var actors []string
	for _, m := range slices.Backward(t.Lineage[1:]) {
		actors = append(actors, m.Identity.String())
	}
	all := []header{
		{"Subject", t.Root().String()}, {"Presenter", t.Presenter().String()}, {"Actors", strings.Join(actors, ", ")},
		{"Scope", strings.Join(t.Scopes, " ")}, {"Audience", t.Audience},
		{"Grant", t.Grant().String()}, {"Txn", t.Transaction}, {"Expires", strconv.FormatInt(t.Expires.Unix(), 10)},
	}
	out := all[:0]
	for _, f := range all {
		if f.value != "" {
			out = append(out, header{prefix + f.name, f.value})
		}
	}
	return out
}

// mustGo reports whether a caller's header doesn't reach the service: what says who calls,
// or to read another method or path than was checked. What proxies say of each other goes
// where it is spelt so that only the service takes it for that.
func mustGo(name string, passToken bool) bool {
	folded := hop.Fold(name)
	return strings.HasPrefix(folded, "x-dayfly-") || slices.Contains(overriding, folded) || folded == "authorization" && !passToken ||
		hop.Identifies(folded) && folded != strings.ToLower(name)
}

// stamp takes out what the caller must not say and says who calls; t is nil on a public
// route, on which no token was looked at and none is passed on.
func stamp(h http.Header, t *verify.Verified, passToken bool) {
	for name := range h {
		if mustGo(name, passToken && t != nil) || hop.Identifies(hop.Fold(name)) {
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
