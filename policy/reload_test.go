package policy_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/fstest"
	"time"

	"github.com/dayflyhq/dayfly/policy"
)

// patience is for machines that are slow; nothing waits for it to pass.
const patience = 60 * time.Second

// following is a policy that follows its folder.
type following struct {
	*policy.Policy
	reloads chan error
	log     *lockedBuffer
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// follow runs a policy on dir until the test ends. Rescans are off, so that what
// is seen is what the file system said, unless the test asks for them.
func follow(t *testing.T, dir string, rescan time.Duration) *following {
	t.Helper()
	f := &following{reloads: make(chan error, 100), log: &lockedBuffer{}}
	f.Policy = load(t, policy.Config{
		Dir:      dir,
		Rescan:   rescan,
		Log:      slog.New(slog.NewTextHandler(f.log, nil)),
		OnReload: func(err error) { f.reloads <- err },
		// A loaded machine must not look like a broken policy.
		Timeout: patience,
	})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- f.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return f
}

// until waits for a reload with the wanted outcome, and then for done.
func (f *following) until(t *testing.T, wantErr bool, done func() bool) {
	t.Helper()
	timeout := time.After(patience)
	for {
		select {
		case err := <-f.reloads:
			if (err != nil) == wantErr && done() {
				return
			}
		case <-timeout:
			t.Fatalf("no such reload; status %+v\n%s", f.Status(), f.log)
		}
	}
}

func (f *following) allows(t *testing.T, scope string) bool {
	t.Helper()
	d, err := f.Decide(t.Context(), policy.Input{Action: policy.ActionIssue, Caller: policy.Caller{ID: id("/ns/shop/payments")},
		Audience: "orders", Scopes: []string{scope}})
	if err != nil {
		t.Fatal(err)
	}
	return d.Allow
}

func always() bool { return true }

// demoData is the demo's data with the scope orders.write renamed to scope.
func demoData(t *testing.T, scope string) string {
	t.Helper()
	f, err := policy.Demo().Open("data.yaml")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var b bytes.Buffer
	if _, err := b.ReadFrom(f); err != nil {
		t.Fatal(err)
	}
	return strings.ReplaceAll(b.String(), "orders.write", scope)
}

func TestReload(t *testing.T) {
	dir := written(t, nil)
	f := follow(t, dir, time.Hour)
	has := func(scope string) func() bool { return func() bool { return f.allows(t, scope) } }

	put(t, dir, "data.yaml", demoData(t, "orders.one"))
	f.until(t, false, has("orders.one"))
	if s := f.Status(); s.Generation != 2 || s.Err != nil {
		t.Errorf("status: %+v", s)
	}

	for name, broken := range map[string]string{
		"data.yaml":   "entitlement:\n",
		"policy.rego": "package policy\ndecision {",
		"mine.rego":   "package mine\nx := http.send({})",
	} {
		put(t, dir, name, broken)
		f.until(t, true, always)
		s := f.Status()
		var problems policy.Problems
		if s.Generation != 2 || !errors.As(s.Err, &problems) || problems[0].File != name {
			t.Errorf("%s: status %+v, want generation 2 and what is wrong", name, s)
		}
		if !f.allows(t, "orders.one") {
			t.Errorf("%s: the last good policy isn't in force", name)
		}
		if !strings.Contains(f.log.String(), "level=ERROR") {
			t.Errorf("%s: not said loudly:\n%s", name, f.log)
		}
		// What was in force before heals it.
		switch name {
		case "data.yaml":
			put(t, dir, name, demoData(t, "orders.one"))
		case "policy.rego":
			put(t, dir, name, defaultRules(t))
		default:
			put(t, dir, name, "")
		}
		f.until(t, false, always)
		if s := f.Status(); s.Generation != 2 || s.Err != nil {
			t.Errorf("%s mended: status %+v", name, s)
		}
	}

	// A broken file, and then a fixed one with something new.
	put(t, dir, "data.yaml", "{")
	f.until(t, true, always)
	put(t, dir, "data.yaml", demoData(t, "orders.two"))
	f.until(t, false, has("orders.two"))
	if f.allows(t, "orders.one") {
		t.Error("the old data is still in force")
	}
}

func defaultRules(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := policy.WriteDefault(dir); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(dir, "policy.rego"))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestReloadOfAnEmptyFolderKeepsTheLastGood(t *testing.T) {
	dir := written(t, nil)
	f := follow(t, dir, time.Hour)
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		put(t, dir, e.Name(), "")
	}
	f.until(t, true, func() bool { return strings.Contains(f.Status().Err.Error(), "no policy") })
	if !f.allows(t, "orders.write") {
		t.Error("the last good policy isn't in force")
	}
}

