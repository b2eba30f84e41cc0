package outgoing

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/dayflyhq/dayfly/agent/hop"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"golang.org/x/net/http/httpguts"
)

const (
	// MaxListeners and MaxUpstreams bound how many listeners there are, and the upstreams
	// of each.
	MaxListeners, MaxUpstreams = 64, 64
	// DefaultHeader is where an upstream finds the token, with DefaultScheme before it.
	DefaultHeader, DefaultScheme = "Authorization", "Bearer"
)

// Tokens is who keeps credentials fresh. Its methods may be called from any goroutine.
type Tokens interface {
	// Token returns a credential that is alive as far as is known at this moment. Its errors
	// are an *sdk.Error somewhere, or what sdk.FromRPC reads.
	Token(ctx context.Context, r sdk.Request) (*sdk.Credential, error)
	// Refused takes back a credential that an upstream has called invalid, and reports
	// whether another one can be had: not more often than with growing pauses.
	Refused(r sdk.Request, c *sdk.Credential) bool
	// Revoked reports whether claims are revoked as far as is known at this moment.
	Revoked(c *token.Claims) bool
	// Changed returns a channel that is closed when Revoked may answer otherwise next.
	Changed() <-chan struct{}
}

// An Upstream is a service, and the token that it gets.
type Upstream struct {
	// URL is https://HOST[:PORT] of the service; http:// only with Insecure. Paths are passed
	// on as they come.
	URL string
	// Host is the name by which a forward proxy's callers know it, with a port if only that
	// one is meant. Empty: that of URL.
	Host string
	// Path is what paths must begin with, in whole segments. Empty: "/", all.
	Path string
	// Request is the token. Where Binding is empty, and the service sees no certificate, a
	// bearer is asked for.
	Request sdk.Request
	// SPIFFEID is who the service must prove to be by its SVID; this workload then shows its
	// own. Zero: the service is verified by the web's certificates.
	SPIFFEID spiffeid.ID
	// Roots verify the web's certificates. Nil: the system's.
	Roots *x509.CertPool
	// Insecure allows http, to a loopback address.
	Insecure bool
	// Header is where the token goes, after Scheme and a space if there is a scheme. Empty:
	// DefaultHeader with DefaultScheme.
	Header, Scheme string
	// KeepRevoked lets requests under way go on when their token is revoked.
	KeepRevoked bool
}

// A Listener is where programs send their requests.
type Listener struct {
	// Listener is a loopback TCP socket or a unix socket. The proxy closes it.
	Listener net.Listener
	// Forward makes it a forward proxy, for programs that have it as their HTTP_PROXY.
	// Otherwise it is a reverse proxy, which programs take for the service.
	Forward bool
	// Secret is the file with what callers must show, made if it isn't there. It or Open
	// must be set on TCP, and neither on a unix socket.
	Secret string
	// Open lets in whoever reaches the TCP socket.
	Open bool
	// MaxConnections is how many there are at a time; 0: hop.MaxConnections.
	MaxConnections int
	// Upstreams are at least one.
	Upstreams []Upstream
}

// Config says what a proxy stands between.
type Config struct {
	Listeners []Listener
	// Tokens must be set. SVIDs and Bundles must be where an upstream has a SPIFFE ID.
	Tokens  Tokens
	SVIDs   x509svid.Source
	Bundles x509bundle.Source
	// Admit decides, with each request, about its connection to a unix socket: nil, or a refusal that
	// sdk.FromRPC reads. Nil: whom the socket's mode lets connect.
	Admit func(net.Conn) error
	// Count is told how each request ended: with the upstream's answer ("") or a reason. Nil:
	// nobody is.
	Count func(reason string)
	// Log receives what happens; nil: nothing does.
	Log *slog.Logger
}

// A FieldError is what is wrong with one field, by its name in a configuration file.
type FieldError struct{ Key, Message string }

func (e *FieldError) Error() string { return e.Key + ": " + e.Message }

