package deliver

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
)

// A Secret is one file whose content isn't a credential of the broker's: who has it writes
// it himself, with the care that credentials get.
type Secret struct {
	// Path is as that of a Target.
	Path string
	// Mode, UID and GID are as those of a Target.
	Mode     fs.FileMode
	UID, GID *int
}

// Validate says all that is wrong with it, whatever is on this host: *field.Error values, joined.
func (s *Secret) Validate() error {
	return errors.Join(checkPath(s.Path), checkAccess(s.Mode, s.GID))
}

// Try looks at the folder that it goes to.
func (s *Secret) Try() error {
	root, err := openFolder(filepath.Dir(s.Path))
	if err != nil {
		return err
	}
	return root.Close()
}

// Write puts a whole file in place of what is there, and says which it is.
func (s *Secret) Write(content string) (fs.FileInfo, error) {
	root, err := openFolder(filepath.Dir(s.Path))
	if err != nil {
		return nil, err
	}
	defer root.Close()
	name, a := filepath.Base(s.Path), newAccess(s.Mode, s.UID, s.GID)
	if err := a.put(root, name, []byte(content)); err != nil {
		return nil, err
	}
	return root.Lstat(name)
}

// Remove removes the file that Write made, unless another is in its place.
func (s *Secret) Remove(made fs.FileInfo) error {
	root, err := openFolder(filepath.Dir(s.Path))
	if err != nil {
		return err
	}
	defer root.Close()
	name := filepath.Base(s.Path)
	if now, err := root.Lstat(name); err != nil || !os.SameFile(now, made) {
		return nil
	}
	return discard(root, name)
}
