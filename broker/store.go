package broker

import (
	"context"
	"errors"
	"iter"
	"time"

	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// A Store keeps the event log, the grants and what was observed. All of its methods
// may be called at once. A method that returns nil has made its effect durable: it
// survives kill -9 and power loss.
//
// An error that wraps ErrStoreFull means that nothing was written and the store
// still works. Any other failed write has an unknown outcome: the store then closes
// itself, every later call returns ErrStoreClosed, and whoever owns it opens it again
// and looks. It never guesses.
type Store interface {
	// Issue records a grant if admit agrees at the moment of commit. The grant was
	// made at g.Position; admit gets the records that the log has beyond it, oldest
	// first (usually none), and refuses by returning an error, which Issue then
	// returns as it is, and nothing is written. If the grant's position is not on
	// the log, Issue returns ErrOffLog. Admit must be pure and quick: it runs while
	// others wait, perhaps more than once.
	Issue(ctx context.Context, g *Grant, admit func(newer []Record) error) error

	// Append seals the record that next makes behind the head, overtaking every
	// Issue that still waits. Next is pure, is given the head, and may return an
	// error, which Append returns as it is.
	Append(ctx context.Context, next func(head feed.Position) (Record, error)) (Record, error)

	// Events yields the records after a number, oldest first, then waits for more
	// until ctx ends, which ends the sequence with ctx.Err(). What a pruning dropped
	// is skipped. Records appended by others on a shared store are seen too.
	Events(ctx context.Context, after uint64) iter.Seq2[Record, error]

	// State returns the head and the horizon, as of now.
	State(ctx context.Context) (StoreState, error)

	// Grant returns one grant, expired ones too while they are kept, or ErrNotFound.
	Grant(ctx context.Context, id token.GrantID) (*Grant, error)

	// Grants returns a page of grants in the order of their IDs' bytes within a day
	// of expiry, and the token of the next page, empty at the end. The order is
	// stable: paging never skips or repeats a grant that exists throughout.
	Grants(ctx context.Context, q GrantQuery) ([]*Grant, string, error)

	// Observe keeps observations by key, a newer one in place of an older; a nil
	// value deletes. With none it is still a durable write: a proof, begun after the
	// call, that this process owns the store. Calls share one write.
	Observe(ctx context.Context, observations ...Observation) error

	// Observed yields all observations whose key begins with the prefix, in order.
	Observed(ctx context.Context, prefix string) iter.Seq2[Observation, error]

	// Prune drops what p names, in one durable step or several small ones.
	Prune(ctx context.Context, p Pruning) (PruneReport, error)

	// Close ends the store, once every call under way has returned. Safe twice.
	Close() error
}

// StoreState is where the log of a store is.
type StoreState struct {
	Head feed.Position
	// Horizon is the highest number such that all up to it were dropped or can match
	// no live token; Seq 0 before the first pruning.
	Horizon feed.Position
}

// GrantQuery says which grants to list. The zero value lists all live ones.
type GrantQuery struct {
	// LiveAt keeps those that expire after it; zero: also expired ones.
	LiveAt time.Time
	// Presenter narrows to one presenter by a range scan; zero: all.
	Presenter spiffeid.ID
	// Match keeps those for which it returns true; nil: all. It must not keep the grant.
	Match func(*Grant) bool
	// Limit is the size of a page, at least 1.
	Limit int
	// After is the token of a page, from an earlier answer to the same query. A
	// malformed one is ErrBadPage.
	After string
}

// An Observation is something that was seen and may be forgotten without breaking a
// promise of its own: the roster of verifiers, their receipts, uses of grants.
type Observation struct {
	Key   string // "kind/..." printable, at most 512 bytes
	Value []byte // at most 64 KiB
}

// Pruning says what may go.
type Pruning struct {
	// Horizon: records up to this number may go, but for the locks, keys and eras in
	// Keep. It never moves back.
	Horizon uint64
	// Keep names records at or below the horizon that must stay (standing locks, live keys).
	Keep func(Record) bool
	// Drop names single records above the horizon that can match no live token.
	Drop []uint64
	// GrantsExpiredBefore drops whole days of grants that expired before it; zero: none.
	GrantsExpiredBefore time.Time
	// Observations drops those whose keys are in one of the ranges. The cost is that of
	// what goes, in steps so small that an Append between them doesn't wait.
	Observations []KeyRange
}

// A KeyRange is the keys from From on and before Until.
type KeyRange struct{ From, Until string }

// PruneReport says what went.
type PruneReport struct {
	Records      int
	Grants       int
	Observations int
	// Horizon is the horizon after the pruning.
	Horizon feed.Position
}

// Errors of a store.
var (
	// ErrNotFound: there is no such grant.
	ErrNotFound = errors.New("not found")
	// ErrStoreFull: the disk is full; nothing was written, and the store works again
	// by itself once there is room. Appends go on: room is reserved for them.
	ErrStoreFull = errors.New("store is full")
	// ErrStoreClosed: the store was closed, or closed itself after a write whose
	// outcome is unknown.
	ErrStoreClosed = errors.New("store is closed")
	// ErrOffLog: a grant's position is not on the log.
	ErrOffLog = errors.New("position is not on the log")
	// ErrBadPage: a malformed page token.
	ErrBadPage = errors.New("malformed page token")
)
