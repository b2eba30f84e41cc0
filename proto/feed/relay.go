package feed

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

const (
	// MaxPath bounds the instances from a verifier up to the broker, its own included.
	MaxPath = 8
	// maxBelow bounds whom a relay reports upwards, those behind other relays included.
	maxBelow = 4096
	// maxNonces bounds the pings of one stream that wait for an answer: the oldest are
	// forgotten, as verifiers forget theirs.
	maxNonces = 64
	// maxGathered bounds the pings from other hosts that go up as one.
	maxGathered = 4096
)

// ErrCrowded: a relay has as many verifiers below it as it can report.
var ErrCrowded = errors.New("too many verifiers below")

// ErrTaken: the instance is that of one with another SPIFFE ID, whose receipts and stream
// are nobody else's.
var ErrTaken = errors.New("the instance is another identity's")

// A Relayed is what a relay says upwards of one that learns from it.
type Relayed struct {
	// Path is the instances of the relays between and its own, nearest to the broker
	// first.
	Path         []string
	Audiences    []string
	Bound        time.Duration
	AcceptsStale bool
	// Acked is up to where it said to have applied everything.
	Acked Position
	// LastAnswerAge is how long ago one of its pings was last answered; 0 if none was.
	LastAnswerAge time.Duration
	// Gone: it is answered no more.
	Gone bool
	// Identity is the SPIFFE ID that it proved to the relay; empty on a unix socket.
	Identity string
}

// A Relay learns the log from above and passes it on with the age of its own knowledge.
// It answers nobody below whom the broker doesn't have on its roster: a new one, or one
// whose terms grew, waits until a ping has come back that went up after the report which
// named it. Whoever owns a relay sends what Report returns before each Ping.
//
// Those on other hosts don't take its word. Their pings go up gathered in a tree, whose
// root is the relay's own ping, and come back under a signed head.
//
// Like everything here it is one state machine for one goroutine or lock. The zero value
// knows nothing and has nobody below.
type Relay struct {
	View  View
	Fresh Freshness
	// Screen, where it is set, holds back what comes from above until a signed head
	// covers it: the relay's own upstream is a relay on another host.
	Screen *Screen

	below map[string]*learner // by path
	// gen counts what must be reported before it may be answered; the answer to a ping
	// that was sent when all up to number n was reported confirms n, once the relay has
	// applied everything up to that answer's head: what was contained before one below
	// was on the roster, it must know from its first answer on. What is confirmed is on
	// the broker's roster, durably, whatever stream comes next.
	gen, confirmed uint64
	answers        []confirmation

	// Of the stream above.
	relays bool              // it may report, and so relay
	pings  map[string]uint64 // nonce to gen as it was sent
	asked  uint64            // the highest of them
	pinged Instant

	reported Instant // everyone, on whatever stream

	waiting  []question           // pings from other hosts, in order of arrival
	gathered map[string]gathering // those that are under way, by the nonce they went up as
	arrived  bool                 // something that the screen holds back, since the last ping
}

// question is a ping of one on another host.
type question struct {
	from  *Downstream
	nonce string
}

// gathering is what went up as one ping: the relay's own nonce is leaf 0.
type gathering struct {
	tree *NonceTree
	of   []question
}

// learner is one that learns here, itself or through another relay.
type learner struct {
	Relayed
	answered Instant // when one of its pings was last answered
	ever     bool    // answered at all
	reports  uint64  // the number of its newest use report
	gen      uint64
	dirty    bool // not reported as it is now
	owner    *Downstream
}

// confirmation is an answer from above whose head isn't applied yet.
type confirmation struct {
	gen  uint64
	head Position
}

func pathKey(path []string) string { return strings.Join(path, "/") }

// Connected begins a stream above, after its welcome. The broker at its other end hears
// of everyone, whatever an earlier one heard.
func (r *Relay) Connected(relays bool) {
	r.Fresh.Reconnected()
	r.View.Reconnected()
	r.relays, r.pings, r.asked, r.answers = relays, map[string]uint64{}, 0, nil
	if r.Screen != nil {
		r.Screen.Reconnected()
	}
	for _, g := range r.gathered { // they are asked again
		r.waiting = append(g.of, r.waiting...)
	}
	r.waiting = slices.DeleteFunc(r.waiting, func(q question) bool { return q.from.left })
	r.gathered = nil
	for _, l := range r.below {
		l.dirty = true
	}
}

// Gather returns the nonce of the next ping: own, which is random, or, where pings from
// other hosts wait, the root of a tree over own and theirs.
func (r *Relay) Gather(own string) string {
	n := min(len(r.waiting), maxGathered)
	if n == 0 {
		return own
	}
	g := gathering{of: slices.Clone(r.waiting[:n])}
	r.waiting = slices.Delete(r.waiting, 0, n)
	nonces := []string{own}
	for _, q := range g.of {
		nonces = append(nonces, q.nonce)
	}
	g.tree = NewNonceTree(nonces)
	root := g.tree.Root()
	if r.gathered == nil {
		r.gathered = map[string]gathering{}
	}
	r.gathered[string(root[:])] = g
	return string(root[:])
}

