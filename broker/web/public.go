package web

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.opentelemetry.io/otel/trace"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/broker/attest"
	"github.com/dayflyhq/dayfly/broker/keys"
	"github.com/dayflyhq/dayfly/proto/token"
)

const (
	// DefaultJWKSMaxAge is how long a reader may keep keys when
	// PublicConfig.JWKSMaxAge is zero.
	DefaultJWKSMaxAge = keys.DefaultJWKSMaxAge
	// MaxJWKSMaxAge is the longest that may be configured.
	MaxJWKSMaxAge = keys.MaxJWKSMaxAge
)

// PublicConfig describes the public handler. Issuer and Keys must be set.
type PublicConfig struct {
	// Issuer is the iss of every token: an https URL (http on loopback) without
	// query, fragment or slash at the end. Its path, if it has one, is where the
	// documents are.
	Issuer string
	// Keys returns the keys that live tokens may be signed with, never a revoked one.
	// It is called for every request, perhaps at once.
	Keys func() []token.PublicKey
	// Algorithm of the keys to come, announced besides those of Keys. Empty: ES256.
	Algorithm token.Algorithm
	// JWKSMaxAge is the max-age of the documents, in whole seconds. Zero means
	// DefaultJWKSMaxAge; at most MaxJWKSMaxAge.
	JWKSMaxAge time.Duration
	// Broker serves the endpoints of OAuth to clients that Attestor proves. Nil: there
	// are none.
	Broker   *broker.Broker
	Attestor *attest.Attestor
	// MutualTLS is the base URL at which clients with a certificate are served, where that
	// isn't the issuer: something that ends TLS stands before that. Empty: it is.
	MutualTLS string
	Now       func() time.Time // nil: time.Now
	// Unproven is told of each request whose client hasn't proved who it is. Nil: nobody is.
	Unproven func(attest.Failure)
	// TracerProvider makes a span of every request. Nil: none.
	TracerProvider trace.TracerProvider
	// Log receives what goes wrong inside. Nil: nothing does.
	Log *slog.Logger
}

type public struct {
	cfg          PublicConfig
	cacheControl string
}

// Public returns the handler of the public documents.
//
//	GET <issuer>/.well-known/openid-configuration    OpenID Connect Discovery 1.0 section 3
//	GET /.well-known/oauth-authorization-server<path of the issuer>    RFC 8414 section 3
//	GET <issuer>/jwks.json    RFC 7517 section 5
//
// These have an ETag and a short max-age; their refusals are JSON with code, reason,
// message and hint. With a broker there are endpoints that want an authenticated client:
//
//	POST <issuer>/token    RFC 6749 section 4.4, RFC 8693
//	POST <issuer>/introspect    RFC 7662
//	POST <issuer>/revoke    RFC 7009
func Public(cfg PublicConfig) (http.Handler, error) {
	if cfg.Algorithm == "" {
		cfg.Algorithm = token.ES256
	}
	if cfg.JWKSMaxAge == 0 {
		cfg.JWKSMaxAge = DefaultJWKSMaxAge
	}
	cfg.Log = orDiscard(cfg.Log)
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Unproven == nil {
		cfg.Unproven = func(attest.Failure) {}
	}
	path, err := cfg.validate()
	if err != nil {
		return nil, fmt.Errorf("configuring the public HTTP handler: %w", err)
	}
	p := &public{cfg, "public, max-age=" + strconv.Itoa(int(cfg.JWKSMaxAge/time.Second)) + ", must-revalidate"}
	rs := routes{
		path + "/.well-known/openid-configuration":       {get: p.document(p.openID)},
		"/.well-known/oauth-authorization-server" + path: {get: p.document(p.authorizationServer)},
		path + "/jwks.json":                              {get: p.document(p.jwks)},
	}
	for _, e := range p.endpoints() {
		rs[path+e.path] = route{post: p.post(e.serve)}
	}
	return traced(hardened(rs), rs, "public", cfg.TracerProvider), nil
}

// oauthEndpoint is where an endpoint is, below the issuer, and what the metadata calls it.
type oauthEndpoint struct {
	path, name string
	serve      endpoint
}

// endpoints are those of OAuth, if there is a broker to serve them.
func (p *public) endpoints() []oauthEndpoint {
	if p.cfg.Broker == nil {
		return nil
	}
	return []oauthEndpoint{
		{"/token", "token", p.token},
		{"/introspect", "introspection", p.introspect},
		{"/revoke", "revocation", p.revoke},
	}
}

// validate returns the issuer's path.
func (c *PublicConfig) validate() (string, error) {
	var errs []error
	path, err := issuerPath(c.Issuer)
	if err != nil {
		errs = append(errs, fmt.Errorf("issuer %q: %w", c.Issuer, err))
	}
	if c.Keys == nil {
		errs = append(errs, errors.New("no source of keys"))
	}
	if !c.Algorithm.Valid() {
		errs = append(errs, fmt.Errorf("algorithm %q is none of %s, %s and %s", c.Algorithm, token.ES256, token.EdDSA, token.RS256))
	}
	if c.JWKSMaxAge < time.Second || c.JWKSMaxAge > MaxJWKSMaxAge {
		errs = append(errs, fmt.Errorf("max-age %v: at least 1s, at most %v", c.JWKSMaxAge, MaxJWKSMaxAge))
	}
	if (c.Broker == nil) != (c.Attestor == nil) {
		errs = append(errs, errors.New("a broker and an attestor go together"))
	}
	if c.MutualTLS != "" {
		if _, err := issuerPath(c.MutualTLS); err != nil {
			errs = append(errs, fmt.Errorf("base URL for clients with a certificate %q: %w", c.MutualTLS, err))
		}
	}
	return path, errors.Join(errs...)
}

