package clients_test

import (
	"strings"
	"testing"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"github.com/dayflyhq/dayfly/e2e/sandbox"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// TestGoOIDC: a verifier that knows the issuer's name and nothing else finds the keys,
// follows their rotation, and refuses what isn't for it.
func TestGoOIDC(t *testing.T) {
	b := newBox(t, "key_rotation: 1s\n", "")
	ctx := oidc.ClientContext(t.Context(), b.http(t, spiffeid.ID{}))
	provider := must(oidc.NewProvider(ctx, b.Issuer))(t)
	verifier := provider.Verifier(&oidc.Config{ClientID: "orders"})

	keys := map[string]bool{}
	var first string
	for len(keys) < 3 {
		cred := b.issue(t, sandbox.Payments, sdk.Request{Audience: "orders"})
		raw := cred.Token.Reveal()
		got, err := verifier.Verify(ctx, raw)
		if err != nil {
			t.Fatalf("after %d keys: %v", len(keys), err)
		}
		if got.Subject != sandbox.Payments.String() || got.Issuer != b.Issuer {
			t.Fatalf("sub %q of iss %q", got.Subject, got.Issuer)
		}
		var claims struct {
			Scope    string `json:"scope"`
			ClientID string `json:"client_id"`
			ID       string `json:"jti"`
		}
		if err := got.Claims(&claims); err != nil {
			t.Fatal(err)
		}
		if claims.ID != cred.Grant || claims.ClientID != sandbox.Payments.String() || claims.Scope != strings.Join(cred.Scopes, " ") {
			t.Errorf("claims %+v of %+v", claims, cred)
		}
		keys[must(token.Inspect(raw))(t).Self().Key.String()] = true
		if first == "" {
			first = raw
		}
		time.Sleep(50 * time.Millisecond)
	}
	// A key that no longer signs is there for as long as what it signed may live.
	if _, err := must(oidc.NewProvider(ctx, b.Issuer))(t).Verifier(&oidc.Config{ClientID: "orders"}).Verify(ctx, first); err != nil {
		t.Errorf("a new verifier, of a token from two keys ago: %v", err)
	}

	if _, err := provider.Verifier(&oidc.Config{ClientID: "ledger"}).Verify(ctx, first); err == nil {
		t.Error("accepted for another audience")
	}
	tampered := first[:len(first)-8] + strings.Repeat("A", 8)
	if _, err := verifier.Verify(ctx, tampered); err == nil {
		t.Error("accepted with another signature")
	}
	other := newBox(t, "", "")
	if _, err := verifier.Verify(ctx, other.issue(t, sandbox.Payments, sdk.Request{Audience: "orders"}).Token.Reveal()); err == nil {
		t.Error("accepted from another issuer")
	}
}
