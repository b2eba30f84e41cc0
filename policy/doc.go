// Package policy decides who may do what. It embeds OPA: Go asks a typed
// question ([Input]), Rego answers, and Go gets a typed answer ([Decision]).
//
//	p, err := policy.Load(ctx, policy.Config{Dir: "/etc/dayfly/policy", Log: log})
//	if err != nil { ... }
//	go p.Run(ctx) // follows changes of the folder
//	d, err := p.Decide(ctx, policy.Input{
//		Action:   policy.ActionIssue,
//		Caller:   policy.Caller{ID: id, Attestation: policy.AttestationX509},
//		Audience: "orders",
//		Scopes:   []string{"orders.read"},
//	})
//	if err != nil || !d.Allow { ... refuse ... }
//
// The laws, and the tests that hold them:
//
//   - Deny by default: an undefined decision, an unknown action and an error of
//     evaluation all deny (TestUndefinedDecisionDenies, TestDecideDefault,
//     TestTimeoutStopsEvaluation).
//   - Nothing that was asked is dropped silently: a scope outside the entitlement
//     denies the whole request (TestDecideDefault), and an answer that grants more
//     than was asked is an error (TestAnswerIsChecked).
//   - Every request is evaluated anew. There is no cache of decisions.
//   - A decision, and everything it was decided on, comes from one generation of
//     the folder; a folder that is broken never replaces one that works
//     (TestReload).
//   - Patterns match whole path segments (TestPatternsMatchWholeSegments).
//   - Policy reaches neither the network nor the environment
//     (TestDeniedBuiltins).
//
// What policy doesn't hold, because Go code must: the hard caps, the narrowing of
// a derived credential, the check that a presented token is addressed to its
// caller, locks and revocations. Policy can only say no more often.
//
// The folder's format and the reasons are in docs/policy.md.
package policy
