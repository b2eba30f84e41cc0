package broker

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/singleflight"
)

// A Use is a verifier's aggregate of one grant, one peer, one outcome and one head. It
// is that verifier's word.
type Use struct {
	Grant       string
	Fingerprint []byte // of the token; none: not said
	Key         string // that signed it
	Peer        string
	Address     string
	Accepted    bool
	Reason      string // of a refusal
	Count       uint64
	First, Last time.Time // by the verifier's clock
	Head        uint64    // that they were judged at
	Era         string    // of the head
	// Of a relay: the SPIFFE ID and the instance of the verifier behind it that saw them,
	// by its word.
	Claimed, ClaimedInstance string
}

// A UseReport is what a verifier saw since its last one.
type UseReport struct {
	// Number counts the reports of an instance: one that comes again is known by it.
	// 0: it is not said, and a repetition counts twice.
	Number uint64
	Uses   []Use
	// Dropped counts the uses that the verifier had no room for.
	Dropped uint64
}

// storedUses is a use report as the store keeps it.
type storedUses struct {
	Verifier string      `json:"verifier"`
	Instance string      `json:"instance"`
	At       time.Time   `json:"at"` // by the broker's clock
	Dropped  uint64      `json:"dropped,omitempty"`
	Uses     []storedUse `json:"uses,omitempty"`
}

// storedUse is a Use with short names and milliseconds since 1970: there are many of
// them, and the largest report that a verifier makes must fit into an observation.
type storedUse struct {
	Grant       string `json:"g"`
	Fingerprint []byte `json:"f,omitempty"`
	Key         string `json:"k,omitempty"`
	Peer        string `json:"p,omitempty"`
	Address     string `json:"a,omitempty"`
	Reason      string `json:"r,omitempty"` // "": accepted
	Count       uint64 `json:"n"`
	First       int64  `json:"b"`
	Last        int64  `json:"l"`
	Head        uint64 `json:"h"`
	Era         string `json:"e,omitempty"`
	Claimed     string `json:"c,omitempty"`
	Instance    string `json:"i,omitempty"`
}

func storeUse(u Use) storedUse {
	return storedUse{u.Grant, u.Fingerprint, u.Key, u.Peer, u.Address, u.Reason, u.Count, u.First.UnixMilli(), u.Last.UnixMilli(), u.Head, u.Era, u.Claimed, u.ClaimedInstance}
}

func (s storedUse) use() Use {
	return Use{
		s.Grant, s.Fingerprint, s.Key, s.Peer, s.Address, s.Reason == "", s.Reason, s.Count,
		time.UnixMilli(s.First).UTC(), time.UnixMilli(s.Last).UTC(), s.Head, s.Era, s.Claimed, s.Instance,
	}
}

func storeReport(id feed.VerifierID, at time.Time, r UseReport) ([]byte, error) {
	stored := storedUses{Verifier: id.Identity, Instance: id.Instance, At: at, Dropped: r.Dropped}
	for _, u := range r.Uses {
		stored.Uses = append(stored.Uses, storeUse(u))
	}
	return json.Marshal(stored)
}

// What the store keeps of uses:
//
//	uses/DAY/VERIFIER/NUMBER       a report, until its grants go from the records
//	unchecked/DAY/VERIFIER/NUMBER  that the report was not looked at yet
//	flows/HOUR/FLOW                who called what, added up, for a day
//	after/REVOCATION/VERIFIER      uses of what was revoked, as long as its revocation
//
// A report is durable, with its mark, before the verifier is answered; looking at it
// comes later, beside the feed. What is found and the end of the mark are one write: a
// crash in between makes it look again, and nothing is lost or counted twice.
const (
	usesPrefix      = "uses/"
	uncheckedPrefix = "unchecked/"
	flowsPrefix     = "flows/"
	afterPrefix     = "after/"

	dayLayout  = "20060102"
	hourLayout = "2006010215"
)

const (
	maxUses   = 256      // in one report
	maxReport = 64 << 10 // bytes of it in the store; an honest one has fewer by far
	usesKept  = grantsKept
	flowsKept = 24 * time.Hour

	// reportOverhead is charged for a report beside its bytes: its keys, its commit.
	reportOverhead = 512
	// checkedAtOnce bounds the reports whose findings are one write.
	checkedAtOnce = 64
	// maxKnownGrants bounds the grants that are remembered between reports: the same
	// ones come again and again.
	maxKnownGrants = 20_000
	// maxFlows bounds the flows of an hour: each needs a recorded grant.
	maxFlows = 5000
	// maxAfter bounds the verifiers that are listed beside a revocation, maxPeers and
	// maxAddresses what is listed of each.
	maxAfter     = 256
	maxPeers     = 8
	maxAddresses = 16
	// maxNamed bounds the verifiers behind one relay that are told apart: what it says of
	// more counts as its own.
	maxNamed = 16
	// checkAgain spaces attempts out while the store takes nothing.
	checkAgain = time.Second
)

