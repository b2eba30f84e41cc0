package broker_test

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
)

const simEpochLong = 100_000 * time.Hour

// simLeaf is an SVID, as far as a broker looks at one.
func simLeaf(s *sim, life time.Duration, what string) *x509.Certificate {
	return &x509.Certificate{Raw: []byte(what), NotBefore: simTime(s.now), NotAfter: simTime(s.now + life)}
}

// rotate gives a workload a new SVID, whose issuer's clock is off by as much as is
// allowed for.
func (s *sim) rotate(c *simCaller) {
	skew := time.Duration(s.rnd.Int64N(int64(40*time.Second))) - 20*time.Second
	c.Leaf = simLeaf(s, simEpochLong, fmt.Sprint(c.ID, s.now, s.rnd.Uint64()))
	c.Leaf.NotBefore = simTime(s.now + skew)
	c.Peer = netip.MustParseAddrPort("127.0.0.1:1")
	c.issued = s.now
}

// act does the next thing, and schedules the one after it.
func (s *sim) act() {
	if s.done >= simActions {
		return
	}
	i := s.done
	s.done, s.acted = s.done+1, true
	if !s.skip[i] {
		s.random(rand.New(rand.NewPCG(s.seed, uint64(1000+i))))
		s.giveBack(i)
	}
	s.after(s.between(1500*time.Millisecond), s.act)
}

// random does one thing. It draws from its own source, so that leaving out other actions
// changes it as little as possible.
func (s *sim) random(r *rand.Rand) {
	b := s.brokers[r.IntN(len(s.brokers))]
	f := s.followers()[r.IntN(len(s.followers()))]
	if r.IntN(3) == 0 { // what happens to a relay, happens to many
		f = &s.relays[r.IntN(len(s.relays))].simFollower
	}
	op := s.brokers[0] // that operators use: others are behind until they hear of it
	if r.IntN(5) == 0 {
		op = b
	}
	some := func(d time.Duration) time.Duration { return time.Duration(r.Int64N(int64(d))) }
	if s.shared && r.IntN(20) == 0 {
		s.goDeaf(s.brokers[1], some(10*time.Minute))
		s.passLater(some(30*time.Second), some(12*time.Minute))
	}
	switch n := r.IntN(122); {
	case n < 26:
		s.meanwhile(r)
		s.issue(b, r)
		s.asking, s.inside = nil, nil
	case n < 42:
		s.meanwhile(r)
		s.exchange(b, r)
		s.asking, s.inside = nil, nil
	case n < 53:
		if !s.calm || r.IntN(4) == 0 {
			s.revoke(op, r)
		}
	case n < 57:
		s.lift(op, r)
	case n < 60:
		if b.b != nil {
			b.kill()
			s.after(some(90*time.Second), func() {
				if b.b == nil {
					b.start()
				}
			})
		}
	case n < 63:
		s.restart(f)
	case n < 68:
		if r.IntN(3) == 0 {
			f.alone = s.now + some(90*time.Second)
			s.after(f.alone-s.now, func() {})
		}
		s.note("%s is cut off for %s", f.name, max(0, f.alone-s.now))
		f.cut()
	case n < 73:
		if f.stream != nil {
			f.stream.stalled = s.now + some(45*time.Second)
			s.after(f.stream.stalled-s.now, func() {})
			s.note("%s gets nothing for %s", f.name, f.stream.stalled-s.now)
		}
	case n < 76:
		if f.stream != nil {
			f.stream.delay = some(20 * time.Second)
		}
	case n < 80:
		f.sleep(s, some(2*time.Minute))
	case n < 82:
		b.sleep(s, some(time.Minute))
	case n < 85:
		s.rotate(s.callers[r.IntN(len(s.callers))])
	case n < 87:
		s.thief(op, r)
	case n < 88:
		if r.IntN(2) == 0 {
			s.again(op, r)
		} else {
			s.foreignKey(op)
		}
	case n < 90:
		if op.up() && r.IntN(2) == 0 {
			op.newKey()
		}
	case n < 92:
		m := []*simMachine{&b.simMachine, &f.simMachine}[r.IntN(2)]
		m.wall = []time.Duration{0, -3 * time.Hour, time.Hour, some(simSkew)}[r.IntN(4)]
		s.clocksOff = s.clocksOff || m == &b.simMachine && m.wall.Abs() > simSkew
		s.note("the wall clock of %s is off by %s", m.name, m.wall)
	case n < 95:
		if b.up() {
			s.prune(b)
		}
	case n < 97:
		s.note("a long time passes")
		long := time.Hour + some(time.Hour)
		switch r.IntN(3) {
		case 0:
			long = time.Hour + some(5*time.Minute) // about when records are forgotten
		case 1:
			long = 56*time.Minute + some(4*time.Minute) // what was issued just before lives on
		}
		s.jump(long)
		for _, b := range s.brokers {
			if b.up() {
				_ = b.catchUp()
				s.prune(b)
			}
		}
	case n < 98:
		s.keepCopy()
	case n < 99:
		if r.IntN(3) == 0 {
			s.putBack()
		} else {
			s.restore(r)
		}
	case n < 102:
		s.raise(f)
	case n < 108:
		if !s.calm {
			s.second(op, r)
		}
	case n < 113:
		for range 3 {
			if len(s.tokens) > 0 {
				k := s.tokens[len(s.tokens)-1-r.IntN(min(len(s.tokens), 20))]
				s.verifiers[r.IntN(len(s.verifiers))].use(k, r)
			}
		}
	case n < 114:
		relay := s.relays[r.IntN(len(s.relays))]
		if s.signs && !relay.trusted() {
			relay.lies, relay.lied = 1+r.IntN(simLies-1), true
			s.note("%s begins to lie: %d", relay.name, relay.lies)
			s.after(some(3*time.Minute), func() { relay.lies = simHonest })
		}
		if r.IntN(3) == 0 {
			s.claims(b, r)
		}
	case n < 117:
		s.passLater(some(30*time.Second), some(4*time.Minute))
	case n < 119:
		s.pass(some(4 * time.Minute))
	case n < 121:
		s.keepCopy()
	default:
		s.restore(r)
	}
}

