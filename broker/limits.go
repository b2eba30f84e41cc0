package broker

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Limits are what policy lets one identity have of this broker; zero is no limit of policy's.
type Limits struct {
	IssuePerSecond int // credentials, issued and exchanged
	LiveGrants     int // on record, neither expired nor revoked
	// GiveBacksPerMinute is of credentials given back early; zero is the broker's default.
	GiveBacksPerMinute int
}

// minIssueBurst is how many credentials an identity may get at once, whatever its rate:
// a workload that starts needs a few. Else the burst is one second's worth.
const minIssueBurst = 5

// issuers counts what each identity was issued, by elapsed time. A count costs the same
// whatever the number of grants. An identity takes at most one tally entry for each
// second of the hard cap, and nothing a minute after its last grant has expired.
type issuers struct {
	mu   sync.Mutex
	byID map[spiffeid.ID]*issuer
}

// issuer is what one identity has: grants that have not expired, and those of them that
// were found revoked as of a position of the log.
type issuer struct {
	rate    budget
	burst   allowance // of its last draw
	granted tally
	revoked tally
	asOf    uint64

	giveBacks     budget
	giveBackBurst allowance // of its last draw
}

// A tally counts what ends, by the second in which it does.
type tally struct {
	ends []ending // the earliest first
	n    int
}

type ending struct {
	at int64 // seconds of elapsed time
	n  int
}

func (t *tally) add(at int64, n int) {
	i, found := slices.BinarySearchFunc(t.ends, at, func(e ending, at int64) int { return cmp.Compare(e.at, at) })
	if !found {
		if n < 0 {
			return // it has ended meanwhile
		}
		t.ends = slices.Insert(t.ends, i, ending{at: at})
	}
	t.ends[i].n += n
	t.n += n
	if t.ends[i].n == 0 {
		t.ends = slices.Delete(t.ends, i, i+1)
	}
}

// expire forgets what has ended.
func (t *tally) expire(now feed.Instant) {
	gone := 0
	for ; gone < len(t.ends) && t.ends[gone].at <= seconds(now); gone++ {
		t.n -= t.ends[gone].n
	}
	t.ends = slices.Delete(t.ends, 0, gone)
}

// seconds rounds down: what is counted ends a second late rather than early.
func seconds(at feed.Instant) int64 { return int64(at) / int64(time.Second) }

func (i *issuer) live(now feed.Instant) int {
	i.granted.expire(now)
	i.revoked.expire(now)
	return i.granted.n - i.revoked.n
}

// A slot is a grant that is counted before it is recorded, so that calls at once don't
// exceed a limit together.
type slot struct {
	all *issuers
	id  spiffeid.ID
	at  int64
}

// release takes back what was not recorded.
func (s slot) release() {
	s.all.mu.Lock()
	defer s.all.mu.Unlock()
	if i := s.all.byID[s.id]; i != nil {
		i.granted.add(s.at, -1)
	}
}

// slotFor counts a grant of a life against an identity's limits, or refuses.
func (b *Broker) slotFor(ctx context.Context, id spiffeid.ID, limits Limits, life time.Duration) (slot, error) {
	s, err := b.issuers.draw(id, limits, life, b.cfg.Boot())
	if err == nil {
		return s, nil
	}
	head := b.Head().Seq
	if !errors.Is(err, ErrLiveLimited) || !b.issuers.outdated(id, head) {
		return slot{}, err
	}
	// Revoked grants are not live, but a revocation is one record and visits no grant:
	// only who stands at the limit is counted anew, once for each new head.
	if _, err, _ := b.flight.Do("revoked "+id.String(), func() (any, error) { return nil, b.countRevoked(context.WithoutCancel(ctx), id, head) }); err != nil {
		return slot{}, storeRefusal(err)
	}
	return b.issuers.place(id, limits, life, b.cfg.Boot())
}

// draw takes from the rate, and a place among the live grants.
func (all *issuers) draw(id spiffeid.ID, limits Limits, life time.Duration, now feed.Instant) (slot, error) {
	if limits.IssuePerSecond > 0 {
		rate := float64(limits.IssuePerSecond)
		a := allowance{burst: max(rate, minIssueBurst), perSecond: rate}
		all.mu.Lock()
		i := all.issuer(id)
		i.burst = a
		ok := i.rate.draw(a, 1, now)
		wait := time.Duration((i.rate.drawn + 1 - a.burst) / rate * float64(time.Second))
		all.mu.Unlock()
		if !ok {
			return slot{}, limited(ErrRateLimited, limits.IssuePerSecond, "credentials a second", wait)
		}
	}
	return all.place(id, limits, life, now)
}

