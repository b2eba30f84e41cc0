package broker_test

import (
	"context"
	"crypto/rand"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk/spiffetest"
	"pgregory.net/rapid"
)

// giveBack gives back or fails the test.
func (w *world) giveBack(c broker.Caller, secret token.Secret) {
	w.t.Helper()
	if err := w.b.GiveBack(ctx, c, secret); err != nil {
		w.t.Fatal(err)
	}
}

// moot checks that the last give-back changed nothing, and what the audit says of it.
func (w *world) moot(head feed.Position, outcome, reason string) {
	w.t.Helper()
	if now := w.b.Head(); now != head {
		w.t.Errorf("%s: the head moved from %s to %s", reason, head, now)
	}
	if e := w.last(); e.Action != broker.ActionGiveBack || e.Outcome != outcome || e.Reason != reason {
		w.t.Errorf("audited %+v, want %s %s", e, outcome, reason)
	}
}

// What is given back is dead with all that derives from it, at once, everywhere, and over
// a restart; nothing else is. It is marked as no operator's doing.
func TestGiveBack(t *testing.T) {
	w := newWorld(t)
	payments, orders := w.caller("payments"), w.caller("orders")
	root := w.issue(payments, orders.ID.String())
	sibling := w.issue(payments, orders.ID.String())
	derived := w.exchange(orders, root.Token, "ledger")
	other := w.exchange(orders, sibling.Token, "ledger")

	w.giveBack(payments, root.Token)
	e := w.last()
	rec, err := w.b.Revocation(w.b.Head().Seq)
	if err != nil {
		t.Fatal(err)
	}
	if e.Outcome != "allowed" || e.Action != broker.ActionGiveBack || e.Grant != root.Grant.ID().String() || e.Sequence != rec.Seq || e.Actor != payments.ID.String() {
		t.Errorf("audited %+v", e)
	}
	if !rec.Details.GivenBack || rec.Details.Lock != broker.LockNone || rec.Details.Actor != payments.ID.String() {
		t.Errorf("the record: %+v", rec.Details)
	}
	check := func(when string) {
		t.Helper()
		for cred, want := range map[*broker.Credential]revocation.Reason{
			root: revocation.Revoked, derived: revocation.Revoked, sibling: revocation.Alive, other: revocation.Alive,
		} {
			if got := w.verdict(cred.Token); got != want {
				t.Errorf("%s: a verifier finds it %s, want %s", when, got, want)
			}
		}
		_, err := w.b.Exchange(ctx, orders, broker.Request{Audience: "ledger", Subject: root.Token})
		refused(t, err, broker.ErrSubjectRevoked)
		if len(w.b.Locks()) != 0 {
			t.Errorf("%s: a give-back made a lock", when)
		}
		w.admitted(payments, true, when)
	}
	check("at once")
	w.restart()
	check("after a restart")

	// Operators aren't shown it unless they ask.
	operators := w.revoke(broker.LockNone, revocation.Identity(id("somebody")))
	if list := w.b.Revocations(0, 10, false); len(list) != 1 || list[0].Seq != operators.Seq {
		t.Errorf("operators see %+v", list)
	}
	if list := w.b.Revocations(0, 10, true); len(list) != 2 || list[1].Seq != rec.Seq {
		t.Errorf("with give-backs: %+v", list)
	}
}

// A derived credential is its presenter's, and giving it back leaves its parent alone.
func TestGiveBackDerived(t *testing.T) {
	w := newWorld(t)
	payments, orders := w.caller("payments"), w.caller("orders")
	root := w.issue(payments, orders.ID.String())
	derived := w.exchange(orders, root.Token, "ledger")
	head := w.b.Head()
	w.giveBack(payments, derived.Token) // its root, and not its presenter
	w.moot(head, "refused", "NOT_HOLDER")
	w.giveBack(orders, derived.Token)
	if got := w.verdict(derived.Token); got != revocation.Revoked {
		t.Errorf("the derived one is %s", got)
	}
	if got := w.verdict(root.Token); got != revocation.Alive {
		t.Errorf("its parent is %s", got)
	}
}