// meanwhile makes something happen in the middle of the issue that follows.
func (s *sim) meanwhile(r *rand.Rand) {
	if s.calm && r.IntN(2) == 0 {
		return
	}
	revoke := func() { s.revoke(s.brokers[0], r) }
	switch r.IntN(12) {
	case 0, 1:
		s.asking = revoke
	case 2, 3:
		s.inside = revoke
	case 4:
		s.inside = func() { // the process is paused there, and its machine is not
			revoke()
			s.note("and a long time passes")
			s.jump(50 * time.Minute)
		}
	}
}

// passLater lets time pass in a while.
func (s *sim) passLater(in, pass time.Duration) {
	s.after(in, func() {
		if s.done < simActions {
			s.pass(pass)
		}
	})
}

// pass lets minutes pass, after which brokers prune, as they do every minute.
func (s *sim) pass(d time.Duration) {
	s.note("%s pass", d)
	s.jump(d)
	for _, b := range s.brokers {
		if b.up() {
			s.prune(b)
		}
	}
}

// goDeaf: a broker hears nothing of what others append to the store, until it wants to
// append itself.
func (s *sim) goDeaf(b *simBroker, d time.Duration) {
	b.deaf = s.now + d
	s.note("%s hears nothing of what others append for %s", b.name, d)
	s.after(d, func() {
		if b.up() {
			_ = b.catchUp()
		}
	})
}

func (s *sim) head() feed.Position {
	st, _ := s.store.Reopen().State(context.Background())
	return st.Head
}

func (s *sim) restart(f *simFollower) {
	s.note("%s restarts", f.name)
	for _, x := range s.relays {
		if &x.simFollower == f {
			x.restart()
		}
	}
	for _, x := range s.verifiers {
		if &x.simFollower == f {
			x.restart()
		}
	}
}

