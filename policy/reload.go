package policy

import (
	"context"
	"fmt"
	"log/slog"
	"path/filepath"
	"time"

	"github.com/fsnotify/fsnotify"
)

const (
	// settle is how long a folder must be quiet before it is read: an editor saves
	// with several events, and a file half written is no policy.
	settle = 50 * time.Millisecond
	// settleAtMost reads a folder that is never quiet all the same.
	settleAtMost = 2 * time.Second
)

// Run follows the folder until ctx ends and then returns nil. A folder that
// doesn't compile, has invalid data, is empty or gone leaves the last good
// generation in force (or none, see [Open]), and is said loudly: an error in the log,
// OnReload, Status.
// With Config.FS there is nothing to follow and Run only waits.
func (p *Policy) Run(ctx context.Context) error {
	if p.cfg.Dir == "" {
		<-ctx.Done()
		return nil
	}
	w := p.watch(ctx)
	defer w.close()
	// What changed between Load and now told nobody, and may be changing still.
	w.settle(ctx)
	p.Reload(ctx)
	rescan := time.NewTicker(p.cfg.Rescan)
	defer rescan.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-rescan.C:
			w.renew()
		case e := <-w.events:
			if !w.note(e) {
				continue
			}
			w.settle(ctx)
		case err := <-w.errors:
			p.cfg.Log.WarnContext(ctx, "watching policy folder", "dir", p.cfg.Dir, "error", err)
		}
		p.Reload(ctx)
	}
}

// Reload reads the folder now and returns what is wrong with it. One that holds
// what is in force already stays as it is, and the same broken folder is
// complained about once.
func (p *Policy) Reload(ctx context.Context) error {
	p.mu.Lock()
	old := p.current.Load()
	f, err := p.cfg.read()
	var hash [32]byte
	if err == nil {
		hash = f.hash
	}
	switch {
	case err == nil && old != nil && hash == old.hash:
		healed := p.lastErr != nil
		p.lastErr = nil
		p.mu.Unlock()
		if healed {
			p.cfg.Log.InfoContext(ctx, "policy folder is again what is in force", "dir", p.cfg.Dir, "generation", old.number)
			p.cfg.OnReload(nil)
		}
		return nil
	case p.lastErr != nil && hash == p.lastBad:
		defer p.mu.Unlock()
		return p.lastErr
	}
	var number uint64 // of what is in force
	if old != nil {
		number = old.number
	}
	var g *generation
	if err == nil {
		g, err = build(ctx, f, p.cfg.Now())
	}
	if ctx.Err() != nil {
		defer p.mu.Unlock()
		return ctx.Err()
	}
	if err != nil {
		err = fmt.Errorf("reloading policy: %w", err)
		p.lastBad = hash
	} else {
		p.install(g, number+1)
	}
	p.lastErr = err
	p.mu.Unlock()
	p.report(ctx, number, err)
	return err
}

func (p *Policy) report(ctx context.Context, old uint64, err error) {
	switch {
	case err != nil && old == 0:
		p.cfg.Log.ErrorContext(ctx, "policy folder is broken, and no policy is in force: everything is denied", "dir", p.cfg.Dir, "error", err)
	case err != nil:
		p.cfg.Log.ErrorContext(ctx, "policy folder is broken, the last good policy stays in force",
			"dir", p.cfg.Dir, "generation", old, "error", err)
	default:
		p.cfg.Log.InfoContext(ctx, "policy reloaded", "dir", p.cfg.Dir, "generation", old+1)
	}
	p.cfg.OnReload(err)
}

// watcher turns the file system's events about one folder into "look again". The
// folder's parent is watched too, because a folder can be replaced as a whole: by
// a rename, or by a link that now points elsewhere.
type watcher struct {
	dir    string
	fs     *fsnotify.Watcher
	events <-chan fsnotify.Event
	errors <-chan error
}

func (p *Policy) watch(ctx context.Context) *watcher {
	w := &watcher{dir: p.cfg.Dir}
	fs, err := fsnotify.NewWatcher()
	if err == nil {
		w.fs, w.events, w.errors = fs, fs.Events, fs.Errors
		// The parent first: a folder that is replaced between the two is noticed then.
		// Without the parent only the replacement of the whole folder is noticed later,
		// at the next rescan.
		if perr := fs.Add(filepath.Dir(w.dir)); perr != nil {
			p.cfg.Log.WarnContext(ctx, "can't watch the policy folder's parent", "dir", w.dir, "error", perr)
		}
		err = fs.Add(w.dir)
	}
	if err != nil {
		p.cfg.Log.WarnContext(ctx, "can't watch the policy folder, reading it at intervals instead",
			"dir", w.dir, "interval", p.cfg.Rescan, slog.Any("error", err))
	}
	return w
}

func (w *watcher) close() {
	if w.fs != nil {
		w.fs.Close()
	}
}

// renew watches what now stands at the folder's name.
func (w *watcher) renew() {
	if w.fs == nil {
		return
	}
	_ = w.fs.Remove(w.dir) // it may have gone by itself
	_ = w.fs.Add(w.dir)    // it may not be back yet; the parent tells
}

// settle takes events until the folder has been quiet for a moment.
func (w *watcher) settle(ctx context.Context) {
	end := time.NewTimer(settleAtMost)
	defer end.Stop()
	quiet := time.NewTimer(settle)
	defer quiet.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-end.C:
			return
		case <-quiet.C:
			return
		case e := <-w.events:
			if w.note(e) {
				quiet.Reset(settle)
			}
		}
	}
}

// note says whether e is about the folder, and follows it where it was
// replaced.
func (w *watcher) note(e fsnotify.Event) bool {
	if e.Name == w.dir {
		w.renew()
		return true
	}
	return filepath.Dir(e.Name) == w.dir
}
