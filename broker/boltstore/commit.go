package boltstore

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	"go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
)

// maxBatch bounds the ops of one tier in a transaction, and so what an append waits for.
const maxBatch = 512

// A tier is how far into the reserve an operation may go.
type tier int

const (
	tierAppend  tier = iota // appends, proofs, pruning: all of it
	tierObserve             // half of it
	tierIssue               // none of it
	tiers
)

// An op is one call that waits for a commit.
type op struct {
	ctx  context.Context
	tier tier
	// bytes is about how much it writes.
	bytes int
	// alone: it has a transaction of its own, which its error undoes.
	alone bool
	// observes: it counts as an observation.
	observes bool
	// apply is run in a transaction, perhaps more than once. Having failed it has
	// changed nothing, unless it is alone.
	apply func(*txn) error

	taken, gone bool // under Store.mu
	err         error
	done        chan struct{}
}

// A txn is what ops see of a transaction.
type txn struct {
	tx *bbolt.Tx
	state
}

func (t *txn) log() *bbolt.Bucket { return t.tx.Bucket(bucketLog) }

// do queues an op and waits for its outcome.
func (s *Store) do(ctx context.Context, o *op) error {
	o.ctx, o.done = ctx, make(chan struct{})
	if err := ctx.Err(); err != nil {
		return err
	}
	s.mu.Lock()
	if s.closing {
		s.mu.Unlock()
		return broker.ErrStoreClosed
	}
	s.queue[o.tier] = append(s.queue[o.tier], o)
	s.queued.Signal()
	s.mu.Unlock()
	select {
	case <-o.done:
		return o.err
	case <-ctx.Done():
	}
	s.mu.Lock()
	taken := o.taken
	o.gone = !taken
	s.mu.Unlock()
	if !taken {
		return ctx.Err()
	}
	<-o.done // it is in a commit: say what became of it
	return o.err
}

// run is the committer: the one goroutine that writes.
func (s *Store) run() {
	defer close(s.stopped)
	for {
		batch := s.next()
		if batch == nil {
			return
		}
		s.commit(batch)
		for _, o := range batch {
			close(o.done)
		}
	}
}

// next waits for ops and takes those of one transaction, in the order in which they
// are applied; nil when the store is closed and nothing waits.
func (s *Store) next() []*op {
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		var batch []*op
		for t := range s.queue {
			batch = s.take(t, batch)
		}
		if batch != nil {
			return batch
		}
		if s.closing && s.empty() {
			return nil
		}
		s.queued.Wait()
	}
}

func (s *Store) empty() bool {
	for _, q := range s.queue {
		if len(q) > 0 {
			return false
		}
	}
	return true
}

// take moves up to maxBatch ops of a tier into the batch: no tier starves another.
func (s *Store) take(t int, batch []*op) []*op {
	q := s.queue[t]
	for enough := len(batch) + maxBatch; len(q) > 0 && len(batch) < enough; {
		o := q[0]
		if o.alone && len(batch) > 0 || len(batch) > 0 && batch[0].alone {
			break
		}
		q = q[1:]
		if o.gone || o.ctx.Err() != nil {
			continue // its caller has been told by its context
		}
		o.taken = true
		batch = append(batch, o)
	}
	if len(q) == 0 {
		q = nil
	}
	s.queue[t] = q
	return batch
}

// commit writes a batch and sets the error of each op. On a full disk, the tiers
// are tried one by one, so that those with a claim on the reserve get through.
func (s *Store) commit(batch []*op) {
	if batch = s.fitting(batch); len(batch) == 0 {
		return
	}
	err := s.write(batch)
	if isFull(err) && (s.room.behind(s.room.needOf(batch), s.keep(lowest(batch))) == nil || s.backup.giveWay("the store needs the room that it holds")) {
		err = s.write(batch) // what was free did not fit; now it does
	}
	if !isFull(err) {
		settle(batch, err)
		return
	}
	for t := range tiers {
		var group []*op
		for _, o := range batch {
			if o.tier == t {
				group = append(group, o)
			}
		}
		if len(group) == 0 {
			continue
		}
		err := s.write(group)
		if isFull(err) {
			err = fmt.Errorf("%w: %w", broker.ErrStoreFull, err)
		}
		settle(group, err)
	}
}

// settle gives ops that have no error of their own that of their transaction.
func settle(ops []*op, err error) {
	if err == nil {
		return
	}
	for _, o := range ops {
		o.err = err
	}
}

// lowest is the tier that leaves the most of the reserve.
func lowest(ops []*op) tier {
	t := tierAppend
	for _, o := range ops {
		t = max(t, o.tier)
	}
	return t
}

// keep is how much of the reserve a tier leaves to those above it.
func (s *Store) keep(t tier) int64 {
	return []int64{0, s.room.reserve / 2, s.room.reserve}[t]
}

