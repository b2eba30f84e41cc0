package config_test

import (
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/dayflyhq/dayfly/cmd/internal/config"
)

type listen struct {
	GRPC  string      `yaml:"grpc,required"`
	Admin string      `yaml:"admin"`
	Mode  config.Mode `yaml:"mode"`
}

type sample struct {
	ID      spiffeid.ID          `yaml:"id,required"`
	Trust   spiffeid.TrustDomain `yaml:"trust_domain"`
	Bound   time.Duration        `yaml:"bound"`
	Message config.Size          `yaml:"message"`
	Level   slog.Level           `yaml:"level"`
	Listen  listen               `yaml:"listen"`
	Extra   *listen              `yaml:"extra"`
	UIDs    []uint32             `yaml:"uids"`
	Bundles map[string]string    `yaml:"bundles"`
	Peers   map[string]listen    `yaml:"peers"`
	Waits   []time.Duration      `yaml:"waits"`
	On      bool                 `yaml:"on"`
	Small   int8                 `yaml:"small"`
	Ratio   float64              `yaml:"ratio"`
}

func (l *listen) Validate() error {
	if l.Admin != "" && !strings.HasPrefix(l.Admin, "127.") {
		return config.Wrong("admin", "must be a loopback address")
	}
	return nil
}

func (s *sample) Validate() error {
	var errs []error
	if s.Bound > time.Hour {
		errs = append(errs, config.Wrong("bound", "is at most 1h"))
	}
	if s.Bound == 0 {
		errs = append(errs, config.Wrong("bound", "must be positive"))
	}
	if s.Listen.GRPC != "" && s.Listen.GRPC == s.Listen.Admin {
		errs = append(errs, config.Wrong("listen.grpc", "is the admin listener's"))
	}
	if s.On && len(s.UIDs) == 0 {
		errs = append(errs, errors.New("on wants uids"))
	}
	return errors.Join(errs...)
}

const full = `# a comment
id: spiffe://example.org/broker
trust_domain: example.org
bound: 1m30s
message: 64KiB
level: warn
listen:
  grpc: 127.0.0.1:8443
  admin: 127.0.0.1:8080
  mode: 0660
extra: {grpc: "x"}
uids: [0, 1000]
bundles:
  other.org: /etc/other.pem
peers:
  a: {grpc: "1"}
waits:
- 1s
- 0s
on: true
small: -128
ratio: 0.5
`

