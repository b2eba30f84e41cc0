package storetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/proto/feed"
	"pgregory.net/rapid"
)

// A model is a store as simple as can be: what was told to it, in lists.
type model struct {
	records  []broker.Record // all that were ever appended
	dropped  map[uint64]bool
	horizon  uint64
	grants   []*broker.Grant
	observed map[string]string
}

func (m *model) at(seq uint64) feed.Position {
	if seq == 0 {
		return feed.Position{}
	}
	return position(m.records[seq-1])
}

func (m *model) head() uint64 { return uint64(len(m.records)) }

// testModel does random things to the store and to a model, and compares.
func testModel(t *testing.T, s *subject) {
	rapid.Check(t, func(rt *rapid.T) {
		s := &subject{t: t, open: s.make()}
		s.reopen()
		defer func() {
			if err := s.Close(); err != nil {
				rt.Errorf("Close: %v", err)
			}
		}()
		first, _ := Era(era).Seal(feed.Position{})
		m := &model{records: []broker.Record{first}, dropped: map[uint64]bool{}, observed: map[string]string{}}
		steps := rapid.IntRange(1, 25).Draw(rt, "steps")
		for n := range steps {
			switch rapid.SampledFrom([]string{"issue", "issue", "issue", "append", "observe", "prune", "reopen", "page"}).Draw(rt, "step") {
			case "issue":
				m.issue(rt, s, n)
			case "append":
				m.records = append(m.records, s.append(revoke(rapid.IntRange(0, 3).Draw(rt, "who"))))
			case "observe":
				m.observe(rt, s)
			case "prune":
				m.prune(rt, s)
			case "reopen":
				s.reopen()
			case "page":
				m.page(rt, s, 10_000+100*n)
			}
		}
		m.compare(rt, s)
	})
}

func (m *model) issue(rt *rapid.T, s *subject, n int) {
	at := rapid.Uint64Range(0, m.head()).Draw(rt, "position")
	expires := noon.Add(time.Duration(rapid.IntRange(0, 3*24*60).Draw(rt, "minute")) * time.Minute)
	g := Grant(n, Identity(rapid.IntRange(0, 2).Draw(rt, "presenter")), expires, m.at(at))
	err := s.Issue(context.Background(), g, func(newer []broker.Record) error {
		var want []uint64
		for seq := at + 1; seq <= m.head(); seq++ {
			if !m.dropped[seq] {
				want = append(want, seq)
			}
		}
		var got []uint64
		for _, r := range newer {
			got = append(got, r.Seq)
		}
		if !slices.Equal(got, want) {
			rt.Errorf("newer records %v, want %v", got, want)
		}
		return nil
	})
	if at == 0 || at < m.horizon {
		if !errors.Is(err, broker.ErrOffLog) {
			rt.Errorf("a grant at %d, below the horizon %d: %v", at, m.horizon, err)
		}
		return
	}
	if err != nil {
		rt.Fatalf("Issue: %v", err)
	}
	m.grants = append(m.grants, g)
}

func (m *model) observe(rt *rapid.T, s *subject) {
	key := rapid.SampledFrom([]string{"a/1", "a/2", "b/1"}).Draw(rt, "key")
	o := broker.Observation{Key: key}
	if value := rapid.SampledFrom([]string{"", "v", "w"}).Draw(rt, "value"); value == "" {
		delete(m.observed, key)
	} else {
		m.observed[key] = value
		o.Value = []byte(value)
	}
	if err := s.Observe(context.Background(), o); err != nil {
		rt.Fatalf("Observe: %v", err)
	}
}

