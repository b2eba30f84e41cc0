package token_test

import (
	"strings"
	"testing"

	"github.com/go-json-experiment/json/jsontext"
)

// without cuts the first field of a name, with its value, out of a JSON text.
func without(t testing.TB, text, name string) string {
	t.Helper()
	field := `"` + name + `":`
	start := strings.Index(text, field)
	if start < 0 {
		t.Fatalf("no %s in %s", name, text)
	}
	dec := jsontext.NewDecoder(strings.NewReader(text[start+len(field):]))
	if err := dec.SkipValue(); err != nil {
		t.Fatal(err)
	}
	end := start + len(field) + int(dec.InputOffset())
	switch {
	case text[end] == ',':
		end++
	case text[start-1] == ',':
		start--
	}
	return text[:start] + text[end:]
}
