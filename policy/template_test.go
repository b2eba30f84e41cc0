package policy_test

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/policy"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// templates are beside the demo's data.
const templates = `audiences:
  "minio/{segment.2}": {owner: storage team, verified_by: external, fallback: {text: wait}}
  "aws:{trust_domain}:{path}": {owner: cloud team, verified_by: external}
  "{segment.1}://{segment.2}": {owner: cloud team, verified_by: external}
  minio/orders: {owner: shop team, verified_by: external}
entitlements:
  spiffe://dayfly.test/ns/*:
    "minio/{segment.2}": {scopes: [], ttl: 2m, binding: none}
    "{segment.1}://{segment.2}": {scopes: []}
  spiffe://dayfly.test/ns/other/*:
    "aws:{trust_domain}:{path}": {scopes: []}
exchange:
  spiffe://dayfly.test/ns/shop/orders:
    orders:
      "aws:{trust_domain}:{path}": {scopes: []}
`

func templateQuestions() []policy.Input {
	var out []policy.Input
	for _, q := range []struct{ caller, audience string }{
		{"/ns/shop/payments", "minio/shop"}, {"/ns/shop/payments", "minio/other"}, {"/ns/shop/payments", "minio/{segment.2}"},
		{"/ns/shop/payments", "minio/sho"}, {"/ns/shop/payments", "minio/shop/"}, {"/ns/shop/payments", "minio/payments"},
		{"/ns/orders", "minio/orders"}, {"/ns", "minio/"}, {"/ns/other/reports", "aws:dayfly.test:ns/other/reports"},
		{"/ns/other/reports", "aws:dayfly.test:ns/other"}, {"/ns/shop/payments", "aws:dayfly.test:ns/shop/payments"}, {"/ns/x", "ns://x"},
	} {
		if !strings.ContainsAny(q.audience, "{}") { // those never get to the rules
			out = append(out, policy.Input{Action: policy.ActionIssue, Caller: policy.Caller{ID: id(q.caller)}, Audience: q.audience})
		}
	}
	return out
}

// Whoever asks gets its own name of a template, and nobody another's: that is as unknown
// as a name that nothing declares.
func TestTemplates(t *testing.T) {
	p := load(t, policy.Config{Dir: written(t, map[string]string{"more.yaml": templates})})
	for _, c := range []struct {
		caller, audience, template, reason string
	}{
		{"/ns/shop/payments", "minio/shop", "minio/{segment.2}", ""},
		{"/ns/other/reports", "minio/other", "minio/{segment.2}", ""},
		{"/ns/shop/payments", "minio/other", "", "audience_unknown"},
		{"/ns/shop/payments", "minio/", "", "audience_unknown"},
		{"/ns/shop/payments", "minio/shop/", "", "audience_unknown"},
		{"/ns/shop/payments", "minio/shop/payments", "", "audience_unknown"},
		{"/ns/shop/payments", "minio/sho", "", "audience_unknown"},
		{"/ns/shop/payments", "minio/{segment.2}", "", "audience_unknown"},
		{"/ns/shop/payments", "{segment.1}://{segment.2}", "", "audience_unknown"},
		{"/ns", "minio/", "", "audience_unknown"},
		{"/ns/orders", "minio/orders", "", "no_entitlement"}, // declared by itself, for others
		{"/ns/other/reports", "aws:dayfly.test:ns/other/reports", "aws:{trust_domain}:{path}", ""},
		{"/ns/other/reports", "aws:dayfly.test:ns/other", "", "audience_unknown"},
		{"/ns/other/reports", "aws:elsewhere.test:ns/other/reports", "", "audience_unknown"},
		{"/ns/shop/payments", "aws:dayfly.test:ns/shop/payments", "aws:{trust_domain}:{path}", "no_entitlement"},
		{"/spiffe/dayfly.test", "spiffe://dayfly.test", "", "audience_unknown"},
	} {
		d, err := p.Decide(t.Context(), policy.Input{Action: policy.ActionIssue, Caller: policy.Caller{ID: id(c.caller)}, Audience: c.audience})
		if err != nil {
			t.Fatal(err)
		}
		var want []string
		if c.reason != "" {
			want = []string{c.reason}
		}
		if d.Allow != (want == nil) || !slices.Equal(reasons(d), want) || d.Template != c.template {
			t.Errorf("%s asks for %s: %+v", c.caller, c.audience, d)
		}
	}
	onward := policy.Input{Action: policy.ActionExchange, Caller: policy.Caller{ID: id("/ns/shop/orders")}, ParentAudience: "orders", Audience: "aws:dayfly.test:ns/shop/orders"}
	if d, err := p.Decide(t.Context(), onward); err != nil || !d.Allow || d.Template == "" {
		t.Errorf("exchange: %+v, %v", d, err)
	}
	onward.Audience = "aws:dayfly.test:ns/shop/payments"
	if d, err := p.Decide(t.Context(), onward); err != nil || d.Allow {
		t.Errorf("exchange into another's: %+v, %v", d, err)
	}

	// What the broker asks of an audience, whoever got a token for it.
	if a, ok := p.Audience("minio/shop"); !ok || a.Owner != "storage team" || a.VerifiedBy != policy.VerifiedByExternal || a.Name != "minio/shop" {
		t.Errorf("audience: %+v, %v", a, ok)
	}
	for _, none := range []string{"minio/", "minio/a/b", "minio/{segment.2}", "spiffe://x"} {
		if a, ok := p.Audience(none); ok {
			t.Errorf("audience %s: %+v", none, a)
		}
	}
	if f := p.Fallback(id("/ns/shop/payments"), "minio/shop"); f.Text != "wait" {
		t.Errorf("fallback: %+v", f)
	}
	e, err := p.Explain(t.Context(), policy.Input{Action: policy.ActionIssue, Caller: policy.Caller{ID: id("/ns/shop/payments")}, Audience: "minio/shop"})
	if text := e.String(); err != nil || !strings.Contains(text, "template minio/{segment.2} gives this caller its audience") ||
		!strings.Contains(text, `data.dayfly.entitlements["spiffe://dayfly.test/ns/*"]["minio/{segment.2}"]  (more.yaml:8)`) {
		t.Errorf("explained: %v\n%s", err, text)
	}
}

