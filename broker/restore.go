package broker

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
)

// A LogCopy is what one copy of a store says of the log: a backup, or the store as it
// was last, damaged perhaps.
type LogCopy struct {
	Head, Horizon feed.Position
	Records       []Record        // by number
	Dropped       []feed.Position // of which only the place is known
	Verifiers     []Observation   // the roster
	// Made is when the copy was made as a backup: what came later isn't in it. Zero
	// for a store.
	Made time.Time
	// Damage says what of it can't be read; empty: all of it is there.
	Damage []string
}

// A Restore is what an operator asks for: a store of a new era out of a backup.
type Restore struct {
	Backup *LogCopy
	// LocksFrom is the second copy, which locks made since the backup are carried over
	// from; nil: there is none.
	LocksFrom *LogCopy
	// Known is a position that verifiers are known to be at; zero: none.
	Known KnownPosition
	// AcceptLost is the operator's consent to losing the locks that no copy names.
	AcceptLost bool
	Actor      string
	Reason     string
	Now        time.Time
}

// A Restoration is what a restored store begins with.
type Restoration struct {
	// Backup is the head of the log that it is made from.
	Backup feed.Position
	// Behind is where the first record is sealed. Its number is one below a full
	// million that no number known of comes within a million of, so that no number of
	// the new era ever named anything else.
	Behind feed.Position
	// Records are that of the era, then what is carried over. The locks of the backup
	// stay where they are.
	Records []Record
	// Verifiers take the place of the backup's roster entries of the same keys.
	Verifiers []Observation
	// Kept is how many locks of the backup stand on, by their old numbers.
	Kept int
	// Fork is the lowest number at which the copies have two histories; 0: none seen.
	Fork uint64
	// Agree is the highest number up to which both copies are known to be the same; 0
	// without a second copy.
	Agree uint64
	// Notes are what the operator should know, in sentences.
	Notes []string
}

// Restored is the part of an era's record that says how the era began.
type Restored struct {
	Backup     string    `json:"backup"` // position of the backup's head
	BackupMade time.Time `json:"backup_made,omitzero"`
	LocksFrom  string    `json:"locks_from,omitempty"` // position of the second copy's head
	Known      string    `json:"known,omitempty"`
	Fork       uint64    `json:"fork,omitempty"`
	Damaged    bool      `json:"damaged,omitempty"` // the second copy could not be read whole
	Carried    int       `json:"carried,omitempty"` // records carried over
	// LocksLost is the operator's consent: locks that no copy names are gone.
	LocksLost bool `json:"locks_lost,omitempty"`
}

// CarriedFrom is the place that a record had in an earlier era.
type CarriedFrom struct {
	Era    token.Era `json:"era"`
	Number uint64    `json:"number"`
}

// Errors of PlanRestore. Their texts say what to do.
var (
	// ErrConsent: locks may be lost, and nobody has consented.
	ErrConsent = errors.New("locks may be lost")
	// ErrUnrelated: the second copy is of another broker's log.
	ErrUnrelated = errors.New("not a copy of the same log")
)

const (
	// numberStep is by how much a new era leaves the numbers behind that any copy knows
	// of: more than a log grows by between a backup and its end.
	numberStep = 1_000_000
	// maxNumber is far from where steps overflow.
	maxNumber = math.MaxInt64 / 2
)

// PlanRestore decides what a restored store begins with. It refuses with ErrConsent
// where locks made since the backup may be lost without the operator's word, and with
// ErrUnrelated.
func PlanRestore(r Restore) (*Restoration, error) {
	if err := r.check(); err != nil {
		return nil, err
	}
	p := &planner{Restore: r, out: &Restoration{Backup: r.Backup.Head}, newest: r.Backup.Head, highest: r.Backup.highest()}
	if err := p.compare(); err != nil {
		return nil, err
	}
	if err := p.consent(); err != nil {
		return nil, err
	}
	if err := p.begin(); err != nil {
		return nil, err
	}
	p.carry()
	p.carryKeys()
	p.out.Records[0].Details.Restored.Carried = len(p.out.Records) - 1
	p.out.Kept = len(r.Backup.standing(r.Now)) - p.lifted()
	return p.out, p.roster()
}