// TestReloadByRename is how editors save: a new file takes the name of the old.
func TestReloadByRename(t *testing.T) {
	dir := written(t, nil)
	f := follow(t, dir, time.Hour)
	for _, scope := range []string{"orders.one", "orders.two"} {
		put(t, dir, ".data.yaml.swp", demoData(t, scope))
		rename(t, filepath.Join(dir, "data.yaml"), filepath.Join(dir, "data.yaml~"))
		rename(t, filepath.Join(dir, ".data.yaml.swp"), filepath.Join(dir, "data.yaml"))
		f.until(t, false, func() bool { return f.allows(t, scope) })
	}
}

// TestReloadOfTheWholeFolder replaces the folder itself: by a rename, and by a
// link that points elsewhere.
func TestReloadOfTheWholeFolder(t *testing.T) {
	old, next := written(t, nil), written(t, nil)
	put(t, next, "data.yaml", demoData(t, "orders.one"))
	f := follow(t, old, time.Hour)
	rename(t, old, old+".old")
	rename(t, next, old)
	f.until(t, false, func() bool { return f.allows(t, "orders.one") })
	// It is the new folder that is followed now.
	put(t, old, "data.yaml", demoData(t, "orders.two"))
	f.until(t, false, func() bool { return f.allows(t, "orders.two") })
}

func TestReloadOfALinkedFolder(t *testing.T) {
	one, two := written(t, nil), written(t, nil)
	put(t, two, "data.yaml", demoData(t, "orders.one"))
	link := filepath.Join(t.TempDir(), "current")
	relink(t, one, link)
	f := follow(t, link, time.Hour)
	relink(t, two, link)
	f.until(t, false, func() bool { return f.allows(t, "orders.one") })
	put(t, two, "data.yaml", demoData(t, "orders.two"))
	f.until(t, false, func() bool { return f.allows(t, "orders.two") })
}

// TestReloadKubernetes is how a ConfigMap is mounted: files are links through
// ..data, which is swapped as a whole.
func TestReloadKubernetes(t *testing.T) {
	dir := t.TempDir()
	for version, scope := range map[string]string{"..1": "orders.write", "..2": "orders.one"} {
		if err := policy.WriteDemo(filepath.Join(dir, version)); err != nil {
			t.Fatal(err)
		}
		put(t, filepath.Join(dir, version), "data.yaml", demoData(t, scope))
	}
	relink(t, "..1", filepath.Join(dir, "..data"))
	for _, name := range []string{"data.yaml", "policy.rego"} {
		relink(t, filepath.Join("..data", name), filepath.Join(dir, name))
	}
	f := follow(t, dir, time.Hour)
	relink(t, "..2", filepath.Join(dir, "..data"))
	f.until(t, false, func() bool { return f.allows(t, "orders.one") })
}

// TestRescan changes a file where no event of the folder tells of it.
func TestRescan(t *testing.T) {
	dir, elsewhere := written(t, nil), t.TempDir()
	put(t, dir, "data.yaml", "")
	put(t, elsewhere, "data.yaml", demoData(t, "orders.write"))
	relink(t, filepath.Join(elsewhere, "data.yaml"), filepath.Join(dir, "data.yaml"))
	f := follow(t, dir, 10*time.Millisecond)
	put(t, elsewhere, "data.yaml", demoData(t, "orders.one"))
	f.until(t, false, func() bool { return f.allows(t, "orders.one") })
}

// TestReloadBetweenLoadAndRun changes the folder before anybody watches it.
func TestReloadBetweenLoadAndRun(t *testing.T) {
	dir := written(t, nil)
	reloads := make(chan error, 10)
	p := load(t, policy.Config{Dir: dir, Rescan: time.Hour, OnReload: func(err error) { reloads <- err }})
	put(t, dir, "data.yaml", demoData(t, "orders.one"))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- p.Run(ctx) }()
	select {
	case err := <-reloads:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(patience):
		t.Error("Run didn't look at the folder")
	}
	cancel()
	<-done
}