// Two identities that a template tells apart never share a name: every template of up to
// three placeholders, over identities made of few letters, which separators use too.
func TestTemplatesTellApart(t *testing.T) {
	var identities []spiffeid.ID
	segments := []string{"a", "-", "a-a", "a-", "-a", "aa"}
	for _, domain := range []string{"a", "a-a"} {
		for _, one := range segments {
			identities = append(identities, spiffeid.RequireFromString("spiffe://"+domain+"/"+one))
			for _, two := range segments {
				identities = append(identities, spiffeid.RequireFromString("spiffe://"+domain+"/"+one+"/"+two))
			}
		}
	}
	holes := []string{"{trust_domain}", "{path}", "{segment.1}", "{segment.2}"}
	fill := func(id spiffeid.ID, text string) string {
		path := strings.TrimPrefix(id.Path(), "/")
		two := append(strings.Split(path, "/"), "")
		return strings.NewReplacer(holes[0], id.TrustDomain().Name(), holes[1], path, holes[2], two[0], holes[3], two[1]).Replace(text)
	}
	names := []string{"x:"}
	accepted := 0
	for range 3 {
		var longer []string
		for _, name := range names {
			for _, h := range holes {
				for _, between := range []string{"", "/", "-", "a/"} {
					longer = append(longer, name+h+between)
				}
			}
		}
		names = longer
		for _, name := range names {
			if !policy.IsTemplate(name) {
				continue
			}
			accepted++
			given := map[string]spiffeid.ID{}
			for _, id := range identities {
				own := fill(id, name)
				whole := !strings.Contains(name, "{segment.2}") || strings.Count(id.Path(), "/") == 2
				if policy.Gives(name, id, own) != whole {
					t.Fatalf("%s gives %s its own name %q: %v", name, id, own, !whole)
				}
				if other, twice := given[own]; twice && whole {
					for _, h := range holes {
						if strings.Contains(name, h) && fill(id, h) != fill(other, h) {
							t.Fatalf("%s gives %q to %s and to %s", name, own, id, other)
						}
					}
				}
				if whole {
					given[own] = id
				}
			}
		}
	}
	if accepted < 100 || accepted == len(names) {
		t.Errorf("%d of %d were templates", accepted, len(names))
	}
}

// Templates are looked at only where a name isn't declared by itself.
func TestTemplatesCostNothingElsewhere(t *testing.T) {
	in := policy.Input{Action: policy.ActionIssue, Caller: policy.Caller{ID: id("/ns/shop/payments")}, Audience: "orders", Time: time.Unix(1, 0)}
	allocs := func(files map[string]string) float64 {
		p := load(t, policy.Config{Dir: written(t, files)})
		return testing.AllocsPerRun(100, func() {
			if d, err := p.Decide(t.Context(), in); err != nil || !d.Allow {
				t.Fatal(d, err)
			}
		})
	}
	if without, with := allocs(nil), allocs(map[string]string{"more.yaml": templates}); with > without*1.1 {
		t.Errorf("%v allocations without templates, %v with some", without, with)
	}
}
