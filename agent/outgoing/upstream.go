package outgoing

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/http/httputil"
	"net/textproto"
	"net/url"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dayflyhq/dayfly/agent/hop"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

const (
	// reachWithin bounds a connection to an upstream, and its handshake.
	reachWithin = 10 * time.Second
	// pingAfter is how long an HTTP/2 connection may be silent before it is asked whether it
	// lives.
	pingAfter = 30 * time.Second
	// idleFor is how long a connection without requests is kept.
	idleFor = 90 * time.Second
	// continueWithin is how long a caller's Expect: 100-continue is waited for.
	continueWithin = 2 * time.Second
	// maxAnswerHeader bounds the header of an answer.
	maxAnswerHeader = 256 << 10
	// drainBytes is how much of a 401 is read so that its connection can be used again.
	drainBytes = 64 << 10
)

// rotationPauses are between looks at whether a credential and the SVID go together: one
// of them is a moment behind the other.
var rotationPauses = []time.Duration{0, 20 * time.Millisecond, 100 * time.Millisecond, 400 * time.Millisecond, time.Second}

// upstream is the way to one service.
type upstream struct {
	cfg     Upstream
	request sdk.Request
	target  *url.URL
	name    string
	tokens  Tokens
	svids   x509svid.Source
	bundles x509bundle.Source
	log     *slog.Logger
	live    *live
	buffers *pool
	proxy   *httputil.ReverseProxy
	counts  counters

	mu     sync.Mutex
	dialer *dialer // of the current SVID

	seen   atomic.Pointer[held]
	failed atomic.Pointer[string] // the reason of the last failure, nil while it works
}

// held is a credential and what it says of itself.
type held struct {
	cred   *sdk.Credential
	claims *token.Claims
}

// A dialer is connections that show one certificate, or none.
type dialer struct {
	certificate [sha256.Size]byte
	web         *http.Transport
	plainHTTP2  *http.Transport // for gRPC over http
}

func newUpstream(cfg *Config, u *Upstream, l *live, buffers *pool) *upstream {
	target, err := url.Parse(u.URL)
	if err != nil {
		panic("internal error: a url that was validated: " + err.Error())
	}
	up := &upstream{
		cfg: *u, request: u.Request, target: &url.URL{Scheme: target.Scheme, Host: target.Host}, tokens: cfg.Tokens,
		svids: cfg.SVIDs, bundles: cfg.Bundles, log: cfg.Log, live: l, buffers: buffers,
	}
	up.name = up.target.String()
	if u.Path != "" && u.Path != "/" {
		up.name += u.Path
	}
	if up.cfg.Header == "" {
		up.cfg.Header = DefaultHeader
		if up.cfg.Scheme == "" {
			up.cfg.Scheme = DefaultScheme
		}
	}
	if u.SPIFFEID.IsZero() && up.request.Binding == "" {
		up.request.Binding = token.BindingNone
	}
	if u.SPIFFEID.IsZero() {
		up.dialer = up.newDialer(nil)
	}
	up.proxy = &httputil.ReverseProxy{
		Rewrite: up.rewrite, Transport: up, ErrorHandler: up.fail, ModifyResponse: up.answered,
		FlushInterval: -1, BufferPool: buffers, ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug),
	}
	return up
}

// rewrite makes the request that goes out, but for the token.
func (u *upstream) rewrite(pr *httputil.ProxyRequest) {
	out := pr.Out
	out.URL.Scheme, out.URL.Host, out.URL.User, out.URL.Opaque = u.target.Scheme, u.target.Host, nil, ""
	out.URL.RawQuery = pr.In.URL.RawQuery // nothing is decided by it
	out.Host = u.target.Host
	out.Trailer = nil // after the body; an upstream might merge them with the header
	strip(out.Header, u.cfg.Header)
}

