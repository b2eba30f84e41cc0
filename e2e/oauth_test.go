package e2e_test

import (
	"encoding/json"
	"io"
	"net/http"
	"net/url"
	"testing"

	"github.com/dayflyhq/dayfly/e2e/sandbox"
	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk"
	"github.com/dayflyhq/dayfly/sdk/spiffetest"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
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
	stranger := must(box.HTTP(t.Context(), spiffeid.ID{}))(t)
	getJSON(t, stranger, tok.Issuer+"/.well-known/openid-configuration", &discovered)
	if discovered.Issuer != tok.Issuer {
		t.Errorf("the document is of %q, the token of %q", discovered.Issuer, tok.Issuer)
	}
	var jwks struct {
		Keys []struct {
			KID string `json:"kid"`
		} `json:"keys"`
	}
	getJSON(t, stranger, discovered.JWKSURI, &jwks)
	if len(jwks.Keys) != 1 || jwks.Keys[0].KID != tok.Self().Key.String() {
		t.Errorf("keys %v, the token is signed with %s", jwks.Keys, tok.Self().Key)
	}
}

func getJSON(t *testing.T, c *http.Client, url string, into any) {
	t.Helper()
	resp := must(c.Get(url))(t)
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("GET %s: %s", url, resp.Status)
	}
	if err := json.NewDecoder(resp.Body).Decode(into); err != nil {
		t.Fatalf("GET %s: %v", url, err)
	}
}

const (
	grantExchange = "urn:ietf:params:oauth:grant-type:token-exchange"
	accessToken   = "urn:ietf:params:oauth:token-type:access_token"
	jwtSPIFFE     = "urn:ietf:params:oauth:client-assertion-type:jwt-spiffe"
)

// TestOAuthDoor gets a token with a certificate, exchanges it with a JWT-SVID, at each
// listener, and finds the same records as for gRPC.
func TestOAuthDoor(t *testing.T) {
	box := newBox(t)
	ctx := t.Context()
	payments, stranger := must(box.HTTP(ctx, sandbox.Payments))(t), must(box.HTTP(ctx, spiffeid.ID{}))(t)
	bySVID := &http.Client{Transport: &http.Transport{
		TLSClientConfig: tlsconfig.MTLSClientConfig(must(box.Source(ctx, sandbox.Payments))(t), box.TD, tlsconfig.AuthorizeID(sandbox.Broker)),
	}}
	defer bySVID.CloseIdleConnections()
	assertion := must(box.TD.IssueJWTSVID(sandbox.Orders, []string{box.Issuer}, spiffetest.SVIDOptions{}))(t)
	own := url.Values{"grant_type": {"client_credentials"}, "audience": {"orders"}}
	grants := map[string]string{} // ID -> presenter
	for name, at := range map[string]struct {
		c    *http.Client
		base string
	}{"web certificate": {payments, box.Issuer}, "SVID": {bySVID, "https://" + box.Info.HTTPSSVID}} {
		root := postToken(t, at.c, at.base, own)
		if root.Scope == "" || root.ExpiresIn <= 0 || root.Type != "Bearer" {
			t.Errorf("%s: got %+v", name, root)
		}
		grants[root.Grant] = sandbox.Payments.String()
		for _, base := range []string{box.Issuer, "http://" + box.Info.Public} {
			derived := postToken(t, stranger, base, url.Values{
				"grant_type": {grantExchange}, "audience": {"ledger"}, "subject_token": {root.Token}, "subject_token_type": {accessToken},
				"client_assertion_type": {jwtSPIFFE}, "client_assertion": {assertion}, "client_id": {sandbox.Orders.String()},
			})
			grants[derived.Grant] = sandbox.Orders.String()
		}
	}
	alice := dayflyv1.NewGrantServiceClient(must(box.Client(ctx, sandbox.Alice, box.Info.GRPC))(t).Conn())
	for id, presenter := range grants {
		g := must(alice.GetGrant(ctx, &dayflyv1.GetGrantRequest{Grant: id}))(t).GetGrant()
		lineage := g.GetLineage()
		if got := lineage[len(lineage)-1].GetIdentity(); got != presenter || g.GetPeerAddress() != "127.0.0.1" || g.GetState() != dayflyv1.GrantState_GRANT_STATE_LIVE {
			t.Errorf("grant %s is of %s, want %s: %v", id, got, presenter, g)
		}
	}
	if len(grants) != 6 {
		t.Errorf("%d grants, want 6", len(grants))
	}
	resp := must(stranger.PostForm(box.Issuer+"/token", own))(t)
	resp.Body.Close()
	if resp.StatusCode != http.StatusUnauthorized {
		t.Errorf("a stranger got %s", resp.Status)
	}
}