// What one identity may cost, whatever it reports: allowances that fill up again. An
// honest verifier stays far below; a hostile one meets them, which is counted and logged.
var (
	// takenBytes is what is stored and looked at: 160 uses a second.
	takenBytes = allowance{burst: 4 << 20, perSecond: 32 << 10}
	// keptBytes is what stays for 30 days: 64 MiB a day.
	keptBytes = allowance{burst: 16 << 20, perSecond: float64(64<<20) / (24 * 60 * 60)}
	// allKeptBytes is the same for all verifiers together: 1 GiB a day.
	allKeptBytes = allowance{burst: 256 << 20, perSecond: float64(1<<30) / (24 * 60 * 60)}
	// alarmsSaid is how many alarms are told one by one.
	alarmsSaid = allowance{burst: 8, perSecond: 1.0 / 60}
)

// An allowance is a size, and how fast what was drawn from it comes back.
type allowance struct{ burst, perSecond float64 }

// A budget is what is left of an allowance. The zero value is a full one.
type budget struct {
	drawn float64
	at    feed.Instant
}

func (b *budget) draw(a allowance, n float64, now feed.Instant) bool {
	b.drawn, b.at = max(0, b.drawn-now.Sub(b.at).Seconds()*a.perSecond), now
	if b.drawn+n > a.burst {
		return false
	}
	b.drawn += n
	return true
}

// usage is what the broker knows of uses.
type usage struct {
	mu        sync.Mutex
	reporters map[string]*reporter // by identity
	kept      budget
	after     map[afterKey]*UsesAfter
	listed    map[uint64]int // how many of after belong to each revocation
	flows     map[string]map[flowKey]*flow
	counts    UseCounts
	full      bool   // the store takes no reports, and that was said
	flooded   string // the hour that has too many flows, which was said
	unnamed   uint64 // reports without a number
	life      string // random, of this process: names those

	flight singleflight.Group // by place: one report is written once
	wake   chan struct{}      // has an element when there is something to look at

	// checking is held by whoever looks at reports; it guards what follows.
	checking sync.Mutex
	known    map[token.GrantID]*Grant
	// looked holds the reports that were looked at and couldn't be marked so, and whether
	// they are kept: what was said of them is not said again.
	looked map[string]bool
}

// reporter is what one identity has used up.
type reporter struct {
	taken, kept, alarms budget
	limited, unkept     bool   // and that was said
	silent              uint64 // alarms that were counted and not told
	named               map[string]bool
}

type afterKey struct {
	seq               uint64
	verifier, claimed string
}

// UsesAfter is what one verifier reported of credentials that a revocation had killed
// already.
type UsesAfter struct {
	Verifier string `json:"verifier"` // identity, or that of the relay before it
	// Claimed is the SPIFFE ID of the verifier behind that relay, by its word.
	Claimed string `json:"claimed,omitempty"`
	// Refused and AcceptedKnowing are by the head that the verifier judged at, which is
	// at or above the revocation: no clock is in them. The first says that somebody still
	// presents what is revoked, the second that the verifier doesn't do its job.
	Refused         uint64 `json:"refused,omitempty"`
	AcceptedKnowing uint64 `json:"accepted_knowing,omitempty"`
	// AcceptedUnaware is by clocks: the verifier's head was below the revocation, its
	// clock past the time that the broker's clock gave the record. Within the verifier's
	// bound it is what a revocation can't prevent; where clocks differ it is an error
	// either way. Of an aggregate that began before, the last use alone counts.
	AcceptedUnaware uint64    `json:"accepted_unaware,omitempty"`
	LastSeen        time.Time `json:"last_seen"` // by the verifier's clock
	Peers           []string  `json:"peers,omitempty"`
	Addresses       []string  `json:"addresses,omitempty"`
	More            bool      `json:"more,omitempty"` // peers or addresses than listed
}

type flowKey struct{ lineage, audience, verifier, claimed string }

// flow is one way of calling within an hour: a lineage's identities, root first with
// spaces between, at an audience's verifier.
type flow struct {
	Lineage  string    `json:"lineage"`
	Audience string    `json:"audience"`
	Verifier string    `json:"verifier"`
	Claimed  string    `json:"claimed,omitempty"`
	Count    uint64    `json:"count"`
	Last     time.Time `json:"last"`
}