func wrong(key, format string, args ...any) error {
	return &FieldError{key, fmt.Sprintf(format, args...)}
}

// Problems lists what is wrong, of an error of Validate.
func Problems(err error) []*FieldError {
	switch e := err.(type) {
	case *FieldError:
		return []*FieldError{e}
	case interface{ Unwrap() []error }:
		var out []*FieldError
		for _, one := range e.Unwrap() {
			out = append(out, Problems(one)...)
		}
		return out
	}
	return nil
}

// Validate says all that is wrong with the upstream: FieldErrors, joined.
func (u *Upstream) Validate() error {
	errs := []error{u.validateURL(), u.validateMatch(), u.validateHeader()}
	if err := token.ValidateAudience(u.Request.Audience); err != nil {
		errs = append(errs, wrong("credential.audience", "%v", err))
	}
	if b := u.Request.Binding; u.SPIFFEID.IsZero() && (b == token.BindingSPIFFE || b == token.BindingX5T) {
		errs = append(errs, wrong("credential.binding", "%s needs spiffe_id: without it this workload shows the service no certificate, and a bound token is refused", b))
	}
	return errors.Join(errs...)
}

func (u *Upstream) validateURL() error {
	target, err := url.Parse(u.URL)
	if err != nil || target.Hostname() == "" || target.User != nil || strings.TrimSuffix(target.Path, "/") != "" || target.RawQuery != "" || target.Fragment != "" || target.Opaque != "" {
		return wrong("url", "is https://HOST[:PORT] and no more")
	}
	switch {
	case target.Scheme == "https" && u.Insecure:
		return wrong("insecure", "goes with an http:// url only")
	case target.Scheme == "https":
	case target.Scheme != "http":
		return wrong("url", "is https://HOST[:PORT] and no more")
	case !u.Insecure:
		return wrong("url", "is http: a token would go in plain text; use https, or say insecure: true for a service on loopback")
	case !loopbackName(target.Hostname()):
		return wrong("url", "is http to another machine: insecure is for loopback only")
	case !u.SPIFFEID.IsZero() || u.Roots != nil:
		return wrong("url", "is http, and spiffe_id and ca_file need https")
	}
	if !u.SPIFFEID.IsZero() && u.Roots != nil {
		return wrong("ca_file", "and spiffe_id exclude each other")
	}
	return nil
}

func (u *Upstream) validateMatch() error {
	var errs []error
	if u.Host != "" {
		if _, _, ok := splitHost(u.Host); !ok {
			errs = append(errs, wrong("host", "is a name or an address, with a port or none"))
		}
	}
	if u.Path != "" && (!strings.HasPrefix(u.Path, "/") || !plainPath(u.Path) || strings.ContainsAny(u.Path, "%?# ") || strings.Contains(u.Path, "//")) {
		errs = append(errs, wrong("path", "begins with / and is plain: no dots, no escapes"))
	}
	return errors.Join(errs...)
}

// taken are headers that a token can't be in: they say how a message is read, or where it
// goes.
var taken = map[string]bool{
	"host": true, "content-length": true, "transfer-encoding": true, "connection": true, "upgrade": true, "te": true, "trailer": true,
	"keep-alive": true, "proxy-connection": true, "proxy-authorization": true, "proxy-authenticate": true, "expect": true, "content-type": true,
}

func (u *Upstream) validateHeader() error {
	var errs []error
	if u.Header != "" && (!httpguts.ValidHeaderFieldName(u.Header) || taken[hop.Fold(u.Header)]) {
		errs = append(errs, wrong("header", "is no header that a token can be in"))
	}
	if u.Scheme != "" && !httpguts.ValidHeaderFieldName(u.Scheme) {
		errs = append(errs, wrong("scheme", "is one word, such as Bearer"))
	}
	return errors.Join(errs...)
}

