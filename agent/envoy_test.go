package agent_test

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"net"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/agent"
	"github.com/dayflyhq/dayfly/agent/incoming"
	extauthzv1 "github.com/dayflyhq/dayfly/proto/dayfly/extauthz/v1"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk/spiffetest"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
)

// envoyFixture is an agent that two Envoys ask: one on a unix socket, which shows
// certificates, and one on loopback, whose word counts.
type envoyFixture struct {
	*fixture
	shows, says *grpc.ClientConn
}

func startEnvoy(t *testing.T, b *broker, change func(*agent.Config)) *envoyFixture {
	t.Helper()
	f := &envoyFixture{}
	path := filepath.Join(tempDir(t), "e.sock")
	unix, err := agent.Listen(agent.SocketConfig{Path: path})
	if err != nil {
		t.Fatal(err)
	}
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f.fixture = start(t, b.td, b, func(c *agent.Config) {
		c.Bundles = b.td
		c.Envoy = []agent.Envoy{
			{EnvoyConfig: incoming.EnvoyConfig{Policy: shop, Listener: unix}},
			{EnvoyConfig: incoming.EnvoyConfig{Policy: shop, Listener: tcp, Peer: incoming.Principal}},
		}
		if change != nil {
			change(c)
		}
	})
	dial := func(target string) *grpc.ClientConn {
		cc, err := grpc.NewClient(target, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = cc.Close() })
		return cc
	}
	f.shows, f.says = dial("unix://"+path), dial("passthrough:"+tcp.Addr().String())
	f.ready()
	return f
}

// question is what Envoy asks of one request.
func question(svid *x509svid.SVID, method, path, bearer string, headers ...string) *extauthzv1.CheckRequest {
	source := &extauthzv1.Peer{Address: &extauthzv1.Address{SocketAddress: &extauthzv1.SocketAddress{Address: "192.0.2.7"}}}
	if svid != nil {
		source.Principal = svid.ID.String()
		source.Certificate = url.QueryEscape(string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: svid.Certificates[0].Raw})))
		source.Certificate = strings.ReplaceAll(source.Certificate, "+", "%20")
	}
	all := map[string]string{":path": path, ":method": method, ":authority": "shop.example"}
	if bearer != "" {
		all["authorization"] = "Bearer " + bearer
	}
	for i := 0; i < len(headers); i += 2 {
		all[headers[i]] = headers[i+1]
	}
	return &extauthzv1.CheckRequest{Attributes: &extauthzv1.AttributeContext{
		Source: source, Request: &extauthzv1.Request{Http: &extauthzv1.HttpRequest{Method: method, Path: path, Host: "shop.example", Headers: all}},
	}}
}

// verdict is Envoy's part of an answer.
type verdict struct {
	code         codes.Code
	status       int
	reason       string
	set          map[string]string
	remove       []string
	wwwAuth, err string
}

func askEnvoy(ctx context.Context, t *testing.T, cc *grpc.ClientConn, q *extauthzv1.CheckRequest) verdict {
	t.Helper()
	out := new(extauthzv1.CheckResponse)
	if err := cc.Invoke(ctx, "/envoy.service.auth.v3.Authorization/Check", q, out); err != nil {
		return verdict{code: status.Code(err), err: err.Error()}
	}
	v := verdict{code: codes.Code(out.GetStatus().GetCode()), set: map[string]string{}}
	for _, h := range slices.Concat(out.GetOkResponse().GetHeaders(), out.GetDeniedResponse().GetHeaders()) {
		if h.GetAppendAction() != 2 {
			t.Errorf("%v doesn't overwrite", h)
		}
		v.set[h.GetHeader().GetKey()] = h.GetHeader().GetValue()
	}
	v.remove = out.GetOkResponse().GetHeadersToRemove()
	if no := out.GetDeniedResponse(); no != nil {
		v.status, v.wwwAuth = int(no.GetStatus().GetCode()), v.set["www-authenticate"]
		var body struct{ Reason string }
		if err := json.Unmarshal([]byte(no.GetBody()), &body); err != nil {
			t.Errorf("the body of a refusal: %q", no.GetBody())
		}
		v.reason = body.Reason
	}
	if (v.code == codes.OK) != (out.GetOkResponse() != nil) || (v.code != codes.OK) != (out.GetDeniedResponse() != nil) {
		t.Errorf("an answer with two minds: %v", out)
	}
	return v
}

