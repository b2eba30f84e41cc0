//go:build linux

package powerloss_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/broker/boltstore"
	"github.com/dayflyhq/dayfly/broker/storetest"
	"github.com/dayflyhq/dayfly/e2e/sandbox"
	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/proto/wire"
	"github.com/dayflyhq/dayfly/sdk"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// A tape is what was answered so far.
type tape struct {
	mu      sync.Mutex
	answers []answer
	kinds   map[string]int
}

// add stamps an answer, which has arrived, and returns how many of its kind have.
func (p *tape) add(a answer) int {
	a.At = monotonic()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.answers = append(p.answers, a)
	if p.kinds == nil {
		p.kinds = map[string]int{}
	}
	p.kinds[a.Kind]++
	return p.kinds[a.Kind]
}

// A history is what was recorded of a store, and what was answered meanwhile.
type history struct {
	Events        []event
	Answers       []answer
	Store, Folder uint64 // inodes
	Seed          uint64 // of the states that are tried
}

// newHistory reads the recordings of a store that nobody serves any more.
func newHistory(t *testing.T, recordings, path string, answers []answer) *history {
	t.Helper()
	h := &history{Answers: answers, Seed: rand.Uint64()}
	var err error
	if h.Events, err = readRecordings(recordings); err != nil {
		t.Fatal(err)
	}
	if h.Store, err = storeIn(h.Events, filepath.Base(path)); err != nil {
		t.Fatal(err)
	}
	if h.Folder, err = inodeOf(filepath.Dir(path)); err != nil {
		t.Fatal(err)
	}
	if err := wantComplete(h.Events, h.Store, path); err != nil {
		t.Fatal(err)
	}
	return h
}

func (h *history) count(kind string) (n int) {
	for _, a := range h.Answers {
		if a.Kind == kind {
			n++
		}
	}
	return n
}

func (h *history) String() string {
	syncs, writes := 0, 0
	for _, e := range h.Events {
		switch {
		case e.End || e.Inode != h.Store:
		case e.Call == callSync:
			syncs++
		default:
			writes++
		}
	}
	return fmt.Sprintf("%d writes, %d syncs; %d credentials, %d records, %d observations, %d prunings answered",
		writes, syncs, h.count(grantGiven), h.count(recordMade), h.count(observation), h.count(pruneDone))
}

