package revocation_test

import (
	"strings"
	"testing"

	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
)

var goodSelectors = []string{
	"grant:d5StDUgBoghG_gBhYWFhYWFh",
	"identity:spiffe://example.org/ns/prod/sa/payments",
	"identity:spiffe://example.org",
	"subtree:spiffe://example.org/ns/prod/*",
	"trust_domain:example.org",
	"audience:ledger",
	"audience:spiffe://example.org/ns/prod/sa/ledger",
	"audience:a:b",
	"svid:01fe0000000000000000000000000000",
	"key:aWT514Vy",
	"everything",
}

var badSelectors = []string{
	"", ":", "everything:", "everything:x", "Everything", "EVERYTHING", " everything", "payments", "grant", "grant:", "identity:", "subtree:",
	"trust_domain:", "audience:", "svid:", "key:", ":x", "Identity:spiffe://example.org/a", "user:x", "identity :spiffe://example.org/a",
	"grant:AAAAAAAAAAAAAAAAAAAAAAAA", "grant:AAAA", "grant:d5StDUgBoghG_gBhYWFh\n\n\n\n", "grant:d5StDUgBoghG_gBhYWFhYWFh ",
	"identity:example.org/a", "identity:spiffe://example.org/a/", "identity:spiffe://example.org/a/*", "identity:spiffe://Example.org/a",
	"identity:spiffe://example.org/a//b", "identity:spiffe://example.org/../b", "identity:https://example.org/a", "identity: spiffe://example.org/a",
	"subtree:spiffe://example.org/ns/prod", "subtree:spiffe://example.org/ns/prod/", "subtree:spiffe://example.org/ns/prod*", "subtree:spiffe://example.org/*",
	"subtree:spiffe://example.org/ns/*/*", "subtree:spiffe://example.org/ns/*/sa/*", "subtree:*", "subtree:/*", "subtree:spiffe://*", "subtree:spiffe://example.org/ns//*",
	"subtree:spiffe://example.org/ns/**", "subtree:spiffe://example.org/ns/prod/*\n",
	"identity:spiffe://example.org/%2e%2e/b", "identity:spiffe://example.org/a%2fb", "identity:spiffe://example.org/a\x00", "identity:spiffe://root@example.org/a",
	"identity:spiffe://example.org:443/a", "identity:spiffe://ex\u0430mple.org/a", "identity:spiffe://example.org\u2215a", "identity:spiffe://example.org/a?b", "identity:spiffe://example.org/a#b",
	"subtree:spiffe://example.org/ns/prod//*", "subtree:spiffe://example.org/../*", "subtree:spiffe://example.org/./*", "subtree:spiffe://example.org/ns/%2a/*", "subtree:spiffe://*/ns/*",
	"subtree:spiffe://example.org/ns/pr*d/*", "subtree:spiffe://example.org/ns/prod/*/", "subtree:spiffe://example.org/ns/prod/?", "subtree:spiffe://Example.org/ns/*",
	"trust_domain:example.org:443", "trust_domain:root@example.org", "trust_domain:ex\u0430mple.org", "trust_domain:example.org\x00",
	"trust_domain:spiffe://example.org", "trust_domain:example.org/a", "trust_domain:spiffe://example.org/a", "trust_domain:Example.org", "trust_domain:*",
	"audience:a b", "audience:a\n", "audience:" + strings.Repeat("a", 513),
	"svid:00000000000000000000000000000000", "svid:01FE0000000000000000000000000000", "svid:01fe", "key:short", "key:aWT514V=", "key:AAAA\n\n\n\n",
}

func TestParse(t *testing.T) {
	for _, s := range goodSelectors {
		sel, err := revocation.Parse(s)
		if err != nil {
			t.Errorf("%q: %v", s, err)
			continue
		}
		if sel.String() != s {
			t.Errorf("%q is written %q", s, sel)
		}
		if again, err := revocation.New(sel.Kind(), sel.Value()); err != nil || again != sel {
			t.Errorf("%q from its kind and value: %q, %v", s, again, err)
		}
	}
	for _, s := range badSelectors {
		if sel, err := revocation.Parse(s); err == nil || sel != (revocation.Selector{}) {
			t.Errorf("%q is the selector %q, %v", s, sel, err)
		}
	}
}

