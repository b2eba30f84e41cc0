package main

import (
	"context"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// Every mistake can still be planted: the table follows the code.
func TestPlants(t *testing.T) {
	dir := t.TempDir()
	for i, m := range mutants {
		sub := filepath.Join(dir, strconv.Itoa(i))
		if err := os.Mkdir(sub, 0o700); err != nil {
			t.Fatal(err)
		}
		if _, err := m.plant("../..", sub); err != nil {
			t.Errorf("%s %s: %v", m.trap, m.mistake, err)
		}
	}
}

// One of them all the way: planted, built, found.
func TestFound(t *testing.T) {
	var out strings.Builder
	if err := run(context.Background(), []string{"-C", "../..", "-run", "^A1 ", "-seeds", "300"}, &out, io.Discard); err != nil {
		t.Fatalf("%v\n%s", err, out.String())
	}
	if !strings.Contains(out.String(), "| A1 |") || !strings.Contains(out.String(), "| I5 |") {
		t.Errorf("printed:\n%s", out.String())
	}
}
