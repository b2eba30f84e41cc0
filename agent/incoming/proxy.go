package incoming

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"net/url"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dayflyhq/dayfly/agent/hop"
	"github.com/dayflyhq/dayfly/sdk/verify"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

const (
	headersWithin = 10 * time.Second
	idleFor       = 2 * time.Minute
	dialWithin    = 5 * time.Second
	// stopWithin is how long requests under way may take to end at shutdown.
	stopWithin = 5 * time.Second
	// maxHeader is the largest head of a request.
	maxHeader = 64 << 10
)

// ProxyConfig describes a proxy before a service. Policy, Listener and Upstream must be
// set.
type ProxyConfig struct {
	Policy
	// Listener is where callers come. The proxy closes it.
	Listener net.Listener
	// Source is the SVID that the proxy serves TLS with, to callers that prove theirs. Nil:
	// plain, for bearer tokens alone; then the listener must be loopback or a unix socket.
	Source x509svid.Source
	// Anonymous lets callers in by TLS that show no certificate: with bearer tokens, and to
	// public routes.
	Anonymous bool
	// Admit looks at the connection of each request; nil: everybody comes in.
	Admit func(net.Conn) error
	// MaxConnections is how many there are at a time; 0: hop.MaxConnections.
	MaxConnections int
	// Upstream is the service, on this host: http://127.0.0.1:8080, https://127.0.0.1:8443
	// or unix:///run/app.sock. gRPC goes to it as HTTP/2, in plain text but for https.
	Upstream string
	// UpstreamCA is who signs an https upstream's certificate; nil: the system's.
	UpstreamCA *x509.CertPool
}

// A Proxy lets requests through to a service. Run makes it work.
type Proxy struct {
	cfg     ProxyConfig
	env     Env
	guard   *guard
	up      *upstream
	reverse *httputil.ReverseProxy
	server  *http.Server
	under   underway
}

// NewProxy returns a proxy that serves nobody yet.
func NewProxy(cfg ProxyConfig, env Env) (*Proxy, error) {
	if env.Now == nil {
		env.Now = time.Now
	}
	if env.Log == nil {
		env.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Listener == nil {
		return nil, errors.New("incoming: a listener must be set")
	}
	if addr, ok := cfg.Listener.Addr().(*net.TCPAddr); ok && cfg.Source == nil && !addr.IP.IsLoopback() {
		return nil, errors.New("incoming: without a source of SVIDs the listener must be on loopback or a unix socket: tokens would go over the network in plain text")
	}
	if cfg.Source != nil && env.Bundles == nil {
		return nil, errors.New("incoming: bundles must be set with TLS, to check the callers' certificates")
	}
	g, err := newGuard(cfg.Policy, env)
	if err != nil {
		return nil, fmt.Errorf("incoming: %w", err)
	}
	up, err := newUpstream(cfg)
	if err != nil {
		return nil, fmt.Errorf("incoming: upstream: %w", err)
	}
	p := &Proxy{cfg: cfg, env: env, guard: g, up: up}
	p.reverse = &httputil.ReverseProxy{
		Rewrite: p.rewrite, Transport: up, FlushInterval: -1, ErrorHandler: p.failed, ModifyResponse: early,
		ErrorLog: slog.NewLogLogger(env.Log.Handler(), slog.LevelDebug),
	}
	p.server = &http.Server{
		Handler: p, ReadHeaderTimeout: headersWithin, IdleTimeout: idleFor, MaxHeaderBytes: maxHeader,
		DisableGeneralOptionsHandler: true, // OPTIONS * is no path of any route
		Protocols:                    new(http.Protocols),
		ErrorLog:                     slog.NewLogLogger(env.Log.Handler(), slog.LevelDebug),
	}
	hop.Limit(p.server, cmp.Or(cfg.MaxConnections, hop.MaxConnections))
	p.server.Protocols.SetHTTP1(true)
	if cfg.Source != nil {
		p.server.Protocols.SetHTTP2(true)
		p.server.TLSConfig = p.tls()
	} else {
		p.server.Protocols.SetUnencryptedHTTP2(true)
	}
	return p, nil
}

// Ready says why every token would be refused, nil if none of that is so.
func (p *Proxy) Ready() error { return p.guard.ready() }

// Run serves until ctx ends. When it returns all that it started has ended.
func (p *Proxy) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	follow, stopFollowing := context.WithCancel(context.WithoutCancel(ctx))
	defer stopFollowing()
	wg.Go(func() { _ = p.guard.v.Run(follow) }) // it is run once: no error

	// Requests that are still under way when their time is over end by their context, also
	// those that have become something else (websockets).
	under, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	p.server.BaseContext = func(net.Listener) context.Context { return under }
	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(stopped)
		last, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopWithin)
		defer cancel()
		err := p.server.Shutdown(last)
		end()
		if err != nil {
			_ = p.server.Close()
		}
	})
	p.env.Log.InfoContext(ctx, "serving incoming requests", "address", p.cfg.Listener.Addr().String(), "tls", p.cfg.Source != nil, "audiences", p.cfg.Audiences)
	var err error
	if p.cfg.Source != nil {
		err = p.server.ServeTLS(p.cfg.Listener, "", "")
	} else {
		err = p.server.Serve(p.cfg.Listener)
	}
	if stop() { // it ended by itself
		end()
		_ = p.server.Close()
	} else {
		<-stopped
	}
	p.under.end()
	p.up.closeIdle()
	if !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serving incoming requests: %w", err)
	}
	return nil
}