// Nobody but the holder changes or learns anything, and dead credentials make no record.
func TestGiveBackMoot(t *testing.T) {
	w := newWorld(t)
	payments := w.caller("payments")
	cred := w.issue(payments, "orders")
	invented, err := token.NewGrantID(payments.ID, noon, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	stolen := w.forge(func(c *token.Claims) { c.Lineage[0].Grant = invented }, cred.Token)
	elsewhere := w.forge(func(c *token.Claims) { c.Issuer = "https://elsewhere.example" }, cred.Token)
	changed := w.forge(func(c *token.Claims) { c.Scopes = []string{"admin"} }, cred.Token)

	head := w.b.Head()
	for _, tc := range []struct {
		name   string
		by     broker.Caller
		secret token.Secret
		reason string
		alert  bool
	}{
		{"another's", w.caller("orders"), cred.Token, "NOT_HOLDER", false},
		{"an operator's", w.operator(), cred.Token, "NOT_HOLDER", false},
		{"over the break-glass socket", broker.Caller{Local: "break-glass:uid=0"}, cred.Token, "NOT_HOLDER", false},
		{"no token", payments, token.NewSecret("nonsense"), "SUBJECT_TOKEN_MALFORMED", false},
		{"nothing", payments, token.Secret{}, "SUBJECT_TOKEN_MALFORMED", false},
		{"another issuer's", payments, elsewhere, "SUBJECT_TOKEN_MALFORMED", false},
		{"one never recorded", payments, stolen, "SUBJECT_TOKEN_UNKNOWN", true},
		{"one recorded otherwise", payments, changed, "SUBJECT_TOKEN_UNKNOWN", true},
	} {
		if err := w.b.GiveBack(ctx, tc.by, tc.secret); err != nil {
			t.Errorf("%s: %v: somebody learns something", tc.name, err)
		}
		w.moot(head, "refused", tc.reason)
		if w.last().Alert != tc.alert {
			t.Errorf("%s: alert %v", tc.name, w.last().Alert)
		}
	}
	if got := w.verdict(cred.Token); got != revocation.Alive {
		t.Fatalf("it is %s", got)
	}

	w.giveBack(payments, cred.Token)
	head = w.b.Head()
	w.giveBack(payments, cred.Token)
	w.moot(head, "allowed", "ALREADY_REVOKED")
	w.restart()
	w.giveBack(payments, cred.Token)
	w.moot(head, "allowed", "ALREADY_REVOKED")

	expired := w.issue(payments, "orders")
	late := w.issue(payments, "orders")
	w.clock.advance(broker.DefaultTTL + token.Leeway - 1)
	w.giveBack(payments, late.Token) // verifiers still accept it
	if e := w.last(); e.Reason != "" || e.Sequence != head.Seq+1 {
		t.Errorf("given back within the leeway: %+v", e)
	}
	head = w.b.Head()
	w.clock.advance(1)
	w.giveBack(payments, expired.Token)
	w.moot(head, "allowed", "ALREADY_EXPIRED")

	killed := w.issue(payments, "orders")
	head = feed.Position{}
	w.revoke(broker.LockQuarantine, revocation.Identity(payments.ID))
	head = w.b.Head()
	w.giveBack(payments, killed.Token)
	w.moot(head, "allowed", "ALREADY_REVOKED")
}

// Of calls at once one makes the record.
func TestGiveBackAtOnce(t *testing.T) {
	w := newWorld(t)
	payments := w.caller("payments")
	cred := w.issue(payments, "orders")
	before := w.b.Head().Seq
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			if err := w.b.GiveBack(ctx, payments, cred.Token); err != nil {
				t.Errorf("giving back: %v", err)
			}
		})
	}
	wg.Wait()
	if n := w.b.Head().Seq - before; n != 1 {
		t.Errorf("%d records for one credential", n)
	}

	// An operator is first, by the time it is to be recorded.
	cred = w.issue(payments, "orders")
	var head feed.Position
	w.store.set(func(s *tap) {
		s.beforeAppend = func() error {
			w.store.set(func(s *tap) { s.beforeAppend = nil })
			w.revoke(broker.LockNone, revocation.Grant(cred.Grant.ID()))
			head = w.b.Head()
			return nil
		}
	})
	w.giveBack(payments, cred.Token)
	w.moot(head, "allowed", "ALREADY_REVOKED")
}

