package revocation_test

import (
	"testing"

	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"pgregory.net/rapid"
)

// world is a history of issuing, exchanging and revoking, kept whole: the plain
// model looks at all records with Selector.Matches, while the Set forgets.
type world struct {
	t       testing.TB
	set     *revocation.Set
	head    uint64
	horizon uint64
	records map[uint64][]revocation.Selector
	tokens  []*issuedToken
}

type issuedToken struct {
	subject revocation.Subject
	parent  *issuedToken
	expired bool
}

// verdict is the promise, said as plainly as it can be.
func (w *world) verdict(sub revocation.Subject) revocation.Reason {
	dead := revocation.Alive
	for seq, selectors := range w.records {
		for _, sel := range selectors {
			if !sel.Matches(sub) {
				continue
			}
			if sel.Kind() == revocation.KindKey {
				return revocation.KeyRevoked
			}
			if seq > sub.Position.Rev {
				dead = revocation.Revoked
			}
		}
	}
	if sub.Position.Rev < w.horizon {
		return revocation.BelowHorizon
	}
	return dead
}

// identities are few and close to each other, so that histories meet.
var identities = []spiffeid.ID{
	id("td"), id("td/a"), id("td/ab"), id("td/a/b"), id("td/a/b/c"), id("td/ab/b"), id("td/b/a"), id("td2/a/b"), id("td2/a"),
}

func (w *world) member(t *rapid.T) token.Member {
	who := rapid.SampledFrom(identities).Draw(t, "identity")
	m := token.Member{
		Identity: who,
		Grant:    grant(w.t, who, len(w.tokens)+1),
		Key:      key(w.t, rapid.IntRange(1, 12).Draw(t, "key")),
	}
	if n := rapid.IntRange(0, 4).Draw(t, "svid"); n > 0 {
		m.SVID = svid(n)
	}
	return m
}

func (w *world) add(t *rapid.T, parent *issuedToken, lineage []token.Member) {
	rev := rapid.Uint64Range(max(w.horizon, w.head-min(w.head, 2)), w.head).Draw(t, "rev")
	sub := revocation.Subject{
		Position: token.Position{Era: era, Rev: rev, Sum: sumAt(rev)},
		Audience: rapid.SampledFrom([]string{"x", "y", "td"}).Draw(t, "audience"),
		Lineage:  lineage,
	}
	// A grant signed at an older head commits if no record since then matches it.
	if rev < w.head && w.verdict(sub) != revocation.Alive {
		t.Skip("a store refuses")
	}
	w.tokens = append(w.tokens, &issuedToken{subject: sub, parent: parent})
}

func (w *world) issue(t *rapid.T) { w.add(t, nil, []token.Member{w.member(t)}) }

func (w *world) exchange(t *rapid.T) {
	if len(w.tokens) == 0 {
		t.Skip("nothing to exchange")
	}
	parent := rapid.SampledFrom(w.tokens).Draw(t, "parent")
	if parent.expired || len(parent.subject.Lineage) == token.MaxDepth || w.verdict(parent.subject) != revocation.Alive {
		t.Skip("a broker refuses")
	}
	lineage := append([]token.Member(nil), parent.subject.Lineage...)
	w.add(t, parent, append(lineage, w.member(t)))
}

func (w *world) selector(t *rapid.T) revocation.Selector {
	who := rapid.SampledFrom(identities).Draw(t, "whom")
	switch rapid.IntRange(0, 15).Draw(t, "kind") {
	case 0, 1, 2:
		return revocation.Identity(who)
	case 3, 4, 5:
		if who.Path() != "" {
			return must(revocation.Subtree(who.String() + "/*"))
		}
		return revocation.TrustDomain(who.TrustDomain())
	case 6, 7:
		return must(revocation.Audience(rapid.SampledFrom([]string{"x", "y"}).Draw(t, "audience")))
	case 8, 9:
		return revocation.SVID(svid(rapid.IntRange(0, 4).Draw(t, "svid")))
	case 10:
		return revocation.Key(key(w.t, rapid.IntRange(1, 12).Draw(t, "key")))
	case 11:
		return revocation.Everything()
	}
	if len(w.tokens) == 0 {
		return revocation.Identity(who)
	}
	lineage := rapid.SampledFrom(w.tokens).Draw(t, "token").subject.Lineage
	return revocation.Grant(rapid.SampledFrom(lineage).Draw(t, "member").Grant)
}

