package deliver

import (
	"encoding/base64"
	"fmt"
	"strings"
	"testing"
	"text/template"
	"time"

	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk"
	"pgregory.net/rapid"
)

var twoCredentials = credentials{
	"a": {Token: token.NewSecret("the.token.a"), Grant: "grant-a", Audience: "orders", Scopes: []string{"r", "w"}, Expires: time.Unix(2_000_000_000, 0)},
	"b": {Token: token.NewSecret("the.token.b"), Grant: "grant-b", Audience: "it's <web>", Expires: time.Unix(1_900_000_000, 0)},
}

// theirs is what Go's own interpreter has of the functions.
func theirs(creds credentials) template.FuncMap {
	of := func(get func(*sdk.Credential) string) func(string) (string, error) {
		return func(name string) (string, error) {
			if c, ok := creds[name]; ok {
				return get(c), nil
			}
			return "", fmt.Errorf("no credential %q", name)
		}
	}
	return template.FuncMap{
		"token": of(func(c *sdk.Credential) string { return c.Token.Reveal() }), "audience": of(func(c *sdk.Credential) string { return c.Audience }),
		"scope":        of(func(c *sdk.Credential) string { return strings.Join(c.Scopes, " ") }),
		"expires_unix": func(name string) int64 { return creds[name].Expires.Unix() },
		"base64":       func(s string) string { return base64.StdEncoding.EncodeToString([]byte(s)) },
	}
}

// A value of a template is drawn with its kind, so that most of them can be run.
func drawText(t *rapid.T, deep int, names []string) string {
	kinds := []string{`"x"`, "`a`", `""`, `"the.token.a"`, `"é<&"`}
	kinds = append(kinds, names...)
	if deep > 0 {
		kinds = append(kinds, "of", "of", "piped", "printf", "print", "html", "urlquery", "base64", "and", "or")
	}
	text := func() string { return drawText(t, deep-1, names) }
	switch k := rapid.SampledFrom(kinds).Draw(t, "text"); k {
	case "of":
		return fmt.Sprintf("(%s %q)", rapid.SampledFrom([]string{"token", "audience", "scope"}).Draw(t, "of"), rapid.SampledFrom([]string{"a", "b", "c"}).Draw(t, "name"))
	case "piped":
		return fmt.Sprintf("(%s | %s)", text(), rapid.SampledFrom([]string{"base64", "html", "urlquery", "print", `printf "%s-%s" "l"`}).Draw(t, "to"))
	case "printf":
		return fmt.Sprintf(`(printf "%%s:%%d:%%v" %s %s %s)`, text(), drawNumber(t, deep-1, names), drawTruth(t, deep-1, names))
	case "print", "and", "or":
		return fmt.Sprintf("(%s %s %s)", k, text(), text())
	case "html", "urlquery", "base64":
		return fmt.Sprintf("(%s %s)", k, text())
	default:
		return k
	}
}

func drawNumber(t *rapid.T, deep int, names []string) string {
	kinds := []string{"0", "1", "-7", "0x10", "'c'", "1.0", "2e3", "2.5", "1_000", "0x1p4", "'.'"}
	if deep > 0 {
		kinds = append(kinds, "len", "unix")
	}
	switch k := rapid.SampledFrom(kinds).Draw(t, "number"); k {
	case "len":
		return fmt.Sprintf("(len %s)", drawText(t, deep-1, names))
	case "unix":
		return `(expires_unix "a")`
	default:
		return k
	}
}

func drawTruth(t *rapid.T, deep int, names []string) string {
	kinds := []string{"true", "false"}
	if deep > 0 {
		kinds = append(kinds, "texts", "numbers", "not", "mixed")
	}
	operator := func() string {
		return rapid.SampledFrom([]string{"eq", "ne", "lt", "le", "gt", "ge"}).Draw(t, "operator")
	}
	switch k := rapid.SampledFrom(kinds).Draw(t, "truth"); k {
	case "texts":
		return fmt.Sprintf("(%s %s %s)", operator(), drawText(t, deep-1, names), drawText(t, deep-1, names))
	case "numbers":
		return fmt.Sprintf("(%s %s %s)", operator(), drawNumber(t, deep-1, names), drawNumber(t, deep-1, names))
	case "not":
		return fmt.Sprintf("(not %s)", drawTruth(t, deep-1, names))
	case "mixed":
		return fmt.Sprintf("(eq %s %s)", drawText(t, deep-1, names), drawNumber(t, deep-1, names))
	default:
		return k
	}
}

