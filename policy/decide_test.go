package policy_test

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/dayflyhq/dayfly/policy"
)

func id(path string) spiffeid.ID { return spiffeid.RequireFromString("spiffe://dayfly.test" + path) }

func load(t testing.TB, cfg policy.Config) *policy.Policy {
	t.Helper()
	cfg.Timeout = cmp.Or(cfg.Timeout, patience)
	p, err := policy.Load(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// rules returns a policy of these rules alone, with the demo's data.
func rules(t testing.TB, rego string, cfg policy.Config) *policy.Policy {
	t.Helper()
	cfg.FS = fstest.MapFS{
		"policy.rego": &fstest.MapFile{Data: []byte("package policy\n" + rego)},
	}
	return load(t, cfg)
}

func reasons(d policy.Decision) []string {
	var out []string
	for _, x := range d.Denials {
		out = append(out, x.Reason)
	}
	slices.Sort(out)
	return out
}

func TestDecideDefault(t *testing.T) {
	payments, orders := policy.Caller{ID: id("/ns/shop/payments")}, policy.Caller{ID: id("/ns/shop/orders")}
	jwt := payments
	jwt.Attestation = policy.AttestationJWT
	alice := policy.Caller{ID: id("/ops/alice")}
	lineage := []policy.Member{{ID: payments.ID, Grant: "g", KeyID: "k"}}
	onward := policy.Input{Action: policy.ActionExchange, Caller: orders, Audience: "ledger", ParentAudience: "orders",
		ParentScopes: []string{"orders.read", "ledger.read"}, Lineage: lineage}
	exhausted := onward
	exhausted.ParentScopes = []string{"orders.read"}
	elsewhere := onward
	elsewhere.ParentAudience = "web"

	for name, c := range map[string]struct {
		in      policy.Input
		scopes  string
		ttl     time.Duration
		binding string
		reasons string // of a denial
		about   string // metadata value that one of them must have
	}{
		"everything asked for": {
			in:     policy.Input{Action: policy.ActionIssue, Caller: payments, Audience: "orders", Scopes: []string{"orders.read"}, TTL: time.Minute},
			scopes: "orders.read", ttl: time.Minute, binding: "spiffe",
		},
		"nothing asked for": {
			in:     policy.Input{Action: policy.ActionIssue, Caller: payments, Audience: "orders"},
			scopes: "orders.read orders.write ledger.read", ttl: 5 * time.Minute, binding: "spiffe",
		},
		"default scopes": {
			in:     policy.Input{Action: policy.ActionIssue, Caller: payments, Audience: "web"},
			scopes: "web.read", ttl: 5 * time.Minute, binding: "none",
		},
		"a stricter binding than policy's": {
			in:     policy.Input{Action: policy.ActionIssue, Caller: payments, Audience: "web", Binding: "x5t"},
			scopes: "web.read", ttl: 5 * time.Minute, binding: "x5t",
		},
		"a laxer binding than policy's": {
			in:     policy.Input{Action: policy.ActionIssue, Caller: payments, Audience: "orders", Scopes: []string{"orders.read"}, Binding: "none"},
			scopes: "orders.read", ttl: 5 * time.Minute, binding: "spiffe",
		},
		"a certificate's binding without one": {
			in:      policy.Input{Action: policy.ActionIssue, Caller: jwt, Audience: "web", Binding: "x5t"},
			reasons: "binding_not_allowed",
		},
		"one scope too many": {
			in:      policy.Input{Action: policy.ActionIssue, Caller: payments, Audience: "orders", Scopes: []string{"orders.read", "orders.admin"}},
			reasons: "scope_not_entitled", about: "orders.admin",
		},
		"a TTL above policy's": {
			in:      policy.Input{Action: policy.ActionIssue, Caller: payments, Audience: "orders", TTL: 5*time.Minute + 1},
			reasons: "ttl_not_entitled", about: "5m",
		},
		"an unknown audience": {
			in:      policy.Input{Action: policy.ActionIssue, Caller: payments, Audience: "nowhere"},
			reasons: "audience_unknown",
		},
		"an empty audience": {
			in:      policy.Input{Action: policy.ActionIssue, Caller: payments},
			reasons: "audience_unknown",
		},
		"an audience without an entitlement": {
			in:      policy.Input{Action: policy.ActionIssue, Caller: payments, Audience: "ledger"},
			reasons: "no_entitlement",
		},
		"an identity of another trust domain": {
			in: policy.Input{Action: policy.ActionIssue, Caller: policy.Caller{ID: spiffeid.RequireFromString("spiffe://evil.test/ns/shop/payments")},
				Audience: "orders"},
			reasons: "no_entitlement",
		},
		"an identity below an entitled one": {
			in:      policy.Input{Action: policy.ActionIssue, Caller: policy.Caller{ID: id("/ns/shop/payments/x")}, Audience: "orders"},
			reasons: "no_entitlement",
		},
		"exchange": {in: onward, scopes: "ledger.read", ttl: 2 * time.Minute, binding: "spiffe"},
		"exchange of a credential without the scope": {
			in: exhausted, reasons: "no_scope_left",
		},
		"exchange from another audience": {in: elsewhere, reasons: "exchange_not_allowed"},
		"follow": {in: policy.Input{Action: policy.ActionFollow, Caller: orders,
			Verifier: policy.Verifier{Audiences: []string{"orders"}, MaxStaleness: 30 * time.Second}}},
		"follow for somebody else": {in: policy.Input{Action: policy.ActionFollow, Caller: orders,
			Verifier: policy.Verifier{Audiences: []string{"ledger"}, MaxStaleness: time.Second}}, reasons: "follow_not_allowed"},
		"follow with a bound too large": {in: policy.Input{Action: policy.ActionFollow, Caller: orders,
			Verifier: policy.Verifier{Audiences: []string{"orders"}, MaxStaleness: time.Minute, OnStale: policy.OnStaleAccept}},
			reasons: "on_stale_not_allowed staleness_not_allowed"},
		"relay":                    {in: policy.Input{Action: policy.ActionRelay, Caller: payments}},
		"follow as an operator":    {in: policy.Input{Action: policy.ActionFollow, Caller: alice}, reasons: "not_verifier"},
		"revoke":                   {in: policy.Input{Action: policy.ActionRevoke, Caller: alice, Selectors: []string{"x"}, Lock: "quarantine"}},
		"revoke everything":        {in: policy.Input{Action: policy.ActionRevokeEverything, Caller: alice}},
		"plan":                     {in: policy.Input{Action: policy.ActionPlan, Caller: alice}},
		"revoke without the right": {in: policy.Input{Action: policy.ActionRevoke, Caller: payments}, reasons: "not_operator"},
		"give back its own":        {in: policy.Input{Action: policy.ActionGiveBack, Caller: orders, Lineage: []policy.Member{{ID: payments.ID}, {ID: orders.ID}}}},
		"give back another's":      {in: policy.Input{Action: policy.ActionGiveBack, Caller: payments, Lineage: []policy.Member{{ID: payments.ID}, {ID: orders.ID}}}, reasons: "not_holder"},
		"introspect what is its":   {in: policy.Input{Action: policy.ActionIntrospect, Caller: orders, ParentAudience: "orders"}},
		"introspect another's":     {in: policy.Input{Action: policy.ActionIntrospect, Caller: orders, ParentAudience: "ledger"}, reasons: "introspection_not_allowed"},
		"an unknown action":        {in: policy.Input{Action: "mint", Caller: alice}, reasons: "action_unknown"},
	} {
		t.Run(name, func(t *testing.T) {
			p := load(t, policy.Config{FS: policy.Demo()})
			d, err := p.Decide(t.Context(), c.in)
			if err != nil {
				t.Fatal(err)
			}
			if got := strings.Join(reasons(d), " "); got != c.reasons {
				t.Fatalf("reasons: got %q, want %q (%+v)", got, c.reasons, d.Denials)
			}
			if d.Allow != (c.reasons == "") {
				t.Errorf("Allow = %v with reasons %q", d.Allow, c.reasons)
			}
			if got := strings.Join(d.Scopes, " "); got != c.scopes {
				t.Errorf("scopes: got %q, want %q", got, c.scopes)
			}
			if d.TTL != c.ttl || d.Binding != c.binding {
				t.Errorf("got TTL %v, binding %q, want %v, %q", d.TTL, d.Binding, c.ttl, c.binding)
			}
			if c.about != "" && !slices.ContainsFunc(d.Denials, func(x policy.Denial) bool {
				return x.Metadata["scopes"] == c.about || x.Metadata["max_ttl"] == c.about
			}) {
				t.Errorf("no denial names %q: %+v", c.about, d.Denials)
			}
			for _, x := range d.Denials {
				if x.Message == "" || x.Hint == "" {
					t.Errorf("denial %s lacks a message or a hint: %+v", x.Reason, x)
				}
			}
		})
	}
}

func TestDecideNewcomersPolicyDenies(t *testing.T) {
	p := load(t, policy.Config{FS: policy.Default()})
	for _, a := range []policy.Action{policy.ActionIssue, policy.ActionExchange, policy.ActionFollow, policy.ActionRelay, policy.ActionReport,
		policy.ActionRevoke, policy.ActionRevokeEverything, policy.ActionLift, policy.ActionLiftConfirm, policy.ActionList, policy.ActionPlan,
		policy.ActionGiveBack, policy.ActionIntrospect} {
		d, err := p.Decide(t.Context(), policy.Input{Action: a, Caller: policy.Caller{ID: id("/x")}, Audience: "x"})
		if err != nil || d.Allow || len(d.Denials) == 0 || d.Denials[0].Reason == "action_unknown" {
			t.Errorf("%s: got %+v, %v, want a denial with a reason", a, d, err)
		}
	}
}

func TestDecideLimitsAndNames(t *testing.T) {
	p := load(t, policy.Config{FS: policy.Demo()})
	d, err := p.Decide(t.Context(), policy.Input{Action: policy.ActionIssue, Caller: policy.Caller{ID: id("/ns/shop/orders")}, Audience: "x"})
	if err != nil {
		t.Fatal(err)
	}
	if want := (policy.Limits{IssuePerSecond: 1000, LiveGrants: 100000}); d.Limits != want {
		t.Errorf("limits: got %+v, want %+v", d.Limits, want)
	}
	if want := []string{"orders"}; !slices.Equal(d.Names, want) {
		t.Errorf("names: got %q, want %q", d.Names, want)
	}
}

// A rule may set limits where the data has none, or lower ones, and can't raise them.
func TestDecideLimitsOfRules(t *testing.T) {
	in := policy.Input{Action: policy.ActionIssue, Caller: policy.Caller{ID: id("/ns/shop/orders")}, Audience: "x"}
	ask := func(limits, data string) (policy.Decision, error) {
		p := load(t, policy.Config{FS: fstest.MapFS{
			"policy.rego": &fstest.MapFile{Data: []byte(`package policy

decision := {"allow": true, "scopes": [], "ttl_ns": 60000000000, "binding": "spiffe", "limits": ` + limits + "}")},
			"data.yaml": &fstest.MapFile{Data: []byte(data)},
		}})
		return p.Decide(t.Context(), in)
	}
	const data = "limits: {spiffe://dayfly.test/*: {issue_per_second: 10, live_grants: 100}}"
	for _, tc := range []struct {
		limits, data string
		want         policy.Limits
	}{
		{`{}`, data, policy.Limits{IssuePerSecond: 10, LiveGrants: 100}},
		{`{"live_grants": 7}`, data, policy.Limits{IssuePerSecond: 10, LiveGrants: 7}},
		{`{"issue_per_second": 11, "live_grants": 101}`, data, policy.Limits{IssuePerSecond: 10, LiveGrants: 100}},
		{`{"issue_per_second": 3}`, "custom: {}", policy.Limits{IssuePerSecond: 3}},
	} {
		if d, err := ask(tc.limits, tc.data); err != nil || d.Limits != tc.want {
			t.Errorf("%s over %s: got %+v, %v, want %+v", tc.limits, tc.data, d.Limits, err, tc.want)
		}
	}
	// They are for giving back, too.
	in = policy.Input{Action: policy.ActionGiveBack, Caller: in.Caller}
	if d, err := ask(`{"give_backs_per_minute": 9}`, "limits: {spiffe://dayfly.test/*: {give_backs_per_minute: 3}}"); err != nil || d.Limits.GiveBacksPerMinute != 3 {
		t.Errorf("give_back: got %+v, %v, want 3 a minute", d.Limits, err)
	}
	for _, bad := range []string{`7`, `{"live_grants": 0}`, `{"live_grants": -1}`, `{"live_grants": 1.5}`, `{"live_grants": "7"}`, `{"live": 7}`, `{"live_grants": 99999999999}`} {
		if d, err := ask(bad, data); err == nil || d.Allow {
			t.Errorf("%s: got %+v, want an error", bad, d)
		}
	}
}

// Which calls take a second person, for how long a proposal waits and who may confirm
// comes from the data, whatever the rules say.
func TestDecideSecondPerson(t *testing.T) {
	const data = "operators:\n  spiffe://td/a: [lift, lift_confirm, revoke_everything]\n  spiffe://td/b: [lift]\n  spiffe://td/sec/*: [lift_confirm]\n  spiffe://td/c: [revoke_everything]\n"
	ask := func(data string, a policy.Action, caller string) policy.SecondPerson {
		t.Helper()
		rego, err := fs.ReadFile(policy.Default(), "policy.rego")
		if err != nil {
			t.Fatal(err)
		}
		p := load(t, policy.Config{FS: fstest.MapFS{"policy.rego": {Data: rego}, "data.yaml": {Data: []byte(data)}}})
		d, err := p.Decide(t.Context(), policy.Input{Action: a, Caller: policy.Caller{ID: spiffeid.RequireFromString(caller)}})
		if err != nil {
			t.Fatal(err)
		}
		return d.SecondPerson
	}
	for _, c := range []struct {
		data   string
		action policy.Action
		caller string
		want   policy.SecondPerson
	}{
		{data, policy.ActionLift, "spiffe://td/a", policy.SecondPerson{Within: 15 * time.Minute}},
		{data + "lift: {two_person: true}\n", policy.ActionLift, "spiffe://td/a", policy.SecondPerson{Required: true, Within: 15 * time.Minute, Confirmers: []string{"spiffe://td/sec/*"}}},
		{data + "lift: {two_person: true}\n", policy.ActionLiftConfirm, "spiffe://td/nobody", policy.SecondPerson{Required: true, Within: 15 * time.Minute, Confirmers: []string{"spiffe://td/a", "spiffe://td/sec/*"}}},
		{data + "lift: {within: 1m}\n", policy.ActionRevokeEverything, "spiffe://td/a", policy.SecondPerson{Required: true, Within: time.Minute, Confirmers: []string{"spiffe://td/c"}}},
		{data + "lift: {two_person: true}\n", policy.ActionRevoke, "spiffe://td/a", policy.SecondPerson{}},
	} {
		if got := ask(c.data, c.action, c.caller); !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s of %s: got %+v, want %+v", c.action, c.caller, got, c.want)
		}
	}
}

func TestMalformedInputIsAnError(t *testing.T) {
	p := load(t, policy.Config{FS: policy.Demo()})
	good := policy.Input{Action: policy.ActionIssue, Caller: policy.Caller{ID: id("/ns/shop/payments")}, Audience: "orders"}
	for name, spoil := range map[string]func(*policy.Input){
		"no caller":           func(in *policy.Input) { in.Caller.ID = spiffeid.ID{} },
		"no action":           func(in *policy.Input) { in.Action = "" },
		"negative TTL":        func(in *policy.Input) { in.TTL = -1 },
		"unknown binding":     func(in *policy.Input) { in.Binding = "dpop" },
		"unknown attestation": func(in *policy.Input) { in.Caller.Attestation = "tpm" },
		"unknown on_stale":    func(in *policy.Input) { in.Verifier.OnStale = "panic" },
	} {
		in := good
		spoil(&in)
		if d, err := p.Decide(t.Context(), in); !errors.Is(err, policy.ErrInput) || d.Allow {
			t.Errorf("%s: got %+v, %v, want ErrInput", name, d, err)
		}
	}
}

func TestUndefinedDecisionDenies(t *testing.T) {
	p := rules(t, `decision := {"allow": true} if input.action == "never"`, policy.Config{})
	d, err := p.Decide(t.Context(), policy.Input{Action: policy.ActionList, Caller: policy.Caller{ID: id("/x")}})
	if err != nil || d.Allow || !slices.Equal(reasons(d), []string{"undefined"}) {
		t.Errorf("got %+v, %v, want a denial for the reason undefined", d, err)
	}
}

// TestAnswerIsChecked holds that no Rego widens what was asked for, and that an
// answer nobody can mean is an error.
func TestAnswerIsChecked(t *testing.T) {
	in := policy.Input{Action: policy.ActionIssue, Caller: policy.Caller{ID: id("/x")}, Audience: "a",
		Scopes: []string{"r"}, TTL: time.Minute, Binding: policy.BindingSPIFFE}
	for name, c := range map[string]struct {
		rego string
		deny string // reason where it isn't an error
	}{
		"a scope not asked for":    {rego: `{"allow": true, "scopes": ["r", "w"], "ttl_ns": 60000000000, "binding": "spiffe"}`},
		"a scope dropped":          {rego: `{"allow": true, "scopes": [], "ttl_ns": 60000000000, "binding": "spiffe"}`},
		"a longer TTL":             {rego: `{"allow": true, "scopes": ["r"], "ttl_ns": 60000000001, "binding": "spiffe"}`},
		"no TTL":                   {rego: `{"allow": true, "scopes": ["r"], "binding": "spiffe"}`},
		"a TTL that is no integer": {rego: `{"allow": true, "scopes": ["r"], "ttl_ns": 0.5, "binding": "spiffe"}`},
		"a laxer binding":          {rego: `{"allow": true, "scopes": ["r"], "ttl_ns": 60000000000, "binding": "none"}`},
		"an unknown binding":       {rego: `{"allow": true, "scopes": ["r"], "ttl_ns": 60000000000, "binding": "dpop"}`},
		"an unknown key":           {rego: `{"allow": true, "scope": ["r"], "ttl_ns": 60000000000, "binding": "spiffe"}`},
		"not an object":            {rego: `true`},
		"allow that is no boolean": {rego: `{"allow": "yes"}`},
		"a denial without reason":  {rego: `{"allow": false, "denials": [{"message": "no"}]}`},
		"an error of a builtin":    {rego: `{"allow": to_number(input.audience) == 1}`},
		"allowed and denied":       {rego: `{"allow": true, "scopes": ["r"], "ttl_ns": 1, "binding": "spiffe", "denials": [{"reason": "no"}]}`, deny: "no"},
		"denied without a reason":  {rego: `{"allow": false}`, deny: "denied"},
		"a set of denials":         {rego: `{"allow": false, "denials": {{"reason": "no"}}}`, deny: "no"},
	} {
		t.Run(name, func(t *testing.T) {
			d, err := rules(t, "decision := "+c.rego, policy.Config{}).Decide(t.Context(), in)
			if d.Allow {
				t.Fatalf("allowed: %+v", d)
			}
			if c.deny == "" {
				if !errors.Is(err, policy.ErrEvaluation) {
					t.Errorf("got %+v, %v, want ErrEvaluation", d, err)
				}
			} else if err != nil || !slices.Equal(reasons(d), []string{c.deny}) {
				t.Errorf("got %+v, %v, want a denial for %q", d, err, c.deny)
			}
		})
	}
}

func TestTimeoutStopsEvaluation(t *testing.T) {
	endless := `decision := {"allow": true} if {
		some i in numbers.range(1, 100000)
		some j in numbers.range(1, 100000)
		i + j < 0
	}`
	in := policy.Input{Action: policy.ActionList, Caller: policy.Caller{ID: id("/x")}}
	p := rules(t, endless, policy.Config{Timeout: 20 * time.Millisecond})
	if d, err := p.Decide(t.Context(), in); !errors.Is(err, policy.ErrEvaluation) || d.Allow {
		t.Errorf("timeout: got %+v, %v, want ErrEvaluation", d, err)
	}
	p = rules(t, endless, policy.Config{Timeout: time.Hour})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if d, err := p.Decide(ctx, in); !errors.Is(err, policy.ErrEvaluation) || d.Allow {
		t.Errorf("cancelled: got %+v, %v, want ErrEvaluation", d, err)
	}
}

func TestTimeIsInjected(t *testing.T) {
	p := rules(t, `decision := {"allow": time.now_ns() == input.time_ns}`, policy.Config{Now: func() time.Time { return time.Unix(7, 0) }})
	for _, at := range []time.Time{{}, time.Unix(9, 9)} {
		d, err := p.Decide(t.Context(), policy.Input{Action: policy.ActionList, Caller: policy.Caller{ID: id("/x")}, Time: at})
		if err != nil || !d.Allow {
			t.Errorf("at %v: got %+v, %v", at, d, err)
		}
	}
}

func TestDeniedBuiltins(t *testing.T) {
	for _, call := range []string{
		`http.send({"method": "GET", "url": "http://127.0.0.1/"})`,
		`net.lookup_ip_addr("localhost")`,
		`opa.runtime()`,
		`rego.parse_module("x", "package x")`,
		`trace("x")`,
		`json.match_schema({}, {"$ref": "file:///etc/passwd"})`,
		`json.verify_schema({"$ref": "http://127.0.0.1/"})`,
	} {
		fsys := fstest.MapFS{"policy.rego": &fstest.MapFile{Data: []byte("package policy\ndecision := {\"allow\": true} if " + call)}}
		_, err := policy.Load(t.Context(), policy.Config{FS: fsys})
		var problems policy.Problems
		if !errors.As(err, &problems) || !strings.Contains(err.Error(), "undefined function") {
			t.Errorf("%s: got %v, want it not to compile", call, err)
		}
	}
}

func TestAudiences(t *testing.T) {
	p := load(t, policy.Config{FS: policy.Demo()})
	got, ok := p.Audience("ledger")
	want := policy.Audience{Name: "ledger", Owner: "ledger team", VerifiedBy: policy.VerifiedByFeed,
		Identities: []string{"spiffe://dayfly.test/ns/shop/ledger"}, MaxStaleness: 5 * time.Second, OnStale: policy.OnStaleRefuse,
		Fallback: policy.Fallback{Owner: "ledger on-call", Text: "bookings wait in the journal"}}
	if !ok || !reflect.DeepEqual(got, want) {
		t.Errorf("Audience: got %+v, %v, want %+v", got, ok, want)
	}
	if _, ok := p.Audience("nowhere"); ok {
		t.Error("an audience nobody declared")
	}
	var names []string
	for _, a := range p.Audiences() {
		names = append(names, a.Name)
	}
	if want := []string{"ledger", "orders", "web"}; !slices.Equal(names, want) {
		t.Errorf("Audiences: got %q, want %q", names, want)
	}
}

// A caller's own fallback stands with what entitles it, the most specific first; where
// it has none, the audience's counts.
func TestFallback(t *testing.T) {
	const data = `
audiences:
  orders: {owner: o, identities: [spiffe://dayfly.test/orders], fallback: {owner: on-call, text: orders queue up}}
  ledger: {owner: o, identities: [spiffe://dayfly.test/ledger]}
entitlements:
  spiffe://dayfly.test/*:
    orders: {scopes: [], fallback: {text: everybody waits}}
  spiffe://dayfly.test/shop/*:
    orders: {scopes: [], fallback: {text: cash only, link: "https://wiki/cash"}}
  spiffe://dayfly.test/shop/web:
    orders: {scopes: []}
exchange:
  spiffe://dayfly.test/orders:
    orders:
      ledger: {scopes: [], fallback: {text: bookings wait}}
`
	p := load(t, policy.Config{FS: fstest.MapFS{
		"policy.rego": {Data: []byte("package policy\ndecision := {\"allow\": false}\n")}, "data.yaml": {Data: []byte(data)},
	}})
	for _, c := range []struct {
		caller, audience string
		want             policy.Fallback
	}{
		{"/x", "orders", policy.Fallback{Text: "everybody waits"}},
		{"/shop/till", "orders", policy.Fallback{Text: "cash only", Link: "https://wiki/cash"}},
		{"/shop/web", "orders", policy.Fallback{Owner: "on-call", Text: "orders queue up"}}, // its entry decides, and has none
		{"/orders", "ledger", policy.Fallback{Text: "bookings wait"}},
		{"/x", "ledger", policy.Fallback{}},
		{"/x", "nowhere", policy.Fallback{}},
	} {
		if got := p.Fallback(id(c.caller), c.audience); got != c.want {
			t.Errorf("%s at %s: %+v, want %+v", c.caller, c.audience, got, c.want)
		}
	}
	if got := problems("audiences:\n  a: {owner: o, verified_by: external}\nentitlements:\n  spiffe://td/x:\n    a: {scopes: [], fallback: {txt: x}}\n"); len(got) != 1 || !strings.Contains(got[0], "unknown key \"txt\"") {
		t.Errorf("problems %q", got)
	}
}

func TestAnswersTo(t *testing.T) {
	dir := written(t, map[string]string{"more.yaml": `audiences:
  books: {owner: x, identities: ["spiffe://dayfly.test/books/*"]}`})
	p := load(t, policy.Config{Dir: dir})
	for _, c := range []struct {
		id, aud string
		want    bool
	}{
		{"/ns/shop/orders", "orders", true},
		{"/ns/shop/orders", "ledger", false},
		{"/ns/shop/orders", "", false},
		{"/ns/shop/orders", "spiffe://dayfly.test/ns/shop/orders", true},
		{"/ns/shop/orders", "spiffe://dayfly.test/ns/shop", false},
		{"/ns/shop/orders", "spiffe://dayfly.test/ns/shop/*", false},
		{"/books/a/b", "books", true},
		{"/books", "books", false},
		{"/bookshop/a", "books", false},
	} {
		if got := p.AnswersTo(id(c.id), c.aud); got != c.want {
			t.Errorf("AnswersTo(%s, %q) = %v, want %v", c.id, c.aud, got, c.want)
		}
	}
	if p.AnswersTo(spiffeid.ID{}, "") {
		t.Error("nobody answers to nothing")
	}
}

func TestExplain(t *testing.T) {
	p := load(t, policy.Config{FS: policy.Demo()})
	e, err := p.Explain(t.Context(), policy.Input{Action: policy.ActionIssue, Caller: policy.Caller{ID: id("/ns/shop/payments")},
		Audience: "orders", Scopes: []string{"orders.admin"}})
	if err != nil {
		t.Fatal(err)
	}
	if e.Decision.Allow || e.Decision.Rule != "issue" {
		t.Errorf("decision: %+v", e.Decision)
	}
	ref := `data.dayfly.entitlements["spiffe://dayfly.test/ns/shop/payments"]["orders"]`
	if len(e.Entries) != 1 || e.Entries[0].Ref != ref || e.Entries[0].File != "data.yaml" || e.Entries[0].Line == 0 || e.Entries[0].Value == nil {
		t.Errorf("entries: %+v", e.Entries)
	}
	if !slices.ContainsFunc(e.Rules, func(r policy.FiredRule) bool {
		return r.Name == "data.policy.denials" && r.File == "policy.rego" && r.Line > 0
	}) {
		t.Errorf("rules: %+v", e.Rules)
	}
	for _, want := range []string{"denied by rule issue", "scope_not_entitled", ref, "data.yaml:", "hint:", "1000 a second", "100000 live grants"} {
		if !strings.Contains(e.String(), want) {
			t.Errorf("text lacks %q:\n%s", want, e)
		}
	}
	b, err := json.Marshal(e)
	if err != nil || !strings.Contains(string(b), `"reason":"scope_not_entitled"`) {
		t.Errorf("JSON: %s, %v", b, err)
	}
}