func (r *Restore) check() error {
	if len(r.Backup.Damage) > 0 {
		return fmt.Errorf("the backup is damaged: %s", r.Backup.Damage[0])
	}
	if r.AcceptLost || r.Reason != "" {
		if err := checkReason(r.Reason); err != nil {
			return err
		}
	}
	return nil
}

// planner is a restoration in the making.
type planner struct {
	Restore
	out     *Restoration
	newest  feed.Position // what the new era follows
	highest uint64        // of all numbers known of
	lost    []string      // why locks may be lost
}

func (p *planner) note(format string, args ...any) {
	p.out.Notes = append(p.out.Notes, fmt.Sprintf(format, args...))
}

// compare finds out whether the second copy is of the same log, and what it adds.
func (p *planner) compare() error {
	c := p.LocksFrom
	p.compareKnown()
	if c == nil {
		p.lost = append(p.lost, "locks made since the backup are in no copy that is named")
		return nil
	}
	p.highest = max(p.highest, c.highest())
	ours, theirs := p.Backup.sums(), c.sums()
	for seq, sum := range ours {
		switch other, both := theirs[seq]; {
		case both && other == sum:
			p.out.Agree = max(p.out.Agree, seq)
		case both && (p.out.Fork == 0 || seq < p.out.Fork):
			p.out.Fork = seq
		}
	}
	if p.out.Agree == 0 {
		return fmt.Errorf("%w: no record is in both, not even that of an era", ErrUnrelated)
	}
	switch {
	case p.out.Fork > 0:
		p.note("FORK: the copies have two histories from number %d on: one of them was run on after it was put back by hand. Every lock that stands in either of them stands", p.out.Fork)
	case c.Head.Compare(p.Backup.Head) < 0:
		p.lost = append(p.lost, fmt.Sprintf("the second copy ends at %s, before the backup, which ends at %s: it holds no lock made since", c.Head, p.Backup.Head))
	case c.Head == p.Backup.Head && !c.Made.IsZero():
		p.lost = append(p.lost, "the second copy is a backup that ends where the first one ends: it holds no lock made since")
	default:
		p.newest = c.Head
		if p.out.Agree < p.Backup.Head.Seq {
			p.note("the copies agree wherever they can be compared, which is up to number %d: what followed is pruned in one of them", p.out.Agree)
		}
	}
	if len(c.Damage) > 0 {
		p.lost = append(p.lost, "the second copy is damaged, and only in part readable: "+c.Damage[0])
	} else if !c.Made.IsZero() {
		p.note("the second copy is a backup of %s: locks made after that are not in it", c.Made.UTC().Format(time.RFC3339))
	}
	return nil
}

// compareKnown finds out whether verifiers know a history that no copy is of.
func (p *planner) compareKnown() {
	if p.Known.Sum == "" {
		return
	}
	contradicted := false
	for _, c := range []*LogCopy{p.Backup, p.LocksFrom} {
		if c == nil {
			continue
		}
		sum, ok := c.sums()[p.Known.Seq]
		if ok && p.Known.Sum == fmt.Sprintf("%x", sum[:4]) {
			return
		}
		contradicted = contradicted || ok
	}
	if contradicted {
		p.note("FORK: the position %s that verifiers know is on no log that is named", p.Known)
		p.lost = append(p.lost, fmt.Sprintf("verifiers know %s, which is on no log that is named", p.Known))
	}
}

// consent refuses what loses locks without the operator's word.
func (p *planner) consent() error {
	ends := p.Backup.Head
	if c := p.LocksFrom; c != nil && c.Head.Compare(ends) > 0 {
		ends = c.Head
	}
	if k := p.Known; cmp.Or(cmp.Compare(k.Era, ends.Era), cmp.Compare(k.Seq, ends.Seq)) > 0 && k.Era != 0 {
		p.lost = append(p.lost, fmt.Sprintf("verifiers know %s, and the newest copy ends at %s", k, ends))
	}
	if len(p.lost) == 0 {
		return nil
	}
	if !p.AcceptLost {
		return fmt.Errorf("%w: %s", ErrConsent, strings.Join(p.lost, "; "))
	}
	for _, why := range p.lost {
		p.note("accepted as lost: %s", why)
	}
	return nil
}

