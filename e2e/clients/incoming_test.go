package clients_test

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dayflyhq/dayfly/e2e/sandbox"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	auth "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// incomingShop are services without our SDK, behind agents: orders behind a proxy for mTLS,
// and an Envoy that asks; web behind a unix socket, for bearers.
type incomingShop struct {
	*box
	mtls, plain, envoy string
}

func startIncoming(t *testing.T) *incomingShop {
	t.Helper()
	b := newBox(t, "", "")
	h := health.NewServer()
	server := grpc.NewServer()
	healthpb.RegisterHealthServer(server, h)
	back := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.Header.Get("Content-Type"), "application/grpc") {
			server.ServeHTTP(w, r)
			return
		}
		_ = json.NewEncoder(w).Encode(map[string]any{"path": r.RequestURI, "header": r.Header})
	}))
	back.Config.Protocols = new(http.Protocols)
	back.Config.Protocols.SetHTTP1(true)
	back.Config.Protocols.SetUnencryptedHTTP2(true)
	back.Start()
	t.Cleanup(back.Close)
	l := must(net.Listen("tcp", "127.0.0.1:0"))(t)
	s := &incomingShop{box: b, mtls: l.Addr().String(), plain: filepath.Join(b.Dir, "in.sock"), envoy: filepath.Join(b.Dir, "envoy.sock")}
	_ = l.Close()
	const routes = `[{path: /healthz, public: true}, {path: /orders/, methods: [GET], scopes: [orders.read]},
    {path: /orders/, methods: [POST], scopes: [orders.write]}, {path: /grpc.health.v1.Health/, scopes: [orders.read]}]`
	b.agentWith(t, sandbox.Orders, fmt.Sprintf(`incoming:
  - {listen: %q, upstream: %q, audiences: [orders], routes: %s}
envoy:
  - {listen: %q, audiences: [orders], routes: %s}
`, s.mtls, back.URL, routes, s.envoy, routes))
	b.agentWith(t, sandbox.Web, fmt.Sprintf("incoming: [{listen: %q, upstream: %q, audiences: [web], routes: [{path: /, scopes: [web.read]}]}]\n", s.plain, back.URL))
	return s
}

// fetched is what curl got.
type fetched struct {
	code   string
	reason string
	header http.Header
}

func (s *incomingShop) fetch(t *testing.T, as spiffeid.ID, target, bearer string, more ...string) fetched {
	t.Helper()
	args := append([]string{"-sS", "-k", "-w", "\n%{http_code}", "-H", "Authorization: Bearer " + bearer}, more...)
	if !as.IsZero() {
		dir := must(s.SVIDFiles(as))(t)
		args = append(args, "--cert", filepath.Join(dir, "svid.pem"), "--key", filepath.Join(dir, "key.pem"))
	}
	out, err := exec.CommandContext(t.Context(), "curl", append(args, target)...).CombinedOutput()
	if err != nil {
		t.Fatalf("curl: %v: %s", err, out)
	}
	body, code, _ := strings.Cut(string(out), "\n\n")
	var f struct {
		Reason string
		Header http.Header
	}
	if err := json.Unmarshal([]byte(body), &f); err != nil {
		t.Fatalf("curl: %v: %s", err, out)
	}
	return fetched{code, f.Reason, f.Header}
}

