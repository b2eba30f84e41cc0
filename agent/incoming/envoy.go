package incoming

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/dayflyhq/dayfly/agent/hop"
	extauthzv1 "github.com/dayflyhq/dayfly/proto/dayfly/extauthz/v1"
	"github.com/dayflyhq/dayfly/sdk/verify"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/protobuf/types/known/structpb"
)

const (
	// MaxCheckBytes is the largest question that Envoy may ask: its own limit for a
	// request's head is 60 KiB, and a certificate comes with it. A larger one, such as with
	// the request's body, gets gRPC's own refusal, which Envoy takes for a no.
	MaxCheckBytes = 256 << 10
	// overwrite is OVERWRITE_IF_EXISTS_OR_ADD.
	overwrite = 2
)

// A Witness is whose word counts for who the peer of an Envoy is.
type Witness int

const (
	// Certificate: that of the peer's certificate, which the agent checks itself.
	Certificate Witness = iota
	// Principal: Envoy's. Its listener must have checked the certificate.
	Principal
)

// EnvoyConfig describes an external authorization service. Policy, Listener and
// Credentials must be set.
type EnvoyConfig struct {
	Policy
	// Listener is where Envoy asks: a unix socket, or loopback. The service closes it.
	Listener net.Listener
	// Credentials look at its connections, and Admit says whether a call's is let in.
	Credentials credentials.TransportCredentials
	Admit       func(context.Context) error
	// Peer is whose word counts for who calls.
	Peer Witness
}

// Envoy answers envoy.service.auth.v3.Authorization. Run makes it work.
type Envoy struct {
	cfg    EnvoyConfig
	env    Env
	guard  *guard
	server *grpc.Server
}

// NewEnvoy returns a service that serves nobody yet.
func NewEnvoy(cfg EnvoyConfig, env Env) (*Envoy, error) {
	if env.Now == nil {
		env.Now = time.Now
	}
	if env.Log == nil {
		env.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Listener == nil || cfg.Credentials == nil || cfg.Admit == nil {
		return nil, errors.New("envoy: listener, credentials and admit must be set")
	}
	if cfg.Peer == Certificate && env.Bundles == nil {
		return nil, errors.New("envoy: bundles must be set, to check the callers' certificates")
	}
	g, err := newGuard(cfg.Policy, env)
	if err != nil {
		return nil, fmt.Errorf("envoy: %w", err)
	}
	e := &Envoy{cfg: cfg, env: env, guard: g}
	e.server = grpc.NewServer(
		grpc.Creds(cfg.Credentials), grpc.MaxRecvMsgSize(MaxCheckBytes), grpc.WaitForHandlers(true),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: true}),
	)
	e.server.RegisterService(&authorization, e)
	return e, nil
}

// authorization is Envoy's service, by hand: see the .proto file for why.
var authorization = grpc.ServiceDesc{
	ServiceName: "envoy.service.auth.v3.Authorization",
	HandlerType: (*checker)(nil),
	Methods: []grpc.MethodDesc{{MethodName: "Check", Handler: func(srv any, ctx context.Context, decode func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
		in := new(extauthzv1.CheckRequest)
		if err := decode(in); err != nil {
			return nil, err
		}
		return srv.(checker).Check(ctx, in)
	}}},
	Metadata: "envoy/service/auth/v3/external_auth.proto",
}

type checker interface {
	Check(context.Context, *extauthzv1.CheckRequest) (*extauthzv1.CheckResponse, error)
}

// Ready says why every token would be refused, nil if none of that is so.
func (e *Envoy) Ready() error { return e.guard.ready() }

// Run serves until ctx ends. When it returns all that it started has ended.
func (e *Envoy) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	follow, stopFollowing := context.WithCancel(context.WithoutCancel(ctx))
	defer stopFollowing()
	wg.Go(func() { _ = e.guard.v.Run(follow) }) // it is run once: no error
	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() { defer close(stopped); e.stop() })
	e.env.Log.InfoContext(ctx, "serving envoy", "address", e.cfg.Listener.Addr().String(), "audiences", e.cfg.Audiences)
	err := e.server.Serve(e.cfg.Listener)
	if stop() {
		e.server.Stop()
	} else {
		<-stopped
	}
	if err != nil && !errors.Is(err, grpc.ErrServerStopped) {
		return fmt.Errorf("serving envoy: %w", err)
	}
	return nil
}

