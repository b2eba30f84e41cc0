package e2e

import (
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/dayflyhq/dayfly"

const (
	grpc      = "google.golang.org/grpc"
	bbolt     = "go.etcd.io/bbolt"
	opa       = "github.com/open-policy-agent/opa"
	goSPIFFE  = "github.com/spiffe/go-spiffe/v2"
	generated = module + "/proto/dayfly"
	// children of the broker, but not the broker: the slash at the end says so
	brokerChildren = module + "/broker/"
)

// ban forbids a path and all below it, or only what is below it when the path
// ends in a slash.
type ban struct{ path, reason string }

// room is a row of the table of the house. Packages below a room without a row of
// their own are part of it.
type room struct {
	path    string
	direct  []ban    // never imported by the room's own files (tests excluded)
	closure []ban    // never compiled by who imports the room
	except  []string // allowed although a ban covers it
}

const (
	bothEnds     = "both ends of the wire share the ground floor"
	pure         = "the rules are pure: no I/O, so a test can step them"
	outlive      = "the core must outlive its adapters"
	disk         = "the store keeps bytes and knows neither the wire nor the policy"
	adapter      = "an adapter reaches the store and the policy through the broker's seams"
	apart        = "keys and policy are one idea each"
	usersCompile = "users of the SDK compile none of it"
	small        = "a sidecar is small"
	unreachable  = "what isn't in the binary can't be reached: make profile builds binaries of its own"
	noWayUp      = "arrows go one way: commands and scenarios are on top"
)

// top is banned in every room but the commands.
var top = []ban{{module + "/cmd", noWayUp}, {module + "/e2e", noWayUp}}

var (
	ground = []ban{
		{grpc, bothEnds}, {generated, bothEnds}, {module + "/broker", bothEnds}, {module + "/sdk", bothEnds},
		{module + "/agent", bothEnds}, {module + "/policy", bothEnds}, {bbolt, bothEnds}, {"go.etcd.io/etcd", bothEnds},
		{opa, bothEnds}, {goSPIFFE, bothEnds},
	}
	noIO       = []ban{{"os", pure}, {"net", pure}, {"database/sql", pure}, {"log", pure}}
	spiffeID   = []string{goSPIFFE + "/spiffeid", goSPIFFE + "/internal", "net/url", "net/netip", "log/slog"} // slog: a token redacts itself
	core       = []ban{{grpc, outlive}, {bbolt, outlive}, {opa, outlive}, {generated, outlive}, {brokerChildren, outlive}, {module + "/policy", outlive}}
	light      = []ban{{module + "/broker", usersCompile}, {module + "/policy", usersCompile}, {module + "/agent", usersCompile}, {bbolt, usersCompile}, {opa, usersCompile}}
	sidecar    = []ban{{module + "/broker", small}, {module + "/policy", small}, {bbolt, small}, {opa, small}}
	unprofiled = []ban{{"net/http/pprof", unreachable}, {module + "/cmd/internal/profile", unreachable}}
	adapters   = []ban{{bbolt, adapter}, {opa, adapter}, {module + "/broker/boltstore", adapter}}
)

// house is the whole table. A package in no room fails the test: a new one needs
// a row here, and a sentence that no existing room could truthfully carry.
var house = []room{
	{path: "proto/dayfly/v1"},
	{path: "proto/dayfly/extauthz/v1"}, // Envoy's questions and answers
	{path: "proto/token", direct: noIO, closure: ground, except: spiffeID},
	{path: "proto/revocation", direct: noIO, closure: ground, except: spiffeID},
	{path: "proto/feed", direct: noIO, closure: ground, except: spiffeID},
	{path: "proto/wire", closure: append(slices.Clip(light), ban{module + "/sdk", bothEnds})},                                                 // the one translation between wire messages and the ground floor's values
	{path: "proto/boottime", closure: append(slices.Clip(light), ban{module + "/sdk", bothEnds})},                                             // the clock that staleness is measured with, on every machine
	{path: "proto/vouch", closure: append(slices.Clip(light), ban{module + "/sdk", bothEnds}, ban{grpc, bothEnds}, ban{generated, bothEnds})}, // statements that a broker's SVID puts its name to: made by the broker, checked at both ends
	{path: "broker", direct: core, closure: core},
	{path: "broker/boltstore", direct: []ban{{grpc, disk}, {generated, disk}, {module + "/policy", disk}, {opa, disk}}},
	{path: "broker/storetest", direct: []ban{{grpc, disk}, {generated, disk}, {module + "/policy", disk}, {opa, disk}, {bbolt, "the suite knows no particular store"}, {module + "/broker/boltstore", "the suite knows no particular store"}}},
	{path: "broker/keys", direct: []ban{{grpc, apart}, {bbolt, apart}, {opa, apart}, {module + "/policy", apart}}},
	{path: "broker/gate", closure: append(slices.Clip(ground), ban{module + "/proto", "it knows connections alone"})},                                     // both listeners bound strangers alike
	{path: "broker/attest", direct: append(slices.Clip(adapters), ban{grpc, "it knows SVIDs and no door"}, ban{generated, "it knows SVIDs and no door"})}, // who a peer is, the same at every door
	{path: "broker/rpc", direct: adapters},
	{path: "broker/web", direct: adapters},
	{path: "policy", direct: []ban{{grpc, apart}, {bbolt, apart}, {module + "/broker/keys", apart}}},
	{path: "agent", closure: sidecar},
	{path: "agent/deliver", closure: append(slices.Clip(sidecar), ban{module + "/agent", "whoever keeps credentials fresh hands them in"}), direct: []ban{{"text/template", "with it the linker keeps every method there is"}}, except: []string{module + "/agent/field", "text/template/parse"}}, // credentials in files
	{path: "agent/outgoing", closure: append(slices.Clip(sidecar), ban{module + "/agent", "whoever keeps credentials fresh hands them in"}), except: []string{module + "/agent/hop", module + "/agent/field"}},                                                                                    // requests that get a token on their way
	{path: "agent/incoming", closure: append(slices.Clip(sidecar), ban{module + "/agent", "whoever has a feed hands it in"}, ban{"github.com/envoyproxy", "its types weigh a fifth of a sidecar"}), except: []string{module + "/agent/hop", module + "/agent/field"}},                             // requests for services without SDK
	{path: "agent/field", direct: []ban{{module, "it knows names and messages alone"}}},                                                              // what is wrong with a configuration
	{path: "agent/hop", closure: []ban{{grpc, "it knows HTTP alone"}, {generated, "it knows HTTP alone"}, {module + "/sdk", "it knows HTTP alone"}}}, // what both proxies do
	{path: "agent/sts", closure: []ban{{grpc, "it knows one POST"}, {generated, "it knows one POST"}, {module + "/sdk", "it knows one POST"}, {"github.com/aws", "a trade is one unsigned POST"}}},
	{path: "sdk", closure: light},
	{path: "sdk/verify", closure: light},
	{path: "sdk/spiffetest", closure: append(slices.Clip(light), ban{"testing", "dev mode links it too"})},
	{path: "cmd/dayfly", closure: unprofiled},
	{path: "cmd/dayfly-broker", closure: unprofiled},
	{path: "cmd/dayfly-agent", closure: unprofiled},
	{path: "cmd/internal/brokerd"},
	{path: "cmd/internal/agentd"},
	{path: "cmd/internal/config"},
	{path: "cmd/internal/supervise", closure: sidecar},                                                        // a program beside its credentials
	{path: "cmd/internal/profile", direct: []ban{{module, "it shows profiles of whatever process it is in"}}}, // linked only with a build tag
	{path: "tools/mutants", direct: []ban{{module, "it plants mistakes in the code, and must build whatever the code is"}}}, // mistakes, and who finds them
}

// violation returns why a room may not import path, or "".
func violation(path string, bans []ban, except []string) string {
	for _, e := range except {
		if covers(e, path) {
			return ""
		}
	}
	for _, b := range bans {
		if covers(b.path, path) {
			return b.reason
		}
	}
	return ""
}

func covers(prefix, path string) bool {
	if strings.HasSuffix(prefix, "/") {
		return strings.HasPrefix(path, prefix)
	}
	return path == prefix || strings.HasPrefix(path, prefix+"/")
}

// roomOf returns the row that a package belongs to: the longest that covers it.
func roomOf(pkg string) (room, bool) {
	var best room
	for _, r := range house {
		if covers(module+"/"+r.path, pkg) && len(r.path) > len(best.path) {
			best = r
		}
	}
	return best, best.path != ""
}

type listed struct {
	ImportPath, Name string
	Imports, Deps    []string
	Error            *struct{ Err string }
}

// listPackages asks go list for every package of the module.
func listPackages(t *testing.T) []listed {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", "list", "-e", "-json=ImportPath,Name,Imports,Deps,Error", "./...")
	cmd.Dir, cmd.Stderr = "..", os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var all []listed
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p listed
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatalf("reading what go list says: %v", err)
		}
		all = append(all, p)
	}
}

