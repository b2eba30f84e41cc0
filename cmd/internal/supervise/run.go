package supervise

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/dayflyhq/dayfly/agent/deliver"
	"github.com/dayflyhq/dayfly/sdk"
	"google.golang.org/grpc/codes"
)

// sayAfter is how long it is silent about what it waits for.
const sayAfter = 3 * time.Second

// Config says what to run. Spec, Keeper, Program and Environ must be set.
type Config struct {
	Spec   *Spec
	Keeper Keeper
	// Program is the name of a program and its arguments.
	Program []string
	// Environ is what the program's environment is made of: variables that this package
	// sets are taken from it, as are those that another exec may have set.
	Environ []string
	// Ready says whether there is all that the Spec doesn't know of; it may change when the
	// Keeper does. Nil: there is.
	Ready func() bool
	// Folder is where files go; nil where there are none. Run removes it.
	Folder *Folder
	// Log hears of what is done to the program. Nil: nobody does.
	Log *slog.Logger

	// Signals are those that came since the start, from Catch.
	Signals <-chan os.Signal
}

// An Exit is how it ended, for the process's exit code.
type Exit struct {
	Code int
	// Err says why the program wasn't started or was ended; nil where the code is its own.
	Err error
}

// Find looks the program up before anything is asked of anyone, so that no credential is
// issued for nothing.
func Find(name string) (string, *Exit) {
	found, err := lookPath(name)
	if err != nil {
		return "", notRunnable(name, err)
	}
	return found, nil
}

// Run waits, starts the program and stays with it until it has ended, or until ctx ends:
// then the program is ended too.
func Run(ctx context.Context, cfg Config) Exit {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	found, fail := Find(cfg.Program[0])
	if fail != nil {
		return *fail
	}
	r := &runner{cfg: cfg, found: found, wake: make(chan struct{}, 1), exited: make(chan result, 1)}
	if len(cfg.Spec.Files) > 0 {
		stop, err := r.deliver()
		if err != nil {
			return Exit{ExitFailed, err}
		}
		defer stop()
	}
	stop := r.reap()
	defer stop()
	return r.loop(ctx)
}

// runner is one Run. All of it belongs to the goroutine of loop, but for what is passed
// by channels.
type runner struct {
	cfg     Config
	found   string // the program's path
	machine machine
	seen    seen
	has     holdings
	files   *deliver.Deliverer

	wake   chan struct{} // has an element when files have changed
	exited chan result
	child  *child // nil while there is none
	code   int    // of the last child
	stop   syscall.Signal
	ended  bool  // the last child has
	offer  offer // of the last view
	why    cause // the last child was told to end
}

// deliver keeps the files, until the function that it returns is called.
func (r *runner) deliver() (func(), error) {
	targets := make([]deliver.Target, len(r.cfg.Spec.Files))
	for i, f := range r.cfg.Spec.Files {
		name := f.Name
		f.Name = ""
		targets[i] = deliver.Target{Path: filepath.Join(r.cfg.Folder.Path, name), Files: []deliver.File{f}}
	}
	d, err := deliver.New(deliver.Config{
		Targets: targets,
		Newest: func(q sdk.Request) *sdk.Credential {
			c := r.cfg.Keeper.Newest(q)
			r.seen.note(c, time.Now())
			return c
		},
		Changed: func([]sdk.Request) func() <-chan struct{} { return r.cfg.Keeper.Changed },
		Alive:   r.cfg.Keeper.Alive, Delivered: r.kick,
		Log: slog.New(onlyTrouble{r.cfg.Log.Handler()}),
	})
	if err == nil {
		err = d.Open()
	}
	if err != nil {
		return nil, fmt.Errorf("files: %w", err)
	}
	r.files = d
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); d.Run(ctx) }()
	return func() { cancel(); <-done }, nil
}

// onlyTrouble leaves out what goes well: each renewal of each file.
type onlyTrouble struct{ slog.Handler }

func (h onlyTrouble) Enabled(ctx context.Context, l slog.Level) bool {
	return l >= slog.LevelWarn && h.Handler.Enabled(ctx, l)
}

func (h onlyTrouble) WithAttrs(attrs []slog.Attr) slog.Handler {
	return onlyTrouble{h.Handler.WithAttrs(attrs)}
}