func (m *model) prune(rt *rapid.T, s *subject) {
	p := broker.Pruning{
		Horizon:             rapid.Uint64Range(0, m.head()).Draw(rt, "horizon"),
		Drop:                rapid.SliceOfN(rapid.Uint64Range(0, m.head()+1), 0, 2).Draw(rt, "drop"),
		Keep:                func(r broker.Record) bool { return r.Seq%3 == 0 },
		GrantsExpiredBefore: noon.Add(time.Duration(rapid.IntRange(0, 3*24).Draw(rt, "hour")) * time.Hour),
	}
	if rapid.Bool().Draw(rt, "observations") {
		p.Observations = []broker.KeyRange{{From: rapid.SampledFrom([]string{"", "a/1", "a/2"}).Draw(rt, "from"), Until: rapid.SampledFrom([]string{"a/2", "b/"}).Draw(rt, "until")}}
	}
	report, err := s.Prune(context.Background(), p)
	if err != nil {
		rt.Fatalf("Prune: %v", err)
	}
	m.horizon = max(m.horizon, p.Horizon)
	records := 0
	for seq := uint64(1); seq <= m.head(); seq++ {
		gone := seq <= m.horizon && seq%3 != 0 || seq > m.horizon && slices.Contains(p.Drop, seq)
		if gone && !m.dropped[seq] {
			m.dropped[seq] = true
			records++
		}
	}
	before := len(m.grants)
	m.grants = slices.DeleteFunc(m.grants, func(g *broker.Grant) bool {
		return !g.Expires.Truncate(24 * time.Hour).Add(24 * time.Hour).After(p.GrantsExpiredBefore)
	})
	observed := len(m.observed)
	for _, r := range p.Observations {
		maps.DeleteFunc(m.observed, func(k, _ string) bool { return k >= r.From && k < r.Until })
	}
	want := broker.PruneReport{Records: records, Grants: before - len(m.grants), Observations: observed - len(m.observed), Horizon: m.at(m.horizon)}
	if report != want {
		rt.Errorf("report %+v, want %+v", report, want)
	}
}

// page reads all grants by pages while others are issued: those that were there
// come once each, in order.
func (m *model) page(rt *rapid.T, s *subject, n int) {
	was := m.sorted(nil)
	limit := rapid.IntRange(1, 4).Draw(rt, "limit")
	q := broker.GrantQuery{Limit: limit}
	var got []*broker.Grant
	for {
		page, after, err := s.Grants(context.Background(), q)
		if err != nil {
			rt.Fatalf("Grants: %v", err)
		}
		got = append(got, page...)
		if q.After = after; after == "" {
			break
		}
		g := Grant(n, Identity(n%3), noon.Add(time.Duration(n%4-1)*24*time.Hour), m.at(m.head()))
		if err := s.Issue(context.Background(), g, Admit); err != nil {
			rt.Fatalf("Issue: %v", err)
		}
		m.grants = append(m.grants, g)
		n++
		if len(got) > 1000 {
			rt.Fatal("paging does not end")
		}
		if len(got) > 2*len(was) {
			break // what is issued behind the page is seen, too: enough
		}
	}
	there := map[string]bool{}
	for _, g := range was {
		there[g.ID().String()] = true
	}
	if !slices.IsSortedFunc(got, order) {
		rt.Error("pages are not in order")
	}
	got = slices.DeleteFunc(got, func(g *broker.Grant) bool { return !there[g.ID().String()] })
	if q.After == "" && !reflect.DeepEqual(got, was) {
		rt.Errorf("paging gave %d grants, not the %d that were there", len(got), len(was))
	}
}

func order(a, b *broker.Grant) int { return bytes.Compare(place(a), place(b)) }

// sorted returns the model's grants that keep wants, in the store's order.
func (m *model) sorted(keep func(*broker.Grant) bool) []*broker.Grant {
	var all []*broker.Grant
	for _, g := range m.grants {
		if keep == nil || keep(g) {
			all = append(all, g)
		}
	}
	slices.SortFunc(all, order)
	return all
}

func (m *model) compare(rt *rapid.T, s *subject) {
	st, err := s.State(context.Background())
	if want := (broker.StoreState{Head: m.at(m.head()), Horizon: m.at(m.horizon)}); err != nil || st != want {
		rt.Errorf("state %+v, want %+v (%v)", st, want, err)
	}
	for i := range 3 {
		live := noon.Add(30 * time.Hour)
		got := s.list(broker.GrantQuery{Limit: 3, Presenter: Identity(i), LiveAt: live})
		want := m.sorted(func(g *broker.Grant) bool { return g.Presenter() == Identity(i) && g.Expires.After(live) })
		if !reflect.DeepEqual(got, want) {
			rt.Errorf("live grants of %d: %d, want %d", i, len(got), len(want))
		}
	}
	for _, want := range m.grants {
		if got, err := s.Grant(context.Background(), want.ID()); err != nil || !reflect.DeepEqual(got, want) {
			rt.Errorf("grant %s: %+v, %v", want.ID(), got, err)
		}
	}
	observed := map[string]string{}
	for _, o := range s.observed("") {
		observed[o.Key] = string(o.Value)
	}
	if fmt.Sprint(observed) != fmt.Sprint(m.observed) {
		rt.Errorf("observed %v, want %v", observed, m.observed)
	}
	var want []broker.Record
	for _, r := range m.records {
		if !m.dropped[r.Seq] {
			want = append(want, r)
		}
	}
	if got := s.records(0); !reflect.DeepEqual(got, want) {
		rt.Errorf("%d records, want %d", len(got), len(want))
	}
}
