package policy_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"pgregory.net/rapid"

	"github.com/dayflyhq/dayfly/policy"
)

// problems returns what is wrong with data, as "line: message".
func problems(data string) []string {
	var out []string
	for _, p := range policy.ParseData("data.yaml", []byte(data)) {
		out = append(out, fmt.Sprintf("%d: %s", p.Line, p.Message))
	}
	return out
}

func TestDataProblems(t *testing.T) {
	const a = "audiences:\n  a: {owner: o, identities: [spiffe://td/a]}\n" // two lines
	for name, c := range map[string]struct {
		data string
		want []string // substrings, one a problem
	}{
		"nothing":          {"", nil},
		"only comments":    {"# nothing\n", nil},
		"empty sections":   {"audiences:\nentitlements:\nexchange:\noperators:\nverifiers:\nlimits:\ncustom:\n", nil},
		"custom anything":  {"custom: {a: [1, {b: null}], c: 1.5, d: true}\n", nil},
		"unknown keys":     {"audience:\nentitlement:\n", []string{`1: unknown key "audience"`, `2: unknown key "entitlement"`}},
		"unknown deep key": {a + "entitlements:\n  spiffe://td/x:\n    a: {scopes: [r], ttll: 5m}\n", []string{`5: unknown key "ttll"`}},
		"a list":           {"- a\n", []string{"1: policy data must be a mapping"}},
		"not YAML":         {"audiences: {\n", []string{"did not find"}},
		"two documents":    {"custom:\n---\ncustom:\n", []string{"a second YAML document"}},
		"twice":            {"custom: {}\ncustom: {}\n", []string{`2: "custom" stands here twice, first in line 1`}},
		"an alias":         {"custom:\n  a: &x [1]\n  b: *x\n", []string{"2: anchors", "3: anchors"}},
		"an anchored list": {"operators:\n  spiffe://td/a: &x [list]\n  spiffe://td/b: *x\n", []string{"2: must be a list", "3: must be a list"}},
		"no owner":         {"audiences:\n  a: {identities: [spiffe://td/a]}\n", []string{`2: audience "a" has no owner`}},
		"no identities":    {"audiences:\n  a: {owner: o}\n", []string{`2: audience "a" has no identities`}},
		"external":         {"audiences:\n  a: {owner: o, verified_by: external}\n", nil},
		"a template":       {"audiences:\n  \"m/{segment.1}:{trust_domain}/{path}\": {owner: o, verified_by: external}\n", nil},
		"templates that are none": {`audiences:
  "m/{segment}": {owner: o, verified_by: external}
  "m/{segment.0}": {owner: o, verified_by: external}
  "m/{segment.01}": {owner: o, verified_by: external}
  "m/{segment.100}": {owner: o, verified_by: external}
  "m/{name": {owner: o, verified_by: external}
  "m/name}": {owner: o, verified_by: external}
  "m/{}": {owner: o, verified_by: external}
  "m/{{path}}": {owner: o, verified_by: external}
  "spiffe://td/{path}": {owner: o, verified_by: external}
  "{segment.1}{segment.2}": {owner: o, verified_by: external}
  "{segment.1}-x.{segment.2}": {owner: o, verified_by: external}
  "m {path}": {owner: o, verified_by: external}
`, []string{`2: audience "m/{segment}": unknown placeholder {segment}`, "3: ", "4: ", "5: ", "6: ", "7: ", "8: ", "9: ", "10: ", "11: ", "12: ", "13: "}},
		"a template that a feed verifies": {"audiences:\n  \"m/{path}\": {owner: o, identities: [spiffe://td/a]}\n", []string{`2: audience "m/{path}" has placeholders: it needs "verified_by: external"`}},
		"a template to exchange from, or to follow": {"audiences:\n  \"m/{path}\": {owner: o, verified_by: external}\nexchange:\n  spiffe://td/x:\n    \"m/{path}\": {}\nverifiers:\n  spiffe://td/x: {follow: [\"m/{path}\"]}\n",
			[]string{"5: nobody answers", "7: audience \"m/{path}\" has placeholders"}},
		"an undeclared template": {"entitlements:\n  spiffe://td/x:\n    \"m/{path}\": {scopes: []}\n", []string{`3: audience "m/{path}" isn't declared`}},
		"SPIFFE audience":        {"audiences:\n  spiffe://td/a: {owner: o}\n", nil},
		"SPIFFE audience with identities": {"audiences:\n  spiffe://td/a: {owner: o, identities: [spiffe://td/b]}\n",
			[]string{"only that identity answers to"}},
		"a bad SPIFFE audience": {"audiences:\n  spiffe://TD/a: {owner: o}\n", []string{"isn't a SPIFFE ID"}},
		"a star audience":       {"audiences:\n  \"*\": {owner: o}\n", []string{"a SPIFFE ID or a name"}},
		"bad values": {"audiences:\n  a:\n    owner: 5\n    verified_by: magic\n    identities: a\n    max_staleness: 30\n    on_stale: maybe\n",
			[]string{"3: must be a string", "4: must be one of feed", "5: must be a list", "6: must be a duration", "7: must be one of refuse", "2: audience \"a\" has no owner", "2: audience \"a\" has no identities"}},
		"undeclared audiences": {"entitlements:\n  spiffe://td/x:\n    b: {scopes: [r]}\nverifiers:\n  spiffe://td/x: {follow: [c]}\n",
			[]string{`3: audience "b" isn't declared`, `5: audience "c" isn't declared`}},
		"patterns": {"operators:\n  spiffe://td: []\n  spiffe://td/a*: []\n  spiffe://td/*/b: []\n  td/a: []\n  spiffe://td/a/: []\n  spiffe://td/*: []\n  spiffe://*: []\n",
			[]string{"2: pattern", "3: pattern", "4: pattern", "5: pattern", "6: pattern", "8: pattern"}},
		"entitlement values": {a + "entitlements:\n  spiffe://td/x:\n    a: {default_scopes: [w], ttl: 999ms, binding: tls}\n",
			[]string{"5: must be at least 1s", "5: must be one of spiffe", "5: no scopes", `5: default scope "w"`}},
		"scopes": {a + "entitlements:\n  spiffe://td/x:\n    a: {scopes: [r, r, \"a b\", \"\", 5]}\n",
			[]string{"twice", `scope "a b"`, `scope ""`, "must be a string"}},
		"an unknown operator action": {"operators:\n  spiffe://td/x: [revoke, drop]\n", []string{`2: unknown action "drop"`}},
		"relay":                      {"verifiers:\n  spiffe://td/x: {follow: [\"*\"], relay: \"yes\"}\n", []string{"2: must be true or false"}},
		"limits": {"limits:\n  spiffe://td/x: {issue_per_second: 0, live_grants: -1, give_backs_per_minute: 0}\n",
			[]string{"2: must be a whole number", "2: must be a whole number", "2: must be a whole number"}},
		"introspectors": {a + "introspectors:\n  spiffe://td/x: [a, \"*\"]\n  spiffe://td/y: []\n", nil},
		"introspectors, wrong": {"introspectors:\n  spiffe://td/x: [b]\n  td/y: []\n  spiffe://td/z: {follow: []}\n",
			[]string{`2: audience "b" isn't declared`, "3: pattern", "4: must be a list"}},
		"lift":            {"lift: {two_person: true, within: 30m}\n", nil},
		"lift, commented": {"lift:\n#  two_person: true\n", nil},
		"lift, wrong":     {"lift: {two_person: 2, within: 2h, who: me}\n", []string{"1: must be true or false", "1: must be at most 1h", `1: unknown key "who"`}},
		"lift, no time":   {"lift: {within: 0s}\n", []string{"1: must be at least 1s"}},
		"a huge limit":    {"limits:\n  spiffe://td/x: {live_grants: 99999999999999999999}\n", []string{"2: must be a whole number"}},
	} {
		t.Run(name, func(t *testing.T) {
			got := problems(c.data)
			if len(got) != len(c.want) {
				t.Fatalf("got %d problems, want %d:\n%s", len(got), len(c.want), strings.Join(got, "\n"))
			}
			for _, w := range c.want {
				if !slices.ContainsFunc(got, func(g string) bool { return strings.Contains(g, w) }) {
					t.Errorf("no problem says %q:\n%s", w, strings.Join(got, "\n"))
				}
			}
		})
	}
}