func (r *runner) kick() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// loop looks, does what is due, and waits for news.
func (r *runner) loop(ctx context.Context) Exit {
	began := time.Now()
	r.machine = machine{spec: r.cfg.Spec}
	if r.cfg.Spec.Wait > 0 {
		r.machine.deadline = began.Add(r.cfg.Spec.Wait)
	}
	said := ""
	ending := ctx.Done()
	for {
		changed := r.cfg.Keeper.Changed() // before anything is looked at
		v := r.view()
		d := r.machine.next(v)
		if d.do != idle {
			if exit := r.act(d, v); exit != nil {
				return *exit
			}
			continue
		}
		wait := d.wait
		if r.machine.phase != waiting {
			wait, said = min(wait, r.has.due(v.now)), ""
		} else {
			if quiet := sayAfter - v.now.Sub(began); quiet > 0 {
				wait = min(wait, quiet)
			} else if why := r.missing(); why != said {
				said = why
				r.cfg.Log.Info("waiting", "for", why)
			}
		}
		timer := time.NewTimer(wait)
		select {
		case <-changed:
		case <-r.wake:
		case <-timer.C:
		case res := <-r.exited:
			r.ended, r.code = true, res.code
		case s := <-r.cfg.Signals:
			r.signalled(s.(syscall.Signal))
		case <-ending:
			ending = nil
			r.stop = syscall.SIGTERM
			if r.machine.phase == running {
				r.machine.end(r.view(), expired, asItHasDone)
				r.child.signal(syscall.SIGTERM)
			}
		}
		timer.Stop()
	}
}

// view is the world of this moment.
func (r *runner) view() view {
	now := time.Now()
	r.offer = r.offered(now)
	v := view{now: now, ready: r.offer.whole, exited: r.ended, code: r.code, stop: r.stop}
	if r.machine.phase == waiting {
		v.refused = r.refusal() != nil
		return v
	}
	r.has.look(now, r.offer.slots, r.cfg.Spec.kind, r.cfg.Keeper.Revoked)
	v.has = r.has.events
	return v
}

// kind is that of a slot of an offer.
func (s *Spec) kind(i int) kind {
	switch {
	case i < len(s.Variables):
		return variable
	case i < len(s.Variables)+len(s.Files):
		return file
	}
	return beside
}

// refusal is why there is a credential that won't come by itself, nil if there is none.
func (r *runner) refusal() error {
	for _, q := range r.cfg.Spec.Requests() {
		if e := r.cfg.Keeper.Refusal(q); e != nil && stands(e.Code) && r.cfg.Keeper.Newest(q) == nil {
			return fmt.Errorf("no credential for %s: %w", q.Audience, e)
		}
	}
	return nil
}

// stands says whether a refusal is one that no time changes; what an SVID that is about to
// rotate, or a fault of somebody's, makes may pass.
func stands(c codes.Code) bool {
	switch c {
	case codes.PermissionDenied, codes.InvalidArgument, codes.FailedPrecondition, codes.NotFound, codes.Unimplemented:
		return true
	}
	return false
}

// An offer is what a program that is started now gets.
type offer struct {
	slots [][]held          // variables, files, and what is beside; nil for one that isn't there
	creds []*sdk.Credential // of the variables
	whole bool
}

func (r *runner) offered(now time.Time) offer {
	o := offer{whole: r.cfg.Ready == nil || r.cfg.Ready()}
	add := func(list []held, ok bool) {
		if !ok {
			list, o.whole = nil, false
		}
		o.slots = append(o.slots, list)
	}
	newest := func(q sdk.Request) *sdk.Credential {
		c := r.cfg.Keeper.Newest(q)
		if h := r.seen.note(c, now); h != nil && !h.over(now) {
			add([]held{*h}, true)
		} else {
			add(nil, false)
		}
		return c
	}
	for _, one := range r.cfg.Spec.Variables {
		o.creds = append(o.creds, newest(one.Request))
	}
	for _, s := range r.status() {
		var list []held
		for _, grant := range s.Grants {
			if h := r.seen.get(grant); h != nil {
				list = append(list, *h)
			}
		}
		add(list, s.Present && len(list) == len(s.Grants))
	}
	for _, q := range r.cfg.Spec.Beside {
		newest(q)
	}
	return o
}

// status is how each file is.
func (r *runner) status() []deliver.Status {
	if r.files == nil {
		return nil
	}
	return r.files.Status()
}

// missing says what the start waits for.
func (r *runner) missing() string {
	var out []string
	for _, q := range r.cfg.Spec.Requests() {
		if r.cfg.Keeper.Newest(q) != nil {
			continue
		}
		text := "a credential for " + q.Audience
		if e := r.cfg.Keeper.Refusal(q); e != nil {
			text += ": " + e.Error()
		}
		out = append(out, text)
	}
	for _, s := range r.status() {
		if len(out) == 0 && s.Err != nil {
			out = append(out, fmt.Sprintf("the file %s: %v", filepath.Base(s.Path), s.Err))
		}
	}
	if len(out) == 0 {
		out = append(out, "files")
	}
	if t := r.cfg.Keeper.Trouble(); t != "" {
		out = append(out, t)
	}
	return strings.Join(out, "; ")
}

