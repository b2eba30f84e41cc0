package clients_test

import (
	"context"
	"errors"
	"maps"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/e2e/sandbox"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk/spiffetest"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/zitadel/oidc/v3/pkg/client"
	"github.com/zitadel/oidc/v3/pkg/client/rp"
	"github.com/zitadel/oidc/v3/pkg/client/tokenexchange"
	httphelper "github.com/zitadel/oidc/v3/pkg/http"
	"github.com/zitadel/oidc/v3/pkg/oidc"
	"golang.org/x/oauth2"
	"golang.org/x/oauth2/clientcredentials"
)

const (
	typeAssertion = "urn:ietf:params:oauth:client-assertion-type:jwt-spiffe"
	typeAccess    = "urn:ietf:params:oauth:token-type:access_token"
)

// assertion is a JWT-SVID of an identity for the issuer, with the parameters that show it.
func (b *box) assertion(t *testing.T, id spiffeid.ID) url.Values {
	t.Helper()
	svid := must(b.TD.IssueJWTSVID(id, []string{b.Issuer}, spiffetest.SVIDOptions{}))(t)
	return url.Values{"client_assertion_type": {typeAssertion}, "client_assertion": {svid}}
}

// TestOAuth2: golang.org/x/oauth2 gets tokens by both ways of proving who it is, a service
// accepts them, and once one is old it gets the next by itself.
func TestOAuth2(t *testing.T) {
	b := newBox(t, "", "")
	provider := must(client.Discover(t.Context(), b.Issuer, b.http(t, spiffeid.ID{})))(t)
	ask := func(how *http.Client, change func(*clientcredentials.Config)) oauth2.TokenSource {
		cfg := clientcredentials.Config{
			ClientID: sandbox.Payments.String(), TokenURL: provider.TokenEndpoint, AuthStyle: oauth2.AuthStyleInParams,
			Scopes: []string{"orders.read"}, EndpointParams: url.Values{"audience": {"orders"}, "dayfly_ttl": {"3"}},
		}
		if change != nil {
			change(&cfg)
		}
		// Config.TokenSource takes a token for old 10 s before it is, which leaves nothing of 3.
		ctx := context.WithValue(t.Context(), oauth2.HTTPClient, how)
		return oauth2.ReuseTokenSourceWithExpiry(nil, perCall(func() (*oauth2.Token, error) { return cfg.Token(ctx) }), time.Second)
	}
	assertion := b.assertion(t, sandbox.Payments)
	orders := must(b.StartService(t.Context(), sandbox.ServiceConfig{ID: sandbox.Orders, Audience: "orders", Feed: b.client(t, sandbox.Orders)}))(t)

	for name, source := range map[string]oauth2.TokenSource{
		"X.509-SVID": ask(b.http(t, sandbox.Payments), nil),
		"JWT-SVID":   ask(b.http(t, spiffeid.ID{}), func(c *clientcredentials.Config) { maps.Copy(c.EndpointParams, assertion) }),
	} {
		t.Run(name, func(t *testing.T) {
			grants := map[string]bool{}
			for len(grants) < 3 {
				tok := must(source.Token())(t)
				answer, err := b.Call(t.Context(), sandbox.Payments, orders, token.NewSecret(tok.AccessToken))
				if err != nil {
					// A token's times are whole seconds, and a slow machine lets it expire on its way.
					if time.Now().Before(tok.Expiry.Add(-time.Second)) {
						t.Fatal(err)
					}
					continue
				}
				if answer.Subject != sandbox.Payments.String() || strings.Join(answer.Scopes, " ") != "orders.read" || tok.Type() != "Bearer" {
					t.Fatalf("%s with %+v", tok.Type(), answer)
				}
				grants[answer.Grant] = true
				time.Sleep(100 * time.Millisecond)
			}
		})
	}
	t.Run("refused", func(t *testing.T) {
		for want, change := range map[string]func(*clientcredentials.Config){
			"invalid_target":  func(c *clientcredentials.Config) { c.EndpointParams.Set("audience", "nobody") },
			"invalid_scope":   func(c *clientcredentials.Config) { c.Scopes = []string{"orders.rule"} },
			"invalid_client":  func(c *clientcredentials.Config) { c.ClientID = sandbox.Reports.String() },
			"invalid_request": func(c *clientcredentials.Config) { maps.Copy(c.EndpointParams, assertion) },
		} {
			_, err := ask(b.http(t, sandbox.Payments), change).Token()
			var refused *oauth2.RetrieveError
			if !errors.As(err, &refused) || refused.ErrorCode != want || refused.ErrorDescription == "" {
				t.Errorf("%v, want %s", err, want)
			}
		}
		_, err := ask(b.http(t, spiffeid.ID{}), nil).Token()
		var refused *oauth2.RetrieveError
		if !errors.As(err, &refused) || refused.ErrorCode != "invalid_client" || refused.Response.StatusCode != http.StatusUnauthorized {
			t.Errorf("a stranger: %v", err)
		}
	})
}