func TestDataJSON(t *testing.T) {
	data := "{\n\t\"audiences\": {\"a\": {\"owner\": \"o\",\t\"identities\": [\"spiffe://td/a\"]}}\n}\n"
	if got := policy.ParseData("data.json", []byte(data)); got != nil {
		t.Errorf("got %v", got)
	}
}

func TestCheckSaysEverythingAtOnce(t *testing.T) {
	dir := written(t, map[string]string{
		"data.yaml":        "nonsense:\naudiences:\n  a: {}\n",
		"more.yaml":        "audiences:\n  b: {owner: o, identities: [spiffe://td/b]}\n",
		"same.yaml":        "audiences:\n  b: {owner: o, identities: [spiffe://td/b]}\n",
		"broken.rego":      "package x\nfoo {",
		"broken_test.rego": "package x_test\n\ntest_x if nowhere(1",
	})
	err := policy.Check(dir)
	var list policy.Problems
	if !errors.As(err, &list) {
		t.Fatalf("got %v, want Problems", err)
	}
	for _, want := range []string{"data.yaml:1: ", "data.yaml:3: ", "same.yaml:2: audiences[\"b\"] is already in more.yaml:2", "broken.rego:2: ", "broken_test.rego:3: "} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("Check doesn't say %q:\n%v", want, err)
		}
	}
	put(t, dir, "broken.rego", "package x\n\ny if http.send({})\n\nz if undefined_fn(1)")
	put(t, dir, "broken_test.rego", "package x_test\n\ntest_x if nowhere(1)")
	err = policy.Check(dir)
	for _, want := range []string{"broken.rego:3: ", "broken.rego:5: ", "broken_test.rego:3: "} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Check doesn't say %q:\n%v", want, err)
		}
	}
}

