package broker_test

import (
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// use is what a verifier saw of a credential, once, now.
func (w *world) use(cred *broker.Credential) broker.Use {
	now := w.clock.Now()
	return broker.Use{
		Grant: cred.Grant.ID().String(), Fingerprint: cred.Grant.Fingerprint[:], Key: w.public.ID.String(),
		Peer: cred.Grant.Presenter().String(), Address: "192.0.2.7", Accepted: true, Count: 1, First: now, Last: now,
		Head: w.b.Head().Seq, Era: w.b.Head().Era.String(),
	}
}

func refusedUse(u broker.Use) broker.Use {
	u.Accepted, u.Reason = false, "TOKEN_REVOKED"
	return u
}

// report sends a report without a number and has it looked at.
func (w *world) report(f *broker.Follower, uses ...broker.Use) {
	w.t.Helper()
	if err := f.Report(ctx, broker.UseReport{Uses: uses}); err != nil {
		w.t.Fatal(err)
	}
	w.check()
}

func (w *world) check() {
	w.t.Helper()
	if err := w.b.CheckUses(ctx); err != nil {
		w.t.Fatal(err)
	}
}

// observed counts what the store holds below a prefix, and its bytes.
func (w *world) observed(prefix string) (n, bytes int) {
	w.t.Helper()
	for o, err := range w.store.Observed(ctx, prefix) {
		if err != nil {
			w.t.Fatal(err)
		}
		n++
		bytes += len(o.Key) + len(o.Value)
	}
	return n, bytes
}

func (w *world) kept() int { n, _ := w.observed("uses/"); return n }

// Use reports are kept, within limits, as long as grants are.
func TestUseReports(t *testing.T) {
	w := newWorld(t)
	f := w.follow("orders", "instance-1", time.Second)
	use := w.use(w.issue(w.caller("payments"), "orders"))
	if err := f.Report(ctx, broker.UseReport{Number: 1, Uses: []broker.Use{use}, Dropped: 3}); err != nil {
		t.Fatal(err)
	}
	if err := f.Report(ctx, broker.UseReport{Number: 2}); err != nil { // says nothing
		t.Fatal(err)
	}
	if n := w.kept(); n != 1 {
		t.Errorf("%d reports are kept", n)
	}
	for name, uses := range map[string][]broker.Use{
		"too many":            make([]broker.Use, broker.MaxUses+1),
		"escapes that swell":  {{Reason: strings.Repeat("<", 30_000)}},
		"too large by itself": {{Reason: strings.Repeat("r", 65<<10)}},
	} {
		if err := f.Report(ctx, broker.UseReport{Uses: uses}); !errors.Is(err, broker.ErrFeedRejected) {
			t.Errorf("%s: %v", name, err)
		}
	}
	w.check()
	if n, _ := w.observed("unchecked/"); n != 0 {
		t.Errorf("%d reports were not looked at", n)
	}
	if c := w.b.UseCounts(); c != (broker.UseCounts{Uses: 1, Dropped: 3}) {
		t.Errorf("counts %+v", c)
	}
	w.clock.set(broker.GrantsKept) // still kept on that day
	w.prune()
	if w.kept() != 1 {
		t.Error("a report went too early")
	}
	w.clock.set(24 * time.Hour)
	w.prune()
	if w.kept() != 0 {
		t.Error("a report stays for ever")
	}
	if n, _ := w.observed("flows/"); n != 0 {
		t.Error("a flow stays for ever")
	}
}

// A report that comes again counts once: on another stream, the next day, after a
// restart. Another instance or identity has numbers of its own.
func TestUseReportsCountOnce(t *testing.T) {
	w := newWorld(t)
	cred := w.issue(w.caller("payments"), "orders")
	w.revoke(broker.LockNone, revocation.Grant(cred.Grant.ID()))
	r := broker.UseReport{Number: 7, Uses: []broker.Use{refusedUse(w.use(cred))}}
	send := func(path, instance string) {
		t.Helper()
		f := w.follow(path, instance, time.Second)
		defer f.Close()
		if err := f.Report(ctx, r); err != nil {
			t.Fatal(err)
		}
		w.check()
	}
	want := func(n uint64) {
		t.Helper()
		var got uint64
		for _, a := range w.b.UsesAfter(w.b.Head().Seq) {
			got += a.Refused
		}
		if got != n {
			t.Errorf("%d uses, want %d", got, n)
		}
	}
	send("orders", "instance-1")
	send("orders", "instance-1")
	want(1)
	w.restart()
	send("orders", "instance-1")
	want(1)
	w.clock.advance(12 * time.Hour) // another day, by the wall clock
	send("orders", "instance-1")
	want(1)
	send("orders", "instance-2")
	want(2)
	send("ledger", "instance-1")
	want(3)
	r.Number = 8
	send("orders", "instance-1")
	want(4)
	r.Number = 0 // from a verifier that counts none
	send("orders", "instance-1")
	send("orders", "instance-1")
	want(6)
}

// The same report on two streams at once, the first of which is broken and still being
// taken, counts once.
func TestUseReportsCountOnceAtOnce(t *testing.T) {
	w := newWorld(t)
	cred := w.issue(w.caller("payments"), "orders")
	rec := w.revoke(broker.LockNone, revocation.Grant(cred.Grant.ID()))
	f, again := w.follow("orders", "instance-1", time.Second), w.follow("orders", "instance-1", time.Second)
	held, release := make(chan struct{}), make(chan struct{})
	var first atomic.Bool
	w.store.set(func(s *tap) {
		s.observe = func(o []broker.Observation) error {
			if len(o) > 0 && strings.HasPrefix(o[0].Key, "uses/") && !first.Swap(true) {
				close(held)
				<-release
			}
			return nil
		}
	})
	r := broker.UseReport{Number: 1, Uses: []broker.Use{refusedUse(w.use(cred))}}
	done := make(chan error, 2)
	go func() { done <- f.Report(ctx, r) }()
	<-held
	go func() { done <- again.Report(ctx, r) }()
	left := 2
	select {
	case err := <-done: // it must not: the first isn't through
		left--
		t.Errorf("the second report came through: %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	close(release)
	for range left {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	w.check()
	if a := w.b.UsesAfter(rec.Seq); len(a) != 1 || a[0].Refused != 1 {
		t.Errorf("got %+v", a)
	}
}

// What is used after its revocation is part of the revocation's status: by the head
// where the verifier knew it, by clocks where it didn't.
func TestUsesAfterRevocation(t *testing.T) {
	w := newWorld(t)
	older := w.revoke(broker.LockNone, revocation.Identity(id("payments"))) // what comes after it lives
	cred := w.issue(w.caller("payments"), "orders")
	bystander := w.issue(w.caller("other"), "orders")
	f := w.follow("orders", "instance-1", time.Second)
	before := w.use(cred)
	w.clock.advance(time.Minute)
	first := w.revoke(broker.LockNone, revocation.Identity(id("payments")))
	at := w.clock.Now()
	w.revoke(broker.LockNone, revocation.Identity(id("nobody")))
	second := w.revoke(broker.LockNone, revocation.Grant(cred.Grant.ID()))

	late := before // head below the revocation, clock past it
	late.First, late.Last, late.Count, late.Address = at.Add(time.Second), at.Add(2*time.Second), 5, "192.0.2.8"
	across := before
	across.Last, across.Count = at.Add(time.Second), 100
	other := before // refused for something else, by one that didn't know
	other.Accepted, other.Reason, other.Last = false, "PRESENTER_MISMATCH", at.Add(time.Hour)
	foreign := late // of another era: its head says nothing
	foreign.Era, foreign.Head, foreign.First, foreign.Last = "00000001", 1<<40, before.First, before.Last
	between := refusedUse(before)
	between.Head, between.Count, between.Last = first.Seq, 3, at.Add(time.Second)

	w.report(f, before, w.use(bystander), other, foreign)
	if a := w.b.UsesAfter(first.Seq); len(a) != 0 {
		t.Errorf("uses from before: %+v", a)
	}
	w.report(f, late, across, between)
	broken := w.use(cred)
	broken.Count, broken.Peer = 2, id("thief").String()
	w.report(w.follow("ledger", "instance-2", time.Second), broken, w.use(bystander))

	check := func(when string) {
		t.Helper()
		want := []broker.UsesAfter{
			{Verifier: id("ledger").String(), AcceptedKnowing: 2, LastSeen: broken.Last, Peers: []string{id("thief").String()}, Addresses: []string{"192.0.2.7"}},
			{Verifier: id("orders").String(), Refused: 3, AcceptedUnaware: 6, LastSeen: late.Last, Peers: []string{id("payments").String()}, Addresses: []string{"192.0.2.8", "192.0.2.7"}},
		}
		if got := w.containment(first).UsesAfter; fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("%s: uses after the first\n got %+v\nwant %+v", when, got, want)
		}
		want[1].Refused = 0 // the head was below the second
		if got := w.containment(second).UsesAfter; fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("%s: uses after the second\n got %+v\nwant %+v", when, got, want)
		}
	}
	check("at once")
	if a := w.b.UsesAfter(older.Seq); len(a) != 0 {
		t.Errorf("uses of what was issued after a revocation: %+v", a)
	}
	if c := w.b.UseCounts(); c.Refused != 3 || c.AcceptedKnowing != 4 || c.AcceptedUnaware != 12 || c.Unrecorded != 0 {
		t.Errorf("counts %+v", c)
	}
	w.report(f, late) // again: counted, and not logged
	for text, want := range map[string]int{"doesn't do its job": 2, "still presented": 1, "hadn't heard": 2} {
		if got := w.logged(text); len(got) != want {
			t.Errorf("%q is logged %d times, want %d", text, len(got), want)
		}
	}
	w.restart()
	if got := w.b.UsesAfter(first.Seq)[1].AcceptedUnaware; got != 11 {
		t.Errorf("%d after a restart", got)
	}

	// With the revocation goes what belongs to it.
	w.revoke(broker.LockNone, revocation.Identity(id("last")))
	w.clock.elapse(broker.ForgetAfter + 1)
	w.prune()
	if n, _ := w.observed("after/"); n != 0 || len(w.b.UsesAfter(first.Seq)) != 0 {
		t.Errorf("%d observations are left of forgotten revocations", n)
	}
}

// Those behind a relay are told by the names that it gives them, as its word, and only
// a relay can give any: in receipts, in plans, in what was used after a revocation, and
// after a restart. A relay that invents names gets so many.
func TestRelaysNameVerifiers(t *testing.T) {
	w := newWorld(t)
	ledger, reports := id("ledger").String(), id("reports").String()
	cred := w.issue(w.caller("payments"), "orders")
	relay := w.relay("relay-0001")
	behind := below("verifier-1")
	behind.Identity = ledger
	w.relays(relay, behind, below("verifier-2"))
	as := func(u broker.Use, claimed string) broker.Use {
		u.Claimed, u.ClaimedInstance = claimed, "verifier-1"
		return u
	}
	w.report(relay, as(w.use(cred), ledger), w.use(cred))
	w.report(w.follow("orders", "instance-1", time.Second), as(w.use(cred), ledger))
	rec := w.revoke(broker.LockNone, revocation.Identity(id("payments")))
	relay2 := w.relay("relay-0001") // with a new SVID, if need be
	w.report(relay2, as(refusedUse(w.use(cred)), ledger), as(w.use(cred), reports), refusedUse(w.use(cred)))
	w.report(w.follow("orders", "instance-2", time.Second), as(refusedUse(w.use(cred)), reports))

	for _, when := range []string{"at once", "after a restart"} {
		var names []string
		for _, r := range w.containment(rec).Receipts {
			if r.Verifier.ID.Via != "" {
				names = append(names, r.Verifier.ID.Instance+"="+r.Verifier.Claimed)
			} else if r.Verifier.Claimed != "" {
				t.Errorf("%s: %+v has a claimed name", when, r.Verifier)
			}
		}
		if want := []string{"verifier-1=" + ledger, "verifier-2="}; !slices.Equal(names, want) {
			t.Errorf("%s: receipts of %v, want %v", when, names, want)
		}
		p, err := w.b.Plan(ctx, []revocation.Selector{revocation.Identity(id("payments"))}, netip.Addr{})
		if err != nil {
			t.Fatal(err)
		}
		flows := map[string]uint64{}
		for _, f := range p.Workflows {
			flows[f.Verifier+"|"+f.Claimed] = f.Count
		}
		agent, orders := id("agent").String(), id("orders").String()
		if want := map[string]uint64{agent + "|": 1, agent + "|" + ledger: 1, agent + "|" + reports: 1, orders + "|": 1}; !maps.Equal(flows, want) {
			t.Errorf("%s: workflows %v, want %v", when, flows, want)
		}
		after := map[string]uint64{}
		for _, a := range w.b.UsesAfter(rec.Seq) {
			after[a.Verifier+"|"+a.Claimed] = a.Refused + 10*a.AcceptedKnowing
		}
		if want := map[string]uint64{agent + "|": 1, agent + "|" + ledger: 1, agent + "|" + reports: 10, orders + "|": 1}; !maps.Equal(after, want) {
			t.Errorf("%s: used after %v, want %v", when, after, want)
		}
		w.restart()
	}
	if n := len(w.logged(`"claimed_verifier":"` + reports)); n != 1 {
		t.Errorf("the one that accepts knowingly is named in %d lines", n)
	}

	relay = w.relay("relay-0002")
	for i := range 3 * broker.MaxNamed {
		w.report(relay, as(refusedUse(w.use(cred)), id(fmt.Sprintf("invented-%d", i)).String()))
	}
	if n := len(w.b.UsesAfter(rec.Seq)); n > broker.MaxNamed+4 {
		t.Errorf("%d verifiers are listed", n)
	}
}

// A watcher of the containment is woken by a use after the revocation.
func TestUseAfterWakes(t *testing.T) {
	w := newWorld(t)
	cred := w.issue(w.caller("payments"), "orders")
	f := w.follow("orders", "instance-1", time.Second)
	rec := w.revoke(broker.LockNone, revocation.Grant(cred.Grant.ID()))
	r, err := w.b.Revocation(rec.Seq)
	if err != nil {
		t.Fatal(err)
	}
	_, changed := w.b.Containment(r)
	w.report(f, refusedUse(w.use(cred)))
	select {
	case <-changed:
	case <-time.After(time.Minute):
		t.Error("nobody was told")
	}
}

// Of one verifier a bounded list of peers and addresses is kept, of one revocation a
// bounded list of verifiers.
func TestUsesAfterAreBounded(t *testing.T) {
	w := newWorld(t)
	cred := w.issue(w.caller("payments"), "orders")
	rec := w.revoke(broker.LockNone, revocation.Grant(cred.Grant.ID()))
	var uses []broker.Use
	for i := range 100 {
		u := refusedUse(w.use(cred))
		u.Address, u.Peer = fmt.Sprintf("192.0.2.%d", i), id(fmt.Sprint("peer/", i)).String()
		uses = append(uses, u)
	}
	w.report(w.follow("orders", "instance-1", time.Second), uses...)
	a := w.b.UsesAfter(rec.Seq)
	if len(a) != 1 || a[0].Refused != 100 || len(a[0].Peers) != 8 || len(a[0].Addresses) != 16 || !a[0].More {
		t.Errorf("got %+v", a)
	}
	for i := range broker.MaxAfter + 10 {
		f := w.follow(fmt.Sprint("verifier/", i), "instance-1", time.Second)
		w.report(f, uses[0])
		f.Close()
	}
	if n := len(w.b.UsesAfter(rec.Seq)); n != broker.MaxAfter {
		t.Errorf("%d verifiers are listed", n)
	}
	if c := w.b.UseCounts(); c.Refused != 100+broker.MaxAfter+10 {
		t.Errorf("counts %+v", c)
	}
}

func (w *world) alarms() (alarms []broker.AuditEntry) {
	for _, e := range w.entries() {
		if e.Outcome == "alarm" {
			alarms = append(alarms, e)
		}
	}
	return alarms
}

// A use of what was never recorded is an alarm that names who reported it.
func TestUnrecordedUse(t *testing.T) {
	w := newWorld(t)
	f := w.follow("orders", "instance-1", time.Second)
	cred := w.issue(w.caller("payments"), "orders")
	invented, err := token.NewGrantID(id("payments"), noon, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}

	honest := w.use(cred)
	old := honest // says no fingerprint
	old.Fingerprint = nil
	before := honest // of an earlier era: the backup lacks it
	before.Grant, before.Era = invented.String(), "00000001"
	w.report(f, honest, old, before)
	if got := w.alarms(); len(got) != 0 {
		t.Fatalf("a false alarm: %+v", got)
	}

	unknown := honest
	unknown.Grant, unknown.Count, unknown.Peer, unknown.Address = invented.String(), 4, id("thief").String(), "203.0.113.9"
	w.report(f, unknown)
	copied := refusedUse(honest) // another token that bears an innocent grant's ID
	copied.Fingerprint, copied.Reason = slices.Repeat([]byte{1}, 32), "PRESENTER_MISMATCH"
	w.report(f, copied)
	got := w.alarms()
	if len(got) != 2 {
		t.Fatalf("%d alarms", len(got))
	}
	for i, want := range []string{"no record holds this grant", "of another token"} {
		e := got[i]
		if e.Action != broker.ActionReport || e.Actor != id("orders").String() || !e.Alert || e.Reason != "GRANT_UNRECORDED" || !strings.Contains(e.Message, want) || !strings.Contains(e.Message, w.public.ID.String()) {
			t.Errorf("alarm %d: %+v", i, e)
		}
	}
	if got[0].Grant != invented.String() || !strings.Contains(got[0].Message, "spiffe://example.org/thief from 203.0.113.9") {
		t.Errorf("alarm %+v", got[0])
	}
	if lines := w.logged("somebody holds a signing key"); len(lines) != 2 || !strings.Contains(lines[0], `"level":"ERROR"`) || !strings.Contains(lines[0], `"reported_by":"spiffe://example.org/orders"`) {
		t.Errorf("logged %q", lines)
	}
	if c := w.b.UseCounts(); c.Unrecorded != 5 {
		t.Errorf("counts %+v", c)
	}
	if p, err := w.b.Plan(ctx, []revocation.Selector{revocation.Everything()}, netip.Addr{}); err != nil || len(p.Workflows) != 1 || p.Workflows[0].Count != 2 {
		t.Errorf("what was never recorded is a workflow: %+v, %v", p.Workflows, err)
	}
	w.restart() // and it isn't raised again and again
	w.check()
	if got := w.alarms(); len(got) != 2 {
		t.Errorf("%d alarms after a restart", len(got))
	}
}

// A verifier that invents grants is counted, told a few times, and hides nobody else's
// alarm.
func TestInventedGrants(t *testing.T) {
	w := newWorld(t)
	liar, honest := w.follow("liar", "instance-1", time.Second), w.follow("orders", "instance-1", time.Second)
	use := w.use(w.issue(w.caller("payments"), "orders"))
	invent := func(n int) (uses []broker.Use) {
		for range n {
			g, err := token.NewGrantID(id("payments"), noon, rand.Reader)
			if err != nil {
				t.Fatal(err)
			}
			use.Grant = g.String()
			uses = append(uses, use)
		}
		return uses
	}
	for range 8 {
		w.report(liar, invent(200)...)
	}
	if n := len(w.alarms()); n != 8 {
		t.Errorf("%d alarms of a liar", n)
	}
	w.report(honest, invent(1)...)
	if a := w.alarms(); len(a) != 9 || a[8].Actor != id("orders").String() {
		t.Errorf("the honest verifier's alarm is missing: %+v", a)
	}
	w.clock.advance(time.Minute)
	w.report(liar, invent(2)...)
	if n := len(w.alarms()); n != 10 {
		t.Errorf("%d alarms a minute later", n)
	}
	if lines := w.logged(`"others_not_told":1592`); len(lines) != 1 {
		t.Errorf("what was not told is not told: %q", w.logged("others_not_told"))
	}
	if c := w.b.UseCounts(); c.Unrecorded != 1603 {
		t.Errorf("counts %+v", c)
	}
}

// A verifier that reports without end costs a bounded amount of disk and of work, which
// is counted and said once; others are not hurt.
func TestReporterIsBounded(t *testing.T) {
	w := newWorld(t)
	cred := w.issue(w.caller("payments"), "orders")
	hostile := w.follow("hostile", "instance-1", time.Second)
	var uses []broker.Use
	for i := range broker.MaxUses {
		u := w.use(cred)
		u.Address = fmt.Sprintf("%064d", i)
		u.Peer = ""
		u.Fingerprint = nil
		uses = append(uses, u)
	}
	const reports = 400
	for range reports {
		if err := hostile.Report(ctx, broker.UseReport{Uses: uses}); err != nil {
			t.Fatal(err)
		}
	}
	w.check()
	n, bytes := w.observed("uses/")
	c := w.b.UseCounts()
	if bytes > 5<<20 || n == 0 || c.Limited == 0 || c.Uses+c.Limited != reports*broker.MaxUses {
		t.Errorf("%d reports of %d bytes are kept; counts %+v", n, bytes, c)
	}
	if lines := w.logged("more uses than it may"); len(lines) != 1 || !strings.Contains(lines[0], "hostile") {
		t.Errorf("logged %q", lines)
	}
	w.report(w.follow("orders", "instance-1", time.Second), w.use(cred))
	if after, _ := w.observed("uses/"); after != n+1 {
		t.Error("an honest verifier's report was dropped")
	}
	// The allowance comes back; what is kept of a day has a limit of its own, beyond
	// which reports are looked at all the same.
	limited := c.Limited
	for range 6 {
		w.clock.advance(5 * time.Minute)
		for range 100 {
			if err := hostile.Report(ctx, broker.UseReport{Uses: uses}); err != nil {
				t.Fatal(err)
			}
		}
		w.check()
	}
	_, bytes = w.observed("uses/")
	c = w.b.UseCounts()
	if bytes > 16<<20+2<<20+1<<20 || c.Unkept == 0 || c.Limited == limited {
		t.Errorf("%d bytes are kept; counts %+v", bytes, c)
	}
	if lines := w.logged("looked at and not kept"); len(lines) == 0 {
		t.Error("that reports aren't kept is not said")
	}
	p, err := w.b.Plan(ctx, []revocation.Selector{revocation.Everything()}, netip.Addr{})
	if err != nil || len(p.Workflows) != 2 || p.Workflows[0].Count != c.Uses-1 {
		t.Errorf("workflows %+v, %v, of %d uses", p.Workflows, err, c.Uses)
	}
}

// What was found is written in one step with the mark that it was looked at: whatever
// fails, nothing is lost, nothing counts twice, and no alarm is repeated.
func TestChecksAreExact(t *testing.T) {
	for _, crash := range []bool{false, true} {
		t.Run(fmt.Sprintf("crash=%t", crash), func(t *testing.T) {
			w := newWorld(t)
			cred := w.issue(w.caller("payments"), "orders")
			rec := w.revoke(broker.LockNone, revocation.Grant(cred.Grant.ID()))
			f := w.follow("orders", "instance-1", time.Second)
			w.store.set(func(s *tap) {
				s.observe = func(o []broker.Observation) error {
					if slices.ContainsFunc(o, func(o broker.Observation) bool { return strings.HasPrefix(o.Key, "after/") }) {
						return broker.ErrStoreFull
					}
					return nil
				}
			})
			forged := refusedUse(w.use(cred))
			forged.Fingerprint = slices.Repeat([]byte{1}, 32)
			if err := f.Report(ctx, broker.UseReport{Number: 1, Uses: []broker.Use{refusedUse(w.use(cred)), forged, w.use(cred)}}); err != nil {
				t.Fatal(err)
			}
			for range 3 {
				if err := w.b.CheckUses(ctx); !errors.Is(err, broker.ErrStoreFull) {
					t.Fatalf("got %v", err)
				}
			}
			if a := w.b.UsesAfter(rec.Seq); len(a) != 0 {
				t.Errorf("visible before it is durable: %+v", a)
			}
			if n := len(w.alarms()); n != 1 {
				t.Errorf("%d alarms", n)
			}
			if crash {
				w.restart()
			} else {
				w.store.set(func(s *tap) { s.observe = nil })
			}
			w.check()
			w.check()
			a := w.b.UsesAfter(rec.Seq)
			if len(a) != 1 || a[0].Refused != 1 || a[0].AcceptedKnowing != 1 {
				t.Errorf("after the writes go through: %+v", a)
			}
			if n := len(w.alarms()); crash && n < 1 || !crash && n != 1 {
				t.Errorf("%d alarms", n)
			}
			p, err := w.b.Plan(ctx, []revocation.Selector{revocation.Everything()}, netip.Addr{})
			if err != nil || len(p.Workflows) != 1 || p.Workflows[0].Count != 1 {
				t.Errorf("workflows %+v, %v", p.Workflows, err)
			}
		})
	}
}

// A full disk drops reports, says so once, and ends no stream.
func TestReportOnFullDisk(t *testing.T) {
	w := newWorld(t)
	f := w.follow("orders", "instance-1", time.Second)
	use := w.use(w.issue(w.caller("payments"), "orders"))
	full := func(o []broker.Observation) error {
		if len(o) > 0 {
			return broker.ErrStoreFull
		}
		return nil
	}
	for range 2 {
		w.store.set(func(s *tap) { s.observe = full })
		for range 3 {
			if err := f.Report(ctx, broker.UseReport{Uses: []broker.Use{use}}); err != nil {
				t.Fatal(err)
			}
		}
		w.store.set(func(s *tap) { s.observe = nil })
		w.report(f, use)
	}
	if c := w.b.UseCounts(); c.Limited != 6 || c.Uses != 2 {
		t.Errorf("counts %+v", c)
	}
	if lines := w.logged("use reports are dropped"); len(lines) != 2 {
		t.Errorf("said %d times", len(lines))
	}
}

// The plan shows what was in use within the last day: who calls whom, how often, when,
// and what the owners documented for the time without; also after a restart.
func TestPlanWorkflows(t *testing.T) {
	w := newWorld(t)
	w.policy.names[id("orders")] = "orders"
	w.policy.audiences["ledger"] = broker.Audience{Name: "ledger", VerifiedBy: "feed", Fallback: broker.Fallback{Text: "they queue"}}
	w.policy.fallbacks = map[spiffeid.ID]broker.Fallback{id("payments"): {Text: "cash only"}}
	root := w.issue(w.caller("payments"), "orders")
	derived := w.exchange(w.caller("orders"), root.Token, "ledger")
	other := w.issue(w.caller("other"), "orders")
	orders := w.follow("orders", "instance-1", time.Second)
	w.report(orders, w.use(root), w.use(root), w.use(other))
	w.clock.advance(2 * time.Hour)
	orders = w.follow("orders", "instance-1", time.Second) // with a new SVID
	ledger := w.follow("ledger", "instance-1", time.Second)
	last := w.clock.Now()
	ahead := w.use(derived)
	ahead.Last = last.Add(time.Hour) // a clock that is off
	w.report(ledger, ahead, refusedUse(w.use(derived)))
	again := w.use(root)
	again.Count = 5
	w.report(orders, again)

	wfs := func(seq ...revocation.Selector) string {
		t.Helper()
		p, err := w.b.Plan(ctx, seq, netip.Addr{})
		if err != nil {
			t.Fatal(err)
		}
		var out []string
		for _, f := range p.Workflows {
			if !f.Last.Equal(last) && f.Caller != id("other") || f.Last.After(last) {
				t.Errorf("last seen %s", f.Last)
			}
			out = append(out, fmt.Sprintf("%s>%s@%s:%d(%s)", f.Caller.Path(), f.Audience, f.Verifier, f.Count, f.Fallback.Text))
		}
		return strings.Join(out, " ")
	}
	const (
		paid = "/payments>orders@spiffe://example.org/orders:7(cash only)"
		led  = "/orders>ledger@spiffe://example.org/ledger:1(they queue)"
		oth  = "/other>orders@spiffe://example.org/orders:1()"
	)
	for range 2 {
		for sel, want := range map[string]string{
			"identity:spiffe://example.org/payments": paid + " " + led,
			"identity:spiffe://example.org/orders":   led,
			"identity:spiffe://example.org/order":    "",
			"audience:ledger":                        led,
			"audience:orders":                        paid + " " + oth,
			"trust_domain:example.org":               paid + " " + led + " " + oth,
			"everything":                             paid + " " + led + " " + oth,
		} {
			if got := wfs(selector(t, sel)); got != want {
				t.Errorf("%s:\n got %s\nwant %s", sel, got, want)
			}
		}
		w.restart()
	}
	// A grant, an SVID and a key are known by the live grants that they match: by now
	// the first have expired.
	if got := wfs(revocation.Grant(root.Grant.ID())); got != "" {
		t.Errorf("an expired grant breaks %s", got)
	}
	live := w.issue(w.caller("payments"), "orders")
	for _, sel := range []revocation.Selector{revocation.Grant(live.Grant.ID()), revocation.SVID(live.Grant.Lineage[0].SVID), revocation.Key(w.public.ID)} {
		if got := wfs(sel); got != paid {
			t.Errorf("%s: %s", sel, got)
		}
	}
	w.clock.advance(23 * time.Hour) // the first hour is out
	if got := wfs(revocation.Everything()); strings.Contains(got, "/other") || !strings.Contains(got, "/payments>orders@spiffe://example.org/orders:5") {
		t.Errorf("a day later: %s", got)
	}
	w.prune()
	w.clock.advance(2 * time.Hour)
	w.prune()
	if n, _ := w.observed("flows/"); n != 0 || wfs(revocation.Everything()) != "" {
		t.Errorf("%d flows are kept", n)
	}
}

// A plan proposes what would do instead.
func TestPlanNarrower(t *testing.T) {
	w := newWorld(t)
	from := func(c broker.Caller, addr string) broker.Caller {
		c.Peer = netip.AddrPortFrom(netip.MustParseAddr(addr), 4711)
		return c
	}
	plan := func(addr string, selectors ...revocation.Selector) (out []string) {
		t.Helper()
		seen := netip.Addr{}
		if addr != "" {
			seen = netip.MustParseAddr(addr)
		}
		p, err := w.b.Plan(ctx, selectors, seen)
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range p.Narrower {
			if len(n.Why) < 20 {
				t.Errorf("why: %q", n.Why)
			}
			var texts []string
			for _, s := range n.Selectors {
				texts = append(texts, s.String())
			}
			out = append(out, strings.Join(texts, "+"))
		}
		return out
	}
	want := func(got []string, want ...string) {
		t.Helper()
		if !slices.Equal(got, want) {
			t.Errorf("got %v, want %v", got, want)
		}
	}
	subtree := selector(t, "subtree:spiffe://example.org/ns/*")
	td := revocation.TrustDomain(domain)
	want(plan("", subtree)) // nothing alive
	stolen := w.caller("ns/payments")
	good := w.caller("ns/payments")
	one := w.issue(from(good, "192.0.2.7"), "orders")
	want(plan("", subtree), "grant:"+one.Grant.ID().String(), "identity:spiffe://example.org/ns/payments")
	want(plan("", revocation.Grant(one.Grant.ID())))
	thief := w.issue(from(stolen, "::ffff:203.0.113.9"), "orders")
	svid := "svid:" + thief.Grant.Lineage[0].SVID.String()
	payments := revocation.Identity(id("ns/payments"))
	want(plan("", payments))
	want(plan("203.0.113.9", payments), svid)
	want(plan("203.0.113.10", payments))
	want(plan("203.0.113.9", subtree), svid, "identity:spiffe://example.org/ns/payments")
	want(plan("203.0.113.9", selector(t, "audience:orders")))                        // names nobody
	want(plan("203.0.113.9", selector(t, svid)), "grant:"+thief.Grant.ID().String()) // the SVID is what was asked for

	// The credentials of the thief have expired: the records of a day tell.
	w.clock.advance(2 * time.Hour)
	good2 := w.issue(from(w.caller("ns/payments"), "192.0.2.7"), "orders")
	want(plan("203.0.113.9", payments), svid, "grant:"+good2.Grant.ID().String())
	w.issue(from(w.caller("ns/payments"), "203.0.113.9"), "orders") // a second SVID from there
	want(plan("203.0.113.9", payments))
	w.clock.advance(25 * time.Hour)
	want(plan("203.0.113.9", payments))

	// Of many selectors, each that reaches one alone is replaced; two identities are no one.
	w.issue(w.caller("ns/a"), "orders")
	w.issue(w.caller("ns/a"), "orders")
	key := revocation.Key(w.public.ID)
	want(plan("", subtree, key), "identity:spiffe://example.org/ns/a+"+key.String())
	w.issue(w.caller("b"), "orders")
	want(plan("", subtree, td), "identity:spiffe://example.org/ns/a+"+td.String())
	want(plan("", td))
}
