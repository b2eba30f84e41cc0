//go:build linux

package powerloss_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/broker/boltstore"
	"github.com/dayflyhq/dayfly/broker/storetest"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"golang.org/x/sys/unix"
)

// An answer is what somebody was told is durable, and when: on the clock of the
// recording, read after it had arrived.
type answer struct {
	At   int64
	Kind string // one of the kinds below

	Grant       string
	Fingerprint [32]byte
	Key         string // that signed it; empty: not looked for
	Expires     time.Time

	Position feed.Position // of a record
	Kept     bool          // no pruning takes it

	Observed string // the key
	Value    int    // grows with each observation of the key

	Horizon         uint64 // of a pruning
	Before          time.Time
	Dropped         []uint64
	Records, Grants int // that went
}

const (
	storeMade   = "made"
	grantGiven  = "grant"
	recordMade  = "record"
	observation = "observation"
	pruneBegun  = "pruning" // stamped before the call: from here on things may be gone
	pruneDone   = "pruned"
)

// contents is what a store says after the power came back.
type contents struct {
	horizon  feed.Position
	grants   map[string]*broker.Grant
	keys     map[string]bool
	records  map[uint64]feed.Sum
	observed map[string]string
}

// inMemory makes a file of an image, in memory and without a name.
func inMemory(m image) (file *os.File, path string, err error) {
	fd, err := unix.MemfdCreate("store", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, "", fmt.Errorf("making a file in memory: %w", err)
	}
	file = os.NewFile(uintptr(fd), "store")
	_, err = file.Write(m.bytes)
	return file, fmt.Sprintf("/proc/self/fd/%d", fd), errors.Join(err, file.Truncate(m.size), file.Chmod(0o600))
}

// open has an image checked and reads it. One in eight goes on, and is checked again.
func open(st state) (*contents, error) {
	file, path, err := inMemory(st.image)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	ctx := context.Background()
	if _, err := boltstore.Check(ctx, path); err != nil {
		return nil, err
	}
	s, err := boltstore.Open(boltstore.Config{Path: path})
	if err != nil {
		return nil, err
	}
	defer s.Close()
	c, err := read(ctx, s)
	if err != nil || st.n%8 > 0 {
		return c, err
	}
	if _, err := s.Append(ctx, storetest.Next(storetest.Revocation("r", revocation.Everything()))); err != nil {
		return nil, err
	}
	if err := s.Close(); err != nil {
		return nil, err
	}
	_, err = boltstore.Check(ctx, path)
	return c, err
}

// openElsewhere has an image checked in a process of its own: what bbolt makes of garbage
// can end the process.
func openElsewhere(st state) (*contents, error) {
	file, path, err := inMemory(st.image)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	cmd := exec.Command(os.Args[0], roleCheck, fmt.Sprintf("/proc/%d/fd/%s", os.Getpid(), filepath.Base(path)))
	out, err := cmd.CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("%w: %.300s", err, out)
	}
	return &contents{}, nil
}

// roleCheck makes the test binary a checker of the store at PATH.
const roleCheck = "dayfly-check"

func read(ctx context.Context, s broker.Store) (*contents, error) {
	st, err := s.State(ctx)
	if err != nil {
		return nil, err
	}
	c := &contents{
		horizon: st.Horizon,
		grants:  map[string]*broker.Grant{}, keys: map[string]bool{}, records: map[uint64]feed.Sum{}, observed: map[string]string{},
	}
	grants, _, err := s.Grants(ctx, broker.GrantQuery{Limit: 1 << 20})
	if err != nil {
		return nil, err
	}
	for _, g := range grants {
		c.grants[g.ID().String()] = g
	}
	for r, err := range s.Events(ctx, 0) {
		if err != nil {
			return nil, err
		}
		c.records[r.Seq] = r.Sum
		if r.Key != nil {
			c.keys[r.Key.Public.ID.String()] = true
		}
		if r.Seq == st.Head.Seq {
			break
		}
	}
	for o, err := range s.Observed(ctx, "") {
		if err != nil {
			return nil, err
		}
		c.observed[o.Key] = string(o.Value)
	}
	return c, nil
}

