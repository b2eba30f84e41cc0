package supervise

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// folderPrefix begins the names of all folders of exec.
const folderPrefix = "dayfly-exec-"

// A Folder is for this user alone and goes with this process: by Close, or, after SIGKILL,
// when the next one is made beside it.
type Folder struct {
	Path string
	// InMemory says that nothing in it reaches a disk, but for swap.
	InMemory bool

	lock *os.File
}

// NewFolder makes one below parent, or, if that is empty, in memory where that can be,
// else among the temporary files.
func NewFolder(parent string) (*Folder, error) {
	if parent != "" {
		if !filepath.IsAbs(parent) {
			return nil, fmt.Errorf("the folder for files, %s, isn't an absolute path", parent)
		}
		return newFolder(parent)
	}
	for _, p := range memoryFolders() {
		if info, err := os.Lstat(p); p == "" || err != nil || !info.IsDir() || !inMemory(p) || !ownedByUs(info) && info.Mode()&os.ModeSticky == 0 {
			continue
		}
		if f, err := newFolder(p); err == nil {
			return f, nil
		}
	}
	return newFolder(os.TempDir())
}

func newFolder(parent string) (*Folder, error) {
	parent, err := filepath.EvalSymlinks(parent)
	if err != nil {
		return nil, err
	}
	removeLeft(parent)
	for range 10 {
		path, err := os.MkdirTemp(parent, folderPrefix)
		if err != nil {
			return nil, err
		}
		lock, err := claim(path)
		if err == nil {
			return &Folder{path, inMemory(path), lock}, nil
		}
		if !errors.Is(err, errTaken) {
			return nil, errors.Join(err, os.RemoveAll(path))
		}
	}
	return nil, fmt.Errorf("making a folder in %s: %w", parent, errTaken)
}

var errTaken = errors.New("another process took it for one that was left behind")

// claim locks a folder, if it is still the one at its path.
func claim(path string) (*os.File, error) {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, errTaken
	}
	if err != nil {
		return nil, err
	}
	if lockFolder(f) != nil {
		return nil, errors.Join(errTaken, f.Close())
	}
	at, err := os.Lstat(path)
	is, statErr := f.Stat()
	if err != nil || statErr != nil || !os.SameFile(at, is) {
		return nil, errors.Join(errTaken, f.Close())
	}
	return f, nil
}

// removeLeft removes the folders of processes of this user that are dead.
func removeLeft(parent string) {
	all, _ := filepath.Glob(filepath.Join(parent, folderPrefix+"*"))
	for _, path := range all {
		if info, err := os.Lstat(path); err != nil || !info.IsDir() || !ownedByUs(info) {
			continue
		}
		if lock, err := claim(path); err == nil {
			_ = os.RemoveAll(path)
			_ = lock.Close()
		}
	}
}

// Close removes the folder and all in it.
func (f *Folder) Close() error {
	return errors.Join(os.RemoveAll(f.Path), f.lock.Close())
}
