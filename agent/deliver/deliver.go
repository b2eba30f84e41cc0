package deliver

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dayflyhq/dayfly/agent/field"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk"
)

const (
	// DefaultMode is that of a file if nothing else is said: its owner's alone.
	DefaultMode fs.FileMode = 0o600
	// WidestMode is the most that a file may allow: its owner, and a group to read. A group
	// must be named for that; others never may.
	WidestMode fs.FileMode = 0o640
	// MinTTL is the shortest life that may be asked for for a file: one that goes a moment
	// before its credential, and is renewed well before that, needs some.
	MinTTL = 10 * time.Second
	// MaxTargets and MaxFiles bound how many targets there are, and the files of each.
	MaxTargets, MaxFiles = 128, 64
)

// A File is one file and what is in it.
type File struct {
	// Name is the file's name in a folder of several; empty where Target.Path is the file.
	Name   string
	Format Format
	// Variable is for the format Env. Empty: DefaultVariable.
	Variable string
	// Template is the text of the format Template. Beside the language's own functions it
	// has token, grant, audience, scope, expires and expires_unix, each of a credential's
	// name, and json, base64 and quote.
	Template string
	// Credentials are what the file holds, by the names that the template has for them:
	// exactly one for the other formats.
	Credentials map[string]sdk.Request
}

// A Target is what is written at once: a file, or the files of a folder.
type Target struct {
	// Path is absolute. Its folder must exist, and be writable for root and this user only,
	// as must be the way to it.
	Path string
	// Directory says that Path is a folder of its own, made if it isn't there, whose Files
	// are exchanged together by the swap of a symbolic link, as in a projected volume of
	// Kubernetes: each is a link to ..data/NAME, and ..data to a folder of one generation.
	Directory bool
	// Files is one file unless Directory.
	Files []File
	// Mode is that of the files: within WidestMode; zero means DefaultMode.
	Mode fs.FileMode
	// UID and GID are whose the files are; nil: this user's. Only root may give files to
	// another user.
	UID, GID *int
	// Change is how the program is told; nil: it isn't.
	Change *Change
}

// Validate says all that is wrong with the target, whatever is on this host: *field.Error values,
// joined.
func (t *Target) Validate() error {
	_, err := t.compile()
	return err
}

func (t *Target) compile() (renders []func(credentials) ([]byte, error), err error) {
	var errs []error
	errs = append(errs, checkPath(t.Path), checkAccess(t.Mode, t.GID))
	if n := len(t.Files); n < 1 || n > MaxFiles || n > 1 && !t.Directory {
		errs = append(errs, field.Wrong("files", "are %d, and must be one, or up to %d in a folder", n, MaxFiles))
	}
	seen := map[string]bool{}
	for i := range t.Files {
		f := &t.Files[i]
		if t.Directory {
			if err := plainName(f.Name); err != nil {
				errs = append(errs, field.Wrong(fmt.Sprintf("files[%d].name", i), "%v", err))
			}
			if seen[f.Name] {
				errs = append(errs, field.Wrong(fmt.Sprintf("files[%d].name", i), "%q is there twice", f.Name))
			}
			seen[f.Name] = true
		}
		render, err := f.compile()
		errs = append(errs, field.Within(fmt.Sprintf("files[%d]", i), err))
		renders = append(renders, render)
	}
	if t.Change != nil {
		errs = append(errs, field.Within("on_change", t.Change.validate()))
	}
	return renders, errors.Join(errs...)
}

func checkPath(path string) error {
	if !filepath.IsAbs(path) || filepath.Clean(path) != path || path == "/" {
		return field.Wrong("path", "must be absolute and plain")
	}
	if err := plainName(filepath.Base(path)); err != nil {
		return field.Wrong("path", "its last part %v", err)
	}
	return nil
}

func checkAccess(mode fs.FileMode, gid *int) error {
	var errs []error
	if mode&^WidestMode != 0 || mode != 0 && mode&0o400 == 0 {
		errs = append(errs, field.Wrong("mode", "must be within %04o, and its owner may read", WidestMode))
	}
	if mode&0o040 != 0 && gid == nil {
		errs = append(errs, field.Wrong("group", "must be named where it may read"))
	}
	return errors.Join(errs...)
}

// Config says what to deliver and where it comes from. Targets, Newest,
// Changed and Alive must be set.
type Config struct {
	Targets []Target
	// Newest returns the newest credential of a request that may be given out now, nil if
	// there is none. It doesn't wait.
	Newest func(sdk.Request) *sdk.Credential
	// Changed is called as a target begins, and returns what returns a channel that is
	// closed when what Newest says of these, or Alive of any, may have changed next, but for
	// what expires.
	Changed func([]sdk.Request) func() <-chan struct{}
	// Alive says whether a credential of these claims may be used, as far as is known.
	Alive func(*token.Claims) bool

	// Delivered is called when what Status says of what is on disk has changed. It must be
	// quick. Nil: nobody is.
	Delivered func()
	// Run runs the command of a Change, for a process that reaps more than what it started.
	// Nil: (*exec.Cmd).Run.
	Run func(*exec.Cmd) error

	// Now is the clock that credentials are aged with. Nil means time.Now.
	Now func() time.Time
	// Log never gets a credential. Nil: nothing is logged.
	Log *slog.Logger
}

// Counts is what a Deliverer counts.
type Counts struct {
	Written, WriteFailures atomic.Uint64
	Removed                atomic.Uint64 // for want of a living credential; not at shutdown
	Told, TellFailures     atomic.Uint64
}

// A Status is how one target is.
type Status struct {
	Path string
	// Present says that it is on disk, until Until at the longest.
	Present bool
	Until   time.Time
	// Grants are the credentials that are on disk.
	Grants []string
	// Err is why it can't be written or removed now, ChangeErr why the program can't be
	// told; nil if they can.
	Err, ChangeErr error
}