// Proved takes the signed head of the answer to a ping, and passes it on to those whose
// pings were gathered in it. Whether it is good is for each of them to check.
func (r *Relay) Proved(nonce string, head SignedHead, path NoncePath) {
	g, ok := r.gathered[nonce]
	if !ok {
		return
	}
	delete(r.gathered, nonce)
	for i, q := range g.of {
		whole, err := g.tree.Path(i + 1).Under(path)
		if err != nil || len(head.Statement) == 0 {
			continue // unanswered: it closes
		}
		q.from.proven = append(q.from.proven, Answer{Nonce: q.nonce, Signed: head, Path: whole})
	}
}

// Ping notes a ping that goes up after a whole report.
func (r *Relay) Ping(nonce string, now Instant) {
	r.Fresh.Sent(nonce, now)
	r.pings[nonce] = r.gen
	r.asked, r.pinged, r.arrived = r.gen, now, false
}

// Due returns how long until the next ping: no time if somebody waits for it. Own is the
// bound of whoever owns the relay; a smaller one below sets the pace.
func (r *Relay) Due(own time.Duration, now Instant) time.Duration {
	if r.arrived && len(r.pings) == 0 && r.Screen.Waits() {
		return 0 // once for what has arrived: a lie is never proven
	}
	if r.asked < r.gen || len(r.waiting) > 0 && len(r.gathered) == 0 {
		return 0 // one gathering is under way at a time: the next takes all that wait by then
	}
	return max(0, r.pinged.Add(r.Bound(own)/PingsPerBound).Sub(now))
}

// Bound returns the smallest bound of the relay's own and of those below.
func (r *Relay) Bound(own time.Duration) time.Duration {
	for _, l := range r.below {
		if !l.Gone {
			own = min(own, l.Bound)
		}
	}
	return own
}

// Overdue reports whether a ping is one that everyone is to be reported before: not one
// that goes out of turn because somebody on another host asked.
func (r *Relay) Overdue(own time.Duration, now Instant) bool {
	return now.Sub(r.reported) >= r.Bound(own)/PingsPerBound
}

// Report returns what changed below since the last report on this stream, and, before a
// ping, everyone who may be answered from it: so the broker never takes one for closed
// that isn't.
func (r *Relay) Report(now Instant, ping bool) []Relayed {
	if !r.relays {
		return nil
	}
	if ping {
		r.reported = now
	}
	var out []Relayed
	for _, key := range slices.Sorted(maps.Keys(r.below)) {
		l := r.below[key]
		if l.dirty || ping && !l.Gone {
			l.dirty = false
			entry := l.Relayed
			if l.ever {
				entry.LastAnswerAge = max(0, now.Sub(l.answered))
			}
			out = append(out, entry)
		}
	}
	r.forget(now)
	return out
}