// A refusal is said only to who holds the credential: policy's, and of an SVID or a store
// that can't be trusted now.
func TestGiveBackRefused(t *testing.T) {
	w := newWorld(t)
	payments := w.caller("payments")
	cred := w.issue(payments, "orders")
	w.policy.set(func(q broker.Question) (broker.Decision, error) {
		d := yes(q)
		d.Allow = q.Action != broker.ActionGiveBack
		if q.Action == broker.ActionGiveBack && (q.Parent == nil || q.Parent.Grant() != cred.Grant.ID()) {
			t.Errorf("policy is asked about %+v", q.Parent)
		}
		return d, nil
	})
	refused(t, w.b.GiveBack(ctx, payments, cred.Token), broker.ErrPolicyDenied)
	if err := w.b.GiveBack(ctx, w.caller("orders"), cred.Token); err != nil {
		t.Errorf("a stranger hears of policy: %v", err)
	}
	w.policy.set(nil)
	w.store.set(func(s *tap) { s.beforeAppend = func() error { return broker.ErrStoreFull } })
	refused(t, w.b.GiveBack(ctx, payments, cred.Token), broker.ErrFull)
	w.store.set(func(s *tap) { s.beforeAppend = nil })
	late := payments
	w.clock.advance(1000 * time.Hour)
	refused(t, w.b.GiveBack(ctx, late, cred.Token), broker.ErrSVIDExpired)
}

// Each identity gives back at its own rate, by elapsed time; what changes nothing is free.
func TestGiveBackRate(t *testing.T) {
	w := newWorld(t)
	payments, web := w.caller("payments"), w.caller("web")
	w.limit(broker.Limits{GiveBacksPerMinute: 6})
	creds := make([]*broker.Credential, 9)
	for i := range creds {
		creds[i] = w.issue(payments, "orders")
	}
	for i := range 6 {
		w.giveBack(payments, creds[i].Token)
		w.giveBack(payments, creds[i].Token)
		w.giveBack(web, creds[7].Token)
	}
	head := w.b.Head()
	r := refused(t, w.b.GiveBack(ctx, payments, creds[6].Token), broker.ErrGiveBackLimited)
	if w.b.Head() != head || r.Metadata["limit"] != "6" || w.last().Reason != "GIVE_BACK_RATE_LIMITED" {
		t.Errorf("refused as %+v", r)
	}
	w.giveBack(web, w.issue(web, "orders").Token) // others aren't touched
	wait := retryAfter(t, r)
	w.clock.set(time.Hour)
	w.clock.set(-time.Hour)
	w.clock.advance(wait - time.Millisecond)
	refused(t, w.b.GiveBack(ctx, payments, creds[6].Token), broker.ErrGiveBackLimited)
	w.clock.advance(time.Millisecond)
	w.giveBack(payments, creds[6].Token)
	refused(t, w.b.GiveBack(ctx, payments, creds[7].Token), broker.ErrGiveBackLimited)

	w.policy.set(nil) // no limit of policy's is the broker's own
	c := w.caller("many")
	for range broker.GiveBacksPerMinute {
		w.giveBack(c, w.issue(c, "orders").Token)
	}
	refused(t, w.b.GiveBack(ctx, c, w.issue(c, "orders").Token), broker.ErrGiveBackLimited)
	w.clock.advance(time.Hour)
	w.prune()
	if n := w.b.Issuers(); n != 0 {
		t.Errorf("%d identities are remembered for nothing", n)
	}
}