// newDialer makes connections that show svid, or nothing for nil.
func (u *upstream) newDialer(svid *x509svid.SVID) *dialer {
	d := &dialer{web: &http.Transport{
		DialContext:         (&net.Dialer{Timeout: reachWithin}).DialContext, // and no proxy of the environment: it could be this one
		TLSHandshakeTimeout: reachWithin, DisableCompression: true, MaxIdleConnsPerHost: 64, IdleConnTimeout: idleFor,
		ExpectContinueTimeout: continueWithin, MaxResponseHeaderBytes: maxAnswerHeader,
		HTTP2: &http.HTTP2Config{SendPingTimeout: pingAfter, PingTimeout: reachWithin},
	}}
	d.web.Protocols = new(http.Protocols)
	d.web.Protocols.SetHTTP1(true)
	if u.target.Scheme == "http" {
		d.plainHTTP2 = d.web.Clone()
		d.plainHTTP2.Protocols = new(http.Protocols)
		d.plainHTTP2.Protocols.SetUnencryptedHTTP2(true)
		return d
	}
	d.web.Protocols.SetHTTP2(true)
	if svid == nil {
		d.web.TLSClientConfig = &tls.Config{RootCAs: u.cfg.Roots, MinVersion: tls.VersionTLS12}
		return d
	}
	tlsCfg := tlsconfig.MTLSClientConfig(fixed{svid}, u.bundles, tlsconfig.AuthorizeID(u.cfg.SPIFFEID))
	verify := tlsCfg.VerifyPeerCertificate
	tlsCfg.VerifyPeerCertificate = func(raw [][]byte, chains [][]*x509.Certificate) error {
		if err := verify(raw, chains); err != nil {
			return &certificateError{err}
		}
		return nil
	}
	tlsCfg.MinVersion = tls.VersionTLS12
	d.certificate, d.web.TLSClientConfig = sha256.Sum256(svid.Certificates[0].Raw), tlsCfg
	return d
}

// fixed is a source of one SVID.
type fixed struct{ svid *x509svid.SVID }

func (f fixed) GetX509SVID() (*x509svid.SVID, error) { return f.svid, nil }

func (d *dialer) close() {
	d.web.CloseIdleConnections()
	if d.plainHTTP2 != nil {
		d.plainHTTP2.CloseIdleConnections()
	}
}

// connections returns those that show the current SVID. What is under way on older ones
// goes on there.
func (u *upstream) connections() (*dialer, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.cfg.SPIFFEID == (spiffeid.ID{}) {
		return u.dialer, nil
	}
	svid, err := u.svids.GetX509SVID()
	if err != nil || len(svid.Certificates) == 0 {
		return nil, &refusal{
			status: http.StatusServiceUnavailable, code: errStopping.code, reason: "IDENTITY_UNAVAILABLE", message: "this workload has no SVID now",
			hint: "see /readyz of the agent", retryAfter: time.Second, outcome: TokenUnavailable,
		}
	}
	if u.dialer == nil || u.dialer.certificate != sha256.Sum256(svid.Certificates[0].Raw) {
		if u.dialer != nil {
			u.dialer.close()
		}
		u.dialer = u.newDialer(svid)
	}
	return u.dialer, nil
}

func (u *upstream) close() {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.dialer != nil {
		u.dialer.close()
	}
}

// credential returns one to present, and the connections to present it on.
func (u *upstream) credential(ctx context.Context) (*held, *dialer, error) {
	for _, pause := range rotationPauses {
		if pause > 0 {
			select {
			case <-ctx.Done():
				return nil, nil, context.Cause(ctx)
			case <-time.After(pause):
			}
		}
		d, err := u.connections()
		if err != nil {
			return nil, nil, err
		}
		cred, err := u.tokens.Token(ctx, u.request)
		if err != nil {
			if ctx.Err() != nil {
				return nil, nil, context.Cause(ctx)
			}
			return nil, nil, tokenRefusal(err)
		}
		h, err := u.inspect(cred)
		if err != nil {
			return nil, nil, tokenRefusal(err)
		}
		if h.claims.Binding != token.BindingNone && u.cfg.SPIFFEID.IsZero() {
			return nil, nil, errBound
		}
		if h.claims.Binding != token.BindingX5T || h.claims.Certificate == d.certificate {
			return h, d, nil
		}
	}
	return nil, nil, errRotating
}

// inspect reads a credential, once while it lasts.
func (u *upstream) inspect(cred *sdk.Credential) (*held, error) {
	if h := u.seen.Load(); h != nil && h.cred.Grant == cred.Grant {
		return h, nil
	}
	t, err := token.Inspect(cred.Token.Reveal())
	if err != nil {
		return nil, fmt.Errorf("reading a credential: %w", err)
	}
	h := &held{cred, &t.Claims}
	u.seen.Store(h)
	return h, nil
}

// RoundTrip makes one request with a token, and once more if the upstream says 401 to it.
func (u *upstream) RoundTrip(req *http.Request) (*http.Response, error) {
	x := exchangeOf(req.Context())
	var body *replay
	if req.Body != nil {
		body = newReplay(req.Body, u.buffers)
		x.body = body
		context.AfterFunc(x.ctx, body.end) // the transport doesn't look while it waits for a body
	}
	h, d, err := u.credential(req.Context())
	if err != nil {
		return nil, err
	}
	resp, err := u.try(x, req, body, h, d)
	if err != nil || !unauthorized(resp) {
		if body != nil {
			body.settle()
		}
		return resp, err
	}
	again := u.tokens.Refused(u.request, h.cred)
	if again {
		u.counts.fetched.Add(1)
	}
	if !again || body != nil && !body.again() {
		return resp, nil
	}
	if resp.ContentLength >= 0 && resp.ContentLength <= drainBytes {
		_, _ = io.Copy(io.Discard, resp.Body)
	}
	_ = resp.Body.Close()
	if h, d, err = u.credential(req.Context()); err != nil {
		return nil, err
	}
	return u.try(x, req, body, h, d)
}