// TestParseQuotesNoToken: a leaked token pasted where a selector belongs stays out
// of the error.
func TestParseQuotesNoToken(t *testing.T) {
	const leaked = "eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJ4In0.c2ln"
	for _, s := range []string{leaked, "grant:" + leaked, "key:" + leaked, "svid:" + leaked, "identity:" + leaked, "subtree:" + leaked + "/*", "trust_domain:" + leaked, leaked + ":x"} {
		if _, err := revocation.Parse(s); err == nil || strings.Contains(err.Error(), "eyJ") {
			t.Errorf("%q: %v", s, err)
		}
	}
}

// FuzzSelector: whatever parses has one spelling, and doesn't kill the zero subject
// unless it says everything.
func FuzzSelector(f *testing.F) {
	for _, s := range append(append([]string(nil), goodSelectors...), badSelectors...) {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		sel, err := revocation.Parse(s)
		if err != nil {
			return
		}
		if sel.String() != s {
			t.Errorf("%q is written %q", s, sel)
		}
		if again, err := revocation.New(sel.Kind(), sel.Value()); err != nil || again != sel {
			t.Errorf("%q from its kind and value: %q, %v", s, again, err)
		}
		if sel.Matches(revocation.Subject{}) != (sel.Kind() == revocation.KindEverything) {
			t.Errorf("%q and the empty subject: %t", s, sel.Matches(revocation.Subject{}))
		}
		set := revocation.NewSet(era)
		set.Know(1, sumAt(1))
		set.Add(1, sel)
		if set.Len() != 1 {
			t.Errorf("%q: a set of it holds %d", s, set.Len())
		}
		sub := chain(t, 0)
		if got, want := set.Judge(sub).Reason != revocation.Alive, sel.Matches(sub); got != want {
			t.Errorf("%q: the set says %t, Matches %t", s, got, want)
		}
	})
}

func TestSelectorSeeds(t *testing.T) {
	kinds := map[revocation.Kind]bool{}
	for _, s := range goodSelectors {
		if sel, err := revocation.Parse(s); err == nil {
			kinds[sel.Kind()] = true
		}
	}
	if len(kinds) != 8 || len(badSelectors) < 40 {
		t.Errorf("seeds of %d kinds and %d bad ones, want 8 and at least 40", len(kinds), len(badSelectors))
	}
}

// TestCaller: what a lock looks at, before there is a grant.
func TestCaller(t *testing.T) {
	c := chain(t, 0).Lineage[0]
	for name, sel := range matching(t) {
		want := strings.HasPrefix(name, "root") && sel.Kind() != revocation.KindGrant || sel.Kind() == revocation.KindEverything
		if got := sel.MatchesCaller(c.Identity, c.SVID); got != want {
			t.Errorf("%s: %t, want %t", name, got, want)
		}
	}
	for name, sel := range sparing(t) {
		if sel.MatchesCaller(c.Identity, c.SVID) || sel.MatchesCaller(c.Identity, token.Thumbprint{}) {
			t.Errorf("%s matches", name)
		}
	}
	lockable := map[revocation.Kind]bool{
		revocation.KindIdentity: true, revocation.KindSubtree: true, revocation.KindTrustDomain: true, revocation.KindSVID: true,
	}
	for _, s := range goodSelectors {
		sel := must(revocation.Parse(s))
		if sel.Lockable() != lockable[sel.Kind()] {
			t.Errorf("%s: lockable is %t", sel, sel.Lockable())
		}
	}
	if (revocation.Selector{}).Lockable() {
		t.Error("the zero selector is lockable")
	}
}
