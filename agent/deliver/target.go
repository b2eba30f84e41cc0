package deliver

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk"
)

const (
	// idle is the longest that a target waits without any event.
	idle = time.Hour
	// lingers is how long the last generation of a folder stays after the swap: enough for
	// whoever has read the link and not yet opened the file.
	lingers = time.Second
)

// A slot is one credential of one file.
type slot struct {
	file int
	name string
	req  sdk.Request
}

// A target is one Target at work. Its fields belong to the goroutine of run, but for what
// mu guards.
type target struct {
	spec    Target
	cfg     Config
	access  access
	renders []func(credentials) ([]byte, error)
	slots   []slot
	teller  *teller // nil: nobody is told
	counts  *Counts
	log     *slog.Logger

	wake     chan struct{} // has an element when it is late
	disk     []*member     // of the slots; empty where nothing is there
	writing  backoff
	removing backoff
	tidyAt   time.Time // when the last generation goes; zero for none
	rewrite  bool      // what is on disk is as another target wanted it

	stop func() // ends it and waits
	left bool   // set before stop: its files stay for the target in its place

	mu    sync.Mutex
	shown Status
}

func newTarget(cfg Config, spec Target, renders []func(credentials) ([]byte, error), counts *Counts) *target {
	t := &target{
		spec: spec, cfg: cfg, renders: renders, counts: counts, log: cfg.Log.With("path", spec.Path),
		access: newAccess(spec.Mode, spec.UID, spec.GID), shown: Status{Path: spec.Path}, wake: make(chan struct{}, 1),
	}
	for i, f := range spec.Files {
		for _, name := range slices.Sorted(maps.Keys(f.Credentials)) {
			t.slots = append(t.slots, slot{i, name, f.Credentials[name]})
		}
	}
	if c := spec.Change; c != nil {
		t.teller = &teller{
			tell:     func(ctx context.Context, what string) error { return c.tell(ctx, spec.Path, what, cfg.Run, t.log) },
			interval: c.interval(), now: cfg.Now, log: t.log, counts: counts, wake: make(chan struct{}, 1),
		}
	}
	return t
}

// run keeps the target until ctx ends, and then removes it.
func (t *target) run(ctx context.Context) {
	defer func() {
		if t.left {
			return
		}
		if err := t.clear(); err != nil {
			t.log.Error("removing at the end", "err", err)
		}
	}()
	var of []sdk.Request
	for _, s := range t.slots {
		of = append(of, s.req)
	}
	whenChanged := t.cfg.Changed(of)
	for {
		changed := whenChanged() // before anything is looked at
		timer := time.NewTimer(t.step())
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-changed:
			timer.Stop()
		case <-t.wake:
			timer.Stop()
		case <-timer.C:
		}
	}
}

func (t *target) kick() {
	select {
	case t.wake <- struct{}{}:
	default:
	}
}

// step does what is due, and returns how long nothing will be unless something changes.
func (t *target) step() time.Duration {
	now := t.cfg.Now()
	creds, newest := t.newest()
	todo := decide(t.disk, newest, now, t.cfg.Alive)
	if t.rewrite && living(newest, now, t.cfg.Alive) {
		todo = write
	}
	if todo == write && t.writing.left(now) > 0 {
		todo = decide(t.disk, nil, now, t.cfg.Alive)
	}
	switch {
	case todo == write:
		t.write(creds, newest)
	case todo == remove && t.removing.left(now) == 0:
		t.remove()
	}
	t.tidy()
	return t.wait()
}

// newest asks for every credential. Those that can't be had are nil.
func (t *target) newest() ([]credentials, []*member) {
	creds, members := make([]credentials, len(t.spec.Files)), make([]*member, len(t.slots))
	for i, s := range t.slots {
		if creds[s.file] == nil {
			creds[s.file] = credentials{}
		}
		c := t.cfg.Newest(s.req)
		if c == nil {
			continue
		}
		read, err := token.Inspect(c.Token.Reveal())
		if err != nil {
			continue
		}
		creds[s.file][s.name] = c
		members[i] = &member{c.Grant, c.Expires, &read.Claims}
	}
	return creds, members
}