// perCall is a source that asks for a token each time.
type perCall func() (*oauth2.Token, error)

func (f perCall) Token() (*oauth2.Token, error) { return f() }

// TestZitadel: zitadel/oidc exchanges a token that orders was sent for one of ledger's, by
// both ways of proving who it is, and verifies it by discovery.
func TestZitadel(t *testing.T) {
	b := newBox(t, "", "")
	ctx := t.Context()
	sent := must((&clientcredentials.Config{
		ClientID: sandbox.Payments.String(), TokenURL: b.Issuer + "/token", AuthStyle: oauth2.AuthStyleInParams, EndpointParams: url.Values{"audience": {"orders"}},
	}).Token(context.WithValue(ctx, oauth2.HTTPClient, b.http(t, sandbox.Payments))))(t).AccessToken
	verifier := must(rp.NewRelyingPartyOIDC(ctx, b.Issuer, "ledger", "", "", nil,
		rp.WithHTTPClient(b.http(t, spiffeid.ID{})), rp.WithSigningAlgsFromDiscovery()))(t).IDTokenVerifier()

	bySVID := must(tokenexchange.NewTokenExchanger(ctx, b.Issuer, tokenexchange.WithHTTPClient(b.http(t, sandbox.Orders))))(t)
	stranger := must(tokenexchange.NewTokenExchanger(ctx, b.Issuer, tokenexchange.WithHTTPClient(b.http(t, spiffeid.ID{}))))(t)
	for name, te := range map[string]tokenexchange.TokenExchanger{
		"X.509-SVID": bySVID,
		"JWT-SVID":   withForm{stranger, b.assertion(t, sandbox.Orders)},
	} {
		got, err := tokenexchange.ExchangeToken(ctx, te, sent, typeAccess, "", "", nil, []string{"ledger"}, []string{"ledger.read"}, typeAccess)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if got.IssuedTokenType != typeAccess || got.TokenType != "Bearer" || got.ExpiresIn == 0 || strings.Join(got.Scopes, " ") != "ledger.read" {
			t.Errorf("%s: %+v", name, got)
		}
		claims, err := rp.VerifyIDToken[*oidc.IDTokenClaims](ctx, got.AccessToken, verifier)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if act, _ := claims.Claims["act"].(map[string]any); claims.Subject != sandbox.Payments.String() || act["sub"] != sandbox.Orders.String() {
			t.Errorf("%s: sub %s, act %v", name, claims.Subject, act)
		}
		if _, err := rp.VerifyIDToken[*oidc.IDTokenClaims](ctx, sent, verifier); err == nil {
			t.Errorf("%s: the token that orders was sent is good at ledger", name)
		}
	}
	if _, err := tokenexchange.ExchangeToken(ctx, stranger, sent, typeAccess, "", "", nil, []string{"ledger"}, nil, ""); err == nil {
		t.Error("a stranger exchanged it")
	}
}

// withForm is an exchanger that adds parameters to its form.
type withForm struct {
	tokenexchange.TokenExchanger
	more url.Values
}

func (w withForm) AuthFn() (any, error) {
	return httphelper.FormAuthorization(func(form url.Values) {
		maps.Copy(form, w.more)
	}), nil
}
