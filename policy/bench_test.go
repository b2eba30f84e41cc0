package policy_test

import (
	"fmt"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/dayflyhq/dayfly/policy"
)

// withEntitlements is the demo policy with n more identities entitled.
func withEntitlements(t testing.TB, n int) *policy.Policy {
	t.Helper()
	var b strings.Builder
	b.WriteString("entitlements:\n")
	for i := range n {
		fmt.Fprintf(&b, "  spiffe://dayfly.test/ns/n%d/*: {orders: {scopes: [orders.read, s%d]}}\n", i, i)
	}
	dir := written(t, map[string]string{"more.yaml": b.String()})
	return load(t, policy.Config{Dir: dir})
}

func BenchmarkDecide(b *testing.B) {
	for _, n := range []int{10, 10_000} {
		p := withEntitlements(b, n)
		caller := policy.Caller{ID: id("/ns/shop/payments"), SVIDSerial: "0a1b2c", SVIDAge: time.Minute, SVIDRemaining: time.Hour}
		for name, in := range map[string]policy.Input{
			"issue": {Action: policy.ActionIssue, Caller: caller, Audience: "orders", Scopes: []string{"orders.read"}},
			"deny":  {Action: policy.ActionIssue, Caller: caller, Audience: "orders", Scopes: []string{"orders.admin"}},
			"exchange": {Action: policy.ActionExchange, Caller: policy.Caller{ID: id("/ns/shop/orders")}, Audience: "ledger",
				ParentAudience: "orders", ParentScopes: []string{"ledger.read"}},
		} {
			b.Run(fmt.Sprintf("%s/%d", name, n), func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					if d, err := p.Decide(b.Context(), in); err != nil || d.Allow != (name != "deny") {
						b.Fatal(d, err)
					}
				}
			})
		}
	}
}

// BenchmarkFloor is what OPA costs for a rule that looks at nothing.
func BenchmarkFloor(b *testing.B) {
	p := load(b, policy.Config{FS: fstest.MapFS{"policy.rego": {Data: []byte("package policy\ndecision := {\"allow\": true}")}}})
	in := policy.Input{Action: policy.ActionList, Caller: policy.Caller{ID: id("/ns/shop/payments")}}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := p.Decide(b.Context(), in); err != nil {
			b.Fatal(err)
		}
	}
}

// TestCostDoesNotGrowWithEntitlements counts allocations, which no other load on
// the machine changes.
func TestCostDoesNotGrowWithEntitlements(t *testing.T) {
	in := policy.Input{Action: policy.ActionIssue, Caller: policy.Caller{ID: id("/ns/shop/payments")}, Audience: "orders",
		Scopes: []string{"orders.read"}}
	allocs := func(n int) float64 {
		p := withEntitlements(t, n)
		return testing.AllocsPerRun(200, func() {
			if d, err := p.Decide(t.Context(), in); err != nil || !d.Allow {
				t.Fatal(d, err)
			}
		})
	}
	few, many := allocs(10), allocs(10_000)
	if many > few*1.1 {
		t.Errorf("%v allocations with 10 entitlements, %v with 10,000", few, many)
	}
}
