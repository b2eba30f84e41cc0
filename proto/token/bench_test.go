package token_test

import (
	"crypto/ecdsa"
	"crypto/sha256"
	"testing"

	"github.com/dayflyhq/dayfly/proto/token"
)

// BenchmarkVerifyFloor is the signature alone: nothing that reads a token is faster.
func BenchmarkVerifyFloor(b *testing.B) {
	k := fixedKey(b, token.ES256, "bench")
	sum := sha256.Sum256([]byte("message"))
	sig, err := ecdsa.SignASN1(nil, k.signer.(*ecdsa.PrivateKey), sum[:])
	if err != nil {
		b.Fatal(err)
	}
	public := k.public.Key.(*ecdsa.PublicKey)
	b.ReportAllocs()
	for b.Loop() {
		if !ecdsa.VerifyASN1(public, sum[:], sig) {
			b.Fatal("bad signature")
		}
	}
}

func BenchmarkParse(b *testing.B) {
	for _, bb := range []struct {
		name    string
		members int
	}{{"root", 1}, {"full depth", token.MaxDepth}} {
		b.Run(bb.name, func(b *testing.B) {
			k := fixedKey(b, token.ES256, "bench")
			raw := sign(b, claims(b, k.public.ID, bb.members), k)
			keys := keySet(k)
			b.ReportAllocs()
			for b.Loop() {
				if _, err := token.Parse(raw, keys); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkInspect is what reading costs beside the signature.
func BenchmarkInspect(b *testing.B) {
	k := fixedKey(b, token.ES256, "bench")
	raw := sign(b, claims(b, k.public.ID, token.MaxDepth), k)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := token.Inspect(raw); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkEncode(b *testing.B) {
	k := fixedKey(b, token.ES256, "bench")
	c := claims(b, k.public.ID, 2)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := token.Encode(c, token.ES256); err != nil {
			b.Fatal(err)
		}
	}
}
