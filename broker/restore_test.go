package broker_test

import (
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/broker/boltstore"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk/spiffetest"
)

// A history is a log in the making, of which copies are taken.
type history struct {
	at      feed.Position
	records []broker.Record
}

var restoreTime = time.Date(2026, 11, 26, 12, 0, 0, 0, time.UTC)

const firstEra token.Era = 0x60000000

func newHistory() *history {
	h := &history{}
	h.add(broker.Record{Event: feed.Event{Era: &feed.Era{Era: firstEra}}})
	return h
}

func (h *history) add(r broker.Record) uint64 {
	r.Details.Time = restoreTime.Add(-time.Hour)
	sealed, next := r.Seal(h.at)
	h.at, h.records = next, append(h.records, sealed)
	return sealed.Seq
}

func (h *history) lock(name string, change func(*broker.Details)) uint64 {
	r := broker.Record{
		Event:   feed.Event{Revocation: &feed.Revocation{Selectors: []revocation.Selector{revocation.Identity(id(name))}}},
		Details: broker.Details{Actor: "spiffe://example.org/alice", Reason: "because of " + name, Lock: broker.LockQuarantine},
	}
	if change != nil {
		change(&r.Details)
	}
	return h.add(r)
}

func (h *history) lift(number uint64) uint64 {
	return h.add(broker.Record{
		Event:   feed.Event{Lift: &feed.Lift{Lock: number}},
		Details: broker.Details{Actor: "spiffe://example.org/bob", Reason: "rebuilt"},
	})
}

func (h *history) branch() *history {
	return &history{at: h.at, records: slices.Clone(h.records)}
}

// copy is the log as a store has it; below the horizon only what is named is there.
func (h *history) copy(horizon uint64, kept ...uint64) *broker.LogCopy {
	c := &broker.LogCopy{Head: h.at}
	for _, r := range h.records {
		if r.Seq == horizon {
			c.Horizon = feed.Position{Era: firstEra, Seq: r.Seq, Sum: r.Sum}
		}
		if r.Seq > horizon || r.Era != nil || slices.Contains(kept, r.Seq) {
			c.Records = append(c.Records, r)
		}
	}
	return c
}