func drawBody(t *rapid.T, deep int, names []string) string {
	var b strings.Builder
	for range rapid.IntRange(1, 4).Draw(t, "parts") {
		switch rapid.IntRange(0, 7).Draw(t, "part") {
		case 0:
			b.WriteString(" plain\n")
		case 1:
			b.WriteString("{{- " + drawText(t, 3, names) + " -}}")
		case 2:
			b.WriteString("{{" + drawNumber(t, 2, names) + "}}{{/* nothing */}}")
		case 3:
			b.WriteString("{{" + drawTruth(t, 3, names) + "}}")
		case 4:
			b.WriteString("{{$v := " + drawText(t, 2, names) + "}}")
			names = append(names[:len(names):len(names)], "$v")
		case 5:
			if len(names) > 0 {
				b.WriteString("{{$v = " + drawText(t, 2, names) + "}}")
			}
		case 6:
			if deep > 0 {
				b.WriteString("{{if " + drawTruth(t, 2, names) + "}}" + drawBody(t, deep-1, names) + "{{else if " + drawText(t, 2, names) + "}}" + drawBody(t, deep-1, names) + "{{else}}e{{end}}")
			}
		case 7:
			if deep > 0 {
				b.WriteString("{{with " + drawText(t, 2, names) + "}}{{.}}" + drawBody(t, deep-1, names) + "{{else}}" + drawBody(t, deep-1, names) + "{{end}}")
			}
		}
	}
	return b.String()
}

// TestTemplateAsGo holds that a template makes what Go's own interpreter makes of it, or
// that neither can.
func TestTemplateAsGo(t *testing.T) {
	made, refused := 0, 0
	rapid.Check(t, func(rt *rapid.T) {
		text := drawBody(rt, 2, nil)
		var want strings.Builder
		parsed, err := template.New("template").Funcs(theirs(twoCredentials)).Parse(text)
		if err == nil {
			err = parsed.Execute(&want, map[string]any{})
		}
		var got strings.Builder
		ours, ourErr := parseTemplate(text, functions(twoCredentials))
		if ourErr == nil {
			ourErr = ours.run(&got, functions(twoCredentials))
		}
		if (err == nil) != (ourErr == nil) || err == nil && got.String() != want.String() {
			rt.Fatalf("%q makes %q (%v), and Go makes %q (%v)", text, got.String(), ourErr, want.String(), err)
		}
		if err == nil {
			made++
		} else {
			refused++
		}
	})
	if made == 0 || refused == 0 {
		t.Errorf("%d made, %d refused: they show nothing", made, refused)
	}
}

// What a template must not have is refused with its place, whether or not it would be run.
func TestTemplateRefusals(t *testing.T) {
	for text, want := range map[string]string{
		"x\n{{.Foo}}":                         "2:2: ",
		"{{.}}":                               "1:2: ",
		"{{$}}":                               "1:2: ",
		"{{range 3}}x{{end}}":                 "1:8: ",
		`{{define "x"}}y{{end}}z`:             "1: ",
		`{{block "x" 1}}y{{end}}z`:            "1: ",
		`{{template "x"}}`:                    "1:11: ",
		`{{"x".Foo}}`:                         "1",
		`{{(token "a").Foo}}`:                 "1:",
		`{{$x := token "a"}}{{$x.Foo}}`:       "1:23: ",
		"{{call 1}}":                          `1: function "call" not defined`,
		"{{nil}}":                             "1:2: ",
		`{{1 "a"}}`:                           "can't be called",
		`{{"a" | 1}}`:                         "1: ",
		"{{token}}":                           "needs one argument",
		"{{token 1}}":                         "needs a text",
		"{{printf}}":                          "needs one argument",
		"{{printf 1}}":                        "needs a text",
		"{{and}}":                             "needs an argument",
		"{{eq 1}}":                            "two arguments",
		"{{json}}":                            "needs one argument",
		`{{lt true 1}}`:                       "different kinds",
		`{{if false}}{{end}}{{token "none"}}`: `no credential is named "none": there are a, b`,
		"{{18446744073709551615}}":            "1:2: ",
		`{{if true}}y{{else}}{{.}}{{end}}`:    "1:22: ",
		"{{1i}}":                              "1:2: ",
	} {
		f := File{Format: Template, Template: text, Credentials: map[string]sdk.Request{"a": {Audience: "a"}, "b": {Audience: "b"}}}
		if err := f.Validate(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
	}
}
