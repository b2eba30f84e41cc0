package outgoing

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/dayflyhq/dayfly/agent/hop"
	"github.com/dayflyhq/dayfly/sdk"
	"google.golang.org/grpc/codes"
)

const (
	// StopWithin is how long requests under way may take to end at shutdown.
	StopWithin = 5 * time.Second
	// headerWithin and maxHeader bound the header of a request.
	headerWithin = 10 * time.Second
	maxHeader    = 64 << 10
	// bufferBytes is how much of a body is on its way at a time.
	bufferBytes = 32 << 10
)

// A Proxy serves one workload. Run makes it work.
type Proxy struct {
	servers []*server
	live    *live
	log     *slog.Logger
}

// server is one listener.
type server struct {
	cfg       Listener
	admit     func(net.Conn) error // nil: everybody
	tcp       bool
	secret    *secret // nil: none is wanted
	routes    []route
	upstreams []*upstream // of the same index
	live      *live
	denied    counters
	count     func(reason string)
	http      *http.Server
}

// New returns a proxy. It starts nothing and calls nobody.
func New(cfg Config) (*Proxy, error) {
	if cfg.Count == nil {
		cfg.Count = func(string) {}
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if err := cfg.validate(); err != nil {
		return nil, fmt.Errorf("configuring outgoing proxy: %w", err)
	}
	p := &Proxy{live: newLive(cfg.Tokens), log: cfg.Log}
	buffers := &pool{}
	for _, l := range cfg.Listeners {
		_, unix := l.Listener.Addr().(*net.UnixAddr)
		s := &server{cfg: l, tcp: !unix, live: p.live, count: cfg.Count}
		if unix {
			s.admit = cfg.Admit
		}
		for i := range l.Upstreams {
			s.routes = append(s.routes, newRoute(&l.Upstreams[i], l.Forward))
			s.upstreams = append(s.upstreams, newUpstream(&cfg, &l.Upstreams[i], p.live, buffers))
		}
		s.serve(cfg.Log)
		p.servers = append(p.servers, s)
	}
	return p, nil
}

func (s *server) serve(log *slog.Logger) {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	s.http = &http.Server{
		Handler: s, Protocols: protocols, ReadHeaderTimeout: headerWithin, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: maxHeader,
		DisableGeneralOptionsHandler: true, ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	hop.Limit(s.http, cmp.Or(s.cfg.MaxConnections, hop.MaxConnections))
}

// Run serves until ctx ends or a listener fails. When it returns everything that it started
// has ended and its listeners are closed. It may be called once.
func (p *Proxy) Run(ctx context.Context) error {
	for _, s := range p.servers {
		if s.cfg.Secret == "" {
			continue
		}
		var err error
		if s.secret, err = loadSecret(s.cfg.Secret); err != nil {
			return errors.Join(fmt.Errorf("outgoing: %w", err), p.closeListeners())
		}
	}
	watching, stopWatching := context.WithCancel(context.Background())
	var watch sync.WaitGroup
	watch.Go(func() { p.live.watch(watching) })
	failed := make(chan error, len(p.servers))
	for _, s := range p.servers {
		go func() { failed <- s.http.Serve(s.cfg.Listener) }()
	}
	left := len(p.servers)
	var err error
	if left > 0 {
		select {
		case <-ctx.Done():
		case err = <-failed:
			left--
			err = fmt.Errorf("serving outgoing: %w", err)
		}
	} else {
		<-ctx.Done()
	}
	p.stop()
	for range left {
		<-failed
	}
	stopWatching()
	watch.Wait()
	return err
}

func (p *Proxy) closeListeners() error {
	var errs []error
	for _, s := range p.servers {
		errs = append(errs, s.cfg.Listener.Close())
	}
	return errors.Join(errs...)
}

// stop lets requests under way end for a while, and then cuts them.
func (p *Proxy) stop() {
	ctx, cancel := context.WithTimeout(context.Background(), StopWithin)
	defer cancel()
	var all sync.WaitGroup
	for _, s := range p.servers {
		all.Go(func() { _ = s.http.Shutdown(ctx) })
	}
	all.Wait()
	drained := p.live.drain() // the server has forgotten those that were upgraded
	select {
	case <-drained:
	case <-ctx.Done():
		p.live.cut(errStopping)
	}
	for _, s := range p.servers {
		_ = s.http.Close()
	}
	<-drained
	for _, s := range p.servers {
		for _, u := range s.upstreams {
			u.close()
		}
	}
}

func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	u, refused := s.admitted(r)
	if refused != nil {
		s.denied.requests[refused.outcome].Add(1)
		s.count(refused.reason)
		hop.Refusing(w, r)
		refused.write(w, r)
		return
	}
	if r.ProtoMajor == 1 {
		// An upstream may answer before it has the whole body; HTTP/2 needs no word for that.
		_ = http.NewResponseController(w).EnableFullDuplex()
	}
	r, x := begin(r)
	u.counts.open.Add(1)
	s.live.add(x)
	defer func() {
		s.live.remove(x)
		u.counts.open.Add(-1)
		var cut *refusal
		switch {
		case errors.As(context.Cause(x.ctx), &cut):
			x.outcome, x.reason = Cut, cut.reason
		case x.ctx.Err() != nil && !x.answered:
			x.outcome, x.reason = Canceled, "CANCELED"
		}
		u.counts.requests[x.outcome].Add(1)
		s.count(x.reason)
		x.cancel(nil)
	}()
	u.proxy.ServeHTTP(w, r)
}

// browsers are headers that only a browser sends, or another proxy in front of this one:
// what is led to loopback by a web page, or from another machine, may not use it.
var browsers = []string{"Origin", "Sec-Fetch-Site", "Sec-Fetch-Mode", "Forwarded", "X-Forwarded-For", "Via"}

// admitted returns the upstream of a request, or why there is none.
func (s *server) admitted(r *http.Request) (*upstream, *refusal) {
	if s.admit != nil {
		if err := s.admit(hop.Conn(r.Context())); err != nil {
			return nil, doorRefusal(err)
		}
	}
	if s.tcp {
		if refused := s.guard(r); refused != nil {
			return nil, refused
		}
	}
	if refused := s.form(r); refused != nil {
		return nil, refused
	}
	path := r.URL.EscapedPath()
	if path == "" {
		path = "/"
	}
	i, why := match(s.routes, r.Host, path)
	switch why {
	case badHost:
		return nil, denied(http.StatusBadRequest, codes.InvalidArgument, "REQUEST_INVALID", "the host of this request is none", "http://HOST[:PORT]/...")
	case noHost:
		return nil, denied(http.StatusForbidden, codes.PermissionDenied, "UPSTREAM_NOT_CONFIGURED", "no upstream is configured for "+r.Host, "add it to outgoing of the agent's configuration, or except it with no_proxy")
	case badPath:
		return nil, denied(http.StatusBadRequest, codes.InvalidArgument, "PATH_AMBIGUOUS", "the path could mean another one to the upstream", "send it without . and .. and encoded slashes")
	case noPath:
		return nil, denied(http.StatusForbidden, codes.PermissionDenied, "UPSTREAM_NOT_CONFIGURED", "no upstream is configured for this path", "see path of the agent's configuration")
	}
	return s.upstreams[i], nil
}

// guard is what loopback needs: every user of the host, and every browser, reaches it.
func (s *server) guard(r *http.Request) *refusal {
	for _, name := range browsers {
		if r.Header.Get(name) != "" {
			return denied(http.StatusForbidden, codes.PermissionDenied, "BROWSER_OR_PROXY", "this request comes through a browser or a proxy: it has "+name, "a program that sends it itself can use a unix socket")
		}
	}
	if host, _, ok := splitHost(r.Host); !s.cfg.Forward && (!ok || !loopbackName(host)) {
		return denied(http.StatusForbidden, codes.PermissionDenied, "HOST_NOT_LOOPBACK", "Host isn't this proxy's address", "call it by its loopback address, such as 127.0.0.1, or localhost")
	}
	if s.secret == nil || s.secret.shown(r, s.cfg.Forward) {
		return nil
	}
	if s.cfg.Forward {
		return denied(http.StatusProxyAuthRequired, codes.Unauthenticated, "PROXY_AUTHORIZATION_INVALID", "this proxy wants what its secret_file holds", "HTTP_PROXY=http://dayfly:SECRET@ADDRESS")
	}
	return denied(http.StatusUnauthorized, codes.Unauthenticated, "PROXY_AUTHORIZATION_INVALID", "this proxy wants what its secret_file holds", "http://dayfly:SECRET@ADDRESS/..., or Proxy-Authorization: Bearer SECRET")
}

// form refuses what can't be passed on with a token in it.
func (s *server) form(r *http.Request) *refusal {
	absolute := r.URL.Host != "" || r.ProtoMajor == 2
	upgrade := r.Header.Get("Upgrade")
	switch {
	case r.Method == http.MethodConnect:
		return denied(http.StatusMethodNotAllowed, codes.Unimplemented, "CONNECT_NOT_SUPPORTED", "a token can't be added inside a TLS connection of the caller's",
			"call http://"+hostOf(r)+"/... through the proxy: the agent speaks TLS to the upstream itself. Set http_proxy only, not https_proxy")
	case r.Method == http.MethodTrace:
		return denied(http.StatusMethodNotAllowed, codes.Unimplemented, "TRACE_NOT_SUPPORTED", "an answer to TRACE repeats the token", "")
	case s.cfg.Forward && !absolute:
		return denied(http.StatusBadRequest, codes.InvalidArgument, "NOT_A_PROXY_REQUEST", "this is a forward proxy, and the request names no host as one to a proxy does", "curl --proxy http://ADDRESS http://HOST/...")
	case r.URL.Scheme != "" && r.URL.Scheme != "http" && r.URL.Scheme != "https":
		return denied(http.StatusBadRequest, codes.InvalidArgument, "REQUEST_INVALID", "only http and https are passed on", "")
	case upgrade == "" || strings.EqualFold(upgrade, "websocket"):
	case strings.HasPrefix(strings.ToLower(upgrade), "h2c"):
		r.Header.Del("Upgrade") // an offer that may be left: some clients make it with every request
	default:
		return denied(http.StatusNotImplemented, codes.Unimplemented, "UPGRADE_NOT_SUPPORTED", "only websocket is passed on of what a connection can be upgraded to", "")
	}
	return nil
}

func hostOf(r *http.Request) string {
	host, _, ok := splitHost(r.Host)
	if !ok {
		return "HOST"
	}
	return host
}

// doorRefusal is what the door says about a connection.
func doorRefusal(err error) *refusal {
	r := denied(http.StatusForbidden, codes.PermissionDenied, "PEER_NOT_ALLOWED", "this user may not use the socket", "")
	var e *sdk.Error
	if errors.As(sdk.FromRPC(err), &e) && e.Reason != "" {
		r.reason, r.message, r.hint = e.Reason, e.Message, e.Hint
	}
	return r
}

// pool lends the buffers that bodies pass through.
type pool struct{ free sync.Pool }

func (p *pool) Get() []byte {
	if b, ok := p.free.Get().(*[]byte); ok {
		return *b
	}
	return make([]byte, bufferBytes)
}

func (p *pool) Put(b []byte) { p.free.Put(&b) }