// CheckIssuer says what is wrong with an iss: see PublicConfig.Issuer.
func CheckIssuer(issuer string) error {
	_, err := issuerPath(issuer)
	return err
}

func issuerPath(issuer string) (string, error) {
	u, err := url.Parse(issuer)
	switch {
	case err != nil:
		return "", errors.New("not a URL")
	case u.Host == "" || u.Opaque != "":
		return "", errors.New("not an absolute URL")
	case u.Scheme != "https" && (u.Scheme != "http" || !loopbackHost(u.Host)):
		return "", errors.New("must begin with https:// (http:// only on loopback)")
	case u.User != nil || u.RawQuery != "" || u.ForceQuery || u.Fragment != "" || strings.HasSuffix(issuer, "#"):
		return "", errors.New("must have no user, query or fragment")
	case strings.HasSuffix(u.Path, "/"):
		return "", errors.New("must not end with a slash")
	case len(issuer) > token.MaxIssuerBytes:
		return "", fmt.Errorf("has %d bytes, a token takes %d", len(issuer), token.MaxIssuerBytes)
	case strings.ContainsFunc(issuer, func(r rune) bool { return r <= ' ' || r > '~' || r == '"' || r == '\\' }):
		return "", errors.New("must be plain ASCII")
	}
	return u.Path, nil
}

// loopbackHost reports whether the host, perhaps with a port, is this machine by name
// or address.
func loopbackHost(hostport string) bool {
	host := hostport
	if h, _, err := net.SplitHostPort(hostport); err == nil {
		host = h
	}
	host = strings.TrimSuffix(strings.TrimPrefix(host, "["), "]")
	ip := net.ParseIP(host)
	return strings.EqualFold(host, "localhost") || ip != nil && ip.IsLoopback()
}

// document serves the bytes that render makes, under an ETag of their own.
func (p *public) document(render func() ([]byte, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		body, err := render()
		if err != nil {
			p.cfg.Log.ErrorContext(r.Context(), "making a public document failed", "path", r.URL.Path, "error", err)
			writeProblem(w, http.StatusInternalServerError, Problem{
				Reason: "INTERNAL", Message: "the document could not be made", Hint: "try again; if it lasts, the broker's log says why"})
			return
		}
		sum := sha256.Sum256(body)
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("Cache-Control", p.cacheControl)
		w.Header().Set("ETag", `"`+hex.EncodeToString(sum[:16])+`"`)
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(body))
	}
}

func (p *public) jwks() ([]byte, error) { return keys.JWKS(p.cfg.Keys()) }

// metadata is what both discovery documents say: RFC 8414 section 2, and what other
// standards added to it. Lists that the standards require or give another default to are
// there though empty: nobody logs in here.
type metadata map[string]any

func (p *public) metadata() metadata {
	m := metadata{
		"issuer": p.cfg.Issuer, "jwks_uri": p.cfg.Issuer + "/jwks.json",
		// Nobody is sent here through a browser, so no response type can be used. But both
		// standards want one and no empty list, and this is what clouds read elsewhere.
		"response_types_supported": []string{"id_token"}, "grant_types_supported": []string{},
		// RFC 8705 section 3.3: the x5t binding.
		"tls_client_certificate_bound_access_tokens": true,
	}
	aliases := map[string]string{}
	for _, e := range p.endpoints() {
		m[e.name+"_endpoint"] = p.cfg.Issuer + e.path
		m[e.name+"_endpoint_auth_methods_supported"] = []string{"spiffe_x509", "spiffe_jwt"}
		aliases[e.name+"_endpoint"] = p.cfg.MutualTLS + e.path
	}
	if p.cfg.Broker != nil {
		m["grant_types_supported"] = []string{grantClientCredentials, grantTokenExchange}
		if p.cfg.MutualTLS != "" {
			m["mtls_endpoint_aliases"] = aliases // RFC 8705 section 5
		}
	}
	return m
}

// openID is what a cloud's token service reads before it federates.
func (p *public) openID() ([]byte, error) {
	m := p.metadata()
	m["subject_types_supported"] = []string{"public"}
	m["id_token_signing_alg_values_supported"] = p.algorithms()
	m["claims_supported"] = []string{"iss", "sub", "aud", "exp", "nbf", "iat", "jti", "client_id", "scope", "act", "cnf", "txn"}
	return json.Marshal(m)
}

func (p *public) authorizationServer() ([]byte, error) { return json.Marshal(p.metadata()) }

func (p *public) algorithms() []token.Algorithm {
	algs := []token.Algorithm{p.cfg.Algorithm}
	for _, k := range p.cfg.Keys() {
		algs = append(algs, k.Algorithm)
	}
	slices.Sort(algs)
	return slices.Compact(algs)
}
