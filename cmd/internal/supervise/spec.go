package supervise

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/dayflyhq/dayfly/agent/deliver"
	"github.com/dayflyhq/dayfly/agent/field"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk"
	"github.com/spf13/pflag"
)

// The exit codes beside the program's own; docs/agent/exec.md lists them.
const (
	// ExitRevoked: the program was ended because a credential was revoked, or expired.
	ExitRevoked = 123
	// ExitWaited: not all credentials were there in time.
	ExitWaited = 124
	// ExitFailed: what isn't the program's doing, and no other code says.
	ExitFailed = 125
	// ExitNotExecutable and ExitNotFound are as shells have them.
	ExitNotExecutable = 126
	ExitNotFound      = 127

	exitSignal = 128 // and the signal's number
)

const (
	defaultWait  = time.Minute
	defaultGrace = 10 * time.Second
	// maxWait and maxGrace only catch slips.
	maxWait, maxGrace = 24 * time.Hour, time.Hour
	// maxWanted is as much as an agent watches for one caller.
	maxWanted = 64
)

// What is put in the program's environment beside what was asked for.
const (
	// FilesVariable holds the folder of the files.
	FilesVariable = "DAYFLY_FILES"
	// expiresSuffix makes the name of the variable that says when a token ends.
	expiresSuffix = "_EXPIRES"
)

// A Variable is a credential in the environment.
type Variable struct {
	Name    string
	Request sdk.Request
}

// A Spec is what a program gets and what happens then.
type Spec struct {
	Variables []Variable
	Files     []deliver.File
	// Beside are what the program gets in other ways, as by files of the agent's
	// configuration: it isn't started without them, and OnRevoke and OnExpiry are for them too.
	Beside []sdk.Request

	OnRenew, OnRevoke, OnExpiry Action

	// Wait is how long the first start may take; zero: as long as it takes.
	Wait time.Duration
	// Grace is between SIGTERM and SIGKILL.
	Grace time.Duration
	// Folder is where the folder of the files is made; empty: in memory where that can be.
	Folder string
}

// Requests lists what must be kept fresh, each once.
func (s *Spec) Requests() []sdk.Request {
	var out []sdk.Request
	add := func(r sdk.Request) {
		if !slices.ContainsFunc(out, func(o sdk.Request) bool { return key(o) == key(r) }) {
			out = append(out, r)
		}
	}
	for _, v := range s.Variables {
		add(v.Request)
	}
	for _, f := range s.Files {
		for _, name := range slices.Sorted(maps.Keys(f.Credentials)) {
			add(f.Credentials[name])
		}
	}
	for _, r := range s.Beside {
		add(r)
	}
	return out
}

// key makes equal requests equal.
func key(r sdk.Request) string {
	return fmt.Sprintf("%s\x00%s\x00%d\x00%s", r.Audience, strings.Join(r.Scopes, " "), r.TTL, r.Binding)
}

// Flags are the command line of both commands.
type Flags struct {
	audience  string
	scopes    []string
	ttl       time.Duration
	binding   string
	env       []string
	files     []string
	templates []string
	named     []string
	onRenew   string
	onRevoke  string
	onExpiry  string
	wait      time.Duration
	grace     time.Duration
	folder    string
}

// Add adds them.
func (f *Flags) Add(fs *pflag.FlagSet) {
	fs.StringVarP(&f.audience, "audience", "a", "", "`whom` a token in the environment is for: a name or a SPIFFE ID")
	fs.StringSliceVarP(&f.scopes, "scope", "s", nil, "`scopes` to ask for with --audience, repeatable or with commas; none: what policy gives by default")
	fs.DurationVar(&f.ttl, "ttl", 0, "wanted life of all, at most "+token.MaxTTL.String()+"; 0: what policy gives")
	fs.StringVar(&f.binding, "binding", "", "who may present them: spiffe, x5t or none; policy may be stricter")
	fs.StringArrayVar(&f.env, "env", nil, "`VARIABLE=AUDIENCE[=SCOPE,SCOPE]` for a token in the environment, repeatable; VARIABLE alone: that of --audience (default "+deliver.DefaultVariable+")")
	fs.StringArrayVar(&f.files, "file", nil, "`NAME=AUDIENCE[=SCOPE,SCOPE]` for a file in the folder "+FilesVariable+", repeatable: NAME.json is JSON, NAME.env lines of a shell, any other the token")
	fs.StringArrayVar(&f.templates, "template", nil, "`NAME=PATH` for a file made by the Go template at PATH, over all of --credential; repeatable")
	fs.StringArrayVar(&f.named, "credential", nil, "`NAME=AUDIENCE[=SCOPE,SCOPE]`: what a template calls NAME, repeatable")
	fs.StringVar(&f.onRenew, "on-renew", "none", "`what` happens after a renewal: none, restart, or a signal such as HUP")
	fs.StringVar(&f.onRevoke, "on-revoke", "kill", "`what` happens after a revocation: kill, restart, none, or a signal")
	fs.StringVar(&f.onExpiry, "on-expiry", "none", "`what` happens when what the program has expired: none, kill, restart, or a signal")
	fs.DurationVar(&f.wait, "wait", defaultWait, "how long to wait for the credentials before the start; 0: for ever")
	fs.DurationVar(&f.grace, "grace", defaultGrace, "how long the program may take to end before it is killed")
	fs.StringVar(&f.folder, "dir", "", "`folder` in which the folder of the files is made (default in memory, where that can be)")
}