// tokenAnswer is what the token endpoint says.
type tokenAnswer struct {
	Token     string `json:"access_token"`
	Type      string `json:"token_type"`
	ExpiresIn int    `json:"expires_in"`
	Scope     string `json:"scope"`
	Grant     string `json:"dayfly_grant"`
}

func postToken(t *testing.T, c *http.Client, base string, f url.Values) tokenAnswer {
	t.Helper()
	resp := must(c.PostForm(base+"/token", f))(t)
	defer resp.Body.Close()
	body := must(io.ReadAll(resp.Body))(t)
	var a tokenAnswer
	if err := json.Unmarshal(body, &a); resp.StatusCode != http.StatusOK || err != nil {
		t.Fatalf("%s: %s %s", base, resp.Status, body)
	}
	return a
}

// TestGivenBackOnBinaries: a token is good when asked about, until its holder gives it
// back; then nothing accepts what derives from it.
func TestGivenBackOnBinaries(t *testing.T) {
	box := newBox(t)
	ctx := t.Context()
	payments, orders, ledger := must(box.HTTP(ctx, sandbox.Payments))(t), must(box.HTTP(ctx, sandbox.Orders))(t), must(box.HTTP(ctx, sandbox.Ledger))(t)
	root := postToken(t, payments, box.Issuer, url.Values{"grant_type": {"client_credentials"}, "audience": {"orders"}}).Token
	derived := postToken(t, orders, box.Issuer, url.Values{
		"grant_type": {grantExchange}, "audience": {"ledger"}, "subject_token": {root}, "subject_token_type": {accessToken},
	}).Token
	active := func(c *http.Client, secret string) bool {
		t.Helper()
		resp := must(c.PostForm(box.Issuer+"/introspect", url.Values{"token": {secret}}))(t)
		defer resp.Body.Close()
		var a struct{ Active bool }
		if err := json.NewDecoder(resp.Body).Decode(&a); err != nil || resp.StatusCode != http.StatusOK {
			t.Fatalf("introspecting: %s, %v", resp.Status, err)
		}
		return a.Active
	}
	giveBack := func(c *http.Client, secret string) {
		t.Helper()
		resp := must(c.PostForm(box.Issuer+"/revoke", url.Values{"token": {secret}}))(t)
		resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			t.Fatalf("giving back: %s", resp.Status)
		}
	}
	giveBack(orders, root) // which isn't its own
	if !active(orders, root) || !active(ledger, derived) {
		t.Fatal("two good tokens are not active")
	}
	if active(ledger, root) || active(payments, root) {
		t.Error("told somebody who may not ask")
	}
	giveBack(payments, root)
	if active(orders, root) || active(ledger, derived) {
		t.Error("given back, and active")
	}
	alice := dayflyv1.NewRevocationServiceClient(must(box.Client(ctx, sandbox.Alice, box.Info.GRPC))(t).Conn())
	if list := must(alice.ListRevocations(ctx, &dayflyv1.ListRevocationsRequest{}))(t).GetRevocations(); len(list) != 0 {
		t.Errorf("operators see %v", list)
	}
	list := must(alice.ListRevocations(ctx, &dayflyv1.ListRevocationsRequest{GivenBack: true}))(t).GetRevocations()
	if len(list) != 1 || list[0].GetActor() != sandbox.Payments.String() || !list[0].GetGivenBack() {
		t.Errorf("with give-backs they see %v", list)
	}
}
