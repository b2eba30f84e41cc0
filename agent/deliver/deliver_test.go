package deliver_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/dayflyhq/dayfly/agent/deliver"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk"
)

// A file is there from its credential's first moment to two seconds before its last, is
// exchanged when that is renewed, and goes with the one that keeps it.
func TestLife(t *testing.T) {
	dir := folder(t)
	s := newShelf(t)
	synctest.Test(t, func(t *testing.T) {
		path := filepath.Join(dir, "orders.jwt")
		s.changed = make(chan struct{}) // of the bubble
		d, end := begin(t, s.config(file(path, "orders")))
		synctest.Wait()
		if !gone(path) || d.Status()[0].Present {
			t.Error("there is a file of nothing")
		}
		s.put(time.Minute, "orders")
		synctest.Wait()
		if !holds(path, s.token("orders")) || !d.Status()[0].Present || d.Status()[0].Err != nil {
			t.Error("not written")
		}
		time.Sleep(40 * time.Second)
		s.put(time.Minute, "orders")
		synctest.Wait()
		if !holds(path, s.token("orders")) || d.Counts.Written.Load() != 2 {
			t.Error("not exchanged")
		}
		// Read all the time until it has gone: never expired by the token's own word.
		for range 580 {
			time.Sleep(100 * time.Millisecond)
			synctest.Wait()
			content, err := os.ReadFile(path)
			if err != nil {
				t.Fatalf("gone too early: %v", err)
			}
			if parsed, err := token.Inspect(string(content)); err != nil || !time.Now().Before(parsed.Claims.Expires) {
				t.Fatalf("expired or torn: %v", err)
			}
			if time.Until(d.Status()[0].Until) <= 2100*time.Millisecond {
				break
			}
		}
		time.Sleep(200 * time.Millisecond)
		synctest.Wait()
		if !gone(path) || d.Status()[0].Present || d.Counts.Removed.Load() != 1 {
			t.Error("it outlived its credential")
		}
		s.put(time.Minute, "orders")
		synctest.Wait()
		s.kill("orders")
		synctest.Wait()
		if !gone(path) {
			t.Error("revoked and there")
		}
		s.put(time.Minute, "orders")
		synctest.Wait()
		if gone(path) {
			t.Error("not back")
		}
		end()
		if left, _ := os.ReadDir(dir); len(left) != 0 {
			t.Errorf("left: %v", left)
		}
	})
}