// Answered takes the answer to a ping. ErrFork closes the view for good.
func (r *Relay) Answered(nonce string, head Position, age time.Duration) error {
	gen, sent := r.pings[nonce]
	delete(r.pings, nonce)
	asOf, err := r.Fresh.Answered(nonce, head, age, r.View.Position())
	if err != nil {
		return fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	if err := r.View.CheckHead(head, asOf); err != nil {
		return err
	}
	if sent && r.relays {
		if len(r.answers) == maxPings { // the newest confirms what the oldest would have
			r.answers = slices.Delete(r.answers, 0, 1)
		}
		r.answers = append(r.answers, confirmation{gen, head})
		r.confirm()
	}
	return nil
}

// confirm takes the answers whose heads are applied.
func (r *Relay) confirm() {
	r.answers = slices.DeleteFunc(r.answers, func(c confirmation) bool {
		if c.head.Compare(r.View.Position()) > 0 {
			return false
		}
		r.confirmed = max(r.confirmed, c.gen)
		return true
	})
}

// Deliver takes a delivery from above.
func (r *Relay) Deliver(d Delivery, now Instant) error {
	if r.Screen == nil {
		return r.apply(now, d)
	}
	proven, err := r.Screen.Deliver(&r.View, d)
	if err != nil {
		return err
	}
	r.arrived = true
	return r.apply(now, proven...)
}

// Signed takes a verified statement, of an answer that Answered has taken.
func (r *Relay) Signed(h HeadStatement, now Instant) error {
	proven, err := r.Screen.Signed(&r.View, h)
	if err != nil {
		return err
	}
	return r.apply(now, proven...)
}

func (r *Relay) apply(now Instant, deliveries ...Delivery) error {
	for _, d := range deliveries {
		if err := r.View.Apply(d, now); err != nil {
			return err
		}
	}
	r.Fresh.Applied(r.View.Position())
	r.confirm()
	return nil
}

// Len returns how many are below, those gone and not yet closed included.
func (r *Relay) Len() int { return len(r.below) }

// Refused returns the stream that speaks for one below whom the broker refused, nil if
// none does any more. Where the path has more than one instance it is a relay's stream.
func (r *Relay) Refused(path []string) *Downstream {
	if l := r.below[pathKey(path)]; l != nil && !l.Gone {
		return l.owner
	}
	return nil
}

// join takes in a learner, or takes over its new data. What it acknowledged before under
// the same instance stands.
func (r *Relay) join(l *learner, now Instant) error {
	key := pathKey(l.Path)
	old, known := r.below[key]
	if !known && len(r.below) >= maxBelow {
		if r.forget(now); len(r.below) >= maxBelow {
			return ErrCrowded
		}
	}
	l.dirty = true
	if known {
		if old.Acked.Compare(l.Acked) > 0 {
			l.Acked = old.Acked
		}
		l.answered, l.ever = max(l.answered, old.answered), l.ever || old.ever
		l.reports = old.reports
	}
	if known && !old.Gone && !l.Gone && l.Bound <= old.Bound && (!l.AcceptsStale || old.AcceptsStale) && slices.Equal(l.Audiences, old.Audiences) {
		l.gen = old.gen // every report named it, with no smaller a bound
	} else {
		r.gen++
		l.gen = r.gen
	}
	if r.below == nil {
		r.below = map[string]*learner{}
	}
	r.below[key] = l
	return nil
}

// forget drops those that are gone, closed by now, and known to the broker as both.
func (r *Relay) forget(now Instant) {
	maps.DeleteFunc(r.below, func(_ string, l *learner) bool {
		return l.Gone && l.gen <= r.confirmed && now.Sub(l.answered) > l.Bound
	})
}

// A Downstream is one stream below a relay.
type Downstream struct {
	relay  *Relay
	self   *learner
	relays bool   // it passes the feed on in turn
	need   uint64 // the generation that must be confirmed before it is answered
	cursor *Cursor
	nonces []string
	signed bool     // on another host: it takes signed heads only
	proven []Answer // to its pings, from above

	welcomed, left bool
}

// A Message is what a downstream sends next: exactly one of these.
type Message struct {
	Welcome  bool
	Delivery *Delivery
	Answer   *Answer
}

// An Answer to a ping.
type Answer struct {
	Nonce         string
	Head, Horizon Position
	Age           time.Duration // of the knowledge that it stands on
	// Signed and Path prove it to one on another host, to whom the rest means nothing.
	Signed SignedHead
	Path   NoncePath
}

// Follow takes in one that begins to follow, whose path is its instance alone and whose
// Acked is what it says to have. Another stream that spoke for the instance is returned:
// it is replaced, and whoever owns it ends it. An instance is one identity's.
func (r *Relay) Follow(self Relayed, relays bool, now Instant) (*Downstream, *Downstream, error) {
	d := &Downstream{relay: r, relays: relays, cursor: NewCursor(self.Acked)}
	if at, ok := r.View.Log().At(self.Acked.Seq); !ok || at != self.Acked {
		self.Acked = Position{}
	}
	var replaced *Downstream
	switch old := r.below[pathKey(self.Path)]; {
	case old == nil:
	case old.Identity != self.Identity:
		return nil, nil, ErrTaken
	case !old.Gone:
		replaced = old.owner
	}
	d.self = &learner{Relayed: self, owner: d}
	if err := r.join(d.self, now); err != nil {
		return nil, nil, err
	}
	d.need = d.self.gen
	return d, replaced, nil
}

// Next returns what to send now, if anything. Records go before answers: an answer is
// worth something only to one who has applied up to its head.
func (d *Downstream) Next(now Instant, limit int) (Message, bool) {
	r := d.relay
	if !d.welcomed {
		d.welcomed = d.need <= r.confirmed
		return Message{Welcome: true}, d.welcomed
	}
	if r.View.Position().Era == 0 {
		return Message{}, false
	}
	if delivery, ok := d.cursor.Next(r.View.Log(), limit); ok {
		return Message{Delivery: &delivery}, true
	}
	age, known := r.Fresh.Age(now)
	if len(d.nonces)+len(d.proven) == 0 || d.need > r.confirmed || !known {
		return Message{}, false
	}
	var a Answer
	if d.signed {
		a, d.proven = d.proven[0], d.proven[1:]
	} else {
		a.Nonce, d.nonces = d.nonces[0], d.nonces[1:]
	}
	a.Head, a.Horizon, a.Age = r.View.Position(), r.View.Log().Horizon(), age
	d.self.answered, d.self.ever = now, true
	return Message{Answer: &a}, true
}

// Distrust makes it one on another host, before its first ping: it gets no answer but
// under a signed head that its own ping is in.
func (d *Downstream) Distrust() { d.signed = true }

// Relays reports whether it passes the feed on in turn.
func (d *Downstream) Relays() bool { return d.relays }

// Name returns the SPIFFE ID that it proved, empty on a unix socket, and its instance.
func (d *Downstream) Name() (identity, instance string) { return d.self.Identity, d.self.Path[0] }

// Bound returns the bound that the relay reports for it.
func (d *Downstream) Bound() time.Duration { return d.self.Bound }

// Ping notes a ping to answer.
func (d *Downstream) Ping(nonce string) {
	if d.signed {
		d.ask(nonce)
		return
	}
	if len(d.nonces) == maxNonces {
		d.nonces = slices.Delete(d.nonces, 0, 1)
	}
	d.nonces = append(d.nonces, nonce)
}

func (d *Downstream) ask(nonce string) {
	mine := func(q question) bool { return q.from == d }
	waiting := d.relay.waiting
	n := len(d.proven)
	for _, q := range waiting {
		if mine(q) {
			n++
		}
	}
	if n >= maxNonces {
		if i := slices.IndexFunc(waiting, mine); i >= 0 {
			waiting = slices.Delete(waiting, i, i+1)
		} else {
			d.proven = slices.Delete(d.proven, 0, 1)
		}
	}
	d.relay.waiting = append(waiting, question{d, nonce})
}

// Acknowledge takes its receipt, for what was delivered here, and reports whether it is
// news to pass on as its own.
func (d *Downstream) Acknowledge(p Position) (bool, error) {
	if err := d.delivered(p); err != nil {
		return false, err
	}
	if !d.credible(p) || p.Compare(d.self.Acked) <= 0 {
		return false, nil
	}
	d.self.Acked, d.self.dirty = p, true
	return true, nil
}

// credible reports whether the relay knows of the position itself. A verifier that came
// here from elsewhere may be ahead; its receipt counts once the relay has caught up and
// the verifier says so again.
func (d *Downstream) credible(p Position) bool { return p.Compare(d.relay.View.Position()) <= 0 }

// delivered refuses a receipt for what this stream hasn't given.
func (d *Downstream) delivered(p Position) error {
	at, known := d.relay.View.Log().At(p.Seq)
	if d.credible(p) && p.Compare(d.cursor.Position()) > 0 || known && p.ForkOf(at) {
		return fmt.Errorf("%w: a receipt for what was not delivered on this stream", ErrMalformed)
	}
	return nil
}

// Report takes what a relay below says of its own; the pings of that relay wait until
// the broker has heard of whoever is new.
func (d *Downstream) Report(below []Relayed, now Instant) error {
	if !d.relays {
		return fmt.Errorf("%w: a relay report from one that is no relay", ErrMalformed)
	}
	for _, b := range below {
		if err := d.report(b, now); err != nil {
			return err
		}
	}
	return nil
}

func (d *Downstream) report(below Relayed, now Instant) error {
	if len(below.Path) == 0 || len(below.Path) >= MaxPath {
		return fmt.Errorf("%w: a path of %d instances below a relay", ErrMalformed, len(below.Path))
	}
	if err := d.delivered(below.Acked); err != nil {
		return err
	}
	if !d.credible(below.Acked) {
		below.Acked = Position{}
	}
	l := &learner{Relayed: below, answered: now.Add(-min(below.LastAnswerAge, maxAge)), ever: true, owner: d}
	l.Path = append(slices.Clone(d.self.Path), below.Path...)
	if err := d.relay.join(l, now); err != nil {
		return err
	}
	d.need = max(d.need, l.gen)
	return nil
}

// UseReport notes the number of a use report, and reports whether it is new: one that
// was sent on an earlier stream may come again. Unnumbered ones, 0, always are.
func (d *Downstream) UseReport(number uint64) bool {
	if number > 0 && number <= d.self.reports {
		return false
	}
	d.self.reports = max(d.self.reports, number)
	return true
}

// Leave ends the stream: all that it spoke for is gone. A relay may have answered those
// behind it since it last said so, but not later than it was answered itself.
func (d *Downstream) Leave() {
	r := d.relay
	d.left = true
	r.waiting = slices.DeleteFunc(r.waiting, func(q question) bool { return q.from == d })
	r.gen++
	for _, l := range r.below {
		if l.owner == d && !l.Gone {
			l.Gone, l.dirty, l.gen = true, true, r.gen
			l.answered, l.ever = max(l.answered, d.self.answered), l.ever || d.self.ever
		}
	}
}
