package deliver

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/dayflyhq/dayfly/agent/field"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk"
)

// A Format is how a file says its credentials.
type Format string

// The formats of a file.
const (
	// Token is the credential and nothing else, without a line's end.
	Token Format = "token"
	// JSON is the object that the agent answers over HTTP, but for expires_in, which would
	// not be true for long.
	JSON Format = "json"
	// Env is lines of NAME=value: the credential in File.Variable, and until when it is good
	// in that name with _EXPIRES after it.
	Env Format = "env"
	// Template is a Go template, over as many credentials as File.Credentials names: it has
	// the actions if and with, variables, and functions.
	Template Format = "template"
)

// DefaultVariable is the variable of the format Env: what dayfly exec calls it too.
const DefaultVariable = "DAYFLY_TOKEN"

// MaxFileBytes bounds what a file may hold: a hundred of the longest tokens.
const MaxFileBytes = 256 << 10

// A bounded repetition would be compiled into as many copies.
var variableName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)

const maxVariable = 128

// jsonFile is the format JSON.
type jsonFile struct {
	AccessToken     string    `json:"access_token"`
	TokenType       string    `json:"token_type"`
	IssuedTokenType string    `json:"issued_token_type"`
	Scope           string    `json:"scope"`
	Grant           string    `json:"grant"`
	Audience        string    `json:"audience"`
	Binding         string    `json:"binding"`
	ExpiresAt       time.Time `json:"expires_at"` // by this machine's clock
}

// credentials are those of one file, by the names that File.Credentials has.
type credentials map[string]*sdk.Credential

func (c credentials) only() *sdk.Credential {
	for _, one := range c {
		return one
	}
	panic("internal error: a file of no credential")
}

// Validate says all that is wrong with what is to be in the file: *field.Error values, joined.
func (f *File) Validate() error {
	_, err := f.compile()
	return err
}

// compile returns how the file is written, and what is wrong with the way it is described.
func (f *File) compile() (func(credentials) ([]byte, error), error) {
	var errs []error
	if f.Format != Template && f.Template != "" {
		errs = append(errs, field.Wrong("template", "is for the format template"))
	}
	if f.Format != Env && f.Variable != "" {
		errs = append(errs, field.Wrong("variable", "is for the format env"))
	}
	if f.Variable != "" && (len(f.Variable) > maxVariable || !variableName.MatchString(f.Variable)) {
		errs = append(errs, field.Wrong("variable", "isn't the name of a variable"))
	}
	if n := len(f.Credentials); n != 1 && (f.Format != Template || n == 0) {
		errs = append(errs, field.Wrong("credentials", "are %d, and must be one, or for a template one or more", n))
	}
	for name, r := range f.Credentials {
		if err := token.ValidateAudience(r.Audience); err != nil {
			errs = append(errs, field.Wrong("credentials."+name+".audience", "%v", err))
		}
		if r.TTL != 0 && r.TTL < MinTTL {
			errs = append(errs, field.Wrong("credentials."+name+".ttl", "is at least %v for a file", MinTTL))
		}
	}
	var render func(credentials) ([]byte, error)
	switch f.Format {
	case Token:
		render = func(c credentials) ([]byte, error) { return []byte(c.only().Token.Reveal()), nil }
	case JSON:
		render = renderJSON
	case Env:
		render = f.renderEnv
	case Template:
		var err error
		if render, err = f.compileTemplate(); err != nil {
			errs = append(errs, field.Wrong("template", "%v", err))
		}
	default:
		errs = append(errs, field.Wrong("format", "is token, json, env or template"))
	}
	return render, errors.Join(errs...)
}

func renderJSON(creds credentials) ([]byte, error) {
	c := creds.only()
	out, err := json.Marshal(jsonFile{
		AccessToken: c.Token.Reveal(), TokenType: "Bearer", IssuedTokenType: "urn:ietf:params:oauth:token-type:access_token",
		Scope: strings.Join(c.Scopes, " "), Grant: c.Grant, Audience: c.Audience, Binding: string(c.Binding), ExpiresAt: until(c),
	})
	return append(out, '\n'), err
}

func (f *File) renderEnv(creds credentials) ([]byte, error) {
	name, c := f.Variable, creds.only()
	if name == "" {
		name = DefaultVariable
	}
	// Neither value has a character that means something to a shell, systemd or Docker.
	return fmt.Appendf(nil, "%s=%s\n%s_EXPIRES=%s\n", name, c.Token.Reveal(), name, until(c).Format(time.RFC3339)), nil
}