// Several credentials are one thing: all or none, and one that dies takes the file along.
func TestSeveral(t *testing.T) {
	dir := folder(t)
	s := newShelf(t)
	path := filepath.Join(dir, "all")
	target := deliver.Target{Path: path, Directory: true, Files: []deliver.File{
		{Name: "a", Format: deliver.Token, Credentials: one("a")},
		{Name: "ab", Format: deliver.Template, Template: "{{token `a`}} {{token `b`}}", Credentials: map[string]sdk.Request{"a": {Audience: "a"}, "b": {Audience: "b"}}},
	}}
	synctest.Test(t, func(t *testing.T) {
		s.changed = make(chan struct{})
		_, end := begin(t, s.config(target))
		s.put(time.Minute, "a")
		synctest.Wait()
		if left, _ := os.ReadDir(path); len(left) != 0 {
			t.Errorf("written with half of it: %v", left)
		}
		s.put(time.Hour, "b")
		synctest.Wait()
		if !holds(path+"/ab", s.token("a")+" "+s.token("b")) || !holds(path+"/a", s.token("a")) {
			t.Error("not written")
		}
		s.put(time.Hour, "b")
		synctest.Wait()
		if !holds(path+"/ab", s.token("a")+" "+s.token("b")) {
			t.Error("not renewed")
		}
		if gens, _ := filepath.Glob(path + "/..2*/ab"); len(gens) != 2 {
			t.Errorf("whoever is on the way through the link finds nothing: %v", gens)
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if gens, _ := filepath.Glob(path + "/..2*"); len(gens) != 1 {
			t.Errorf("generations: %v", gens)
		}
		time.Sleep(time.Minute) // a expires, b lives
		synctest.Wait()
		if left, _ := os.ReadDir(path); len(left) != 0 {
			t.Errorf("left without a: %v", left)
		}
		s.put(time.Hour, "a")
		synctest.Wait()
		s.kill("b")
		synctest.Wait()
		if left, _ := os.ReadDir(path); len(left) != 0 {
			t.Errorf("left without b: %v", left)
		}
		end()
	})
}

// Whoever reads all the time while credentials are renewed as fast as it goes finds whole
// files, none of them empty, torn or missing.
func TestReaders(t *testing.T) {
	dir := folder(t)
	s := newShelf(t)
	s.put(time.Hour, "orders")
	path, all := filepath.Join(dir, "orders.jwt"), filepath.Join(dir, "all")
	d, _ := begin(t, s.config(file(path, "orders"), deliver.Target{Path: all, Directory: true, Files: []deliver.File{
		{Name: "one", Format: deliver.Token, Credentials: one("orders")}, {Name: "two", Format: deliver.Token, Credentials: one("orders")},
	}}))
	eventually(t, "the first", func() bool { return !gone(path) && !gone(all+"/..data") })
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for _, at := range []string{path, all + "/one", all + "/two"} {
		wg.Go(func() {
			for reads := 0; ; reads++ {
				content, err := os.ReadFile(at)
				if err == nil {
					_, err = token.Parse(string(content), func(token.KeyID) (token.PublicKey, bool) { return s.pub, true })
				}
				if err != nil {
					t.Errorf("read %d of %s: %v (%d bytes)", reads, at, err, len(content))
					return
				}
				select {
				case <-stop:
					t.Logf("%s: %d reads", filepath.Base(at), reads)
					return
				default:
				}
			}
		})
	}
	for range 60 {
		before := d.Counts.Written.Load()
		s.put(time.Hour, "orders")
		eventually(t, "both to be written", func() bool { return d.Counts.Written.Load() >= before+2 })
	}
	close(stop)
	wg.Wait()
}

// What a process that was killed left is judged before anything else.
func TestLeftBehind(t *testing.T) {
	s := newShelf(t)
	cred, other := s.mint("orders", time.Hour), s.mint("web", time.Hour)
	text := func(c *sdk.Credential) string { return c.Token.Reveal() }
	hidden := deliver.File{Format: deliver.Template, Template: "{{token `orders` | base64}}", Credentials: one("orders")}
	for name, c := range map[string]struct {
		content string
		mode    fs.FileMode
		file    *deliver.File
		kill    bool
		stays   bool
		refused string
	}{
		"living":                     {content: text(cred), mode: 0o600, stays: true},
		"of another audience":        {content: text(other), mode: 0o600},
		"expired":                    {content: text(s.mint("orders", time.Second)), mode: 0o600},
		"revoked":                    {content: text(cred), mode: 0o600, kill: true},
		"wider than it should be":    {content: text(cred), mode: 0o640},
		"hidden from us":             {content: "ZXlK", mode: 0o600, file: &hidden},
		"hidden, and not ours":       {content: "ZXlK", mode: 0o644, file: &hidden, refused: "didn't make"},
		"somebody's":                 {content: "root:x:0:0", mode: 0o600, refused: "didn't make"},
		"empty":                      {mode: 0o600, refused: "didn't make"},
		"the beginning of something": {content: text(cred)[:100], mode: 0o600, refused: "didn't make"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := folder(t)
			path := filepath.Join(dir, "orders.jwt")
			if err := os.WriteFile(path, []byte(c.content), c.mode); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, ".orders.jwt.dayfly"), []byte("half"), 0o600); err != nil {
				t.Fatal(err)
			}
			target := file(path, "orders")
			if c.file != nil {
				target.Files[0] = *c.file
			}
			cfg := s.config(target)
			if c.kill {
				cfg.Alive = func(*token.Claims) bool { return false }
			}
			d, err := deliver.New(cfg)
			if err != nil {
				t.Fatal(err)
			}
			err = d.Open()
			if c.refused != "" {
				if err == nil || !strings.Contains(err.Error(), c.refused) || !holds(path, c.content) {
					t.Errorf("got %v, want %q and the file untouched", err, c.refused)
				}
				return
			}
			if err != nil || gone(path) == c.stays || d.Status()[0].Present != c.stays {
				t.Errorf("stays %v, want %v: %v", !gone(path), c.stays, err)
			}
			if !gone(filepath.Join(dir, ".orders.jwt.dayfly")) {
				t.Error("half a file stayed")
			}
		})
	}
}

