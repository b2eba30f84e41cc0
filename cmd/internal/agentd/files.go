package agentd

import (
	"errors"
	"fmt"
	"io/fs"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/dayflyhq/dayfly/agent/deliver"
	"github.com/dayflyhq/dayfly/agent/field"
	"github.com/dayflyhq/dayfly/cmd/internal/config"
	"github.com/dayflyhq/dayfly/cmd/internal/supervise"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk"
)

// File is one file with credentials in it.
type File struct {
	Path         string              `yaml:"path,required"`
	Format       string              `yaml:"format"`
	Variable     string              `yaml:"variable"`
	Template     string              `yaml:"template"`
	TemplateFile string              `yaml:"template_file"`
	Credential   Prefetch            `yaml:"credential"`
	Credentials  map[string]Prefetch `yaml:"credentials"`
	Mode         config.Mode         `yaml:"mode"`
	Owner        string              `yaml:"owner"`
	Group        string              `yaml:"group"`
	OnChange     OnChange            `yaml:"on_change"`
}

// Directory is a folder of files that change together.
type Directory struct {
	Path     string          `yaml:"path,required"`
	Files    []DirectoryFile `yaml:"files,required"`
	Mode     config.Mode     `yaml:"mode"`
	Owner    string          `yaml:"owner"`
	Group    string          `yaml:"group"`
	OnChange OnChange        `yaml:"on_change"`
}

// DirectoryFile is one of them.
type DirectoryFile struct {
	Name         string              `yaml:"name,required"`
	Format       string              `yaml:"format"`
	Variable     string              `yaml:"variable"`
	Template     string              `yaml:"template"`
	TemplateFile string              `yaml:"template_file"`
	Credential   Prefetch            `yaml:"credential"`
	Credentials  map[string]Prefetch `yaml:"credentials"`
}

// OnChange is how a program is told of a change: a command or a signal.
type OnChange struct {
	Command     []string      `yaml:"command"`
	Timeout     time.Duration `yaml:"timeout"`
	PIDFile     string        `yaml:"pid_file"`
	Signal      string        `yaml:"signal"`
	MinInterval time.Duration `yaml:"min_interval"`
}

// single is the name of the one credential that needs none.
const single = "credential"

// readTemplate returns the template that is at a path, if one is given, and what is wrong
// with that.
func readTemplate(template, from string) (text, wrong string) {
	switch {
	case from == "":
		return template, ""
	case template != "":
		return template, "and template exclude each other"
	case !filepath.IsAbs(from):
		return unread, "must be an absolute path"
	}
	text, err := supervise.ReadTemplate(from)
	switch {
	case err != nil:
		return unread, err.Error()
	case text == "":
		return unread, from + " is empty"
	}
	return text, ""
}

// unread stands for a template that there is none of, so that this is said once.
const unread = "unread"

func content(name, format, variable, template string, one Prefetch, several map[string]Prefetch) deliver.File {
	f := deliver.File{Name: name, Format: deliver.Format(format), Variable: variable, Template: template, Credentials: map[string]sdk.Request{}}
	if format == "" {
		f.Format = deliver.Token
	}
	for name, p := range several {
		f.Credentials[name] = p.request()
	}
	if one.Audience != "" {
		f.Credentials[single] = one.request()
	}
	return f
}

func (p *Prefetch) request() sdk.Request {
	return sdk.Request{Audience: p.Audience, Scopes: p.Scopes, TTL: p.TTL, Binding: token.Binding(p.Binding)}
}

// target reads a file's configuration; an owner that isn't on this host is an error.
func (f *File) target() (deliver.Target, error) {
	text, wrong := readTemplate(f.Template, f.TemplateFile)
	uid, gid, err := owners("", f.Owner, f.Group)
	if wrong != "" {
		err = errors.Join(config.Wrong("template_file", "%s", wrong), err)
	}
	return deliver.Target{
		Path: f.Path, Mode: fs.FileMode(f.Mode), UID: uid, GID: gid, Change: f.OnChange.change(),
		Files: []deliver.File{content("", f.Format, f.Variable, text, f.Credential, f.Credentials)},
	}, err
}