func TestCheckRulesThatNeedTheirTests(t *testing.T) {
	dir := written(t, map[string]string{"mine.rego": "package mine\n\nx if data.mine.helper(1)", "mine_test.rego": "package mine\n\nhelper(x) if x == 1"})
	if err := policy.Check(dir); err == nil || !strings.Contains(err.Error(), "mine.rego:3: ") {
		t.Errorf("got %v", err)
	}
}

func TestLoadRefusesAFolderWithoutPolicy(t *testing.T) {
	for name, fsys := range map[string]fs.FS{
		"empty":          fstest.MapFS{},
		"data only":      fstest.MapFS{"data.yaml": {Data: []byte("audiences:\n")}},
		"tests only":     fstest.MapFS{"policy_test.rego": {Data: []byte("package policy\ndecision := {}")}},
		"truncated data": fstest.MapFS{"policy.rego": {Data: []byte("package policy\ndecision := {}")}, "data.yaml": {}},
		"no decision":    fstest.MapFS{"policy.rego": {Data: []byte("package policy\nx := 1")}},
		"old Rego":       fstest.MapFS{"policy.rego": {Data: []byte("package policy\ndecision[x] { x := 1 }")}},
		"rules over data": fstest.MapFS{"policy.rego": {Data: []byte("package policy\ndecision := {}")},
			"x.rego": {Data: []byte("package dayfly\nentitlements := {}")}},
	} {
		if _, err := policy.Load(t.Context(), policy.Config{FS: fsys}); err == nil {
			t.Errorf("%s: loaded", name)
		}
	}
	if _, err := policy.Load(t.Context(), policy.Config{Dir: filepath.Join(t.TempDir(), "absent")}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("absent folder: got %v", err)
	}
	if _, err := policy.Load(t.Context(), policy.Config{}); err == nil {
		t.Error("neither Dir nor FS: loaded")
	}
}

func TestWriteDefault(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "new", "policy")
	if err := policy.WriteDefault(dir); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(dir)
	if err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("folder: %v, %v", info.Mode(), err)
	}
	info, err = os.Stat(filepath.Join(dir, "data.yaml"))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("data.yaml: %v, %v", info.Mode(), err)
	}
	if err := policy.WriteDefault(dir); !errors.Is(err, fs.ErrExist) {
		t.Errorf("written over: %v", err)
	}
}

// TestDefaultExamplesAreValid takes the comment signs off the newcomer's file.
func TestDefaultExamplesAreValid(t *testing.T) {
	b, err := fs.ReadFile(policy.Default(), "data.yaml")
	if err != nil {
		t.Fatal(err)
	}
	// Examples are "#" and two spaces; ledger is declared only here.
	_, examples, _ := strings.Cut(string(b), "\naudiences:\n")
	data := strings.ReplaceAll("\naudiences:\n"+examples, "\n#  ", "\n  ")
	data = strings.Replace(data, "audiences:\n", "audiences:\n  ledger: {owner: o, identities: [spiffe://example.org/ledger]}\n", 1)
	if got := problems(data); got != nil {
		t.Errorf("%s\n%s", strings.Join(got, "\n"), data)
	}
}

func TestTestReportsFailures(t *testing.T) {
	dir := written(t, map[string]string{"mine_test.rego": "package mine_test\n\ntest_wrong if {\n\tprint(\"seen\")\n\t1 == 2\n}\n"})
	var out strings.Builder
	_, err := policy.Test(t.Context(), dir, &out)
	if !errors.Is(err, policy.ErrTestsFailed) {
		t.Errorf("got %v", err)
	}
	for _, want := range []string{"FAIL  data.mine_test.test_wrong", "mine_test.rego:3", "seen", "1 failed"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in:\n%s", want, &out)
		}
	}
}

func TestPatternsOfAnIdentity(t *testing.T) {
	for in, want := range map[string][]string{
		"spiffe://td":       {"spiffe://td"},
		"spiffe://td/a":     {"spiffe://td/a", "spiffe://td/*"},
		"spiffe://td/a/b/c": {"spiffe://td/a/b/c", "spiffe://td/a/b/*", "spiffe://td/a/*", "spiffe://td/*"},
	} {
		if got := policy.Patterns(spiffeid.RequireFromString(in)); !slices.Equal(got, want) {
			t.Errorf("%s: got %q, want %q", in, got, want)
		}
	}
}

