package policy

import (
	"crypto"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// IsTemplate says whether it is a good one.
func IsTemplate(text string) bool {
	_, err := parseTemplate(text)
	return err == nil
}

// Gives says whether a template, if it is one, gives an identity a name.
func Gives(text string, id spiffeid.ID, name string) bool {
	t, err := parseTemplate(text)
	return err == nil && t.gives(id, name)
}

// ReadBundle reads a bundle whose signature must verify, and returns its revision and
// its files.
func ReadBundle(raw []byte, keys map[string]crypto.PublicKey) (string, map[string][]byte, error) {
	verify, err := verification(keys, "")
	if err != nil {
		return "", nil, err
	}
	f, err := readBundle(raw, verify)
	if err != nil {
		return "", nil, err
	}
	return f.revision, f.files, nil
}

// ParseData is the data parser on one file.
func ParseData(name string, content []byte) Problems {
	var problems Problems
	parseData([]string{name}, map[string][]byte{name: content}, &problems)
	return problems
}