func (all *issuers) place(id spiffeid.ID, limits Limits, life time.Duration, now feed.Instant) (slot, error) {
	all.mu.Lock()
	defer all.mu.Unlock()
	i := all.issuer(id)
	if limits.LiveGrants > 0 && i.live(now) >= limits.LiveGrants {
		wait := time.Second
		if len(i.granted.ends) > 0 {
			wait = feed.Instant(i.granted.ends[0].at * int64(time.Second)).Sub(now)
		}
		return slot{}, limited(ErrLiveLimited, limits.LiveGrants, "live grants", wait)
	}
	s := slot{all, id, seconds(now.Add(life)) + 1}
	i.granted.expire(now)
	i.granted.add(s.at, 1)
	return s, nil
}

// retryAfter is the metadata key that says how long to wait, as a Go duration.
const retryAfter = "retry_after"

func limited(r *Refusal, limit int, of string, wait time.Duration) *Refusal {
	return r.because("policy lets this identity have %d %s", limit, of).with("limit", strconv.Itoa(limit)).with(retryAfter, roundUp(wait).String())
}

// roundUp makes whole milliseconds of a wait, at least one.
func roundUp(wait time.Duration) time.Duration {
	wait = max(wait, time.Millisecond)
	if rest := wait % time.Millisecond; rest > 0 {
		wait += time.Millisecond - rest
	}
	return wait
}

// issuer returns an identity's; the caller holds mu.
func (all *issuers) issuer(id spiffeid.ID) *issuer {
	i := all.byID[id]
	if i == nil {
		if all.byID == nil {
			all.byID = map[spiffeid.ID]*issuer{}
		}
		i = &issuer{}
		all.byID[id] = i
	}
	return i
}

// outdated reports whether records came since an identity's revoked grants were counted.
func (all *issuers) outdated(id spiffeid.ID, head uint64) bool {
	all.mu.Lock()
	defer all.mu.Unlock()
	return all.issuer(id).asOf < head
}

// tidy forgets identities that have nothing live and their whole allowance.
func (all *issuers) tidy(now feed.Instant) {
	all.mu.Lock()
	defer all.mu.Unlock()
	maps.DeleteFunc(all.byID, func(_ spiffeid.ID, i *issuer) bool {
		i.live(now)
		return i.granted.n == 0 && i.rate.full(i.burst, now) && i.giveBacks.full(i.giveBackBurst, now)
	})
}

// countRevoked finds which of an identity's grants are revoked, by a scan of its own
// grants alone.
func (b *Broker) countRevoked(ctx context.Context, id spiffeid.ID, head uint64) error {
	now, boot := b.cfg.Now(), b.cfg.Boot()
	var revoked tally
	err := b.visitLive(ctx, GrantQuery{Presenter: id, LiveAt: now}, func(g *Grant) {
		if state, _ := b.GrantState(g); state == GrantRevoked {
			revoked.add(seconds(boot.Add(g.Expires.Sub(now))), 1)
		}
	})
	if err != nil {
		return err
	}
	b.issuers.mu.Lock()
	defer b.issuers.mu.Unlock()
	i := b.issuers.issuer(id)
	i.revoked, i.asOf = revoked, head
	return nil
}

// loadIssuers counts what is live on record, by one scan. On the way it notes what was
// issued later than our clock now says: it was set back since, and an SVID was valid, so
// its NotBefore past, when it got a credential.
func (b *Broker) loadIssuers(ctx context.Context) error {
	now, boot := b.cfg.Now(), b.cfg.Boot()
	err := b.visitLive(ctx, GrantQuery{LiveAt: now}, func(g *Grant) {
		at := seconds(boot.Add(g.Expires.Sub(now))) + 1
		b.issuers.mu.Lock()
		b.issuers.issuer(g.Presenter()).granted.add(at, 1)
		b.issuers.mu.Unlock()
		if g.IssuedAt.After(now) {
			b.seen.noteNotBefore(g.Presenter(), g.IssuedAt)
		}
	})
	if err != nil {
		return fmt.Errorf("counting live grants: %w", err)
	}
	return nil
}

// visitLive calls visit with each grant of a query, of which it may keep nothing.
func (b *Broker) visitLive(ctx context.Context, q GrantQuery, visit func(*Grant)) error {
	q.Limit = 1
	q.Match = func(g *Grant) bool { visit(g); return false }
	_, _, err := b.cfg.Store.Grants(ctx, q)
	return err
}