// ErrNothing is said of a command line that asks for no credential; the Spec is good.
var ErrNothing = errors.New("no credential is asked for: name whom one is for by --audience, --env or --file")

var variableName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)

const maxVariable = 128

// Spec reads the command line. All that is wrong is said at once.
func (f *Flags) Spec() (*Spec, error) {
	s := &Spec{Wait: f.wait, Grace: f.grace, Folder: f.folder}
	var errs []error
	wrong := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	for _, one := range []struct {
		flag, value string
		into        *Action
		kill        bool
	}{{"--on-renew", f.onRenew, &s.OnRenew, false}, {"--on-revoke", f.onRevoke, &s.OnRevoke, true}, {"--on-expiry", f.onExpiry, &s.OnExpiry, true}} {
		var err error
		if *one.into, err = parseAction(one.value); err != nil || one.into.do == doKill && !one.kill {
			wrong("%s %q: is none, restart,%s or a signal such as HUP", one.flag, short(one.value), map[bool]string{true: " kill"}[one.kill])
		}
	}
	if f.ttl < 0 || f.ttl > token.MaxTTL || f.ttl > 0 && f.ttl < time.Second {
		wrong("--ttl %v: is 1s to %v, or absent", f.ttl, token.MaxTTL)
	}
	if f.binding != "" && !token.Binding(f.binding).Valid() {
		wrong("--binding %q: is spiffe, x5t or none", short(f.binding))
	}
	if f.wait < 0 || f.wait > maxWait {
		wrong("--wait %v: is at most %v", f.wait, maxWait)
	}
	if f.grace < 0 || f.grace > maxGrace {
		wrong("--grace %v: is at most %v", f.grace, maxGrace)
	}
	errs = append(errs, f.variables(s), f.delivered(s))
	if len(s.Variables) == 0 && len(s.Files) == 0 && errors.Join(errs...) == nil {
		return s, ErrNothing
	}
	if n := len(s.Requests()); n > maxWanted {
		wrong("%d different credentials are asked for, at most %d may be", n, maxWanted)
	}
	return s, errors.Join(errs...)
}

// variables reads --audience and --env.
func (f *Flags) variables(s *Spec) error {
	var errs []error
	alone := ""
	taken := map[string]bool{}
	put := func(name string, r sdk.Request) {
		switch {
		case len(name) > maxVariable, !variableName.MatchString(name):
			errs = append(errs, fmt.Errorf("--env %q: isn't the name of a variable", short(name)))
		case taken[name] || taken[name+expiresSuffix] || name == FilesVariable:
			errs = append(errs, fmt.Errorf("--env %s: is there twice", name))
		}
		taken[name], taken[name+expiresSuffix] = true, true
		s.Variables = append(s.Variables, Variable{name, r})
	}
	for _, text := range f.env {
		name, rest, given := strings.Cut(text, "=")
		if !given {
			if alone != "" || f.audience == "" {
				errs = append(errs, fmt.Errorf("--env %q: write VARIABLE=AUDIENCE; a VARIABLE alone is for the token of --audience", short(text)))
			}
			alone = name
			continue
		}
		r, err := f.request(rest)
		if err != nil {
			errs = append(errs, fmt.Errorf("--env %s: %w", short(name), err))
		}
		put(name, r)
	}
	if f.audience == "" {
		if len(f.scopes) > 0 {
			errs = append(errs, errors.New("--scope goes with --audience: others are written VARIABLE=AUDIENCE=SCOPE,SCOPE"))
		}
		return errors.Join(errs...)
	}
	if alone == "" {
		alone = deliver.DefaultVariable
	}
	r, err := f.checked(f.audience, f.scopes)
	if err != nil {
		errs = append(errs, fmt.Errorf("--audience: %w", err))
	}
	put(alone, r)
	return errors.Join(errs...)
}