// The set has a maximum, which give-backs keep to and operators don't. The horizon makes
// room.
func TestGiveBackMaximum(t *testing.T) {
	w := newWorld(t)
	w.maxRevocations = 4
	w.restart()
	c := w.caller("payments")
	back := func() error {
		t.Helper()
		return w.b.GiveBack(ctx, c, w.issue(c, "orders").Token)
	}
	full := func() {
		t.Helper()
		head := w.b.Head()
		cred := w.issue(c, "orders")
		r := refused(t, w.b.GiveBack(ctx, c, cred.Token), broker.ErrGiveBackFull)
		if r.Metadata["limit"] != "4" || w.b.Head() != head || w.verdict(cred.Token) != revocation.Alive {
			t.Errorf("refused as %+v", r)
		}
		retryAfter(t, r)
	}
	for range 3 {
		if err := back(); err != nil {
			t.Fatal(err)
		}
	}
	last := w.issue(c, "orders")
	w.giveBack(c, last.Token)
	full()
	w.giveBack(c, last.Token) // what is dead takes no room
	for range 2 {             // operators may
		w.revoke(broker.LockNone, revocation.Grant(w.issue(c, "orders").Grant.ID()))
	}
	w.restart()
	full()
	w.clock.advance(broker.ForgetAfter + 1)
	w.prune()
	c = w.caller("payments") // its SVID has expired
	for range 4 {
		if err := back(); err != nil {
			t.Errorf("after the horizon has moved: %v", err)
		}
	}
	full()
}

// No give-back leaves before the horizon passes it, when its credential has long expired
// and the log is pruned: a verifier behind a relay on another host wants every record
// above the horizon, and a new one with a slow clock goes by them alone.
func TestGiveBackLeavesNoHole(t *testing.T) {
	w := newWorld(t)
	payments := w.caller("payments")
	cred := w.issue(payments, "orders")
	w.giveBack(payments, cred.Token)
	w.revoke(broker.LockNone, revocation.Identity(id("somebody")))
	w.clock.advance(broker.ForgetAfter)
	w.prune()
	if got := w.verdict(cred.Token); got != revocation.Revoked {
		t.Errorf("a verifier whose clock stands still finds it %s", got)
	}
	f := w.signed("instance-far", false)
	var (
		view   feed.View
		screen feed.Screen
	)
	apply := func(all []feed.Delivery, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range all {
			if err := view.Apply(d, 1); err != nil {
				t.Fatal(err)
			}
		}
	}
	for d, ok, _ := f.Next(100); ok; d, ok, _ = f.Next(100) {
		apply(screen.Deliver(&view, d))
	}
	proof, err := f.Answer(ctx, "nonce-of-a-ping")
	if err != nil {
		t.Fatal(err)
	}
	apply(screen.Signed(&view, w.proven("nonce-of-a-ping", proof)))
	if view.Position() != w.b.Head() {
		t.Errorf("a verifier on another host is at %s, the head is %s", view.Position(), w.b.Head())
	}
}

// The broker dies in the middle of a give-back: it is done or it isn't, and asking again
// makes it so.
func TestGiveBackCrash(t *testing.T) {
	w := newWorld(t)
	payments := w.caller("payments")
	cred := w.issue(payments, "orders")
	w.store.set(func(s *tap) { s.beforeAppend = func() error { return broker.ErrStoreClosed } })
	refused(t, w.b.GiveBack(ctx, payments, cred.Token), broker.ErrStoreLost)
	w.restart()
	if got := w.verdict(cred.Token); got != revocation.Alive {
		t.Fatalf("nothing was written, and it is %s", got)
	}
	w.giveBack(payments, cred.Token)
	// Who gives up waiting doesn't undo it.
	other := w.issue(payments, "orders")
	gone, cancel := context.WithCancel(ctx)
	cancel()
	if err := w.b.GiveBack(gone, payments, other.Token); err != nil && !errors.Is(err, context.Canceled) {
		t.Errorf("giving up: %v", err)
	}
	w.giveBack(payments, other.Token)
	w.restart()
	for _, c := range []*broker.Credential{cred, other} {
		if got := w.verdict(c.Token); got != revocation.Revoked {
			t.Errorf("after a restart it is %s", got)
		}
	}
}

