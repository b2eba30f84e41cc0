package revocation_test

import (
	"fmt"

	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func Example() {
	payments := spiffeid.RequireFromString("spiffe://example.org/ns/prod/sa/payments")
	claims := token.Claims{
		Audience: "ledger",
		Lineage:  []token.Member{{Identity: payments}},
		Position: token.Position{Era: 1},
	}
	known := revocation.NewSet(1)
	fmt.Println(known.Judge(revocation.SubjectOf(&claims)).Reason)

	known.Know(1, [8]byte{0xaa})
	known.Add(1, revocation.Identity(payments))
	fmt.Println(known.Judge(revocation.SubjectOf(&claims)))

	claims.Position = token.Position{Era: 1, Rev: 1, Sum: [8]byte{0xaa}} // issued knowing of it
	fmt.Println(known.Judge(revocation.SubjectOf(&claims)).Reason)
	// Output:
	// alive
	// {revoked 1}
	// alive
}
