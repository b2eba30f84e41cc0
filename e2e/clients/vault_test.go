package clients_test

import (
	"os"
	"strings"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/e2e/sandbox"
	"github.com/dayflyhq/dayfly/sdk"
	jwtauth "github.com/hashicorp/vault-plugin-auth-jwt"
	"github.com/hashicorp/vault/sdk/logical"
)

// vaultData is docs/federation/vault.md's example.
const vaultData = `
audiences:
  vault: {owner: platform team, verified_by: external}
entitlements:
  spiffe://dayfly.test/ns/shop/*:
    vault: {scopes: [], ttl: 1m, binding: none}
`

// TestVault logs in to Vault's own JWT auth method, which OpenBao has from it, as
// docs/federation/vault.md configures it.
func TestVault(t *testing.T) {
	b := newBox(t, "", vaultData)
	v := &vault{storage: &logical.InmemStorage{}}
	v.Backend = must(jwtauth.Factory(t.Context(), &logical.BackendConfig{
		StorageView: v.storage,
		System:      &logical.StaticSystemView{DefaultLeaseTTLVal: time.Hour, MaxLeaseTTLVal: 24 * time.Hour},
	}))(t)
	t.Cleanup(func() { v.Cleanup(t.Context()) })
	v.write(t, logical.UpdateOperation, "config", map[string]any{
		"oidc_discovery_url": b.Issuer, "oidc_discovery_ca_pem": string(must(os.ReadFile(b.WebCA()))(t)),
		"bound_issuer": b.Issuer, "jwt_supported_algs": []string{"ES256"},
	})
	v.write(t, logical.CreateOperation, "role/payments", map[string]any{
		"role_type": "jwt", "bound_audiences": []string{"vault"}, "bound_subject": sandbox.Payments.String(), "user_claim": "sub",
		"claim_mappings": map[string]any{"jti": "dayfly_grant"}, "token_policies": []string{"payments"},
		"token_ttl": "5m", "token_max_ttl": "5m", "token_no_default_policy": true,
		"expiration_leeway": -1, "not_before_leeway": -1, "clock_skew_leeway": -1,
	})

	cred := b.issue(t, sandbox.Payments, sdk.Request{Audience: "vault"})
	auth, refused := v.login(t, "payments", cred.Token.Reveal())
	if refused != "" {
		t.Fatal(refused)
	}
	if auth.Alias.Name != sandbox.Payments.String() || strings.Join(auth.Policies, " ") != "payments" || auth.Metadata["dayfly_grant"] != cred.Grant {
		t.Errorf("logged in as %q with %v and %v", auth.Alias.Name, auth.Policies, auth.Metadata)
	}
	if auth.TTL != 5*time.Minute || auth.MaxTTL != 5*time.Minute {
		t.Errorf("Vault's token lives %s and %s at most: docs/federation/vault.md says that it outlives ours", auth.TTL, auth.MaxTTL)
	}

	brief := b.issue(t, sandbox.Payments, sdk.Request{Audience: "vault", TTL: time.Second})
	time.Sleep(time.Until(brief.Expires) + time.Second)
	for what, c := range map[string]struct{ token, want string }{
		"another audience": {b.issue(t, sandbox.Payments, sdk.Request{Audience: "orders"}).Token.Reveal(), "aud"},
		"another subject":  {b.issue(t, sandbox.Web, sdk.Request{Audience: "vault"}).Token.Reveal(), "sub"},
		"expired":          {brief.Token.Reveal(), "expired"},
		"tampered with":    {cred.Token.Reveal()[:len(cred.Token.Reveal())-8] + "AAAAAAAA", "signature"},
	} {
		if auth, refused := v.login(t, "payments", c.token); auth != nil || !strings.Contains(refused, c.want) {
			t.Errorf("%s: logged in %v, refused %q", what, auth != nil, refused)
		}
	}
}

// vault is the auth method without the server around it.
type vault struct {
	logical.Backend
	storage logical.Storage
}

func (v *vault) write(t *testing.T, op logical.Operation, path string, data map[string]any) *logical.Response {
	t.Helper()
	resp, err := v.HandleRequest(t.Context(), &logical.Request{Operation: op, Path: path, Storage: v.storage, Data: data})
	if err != nil || resp.IsError() {
		t.Fatalf("writing %s: %v, %v", path, err, resp)
	}
	return resp
}

// login returns what Vault makes of a token, or why it refuses.
func (v *vault) login(t *testing.T, role, token string) (*logical.Auth, string) {
	t.Helper()
	resp := must(v.HandleRequest(t.Context(), &logical.Request{
		Operation: logical.UpdateOperation, Path: "login", Storage: v.storage,
		Data: map[string]any{"role": role, "jwt": token}, Connection: &logical.Connection{RemoteAddr: "127.0.0.1"},
	}))(t)
	if resp.IsError() {
		return nil, resp.Error().Error()
	}
	return resp.Auth, ""
}