func TestImports(t *testing.T) {
	seen := make(map[string]bool)
	for _, p := range listPackages(t) {
		if p.Error != nil && !strings.Contains(p.Error.Err, "no non-test Go files") {
			t.Errorf("%s: %s", p.ImportPath, p.Error.Err)
			continue
		}
		if covers(module+"/e2e", p.ImportPath) {
			continue
		}
		r, ok := roomOf(p.ImportPath)
		if !ok && covers(module+"/cmd", p.ImportPath) {
			continue
		}
		if !ok {
			t.Errorf("%s is in no room: give it a row in the table, or a place in an existing room", p.ImportPath)
			continue
		}
		seen[strings.TrimPrefix(p.ImportPath, module+"/")] = true
		if !covers("cmd", r.path) {
			r.direct = append(slices.Clip(r.direct), top...)
		}
		for _, path := range p.Imports {
			if why := violation(path, r.direct, r.except); why != "" {
				t.Errorf("%s imports %s: %s", p.ImportPath, path, why)
			}
		}
		for _, path := range p.Deps {
			if why := violation(path, r.closure, r.except); why != "" {
				t.Errorf("%s depends on %s: %s", p.ImportPath, path, why)
			}
		}
	}
	for _, r := range house {
		if !seen[r.path] {
			t.Errorf("room %s has no package: the table must name what exists", r.path)
		}
	}
}