func TestEveryTypeIsRead(t *testing.T) {
	var got sample
	if err := config.Parse("x.yaml", []byte(full), &got); err != nil {
		t.Fatal(err)
	}
	want := sample{
		ID:      spiffeid.RequireFromString("spiffe://example.org/broker"),
		Trust:   spiffeid.RequireTrustDomainFromString("example.org"),
		Bound:   90 * time.Second,
		Message: 64 * config.KiB,
		Level:   slog.LevelWarn,
		Listen:  listen{GRPC: "127.0.0.1:8443", Admin: "127.0.0.1:8080", Mode: 0o660},
		Extra:   &listen{GRPC: "x"},
		UIDs:    []uint32{0, 1000},
		Bundles: map[string]string{"other.org": "/etc/other.pem"},
		Peers:   map[string]listen{"a": {GRPC: "1"}},
		Waits:   []time.Duration{time.Second, 0},
		On:      true,
		Small:   -128,
		Ratio:   0.5,
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

func TestWhatTheFileLeavesOutStays(t *testing.T) {
	got := sample{Bound: 30 * time.Second, Listen: listen{Admin: "127.0.0.1:1"}}
	err := config.Parse("x.yaml", []byte("id: spiffe://td/x\nlisten: {grpc: g}\n"), &got)
	if err != nil {
		t.Fatal(err)
	}
	if got.Bound != 30*time.Second || got.Listen.Admin != "127.0.0.1:1" || got.Listen.GRPC != "g" {
		t.Errorf("defaults are gone: %+v", got)
	}
}

// One file with a mistake of every kind: each is reported, in order, by line.
func TestAllProblemsAtOnceWithLines(t *testing.T) {
	const broken = `id: not-an-id
trust_domain: "UPPER case"
bound: 90
message: 64kb
level: loud
listen:
  admim: x
  admin: 0.0.0.0:80
  mode: 9999
uids: 7
uids: [1]
bundles: [a]
waits: [1s, -2s, soon]
on: yes
small: 128
ratio: much
colour: red
extra:
peers: {a: {grpc: 5}, b: &x {grpc: a}, c: *x}
`
	want := []string{
		`1: id: "not-an-id": scheme is missing or invalid`,
		`2: trust_domain: "UPPER case": trust domain characters are limited to`,
		`3: bound: "90" isn't a duration: write a number with a unit`,
		`4: message: "64kb": unknown unit: write B, KiB, MiB or GiB`,
		`5: level: "loud": is none of debug, info, warn and error`,
		`7: listen: unknown key "admim": did you mean "admin"?`,
		`7: listen.grpc: is required`,
		`8: listen.admin: must be a loopback address`,
		`9: listen.mode: "9999": not a file mode`,
		`10: uids: wants a list, not a number`,
		`11: uids: is given twice, first in line 10`,
		`12: bundles: wants keys with values, not a list`,
		`13: waits[1]: "-2s" is negative`,
		`13: waits[2]: "soon" isn't a duration`,
		`14: on: "yes" is neither true nor false`,
		`15: small: "128" is out of range: from -128 to 127`,
		`16: ratio: "much" isn't a number`,
		`17: unknown key "colour": known here are id, trust_domain,`,
		`18: extra: has no value`,
		`19: peers.a.grpc: wants text, and YAML reads "5" as a number: put it in quotes`,
		`19: peers.b: anchors and aliases are refused`,
		`19: peers.c: anchors and aliases are refused`,
	}
	var got sample
	expectProblems(t, config.Parse("b.yaml", []byte(broken), &got), want)
}

func expectProblems(t *testing.T, err error, want []string) {
	t.Helper()
	var problems config.Problems
	if !errors.As(err, &problems) {
		t.Fatalf("error is %v, want Problems", err)
	}
	for i := range max(len(problems), len(want)) {
		switch {
		case i >= len(want):
			t.Errorf("unexpected: %s", problems[i])
		case i >= len(problems):
			t.Errorf("missing: %s", want[i])
		case !strings.HasPrefix(problems[i].String(), "b.yaml:"+want[i]):
			t.Errorf("problem %d\n got %s\nwant b.yaml:%s", i, problems[i], want[i])
		}
	}
}

func TestValidate(t *testing.T) {
	for name, c := range map[string]struct {
		text string
		want []string
	}{
		"a key's line":                         {"id: spiffe://td/x\nlisten: {grpc: g}\nbound: 2h\n", []string{"3: bound: is at most 1h"}},
		"an absent key has its mapping's line": {"id: spiffe://td/x\nlisten: {grpc: g}\n", []string{"1: bound: must be positive"}},
		"a deep key":                           {"id: spiffe://td/x\nbound: 1s\nlisten:\n  admin: 127.0.0.1:1\n  grpc: 127.0.0.1:1\n", []string{"5: listen.grpc: is the admin listener's"}},
		"without a key":                        {"id: spiffe://td/x\nbound: 1s\nlisten: {grpc: g}\non: true\n", []string{"1: on wants uids"}},
		"a value that couldn't be read is reported once":  {"id: spiffe://td/x\nbound: x\nlisten: {grpc: g}\n", []string{"2: bound: \"x\" isn't a duration"}},
		"without a key, only where nothing else is wrong": {"id: spiffe://td/x\nbound: 1s\nlisten: {grpc: g}\non: true\nuids: x\n", []string{"5: uids: wants a list"}},
	} {
		t.Run(name, func(t *testing.T) {
			var s sample
			expectProblems(t, config.Parse("b.yaml", []byte(c.text), &s), c.want)
		})
	}
}

func TestNotOneMapping(t *testing.T) {
	for name, c := range map[string]struct{ text, want string }{
		"empty":            {"", "b.yaml:1: id: is required"},
		"comments only":    {"# nothing\n", "b.yaml:1: id: is required"},
		"a list":           {"- a\n", "b.yaml:1: wants keys with values, not a list"},
		"a word":           {"hello\n", "b.yaml:1: wants keys with values, not a single value"},
		"two documents":    {"id: spiffe://td/x\n---\nid: spiffe://td/y\n", "b.yaml:2: a second YAML document begins"},
		"a syntax error":   {"id: a\n  b: [\n", "b.yaml:2: "},
		"a tab":            {"listen:\n\tgrpc: x\n", "b.yaml:2: found character that cannot start any token"},
		"a merge key":      {"id: spiffe://td/x\n<<: {bound: 1s}\n", "b.yaml:2: a key must be a plain word"},
		"a tag":            {"id: !!binary aGk=\n", "b.yaml:1: id: tags are refused"},
		"a key of its own": {"id: spiffe://td/x\n? [a, b]\n: c\n", "a key must be a plain word"},
		"not UTF-8":        {"id: \xff\xfe\n", "b.yaml"},
	} {
		t.Run(name, func(t *testing.T) {
			var s struct {
				ID spiffeid.ID `yaml:"id,required"`
			}
			err := config.Parse("b.yaml", []byte(c.text), &s)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error is %v, want %q", err, c.want)
			}
		})
	}
}

func TestSizeRoundTrip(t *testing.T) {
	for text, want := range map[string]config.Size{
		"0": 0, "1": 1, "4096B": 4096, "64KiB": 64 * config.KiB, "3 MiB": 3 * config.MiB, "2GiB": 2 * config.GiB,
	} {
		var got, again config.Size
		if err := got.UnmarshalText([]byte(text)); err != nil || got != want {
			t.Errorf("%q is %d, %v; want %d", text, got, err, want)
		}
		if err := again.UnmarshalText([]byte(got.String())); err != nil || again != got {
			t.Errorf("%v reads back as %v, %v", got, again, err)
		}
	}
	for _, text := range []string{"", "KiB", "-1", "1.5MiB", "64kb", "1TiB", "9223372036854775807KiB", "0x10"} {
		var got config.Size
		if err := got.UnmarshalText([]byte(text)); err == nil {
			t.Errorf("%q is read as %v", text, got)
		}
	}
}

func TestLoadSaysWhatIsWrongWithThePath(t *testing.T) {
	dir := t.TempDir()
	var s sample
	missing := filepath.Join(dir, "none.yaml")
	err := config.Load(missing, &s)
	if !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "there is no file "+missing) {
		t.Errorf("a missing file: %v", err)
	}
	if err := config.Load(dir, &s); err == nil || !strings.Contains(err.Error(), "is a folder") {
		t.Errorf("a folder: %v", err)
	}
	big := filepath.Join(dir, "big.yaml")
	if err := os.WriteFile(big, make([]byte, config.MaxBytes+1), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := config.Load(big, &s); err == nil || !strings.Contains(err.Error(), "is larger than") {
		t.Errorf("a huge file: %v", err)
	}
	good := filepath.Join(dir, "good.yaml")
	if err := os.WriteFile(good, []byte(full), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := config.Load(good, &s); err != nil {
		t.Errorf("a good file: %v", err)
	}
}

func TestLongValuesAreCut(t *testing.T) {
	long := "eyJ" + strings.Repeat("s3cret", 50)
	var s sample
	err := config.Parse("x", []byte("bound: "+long+"\n"), &s)
	if err == nil || strings.Contains(err.Error(), "s3crets3crets3cret") {
		t.Errorf("a long value is shown whole: %v", err)
	}
}

// Whatever a file holds, Parse returns; and what it accepts without complaint it
// accepts again.
func FuzzParse(f *testing.F) {
	f.Add([]byte(full))
	f.Add([]byte("id: spiffe://td/x\nbound: 1s\nlisten: {grpc: g}\n"))
	f.Add([]byte("a: &a [*a]\n"))
	f.Add([]byte("? {a: b}\n: - c\n"))
	f.Add([]byte("--- |\n x\n...\n--- !t\n"))
	f.Add([]byte("listen:\n - \x00"))
	f.Fuzz(func(t *testing.T, content []byte) {
		var a, b sample
		err := config.Parse("x", content, &a)
		if err != nil {
			var problems config.Problems
			if !errors.As(err, &problems) || len(problems) == 0 {
				t.Fatalf("not Problems: %v", err)
			}
			return
		}
		if err := config.Parse("x", content, &b); err != nil || !reflect.DeepEqual(a, b) {
			t.Fatalf("read twice: %v", err)
		}
		if a.Bound < 0 || a.Message < 0 || a.ID.IsZero() {
			t.Fatalf("accepted: %+v", a)
		}
	})
}
