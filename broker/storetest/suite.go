package storetest

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
)

// An Opener opens one store, and opens it again after it was closed.
type Opener func() (broker.Store, error)

// era is that of the suite's stores.
const era token.Era = 0x66000000

// Run tests a kind of store: make makes an empty one whose log begins with a record.
func Run(t *testing.T, make func(t *testing.T, first broker.Record) Opener) {
	for _, c := range []struct {
		name string
		test func(*testing.T, *subject)
	}{
		{"Begin", testBegin},
		{"Append", testAppend},
		{"AppendRefuses", testAppendRefuses},
		{"Issue", testIssue},
		{"IssueAdmits", testIssueAdmits},
		{"IssueOffLog", testIssueOffLog},
		{"IssueTwice", testIssueTwice},
		{"Grants", testGrants},
		{"GrantsPresenter", testGrantsPresenter},
		{"GrantsBadPage", testGrantsBadPage},
		{"Events", testEvents},
		{"EventsWait", testEventsWait},
		{"EventsClose", testEventsClose},
		{"Observe", testObserve},
		{"ObservePrefix", testObservePrefix},
		{"ObserveRefuses", testObserveRefuses},
		{"PruneLog", testPruneLog},
		{"PruneGrants", testPruneGrants},
		{"PruneObserved", testPruneObserved},
		{"Cancelled", testCancelled},
		{"Closed", testClosed},
		{"AtOnce", testAtOnce},
		{"Model", testModel},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := &subject{t: t, open: make(t, Era(era)), make: func() Opener { return make(t, Era(era)) }}
			s.reopen()
			c.test(t, s)
			if err := s.Close(); err != nil {
				t.Errorf("Close: %v", err)
			}
		})
	}
	for name, test := range map[string]func(*testing.T, *subject){"Overtaking": testOvertaking, "OvertakingAll": testOvertakingAll} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := &subject{t: t, open: make(t, Era(era))}
				s.reopen()
				test(t, s)
				if err := s.Close(); err != nil {
					t.Errorf("Close: %v", err)
				}
			})
		})
	}
}

// A subject is the store under test.
type subject struct {
	broker.Store
	t    *testing.T
	open Opener
	make func() Opener
}

// reopen closes the store, if it is open, and opens it again.
func (s *subject) reopen() {
	s.t.Helper()
	if s.Store != nil {
		if err := s.Close(); err != nil {
			s.t.Fatalf("Close: %v", err)
		}
	}
	store, err := s.open()
	if err != nil {
		s.t.Fatalf("opening: %v", err)
	}
	s.Store = store
}

func (s *subject) head() feed.Position {
	s.t.Helper()
	st, err := s.State(s.t.Context())
	if err != nil {
		s.t.Fatalf("State: %v", err)
	}
	return st.Head
}

func (s *subject) append(r broker.Record) broker.Record {
	s.t.Helper()
	sealed, err := s.Append(s.t.Context(), Next(r))
	if err != nil {
		s.t.Fatalf("Append: %v", err)
	}
	return sealed
}

func (s *subject) issue(g *broker.Grant) *broker.Grant {
	s.t.Helper()
	if err := s.Issue(s.t.Context(), g, Admit); err != nil {
		s.t.Fatalf("Issue: %v", err)
	}
	return g
}

// records reads the log up to its head.
func (s *subject) records(after uint64) []broker.Record {
	s.t.Helper()
	ctx, cancel := context.WithCancel(s.t.Context())
	defer cancel()
	head := s.head().Seq
	var all []broker.Record
	if after >= head {
		return nil
	}
	// What was dropped at the end is skipped: wait for a mark that is not.
	mark := s.append(Revocation("mark", revocation.Identity(Identity(999)))).Seq
	for r, err := range s.Events(ctx, after) {
		if err != nil {
			s.t.Fatalf("Events: %v", err)
		}
		if r.Seq == mark {
			return all
		}
		all = append(all, r)
	}
	s.t.Fatal("Events ended without an error")
	return nil
}