// TestTableBites holds the table itself: a rule that matches nothing is no rule.
func TestTableBites(t *testing.T) {
	for _, c := range []struct {
		room, path string
		forbidden  bool
	}{
		{"proto/token", grpc + "/codes", true},
		{"proto/feed", goSPIFFE + "/workloadapi", true},
		{"proto/feed", goSPIFFE + "/spiffeid", false},
		{"proto/token", "github.com/golang-jwt/jwt/v5", false},
		{"proto/revocation", "net/http", true},
		{"broker", bbolt, true},
		{"broker", module + "/broker/keys", true},
		{"broker", module + "/proto/token", false},
		{"broker/rpc", grpc, false},
		{"broker/rpc", opa + "/v1/rego", true},
		{"sdk/verify", module + "/broker/rpc", true},
		{"sdk", "google.golang.org/grpcfake", false},
		{"agent", module + "/sdk", false},
		{"agent", opa, true},
		{"cmd/dayfly-broker", "net/http/pprof", true},
	} {
		r, ok := roomOf(module + "/" + c.room)
		if !ok || r.path != c.room {
			t.Errorf("no row for %s", c.room)
			continue
		}
		if got := violation(c.path, slices.Concat(r.direct, r.closure), r.except) != ""; got != c.forbidden {
			t.Errorf("%s importing %s: forbidden %v, want %v", c.room, c.path, got, c.forbidden)
		}
	}
}