// begin makes the record of the era.
func (p *planner) begin() error {
	reason := p.Reason
	if reason == "" {
		reason = "restored from a backup"
	}
	era := max(p.newest.Era, p.Backup.Head.Era, p.Known.Era)
	if c := p.LocksFrom; c != nil {
		era = max(era, c.Head.Era)
	}
	highest := max(p.highest, p.Known.Seq)
	if era == math.MaxUint32 || highest > maxNumber {
		return fmt.Errorf("no era can follow %s, or no number %d", era, highest)
	}
	first := (highest/numberStep + 2) * numberStep
	p.out.Behind = feed.Position{Era: era, Seq: first - 1, Sum: p.newest.Sum}
	restored := &Restored{
		Backup: p.Backup.Head.String(), BackupMade: p.Backup.Made, Fork: p.out.Fork,
		Known: p.Known.String(), LocksLost: len(p.lost) > 0,
	}
	if c := p.LocksFrom; c != nil {
		restored.LocksFrom, restored.Damaged = c.Head.String(), len(c.Damage) > 0
	}
	p.out.Records = []Record{{
		Event:   feed.Event{Era: &feed.Era{Era: token.NextEra(era, p.Now)}},
		Details: Details{Time: p.Now.UTC(), Actor: p.Actor, Reason: reason, Restored: restored},
	}}
	return nil
}

// carry carries over the locks and lifts that only the second copy has. Where that isn't
// certain, a lock stands: a needless one can be lifted again.
func (p *planner) carry() {
	c := p.LocksFrom
	if c == nil {
		return
	}
	ours, theirs := p.Backup.standing(p.Now), c.standing(p.Now)
	whole := p.out.Fork == 0 && len(c.Damage) == 0
	for _, seq := range slices.Sorted(maps.Keys(theirs)) {
		if lock := theirs[seq]; ours[seq].Sum != lock.Sum {
			p.carryRecord(lock, c.eraOf(seq))
		}
	}
	lifts, held := c.lifts(), c.sums()
	for _, seq := range slices.Sorted(maps.Keys(ours)) {
		lock := ours[seq]
		sum, there := held[seq]
		switch {
		case theirs[seq].Sum == lock.Sum:
		case there && sum == lock.Sum && whole && lifts[seq].Lift != nil:
			p.carryRecord(lifts[seq], c.eraOf(lifts[seq].Seq))
		case !there && seq <= p.out.Agree && seq <= c.Horizon.Seq && whole:
			// The copy's log had it, and pruned it: it no longer stood.
			p.out.Records = append(p.out.Records, Record{
				Event:   feed.Event{Lift: &feed.Lift{Lock: seq}},
				Details: Details{Time: p.Now.UTC(), Actor: p.Actor, Reason: "it no longer stood in the second copy; who lifted it, and why, is in the audit of that time"},
			})
		default:
			p.note("lock %d stands, since it can't be told whether it was lifted after the backup: lift it again if it was", seq)
		}
	}
}

// lifted counts the locks of the backup that a carried lift ends.
func (p *planner) lifted() int {
	n := 0
	for _, rec := range p.out.Records {
		if rec.Lift != nil {
			n++
		}
	}
	return n
}

// carryRecord makes a record of an earlier era one of the new era, with who, why and
// when as they were.
func (p *planner) carryRecord(rec Record, era token.Era) {
	details := rec.Details
	details.IdempotencyKey = "" // a retry of that call finds no record of this era
	details.CarriedFrom = &CarriedFrom{Era: era, Number: rec.Seq}
	p.out.Records = append(p.out.Records, Record{Event: feed.Event{Revocation: rec.Revocation, Lift: rec.Lift}, Details: details})
}

// carryKeys keeps revoked keys revoked: a key that is revoked never comes back.
func (p *planner) carryKeys() {
	carried := map[revocation.Selector]bool{}
	for _, rec := range p.out.Records {
		for _, s := range keySelectors(rec) {
			carried[s] = true
		}
	}
	var keys []revocation.Selector
	for _, c := range []*LogCopy{p.Backup, p.LocksFrom} {
		if c == nil {
			continue
		}
		for _, rec := range c.Records {
			for _, s := range keySelectors(rec) {
				if !carried[s] {
					carried[s] = true
					keys = append(keys, s)
				}
			}
		}
	}
	for chunk := range slices.Chunk(keys, MaxSelectors) {
		p.out.Records = append(p.out.Records, Record{
			Event:   feed.Event{Revocation: &feed.Revocation{Selectors: chunk}},
			Details: Details{Time: p.Now.UTC(), Actor: p.Actor, Reason: "signing keys that were revoked in earlier eras", Lock: LockNone},
		})
	}
}