func (s *subject) list(q broker.GrantQuery) []*broker.Grant {
	s.t.Helper()
	var all []*broker.Grant
	for {
		page, after, err := s.Grants(s.t.Context(), q)
		if err != nil {
			s.t.Fatalf("Grants: %v", err)
		}
		if len(page) > q.Limit {
			s.t.Fatalf("a page of %d grants, more than %d", len(page), q.Limit)
		}
		all = append(all, page...)
		if after == "" {
			return all
		}
		if len(page) < q.Limit {
			s.t.Fatalf("a page of %d grants, fewer than %d, with another behind it", len(page), q.Limit)
		}
		q.After = after
	}
}

func revoke(i int) broker.Record {
	return Revocation(fmt.Sprintf("reason %d", i), revocation.Identity(Identity(i)))
}

func equal(t *testing.T, what string, got, want any) {
	t.Helper()
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%s:\n got %+v\nwant %+v", what, got, want)
	}
}

func testBegin(t *testing.T, s *subject) {
	first, at := Era(era).Seal(feed.Position{})
	st, err := s.State(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	equal(t, "state of a new store", st, broker.StoreState{Head: at})
	equal(t, "records of a new store", s.records(0), []broker.Record{first})
	equal(t, "grants of a new store", len(s.list(broker.GrantQuery{Limit: 1})), 0)
}

func testAppend(t *testing.T, s *subject) {
	at := s.head()
	var want []broker.Record
	for i := range 5 {
		r := revoke(i)
		r.Details.SVIDExpires = map[string]time.Time{"00": noon, "01": noon.Add(time.Nanosecond)}
		r.Details.Proposed = &broker.Proposal{Subject: "lift 1", Actor: "a", Reason: "<é>", Time: noon.Add(time.Nanosecond), Ends: noon.Add(time.Hour), IdempotencyKey: "k"}
		var sealed broker.Record
		sealed, at = r.Seal(at)
		equal(t, "what Append returns", s.append(r), sealed)
		equal(t, "head", s.head(), at)
		want = append(want, sealed)
	}
	lift, at := broker.Record{Event: feed.Event{Lift: &feed.Lift{Lock: 2}}, Details: broker.Details{Time: noon, Actor: "a", Reason: "<&>\u2028é\xff"}}.Seal(at)
	if _, err := s.Append(t.Context(), Next(lift)); err == nil {
		want = append(want, lift) // a store may refuse text that is not UTF-8
	} else {
		at = s.head()
	}
	var sealed broker.Record
	sealed, at = Era(era + 1).Seal(at)
	s.append(Era(era + 1))
	want = append(want, sealed)
	s.reopen()
	equal(t, "head after reopening", s.head(), at)
	got := s.records(1)
	for i := range got {
		if got[i].Private != got[i].Details.Digest() {
			t.Errorf("record %d no longer matches its private digest", got[i].Seq)
		}
		got[i].Details.Reason, want[i].Details.Reason = "", ""
	}
	equal(t, "records after reopening", got, want)
}

func testAppendRefuses(t *testing.T, s *subject) {
	before := s.head()
	own := errors.New("own error")
	_, err := s.Append(t.Context(), func(head feed.Position) (broker.Record, error) {
		equal(t, "head given to next", head, before)
		return broker.Record{}, own
	})
	if err != own {
		t.Errorf("Append returned %v, not the error of next as it is", err)
	}
	for name, r := range map[string]broker.Record{
		"nothing":      {},
		"no selector":  Revocation("r"),
		"a later lock": {Event: feed.Event{Lift: &feed.Lift{Lock: 2}}},
		"the same era": Era(era),
	} {
		if _, err := s.Append(t.Context(), Next(r)); err == nil {
			t.Errorf("a record with %s was appended", name)
		}
	}
	equal(t, "head", s.head(), before)
}

func testIssue(t *testing.T, s *subject) {
	root := s.issue(Grant(1, Identity(1), noon, s.head()))
	s.append(revoke(7))
	child := s.issue(Derive(2, root, Identity(2), s.head()))
	for range 2 {
		for _, want := range []*broker.Grant{root, child} {
			got, err := s.Grant(t.Context(), want.ID())
			if err != nil {
				t.Fatal(err)
			}
			equal(t, "grant", got, want)
		}
		if _, err := s.Grant(t.Context(), Grant(3, Identity(1), noon, feed.Position{}).ID()); !errors.Is(err, broker.ErrNotFound) {
			t.Errorf("a grant that was never issued: %v", err)
		}
		s.reopen()
	}
}

func testIssueAdmits(t *testing.T, s *subject) {
	at := s.head()
	first, second := s.append(revoke(1)), s.append(revoke(2))
	own := errors.New("own error")
	g := Grant(1, Identity(1), noon, at)
	err := s.Issue(t.Context(), g, func(newer []broker.Record) error {
		equal(t, "newer records", newer, []broker.Record{first, second})
		return own
	})
	if err != own {
		t.Errorf("Issue returned %v, not the error of admit as it is", err)
	}
	if _, err := s.Grant(t.Context(), g.ID()); !errors.Is(err, broker.ErrNotFound) {
		t.Errorf("a grant that was refused: %v", err)
	}
	err = s.Issue(t.Context(), Grant(2, Identity(1), noon, s.head()), func(newer []broker.Record) error {
		equal(t, "newer records at the head", len(newer), 0)
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

func testIssueOffLog(t *testing.T, s *subject) {
	s.append(revoke(1))
	head := s.head()
	forked, ahead, older := head, head, head
	forked.Sum[9]++
	ahead.Seq++
	older.Era--
	past := head
	past.Seq--
	for name, at := range map[string]feed.Position{"zero": {}, "forked": forked, "ahead": ahead, "of another era": older, "forked in the past": past} {
		err := s.Issue(t.Context(), Grant(1, Identity(1), noon, at), func([]broker.Record) error {
			t.Errorf("%s: admit was asked", name)
			return nil
		})
		if !errors.Is(err, broker.ErrOffLog) {
			t.Errorf("position %s: %v", name, err)
		}
	}
}

func testIssueTwice(t *testing.T, s *subject) {
	g := s.issue(Grant(1, Identity(1), noon, s.head()))
	again := cloneGrant(g)
	again.Audience = "ledger"
	if err := s.Issue(t.Context(), again, Admit); err == nil {
		t.Error("one ID was issued twice")
	}
	got, err := s.Grant(t.Context(), g.ID())
	if err != nil {
		t.Fatal(err)
	}
	equal(t, "grant", got, g)
}

// fill issues grants that expire over three days, and returns them in order.
func fill(s *subject, n int) []*broker.Grant {
	var all []*broker.Grant
	for i := range n {
		expires := noon.Add(time.Duration(i%3)*24*time.Hour + time.Duration(i)*time.Second)
		all = append(all, s.issue(Grant(i, Identity(i%4), expires, s.head())))
	}
	slices.SortFunc(all, func(a, b *broker.Grant) int { return slices.Compare(place(a), place(b)) })
	return all
}

func testGrants(t *testing.T, s *subject) {
	all := fill(s, 40)
	for _, limit := range []int{1, 7, 40, 1000} {
		equal(t, fmt.Sprintf("grants by %d", limit), s.list(broker.GrantQuery{Limit: limit}), all)
	}
	live := noon.Add(24*time.Hour + 10*time.Second)
	want := slices.DeleteFunc(slices.Clone(all), func(g *broker.Grant) bool { return !g.Expires.After(live) })
	equal(t, "live grants", s.list(broker.GrantQuery{Limit: 3, LiveAt: live}), want)
	odd := func(g *broker.Grant) bool { return g.Binding == token.BindingX5T }
	want = slices.DeleteFunc(slices.Clone(all), func(g *broker.Grant) bool { return !odd(g) })
	equal(t, "matching grants", s.list(broker.GrantQuery{Limit: 3, Match: odd}), want)
	// What is issued between two pages moves nothing.
	page, after, err := s.Grants(t.Context(), broker.GrantQuery{Limit: 20})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 20 {
		s.issue(Grant(1000+i, Identity(i%4), noon.Add(-48*time.Hour), s.head()))
	}
	page = append(page, s.list(broker.GrantQuery{Limit: 20, After: after})...)
	equal(t, "pages around an issue", page, all)
}

func testGrantsPresenter(t *testing.T, s *subject) {
	all := fill(s, 40)
	for i := range 5 {
		want := slices.DeleteFunc(slices.Clone(all), func(g *broker.Grant) bool { return g.Presenter() != Identity(i) })
		got := s.list(broker.GrantQuery{Limit: 3, Presenter: Identity(i)})
		if len(want)+len(got) > 0 {
			equal(t, "grants of a presenter", got, want)
		}
	}
}

func testGrantsBadPage(t *testing.T, s *subject) {
	fill(s, 4)
	_, after, err := s.Grants(t.Context(), broker.GrantQuery{Limit: 1})
	if err != nil || after == "" {
		t.Fatalf("first page: %q, %v", after, err)
	}
	for _, bad := range []string{"!", "AAAA", after + "A", after[:len(after)-1], after + "\n"} {
		if _, _, err := s.Grants(t.Context(), broker.GrantQuery{Limit: 1, After: bad}); !errors.Is(err, broker.ErrBadPage) {
			t.Errorf("page %q: %v", bad, err)
		}
	}
	if _, _, err := s.Grants(t.Context(), broker.GrantQuery{}); err == nil {
		t.Error("a page without a limit was returned")
	}
}

func testEvents(t *testing.T, s *subject) {
	var want []broker.Record
	for i := range 600 { // more than any chunk
		want = append(want, s.append(revoke(i%9)))
	}
	equal(t, "records", s.records(1), want)
	equal(t, "records after 300", s.records(300), append(want[299:], revokeMark(s, 602)))
	for r, err := range s.Events(t.Context(), 0) {
		if err != nil || r.Seq != 1 {
			t.Errorf("first record: %d, %v", r.Seq, err)
		}
		break
	}
}

// revokeMark reads back one record.
func revokeMark(s *subject, seq uint64) broker.Record {
	for r, err := range s.Events(s.t.Context(), seq-1) {
		if err != nil {
			s.t.Fatal(err)
		}
		return r
	}
	return broker.Record{}
}

func testEventsWait(t *testing.T, s *subject) {
	ctx, cancel := context.WithCancel(t.Context())
	got := make(chan uint64)
	ended := make(chan error, 1)
	after := s.head().Seq
	go func() {
		for r, err := range s.Events(ctx, after) {
			if err != nil {
				ended <- err
				continue
			}
			got <- r.Seq
		}
		close(ended)
	}()
	for i := range 5 {
		if i > 0 {
			s.append(revoke(i))
			if seq, want := <-got, uint64(i+1); seq != want {
				t.Errorf("event %d, not %d", seq, want)
			}
		}
		// An issue is no event.
		s.issue(Grant(i, Identity(1), noon, s.head()))
	}
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("Events ended with %v", err)
	}
	if err, more := <-ended; more {
		t.Errorf("Events went on with %v", err)
	}
}

func testEventsClose(t *testing.T, s *subject) {
	ended := make(chan error, 1)
	started := make(chan struct{})
	go func() {
		for _, err := range s.Store.Events(context.Background(), 0) {
			if err != nil {
				ended <- err
				return
			}
			close(started)
		}
	}()
	<-started
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if err := <-ended; !errors.Is(err, broker.ErrStoreClosed) {
		t.Errorf("Events ended with %v", err)
	}
}

func (s *subject) observed(prefix string) []broker.Observation {
	s.t.Helper()
	var all []broker.Observation
	for o, err := range s.Observed(s.t.Context(), prefix) {
		if err != nil {
			s.t.Fatalf("Observed: %v", err)
		}
		all = append(all, o)
	}
	return all
}

func testObserve(t *testing.T, s *subject) {
	observe := func(o ...broker.Observation) {
		t.Helper()
		if err := s.Observe(t.Context(), o...); err != nil {
			t.Fatalf("Observe: %v", err)
		}
	}
	observe()
	observe(broker.Observation{Key: "a/2", Value: []byte("two")}, broker.Observation{Key: "a/1", Value: []byte{}})
	observe(broker.Observation{Key: "a/2", Value: []byte("newer")}, broker.Observation{Key: "b/1", Value: []byte("b")})
	observe(broker.Observation{Key: "b/1"}, broker.Observation{Key: "b/none"})
	s.reopen()
	equal(t, "observations", s.observed(""), []broker.Observation{
		{Key: "a/1", Value: []byte{}},
		{Key: "a/2", Value: []byte("newer")},
	})
}

func testObservePrefix(t *testing.T, s *subject) {
	var want, all []broker.Observation
	for i := range 700 { // more than any chunk
		o := broker.Observation{Key: fmt.Sprintf("a/%04d", i), Value: []byte{byte(i)}}
		want = append(want, o)
		all = append(all, o, broker.Observation{Key: fmt.Sprintf("b/%04d", i), Value: []byte("b")})
	}
	if err := s.Observe(t.Context(), all...); err != nil {
		t.Fatal(err)
	}
	equal(t, "observations", s.observed("a/"), want)
	equal(t, "observations of a longer prefix", s.observed("a/001"), want[10:20])
	equal(t, "observations of no prefix", len(s.observed("c")), 0)
	for range s.Observed(t.Context(), "") {
		break
	}
}

func testObserveRefuses(t *testing.T, s *subject) {
	good := broker.Observation{Key: "a/1", Value: []byte("v")}
	for name, bad := range map[string]broker.Observation{
		"no key":        {Value: []byte("v")},
		"a long key":    {Key: string(make([]byte, 513)), Value: []byte("v")},
		"a control key": {Key: "a/\n", Value: []byte("v")},
		"a large value": {Key: "a/2", Value: make([]byte, 64<<10+1)},
	} {
		if err := s.Observe(t.Context(), good, bad); err == nil {
			t.Errorf("an observation with %s was kept", name)
		}
	}
	equal(t, "observations after refusals", len(s.observed("")), 0)
	if err := s.Observe(t.Context(), broker.Observation{Key: "a/3", Value: make([]byte, 64<<10)}); err != nil {
		t.Error(err)
	}
}

func testPruneLog(t *testing.T, s *subject) {
	for i := range 9 { // numbers 2 to 10
		s.append(revoke(i))
	}
	all := append([]broker.Record{revokeMark(s, 1)}, s.records(1)...)
	below, at := position(all[3]), position(all[5])
	keep := func(numbers ...uint64) func(broker.Record) bool {
		return func(r broker.Record) bool { return slices.Contains(numbers, r.Seq) }
	}
	report, err := s.Prune(t.Context(), broker.Pruning{Horizon: 6, Keep: keep(1, 3), Drop: []uint64{8, 5, 77}})
	if err != nil {
		t.Fatal(err)
	}
	equal(t, "report", report, broker.PruneReport{Records: 5, Horizon: at})
	s.reopen()
	st, err := s.State(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	equal(t, "horizon", st.Horizon, at)
	left := func(numbers ...int) (want []broker.Record) {
		for _, n := range numbers {
			want = append(want, all[n-1])
		}
		return want
	}
	got := s.records(0)
	equal(t, "records after pruning", got[:len(got)-1], left(1, 3, 7, 9, 10))
	// The horizon is on the log, what is below it is not, and a dropped number is.
	for name, c := range map[string]struct {
		at   feed.Position
		want error
	}{"horizon": {at, nil}, "below": {below, broker.ErrOffLog}, "dropped": {position(all[7]), nil}} {
		err := s.Issue(t.Context(), Grant(int(c.at.Seq), Identity(1), noon, c.at), Admit)
		if !errors.Is(err, c.want) {
			t.Errorf("grant at position %s: %v, want %v", name, err, c.want)
		}
	}
	// It never moves back, and lets go of what no one wants any longer.
	report, err = s.Prune(t.Context(), broker.Pruning{Horizon: 2, Keep: keep(3)})
	if err != nil {
		t.Fatal(err)
	}
	equal(t, "second report", report, broker.PruneReport{Records: 1, Horizon: at})
	if _, err := s.Prune(t.Context(), broker.Pruning{Horizon: 100}); err == nil {
		t.Error("a horizon beyond the head was accepted")
	}
	// All may go; the head stays.
	head := s.head()
	if report, err = s.Prune(t.Context(), broker.Pruning{Horizon: head.Seq}); err != nil {
		t.Fatal(err)
	}
	equal(t, "horizon at the head", report.Horizon, head)
	s.reopen()
	equal(t, "head after pruning everything", s.head(), head)
	s.issue(Grant(200, Identity(1), noon, head))
	if r := s.append(revoke(1)); r.Seq != head.Seq+1 {
		t.Errorf("record %d follows %d", r.Seq, head.Seq)
	}
}

// position is where a record of the suite's first era stands.
func position(r broker.Record) feed.Position {
	return feed.Position{Era: era, Seq: r.Seq, Sum: r.Sum}
}

func testPruneGrants(t *testing.T, s *subject) {
	all := fill(s, 30)
	day := func(n int) time.Time { return noon.Truncate(24*time.Hour).AddDate(0, 0, n) }
	prune := func(before time.Time, want int) {
		t.Helper()
		report, err := s.Prune(t.Context(), broker.Pruning{GrantsExpiredBefore: before})
		if err != nil {
			t.Fatal(err)
		}
		if report.Grants != want {
			t.Errorf("%d grants expired before %s went, not %d", report.Grants, before, want)
		}
	}
	prune(time.Time{}, 0)
	prune(day(1).Add(-time.Second), 0) // days go whole
	prune(day(1), 10)
	prune(day(1), 0)
	s.reopen()
	equal(t, "grants left", s.list(broker.GrantQuery{Limit: 100}), all[10:])
	if _, err := s.Grant(t.Context(), all[0].ID()); !errors.Is(err, broker.ErrNotFound) {
		t.Errorf("a pruned grant: %v", err)
	}
	prune(day(9), 20)
}

func testPruneObserved(t *testing.T, s *subject) {
	var all []broker.Observation
	for i := range 2500 { // more than any step
		all = append(all, broker.Observation{Key: fmt.Sprintf("uses/%04d", i), Value: []byte{byte(i)}})
	}
	others := []broker.Observation{{Key: "use", Value: []byte("v")}, {Key: "uses0", Value: []byte("v")}, {Key: "verifier/1", Value: []byte("v")}}
	if err := s.Observe(t.Context(), append(slices.Clone(all), others...)...); err != nil {
		t.Fatal(err)
	}
	prune := func(want int, ranges ...broker.KeyRange) {
		t.Helper()
		report, err := s.Prune(t.Context(), broker.Pruning{Observations: ranges})
		if err != nil {
			t.Fatal(err)
		}
		if report.Observations != want || report.Records != 0 || report.Grants != 0 {
			t.Errorf("pruning %v: %+v, want %d observations", ranges, report, want)
		}
	}
	prune(0, broker.KeyRange{From: "uses/", Until: "uses/0000"}) // the end is not in it
	prune(0, broker.KeyRange{From: "x", Until: "y"}, broker.KeyRange{From: "uses/9", Until: "uses/0"})
	prune(2001, broker.KeyRange{From: "uses/", Until: "uses/2000"}, broker.KeyRange{From: "uses/2499", Until: "uses0"})
	s.reopen()
	equal(t, "observations left", s.observed("uses/"), all[2000:2499])
	for _, o := range others {
		if !slices.ContainsFunc(s.observed(""), func(left broker.Observation) bool { return reflect.DeepEqual(left, o) }) {
			t.Errorf("%s went, too", o.Key)
		}
	}
	prune(499, broker.KeyRange{From: "uses/", Until: "uses0"})
	prune(0, broker.KeyRange{From: "uses/", Until: "uses0"})
}

// calls are all methods, each as one call.
func (s *subject) calls(ctx context.Context) map[string]error {
	out := map[string]error{}
	at := feed.Position{Era: era, Seq: 1}
	out["Issue"] = s.Issue(ctx, Grant(1, Identity(1), noon, at), Admit)
	_, out["Append"] = s.Append(ctx, Next(revoke(1)))
	_, out["State"] = s.State(ctx)
	_, out["Grant"] = s.Grant(ctx, Grant(1, Identity(1), noon, at).ID())
	_, _, out["Grants"] = s.Grants(ctx, broker.GrantQuery{Limit: 1})
	out["Observe"] = s.Observe(ctx)
	_, out["Prune"] = s.Prune(ctx, broker.Pruning{})
	for _, err := range s.Events(ctx, 0) {
		out["Events"] = err
		break
	}
	for _, err := range s.Observed(ctx, "") {
		out["Observed"] = err
		break
	}
	return out
}

func testCancelled(t *testing.T, s *subject) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	before := s.head()
	for name, err := range s.calls(ctx) {
		if !errors.Is(err, context.Canceled) {
			t.Errorf("%s with a cancelled context: %v", name, err)
		}
	}
	equal(t, "head", s.head(), before)
}

func testClosed(t *testing.T, s *subject) {
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	for name, err := range s.calls(t.Context()) {
		if !errors.Is(err, broker.ErrStoreClosed) {
			t.Errorf("%s of a closed store: %v", name, err)
		}
	}
	s.reopen()
	equal(t, "calls after reopening", s.Observe(t.Context()), nil)
}

// testAtOnce lets every method run at once and looks at what remains.
func testAtOnce(t *testing.T, s *subject) {
	const workers, each = 8, 25
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for i := range each {
				n := w*each + i
				if err := s.Issue(t.Context(), Grant(n, Identity(w), noon, s.head()), Admit); err != nil {
					t.Errorf("Issue: %v", err)
				}
				if i%5 == 0 {
					s.append(revoke(n))
				}
				if err := s.Observe(t.Context(), broker.Observation{Key: fmt.Sprintf("k/%d", n), Value: []byte("v")}); err != nil {
					t.Errorf("Observe: %v", err)
				}
				if _, err := s.Grant(t.Context(), Grant(n, Identity(w), noon, feed.Position{}).ID()); err != nil {
					t.Errorf("Grant: %v", err)
				}
				s.list(broker.GrantQuery{Limit: 100, Presenter: Identity(w)})
			}
		})
	}
	seen := make(chan int)
	go func() {
		n := 0
		for r, err := range s.Events(t.Context(), 1) {
			if n++; err != nil || r.Seq != uint64(n+1) {
				t.Errorf("event %d: %d, %v", n, r.Seq, err)
			}
			if err != nil || n == workers*each/5 {
				break
			}
		}
		seen <- n
	}()
	wg.Wait()
	if n := <-seen; n != workers*each/5 {
		t.Errorf("%d events", n)
	}
	s.reopen()
	equal(t, "grants", len(s.list(broker.GrantQuery{Limit: 1000})), workers*each)
	equal(t, "observations", len(s.observed("k/")), workers*each)
	equal(t, "head", s.head().Seq, uint64(1+workers*each/5))
}