// recordBroker runs a broker's binary under the recorder: init, and twice serve with
// callers, an operator and a verifier, until so many credentials were handed out.
func recordBroker(t *testing.T, binary string, credentials int) *history {
	t.Helper()
	dir, recordings := shortTemp(t), t.TempDir()
	box, err := sandbox.New(sandbox.Config{Broker: recorder(dir, recordings, binary), Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	defer box.Close()
	var said tape
	said.add(answer{Kind: storeMade})
	for session := 1; session <= 2; session++ {
		if err := box.StartBroker(t.Context()); err != nil {
			t.Fatal(err)
		}
		loadBroker(t, box, &said, session*credentials/2)
		if err := box.StopBroker(); err != nil {
			t.Fatalf("stopping the broker: %v\n%s", err, box.Log("broker"))
		}
	}
	return newHistory(t, recordings, box.StorePath(), said.answers)
}

// loadBroker keeps a broker busy until so many credentials were handed out in all.
func loadBroker(t *testing.T, box *sandbox.Sandbox, said *tape, credentials int) {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	client := func(id spiffeid.ID) *sdk.Client {
		c, err := box.Client(ctx, id, box.Info.GRPC)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	payments, orders, alice := client(sandbox.Payments), client(sandbox.Orders), client(sandbox.Alice)
	if _, err := box.StartService(ctx, sandbox.ServiceConfig{ID: sandbox.Orders, Audience: "orders", Feed: orders}); err != nil {
		t.Fatal(err)
	}
	var (
		wg     sync.WaitGroup
		failed atomic.Int64
	)
	// Calls may time out on a slow machine, and a planted broker may refuse what it granted.
	work := func(f func() error) {
		wg.Go(func() {
			for ctx.Err() == nil {
				if err := f(); err != nil && ctx.Err() == nil && failed.Add(1) > 100 {
					t.Errorf("after 100 failed calls: %v", err)
					stop()
				}
			}
		})
	}
	given := func(c *sdk.Credential) error {
		shown, err := token.Inspect(c.Token.Reveal())
		if err != nil {
			return err
		}
		a := answer{Kind: grantGiven, Grant: c.Grant, Fingerprint: shown.Fingerprint, Key: shown.Self().Key.String()}
		if said.add(a) >= credentials {
			stop()
		}
		return nil
	}
	for range 6 {
		work(func() error {
			root, err := payments.Issue(ctx, sdk.Request{Audience: "orders"})
			if err != nil {
				return err
			}
			if err := given(root); err != nil {
				return err
			}
			derived, err := orders.Exchange(ctx, root.Token, sdk.Request{Audience: "ledger"})
			if err != nil {
				return err
			}
			return given(derived)
		})
	}
	work(func() error { return revokeAndLift(ctx, dayflyv1.NewRevocationServiceClient(alice.Conn()), said) })
	wg.Wait()
}

// revokeAndLift makes one record of each kind that an operator makes.
func revokeAndLift(ctx context.Context, client dayflyv1.RevocationServiceClient, said *tape) error {
	revoked, err := client.Revoke(ctx, &dayflyv1.RevokeRequest{
		Selectors: []*dayflyv1.Selector{{Selector: &dayflyv1.Selector_Identity{Identity: sandbox.Web.String()}}}, Reason: "load",
	})
	if err != nil {
		return err
	}
	at, err := wire.ToPosition(revoked.GetRevocation().GetPosition())
	if err != nil {
		return err
	}
	said.add(answer{Kind: recordMade, Position: at})
	lifted, err := client.Lift(ctx, &dayflyv1.LiftRequest{Lock: at.Seq, Reason: "load"})
	if err != nil {
		return err
	}
	at.Seq, at.Sum = lifted.GetLift().GetSequence(), [32]byte{}
	said.add(answer{Kind: recordMade, Position: at})
	return nil
}

// recordStore runs a store under the recorder, in a process of its own that also prunes,
// which a broker does only after an hour.
func recordStore(t *testing.T, days int) *history {
	t.Helper()
	dir, recordings := t.TempDir(), t.TempDir()
	path := filepath.Join(dir, "store.db")
	command := append(recorder(dir, recordings, os.Args[0]), roleStore, path, strconv.Itoa(days))
	cmd := exec.CommandContext(t.Context(), command[0], command[1:]...)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var answers []answer
	decodeErr := json.NewDecoder(out).Decode(&answers)
	if err := errors.Join(decodeErr, cmd.Wait()); err != nil {
		t.Fatal(err)
	}
	return newHistory(t, recordings, path, answers)
}

// roleStore makes the test binary the process that recordStore runs: PATH DAYS.
const roleStore = "dayfly-store"

// runStore makes a store, lives through days of load, and prints what it was answered.
func runStore(path string, days int, out io.Writer) error {
	var said tape
	if err := boltstore.Create(path, storetest.Era(1)); err != nil {
		return err
	}
	said.add(answer{Kind: storeMade})
	s, err := boltstore.Open(boltstore.Config{Path: path, Reserve: 256 << 10})
	if err != nil {
		return err
	}
	first := time.Date(2026, 11, 1, 12, 0, 0, 0, time.UTC)
	for day := range days {
		if err := oneDay(s, day, first.AddDate(0, 0, day), &said); err != nil {
			return fmt.Errorf("day %d: %w", day, err)
		}
	}
	if err := s.Close(); err != nil {
		return err
	}
	return json.NewEncoder(out).Encode(said.answers)
}

// keptByPruning says which records no pruning takes.
func keptByPruning(seq uint64) bool { return seq%5 == 1 }

// oneDay issues, appends and observes at once, with a pruning in between that takes
// what is two days old.
func oneDay(s broker.Store, day int, noon time.Time, said *tape) error {
	ctx := context.Background()
	var wg sync.WaitGroup
	var failed sync.Map
	work := func(times int, f func(i int) error) {
		wg.Go(func() {
			for i := range times {
				if err := f(i); err != nil {
					failed.Store(err, true)
					return
				}
			}
		})
	}
	for w := range 4 {
		work(10, func(i int) error {
			st, err := s.State(ctx)
			if err != nil {
				return err
			}
			g := storetest.Grant(day*1000+w*100+i, storetest.Identity(w), noon, st.Head)
			if err := s.Issue(ctx, g, storetest.Admit); err != nil {
				return err
			}
			said.add(answer{Kind: grantGiven, Grant: g.ID().String(), Fingerprint: g.Fingerprint, Expires: g.Expires})
			return nil
		})
	}
	work(8, func(i int) error {
		r, err := s.Append(ctx, storetest.Next(storetest.Revocation("r", revocation.Identity(storetest.Identity(i)))))
		if err != nil {
			return err
		}
		st, err := s.State(ctx)
		if err != nil {
			return err
		}
		st.Head.Seq, st.Head.Sum = r.Seq, r.Sum
		said.add(answer{Kind: recordMade, Position: st.Head, Kept: keptByPruning(r.Seq)})
		return nil
	})
	work(10, func(i int) error {
		value := day*10 + i
		if err := s.Observe(ctx, broker.Observation{Key: "use/1", Value: []byte(strconv.Itoa(value))}); err != nil {
			return err
		}
		said.add(answer{Kind: observation, Observed: "use/1", Value: value})
		return nil
	})
	work(1, func(int) error { return prune(ctx, s, noon.AddDate(0, 0, -1), said) })
	wg.Wait()
	for err := range failed.Range {
		return err.(error)
	}
	return nil
}

func prune(ctx context.Context, s broker.Store, before time.Time, said *tape) error {
	st, err := s.State(ctx)
	if err != nil {
		return err
	}
	if st.Head.Seq < 8 {
		return nil
	}
	p := broker.Pruning{
		Horizon: st.Head.Seq - 6, Drop: []uint64{st.Head.Seq - 4}, GrantsExpiredBefore: before,
		Keep: func(r broker.Record) bool { return keptByPruning(r.Seq) },
	}
	if keptByPruning(p.Drop[0]) {
		p.Drop = nil
	}
	said.add(answer{Kind: pruneBegun, Horizon: p.Horizon, Before: before, Dropped: p.Drop})
	report, err := s.Prune(ctx, p)
	if err != nil {
		return err
	}
	said.add(answer{Kind: pruneDone, Horizon: report.Horizon.Seq, Records: report.Records, Grants: report.Grants})
	return nil
}

// shortTemp is a temporary folder whose path leaves room for unix sockets.
func shortTemp(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "df")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}
