package deliver

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
)

// Names in a folder of several files, as the kubelet's projected volumes have them, so
// that what watches those watches these.
const (
	dataLink = "..data"
	newLink  = "..data_tmp"
)

// generation is what the folders that the link points at are called.
var generation = regexp.MustCompile(`^\.\.[0-9]{4}_[0-9]{2}_[0-9]{2}_[0-9A-Za-z_.]+$`)

// openFolder opens a folder in which, and on the way to which, nobody but root and this
// user can put anything. It is opened for each use: it may have been made anew since.
func openFolder(path string) (*os.Root, error) {
	if real, err := filepath.EvalSymlinks(path); err != nil {
		return nil, err
	} else if real != path {
		return nil, fmt.Errorf("the way to %s goes through a symbolic link: write %s", path, real)
	}
	for at := path; ; at = filepath.Dir(at) {
		info, err := os.Lstat(at)
		if err != nil {
			return nil, err
		}
		if err := trusted(at, info, at != path); err != nil {
			return nil, err
		}
		if at == filepath.Dir(at) {
			break
		}
	}
	return openUnmoved(path)
}

// trusted refuses a folder in which others can put things. One above may be like /tmp,
// where each can remove only what is his.
func trusted(path string, info fs.FileInfo, above bool) error {
	if !info.IsDir() {
		return fmt.Errorf("%s is no folder", path)
	}
	uid, err := ownerOf(info)
	if err != nil {
		return err
	}
	if uid != 0 && uid != os.Geteuid() {
		return fmt.Errorf("the folder %s belongs to user %d: it must be root's or this user's, or others could put a file in the place of ours", path, uid)
	}
	if info.Mode().Perm()&0o022 != 0 && !(above && info.Mode()&fs.ModeSticky != 0) {
		return fmt.Errorf("others may write to the folder %s (mode %04o): take that from them, or choose another", path, info.Mode().Perm())
	}
	return nil
}

// openUnmoved opens the folder that was looked at, and no other.
func openUnmoved(path string) (*os.Root, error) {
	root, err := os.OpenRoot(path)
	if err != nil {
		return nil, err
	}
	before, err := os.Lstat(path)
	opened, openedErr := root.Stat(".")
	if err := errors.Join(err, openedErr); err != nil {
		return nil, errors.Join(err, root.Close())
	}
	if !os.SameFile(before, opened) {
		return nil, errors.Join(fmt.Errorf("the folder %s was exchanged meanwhile", path), root.Close())
	}
	return root, nil
}

// access is whom files are for.
type access struct {
	mode     fs.FileMode
	uid, gid int // -1 for this user's
}

func newAccess(mode fs.FileMode, uid, gid *int) access {
	a := access{mode, -1, -1}
	if mode == 0 {
		a.mode = DefaultMode
	}
	if uid != nil {
		a.uid = *uid
	}
	if gid != nil {
		a.gid = *gid
	}
	return a
}

// folderMode lets whom the files are for come as far as them.
func (a *access) folderMode() fs.FileMode {
	switch {
	case a.uid >= 0:
		return 0o711
	case a.mode&0o040 != 0:
		return 0o750
	}
	return 0o700
}

// create makes a file that wasn't there, whole and on the disk, or leaves none.
func (a *access) create(root *os.Root, name string, content []byte) (err error) {
	f, err := root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if closeErr := f.Close(); err == nil {
			err = closeErr
		}
		if err != nil {
			_ = root.Remove(name)
		}
	}()
	if _, err := f.Write(content); err != nil {
		return err
	}
	if a.uid >= 0 || a.gid >= 0 {
		if err := f.Chown(a.uid, a.gid); err != nil {
			return err
		}
	}
	if err := f.Chmod(a.mode); err != nil {
		return err
	}
	return f.Sync()
}

// syncNames puts names on the disk. If it can't, a name that is older is found after a power
// loss, which the next start looks at anyway.
func syncNames(root *os.Root) {
	if dir, err := root.Open("."); err == nil {
		_ = dir.Sync()
		_ = dir.Close()
	}
}