// testOvertaking holds a commit, lets a grant and then a record queue behind it,
// and wants the record first.
func testOvertaking(t *testing.T, s *subject) {
	head := s.head()
	held, release := make(chan struct{}), make(chan struct{})
	var once, freed sync.Once
	var wg sync.WaitGroup
	wg.Go(func() {
		err := s.Issue(t.Context(), Grant(1, Identity(1), noon, head), func([]broker.Record) error {
			once.Do(func() { close(held) })
			<-release
			return nil
		})
		if err != nil {
			t.Errorf("the first Issue: %v", err)
		}
	})
	defer wg.Wait()
	defer freed.Do(func() { close(release) })
	<-held
	ctx, cancel := context.WithCancel(t.Context())
	wg.Go(func() {
		if err := s.Issue(ctx, Grant(2, Identity(1), noon, head), Admit); !errors.Is(err, context.Canceled) {
			t.Errorf("an Issue cancelled in the queue: %v", err)
		}
	})
	wg.Go(func() {
		err := s.Issue(t.Context(), Grant(3, Identity(1), noon, head), func(newer []broker.Record) error {
			if len(newer) != 1 {
				t.Errorf("the queued grant met %d newer records, not the one that overtook it", len(newer))
			}
			return nil
		})
		if err != nil {
			t.Errorf("the queued Issue: %v", err)
		}
	})
	synctest.Wait()
	wg.Go(func() { s.append(revoke(1)) })
	synctest.Wait()
	cancel()
	synctest.Wait()
	freed.Do(func() { close(release) })
	wg.Wait()
	if _, err := s.Grant(t.Context(), Grant(2, Identity(1), noon, head).ID()); !errors.Is(err, broker.ErrNotFound) {
		t.Errorf("the cancelled grant: %v", err)
	}
}

