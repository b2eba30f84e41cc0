package sdk

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/dayflyhq/dayfly/proto/token"
	"golang.org/x/oauth2"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
)

// PerRPC returns the source as gRPC credentials: every call carries the current token.
// They demand transport security. Over a unix socket dial with
// google.golang.org/grpc/credentials/local, which counts as secure there.
func (s *TokenSource) PerRPC() credentials.PerRPCCredentials { return perRPC{s} }

type perRPC struct{ source *TokenSource }

func (p perRPC) GetRequestMetadata(ctx context.Context, _ ...string) (map[string]string, error) {
	if info, ok := credentials.RequestInfoFromContext(ctx); ok {
		if err := credentials.CheckSecurityLevel(info.AuthInfo, credentials.PrivacyAndIntegrity); err != nil {
			return nil, status.Error(codes.Unauthenticated, "the connection is not secure enough for a credential")
		}
	}
	cred, err := p.source.Token(ctx)
	if err != nil {
		var refused *Error
		if errors.As(err, &refused) && !refused.Temporary() {
			return nil, status.Error(codes.Unauthenticated, err.Error())
		}
		return nil, status.Error(codes.Unavailable, err.Error())
	}
	return map[string]string{"authorization": "Bearer " + cred.Token.Reveal()}, nil
}

func (perRPC) RequireTransportSecurity() bool { return true }

// ErrPlaintext: a request would have carried a token over plain http to another machine.
var ErrPlaintext = errors.New("a token is sent over https, or over http to this machine, only")

// A Transport is an http.RoundTripper that adds the current token to every request. A
// request that a redirect leads to another scheme, host or port goes there without it.
//
// A token that a service calls invalid (401 with error="invalid_token", RFC 6750) is
// dropped: it was revoked, or the broker's store was restored since. The request is made
// once more with a new one, unless its body can't be had again.
//
// A token that is bound to a certificate goes over connections that show that one: of a
// copy of Base, if that is an *http.Transport. Any other Base must see to that itself.
type Transport struct {
	// Source gives the tokens. Required.
	Source *TokenSource
	// Base makes the requests. Nil means http.DefaultTransport.
	Base http.RoundTripper
	// AllowPlaintext sends tokens over http to other machines too.
	AllowPlaintext bool

	mu    sync.Mutex
	bound *http.Transport // for tokens bound to the certificate
	to    [sha256.Size]byte
}

// RoundTrip makes one request. It returns ErrPlaintext, ErrOtherCertificate, or the error
// of the source, without having sent anything.
func (t *Transport) RoundTrip(req *http.Request) (*http.Response, error) {
	if !sameOrigin(req) {
		return t.base().RoundTrip(req)
	}
	if req.URL.Scheme != "https" && !t.AllowPlaintext && !loopback(req.URL.Hostname()) {
		return nil, refuse(req, ErrPlaintext)
	}
	cred, err := t.Source.Token(req.Context())
	if err != nil {
		return nil, refuse(req, err)
	}
	resp, err := t.over(cred).RoundTrip(authorized(req, cred))
	for range certificateAttempts {
		again, ok := replay(req)
		if !errors.Is(err, ErrOtherCertificate) || !ok {
			break
		}
		req = again
		if cred, err = t.Source.Token(req.Context()); err != nil {
			return nil, refuse(req, err)
		}
		resp, err = t.over(cred).RoundTrip(authorized(req, cred))
	}
	if err != nil || !invalidToken(resp) || !t.Source.Refused(cred.Grant) {
		return resp, err
	}
	again, ok := replay(req)
	if !ok {
		return resp, nil
	}
	fresh, err := t.Source.Token(req.Context())
	if err != nil || fresh.Grant == cred.Grant {
		return resp, nil
	}
	_ = resp.Body.Close()
	return t.over(fresh).RoundTrip(authorized(again, fresh))
}

func (t *Transport) base() http.RoundTripper {
	if t.Base == nil {
		return http.DefaultTransport
	}
	return t.Base
}