// TestBrokenFolderIsSaidOnce holds that a folder that stays broken doesn't fill
// the log.
func TestBrokenFolderIsSaidOnce(t *testing.T) {
	dir := written(t, nil)
	var said int
	p := load(t, policy.Config{Dir: dir, OnReload: func(error) { said++ }})
	put(t, dir, "data.yaml", "{")
	for range 3 {
		if err := p.Reload(t.Context()); err == nil {
			t.Error("no error")
		}
	}
	if said != 1 {
		t.Errorf("said %d times", said)
	}
}

func TestRunOnEmbeddedPolicyWaits(t *testing.T) {
	p := load(t, policy.Config{FS: fstest.MapFS{"policy.rego": {Data: []byte("package policy\ndecision := {\"allow\": false}")}}})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := p.Run(ctx); err != nil {
		t.Errorf("Run: %v", err)
	}
}

func rename(t *testing.T, from, to string) {
	t.Helper()
	if err := os.Rename(from, to); err != nil {
		t.Fatal(err)
	}
}

// relink makes link point at target, in one step where it is there already.
func relink(t *testing.T, target, link string) {
	t.Helper()
	if err := os.Symlink(target, link+".tmp"); err != nil {
		t.Fatal(err)
	}
	rename(t, link+".tmp", link)
}

// A folder that is empty, broken or not there when it is opened denies everything, says
// why, and is taken up by itself once it is good.
func TestOpenWaits(t *testing.T) {
	for name, prepare := range map[string]func(dir string) error{
		"not there": func(string) error { return nil },
		"empty":     func(dir string) error { return os.Mkdir(dir, 0o700) },
		"broken": func(dir string) error {
			if err := os.Mkdir(dir, 0o700); err != nil {
				return err
			}
			return os.WriteFile(filepath.Join(dir, "x.rego"), []byte("package"), 0o600)
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "policy")
			if err := prepare(dir); err != nil {
				t.Fatal(err)
			}
			if _, err := policy.Load(t.Context(), policy.Config{Dir: dir}); err == nil {
				t.Fatal("Load took it")
			}
			log, reloads := &lockedBuffer{}, make(chan error, 100)
			p, err := policy.Open(t.Context(), policy.Config{
				Dir: dir, Log: slog.New(slog.NewTextHandler(log, nil)), OnReload: func(err error) { reloads <- err }, Timeout: patience,
			})
			if err != nil {
				t.Fatal(err)
			}
			f := &following{Policy: p, reloads: reloads, log: log}
			if err := <-reloads; err == nil || !strings.Contains(log.String(), "everything is denied") {
				t.Errorf("said %v, and %s", err, log)
			}
			in := policy.Input{Action: policy.ActionIssue, Caller: policy.Caller{ID: id("/ns/shop/payments")}, Audience: "orders"}
			if d, err := p.Decide(t.Context(), in); !errors.Is(err, policy.ErrNone) || !errors.Is(err, policy.ErrEvaluation) || d.Allow {
				t.Errorf("decided %+v, %v", d, err)
			}
			if _, ok := p.Audience("orders"); ok || len(p.Audiences()) > 0 || p.AnswersTo(id("/ns/shop/orders"), "orders") {
				t.Error("it knows audiences")
			}
			if st := p.Status(); st.Err == nil || st.Generation != 0 {
				t.Errorf("status %+v", st)
			}
			select {
			case <-p.Ready():
				t.Fatal("ready without a policy")
			default:
			}
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error)
			go func() { done <- p.Run(ctx) }()
			if name == "broken" {
				if err := os.Remove(filepath.Join(dir, "x.rego")); err != nil {
					t.Fatal(err)
				}
			}
			if err := policy.WriteDemo(dir); err != nil {
				t.Fatal(err)
			}
			select {
			case <-p.Ready():
			case <-time.After(patience):
				t.Fatalf("it isn't taken up: %+v\n%s", p.Status(), log)
			}
			// What is written file by file may be in force before it is whole.
			if !f.allows(t, "orders.write") {
				f.until(t, false, func() bool { return f.allows(t, "orders.write") })
			}
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
	}
}

func contextFor(t *testing.T) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	return ctx, cancel
}