// TestPatternsMatchWholeSegments compares the look-up with the definition: a
// subtree holds an identity if its segments are a proper prefix.
func TestPatternsMatchWholeSegments(t *testing.T) {
	segment := rapid.SampledFrom([]string{"a", "aa", "a.b", "b", "ns", "nsx"})
	rapid.Check(t, func(t *rapid.T) {
		who := rapid.SliceOfN(segment, 1, 5).Draw(t, "identity")
		base := rapid.SliceOfN(segment, 0, 5).Draw(t, "base")
		td := rapid.SampledFrom([]string{"td", "td.x"}).Draw(t, "trust domain")
		id := spiffeid.RequireFromString("spiffe://td/" + strings.Join(who, "/"))
		path := strings.Join(append([]string{"spiffe://" + td}, base...), "/")

		exact := td == "td" && slices.Equal(base, who)
		if got := slices.Contains(policy.Patterns(id), path); len(base) > 0 && got != exact {
			t.Fatalf("%s matches %s: %v, want %v", path, id, got, exact)
		}
		below := td == "td" && len(base) < len(who) && slices.Equal(base, who[:len(base)])
		if got := slices.Contains(policy.Patterns(id), path+"/*"); got != below {
			t.Fatalf("%s/* matches %s: %v, want %v", path, id, got, below)
		}
	})
}

// TestRegoHelperAgrees holds the helper of Rego tests to what Go sends.
func TestRegoHelperAgrees(t *testing.T) {
	var b strings.Builder
	b.WriteString("package agree_test\n\nimport data.testing\n")
	for i, s := range []string{"spiffe://td/a", "spiffe://td/a/b/c", "spiffe://dayfly.test/ns/shop/orders"} {
		fmt.Fprintf(&b, "\ntest_%d if testing.patterns(%q) == [\"%s\"]\n", i, s,
			strings.Join(policy.Patterns(spiffeid.RequireFromString(s)), `", "`))
	}
	b.WriteString(`
test_names if testing.caller("spiffe://dayfly.test/ns/shop/orders").names == ["orders"]

test_path if testing.caller("spiffe://dayfly.test/ns/shop/orders").path == "/ns/shop/orders"

test_ask if testing.ask("spiffe://dayfly.test/ns/shop/payments", "issue", {"audience": "orders"}).allow

test_exchange if testing.ask("spiffe://dayfly.test/ns/shop/orders", "exchange", {
	"audience": "ledger",
	"parent": {"audience": "orders", "scopes": ["ledger.read"], "lineage": []},
}).allow
`)
	p := load(t, policy.Config{Dir: written(t, map[string]string{"more.yaml": templates})})
	for i, in := range templateQuestions() {
		e, err := p.Explain(t.Context(), in)
		if err != nil {
			t.Fatal(err)
		}
		asked := e.Input.(map[string]any)
		fmt.Fprintf(&b, "\ntest_template_%d if {\n\tq := testing.question(%q, \"issue\", {\"audience\": %q})\n\tq.match == %q\n\tq.target == %q\n}\n",
			i, in.Caller.ID, in.Audience, asked["match"], asked["target"])
	}
	dir := written(t, map[string]string{"agree_test.rego": b.String(), "more.yaml": templates})
	var out strings.Builder
	if _, err := policy.Test(t.Context(), dir, &out); err != nil {
		t.Errorf("%v\n%s", err, &out)
	}
}

func FuzzData(f *testing.F) {
	for _, fsys := range []fs.FS{policy.Default(), policy.Demo()} {
		b, err := fs.ReadFile(fsys, "data.yaml")
		if err != nil || len(b) == 0 {
			f.Fatalf("no seed: %v", err)
		}
		f.Add(b)
	}
	for _, s := range []string{"", "{", "- 1", "a: &a [*a]", "audiences: {a: {owner: o, identities: [spiffe://td/a]}}",
		"custom: {a: .nan, b: 0x10, c: 2026-11-23, <<: {}}", "? [a]\n: b", "custom: !!binary aGk=", "limits: {spiffe://td/*: {live_grants: 1}}"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		list := policy.ParseData("data.yaml", b)
		if again := policy.ParseData("data.yaml", b); len(again) != len(list) {
			t.Errorf("%d problems, then %d", len(list), len(again))
		}
		lines := 1 + strings.Count(string(b), "\n") + strings.Count(string(b), "\r") +
			strings.Count(string(b), "\u0085") + strings.Count(string(b), "\u2028") + strings.Count(string(b), "\u2029")
		for _, p := range list {
			if p.Message == "" || p.Line < 0 || p.Line > lines+1 {
				t.Errorf("problem %+v in %d lines", p, lines)
			}
		}
	})
}