// broken lists the answers before a moment that a state doesn't keep. No contents: there
// is no store.
func broken(c *contents, answers []answer, at int64) []string {
	var problems []string
	problem := func(format string, args ...any) { problems = append(problems, fmt.Sprintf(format, args...)) }
	var (
		horizon uint64
		before  time.Time
		dropped = map[uint64]bool{}
	)
	for _, a := range answers {
		if a.At < at && a.Kind == pruneBegun {
			horizon, before = max(horizon, a.Horizon), a.Before
			for _, seq := range a.Dropped {
				dropped[seq] = true
			}
		}
	}
	for _, a := range answers {
		switch {
		case a.At >= at || a.Kind == pruneBegun:
			continue
		case c == nil:
			problem("there is no store, and %s was answered", a.Kind)
			continue
		}
		switch a.Kind {
		case grantGiven:
			g := c.grants[a.Grant]
			switch {
			case g == nil && expired(a.Expires, before):
			case g == nil:
				problem("grant %s was handed out and is not on record", a.Grant)
			case g.Fingerprint != a.Fingerprint:
				problem("grant %s is on record with another fingerprint", a.Grant)
			case a.Key != "" && !c.keys[a.Key]:
				problem("key %s of grant %s is not on record", a.Key, a.Grant)
			}
		case recordMade:
			seq := a.Position.Seq
			switch sum, ok := c.records[seq]; {
			case !ok && (a.Kept || seq > horizon && !dropped[seq]):
				problem("record %d was acknowledged and is gone", seq)
			case ok && sum != a.Position.Sum && a.Position.Sum != feed.Sum{}:
				problem("record %d was acknowledged and is another", seq)
			}
		case observation:
			var value int
			if fmt.Sscan(c.observed[a.Observed], &value); value < a.Value {
				problem("observation %s=%d is gone", a.Observed, a.Value)
			}
		case pruneDone:
			if c.horizon.Seq < a.Horizon {
				problem("the horizon is back at %d after %d", c.horizon.Seq, a.Horizon)
			}
		}
	}
	return problems
}

// expired reports whether a grant's whole day had ended at a time.
func expired(expires, before time.Time) bool {
	return !before.IsZero() && !expires.Truncate(24*time.Hour).Add(24*time.Hour).After(before)
}

// A verdict is what became of a recording.
type verdict struct {
	histories, windows, states int

	lost, corrupt []string // states that break an answer; that don't open
}

func (v *verdict) String() string {
	return fmt.Sprintf("%d histories, %d windows between syncs, %d states: %d lose what was answered, %d are corrupt", v.histories, v.windows, v.states, len(v.lost), len(v.corrupt))
}

// add sums up.
func (v *verdict) add(w *verdict) {
	v.histories, v.windows, v.states = v.histories+w.histories, v.windows+w.windows, v.states+w.states
	v.lost, v.corrupt = append(v.lost, w.lost...), append(v.corrupt, w.corrupt...)
}

// try opens all states of a recording, until enough of them are bad.
func try(t *testing.T, d *disk, opener func(state) (*contents, error), h *history, enough int) *verdict {
	t.Helper()
	var (
		v      verdict
		mu     sync.Mutex
		wg     sync.WaitGroup
		states = make(chan state)
		n      int
	)
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for s := range states {
				var c *contents
				var err error
				if s.named {
					c, err = opener(s)
				}
				mu.Lock()
				if v.states++; err != nil {
					v.corrupt = append(v.corrupt, fmt.Sprintf("%v\n%s", err, s.what))
				} else if p := broken(c, h.Answers, s.at); len(p) > 0 {
					v.lost = append(v.lost, fmt.Sprintf("%d answers are broken, the first: %s\n%s", len(p), p[0], s.what))
				}
				mu.Unlock()
			}
		})
	}
	d.yield = func(s state) bool {
		s.n, n = n, n+1
		states <- s
		mu.Lock()
		defer mu.Unlock()
		return len(v.lost)+len(v.corrupt) < enough
	}
	d.run(h.Events)
	close(states)
	wg.Wait()
	v.histories, v.windows = 1, d.windows
	return &v
}
