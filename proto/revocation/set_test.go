package revocation_test

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const era token.Era = 0x3f9c1a7e

func id(s string) spiffeid.ID { return spiffeid.RequireFromString("spiffe://" + s) }

func grant(t testing.TB, presenter spiffeid.ID, n int) token.GrantID {
	t.Helper()
	g, err := token.NewGrantID(presenter, time.Unix(int64(n), 0), bytes.NewReader(make([]byte, 7)))
	if err != nil {
		t.Fatal(err)
	}
	return g
}

func key(t testing.TB, n int) token.KeyID {
	t.Helper()
	k, err := token.ParseKeyID(fmt.Sprintf("key%05d", n))
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func svid(n int) token.Thumbprint { return token.Thumbprint{byte(n >> 8), byte(n), 1} }

// sumAt is what the tests' log has as its running hash; 0 at its start.
func sumAt(seq uint64) [8]byte {
	if seq == 0 {
		return [8]byte{}
	}
	return [8]byte{byte(seq >> 8), byte(seq), 0xaa}
}

// logOf returns a set that knows all numbers up to head.
func logOf(head uint64) *revocation.Set {
	s := revocation.NewSet(era)
	for seq := uint64(1); seq <= head; seq++ {
		s.Know(seq, sumAt(seq))
	}
	return s
}

// chain is payments, through orders, at the audience ledger, all in prod.
func chain(t testing.TB, rev uint64) revocation.Subject {
	payments, orders := id("example.org/ns/prod/payments"), id("partner.org/ns/prod/orders")
	return revocation.Subject{
		Position: token.Position{Era: era, Rev: rev, Sum: sumAt(rev)},
		Audience: "ledger",
		Lineage: []token.Member{
			{Identity: payments, Grant: grant(t, payments, 1), Key: key(t, 1), SVID: svid(1)},
			{Identity: orders, Grant: grant(t, orders, 2), Key: key(t, 2), SVID: svid(2)},
		},
	}
}

func must(sel revocation.Selector, err error) revocation.Selector {
	if err != nil {
		panic(err)
	}
	return sel
}

// matching are selectors that match the chain, of every kind and every member.
func matching(t testing.TB) map[string]revocation.Selector {
	c := chain(t, 0).Lineage
	return map[string]revocation.Selector{
		"root's grant":           revocation.Grant(c[0].Grant),
		"own grant":              revocation.Grant(c[1].Grant),
		"root":                   revocation.Identity(c[0].Identity),
		"presenter":              revocation.Identity(c[1].Identity),
		"root's namespace":       must(revocation.Subtree("spiffe://example.org/ns/prod/*")),
		"root's upper namespace": must(revocation.Subtree("spiffe://example.org/ns/*")),
		"presenter's namespace":  must(revocation.Subtree("spiffe://partner.org/ns/prod/*")),
		"root's trust domain":    revocation.TrustDomain(c[0].Identity.TrustDomain()),
		"presenter's domain":     revocation.TrustDomain(c[1].Identity.TrustDomain()),
		"audience":               must(revocation.Audience("ledger")),
		"root's SVID":            revocation.SVID(c[0].SVID),
		"presenter's SVID":       revocation.SVID(c[1].SVID),
		"everything":             revocation.Everything(),
	}
}

// sparing are selectors close to those that match.
func sparing(t testing.TB) map[string]revocation.Selector {
	payments := id("example.org/ns/prod/payments")
	return map[string]revocation.Selector{
		"zero":                          {},
		"another grant of the root":     revocation.Grant(grant(t, payments, 9)),
		"a sibling":                     revocation.Identity(id("example.org/ns/prod/payments2")),
		"a child":                       revocation.Identity(id("example.org/ns/prod/payments/db")),
		"a parent":                      revocation.Identity(id("example.org/ns/prod")),
		"the trust domain's own ID":     revocation.Identity(id("example.org")),
		"same path, another domain":     revocation.Identity(id("other.org/ns/prod/payments")),
		"half a segment":                must(revocation.Subtree("spiffe://example.org/ns/pro/*")),
		"a longer segment":              must(revocation.Subtree("spiffe://example.org/ns/production/*")),
		"a subtree below the root":      must(revocation.Subtree("spiffe://example.org/ns/prod/payments/*")),
		"a subtree in another domain":   must(revocation.Subtree("spiffe://other.org/ns/prod/*")),
		"a subtree by an inner segment": must(revocation.Subtree("spiffe://example.org/prod/*")),
		"a trust domain above":          revocation.TrustDomain(id("org").TrustDomain()),
		"a trust domain below":          revocation.TrustDomain(id("sub.example.org").TrustDomain()),
		"another audience":              must(revocation.Audience("ledger2")),
		"the presenter as an audience":  must(revocation.Audience("spiffe://partner.org/ns/prod/orders")),
		"another SVID":                  revocation.SVID(svid(3)),
		"no SVID":                       revocation.SVID(token.Thumbprint{}),
		"another key":                   revocation.Key(key(t, 3)),
		"no key":                        revocation.Key(token.KeyID{}),
	}
}

func judge(t *testing.T, s *revocation.Set, sub revocation.Subject, want revocation.Verdict) {
	t.Helper()
	if got := s.Judge(sub); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
}

// TestEverySelector: each kind, on each member, kills what was issued before it and
// nothing that was issued with knowledge of it.
func TestEverySelector(t *testing.T) {
	for name, sel := range matching(t) {
		t.Run(name, func(t *testing.T) {
			if !sel.Matches(chain(t, 0)) {
				t.Error("Matches says no")
			}
			s := logOf(5)
			s.Add(3, sel)
			for rev := range uint64(6) {
				want := revocation.Verdict{Reason: revocation.Alive}
				if 3 > rev { // not >=: a token of 3 was issued knowing 3
					want = revocation.Verdict{Reason: revocation.Revoked, By: 3}
				}
				judge(t, s, chain(t, rev), want)
			}
		})
	}
}

func TestSparing(t *testing.T) {
	for name, sel := range sparing(t) {
		t.Run(name, func(t *testing.T) {
			if sel.Matches(chain(t, 0)) {
				t.Error("Matches says yes")
			}
			s := logOf(5)
			s.Add(3, sel)
			judge(t, s, chain(t, 0), revocation.Verdict{Reason: revocation.Alive})
		})
	}
}

// TestWholeSegments is the promise of the subtree to the letter.
func TestWholeSegments(t *testing.T) {
	sel := must(revocation.Subtree("spiffe://td/ns/prod/*"))
	for path, want := range map[string]bool{
		"td/ns/prod/db": true, "td/ns/prod/db/a/b": true, "td/ns/prod/prod": true,
		"td/ns/prod": false, "td/ns/production": false, "td/ns/production/db": false, "td/ns/prod-2/db": false,
		"td/ns/pro": false, "td/ns": false, "td": false, "td/x/ns/prod/db": false, "td2/ns/prod/db": false, "td/ns/prod.db": false,
	} {
		sub := revocation.Subject{
			Position: token.Position{Era: era},
			Lineage:  []token.Member{{Identity: id(path), Grant: grant(t, id(path), 1), Key: key(t, 1)}},
		}
		s := logOf(1)
		s.Add(1, sel)
		if got := s.Judge(sub).Reason == revocation.Revoked; got != want {
			t.Errorf("%s: revoked is %t, want %t", path, got, want)
		}
		if got := sel.Matches(sub); got != want {
			t.Errorf("%s: Matches is %t, want %t", path, got, want)
		}
		if got := sel.MatchesCaller(id(path), token.Thumbprint{}); got != want {
			t.Errorf("%s: MatchesCaller is %t, want %t", path, got, want)
		}
	}
}

// TestNoSVID: a member without a certificate is not that of any revoked one.
func TestNoSVID(t *testing.T) {
	sub := chain(t, 0)
	sub.Lineage[0].SVID = token.Thumbprint{}
	s := logOf(2)
	s.Add(1, revocation.SVID(token.Thumbprint{}), revocation.SVID(svid(1)))
	judge(t, s, sub, revocation.Verdict{Reason: revocation.Alive})
}

// TestRevokedKey: whoever stole a key writes any number, in any era, above the head
// or below the horizon; the key stays revoked when all else is forgotten.
func TestRevokedKey(t *testing.T) {
	for member := range 2 {
		s := logOf(10)
		s.Add(4, revocation.Key(key(t, member+1)))
		want := revocation.Verdict{Reason: revocation.KeyRevoked, By: 4}
		check := func() {
			t.Helper()
			for _, rev := range []uint64{0, 3, 4, 5, 10, 11, 1<<64 - 1} {
				for _, e := range []token.Era{era - 1, era, era + 1} {
					sub := chain(t, rev)
					sub.Position.Era = e
					judge(t, s, sub, want)
				}
			}
		}
		check()
		s.Forget(4)
		check()
		s.SetHorizon(9)
		check()
		if !s.KeyRevoked(key(t, member+1)) || s.KeyRevoked(key(t, 7)) {
			t.Error("KeyRevoked is wrong")
		}
	}
	s := logOf(10)
	s.SetHorizon(9)
	s.Add(4, revocation.Key(key(t, 1))) // learnt late, below the horizon
	judge(t, s, chain(t, 10), revocation.Verdict{Reason: revocation.KeyRevoked, By: 4})
}

func TestPositions(t *testing.T) {
	s := logOf(10)
	s.SetHorizon(5)
	at := func(e token.Era, rev uint64, sum [8]byte) revocation.Subject {
		sub := chain(t, rev)
		sub.Position = token.Position{Era: e, Rev: rev, Sum: sum}
		return sub
	}
	for _, tc := range []struct {
		name string
		sub  revocation.Subject
		want revocation.Reason
	}{
		{"at the head", at(era, 10, sumAt(10)), revocation.Alive},
		{"above the head", at(era, 11, sumAt(11)), revocation.Ahead},
		{"at infinity", at(era, 1<<64-1, sumAt(11)), revocation.Ahead},
		{"an earlier era", at(era-1, 7, sumAt(7)), revocation.WrongEra},
		{"an earlier era, a higher number", at(era-1, 99, sumAt(99)), revocation.WrongEra},
		{"a later era", at(era+1, 7, sumAt(7)), revocation.Ahead},
		{"a later era, a lower number", at(era+1, 0, sumAt(0)), revocation.Ahead},
		{"off the log", at(era, 7, sumAt(8)), revocation.OffLog},
		{"off the log at the head", at(era, 10, sumAt(8)), revocation.OffLog},
		{"off the log at the horizon", at(era, 5, sumAt(8)), revocation.OffLog},
		{"at the horizon", at(era, 5, sumAt(5)), revocation.Alive},
		{"below the horizon", at(era, 4, sumAt(4)), revocation.BelowHorizon},
		{"at the start", at(era, 0, sumAt(0)), revocation.BelowHorizon},
	} {
		if got := s.Judge(tc.sub); got != (revocation.Verdict{Reason: tc.want}) {
			t.Errorf("%s: %+v, want %s", tc.name, got, tc.want)
		}
	}
	hole := revocation.NewSet(era) // a snapshot: 7 is not in it
	hole.Know(6, sumAt(6))
	hole.Know(10, sumAt(10))
	judge(t, hole, at(era, 7, sumAt(8)), revocation.Verdict{Reason: revocation.Alive})
	judge(t, hole, at(era, 6, sumAt(8)), revocation.Verdict{Reason: revocation.OffLog})
	judge(t, hole, at(era, 0, sumAt(8)), revocation.Verdict{Reason: revocation.OffLog})
}

// TestHorizon: what it makes needless goes, what can still kill stays, and it never
// moves down, in small steps and in leaps.
func TestHorizon(t *testing.T) {
	for _, steps := range [][]uint64{{5}, {1, 2, 3, 4, 5}, {5, 3, 0}} {
		s := logOf(10)
		sel := revocation.Identity(id("example.org/ns/prod/payments"))
		s.Add(5, sel, revocation.Everything())
		s.Add(6, sel)
		for _, h := range steps {
			s.SetHorizon(h)
		}
		if s.Horizon() != 5 || s.Len() != 1 || s.Head() != 10 || s.Era() != era {
			t.Errorf("%v: horizon %d, %d selectors, head %d", steps, s.Horizon(), s.Len(), s.Head())
		}
		judge(t, s, chain(t, 5), revocation.Verdict{Reason: revocation.Revoked, By: 6})
		judge(t, s, chain(t, 6), revocation.Verdict{Reason: revocation.Alive})
		judge(t, s, chain(t, 4), revocation.Verdict{Reason: revocation.BelowHorizon})
		for seq := range uint64(12) {
			if sum, ok := s.SumAt(seq); ok != (seq >= 5 && seq <= 10) || ok && sum != sumAt(seq) {
				t.Errorf("%v: SumAt(%d) = %x, %t", steps, seq, sum, ok)
			}
		}
		s.Know(3, sumAt(3))
		s.Add(3, revocation.Everything())
		if _, ok := s.SumAt(3); ok || s.Len() != 1 || s.Head() != 10 {
			t.Errorf("%v: what is below the horizon came back", steps)
		}
		s.SetHorizon(1 << 63) // a leap costs what is held, not what it passes
		if _, ok := s.SumAt(10); ok || s.Len() != 0 {
			t.Errorf("%v: %d selectors are left at the end of time", steps, s.Len())
		}
	}
}

// TestLeap: a verifier that holds little of a long log meets its horizon.
func TestLeap(t *testing.T) {
	s := revocation.NewSet(era)
	for _, seq := range []uint64{999, 1000, 1001} {
		s.Know(seq, sumAt(seq))
		s.Add(seq, revocation.Everything(), must(revocation.Audience(fmt.Sprint("a", seq))))
	}
	s.SetHorizon(1000)
	judge(t, s, chain(t, 999), revocation.Verdict{Reason: revocation.BelowHorizon})
	judge(t, s, chain(t, 1000), revocation.Verdict{Reason: revocation.Revoked, By: 1001})
	judge(t, s, chain(t, 1001), revocation.Verdict{Reason: revocation.Alive})
	if s.Len() != 2 {
		t.Errorf("%d selectors are left, want the 2 of record 1001", s.Len())
	}
	if _, ok := s.SumAt(1000); !ok {
		t.Error("the running hash at the horizon is gone")
	}
}

// TestAddTwice: snapshots overlap with events and with each other.
func TestAddTwice(t *testing.T) {
	s := logOf(3)
	for range 3 {
		for _, sel := range matching(t) {
			s.Add(2, sel, revocation.Key(key(t, 5)))
		}
	}
	if got, want := s.Len(), len(matching(t))+1; got != want {
		t.Errorf("%d selectors, want %d", got, want)
	}
	sel := revocation.Everything()
	if n := testing.AllocsPerRun(1, func() {
		for range 1000 {
			s.Add(2, sel)
		}
	}); n != 0 {
		t.Errorf("adding it again allocated %v times: the set grows", n)
	}
	s.Forget(2)
	if s.Len() != 1 {
		t.Errorf("%d selectors are left, want the key alone", s.Len())
	}
	judge(t, s, chain(t, 0), revocation.Verdict{Reason: revocation.Alive})
	s.Forget(2)
	s.Forget(99)
}

// TestForgetKeepsNewer: forgetting one record leaves what another revokes.
func TestForgetKeepsNewer(t *testing.T) {
	for name, sel := range matching(t) {
		for _, order := range [][]uint64{{2, 4}, {4, 2}} { // events may be learnt in any order
			s := logOf(5)
			for _, seq := range order {
				s.Add(seq, sel)
			}
			s.Forget(2)
			if got := s.Judge(chain(t, 3)); got != (revocation.Verdict{Reason: revocation.Revoked, By: 4}) {
				t.Errorf("%s, learnt as %v: %+v after forgetting 2", name, order, got)
			}
		}
	}
}

func TestSubjectOf(t *testing.T) {
	sub := chain(t, 3)
	got := revocation.SubjectOf(&token.Claims{Position: sub.Position, Audience: sub.Audience, Lineage: sub.Lineage})
	if got.Position != sub.Position || got.Audience != sub.Audience || len(got.Lineage) != 2 {
		t.Errorf("SubjectOf = %+v", got)
	}
}

// TestJudgeAllocatesNothing: it runs in every request of every service.
func TestJudgeAllocatesNothing(t *testing.T) {
	s := bigSet(t, 1000)
	sub := deep(t)
	if n := testing.AllocsPerRun(100, func() { s.Judge(sub) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// deep is a subject of full depth.
func deep(t testing.TB) revocation.Subject {
	sub := revocation.Subject{Position: token.Position{Era: era}, Audience: "ledger"}
	for i := range token.MaxDepth {
		who := id(fmt.Sprintf("example.org/ns/prod/team/sa/service-%d", i))
		sub.Lineage = append(sub.Lineage, token.Member{Identity: who, Grant: grant(t, who, i), Key: key(t, i), SVID: svid(i)})
	}
	return sub
}

// bigSet holds n revocations of the usual kinds, none of which matches deep.
func bigSet(t testing.TB, n int) *revocation.Set {
	s := revocation.NewSet(era)
	for i := 1; i <= n; i++ {
		who := id(fmt.Sprintf("example.org/ns/dev/sa/gone-%d", i))
		sel := []revocation.Selector{
			revocation.Identity(who), revocation.Grant(grant(t, who, i)), revocation.SVID(token.Thumbprint{9, byte(i), byte(i >> 8), byte(i >> 16)}),
			must(revocation.Subtree(who.String() + "/*")), must(revocation.Audience(strings.Repeat("a", 5) + fmt.Sprint(i))),
		}[i%5]
		s.Know(uint64(i), sumAt(uint64(i)))
		s.Add(uint64(i), sel)
	}
	return s
}

// BenchmarkJudge: the cost depends on the lineage, not on what is revoked.
func BenchmarkJudge(b *testing.B) {
	for _, n := range []int{10, 100_000} {
		b.Run(fmt.Sprintf("%d revocations", n), func(b *testing.B) {
			s, sub := bigSet(b, n), deep(b)
			b.ReportAllocs()
			for b.Loop() {
				if s.Judge(sub).Reason != revocation.Alive {
					b.Fatal("dead")
				}
			}
		})
	}
}

// BenchmarkSetHorizon: a step costs what it passes.
func BenchmarkSetHorizon(b *testing.B) {
	s := bigSet(b, 100_000)
	b.ReportAllocs()
	for i := uint64(1); b.Loop(); i++ {
		s.SetHorizon(i)
	}
}