// act does what was decided, and returns how it ended if it has.
func (r *runner) act(d decision, v view) *Exit {
	switch d.do {
	case start:
		return r.start()
	case tell:
		r.has.events[d.cause] = false
		text := "a credential was " + d.cause.String()
		if d.ends {
			r.why = d.cause
			r.cfg.Log.Warn(text+": ending the program", "within", r.cfg.Spec.Grace)
		} else {
			r.cfg.Log.Info(text+": signalling the program", "signal", d.signal.String())
		}
		r.child.signal(d.signal)
	case leave:
		r.has.events[d.cause] = false
		r.left(d.cause, v.now)
	case kill:
		r.cfg.Log.Warn("the program didn't end in time: killing it")
		r.child.signal(syscall.SIGKILL)
	case sweep:
		killOrphans()
	case exit:
		return r.exit(d.code)
	}
	return nil
}

// left says what the program has to live with.
func (r *runner) left(c cause, now time.Time) {
	switch c {
	case revoked:
		r.cfg.Log.Warn("a credential that the program has was revoked: it goes on, as --on-revoke says")
	case expired:
		r.cfg.Log.Warn("a credential that the program has is expired: it goes on, as --on-expiry says")
	case renewed:
		for i, one := range r.cfg.Spec.Variables {
			s := &r.has.slots[i]
			if s.news == "" || s.dead || s.said {
				continue
			}
			s.said = true
			r.cfg.Log.Warn("a running program's environment can't be renewed: use --file, or --on-renew restart",
				"variable", one.Name, "stale_from", s.now[0].expires.UTC().Format(time.RFC3339), "in", s.now[0].expires.Sub(now).Round(time.Second))
		}
	}
}

func (r *runner) start() *Exit {
	r.has.begin(r.offer.slots)
	r.ended, r.code = false, 0
	c, err := startChild(r.found, r.cfg.Program, r.environ(), r.exited)
	if err != nil {
		return notRunnable(r.cfg.Program[0], err)
	}
	r.child = c
	return nil
}

// environ is the program's environment.
func (r *runner) environ() []string {
	set := map[string]string{}
	for i, one := range r.cfg.Spec.Variables {
		c := r.offer.creds[i]
		set[one.Name] = c.Token.Reveal()
		set[one.Name+expiresSuffix] = c.Expires.UTC().Truncate(time.Second).Format(time.RFC3339)
	}
	if len(r.cfg.Spec.Files) > 0 {
		set[FilesVariable] = r.cfg.Folder.Path
	}
	// An exec around this one has set these for itself.
	gone := []string{deliver.DefaultVariable, deliver.DefaultVariable + expiresSuffix, FilesVariable}
	env := slices.DeleteFunc(slices.Clone(r.cfg.Environ), func(kv string) bool {
		name, _, _ := strings.Cut(kv, "=")
		_, ours := set[name]
		return ours || slices.Contains(gone, name)
	})
	for _, name := range slices.Sorted(maps.Keys(set)) {
		env = append(env, name+"="+set[name])
	}
	return env
}

func (r *runner) exit(code int) *Exit {
	switch {
	case r.machine.phase == stopping && r.machine.then == asRevoked:
		return &Exit{code, errors.New("the program was ended because a credential that it had was " + r.why.String())}
	case code == ExitWaited && !r.machine.started:
		return &Exit{code, fmt.Errorf("not ready after %v: %s", r.cfg.Spec.Wait, r.missing())}
	case code == ExitFailed && !r.machine.started:
		return &Exit{code, r.refusal()}
	}
	return &Exit{Code: code}
}

// signalled passes a signal on, or ends the waiting.
func (r *runner) signalled(s syscall.Signal) {
	alive := r.machine.phase != waiting && !r.ended
	switch {
	case s == syscall.SIGTERM, !alive && slices.Contains(ends, s):
		r.stop = s // stands also if what runs now is ended to be started anew
	case r.machine.phase == stopping && (s == syscall.SIGINT || s == syscall.SIGQUIT):
		r.stop = s
	}
	mine := fromTerminal(s)
	if alive && !mine {
		r.child.signal(s)
	}
	suspend(s)
}

// ends are the signals that end whoever only waits.
var ends = []syscall.Signal{syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGTERM}

// Catch takes over the process's signals, but for those that were ignored when it began:
// they stay so, here and in the program. What it returns is for Config.Signals.
func Catch() (<-chan os.Signal, func()) {
	c := make(chan os.Signal, 64)
	var list []os.Signal
	for _, s := range forwarded {
		if !ignoredAtStart[s] {
			list = append(list, s)
		} else {
			signal.Ignore(s)
		}
	}
	signal.Notify(c, list...)
	// A log that nobody reads any more is no reason to die.
	broken := make(chan os.Signal, 1)
	signal.Notify(broken, syscall.SIGPIPE)
	return c, func() { signal.Stop(c); signal.Stop(broken) }
}

var ignoredAtStart = func() map[syscall.Signal]bool {
	out := map[syscall.Signal]bool{}
	for _, s := range forwarded {
		out[s] = signal.Ignored(s)
	}
	return out
}()