// testOvertakingAll lets more grants queue than any commit carries, and observations,
// and wants the record that comes last before all of them.
func testOvertakingAll(t *testing.T, s *subject) {
	const waiting = 2000
	head := s.head()
	held, release := make(chan struct{}), make(chan struct{})
	var once, freed sync.Once
	var wg sync.WaitGroup
	issue := func(n int, admit func([]broker.Record) error) {
		wg.Go(func() {
			if err := s.Issue(t.Context(), Grant(n, Identity(1), noon, head), admit); err != nil {
				t.Errorf("Issue %d: %v", n, err)
			}
		})
	}
	issue(0, func([]broker.Record) error {
		once.Do(func() { close(held) })
		<-release
		return nil
	})
	defer wg.Wait()
	defer freed.Do(func() { close(release) })
	<-held
	var mu sync.Mutex
	behind := map[int]bool{} // a store may ask twice
	for n := 1; n <= waiting; n++ {
		issue(n, func(newer []broker.Record) error {
			mu.Lock()
			defer mu.Unlock()
			if len(newer) == 1 {
				behind[n] = true
			}
			return nil
		})
		if n%10 == 0 {
			wg.Go(func() {
				if err := s.Observe(t.Context(), broker.Observation{Key: fmt.Sprintf("k/%d", n), Value: []byte("v")}); err != nil {
					t.Errorf("Observe: %v", err)
				}
			})
		}
	}
	synctest.Wait()
	wg.Go(func() { s.append(revoke(1)) })
	synctest.Wait()
	freed.Do(func() { close(release) })
	wg.Wait()
	if len(behind) != waiting {
		t.Errorf("the record overtook %d of %d waiting grants", len(behind), waiting)
	}
}
