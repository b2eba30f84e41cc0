package outgoing

import (
	"net/http"
	"strings"
)

// fold makes names equal that a server may take for one: CGI and its heirs know neither
// case nor the difference between - and _.
func fold(name string) string {
	return strings.ReplaceAll(strings.ToLower(name), "_", "-")
}

// claims are headers by which a request says who makes it. An upstream must find there what
// this proxy put there, or nothing.
var claims = map[string]bool{
	"authorization": true, "proxy-authorization": true, "dpop": true, "forwarded": true, "x-real-ip": true,
}

// strip removes what a caller may have sent in the token's place or to be taken for someone.
// Hop-by-hop headers have gone before.
func strip(h http.Header, tokenHeader string) {
	own := fold(tokenHeader)
	for name := range h {
		if f := fold(name); f == own || claims[f] || strings.HasPrefix(f, "x-forwarded-") {
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
