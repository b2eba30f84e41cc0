package storetest

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"iter"
	"maps"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/token"
)

// Era returns the record that begins an era, to make a store with.
func Era(era token.Era) broker.Record {
	return broker.Record{
		Event:   feed.Event{Era: &feed.Era{Era: era}},
		Details: broker.Details{Time: time.Unix(int64(era), 0).UTC(), Actor: "storetest", Reason: "a new store"},
	}
}

// Memory returns a store in memory whose log has these records, the first of which
// begins an era. It fails t when a caller breaks the contract of broker.Store: when
// it changes a grant that it gave away, issues one that is malformed or that no
// token could be like, uses an ID or a fingerprint twice, passes an admit or a next
// that is not pure, or keeps the grant that a query's Match was shown.
func Memory(t testing.TB, first ...broker.Record) *Mem {
	t.Helper()
	if len(first) == 0 || first[0].Era == nil {
		t.Fatal("a log begins with an era")
	}
	d := &memory{t: t, grants: map[token.GrantID]*broker.Grant{}, prints: map[token.Fingerprint]token.GrantID{}, observed: map[string][]byte{}, news: make(chan struct{})}
	d.free = sync.NewCond(&d.mu)
	for _, r := range first {
		if _, err := d.append(r); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(d.police)
	return &Mem{d: d, done: make(chan struct{})}
}

// A Mem is a broker.Store in memory. Memory makes it.
type Mem struct {
	d    *memory
	once sync.Once
	done chan struct{}
}

var _ broker.Store = (*Mem)(nil)

// Reopen returns another store with the same contents, as after a restart.
func (m *Mem) Reopen() *Mem { return &Mem{d: m.d, done: make(chan struct{})} }

// Clone returns another store with a copy of the contents of now: an old file, once the
// first has been written to.
func (m *Mem) Clone() *Mem {
	m.d.mu.Lock()
	defer m.d.mu.Unlock()
	d := &memory{
		t: m.d.t, log: slices.Clone(m.d.log), head: m.d.head, horizon: m.d.horizon,
		grants: maps.Clone(m.d.grants), prints: maps.Clone(m.d.prints), observed: maps.Clone(m.d.observed), news: make(chan struct{}),
	}
	d.free = sync.NewCond(&d.mu)
	return &Mem{d: d, done: make(chan struct{})}
}

type memory struct {
	t  testing.TB
	mu sync.Mutex
	// One writer at a time, appends before issues, as in a store that commits.
	free    *sync.Cond
	busy    bool
	appends int

	log           []memEntry
	head, horizon feed.Position
	grants        map[token.GrantID]*broker.Grant
	prints        map[token.Fingerprint]token.GrantID
	given         []given
	observed      map[string][]byte
	news          chan struct{}
}

type memEntry struct {
	at      feed.Position
	dropped bool
	record  broker.Record
}

// given is a grant as its caller holds it, and as it was.
type given struct{ theirs, was *broker.Grant }

func (d *memory) police() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, g := range d.given {
		if !reflect.DeepEqual(g.theirs, g.was) {
			d.t.Errorf("storetest: grant %s was changed after Issue:\n got %+v\nwant %+v", g.was.ID(), g.theirs, g.was)
		}
	}
}

func (m *Mem) live(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	select {
	case <-m.done:
		return broker.ErrStoreClosed
	default:
		return nil
	}
}

// write runs f as the one writer. It is without the lock, so that others can queue.
func (m *Mem) write(ctx context.Context, overtakes bool, f func() error) error {
	d := m.d
	stop := context.AfterFunc(ctx, func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.free.Broadcast()
	})
	defer stop()
	d.mu.Lock()
	if overtakes {
		d.appends++
	}
	for ctx.Err() == nil && (d.busy || !overtakes && d.appends > 0) {
		d.free.Wait()
	}
	if overtakes {
		d.appends--
	}
	if err := m.live(ctx); err != nil {
		d.free.Broadcast()
		d.mu.Unlock()
		return err
	}
	d.busy = true
	d.mu.Unlock()
	defer func() {
		d.mu.Lock()
		d.busy = false
		d.free.Broadcast()
		d.mu.Unlock()
	}()
	return f()
}