func (d *Directory) target() (deliver.Target, error) {
	uid, gid, err := owners("", d.Owner, d.Group)
	t := deliver.Target{Path: d.Path, Directory: true, Mode: fs.FileMode(d.Mode), UID: uid, GID: gid, Change: d.OnChange.change()}
	errs := []error{err}
	for i := range d.Files {
		f := &d.Files[i]
		text, wrong := readTemplate(f.Template, f.TemplateFile)
		if wrong != "" {
			errs = append(errs, config.Wrong(fmt.Sprintf("files[%d].template_file", i), "%s", wrong))
		}
		t.Files = append(t.Files, content(f.Name, f.Format, f.Variable, text, f.Credential, f.Credentials))
	}
	return t, errors.Join(errs...)
}

func (o *OnChange) change() *deliver.Change {
	if len(o.Command) == 0 && o.PIDFile == "" && o.Signal == "" && o.Timeout == 0 && o.MinInterval == 0 {
		return nil
	}
	return &deliver.Change{Command: o.Command, Timeout: o.Timeout, PIDFile: o.PIDFile, Signal: o.Signal, MinInterval: o.MinInterval}
}

// owners looks up whose files are, by the keys owner and group after prefix; nil for what
// isn't given.
func owners(prefix, owner, group string) (uid, gid *int, err error) {
	var errs []error
	if owner != "" {
		n, err := userID(owner)
		if err != nil {
			errs = append(errs, config.Wrong(prefix+"owner", "%v", err))
		}
		uid = &n
	}
	if group != "" {
		n, err := groupID(group)
		if err != nil {
			errs = append(errs, config.Wrong(prefix+"group", "%v", err))
		}
		gid = &n
	}
	return uid, gid, errors.Join(errs...)
}

// userID reads a number or looks up a name.
func userID(name string) (int, error) {
	if n, err := strconv.ParseUint(name, 10, 31); err == nil {
		return int(n), nil
	}
	u, err := user.Lookup(name)
	if err != nil {
		return 0, fmt.Errorf("no user %q on this host", name)
	}
	return strconv.Atoi(u.Uid)
}

// Validate checks all but the folders on the host.
func (f *File) Validate() error {
	t, err := f.target()
	errs := []error{err}
	if f.Credential.Audience != "" && len(f.Credentials) > 0 {
		errs = append(errs, config.Wrong("credentials", exclusive))
	}
	for _, p := range field.Errors(t.Validate()) {
		errs = append(errs, problem(strings.TrimPrefix(p.Key, "files[0]."), p.Message))
	}
	return errors.Join(errs...)
}

const exclusive = "and credential exclude each other"

// problem names the key as the file has it.
func problem(key, message string) error {
	return config.Wrong(strings.Replace(key, "credentials."+single+".", single+".", 1), "%s", message)
}

// Validate checks all but the folders on the host.
func (d *Directory) Validate() error {
	t, err := d.target()
	errs := []error{err}
	for i := range d.Files {
		if f := &d.Files[i]; f.Credential.Audience != "" && len(f.Credentials) > 0 {
			errs = append(errs, config.Wrong(fmt.Sprintf("files[%d].credentials", i), exclusive))
		}
	}
	for _, p := range field.Errors(t.Validate()) {
		errs = append(errs, problem(p.Key, p.Message))
	}
	return errors.Join(errs...)
}

// targets are what the agent delivers to. Owners were looked up by Validate.
func (w *Workload) targets() []deliver.Target {
	var out []deliver.Target
	for i := range w.Files {
		t, _ := w.Files[i].target()
		out = append(out, t)
	}
	for i := range w.Directories {
		t, _ := w.Directories[i].target()
		out = append(out, t)
	}
	return out
}

// targetKey is where the file says the i-th target.
func (w *Workload) targetKey(i int) string {
	if n := i - len(w.Files); n >= 0 {
		return fmt.Sprintf("directories[%d].path", n)
	}
	return fmt.Sprintf("files[%d].path", i)
}
