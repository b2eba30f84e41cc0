package outgoing

import (
	"net/http"
	"strings"

	"github.com/dayflyhq/dayfly/agent/hop"
)

// strip removes what a caller may have sent in the token's place or to be taken for someone:
// an upstream must find there what this proxy put there, or nothing. Hop-by-hop headers have
// gone before.
func strip(h http.Header, tokenHeader string) {
	own := hop.Fold(tokenHeader)
	for name := range h {
		switch f := hop.Fold(name); {
		case f == own, f == "authorization", f == "proxy-authorization", f == "dpop", hop.Identifies(f):
			delete(h, name)
		}
	}
}

// hide removes headers of an answer that repeat the token.
func hide(h http.Header, secret string) {
	for name, values := range h {
		for _, v := range values {
			if strings.Contains(v, secret) {
				delete(h, name)
				break
			}
		}
	}
}
