package token_test

import (
	"crypto/ed25519"
	"fmt"
	"strings"
	"time"

	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func Example() {
	signer := ed25519.NewKeyFromSeed(make([]byte, 32)) // a broker's is random
	public, err := token.NewPublicKey(token.EdDSA, signer.Public())
	if err != nil {
		fmt.Println(err)
		return
	}
	now := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	payments := spiffeid.RequireFromString("spiffe://example.org/ns/prod/sa/payments")
	grant, err := token.NewGrantID(payments, now, strings.NewReader("random!")) // crypto/rand.Reader
	if err != nil {
		fmt.Println(err)
		return
	}
	unsigned, err := token.Encode(&token.Claims{
		Issuer:   "https://dayfly.example.org",
		Audience: "ledger",
		Lineage:  []token.Member{{Identity: payments, Grant: grant, Key: public.ID}},
		IssuedAt: now, NotBefore: now, Expires: now.Add(5 * time.Minute),
		Binding:     token.BindingSPIFFE,
		Transaction: grant.String(),
		Position:    token.Position{Era: 1},
	}, token.EdDSA)
	if err != nil {
		fmt.Println(err)
		return
	}
	// Record unsigned.Fingerprint() here, then:
	secret, err := unsigned.Sign(signer)
	if err != nil {
		fmt.Println(err)
		return
	}
	t, err := token.Parse(secret.Reveal(), func(id token.KeyID) (token.PublicKey, bool) { return public, id == public.ID })
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(secret, t.Presenter(), t.Audience, t.Fingerprint == unsigned.Fingerprint())
	// Output: [redacted token] spiffe://example.org/ns/prod/sa/payments ledger true
}