// underway counts the requests that handlers work on, which the server doesn't wait for.
type underway struct {
	mu    sync.Mutex
	ended bool
	wg    sync.WaitGroup
}

func (u *underway) enter() bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	if !u.ended {
		u.wg.Add(1)
	}
	return !u.ended
}

// end lets nobody in any more, and waits for those who are.
func (u *underway) end() {
	u.mu.Lock()
	u.ended = true
	u.mu.Unlock()
	u.wg.Wait()
}

// tls is that of the workload's SVID. Whoever shows a certificate must show one of a
// trust domain that the Workload API gave a bundle of; it is looked at again with every
// request.
func (p *Proxy) tls() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		ClientAuth: map[bool]tls.ClientAuthType{true: tls.RequestClientCert, false: tls.RequireAnyClientCert}[p.cfg.Anonymous],
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			svid, err := p.cfg.Source.GetX509SVID()
			if err != nil {
				return nil, err
			}
			out := &tls.Certificate{PrivateKey: svid.PrivateKey, Leaf: svid.Certificates[0]}
			for _, c := range svid.Certificates {
				out.Certificate = append(out.Certificate, c.Raw)
			}
			return out, nil
		},
		// A resumed session would skip the look at its certificate.
		SessionTicketsDisabled: true,
		VerifyConnection: func(state tls.ConnectionState) error {
			if len(state.PeerCertificates) == 0 {
				return nil
			}
			_, _, err := x509svid.Verify(state.PeerCertificates, p.env.Bundles, x509svid.WithTime(p.env.Now()))
			return err
		},
	}
}

// ServeHTTP checks one request and lets it through.
func (p *Proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if !p.under.enter() {
		panic(http.ErrAbortHandler)
	}
	defer p.under.wg.Done()
	path := r.URL.EscapedPath() // what is forwarded
	t, no := p.check(r, path)
	if no != nil {
		no.write(w, r)
		return
	}
	ctx, done := r.Context(), func() {}
	if t != nil {
		ctx, done = p.guard.v.Watch(verify.NewContext(ctx, t), t)
	}
	defer done()
	defer hop.Ends(ctx, w)()
	if r.ProtoMajor == 1 && r.ContentLength != 0 {
		sent := &upload{ReadCloser: r.Body}
		ctx, r.Body = context.WithValue(ctx, uploadKey{}, sent), sent
	}
	r = r.WithContext(ctx)
	r.Header = r.Header.Clone()
	if up := r.Header.Values("Upgrade"); len(up) != 1 || !strings.EqualFold(up[0], "websocket") {
		// h2c above all: what would follow on the connection nobody would look at.
		r.Header.Del("Upgrade")
		r.Header.Del("Http2-Settings")
	}
	defer p.cut(w, r)
	p.reverse.ServeHTTP(w, r)
}

func (p *Proxy) check(r *http.Request, path string) (*verify.Verified, *refusal) {
	if p.cfg.Admit != nil {
		if err := p.cfg.Admit(hop.Conn(r.Context())); err != nil {
			p.guard.count(peerNotAllowed)
			return nil, refuse(peerNotAllowed, "this program may not use this socket", "whom the socket lets in is in the agent's configuration")
		}
	}
	peer := p.guard.v.PeerOf(r.TLS, r.RemoteAddr) // its bundles and its clock are those of env
	if shown := r.TLS != nil && len(r.TLS.PeerCertificates) > 0; peer.ID.IsZero() && (shown || p.cfg.Source != nil && !p.cfg.Anonymous) {
		p.guard.count(svidInvalid)
		return nil, refuse(svidInvalid, "the certificate of this connection proves nothing now", "connect anew with the current SVID")
	}
	return p.guard.check(r.Context(), request{method: r.Method, host: r.Host, path: path, authorization: r.Header.Values("Authorization"), peer: peer})
}

// cut ends a gRPC call whose token died in gRPC's own way; other protocols have none for a
// response that has begun, and their callers see it broken off.
func (p *Proxy) cut(w http.ResponseWriter, r *http.Request) {
	e := recover()
	if e == nil {
		return
	}
	no := p.dead(r)
	if e != http.ErrAbortHandler || no == nil || !hop.IsGRPC(r) {
		panic(e)
	}
	no.trailers(func(name, value string) { w.Header().Set(http.TrailerPrefix+name, value) })
}