func plan(t *testing.T, r broker.Restore) *broker.Restoration {
	t.Helper()
	r.Now = restoreTime
	p, err := broker.PlanRestore(r)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// carried tells what a restoration carries over, in short.
func carried(p *broker.Restoration) []string {
	var out []string
	for _, r := range p.Records[1:] {
		switch {
		case r.Lift != nil:
			out = append(out, "lift "+r.Details.Actor)
		default:
			out = append(out, string(r.Details.Lock)+" "+r.Revocation.Selectors[0].Value())
		}
	}
	return out
}

func wantCarried(t *testing.T, p *broker.Restoration, want ...string) {
	t.Helper()
	if got := carried(p); !slices.Equal(got, want) {
		t.Errorf("carried over %q, want %q; notes %q", got, want, p.Notes)
	}
}

// TestRestoreConsent: G3. Nothing is restored while locks may be lost without a word.
func TestRestoreConsent(t *testing.T) {
	h := newHistory()
	h.lock("a", nil)
	older := h.copy(0)
	h.lock("b", nil)
	backup := h.copy(0)
	marked := h.copy(0)
	marked.Made = restoreTime.Add(-time.Minute)
	damaged := h.copy(0)
	damaged.Damage = []string{"record 2 can't be read"}
	for name, r := range map[string]broker.Restore{
		"no copy":                   {},
		"an older copy":             {LocksFrom: older},
		"the same backup":           {LocksFrom: marked},
		"a damaged copy":            {LocksFrom: damaged},
		"verifiers know more":       {LocksFrom: h.copy(0), Known: broker.KnownPosition{Era: firstEra, Seq: h.at.Seq + 1}},
		"verifiers know of an era":  {LocksFrom: h.copy(0), Known: broker.KnownPosition{Era: firstEra + 1}},
		"verifiers know, no copies": {Known: broker.KnownPosition{Era: firstEra, Seq: 1}},
	} {
		t.Run(name, func(t *testing.T) {
			r.Backup, r.Now = backup, restoreTime
			if _, err := broker.PlanRestore(r); !errors.Is(err, broker.ErrConsent) {
				t.Fatalf("%v, want ErrConsent", err)
			}
			r.AcceptLost = true
			if _, err := broker.PlanRestore(r); !errors.Is(err, broker.ErrReasonRequired) {
				t.Fatalf("consent without a reason: %v", err)
			}
			r.Reason, r.Actor = "the disk is gone", "root"
			p := plan(t, r)
			first := p.Records[0].Details
			if !first.Restored.LocksLost || first.Reason != r.Reason || first.Actor != "root" || len(p.Notes) == 0 {
				t.Errorf("the consent isn't in the records: %+v %+v", first, first.Restored)
			}
			if len(p.Verifiers) == 0 || !strings.Contains(string(p.Verifiers[len(p.Verifiers)-1].Value), "3600000000000") {
				t.Errorf("nobody stands for the verifiers that were lost: %q", p.Verifiers)
			}
		})
	}
	p := plan(t, broker.Restore{Backup: backup, LocksFrom: h.copy(0)}) // the store itself, as it was last
	if p.Records[0].Details.Restored.LocksLost || len(p.Verifiers) != 0 {
		t.Errorf("a copy that is the store itself loses nothing: %+v, %q", p.Records[0].Details.Restored, p.Verifiers)
	}
	wantCarried(t, p)
}

// TestRestoreCarries: what was locked since the backup is locked, with who and why; what
// was lifted is lifted; a revoked key never comes back.
func TestRestoreCarries(t *testing.T) {
	h := newHistory()
	stays := h.lock("stays", nil)
	h.lock("lifted-later", nil)
	lifted := h.at.Seq
	backup := h.copy(0)
	cut := restoreTime.Add(-10 * time.Minute)
	ends := restoreTime.Add(time.Hour)
	reissue := h.lock("reissue", func(d *broker.Details) {
		d.Lock, d.LockCut, d.LockEnds, d.IdempotencyKey = broker.LockReissue, cut, ends, "once"
	})
	h.lock("ended", func(d *broker.Details) { d.LockEnds = restoreTime.Add(-time.Second) })
	h.lift(lifted)
	h.lift(h.lock("locked-and-lifted", nil))
	h.lock("no-lock", func(d *broker.Details) { d.Lock = broker.LockNone })
	h.add(broker.Record{
		Event:   feed.Event{Revocation: &feed.Revocation{Selectors: []revocation.Selector{revocation.Key(keyIDOf(t, "AAAAAAAA"))}}},
		Details: broker.Details{Actor: "a", Reason: "stolen", Lock: broker.LockNone},
	})
	p := plan(t, broker.Restore{Backup: backup, LocksFrom: h.copy(0), Known: broker.KnownPosition{Era: firstEra, Seq: 3}})
	wantCarried(t, p, "reissue "+id("reissue").String(), "lift spiffe://example.org/bob", "none AAAAAAAA")
	if p.Kept != 1 || p.Fork != 0 || p.Agree != backup.Head.Seq {
		t.Errorf("kept %d, fork %d, agree %d", p.Kept, p.Fork, p.Agree)
	}
	got := p.Records[1].Details
	want := broker.CarriedFrom{Era: firstEra, Number: reissue}
	if got.Actor != "spiffe://example.org/alice" || got.Reason != "because of reissue" || !got.LockCut.Equal(cut) || !got.LockEnds.Equal(ends) ||
		got.CarriedFrom == nil || *got.CarriedFrom != want || got.IdempotencyKey != "" {
		t.Errorf("carried over as %+v", got)
	}
	if lift := p.Records[2].Lift; lift.Lock != lifted || lift.Lock == stays {
		t.Errorf("the lift is of lock %d", lift.Lock)
	}
	// The era is the greatest and the numbers are nobody's.
	if era := p.Records[0].Era.Era; era <= firstEra || p.Behind.Era != firstEra || p.Behind.Sum != h.at.Sum || (p.Behind.Seq+1)%1_000_000 != 0 || p.Behind.Seq < h.at.Seq+1_000_000-1 {
		t.Errorf("era %s behind %s", era, p.Behind)
	}
	// So they stay when the same is done again, with the clock set back.
	h2 := &history{at: p.Behind}
	for _, r := range p.Records {
		h2.add(r)
	}
	later := h2.copy(0)
	later.Records = append(slices.Clone(backup.Records), later.Records...)
	again := plan(t, broker.Restore{Backup: backup, LocksFrom: later, Known: broker.KnownPosition{Era: 0xfffffff0}, AcceptLost: true, Reason: "r"})
	if again.Records[0].Era.Era <= 0xfffffff0 || again.Behind.Seq+1 <= h2.at.Seq {
		t.Errorf("era %s behind %s, after %s", again.Records[0].Era.Era, again.Behind, h2.at)
	}
	wantCarried(t, again, "reissue "+id("reissue").String(), "lift spiffe://example.org/bob", "none AAAAAAAA")
	if from := again.Records[1].Details.CarriedFrom; from.Number != p.Behind.Seq+2 || from.Era != p.Records[0].Era.Era {
		t.Errorf("carried over twice, it was %+v", from)
	}
	if _, err := broker.PlanRestore(broker.Restore{Backup: backup, LocksFrom: later, Known: broker.KnownPosition{Era: 0xffffffff}, AcceptLost: true, Reason: "r"}); err == nil {
		t.Error("an era follows the last one that there is")
	}
}

// TestRestoreFork: an older file was put back by hand and run on. What stands in either
// history stands.
func TestRestoreFork(t *testing.T) {
	h := newHistory()
	both := h.lock("both", nil)
	inA, inB := h.lock("lifted-in-a", nil), h.lock("lifted-in-b", nil)
	a, b := h, h.branch()
	a.lift(inA)
	a.lock("only-a", nil)
	b.lock("only-b", nil)
	b.lift(inB)
	b.lock("newer-in-b", nil)
	p := plan(t, broker.Restore{Backup: a.copy(0), LocksFrom: b.copy(0)})
	if p.Fork != 5 || p.Agree != 4 || p.Records[0].Details.Restored.Fork != 5 || !strings.Contains(strings.Join(p.Notes, "\n"), "FORK") {
		t.Errorf("fork at %d, agree up to %d: %q", p.Fork, p.Agree, p.Notes)
	}
	wantCarried(t, p, "quarantine "+id("lifted-in-a").String(), "quarantine "+id("only-b").String(), "quarantine "+id("newer-in-b").String())
	if p.Kept != 3 { // both, only a, and the one that was lifted in b only
		t.Errorf("kept %d; notes %q; both is %d", p.Kept, p.Notes, both)
	}
	// A position that verifiers know tells that neither is theirs.
	known := broker.KnownPosition{Era: firstEra, Seq: 5, Sum: "00000000"}
	third := broker.Restore{Backup: a.copy(0), LocksFrom: b.copy(0), Known: known, Now: restoreTime}
	if _, err := broker.PlanRestore(third); !errors.Is(err, broker.ErrConsent) {
		t.Errorf("verifiers know a third history: %v", err)
	}
	third.AcceptLost, third.Reason = true, "r"
	if p := plan(t, third); !strings.Contains(strings.Join(p.Notes, "\n"), "FORK: the position 60000000/5/00000000") {
		t.Errorf("notes %q", p.Notes)
	}
	third.AcceptLost, third.Reason, third.Known.Sum = false, "", fmt.Sprintf("%x", b.records[4].Sum[:4])
	plan(t, third)
}

// TestRestorePruned: where the second copy has forgotten, a lock is lifted only if the
// log that forgot it is certainly the same.
func TestRestorePruned(t *testing.T) {
	h := newHistory()
	lock := h.lock("lifted", nil)
	anchor := h.lock("anchor", nil)
	unsure := h.lock("unsure", nil)
	backup := h.copy(0)
	h.lift(lock)
	h.lift(unsure)
	h.lock("new", nil)
	p := plan(t, broker.Restore{Backup: backup, LocksFrom: h.copy(h.at.Seq, anchor)})
	wantCarried(t, p, "lift ")
	if p.Records[1].Lift.Lock != lock || p.Agree != anchor {
		t.Errorf("lifted %d, agree up to %d", p.Records[1].Lift.Lock, p.Agree)
	}
	if !strings.Contains(strings.Join(p.Notes, "\n"), "lock 4 stands") || unsure != 4 {
		t.Errorf("notes %q", p.Notes)
	}
	// A copy that can't be read whole lifts nothing.
	damaged := h.copy(h.at.Seq, anchor)
	damaged.Damage = []string{"a page"}
	wantCarried(t, plan(t, broker.Restore{Backup: backup, LocksFrom: damaged, AcceptLost: true, Reason: "r"}))
}

func TestRestoreUnrelated(t *testing.T) {
	h, other := newHistory(), &history{}
	other.add(broker.Record{Event: feed.Event{Era: &feed.Era{Era: firstEra}}, Details: broker.Details{Actor: "another"}})
	other.lock("a", nil)
	if _, err := broker.PlanRestore(broker.Restore{Backup: h.copy(0), LocksFrom: other.copy(0), AcceptLost: true, Reason: "r", Now: restoreTime}); !errors.Is(err, broker.ErrUnrelated) {
		t.Errorf("%v, want ErrUnrelated", err)
	}
	broken := h.copy(0)
	broken.Damage = []string{"a page"}
	if _, err := broker.PlanRestore(broker.Restore{Backup: broken, AcceptLost: true, Reason: "r", Now: restoreTime}); err == nil {
		t.Error("a damaged backup is restored")
	}
}

// TestRestoreRoster: the second copy's verifiers join, without what they acknowledged
// there, and with the larger bound.
func TestRestoreRoster(t *testing.T) {
	h := newHistory()
	backup, newest := h.copy(0), h.copy(0)
	backup.Verifiers = []broker.Observation{{Key: "verifier/a||one", Value: []byte(`{"identity":"a","instance":"one","bound":2000000000,"era":1,"seq":1}`)}}
	newest.Verifiers = []broker.Observation{
		{Key: "verifier/a||one", Value: []byte(`{"identity":"a","instance":"one","bound":1000000000,"accepts_stale":true,"era":1,"seq":9}`)},
		{Key: "verifier/b||two", Value: []byte(`{"identity":"b","instance":"two","bound":1000000000,"era":1,"seq":9}`)},
	}
	p := plan(t, broker.Restore{Backup: backup, LocksFrom: newest})
	var got []string
	for _, o := range p.Verifiers {
		got = append(got, o.Key+" "+string(o.Value))
	}
	want := []string{
		`verifier/a||one {"identity":"a","instance":"one","bound":2000000000,"accepts_stale":true,"era":1,"seq":1}`,
		`verifier/b||two {"identity":"b","instance":"two","bound":1000000000}`,
	}
	if !slices.Equal(got, want) {
		t.Errorf("roster %q", got)
	}
	newest.Verifiers[0].Value = []byte("{")
	if _, err := broker.PlanRestore(broker.Restore{Backup: backup, LocksFrom: newest, Now: restoreTime}); err == nil {
		t.Error("an unreadable roster is taken")
	}
}

// restored ends the broker and starts one on a store that is restored from a copy.
func (w *world) restored(backup string) {
	w.t.Helper()
	w.stop()
	lost := w.path
	w.path = filepath.Join(w.t.TempDir(), "restored.db")
	b, err := boltstore.ReadLog(ctx, backup)
	if err != nil {
		w.t.Fatal(err)
	}
	c, err := boltstore.ReadLog(ctx, lost)
	if err != nil {
		w.t.Fatal(err)
	}
	p, err := broker.PlanRestore(broker.Restore{Backup: b, LocksFrom: c, Actor: "root", Reason: "test", Now: w.clock.Now()})
	if err != nil {
		w.t.Fatal(err)
	}
	if _, err := boltstore.Restore(ctx, boltstore.RestoreConfig{From: backup, Path: w.path, Restoration: p}); err != nil {
		w.t.Fatal(err)
	}
}

// copied ends the broker, copies its store and starts it again.
func (w *world) copied() string {
	w.t.Helper()
	w.stop()
	to := filepath.Join(w.t.TempDir(), "backup.db")
	_, err := boltstore.SaveBackup(ctx, to, w.clock.Now(), func(out io.Writer) error {
		return boltstore.CopyFile(ctx, w.path, func(int64) {}, out)
	})
	if err != nil {
		w.t.Fatal(err)
	}
	w.start()
	w.newKey()
	return to
}

// TestRestoredLocks: G3, G1. Over a restore every lock means what it meant, and goes on
// to over a restart and a pruning; nothing of the era before is good, and a retry of a
// call of that era makes a record of this one.
func TestRestoredLocks(t *testing.T) {
	w := newWorld(t)
	dated := func(path string, notBefore time.Time) broker.Caller {
		return w.callerWith(id(path), spiffetest.SVIDOptions{NotBefore: notBefore, NotAfter: notBefore.Add(20 * time.Hour)})
	}
	old := w.issue(w.caller("payments"), "orders")
	w.revoke(broker.LockQuarantine, revocation.Identity(id("early")))
	rebuilt := w.revoke(broker.LockQuarantine, revocation.Identity(id("rebuilt")))
	backup := w.copied()

	again := broker.Revoke{
		Selectors: []revocation.Selector{revocation.Identity(id("retried"))}, Lock: broker.LockNone, Reason: "r", IdempotencyKey: "once",
	}
	operator := w.operator()
	first, err := w.b.Revoke(ctx, operator, again)
	if err != nil {
		t.Fatal(err)
	}
	w.revoke(broker.LockReissue, revocation.Identity(id("rotated")))
	stolen := w.caller("copied")
	w.admitted(stolen, true, "before it was stolen")
	w.revoke(broker.LockQuarantine, revocation.SVID(token.ThumbprintOf(stolen.Leaf)))
	w.revoke(broker.LockNone, revocation.Key(w.public.ID))
	revoked := w.public.ID
	if _, err := w.b.Lift(ctx, operator, rebuilt.Seq, "rebuilt", ""); err != nil {
		t.Fatal(err)
	}

	w.restored(backup)
	w.auditErr = errors.New("the audit's disk is full")
	if store, err := boltstore.Open(boltstore.Config{Path: w.path}); err != nil {
		t.Fatal(err)
	} else {
		w.store = &tap{Store: store}
		if err := w.newBroker().Load(ctx); !errors.Is(err, w.auditErr) {
			t.Errorf("a restore that can't be audited is served: %v", err)
		}
		if err := store.Close(); err != nil {
			t.Fatal(err)
		}
	}
	w.auditErr = nil
	w.start()
	if e := w.last(); e.Action != broker.ActionRestore || e.Actor != "root" || e.Why != "test" {
		t.Errorf("audited %+v", e)
	}
	w.newKey()
	check := func(when string) {
		t.Helper()
		w.admitted(w.caller("early"), false, "early, "+when)
		w.admitted(w.caller("rebuilt"), true, "rebuilt, "+when)
		w.admitted(dated("rotated", noon.Add(broker.ClockSkew)), false, "at the cut, "+when)
		w.admitted(dated("rotated", noon.Add(broker.ClockSkew+time.Second)), true, "after the cut, "+when)
		w.admitted(w.caller("payments"), true, "payments, "+when)
		if !w.b.KeyRevoked(revoked) {
			t.Errorf("a revoked key is back, %s", when)
		}
	}
	check("restored")
	w.admitted(stolen, false, "the stolen SVID")
	w.admitted(w.caller("copied"), true, "its sibling")
	_, err = w.b.Exchange(ctx, w.caller("orders"), broker.Request{Audience: "ledger", Subject: old.Token})
	refused(t, err, broker.ErrSubjectKeyUnknown)
	if rec, err := w.b.Revoke(ctx, operator, again); err != nil || rec.Seq <= 2_000_000 || rec.Seq == first.Seq {
		t.Errorf("a retry of a call of the era before: %d, %v", rec.Seq, err)
	}
	w.clock.elapse(broker.ForgetAfter + time.Second)
	w.newKey()
	w.clock.elapse(broker.ForgetAfter + time.Second)
	w.prune()
	check("pruned")
	w.restart()
	check("started again")
	for _, e := range w.entries() {
		if e.Action == broker.ActionRestore && e.Sequence != 2_000_000 {
			t.Errorf("audited %+v", e)
		}
	}
}

func FuzzKnownPosition(f *testing.F) {
	for _, s := range []string{"6a1b2c3d", "6a1b2c3d/1042", "6a1b2c3d/1042/0123abcd", "0/1", "6a1b2c3d/", "6a1b2c3d/01", "6a1b2c3d/1/x", "a/b/c/d", "6a1b2c3d/1/0123ABCD"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if p, err := broker.ParseKnownPosition(s); err == nil && p.String() != s {
			t.Errorf("%q reads as %q", s, p)
		}
	})
}

func keyIDOf(t *testing.T, s string) token.KeyID {
	t.Helper()
	k, err := token.ParseKeyID(s)
	if err != nil {
		t.Fatal(err)
	}
	return k
}
