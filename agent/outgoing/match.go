package outgoing

import (
	"net/netip"
	"net/url"
	"strings"
)

// A route is what requests an upstream gets.
type route struct {
	host string // lower case, without brackets; empty: any
	port string // empty: that of the upstream, 80, 443 or none
	home string // the upstream's own port
	path string // begins and ends with "/"
}

func newRoute(u *Upstream, forward bool) route {
	target, err := url.Parse(u.URL)
	if err != nil {
		panic("internal error: a url that was validated: " + err.Error())
	}
	r := route{path: strings.TrimSuffix(u.Path, "/") + "/", home: target.Port()}
	if !forward {
		return r
	}
	r.host = strings.ToLower(target.Hostname())
	if u.Host != "" {
		r.host, r.port, _ = splitHost(u.Host)
	}
	return r
}

// splitHost takes a Host header apart: a name or an address, and a port or none.
func splitHost(s string) (host, port string, ok bool) {
	if in, rest, bracketed := strings.Cut(strings.TrimPrefix(s, "["), "]"); bracketed && strings.HasPrefix(s, "[") {
		addr, err := netip.ParseAddr(in)
		if err != nil || !addr.Is6() || addr.Zone() != "" {
			return "", "", false
		}
		host, s = addr.String(), rest
	} else {
		if i := strings.IndexByte(s, ':'); i >= 0 {
			host, s = s[:i], s[i:]
		} else {
			host, s = s, ""
		}
		host = strings.ToLower(host)
		if host == "" || len(host) > maxHost || strings.Trim(host, "abcdefghijklmnopqrstuvwxyz0123456789.-_") != "" {
			return "", "", false
		}
	}
	if s == "" {
		return host, "", true
	}
	port = strings.TrimPrefix(s, ":")
	if port == s || port == "" || len(port) > 5 || strings.Trim(port, "0123456789") != "" {
		return "", "", false
	}
	return host, port, true
}

// maxHost is the longest name that the DNS takes.
const maxHost = 253

// matches reports whether the route takes a host and port.
func (r *route) matches(host, port string) bool {
	if r.host == "" {
		return true
	}
	if r.host != host {
		return false
	}
	if r.port != "" {
		return r.port == port
	}
	return port == "" || port == "80" || port == "443" || port == r.home
}

// under reports whether a path is below the route's, in whole segments.
func (r *route) under(path string) bool {
	return strings.HasPrefix(path, r.path) || path+"/" == r.path
}

// A miss is why no route takes a request.
type miss int

const (
	hit     miss = iota
	badHost      // it is no name of a host
	noHost       // no upstream has it
	badPath      // it could mean another path to the upstream than it does here
	noPath       // no upstream of the host has it
)

// match finds the route of a request by its host, as in a Host header, and its path as it
// was sent: the one with the longest path. Where a path decides anything, one that a server
// may read in another way is refused.
func match(routes []route, hostport, path string) (int, miss) {
	host, port, ok := splitHost(hostport)
	best, lenient, found, decides := -1, -1, false, false
	merged := merge(path)
	for i := range routes {
		r := &routes[i]
		if r.host != "" && !ok || !r.matches(host, port) {
			continue
		}
		found = true
		decides = decides || r.path != "/"
		if r.under(path) && (best < 0 || len(r.path) > len(routes[best].path)) {
			best = i
		}
		if r.under(merged) && (lenient < 0 || len(r.path) > len(routes[lenient].path)) {
			lenient = i
		}
	}
	switch {
	case !found && !ok:
		return 0, badHost
	case !found:
		return 0, noHost
	case !strings.HasPrefix(path, "/"), decides && (!plainPath(path) || best != lenient):
		return 0, badPath
	case best < 0:
		return 0, noPath
	}
	return best, hit
}

// merge returns a path as a lenient server reads it: without escapes, parameters, and slashes
// that follow each other.
func merge(path string) string {
	var out strings.Builder
	for segment := range strings.SplitSeq(path, "/") {
		if plain, err := url.PathUnescape(segment); err == nil {
			segment = plain
		}
		if segment, _, _ = strings.Cut(segment, ";"); segment != "" {
			out.WriteString("/" + segment)
		}
	}
	return out.String() + "/"
}

// plainPath reports whether an escaped path means what it says to every server: no segment
// goes up, and none hides a separator.
func plainPath(path string) bool {
	for segment := range strings.SplitSeq(path, "/") {
		plain, err := url.PathUnescape(segment)
		if err != nil || strings.ContainsAny(plain, "/\\\x00") {
			return false
		}
		plain, _, _ = strings.Cut(plain, ";") // what some servers take for a parameter
		if plain == "." || plain == ".." {
			return false
		}
	}
	return true
}