func (e *Envoy) stop() {
	late := time.AfterFunc(stopWithin, e.server.Stop)
	defer late.Stop()
	e.server.GracefulStop()
}

// Check judges one request that Envoy has. Every no is an answer, none an error: what is
// an error to Envoy it may be told to let pass.
func (e *Envoy) Check(ctx context.Context, in *extauthzv1.CheckRequest) (*extauthzv1.CheckResponse, error) {
	if err := e.cfg.Admit(ctx); err != nil {
		return nil, err
	}
	http := in.GetAttributes().GetRequest().GetHttp()
	headers := headersOf(http)
	t, no := e.judge(ctx, in.GetAttributes(), headers)
	if no != nil {
		return denied(no), nil
	}
	return e.passed(t, headers), nil
}

func (e *Envoy) judge(ctx context.Context, a *extauthzv1.AttributeContext, headers []header) (*verify.Verified, *refusal) {
	http := a.GetRequest().GetHttp()
	if http == nil {
		return nil, e.malformed("the question is about no HTTP request", "put ext_authz among the HTTP filters")
	}
	peer, no := e.peer(a.GetSource())
	if no != nil {
		return nil, no
	}
	path, _, _ := strings.Cut(http.GetPath(), "?")
	r := request{method: http.GetMethod(), host: http.GetHost(), path: path, peer: peer}
	for _, h := range headers {
		if hop.Fold(h.name) == "authorization" {
			// Envoy joins several by a comma, which no token has.
			r.authorization = append(r.authorization, strings.Split(h.value, ",")...)
		}
	}
	return e.guard.check(ctx, r)
}

func (e *Envoy) malformed(message, hint string) *refusal {
	e.guard.count(invalidRequest)
	return refuse(invalidRequest, message, hint)
}

// headersOf lists a request's headers, in whichever way Envoy sent them.
func headersOf(r *extauthzv1.HttpRequest) []header {
	var out []header
	for name, value := range r.GetHeaders() {
		out = append(out, header{name, value})
	}
	for _, h := range r.GetHeaderMap().GetHeaders() {
		value := h.GetValue()
		if raw := h.GetRawValue(); len(raw) > 0 {
			value = string(raw)
		}
		out = append(out, header{h.GetKey(), value})
	}
	return out
}

// peer is who is at the other end of Envoy's connection. Headers (x-forwarded-client-cert)
// are nobody's word: whoever forgets to sanitize them passes on the caller's.
func (e *Envoy) peer(p *extauthzv1.Peer) (verify.Peer, *refusal) {
	out := verify.Peer{Address: p.GetAddress().GetSocketAddress().GetAddress()}
	var leaf *x509.Certificate
	if text := p.GetCertificate(); text != "" {
		var err error
		if leaf, err = parseCertificate(text); err != nil {
			return out, e.malformed("source.certificate: "+err.Error(), "this is what Envoy sends with include_peer_certificate")
		}
		if now := e.env.Now(); now.After(leaf.NotAfter) || now.Before(leaf.NotBefore) {
			e.guard.count(svidInvalid)
			return out, refuse(svidInvalid, "the certificate of this connection has expired, or is not valid yet", "connect anew with the current SVID")
		}
	}
	principal := p.GetPrincipal()
	var id spiffeid.ID
	if strings.HasPrefix(principal, "spiffe:") {
		var err error
		if id, err = spiffeid.FromString(principal); err != nil {
			return out, e.malformed("source.principal: no SPIFFE ID", "it is the URI SAN of the peer's certificate")
		}
	}
	if leaf != nil {
		if of, err := x509svid.IDFromCert(leaf); err == nil && of != id || err != nil && !id.IsZero() {
			return out, e.malformed("source.principal and source.certificate speak of different identities", "")
		}
	}
	switch {
	case e.cfg.Peer == Principal:
		out.ID, out.Certificate = id, leaf
	case leaf != nil:
		if _, _, err := x509svid.Verify([]*x509.Certificate{leaf}, e.env.Bundles, x509svid.WithTime(e.env.Now())); err != nil {
			e.guard.count(svidInvalid)
			return out, refuse(svidInvalid, "the peer's certificate is of no trust domain that the agent has the bundle of, or not signed by its authority itself",
				"with intermediate authorities, which Envoy doesn't send, configure peer: principal")
		}
		out.ID, out.Certificate = id, leaf
	}
	return out, nil
}