// Whatever is issued, derived, given back, revoked, forgotten and restarted: what was
// given back is dead with what derives from it, nothing else is, and no give-back makes
// the set larger than it may be.
func TestGiveBackProperty(t *testing.T) {
	w := newWorld(t)
	w.maxRevocations = 12
	w.restart()
	verifier := w.callerWith(id("verifier"), spiffetest.SVIDOptions{NotAfter: noon.Add(100_000 * time.Hour)})
	var view feed.View
	type held struct {
		cred   *broker.Credential
		by     broker.Caller
		parent *held
		dead   bool // given back or revoked, itself
	}
	dead := func(h *held) bool {
		for ; h != nil; h = h.parent {
			if h.dead {
				return true
			}
		}
		return false
	}
	rapid.Check(t, func(rt *rapid.T) {
		var all []*held
		callers := map[string]broker.Caller{}
		caller := func(name string) broker.Caller {
			c, ok := callers[name]
			if !ok || w.clock.Now().Add(time.Minute).After(c.Leaf.NotAfter) {
				c = w.caller(name)
				callers[name] = c
			}
			return c
		}
		some := func(rt *rapid.T) *held {
			if len(all) == 0 {
				rt.Skip()
			}
			return all[rapid.IntRange(0, len(all)-1).Draw(rt, "which")]
		}
		live := func(h *held) bool { return w.clock.Now().Before(h.cred.Grant.Expires) }
		rt.Repeat(map[string]func(*rapid.T){
			"issue": func(rt *rapid.T) {
				c := caller(rapid.SampledFrom([]string{"a", "b"}).Draw(rt, "who"))
				cred, err := w.b.Issue(ctx, c, broker.Request{Audience: id("c").String()})
				if err != nil {
					rt.Fatal(err)
				}
				all = append(all, &held{cred: cred, by: c})
			},
			"exchange": func(rt *rapid.T) {
				parent, c := some(rt), caller("c")
				cred, err := w.b.Exchange(ctx, c, broker.Request{Audience: id("c").String(), Subject: parent.cred.Token})
				switch ok := !dead(parent) && live(parent); {
				case errors.Is(err, broker.ErrChainTooDeep):
				case err == nil && ok:
					all = append(all, &held{cred: cred, by: c, parent: parent})
				case err == nil || ok:
					rt.Errorf("deriving from one that is dead=%v, live=%v: %v", dead(parent), live(parent), err)
				}
			},
			"give back": func(rt *rapid.T) {
				h := some(rt)
				by := caller(rapid.SampledFrom([]string{"a", "b", "c"}).Draw(rt, "by"))
				before := w.b.SetLen()
				err := w.b.GiveBack(ctx, by, h.cred.Token)
				after := w.b.SetLen()
				switch {
				case err == nil && after > before:
					if by.ID != h.by.ID || dead(h) || after > w.maxRevocations {
						rt.Errorf("%s gave back what was %s's (dead=%v, live=%v), and the set has %d", by.ID, h.by.ID, dead(h), live(h), after)
					}
					h.dead = true
				case err == nil:
					if by.ID == h.by.ID && !dead(h) && live(h) {
						rt.Errorf("%s gave back its own, and nothing happened", by.ID)
					}
				case errors.Is(err, broker.ErrGiveBackFull) && before >= w.maxRevocations, errors.Is(err, broker.ErrGiveBackLimited):
				default:
					rt.Errorf("giving back with %d in the set: %v", before, err)
				}
			},
			"revoke": func(rt *rapid.T) {
				h := some(rt)
				w.revoke(broker.LockNone, revocation.Grant(h.cred.Grant.ID()))
				h.dead = true
			},
			"pass": func(rt *rapid.T) {
				w.clock.advance(time.Duration(rapid.IntRange(0, 1500).Draw(rt, "pause")) * time.Second)
				w.prune()
			},
			"restart": func(rt *rapid.T) {
				if rapid.IntRange(0, 24).Draw(rt, "rarely") == 0 {
					w.restart()
				}
			},
			"": func(rt *rapid.T) {
				f, err := w.b.Subscribe(ctx, verifier, broker.Subscriber{
					Instance: "instance-one", Audiences: []string{"orders"}, MaxStaleness: time.Second, Position: view.Position(),
				})
				if err != nil {
					rt.Fatal(err)
				}
				defer f.Close()
				drain(t, f, &view)
				for _, h := range all { // expired ones may be forgotten
					if got := view.Judge(h.cred.Grant.Subject()); live(h) && (got.Reason == revocation.Alive) == dead(h) {
						rt.Errorf("a credential that is dead=%v is %s", dead(h), got.Reason)
					}
				}
			},
		})
	})
}