// TestIncoming: curl by HTTP/1 and HTTP/2, and gRPC, through the proxy of a real agent; a
// token that is stolen, and one that is revoked; and "contained" counts the proxies.
func TestIncoming(t *testing.T) {
	s := startIncoming(t)
	cred := s.issue(t, sandbox.Payments, sdk.Request{Audience: "orders", Scopes: []string{"orders.read"}})
	raw := cred.Token.Reveal()
	to := "https://" + s.mtls + "/orders/1"
	for _, version := range []string{"--http1.1", "--http2"} {
		got := s.fetch(t, sandbox.Payments, to, raw, version, "-H", "X_Dayfly_Subject: root", "-H", "X-Dayfly-Scope: root")
		if got.code != "200" || got.header.Get("X-Dayfly-Subject") != sandbox.Payments.String() || got.header.Get("X-Dayfly-Scope") != "orders.read" || got.header.Get("Authorization") != "" || strings.Contains(fmt.Sprint(got.header), "root") {
			t.Errorf("%s: %+v", version, got)
		}
		if got := s.fetch(t, sandbox.Reports, to, raw, version); got.code != "401" || got.reason != "PRESENTER_MISMATCH" {
			t.Errorf("%s, stolen: %+v", version, got)
		}
		if got := s.fetch(t, sandbox.Payments, to, raw, version, "-X", "POST"); got.code != "403" || got.reason != "SCOPE_MISSING" {
			t.Errorf("%s, without the scope: %+v", version, got)
		}
		if got := s.fetch(t, sandbox.Payments, "https://"+s.mtls+"/healthz/../orders/1", raw, version, "--path-as-is"); got.code != "400" || got.reason != "PATH_AMBIGUOUS" {
			t.Errorf("%s, dots: %+v", version, got)
		}
	}
	bearer := s.issue(t, sandbox.Payments, sdk.Request{Audience: "web", Scopes: []string{"web.read"}})
	if got := s.fetch(t, spiffeid.ID{}, "http://orders/x", bearer.Token.Reveal(), "--unix-socket", s.plain); got.code != "200" || got.header.Get("X-Dayfly-Audience") != "web" {
		t.Errorf("a bearer by the unix socket: %+v", got)
	}
	source := must(s.Source(t.Context(), sandbox.Payments))(t)
	cc := must(grpc.NewClient("passthrough:"+s.mtls, grpc.WithTransportCredentials(credentials.NewTLS(tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeID(sandbox.Orders))))))(t)
	defer cc.Close()
	call := func() error {
		_, err := healthpb.NewHealthClient(cc).Check(metadata.AppendToOutgoingContext(t.Context(), "authorization", "Bearer "+raw), &healthpb.HealthCheckRequest{})
		return err
	}
	if err := call(); err != nil {
		t.Errorf("gRPC: %v", err)
	}
	s.revoke(t, cred.Grant)
	if got := s.fetch(t, sandbox.Payments, to, raw); got.code != "401" || got.reason != "TOKEN_REVOKED" {
		t.Errorf("contained, and %+v", got)
	}
	if err := call(); status.Code(err) != codes.Unauthenticated {
		t.Errorf("contained, and gRPC: %v", err)
	}
}

// revoke waits until the revocation is contained, as dayfly's exit code says.
func (s *incomingShop) revoke(t *testing.T, grant string) {
	t.Helper()
	if out, err := s.dayfly(t, sandbox.Alice, "revoke", "--grant", grant, "--reason", "a test", "--yes"); err != nil {
		t.Fatalf("revoking: %v: %s", err, out)
	}
}