// TestEnvoy: the same check as the proxy's, of what Envoy says of a request.
func TestEnvoy(t *testing.T) {
	noLeaks(t)
	b := newBroker(t, newDomain(t))
	f := startEnvoy(t, b, nil)
	mine, theirs := b.svid(ordersID), b.svid(thiefID)
	sibling, err := b.td.IssueSVID(ordersID, spiffetest.SVIDOptions{})
	if err != nil {
		t.Fatal(err)
	}
	old, err := b.td.IssueSVID(ordersID, spiffetest.SVIDOptions{NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(-time.Minute)})
	if err != nil {
		t.Fatal(err)
	}
	stranger := newBroker(t, newDomain(t)).svid(ordersID)
	bound := b.mintFor(minting{id: ordersID, scopes: []string{"read"}})
	x5t := b.mintFor(minting{id: ordersID, scopes: []string{"read"}, binding: token.BindingX5T})
	bearer := b.mintFor(minting{id: ordersID, scopes: []string{"read"}, binding: token.BindingNone})
	source := func(q *extauthzv1.CheckRequest, change func(*extauthzv1.Peer)) *extauthzv1.CheckRequest {
		change(q.GetAttributes().GetSource())
		return q
	}
	principalOnly := func(p *extauthzv1.Peer) { p.Certificate = "" }
	for name, c := range map[string]struct {
		cc     *grpc.ClientConn
		q      *extauthzv1.CheckRequest
		status int // 0: passes
		reason string
	}{
		"bound":                               {f.shows, question(mine, "GET", "/orders/1?a=b/../c", bound), 0, ""},
		"bound, by Envoy's word":              {f.says, source(question(mine, "GET", "/orders/1", bound), principalOnly), 0, ""},
		"bound, another SVID of it":           {f.shows, question(sibling, "GET", "/orders/1", bound), 0, ""},
		"certificate-bound":                   {f.shows, question(mine, "GET", "/orders/1", x5t), 0, ""},
		"certificate-bound, by Envoy's word":  {f.says, question(mine, "GET", "/orders/1", x5t), 0, ""},
		"a bearer":                            {f.shows, question(nil, "GET", "/orders/1", bearer), 0, ""},
		"a bearer with a name that's none":    {f.shows, source(question(nil, "GET", "/orders/1", bearer), func(p *extauthzv1.Peer) { p.Principal = "CN=x" }), 0, ""},
		"public":                              {f.shows, question(nil, "GET", "/healthz", ""), 0, ""},
		"stolen":                              {f.shows, question(theirs, "GET", "/orders/1", bound), 401, "PRESENTER_MISMATCH"},
		"stolen, by Envoy's word":             {f.says, question(theirs, "GET", "/orders/1", bound), 401, "PRESENTER_MISMATCH"},
		"bound, no certificate":               {f.shows, question(nil, "GET", "/orders/1", bound), 401, "PRESENTER_MISMATCH"},
		"bound, a name without certificate":   {f.shows, source(question(mine, "GET", "/orders/1", bound), principalOnly), 401, "PRESENTER_MISMATCH"},
		"certificate-bound, another":          {f.shows, question(sibling, "GET", "/orders/1", x5t), 401, "CERTIFICATE_MISMATCH"},
		"certificate-bound, none shown":       {f.says, source(question(mine, "GET", "/orders/1", x5t), principalOnly), 401, "CERTIFICATE_MISMATCH"},
		"a stranger's certificate":            {f.shows, question(stranger, "GET", "/orders/1", bound), 401, "SVID_INVALID"},
		"an expired certificate":              {f.says, question(old, "GET", "/orders/1", bound), 401, "SVID_INVALID"},
		"another name than the certificate's": {f.shows, source(question(theirs, "GET", "/orders/1", bound), func(p *extauthzv1.Peer) { p.Principal = ordersID.String() }), 400, "INVALID_REQUEST"},
		"the same, by Envoy's word":           {f.says, source(question(theirs, "GET", "/orders/1", bound), func(p *extauthzv1.Peer) { p.Principal = ordersID.String() }), 400, "INVALID_REQUEST"},
		"a broken certificate":                {f.shows, source(question(mine, "GET", "/orders/1", bound), func(p *extauthzv1.Peer) { p.Certificate = "%zz" }), 400, "INVALID_REQUEST"},
		"a broken name":                       {f.says, source(question(nil, "GET", "/orders/1", bound), func(p *extauthzv1.Peer) { p.Principal = "spiffe://TD/%" }), 400, "INVALID_REQUEST"},
		"forwarded certificates are no proof": {f.says, question(nil, "GET", "/orders/1", bound, "x-forwarded-client-cert", "URI=spiffe://td/orders"), 401, "PRESENTER_MISMATCH"},
		"no token":                            {f.shows, question(mine, "GET", "/orders/1", ""), 401, "TOKEN_MISSING"},
		"two tokens":                          {f.shows, question(mine, "GET", "/orders/1", bound+",Bearer "+bound), 400, "INVALID_REQUEST"},
		"no scope":                            {f.shows, question(mine, "POST", "/orders/1", bound), 403, "SCOPE_MISSING"},
		"no route":                            {f.shows, question(mine, "GET", "/x", bound), 403, "ROUTE_UNKNOWN"},
		"no method of the route":              {f.shows, question(mine, "PUT", "/orders/1", bound), 405, "METHOD_NOT_ALLOWED"},
		"a path with two readings":            {f.shows, question(mine, "GET", "/any/..%2forders/1", bound), 400, "PATH_AMBIGUOUS"},
		"no path":                             {f.shows, question(mine, "GET", "", bound), 400, "PATH_AMBIGUOUS"},
		"nothing":                             {f.shows, &extauthzv1.CheckRequest{}, 400, "INVALID_REQUEST"},
		"no request":                          {f.shows, &extauthzv1.CheckRequest{Attributes: &extauthzv1.AttributeContext{}}, 400, "INVALID_REQUEST"},
	} {
		got := askEnvoy(t.Context(), t, c.cc, c.q)
		if got.status != c.status || got.reason != c.reason || (got.code == codes.OK) != (c.status == 0) {
			t.Errorf("%s: %+v", name, got)
		}
	}
	passed := askEnvoy(t.Context(), t, f.shows, question(mine, "GET", "/orders/1", bound))
	if passed.set["x-dayfly-subject"] != "spiffe://td/orders" || passed.set["x-dayfly-scope"] != "read" || !slices.Contains(passed.remove, "authorization") {
		t.Errorf("%+v", passed)
	}
	if no := askEnvoy(t.Context(), t, f.shows, question(mine, "POST", "/orders/1", bound)); no.code != codes.PermissionDenied || no.wwwAuth == "" {
		t.Errorf("%+v", no)
	}
	// Raw headers are read too.
	raw := question(mine, "GET", "/orders/1", "")
	raw.Attributes.Request.Http.HeaderMap = &extauthzv1.HeaderMap{Headers: []*extauthzv1.HeaderValue{{Key: "authorization", RawValue: []byte("Bearer " + bound)}}}
	if got := askEnvoy(t.Context(), t, f.shows, raw); got.code != codes.OK {
		t.Errorf("raw headers: %+v", got)
	}
	// A question that is too large is no answer, which Envoy takes for a no.
	if got := askEnvoy(t.Context(), t, f.shows, question(mine, "GET", "/orders/1", bound, "x", strings.Repeat("x", incoming.MaxCheckBytes))); got.code != codes.ResourceExhausted || got.err == "" {
		t.Errorf("a huge question: %+v", got)
	}
	at := b.revoke(revocation.Identity(ordersID))
	eventually(t, "the revocation", func() error {
		if got := askEnvoy(t.Context(), t, f.shows, question(mine, "GET", "/orders/1", bound)); got.reason != "TOKEN_REVOKED" {
			return errorOf(got)
		}
		return nil
	})
	if at.Seq == 0 {
		t.Error("no position")
	}
}

