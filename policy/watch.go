package policy

import (
	"context"
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

// folderOrigin is a folder on disk.
type folderOrigin struct {
	dir    string
	rescan time.Duration
	log    *slog.Logger
}

func (s *folderOrigin) first() (*folder, error) { return readDir(s.dir) }

func (s *folderOrigin) read(context.Context) (*folder, error) { return readDir(s.dir) }

func (*folderOrigin) keep(*folder) error { return nil }

func (*folderOrigin) trouble() string { return "policy folder is broken" }

func (s *folderOrigin) where() slog.Attr { return slog.String("dir", s.dir) }

func (s *folderOrigin) follow(ctx context.Context, look func(context.Context) error) {
	w := s.watch(ctx)
	defer w.close()
	// What changed between Load and now told nobody, and may be changing still.
	w.settle(ctx)
	_ = look(ctx) // it says itself what is wrong
	rescan := time.NewTicker(s.rescan)
	defer rescan.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-rescan.C:
			w.renew()
		case e := <-w.events:
			if !w.note(e) {
				continue
			}
			w.settle(ctx)
		case err := <-w.errors:
			s.log.WarnContext(ctx, "watching policy folder", "dir", s.dir, "error", err)
		}
		_ = look(ctx)
	}
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

func (s *folderOrigin) watch(ctx context.Context) *watcher {
	w := &watcher{dir: s.dir}
	fs, err := fsnotify.NewWatcher()
	if err == nil {
		w.fs, w.events, w.errors = fs, fs.Events, fs.Errors
		// The parent first: a folder that is replaced between the two is noticed then.
		// Without the parent only the replacement of the whole folder is noticed later,
		// at the next rescan.
		if perr := fs.Add(filepath.Dir(w.dir)); perr != nil {
			s.log.WarnContext(ctx, "can't watch the policy folder's parent", "dir", w.dir, "error", perr)
		}
		err = fs.Add(w.dir)
	}
	if err != nil {
		s.log.WarnContext(ctx, "can't watch the policy folder, reading it at intervals instead",
			"dir", w.dir, "interval", s.rescan, slog.Any("error", err))
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