// Issue implements broker.Store.
func (m *Mem) Issue(ctx context.Context, g *broker.Grant, admit func([]broker.Record) error) error {
	d := m.d
	if err := validGrant(g); err != nil {
		d.t.Errorf("storetest: Issue of a bad grant: %v", err)
		return err
	}
	return m.write(ctx, false, func() error {
		newer, err := d.beyond(g.Position)
		if err != nil {
			return err
		}
		err = admit(newer)
		newer, _ = d.beyond(g.Position)
		if again := admit(newer); (again == nil) != (err == nil) {
			d.t.Errorf("storetest: admit is not pure: it said %v, then %v", err, again)
		}
		if err != nil {
			return err
		}
		return d.keep(g)
	})
}

func validGrant(g *broker.Grant) error {
	if len(g.Lineage) == 0 {
		return errors.New("no lineage")
	}
	switch {
	case len(g.Lineage) > token.MaxDepth:
		return errors.New("lineage too long")
	case g.ID().IsZero():
		return errors.New("no ID")
	case g.Audience == "":
		return errors.New("no audience")
	case !g.Binding.Valid():
		return fmt.Errorf("binding %q", g.Binding)
	case (g.Binding == token.BindingX5T) != (g.Certificate != [32]byte{}):
		return errors.New("a certificate goes with x5t, and only with it")
	case !slices.IsSorted(g.Scopes):
		return errors.New("scopes are not sorted")
	case g.IssuedAt.Nanosecond() != 0 || g.Expires.Nanosecond() != 0:
		return errors.New("times are not whole seconds")
	case g.IssuedAt.Location() != time.UTC || g.Expires.Location() != time.UTC:
		return errors.New("times are not in UTC")
	case !g.Expires.After(g.IssuedAt) || g.Expires.Sub(g.IssuedAt) > token.MaxTTL:
		return fmt.Errorf("lives from %s to %s", g.IssuedAt, g.Expires)
	case g.Fingerprint == token.Fingerprint{}:
		return errors.New("no fingerprint")
	}
	return nil
}

func (d *memory) keep(g *broker.Grant) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, ok := d.grants[g.ID()]; ok {
		return fmt.Errorf("grant %s is in the records already", g.ID())
	}
	if other, ok := d.prints[g.Fingerprint]; ok {
		d.t.Errorf("storetest: grants %s and %s have the same fingerprint", other, g.ID())
	}
	was := cloneGrant(g)
	d.grants[g.ID()] = was
	d.prints[g.Fingerprint] = g.ID()
	d.given = append(d.given, given{g, was})
	return nil
}

// beyond returns the records beyond a position of the log.
func (d *memory) beyond(at feed.Position) ([]broker.Record, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	on := at.Seq > 0 && (at == d.head || at == d.horizon)
	var newer []broker.Record
	for _, e := range d.log {
		switch {
		case e.at.Seq <= d.horizon.Seq:
		case e.at == at:
			on = true
		case e.at.Seq > at.Seq && !e.dropped:
			newer = append(newer, cloneRecord(e.record))
		}
	}
	if !on {
		return nil, broker.ErrOffLog
	}
	return newer, nil
}

// Append implements broker.Store.
func (m *Mem) Append(ctx context.Context, next func(feed.Position) (broker.Record, error)) (broker.Record, error) {
	var sealed broker.Record
	err := m.write(ctx, true, func() error {
		head := m.d.head
		r, err := next(head)
		again, errAgain := next(head)
		if (err == nil) != (errAgain == nil) || err == nil && !samePlace(r, again, head) {
			m.d.t.Errorf("storetest: next is not pure: it made %+v (%v), then %+v (%v)", r, err, again, errAgain)
		}
		if err != nil {
			return err
		}
		sealed, err = m.d.append(r)
		return err
	})
	return sealed, err
}

func samePlace(r, q broker.Record, head feed.Position) bool {
	_, a := r.Seal(head)
	_, b := q.Seal(head)
	return a == b
}

