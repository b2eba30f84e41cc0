package e2e_test

import (
	"encoding/json"
	"net/http"
	"testing"

	"github.com/dayflyhq/dayfly/e2e/sandbox"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk"
)

// TestIssuerAnswers follows a token to the keys that verify it, as a verifier does that
// knows nothing but its iss.
func TestIssuerAnswers(t *testing.T) {
	box := newBox(t)
	payments := must(box.Client(t.Context(), sandbox.Payments, box.Info.GRPC))(t)
	cred := must(payments.Issue(t.Context(), sdk.Request{Audience: "orders"}))(t)
	tok := must(token.Inspect(cred.Token.Reveal()))(t)
	if tok.Issuer != box.Issuer {
		t.Fatalf("iss is %q, want %q", tok.Issuer, box.Issuer)
	}
	var discovered struct {
		Issuer  string `json:"issuer"`
		JWKSURI string `json:"jwks_uri"`
	}
	getJSON(t, tok.Issuer+"/.well-known/openid-configuration", &discovered)
	if discovered.Issuer != tok.Issuer {
		t.Errorf("the document is of %q, the token of %q", discovered.Issuer, tok.Issuer)
	}
	var jwks struct {
		Keys []struct {
			KID string `json:"kid"`
		} `json:"keys"`
	}
	getJSON(t, discovered.JWKSURI, &jwks)
	if len(jwks.Keys) != 1 || jwks.Keys[0].KID != tok.Self().Key.String() {
		t.Errorf("keys %v, the token is signed with %s", jwks.Keys, tok.Self().Key)
	}
}

func getJSON(t *testing.T, url string, into any) {
	t.Helper()
	resp := must(http.Get(url))(t)
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("GET %s: %s", url, resp.Status)
	}
	if err := json.NewDecoder(resp.Body).Decode(into); err != nil {
		t.Fatalf("GET %s: %v", url, err)
	}
}