// try makes one request with one token.
func (u *upstream) try(x *exchange, req *http.Request, body *replay, h *held, d *dialer) (*http.Response, error) {
	if !u.cfg.KeepRevoked && !u.live.hold(x, h.claims) {
		return nil, errRevoked
	}
	x.secret = h.cred.Token
	out := *req.WithContext(httptrace.WithClientTrace(req.Context(), &httptrace.ClientTrace{
		Got1xxResponse: func(_ int, header textproto.MIMEHeader) error { // before it is passed on
			hide(http.Header(header), h.cred.Token.Reveal())
			return nil
		},
	}))
	out.Header = req.Header.Clone()
	value := h.cred.Token.Reveal()
	if u.cfg.Scheme != "" {
		value = u.cfg.Scheme + " " + value
	}
	out.Header[http.CanonicalHeaderKey(u.cfg.Header)] = []string{value}
	if body != nil {
		out.Body = body.current
	}
	if d.plainHTTP2 != nil && hop.IsGRPC(req) {
		return d.plainHTTP2.RoundTrip(&out)
	}
	return d.web.RoundTrip(&out)
}

// unauthorized reports whether an upstream refused a token: over HTTP, or as gRPC does where
// nothing else was said yet.
func unauthorized(resp *http.Response) bool {
	return resp.StatusCode == http.StatusUnauthorized || slices.Equal(resp.Header["Grpc-Status"], []string{"16"})
}

// answered looks at an answer before it is passed on.
func (u *upstream) answered(resp *http.Response) error {
	x := exchangeOf(resp.Request.Context())
	hide(resp.Header, x.secret.Reveal())
	x.answered = true
	if x.early() {
		resp.Header.Set("Connection", "close")
	}
	if unauthorized(resp) {
		x.outcome, x.reason = Unauthorized, "UPSTREAM_UNAUTHORIZED"
	}
	u.note(resp.Request.Context(), x.reason)
	if x.grpc {
		hop.TrailersOnly(resp)
	}
	if resp.StatusCode != http.StatusSwitchingProtocols {
		resp.Body = &ending{resp.Body, resp, x}
	}
	return nil
}

// An ending is the body of an answer. That of a call of gRPC's that is cut ends with a
// status that says why.
type ending struct {
	io.ReadCloser
	resp *http.Response
	x    *exchange
}

func (e *ending) Read(p []byte) (int, error) {
	n, err := e.ReadCloser.Read(p)
	if err == nil {
		return n, nil
	}
	if err != io.EOF {
		var cut *refusal
		if !errors.As(context.Cause(e.x.ctx), &cut) || !e.x.grpc {
			return n, err
		}
		e.resp.Trailer = cut.grpc()
		return n, io.EOF
	}
	hide(e.resp.Trailer, e.x.secret.Reveal())
	return n, io.EOF
}

// fail answers in the upstream's place.
func (u *upstream) fail(w http.ResponseWriter, req *http.Request, err error) {
	x := exchangeOf(req.Context())
	r := upstreamRefusal(err)
	var cut *refusal
	switch {
	case errors.As(context.Cause(x.ctx), &cut):
		r = cut
	case x.ctx.Err() != nil:
		return // nobody reads an answer
	}
	x.outcome, x.reason = r.outcome, r.reason
	if r.outcome != Cut {
		u.note(req.Context(), r.reason)
	}
	clear(w.Header())
	if x.early() {
		w.Header().Set("Connection", "close")
	}
	r.write(w, req)
}

// note logs when an upstream's way of failing changes, and not every request.
func (u *upstream) note(ctx context.Context, reason string) {
	was := ""
	if p := u.failed.Load(); p != nil {
		was = *p
	}
	if was == reason {
		return
	}
	u.failed.Store(&reason)
	switch {
	case reason == "" && was != "":
		u.log.InfoContext(ctx, "requests to an upstream succeed again", "upstream", u.name)
	case reason != "":
		u.log.WarnContext(ctx, "requests to an upstream fail", "upstream", u.name, "reason", reason)
	}
}