func until(c *sdk.Credential) time.Time { return c.Expires.UTC().Truncate(time.Second) }

// functions are all that a template has beside the language's own: none of them reads or
// writes anything.
func functions(creds credentials) map[string]function {
	of := func(get func(*sdk.Credential) any) function {
		return ofText(func(name string) (any, error) {
			c, ok := creds[name]
			if !ok {
				return nil, fmt.Errorf("no credential is named %q: there are %s", name, strings.Join(slices.Sorted(maps.Keys(creds)), ", "))
			}
			return get(c), nil
		})
	}
	return map[string]function{
		"token":        of(func(c *sdk.Credential) any { return c.Token.Reveal() }),
		"grant":        of(func(c *sdk.Credential) any { return c.Grant }),
		"audience":     of(func(c *sdk.Credential) any { return c.Audience }),
		"scope":        of(func(c *sdk.Credential) any { return strings.Join(c.Scopes, " ") }),
		"expires":      of(func(c *sdk.Credential) any { return until(c).Format(time.RFC3339) }),
		"expires_unix": of(func(c *sdk.Credential) any { return until(c).Unix() }),
		"json": func(args []any) (any, error) {
			if len(args) != 1 {
				return nil, errors.New("needs one argument")
			}
			out, err := json.Marshal(args[0])
			return string(out), err
		},
		"base64": ofText(func(s string) (any, error) { return base64.StdEncoding.EncodeToString([]byte(s)), nil }),
		// As a shell takes it literally.
		"quote": ofText(func(s string) (any, error) { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'", nil }),
	}
}

// compileTemplate parses the template and tries it with credentials that are none, so that
// a name nobody has is found at the start.
func (f *File) compileTemplate() (func(credentials) ([]byte, error), error) {
	if f.Template == "" {
		return nil, errors.New("is missing")
	}
	example := credentials{}
	for name, r := range f.Credentials {
		example[name] = &sdk.Credential{Token: token.NewSecret("example"), Grant: "example", Audience: r.Audience, Scopes: r.Scopes, Expires: time.Unix(1<<31, 0)}
	}
	parsed, err := parseTemplate(f.Template, functions(example))
	if err != nil {
		return nil, templateError(err)
	}
	render := func(c credentials) ([]byte, error) {
		var out bytes.Buffer
		if err := parsed.run(&limited{&out}, functions(c)); err != nil {
			return nil, templateError(err)
		}
		if len(bytes.TrimSpace(out.Bytes())) == 0 {
			return nil, errors.New("it makes an empty file")
		}
		return out.Bytes(), nil
	}
	if err := parsed.try(functions(example)); err != nil {
		return nil, templateError(err)
	}
	_, err = render(example)
	return render, err
}

// templateError says where in the template something is wrong, and never with what.
func templateError(err error) error {
	return errors.New(redact(strings.TrimPrefix(err.Error(), "template: template:")) + " (line:column of the template)")
}

type limited struct{ *bytes.Buffer }

func (l *limited) Write(p []byte) (int, error) {
	if l.Len()+len(p) > MaxFileBytes {
		return 0, fmt.Errorf("it makes more than %d bytes", MaxFileBytes)
	}
	return l.Buffer.Write(p)
}

// secretLike is whatever might be a credential, or part of one, in any of its encodings, if
// it is long enough.
var secretLike = regexp.MustCompile(`[A-Za-z0-9_.+/=-]+`)

const shortestSecret = 64

// redact takes from a text what might be a credential.
func redact(s string) string {
	return secretLike.ReplaceAllStringFunc(s, func(run string) string {
		if len(run) < shortestSecret {
			return run
		}
		return "[redacted]"
	})
}

var jwt = regexp.MustCompile(`eyJ[A-Za-z0-9_-]*\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+`)

// claimsIn finds what tokens of ours a file holds. Their signatures aren't checked: it is
// asked of files where only this user writes, and believed only to remove them sooner.
func claimsIn(content []byte) []*token.Claims {
	var out []*token.Claims
	for _, raw := range jwt.FindAll(content, -1) {
		if t, err := token.Inspect(string(raw)); err == nil {
			out = append(out, &t.Claims)
		}
	}
	return out
}