func (w *world) revoke(t *rapid.T) {
	w.head++
	var selectors []revocation.Selector
	for range rapid.IntRange(1, 3).Draw(t, "selectors") {
		selectors = append(selectors, w.selector(t))
	}
	w.records[w.head] = selectors
	w.set.Know(w.head, sumAt(w.head))
	w.set.Add(w.head, selectors...)
}

// other is a record of the log that revokes nothing: a lift, a key.
func (w *world) other(*rapid.T) {
	w.head++
	w.set.Know(w.head, sumAt(w.head))
}

func (w *world) moveHorizon(t *rapid.T) {
	w.horizon = rapid.Uint64Range(w.horizon, w.head).Draw(t, "horizon")
	w.set.SetHorizon(w.horizon)
}

// forget drops one record early, when what it could match has expired.
func (w *world) forget(t *rapid.T) {
	if w.head == 0 {
		t.Skip("no record")
	}
	seq := rapid.Uint64Range(1, w.head).Draw(t, "forgotten")
	for _, sel := range w.records[seq] {
		for _, tok := range w.tokens {
			if tok.subject.Position.Rev < seq && sel.Matches(tok.subject) {
				tok.expired = true
			}
		}
	}
	for _, tok := range w.tokens { // a child never outlives its parent
		if tok.parent != nil && tok.parent.expired {
			tok.expired = true
		}
	}
	w.set.Forget(seq)
}

// relearn takes a snapshot: all records again, forgotten ones too.
func (w *world) relearn(*rapid.T) {
	for seq, selectors := range w.records {
		w.set.Know(seq, sumAt(seq))
		w.set.Add(seq, selectors...)
	}
}

func (w *world) check(t *rapid.T) {
	for i, tok := range w.tokens {
		got, want := w.set.Judge(tok.subject), w.verdict(tok.subject)
		if tok.expired && want == revocation.Revoked {
			continue // it may be forgotten why
		}
		if got.Reason != want {
			t.Fatalf("token %d (%+v, expired %t): %s, want %s; records %v", i, tok.subject, tok.expired, got.Reason, want, w.records)
		}
		if want == revocation.Revoked && !w.explains(got.By, tok.subject) {
			t.Fatalf("token %d: record %d is blamed and doesn't match it", i, got.By)
		}
	}
	if held := w.set.Head(); held != w.head || w.set.Horizon() != w.horizon {
		t.Fatalf("head %d, horizon %d, want %d, %d", held, w.set.Horizon(), w.head, w.horizon)
	}
}

func (w *world) explains(seq uint64, sub revocation.Subject) bool {
	for _, sel := range w.records[seq] {
		if seq > sub.Position.Rev && sel.Matches(sub) {
			return true
		}
	}
	return false
}

// TestCausalRevocation is promise 2: after any history, a token is accepted exactly
// when no later revocation matches its lineage, and no key of it is revoked.
func TestCausalRevocation(t *testing.T) {
	accepted, refused := 0, 0
	rapid.Check(t, func(rt *rapid.T) {
		w := &world{t: t, set: revocation.NewSet(era), records: map[uint64][]revocation.Selector{}}
		rt.Repeat(map[string]func(*rapid.T){
			"issue": w.issue, "issue again": w.issue, "exchange": w.exchange, "exchange again": w.exchange,
			"revoke": w.revoke, "other": w.other, "horizon": w.moveHorizon, "forget": w.forget, "relearn": w.relearn,
			"": w.check,
		})
		for _, tok := range w.tokens {
			if w.verdict(tok.subject) == revocation.Alive {
				accepted++
			} else {
				refused++
			}
		}
	})
	if accepted == 0 || refused == 0 {
		t.Errorf("%d tokens accepted, %d refused: the histories show nothing", accepted, refused)
	}
}
