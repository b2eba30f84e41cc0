package incoming_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/dayflyhq/dayfly/agent/incoming"
	extauthzv1 "github.com/dayflyhq/dayfly/proto/dayfly/extauthz/v1"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"google.golang.org/protobuf/proto"
)

// FuzzCheck: whatever Envoy, or whoever sits in its place, asks, there is one answer, and
// without a token that passes it is yes for public routes alone.
func FuzzCheck(f *testing.F) {
	check, err := incoming.NewChecker(incoming.Policy{Audiences: []string{"a"}, Routes: []incoming.Route{{Path: "/public/", Public: true}, {Path: "/"}}}, x509bundle.NewSet())
	if err != nil {
		f.Fatal(err)
	}
	seed := func(p *extauthzv1.Peer, r *extauthzv1.HttpRequest) {
		b, err := proto.Marshal(&extauthzv1.CheckRequest{Attributes: &extauthzv1.AttributeContext{Source: p, Request: &extauthzv1.Request{Http: r}}})
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte{})
	seed(nil, nil)
	seed(&extauthzv1.Peer{}, &extauthzv1.HttpRequest{Method: "GET", Path: "/public/x?y"})
	seed(&extauthzv1.Peer{Principal: "spiffe://td/a", Certificate: "-----BEGIN%20CERTIFICATE-----%0AAA%3D%3D%0A-----END%20CERTIFICATE-----%0A"}, &extauthzv1.HttpRequest{Method: "GET", Path: "/public/x"})
	seed(&extauthzv1.Peer{Principal: "spiffe://td/a"}, &extauthzv1.HttpRequest{Method: "GET", Path: "/x", Headers: map[string]string{"authorization": "Bearer x", "x_dayfly_subject": "y"}})
	seed(nil, &extauthzv1.HttpRequest{Method: "GET", Path: "/public/..%2fx", HeaderMap: &extauthzv1.HeaderMap{Headers: []*extauthzv1.HeaderValue{{Key: "Authorization", RawValue: []byte("Bearer \xff")}}}})
	f.Fuzz(func(t *testing.T, b []byte) {
		in := new(extauthzv1.CheckRequest)
		if proto.Unmarshal(b, in) != nil {
			return // gRPC's own refusal
		}
		out, err := check(in)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := proto.Marshal(out); err != nil {
			t.Fatalf("an answer that can't be sent: %v", err)
		}
		ok, no := out.GetOkResponse(), out.GetDeniedResponse()
		if (ok == nil) == (no == nil) || (ok != nil) != (out.GetStatus().GetCode() == 0) {
			t.Fatalf("two minds: %v", out)
		}
		if no != nil && (no.GetStatus().GetCode() < 400 || no.GetBody() == "") {
			t.Fatalf("a no that is none: %v", no)
		}
		if ok == nil {
			return
		}
		if path := in.GetAttributes().GetRequest().GetHttp().GetPath(); !strings.HasPrefix(path, "/public/") || len(ok.GetHeaders()) > 0 {
			t.Fatalf("yes to %q: %v", path, ok)
		}
		for name := range in.GetAttributes().GetRequest().GetHttp().GetHeaders() {
			if incoming.MustGo(name, false) && !slices.Contains(ok.GetHeadersToRemove(), strings.ToLower(name)) {
				t.Fatalf("%q stays", name)
			}
		}
	})
}
