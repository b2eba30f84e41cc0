package brokerd

import (
	"bytes"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/broker/boltstore"
	"github.com/dayflyhq/dayfly/broker/storetest"
)

// On a terminal a backup says how far it is, on one line that it overwrites and ends;
// nowhere else is anything said.
func TestBackupProgress(t *testing.T) {
	store := filepath.Join(t.TempDir(), "s.db")
	if err := boltstore.Create(store, storetest.Era(7)); err != nil {
		t.Fatal(err)
	}
	var said bytes.Buffer
	b := &backup{File: store + ".backup", store: store, progress: &said}
	if err := b.run(t.Context()); err != nil {
		t.Fatal(err)
	}
	text := said.String()
	whole := strings.TrimPrefix(text[strings.LastIndex(text, "\r"):], "\rcopied ")
	if parts := strings.Split(whole, " "); !strings.HasPrefix(text, "\rcopied ") || !strings.HasSuffix(text, " MiB\n") || strings.Count(text, "\n") != 1 || len(parts) != 4 || parts[0] != parts[2] {
		t.Errorf("the terminal shows %q", text)
	}
	quiet := &backup{}
	if w := quiet.counted(&said); w != &said {
		t.Error("without a terminal it is counted")
	}

	// It is said a few times a second, whatever the pieces, and at the end.
	said.Reset()
	b = &backup{progress: &said, Bytes: 1000}
	w := b.counted(&bytes.Buffer{})
	began := time.Now()
	for range 1000 {
		if _, err := w.Write([]byte{0}); err != nil {
			t.Fatal(err)
		}
	}
	if n, most := strings.Count(said.String(), "\r"), 2+int(time.Since(began)/(100*time.Millisecond)); n > most || n == 0 {
		t.Errorf("said %d times, at most %d", n, most)
	}
}
