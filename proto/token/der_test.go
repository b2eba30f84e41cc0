package token_test

import (
	"encoding/asn1"
	"math/big"
	"testing"
)

// splitDER reads the two numbers of an ASN.1 signature.
func splitDER(t testing.TB, der []byte) (r, s *big.Int) {
	t.Helper()
	var sig struct{ R, S *big.Int }
	if rest, err := asn1.Unmarshal(der, &sig); err != nil || len(rest) > 0 {
		t.Fatalf("signature: %v, %d bytes left", err, len(rest))
	}
	return sig.R, sig.S
}
