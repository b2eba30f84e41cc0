package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Every mistake can still be planted: the table follows the code.
func TestPlants(t *testing.T) {
	dir := t.TempDir()
	for i, h := range hunts {
		for j, m := range h.mutants {
			sub := filepath.Join(dir, fmt.Sprintf("%d-%d", i, j))
			if err := os.Mkdir(sub, 0o700); err != nil {
				t.Fatal(err)
			}
			if _, err := m.plant("../..", sub); err != nil {
				t.Errorf("%s %s: %v", m.trap, m.mistake, err)
			}
		}
	}
}

// One of each kind all the way: planted, built, found.
func TestFound(t *testing.T) {
	var out strings.Builder
	if err := run(context.Background(), []string{"-C", "../..", "-run", "^A1 |remembers its verdict", "-seeds", "300"}, &out, io.Discard); err != nil {
		t.Fatalf("%v\n%s", err, out.String())
	}
	for _, want := range []string{"| A1 | issuing is not conditional on the head | I5 |", "| a verifier remembers its verdict | TestSameAnswers |"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("printed:\n%s\nwant %s", out.String(), want)
		}
	}
}