// UseCounts are totals since the process began.
type UseCounts struct {
	Uses uint64 // that were reported
	// Dropped were given up by verifiers for want of room, Limited by this broker because
	// an identity reported too much or the disk is full. Unkept were looked at, and then
	// not kept for lack of allowance.
	Dropped, Limited, Unkept uint64
	// After a revocation, as in UsesAfter.
	Refused, AcceptedKnowing, AcceptedUnaware uint64
	// Unrecorded are uses of what no record holds.
	Unrecorded uint64
}

// UseCounts returns the totals.
func (b *Broker) UseCounts() UseCounts {
	b.uses.mu.Lock()
	defer b.uses.mu.Unlock()
	return b.uses.counts
}

func (u *usage) init() {
	u.reporters = map[string]*reporter{}
	u.after, u.listed = map[afterKey]*UsesAfter{}, map[uint64]int{}
	u.flows = map[string]map[flowKey]*flow{}
	u.known, u.looked = map[token.GrantID]*Grant{}, map[string]bool{}
	u.life = rand.Text()
	u.wake = make(chan struct{}, 1)
	u.wake <- struct{}{} // what an earlier process left
}

// reporter returns an identity's; the caller holds mu.
func (u *usage) reporter(identity string) *reporter {
	r := u.reporters[identity]
	if r == nil {
		r = &reporter{}
		u.reporters[identity] = r
	}
	return r
}