// dead is why a request's context ended, nil unless its token is to blame.
func (p *Proxy) dead(r *http.Request) *refusal {
	var no *verify.Refusal
	if !errors.As(context.Cause(r.Context()), &no) {
		return nil
	}
	return refused(p.guard.v, no, nil)
}

// rewrite makes the service's request of the caller's.
func (p *Proxy) rewrite(r *httputil.ProxyRequest) {
	r.Out.URL.Scheme, r.Out.URL.Host = p.up.scheme, p.up.host
	r.Out.URL.RawQuery = r.In.URL.RawQuery // as it came: nothing here depends on it
	r.Out.Trailer = nil                    // programs may take its fields for headers
	t, _ := verify.FromContext(r.In.Context())
	stamp(r.Out.Header, t, p.cfg.PassToken)
	r.SetXForwarded()
}

// upload is the body of a request over HTTP/1.
type upload struct {
	io.ReadCloser
	whole atomic.Bool
}

type uploadKey struct{}

func (u *upload) Read(p []byte) (int, error) {
	n, err := u.ReadCloser.Read(p)
	if err == io.EOF {
		u.whole.Store(true)
	}
	return n, err
}

// early makes an answer over HTTP/1 that begins before its request has ended the last of its
// connection: else the server would wait for the rest of the body first, for as long as the
// caller likes.
func early(resp *http.Response) error {
	if sent, ok := resp.Request.Context().Value(uploadKey{}).(*upload); ok && !sent.whole.Load() {
		resp.Header.Set("Connection", "close")
	}
	if hop.IsGRPC(resp.Request) {
		hop.TrailersOnly(resp)
	}
	return nil
}

// failed answers for a service that doesn't.
func (p *Proxy) failed(w http.ResponseWriter, r *http.Request, err error) {
	no := p.dead(r)
	if no == nil {
		if r.Context().Err() == nil {
			p.env.Log.WarnContext(r.Context(), "the service behind the incoming proxy doesn't answer", "err", err)
		}
		p.guard.count(upstreamAway)
		no = refuse(upstreamAway, "the service behind this proxy doesn't answer", "try again; whoever runs it finds more in the agent's log")
	}
	no.write(w, r)
}

// upstream is the way to the service: gRPC by HTTP/2, which it needs, all else by HTTP/1
// in plain text and by what is agreed on in TLS.
type upstream struct {
	scheme, host string
	http, grpc   *http.Transport
}

func (u *upstream) RoundTrip(r *http.Request) (*http.Response, error) {
	if hop.IsGRPC(r) {
		return u.grpc.RoundTrip(r)
	}
	return u.http.RoundTrip(r)
}

func (u *upstream) closeIdle() {
	u.http.CloseIdleConnections()
	u.grpc.CloseIdleConnections()
}

// CheckUpstream says what is wrong with the address of a service.
func CheckUpstream(address string) error {
	_, _, err := parseUpstream(address)
	return err
}

func parseUpstream(address string) (u *url.URL, socket string, err error) {
	const want = "want http://127.0.0.1:PORT, https://127.0.0.1:PORT or unix:///PATH"
	u, err = url.Parse(address)
	if err != nil || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return nil, "", errors.New(want)
	}
	switch u.Scheme {
	case "unix":
		if u.Host != "" || !filepath.IsAbs(u.Path) {
			return nil, "", errors.New(want)
		}
		return u, u.Path, nil
	case "http", "https":
		if u.Path != "" && u.Path != "/" {
			return nil, "", errors.New("has a path, and requests go on with their own")
		}
		if ip, err := netip.ParseAddr(u.Hostname()); (err != nil || !ip.IsLoopback()) && u.Hostname() != "localhost" {
			return nil, "", fmt.Errorf("must be on this host, since whoever reaches it without the proxy may say who they are: %s", want)
		}
		return u, "", nil
	}
	return nil, "", errors.New(want)
}

func newUpstream(cfg ProxyConfig) (*upstream, error) {
	u, socket, err := parseUpstream(cfg.Upstream)
	if err != nil {
		return nil, err
	}
	dialer := &net.Dialer{Timeout: dialWithin}
	dial := dialer.DialContext
	out := &upstream{scheme: u.Scheme, host: u.Host}
	if socket != "" {
		out.scheme, out.host = "http", "localhost"
		dial = func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, "unix", socket)
		}
	}
	transport := func() *http.Transport {
		return &http.Transport{
			DialContext: dial, MaxIdleConnsPerHost: 64, IdleConnTimeout: idleFor, DisableCompression: true,
			TLSClientConfig: &tls.Config{RootCAs: cfg.UpstreamCA}, Protocols: new(http.Protocols), MaxResponseHeaderBytes: 1 << 20,
		}
	}
	out.http, out.grpc = transport(), transport()
	out.http.Protocols.SetHTTP1(true)
	if out.scheme == "https" {
		out.http.Protocols.SetHTTP2(true)
		out.grpc.Protocols.SetHTTP2(true)
	} else {
		out.grpc.Protocols.SetUnencryptedHTTP2(true)
	}
	return out, nil
}
