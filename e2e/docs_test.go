package e2e

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

var (
	testFunc  = regexp.MustCompile(`(?m)^func ((?:Test|Fuzz)\w+)\(`)
	namedTest = regexp.MustCompile("`((?:Test|Fuzz)[A-Z]\\w*)`")
	link      = regexp.MustCompile(`\]\(([^)#:]+)[^):]*\)`)
)

// TestDocs: every test that a page names is there, and so is every page that it links to.
func TestDocs(t *testing.T) {
	tests := map[string]bool{}
	err := filepath.WalkDir("..", func(path string, _ fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		raw, err := os.ReadFile(path)
		for _, m := range testFunc.FindAllSubmatch(raw, -1) {
			tests[string(m[1])] = true
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	pages, err := filepath.Glob("../docs/*.md")
	nested, nestedErr := filepath.Glob("../docs/*/*.md")
	if err := errors.Join(err, nestedErr); err != nil || len(pages) == 0 || len(nested) == 0 {
		t.Fatalf("no pages: %v", err)
	}
	pages = append(pages, nested...)
	named := 0
	for _, page := range append(pages, "../README.md") {
		raw, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range namedTest.FindAllSubmatch(raw, -1) {
			named++
			if !tests[string(m[1])] {
				t.Errorf("%s names %s, which is nowhere", page, m[1])
			}
		}
		for _, m := range link.FindAllSubmatch(raw, -1) {
			if _, err := os.Stat(filepath.Join(filepath.Dir(page), string(m[1]))); err != nil {
				t.Errorf("%s links to nothing: %v", page, err)
			}
		}
	}
	if named < 100 {
		t.Errorf("only %d names of tests were found", named)
	}
}