func keySelectors(rec Record) []revocation.Selector {
	if rec.Revocation == nil {
		return nil
	}
	return slices.DeleteFunc(slices.Clone(rec.Revocation.Selectors), func(s revocation.Selector) bool { return s.Kind() != revocation.KindKey })
}

// lostVerifiers stands on the roster for those that no copy names: until the largest
// bound that there is has passed they may accept what is revoked.
const lostVerifiers = "(verifiers that no copy names)"

// roster adds the second copy's verifiers. What they acknowledged there says nothing of
// this log.
func (p *planner) roster() error {
	ours := map[string]storedVerifier{}
	for _, o := range p.Backup.Verifiers {
		v, err := storedVerifierOf(o)
		if err != nil {
			return err
		}
		ours[o.Key] = v
	}
	c := p.LocksFrom
	if c != nil {
		for _, o := range c.Verifiers {
			v, err := storedVerifierOf(o)
			if err != nil {
				return err
			}
			v.Era, v.Seq, v.Sum = 0, 0, nil
			if old, ok := ours[o.Key]; ok {
				v.Era, v.Seq, v.Sum = old.Era, old.Seq, old.Sum
				v.Bound, v.AcceptsStale = max(v.Bound, old.Bound), v.AcceptsStale || old.AcceptsStale
			}
			p.out.Verifiers = append(p.out.Verifiers, v.observation())
		}
	}
	if c == nil || !c.Made.IsZero() || len(p.lost) > 0 {
		p.out.Verifiers = append(p.out.Verifiers, storedVerifier{Identity: lostVerifiers, Instance: "lost-in-restore", Bound: MaxStaleness}.observation())
		p.note("verifiers that began to follow after the copies were made aren't known: for %s after its start the broker calls no revocation contained that they may not have confirmed", MaxStaleness)
	}
	return nil
}

// highest is the highest number that the copy knows.
func (c *LogCopy) highest() uint64 {
	highest := max(c.Head.Seq, c.Horizon.Seq)
	for _, r := range c.Records {
		highest = max(highest, r.Seq)
	}
	return highest
}

// sums maps the numbers that the copy knows to the log's running hash there.
func (c *LogCopy) sums() map[uint64]feed.Sum {
	out := map[uint64]feed.Sum{}
	for _, p := range append([]feed.Position{c.Head, c.Horizon}, c.Dropped...) {
		if p.Seq > 0 {
			out[p.Seq] = p.Sum
		}
	}
	for _, r := range c.Records {
		out[r.Seq] = r.Sum
	}
	return out
}

func (c *LogCopy) lifts() map[uint64]Record {
	out := map[uint64]Record{}
	for _, r := range c.Records {
		if r.Lift != nil {
			out[r.Lift.Lock] = r
		}
	}
	return out
}

// standing returns the records whose locks stand.
func (c *LogCopy) standing(now time.Time) map[uint64]Record {
	out := map[uint64]Record{}
	lifts := c.lifts()
	for _, r := range c.Records {
		if r.Revocation == nil || lifts[r.Seq].Lift != nil {
			continue
		}
		if l := lockOf(r); l != nil && l.standing(now) {
			out[r.Seq] = r
		}
	}
	return out
}

// eraOf returns the era of a number, as far as the copy has the records of eras.
func (c *LogCopy) eraOf(seq uint64) token.Era {
	var era token.Era
	for _, r := range c.Records {
		if r.Era != nil && r.Seq <= seq {
			era = r.Era.Era
		}
	}
	return era
}

// A KnownPosition is a position as logs print it: "ERA", "ERA/NUMBER" or
// "ERA/NUMBER/SUM", with the first 4 bytes of the running hash.
type KnownPosition struct {
	Era token.Era
	Seq uint64
	Sum string // 8 hexadecimal digits, or empty
}