func errorOf(v verdict) error { return status.Error(v.code, v.reason+v.err) }

// TestEnvoySpoofedHeaders: what a caller says of who calls is removed by the name that it
// has, and nothing that is set is removed, since Envoy removes last.
func TestEnvoySpoofedHeaders(t *testing.T) {
	noLeaks(t)
	b := newBroker(t, newDomain(t))
	f := startEnvoy(t, b, nil)
	bearer := b.mintFor(minting{id: ordersID, scopes: []string{"read"}, binding: token.BindingNone})
	spoofed := []string{"x-dayfly-subject", "x_dayfly_subject", "x-dayfly_scope", "x.dayfly.grant", "x-dayfly-admin", "x-dayfly-actors", "x-http-method-override", "x_original_url", "x-original-uri", "x_forwarded_for", "x_real-ip"}
	var headers []string
	for _, h := range spoofed {
		headers = append(headers, h, "root")
	}
	for path, known := range map[string]bool{"/orders/1": true, "/healthz": false} {
		got := askEnvoy(t.Context(), t, f.shows, question(nil, "GET", path, bearer, headers...))
		if got.code != codes.OK {
			t.Fatalf("%+v", got)
		}
		for _, h := range append(spoofed, "authorization") {
			if _, set := got.set[h]; !set && !slices.Contains(got.remove, h) {
				t.Errorf("%s: %s stays", path, h)
			}
		}
		for name, value := range got.set {
			if slices.Contains(got.remove, name) || value == "root" {
				t.Errorf("%s: %s: %s is set, and removed: %v", path, name, value, got.remove)
			}
		}
		if (got.set["x-dayfly-subject"] != "") != known {
			t.Errorf("%s: %+v", path, got)
		}
	}
}