func (d *memory) append(r broker.Record) (broker.Record, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	sealed, at := cloneRecord(r).Seal(d.head)
	if err := sealed.Validate(); err != nil {
		return broker.Record{}, fmt.Errorf("appending record: %w", err)
	}
	if sealed.Era != nil && sealed.Era.Era <= d.head.Era {
		return broker.Record{}, fmt.Errorf("appending record: era %s does not follow era %s", sealed.Era.Era, d.head.Era)
	}
	d.log = append(d.log, memEntry{at: at, record: sealed})
	d.head = at
	close(d.news)
	d.news = make(chan struct{})
	return cloneRecord(sealed), nil
}

// Events implements broker.Store.
func (m *Mem) Events(ctx context.Context, after uint64) iter.Seq2[broker.Record, error] {
	return func(yield func(broker.Record, error) bool) {
		for last := after; ; {
			if err := m.live(ctx); err != nil {
				yield(broker.Record{}, err)
				return
			}
			e, news := m.d.after(last)
			if e == nil {
				select {
				case <-news:
				case <-m.done:
				case <-ctx.Done():
				}
				continue
			}
			last = e.at.Seq
			if !e.dropped && !yield(cloneRecord(e.record), nil) {
				return
			}
		}
	}
}

func (d *memory) after(seq uint64) (*memEntry, <-chan struct{}) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, e := range d.log {
		if e.at.Seq > seq {
			return &e, nil
		}
	}
	return nil, d.news
}

// State implements broker.Store.
func (m *Mem) State(ctx context.Context) (broker.StoreState, error) {
	if err := m.live(ctx); err != nil {
		return broker.StoreState{}, err
	}
	m.d.mu.Lock()
	defer m.d.mu.Unlock()
	return broker.StoreState{Head: m.d.head, Horizon: m.d.horizon}, nil
}

// Grant implements broker.Store.
func (m *Mem) Grant(ctx context.Context, id token.GrantID) (*broker.Grant, error) {
	if err := m.live(ctx); err != nil {
		return nil, err
	}
	m.d.mu.Lock()
	defer m.d.mu.Unlock()
	g, ok := m.d.grants[id]
	if !ok {
		return nil, broker.ErrNotFound
	}
	return cloneGrant(g), nil
}

// Grants implements broker.Store.
func (m *Mem) Grants(ctx context.Context, q broker.GrantQuery) ([]*broker.Grant, string, error) {
	if err := m.live(ctx); err != nil {
		return nil, "", err
	}
	if q.Limit < 1 {
		return nil, "", errors.New("a page of grants has a limit of at least 1")
	}
	after, err := base64.RawURLEncoding.Strict().DecodeString(q.After)
	if err != nil || base64.RawURLEncoding.EncodedLen(len(after)) != len(q.After) || len(after) != 0 && len(after) != 26 {
		return nil, "", broker.ErrBadPage
	}
	m.d.mu.Lock()
	all := slices.SortedFunc(maps.Values(m.d.grants), func(a, b *broker.Grant) int { return bytes.Compare(place(a), place(b)) })
	m.d.mu.Unlock()
	var page []*broker.Grant
	for _, g := range all {
		if bytes.Compare(place(g), after) <= 0 || !wanted(q, g) {
			continue
		}
		if len(page) == q.Limit {
			return page, base64.RawURLEncoding.EncodeToString(place(page[len(page)-1])), nil
		}
		page = append(page, cloneGrant(g))
	}
	return page, "", nil
}

// place is where a grant stands in the order of the store.
func place(g *broker.Grant) []byte {
	return append([]byte(g.Expires.Format("20060102")), g.ID().Bytes()...)
}

func wanted(q broker.GrantQuery, g *broker.Grant) bool {
	if !q.LiveAt.IsZero() && !g.Expires.After(q.LiveAt) || !q.Presenter.IsZero() && g.Presenter() != q.Presenter {
		return false
	}
	if q.Match == nil {
		return true
	}
	shown := cloneGrant(g)
	defer func() { *shown = broker.Grant{} }() // whoever keeps it has nothing
	return q.Match(shown)
}

// Observe implements broker.Store.
func (m *Mem) Observe(ctx context.Context, observations ...broker.Observation) error {
	for _, o := range observations {
		if err := validObservation(o); err != nil {
			return err
		}
	}
	return m.write(ctx, false, func() error {
		m.d.mu.Lock()
		defer m.d.mu.Unlock()
		for _, o := range observations {
			if o.Value == nil {
				delete(m.d.observed, o.Key)
			} else {
				m.d.observed[o.Key] = append([]byte{}, o.Value...)
			}
		}
		return nil
	})
}