// fitting makes room and returns the ops for which there is some. It is an estimate
// that spares a full disk the cost of transactions that come to nothing; the exact
// bound is in write.
func (s *Store) fitting(batch []*op) []*op {
	need := s.room.needOf(batch)
	err := s.room.ensure(need, s.room.reserve)
	if err == nil {
		return batch
	}
	var fit []*op
	for _, o := range batch {
		if o.tier == tierAppend || s.room.left(s.keep(o.tier)) >= need {
			fit = append(fit, o)
		} else {
			o.err = fmt.Errorf("%w: %w", broker.ErrStoreFull, err)
		}
	}
	return fit
}

// write runs one transaction. It returns nil, an error that isFull when nothing was
// written, or the reason for which the store is now closed.
func (s *Store) write(ops []*op) error {
	if err := s.owned(); err != nil {
		return s.fail(err)
	}
	s.room.limit(s.keep(lowest(ops)))

	s.mu.Lock()
	before := s.state
	s.mu.Unlock()
	var after state
	started, wrote := time.Now(), s.writeTime()
	update := func() error {
		return s.db.Update(func(tx *bbolt.Tx) error {
			t := &txn{tx: tx, state: before}
			for _, o := range ops {
				if o.err = o.apply(t); o.err != nil && o.alone {
					return errUndo
				}
			}
			after = t.state
			if err := bumpCommits(tx); err != nil {
				return err
			}
			return writeState(tx.Bucket(bucketMeta), after)
		})
	}
	watch := s.backup.watch()
	err := s.faulty(update)
	watch()
	if errors.Is(err, errUndo) {
		return nil // the op has its error
	}
	s.report(ops, started, wrote, err)
	if err != nil {
		return s.judge(err, before)
	}
	s.publish(after)
	if err := s.room.refresh(); err != nil {
		return s.fail(err)
	}
	if s.room.pending > maxPinned {
		s.backup.giveWay(fmt.Sprintf("more than %d MiB were written meanwhile", maxPinned>>20))
	}
	return nil
}

// errUndo undoes the transaction of an op that is alone and failed.
var errUndo = errors.New("undo")

func (s *Store) faulty(update func() error) error {
	if s.cfg.fault != nil {
		return s.cfg.fault(update)
	}
	return update()
}

// owned makes sure that what is written can be found again: a file that was moved
// away or replaced still takes writes, and loses them.
func (s *Store) owned() error {
	info, err := os.Stat(s.cfg.Path)
	if err != nil {
		return fmt.Errorf("store's file is gone: %w", err)
	}
	if !os.SameFile(info, s.identity) {
		return fmt.Errorf("%s was replaced by another file", s.cfg.Path)
	}
	return nil
}

// judge looks at what a failed transaction left. A full disk is harmless if nothing
// was committed, and that can be read; any other failure ends the store.
func (s *Store) judge(cause error, before state) error {
	if !isFull(cause) {
		return s.fail(cause)
	}
	var now state
	commits, err := s.commits(&now)
	if err != nil || now != before || commits != s.committed {
		return s.fail(errors.Join(cause, err))
	}
	return cause
}

// commits reads the counter and the state of the last transaction.
func (s *Store) commits(st *state) (n uint64, err error) {
	err = s.db.View(func(tx *bbolt.Tx) error {
		n = commitsOf(tx)
		var err error
		*st, err = readState(tx)
		return err
	})
	return n, err
}

// fail closes the store after a write whose outcome is unknown.
func (s *Store) fail(cause error) error {
	s.cfg.Log.Error("store closes itself: the outcome of a write is unknown", "path", s.cfg.Path, "error", cause)
	s.shut()
	if isFull(cause) {
		cause = hideFull{cause}
	}
	return fmt.Errorf("%w: it closed itself, outcome of the write unknown: %w", broker.ErrStoreClosed, cause)
}

// hideFull keeps the text of an error and lets no one mistake it for a full disk,
// after which nothing would have been written.
type hideFull struct{ error }

// publish makes a commit visible.
func (s *Store) publish(after state) {
	s.committed++
	s.mu.Lock()
	defer s.mu.Unlock()
	grown := after.head != s.state.head
	s.state = after
	if grown {
		close(s.news)
		s.news = make(chan struct{})
	}
}

// writeTime is the time that all transactions have spent writing and syncing.
func (s *Store) writeTime() time.Duration {
	stats := s.db.Stats()
	return stats.TxStats.GetWriteTime()
}

func (s *Store) report(ops []*op, started time.Time, wrote time.Duration, err error) {
	if s.cfg.OnCommit == nil {
		return
	}
	c := Commit{Took: time.Since(started), Wrote: s.writeTime() - wrote, Err: err}
	for _, o := range ops {
		switch {
		case o.tier == tierIssue:
			c.Issues++
		case o.observes:
			c.Observations++
		case !o.alone:
			c.Appends++
		}
	}
	s.cfg.OnCommit(c)
}

// view reads in a short transaction: a long one would keep the file from growing.
func (s *Store) view(ctx context.Context, f func(*bbolt.Tx) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	s.mu.Lock()
	closed := s.closing
	s.mu.Unlock()
	if closed {
		return broker.ErrStoreClosed
	}
	err := s.db.View(f)
	if errors.Is(err, berrors.ErrDatabaseNotOpen) {
		return broker.ErrStoreClosed
	}
	return err
}