func (t *target) write(creds []credentials, newest []*member) {
	began := t.cfg.Now()
	if err := t.put(creds); err != nil {
		t.counts.WriteFailures.Add(1)
		t.writing.failed(t.cfg.Now())
		t.show(fmt.Errorf("writing: %w", err))
		t.log.Error("writing credentials", "err", err, "retry_in", t.writing.pause, "still_there", len(t.disk) > 0)
		return
	}
	t.disk, t.rewrite = newest, false
	t.counts.Written.Add(1)
	t.writing.reset()
	t.removing.reset()
	t.show(nil)
	t.log.Info("wrote credentials", "grants", grants(newest), "for", firstLeft(newest, began).Round(time.Second))
	t.told("written")
}

func grants(members []*member) []string {
	out := make([]string, len(members))
	for i, m := range members {
		out[i] = m.grant
	}
	return out
}

// put renders everything before it touches anything.
func (t *target) put(creds []credentials) error {
	contents := make([][]byte, len(creds))
	for i, c := range creds {
		var err error
		if contents[i], err = t.renders[i](c); err != nil {
			return fmt.Errorf("making %s: %w", t.fileName(i), err)
		}
	}
	root, err := t.open()
	if err != nil {
		return err
	}
	defer root.Close()
	if !t.spec.Directory {
		return t.access.put(root, t.fileName(0), contents[0])
	}
	at := t.cfg.Now()
	if err := t.access.swap(root, at.UTC().Format("..2006_01_02_15_04_05.")+rand.Text()[:10], t.names(), contents); err != nil {
		return err
	}
	t.tidyAt = at.Add(lingers)
	return nil
}

func (t *target) fileName(i int) string {
	if t.spec.Directory {
		return t.spec.Files[i].Name
	}
	return filepath.Base(t.spec.Path)
}

func (t *target) names() []string {
	out := make([]string, len(t.spec.Files))
	for i := range out {
		out[i] = t.fileName(i)
	}
	return out
}

// open opens the folder that the files are in; one that is the target's own is made.
func (t *target) open() (*os.Root, error) {
	if !t.spec.Directory {
		return openFolder(filepath.Dir(t.spec.Path))
	}
	parent, err := openFolder(filepath.Dir(t.spec.Path))
	if err != nil {
		return nil, err
	}
	defer parent.Close()
	name := filepath.Base(t.spec.Path)
	if err := parent.Mkdir(name, 0o700); err == nil {
		if err := t.access.open(parent, name); err != nil {
			return nil, err
		}
	} else if !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	return openFolder(t.spec.Path)
}

// remove takes the target from the disk because it has died.
func (t *target) remove() {
	if err := t.clearShown(); err != nil {
		t.removing.failed(t.cfg.Now())
		t.log.Error("removing dead credentials", "err", err, "retry_in", t.removing.pause)
		return
	}
	t.counts.Removed.Add(1)
	t.removing.reset()
	t.log.Info("removed dead credentials")
	t.told("removed")
}

// clear removes whatever there is of the target. A folder of its own stays, empty: who
// watches it goes on.
func (t *target) clear() error {
	dir := t.spec.Path
	if !t.spec.Directory {
		dir = filepath.Dir(dir)
	}
	root, err := openFolder(dir)
	if errors.Is(err, fs.ErrNotExist) {
		t.disk = nil
		return nil
	}
	if err != nil {
		return err
	}
	defer root.Close()
	if t.spec.Directory {
		err = empty(root)
	} else {
		err = errors.Join(discard(root, temporary(t.fileName(0))), discard(root, t.fileName(0)))
		syncNames(root)
	}
	if err == nil {
		t.disk, t.tidyAt = nil, time.Time{}
	}
	return err
}

func (t *target) tidy() {
	if t.tidyAt.IsZero() || t.cfg.Now().Before(t.tidyAt) {
		return
	}
	root, err := openFolder(t.spec.Path)
	if err == nil {
		err = errors.Join(tidy(root, t.names()), root.Close())
	}
	t.tidyAt = time.Time{}
	if err != nil {
		t.tidyAt = t.cfg.Now().Add(maxPause)
		t.log.Error("removing the last generation", "err", err)
	}
}

// wait is how long nothing is due by itself.
func (t *target) wait() time.Duration {
	now := t.cfg.Now()
	wait := idle
	if len(t.disk) > 0 && t.removing.left(now) == 0 {
		wait = min(wait, firstLeft(t.disk, now))
	}
	for _, b := range []*backoff{&t.writing, &t.removing} {
		if left := b.left(now); left > 0 {
			wait = min(wait, left)
		}
	}
	if !t.tidyAt.IsZero() {
		wait = min(wait, t.tidyAt.Sub(now))
	}
	return max(wait, 0)
}