// names returns the SPIFFE ID by which a relay's uses are listed: that of the verifier
// behind it, as long as it doesn't name too many.
func (u *usage) names(relay, claimed string) string {
	if claimed == "" {
		return ""
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	r := u.reporter(relay)
	switch {
	case r.named[claimed]:
		return claimed
	case len(r.named) >= maxNamed:
		return ""
	case r.named == nil:
		r.named = map[string]bool{}
	}
	r.named[claimed] = true
	return claimed
}

// Report keeps a use report: the evidence of an incident. Once it returns, the report
// survives a crash. What is beyond the identity's allowance, or finds the disk full, is
// dropped and counted; a verifier's freshness never hangs on it.
func (f *Follower) Report(ctx context.Context, r UseReport) error {
	if err := f.Check(); err != nil {
		return err
	}
	if len(r.Uses) > maxUses {
		return ErrFeedRejected.because("a use report of more than %d entries", maxUses)
	}
	if len(r.Uses) == 0 && r.Dropped == 0 {
		return nil
	}
	if !f.relay { // it speaks for itself alone, whatever it says
		for i := range r.Uses {
			r.Uses[i].Claimed, r.Uses[i].ClaimedInstance = "", ""
		}
	}
	b := f.b
	now := b.cfg.Now().UTC()
	value, err := storeReport(f.id, now, r)
	if err != nil || len(value) > maxReport { // escapes that swell
		return ErrFeedRejected.because("a use report that can't be kept")
	}
	if !b.uses.take(f.id.Identity, len(value), b.cfg.Boot()) {
		b.limited(ctx, f.id, r)
		return nil
	}
	place := b.uses.reportPlace(f.id, r.Number)
	// A stream that broke may still be at it when the next one repeats the report.
	_, err, _ = b.uses.flight.Do(place, func() (any, error) { return nil, b.keepReport(context.WithoutCancel(ctx), place, now, value, r) })
	return storeRefusal(err)
}

// keepReport writes a report down with its mark, if it isn't there yet.
func (b *Broker) keepReport(ctx context.Context, place string, now time.Time, value []byte, r UseReport) error {
	if known, err := b.reported(ctx, place, now); known || err != nil {
		return err
	}
	place = now.Format(dayLayout) + "/" + place
	err := b.cfg.Store.Observe(ctx, Observation{Key: usesPrefix + place, Value: value}, Observation{Key: uncheckedPrefix + place, Value: []byte{}})
	if errors.Is(err, ErrStoreFull) {
		b.storeFull(ctx, r)
		return nil
	}
	if err != nil {
		return err
	}
	u := &b.uses
	u.mu.Lock()
	u.full = false
	u.counts.Uses += r.total()
	u.counts.Dropped += r.Dropped
	u.mu.Unlock()
	u.poke()
	return nil
}

// total is how many uses a report tells of.
func (r *UseReport) total() (n uint64) {
	for _, use := range r.Uses {
		n += use.Count
	}
	return n
}

// reportPlace is where a report stands within a day. Nobody but the verifier itself can
// make another one with the same name.
func (u *usage) reportPlace(id feed.VerifierID, number uint64) string {
	name := hash(id.Identity + "|" + id.Instance)
	if number > 0 {
		return fmt.Sprintf("%s/%016x", name, number)
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	u.unnamed++
	return fmt.Sprintf("%s/%s-%x", name, u.life, u.unnamed)
}

// hash names what may be longer than a key.
func hash(s string) string {
	sum := sha256.Sum256([]byte(s))
	return hex.EncodeToString(sum[:16])
}

// reported looks for a report that came before, today or yesterday. One of which nothing
// was kept is not found: if its stream broke just then, it counts twice.
func (b *Broker) reported(ctx context.Context, place string, now time.Time) (bool, error) {
	for _, day := range []time.Time{now, now.AddDate(0, 0, -1)} {
		if value, err := b.observation(ctx, usesPrefix+day.Format(dayLayout)+"/"+place); value != nil || err != nil {
			return value != nil, err
		}
	}
	return false, nil
}

// observation returns the value at a key, nil if there is none.
func (b *Broker) observation(ctx context.Context, key string) ([]byte, error) {
	for o, err := range b.cfg.Store.Observed(ctx, key) {
		if err != nil {
			return nil, err
		}
		if o.Key == key {
			return o.Value, nil
		}
		break
	}
	return nil, nil
}

// take draws what a report costs.
func (u *usage) take(identity string, bytes int, now feed.Instant) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.reporter(identity).taken.draw(takenBytes, float64(bytes+reportOverhead), now)
}

// limited counts a report that was dropped for its identity's sake, and says so once
// until the identity has kept to its allowance for a while.
func (b *Broker) limited(ctx context.Context, id feed.VerifierID, r UseReport) {
	b.uses.mu.Lock()
	b.uses.counts.Limited += r.total() + r.Dropped
	from := b.uses.reporter(id.Identity)
	said := from.limited
	from.limited = true
	b.uses.mu.Unlock()
	if !said {
		b.cfg.Log.WarnContext(ctx, "a verifier reports more uses than it may: the excess is dropped", "verifier", id.Identity, "instance", id.Instance)
	}
}

func (b *Broker) storeFull(ctx context.Context, r UseReport) {
	b.uses.mu.Lock()
	b.uses.counts.Limited += r.total() + r.Dropped
	said := b.uses.full
	b.uses.full = true
	b.uses.mu.Unlock()
	if !said {
		b.cfg.Log.ErrorContext(ctx, "the disk is full: use reports are dropped")
	}
}

func (u *usage) poke() {
	select {
	case u.wake <- struct{}{}:
	default:
	}
}

// checkLoop looks at reports as they come.
func (b *Broker) checkLoop(ctx context.Context) {
	failed := false
	for {
		select {
		case <-ctx.Done():
			return
		case <-b.uses.wake:
		}
		err := b.CheckUses(ctx)
		if err == nil || ctx.Err() != nil {
			failed = false
			continue
		}
		if !failed {
			b.cfg.Log.ErrorContext(ctx, "looking at use reports failed; trying on", "err", err)
		}
		failed = true
		select {
		case <-ctx.Done():
			return
		case <-time.After(checkAgain):
			b.uses.poke()
		}
	}
}

// CheckUses looks at every report that was not looked at yet: compares it with the
// records and the revocations, and adds up who calls whom. Run does so by itself; it
// costs one look-up for each grant that isn't remembered, and the feed doesn't wait for it.
func (b *Broker) CheckUses(ctx context.Context) error {
	for {
		if more, err := b.checkSome(ctx); err != nil || !more {
			return err
		}
	}
}

func (b *Broker) checkSome(ctx context.Context) (more bool, err error) {
	b.uses.checking.Lock()
	defer b.uses.checking.Unlock()
	places, err := b.unchecked(ctx)
	if err != nil {
		return false, fmt.Errorf("finding use reports: %w", err)
	}
	if len(places) == 0 {
		return false, nil
	}
	if err := b.check(ctx, places); err != nil {
		return false, fmt.Errorf("looking at use reports: %w", err)
	}
	return true, nil
}

func (b *Broker) unchecked(ctx context.Context) (places []string, err error) {
	for o, err := range b.cfg.Store.Observed(ctx, uncheckedPrefix) {
		if err != nil {
			return nil, err
		}
		if places = append(places, strings.TrimPrefix(o.Key, uncheckedPrefix)); len(places) == checkedAtOnce {
			break
		}
	}
	return places, nil
}

// findings is what came of some reports, before it is durable.
type findings struct {
	after   map[afterKey]*UsesAfter
	flows   map[string]map[flowKey]*flow
	counts  UseCounts
	deleted []string
}

// check looks at some reports, writes down what it found and ends their marks.
func (b *Broker) check(ctx context.Context, places []string) error {
	found := &findings{after: map[afterKey]*UsesAfter{}, flows: map[string]map[flowKey]*flow{}}
	for _, place := range places {
		found.deleted = append(found.deleted, uncheckedPrefix+place)
		value, err := b.observation(ctx, usesPrefix+place)
		if err != nil {
			return err
		}
		var r storedUses
		if value == nil || json.Unmarshal(value, &r) != nil {
			continue
		}
		kept, again := b.uses.looked[place]
		for _, use := range r.Uses {
			if err := b.checkUse(ctx, found, &r, use.use(), again); err != nil {
				return err
			}
		}
		if !again {
			kept = b.keeps(ctx, &r, len(value))
			b.uses.looked[place] = kept
		}
		if !kept {
			found.deleted = append(found.deleted, usesPrefix+place)
			for _, use := range r.Uses {
				found.counts.Unkept += use.Count
			}
		}
	}
	if err := b.cfg.Store.Observe(ctx, found.observations()...); err != nil {
		return err
	}
	for _, place := range places {
		delete(b.uses.looked, place)
	}
	b.settle(found)
	return nil
}

// keeps draws what it costs to keep a report for its 30 days.
func (b *Broker) keeps(ctx context.Context, r *storedUses, bytes int) bool {
	u := &b.uses
	u.mu.Lock()
	from, now := u.reporter(r.Verifier), b.cfg.Boot()
	kept := from.kept.draw(keptBytes, float64(bytes+reportOverhead), now) && u.kept.draw(allKeptBytes, float64(bytes+reportOverhead), now)
	said := from.unkept
	from.unkept = !kept
	u.mu.Unlock()
	if !kept && !said {
		b.cfg.Log.WarnContext(ctx, "use reports are looked at and not kept: too many for the day", "verifier", r.Verifier)
	}
	return kept
}

// checkUse compares one use with the records. quiet: its alarms were raised before.
func (b *Broker) checkUse(ctx context.Context, found *findings, r *storedUses, use Use, quiet bool) error {
	id, err := token.ParseGrantID(use.Grant)
	if err != nil {
		return nil
	}
	g, err := b.grantOf(ctx, id)
	switch {
	case errors.Is(err, ErrNotFound):
		b.unrecorded(ctx, found, r, use, "no record holds this grant", quiet)
		return nil
	case err != nil:
		return err
	case len(use.Fingerprint) > 0 && string(use.Fingerprint) != string(g.Fingerprint[:]):
		b.unrecorded(ctx, found, r, use, "the record of this grant is of another token", quiet)
		return nil
	}
	if use.Accepted {
		b.addFlow(ctx, found, r, use, g)
	}
	b.addAfter(ctx, found, r, use, g, quiet)
	return nil
}

// grantOf looks a grant up, or remembers it: grants never change.
func (b *Broker) grantOf(ctx context.Context, id token.GrantID) (*Grant, error) {
	if g, ok := b.uses.known[id]; ok {
		return g, nil
	}
	g, err := b.cfg.Store.Grant(ctx, id)
	if err != nil {
		return nil, err
	}
	if len(b.uses.known) >= maxKnownGrants {
		clear(b.uses.known)
	}
	b.uses.known[id] = g
	return g, nil
}

// sameEra reports whether a use was judged in the era of the log, as far as it says.
func (b *Broker) sameEra(use Use) bool { return use.Era == "" || use.Era == b.Head().Era.String() }

// unrecorded raises the alarm: a verifier saw a good signature on what was never
// recorded, or says so. Both are grave, and the alarm says whose word it is. It is raised
// before it is written down that the report was looked at: a crash may repeat it, and
// never loses it. Of a verifier that invents grants only a few are told one by one.
//
// What was judged in an earlier era is none: the records of a restored store lack what
// was issued since the backup.
func (b *Broker) unrecorded(ctx context.Context, found *findings, r *storedUses, use Use, why string, quiet bool) {
	if !b.sameEra(use) {
		return
	}
	found.counts.Unrecorded += use.Count
	if quiet {
		return
	}
	u := &b.uses
	u.mu.Lock()
	from := u.reporter(r.Verifier)
	told := from.alarms.draw(alarmsSaid, 1, b.cfg.Boot())
	silent := from.silent
	from.silent++
	if told {
		from.silent = 0
	}
	u.mu.Unlock()
	if !told {
		return
	}
	b.cfg.Log.ErrorContext(ctx, "a use is reported of what was never recorded: somebody holds a signing key", "why", why,
		"reported_by", r.Verifier, "instance", r.Instance, "claimed_verifier", use.Claimed, "claimed_instance", use.ClaimedInstance, "grant", use.Grant, "key", use.Key,
		"peer", use.Peer, "address", use.Address, "accepted", use.Accepted, "count", use.Count, "others_not_told", silent)
	e := AuditEntry{
		Time: b.cfg.Now().UTC(), Action: ActionReport, Actor: r.Verifier, Outcome: "alarm", Reason: "GRANT_UNRECORDED", Grant: use.Grant, Alert: true,
		Message: fmt.Sprintf("%s: signed by key %s, presented by %s from %s; the reporting verifier's word", why, orUnknown(use.Key), orUnknown(use.Peer), orUnknown(use.Address)),
	}
	if err := b.cfg.Audit(e); err != nil {
		b.cfg.Log.ErrorContext(ctx, "writing the audit of an alarm failed", "err", err)
	}
}

func orUnknown(s string) string { return cmp.Or(s, "unknown") }

// addFlow counts an accepted use for plans.
func (b *Broker) addFlow(ctx context.Context, found *findings, r *storedUses, use Use, g *Grant) {
	key := flowKey{lineageText(g), g.Audience, r.Verifier, b.uses.names(r.Verifier, use.Claimed)}
	hour := r.At.Format(hourLayout)
	if found.flows[hour] == nil {
		found.flows[hour] = map[flowKey]*flow{}
	}
	fl := found.flows[hour][key]
	if fl == nil {
		fl = &flow{Lineage: key.lineage, Audience: key.audience, Verifier: key.verifier, Claimed: key.claimed}
		b.uses.mu.Lock()
		old, ok := b.uses.flows[hour][key]
		room := len(b.uses.flows[hour])+len(found.flows[hour]) < maxFlows
		b.uses.mu.Unlock()
		switch {
		case ok:
			*fl = *old
		case !room:
			b.flooded(ctx, hour)
			return
		}
		found.flows[hour][key] = fl
	}
	fl.Count += use.Count
	// A verifier's clock that is ahead makes no use of the future.
	if last := earlier(use.Last, r.At); last.After(fl.Last) {
		fl.Last = last
	}
}

func (b *Broker) flooded(ctx context.Context, hour string) {
	b.uses.mu.Lock()
	said := b.uses.flooded == hour
	b.uses.flooded = hour
	b.uses.mu.Unlock()
	if !said {
		b.cfg.Log.WarnContext(ctx, "more workflows are in use than are kept: plans don't show all of them", "kept", maxFlows)
	}
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

// lineageText is a lineage's identities, root first.
func lineageText(g *Grant) string {
	ids := make([]string, len(g.Lineage))
	for i, m := range g.Lineage {
		ids[i] = m.Identity.String()
	}
	return strings.Join(ids, " ")
}

// recentFlows returns those of the last 24 h. A flow is replaced and never changed, so
// they are read without the lock.
func (u *usage) recentFlows(now time.Time) []*flow {
	first := now.UTC().Add(-flowsKept).Format(hourLayout)
	u.mu.Lock()
	defer u.mu.Unlock()
	var out []*flow
	for hour, flows := range u.flows {
		if hour >= first {
			out = slices.AppendSeq(out, maps.Values(flows))
		}
	}
	return out
}

// subject is what selectors see of a flow: its audience and its identities.
func (fl *flow) subject() revocation.Subject {
	s := revocation.Subject{Audience: fl.Audience}
	for _, text := range strings.Split(fl.Lineage, " ") {
		if id, err := spiffeid.FromString(text); err == nil {
			s.Lineage = append(s.Lineage, token.Member{Identity: id})
		}
	}
	return s
}

// addAfter counts a use of what is revoked, for each revocation that kills it.
func (b *Broker) addAfter(ctx context.Context, found *findings, r *storedUses, use Use, g *Grant, quiet bool) {
	for _, rec := range b.killers(g) {
		knew := b.sameEra(use) && use.Head >= rec.Seq
		var refused, knowing, unaware uint64
		switch {
		case knew && !use.Accepted:
			refused = use.Count
		case knew:
			knowing = use.Count
		case !use.Accepted:
			continue // refused for something else
		case use.First.After(rec.Details.Time):
			unaware = use.Count
		case use.Last.After(rec.Details.Time):
			unaware = 1
		default:
			continue
		}
		found.counts.Refused += refused
		found.counts.AcceptedKnowing += knowing
		found.counts.AcceptedUnaware += unaware
		a := b.usesAfter(found, afterKey{rec.Seq, r.Verifier, b.uses.names(r.Verifier, use.Claimed)})
		if a == nil {
			continue
		}
		if !quiet {
			b.sayAfter(ctx, a, r, use, rec.Seq, refused, knowing, unaware)
		}
		a.Refused += refused
		a.AcceptedKnowing += knowing
		a.AcceptedUnaware += unaware
		if use.Last.After(a.LastSeen) {
			a.LastSeen = use.Last
		}
		a.Peers = a.list(a.Peers, use.Peer, maxPeers)
		a.Addresses = a.list(a.Addresses, use.Address, maxAddresses)
	}
}

// killers are the revocations of this era that kill a grant. They are looked for only
// where there is one, and the records are few: the horizon takes them away.
func (b *Broker) killers(g *Grant) []Record {
	s := b.state
	s.mu.RLock()
	defer s.mu.RUnlock()
	sub := g.Subject()
	if v := s.set.Judge(sub); v.Reason != revocation.Revoked && v.Reason != revocation.KeyRevoked {
		return nil
	}
	var out []Record
	for seq, rec := range s.records {
		if rec.Revocation == nil || seq < s.eraSeq {
			continue
		}
		if slices.ContainsFunc(rec.Revocation.Selectors, func(sel revocation.Selector) bool {
			return (seq > g.Position.Seq || sel.Kind() == revocation.KindKey) && sel.Matches(sub)
		}) {
			out = append(out, rec)
		}
	}
	return out
}

// usesAfter returns what is known of a revocation and a verifier, to be changed; nil if
// too many verifiers are listed beside the revocation.
func (b *Broker) usesAfter(found *findings, key afterKey) *UsesAfter {
	if a := found.after[key]; a != nil {
		return a
	}
	u := &b.uses
	u.mu.Lock()
	defer u.mu.Unlock()
	a := &UsesAfter{Verifier: key.verifier, Claimed: key.claimed}
	if old := u.after[key]; old != nil {
		*a = *old
		a.Peers, a.Addresses = slices.Clone(old.Peers), slices.Clone(old.Addresses)
	} else if u.listed[key.seq]+len(found.after) >= maxAfter {
		return nil
	}
	found.after[key] = a
	return a
}

// list adds a text to a bounded list.
func (a *UsesAfter) list(all []string, s string, most int) []string {
	switch {
	case s == "" || slices.Contains(all, s):
		return all
	case len(all) == most:
		a.More = true
		return all
	}
	return append(all, s)
}

// sayAfter logs the first of each kind, of one verifier and one revocation; the metric
// and the revocation's status count them all.
func (b *Broker) sayAfter(ctx context.Context, a *UsesAfter, r *storedUses, use Use, seq, refused, knowing, unaware uint64) {
	args := []any{"revocation", seq, "grant", use.Grant, "verifier", r.Verifier, "instance", r.Instance, "claimed_verifier", use.Claimed, "claimed_instance", use.ClaimedInstance, "peer", use.Peer, "address", use.Address, "head", use.Head}
	switch {
	case knowing > 0 && a.AcceptedKnowing == 0:
		b.cfg.Log.ErrorContext(ctx, "a verifier accepted what it knew to be revoked: it doesn't do its job", args...)
	case refused > 0 && a.Refused == 0:
		b.cfg.Log.WarnContext(ctx, "a revoked credential is still presented, and refused", args...)
	case unaware > 0 && a.AcceptedUnaware == 0:
		b.cfg.Log.WarnContext(ctx, "a revoked credential was accepted, by a verifier that hadn't heard of it", args...)
	}
}

// observations are the findings as the store keeps them.
func (f *findings) observations() []Observation {
	var out []Observation
	for key, a := range f.after {
		out = append(out, Observation{Key: key.String(), Value: encoded(a)})
	}
	for hour, flows := range f.flows {
		for key, fl := range flows {
			name := hash(named(strings.Join([]string{key.lineage, key.audience, key.verifier}, "|"), key.claimed))
			out = append(out, Observation{Key: flowsPrefix + hour + "/" + name, Value: encoded(fl)})
		}
	}
	for _, key := range f.deleted {
		out = append(out, Observation{Key: key})
	}
	return out
}

func (k afterKey) String() string {
	return fmt.Sprintf("%s%016x/%s", afterPrefix, k.seq, hash(named(k.verifier, k.claimed)))
}

// named tells apart what is said of a verifier itself and of one behind it.
func named(verifier, claimed string) string {
	if claimed == "" {
		return verifier
	}
	return verifier + "|" + claimed
}

func encoded(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic("internal error: marshalling what was found in use reports: " + err.Error())
	}
	return b
}

// settle makes findings visible that are durable now.
func (b *Broker) settle(f *findings) {
	u := &b.uses
	u.mu.Lock()
	for key, a := range f.after {
		if u.after[key] == nil {
			u.listed[key.seq]++
		}
		u.after[key] = a
	}
	for hour, flows := range f.flows {
		if u.flows[hour] == nil {
			u.flows[hour] = map[flowKey]*flow{}
		}
		maps.Copy(u.flows[hour], flows)
	}
	u.counts.Unkept += f.counts.Unkept
	u.counts.Refused += f.counts.Refused
	u.counts.AcceptedKnowing += f.counts.AcceptedKnowing
	u.counts.AcceptedUnaware += f.counts.AcceptedUnaware
	u.counts.Unrecorded += f.counts.Unrecorded
	u.mu.Unlock()
	if len(f.after) > 0 {
		b.roster.mu.Lock()
		b.roster.ring()
		b.roster.mu.Unlock()
	}
}

// UsesAfter returns what verifiers reported of what a revocation killed, by verifier.
func (b *Broker) UsesAfter(seq uint64) []UsesAfter {
	u := &b.uses
	u.mu.Lock()
	defer u.mu.Unlock()
	var out []UsesAfter
	for key, a := range u.after {
		if key.seq == seq {
			out = append(out, *a)
		}
	}
	slices.SortFunc(out, func(x, y UsesAfter) int {
		return cmp.Or(cmp.Compare(x.Verifier, y.Verifier), cmp.Compare(x.Claimed, y.Claimed))
	})
	return out
}

// loadUses reads what earlier processes found.
func (b *Broker) loadUses(ctx context.Context) error {
	u := &b.uses
	for o, err := range b.cfg.Store.Observed(ctx, afterPrefix) {
		if err != nil {
			return fmt.Errorf("reading uses after revocations: %w", err)
		}
		var seq uint64
		a := &UsesAfter{}
		if _, err := fmt.Sscanf(o.Key, afterPrefix+"%016x/", &seq); err != nil || json.Unmarshal(o.Value, a) != nil {
			return fmt.Errorf("reading uses after revocations: entry %q is malformed", o.Key)
		}
		u.after[afterKey{seq, a.Verifier, a.Claimed}] = a
		u.listed[seq]++
	}
	first := b.cfg.Now().UTC().Add(-flowsKept).Format(hourLayout)
	for o, err := range b.cfg.Store.Observed(ctx, flowsPrefix) {
		if err != nil {
			return fmt.Errorf("reading flows: %w", err)
		}
		hour, _, _ := strings.Cut(strings.TrimPrefix(o.Key, flowsPrefix), "/")
		fl := &flow{}
		if err := json.Unmarshal(o.Value, fl); err != nil {
			return fmt.Errorf("reading flows: entry %q: %w", o.Key, err)
		}
		if hour < first {
			continue
		}
		if u.flows[hour] == nil {
			u.flows[hour] = map[flowKey]*flow{}
		}
		u.flows[hour][flowKey{fl.Lineage, fl.Audience, fl.Verifier, fl.Claimed}] = fl
	}
	return nil
}

// oldUses names what goes: whole days of reports whose grants are gone, and flows that
// no plan shows.
func (b *Broker) oldUses() []KeyRange {
	now := b.cfg.Now().UTC()
	day, hour := now.Add(-usesKept).Format(dayLayout), now.Add(-flowsKept).Format(hourLayout)
	return []KeyRange{
		{usesPrefix, usesPrefix + day}, {uncheckedPrefix, uncheckedPrefix + day}, {flowsPrefix, flowsPrefix + hour},
	}
}

// forgetUses drops from memory what belongs to nothing any more, and returns the keys
// that the store can drop.
func (b *Broker) forgetUses(now feed.Instant) (gone []Observation) {
	hour := b.cfg.Now().UTC().Add(-flowsKept).Format(hourLayout)
	b.uses.checking.Lock() // nobody is about to write what is dropped here
	defer b.uses.checking.Unlock()
	b.state.mu.RLock()
	defer b.state.mu.RUnlock()
	u := &b.uses
	u.mu.Lock()
	defer u.mu.Unlock()
	maps.DeleteFunc(u.flows, func(h string, _ map[flowKey]*flow) bool { return h < hour })
	for key := range u.after {
		if _, ok := b.state.records[key.seq]; !ok {
			gone = append(gone, Observation{Key: key.String()})
			delete(u.after, key)
			delete(u.listed, key.seq)
		}
	}
	maps.DeleteFunc(u.reporters, func(_ string, r *reporter) bool {
		return r.silent == 0 && r.taken.full(takenBytes, now) && r.kept.full(keptBytes, now) && r.alarms.full(alarmsSaid, now)
	})
	return gone
}

// full reports whether nothing is drawn from a budget any more.
func (b *budget) full(a allowance, now feed.Instant) bool {
	return now.Sub(b.at).Seconds()*a.perSecond >= b.drawn
}
