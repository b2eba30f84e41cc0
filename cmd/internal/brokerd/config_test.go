package brokerd_test

import (
	"errors"
	"os"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/cmd/internal/brokerd"
	"github.com/dayflyhq/dayfly/cmd/internal/config"
)

const example = "../../../deploy/broker.yaml"

func readExample(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile(example)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// keysOf lists the yaml keys of a configuration, with what lies in them.
func keysOf(typ reflect.Type, into map[string]reflect.StructField) {
	for f := range typ.Fields() {
		name, _, _ := strings.Cut(f.Tag.Get("yaml"), ",")
		if name == "" {
			continue
		}
		into[name] = f
		if f.Type == reflect.TypeFor[brokerd.Listen]() {
			keysOf(f.Type, into)
		}
	}
}

// A key that the example leaves out is there as a comment: "# traces: ...".
var commentedKey = regexp.MustCompile(`(?m)^( *)# ([a-z_]+: .*)$`)

func TestExampleHasEveryKey(t *testing.T) {
	text := readExample(t)
	keys := map[string]reflect.StructField{}
	keysOf(reflect.TypeFor[brokerd.Config](), keys)
	if len(keys) < 10 {
		t.Fatalf("found only the keys %v", keys)
	}
	for key := range keys {
		if !regexp.MustCompile(`(?m)^ *(# )?` + key + `:( |$)`).MatchString(text) {
			t.Errorf("%s says nothing of the key %q", example, key)
		}
	}
}

func TestExampleLoads(t *testing.T) {
	cfg := brokerd.Defaults()
	if err := config.Load(example, &cfg); err != nil {
		t.Fatal(err)
	}
	// What it gives for an optional setting is the default, as it says.
	want := brokerd.Defaults()
	want.Issuer, want.Store, want.Policy, want.Audit = cfg.Issuer, cfg.Store, cfg.Policy, cfg.Audit
	want.WorkloadAPI, want.Listen = cfg.WorkloadAPI, cfg.Listen
	if !reflect.DeepEqual(cfg, want) {
		t.Errorf("the example isn't the default\n got %+v\nwant %+v", cfg, want)
	}
}

func TestExampleLoadsWithEveryKey(t *testing.T) {
	text := commentedKey.ReplaceAllString(readExample(t), "$1$2")
	cfg := brokerd.Defaults()
	if err := config.Parse("broker.yaml", []byte(text), &cfg); err != nil {
		t.Fatal(err)
	}
	keys := map[string]reflect.StructField{}
	keysOf(reflect.TypeFor[brokerd.Config](), keys)
	top := reflect.ValueOf(cfg)
	for key, f := range keys {
		v := top.FieldByName(f.Name)
		if !v.IsValid() {
			v = top.FieldByName("Listen").FieldByName(f.Name)
		}
		if key == "policy_bundle" {
			continue // instead of policy: TestExampleOfABundle
		}
		if key != "log_level" && v.IsZero() { // info is the zero level
			t.Errorf("the key %q is nowhere in %s, not even as a comment", key, example)
		}
	}
}

// The example's bundle, without its folder, loads once its comments are taken off.
func TestExampleOfABundle(t *testing.T) {
	text := regexp.MustCompile(`(?m)^policy: .*$`).ReplaceAllString(readExample(t), "")
	before, block, _ := strings.Cut(text, "# policy_bundle:\n")
	block, after, _ := strings.Cut(block, "\n\n")
	block = regexp.MustCompile(`(?m)^#`).ReplaceAllString(block, "")
	cfg := brokerd.Defaults()
	if err := config.Parse("broker.yaml", []byte(before+"policy_bundle:\n"+block+"\n\n"+after), &cfg); err != nil {
		t.Fatal(err)
	}
	v := reflect.ValueOf(*cfg.PolicyBundle)
	for i := range v.NumField() {
		if name := v.Type().Field(i).Name; v.Field(i).IsZero() != (name == "ServerID") {
			t.Errorf("%s says nothing of policy_bundle's %s, or gives both ca and server_id", example, name)
		}
	}
	if !strings.Contains(block, "# server_id: ") {
		t.Errorf("%s says nothing of server_id", example)
	}
}

// minimal has nothing but what is required.
const minimal = `issuer: https://b.example.org
store: /s
policy: /p
audit: "-"
listen:
  grpc: 127.0.0.1:0
`

const bundled = `policy_bundle:
  url: https://bundles.example.org/dayfly.tar.gz
  keys: {k1: /k1.pem}
  server_id: spiffe://example.org/bundles
  poll: 30s
`

// onlyBundle is a configuration with a bundle instead of a folder, and a change in it.
func onlyBundle(old, now string) string {
	return strings.Replace(minimal, "policy: /p\n", "", 1) + strings.Replace(bundled, old, now, 1)
}

func TestBundleConfig(t *testing.T) {
	cfg := brokerd.Defaults()
	if err := config.Parse("b.yaml", []byte(onlyBundle("", "")), &cfg); err != nil || cfg.PolicyBundle.Keys["k1"] != "/k1.pem" || cfg.PolicyBundle.Poll != 30*time.Second {
		t.Errorf("got %+v, %v", cfg.PolicyBundle, err)
	}
}

func TestMinimalConfig(t *testing.T) {
	cfg := brokerd.Defaults()
	if err := config.Parse("b.yaml", []byte(minimal), &cfg); err != nil {
		t.Error(err)
	}
}

func TestBadConfig(t *testing.T) {
	for name, c := range map[string]struct {
		text string
		want []string // beginnings of the lines of the error
	}{
		"empty": {"", []string{
			"b.yaml:1: issuer: is required", "b.yaml:1: store: is required", "b.yaml:1: audit: is required", "b.yaml:1: listen: is required",
			"b.yaml:1: policy: is missing",
		}},
		"all at once, by line": {`issuer: broker.example.org
stor: /s
store: /s
policy: 7
audit: "-"
listen:
  grpc: 8443
  public: localhost
  admin: ":9090"
  break_glass: run/glass.sock
max_ttl: 2h
key_rotation: 13h
algorithm: PS256
trust_domains: ["Not A Domain"]
log_level: chatty
shutdown_grace: -1s
workload_api: /run/spire.sock
traces: 127.0.0.1:4317
`, []string{
			"b.yaml:1: issuer: not an absolute URL",
			`b.yaml:2: unknown key "stor": did you mean "store"?`,
			"b.yaml:4: policy: wants text",
			"b.yaml:7: listen.grpc: wants text",
			"b.yaml:8: listen.public: is HOST:PORT",
			"b.yaml:9: listen.admin: is a loopback address",
			"b.yaml:10: listen.break_glass: is an absolute path",
			"b.yaml:11: max_ttl: is between 1s and the hard cap of 1h",
			"b.yaml:12: key_rotation: is between 1s and 12h",
			"b.yaml:13: algorithm: is ES256, EdDSA or RS256",
			"b.yaml:14: trust_domains[0]: ",
			"b.yaml:15: log_level: ",
			`b.yaml:16: shutdown_grace: "-1s" is negative`,
			"b.yaml:17: workload_api: ",
			"b.yaml:18: traces: is an http or https URL",
		}},
		"a listener without gRPC": {strings.Replace(minimal, "grpc: 127.0.0.1:0", "admin: 127.0.0.1:0", 1),
			[]string{"b.yaml:6: listen.grpc: is required"}},
		"an issuer over http":           {strings.Replace(minimal, "https:", "http:", 1), []string{"b.yaml:1: issuer: must begin with https://"}},
		"an issuer with a slash":        {strings.Replace(minimal, ".org", ".org/", 1), []string{"b.yaml:1: issuer: must not end with a slash"}},
		"an issuer with a query":        {strings.Replace(minimal, ".org", ".org?a=b", 1), []string{"b.yaml:1: issuer: must have no user, query or fragment"}},
		"an issuer for no token":        {strings.Replace(minimal, ".org", ".org/"+strings.Repeat("x", 512), 1), []string{"b.yaml:1: issuer: has 534 bytes"}},
		"paths that are empty":          {strings.NewReplacer("/s", `""`, "/p", `""`, `"-"`, `""`).Replace(minimal), []string{"b.yaml:2: store: is empty", "b.yaml:3: policy: is missing", "b.yaml:4: audit: is empty"}},
		"admin for everybody":           {minimal + "  admin: 0.0.0.0:9090\n", []string{"b.yaml:7: listen.admin: is a loopback address"}},
		"admin under a name":            {minimal + "  admin: broker.example.org:9090\n", []string{"b.yaml:7: listen.admin: is a loopback address"}},
		"a port that is none":           {minimal + "  public: 127.0.0.1:70000\n", []string{"b.yaml:7: listen.public: is HOST:PORT"}},
		"one address for two":           {strings.Replace(minimal, ":0", ":1", 1) + "  admin: 127.0.0.1:1\n", []string{"b.yaml:7: listen.admin: is the address of listen.grpc too"}},
		"a socket with a long path":     {minimal + "  break_glass: /" + strings.Repeat("x", 107) + "\n", []string{"b.yaml:7: listen.break_glass: has 108 bytes"}},
		"no TTL at all":                 {minimal + "max_ttl: 0s\n", []string{"b.yaml:7: max_ttl: is between"}},
		"a rotation of nothing":         {minimal + "key_rotation: 1ms\n", []string{"b.yaml:7: key_rotation: is between"}},
		"a number for a time":           {minimal + "shutdown_grace: 10\n", []string{`b.yaml:7: shutdown_grace: "10" isn't a duration`}},
		"a key given twice":             {minimal + "store: /other\n", []string{"b.yaml:7: store: is given twice, first in line 2"}},
		"a key of the agent's":          {minimal + "sockets:\n  grpc: /x\n", []string{`b.yaml:7: unknown key "sockets"`}},
		"HS256 is no algorithm":         {minimal + "algorithm: HS256\n", []string{"b.yaml:7: algorithm: is ES256, EdDSA or RS256"}},
		"none is no algorithm":          {minimal + "algorithm: none\n", []string{"b.yaml:7: algorithm: is ES256, EdDSA or RS256"}},
		"a folder and a bundle":         {minimal + bundled, []string{"b.yaml:7: policy_bundle: stands beside policy"}},
		"a bundle over http":            {onlyBundle("https", "http"), []string{"b.yaml:7: policy_bundle.url: must begin with https"}},
		"a bundle without keys":         {onlyBundle("{k1: /k1.pem}", "{}"), []string{"b.yaml:8: policy_bundle.keys: is empty"}},
		"a bundle of no server":         {strings.Replace(onlyBundle("", ""), "  url: https://bundles.example.org/dayfly.tar.gz\n", "", 1), []string{"b.yaml:7: policy_bundle.url: is required"}},
		"a hasty bundle":                {onlyBundle("poll: 30s", "poll: 1ms"), []string{"b.yaml:10: policy_bundle.poll: is at least 1s"}},
		"a huge bundle":                 {onlyBundle("poll: 30s", "max_size: 1GiB"), []string{"b.yaml:10: policy_bundle.max_size: is at most 32MiB"}},
		"two ways to trust":             {onlyBundle("poll: 30s", "ca: /ca.pem"), []string{"b.yaml:9: policy_bundle.server_id: stands beside ca"}},
		"plain HTTP for everybody":      {minimal + "  public: \":8080\"\n", []string{"b.yaml:7: listen.public: is a loopback address"}},
		"HTTPS without files":           {minimal + "  https: \":443\"\n", []string{"b.yaml:6: listen.https_certificate: and listen.https go together", "b.yaml:6: listen.https_key: and listen.https go together"}},
		"a key without HTTPS":           {minimal + "  https_key: /k\n", []string{"b.yaml:7: listen.https_key: and listen.https go together"}},
		"HTTPS on a port that's in use": {strings.Replace(minimal, ":0", ":1", 1) + "  https_svid: 127.0.0.1:1\n", []string{"b.yaml:7: listen.https_svid: is the address of listen.grpc too"}},
		"JWT-SVIDs of nobody":           {minimal + "  grpc_jwt: \":1\"\n", []string{"b.yaml:1: grpc_jwt_trust_domains: is empty"}},
		"JWT-SVIDs and no listener":     {minimal + "grpc_jwt_trust_domains: [example.org]\n", []string{"b.yaml:7: grpc_jwt_trust_domains: is of no use"}},
		"a URL that is none":            {minimal + "mutual_tls_url: broker:8445\n", []string{"b.yaml:7: mutual_tls_url: not an absolute URL"}},
		"a domain that's an URL":        {minimal + "trust_domains: [\"https://x\"]\n", []string{"b.yaml:7: trust_domains[0]: "}},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := brokerd.Defaults()
			err := config.Parse("b.yaml", []byte(c.text), &cfg)
			var problems config.Problems
			if !errors.As(err, &problems) {
				t.Fatalf("error is %v, want a list of problems", err)
			}
			got := strings.Split(err.Error(), "\n")
			for i := range max(len(got), len(c.want)) {
				switch {
				case i >= len(c.want):
					t.Errorf("unexpected: %s", got[i])
				case i >= len(got):
					t.Errorf("missing: %s", c.want[i])
				case !strings.HasPrefix(got[i], c.want[i]):
					t.Errorf("problem %d\n got %s\nwant %s", i, got[i], c.want[i])
				}
			}
		})
	}
}