// raise gives a follower a larger bound while it runs.
func (s *sim) raise(f *simFollower) {
	f.bound = 30 * time.Second
	f.cut()
}

func (s *sim) prune(b *simBroker) {
	before := s.horizon()
	if err := b.b.Prune(context.Background()); err != nil {
		s.violation("internal: pruning: %v", err)
	}
	if after := s.horizon(); after != before {
		s.counts["pruned"]++
		s.note("%s prunes up to %s", b.name, after)
	}
}

func (s *sim) horizon() feed.Position {
	st, _ := s.store.Reopen().State(context.Background())
	return st.Horizon
}

// someone is a workload, or a thief with a copy of its SVID.
func (s *sim) someone(r *rand.Rand) simCaller {
	if len(s.stolenSVIDs) > 0 && r.IntN(5) == 0 {
		return s.stolenSVIDs[r.IntN(len(s.stolenSVIDs))]
	}
	return *s.callers[r.IntN(len(s.callers))]
}

func (s *sim) request(r *rand.Rand) broker.Request {
	req := broker.Request{Audience: simAudience(simID(r.IntN(5)))}
	if r.IntN(2) == 0 {
		req.TTL = time.Duration(1+r.IntN(60)) * time.Minute
	}
	for _, scope := range []string{"read", "write", "admin"} {
		if r.IntN(3) == 0 {
			req.Scopes = append(req.Scopes, scope)
		}
	}
	return req
}

func (s *sim) issue(b *simBroker, r *rand.Rand) {
	if !b.up() {
		return
	}
	c := s.someone(r)
	cred, err := b.b.Issue(context.Background(), c.Caller, s.request(r))
	s.issued(b, c, nil, cred, err)
}

func (s *sim) exchange(b *simBroker, r *rand.Rand) {
	if !b.up() || len(s.tokens) == 0 {
		return
	}
	parent := s.tokens[len(s.tokens)-1-r.IntN(min(len(s.tokens), 5))]
	var c *simCaller
	for _, other := range s.callers {
		if simAudience(other.ID) == parent.claims.Audience {
			c = other
		}
	}
	if c == nil {
		return
	}
	req := s.request(r)
	req.Subject = parent.secret
	if r.IntN(2) == 0 {
		req.TTL, req.Scopes = 0, nil
	}
	cred, err := b.b.Exchange(context.Background(), c.Caller, req)
	s.issued(b, *c, parent, cred, err)
}

// issued checks what a broker gave out.
func (s *sim) issued(b *simBroker, c simCaller, parent *simToken, cred *broker.Credential, err error) {
	if err != nil {
		var refusal *broker.Refusal
		if !errors.As(err, &refusal) {
			s.violation("internal: %v", err)
		} else {
			s.counts["denied "+refusal.Reason]++
			s.note("%s refuses %s: %v", b.name, c.ID, err)
		}
		return
	}
	what := "issued"
	if b.gagged {
		s.violation("I1: %s issues, though it was shown a signed head that its log lacks", b.name)
	}
	k := &simToken{name: fmt.Sprint("t", len(s.tokens)), secret: cred.Token, parent: parent, issued: s.now}
	t, err := token.Parse(cred.Token.Reveal(), func(id token.KeyID) (token.PublicKey, bool) { k, ok := s.made[id]; return k, ok })
	if err != nil {
		s.violation("internal: a credential that doesn't parse: %v", err)
		return
	}
	k.print = t.Fingerprint
	s.byPrint[k.print] = k
	k.claims, k.svid, k.key = t.Claims, token.ThumbprintOf(c.Leaf), t.Self().Key
	k.expires = s.now + t.Expires.Sub(b.Wall(s))
	if parent != nil {
		what = "exchanged"
		k.name += " of " + parent.name
		k.expires = min(k.expires, parent.expires)
		s.checkNarrow(k, parent)
		if parent.forged {
			s.violation("I9: %s laundered the forged %s", b.name, parent.name)
		}
	}
	s.counts[what]++
	s.note("%s gives %s to %s for %s at %s, expires %s", b.name, k.name, c.ID, t.Audience, cred.Grant.Position, t.Expires.Sub(simTime(0)))
	if g, err := b.store.Grant(context.Background(), t.Grant()); err != nil || g.Fingerprint != t.Fingerprint {
		s.violation("P1: %s released %s, which is not on record: %v", b.name, k.name, err)
	}
	s.checkLocks(c, k)
	s.tokens = append(s.tokens, k)
	if len(s.tokens) > 60 {
		s.tokens = slices.Delete(s.tokens, 5, 6) // some old ones stay: they must stay dead
	}
}

