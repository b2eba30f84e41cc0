package broker_test

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/vouch"
	"github.com/dayflyhq/dayfly/sdk/spiffetest"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// signed follows and asks for signed heads.
func (w *world) signed(instance string, relay bool) *broker.Follower {
	w.t.Helper()
	f, err := w.b.Subscribe(ctx, w.caller("orders"), broker.Subscriber{
		Instance: instance, Audiences: []string{"orders"}, MaxStaleness: time.Second, Relay: relay, SignedHeads: true,
	})
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(f.Close)
	return f
}

// proven checks an answer as one behind a relay does.
func (w *world) proven(nonce string, p broker.Proof) feed.HeadStatement {
	w.t.Helper()
	s, err := feed.VerifyAnswer(nonce, p.Signed, p.Path, func(h feed.SignedHead) (feed.HeadStatement, error) {
		return vouch.VerifyHead(issuer, h, w.td, spiffeid.MatchID(brokerID), w.clock.Now())
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return s
}

// TestSignedHeads: the pings that wait for the same proof share one signature, and each
// has its own place under it. The proof begins after the ping.
func TestSignedHeads(t *testing.T) {
	w := newWorld(t)
	type answer struct {
		nonce string
		proof broker.Proof
		err   error
	}
	var relays []*broker.Follower
	for i := range 6 {
		relays = append(relays, w.signed(fmt.Sprintf("instance-%d", i), true))
	}
	answers := make(chan answer, len(relays))
	ask := func(f *broker.Follower, nonce string) {
		p, err := f.Answer(ctx, nonce)
		answers <- answer{nonce, p, err}
	}
	entered, release := make(chan struct{}), make(chan struct{})
	first := true
	w.store.set(func(s *tap) {
		s.observe = func(o []broker.Observation) error {
			if len(o) == 0 && first {
				first = false
				close(entered)
				<-release
			}
			return nil
		}
	})
	go ask(relays[0], "nonce-of-0")
	<-entered
	for i, f := range relays[1:] {
		go ask(f, fmt.Sprintf("nonce-of-%d", i+1))
	}
	for w.b.Waiting() < 5 {
		time.Sleep(time.Millisecond)
	}
	rec := w.revoke(broker.LockNone, revocation.Identity(id("payments"))) // after the first proof began
	close(release)
	statements := map[uint64]int{}
	for range relays {
		a := <-answers
		if a.err != nil {
			t.Fatal(a.err)
		}
		s := w.proven(a.nonce, a.proof)
		statements[s.Head.Seq]++
		if s.Age != 0 || !s.SignedAt.Equal(w.clock.Now()) || s.Head != a.proof.Head || s.Horizon != a.proof.Horizon {
			t.Errorf("%+v for %+v", s, a.proof)
		}
	}
	if n := len(w.headsSigned()); n != 2 {
		t.Errorf("%d signatures for 6 pings in 2 batches", n)
	}
	if statements[rec.Seq] < 5 {
		t.Errorf("pings sent after record %d was durable were answered with %v", rec.Seq, statements)
	}
}

// A log's key set in a statement is what one who has the log finds too.
func TestSignedKeySet(t *testing.T) {
	w := newWorld(t)
	old := w.public.ID
	w.newKey()
	w.revoke(broker.LockNone, revocation.Key(old))
	f := w.signed("instance-relay", true)
	p, err := f.Answer(ctx, "nonce-of-it")
	if err != nil {
		t.Fatal(err)
	}
	var screen feed.Screen
	var view feed.View
	d, ok, _ := f.Next(100)
	if !ok {
		t.Fatal("nothing to deliver")
	}
	if _, err := screen.Deliver(&view, d); err != nil {
		t.Fatal(err)
	}
	out, err := screen.Signed(&view, w.proven("nonce-of-it", p))
	if err != nil || len(out) != 1 || out[0].Position != w.b.Head() {
		t.Fatalf("proven %+v, %v", out, err)
	}
}

// Who doesn't ask gets none and costs no signature; a verifier that only keeps it gets one
// at first and for each new head, a relay each time.
func TestSignedHeadsWhenAsked(t *testing.T) {
	w := newWorld(t)
	ask := func(f *broker.Follower) bool {
		t.Helper()
		p, err := f.Answer(ctx, "nonce-of-it")
		if err != nil {
			t.Fatal(err)
		}
		if p.Head.Era == 0 || p.Horizon.Era == 0 {
			t.Errorf("answered with %+v", p)
		}
		return len(p.Signed.Statement) > 0
	}
	if ask(w.follow("orders", "instance-plain", time.Second)) || len(w.headsSigned()) != 0 {
		t.Error("one who didn't ask got a signed head")
	}
	relay, verifier := w.signed("instance-relay", true), w.signed("instance-verifier", false)
	got := []bool{ask(verifier), ask(verifier), ask(relay), ask(relay)}
	w.revoke(broker.LockNone, revocation.Identity(id("payments")))
	got = append(got, ask(verifier), ask(verifier))
	if want := []bool{true, false, true, true, true, false}; fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("got %v, want %v", got, want)
	}

	// Without an SVID to sign with the relay itself is answered.
	w.mu.Lock()
	w.headErr = errors.New("no SVID")
	w.mu.Unlock()
	if ask(relay) {
		t.Error("a signed head without a signature")
	}
}

// show subscribes with a signed head that was kept.
func (w *world) show(h feed.SignedHead) *broker.Follower {
	w.t.Helper()
	f, err := w.b.Subscribe(ctx, w.caller("orders"), broker.Subscriber{
		Instance: "instance-shows", Audiences: []string{"orders"}, MaxStaleness: time.Second, NewestHead: h,
	})
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(f.Close)
	return f
}

// head signs for a position.
func (w *world) head(by string, forIssuer string, p feed.Position) feed.SignedHead {
	w.t.Helper()
	svid, err := w.td.IssueSVID(id(by), spiffetest.SVIDOptions{})
	if err != nil {
		w.t.Fatal(err)
	}
	h, err := vouch.SignHead(svid, forIssuer, feed.HeadStatement{Head: p, Horizon: feed.Position{Era: p.Era}, SignedAt: w.clock.Now()})
	if err != nil {
		w.t.Fatal(err)
	}
	return h
}

// TestSilence: only a head that a broker signed, and that this log lacks, silences it; it
// then issues nothing and answers no ping, and revokes.
func TestSilence(t *testing.T) {
	w := newWorld(t)
	w.revoke(broker.LockNone, revocation.Identity(id("payments")))
	at := w.b.Head()
	moved := func(f func(*feed.Position)) feed.Position {
		p := at
		f(&p)
		return p
	}
	above := moved(func(p *feed.Position) { p.Seq += 5 })
	other := moved(func(p *feed.Position) { p.Sum[0]++ })
	for name, h := range map[string]feed.SignedHead{
		"none":               {},
		"this very head":     w.head("dayfly/broker", issuer, at),
		"an earlier one":     w.head("dayfly/broker", issuer, moved(func(p *feed.Position) { p.Seq = 1; p.Sum = w.sumAt(1) })),
		"of an earlier era":  w.head("dayfly/broker", issuer, moved(func(p *feed.Position) { p.Era--; p.Seq += 99 })),
		"of a workload":      w.head("orders", issuer, above),
		"for another issuer": w.head("dayfly/broker", "https://other.example.org", above),
		"nonsense":           {Statement: []byte("nonsense"), Signature: []byte("x"), Certificates: [][]byte{{1}}},
	} {
		f := w.show(h)
		if s := w.b.Silent(); s != nil {
			t.Fatalf("%s silences: %+v", name, s)
		}
		if _, err := f.Answer(ctx, "nonce-of-it"); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		f.Close()
	}
	for name, p := range map[string]feed.Position{
		"a higher number": above, "another history": other, "a later era": moved(func(p *feed.Position) { p.Era++; p.Seq = 2 }),
	} {
		t.Run(name, func(t *testing.T) {
			w.restart()
			if w.b.Silent() != nil {
				t.Fatal("silent from the start")
			}
			subject := w.issue(w.caller("payments"), "spiffe://example.org/orders")
			f := w.show(w.head("dayfly/broker", issuer, p))
			s := w.b.Silent()
			if s == nil || s.Head != p || s.ShownBy != "spiffe://example.org/orders" || !s.SignedAt.Equal(w.clock.Now()) {
				t.Fatalf("silence %+v", s)
			}
			if e := w.last(); e.Action != broker.ActionFollow || e.Outcome != "allowed" {
				t.Errorf("the audit ends with %+v", e)
			}
			alerts := 0
			for _, e := range w.entries() {
				if e.Alert && e.Reason == "LOG_BEHIND_SIGNED_HEAD" && strings.Contains(e.Message, p.String()) {
					alerts++
				}
			}
			if alerts != 1 {
				t.Errorf("%d alerts in the audit", alerts)
			}
			_, err := w.b.Issue(ctx, w.caller("payments"), broker.Request{Audience: "orders"})
			if e := w.last(); e.Grant != "" {
				t.Errorf("a silent broker made grant %s", e.Grant)
			}
			if r := refused(t, err, broker.ErrLogBehind); r.Metadata["signed_head"] != p.String() {
				t.Errorf("metadata %v", r.Metadata)
			}
			_, err = w.b.Exchange(ctx, w.caller("orders"), broker.Request{Audience: "ledger", Subject: subject.Token})
			refused(t, err, broker.ErrLogBehind)
			_, err = f.Answer(ctx, "nonce-of-it")
			refused(t, err, broker.ErrLogBehind)
			_, err = w.signed("instance-relay", true).Answer(ctx, "nonce-of-it")
			refused(t, err, broker.ErrLogBehind)
			rec := w.revoke(broker.LockNone, revocation.Identity(id("other")))
			if got := drain(t, f, &feed.View{}); got.Seq != rec.Seq {
				t.Errorf("delivered up to %s, revoked at %d", got, rec.Seq)
			}
		})
	}

	// An operator has looked.
	w.disregard = feed.Position{Era: at.Era, Seq: above.Seq}
	w.restart()
	w.show(w.head("dayfly/broker", issuer, above)).Close()
	if s := w.b.Silent(); s != nil {
		t.Errorf("what is disregarded silences: %+v", s)
	}
	w.issue(w.caller("payments"), "orders")
	w.show(w.head("dayfly/broker", issuer, moved(func(p *feed.Position) { p.Seq = w.b.Head().Seq + 50 }))).Close()
	if w.b.Silent() == nil {
		t.Error("a higher one than what is disregarded doesn't silence")
	}
}

// sumAt is the running hash at a number.
func (w *world) sumAt(seq uint64) feed.Sum {
	w.t.Helper()
	var view feed.View
	drain(w.t, w.follow("orders", "instance-sums", time.Second), &view)
	at, ok := view.Log().At(seq)
	if !ok {
		w.t.Fatalf("no number %d", seq)
	}
	return at.Sum
}

// An older file is put back, and run on until its head passes what verifiers knew.
func TestSilenceOnOldStore(t *testing.T) {
	w := newWorld(t)
	w.stop()
	old, err := os.ReadFile(w.path)
	if err != nil {
		t.Fatal(err)
	}
	w.start()
	w.revoke(broker.LockQuarantine, revocation.Identity(id("payments")))
	p, err := w.signed("instance-keeps", false).Answer(ctx, "nonce-of-it")
	if err != nil {
		t.Fatal(err)
	}
	var kept feed.Newest
	kept.Note(p.Signed)
	w.clock.advance(3 * time.Hour) // the SVID that signed is long dead
	for _, goesOn := range []int{0, 4} {
		w.stop()
		if err := os.WriteFile(w.path, old, 0o600); err != nil {
			t.Fatal(err)
		}
		w.start()
		for i := range goesOn {
			w.revoke(broker.LockNone, revocation.Identity(id(fmt.Sprint("other-", i))))
		}
		w.show(kept.Signed).Close()
		if s := w.b.Silent(); s == nil || s.Head != kept.Head {
			t.Errorf("after %d records of its own: silence %+v, want for %s", goesOn, s, kept.Head)
		}
	}
}