// discard removes a name that may be gone already.
func discard(root *os.Root, name string) error {
	if err := root.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// temporary is the name that a file has until it is whole. It is always the same: what a
// killed process left is the first to go.
func temporary(name string) string { return "." + name + ".dayfly" }

// put replaces a file.
func (a *access) put(root *os.Root, name string, content []byte) error {
	made := temporary(name)
	if err := discard(root, made); err != nil {
		return err
	}
	if err := a.create(root, made, content); err != nil {
		return err
	}
	if err := root.Rename(made, name); err != nil {
		_ = root.Remove(made)
		return err
	}
	syncNames(root)
	return nil
}

// swap replaces all files of a folder in the one moment in which its link is renamed.
// What was there before stays until tidy: somebody may be on the way through the link.
func (a *access) swap(root *os.Root, gen string, names []string, contents [][]byte) (err error) {
	if err := root.Mkdir(gen, 0o700); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = root.RemoveAll(gen)
		}
	}()
	inside, err := root.OpenRoot(gen)
	if err != nil {
		return err
	}
	defer inside.Close()
	for i, name := range names {
		if err := a.create(inside, name, contents[i]); err != nil {
			return err
		}
	}
	if err := a.open(root, gen); err != nil {
		return err
	}
	syncNames(inside)
	for _, name := range names {
		if err := showLink(root, name); err != nil {
			return err
		}
	}
	if err := discard(root, newLink); err != nil {
		return err
	}
	if err := root.Symlink(gen, newLink); err != nil {
		return err
	}
	if err := root.Rename(newLink, dataLink); err != nil {
		_ = root.Remove(newLink)
		return err
	}
	syncNames(root)
	return nil
}

// open gives a folder the group and mode that its files' readers need.
func (a *access) open(root *os.Root, name string) error {
	if a.gid >= 0 {
		if err := root.Chown(name, -1, a.gid); err != nil {
			return err
		}
	}
	return root.Chmod(name, a.folderMode())
}

// showLink makes the name under which readers find a file. It comes before what it
// points at: a link to nothing is as good as no file.
func showLink(root *os.Root, name string) error {
	want := dataLink + "/" + name
	switch is, err := root.Readlink(name); {
	case err == nil && is == want:
		return nil
	case errors.Is(err, fs.ErrNotExist):
		return root.Symlink(want, name)
	}
	return foreign(name)
}

func foreign(name string) error {
	return fmt.Errorf("there is a %s already that the agent didn't make: remove it, or choose another path", name)
}

// current is the generation that the link points at, "" for none.
func current(root *os.Root) (string, error) {
	is, err := root.Readlink(dataLink)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return "", nil
	case err != nil || !generation.MatchString(is):
		return "", foreign(dataLink)
	}
	return is, nil
}

// tidy removes what is left of other generations than the current one, and links to
// files that are no longer made.
func tidy(root *os.Root, names []string) error {
	now, err := current(root)
	if err != nil {
		return err
	}
	dir, err := root.Open(".")
	if err != nil {
		return err
	}
	defer dir.Close()
	entries, err := dir.ReadDir(-1)
	if err != nil {
		return err
	}
	wanted := map[string]bool{}
	for _, n := range names {
		wanted[n] = true
	}
	var errs []error
	for _, e := range entries {
		switch name := e.Name(); {
		case name == newLink, generation.MatchString(name) && name != now && e.IsDir():
			errs = append(errs, root.RemoveAll(name))
		case e.Type() == fs.ModeSymlink && !wanted[name] && name != dataLink:
			if is, err := root.Readlink(name); err == nil && is == dataLink+"/"+name {
				errs = append(errs, discard(root, name))
			}
		}
	}
	return errors.Join(errs...)
}

// empty removes all that swap made; for readers it is one moment.
func empty(root *os.Root) error {
	if _, err := current(root); err != nil {
		return err
	}
	if err := discard(root, dataLink); err != nil {
		return err
	}
	err := tidy(root, nil)
	syncNames(root)
	return err
}

// read returns a file that is no link and not too large, nil for none.
func read(root *os.Root, name string) ([]byte, fs.FileInfo, error) {
	info, err := root.Lstat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, nil
	}
	if err != nil {
		return nil, nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > MaxFileBytes {
		return nil, nil, foreign(name)
	}
	f, err := root.Open(name)
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	if opened, err := f.Stat(); err != nil || !os.SameFile(info, opened) {
		return nil, nil, errors.Join(foreign(name), err)
	}
	content, err := io.ReadAll(io.LimitReader(f, MaxFileBytes))
	if content == nil {
		content = []byte{}
	}
	return content, info, err
}

// plainName says what is wrong with the name of a file in a folder.
func plainName(name string) error {
	switch {
	case name == "" || name == "." || strings.ContainsAny(name, "/\x00"):
		return errors.New("must be a plain name")
	case strings.HasPrefix(name, ".."):
		return errors.New("must not begin with two dots: those names are the agent's own")
	case len(name) > 200:
		return errors.New("has more than 200 bytes")
	}
	return nil
}