// The same for a folder: a living generation stays, others and links to nothing go.
func TestFolderLeftBehind(t *testing.T) {
	dir := folder(t)
	s := newShelf(t)
	s.put(time.Hour, "orders")
	target := deliver.Target{Path: filepath.Join(dir, "all"), Directory: true, Files: []deliver.File{{Name: "one", Format: deliver.Token, Credentials: one("orders")}}}
	build := func(gen string) {
		t.Helper()
		for _, err := range []error{
			os.MkdirAll(filepath.Join(target.Path, gen), 0o700),
			os.WriteFile(filepath.Join(target.Path, gen, "one"), []byte(s.token("orders")), 0o600),
		} {
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	build("..2026_01_01_00_00_00.1")
	build("..2026_01_01_00_00_00.2")
	for link, to := range map[string]string{"..data": "..2026_01_01_00_00_00.2", "..data_tmp": "x", "one": "..data/one", "former": "..data/former", "kept": "elsewhere"} {
		if err := os.Symlink(to, filepath.Join(target.Path, link)); err != nil {
			t.Fatal(err)
		}
	}
	cfg := s.config(target)
	cfg.Newest = func(sdk.Request) *sdk.Credential { return nil }
	d, end := begin(t, cfg)
	if !d.Status()[0].Present || !holds(target.Path+"/one", s.token("orders")) {
		t.Error("the living one went")
	}
	var names []string
	entries, _ := os.ReadDir(target.Path)
	for _, e := range entries {
		names = append(names, e.Name())
	}
	if got := strings.Join(names, " "); got != "..2026_01_01_00_00_00.2 ..data kept one" {
		t.Errorf("there is %s", got)
	}
	end()
	if entries, _ := os.ReadDir(target.Path); len(entries) != 1 || entries[0].Name() != "kept" {
		t.Errorf("at the end: %v", entries)
	}
	if err := os.WriteFile(target.Path+"/one", []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	d, err := deliver.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Open(); err == nil || !holds(target.Path+"/one", "mine") {
		t.Errorf("over somebody's file: %v", err)
	}
}

// Where somebody else could put something in the way, nothing is written.
func TestUnsafePlaces(t *testing.T) {
	s := newShelf(t)
	for name, c := range map[string]struct {
		make func(dir string) string // returns the path to deliver to
		want string
	}{
		"no folder": {func(dir string) string { return dir + "/none/f" }, "no such file"},
		"a folder that others may write": {func(dir string) string {
			_ = os.Mkdir(dir+"/d", 0o700)
			_ = os.Chmod(dir+"/d", 0o772)
			return dir + "/d/f"
		}, "others may write"},
		"like /tmp": {func(dir string) string {
			_ = os.Mkdir(dir+"/d", 0o700)
			_ = os.Chmod(dir+"/d", 0o777|fs.ModeSticky)
			return dir + "/d/f"
		}, "others may write"},
		"below one that others may write": {func(dir string) string {
			_ = os.MkdirAll(dir+"/d/e", 0o700)
			_ = os.Chmod(dir+"/d", 0o777)
			return dir + "/d/e/f"
		}, "others may write"},
		"through a link": {func(dir string) string {
			_ = os.Mkdir(dir+"/d", 0o700)
			_ = os.Symlink("d", dir+"/l")
			return dir + "/l/f"
		}, "symbolic link"},
		"a link at the path": {func(dir string) string {
			_ = os.WriteFile(dir+"/precious", []byte("precious"), 0o600)
			_ = os.Symlink("precious", dir+"/f")
			return dir + "/f"
		}, "didn't make"},
		"a folder at the path": {func(dir string) string { _ = os.Mkdir(dir+"/f", 0o700); return dir + "/f" }, "didn't make"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := folder(t)
			d, err := deliver.New(s.config(file(c.make(dir), "orders")))
			if err != nil {
				t.Fatal(err)
			}
			if err := d.Open(); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
}

// A link that appears at the path while it runs is replaced and not followed; a folder that
// others may write from now on gets nothing more, and what is in it goes at its time.
func TestLinkAtThePath(t *testing.T) {
	dir := folder(t)
	s := newShelf(t)
	s.put(time.Hour, "orders")
	path, precious := filepath.Join(dir, "orders.jwt"), filepath.Join(dir, "precious")
	d, _ := begin(t, s.config(file(path, "orders")))
	eventually(t, "the file", func() bool { return d.Status()[0].Present })
	for _, err := range []error{os.WriteFile(precious, []byte("precious"), 0o600), os.Remove(path), os.Symlink("precious", path), os.Symlink("precious", filepath.Join(dir, ".orders.jwt.dayfly"))} {
		if err != nil {
			t.Fatal(err)
		}
	}
	s.put(time.Hour, "orders")
	eventually(t, "the next", func() bool { return holds(path, s.token("orders")) })
	if info, err := os.Lstat(path); err != nil || !info.Mode().IsRegular() || !holds(precious, "precious") {
		t.Errorf("the link was followed: %v %v", info, err)
	}
	// What is in the way of the next one is no reason to lose the last.
	before := s.token("orders")
	if err := os.MkdirAll(filepath.Join(dir, ".orders.jwt.dayfly", "x"), 0o700); err != nil {
		t.Fatal(err)
	}
	s.put(time.Hour, "orders")
	eventually(t, "the error", func() bool { return d.Status()[0].Err != nil })
	if !holds(path, before) {
		t.Error("a write that failed took the file")
	}
	if err := os.RemoveAll(filepath.Join(dir, ".orders.jwt.dayfly")); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a try that works", func() bool { return d.Status()[0].Err == nil && holds(path, s.token("orders")) })

	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	before = s.token("orders")
	s.put(time.Hour, "orders")
	eventually(t, "the error", func() bool { return d.Status()[0].Err != nil })
	if !holds(path, before) || !d.Status()[0].Present || strings.Contains(d.Status()[0].Err.Error(), "eyJ") {
		t.Errorf("the one that lives: %+v", d.Status()[0])
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a try that works", func() bool { return d.Status()[0].Err == nil && holds(path, s.token("orders")) })
}

// The formats, byte by byte.
func TestFormats(t *testing.T) {
	dir := folder(t)
	s := newShelf(t)
	s.put(time.Hour, "orders", "web")
	path := func(name string) string { return filepath.Join(dir, name) }
	of := func(name string, f deliver.File) deliver.Target {
		if f.Credentials == nil {
			f.Credentials = one("orders")
		}
		return deliver.Target{Path: path(name), Files: []deliver.File{f}}
	}
	group := os.Getegid()
	shared := of("shared", deliver.File{Format: deliver.Token})
	shared.Mode, shared.GID = 0o640, &group
	d, _ := begin(t, s.config(
		of("token", deliver.File{Format: deliver.Token}), of("json", deliver.File{Format: deliver.JSON}),
		of("env", deliver.File{Format: deliver.Env}), of("env2", deliver.File{Format: deliver.Env, Variable: "REGISTRY"}),
		of("template", deliver.File{Format: deliver.Template, Credentials: map[string]sdk.Request{"o": {Audience: "orders"}, "w": {Audience: "web"}},
			Template: "{{token `o`}}|{{token `w` | base64}}|{{audience `w` | json}}|{{quote \"it's\"}}|{{scope `o`}}|{{grant `o`}}|{{expires `o`}}|{{expires_unix `o`}}"}),
		shared,
	))
	eventually(t, "all", func() bool { return d.Counts.Written.Load() == 6 })
	s.mu.Lock()
	o, w := s.creds["orders"], s.creds["web"]
	s.mu.Unlock()
	until := o.Expires.UTC().Truncate(time.Second)
	quoted, _ := json.Marshal(until)
	for name, want := range map[string]string{
		"token": o.Token.Reveal(), "shared": o.Token.Reveal(),
		"json":     `{"access_token":"` + o.Token.Reveal() + `","token_type":"Bearer","issued_token_type":"urn:ietf:params:oauth:token-type:access_token","scope":"r","grant":"` + o.Grant + `","audience":"orders","binding":"none","expires_at":` + string(quoted) + "}\n",
		"env":      "DAYFLY_TOKEN=" + o.Token.Reveal() + "\nDAYFLY_TOKEN_EXPIRES=" + until.Format(time.RFC3339) + "\n",
		"env2":     "REGISTRY=" + o.Token.Reveal() + "\nREGISTRY_EXPIRES=" + until.Format(time.RFC3339) + "\n",
		"template": o.Token.Reveal() + "|" + base64Of(w.Token.Reveal()) + `|"web"|'it'\''s'|r|` + o.Grant + "|" + until.Format(time.RFC3339) + "|" + itoa(until.Unix()),
	} {
		got, err := os.ReadFile(path(name))
		if err != nil || string(got) != want {
			t.Errorf("%s: %v: got %q, want %q", name, err, got, want)
		}
	}
	for name, want := range map[string]fs.FileMode{"token": 0o600, "shared": 0o640} {
		if info, err := os.Lstat(path(name)); err != nil || info.Mode() != want {
			t.Errorf("%s: mode %v, want %v", name, info.Mode(), want)
		}
	}
}

// Everything that is wrong is said at once, and before anything is touched.
func TestRefused(t *testing.T) {
	group := 0
	_, err := deliver.New(deliver.Config{Targets: []deliver.Target{
		{Path: "relative", Mode: 0o644, Files: []deliver.File{{Format: "yaml", Credentials: one("a b")}}},
		{Path: "/d/../x", Mode: 0o640, Files: []deliver.File{{Format: deliver.Token, Template: "t", Variable: "v"}}},
		{Path: "/d", Directory: true, Files: []deliver.File{{Name: "..x", Format: deliver.Token, Credentials: one("a")}, {Name: "a/b", Format: deliver.Env, Variable: "A=B", Credentials: one("a")}, {Name: "t", Format: deliver.Token, Credentials: one("a")}, {Name: "t", Format: deliver.Token, Credentials: map[string]sdk.Request{"a": {Audience: "a", TTL: time.Second}}}}},
		{Path: "/t", Files: []deliver.File{{Format: deliver.Template, Template: "x\n{{token `b`}}", Credentials: one("a")}}, Change: &deliver.Change{}},
		{Path: "/u", Files: []deliver.File{{Format: deliver.Template, Template: "{{", Credentials: one("a")}}, Change: &deliver.Change{Command: []string{"sh"}, PIDFile: "x", Signal: "KILL", Timeout: time.Hour, MinInterval: 2 * time.Hour}},
		{Path: "/v", Files: []deliver.File{{Format: deliver.Template, Template: "{{.Foo}}", Credentials: one("a")}}, Change: &deliver.Change{PIDFile: "x", Signal: "KILL"}},
		{Path: "/w", Mode: 0o240, GID: &group, Files: []deliver.File{{Format: deliver.Template, Template: " ", Credentials: one("a")}}},
	}})
	for _, want := range []string{
		"relative: path: must be", "within 0640", "files[0].format", "credentials.a b.audience",
		"/d/../x: path", "group: must be named", "template: is for", "variable: is for", "credentials: are 0",
		"files[0].name: must not begin", "files[1].name", "variable: isn't", `files[3].name: "t" is there twice`, "ttl: is at least 10s",
		"2:2: ", `no credential is named "b": there are a`, "on_change.command: either",
		"template: 1: ", "on_change.command: begins", "on_change.timeout", "on_change.min_interval",
		"has no such value", "on_change.pid_file", "on_change.signal",
		"empty file", "its owner may read",
	} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("the error lacks %q:\n%v", want, err)
		}
	}
	for _, clash := range [][2]deliver.Target{
		{file("/a/b", "x"), file("/a/b", "y")},
		{file("/a/b", "x"), {Path: "/a", Directory: true, Files: []deliver.File{{Name: "n", Format: deliver.Token, Credentials: one("x")}}}},
	} {
		if _, err := deliver.New(deliver.Config{Targets: clash[:]}); err == nil || !strings.Contains(err.Error(), "in the way") {
			t.Errorf("%s and %s: %v", clash[0].Path, clash[1].Path, err)
		}
	}
}

// lockedBuffer is a log that is read while it is written.
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

// A command that fails is run again; its output is in the log, and no credential is,
// though it shows the file. One that hangs is killed with all that it started.
func TestCommand(t *testing.T) {
	dir := folder(t)
	s := newShelf(t)
	s.put(time.Hour, "orders")
	var log lockedBuffer
	target := file(filepath.Join(dir, "orders.jwt"), "orders")
	target.Change = &deliver.Change{Command: []string{"/bin/sh", "-c", `echo "$DAYFLY_CHANGE" >>"$0/runs"; cat "$DAYFLY_PATH"; base64 "$DAYFLY_PATH"; test -e "$0/fixed"`, dir}}
	hangs := file(filepath.Join(dir, "hangs"), "orders")
	hangs.Change = &deliver.Change{Command: []string{"/bin/sh", "-c", `sleep 600 & echo $! >"$0/pid"; wait`, dir}, Timeout: time.Second}
	cfg := s.config(target, hangs)
	cfg.Log = slog.New(slog.NewJSONHandler(&log, nil))
	d, end := begin(t, cfg)
	eventually(t, "two failures", func() bool { got, _ := os.ReadFile(dir + "/runs"); return len(got) >= len("written\n")*2 })
	if d.Status()[0].ChangeErr == nil {
		t.Error("no failure is reported")
	}
	if err := os.WriteFile(dir+"/fixed", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	eventually(t, "success", func() bool { return d.Status()[0].ChangeErr == nil })
	eventually(t, "the end of what hangs", func() bool {
		err := d.Status()[1].ChangeErr
		return err != nil && strings.Contains(err.Error(), "was killed")
	})
	var pid string
	eventually(t, "its child to be gone", func() bool {
		if pid == "" {
			raw, _ := os.ReadFile(dir + "/pid")
			pid = strings.TrimSpace(string(raw))
		}
		state, err := os.ReadFile("/proc/" + pid + "/stat")
		return errors.Is(err, fs.ErrNotExist) || strings.Contains(string(state), ") Z ")
	})
	end()
	if text := log.String(); strings.Contains(text, s.token("orders")) || strings.Contains(text, "eyJ") || strings.Contains(text, base64Of(s.token("orders"))[:60]) || !strings.Contains(text, "[redacted]") {
		t.Errorf("the log: %s", text)
	}
}