// Validate says all that is wrong with the listener but for its socket: FieldErrors, joined.
func (l *Listener) Validate() error {
	var errs []error
	if n := len(l.Upstreams); n < 1 || n > MaxUpstreams {
		errs = append(errs, wrong("upstreams", "are %d, and must be 1 to %d", n, MaxUpstreams))
	}
	if l.Secret != "" && !filepath.IsAbs(l.Secret) {
		errs = append(errs, wrong("secret_file", "must be an absolute path"))
	}
	seen := map[string]bool{}
	for i := range l.Upstreams {
		u := &l.Upstreams[i]
		key := fmt.Sprintf("upstreams[%d]", i)
		own := Problems(u.Validate())
		for _, p := range own {
			errs = append(errs, wrong(key+"."+p.Key, "%s", p.Message))
		}
		if !l.Forward && u.Host != "" {
			errs = append(errs, wrong(key+".host", "is for forward proxies: a reverse proxy's callers know it by its own address"))
		}
		if len(own) > 0 {
			continue
		}
		r := newRoute(u, l.Forward)
		if at := r.host + " " + r.port + " " + r.path; seen[at] {
			errs = append(errs, wrong(key+".path", "is that of another upstream of this listener"))
		} else {
			seen[at] = true
		}
	}
	return errors.Join(errs...)
}

// ValidateSocket says what is wrong with the way in: on TCP a secret or the word that there
// is none, on a unix socket neither.
func (l *Listener) ValidateSocket(unix bool) error {
	switch {
	case unix && (l.Secret != "" || l.Open):
		return wrong("secret_file", "and open are for TCP: a unix socket's mode says who may use it")
	case !unix && (l.Secret == "") == !l.Open:
		return wrong("secret_file", "or open: true must be there, and not both: every user of this host reaches a loopback address")
	}
	return nil
}

func (l *Listener) validateListener() error {
	if l.Listener == nil {
		return wrong("listen", "must be set")
	}
	switch addr := l.Listener.Addr().(type) {
	case *net.UnixAddr:
		return l.ValidateSocket(true)
	case *net.TCPAddr:
		errs := []error{l.ValidateSocket(false)}
		if !addr.IP.IsLoopback() {
			errs = append(errs, wrong("listen", "must be a loopback address"))
		}
		for i := range l.Upstreams {
			if target, err := url.Parse(l.Upstreams[i].URL); err == nil && target.Port() == strconv.Itoa(addr.Port) && isAt(target.Hostname(), addr.IP) {
				errs = append(errs, wrong(fmt.Sprintf("upstreams[%d].url", i), "is this listener's own address"))
			}
		}
		return errors.Join(errs...)
	}
	return wrong("listen", "is neither TCP nor a unix socket")
}

// isAt reports whether a host is an address, or may be.
func isAt(host string, ip net.IP) bool {
	return strings.EqualFold(host, "localhost") || net.ParseIP(host).Equal(ip)
}

func (c *Config) validate() error {
	var errs []error
	if c.Tokens == nil {
		errs = append(errs, wrong("tokens", "must be set"))
	}
	if len(c.Listeners) > MaxListeners {
		errs = append(errs, wrong("outgoing", "are at most %d", MaxListeners))
	}
	for i := range c.Listeners {
		l := &c.Listeners[i]
		for _, p := range append(Problems(l.Validate()), Problems(l.validateListener())...) {
			errs = append(errs, wrong(fmt.Sprintf("outgoing[%d].%s", i, p.Key), "%s", p.Message))
		}
		for j := range l.Upstreams {
			if !l.Upstreams[j].SPIFFEID.IsZero() && (c.SVIDs == nil || c.Bundles == nil) {
				errs = append(errs, wrong("bundles", "and an SVID must be set for upstreams with a SPIFFE ID"))
			}
		}
	}
	return errors.Join(errs...)
}

// loopbackName reports whether a host is this machine, and not what a DNS server of
// somebody's says is.
func loopbackName(host string) bool {
	addr, err := netip.ParseAddr(strings.Trim(host, "[]"))
	return strings.EqualFold(host, "localhost") || err == nil && addr.IsLoopback()
}