// ParseKnownPosition reads a position as logs print it.
func ParseKnownPosition(s string) (KnownPosition, error) {
	parts := strings.Split(s, "/")
	era, err := token.ParseEra(parts[0])
	if err != nil || len(parts) > 3 {
		return KnownPosition{}, errors.New("a position is ERA/NUMBER/SUM as logs print it (6a1b2c3d/1042/0123abcd), or its beginning")
	}
	k := KnownPosition{Era: era}
	if len(parts) > 1 {
		if k.Seq, err = strconv.ParseUint(parts[1], 10, 64); err != nil || k.Seq == 0 || strconv.FormatUint(k.Seq, 10) != parts[1] {
			return KnownPosition{}, fmt.Errorf("%q is no number of a record", parts[1])
		}
	}
	if len(parts) > 2 {
		n, err := strconv.ParseUint(parts[2], 16, 32)
		if k.Sum = fmt.Sprintf("%08x", n); err != nil || k.Sum != parts[2] {
			return KnownPosition{}, fmt.Errorf("%q is not 8 lower-case hexadecimal digits", parts[2])
		}
	}
	return k, nil
}

func (k KnownPosition) String() string {
	switch {
	case k.Era == 0:
		return ""
	case k.Seq == 0:
		return k.Era.String()
	case k.Sum == "":
		return fmt.Sprintf("%s/%d", k.Era, k.Seq)
	}
	return fmt.Sprintf("%s/%d/%s", k.Era, k.Seq, k.Sum)
}

const eraPrefix = "era/"

// auditRestore audits the restore that began this era, once: whoever restored had no
// broker to audit it. Nothing is served before that.
func (b *Broker) auditRestore(ctx context.Context) error {
	b.state.mu.RLock()
	rec := b.state.records[b.state.eraSeq]
	b.state.mu.RUnlock()
	if rec.Era == nil || rec.Details.Restored == nil {
		return nil
	}
	key := eraPrefix + rec.Era.Era.String()
	for _, err := range b.cfg.Store.Observed(ctx, key) {
		return err // audited before
	}
	how, err := json.Marshal(rec.Details.Restored)
	if err != nil {
		return fmt.Errorf("describing a restore: %w", err)
	}
	b.cfg.Log.WarnContext(ctx, "RESTORED: a new era begins with a backup; every credential of earlier eras is dead",
		"era", rec.Era.Era.String(), "by", rec.Details.Actor, "reason", rec.Details.Reason, "restored", string(how))
	err = b.cfg.Audit(AuditEntry{
		Time: rec.Details.Time, Action: ActionRestore, Actor: rec.Details.Actor, Outcome: "allowed",
		Message: string(how), Sequence: rec.Seq, Why: rec.Details.Reason,
	})
	if err != nil {
		return fmt.Errorf("auditing the restore: %w", err)
	}
	return b.cfg.Store.Observe(ctx, Observation{Key: key, Value: []byte("audited")})
}

// notStanding says that a lock can't be lifted, and by which number it can.
func (b *Broker) notStanding(number uint64) error {
	b.state.mu.RLock()
	defer b.state.mu.RUnlock()
	for n := range b.state.locks {
		if from := b.state.records[n].Details.CarriedFrom; from != nil && from.Number == number {
			return ErrNotStanding.because("lock %d of era %s was carried over, and stands as lock %d", number, from.Era, n).with("lock", strconv.FormatUint(n, 10))
		}
	}
	return b.state.whyNotStanding(number)
}

// whyNotStanding says what became of a lock, or that there was none. The caller holds
// the lock of the state.
func (s *state) whyNotStanding(number uint64) error {
	if lift, ok := s.lifts[number]; ok {
		return ErrNotStanding.because("lock %d was lifted already: number %d, by %s at %s", number, lift.Seq, lift.Details.Actor, lift.Details.Time.Format(time.RFC3339))
	}
	if l, ok := s.locks[number]; ok {
		return ErrNotStanding.because("lock %d ended by itself at %s", number, l.End().Format(time.RFC3339))
	}
	if rec, ok := s.records[number]; ok && rec.Revocation != nil {
		return ErrNotStanding.because("revocation %d locked nobody: there is nothing to lift", number)
	}
	return ErrNotStanding.because("lock %d does not stand", number)
}