// TestEnvoyPassesTheToken where it is told to, and never one that nobody looked at; what Envoy
// itself says of where a request is from stays.
func TestEnvoyPassesTheToken(t *testing.T) {
	noLeaks(t)
	b := newBroker(t, newDomain(t))
	f := startEnvoy(t, b, func(c *agent.Config) { c.Envoy[0].PassToken = true })
	bearer := b.mintFor(minting{id: ordersID, scopes: []string{"read"}, binding: token.BindingNone})
	for path, passes := range map[string]bool{"/orders/1": true, "/healthz": false} {
		got := askEnvoy(t.Context(), t, f.shows, question(nil, "GET", path, bearer, "x-forwarded-for", "192.0.2.1"))
		if got.code != codes.OK || slices.Contains(got.remove, "authorization") == passes || slices.Contains(got.remove, "x-forwarded-for") {
			t.Errorf("%s: %+v", path, got)
		}
	}
}

// TestEnvoyDoor: a unix socket lets in whom it is for.
func TestEnvoyDoor(t *testing.T) {
	noLeaks(t)
	b := newBroker(t, newDomain(t))
	f := startEnvoy(t, b, func(c *agent.Config) { c.Envoy[0].Allow.UIDs = []uint32{4242424242} })
	if got := askEnvoy(t.Context(), t, f.shows, question(nil, "GET", "/healthz", "")); got.code != codes.PermissionDenied || !strings.Contains(got.err, "may not use this socket") {
		t.Errorf("%+v", got)
	}
	if got := askEnvoy(t.Context(), t, f.says, question(nil, "GET", "/healthz", "")); got.code != codes.OK {
		t.Errorf("%+v", got)
	}
}

// TestIncomingCounts: by listener and outcome.
func TestIncomingCounts(t *testing.T) {
	noLeaks(t)
	b := newBroker(t, newDomain(t))
	f := startEnvoy(t, b, nil)
	for range 3 {
		askEnvoy(t.Context(), t, f.shows, question(nil, "GET", "/healthz", ""))
	}
	askEnvoy(t.Context(), t, f.says, question(nil, "GET", "/x", ""))
	askEnvoy(t.Context(), t, f.says, question(nil, "GET", "/any/", b.mintFor(minting{id: ordersID, binding: token.BindingNone})))
	got := map[string]float64{}
	for _, family := range f.agent.Metrics() {
		for _, s := range family.Samples {
			if family.Name == "dayfly_agent_requests_total" && s.Labels[0].Value == agent.ListenerEnvoy {
				got[s.Labels[1].Value] += s.Value
			}
		}
	}
	if got["public"] != 3 || got["ROUTE_UNKNOWN"] != 1 || got["ok"] != 1 || len(got) != 3 {
		t.Errorf("%v", got)
	}
}
