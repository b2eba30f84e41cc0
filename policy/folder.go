package policy

import (
	"crypto/sha256"
	"embed"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// maxFile bounds one file of a policy folder, in bytes: room for a hundred
// thousand entitlements, and an end to a log file copied there by mistake.
const maxFile = 32 << 20

//go:embed default/*.rego default/data.yaml demo/data.yaml
var embedded embed.FS

// Default is the policy folder that a newcomer starts from: the default rules,
// their tests and commented data that allows nothing yet.
func Default() fs.FS { return subFS("default") }

// Demo is the default rules with the data of dayfly dev and dayfly demo.
func Demo() fs.FS { return overlay{subFS("demo"), Default()} }

// WriteDefault writes [Default] into dir, which it creates with mode 0700 where
// it isn't there. Files get mode 0600; one that exists already is an error, and
// nothing is overwritten.
func WriteDefault(dir string) error { return write(dir, Default()) }

// WriteDemo writes [Demo] into dir as [WriteDefault] does.
func WriteDemo(dir string) error { return write(dir, Demo()) }

func subFS(name string) fs.FS {
	sub, err := fs.Sub(embedded, name)
	if err != nil {
		panic("internal error: embedded policy: " + err.Error())
	}
	return sub
}

// overlay shows several flat folders as one; the first that has a file wins.
type overlay []fs.FS

func (o overlay) Open(name string) (fs.File, error) {
	var errs []error
	for _, fsys := range o {
		f, err := fsys.Open(name)
		if err == nil {
			return f, nil
		}
		errs = append(errs, err)
	}
	return nil, errors.Join(errs...)
}

func (o overlay) ReadDir(name string) ([]fs.DirEntry, error) {
	var out []fs.DirEntry
	for _, fsys := range o {
		list, err := fs.ReadDir(fsys, name)
		if err != nil {
			return nil, err
		}
		for _, e := range list {
			if !slices.ContainsFunc(out, func(x fs.DirEntry) bool { return x.Name() == e.Name() }) {
				out = append(out, e)
			}
		}
	}
	return out, nil
}

func write(dir string, fsys fs.FS) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("creating policy folder: %w", err)
	}
	f, err := readFolder(fsys)
	if err != nil {
		return err
	}
	for _, name := range f.names {
		if err := writeNew(filepath.Join(dir, name), f.files[name]); err != nil {
			return fmt.Errorf("writing policy: %w", err)
		}
	}
	return nil
}

func writeNew(name string, content []byte) error {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	return errors.Join(err, f.Close())
}

// folder is what a source of policy holds at one moment.
type folder struct {
	names    []string // sorted
	files    map[string][]byte
	revision string
	fetched  *fetched // of a bundle that came over the network
}

// seal makes names and revision out of files; label is a bundle's own revision.
func (f *folder) seal(label string) {
	f.names = slices.Sorted(maps.Keys(f.files))
	h := sha256.New()
	for _, name := range f.names {
		fmt.Fprintf(h, "%q %d\n", name, len(f.files[name]))
		h.Write(f.files[name])
	}
	f.revision = fmt.Sprintf("sha256:%x", h.Sum(nil)[:16])
	if label != "" {
		f.revision = label + "@" + f.revision
	}
}

// readFolder reads the policy files directly in fsys: *.rego, *.yaml, *.yml and
// *.json. Names that start with a dot are left alone (editors' swap files, the
// ..data of Kubernetes), and so are subfolders.
func readFolder(fsys fs.FS) (*folder, error) {
	entries, err := fs.ReadDir(fsys, ".")
	if err != nil {
		return nil, fmt.Errorf("reading policy folder: %w", err)
	}
	f := &folder{files: map[string][]byte{}}
	for _, e := range entries {
		name := e.Name()
		if strings.HasPrefix(name, ".") || !isRego(name) && !isData(name) {
			continue
		}
		content, err := readFile(fsys, name)
		if err != nil {
			return nil, fmt.Errorf("reading policy folder: %w", err)
		}
		f.files[name] = content
	}
	f.seal("")
	return f, nil
}

// readDir reads the policy files of a folder on disk.
func readDir(dir string) (*folder, error) {
	f, err := readFolder(os.DirFS(dir))
	if p := (*fs.PathError)(nil); errors.As(err, &p) && p.Path == "." {
		return nil, fmt.Errorf("reading policy folder %s: %w", dir, p.Err)
	}
	return f, err
}

// readAny reads a folder on disk, or a bundle that nobody needs to have signed: what
// somebody wants to try out.
func readAny(path string) (*folder, error) {
	if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() {
		return readBundleFile(path)
	}
	return readDir(path)
}

func readFile(fsys fs.FS, name string) ([]byte, error) {
	file, err := fsys.Open(name)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	content, err := io.ReadAll(io.LimitReader(file, maxFile+1))
	if err != nil {
		return nil, err
	}
	if len(content) > maxFile {
		return nil, fmt.Errorf("%s is larger than %d bytes", name, maxFile)
	}
	return content, nil
}

func isRego(name string) bool { return path.Ext(name) == ".rego" }

func isTest(name string) bool { return strings.HasSuffix(name, "_test.rego") }

func isData(name string) bool {
	switch path.Ext(name) {
	case ".yaml", ".yml", ".json":
		return true
	}
	return false
}
