package boltstore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/proto/feed"
	"go.etcd.io/bbolt"
)

// maxProblems bounds what a report lists; the rest is counted.
const maxProblems = 100

// A Report says what Check found.
type Report struct {
	Schema       uint32        `json:"schema"`
	Head         feed.Position `json:"head"`
	Horizon      feed.Position `json:"horizon"`
	Records      int           `json:"records"`
	Dropped      int           `json:"dropped"` // above the horizon, by number
	Grants       int           `json:"grants"`
	Observations int           `json:"observations"`
	// Backup is when the file was made as a backup; zero for a store.
	Backup time.Time `json:"backup,omitzero"`
	// Problems are what is wrong, at most 100 of them; More counts the others.
	Problems []string `json:"problems,omitempty"`
	More     int      `json:"more,omitempty"`
}

// Good reports whether nothing was found to be wrong.
func (r *Report) Good() bool { return len(r.Problems) == 0 && r.More == 0 }

// Check reads a whole store that nobody serves and verifies it: the pages; that the
// log has no gap above its horizon and its running hashes follow each other; that
// each record's private part is the one that was sealed; that each grant stands
// where it belongs, was issued at a position of the log, and has a recorded parent
// that outlives it. The error wraps ErrCorrupt if there are problems, which are in
// the report, and says otherwise why the store could not be read.
func Check(ctx context.Context, path string) (Report, error) {
	if err := inspect(path, defaultLockTimeout); err != nil {
		return Report{}, fmt.Errorf("checking store: %w", err)
	}
	var report Report
	err := readOnly(path, defaultLockTimeout, func(tx *bbolt.Tx) (err error) {
		for err := range tx.Check() {
			report.problem("pages: %v", err)
		}
		return report.check(ctx, tx)
	})
	if err != nil {
		return report, fmt.Errorf("checking store: %w", err)
	}
	return report, report.err()
}

// Check does the same for an open store, but for the pages. While it reads, the file
// may not be able to grow beyond the next power of two.
func (s *Store) Check(ctx context.Context) (Report, error) {
	var report Report
	err := s.view(ctx, func(tx *bbolt.Tx) error { return report.check(ctx, tx) })
	if err != nil {
		return report, fmt.Errorf("checking store: %w", err)
	}
	return report, report.err()
}

func (r *Report) err() error {
	if len(r.Problems) == 0 {
		return nil
	}
	return fmt.Errorf("%w: %d problems, the first: %s", ErrCorrupt, len(r.Problems)+r.More, r.Problems[0])
}

func (r *Report) problem(format string, args ...any) {
	if len(r.Problems) == maxProblems {
		r.More++
		return
	}
	r.Problems = append(r.Problems, fmt.Sprintf(format, args...))
}

func (r *Report) check(ctx context.Context, tx *bbolt.Tx) error {
	st, err := readState(tx)
	if err != nil {
		return err
	}
	r.Schema, r.Head, r.Horizon, r.Backup = schemaVersion, st.head, st.horizon, backupMade(tx)
	r.checkLog(tx.Bucket(bucketLog), st)
	t := &txn{tx: tx, state: st}
	err = tx.Bucket(bucketGrants).ForEach(func(day, v []byte) error {
		if _, err := dayEnd(day); err != nil || v != nil {
			r.problem("grants: %q is no day", day)
			return nil
		}
		r.checkDay(t, day)
		return ctx.Err()
	})
	if err != nil {
		return err
	}
	return tx.Bucket(bucketObserved).ForEach(func(k, v []byte) error {
		r.Observations++
		if err := validateObservation(broker.Observation{Key: string(k), Value: v}); err != nil {
			r.problem("%v", err)
		}
		return nil
	})
}

func (r *Report) checkLog(log *bbolt.Bucket, st state) {
	last := st.horizon
	c := log.Cursor()
	for k, v := c.First(); k != nil; k, v = c.Next() {
		e, err := decodeEntry(v)
		if err != nil {
			r.problem("record %x: %v", k, err)
			continue
		}
		if !bytes.Equal(k, logKey(e.position.Seq)) {
			r.problem("record %x says that it is number %d", k, e.position.Seq)
			continue
		}
		if e.position.Seq <= st.horizon.Seq {
			r.checkKept(e)
			continue
		}
		if e.position.Seq != last.Seq+1 {
			r.problem("record %d follows record %d", e.position.Seq, last.Seq)
		} else {
			r.checkNext(e, last)
		}
		last = e.position
	}
	if last != st.head {
		r.problem("the log ends at %s, not at its head %s", last, st.head)
	}
}

// checkKept looks at a record below the horizon, whose predecessors may be gone.
func (r *Report) checkKept(e entry) {
	r.Records++
	switch {
	case e.dropped:
		r.problem("dropped record %d is below the horizon", e.position.Seq)
	case e.record.Private != e.record.Details.Digest():
		r.problem("private digest of record %d does not match its details", e.position.Seq)
	}
}

func (r *Report) checkNext(e entry, last feed.Position) {
	if e.dropped {
		r.Dropped++
		return
	}
	r.Records++
	if err := e.record.Validate(); err != nil {
		r.problem("record %d: %v", e.position.Seq, err)
	}
	if err := verifyRecord(e.record, last.Sum); err != nil {
		r.problem("%v", err)
	}
	era := last.Era
	if e.record.Era != nil {
		era = e.record.Era.Era
		if era <= last.Era {
			r.problem("record %d: era %s does not follow era %s", e.position.Seq, era, last.Era)
		}
	}
	if e.position.Era != era {
		r.problem("record %d is of era %s in a log of era %s", e.position.Seq, e.position.Era, era)
	}
}

func (r *Report) checkDay(t *txn, day []byte) {
	c := t.tx.Bucket(bucketGrants).Bucket(day).Cursor()
	for k, v := c.First(); k != nil; k, v = c.Next() {
		r.Grants++
		g, err := grantAt(day, k, v)
		if err != nil {
			r.problem("%v", err)
			continue
		}
		if at := g.Position; at.Seq > t.horizon.Seq {
			if on, err := t.onLog(at); err != nil || !on {
				r.problem("grant %s was issued at %s, which is not on the log", g.ID(), at)
			}
		}
		if g.Derived() {
			r.checkParent(t, g)
		}
	}
}

// checkParent: a parent expires no earlier than its child, so it is never pruned
// before it.
func (r *Report) checkParent(t *txn, g *broker.Grant) {
	grants := t.tx.Bucket(bucketGrants)
	value, day := findGrant(grants, g.Parent())
	if value == nil {
		value, day = searchGrant(grants, g.Parent())
	}
	if value == nil {
		r.problem("parent %s of grant %s is not in the records", g.Parent(), g.ID())
		return
	}
	parent, err := grantAt([]byte(day), g.Parent().Bytes(), value)
	if errors.Is(err, ErrCorrupt) {
		return // it is listed under its own number
	}
	if g.Expires.After(parent.Expires) {
		r.problem("grant %s expires at %s, after its parent %s at %s", g.ID(), g.Expires.Format(time.RFC3339), g.Parent(), parent.Expires.Format(time.RFC3339))
	}
	depth := len(g.Lineage) - 1
	if len(parent.Lineage) != depth {
		r.problem("grant %s is not one deeper than its parent %s", g.ID(), g.Parent())
		return
	}
	for i, m := range parent.Lineage {
		if g.Lineage[i] != m {
			r.problem("member %d of the lineage of grant %s is not its parent's", i+1, g.ID())
		}
	}
}