// told leaves word for the program.
func (t *target) told(what string) {
	t.cfg.Delivered()
	if t.teller != nil {
		t.teller.changed(what)
	}
}

// clearShown is clear and show in one: nobody who misses the file is told that it is there.
func (t *target) clearShown() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	err := t.clear()
	if err != nil {
		err = fmt.Errorf("removing what is dead: %w", err)
	}
	t.shownNow(err)
	return err
}

// show makes the target's state known.
func (t *target) show(err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.shownNow(err)
}

// shownNow is show; mu is held.
func (t *target) shownNow(err error) {
	t.shown.Err, t.shown.Present, t.shown.Until, t.shown.Grants = err, len(t.disk) > 0, time.Time{}, grants(t.disk)
	for _, m := range t.disk {
		if t.shown.Until.IsZero() || m.expires.Before(t.shown.Until) {
			t.shown.Until = m.expires
		}
	}
}

func (t *target) status() Status {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.shown
	if t.teller != nil {
		s.ChangeErr = t.teller.failing()
	}
	return s
}

// inherit takes over what a target that has stopped left at the same place. It stays until
// it can be written anew as this target wants it, or has died.
func (t *target) inherit(old *target) {
	t.disk, t.tidyAt, t.rewrite = old.disk, old.tidyAt, len(old.disk) > 0
	t.show(nil)
}

// adopt looks at what a process before this one left: what says of itself that it lives
// stays until there is newer, all else goes. What isn't ours is an error.
func (t *target) adopt() error {
	root, err := t.open()
	if err != nil {
		return err
	}
	defer root.Close()
	found, err := t.found(root)
	if err != nil {
		return err
	}
	if living(found, t.cfg.Now(), t.cfg.Alive) {
		t.disk = found
		t.log.Info("found living credentials of an earlier process", "grants", grants(found))
		t.show(nil)
		return nil
	}
	return t.clear()
}

// found returns the credentials on disk, nil where they aren't all there or can't be read
// from the files.
func (t *target) found(root *os.Root) ([]*member, error) {
	in := ""
	if t.spec.Directory {
		gen, err := current(root)
		if err != nil {
			return nil, err
		}
		for _, name := range t.names() {
			if is, err := root.Readlink(name); err != nil && !errors.Is(err, fs.ErrNotExist) || err == nil && is != dataLink+"/"+name {
				return nil, foreign(name)
			}
		}
		if err := tidy(root, t.names()); err != nil || gen == "" {
			return nil, err
		}
		in = gen + "/"
	} else if err := discard(root, temporary(t.fileName(0))); err != nil {
		return nil, err
	}
	claims := make([][]*token.Claims, len(t.spec.Files))
	for i, f := range t.spec.Files {
		content, info, err := read(root, in+t.fileName(i))
		if err != nil {
			return nil, err
		}
		if content == nil {
			return nil, nil
		}
		claims[i] = claimsIn(content)
		// A template may hide its tokens from us; but nobody's file that all can read, nor
		// one of another format without a token, is ours.
		if in == "" && len(claims[i]) == 0 && (f.Format != Template || info.Mode().Perm()&^WidestMode != 0) {
			return nil, foreign(t.fileName(i))
		}
		if info.Mode().Perm()&^t.access.mode != 0 {
			return nil, nil
		}
	}
	return t.match(claims), nil
}

// match finds a credential for each slot.
func (t *target) match(claims [][]*token.Claims) []*member {
	members := make([]*member, len(t.slots))
	for i, s := range t.slots {
		at := slices.IndexFunc(claims[s.file], func(c *token.Claims) bool { return c.Audience == s.req.Audience && covers(c.Scopes, s.req.Scopes) })
		if at < 0 {
			return nil
		}
		c := claims[s.file][at]
		members[i] = &member{c.Grant().String(), c.Expires, c}
		claims[s.file] = slices.Delete(claims[s.file], at, at+1)
	}
	return members
}

// covers says whether scopes are what was asked for; asking for none asks for the default.
func covers(have, want []string) bool {
	return len(want) == 0 || strings.Join(slices.Sorted(slices.Values(have)), " ") == strings.Join(slices.Sorted(slices.Values(want)), " ")
}