// over returns what makes a request with a credential. A connection from before the SVID
// rotated shows the old certificate for as long as it is open, and so every token that is
// bound to the new one would be refused on it.
func (t *Transport) over(cred *Credential) http.RoundTripper {
	base, ok := t.base().(*http.Transport)
	if !ok || cred.Binding != token.BindingX5T {
		return t.base()
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.bound == nil || t.to != cred.certificate {
		if t.bound != nil {
			t.bound.CloseIdleConnections()
		}
		t.bound, t.to = base.Clone(), cred.certificate
		if cfg := t.bound.TLSClientConfig; cfg != nil && cfg.GetClientCertificate != nil {
			cfg.GetClientCertificate = only(cred.certificate, cfg.GetClientCertificate)
		}
	}
	return t.bound
}

// certificateAttempts bounds how often a request is begun anew because the certificate
// rotated between its token and its connection.
const certificateAttempts = 3

// ErrOtherCertificate: the certificate that a token is bound to is no longer the one that
// connections show. It passes by itself: ask again.
var ErrOtherCertificate = errors.New("the token is bound to another certificate than the current one")

// only shows one certificate of those that get gives over time, from when that is the
// current one on.
func only(want [sha256.Size]byte, get func(*tls.CertificateRequestInfo) (*tls.Certificate, error)) func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
	var seen atomic.Pointer[tls.Certificate]
	return func(info *tls.CertificateRequestInfo) (*tls.Certificate, error) {
		if cert := seen.Load(); cert != nil {
			return cert, nil
		}
		cert, err := get(info)
		if err != nil {
			return nil, err
		}
		if len(cert.Certificate) == 0 || sha256.Sum256(cert.Certificate[0]) != want {
			return nil, ErrOtherCertificate
		}
		seen.Store(cert)
		return cert, nil
	}
}

// CloseIdleConnections closes the connections that no request uses.
func (t *Transport) CloseIdleConnections() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.bound != nil {
		t.bound.CloseIdleConnections()
	}
	if base, ok := t.base().(interface{ CloseIdleConnections() }); ok {
		base.CloseIdleConnections()
	}
}

// authorized returns a copy of a request with a token. The caller's must stay as it is: a
// redirect copies its headers.
func authorized(req *http.Request, cred *Credential) *http.Request {
	out := req.Clone(req.Context())
	out.Header.Set("Authorization", "Bearer "+cred.Token.Reveal())
	return out
}

// invalidToken reports whether a service has refused the token itself.
func invalidToken(resp *http.Response) bool {
	return resp.StatusCode == http.StatusUnauthorized && strings.Contains(resp.Header.Get("WWW-Authenticate"), `error="invalid_token"`)
}

// replay returns a request to be made once more, false if its body is gone.
func replay(req *http.Request) (*http.Request, bool) {
	if req.Body == nil || req.Body == http.NoBody {
		return req, true
	}
	if req.GetBody == nil {
		return nil, false
	}
	body, err := req.GetBody()
	if err != nil {
		return nil, false
	}
	out := *req
	out.Body = body
	return &out, true
}

// refuse closes the body, as a RoundTripper must.
func refuse(req *http.Request, err error) error {
	if req.Body != nil {
		_ = req.Body.Close()
	}
	return fmt.Errorf("authorizing request to %s: %w", req.URL.Host, err)
}

// sameOrigin reports whether every redirect that led to the request stayed where the
// first request went.
func sameOrigin(req *http.Request) bool {
	for r := req; r.Response != nil && r.Response.Request != nil; r = r.Response.Request {
		from := r.Response.Request.URL
		if from.Scheme != req.URL.Scheme || !strings.EqualFold(from.Host, req.URL.Host) {
			return false
		}
	}
	return true
}

func loopback(host string) bool {
	if host == "localhost" {
		return true
	}
	addr, err := netip.ParseAddr(host)
	return err == nil && net.IP(addr.AsSlice()).IsLoopback()
}

// OAuth2 returns the source for libraries that take an oauth2.TokenSource. ctx bounds
// every fetch that they wait for. Give it to them as it is: a wrapper that keeps tokens
// (oauth2.ReuseTokenSource, oauth2.NewClient) doesn't hear of a revocation.
func (s *TokenSource) OAuth2(ctx context.Context) oauth2.TokenSource { return oauth{ctx, s} }

type oauth struct {
	ctx    context.Context
	source *TokenSource
}

func (o oauth) Token() (*oauth2.Token, error) {
	cred, err := o.source.Token(o.ctx)
	if err != nil {
		return nil, err
	}
	return &oauth2.Token{AccessToken: cred.Token.Reveal(), TokenType: "Bearer", Expiry: cred.asked.time.Add(cred.left)}, nil
}