// A Deliverer keeps files. Run makes it work.
type Deliverer struct {
	Counts Counts
	cfg    Config

	started  chan struct{} // closed once Run has begun
	applying sync.Mutex    // held over the whole of a change, and by the end of Run
	ctx      context.Context
	wg       sync.WaitGroup

	mu      sync.Mutex
	targets []*target
}

// New checks the configuration. It touches nothing.
func New(cfg Config) (*Deliverer, error) {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Delivered == nil {
		cfg.Delivered = func() {}
	}
	if cfg.Run == nil {
		cfg.Run = (*exec.Cmd).Run
	}
	d := &Deliverer{cfg: cfg, started: make(chan struct{})}
	var err error
	d.targets, err = d.compile(cfg.Targets)
	return d, err
}

func (d *Deliverer) compile(specs []Target) ([]*target, error) {
	var out []*target
	var errs []error
	if len(specs) > MaxTargets {
		errs = append(errs, fmt.Errorf("are more than %d", MaxTargets))
	}
	for i, spec := range specs {
		renders, err := spec.compile()
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", spec.Path, err))
			continue
		}
		for _, other := range specs[:i] {
			if Overlap(&spec, &other) {
				errs = append(errs, fmt.Errorf("%s: is in the way of %s", spec.Path, other.Path))
			}
		}
		out = append(out, newTarget(d.cfg, spec, renders, &d.Counts))
	}
	return out, errors.Join(errs...)
}

// Overlap says whether two targets would write at one place.
func Overlap(a, b *Target) bool {
	return a.Path == b.Path || a.Directory && strings.HasPrefix(b.Path, a.Path+"/") || b.Directory && strings.HasPrefix(a.Path, b.Path+"/")
}

// Open looks at every target's place: what an earlier process left there stays if it is
// alive as far as it says itself, and goes if not. After an error nothing is left.
func (d *Deliverer) Open() error { return open(d.targets) }

// Try is Open for all but the targets at these paths, which somebody else delivers to now.
func (d *Deliverer) Try(except []string) error {
	return open(slices.DeleteFunc(slices.Clone(d.targets), func(t *target) bool { return slices.Contains(except, t.spec.Path) }))
}

func open(targets []*target) error {
	var errs []error
	for _, t := range targets {
		if err := t.adopt(); err != nil {
			errs = append(errs, fmt.Errorf("delivering to %s: %w", t.spec.Path, err))
		}
	}
	if len(errs) == 0 {
		return nil
	}
	for _, t := range targets {
		if len(t.disk) > 0 {
			errs = append(errs, t.clear())
		}
	}
	return errors.Join(errs...)
}

// Run keeps the files until ctx ends. When it returns they are gone.
func (d *Deliverer) Run(ctx context.Context) {
	d.applying.Lock()
	d.ctx = ctx
	for _, t := range d.targets {
		d.start(t)
	}
	d.applying.Unlock()
	close(d.started)
	<-ctx.Done()
	d.applying.Lock() // nothing is started any more
	defer d.applying.Unlock()
	d.wg.Wait()
}

// start makes a target work until it is stopped.
func (d *Deliverer) start(t *target) {
	ctx, cancel := context.WithCancel(d.ctx)
	var own sync.WaitGroup
	if t.teller != nil {
		own.Go(func() { t.teller.run(ctx) })
	}
	own.Go(func() { t.run(ctx) })
	t.stop = func() { cancel(); own.Wait() }
	d.wg.Go(func() { own.Wait(); cancel() })
}

// Apply changes what is delivered, while Run runs; it waits for that to begin. What stays the same goes on undisturbed.
// A file or folder whose target has changed is replaced as by a renewal, and one that is no
// target any more is removed. After an error nothing has changed.
func (d *Deliverer) Apply(specs []Target) error {
	<-d.started
	d.applying.Lock()
	defer d.applying.Unlock()
	if d.ctx.Err() != nil {
		return errors.New("it has ended")
	}
	next, err := d.compile(specs)
	if err != nil {
		return err
	}
	gone := map[string]*target{}
	for _, t := range d.targets {
		gone[t.spec.Path] = t
	}
	var fresh, begin []*target
	changed := map[*target]*target{} // new to old
	for i, t := range next {
		switch old := gone[t.spec.Path]; {
		case old != nil && reflect.DeepEqual(old.spec, t.spec):
			next[i] = old
			delete(gone, t.spec.Path)
			continue
		case old != nil && old.spec.Directory == t.spec.Directory:
			changed[t] = old
			delete(gone, t.spec.Path)
		default:
			fresh = append(fresh, t)
		}
		begin = append(begin, t)
	}
	if err := open(fresh); err != nil {
		return err
	}
	for _, old := range gone {
		old.stop()
	}
	for t, old := range changed {
		old.left = true
		old.stop()
		t.inherit(old)
	}
	for _, t := range begin {
		d.start(t)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.targets = next
	return nil
}

func (d *Deliverer) now() []*target {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.targets
}

// Look is for whoever looks at a clock anyway: it wakes what should have removed its file
// by now, as timers sleep with the machine and know nothing of a clock that was set.
func (d *Deliverer) Look() {
	for _, t := range d.now() {
		if s := t.status(); s.Present && (&member{expires: s.Until}).left(t.cfg.Now()) <= 0 {
			t.kick()
		}
	}
}

// Status says how each target is.
func (d *Deliverer) Status() []Status {
	targets := d.now()
	out := make([]Status, len(targets))
	for i, t := range targets {
		out[i] = t.status()
	}
	return out
}