func (s *sim) selector(r *rand.Rand) revocation.Selector {
	must := func(sel revocation.Selector, err error) revocation.Selector {
		if err != nil {
			panic(err)
		}
		return sel
	}
	var k *simToken
	if len(s.tokens) > 0 {
		k = s.tokens[len(s.tokens)-1-r.IntN(min(len(s.tokens), 20))]
	}
	c := s.someone(r)
	switch n := r.IntN(16); {
	case n < 6:
		return revocation.Identity(c.ID)
	case n < 8:
		return revocation.SVID(token.ThumbprintOf(c.Leaf))
	case n < 10:
		return must(revocation.Subtree([]string{"spiffe://example.org/ns/prod/*", "spiffe://example.org/ns/*"}[r.IntN(2)]))
	case n < 11:
		return revocation.TrustDomain(c.ID.TrustDomain())
	case n < 12:
		return must(revocation.Audience(simAudience(c.ID)))
	case n < 14 && k != nil:
		return revocation.Grant(k.claims.Lineage[r.IntN(len(k.claims.Lineage))].Grant)
	case n < 15 && k != nil:
		return revocation.Key(k.claims.Lineage[r.IntN(len(k.claims.Lineage))].Key)
	case n == 15:
		return revocation.Everything()
	}
	return revocation.Identity(c.ID)
}

func (s *sim) revoke(b *simBroker, r *rand.Rand) {
	if !b.up() {
		return
	}
	req := broker.Revoke{Reason: "sim", AllowEverything: true}
	for range 1 + r.IntN(2) {
		req.Selectors = append(req.Selectors, s.selector(r))
	}
	if slices.ContainsFunc(req.Selectors, revocation.Selector.Lockable) {
		req.Lock = []broker.LockMode{broker.LockNone, broker.LockNone, broker.LockQuarantine, broker.LockReissue}[r.IntN(4)]
		endable := slices.ContainsFunc(req.Selectors, func(sel revocation.Selector) bool { return sel.Lockable() && sel.Kind() != revocation.KindSVID })
		if req.Lock != broker.LockNone && endable && r.IntN(4) == 0 {
			req.LockEnds = b.Wall(s).Add(time.Duration(1+r.IntN(120)) * time.Minute)
		}
	}
	rec, err := b.b.Revoke(context.Background(), simOperator, req)
	if err != nil {
		s.violation("internal: revoking: %v", err)
		return
	}
	s.counts["revoked"]++
	if rec.Details.Lock != broker.LockNone {
		s.counts["locked"]++
	}
	if b.key != nil && b.b.KeyRevoked(b.key.id) {
		b.newKey()
	}
}

// simOperator needs no second person.
var simOperator = broker.Caller{Local: "break-glass:uid=0"}

func (s *sim) lift(b *simBroker, r *rand.Rand) {
	if !b.up() {
		return
	}
	locks := b.b.Locks()
	if len(locks) == 0 {
		return
	}
	l := locks[r.IntN(len(locks))]
	if _, err := b.b.Lift(context.Background(), simOperator, l.Number, "sim", ""); err == nil {
		s.counts["lifted"]++
	} else {
		var refusal *broker.Refusal
		if !errors.As(err, &refusal) {
			s.violation("internal: lifting: %v", err)
		}
	}
}