// delivered reads --file, --template and --credential.
func (f *Flags) delivered(s *Spec) error {
	var errs []error
	taken := map[string]bool{}
	put := func(flag string, file deliver.File) {
		if taken[file.Name] {
			errs = append(errs, fmt.Errorf("--%s %s: is there twice", flag, short(file.Name)))
		}
		taken[file.Name] = true
		// As it will be checked where it is written.
		target := deliver.Target{Path: "/dayfly", Directory: true, Files: []deliver.File{file}}
		for _, p := range field.Errors(target.Validate()) {
			errs = append(errs, fmt.Errorf("--%s %s: %s: %s", flag, short(file.Name), strings.TrimPrefix(p.Key, "files[0]."), p.Message))
		}
		s.Files = append(s.Files, file)
	}
	for _, text := range f.files {
		name, rest, _ := strings.Cut(text, "=")
		r, err := f.request(rest)
		if err != nil {
			errs = append(errs, fmt.Errorf("--file %s: %w", short(name), err))
			continue
		}
		put("file", deliver.File{Name: name, Format: formatOf(name), Credentials: map[string]sdk.Request{"credential": r}})
	}
	named := map[string]sdk.Request{}
	for _, text := range f.named {
		name, rest, _ := strings.Cut(text, "=")
		r, err := f.request(rest)
		if _, twice := named[name]; twice || name == "" {
			err = errors.New("needs a name of its own")
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("--credential %s: %w", short(name), err))
		}
		named[name] = r
	}
	if len(named) > 0 && len(f.templates) == 0 {
		errs = append(errs, errors.New("--credential: is for --template, and there is none"))
	}
	for _, text := range f.templates {
		name, from, _ := strings.Cut(text, "=")
		content, err := ReadTemplate(from)
		if err != nil {
			errs = append(errs, fmt.Errorf("--template %s: %w", short(name), err))
			continue
		}
		put("template", deliver.File{Name: name, Format: deliver.Template, Template: content, Credentials: named})
	}
	return errors.Join(errs...)
}

// ReadTemplate reads the text of a template.
func ReadTemplate(from string) (string, error) {
	if from == "" {
		return "", errors.New("write NAME=PATH, with the path of a template")
	}
	in, err := os.Open(from)
	if err != nil {
		return "", err
	}
	defer in.Close()
	content, err := io.ReadAll(io.LimitReader(in, deliver.MaxFileBytes+1))
	if err == nil && len(content) > deliver.MaxFileBytes {
		err = fmt.Errorf("%s has more than %d bytes", from, deliver.MaxFileBytes)
	}
	return string(content), err
}

func formatOf(name string) deliver.Format {
	switch path.Ext(name) {
	case ".json":
		return deliver.JSON
	case ".env":
		return deliver.Env
	}
	return deliver.Token
}

// request reads AUDIENCE[=SCOPE,SCOPE], as --prefetch of the agent has it.
func (f *Flags) request(text string) (sdk.Request, error) {
	audience, scopes, given := strings.Cut(text, "=")
	var list []string
	if given {
		list = strings.Split(scopes, ",")
	}
	return f.checked(audience, list)
}

func (f *Flags) checked(audience string, scopes []string) (sdk.Request, error) {
	if audience == "" {
		return sdk.Request{}, errors.New("the audience is missing")
	}
	if err := token.ValidateAudience(audience); err != nil {
		return sdk.Request{}, err
	}
	normal, err := token.NormalizeScopes(scopes)
	if err != nil {
		return sdk.Request{}, err
	}
	return sdk.Request{Audience: audience, Scopes: normal, TTL: f.ttl, Binding: token.Binding(f.binding)}, nil
}

// short cuts a text from the command line for an error: it may be a credential in the
// wrong place.
func short(s string) string {
	const most = 32
	if len(s) <= most {
		return s
	}
	return s[:8] + "..."
}
