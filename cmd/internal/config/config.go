// Package config reads the commands' YAML files, strictly: an unknown key, a key
// given twice, a value of the wrong type and a value out of range are errors, and
// all of them are reported at once, each with its line.
//
//	type Config struct {
//		Listen string          `yaml:"listen,required"`
//		Bound  time.Duration   `yaml:"bound"`
//		Broker spiffeid.ID     `yaml:"broker_id,required"`
//	}
//
//	func (c *Config) Validate() error {
//		if c.Bound > time.Hour {
//			return config.Wrong("bound", "is at most 1h")
//		}
//		return nil
//	}
//
//	cfg := Config{Bound: 30 * time.Second} // what isn't in the file stays
//	err := config.Load("/etc/dayfly/agent.yaml", &cfg)
//
// Fields are named by their yaml tag; a field without one isn't read. "required"
// wants the key to be there. Types: string, bool, integers, floats,
// [time.Duration] ("30s", never negative), [Size] ("64KiB"), [Mode] ("0600"),
// whatever implements [encoding.TextUnmarshaler] (a SPIFFE ID, a trust domain, a
// slog.Level, a netip.AddrPort), structs, pointers, lists, and maps with string
// keys. Anchors, aliases, tags of one's own and several documents are refused:
// a file says what it says, where it says it. The tag ",inline" takes the keys of
// an embedded struct for the struct's own. An element of a list that has a
// SetDefaults method begins as that leaves it.
//
// A struct with a Validate method, at any depth, is asked after its fields were
// read. It returns one error or several, joined; those made by [Wrong] get the
// line of the key that they name.
//
// Execute and ExitCode give the daemons one meaning of their exit codes: 2 for a command
// line or a configuration that is wrong.
package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"reflect"
	"regexp"
	"strconv"

	"go.yaml.in/yaml/v3"
)

// MaxBytes bounds a configuration file; ours have a few hundred lines.
const MaxBytes = 1 << 20

// Load reads the file into a struct, given as a pointer; what the file doesn't
// mention keeps its value. The error is [Problems] for a file that could be read
// and is wrong, and wraps fs.ErrNotExist or fs.ErrPermission for one that
// couldn't. After an error the struct holds an unspecified mixture.
func Load(path string, into any) error {
	content, err := readFile(path)
	if err != nil {
		return fmt.Errorf("reading configuration: %w", err)
	}
	return Parse(path, content, into)
}

// Parse is Load for bytes; name is what problems call the file.
func Parse(name string, content []byte, into any) error {
	v := reflect.ValueOf(into)
	if v.Kind() != reflect.Pointer || v.IsNil() || v.Elem().Kind() != reflect.Struct {
		panic(fmt.Sprintf("internal error: config.Parse into %T, not a pointer to a struct", into))
	}
	d := &decoder{file: name}
	root := d.document(content)
	if root != nil {
		d.mapping(root, v.Elem(), "")
	}
	return d.problems.err()
}

func readFile(path string) ([]byte, error) {
	if path == "" {
		return nil, errors.New("no path was given")
	}
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("there is no file %s: %w", path, fs.ErrNotExist)
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil {
		return nil, err
	} else if info.IsDir() {
		return nil, fmt.Errorf("%s is a folder, not a file", path)
	}
	content, err := io.ReadAll(io.LimitReader(f, MaxBytes+1))
	if err != nil {
		return nil, err
	}
	if len(content) > MaxBytes {
		return nil, fmt.Errorf("%s is larger than %d bytes", path, MaxBytes)
	}
	return content, nil
}

// document returns the one mapping that a file is. An empty file is an empty one,
// so that its required keys are reported like any other's.
func (d *decoder) document(content []byte) *yaml.Node {
	empty := &yaml.Node{Kind: yaml.MappingNode, Tag: mapTag, Line: 1}
	dec := yaml.NewDecoder(bytes.NewReader(content))
	var doc yaml.Node
	switch err := dec.Decode(&doc); {
	case errors.Is(err, io.EOF):
		return empty
	case err != nil:
		d.syntax(err)
		return nil
	case len(doc.Content) != 1:
		return empty
	}
	var more yaml.Node
	switch err := dec.Decode(&more); {
	case err == nil:
		d.addf(more.Line, "", "a second YAML document begins: put everything in one")
	case !errors.Is(err, io.EOF):
		d.syntax(err)
	}
	if root := doc.Content[0]; root.Tag != nullTag {
		return root
	}
	return empty
}

// yamlLine is how the YAML library begins its complaints.
var yamlLine = regexp.MustCompile(`^(?:yaml: )?(?:line (\d+): )?`)

func (d *decoder) syntax(err error) {
	m := yamlLine.FindStringSubmatch(err.Error())
	line, _ := strconv.Atoi(m[1])
	d.addf(line, "", "%s", err.Error()[len(m[0]):])
}