// parseCertificate reads PEM that is percent-encoded, as Envoy writes it.
func parseCertificate(text string) (*x509.Certificate, error) {
	plain, err := url.PathUnescape(text)
	if err != nil {
		return nil, errors.New("not percent-encoded")
	}
	block, _ := pem.Decode([]byte(plain))
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, errors.New("no PEM of a certificate")
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, errors.New("no certificate")
	}
	return cert, nil
}

// passed lets a request on, with the headers that say who calls. Envoy removes after it
// has set, so that nothing is in both lists.
func (e *Envoy) passed(t *verify.Verified, headers []header) *extauthzv1.CheckResponse {
	ok := &extauthzv1.OkHttpResponse{}
	remove := append([]string(nil), identityNames...)
	remove = append(remove, overriding...)
	passToken := e.guard.passToken && t != nil // a public route's was not looked at
	if !passToken {
		remove = append(remove, "authorization")
	}
	for _, h := range headers {
		if mustGo(h.name, passToken) {
			remove = append(remove, h.name)
		}
	}
	for i, name := range remove {
		remove[i] = strings.ToLower(name)
	}
	out := &extauthzv1.CheckResponse{Status: &extauthzv1.Status{}, HttpResponse: &extauthzv1.CheckResponse_OkResponse{OkResponse: ok}}
	if t != nil {
		for _, f := range identity(t) {
			name := strings.ToLower(f.name)
			ok.Headers = append(ok.Headers, headerOption(name, f.value))
			remove = slices.DeleteFunc(remove, func(s string) bool { return s == name })
		}
		out.DynamicMetadata = metadata(t)
	}
	slices.Sort(remove)
	ok.HeadersToRemove = slices.Compact(remove)
	return out
}

func headerOption(name, value string) *extauthzv1.HeaderValueOption {
	return &extauthzv1.HeaderValueOption{Header: &extauthzv1.HeaderValue{Key: name, Value: value}, AppendAction: overwrite}
}

// metadata is the same for Envoy's own filters and logs.
func metadata(t *verify.Verified) *structpb.Struct {
	out := &structpb.Struct{Fields: map[string]*structpb.Value{}}
	for _, f := range identity(t) {
		out.Fields[strings.ToLower(strings.TrimPrefix(f.name, prefix))] = structpb.NewStringValue(f.value)
	}
	list := func(all []string) *structpb.Value {
		values := &structpb.ListValue{}
		for _, s := range all {
			values.Values = append(values.Values, structpb.NewStringValue(s))
		}
		return structpb.NewListValue(values)
	}
	var actors []string
	for _, m := range slices.Backward(t.Lineage[1:]) {
		actors = append(actors, m.Identity.String())
	}
	out.Fields["scope"], out.Fields["actors"] = list(t.Scopes), list(actors)
	out.Fields["expires"] = structpb.NewNumberValue(float64(t.Expires.Unix()))
	out.Fields["binding"] = structpb.NewStringValue(string(t.Binding))
	return out
}

func denied(no *refusal) *extauthzv1.CheckResponse {
	answer := &extauthzv1.DeniedHttpResponse{Status: &extauthzv1.HttpStatus{Code: int32(no.status)}, Body: string(no.body)}
	for name, values := range no.header {
		for _, v := range values {
			answer.Headers = append(answer.Headers, headerOption(strings.ToLower(name), v))
		}
	}
	code := no.rpc.Code()
	if code == codes.OK {
		code = codes.PermissionDenied
	}
	reason := &structpb.Struct{Fields: map[string]*structpb.Value{"reason": structpb.NewStringValue(no.reason)}}
	return &extauthzv1.CheckResponse{
		Status:       &extauthzv1.Status{Code: int32(code), Message: no.reason + ": " + no.message},
		HttpResponse: &extauthzv1.CheckResponse_DeniedResponse{DeniedResponse: answer}, DynamicMetadata: reason,
	}
}