// thief copies an SVID, or a broker's key and writes with it what it likes.
func (s *sim) thief(b *simBroker, r *rand.Rand) {
	if r.IntN(2) == 0 {
		s.stolenSVIDs = append(s.stolenSVIDs, *s.callers[r.IntN(len(s.callers))])
		return
	}
	if !b.up() {
		return
	}
	key := b.key
	if s.stolen[key.id] == nil {
		s.stolen[key.id] = key
		s.note("a thief has key %s", key.id)
	}
	k, err := s.forge(key, b.b.Head(), r)
	if err != nil {
		s.violation("internal: forging: %v", err)
		return
	}
	s.counts["forged"]++
	s.tokens = append(s.tokens, k)
	s.after(s.between(20*time.Second), func() {
		if !b.up() || b.b.KeyRevoked(key.id) || s.quiet > 0 && s.now > s.quiet {
			return
		}
		if b.key == key {
			b.newKey()
		}
		if _, err := b.b.Revoke(context.Background(), simOperator, broker.Revoke{Selectors: []revocation.Selector{revocation.Key(key.id)}, Reason: "stolen"}); err != nil {
			s.violation("internal: revoking a key: %v", err)
		}
	})
}

// forge makes a token that was never recorded, sometimes with a position to come.
func (s *sim) forge(key *simKey, at feed.Position, r *rand.Rand) (*simToken, error) {
	c := s.callers[r.IntN(len(s.callers))]
	now := simTime(s.now).Truncate(time.Second)
	id, err := token.NewGrantID(c.ID, now, simRand{r})
	if err != nil {
		return nil, err
	}
	if n := len(s.tokens); n > 0 && r.IntN(3) == 0 { // of another that is on record
		self := s.tokens[n-1].claims.Self()
		id = self.Grant
		for _, other := range s.callers {
			if other.ID == self.Identity {
				c = other
			}
		}
	}
	position := at.Token()
	if r.IntN(2) == 0 {
		position.Rev += uint64(1 + r.IntN(5)) // and a sum that nobody knows yet
	}
	claims := token.Claims{
		Issuer: issuer, Audience: simAudience(simID(r.IntN(5))), Scopes: []string{"admin"}, Transaction: "forged-transaction",
		Lineage:  []token.Member{{Identity: c.ID, Grant: id, Key: key.id, SVID: token.ThumbprintOf(c.Leaf)}},
		IssuedAt: now, NotBefore: now, Expires: now.Add(token.MaxTTL), Binding: token.BindingSPIFFE, Position: position,
	}
	u, err := token.Encode(&claims, token.ES256)
	if err != nil {
		return nil, err
	}
	secret, err := u.Sign(key.private)
	k := &simToken{name: fmt.Sprint("forged", len(s.tokens)), secret: secret, claims: claims, svid: claims.Self().SVID, key: key.id, issued: s.now, expires: s.now + token.MaxTTL, forged: true, print: u.Fingerprint()}
	s.byPrint[k.print] = k
	return k, err
}

// foreignKey is what a process does that can write the store: it inserts a key, and signs
// with it.
func (s *sim) foreignKey(b *simBroker) {
	if s.keys == len(simKeys()) || !b.up() {
		return
	}
	key := s.makeKey()
	s.stolen[key.id] = key
	s.foreign[key.id] = s.now
	s.insertKey(b, key, "mine")
}

// insertKey writes a key into the store, past the broker, and makes a token with it.
func (s *sim) insertKey(b *simBroker, key *simKey, signature string) {
	_, err := b.store.Append(context.Background(), func(feed.Position) (broker.Record, error) {
		k := simKeyRecord(key, signature)
		return broker.Record{Event: feed.Event{Key: &k}, Details: broker.Details{Time: b.Wall(s), Actor: "a thief"}}, nil
	})
	if err != nil {
		s.violation("internal: inserting a key: %v", err)
		return
	}
	k, err := s.forge(key, b.b.Head(), s.rnd)
	if err != nil {
		s.violation("internal: forging: %v", err)
		return
	}
	s.note("a thief inserts key %s (%s)", key.id, signature)
	s.tokens = append(s.tokens, k)
}
