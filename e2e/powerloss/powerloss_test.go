//go:build linux

package powerloss_test

import (
	"encoding/gob"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const (
	// samples is how many states are tried between two syncs besides the prefixes.
	samples = 6

	// longVar says for how long to try new histories, a Go duration; unset: one of each kind.
	longVar = "DAYFLY_POWERLOSS"
	// replayVar names a file that a failed test has left, to try its history again.
	replayVar = "DAYFLY_POWERLOSS_REPLAY"
	// plantVar says which mistake the planted broker makes.
	plantVar = "DAYFLY_TEST_PLANT"
)

// TestPowerLoss takes the power from a broker's binary under load, whenever it may go.
// Every credential that a caller had received by then, every revocation and every lift
// that was acknowledged, is in the records: promise 1.
func TestPowerLoss(t *testing.T) {
	binary := buildBroker(t, nil)
	survive(t, func() *history {
		h := recordBroker(t, binary, 200)
		if h.count(grantGiven) < 200 || h.count(recordMade) < 4 {
			t.Fatalf("that is too little to test anything: %v", h)
		}
		return h
	})
}

// TestPowerLossWhilePruning does it to a store that prunes while others write.
func TestPowerLossWhilePruning(t *testing.T) {
	survive(t, func() *history {
		h := recordStore(t, 5)
		records, grants := 0, 0
		for _, a := range h.Answers {
			records, grants = records+a.Records, grants+a.Grants
		}
		if records < 10 || grants < 40 {
			t.Fatalf("%d records and %d grants were pruned: too little to test anything", records, grants)
		}
		return h
	})
}

// survive tries a history, or new ones for as long as the environment says.
func survive(t *testing.T, next func() *history) {
	t.Helper()
	var long time.Duration
	if s := os.Getenv(longVar); s != "" {
		var err error
		if long, err = time.ParseDuration(s); err != nil {
			t.Fatalf("%s: %v", longVar, err)
		}
	}
	replay := os.Getenv(replayVar)
	if replay != "" {
		next = func() *history { return readHistory(t, replay) }
	}
	var all verdict
	for began := time.Now(); ; {
		h := next()
		t.Logf("%v, seed %d", h, h.Seed)
		v := try(t, newDisk(h), open, h, 5)
		all.add(v)
		for _, bad := range append(v.lost, v.corrupt...) {
			t.Error(bad)
		}
		if t.Failed() && replay == "" {
			t.Logf("try it again with %s=%s", replayVar, keepHistory(t, h))
		}
		if t.Failed() {
			return
		}
		if time.Since(began) >= long {
			break
		}
	}
	t.Log(&all)
}

func newDisk(h *history) *disk {
	return &disk{store: h.Store, folder: h.Folder, samples: samples, rand: rand.New(rand.NewPCG(h.Seed, 0))}
}

func keepHistory(t *testing.T, h *history) string {
	t.Helper()
	f, err := os.CreateTemp("", "dayfly-powerloss-*.gob")
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(gob.NewEncoder(f).Encode(h), f.Close()); err != nil {
		t.Fatal(err)
	}
	return f.Name()
}

func readHistory(t *testing.T, path string) *history {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var h history
	if err := gob.NewDecoder(f).Decode(&h); err != nil {
		t.Fatal(err)
	}
	return &h
}

// buildBroker builds the broker, with files of the source replaced by others.
func buildBroker(t *testing.T, replace map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	b, err := json.Marshal(map[string]any{"Replace": replace})
	if err != nil {
		t.Fatal(err)
	}
	overlay, out := filepath.Join(dir, "overlay.json"), filepath.Join(dir, "dayfly-broker")
	if err := os.WriteFile(overlay, b, 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "go", "build", "-overlay", overlay, "-o", out, "../../cmd/dayfly-broker")
	if b, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("building the broker: %v\n%s", err, b)
	}
	return out
}

// plants are mistakes in the store, each behind a value of the variable.
var plants = []struct{ file, old, new string }{
	{"open.go", "NoFreelistSync:  true,", `NoFreelistSync: true, NoSync: os.Getenv("` + plantVar + `") == "nosync",`},
	{"create.go", `	return fault("directory", func() error { return syncDir(dir) })`, `
	if os.Getenv("` + plantVar + `") == "nodirsync" {
		return nil
	}
	return fault("directory", func() error { return syncDir(dir) })`},
	{"commit.go", "		s.commit(batch)\n		for _, o := range batch {\n			close(o.done)\n		}\n", `
		early := os.Getenv("` + plantVar + `") == "early"
		if !early {
			s.commit(batch)
		}
		for _, o := range batch {
			close(o.done)
		}
		if early {
			time.Sleep(5 * time.Millisecond)
			s.commit(batch)
		}
`},
}

// planted builds a broker with all the plants.
func planted(t *testing.T) string {
	t.Helper()
	replace := map[string]string{}
	for _, p := range plants {
		path, err := filepath.Abs(filepath.Join("../../broker/boltstore", p.file))
		if err != nil {
			t.Fatal(err)
		}
		source, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Count(string(source), p.old) != 1 {
			t.Fatalf("%s no longer has what the plant replaces: %s", p.file, p.old)
		}
		replace[path] = filepath.Join(t.TempDir(), p.file)
		if err := os.WriteFile(replace[path], []byte(strings.Replace(string(source), p.old, p.new, 1)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return buildBroker(t, replace)
}

// TestPowerLossTeeth runs the same on brokers that break promise 1: each is found out.
func TestPowerLossTeeth(t *testing.T) {
	binary := planted(t)
	for _, c := range []struct{ plant, mistake string }{
		{"nosync", "bbolt never syncs"},
		{"nodirsync", "init doesn't sync the folder"},
		{"early", "callers are answered before the commit"},
	} {
		t.Run(c.plant, func(t *testing.T) {
			t.Setenv(plantVar, c.plant)
			h := recordBroker(t, binary, 40)
			v := try(t, newDisk(h), open, h, 1)
			if len(v.lost) == 0 {
				t.Fatalf("%s, and that wasn't found: %v", c.mistake, v)
			}
			t.Logf("found in state %d: %s", v.states, v.lost[0])
		})
	}
}

// TestPowerLossReorders takes each sync between pages and the meta page that points to
// them for nothing: the meta page may then be there without its pages, and a store that
// is corrupt is found. A sampler that kept writes in their order would find none.
func TestPowerLossReorders(t *testing.T) {
	h := recordStore(t, 3)
	h.Answers = nil
	d := newDisk(h)
	d.ignores = func(pending []event) bool {
		return len(pending) > 0 && pending[len(pending)-1].Offset >= 2*int64(os.Getpagesize())
	}
	v := try(t, d, openElsewhere, h, 1)
	if len(v.corrupt) == 0 {
		t.Fatalf("pages may arrive after their meta page, and no store was corrupt: %v", v)
	}
	t.Logf("found in state %d: %s", v.states, v.corrupt[0])
}