func validObservation(o broker.Observation) error {
	printable := strings.IndexFunc(o.Key, func(r rune) bool { return r < ' ' || r > '~' }) < 0
	if o.Key == "" || len(o.Key) > 512 || !printable || len(o.Value) > 64<<10 {
		return fmt.Errorf("malformed observation %q with %d bytes", o.Key, len(o.Value))
	}
	return nil
}

// Observed implements broker.Store.
func (m *Mem) Observed(ctx context.Context, prefix string) iter.Seq2[broker.Observation, error] {
	return func(yield func(broker.Observation, error) bool) {
		if err := m.live(ctx); err != nil {
			yield(broker.Observation{}, err)
			return
		}
		m.d.mu.Lock()
		var all []broker.Observation
		for _, k := range slices.Sorted(maps.Keys(m.d.observed)) {
			if strings.HasPrefix(k, prefix) {
				all = append(all, broker.Observation{Key: k, Value: append([]byte{}, m.d.observed[k]...)})
			}
		}
		m.d.mu.Unlock()
		for _, o := range all {
			if !yield(o, nil) {
				return
			}
		}
	}
}

// Prune implements broker.Store.
func (m *Mem) Prune(ctx context.Context, p broker.Pruning) (report broker.PruneReport, err error) {
	err = m.write(ctx, true, func() error {
		m.d.mu.Lock()
		defer m.d.mu.Unlock()
		report, err = m.d.prune(p)
		return err
	})
	return report, err
}

func (d *memory) prune(p broker.Pruning) (report broker.PruneReport, err error) {
	if p.Horizon > d.head.Seq {
		return report, fmt.Errorf("pruning: horizon %d is beyond the head %d", p.Horizon, d.head.Seq)
	}
	var log []memEntry
	horizon := max(p.Horizon, d.horizon.Seq)
	for _, e := range d.log {
		if e.at.Seq == horizon {
			d.horizon = e.at
		}
		switch {
		case e.at.Seq <= horizon && (e.dropped || p.Keep == nil || !p.Keep(cloneRecord(e.record))):
			if !e.dropped {
				report.Records++
			}
			continue
		case e.at.Seq > horizon && !e.dropped && slices.Contains(p.Drop, e.at.Seq):
			report.Records++
			e = memEntry{at: e.at, dropped: true}
		}
		log = append(log, e)
	}
	d.log = log
	report.Horizon = d.horizon
	for id, g := range d.grants {
		day := g.Expires.Truncate(24 * time.Hour)
		if !p.GrantsExpiredBefore.IsZero() && !day.Add(24*time.Hour).After(p.GrantsExpiredBefore) {
			delete(d.grants, id)
			report.Grants++
		}
	}
	for _, r := range p.Observations {
		for k := range d.observed {
			if k >= r.From && k < r.Until {
				delete(d.observed, k)
				report.Observations++
			}
		}
	}
	return report, nil
}

// Close implements broker.Store.
func (m *Mem) Close() error {
	m.once.Do(func() { close(m.done) })
	m.d.mu.Lock()
	defer m.d.mu.Unlock()
	for m.d.busy {
		m.d.free.Wait()
	}
	return nil
}

func cloneGrant(g *broker.Grant) *broker.Grant {
	c := *g
	c.Lineage = slices.Clone(g.Lineage)
	c.Scopes = slices.Clone(g.Scopes)
	return &c
}

func cloneRecord(r broker.Record) broker.Record {
	switch {
	case r.Revocation != nil:
		r.Revocation = &feed.Revocation{Selectors: slices.Clone(r.Revocation.Selectors)}
	case r.Lift != nil:
		r.Lift = &feed.Lift{Lock: r.Lift.Lock}
	case r.Key != nil:
		k := *r.Key
		k.DER, k.Signature, k.Certificates = bytes.Clone(k.DER), bytes.Clone(k.Signature), slices.Clone(k.Certificates)
		r.Key = &k
	case r.Era != nil:
		r.Era = &feed.Era{Era: r.Era.Era}
	}
	r.Details.SVIDExpires = maps.Clone(r.Details.SVIDExpires)
	return r
}