// TestEnvoyControlPlane: Envoy's own types ask a real agent.
func TestEnvoyControlPlane(t *testing.T) {
	s := startIncoming(t)
	cc := must(grpc.NewClient("unix://"+s.envoy, grpc.WithTransportCredentials(insecure.NewCredentials())))(t)
	defer cc.Close()
	client := auth.NewAuthorizationClient(cc)
	cred := s.issue(t, sandbox.Payments, sdk.Request{Audience: "orders", Scopes: []string{"orders.read"}})
	x5t := s.issue(t, sandbox.Payments, sdk.Request{Audience: "orders", Scopes: []string{"orders.read"}, Binding: token.BindingX5T})
	ask := func(as spiffeid.ID, method, path, raw string, headers ...string) *auth.CheckResponse {
		t.Helper()
		svid := must(must(s.Source(t.Context(), as))(t).GetX509SVID())(t)
		all := map[string]string{":method": method, ":path": path, ":authority": "orders", "authorization": "Bearer " + raw}
		for _, h := range headers {
			all[h] = "root"
		}
		// As Envoy writes a request that came by mTLS: see include_peer_certificate.
		certificate := url.PathEscape(string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: svid.Certificates[0].Raw})))
		return must(client.Check(t.Context(), &auth.CheckRequest{Attributes: &auth.AttributeContext{
			Source: &auth.AttributeContext_Peer{
				Address:   &core.Address{Address: &core.Address_SocketAddress{SocketAddress: &core.SocketAddress{Address: "192.0.2.1", PortSpecifier: &core.SocketAddress_PortValue{PortValue: 4711}}}},
				Principal: as.String(), Certificate: certificate, Labels: map[string]string{"a": "b"}, Service: "s",
			},
			Destination: &auth.AttributeContext_Peer{Principal: sandbox.Orders.String()},
			Request: &auth.AttributeContext_Request{Http: &auth.AttributeContext_HttpRequest{
				Id: "1", Method: method, Path: path, Host: "orders", Scheme: "https", Protocol: "HTTP/2", Size: -1, Headers: all,
			}},
			ContextExtensions: map[string]string{"virtual_host": "orders"}, MetadataContext: &core.Metadata{},
			TlsSession: &auth.AttributeContext_TLSSession{Sni: "orders"},
		}}))(t)
	}
	got := ask(sandbox.Payments, "GET", "/orders/1?x=1", cred.Token.Reveal(), "x_dayfly_subject", "x-dayfly-actors")
	if codes.Code(got.GetStatus().GetCode()) != codes.OK || got.GetOkResponse() == nil {
		t.Fatalf("%v", got)
	}
	set := map[string]string{}
	for _, h := range got.GetOkResponse().GetHeaders() {
		set[h.GetHeader().GetKey()] = h.GetHeader().GetValue()
		if h.GetAppendAction() != core.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD {
			t.Errorf("%v doesn't overwrite", h)
		}
	}
	if set["x-dayfly-subject"] != sandbox.Payments.String() || set["x-dayfly-scope"] != "orders.read" || set["x-dayfly-grant"] != cred.Grant {
		t.Errorf("headers: %v", set)
	}
	removed := strings.Join(got.GetOkResponse().GetHeadersToRemove(), " ")
	for _, h := range []string{"authorization", "x_dayfly_subject", "x-dayfly-actors"} {
		if !strings.Contains(" "+removed+" ", " "+h+" ") {
			t.Errorf("%s stays: %s", h, removed)
		}
	}
	if fields := got.GetDynamicMetadata().GetFields(); fields["subject"].GetStringValue() != sandbox.Payments.String() || len(fields["scope"].GetListValue().GetValues()) != 1 || fields["expires"].GetNumberValue() == 0 {
		t.Errorf("metadata: %v", got.GetDynamicMetadata())
	}
	if got := ask(sandbox.Payments, "GET", "/orders/1", x5t.Token.Reveal()); got.GetOkResponse() == nil {
		t.Errorf("bound to the certificate: %v", got)
	}
	denied := func(name string, got *auth.CheckResponse, http int, code codes.Code, reason string) {
		t.Helper()
		no := got.GetDeniedResponse()
		var body struct{ Reason string }
		_ = json.Unmarshal([]byte(no.GetBody()), &body)
		if int(no.GetStatus().GetCode()) != http || codes.Code(got.GetStatus().GetCode()) != code || body.Reason != reason {
			t.Errorf("%s: %v", name, got)
		}
	}
	denied("stolen", ask(sandbox.Reports, "GET", "/orders/1", cred.Token.Reveal()), 401, codes.Unauthenticated, "PRESENTER_MISMATCH")
	denied("without the scope", ask(sandbox.Payments, "POST", "/orders/1", cred.Token.Reveal()), 403, codes.PermissionDenied, "SCOPE_MISSING")
	denied("no route", ask(sandbox.Payments, "GET", "/", cred.Token.Reveal()), 403, codes.PermissionDenied, "ROUTE_UNKNOWN")
	denied("nothing", must(client.Check(context.Background(), &auth.CheckRequest{}))(t), 400, codes.InvalidArgument, "INVALID_REQUEST")
	s.revoke(t, cred.Grant)
	denied("contained", ask(sandbox.Payments, "GET", "/orders/1", cred.Token.Reveal()), 401, codes.Unauthenticated, "TOKEN_REVOKED")
}
